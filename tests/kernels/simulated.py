"""What runs inside numba's CUDA simulator, in a process of its own (`simulator`): functions from JSON to JSON.

NUMBA_ENABLE_CUDASIM=1 python -m tests.kernels.simulated      one request a line on stdin, one answer a line on stdout
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import sys
import warnings
from typing import Any
from unittest import mock

import qoqlab_kernels as qk
import torch
from qoqlab_kernels import cases, elementwise, emulation, gemm, layout, matmul, ptx, simulation
from qoqlab_kernels.cases import Case
from qoqlab_kernels.plan import Plan

from qoqlab import exact, reference
from qoqlab.affine import Affine, quantize_per_token_s8
from qoqlab.parallel import inputs
from qoqlab.pipeline import quantize as quantize_model

from ..families import build, cast_parameters
from .engines import pair as engine_pair
from .expected import product
from .simulated_attention import attention_case, attention_errors, attention_mutant_case, codes_case, public_attention_case
from .simulated_own import compiled_own_case, own_case, own_errors, own_mutant_case

GUARD = 512  # elements of poison before and after an output


def poisoned(rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(a ``[rows, columns]`` output full of poison, the larger buffer in whose middle it lies)."""
    buffer = torch.full((2 * GUARD + rows * columns,), torch.nan, dtype=dtype)
    return buffer[GUARD : GUARD + rows * columns].view(rows, columns), buffer


def backwards() -> Any:
    """Blocks run in the opposite order, so that the first worker of a shared tile comes last instead of the last."""
    return mock.patch.object(simulation, "running", functools.partial(simulation.running, backwards=True))


