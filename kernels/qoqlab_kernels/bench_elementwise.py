"""Benchmark of what lies between the GEMMs of a layer, beside its bound and torch's eager equivalent.

    python -m qoqlab_kernels.bench elementwise --json data/benchmarks/elementwise.json

Bound: the bytes that must be read and written over the copy bandwidth measured in the same run. Beside it the time of
torch's copy of as many bytes, which also has to start and to end. Every result is compared with `qoqlab.reference`, bit for
bit, before it is timed. Operands and results rotate (`SETS` sets at most: few tokens stay in the L2 cache, as between two
kernels of a model).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qoqlab import exact, reference
from qoqlab.affine import Affine, quantize_per_token_s8

from . import fused, matmul, measure
from .cache import PagedKV4
from .layout import Activations, blocks, tile_activations

MODULE = "qoqlab_kernels.bench"
BATCHES = (1, 16, 64, 256, 1024, 4096)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
EPS = 1e-5
#: Sets of operands that rotate at most.
SETS = 256
#: Aims for a model 4096 wide: microseconds of 16 tokens, share of copy bandwidth of 1024.
TARGET_US, TARGET_SHARE = 5.0, 0.7


@dataclass(frozen=True)
class Operation:
    """One fused kernel. ``run`` and ``eager`` take the operands that ``operands(m, k, dtype)`` makes; ``want`` gives what
    ``run`` must equal; ``bytes`` is what one output element costs, read and written."""

    k: int
    bytes: float
    operands: Callable[[int, int, torch.dtype], tuple]
    run: Callable[..., Any]
    want: Callable[..., Any]
    eager: Callable[..., Any]


def _numbers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def _eager_codes(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    scale = y.abs().amax(-1, keepdim=True) / 127
    codes = (y / scale).round().to(torch.int8)
    return codes, scale, codes.sum(-1, dtype=torch.int32)


def _eager_norm(x: torch.Tensor, weight: torch.Tensor) -> tuple:
    return _eager_codes(torch.nn.functional.rms_norm(x, weight.shape, weight, EPS))


def _eager_add_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple:
    total = x + residual
    return (*_eager_norm(total, weight), total)


def _eager_silu(gate_up: torch.Tensor) -> tuple:
    gate, up = gate_up.chunk(2, -1)
    return _eager_codes(torch.nn.functional.silu(gate) * up)


#: Query heads, key heads, size of a head.
HEADS = (32, 8, 128)


def _rope_operands(m: int, k: int, dtype: torch.dtype) -> tuple:
    """A cache with a page for each of ``m`` sequences, and a token at the same position of each."""
    _, kv_heads, dim = HEADS
    cache = PagedKV4(1, kv_heads, dim, pages=m, sequences=m, max_tokens=64, device="cuda")
    cache.tables[:, 0] = torch.arange(m, device="cuda")
    angles = torch.randn(64, dim // 2, device="cuda")
    slots = torch.arange(m, dtype=torch.int32, device="cuda")
    places = torch.full_like(slots, 21)
    return cache, slots, _numbers(m, k, dtype=dtype), angles.cos().to(dtype), angles.sin().to(dtype), places


def _prompt_operands(m: int, k: int, dtype: torch.dtype) -> tuple:
    """The same for the ``m`` tokens of one sequence."""
    _, kv_heads, dim = HEADS
    cache = PagedKV4(1, kv_heads, dim, pages=blocks(m, 64), sequences=1, max_tokens=m, device="cuda")
    cache.tables[0] = torch.arange(cache.tables.shape[1], device="cuda")
    angles = torch.randn(m, dim // 2, device="cuda")
    places = torch.arange(m, dtype=torch.int32, device="cuda")
    return cache, places * 0, _numbers(m, k, dtype=dtype), angles.cos().to(dtype), angles.sin().to(dtype), places


def _rope(cache: PagedKV4, slots: torch.Tensor, qkv: torch.Tensor, *tables: torch.Tensor) -> tuple:
    return fused.rope_kv4_append(cache, 0, slots, qkv, *tables)


def _turned(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    heads, kv_heads, dim = HEADS
    x, rows = qkv.unflatten(-1, (-1, dim))[:, : heads + kv_heads], places.long()
    return exact.rotate(x, cos[rows, None], sin[rows, None])


def _want_rope(cache: PagedKV4, slots: torch.Tensor, qkv: torch.Tensor, *tables: torch.Tensor) -> tuple:
    return _turned(qkv, *tables).split(list(HEADS[:2]), 1)


def _eager_rope(cache: PagedKV4, slots: torch.Tensor, qkv: torch.Tensor, *tables: torch.Tensor) -> tuple:
    """Without the way into pages."""
    heads, kv_heads, dim = HEADS
    turned = _turned(qkv, *tables)
    x = torch.cat([turned[:, heads:], qkv.unflatten(-1, (-1, dim))[:, heads + kv_heads :]], 1).float()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (high - low) / 15
    zero = -low / scale
    return turned, (x / scale + zero).round().clamp(0, 15).to(torch.uint8), scale.half(), zero.half()


def _own_operands(m: int, k: int, dtype: torch.dtype) -> tuple:
    """What attention saw with its log-sum-exp, queries, keys, and values as a slice of q, k, v."""
    heads, kv_heads, dim = HEADS
    seen, query = (_numbers(m, heads, dim, dtype=dtype) for _ in range(2))
    qkv = _numbers(m, heads + 2 * kv_heads, dim, dtype=dtype)
    key = _numbers(m, kv_heads, dim, dtype=dtype)
    return seen, _numbers(m, heads, dtype=torch.float32), query, key, qkv[:, -kv_heads:]


def _eager_own(seen: torch.Tensor, lse: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple:
    heads, kv_heads, dim = HEADS
    key, value = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))
    score = (query * key).sum(-1) * dim**-0.5
    own = torch.sigmoid(score - lse)[..., None]
    return _eager_codes((seen * (1 - own) + value * own).to(seen.dtype).flatten(1))


#: Everything that is measured: sizes of Llama-3-8B.
OPERATIONS: dict[str, Operation] = {
    "quantize": Operation(
        4096,
        3,
        lambda m, k, t: (_numbers(m, k, dtype=t),),
        matmul.quantize_activations,
        quantize_per_token_s8,
        _eager_codes,
    ),
    "rms_norm_s8": Operation(
        4096,
        3,
        lambda m, k, t: (_numbers(m, k, dtype=t), _numbers(k, dtype=t)),
        lambda x, w: fused.rms_norm_s8(x, w, EPS),
        lambda x, w: reference.rms_norm_s8(x, w, EPS),
        _eager_norm,
    ),
    "add_rms_norm_s8": Operation(
        4096,
        7,
        lambda m, k, t: (_numbers(m, k, dtype=t), _numbers(m, k, dtype=t), _numbers(k, dtype=t)),
        lambda x, r, w: fused.add_rms_norm_s8(x, r, w, EPS),
        lambda x, r, w: reference.add_rms_norm_s8(x, r, w, EPS),
        _eager_add_norm,
    ),
    "silu_mul_s8": Operation(
        14336,
        5,
        lambda m, k, t: (_numbers(m, 2 * k, dtype=t),),
        fused.silu_mul_s8,
        reference.silu_mul_s8,
        _eager_silu,
    ),
    # q, k, v read, q and k written; half a byte a code of k and v. A token of every sequence, or all tokens of one
    "rope_kv4_append": Operation(6144, 2 + 2 * 5 / 6 + 1 / 6, _rope_operands, _rope, _want_rope, _eager_rope),
    "rope_kv4_prompt": Operation(6144, 2 + 2 * 5 / 6 + 1 / 6, _prompt_operands, _rope, _want_rope, _eager_rope),
    # what was seen and queries read, a quarter as many keys and values, codes written; 4 bytes a head
    "attend_own_s8": Operation(4096, 6 + 4 / 128, _own_operands, fused.attend_own_s8, reference.attend_own_s8, _eager_own),
}


def moved(name: str, m: int, k: int) -> int:
    """The least bytes that an operation reads and writes: operands, codes and what else it leaves; 8 bytes a token for sum
    and scale, 4 for the scale and zero of a head."""
    gains = 2 * k if "norm" in name else 0
    beside = 4 * 2 * HEADS[1] if name.startswith("rope") else 8
    return round(OPERATIONS[name].bytes * m * k) + gains + beside * m


def same(got: Any, want: Any) -> bool:
    """Are a kernel's result and the reference's equal in every bit, order and padding included?"""
    if isinstance(got, tuple):
        return all(same(a, b) for a, b in zip(got, want, strict=True))
    if isinstance(got, Activations) and isinstance(want, Affine):
        tiled = tile_activations(want.codes, want.scales)
        return torch.equal(got.tiles, tiled.tiles) and torch.equal(got.tokens, tiled.tokens)
    return torch.equal(got, want)


def _kept(run: Callable[..., Any], sets: Sequence[tuple]) -> list[Callable[[], None]]:
    """Calls on one set each, whose results live until the next round, so that every call writes elsewhere."""
    results: list[Any] = [None] * len(sets)

    def call(i: int) -> None:
        results[i] = run(*sets[i])

    return [lambda i=i: call(i) for i in range(len(sets))]  # type: ignore[misc]


def _copies(size: int, count: int) -> list[Callable[[], Any]]:
    """Calls that copy ``size`` bytes each, as many different ones."""
    pairs = [torch.empty(2, size, dtype=torch.uint8, device="cuda") for _ in range(count)]
    return [lambda p=p: p[1].copy_(p[0]) for p in pairs]  # type: ignore[misc]


def measured(
    names: Sequence[str], batches: Sequence[int], dtype: str, bandwidth: float, peers: bool = True
) -> Iterator[dict[str, Any]]:
    """Every point in turn. Raises `measure.WrongResult`."""
    cache_bytes = torch.cuda.get_device_properties().L2_cache_size
    for name in names:
        op = OPERATIONS[name]
        for m in batches:
            size = moved(name, m, op.k)
            count = min(SETS, measure.copies(size, cache_bytes))
            sets = [op.operands(m, op.k, DTYPES[dtype]) for _ in range(count)]
            if not same(op.run(*sets[0]), op.want(*sets[0])):
                raise measure.WrongResult(f"{name} {dtype} {m} x {op.k}: differs from qoqlab.reference")
            bound = size / bandwidth * 1e6
            us = measure.graph_time(_kept(op.run, sets), bound)
            copy = measure.graph_time(_copies(size // 2, count), bound)
            eager = measure.graph_time(_kept(op.eager, sets), 10 * bound) if peers else None
            yield {
                "op": name,
                "precision": dtype,
                "k": op.k,
                "m": m,
                "us": us,
                "bound_us": bound,
                "share": bound / us,
                "copy_us": copy,
                "tb_per_s": size / us / 1e6,
                "peers": {} if eager is None else {"torch_eager": eager},
            }


def verdict(row: dict[str, Any]) -> str:
    """Whether a point meets its aim; empty where it has none."""
    if row["m"] not in (16, 1024):
        return ""
    met = row["us"] < TARGET_US if row["m"] == 16 else row["share"] >= TARGET_SHARE
    return "met" if met else "missed"


def point_table(results: Sequence[dict[str, Any]]) -> str:
    """Every point, with its bound and torch's time."""
    rows = []
    for r in results:
        what, times = [r["op"], r["precision"], f"{r['m']}x{r['k']}"], [r["us"], r["bound_us"], r["share"], r["copy_us"]]
        rows.append([*what, *times, r["peers"].get("torch_eager"), verdict(r)])
    return measure.table(["operation", "dtype", "MxK", "us", "bound", "share", "copy", "eager", ""], rows)


