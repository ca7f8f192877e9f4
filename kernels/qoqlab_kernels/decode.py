"""Decode attention as torch sees it: checks, choice of kernel, launch, custom operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qoqlab.checks import require_count, require_float, shape_of

from . import attention, matmul, ptx
from .attention import MOST_SEQUENCES, Form, Room, part_bytes
from .cache import PagedKV4

#: Below so many (sequence, kv head) pairs one large block a multiprocessor takes fewer parts to merge.
FEW_HEADS = 64
#: Shared memory of a multiprocessor, and what one block may use of it, by compute capability (bytes).
SHARED = {(8, 0): (167936, 166912), (9, 0): (233472, 232448), (10, 0): (233472, 232448)}
SMALL_SHARED = (102400, 101376)


@dataclass(frozen=True)
class DecodePlan:
    """How one launch runs. ``warps`` a block, ``stages`` pages in a warp's ring, ``workers`` blocks, ``bulk``: Hopper's
    copies."""

    version: str = "v4"
    warps: int = 4
    stages: int = 3
    workers: int = 0
    bulk: bool = False

    def constants(self, form: Form) -> tuple:
        """What the version's builder takes."""
        return (form, self.warps, self.stages, self.bulk)


def plan_decode(batch: int, kv_heads: int, form: Form, capability: tuple[int, int], processors: int) -> DecodePlan:
    """The plan for ``batch`` sequences; lengths play no part, so that a captured launch stays right while they grow."""
    whole, most = SHARED.get(capability, SMALL_SHARED)
    bulk = capability >= (9, 0)
    per_stage = 128 // form.dim  # a page of head_dim 64 has half the bytes
    if batch * kv_heads * form.splits < FEW_HEADS:
        stages = next(n for n in (2 * per_stage, 1) if Room(form, 8, n).total <= most)
        return DecodePlan("v4", 8, stages, processors, bulk)
    stages = next(n for n in (3 * per_stage, 2 * per_stage, 1) if Room(form, 4, n).total <= most)
    for fewer in range(stages, 1, -1):
        if 2 * (Room(form, 4, fewer).total + 1024) <= whole:
            return DecodePlan("v4", 4, fewer, 2 * processors, bulk)
    return DecodePlan("v4", 4, stages, processors, bulk)


def kv4_attention(
    query: torch.Tensor,
    cache: PagedKV4,
    layer: int,
    sequences: Sequence[int] | torch.Tensor,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """One decode step of attention: every query head against its sequence's cached keys and values, softmax in fp32.

    ``query`` fp16 or bf16 [B, Hq, head_dim], Hq a multiple of the cache's kv heads, at most 16 times as many; consecutive
    query heads share a KV head. ``sequences``: B of them; int32 [B] from ``cache.batch`` needs no copy. ``scale`` defaults
    to ``head_dim ** -0.5``; ``window``: only the last so many tokens are seen; ``softcap``: logits become
    ``softcap * tanh(logit / softcap)``. Returns [B, Hq, head_dim] in ``query``'s dtype; zeros for a sequence without tokens.

    Equals `qoqlab.reference.kv4_attention` on the dequantised cache up to rounding: relative error at most 2e-3 at any
    length (paper section 5.3). Runs on torch's current stream, waits for nothing, may be captured in a CUDA graph whose
    replays see new lengths, and used under torch.compile.

    Raises TypeError or ValueError naming the argument; RuntimeError on GPUs below compute capability 8.0.
    """
    require_float("query", query)
    if not isinstance(cache, PagedKV4) or cache.name != "kv4":
        raise TypeError(f"cache: expected a PagedKV4, got {type(cache).__name__}; the kernels read 4-bit pages only")
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"query: expected fp16 or bf16, got {query.dtype}")
    layer = cache._layer(layer)
    batch = cache._batch(sequences) if isinstance(sequences, torch.Tensor) else cache.batch(sequences)
    if query.ndim != 3 or query.shape[0] != len(batch) or query.shape[2] != cache.head_dim or not len(batch):
        raise ValueError(f"query: expected [{len(batch)}, Hq, {cache.head_dim}] with B >= 1, got {shape_of(query)}")
    group = query.shape[1] // cache.kv_heads
    if query.shape[1] % cache.kv_heads or not 1 <= group <= 16:
        raise ValueError(f"query: {query.shape[1]} heads; expected 1 to 16 for each of {cache.kv_heads} kv heads")
    if query.device != cache.device:
        raise ValueError(f"query: on {query.device}, the cache on {cache.device}")
    factor = cache.head_dim**-0.5 if scale is None else float(scale)
    if not math.isfinite(factor):
        raise ValueError(f"scale: expected a finite number, got {scale!r}")
    if window is not None:
        require_count("window", window, 1)
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap: expected a positive number, got {softcap!r}")
    matmul._require_place("query", query)
    arguments = (cache.data, cache.tables, cache.lengths, batch, layer, factor, window or 0, softcap or 0.0)
    if torch.compiler.is_compiling():
        return _operator(query, *arguments)
    return _attend(query, *arguments)


