"""Integration with transformers: a 4-bit KV cache for `generate`."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from transformers.cache_utils import Cache, DynamicLayer

from .grids import UINT4, Grid
from .hadamard import transform
from .kv import Keys, KVFormat, QuantizedKV, dequantize_windows
from .packing import pack_u4, unpack_u4


def _stored_format(grid: Grid | KVFormat) -> tuple[KVFormat, Grid]:
    """The format that ``grid`` stands for, and its grid. Raises TypeError or ValueError where there is nothing to store."""
    form = KVFormat.of(grid, "grid")
    if form is None or form.grid is None:
        raise ValueError(f"grid: expected a Grid or a KVFormat with a grid, got {grid!r}")
    return form, form.grid


class KV4Layer(DynamicLayer):
    """One layer's keys and values as packed 4-bit codes, quantised once, on arrival, per token and head.

    `update` returns the dequantised past followed by the *unquantised* new tokens: a prompt attends to exact keys and values
    and a decoded token to its own exact ones, as QServe's kernels do.
    """

    def __init__(self, grid: Grid | KVFormat = UINT4) -> None:
        super().__init__()
        self.form, self.grid = _stored_format(grid)
        self.stored: dict[str, QuantizedKV] = {}
        #: with scales per key channel: exact keys [B, H, < window, D] of the window that is not complete yet
        self.waiting: torch.Tensor | None = None

    def _append(self, name: str, new: torch.Tensor) -> torch.Tensor:
        past = self.stored.get(name)
        self._store(name, self.form.quantize_values(new))
        return new if past is None else torch.cat([self._unpack(past).dequantize(new.dtype), new], 2)

    def _append_windows(self, new: torch.Tensor) -> torch.Tensor:
        past = self.stored.get("keys")
        waiting = new if self.waiting is None else torch.cat([self.waiting, new], 2)
        whole = waiting.shape[2] // self.form.window * self.form.window
        if whole:
            self._store("keys", self.form.quantize_windows(waiting[:, :, :whole]))
        self.waiting = waiting[:, :, whole:].clone()
        return waiting if past is None else torch.cat([dequantize_windows(self._unpack(past), new.dtype), waiting], 2)

    def _store(self, name: str, quantized: QuantizedKV) -> None:
        """Append along the tokens' (or windows') dimension."""
        fresh, past = QuantizedKV(self._pack(quantized.codes), quantized.scales, quantized.zeros), self.stored.get(name)
        if past is not None:
            pairs = zip(vars(past).values(), vars(fresh).values(), strict=True)
            fresh = QuantizedKV(*(torch.cat(pair, 2) for pair in pairs))
        self.stored[name] = fresh

    def _pack(self, codes: torch.Tensor) -> torch.Tensor:
        return pack_u4(codes) if self.grid.bits == 4 else codes

    def _unpack(self, stored: QuantizedKV) -> QuantizedKV:
        codes = unpack_u4(stored.codes) if self.grid.bits == 4 else stored.codes
        return QuantizedKV(codes, stored.scales, stored.zeros)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys (after RoPE) and values ``[B, H, T, D]``; return what attention sees, ``[B, H, past + T, D]``.

        Where the format rotates keys, they are returned rotated, and the attention function must rotate queries.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key_states = transform(key_states) if self.form.rotate_keys else key_states
        per_channel = self.form.keys is Keys.CHANNEL
        keys = self._append_windows(key_states) if per_channel else self._append("keys", key_states)
        values = self._append("values", value_states)
        keys.from_quantized_cache = True  # type: ignore[attr-defined]  # so that `attention.forward` does not round again
        return keys, values

    def get_seq_length(self) -> int:
        """Number of cached tokens."""
        return self.stored["values"].scales.shape[2] if self.stored else 0

    def _map(self, change: Any) -> None:
        self.stored = {n: QuantizedKV(*(change(t) for t in vars(s).values())) for n, s in self.stored.items()}
        self.waiting = None if self.waiting is None else change(self.waiting)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Select sequences, as beam search does."""
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._map(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the given sequences."""
        self._map(lambda t: t[indices])

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Not offered: releases of transformers disagree on whether the argument counts kept or removed tokens."""
        raise TypeError("KV4Cache: crop is not supported; make a new cache from the shorter prompt")

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.stored, self.waiting = {}, None

    def storage_bytes(self) -> int:
        """Bytes of codes, scales and zeros, and of keys that wait for their window."""
        tensors = [t for s in self.stored.values() for t in vars(s).values()]
        return sum(t.numel() * t.element_size() for t in (*tensors, *([] if self.waiting is None else [self.waiting])))


def cache_keyword() -> str:
    """How ``model.generate`` calls its cache: ``cache`` from transformers 5.24 on, ``past_key_values`` before.

    ``model.generate(ids, **{cache_keyword(): KV4Cache()})`` works with either, without a warning.
    """
    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    return "cache" if (major, minor) >= (5, 24) else "past_key_values"


class KV4Cache(Cache):
    """4-bit KV cache for ``model.generate(..., cache=KV4Cache())`` (see `cache_keyword`), with any dynamic cache.

    Another unsigned grid, such as `grids.UINT8`, makes it a cache of that many bits, for comparison; a `kv.KVFormat` may
    scale keys per channel. One that rotates keys needs a quantised model, whose attention rotates queries too.

    With a quantised model `qoqlab.generate` chooses it, and integer linears, by itself.

    Raises TypeError for anything but a grid or a format, ValueError for one that stores nothing or a signed grid.
    """

    def __init__(self, grid: Grid | KVFormat = UINT4) -> None:
        _stored_format(grid)  # layers are made when the model is first run, too late for an error
        super().__init__(layer_class_to_replicate=functools.partial(KV4Layer, grid))  # type: ignore[arg-type]

    def storage_bytes(self) -> int:
        """Bytes of all layers' codes, scales and zeros."""
        return sum(layer.storage_bytes() for layer in self.layers if isinstance(layer, KV4Layer))
