"""What runs inside numba's CUDA simulator, in a process of its own (`simulator`): functions from JSON to JSON.

NUMBA_ENABLE_CUDASIM=1 python -m tests.kernels.simulated      one request a line on stdin, one answer a line on stdout
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import warnings
from typing import Any
from unittest import mock

import numpy as np
import qoqlab_kernels as qk
import torch
from qoqlab_kernels import attention, cases, decode, emulation, gemm, launch, layout, matmul, ptx
from qoqlab_kernels.cases import Case
from qoqlab_kernels.plan import Plan

from qoqlab.affine import quantize_per_token_s8

from .expected import product

GUARD = 512  # elements of poison before and after an output


def poisoned(rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(a ``[rows, columns]`` output full of poison, the larger buffer in whose middle it lies)."""
    buffer = torch.full((2 * GUARD + rows * columns,), torch.nan, dtype=dtype)
    return buffer[GUARD : GUARD + rows * columns].view(rows, columns), buffer


@contextlib.contextmanager
def backwards() -> Any:
    """Blocks run in the opposite order, so that the first worker of a shared tile comes last instead of the last."""
    from numba.cuda.simulator.kernel import BlockManager

    run = BlockManager.run

    def reverse(self: Any, point: tuple, *arguments: Any) -> Any:
        return run(self, tuple(size - 1 - p for size, p in zip(self._grid_dim, point, strict=True)), *arguments)

    with mock.patch.object(BlockManager, "run", reverse):
        yield


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
    reverse: bool = False,
    repeats: int = 1,
) -> dict:
    """Run a case by a plan into poisoned memory, ``repeats`` times: which properties held every time."""
    c, p, kind = Case(**case), Plan(**plan), getattr(torch, dtype)
    w, codes, scales = operands(c, extreme)
    x, packed = layout.tile_activations(codes, scales), layout.pack_weight(w)
    b = torch.linspace(-3, 3, c.n) if bias else None
    form = gemm.Form(packed.groups, c.format == "channel-scaled", dtype == "bfloat16", bias)
    want = product(codes, scales, w, b, kind)
    parts, counters = matmul.workspace(p, int(np.prod(p.tiles(c.m, c.n))), x.device)
    outputs, kept = [], []
    for _ in range(repeats):
        if p.version in ("v4", "v5"):
            parts.fill_(0xA5)
        out, buffer = poisoned(c.m, c.n, kind)
        with backwards() if reverse else contextlib.nullcontext():
            matmul.run(p, form, x, packed, b, out)
        outputs.append(out)
        kept.append(bool(buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all()))
    return {
        "equal": torch.equal(outputs[0], want),
        "finite": bool(want.isfinite().all()),
        "repeats": all(torch.equal(out, outputs[0]) for out in outputs),
        "kept": all(kept),
        "counters": int(counters.abs().sum()) if p.version in ("v4", "v5") else 0,
    }


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
    """The public functions under torch.compile, in one graph, for two batches: "codes", "tiled" or quantised "floats"."""
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
        floats = codes[:m].float() * scales[:m].float()[:, None]
        q = quantize_per_token_s8(floats) if how == "floats" else None
        some, their = (q.codes, q.scales) if q else (codes[:m], scales[:m])
        x = {"codes": (some, their), "tiled": (layout.tile_activations(some, their), None), "floats": (floats,)}[how]
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
    """`quantize_activations` against `quantize_per_token_s8` and `tile_activations`; the second token is all zeros."""
    generator = torch.Generator().manual_seed(m * k)
    x = torch.randn(m, k, generator=generator) * torch.logspace(-6, 3, m)[:, None]
    x[1:2] = 0
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


# -- attention over a KV4 cache -------------------------------------------------------------------------------------------


