"""Paged KV caches: 4-bit keys and values with one scale and zero per token and head (paper sections 4.2 and 5.3), and, for
comparison, the same with 8 bits and with fp16 numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qoqlab.allocator import PageAllocator
from qoqlab.checks import require_count, require_finite, require_float, shape_of
from qoqlab.grids import UINT4, UINT8, Grid
from qoqlab.kv import QuantizedKV, quantize_kv
from qoqlab.transfer import sent

from .pages import ChunkLayout, byte_tables, token_bytes, token_numbers

#: Keys or values as a page holds them: codes with their scales and zeros, or fp16 numbers.
Stored = QuantizedKV | torch.Tensor


class PagedKV:
    """KV cache of ``layers`` x ``kv_heads``, in ``pages`` pages of ``page_size`` tokens that sequences take as they grow.

    `PagedKV4`, `PagedKV8` and `PagedKV16` say what a page holds. ``head_dim`` 64 or 128; ``page_size`` 16, 32, 64 or 128.
    ``sequences``: how many may be open at a time; ``max_tokens`` of one sequence (default: all pages). ``device``: where the
    cache lies.

    ``pool`` uint8 [layers, pages, kv_heads, bytes of a chunk] is one allocation, see `pages.ChunkLayout`. A page number
    stands for that page of every layer. ``tables`` int32 [sequences, pages of a sequence] and ``lengths`` int32
    [layers, sequences] lie on the device and change in place, so that captured CUDA graphs see them grow; unused entries of
    the tables are 0.

    A sequence is a small number, from `open`. Each layer appends on its own; its length is what attention there sees.

    Raises ValueError naming the argument for sizes that are not possible.
    """

    #: Grid of the codes; None: fp16 numbers as they are.
    grid: Grid | None

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        pages: int,
        page_size: int = 64,
        *,
        sequences: int = 256,
        max_tokens: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("layers", layers), ("kv_heads", kv_heads), ("pages", pages), ("sequences", sequences)):
            require_count(name, value, 1)
        self.layout = ChunkLayout(head_dim, page_size, 16 if self.grid is None else self.grid.bits)
        if max_tokens is not None:
            require_count("max_tokens", max_tokens, 1)
        self.layers, self.kv_heads, self.pages, self.sequences = layers, kv_heads, pages, sequences
        self.head_dim, self.page_size, self.device = head_dim, page_size, torch.device(device)
        width = pages if max_tokens is None else min(pages, -(-max_tokens // page_size))
        self.allocator = PageAllocator(pages)
        self.pool = torch.zeros(layers, pages, kv_heads, self.layout.bytes, dtype=torch.uint8, device=device)
        self.tables = torch.zeros(sequences, width, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(layers, sequences, dtype=torch.int32, device=device)
        self._held: dict[int, list[int]] = {}  # pages of every open sequence
        self._length: dict[int, list[int]] = {}  # of every layer; the host's copy, so that nothing waits for the device
        self._places = [table.to(device) for table in byte_tables(self.layout)]

    # -- sequences --------------------------------------------------------------------------------------------------------

    def open(self) -> int:
        """A new, empty sequence. Raises RuntimeError if all are in use."""
        free = next((number for number in range(self.sequences) if number not in self._held), None)
        if free is None:
            raise RuntimeError(f"sequences: all {self.sequences} are open; free one first")
        self._held[free], self._length[free] = [], [0] * self.layers
        self.lengths[:, free] = 0
        return free

    def fork(self, sequence: int) -> int:
        """A new sequence that starts as a copy of another: full pages are shared, the last, partial one is copied.

        Raises ValueError for a sequence that is not open, RuntimeError and `PagesExhausted` as `open` and `reserve` do.
        """
        pages, lengths = self.pages_of(sequence), self._length[sequence]
        shared = min(lengths) // self.page_size  # layers may differ while a step is under way
        own = self.allocator.take(len(pages) - shared)
        try:
            copy = self.open()
        except RuntimeError:
            self.allocator.drop(own)
            raise
        self.allocator.share(pages[:shared])
        self._held[copy], self._length[copy] = pages[:shared] + own, list(lengths)
        self.tables[copy] = self.tables[sequence]
        if own:
            source = sent(pages[shared:], self.device)
            to = sent(own, self.device)
            self.pool[:, to] = self.pool[:, source]
            self.tables[copy, shared : len(pages)] = to.int()
        self.lengths[:, copy] = self.lengths[:, sequence]
        return copy

    def free(self, sequence: int) -> None:
        """Close a sequence; its pages go back unless another sequence shares them. Raises ValueError if it is not open."""
        self.allocator.drop(self.pages_of(sequence))
        del self._held[sequence], self._length[sequence]
        self.lengths[:, sequence] = 0
        self.tables[sequence] = 0

    def pages_of(self, sequence: int) -> list[int]:
        """Page numbers of a sequence in the order of its tokens. Raises ValueError if it is not open."""
        if isinstance(sequence, bool) or not isinstance(sequence, int) or sequence not in self._held:
            raise ValueError(f"sequence: {sequence!r} is not open")
        return list(self._held[sequence])

    def length(self, layer: int, sequence: int) -> int:
        """Tokens of a sequence in a layer."""
        self.pages_of(sequence)
        return self._length[sequence][self._layer(layer)]

    def layer_lengths(self, layer: int) -> torch.Tensor:
        """Lengths int32 [sequences] of a layer on the device. Raises ValueError for a layer that is none."""
        return self.lengths[self._layer(layer)]

    def _layer(self, layer: int) -> int:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < self.layers:
            raise ValueError(f"layer: {layer!r} is not one of 0..{self.layers - 1}")
        return layer

    def reserve(self, sequences: Sequence[int], tokens: int = 1) -> None:
        """Make room for ``tokens`` more tokens of each sequence (counted from its longest layer), all or none.

        `append` does this by itself; call it before replaying a captured graph that appends. Raises ValueError for a
        sequence that is not open or grows beyond ``max_tokens``, `PagesExhausted` where pages are short.
        """
        require_count("tokens", tokens, 0)
        for sequence in sequences:
            self.pages_of(sequence)
        self.grow({sequence: max(self._length[sequence]) + tokens for sequence in sequences})

    def grow(self, totals: dict[int, int]) -> None:
        """Give every sequence the pages that so many tokens in all need, all or none; raises as `reserve` does."""
        wanted = {}
        for sequence, total in totals.items():
            need = -(-total // self.page_size)
            if need > self.tables.shape[1]:
                limit = self.tables.shape[1] * self.page_size
                raise ValueError(f"tokens: sequence {sequence} would grow beyond the {limit} tokens that its table holds")
            if sequence not in self._held:
                raise ValueError(f"sequence: {sequence!r} is not open")
            wanted[sequence] = max(0, need - len(self._held[sequence]))
        taken = self.allocator.take(sum(wanted.values()))
        if not taken:
            return
        places = [(s, len(self._held[s]) + i) for s, count in wanted.items() for i in range(count)]
        try:
            rows, columns, pages = sent([(*place, page) for place, page in zip(places, taken, strict=True)], self.device).T
            self.tables[rows, columns] = pages.int()
        except BaseException:
            self.allocator.drop(taken)  # no sequence holds them
            raise
        for (sequence, _), page in zip(places, taken, strict=True):
            self._held[sequence].append(page)

    def advance(self, sequences: Sequence[int], tokens: int = 1) -> None:
        """Tell the host that a replayed graph has appended ``tokens`` tokens to every layer of these sequences; the device's
        lengths have grown in the graph. Raises ValueError where `reserve` has not made room."""
        require_count("tokens", tokens, 0)
        for sequence in sequences:
            room = len(self.pages_of(sequence)) * self.page_size
            if max(self._length[sequence]) + tokens > room:
                raise ValueError(f"tokens: sequence {sequence} has room for {room} tokens only; reserve them beforehand")
        for sequence in sequences:
            self._length[sequence] = [length + tokens for length in self._length[sequence]]

    # -- tokens -----------------------------------------------------------------------------------------------------------

    def append(self, layer: int, sequences: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Quantise keys (after RoPE) and values float ``[B, kv_heads, T, D]`` of ``B`` different sequences and add them.

        Codes, scales and zeros are those of `qoqlab.kv.quantize_kv`. Raises TypeError or ValueError naming the argument for
        wrong shapes, NaN, sequences that are not open or named twice; `PagesExhausted`, having changed nothing.
        """
        self._layer(layer)
        numbers = list(sequences)
        if len(set(numbers)) != len(numbers):
            raise ValueError(f"sequences: each may be named once, got {numbers}")
        for name, x in (("keys", keys), ("values", values)):
            require_float(name, x)
            rule = (len(numbers), self.kv_heads, x.shape[-2] if x.ndim == 4 else 0, self.head_dim)
            if x.ndim != 4 or tuple(x.shape) != rule or x.shape[2] == 0 or x.device != self.pool.device:
                raise ValueError(
                    f"{name}: expected [{len(numbers)}, {self.kv_heads}, T, {self.head_dim}] with T >= 1 on "
                    f"{self.pool.device}, got {shape_of(x)} on {x.device}"
                )
        if keys.shape != values.shape:
            raise ValueError(f"values: {shape_of(values)} does not have the keys' shape {shape_of(keys)}")
        stored = self._stored(keys), self._stored(values)
        tokens = keys.shape[2]
        self.grow({sequence: self.length(layer, sequence) + tokens for sequence in numbers})
        slots = sent(numbers, self.device)
        self.write(layer, slots, *stored)
        for sequence in numbers:
            self._length[sequence][layer] += tokens

    def _stored(self, x: torch.Tensor) -> Stored:
        """Keys or values as pages hold them. Raises ValueError for NaN and infinity, and what fp16 cannot hold."""
        if self.grid is not None:
            return quantize_kv(x, self.grid)
        numbers = x.half()
        require_finite("x", numbers)
        return numbers

    def write(self, layer: int, slots: torch.Tensor, keys: Stored, values: Stored) -> None:
        """The device's part of `append`: put codes (or fp16 numbers) ``[B, kv_heads, T, D]`` behind the tokens of sequences
        ``slots`` int64 [B] and let their lengths grow. Nothing is checked and nothing waits, so it may be captured in a CUDA
        graph."""
        tokens = (keys.codes if isinstance(keys, QuantizedKV) else keys).shape[2]
        position = self.lengths[layer, slots].long()[:, None] + torch.arange(tokens, device=self.device)  # [B, T]
        page = self.tables[slots[:, None], position // self.page_size].long()
        inside = position % self.page_size
        heads = torch.arange(self.kv_heads, device=self.device)[None, :, None]
        chunk = (page[:, None] * self.kv_heads + heads) * self.layout.bytes  # [B, H, T]
        flat = self.pool[layer].view(-1)
        pairs = (self.layout.scales, self.layout.value_scales)
        for new, places, scales_at in zip((keys, values), self._places, pairs, strict=True):
            numbers = new.codes if isinstance(new, QuantizedKV) else new
            flat[chunk[..., None] + places[inside][:, None]] = token_bytes(numbers, self.layout.bits)
            if isinstance(new, QuantizedKV):
                words = torch.stack([new.scales, new.zeros], -1).view(torch.uint8)  # [B, H, T, 4]
                offset = scales_at + 4 * inside[:, None, :, None] + torch.arange(4, device=self.device)
                flat[chunk[..., None] + offset] = words
        self.lengths[layer].index_add_(0, slots, torch.full_like(slots, tokens, dtype=torch.int32))

    def codes(self, layer: int, sequence: int) -> tuple[Any, Any]:
        """A sequence's keys and values as stored: `QuantizedKV` of codes ``[kv_heads, T, D]``, scales and zeros
        ``[kv_heads, T]``, or the fp16 numbers ``[kv_heads, T, D]``."""
        tokens = self.length(layer, sequence)
        pages = torch.tensor(self.pages_of(sequence), dtype=torch.int64, device=self.device)
        chunks = self.pool[layer, pages].transpose(0, 1)  # [H, pages, bytes]
        found: list[Stored] = []
        for places, at in zip(self._places, (self.layout.scales, self.layout.value_scales), strict=True):
            numbers = token_numbers(chunks[..., places], self.layout.bits).flatten(1, 2)[:, :tokens]
            if self.grid is None:
                found.append(numbers)
                continue
            pairs = chunks[..., at : at + self.layout.pairs].contiguous().view(torch.float16).unflatten(-1, (-1, 2))
            pairs = pairs.flatten(1, 2)[:, :tokens]
            found.append(QuantizedKV(numbers, pairs[..., 0].contiguous(), pairs[..., 1].contiguous()))
        return found[0], found[1]

    def gather(self, layer: int, sequence: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """Dequantised keys and values ``[kv_heads, T, D]`` of a sequence. Raises ValueError if it is not open."""
        keys, values = self.codes(layer, sequence)
        if self.grid is None:
            return keys.to(dtype), values.to(dtype)
        return keys.dequantize(dtype), values.dequantize(dtype)


class PagedKV4(PagedKV):
    """`PagedKV` of 4-bit codes, those of `qoqlab.kv.quantize_kv4`: what all kernels read.

    >>> cache = PagedKV4(layers=1, kv_heads=2, head_dim=64, pages=4)
    >>> s = cache.open()
    >>> cache.append(0, [s], torch.ones(1, 2, 70, 64), torch.zeros(1, 2, 70, 64))
    >>> cache.length(0, s), cache.allocator.free, cache.gather(0, s)[0].shape
    (70, 2, torch.Size([2, 70, 64]))
    """

    grid = UINT4


class PagedKV8(PagedKV):
    """`PagedKV` of 8-bit codes with scales and zeros as in `PagedKV4`, for comparison: attention by one simple kernel."""

    grid = UINT8


class PagedKV16(PagedKV):
    """`PagedKV` of fp16 numbers, for comparison: attention by one simple kernel. What fp16 cannot hold is refused."""

    grid = None
