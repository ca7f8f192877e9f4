"""From a Python kernel to a launch: compile with numba, link, keep the binary on disk, launch through the driver.

numba's own launcher knows neither clusters nor programmatic dependent launch and takes tens of microseconds with torch
tensors; this one takes a kernel's binary, torch tensors and integers, and torch's current stream.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from numba import cuda


def target(capability: tuple[int, int]) -> tuple:
    """What numba compiles for: ``(9, 0, "a")`` on Hopper, because wgmma and setmaxnreg exist only in the "a" target."""
    return (*capability, "a") if capability == (9, 0) else capability


def architecture(capability: tuple[int, int]) -> str:
    """What ptxas calls a compute capability: ``sm_80``, ``sm_90a``."""
    return "sm_" + "".join(map(str, target(capability)))


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``QOQLAB_CACHE``, else ``~/.cache/qoqlab``."""
    return Path(os.environ.get("QOQLAB_CACHE") or Path.home() / ".cache" / "qoqlab")


@dataclass(frozen=True)
class Program:
    """A kernel with all its constants chosen: the Python function, the types of its arguments, and how it is launched.

    ``threads`` a block; ``shared`` bytes of dynamic shared memory; ``cluster`` blocks; ``overlap``: may start before the
    previous kernel of the stream ends (it then waits inside, `ptx.wait_for_previous_kernel`); ``residents``: blocks for
    which a multiprocessor must have registers.
    """

    function: Callable
    signature: tuple
    threads: int
    shared: int = 0
    cluster: int = 1
    overlap: bool = False
    residents: int = 1


def to_ltoir(program: Program, capability: tuple[int, int]) -> bytes:
    """A program in the linker's intermediate language. Needs no GPU, but numba-cuda (RuntimeError without it).

    Not PTX: the linker compiles PTX as one unit of several, so it ignores ``setmaxnreg`` and runs every ``wgmma`` of a wide
    tile alone (its notes C7504 and C7512).
    """
    if not _installed("numba-cuda"):
        raise RuntimeError(
            'numba-cuda: not installed, and numba alone only simulates kernels; pip install "qoqlab[cu13]" '
            "(or cu12, by your driver), or set NUMBA_ENABLE_CUDASIM=1"
        )
    # device functions ask numba for "the current device": answer without one
    device = SimpleNamespace(compute_capability=capability)
    with mock.patch("numba.cuda.dispatcher.get_current_device", lambda: device):
        code, _ = cuda.compile(
            program.function,
            program.signature,
            device=False,
            abi="numba",
            cc=target(capability),
            output="ltoir",
            launch_bounds=(program.threads, program.residents),
        )
    return bytes(code)


def to_binary(code: bytes, capability: tuple[int, int]) -> tuple[bytes, str]:
    """Machine code of what `to_ltoir` made, and what the assembler reports: registers, spills, lost performance."""
    from cuda.core import Linker, LinkerOptions, ObjectCode

    options = LinkerOptions(arch=architecture(capability), link_time_optimization=True, ptxas_options=["-v"])
    linker = Linker(ObjectCode.from_ltoir(code), options=options)
    made = bytes(linker.link("cubin").code)
    return made, linker.get_info_log()


@functools.cache
def _sources() -> bytes:
    """Everything that determines a binary besides its constants."""
    texts = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    versions = [metadata.version(name) for name in ("numba-cuda", "nvidia-nvjitlink", "nvidia-nvvm") if _installed(name)]
    return hashlib.sha256(b"".join(texts) + repr(versions).encode()).digest()


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def binary_path(build: Callable[..., Program], constants: tuple, capability: tuple[int, int]) -> Path:
    """Where the machine code of ``build(*constants)`` is kept."""
    name = hashlib.sha256(_sources() + repr((build.__name__, constants, capability)).encode()).hexdigest()[:32]
    return cache_folder() / f"{build.__name__}-{name}.cubin"


def binary(build: Callable[..., Program], constants: tuple, capability: tuple[int, int]) -> tuple[Program, bytes]:
    """The program ``build(*constants)`` and its machine code, from disk if it was compiled before."""
    program, path = build(*constants), binary_path(build, constants, capability)
    if path.is_file():
        return program, path.read_bytes()
    code, report = to_binary(to_ltoir(program, capability), capability)
    if "Potential Performance Loss" in report:  # right results, but not the kernel that was measured
        warnings.warn(f"{build.__name__}{constants}: {report.strip()}", RuntimeWarning, stacklevel=2)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(code)
        part.replace(path)  # another process sees the whole file or none
    except OSError:
        pass  # a read-only home only costs the next process a compilation
    return program, code


def _check(result: tuple, what: str) -> Any:
    from cuda.bindings import driver

    if result[0] != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{what}: {result[0].name}")
    return result[1] if len(result) == 2 else result[1:]


@functools.cache
def _launcher() -> Callable[..., int]:
    """``cuLaunchKernelEx`` of the driver: the bindings take several times as long, since they copy the configuration."""
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1").cuLaunchKernelEx


