"""Time the element-wise kernels beside the copy bandwidth.

    python -m qoqlab_kernels.bench elementwise --json data/benchmarks/elementwise.json

Every result is compared with `qoqlab.reference`, bit for bit, before it is timed. ``bound`` is the least bytes over the
bandwidth of a large copy, ``share`` the bound over the time. Operands rotate beyond the L2 cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qoqlab import reference
from qoqlab.affine import Affine, quantize_per_token_s8

from . import cases, elementwise, fused, launch, matmul, measure
from .layout import Activations, tile_activations

MODULE = "qoqlab_kernels.bench"
EPS = 1e-5
BATCHES = (1, 16, 64, 256, 1024, 4096)
#: Widths of an 8-billion-parameter Llama: hidden states; the input of its down projection.
WIDTHS = (4096, 14336)
#: kernel -> bytes a token and input: read, written. Row sums, scales and gains hardly count.
KERNELS = {"quantize": (2, 1), "norm": (2, 1), "add_norm": (4, 3), "silu": (4, 1)}


def calls(kernel: str, operands: tuple) -> Callable[[], Any]:
    """The kernel on one set of operands, outputs allocated by torch."""
    x, residual, weight, gate_up = operands
    found: dict[str, Callable[[], Any]] = {
        "quantize": partial(matmul.quantize_activations, x),
        "norm": partial(fused.rms_norm_s8, x, weight, EPS),
        "add_norm": partial(fused.add_rms_norm_s8, x, residual, weight, EPS),
        "silu": partial(fused.silu_mul_s8, gate_up),
    }
    return found[kernel]


def expected(kernel: str, operands: tuple) -> tuple[Affine, torch.Tensor | None]:
    """What the kernel must give."""
    x, residual, weight, gate_up = operands
    if kernel == "add_norm":
        return reference.add_rms_norm_s8(x, residual, weight, EPS)
    if kernel == "silu":
        return reference.silu_mul_s8(gate_up), None
    return (reference.rms_norm_s8(x, weight, EPS) if kernel == "norm" else quantize_per_token_s8(x)), None


def check(kernel: str, operands: tuple) -> None:
    """Raise `measure.WrongResult` unless the kernel gives exactly the reference's result."""
    got, (want, total) = calls(kernel, operands)(), expected(kernel, operands)
    made: Activations = got[0] if isinstance(got, tuple) else got
    tiled = tile_activations(want.codes, want.scales)
    right = torch.equal(made.tiles, tiled.tiles) and torch.equal(made.tokens, tiled.tokens)
    if not right or (total is not None and not torch.equal(got[1], total)):
        raise measure.WrongResult(
            f"{kernel}: {int((made.codes != want.codes).sum())} of {want.codes.numel()} codes are wrong"
        )


def measured(
    kernels: Sequence[str], batches: Sequence[int], widths: Sequence[int], dtype: torch.dtype, bandwidth: float
) -> Iterator[dict[str, Any]]:
    """Every point in turn."""
    cache_bytes = torch.cuda.get_device_properties().L2_cache_size
    for kernel in kernels:
        for k in widths:
            for m in batches:
                moved = sum(KERNELS[kernel]) * m * k
                count = min(64, measure.copies(moved, cache_bytes))
                sets = [cases.elementwise_operands(m, k, dtype, seed, "cuda") for seed in range(count)]
                check(kernel, sets[0])
                bound = moved / bandwidth * 1e6
                us = measure.graph_time([calls(kernel, s) for s in sets], bound + 2)
                yield {
                    "op": "elementwise",
                    "kernel": kernel,
                    "dtype": str(dtype).removeprefix("torch."),
                    "m": m,
                    "k": k,
                    "us": us,
                    "bound_us": bound,
                    "tb_per_s": moved / us / 1e6,
                    "share": bound / us,
                }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Every point."""
    names = ["kernel", "m", "k", "us", "bound_us", "tb_per_s", "share"]
    return measure.table(names, [[r[name] for name in names] for r in results])


def compile_all(widths: Sequence[int], batches: Sequence[int], dtype: torch.dtype) -> None:
    """Compile what a run needs beforehand; from disk the second time."""
    capability, processors, _ = matmul._gpu(torch.cuda.current_device())
    for operation in elementwise.OPERATIONS:
        for k in widths:
            for threads in {fused.threads_for(m, k, processors) for m in batches}:
                constants = (operation, matmul.KINDS[dtype], k, threads, True, capability >= (9, 0))
                launch.kernel(elementwise.elementwise, constants, torch.cuda.current_device())


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE} elementwise", description="Time the element-wise kernels.")
    parser.add_argument("--m", default=",".join(map(str, BATCHES)), help="numbers of tokens, separated by commas")
    parser.add_argument("--k", default=",".join(map(str, WIDTHS)), help="widths, separated by commas")
    parser.add_argument("--kernels", default=",".join(KERNELS), help=f"of {', '.join(KERNELS)}, separated by commas")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--json", type=Path, help="write the record here")
    parser.add_argument("--commit", default="", help="recorded where the code runs outside a git checkout")
    known = parser.parse_args(list(arguments))
    try:
        batches, widths = measure.numbers(known.m, "--m"), measure.numbers(known.k, "--k")
        kernels = measure.choices(known.kernels, "--kernels", list(KERNELS))
    except ValueError as error:
        parser.error(str(error))
    command = measure.command_line(MODULE, ["elementwise", *arguments])

    def work() -> None:
        measure.require_gpu()
        dtype = getattr(torch, known.dtype)
        compile_all(widths, batches, dtype)
        bandwidth, how = measure.measure_bandwidth()
        results = list(measured(kernels, batches, widths, dtype, bandwidth))
        print(table(results))
        print(f"\n{torch.cuda.get_device_name()}: {bandwidth / 1e12:.2f} TB/s ({how})", flush=True)
        if known.json:
            more = {"bandwidth": {"bytes_per_s": bandwidth, "source": how}}
            measure.write_record(known.json, measure.record(command, known.commit, results, **more))

    return measure.guarded(MODULE, work)
