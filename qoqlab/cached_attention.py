"""What an engine does between the q, k, v GEMM and the output GEMM: heads' norms, rotary positions, the cache, attention.

`ReferenceAttention` works on `paged.PagedCache` with `reference` and torch; `KernelAttention` on the kernels' cache. On both
a prompt attends to its own exact keys and values, through torch, and a decoded token to the quantised cache and its own
exact key and value. What they return is INT8 per token, ready for the output GEMM.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from . import exact
from .affine import Affine, quantize_per_token_s8
from .kv import KVFormat
from .paged import PAGE, PagedCache
from .transfer import sent

#: Position of the token that a row without a sequence repeats: the first, since nothing before it costs attention nothing (a
#: page for each head of each such row took longer than 24 full pages).
IDLE = 0
#: RMSNorms of query and key heads ``[D]`` and their epsilon, or None.
HeadNorms = tuple[torch.Tensor, torch.Tensor, float] | None


@dataclass(frozen=True)
class Shape:
    """Sizes of a model's attention and cache: a sequence has at most ``max_tokens`` tokens, ``max_batch`` are open.
    ``room``: pages of the cache (None: enough for all of them at their longest)."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_batch: int
    max_tokens: int
    room: int | None = None

    @property
    def pages(self) -> int:
        """Pages of the cache."""
        return self.room or self.max_batch * -(-self.max_tokens // PAGE)


@dataclass(frozen=True)
class Batch:
    """Tokens of a step, one sequence after the other: ``counts[i]`` of ``sequences[i]``, the first at ``starts[i]``.

    ``positions`` and ``slots`` int32 [M] say the same token by token on the device (a slot is a sequence's number); a
    captured graph has only these.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    sequences: Sequence[int] = field(default=())
    counts: Sequence[int] = field(default=())
    starts: Sequence[int] = field(default=())

    @functools.cached_property
    def ends(self) -> torch.Tensor:
        """Where each sequence's tokens begin, and where the last one's end: int32 on the device."""
        return sent([0, *itertools.accumulate(self.counts)], self.positions.device, torch.int32)

    def next(self) -> Batch:
        """The same sequences one token further."""
        starts = [start + 1 for start in self.starts]
        return Batch(self.positions + 1, self.slots, self.sequences, self.counts, starts)


def batch_of(sequences: Sequence[int], counts: Sequence[int], starts: Sequence[int], device: torch.device) -> Batch:
    """A `Batch` with its tensors."""
    if all(count == 1 for count in counts):  # a decode step, which should not wait for Python
        positions, slots = sent([starts, sequences], device, torch.int32)
        return Batch(positions, slots, sequences, counts, starts)
    many, first, slots = sent([counts, starts, sequences], device)
    total = sum(counts)
    begin = (many.cumsum(0) - many).repeat_interleave(many, output_size=total)
    places = torch.arange(total, device=device) - begin
    positions, slots = (x.repeat_interleave(many, output_size=total) for x in (first, slots))
    return Batch((positions + places).int(), slots.int(), sequences, counts, starts)


class Attention(Protocol):
    """Attention with a cache. ``qkv [M, (Hq + 2 Hkv) D]``; results ``[M, Hq D]`` are quantised, as in `arithmetic.Ops`."""

    #: The sequence of a captured step's rows that have nothing to do; None where steps cannot be captured.
    idle: int | None
    shape: Shape

    def open(self) -> int:
        """A new, empty sequence."""

    def free(self, sequence: int) -> None:
        """End a sequence and take its pages back."""

    def reserve(self, sequences: Sequence[int], totals: Sequence[int]) -> None:
        """Make room for so many tokens in all of each sequence; raises a RuntimeError where pages are short."""

    def prompt(self, layer: int, qkv: torch.Tensor, batch: Batch, window: int | None) -> Any:
        """Prompts: attend to themselves, exactly; keys and values go to the cache."""

    def step(self, layer: int, qkv: torch.Tensor, batch: Batch, window: int | None) -> Any:
        """One new token a sequence: attends to the cache and, exactly, to itself; joins the cache. A window counts it."""

    def advance(self, batch: Batch) -> None:
        """All layers have had the tokens of a batch."""


def causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Attention of a prompt to itself: query ``[T, Hq, D]``, key and value ``[T, Hkv, D]`` -> ``[T, Hq, D]``, by torch."""
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
    length, mask = len(query), None
    if window is not None and window < length:
        i = torch.arange(length, device=query.device)
        mask = (i[:, None] >= i) & (i[:, None] - i < window)
    seen = scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])
    return seen[0].transpose(0, 1)