def _attend(
    query: torch.Tensor,
    data: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    batch: torch.Tensor,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    form = Form(query.shape[2], query.shape[1] // data.shape[2], query.dtype == torch.bfloat16, softcap > 0)
    if ptx.SIMULATED:
        plan = DecodePlan("v4", 2, 2, 3, True)
    else:
        capability, processors, _ = matmul._gpu(query.device.index)
        if capability < (8, 0):
            raise RuntimeError(f"compute capability {capability[0]}.{capability[1]}: the kernels need 8.0 or newer")
        plan = plan_decode(len(batch), data.shape[2], form, capability, processors)
    for start in range(0, len(batch), MOST_SEQUENCES):
        some = slice(start, start + MOST_SEQUENCES)
        run(plan, form, query[some], data, tables, lengths, batch[some], out[some], (layer, scale, window, softcap))
    return out


def bits(number: float) -> int:
    """The fp32 pattern of a number, as kernels take it."""
    return int(torch.tensor(number, dtype=torch.float32).view(torch.int32)) & 0xFFFFFFFF


def run(
    plan: DecodePlan,
    form: Form,
    query: torch.Tensor,
    data: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    batch: torch.Tensor,
    out: torch.Tensor,
    options: tuple[int, float, int, float],
) -> None:
    """Launch the kernel of a plan for at most 256 sequences; operands are checked already. ``options``: layer, scale, window
    (0: none), soft-cap (0: none)."""
    _, pages, kv_heads, _ = data.shape
    layer, scale, window, softcap = options
    parts, counters = matmul.room_for(
        max(plan.workers, 1) * 2 * part_bytes(form), len(batch) * kv_heads * form.splits, query.device
    )
    query = matmul._aligned(query)
    arguments = [query, data, tables, lengths, batch.contiguous(), out, parts, counters]
    sizes = [len(batch), kv_heads, pages, layer, tables.shape[1], window, bits(scale), bits(softcap)]
    if ptx.SIMULATED:  # whose arrays have the dtypes that the kernels declare
        u8, u16, u32 = torch.uint8, torch.uint16, torch.uint32
        kinds = (u16, u8, u32, u32, u32, u16, u8, u32)
        arguments = [tensor.view(kind) for tensor, kind in zip(arguments, kinds, strict=True)]
    matmul._run(attention.VERSIONS[plan.version], plan.constants(form), (plan.workers, 1, 1), [*arguments, *sizes])


@torch.library.custom_op("qoqlab::kv4_attention", mutates_args=())
def _operator(
    query: torch.Tensor,
    data: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    batch: torch.Tensor,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    return _attend(query, data, tables, lengths, batch, layer, scale, window, softcap)


@_operator.register_fake
def _(query, data, tables, lengths, batch, layer, scale, window, softcap):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape)
