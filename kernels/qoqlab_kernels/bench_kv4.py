"""Benchmark of decode attention on the KV4 cache, beside its bound and torch's fp16 attention, on this machine's GPU.

    python -m qoqlab_kernels.bench kv4_decode --json data/benchmarks/kv4_decode.json

Every result is compared with an fp32 reference on the dequantised cache before it is timed and after. ``us`` is the time
of one attention after another; ``with_append_us`` that with the RoPE and append before it, as in a decode step, waiting for
their end or fetching pages meanwhile (`attention.kv4_attention`, ``settled``). ``ladder``: v1 to v3, where short.

Peers are torch's flash and cuDNN attention on fp16 keys and values of the same numbers: as a batch of single queries
(``enable_gqa``), and with the query group as the sequence of queries, which is the same product without masking and what
serving libraries do.

``--plans 4x2x2,4x1x3`` also times other sizes of the kernel, each of so many warps, stages and blocks on a multiprocessor,
on the points of this run (``plans`` in the record).
"""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from qoqlab import reference
from qoqlab.kv import QuantizedKV, quantize_kv4

from . import attention, fused, kv4_ladder, measure
from .cache import PagedKV4
from .kv4 import Form, Ring

MODULE = "qoqlab_kernels.bench"
#: Largest relative error of a result against fp32, of the kernel and of a peer.
TOLERANCE, PEER_TOLERANCE = 2e-3, 5e-3
#: Largest cache on which the ladder's first versions are timed.
LADDER_BYTES = 2e6
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Point:
    """What is measured: sequences, tokens of each, query and KV heads; aim on an H200 in microseconds."""

    batch: int
    tokens: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    target_us: float | None = None

    @property
    def form(self) -> Form:
        """What the kernel is compiled for."""
        return Form(self.head_dim, self.heads // self.kv_heads)

    @property
    def cache_bytes(self) -> int:
        """Codes, scales and zeros of the tokens: what has to be read at least, besides the query."""
        return self.batch * self.kv_heads * self.tokens * (self.head_dim + 8)

    @property
    def least_bytes(self) -> int:
        """The least that is read and written."""
        return self.cache_bytes + 2 * 2 * self.batch * self.heads * self.head_dim


POINTS = (
    Point(1, 1024),
    Point(1, 4096, target_us=9),
    Point(1, 16384, target_us=14),
    Point(1, 131072),
    Point(16, 1536, target_us=14),
    Point(16, 16384),
    Point(64, 1024),
    Point(64, 1536, target_us=32),
    Point(128, 1024),
    Point(256, 1024),
    Point(64, 1536, 32, 32, target_us=130),
    Point(64, 1536, 32, 8, 64),
)


@dataclass(frozen=True)
class Operands:
    """A cache whose layers hold the same tokens (their copies rotate), and what attention must give."""

    cache: PagedKV4
    slots: torch.Tensor
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    want: torch.Tensor


def operands(point: Point, copies: int, seed: int) -> Operands:
    """Random tokens on the GPU, their pages in random order."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (point.batch, point.kv_heads, point.tokens, point.head_dim)
    cache = PagedKV4(
        copies, point.kv_heads, point.head_dim, point.batch * -(-point.tokens // 64), sequences=point.batch,
        max_tokens=point.tokens, device="cuda",
    )  # fmt: skip
    numbers = [cache.open() for _ in range(point.batch)]
    cache.grow(dict.fromkeys(numbers, point.tokens))
    used = cache.tables.numel()
    cache.tables.copy_(torch.randperm(used, device="cuda", generator=generator).view_as(cache.tables))
    slots = torch.tensor(numbers, device="cuda")

    def codes() -> QuantizedKV:
        return quantize_kv4(torch.randn(shape, device="cuda", dtype=torch.float16, generator=generator))

    k, v = codes(), codes()
    for start in range(0, point.tokens, 4096):  # the index of a long prompt would take gigabytes
        part = slice(start, start + 4096)
        cache.write(0, slots, *(QuantizedKV(x.codes[:, :, part], x.scales[:, :, part], x.zeros[:, :, part]) for x in (k, v)))
    cache.pool[1:], cache.lengths[1:] = cache.pool[:1], cache.lengths[:1]
    query = torch.randn(point.batch, point.heads, point.head_dim, device="cuda", generator=generator).half()
    keys, values = k.dequantize(), v.dequantize()
    want = reference.kv4_attention(query.float(), keys, values)
    return Operands(cache, slots.int(), query, keys.half(), values.half(), want)


def error_of(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative error, NaN where a result is."""
    return ((got.float() - want).norm() / want.norm()).item()


def checked_time(
    calls: Sequence[Callable[[], Any]], outputs: Sequence[torch.Tensor], want: torch.Tensor, about_us: float
) -> tuple[float, float]:
    """(`measure.checked_time` of calls whose results have a relative error of at most `TOLERANCE`, the largest error)."""

    def problem(out: torch.Tensor) -> str:
        error = error_of(out, want)
        return "" if error <= TOLERANCE else f"relative error {error:.1e}, at most {TOLERANCE:.0e} is allowed,"

    us = measure.checked_time(calls, outputs, problem, about_us)
    return us, max(error_of(out, want) for out in outputs)


def time_kernel(
    data: Operands, form: Form, about_us: float, plan: attention.AttentionPlan | None = None, layers: int | None = None
) -> tuple[float, float, attention.AttentionPlan]:
    """(microseconds, largest relative error, plan) of the kernel, on so many layers in turn (None: all)."""
    plan = plan or attention.attention_plan(form, data.query.device)
    outputs = [torch.empty_like(data.query) for _ in range(layers or data.cache.layers)]
    options = (form.head_dim**-0.5, 0, None)
    calls = [
        partial(attention.run, plan, form, data.query, data.cache, layer, data.slots, (out, None), options)
        for layer, out in enumerate(outputs)
    ]
    return (*checked_time(calls, outputs, data.want, about_us), plan)


def variant(words: str, processors: int, base: attention.AttentionPlan) -> attention.AttentionPlan:
    """A plan with other sizes: ``"4x1x3"`` has 4 warps, 1 stage and 3 blocks on each of so many multiprocessors. Raises
    ValueError for other words."""
    sizes = words.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(f"--plans: expected warps, stages and blocks on a multiprocessor, such as 4x1x3, got {words!r}")
    warps, stages, residents = map(int, sizes)
    return replace(base, warps=warps, stages=stages, residents=residents, blocks=processors * residents)


def time_plans(data: Operands, form: Form, about_us: float, plans: Sequence[str]) -> dict[str, float]:
    """Microseconds of other sizes of the kernel; says why where one cannot run."""
    properties: Any = torch.cuda.get_device_properties(data.query.device)
    limits = properties.shared_memory_per_block_optin, properties.shared_memory_per_multiprocessor
    base, times = attention.attention_plan(form, data.query.device), {}
    for words in plans:
        plan = variant(words, properties.multi_processor_count, base)
        needed, there = Ring(form, plan.warps, plan.stages).total, attention.room_of(plan.residents, *limits)
        if needed > there:
            print(f"no plan {words}: {needed} bytes of shared memory a block, {there} are there", flush=True)
        else:
            times[words] = time_kernel(data, form, about_us, plan)[0]
    return times


def time_in_step(data: Operands, form: Form, about_us: float) -> dict[str, float]:
    """Microseconds of RoPE and append with the attention behind it: "waiting" for its end, and "settled". The cache's last
    tokens become others, which attention does not see."""
    cache, past = data.cache, data.keys.shape[2] - 1
    positions = torch.full_like(data.slots, past)
    cache.lengths.fill_(past)
    beside = torch.randn(len(data.slots), 2 * cache.kv_heads, cache.head_dim, device="cuda").half()
    qkv = torch.cat([data.query, beside], 1).flatten(1)
    cos = torch.ones(past + 1, cache.head_dim // 2, device="cuda", dtype=torch.float16)
    want = reference.kv4_attention(data.query.float(), data.keys[:, :, :past].float(), data.values[:, :, :past].float())
    outputs = [torch.empty_like(data.query) for _ in range(cache.layers)]

    def step(form: Form, layer: int, out: torch.Tensor) -> None:
        query, _ = fused.rope_kv4_append(cache, layer, data.slots, qkv, cos, cos * 0, positions)
        plan, options = attention.attention_plan(form, data.query.device), (form.head_dim**-0.5, 0, None)
        attention.run(plan, form, query, cache, layer, data.slots, (out, None), options)

    def timed(form: Form) -> float:
        return checked_time([partial(step, form, *pair) for pair in enumerate(outputs)], outputs, want, about_us)[0]

    return {"waiting": timed(form), "settled": timed(replace(form, settled=True))}


def time_peers(data: Operands, point: Point, cache_bytes: int, about_us: float) -> tuple[dict[str, float], dict[str, str]]:
    """(microseconds of every peer that is there and right, why the others are not)."""
    count = min(measure.copies(4 * data.keys.numel(), cache_bytes), 32)
    k, v = ([x, *(x.clone() for _ in range(count - 1))] for x in (data.keys, data.values))
    group = point.heads // point.kv_heads
    single, folded = data.query[:, :, None], data.query.unflatten(1, (point.kv_heads, group))
    ways: list[tuple[str, torch.Tensor, dict[str, Any]]] = [
        ("gqa", single, {"enable_gqa": group > 1}),
        ("folded", folded, {}),
    ]
    times: dict[str, float] = {}
    refused: dict[str, str] = {}
    for backend, kind in BACKENDS.items():
        for how, query, options in ways:
            if group == 1 and how == "folded":
                continue
            name = f"{backend}_{how}"
            calls = [partial(scaled_dot_product_attention, query, a, b, **options) for a, b in zip(k, v, strict=True)]
            try:
                with sdpa_kernel(kind):
                    error = error_of(calls[0]().reshape(data.want.shape), data.want)
                    if not error <= PEER_TOLERANCE:
                        refused[name] = f"relative error {error:.1e}"
                        continue
                    times[name] = measure.graph_time(calls, about_us, replays=7)
            except RuntimeError as problem:
                refused[name] = str(problem).splitlines()[0]
    return times, refused


def measured(
    points: Sequence[Point], peers: bool, plans: Sequence[str], bandwidth: float, seed: int
) -> Iterator[dict[str, Any]]:
    """Every point in turn."""
    cache_bytes = torch.cuda.get_device_properties().L2_cache_size
    for point in points:
        bound = point.least_bytes / bandwidth * 1e6
        data = operands(point, min(measure.copies(point.cache_bytes, cache_bytes), 32), seed)
        us, error, plan = time_kernel(data, point.form, bound)
        times, refused = time_peers(data, point, cache_bytes, 4 * bound) if peers else ({}, {})
        ladder = {
            version: time_kernel(data, point.form, 1e9, attention.AttentionPlan(version), 2)[0]
            for version in (kv4_ladder.VERSIONS if point.cache_bytes <= LADDER_BYTES else ())
        }
        for name, why in refused.items():
            print(f"{point.batch} x {point.tokens}: no {name}: {why}", flush=True)
        yield {
            "op": "kv4_decode",
            **asdict(point),
            "us": us,
            "bound_us": bound,
            "of_bandwidth": bound / us,
            "tb_per_s": point.least_bytes / us / 1e6,
            "relative_error": error,
            **({"plans": time_plans(data, point.form, bound, plans)} if plans else {}),
            "with_append_us": time_in_step(data, point.form, bound),
            "ladder": ladder,
            "peers": times,
            "plan": asdict(plan),
        }


def point_table(results: Sequence[dict[str, Any]]) -> str:
    """Every point with its bound, the share of the bandwidth, its best peer and its aim."""
    first = ["B", "tokens", "heads", "D", "us", "+ append", "settled", "bound"]
    names = [*first, "% of bandwidth", "TB/s", "error", "best peer", "us", "target", ""]
    rows = []
    for r in results:
        best = min(r["peers"], key=r["peers"].__getitem__, default=None)
        met = "" if r["target_us"] is None else "met" if r["us"] <= r["target_us"] else "missed"
        rows.append(
            [r["batch"], r["tokens"], f"{r['heads']}/{r['kv_heads']}", r["head_dim"], r["us"], *r["with_append_us"].values(),
             r["bound_us"], 100 * r["of_bandwidth"], r["tb_per_s"], f"{r['relative_error']:.0e}", best, r["peers"].get(best),
             r["target_us"], met]
        )  # fmt: skip
    return measure.table(names, rows)


def plan_table(results: Sequence[dict[str, Any]]) -> str:
    """Microseconds of every point by the plan that it runs with and by the others."""
    others = list(dict.fromkeys(words for r in results for words in r["plans"]))
    rows = [[r["batch"], r["tokens"], r["head_dim"], r["us"], *(r["plans"].get(w) for w in others)] for r in results]
    return measure.table(["B", "tokens", "D", "us", *others], rows)


def bench(
    points: Sequence[Point], peers: bool, plans: Sequence[str], command: Sequence[str], json: Path | None, commit: str
) -> None:
    """Measure, print and write."""
    measure.require_gpu()
    (bandwidth, how), seed = measure.measure_bandwidth(), secrets.randbelow(1 << 20)
    results: list[dict[str, Any]] = []
    for result in measured(points, peers, plans, bandwidth, seed):
        results.append(result)
        if json:  # after every point: what is done is kept if time runs out
            more = {"bandwidth": {"bytes_per_s": bandwidth, "source": how}, "seed": seed}
            measure.write_record(json, measure.record(command, commit, results, **more))
    print(point_table(results))
    if plans:
        print("", plan_table(results), sep="\n")
    print(f"\n{torch.cuda.get_device_name()}: {bandwidth / 1e12:.2f} TB/s ({how}); targets: on an H200", flush=True)


def main(arguments: Sequence[str]) -> int:
    """The command, after its name. Exits with code 2 and a message for what is wrong."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE} kv4_decode", description="Time decode attention on KV4.")
    parser.add_argument("--batch", default="", help="only these numbers of sequences, separated by commas")
    parser.add_argument("--no-peers", action="store_true", help="leave torch's attention out")
    parser.add_argument("--plans", default="", help="other warps, stages and blocks to time, such as 4x2x2,4x1x3")
    parser.add_argument("--json", type=Path, help="write the record here")
    parser.add_argument("--commit", default="", help="recorded where the code runs outside a git checkout")
    known = parser.parse_args(list(arguments))
    points: Sequence[Point] = POINTS
    if known.batch:
        try:
            batches = measure.numbers(known.batch, "--batch")
        except ValueError as error:
            parser.error(str(error))
        points = [point for point in POINTS if point.batch in batches]
        if not points:
            parser.error(f"--batch: none of {known.batch} is measured; {sorted({p.batch for p in POINTS})} are")
    plans = [words.strip() for words in known.plans.split(",") if words.strip()]
    for words in plans:
        try:
            variant(words, 1, attention.AttentionPlan("v4"))
        except ValueError as error:
            parser.error(str(error))
    command = measure.command_line(MODULE, ["kv4_decode", *arguments])
    return measure.guarded(MODULE, lambda: bench(points, not known.no_peers, plans, command, known.json, known.commit))
