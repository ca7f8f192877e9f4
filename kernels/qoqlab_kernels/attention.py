"""Decode attention as torch sees it: checks, choice of kernel, workspaces, launch."""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch

from qoqlab.checks import require_count, require_positive, require_tensor, shape_of
from qoqlab.transfer import sent

from . import kv4, kv4_ladder, matmul, ptx
from .cache import PagedKV
from .kv4 import LOG2_E, Form, Ring

#: Overrides the version, for lessons and tests: ``QOQLAB_ATTENTION=v2``.
OVERRIDE = "QOQLAB_ATTENTION"
VERSIONS = kv4_ladder.VERSIONS | {"v4": kv4.v4}
DTYPES = (torch.float16, torch.bfloat16)
MAX_GROUP = 16
#: Warps in a block of v4, and about how many bytes are on their way to each: more let a warp's first page wait for others'
#: second and third ones, which costs short contexts 5 % (measured on an H100).
WARPS, WARP_BYTES = 4, 18432
#: Pages whose time the end of a segment takes, about. 256 sequences of 1280 tokens and 64 of one: 510 us with 0, 215 with 2,
#: 155 with 4, 122 with 8, 124 with 16; 64 sequences of 1 to 2048 tokens: 72, 43, 35, 35, 38 (measured on an H200).
WEIGHT = 8


@dataclass(frozen=True)
class AttentionPlan:
    """Which kernel and, of v4 only, how large: ``warps`` in a block, ``stages`` pages on their way to each, ``bulk`` copies,
    ``blocks`` in the grid, ``overlap`` with the previous kernel's end, ``weight``: pages that a segment counts for beside
    its own, ``residents``: blocks on a multiprocessor."""

    version: str
    warps: int = 0
    stages: int = 0
    bulk: bool = False
    blocks: int = 0
    overlap: bool = False
    weight: int = 0
    residents: int = 1

    def constants(self, form: Form) -> tuple:
        """What the kernel of this version is built from."""
        if self.version != "v4":
            return (form,)
        return (form, self.warps, self.stages, self.bulk, self.overlap, self.weight, self.residents)