def words_of(arguments: Sequence[torch.Tensor | int]) -> list[int]:
    """Kernel arguments as 64-bit words: a tensor as numba's one-dimensional array, an integer as it is."""
    words: list[int] = []
    for value in arguments:
        if isinstance(value, torch.Tensor):
            count, size = value.numel(), value.element_size()
            words += (0, 0, count, size, value.data_ptr(), count, size)
        else:
            words.append(value)
    return words


class Kernel:
    """A compiled program, loaded on one device, whose context is current."""

    def __init__(self, program: Program, code: bytes, name: str, device: int) -> None:
        from cuda.bindings import driver

        self.program, self.name, self.device, self._driver = program, name, device, driver
        self._module = _check(driver.cuModuleLoadData(code), f"{name}: loading")
        functions = _check(driver.cuModuleEnumerateFunctions(1, self._module), name)
        self.handle = functions[0]
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(
            driver.cuFuncSetAttribute(self.handle, attribute, program.shared),
            f"{name}: {program.shared} bytes of shared memory",
        )
        self._address, self._start = ctypes.c_void_p(int(self.handle)), _launcher()
        self._context = _check(driver.cuCtxGetCurrent(), name)
        self._threads = threading.local()

    @functools.lru_cache(maxsize=64)  # noqa: B019 (kernels live as long as the process)
    def _config(self, grid: tuple[int, int, int], stream: int) -> tuple[Any, ctypes.c_void_p]:
        """A launch's configuration and where it lies."""
        d, p = self._driver, self.program
        config = d.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = p.threads, 1, 1
        config.sharedMemBytes, config.hStream = p.shared, stream
        attributes = []
        if p.cluster > 1:
            cluster = d.CUlaunchAttribute()
            cluster.id = d.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z = p.cluster, 1, 1
            attributes.append(cluster)
        if p.overlap:
            overlap = d.CUlaunchAttribute()
            overlap.id = d.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            overlap.value.programmaticStreamSerializationAllowed = 1
            attributes.append(overlap)
        config.attrs, config.numAttrs = attributes, len(attributes)
        return config, ctypes.c_void_p(config.getPtr())

    def _room(self, count: int) -> tuple[Any, Any]:
        """This thread's room for arguments, and pointers to them."""
        if not hasattr(self._threads, "room"):
            _check(self._driver.cuCtxSetCurrent(self._context), self.name)  # a new thread has none
            values = (ctypes.c_uint64 * count)()
            start = ctypes.addressof(values)
            self._threads.room = values, (ctypes.c_void_p * count)(*range(start, start + 8 * count, 8))
        return self._threads.room

    def __call__(self, grid: tuple[int, int, int], arguments: Sequence[torch.Tensor | int]) -> None:
        """Launch on torch's current stream of the device."""
        words = words_of(arguments)
        values, pointers = self._room(len(words))
        values[:] = words
        status = self._start(self._config(grid, current_stream(self.device))[1], self._address, pointers, None)
        if status:
            raise RuntimeError(f"{self.name}: launching {grid}: {self._driver.CUresult(status).name}")


@functools.cache
def kernel(build: Callable[..., Program], constants: tuple, device: int) -> Kernel:
    """The kernel ``build(*constants)`` for a CUDA device, compiled and loaded once."""
    capability = torch.cuda.get_device_capability(device)
    with torch.cuda.device(device):  # makes torch's context current
        return Kernel(*binary(build, constants, capability), f"{build.__name__}{constants}", device)


def on(device: int) -> AbstractContextManager:
    """Torch's context of a device; nothing to do where it is current, as it mostly is."""
    return nullcontext() if device == torch.cuda.current_device() else torch.cuda.device(device)


def current_stream(device: int) -> int:
    """Handle of torch's current stream; a `torch.cuda.Stream` takes longer to make than a kernel to launch."""
    return torch._C._cuda_getCurrentRawStream(device)


def capture_id() -> int:
    """Number of the CUDA graph capture that the current stream is part of, 0 outside of captures."""
    if not torch.cuda.is_current_stream_capturing():
        return 0
    from cuda.bindings import driver

    stream = current_stream(torch.cuda.current_device())
    return int(_check(driver.cuStreamGetCaptureInfo(stream), "capture")[1])


def simulate(program: Program, grid: tuple[int, int, int], arguments: Sequence[torch.Tensor | int]) -> None:
    """Run a program in numba's CUDA simulator on CPU tensors (``NUMBA_ENABLE_CUDASIM=1`` before numba is imported)."""
    call = [v.detach().reshape(-1).numpy() if isinstance(v, torch.Tensor) else np.uint32(v) for v in arguments]
    from . import simulation

    with warnings.catch_warnings(), simulation.running(program.cluster, program.shared):
        # idle threads compute with memory that nobody wrote; integers wrap around, as on the GPU
        warnings.filterwarnings("ignore", "overflow encountered", RuntimeWarning)
        cuda.jit(program.function)[grid, program.threads, 0, program.shared](*call)