#: torch's attentions of prompts. Not cuDNN's, which makes a plan for every new length.
ALONE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@functools.cache
def _side_by_side(device: torch.device, dtype: torch.dtype) -> tuple[Callable, dict[str, Any]] | None:
    """torch's attention of sequences side by side and how to call it; None where there is none (with windows)."""
    if device.type != "cuda" or dtype.itemsize != 2 or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return None
    known = inspect.signature(varlen_attn).parameters
    return (varlen_attn, {"enable_gqa": True} if "enable_gqa" in known else {}) if "window_size" in known else None


def causal_prompts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: Batch, window: int | None = None
) -> torch.Tensor:
    """`causal` of every prompt of a batch: query ``[M, Hq, D]``, key and value ``[M, Hkv, D]`` -> ``[M, Hq, D]``.

    On a GPU by one kernel for all prompts where torch has it: FlashAttention, of 16-bit numbers. A prompt's result has the
    same bits whatever is beside it (which rules out a faster kernel for prompts that are alike), if the caller lets torch
    choose among `ALONE` only, as `Engine.prefill` does.
    """
    if len(batch.counts) == 1 and (window is None or window >= len(query)):  # which torch begins sooner
        return causal(query, key, value, window)
    packed = _side_by_side(query.device, query.dtype)
    if packed is None:
        parts = (t.split(list(batch.counts)) for t in (query, key, value))
        return torch.cat([causal(q, k, v, window) for q, k, v in zip(*parts, strict=True)])
    attend, options = packed
    longest, seen = max(batch.counts), (-1 if window is None else window - 1, 0)
    return attend(query, key, value, batch.ends, batch.ends, longest, longest, window_size=seen, **options)


def heads_of(qkv: torch.Tensor, shape: Shape, norms: HeadNorms) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries ``[M, Hq, D]``, keys and values ``[M, Hkv, D]`` side by side in ``qkv``, after the heads' RMSNorms."""
    sizes = [shape.heads, shape.kv_heads, shape.kv_heads]
    query, key, value = qkv.unflatten(-1, (-1, shape.head_dim)).split(sizes, 1)
    if norms is not None:
        query, key = exact.rms_norm(query, norms[0], norms[2]), exact.rms_norm(key, norms[1], norms[2])
    return query, key, value