def operands(c: Case, extreme: bool = False) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Weight, activation codes and scales of a case."""
    if extreme:
        return cases.extreme_weight(c.n, c.k, c.format), *cases.extreme_codes(c.m, c.k)
    a = cases.activations(c.m, c.k)
    return cases.weight(c.n, c.k, c.format), a.codes, a.scales


def gemm_case(
    case: dict,
    plan: dict,
    dtype: str = "float16",
    bias: bool = False,
    extreme: bool = False,
    repeats: int = 1,
) -> dict:
    """Run a case by a plan into poisoned memory, ``repeats`` times: which properties held every time."""
    c, p, kind = Case(**case), Plan(**plan), getattr(torch, dtype)
    w, codes, scales = operands(c, extreme)
    x, packed = layout.tile_activations(codes, scales), layout.pack_weight(w)
    b = torch.linspace(-3, 3, c.n) if bias else None
    form = gemm.Form(packed.groups, c.format == "channel-scaled", dtype == "bfloat16", bias)
    want = product(codes, scales, w, b, kind)
    parts, flags = matmul.workspace(p, x.device)
    outputs, kept = [], []
    for _ in range(repeats):
        if p.version in ("v4", "v5"):
            parts.fill_(0xA5)
        out, buffer = poisoned(c.m, c.n, kind)
        matmul.run(p, form, x, packed, b, out)
        outputs.append(out)
        kept.append(bool(buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all()))
    return {
        "equal": torch.equal(outputs[0], want),
        "finite": bool(want.isfinite().all()),
        "repeats": all(torch.equal(out, outputs[0]) for out in outputs),
        "kept": all(kept),
        "flags": int(flags.abs().sum()) if p.version in ("v4", "v5") and p.split == 1 else 0,
    }


def sums_case(case: dict, plan: dict, dtype: str = "float16", bias: bool = False) -> dict:
    """Two halves of the inputs, as two ranks have them: their sums by a plan, added and scaled, are the whole's result."""
    c, kind = Case(**case), getattr(torch, dtype)
    w, codes, scales = operands(c)
    b = torch.linspace(-3, 3, c.n) if bias else None
    halves, kept = [], []
    for part in (slice(0, c.k // 2), slice(c.k // 2, c.k)):
        packed, x = layout.pack_weight(inputs(w, part)), layout.tile_activations(codes[:, part], scales)
        form = gemm.Form(packed.groups, c.format == "channel-scaled", raw=True)
        out, buffer = poisoned(c.m, c.n, torch.float32)
        matmul.run(Plan(**plan), form, x, packed, None, out)
        halves.append(out.view(torch.int32))
        kept.append(bool(buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all()))
    token_sums = codes.sum(-1, dtype=torch.int32) if form.scaled else None
    with poisoned_outputs():
        y = qk.scale_sums(halves[0] + halves[1], x, packed, b, kind, token_sums)
    return {"equal": torch.equal(y, product(codes, scales, w, b, kind)), "kept": all(kept)}


def sums_errors() -> dict:
    """Bad input of `w4a8_sums` and `scale_sums`: name -> ``[class, message]``."""
    c = Case(3, 32, 64, "channel")
    w, codes, scales = operands(c)
    packed, x = qk.pack_weight(w), layout.tile_activations(codes, scales)
    total = torch.zeros(3, 32, dtype=torch.int32)
    calls = {
        "x: codes": lambda: qk.w4a8_sums(codes, packed),
        "x: other K": lambda: qk.w4a8_sums(layout.tile_activations(codes[:, :32], scales), packed),
        "total: fp32": lambda: qk.scale_sums(total.float(), x, packed),
        "dtype": lambda: qk.scale_sums(total, x, packed, dtype=torch.float32),
        "token_sums": lambda: qk.scale_sums(total, x, packed, token_sums=total[:, 0]),
    }
    return {name: message_of(call) for name, call in calls.items()}


def public_case(case: dict, version: str, tiled: bool = False) -> dict:
    """The public functions from end to end, with the version forced as a lesson would."""
    c = Case(**case)
    w, codes, scales = operands(c)
    packed = qk.pack_weight(w)
    with mock.patch.dict(os.environ, QOQLAB_KERNEL=version):
        chosen = qk.plan(c.m, packed)
        x = (layout.tile_activations(codes, scales), None) if tiled else (codes, scales)
        out = torch.full((c.m, c.n), torch.nan, dtype=torch.float16)
        y = qk.w4a8_gemm(*x, packed, out=out)
    return {"equal": torch.equal(y, product(codes, scales, w)), "version": chosen.version, "out": y is out}


def compiled_case(case: dict, how: str) -> dict:
    """The public functions under torch.compile, in one graph, for two batches: "codes" or quantised "floats"."""
    c = Case(**case)
    w, codes, scales = operands(c)
    packed, bias = qk.pack_weight(w), torch.linspace(-1, 1, c.n)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def layer(*x: Any) -> torch.Tensor:
        if how == "floats":
            x = (qk.quantize_activations(*x), None)
        return qk.w4a8_gemm(*x, packed, bias) * 2

    equal = []
    for m in (c.m, c.m - 1):
        floats = (codes[:m].float() * scales[:m].float()[:, None]).half()
        q = quantize_per_token_s8(floats) if how == "floats" else None
        some, their = (q.codes, q.scales) if q else (codes[:m], scales[:m])
        x = {"codes": (some, their), "floats": (floats,)}[how]
        equal.append(torch.equal(layer(*x), product(some, their, w, bias) * 2))
    return {"equal": equal}


# -- quantisation of activations ------------------------------------------------------------------------------------------


def _laid_out(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same numbers elsewhere in memory."""
    if how == "transposed":
        return x.T.contiguous().T
    if how == "strided":
        return torch.stack([x, torch.zeros_like(x)], -1).flatten(1)[:, ::2]
    if how == "misaligned":
        buffer = torch.zeros(x.numel() + 1, dtype=x.dtype)
        buffer[1:] = x.flatten()
        return buffer[1:].view(x.shape)
    return x


def quantize_case(m: int, k: int, dtype: str, how: str = "contiguous") -> dict:
    """`quantize_activations` against `quantize_per_token_s8` and `tile_activations`; the second token is all zeros, the
    third so small that its scale has a single bit: all its values are 180 of these."""
    generator = torch.Generator().manual_seed(m * k)
    x = torch.randn(m, k, generator=generator) * torch.logspace(-6, 3, m)[:, None]
    x[1:2] = 0
    x[2:3] = x[2:3].sign() * 180 * 2**-24
    x[0, :2] = torch.tensor([100.0, -99.99])  # the last bit of a division decides their codes in fp16
    if dtype == "int8":
        codes, scales = cases.extreme_codes(m, k)
        codes[:, ::3] = quantize_per_token_s8(x).codes[:, ::3]
        got = qk.quantize_activations(_laid_out(codes, how), scales)
    else:
        x = x.to(getattr(torch, dtype))
        a = quantize_per_token_s8(x)
        codes, scales = a.codes, a.scales
        got = qk.quantize_activations(_laid_out(x, how))
    want = layout.tile_activations(codes, scales)
    return {
        "tiles": torch.equal(got.tiles, want.tiles),
        "tokens": torch.equal(got.tokens, want.tokens),
        "codes": torch.equal(got.codes, codes),
        "scales": torch.equal(got.scales, scales),
        "sums": torch.equal(got.sums.long(), codes.sum(-1, dtype=torch.int64)),
    }


def sliced_case(m: int, k: int, dtype: str) -> dict:
    """Two slices of gated tokens, as two ranks have them: `silu_mul` finds the largest of each, and with the larger of them
    `quantize_activations` gives both the codes of the whole, but their own sums."""
    kind, generator = getattr(torch, dtype), torch.Generator().manual_seed(m * k)
    sizes = torch.logspace(2, -2, m)[:, None, None]
    sizes[-1] = 0 if m > 1 else 1
    halves = (torch.randn(2, m, 2 * k, generator=generator) * sizes[:, 0]).to(kind)
    halves[0, 0] = 0  # nothing in this slice, something in the other
    with poisoned_outputs():
        parts = [qk.silu_mul(half) for half in halves]
        largest = torch.maximum(parts[0][1], parts[1][1])
        got = [qk.quantize_activations(x, largest=largest) for x, _ in parts]
    values = [exact.silu_mul(half) for half in halves]
    whole = quantize_per_token_s8(torch.cat(values, 1))
    tiled = [layout.tile_activations(codes, whole.scales) for codes in whole.codes.chunk(2, 1)]
    return {
        "values": all(torch.equal(x, want) for (x, _), want in zip(parts, values, strict=True)),
        "largest": all(torch.equal(best, v.float().abs().amax(-1)) for (_, best), v in zip(parts, values, strict=True)),
        "tiles": all(torch.equal(a.tiles, b.tiles) for a, b in zip(got, tiled, strict=True)),
        "tokens": all(torch.equal(a.tokens, b.tokens) for a, b in zip(got, tiled, strict=True)),
    }


def sliced_errors() -> dict:
    """Bad largest numbers: name -> ``[class, message]``."""
    x, best = torch.zeros(3, 64, dtype=torch.float16), torch.ones(3)
    calls = {
        "a list": lambda: qk.quantize_activations(x, largest=[1.0]),
        "fp16": lambda: qk.quantize_activations(x, largest=best.half()),
        "too few": lambda: qk.quantize_activations(x, largest=best[:2]),
        "of fp32 tokens": lambda: qk.quantize_activations(x.float(), largest=best),
    }
    return {name: message_of(call) for name, call in calls.items()}


# -- fused element-wise kernels -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def poisoned_outputs() -> Any:
    """Memory that `torch.empty` hands out is full of poison, so what a kernel leaves unwritten is noticed."""
    empty = torch.empty

    def poisoned_empty(*size: Any, **options: Any) -> torch.Tensor:
        made = empty(*size, **options)
        made.view(torch.uint8).fill_(0xA5)
        return made

    with mock.patch.object(torch, "empty", poisoned_empty):
        yield


def _as_the_reference(got: layout.Activations, want: Affine) -> bool:
    tiled = layout.tile_activations(want.codes, want.scales)
    return torch.equal(got.tiles, tiled.tiles) and torch.equal(got.tokens, tiled.tokens)


def fused_case(operation: str, m: int, k: int, dtype: str, how: str = "contiguous", threads: int = 0) -> dict:
    """A fused kernel against `qoqlab.reference`: tokens of very different sizes, the last one all zeros."""
    generator = torch.Generator().manual_seed(m * k)
    sizes = torch.logspace(2, -2, m)[:, None]
    sizes[-1] = 0 if m > 1 else 1

    def numbers(columns: int) -> torch.Tensor:
        return _laid_out((torch.randn(m, columns, generator=generator) * sizes).to(getattr(torch, dtype)), how)

    x, residual = numbers(2 * k if operation == "silu_mul_s8" else k), numbers(k)
    weight = torch.randn(k, generator=generator).to(x.dtype)
    before = residual.clone()
    chosen = mock.patch.object(elementwise, "threads_for", lambda *_: threads) if threads else contextlib.nullcontext()
    with poisoned_outputs(), chosen:
        if operation == "silu_mul_s8":
            good = _as_the_reference(qk.silu_mul_s8(x), reference.silu_mul_s8(x))
        elif operation == "rms_norm_s8":
            good = _as_the_reference(qk.rms_norm_s8(x, weight, 1e-5), reference.rms_norm_s8(x, weight, 1e-5))
        elif operation == "add_rms_norm_s8":
            (got, total), (want, sum_) = (
                f(x, residual, weight, 1e-6) for f in (qk.add_rms_norm_s8, reference.add_rms_norm_s8)
            )
            good = _as_the_reference(got, want) and torch.equal(total, sum_)
        elif operation == "rms_norm":
            good = torch.equal(qk.rms_norm(x, weight, 1e-5), exact.rms_norm(x, weight, 1e-5))
        else:
            good = torch.equal(qk.add_rms_norm(x, residual, weight, 1e-5), exact.rms_norm(x + residual, weight, 1e-5))
    return {"equal": good, "kept": torch.equal(residual, before)}


def rope_case(dim: int, heads: int, kv_heads: int, dtype: str, stepwise: bool) -> dict:
    """`rope_kv4_append` against `exact.rotate` and `PagedKV4.append`: two sequences of different lengths, cut into pages."""
    generator = torch.Generator().manual_seed(dim)
    kind, before = getattr(torch, dtype), (15, 4)
    caches = [qk.PagedKV4(2, kv_heads, dim, pages=6, page_size=16, sequences=3) for _ in range(2)]
    for cache in caches:
        cache.allocator.take(1)
        numbers = [cache.open(), cache.open()]
        for number, count in zip(numbers, before, strict=True):
            x = torch.randn(1, kv_heads, count, dim, generator=torch.Generator().manual_seed(count))
            cache.append(1, [number], x, -x)
    want, got = caches
    angles = torch.randn(40, dim // 2, generator=generator)
    cos, sin = angles.cos().to(kind), angles.sin().to(kind)
    fresh = [(1, 4), (0, 15)] if stepwise else [(0, 15), (0, 16), (0, 17), (1, 4)]  # (sequence, position)
    qkv = (torch.randn(len(fresh), heads + 2 * kv_heads, dim, generator=generator) * 3).to(kind)
    qkv[0, heads] = 0  # an all-zero key, a constant value, and one far from zero
    qkv[0, -1] = 2.5
    qkv[-1, -1] = 1000 + qkv[-1, -1]
    slots, places = (torch.tensor(v, dtype=torch.int32) for v in zip(*fresh, strict=True))
    got.reserve([0, 1], 4)
    with poisoned_outputs():
        q, k = qk.rope_kv4_append(got, 1, slots, qkv.flatten(1), cos, sin, None if stepwise else places)
    rows = places.long()
    turned = exact.rotate(qkv[:, : heads + kv_heads], cos[rows, None], sin[rows, None])
    lengths = got.lengths.tolist()
    for i, (number, _) in enumerate(fresh):
        want.append(1, [number], turned[i, heads:][None, :, None], qkv[i, heads + kv_heads :][None, :, None])
    for number in (0, 1):
        got._length[number] = want._length[number]
    same = [
        torch.equal(a, b)
        for number in (0, 1)
        for mine, theirs in zip(got.codes(1, number), want.codes(1, number), strict=True)
        for a, b in zip(vars(mine).values(), vars(theirs).values(), strict=True)
    ]
    grown = want.lengths.tolist() if stepwise else [[0, 0, 0], [*before, 0]]
    return {
        "queries": torch.equal(q, turned[:, :heads]),
        "keys": torch.equal(k, turned[:, heads:]),
        "cache": all(same) and torch.equal(got.pool[0], want.pool[0]),
        "lengths": lengths == grown,
    }


def compiled_fused_case(m: int, k: int) -> dict:
    """The fused operators under torch.compile, in one graph."""
    generator = torch.Generator().manual_seed(1)
    x, residual, gate_up = (torch.randn(m, n, generator=generator).half() for n in (k, k, 2 * k))
    weight = torch.randn(k, generator=generator).half()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x: torch.Tensor, residual: torch.Tensor, gate_up: torch.Tensor) -> tuple:
        made, total = qk.add_rms_norm_s8(x * 2, residual, weight, 1e-5)
        normed, gated = qk.rms_norm_s8(x, weight, 1e-5), qk.silu_mul_s8(gate_up)
        return made.tiles, total, normed.tiles, gated.tiles

    tiles, total, normed, gated = step(x, residual, gate_up)
    want, sum_ = reference.add_rms_norm_s8(x * 2, residual, weight, 1e-5)
    others = (want, reference.rms_norm_s8(x, weight, 1e-5), reference.silu_mul_s8(gate_up))
    same = [
        torch.equal(a, layout.tile_activations(b.codes, b.scales).tiles)
        for a, b in zip((tiles, normed, gated), others, strict=True)
    ]
    return {"equal": [*same, torch.equal(total, sum_)]}


def fused_errors() -> dict:
    """Bad input of the fused functions: name -> ``[class, message]``."""
    x, weight = torch.zeros(3, 64, dtype=torch.float16), torch.ones(64, dtype=torch.float16)

    def norm(x: Any = x, weight: Any = weight, eps: float = 1e-5) -> Any:
        return lambda: qk.rms_norm_s8(x, weight, eps)

    cache, table = qk.PagedKV4(1, 1, 64, pages=2), torch.zeros(9, 32, dtype=torch.float16)
    qkv, slots = torch.zeros(2, 3 * 64, dtype=torch.float16), torch.zeros(2, dtype=torch.int32)

    def rope(**changed: Any) -> Any:
        options: dict = {"cache": cache, "layer": 0, "slots": slots, "qkv": qkv, "cos": table, "sin": table}
        return lambda: qk.rope_kv4_append(**{**options, **changed})

    def add(residual: Any) -> Any:
        return lambda: qk.add_rms_norm_s8(x, residual, weight, 1e-5)

    calls = {
        "x: a list": norm([[1.0]]),
        "x: fp32": norm(x.float()),
        "x: one row": norm(x[0]),
        "x: K = 48": norm(x[:, :48]),
        "x: no tokens": norm(x[:0]),
        "x: elsewhere": norm(x.to("meta"), weight.to("meta")),
        "weight: a list": norm(weight=[1.0]),
        "weight: bf16": norm(weight=weight.bfloat16()),
        "weight: other K": norm(weight=weight[:32]),
        "eps: zero": norm(eps=0.0),
        "eps: NaN": norm(eps=float("nan")),
        "residual: other shape": add(x[:2]),
        "residual: bf16": add(x.bfloat16()),
        "residual: a list": add([1.0]),
        "cache: none": rope(cache=None),
        "layer: beyond": rope(layer=1),
        "qkv: fp32": rope(qkv=qkv.float()),
        "qkv: half a head": rope(qkv=qkv[:, :-32]),
        "qkv: no queries": rope(qkv=qkv[:, :128]),
        "cos: fp32": rope(cos=table.float()),
        "cos: a head wide": rope(cos=table.repeat(1, 2)),
        "sin: fewer": rope(sin=table[:5]),
        "slots: int64": rope(slots=slots.long()),
        "slots: too few": rope(slots=slots[:1]),
        "positions: too few": rope(positions=slots[:1]),
        "unquantised: K = 48": lambda: qk.rms_norm(x[:, :48], weight[:48], 1e-5),
        "unquantised: residual": lambda: qk.add_rms_norm(x, x[:2], weight, 1e-5),
        "gate_up: fp32": lambda: qk.silu_mul_s8(x.float()),
        "gate_up: I = 16": lambda: qk.silu_mul_s8(x[:, :32]),
        "gate_up: a list": lambda: qk.silu_mul_s8([1.0]),
    }
    return {name: message_of(call) for name, call in calls.items()}


# -- the engine -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def by_the_reference() -> Any:
    """GEMM and quantiser, which have tests of their own, replaced by what they equal: slow to simulate."""

    def multiply(a: layout.Activations, _: None, packed: Any, bias: Any, dtype: torch.dtype) -> torch.Tensor:
        return product(a.codes, a.scales, qk.unpack(packed), bias, dtype)

    def quantize(x: torch.Tensor) -> layout.Activations:
        a = quantize_per_token_s8(x)
        return layout.tile_activations(a.codes, a.scales)

    with mock.patch.object(qk, "w4a8_gemm", multiply), mock.patch.object(qk, "quantize_activations", quantize):
        yield


def engine_case(family: str, window: int | None = None, gemms: bool = False) -> dict:
    """A model of one layer on simulated kernels and on the reference: two prompts of different lengths, then a step, with
    ``gemms`` simulated too. Largest relative error of the prompts' logits and of the step's; whether both caches hold the
    same; how many tokens the device counts."""
    config: dict = {} if window is None else {"sliding_window": window}
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 64, "kv_heads": 1, "num_attention_heads": 2}
    model = build(family, num_hidden_layers=1, **sizes, **config)
    result = quantize_model(cast_parameters(model, torch.float16), "rtn-w4a8kv4", progress=False)
    engines = engine_pair(result, "cpu", torch.float16, (2, 70))
    with by_the_reference():
        prefilled = [e.prefill([[1, 2, 3], [7]]) for e in engines]
    with contextlib.nullcontext() if gemms else by_the_reference():
        steps = [e.decode(sequences, [5, 6]) for e, (sequences, _) in zip(engines, prefilled, strict=True)]

    def error(got: torch.Tensor, want: torch.Tensor) -> float:
        return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())

    fast, plain = (e.attend.cache for e in engines)
    (a, last), (b, _) = (sequences for sequences, _ in prefilled)
    same = map(torch.equal, fast.gather(0, a), plain.gather(0, b, 0, 4))
    return {
        "prefill": error(*(logits for _, logits in prefilled)),
        "decode": error(*steps),
        "cache": all(same),
        "lengths": fast.lengths[0, [a, last]].tolist(),
    }


# -- what the tests must notice -------------------------------------------------------------------------------------------


def _spoil_layout(what: str, x: layout.Activations, packed: layout.PackedWeight) -> tuple:
    """One bit wrong in one of the operands."""
    units, tiles, tokens, rows = (t.clone() for t in (packed.units, x.tiles, x.tokens, packed.rows))
    if what == "code":
        units[-1, -1, 0] ^= 0x10
    elif what == "group scale":
        units[0, 0, layout.CODE_BYTES] ^= 1
    elif what == "activation":
        tiles[0, 0, 5] ^= 1
    elif what == "token sum":
        tokens[0, 0] ^= 1
    elif what == "output zero":
        rows.view(torch.int32)[3, 1] ^= 1
    return dataclasses.replace(x, tiles=tiles, tokens=tokens), dataclasses.replace(packed, units=units, rows=rows)


def spoilt_case(version: str, what: str) -> dict:
    """A product with one bit of an operand wrong (``"nothing"``: none): in how many results it differs."""
    c = Case(3, 64, 128, "g128")
    w, codes, scales = operands(c)
    x, packed = _spoil_layout(what, layout.tile_activations(codes, scales), layout.pack_weight(w))
    out, _ = poisoned(c.m, c.n, torch.float16)
    plan = Plan(version, tokens=8, stages=2) if version in ("v4", "v5") else Plan(version)
    matmul.run(plan, gemm.Form(1), x, packed, None, out)
    return {"wrong": int((out != product(codes, scales, w)).sum())}


def mutant_case(version: str, what: str) -> dict:
    """A kernel with one instruction changed: in how many results it differs, if it ends."""
    expect, copy, store, permute = emulation.barrier_expect, emulation.bulk_load, emulation.stg4, emulation.permute
    name, wrong = {
        "announces no bytes": ("barrier_expect", lambda at, count: expect(at, 0)),
        "announces too few bytes": ("barrier_expect", lambda at, count: expect(at, int(count) - 16)),
        "announces too many bytes": ("barrier_expect", lambda at, count: expect(at, int(count) + 16)),
        "never initialises": ("barrier_init", emulation.nothing),
        "never releases": ("barrier_arrive", emulation.nothing),
        "never waits": ("barrier_wait", emulation.nothing),
        "copies a wrong size": ("bulk_load", lambda to, source, count, at: copy(to, source, int(count) + 8, at)),
        "copies from beyond": ("bulk_load", lambda to, source, count, at: copy(to, int(source) + (1 << 24), count, at)),
        "copies to beyond": ("bulk_load", lambda to, source, count, at: copy(int(to) + (1 << 18), source, count, at)),
        "stores beyond": ("stg4", lambda at, *values: store(int(at) + (1 << 24), *values)),
        "misaligned store": ("stg4", lambda at, *values: store(int(at) + 8, *values)),
        "swaps scale and offset": ("permute", lambda a, b, selector: permute(a, b, int(selector) ^ 0x1)),
        "tells nobody": ("store_release", lambda at, value: None),
    }[what]
    c = Case(3, 64, 640, "g128")
    w, codes, scales = operands(c)
    x, packed = layout.tile_activations(codes, scales), layout.pack_weight(w)
    out, _ = poisoned(c.m, c.n, torch.float16)
    causes: list[Exception] = []

    def watched(*values: Any) -> Any:
        try:
            return wrong(*values)
        except Exception as error:
            causes.append(error)
            raise

    with mock.patch.object(ptx, name, watched):
        try:
            matmul.run(Plan(version, tokens=8, stages=2, workers=2), gemm.Form(1), x, packed, None, out)
        except Exception as error:  # where it has a cause, that is its words behind a thread's number
            raise causes[0] if causes else error from None
    return {"wrong": int((out != product(codes, scales, w)).sum())}


# -- errors of the public functions ---------------------------------------------------------------------------------------


def message_of(call: Any) -> list[str]:
    """``[class, message]`` of what a call raises, empty if nothing."""
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


def error_cases() -> dict:
    """Bad input of the public functions: name -> ``[class, message]``."""
    x, scales = torch.zeros(3, 64, dtype=torch.int8), torch.ones(3, dtype=torch.float16)
    packed = qk.pack_weight(cases.weight(64, 64, "g32"))
    tiled = layout.tile_activations(x, scales)
    other = dataclasses.replace(tiled, tiles=tiled.tiles.to("meta"))

    def multiply(codes: Any = x, s: Any = scales, w: Any = packed, **options: Any) -> Any:
        return lambda: qk.w4a8_gemm(codes, s, w, **options)

    def finish(**options: Any) -> Any:
        return multiply(tiled, None, **options)

    def quantize(*arguments: Any) -> Any:
        return lambda: qk.quantize_activations(*arguments)

    def out(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype)

    calls = {
        "packed: not packed": multiply(w=torch.zeros(64, 64)),
        "dtype: fp32": multiply(dtype=torch.float32),
        "x_scales: twice": multiply(codes=tiled),
        "x_scales: none": multiply(s=None),
        "x_scales: fp32": multiply(s=scales.float()),
        "x_scales: too many": multiply(s=torch.ones(4, dtype=torch.float16)),
        "x_scales: a list": multiply(s=[1.0, 1.0, 1.0]),
        "x_codes: a list": multiply(codes=[[1, 2]]),
        "x_codes: fp16": multiply(codes=x.half()),
        "x_codes: one row": multiply(codes=x[0]),
        "x_codes: other K": multiply(codes=torch.zeros(3, 96, dtype=torch.int8)),
        "x_codes: other K, tiled": multiply(
            codes=layout.tile_activations(torch.zeros(3, 96, dtype=torch.int8), scales), s=None
        ),
        "x_codes: no tokens": multiply(codes=x[:0], s=scales[:0]),
        "packed: elsewhere": multiply(codes=other, s=None),
        "bias: wrong size": finish(bias=torch.zeros(32)),
        "bias: integers": finish(bias=torch.zeros(64, dtype=torch.int32)),
        "bias: a matrix": finish(bias=torch.zeros(1, 64)),
        "bias: NaN": finish(bias=torch.full((64,), torch.nan)),
        "bias: a list": finish(bias=[0.0] * 64),
        "out: fp32": finish(out=out(3, 64, dtype=torch.float32)),
        "out: bf16": finish(out=out(3, 64), dtype=torch.bfloat16),
        "out: wrong shape": finish(out=out(64, 3)),
        "out: a column block": finish(out=out(3, 128)[:, :64]),
        "out: misaligned": finish(out=out(3 * 64 + 1)[1:].view(3, 64)),
        "x: a list": quantize([[1.0]]),
        "x: fp64": quantize(torch.zeros(3, 64, dtype=torch.float64)),
        "x: one row": quantize(torch.zeros(64)),
        "x: K = 48": quantize(torch.zeros(3, 48)),
        "x: no tokens": quantize(torch.zeros(0, 64)),
        "x: no inputs": quantize(torch.zeros(3, 0)),
        "x: elsewhere": quantize(torch.zeros(3, 64, device="meta")),
        "x_scales: for floats": quantize(torch.zeros(3, 64), scales),
        "x_scales: missing": quantize(x),
    }
    return {name: message_of(call) for name, call in calls.items()}


FUNCTIONS = {
    f.__name__: f
    for f in (
        *(gemm_case, public_case, compiled_case, quantize_case, spoilt_case, mutant_case, error_cases),
        *(fused_case, rope_case, compiled_fused_case, fused_errors, engine_case, sliced_case, sliced_errors),
        *(sums_case, sums_errors),
        *(attention_case, public_attention_case, attention_mutant_case, attention_errors, codes_case),
        *(own_case, compiled_own_case, own_mutant_case, own_errors),
    )
}


def main() -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints goes to stderr
    warnings.simplefilter("ignore", RuntimeWarning)  # 32-bit words wrap, as they should
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer: dict = {"result": FUNCTIONS[request["function"]](**request["arguments"])}
        except Exception as error:  # for the test, which expects it or fails
            answer = {"error": type(error).__name__, "message": str(error)}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
