"""Decode attention on a KV4 cache: what to attend to, and what must come out. For the simulator's tests and the GPU's."""

from __future__ import annotations

from typing import Any

import qoqlab_kernels as qk
import torch
from qoqlab_kernels import attention
from qoqlab_kernels.attention import AttentionPlan
from qoqlab_kernels.kv4 import Form

#: fp16 rounds every weight, and the result, by at most 2**-11 of itself; bf16 the result by 2**-8.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 5e-3}
#: Half of the distance of numbers below the normal range.
SUBNORMAL = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}
GUARD = 512  # elements of poison before and after an output


def filled(form: Form, kv_heads: int, lengths: list[int], what: str = "normal", device: str = "cpu") -> tuple[Any, list]:
    """(cache, sequences) with random tokens: "normal", "uniform" (nearly equal scores), "offset", "constant", "peaked",
    "tiny". Whatever is not written is NaN, and pages are in no order."""
    generator = torch.Generator(device).manual_seed(sum(lengths))
    pages = sum(-(-n // form.page_size) for n in lengths) + 3
    kind = {4: qk.PagedKV4, 8: qk.PagedKV8, 16: qk.PagedKV16}[form.bits]
    cache = kind(
        2, kv_heads, form.head_dim, pages, form.page_size, sequences=len(lengths) + 1, max_tokens=max(lengths), device=device
    )
    cache.pool.fill_(0xFF)
    shuffled = torch.randperm(pages, generator=torch.Generator().manual_seed(1)).tolist()
    cache.allocator._free = shuffled
    sequences = [cache.open() for _ in range(len(lengths) + 1)][1:]
    for sequence, count in zip(sequences, lengths, strict=True):
        if not count:
            continue
        k, v = torch.randn(2, 1, kv_heads, count, form.head_dim, generator=generator, device=device)
        k = k * {"uniform": 0.02, "peaked": 8.0}.get(what, 1.0)
        if what == "offset":
            k[..., 5] += 100
            v = v + 1000
        elif what == "constant":
            v = torch.full_like(v, 0.37)
        elif what == "tiny":
            v = v * 1e-3
        for start in range(0, count, 16384):
            part = slice(start, start + 16384)
            cache.append(1, [sequence], k[:, :, part], v[:, :, part])
    return cache, sequences


def expected(
    query: torch.Tensor, cache: Any, sequences: list, scale: float, window: int | None, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in fp64 on the dequantised cache, sequence by sequence, and the scores' log-sum-exp; zeros and -inf where
    there are no tokens."""
    want = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    sums = torch.full(query.shape[:2], -torch.inf, dtype=torch.float64, device=query.device)
    for i, sequence in enumerate(sequences):
        if cache.length(1, sequence):
            keys, values = (x[:, -(window or 0) :].double() for x in cache.gather(1, sequence))
            scores = query[i].double().view(cache.kv_heads, -1, cache.head_dim) @ keys.transpose(1, 2) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            want[i] = (scores.softmax(-1) @ values).flatten(0, 1)
            sums[i] = scores.logsumexp(-1).flatten()
    return want, sums


def attend(
    plan: AttentionPlan,
    form: Form,
    kv_heads: int,
    lengths: list[int],
    what: str = "normal",
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    repeats: int = 1,
    device: str = "cpu",
    run: Any = attention.run,
) -> dict[str, Any]:
    """Run a plan into poisoned memory: which properties held, and the largest relative error of a sequence."""
    cache, sequences = filled(form, kv_heads, lengths, what, device)
    kind = torch.bfloat16 if form.bfloat else torch.float16
    generator = torch.Generator(device).manual_seed(2)
    shape = (len(lengths), kv_heads * form.group, form.head_dim)
    query = torch.randn(shape, generator=generator, device=device).to(kind)
    slots = torch.tensor(sequences, dtype=torch.int32, device=device)
    scale = form.head_dim**-0.5 if scale is None else scale
    outputs, kept = [], []
    for _ in range(repeats):
        buffer = torch.full((2 * GUARD + query.numel(),), torch.nan, dtype=kind, device=device)
        out = buffer[GUARD:-GUARD].view(shape)
        lse = torch.full(shape[:2], torch.nan, device=device) if form.lse else None
        run(plan, form, query, cache, 1, slots, (out, lse), (scale, window or 0, softcap))
        outputs.append(out)
        kept.append(bool(buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all()))
    want, sums = expected(query, cache, sequences, scale, window, softcap)
    errors = []
    for got, wanted, count in zip(outputs[0].double(), want, lengths, strict=True):
        lost = SUBNORMAL[kind] * got.numel() ** 0.5  # by the last rounding, of results below the normal range
        error = ((got - wanted).norm() - lost).clamp(min=0) / wanted.norm() if count else got.abs().sum()
        errors.append(error.item())
    # fp32 has scores of up to some hundreds to a few units in 2**-16
    right = lse is None or torch.allclose(lse.double(), sums, rtol=1e-5, atol=2e-4)
    return {
        "right": right and all(error <= TOLERANCE[kind] for error in errors),
        "kept": all(kept),
        "repeats": all(torch.equal(out, outputs[0]) for out in outputs),
        "error": max(errors),
    }