def parse(arguments: Sequence[str]) -> tuple[tuple[str, ...], tuple[int, ...], argparse.Namespace]:
    """(operations, batches, the rest) of the command line. Exits with code 2 and a message for what is wrong."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE} elementwise", description="Time the fused element-wise kernels on this GPU."
    )
    parser.add_argument("--ops", default=",".join(OPERATIONS), help="separated by commas")
    parser.add_argument("--m", default=",".join(map(str, BATCHES)), help="numbers of tokens, separated by commas")
    parser.add_argument("--dtype", default="fp16", choices=sorted(DTYPES))
    parser.add_argument("--no-peers", action="store_true", help="leave torch's eager functions out")
    parser.add_argument("--json", type=Path, help="write the record here")
    parser.add_argument("--commit", default="", help="recorded where the code runs outside a git checkout")
    known = parser.parse_args(arguments)
    try:
        return measure.choices(known.ops, "--ops", list(OPERATIONS)), measure.numbers(known.m, "--m"), known
    except ValueError as error:
        parser.error(str(error))


def bench(names: Sequence[str], batches: Sequence[int], command: Sequence[str], known: argparse.Namespace) -> None:
    """Measure, print and write."""
    measure.require_gpu()
    bandwidth, how = measure.measure_bandwidth()
    results: list[dict[str, Any]] = []
    for point in measured(names, batches, known.dtype, bandwidth, not known.no_peers):
        results.append(point)
        if known.json:  # after every point: what is done is kept if time runs out
            more = {"ceilings": {"bytes_per_s": bandwidth, "sources": {"bytes_per_s": how}}}
            measure.write_record(known.json, measure.record(command, known.commit, results, **more))
    print(point_table(results))
    print(f"\n{torch.cuda.get_device_name()}: {bandwidth / 1e12:.2f} TB/s ({how})", flush=True)


def main(arguments: Sequence[str]) -> int:
    """The command, ``arguments`` without its name."""
    names, batches, known = parse(arguments)
    command = measure.command_line(MODULE, ["elementwise", *arguments])
    return measure.guarded(MODULE, lambda: bench(names, batches, command, known))