def attention_case(
    lengths: list[int],
    heads: int,
    group: int,
    dim: int,
    plan: dict,
    dtype: str = "float16",
    window: int = 0,
    softcap: float = 0.0,
    reverse: bool = False,
) -> dict:
    """Append by the kernel, then attend by a plan into poison: whether the cache is right, and the largest relative error
    against fp64 on the dequantised cache (for a sequence without tokens: the largest number)."""
    generator = torch.Generator().manual_seed(sum(lengths))
    cache = qk.PagedKV4(2, heads, dim, 1 + sum(-(-n // 64) for n in lengths), sequences=8)
    cache.data[:, cache.allocator.take()] = 0xFF  # a page that nobody owns, full of NaN constants
    opened, total = [cache.open() for _ in lengths], sum(lengths)
    cache.extend(opened, lengths)
    rows = torch.randn(2, total, heads, dim, generator=generator)
    rows[0] += 2 * torch.randn(heads, dim, generator=generator)
    rows[1] = rows[1] * 0.01 + 0.02
    rows[:, 3::7] = 0
    keys, values = rows.to(getattr(torch, dtype))
    cache.append(1, opened, keys, values, lengths)
    want = cache.data.clone()
    cache.data[:, 1:] = 0
    back = torch.cat([torch.arange(n, 0, -1, dtype=torch.int32) for n in lengths])
    cache.write_by_kernel(1, cache.batch(opened).repeat_interleave(torch.tensor(lengths)), back, keys, values)
    query = torch.randn(len(lengths), heads * group, dim, generator=generator).to(keys.dtype)
    form = attention.Form(dim, group, dtype == "bfloat16", softcap > 0)
    out, buffer = poisoned(len(lengths), heads * group * dim, keys.dtype)
    out = out.view(query.shape)
    with backwards() if reverse else contextlib.nullcontext():
        decode.run(decode.DecodePlan(**plan), form, query, cache.data, cache.tables, cache.lengths, cache.batch(opened), out,
                   (1, dim**-0.5, window, softcap))  # fmt: skip
    errors = []
    for b, sequence in enumerate(opened):
        k, v = (x[:, -window:].double() for x in cache.gather(1, sequence))
        logits = query[b].double().view(heads, group, dim) @ k.transpose(-1, -2) * dim**-0.5
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        y = (logits.softmax(-1) @ v).view(-1, dim)
        errors.append(float((out[b].double() - y).norm() / (y.norm() if lengths[b] else 1)))
    return {
        "cache": torch.equal(want, cache.data),
        "error": max(errors),
        "kept": bool(buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all()),
    }


def attention_public_case() -> dict:
    """The public function, plain and under torch.compile, and the messages for bad input."""
    cache = qk.PagedKV4(1, 1, 64, 2, sequences=2)
    a = cache.open()
    cache.extend([a], [70])
    x = torch.randn(70, 1, 64, generator=torch.Generator().manual_seed(0)).half()
    cache.append(0, [a], x, x, [70])
    query, batch = x[:2].reshape(1, 2, 64), cache.batch([a])
    y = qk.kv4_attention(query, cache, 0, [a], window=66)
    compiled = torch.compile(lambda q: qk.kv4_attention(q, cache, 0, batch, window=66) * 2, backend="aot_eager")

    def call(q: Any = query, c: Any = cache, layer: int = 0, sequences: Any = batch, **options: Any) -> Any:
        return message_of(lambda: qk.kv4_attention(q, c, layer, sequences, **options))

    return {
        "compiled": torch.equal(compiled(query), y * 2),
        "errors": [
            call(q=query.float()),
            call(q=query[0]),
            call(q=query.expand(2, 2, 64)),
            call(q=query[..., :32]),
            call(q=query.repeat(1, 9, 1)),
            call(c=qk.PagedKV8(1, 1, 64, 2)),
            call(layer=1),
            call(sequences=[1]),
            call(sequences=batch.long()),
            call(scale=float("nan")),
            call(window=0),
            call(softcap=-1.0),
        ],
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
    """A kernel with one instruction changed, run with little patience: in how many results it differs, if it ends."""
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
        "counts no arrivals": ("atomic_inc", lambda at: np.uint32(0)),
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

    with mock.patch.object(emulation, "PATIENCE", 1.5), mock.patch.object(ptx, name, watched):
        try:
            matmul.run(Plan(version, tokens=8, stages=2, workers=2), gemm.Form(1), x, packed, None, out)
        except Exception as error:  # of whichever thread the simulator looked at first, perhaps one that waited in vain
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


def cluster_case() -> dict:
    """The simulator has no clusters and says so."""
    return {"raised": message_of(lambda: launch.simulate(gemm.v5(gemm.Form(1), 64, 1, 2, 2), (2, 1, 1), []))}


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
        attention_case,
        attention_public_case,
        gemm_case,
        public_case,
        compiled_case,
        quantize_case,
        spoilt_case,
        mutant_case,
        cluster_case,
        error_cases,
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
