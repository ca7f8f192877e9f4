"""A paged KV cache in plain torch: what an engine's cache must do, on any device.

Pages hold keys and values of all layers for `PAGE` tokens; a sequence takes them as it grows and gives them back at its end.
Codes are packed, scales and zeros per token and head (paper sections 4.2 and 5.3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import reference
from .allocator import PageAllocator
from .kv import KVFormat, QuantizedKV
from .packing import pack_u4, unpack_u4

#: Tokens in a page.
PAGE = 64


class PagedCache:
    """Keys and values of up to ``sequences`` sequences in ``pages`` pages of `PAGE` tokens.

    ``form``: how they are stored (scales per token; None or no grid: in ``dtype`` as they are).
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        pages: int,
        form: KVFormat | None = None,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str = "cpu",
    ) -> None:
        self.form = form if form is not None and form.grid is not None else None
        self.packed = self.form is not None and self.form.grid is not None and self.form.grid.bits == 4
        slots = pages * PAGE
        shape = (layers, 2, slots, kv_heads)
        width = head_dim // 2 if self.packed else head_dim
        self.codes = torch.zeros(*shape, width, dtype=torch.uint8 if self.form else dtype, device=device)
        self.scales = torch.zeros(*shape, dtype=torch.float16, device=device) if self.form else None
        self.zeros = torch.zeros(*shape, dtype=torch.float16, device=device) if self.form else None
        self.allocator = PageAllocator(pages)
        self._pages: dict[int, list[int]] = {}
        self._next = 0

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return self.allocator.free

    def open(self) -> int:
        """A new, empty sequence."""
        self._next += 1
        self._pages[self._next] = []
        return self._next

    def free(self, sequence: int) -> None:
        """End a sequence and take its pages back. Raises KeyError where it is not open."""
        self.allocator.drop(self._held(sequence))
        del self._pages[sequence]

    def reserve(self, sequence: int, tokens: int) -> None:
        """Make room for ``tokens`` in all. Raises `allocator.PagesExhausted`, changing nothing, where pages are short."""
        held = self._held(sequence)
        held += self.allocator.take(max(0, -(-tokens // PAGE) - len(held)))

    def _held(self, sequence: int) -> list[int]:
        if sequence not in self._pages:
            raise KeyError(f"sequence: {sequence} is not open")
        return self._pages[sequence]

    def _slots(self, sequence: int, start: int, stop: int) -> torch.Tensor:
        """Places of the tokens ``start .. stop - 1``."""
        pages = torch.tensor(self._held(sequence), dtype=torch.long)
        positions = torch.arange(start, stop)
        return (pages[positions // PAGE] * PAGE + positions % PAGE).to(self.codes.device)

    def append(self, layer: int, sequence: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys (after RoPE) and values ``[T, H, D]`` of the tokens from ``start`` on; room must be reserved."""
        slots = self._slots(sequence, start, start + len(keys))
        for side, x in enumerate((keys, values)):
            if self.form is None:
                self.codes[layer, side, slots] = x
                continue
            assert self.scales is not None and self.zeros is not None
            q = self.form.quantize_values(x)
            self.codes[layer, side, slots] = pack_u4(q.codes) if self.packed else q.codes
            self.scales[layer, side, slots], self.zeros[layer, side, slots] = q.scales, q.zeros

    def gather(self, layer: int, sequence: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 keys and values ``[H, T, D]`` of the tokens ``start .. stop - 1``."""
        slots, found = self._slots(sequence, start, stop), []
        for side in (0, 1):
            codes = self.codes[layer, side, slots]
            if self.scales is not None and self.zeros is not None:
                codes = unpack_u4(codes) if self.packed else codes
                codes = QuantizedKV(codes, self.scales[layer, side, slots], self.zeros[layer, side, slots]).dequantize()
            found.append(codes.float().transpose(0, 1))
        return found[0], found[1]

    def decode(
        self,
        layer: int,
        sequences: Sequence[int],
        positions: Sequence[int],
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        window: int | None = None,
    ) -> torch.Tensor:
        """One decode step: every sequence's new query attends to its cached keys and values and to its own, which are not
        quantised for it, then those are stored.

        ``positions``: of the new tokens; ``qkv``: query ``[B, Hq, D]``, key and value ``[B, Hkv, D]``, after RoPE. Returns
        ``[B, Hq, D]`` in the query's dtype.
        """
        query, key, value = qkv
        rows = []
        for i, (sequence, position) in enumerate(zip(sequences, positions, strict=True)):
            first = 0 if window is None else max(0, position + 1 - window)
            past = self.gather(layer, sequence, first, position)
            k, v = (torch.cat([old, new[i].float()[:, None]], 1)[None] for old, new in zip(past, (key, value), strict=True))
            rows.append(reference.kv4_attention(query[i : i + 1], k, v))
            self.append(layer, sequence, position, key[i : i + 1], value[i : i + 1])
        return torch.cat(rows)