def room_of(residents: int, per_block: int, per_processor: int) -> int:
    """Bytes of shared memory for each of so many blocks on a multiprocessor; 1 KB a block is the driver's."""
    return min(per_block, per_processor // residents - 1024)


def plan_for(form: Form, capability: tuple[int, int], processors: int, per_block: int, per_processor: int) -> AttentionPlan:
    """The plan for a GPU with so many bytes of shared memory for a block and for a multiprocessor: two blocks on each
    multiprocessor if two stages of theirs fit, else one, of fewer warps if need be."""
    wanted, hopper = max(2, WARP_BYTES // form.layout.bytes), capability >= (9, 0)
    for residents, warps in ((2, WARPS), (1, WARPS), (1, WARPS // 2)):
        limit = room_of(residents, per_block, per_processor)
        stages = min(wanted, (limit - Ring(form, warps, 0).total) // (warps * (form.layout.bytes + 8)))
        if stages >= residents:
            return AttentionPlan("v4", warps, stages, hopper, processors * residents, hopper, WEIGHT, residents)
    raise ValueError(f"page_size: pages of {form.page_size} tokens do not fit in {per_block} bytes of shared memory")


@functools.cache
def _plan(form: Form, index: int) -> AttentionPlan:
    properties: Any = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    if capability < (8, 0):
        raise RuntimeError(f"kv4_attention: compute capability {capability[0]}.{capability[1]}; 8.0 or newer is needed")
    return plan_for(
        form,
        capability,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        properties.shared_memory_per_multiprocessor,
    )


def attention_plan(form: Form, device: torch.device) -> AttentionPlan:
    """How attention runs on a device: by v4, or v2 where pages are not of 4 bits, or what the override says (ValueError if
    there is no such version). Small under the simulator: three blocks, so that heads are shared."""
    known = list(VERSIONS) if form.bits == 4 else ["v2"]
    chosen = os.environ.get(OVERRIDE, known[-1])
    if chosen not in known:
        raise ValueError(f"{OVERRIDE}: {chosen!r} is not one of {', '.join(known)} for pages of {form.bits} bits")
    if chosen != "v4":
        return AttentionPlan(chosen)
    if ptx.SIMULATED:
        return AttentionPlan("v4", 2, 2, True, 3, weight=1)
    return _plan(form, device.index)


def _bits(value: float) -> int:
    """A number as the bits of an fp32."""
    return struct.unpack("<I", struct.pack("<f", value))[0]


def _slots(cache: PagedKV, sequences: Sequence[int] | torch.Tensor) -> torch.Tensor:
    if isinstance(sequences, torch.Tensor):
        if sequences.dtype != torch.int32 or sequences.ndim != 1 or sequences.device != cache.pool.device:
            raise ValueError(
                f"sequences: expected int32 [B] on {cache.pool.device}, got {sequences.dtype} of shape "
                f"{shape_of(sequences)} on {sequences.device}"
            )
        return sequences.contiguous()
    numbers = list(sequences)
    for sequence in numbers:
        cache.pages_of(sequence)
    return sent(numbers, cache.pool.device, torch.int32)


@overload
def kv4_attention(
    query: torch.Tensor,
    cache: PagedKV,
    layer: int,
    sequences: Sequence[int] | torch.Tensor,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    lse: Literal[False] = False,
    settled: bool = False,
) -> torch.Tensor: ...


@overload
def kv4_attention(
    query: torch.Tensor,
    cache: PagedKV,
    layer: int,
    sequences: Sequence[int] | torch.Tensor,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    *,
    lse: Literal[True],
    settled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def kv4_attention(
    query: torch.Tensor,
    cache: PagedKV,
    layer: int,
    sequences: Sequence[int] | torch.Tensor,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    lse: bool = False,
    settled: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """One decode step of attention: ``query [B, Hq, D]`` fp16 or bf16 against the cached tokens of ``B`` sequences.

    Hq is a multiple of the cache's KV heads, at most 16 times as many; consecutive query heads share a KV head.
    ``sequences``: numbers from `PagedKV4.open`, or an int32 tensor of them on the device, which is not looked into (for CUDA
    graphs; lengths and pages are read on the device, so a captured launch sees them grow). ``scale`` defaults to
    ``D ** -0.5``. ``window``: only the last so many tokens. ``softcap``: scores become ``softcap * tanh(score / softcap)``.

    ``settled``: the kernel before this one on the stream writes neither lengths, page tables, ``sequences`` nor tokens that
    the lengths count, and began its work when those before it had ended. `fused.rope_kv4_append` with positions is such a
    kernel. Then pages are fetched while it runs (compute capability 9.0).

    Returns ``[B, Hq, D]`` in the query's dtype: `qoqlab.reference.kv4_attention` within 1e-3 (relative, before the last
    rounding); zeros for a sequence without tokens. With ``lse`` a pair: that, and the natural log-sum-exp of the scaled (and
    capped) scores, fp32 ``[B, Hq]``, -inf for a sequence without tokens: what `attend_own_s8` needs to add a token. Repeats
    are bit-identical. NaN is not looked for.

    Raises TypeError or ValueError naming the argument; RuntimeError on GPUs below compute capability 8.0.
    """
    if not isinstance(cache, PagedKV):
        raise TypeError(f"cache: expected a PagedKV4, PagedKV8 or PagedKV16, got {type(cache).__name__}")
    require_tensor("query", query)
    if query.dtype not in DTYPES:
        raise TypeError(f"query: expected fp16 or bf16, got {query.dtype}")
    cache.layer_lengths(layer)
    slots = _slots(cache, sequences)
    group = query.shape[1] // cache.kv_heads if query.ndim == 3 else 0
    if query.ndim != 3 or query.shape[0] != len(slots) or query.shape[2] != cache.head_dim:
        raise ValueError(f"query: expected [{len(slots)}, Hq, {cache.head_dim}], got {shape_of(query)}")
    if not 1 <= group <= MAX_GROUP or group * cache.kv_heads != query.shape[1]:
        raise ValueError(
            f"query: {query.shape[1]} heads; expected a multiple of the cache's {cache.kv_heads} KV heads, at most "
            f"{MAX_GROUP} times as many"
        )
    if query.device != cache.pool.device:
        raise ValueError(f"query: on {query.device}, the cache on {cache.pool.device}")
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None:
            require_positive(name, value)
    if window is not None:
        require_count("window", window, 1)
    matmul._require_place("query", query)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    sums = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device) if lse else None
    if len(slots):
        bfloat, bits = query.dtype == torch.bfloat16, cache.layout.bits
        form = Form(cache.head_dim, group, cache.page_size, bfloat, softcap is not None, lse, bits, settled)
        scale = cache.head_dim**-0.5 if scale is None else scale
        run(attention_plan(form, query.device), form, query, cache, layer, slots, (out, sums), (scale, window or 0, softcap))
    return out if sums is None else (out, sums)


def run(
    plan: AttentionPlan,
    form: Form,
    query: torch.Tensor,
    cache: PagedKV,
    layer: int,
    slots: torch.Tensor,
    results: tuple[torch.Tensor, torch.Tensor | None],
    options: tuple[float, int, float | None],
) -> None:
    """Launch the kernel of a plan; operands are checked already. ``results``: out, and the log-sum-exp or None, as the form
    says; ``options``: scale, window (0: none), soft cap."""
    (out, lse), (scale, window, softcap) = results, options
    heads = len(slots) * cache.kv_heads
    if plan.version == "v4":
        parts, counters = matmul.room(plan.blocks * 2 * form.group * form.row, heads, query.device)
        grid = (plan.blocks, 1, 1)
    else:
        counters = torch.empty(1, dtype=torch.int32, device=query.device)
        parts, grid = counters.view(torch.uint8), (-(-heads * form.group // kv4_ladder.HEADS[plan.version]), 1, 1)
    factor = scale * LOG2_E if softcap is None else scale * 2 * LOG2_E / softcap
    cap = 0.0 if softcap is None else softcap * LOG2_E
    arguments = [
        query.contiguous(),
        cache.pool[layer],
        cache.tables,
        cache.layer_lengths(layer),
        slots,
        out,
        counters if lse is None else lse,
        parts,
        counters,
    ]
    if ptx.SIMULATED:  # whose arrays have the dtypes that the kernels declare
        half, word = torch.uint16, torch.uint32
        dtypes = (half, torch.uint8, word, word, word, half, torch.float32, torch.uint8, word)
        arguments = [tensor.view(kind) for tensor, kind in zip(arguments, dtypes, strict=True)]
    numbers = [len(slots), cache.kv_heads, cache.tables.shape[1], window, _bits(factor), _bits(cap)]
    matmul._run(VERSIONS[plan.version], plan.constants(form), grid, [*arguments, *numbers])
