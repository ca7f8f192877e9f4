"""Benchmark of decode attention over a KV4 cache: ``python -m qoqlab_kernels.bench kv4_decode``.

Every result is compared with the fp32 reference on the dequantised cache before it is timed and after; peers, fp16
attention by torch's flash and cuDNN kernels over a cache of the same shape, run in the same process. kernels/README.md says
how to read the output.
"""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from qoqlab import reference

from . import attention, decode, matmul, measure
from .cache import PagedKV4
from .rows import PAGE

MODULE = "qoqlab_kernels.bench"
#: Largest relative error of a result, per sequence.
TOLERANCE = 2e-3
PEERS = {"sdpa_flash_fp16": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn_fp16": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Point:
    """What is timed: ``batch`` sequences of ``length`` tokens."""

    batch: int
    length: int
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def form(self) -> attention.Form:
        """The kernel's."""
        return attention.Form(self.head_dim, self.q_heads // self.kv_heads)

    @property
    def bytes(self) -> int:
        """The least that has to move."""
        return measure.attention_bytes(self.batch, self.length, self.q_heads, self.kv_heads, self.head_dim)


#: Aims on an H200, microseconds.
TARGETS = {
    Point(1, 4096): 9,
    Point(1, 16384): 14,
    Point(16, 1536): 14,
    Point(64, 1536): 32,
    Point(64, 1536, 32, 32): 130,
}
POINTS = (
    Point(1, 4096),
    Point(1, 16384),
    *(Point(16, length) for length in (1024, 1536, 4096, 16384)),
    *(Point(batch, length) for batch in (64, 128, 256) for length in (1024, 1536, 4096)),
    Point(64, 1536, 32, 32),
)


def random_cache(point: Point, layers: int, generator: torch.Generator) -> tuple[PagedKV4, torch.Tensor]:
    """A full cache of random codes, scales and zeros, its pages in random order, and its sequences."""
    pages = -(-point.length // PAGE) * point.batch
    cache = PagedKV4(layers, point.kv_heads, point.head_dim, pages, sequences=point.batch, device="cuda")
    opened = [cache.open() for _ in range(point.batch)]
    cache.extend(opened, [point.length] * point.batch)
    order = torch.randperm(pages, generator=generator, device="cuda").int()
    used = cache.tables[:, : pages // point.batch]
    used.copy_(order[used.long()])
    cache.data.random_(0, 256, generator=generator)
    half = cache.data.shape[-1] // 2
    for kind in (0, 1):
        constants = cache.data[..., kind * half + PAGE * point.head_dim // 2 : (kind + 1) * half].view(torch.float16)
        noise = torch.rand(constants.shape, generator=generator, device="cuda", dtype=torch.float16)
        constants[..., 0::2] = noise[..., 0::2] * 0.2 + 0.1
        constants[..., 1::2] = noise[..., 1::2] * 4 + 5.5
    return cache, cache.batch(opened)


@dataclass(frozen=True)
class Operands:
    """A cache whose layers rotate, a query for each, and the sequences."""

    cache: PagedKV4
    queries: list[torch.Tensor]
    batch: torch.Tensor

    def calls(self, plan: decode.DecodePlan, form: attention.Form, outputs: Sequence[torch.Tensor]) -> list[Callable]:
        """One launch for every layer."""
        c, scale = self.cache, self.cache.head_dim**-0.5
        return [
            partial(decode.run, plan, form, query, c.data, c.tables, c.lengths, self.batch, out, (layer, scale, 0, 0.0))
            for layer, (query, out) in enumerate(zip(self.queries, outputs, strict=True))
        ]

    def worst_error(self, outputs: Sequence[torch.Tensor]) -> float:
        """Largest relative error of some sequences of the first and last layer, infinite for results that are not."""
        count = len(self.batch)
        worst = 0.0
        for layer in (0, len(outputs) - 1):
            if not bool(outputs[layer].isfinite().all()):
                return float("inf")
            for b in sorted({0, count // 2, count - 1}):
                keys, values = self.cache.gather(layer, b)
                want = reference.kv4_attention(self.queries[layer][b : b + 1].float(), keys[None], values[None])
                worst = max(worst, float((outputs[layer][b].float() - want[0]).norm() / want.norm()))
        return worst


def operands(point: Point, cache_bytes: int, seed: int) -> Operands:
    """Random operands of a point on the GPU, as many layers as rotate."""
    generator = torch.Generator("cuda").manual_seed(seed)
    layers = measure.copies(point.bytes, cache_bytes)
    cache, batch = random_cache(point, layers, generator)
    shape = (point.batch, point.q_heads, point.head_dim)
    queries = [torch.randn(shape, generator=generator, device="cuda").half() for _ in range(layers)]
    return Operands(cache, queries, batch)


def time_plan(plan: decode.DecodePlan, point: Point, data: Operands, about_us: float) -> float:
    """Microseconds of a launch; raises `measure.WrongResult` unless it is right before timing and after."""
    outputs = [torch.full_like(query, torch.nan) for query in data.queries]
    calls = data.calls(plan, point.form, outputs)
    us = 0.0
    for when in ("before", "after"):
        if when == "before":
            for call in calls:
                call()
        else:
            for out in outputs:
                out.fill_(torch.nan)
            us = measure.graph_time(calls, about_us)
        error = data.worst_error(outputs)
        if not error <= TOLERANCE:
            raise measure.WrongResult(f"{point} {plan}: relative error {error:.1e} {when} timing, at most {TOLERANCE:.0e}")
    return us


def _attend(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def time_peers(point: Point, about_us: float, cache_bytes: int) -> tuple[dict[str, float], dict[str, str]]:
    """(microseconds of every peer that is there and right, why the others are not)."""
    times: dict[str, float] = {}
    refused: dict[str, str] = {}
    size = 2 * 2 * point.batch * point.kv_heads * point.length * point.head_dim
    shape = (point.batch, point.kv_heads, point.length, point.head_dim)
    sets = [
        (
            torch.randn(point.batch, point.q_heads, 1, point.head_dim, device="cuda").half(),
            torch.randn(shape, device="cuda", dtype=torch.float16),
            torch.randn(shape, device="cuda", dtype=torch.float16),
        )
        for _ in range(measure.copies(size, cache_bytes))
    ]
    q, k, v = (x[-1:] for x in sets[0])
    want = reference.kv4_attention(q[:, :, 0].float(), k.float(), v.float())
    for name, backend in PEERS.items():
        try:
            got = _attend(backend, *sets[0])[-1:, :, 0].float()
            error = float((got - want).norm() / want.norm())
            if not error <= TOLERANCE:
                refused[name] = f"relative error {error:.1e}"
                continue
            times[name] = measure.graph_time([partial(_attend, backend, *some) for some in sets], about_us)
        except (RuntimeError, ValueError, TypeError) as failure:
            refused[name] = f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
    return times, refused


def row(point: Point, us: float, bound_us: float, peers: dict[str, float], plan: decode.DecodePlan) -> dict[str, Any]:
    """A point of the record."""
    return {
        "op": "kv4_decode",
        **asdict(point),
        "us": us,
        "bound_us": bound_us,
        "ratio": us / bound_us,
        "tb_per_s": point.bytes / us / 1e6,
        "peers": peers,
        "plan": asdict(plan),
    }


def plan_of(point: Point) -> decode.DecodePlan:
    """The plan of a point on the current GPU."""
    capability, processors, _ = matmul._gpu(torch.cuda.current_device())
    return decode.plan_decode(point.batch, point.kv_heads, point.form, capability, processors)


def measured(points: Sequence[Point], bandwidth: float, peers: bool, seed: int) -> Iterator[dict[str, Any]]:
    """Every point in turn."""
    cache_bytes = torch.cuda.get_device_properties().L2_cache_size
    for point in points:
        bound = point.bytes / bandwidth * 1e6
        plan, data = plan_of(point), operands(point, cache_bytes, seed)
        us = time_plan(plan, point, data, bound)
        del data
        times: dict[str, float] = {}
        if peers:
            times, refused = time_peers(point, 4 * bound, cache_bytes)
            for name, why in refused.items():
                print(f"{point}: no {name}: {why}", flush=True)
        yield row(point, us, bound, times, plan)


def point_table(results: Sequence[dict[str, Any]]) -> str:
    """Every point, with its bound, its peers, and the aim of an H200."""
    rows = []
    for r in results:
        point = Point(*(r[name] for name in ("batch", "length", "q_heads", "kv_heads", "head_dim")))
        target = TARGETS.get(point)
        met = "" if target is None else "met" if r["us"] <= target else "missed"
        peers = [r["peers"].get(name) for name in PEERS]
        heads = f"{point.q_heads}/{point.kv_heads}"
        rows.append([heads, r["batch"], r["length"], r["us"], r["bound_us"], r["ratio"], r["tb_per_s"], *peers, target, met])
    return measure.table(["heads", "B", "length", "us", "bound", "ratio", "TB/s", *PEERS, "target", ""], rows)


def parse(arguments: Sequence[str]) -> tuple[tuple[Point, ...], argparse.Namespace]:
    """Points of the command line. Exits with code 2 and a message for what is wrong."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE} kv4_decode", description="Time decode attention on this GPU.")
    parser.add_argument("--batch", default="1,16,64,128,256", help="numbers of sequences, separated by commas")
    parser.add_argument("--length", default="1024,1536,4096,16384", help="tokens of context, separated by commas")
    parser.add_argument("--no-peers", action="store_true", help="leave other kernels out")
    parser.add_argument("--json", type=Path, help="write the record here")
    parser.add_argument("--commit", default="", help="recorded where the code runs outside a git checkout")
    known = parser.parse_args(arguments)
    try:
        batches, lengths = measure.numbers(known.batch, "--batch"), measure.numbers(known.length, "--length")
    except ValueError as error:
        parser.error(str(error))
    points = tuple(point for point in POINTS if point.batch in batches and point.length in lengths)
    if not points:
        parser.error("--batch, --length: none of the points that are measured has these")
    return points, known


def bench(points: Sequence[Point], command: Sequence[str], known: argparse.Namespace) -> None:
    """Measure, print and write."""
    capability = measure.require_gpu()
    plans = dict.fromkeys((plan_of(point).constants(point.form)) for point in points)
    measure.compile_all([(attention.v4, constants) for constants in plans], capability)
    (bandwidth, how), seed = measure.measure_bandwidth(), secrets.randbelow(1 << 20)
    results: list[dict[str, Any]] = []
    for result in measured(points, bandwidth, not known.no_peers, seed):
        results.append(result)
        if known.json:  # after every point: what is done is kept if time runs out
            more = {"ceilings": {"bytes_per_s": bandwidth, "sources": {"bytes_per_s": how}}, "seed": seed}
            measure.write_record(known.json, measure.record(command, known.commit, results, **more))
    print(point_table(results))
    print(f"\n{torch.cuda.get_device_name()}: {bandwidth / 1e12:.2f} TB/s ({how}); target: on an H200", flush=True)


def main(arguments: Sequence[str]) -> int:
    """The command, without its name."""
    points, known = parse(arguments)
    command = measure.command_line(MODULE, ["kv4_decode", *arguments])
    return measure.guarded(MODULE, lambda: bench(points, command, known))
