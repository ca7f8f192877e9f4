"""How benchmarks measure: ceilings of the card, timing, rotation of operands, records and tables.

A time is the median over replays of a CUDA graph that runs an operation many times, each time on other operands: the cost of
launching stays out, and the L2 cache cannot help. Beside every time stands the bound: the least bytes over the copy
bandwidth, or the operations over the integer rate, whichever is longer, both measured on the same card in the same run.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from numba import cuda, types

from . import gemm, launch, ptx
from .launch import Program
from .plan import Plan
from .ptx import u32, u64

#: How far operands rotate, in sizes of the L2 cache.
ROTATION = 2
#: Packages whose versions decide what was measured.
PACKAGES = ("torch", "numba", "numba-cuda", "nvidia-nvjitlink")


class Unavailable(Exception):
    """What a measurement needs is not there; the message says what."""


class WrongResult(Exception):
    """A kernel did not compute what the reference does: its time means nothing."""


def require_gpu() -> tuple[int, int]:
    """Compute capability of the current GPU. Raises `Unavailable` where there is none that the kernels run on."""
    if ptx.SIMULATED:
        raise Unavailable("NUMBA_ENABLE_CUDASIM is set: the simulator's times mean nothing; unset it")
    if not torch.cuda.is_available():
        raise Unavailable("no CUDA GPU here: these measurements need one of compute capability 8.0 or newer")
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        raise Unavailable(f"compute capability {capability[0]}.{capability[1]}: the kernels need 8.0 or newer")
    return capability


# -- bounds ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """What the card can do at best: bytes per second read and written, integer operations per second, and how both were
    found out."""

    bytes_per_s: float
    ops_per_s: float
    sources: tuple[str, str]

    def bound(self, size: float, ops: float) -> float:
        """Microseconds below which moving ``size`` bytes and computing ``ops`` cannot go."""
        return max(size / self.bytes_per_s, ops / self.ops_per_s) * 1e6


def gemm_bytes(m: int, n: int, k: int, group_size: int) -> int:
    """The least that a W4A8 product moves: codes, a scale and an offset byte per group, fp16 scales (per channel zeros too),
    INT8 activations with scale and sum, fp16 results; each once."""
    scales = 2 * n * k // group_size + 2 * n if group_size else 4 * n
    return n * k // 2 + scales + m * k + 6 * m + 2 * m * n


def gemm_ops(m: int, n: int, k: int) -> int:
    """Multiplications and additions of a product."""
    return 2 * m * n * k


def int8_rate(tokens: int) -> Program:
    """Two warpgroups a block multiply the same registers and the same shared memory over and over: wgmma's rate on int8.

    ``source``: at least 128 * max(tokens, 128) random bytes.
    """
    zeros, start, wait = ptx.zeros(tokens // 2), ptx.wgmma(tokens), ptx.wgmma_wait(tokens, 1)
    finish = ptx.wgmma_wait(tokens, 0)

    def kernel(source: Any, out: Any, rounds: Any) -> None:
        thread = u32(cuda.threadIdx.x)
        barrier = u32((ptx.shared_base() + u32(1023)) & u32(0xFFFFFC00))
        tile = barrier + u32(1024)
        if thread == u32(0):
            ptx.barrier_init(barrier, u32(1))
            ptx.barrier_fence()
        cuda.syncthreads()
        if thread == u32(0):
            ptx.barrier_expect(barrier, u32(tokens * 128))
            ptx.bulk_load(tile, ptx.address(source), u32(tokens * 128), barrier)
        ptx.barrier_wait(barrier, u32(0))
        at = ptx.address(source) + u64(thread) * u64(16)
        a0, a1, a2, a3 = ptx.ldg4(at), ptx.ldg4(at + u64(4096)), ptx.ldg4(at + u64(8192)), ptx.ldg4(at + u64(12288))
        a = a0 + a1 + a2 + a3
        acc = zeros()
        for _ in range(rounds):
            acc = wait(start(acc, a, gemm.descriptor(tile)))
        acc = finish(acc)
        place = ptx.address(out) + u64(u32(cuda.blockIdx.x) * u32(256) + thread) * u64(16)
        ptx.stg4(place, u32(acc[0]), u32(acc[1]), u32(acc[2]), u32(acc[3]))

    return Program(kernel, (types.Array(ptx.u8, 1, "C"), types.Array(u32, 1, "C"), u32), 256, 2048 + tokens * 128)


def measure_int8_rate(capability: tuple[int, int]) -> tuple[float, str]:
    """Integer operations per second on random data, and how they were measured."""
    if capability == (9, 0):
        tokens, rounds, blocks = 256, 2000, torch.cuda.get_device_properties().multi_processor_count
        source = torch.randint(256, (128 * tokens,), dtype=torch.uint8, device="cuda")
        out = torch.empty(blocks * 256 * 4, dtype=torch.int32, device="cuda")
        kernel = launch.kernel(int8_rate, (tokens,), torch.cuda.current_device())
        us = graph_time([lambda: kernel((blocks, 1, 1), [source, out, rounds])], replays=9)
        return 2 * 2 * 64 * tokens * 128 * rounds * blocks / us * 1e6, "measured: wgmma m64n256k32 u8 x s8, no data movement"
    size = 8192
    x, w = (torch.randint(-128, 128, (size, size), dtype=torch.int8, device="cuda") for _ in range(2))
    us = graph_time([lambda: torch._int_mm(x, w.T)], replays=9)
    return gemm_ops(size, size, size) / us * 1e6, f"measured: torch._int_mm of {size}^3"


def measure_bandwidth() -> tuple[float, str]:
    """Bytes read and written per second by a large device-to-device copy, and how they were measured."""
    size = 1 << 31
    source, to = (
        torch.randint(256, (size,), dtype=torch.uint8, device="cuda"),
        torch.empty(size, dtype=torch.uint8, device="cuda"),
    )
    us = graph_time([lambda: to.copy_(source)], replays=9)
    return 2 * size / us * 1e6, "measured: device-to-device copy of 2 GiB, bytes read and written"


def measure_ceilings(capability: tuple[int, int]) -> Ceilings:
    """Both ceilings of the current GPU."""
    (bandwidth, how), (rate, and_how) = measure_bandwidth(), measure_int8_rate(capability)
    return Ceilings(bandwidth, rate, (how, and_how))


# -- time -----------------------------------------------------------------------------------------------------------------


def copies(set_bytes: int, cache_bytes: int) -> int:
    """How many sets of operands to rotate so that a set has left the cache before its turn comes again; at least 2."""
    return max(2, -(-ROTATION * cache_bytes // set_bytes) + 1)


def rounds_for(calls: int, about_us: float, aim_us: float = 2000.0) -> int:
    """How often a graph goes through all ``calls`` so that it runs for about ``aim_us``; 1 to 16."""
    return min(16, max(1, round(aim_us / (about_us * calls))))


def checked_time(
    calls: Sequence[Callable[[], Any]],
    outputs: Sequence[torch.Tensor],
    problem: Callable[[torch.Tensor], str],
    about_us: float,
) -> float:
    """Microseconds per call, after every call was right into poisoned memory, and again while timed.

    ``problem``: what is wrong with an output, "" if nothing is. Raises `WrongResult` with its words.
    """
    us = 0.0
    for when in ("before", "while"):
        for out in outputs:
            out.fill_(torch.nan)
        if when == "before":
            for call in calls:
                call()
        else:
            us = graph_time(calls, about_us)
        for found in map(problem, outputs):
            if found:
                raise WrongResult(f"{found} {when} timing")
    return us


def graph_time(calls: Sequence[Callable[[], Any]], about_us: float = 1e9, replays: int = 15) -> float:
    """Microseconds per call: median over replays of a CUDA graph that makes the ``calls`` in turn."""
    for call in calls:  # compiled, loaded and warm before the capture
        call()
    torch.cuda.synchronize()
    rounds, graph = rounds_for(len(calls), about_us), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    for _ in range(2):
        graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times) * 1e3 / (rounds * len(calls))


# -- compilation ----------------------------------------------------------------------------------------------------------


def _compile(version: str, constants: tuple, capability: tuple[int, int]) -> str:
    try:
        launch.binary(gemm.VERSIONS[version], constants, capability)
    except Exception as error:  # whatever the compiler says: this candidate is none
        return f"{type(error).__name__}: {error}"
    return ""


def compile_ahead(
    wanted: Iterable[tuple[Plan, gemm.Form]], capability: tuple[int, int], processes: int = 0
) -> dict[tuple[str, tuple], str]:
    """Compile the kernels of plans into the disk cache, in parallel. Returns what would not compile: (version, constants) ->
    message. ``processes`` 0: one a core."""
    jobs = list(dict.fromkeys((plan.version, plan.constants(form)) for plan, form in wanted))
    count = min(processes or os.cpu_count() or 1, len(jobs))
    if count <= 1:
        messages = [_compile(*job, capability) for job in jobs]
    else:
        with ProcessPoolExecutor(count, get_context("spawn")) as pool:
            messages = list(pool.map(_compile, *zip(*jobs, strict=True), [capability] * len(jobs)))
    return {job: message for job, message in zip(jobs, messages, strict=True) if message}


# -- records and tables ---------------------------------------------------------------------------------------------------


def _commit() -> str:
    """Commit of the checkout that this file lies in, empty where there is none."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return found.stdout.strip()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def record(command: Sequence[str], commit: str, results: list[dict], **more: object) -> dict[str, Any]:
    """A benchmark's file: where, when, of what and how it was measured, then a row per point."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "date": date.today().isoformat(),
        "commit": commit or _commit(),
        "command": shlex.join(command),
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda or ""}
        | {package: _version(package) for package in PACKAGES},
        **more,
        "results": results,
    }


def ceilings_record(ceilings: Ceilings) -> dict[str, Any]:
    """Ceilings as a record keeps them."""
    return asdict(ceilings) | {"sources": dict(zip(("bytes_per_s", "ops_per_s"), ceilings.sources, strict=True))}


def write_record(path: Path, content: dict[str, Any]) -> None:
    """Write a record as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def cell(value: object) -> str:
    """A number as tables show it: three significant digits, ``-`` for what was not measured."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return str(value)


def table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns of text, numbers to the right."""
    texts = [list(names), *([cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in texts) for i in range(len(names))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in texts)


def numbers(text: str, name: str) -> tuple[int, ...]:
    """``"1,16,64"`` -> (1, 16, 64). Raises ValueError naming the option for anything but positive numbers."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{name}: expected positive numbers separated by commas, got {text!r}")
    return tuple(dict.fromkeys(int(part) for part in parts))


def choices(text: str, name: str, known: Sequence[str]) -> tuple[str, ...]:
    """``"a,b"`` -> ("a", "b"). Raises ValueError naming the option for what is not known."""
    parts = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for part in parts:
        if part not in known:
            raise ValueError(f"{name}: {part!r} is not one of {', '.join(known)}")
    return parts


def command_line(module: str, arguments: Sequence[str]) -> list[str]:
    """How a module was called, as it is recorded."""
    return ["python", "-m", module, *arguments]


def guarded(module: str, work: Callable[[], None]) -> int:
    """Run a command; 0, or after one line on stderr 2 where something that it needs is missing, 1 for a wrong result."""
    try:
        work()
    except (Unavailable, WrongResult) as error:
        print(f"{module}: {error}", file=sys.stderr)
        return 2 if isinstance(error, Unavailable) else 1
    return 0