class ReferenceAttention:
    """`Attention` in plain torch, sequence by sequence."""

    idle: int | None = None

    def __init__(
        self,
        shape: Shape,
        form: KVFormat | None,
        rotary: tuple[torch.Tensor, torch.Tensor],
        norms: Sequence[HeadNorms],
        dtype: torch.dtype,
    ) -> None:
        self.shape, self.norms = shape, norms
        self.cos, self.sin = rotary
        self.cache = PagedCache(shape.layers, shape.kv_heads, shape.head_dim, shape.pages, form, dtype, self.cos.device)

    def open(self) -> int:
        """See `Attention`."""
        return self.cache.open()

    def free(self, sequence: int) -> None:
        """See `Attention`."""
        self.cache.free(sequence)

    def reserve(self, sequences: Sequence[int], totals: Sequence[int]) -> None:
        """See `Attention`."""
        for sequence, total in zip(sequences, totals, strict=True):
            self.cache.reserve(sequence, total)

    def _heads(self, layer: int, qkv: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = heads_of(qkv, self.shape, self.norms[layer])
        at = batch.positions.long()
        cos, sin = self.cos[at][:, None], self.sin[at][:, None]
        return exact.rotate(query, cos, sin), exact.rotate(key, cos, sin), value

    def prompt(self, layer: int, qkv: torch.Tensor, batch: Batch, window: int | None) -> Affine:
        """See `Attention`."""
        query, key, value = self._heads(layer, qkv, batch)
        for sequence, k, v in zip(batch.sequences, *(t.split(list(batch.counts)) for t in (key, value)), strict=True):
            self.cache.append(layer, sequence, 0, k, v)
        return self.quantize(causal_prompts(query, key, value, batch, window).flatten(1))

    def step(self, layer: int, qkv: torch.Tensor, batch: Batch, window: int | None) -> Affine:
        """See `Attention`."""
        seen = self.cache.decode(layer, batch.sequences, batch.starts, self._heads(layer, qkv, batch), window)
        return self.quantize(seen.flatten(1))

    def quantize(self, x: torch.Tensor) -> Affine:
        """INT8 per token of ``x [M, Hq D]``."""
        return quantize_per_token_s8(x)

    def advance(self, batch: Batch) -> None:
        """See `Attention`; positions say everything here."""


class KernelAttention:
    """`Attention` on a GPU, by ``kernels``: the package ``qoqlab_kernels``.

    During a step the device's lengths are those before it, so attention on the cache leaves the new token out although it
    is there already; `attend_own_s8` adds it, not quantised.
    """

    def __init__(
        self,
        kernels: Any,
        shape: Shape,
        rotary: tuple[torch.Tensor, torch.Tensor],
        norms: Sequence[HeadNorms],
    ) -> None:
        self.kernels, self.shape, self.norms = kernels, shape, norms
        self.cos, self.sin = rotary
        # one more sequence for the rows of a captured step that have nothing to do: its token `IDLE` again and again
        self.cache = kernels.PagedKV4(
            shape.layers,
            shape.kv_heads,
            shape.head_dim,
            shape.pages + 1,
            PAGE,
            sequences=shape.max_batch + 1,
            max_tokens=shape.max_tokens,
            device=self.cos.device,
        )
        self.idle = self.cache.open()
        self.cache.reserve([self.idle], IDLE + 1)

    def open(self) -> int:
        """See `Attention`."""
        return self.cache.open()

    def free(self, sequence: int) -> None:
        """See `Attention`."""
        self.cache.free(sequence)

    def reserve(self, sequences: Sequence[int], totals: Sequence[int]) -> None:
        """See `Attention`."""
        self.cache.grow(dict(zip(sequences, totals, strict=True)))

    def prompt(self, layer: int, qkv: torch.Tensor, batch: Batch, window: int | None) -> Any:
        """See `Attention`."""
        return self.quantize(causal_prompts(*self._append(layer, qkv, batch), batch, window).flatten(1))

    def step(self, layer: int, qkv: torch.Tensor, batch: Batch, window: int | None) -> Any:
        """See `Attention`."""
        if layer == 0:  # for all layers at once; rows without a sequence share theirs, so nothing is counted up
            self.cache.lengths[:, batch.slots.long()] = batch.positions
        query, key, value = self._append(layer, qkv, batch)
        if window == 1:
            seen, lse = torch.zeros_like(query), query.new_full(query.shape[:2], -torch.inf, dtype=torch.float32)
        else:
            past = None if window is None else window - 1
            options = {"window": past, "lse": True, "settled": True}  # the kernel before has positions given
            seen, lse = self.kernels.kv4_attention(query, self.cache, layer, batch.slots, **options)
        if layer == self.shape.layers - 1:
            self.cache.lengths[:, batch.slots.long()] = batch.positions + 1
        return self.join(seen, lse, query, key, value)

    def quantize(self, x: torch.Tensor) -> Any:
        """INT8 per token of ``x [M, Hq D]``."""
        return self.kernels.quantize_activations(x)

    def join(
        self, seen: torch.Tensor, lse: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> Any:
        """New tokens join what their queries have seen; INT8 per token."""
        return self.kernels.attend_own_s8(seen, lse, query, key, value)

    def _append(self, layer: int, qkv: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values into the cache; query ``[M, Hq, D]`` and key ``[M, Hkv, D]``, turned, and value."""
        if self.norms[layer] is not None:
            qkv = torch.cat(heads_of(qkv, self.shape, self.norms[layer]), 1).flatten(1)
        query, key = self.kernels.rope_kv4_append(
            self.cache, layer, batch.slots, qkv, self.cos, self.sin, positions=batch.positions
        )
        return query, key, qkv.unflatten(-1, (-1, self.shape.head_dim))[:, -self.shape.kv_heads :]

    def advance(self, batch: Batch) -> None:
        """See `Attention`; steps have set the device's lengths, prompts have not."""
        fresh = []
        for sequence, count, start in zip(batch.sequences, batch.counts, batch.starts, strict=True):
            self.cache.advance([sequence], count)
            if start == 0:
                fresh.append((sequence, count))
        if fresh:
            slots, counts = sent(fresh, self.cache.lengths.device).T
            self.cache.lengths[:, slots] = counts.to(self.cache.lengths.dtype)
