"""What each version of the GEMM reads from global memory, counted exactly, on any machine. For lessons and tests.

The kernels' own source runs in numba's CUDA simulator, in a process of its own: numba decides once, when it is imported,
whether kernels are simulated. Counted are reads of the weight (codes, scales, offsets) and of the activations; the constants
of outputs and tokens, and the results, are a few bytes more and the same for all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    import pandas as pd

VERSIONS = ("v1", "v2", "v3", "v4", "v5")


def count(m: int = 8, n: int = 64, k: int = 128, versions: tuple[str, ...] = VERSIONS, seconds: float = 300) -> pd.DataFrame:
    """Run ``[m, k] x [n, k]`` (groups of 128, or of K if that is less) by several versions and count what they read.

    One row a version: ``version``, ``threads`` in all, ``weight_reads`` and ``weight_bytes``, ``activation_reads`` and
    ``activation_bytes``, and whether the result is ``equal`` to `qoqlab.reference`, bit for bit. Small shapes only: the
    simulator runs some ten thousand instructions a second.

    Raises ValueError for an unknown version or a shape that the kernels do not take, and RuntimeError if the simulator fails
    or takes longer than ``seconds``.
    """
    import pandas as pd

    unknown = [version for version in versions if version not in VERSIONS]
    if unknown:
        raise ValueError(f"versions: {unknown[0]!r} is not one of {', '.join(VERSIONS)}")
    if min(m, n, k) < 1 or n % 32 or k % 32 or m * n * k > 1 << 17:
        raise ValueError(f"m, n, k: n and k are multiples of 32 and m * n * k at most {1 << 17}, got {m}, {n}, {k}")
    folders = [str(Path(__file__).parents[1]), *sys.path]
    run = subprocess.run(
        [sys.executable, "-m", "qoqlab_kernels.microscope", str(m), str(n), str(k), *versions],
        env=os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": os.pathsep.join(filter(None, folders))},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    if run.returncode:
        raise RuntimeError(f"the simulator ended with {run.returncode}: {run.stderr.strip().splitlines()[-1:]}")
    return pd.DataFrame(json.loads(run.stdout))


class Counter:
    """Counts reads that fall into the memory of named arrays."""

    def __init__(self, **arrays: Any) -> None:
        self.places = {name: (a.ctypes.data, a.ctypes.data + a.nbytes) for name, a in arrays.items()}
        self.reads, self.bytes = dict.fromkeys(arrays, 0), dict.fromkeys(arrays, 0)

    def see(self, address: int, size: int) -> None:
        """Note a read of ``size`` bytes."""
        for name, (start, end) in self.places.items():
            if start <= address < end:
                self.reads[name] += 1
                self.bytes[name] += size


def watched(program: Any, grid: tuple[int, int, int], arguments: list[Any]) -> Counter:
    """`launch.simulate`, with the reads of its first two arguments, weight and activations, counted."""
    import torch
    from numba import cuda
    from numba.cuda.simulator.cudadrv.devicearray import FakeWithinKernelCUDAArray

    from . import simulation

    # device arrays are passed on as they are, so their addresses are known beforehand
    call = [cuda.to_device(v.reshape(-1).numpy()) if isinstance(v, torch.Tensor) else v for v in arguments]
    counter = Counter(weight=call[0]._ary, activation=call[1]._ary)
    item, block = FakeWithinKernelCUDAArray.__getitem__, simulation.Block.global_bytes

    def element(self: Any, at: Any) -> Any:
        array = self._item._ary
        if array.ndim == 1:  # arrays in shared memory have two dimensions
            counter.see(array.ctypes.data + int(at) * array.itemsize, array.itemsize)
        return item(self, at)

    def words(self: Any, at: int, size: int, align: int) -> Any:
        counter.see(int(at), int(size))
        return block(self, at, size, align)

    with (
        simulation.running(program.cluster, program.shared),
        mock.patch.object(FakeWithinKernelCUDAArray, "__getitem__", element),
        mock.patch.object(simulation.Block, "global_bytes", words),
    ):
        cuda.jit(program.function)[grid, program.threads, 0, program.shared](*call)
    for tensor, array in zip(arguments, call, strict=True):
        if isinstance(tensor, torch.Tensor):
            tensor.reshape(-1).numpy()[:] = array.copy_to_host()
    return counter


def measure(m: int, n: int, k: int, version: str) -> dict[str, Any]:
    """One version in this process, which has to be simulating."""
    import numpy as np
    import torch

    from qoqlab import reference

    from . import cases, gemm, launch, layout, matmul
    from .plan import Plan

    w = cases.weight(n, k, "g128" if k % 128 == 0 else "g32")
    a = cases.activations(m, k)
    x, packed = layout.tile_activations(a.codes, a.scales), layout.pack_weight(w)
    plan = Plan(version, tokens=8, stages=2) if version in ("v4", "v5") else Plan(version)
    form, out = gemm.Form(packed.groups), torch.zeros(m, n, dtype=torch.float16)
    counters: list[Counter] = []

    def simulate(program: Any, grid: tuple[int, int, int], arguments: list[Any]) -> None:
        counters.append(watched(program, grid, [v if isinstance(v, torch.Tensor) else np.uint32(v) for v in arguments]))

    with mock.patch.object(launch, "simulate", simulate):
        matmul.run(plan, form, x, packed, None, out)
    (counter,) = counters
    grid = plan.grid(m, n)
    program = gemm.VERSIONS[version](*plan.constants(form))
    return {
        "version": version,
        "threads": int(grid[0] * grid[1] * grid[2] * program.threads),
        "weight_reads": counter.reads["weight"],
        "weight_bytes": counter.bytes["weight"],
        "activation_reads": counter.reads["activation"],
        "activation_bytes": counter.bytes["activation"],
        "equal": bool(torch.equal(out, reference.w4a8_matmul(a, w))),
    }


def main(arguments: list[str]) -> None:
    """What `count` runs: ``M N K VERSION ...`` -> a JSON list of rows on standard output."""
    import warnings

    import torch

    warnings.simplefilter("ignore", RuntimeWarning)  # 32-bit words wrap, as they should
    torch.set_num_threads(1)
    m, n, k = map(int, arguments[:3])
    print(json.dumps([measure(m, n, k, version) for version in arguments[3:]]))


if __name__ == "__main__":
    main(sys.argv[1:])
