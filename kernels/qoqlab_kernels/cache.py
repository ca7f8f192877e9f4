"""Paged caches of keys and values: 4-bit as the attention kernel reads it, 8-bit and fp16 behind the same interface.

A page holds 64 tokens. For every layer, page and KV head there is one chunk of consecutive bytes, keys then values, codes
and constants together, so that one bulk copy brings all that a warp needs. Which page holds which tokens of a sequence says
a table on the device; tables and lengths are changed in place, so captured CUDA graphs see them grow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qoqlab.checks import require_count, require_finite, require_float, shape_of
from qoqlab.grids import UINT8
from qoqlab.kv import QuantizedKV, quantize_kv, quantize_kv4

from . import matmul, ptx, rows
from .allocator import PageAllocator
from .rows import PAGE

#: Longest sequence, in tokens: 128k.
LONGEST = 131072


def _kv4_bytes(dim: int) -> torch.Tensor:
    """Offset in a chunk of every byte of a row: [keys or values, token, dim / 2 bytes of codes + 4 of constants].

    Byte j of a row holds channels d (low nibble) and d + 8, d = 16 (j // 8) + j % 8.
    """
    token, j = torch.arange(PAGE)[:, None], torch.arange(dim // 2)[None]
    step, channel, row = j // 8, j % 8, token % 8
    start = token // 16 * (8 * dim) + step // 4 * 512 + step % 4 * 4
    keys = start + (row * 4 + channel // 2) * 16 + token % 16 // 8 + 2 * (channel % 2)
    values = start + (channel * 4 + row // 2) * 16 + token % 16 // 8 + 2 * (row % 2)
    constants = PAGE * dim // 2 + 4 * token + torch.arange(4)
    part = PAGE * (dim // 2 + 4)
    return torch.stack([torch.cat([keys, constants], 1), part + torch.cat([values, constants], 1)])


def _plain_bytes(row: int) -> torch.Tensor:
    """The same for formats whose rows lie one after the other."""
    return torch.arange(2 * PAGE * row).view(2, PAGE, row)


def _constants(q: QuantizedKV) -> torch.Tensor:
    """Scale and zero of every row as 4 bytes."""
    return torch.stack([q.scales, q.zeros], -1).contiguous().view(torch.uint8)


def _with_constants(codes: torch.Tensor, constants: torch.Tensor) -> QuantizedKV:
    both = constants.contiguous().view(torch.float16)
    return QuantizedKV(codes, both[..., 0], both[..., 1])


class PagedKV4:
    """A paged KV cache with 4-bit codes, one fp16 scale and zero per token and head (paper sections 4.2 and 5.3).

    ``layers``, ``kv_heads``: of the model; ``head_dim``: 64 or 128; ``pages``: how many, each of ``page_size`` 64 tokens of
    every layer; ``sequences``: how many can live at a time; ``device``: where. Raises ValueError for other sizes.

        cache = qk.PagedKV4(layers, kv_heads, head_dim, pages=4096, device="cuda")
        a = cache.open()                        a sequence, a small number
        cache.extend([a], [1000])               1000 tokens more, with pages to hold them
        cache.append(layer, [a], keys, values, [1000])   for every layer: the last 1000 tokens
        y = qk.kv4_attention(query, cache, layer, cache.batch([a]))
        cache.free([a])

    ``data`` uint8 [layers, pages, kv_heads, bytes of a chunk]; ``tables`` int32 [sequences, pages of the longest], -1 where
    there is none; ``lengths`` int32 [sequences].
    """

    name = "kv4"

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        pages: int,
        page_size: int = PAGE,
        sequences: int = 256,
        device: str | torch.device = "cpu",
    ) -> None:
        for what, value in (("layers", layers), ("kv_heads", kv_heads), ("sequences", sequences)):
            require_count(what, value, 1)
        if head_dim not in (64, 128):
            raise ValueError(f"head_dim: expected 64 or 128, got {head_dim!r}")
        if page_size != PAGE:
            raise ValueError(f"page_size: pages hold {PAGE} tokens, got {page_size!r}")
        self.allocator = PageAllocator(pages)
        self.layers, self.kv_heads, self.head_dim, self.pages = layers, kv_heads, head_dim, pages
        self.where = self._bytes().to(device)
        self.data = torch.zeros(layers, pages, kv_heads, self.where.numel(), dtype=torch.uint8, device=device)
        self.tables = torch.full((sequences, min(pages, LONGEST // PAGE)), -1, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(sequences, dtype=torch.int32, device=device)
        self._held: dict[int, list[int]] = {}
        self._tokens: dict[int, int] = {}

    # -- format: what the variants change ---------------------------------------------------------------------------------

    def _bytes(self) -> torch.Tensor:
        return _kv4_bytes(self.head_dim)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        """Rows ``[..., D]`` -> their bytes, uint8 ``[..., bytes of a row]``."""
        q = quantize_kv4(x)
        pairs = q.codes.unflatten(-1, (-1, 2, 8))
        return torch.cat([(pairs[..., 0, :] | pairs[..., 1, :] << 4).flatten(-2), _constants(q)], -1)

    def _decode(self, stored: torch.Tensor) -> QuantizedKV | torch.Tensor:
        codes, constants = stored.split([self.head_dim // 2, 4], -1)
        pairs = codes.unflatten(-1, (-1, 1, 8))
        return _with_constants(torch.cat([pairs & 15, pairs >> 4], -2).flatten(-3), constants)

    # -- sequences --------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the cache is."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.data.numel()

    def tokens(self, sequence: int) -> int:
        """How many tokens a sequence has, as far as the host knows (`extend`, `advanced`)."""
        self._require([sequence])
        return self._tokens[sequence]

    def open(self, prefix: int | None = None, tokens: int = 0) -> int:
        """A new sequence, empty or with the first ``tokens`` tokens of the sequence ``prefix``, whose pages it shares.

        Only whole pages are shared. Raises ValueError where ``tokens`` is no multiple of 64 or more than there are,
        RuntimeError where all sequences are taken.
        """
        number = next((k for k in range(len(self.lengths)) if k not in self._held), None)
        if number is None:
            raise RuntimeError(f"sequences: all {len(self.lengths)} are in use; free one, or make the cache with more")
        held: list[int] = []
        if prefix is not None:
            self._require([prefix])
            if tokens % PAGE or not 0 <= tokens <= self._tokens[prefix]:
                raise ValueError(f"tokens: expected a multiple of {PAGE} up to {self._tokens[prefix]}, got {tokens}")
            held = self._held[prefix][: tokens // PAGE]
            self.allocator.share(held)
        elif tokens:
            raise ValueError(f"tokens: {tokens} without a prefix to take them from")
        self._held[number], self._tokens[number] = list(held), tokens
        self._write_table(number, 0)
        self.lengths[number] = tokens
        return number

    def reserve(self, sequences: Sequence[int], tokens: int) -> None:
        """Make sure of pages for ``tokens`` more tokens of each sequence, without making them longer: before steps that are
        replayed from a CUDA graph. Takes all or none; raises `allocator.OutOfPages`."""
        self._grow(list(sequences), [tokens] * len(sequences))

    def extend(self, sequences: Sequence[int], counts: Sequence[int] | None = None) -> None:
        """Make each sequence ``counts`` tokens longer (default 1), on the host and on the device, taking pages as needed.

        Then `append` fills the new tokens, layer by layer. Raises `allocator.OutOfPages`, and changes nothing, where pages
        are missing.
        """
        chosen = list(sequences)
        more = [1] * len(chosen) if counts is None else list(counts)
        self._grow(chosen, more)
        for sequence, count in zip(chosen, more, strict=True):
            self._tokens[sequence] += count
        self.lengths[self.batch(chosen).long()] = torch.tensor(
            [self._tokens[s] for s in chosen], dtype=torch.int32, device=self.device
        )

    def advance(self, batch: torch.Tensor) -> None:
        """One token more for each sequence of a `batch`, on the device only, so that it can be part of a CUDA graph. The
        pages must be `reserve`d; tell the host afterwards (`advanced`)."""
        self.lengths.index_add_(0, batch, torch.ones_like(batch))

    def advanced(self, sequences: Sequence[int], count: int = 1) -> None:
        """Tell the host that `advance` has run ``count`` times on these sequences."""
        self._require(sequences)
        for sequence in sequences:
            self._tokens[sequence] += count

    def free(self, sequences: Sequence[int]) -> None:
        """Let go of sequences and of their pages. Raises ValueError for one that is not open."""
        self._require(sequences)
        for sequence in sequences:
            self.allocator.release(self._held.pop(sequence))
            del self._tokens[sequence]
            self.tables[sequence] = -1
            self.lengths[sequence] = 0

    def batch(self, sequences: Sequence[int]) -> torch.Tensor:
        """Sequences as int32 [B] on the device: what `append` and `kv4_attention` take without a copy."""
        self._require(sequences)
        return torch.tensor(list(sequences), dtype=torch.int32, device=self.device)

    def _require(self, sequences: Sequence[int]) -> None:
        for sequence in sequences:
            if sequence not in self._held:
                raise ValueError(f"sequences: {sequence!r} is not open")
        if len(set(sequences)) != len(sequences):
            raise ValueError(f"sequences: each may be named once, got {list(sequences)}")

    def _grow(self, sequences: list[int], counts: list[int]) -> None:
        self._require(sequences)
        if len(counts) != len(sequences):
            raise ValueError(f"counts: expected one for each of {len(sequences)} sequences, got {len(counts)}")
        for count in counts:
            require_count("counts", count, 0)
        totals = [self._tokens[s] + count for s, count in zip(sequences, counts, strict=True)]
        most = self.tables.shape[1] * PAGE
        if max(totals, default=0) > most:
            raise ValueError(f"counts: a sequence of this cache holds at most {most} tokens, not {max(totals)}")
        needed = [max(0, -(-t // PAGE) - len(self._held[s])) for s, t in zip(sequences, totals, strict=True)]
        taken = self.allocator.take(sum(needed))
        for sequence, count in zip(sequences, needed, strict=True):
            if count:
                before = len(self._held[sequence])
                self._held[sequence] += taken[:count]
                taken = taken[count:]
                self._write_table(sequence, before)

    def _write_table(self, sequence: int, start: int) -> None:
        held = self._held[sequence]
        if held[start:]:
            self.tables[sequence, start : len(held)] = torch.tensor(held[start:], dtype=torch.int32, device=self.device)

    # -- keys and values --------------------------------------------------------------------------------------------------

    def append(
        self,
        layer: int,
        sequences: Sequence[int] | torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        counts: Sequence[int] | None = None,
    ) -> None:
        """Quantise and write the last tokens of each sequence, one (``counts`` None) or ``counts``.

        ``keys``, ``values`` float [tokens of all sequences, kv_heads, head_dim], keys after RoPE. With ``sequences`` from
        `batch` and ``counts`` None nothing waits for the GPU, and the call may be part of a CUDA graph. Bit-exact with
        `qoqlab.kv.quantize_kv4`; NaN and infinity are only looked for on a CPU.

        Raises TypeError or ValueError naming the argument.
        """
        layer = self._layer(layer)
        owners = self._batch(sequences) if isinstance(sequences, torch.Tensor) else self.batch(sequences)
        if counts is None:
            back = torch.ones_like(owners)
        else:
            if len(counts) != len(owners):
                raise ValueError(f"counts: expected one for each of {len(owners)} sequences, got {len(counts)}")
            each = torch.tensor(list(counts), device=self.device)
            owners = owners.repeat_interleave(each)
            back = torch.cat([torch.arange(count, 0, -1, dtype=torch.int32) for count in counts]).to(self.device)
        for name, x in (("keys", keys), ("values", values)):
            require_float(name, x)
            if x.shape != (len(owners), self.kv_heads, self.head_dim) or x.device != self.device:
                raise ValueError(
                    f"{name}: expected [{len(owners)}, {self.kv_heads}, {self.head_dim}] on {self.device}, got "
                    f"{shape_of(x)} on {x.device}"
                )
        self._write(layer, owners, back, keys, values)

    def _write(self, layer: int, owners: torch.Tensor, back: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        halves = keys.dtype == values.dtype and keys.dtype in (torch.float16, torch.bfloat16)
        if self.device.type == "cuda" and self.name == "kv4" and halves:
            self.write_by_kernel(layer, owners, back, keys, values)
            return
        token = self.lengths[owners.long()].long() - back.long()
        page = self.tables[owners.long(), token // PAGE].long()
        for kind, (name, x) in enumerate((("keys", keys), ("values", values))):
            require_finite(name, x)
            self.data.view(-1)[self._places(layer, page, token % PAGE, kind)] = self._encode(x)

    def write_by_kernel(
        self, layer: int, owners: torch.Tensor, back: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """What `append` runs on a GPU: `rows.append`; also in the simulator."""
        arguments = [keys.contiguous(), values.contiguous(), self.data, self.tables, self.lengths, owners, back]
        if ptx.SIMULATED:
            kinds = (torch.uint16,) * 2 + (torch.uint8,) + (torch.uint32,) * 4
            arguments = [tensor.view(kind) for tensor, kind in zip(arguments, kinds, strict=True)]
        blocks = -(-len(owners) * self.kv_heads * 2 // rows.WARPS)
        sizes = [len(owners), self.kv_heads, self.pages, layer, self.tables.shape[1]]
        matmul._run(rows.append, (self.head_dim, keys.dtype == torch.bfloat16), (blocks, 1, 1), [*arguments, *sizes])

    def stored(self, layer: int, sequence: int) -> tuple[QuantizedKV | torch.Tensor, QuantizedKV | torch.Tensor]:
        """Keys and values of a sequence as they are stored: codes [kv_heads, T, head_dim] with scales and zeros."""
        layer = self._layer(layer)
        self._require([sequence])
        token = torch.arange(int(self.lengths[sequence]), device=self.device)
        page = self.tables[sequence, token // PAGE].long()
        found = []
        for kind in (0, 1):
            raw = self.data.view(-1)[self._places(layer, page, token % PAGE, kind)]
            found.append(self._decode(raw.transpose(0, 1)))
        return found[0], found[1]

    def gather(self, layer: int, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a sequence, dequantised, fp32 [kv_heads, T, head_dim]."""
        keys, values = (x if isinstance(x, torch.Tensor) else x.dequantize() for x in self.stored(layer, sequence))
        return keys.float(), values.float()

    def _places(self, layer: int, page: torch.Tensor, slot: torch.Tensor, kind: int) -> torch.Tensor:
        """Where in ``data`` the bytes of rows lie: [rows, kv_heads, bytes of a row]."""
        head = torch.arange(self.kv_heads, device=self.device)
        chunk = (layer * self.pages + page)[:, None] * self.kv_heads + head
        return chunk[..., None] * self.where.numel() + self.where[kind, slot][:, None]

    def _layer(self, layer: int) -> int:
        require_count("layer", layer, 0)
        if layer >= self.layers:
            raise ValueError(f"layer: expected 0 .. {self.layers - 1}, got {layer}")
        return layer

    def _batch(self, batch: torch.Tensor) -> torch.Tensor:
        if batch.dtype != torch.int32 or batch.ndim != 1 or batch.device != self.device:
            raise ValueError(
                f"sequences: expected int32 [B] on {self.device} (cache.batch), got {batch.dtype} of shape "
                f"{shape_of(batch)} on {batch.device}"
            )
        return batch.contiguous()


class PagedKV8(PagedKV4):
    """The same cache with 8-bit codes, for comparison; the attention kernel does not read it."""

    name = "kv8"

    def _bytes(self) -> torch.Tensor:
        return _plain_bytes(self.head_dim + 4)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        q = quantize_kv(x, UINT8)
        return torch.cat([q.codes, _constants(q)], -1)

    def _decode(self, stored: torch.Tensor) -> QuantizedKV | torch.Tensor:
        codes, constants = stored.split([self.head_dim, 4], -1)
        return _with_constants(codes, constants)


class PagedKV16(PagedKV4):
    """The same cache in fp16, for comparison; the attention kernel does not read it."""

    name = "kv16"

    def _bytes(self) -> torch.Tensor:
        return _plain_bytes(2 * self.head_dim)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        return x.half().contiguous().view(torch.uint8)

    def _decode(self, stored: torch.Tensor) -> QuantizedKV | torch.Tensor:
        return stored.contiguous().view(torch.float16)
