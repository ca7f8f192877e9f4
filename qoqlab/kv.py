"""KV cache codes: one asymmetric scale and zero per token and head (paper section 4.2 and 5.3).

The zero is real-valued fp16 in units of codes, as in QServe's cache pages: ``x ~ scale * (code - zero)``.

Two corners that the original gets wrong are ruled out here. A head with no range (constant, or all zero) would divide by
zero; a head whose offset dwarfs its range would need a zero that fp16 cannot hold, and its top code would wrap from 16 to 0.
The scale is therefore at least ``max|x| / 2048``, one fp16 rounding step of the values themselves, which keeps ``|zero|``
within fp16's exact integers, and codes are clamped.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from .affine import divide, to_scale
from .checks import require_count, require_enum, require_ratio, require_rows
from .grids import UINT4, Grid

#: fp16 holds every integer up to this one, so a zero of at most this size is off by at most half a code.
FP16_EXACT_INTEGERS = 2048


@dataclass(frozen=True)
class QuantizedKV:
    """Keys or values: ``codes`` uint8 [..., D], ``scales`` fp16 [...], ``zeros`` fp16 [...] in units of codes."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[..., D] values, computed in fp32 as ``(code - zero) * scale`` and rounded once to ``dtype``."""
        return ((self.codes.float() - self.zeros.float()[..., None]) * self.scales.float()[..., None]).to(dtype)


def quantize_kv(x: torch.Tensor, grid: Grid = UINT4, ratio: float = 1.0) -> QuantizedKV:
    """Quantise ``x [..., D]`` with one scale and zero per leading index (token and head) on an unsigned ``grid``.

    All arithmetic in fp32: ``scale = fp16(max((max - min) / steps, max|x| / 2048))`` (1 for an all-zero head),
    ``zero = fp16(-min / scale)``, ``code = clamp(round(x / scale + zero))``. ``ratio`` in (0, 1] shrinks min and max.

    Raises TypeError for a non-float ``x``; ValueError for NaN, infinity, an empty last dimension or a bad ratio.

    >>> c = quantize_kv(torch.tensor([-1.0, 0.0, 0.5, 2.0]))
    >>> c.codes.tolist(), round(c.scales.item(), 2), round(c.zeros.item(), 2)
    ([0, 5, 8, 15], 0.2, 5.0)
    """
    require_rows("x", x)
    require_ratio(ratio)
    values = x.float()
    low, high = values.amin(-1) * ratio, values.amax(-1) * ratio
    largest = torch.maximum(low.abs(), high.abs())
    scale = to_scale("x", torch.maximum(divide(high - low, grid.steps), divide(largest, FP16_EXACT_INTEGERS)))
    zero = (-low / scale.float()).half()
    codes = grid.clamp(values / scale.float()[..., None] + zero.float()[..., None])
    return QuantizedKV(codes, scale, zero)


def quantize_kv4(x: torch.Tensor) -> QuantizedKV:
    """Quantise ``x [..., D]`` (keys after RoPE, or values) to 4 bits per token and head; see `quantize_kv`."""
    return quantize_kv(x, UINT4)


class Keys(Enum):
    """What shares a scale and zero among cached keys.

    TOKEN    all channels of a token and head, as values always do (QoQ)
    CHANNEL  ``window`` consecutive tokens of a channel, since key outliers stay in their channels (KIVI, arXiv 2402.02750)
    """

    TOKEN = "token"
    CHANNEL = "channel"


@dataclass(frozen=True)
class KVFormat:
    """How keys (after RoPE) and values are cached.

    ``grid`` None stores them as they are. With ``Keys.CHANNEL`` keys wait, exact, until their window of ``window`` tokens is
    complete. ``rotate_keys`` multiplies queries and keys by a Hadamard matrix first, which leaves their products alone and
    spreads key outliers (QuaRot, arXiv 2404.00456). ``ratio`` clips the range of every scale.
    """

    grid: Grid | None = UINT4
    keys: Keys = Keys.TOKEN
    window: int = 32
    rotate_keys: bool = False
    ratio: float = 1.0

    def __post_init__(self) -> None:
        if self.grid is not None and not isinstance(self.grid, Grid):
            raise TypeError(f"grid: expected a Grid or None, got {self.grid!r}")
        if self.grid is not None and self.grid.low:
            raise ValueError(f"grid: keys and values need an unsigned grid, got {self.grid.name}")
        require_enum("keys", self.keys, Keys)
        require_count("window", self.window, 1)
        if self.window % 2:
            raise ValueError(f"window: must be even so that codes fill bytes, got {self.window}")
        if not isinstance(self.rotate_keys, bool):
            raise TypeError(f"rotate_keys: expected True or False, got {self.rotate_keys!r}")
        require_ratio(self.ratio)

    @classmethod
    def of(cls, kv: Grid | KVFormat | None, name: str = "kv") -> KVFormat | None:
        """The format that a grid alone stands for; formats and None pass.

        Raises TypeError for anything else and ValueError for a signed grid, naming the argument ``name``.
        """
        if kv is not None and not isinstance(kv, Grid | KVFormat):
            raise TypeError(f"{name}: expected a Grid, a KVFormat or None, got {kv!r}")
        return cls(kv) if isinstance(kv, Grid) else kv

    def bits_per_value(self, head_dim: int) -> float:
        """Stored bits per number, averaged over keys and values, scale and zero included, in a cache of whole windows."""
        if self.grid is None:
            return 16.0
        shared = [head_dim if self.keys is Keys.TOKEN else self.window, head_dim]
        return sum(self.grid.bits + 2 * 16 / n for n in shared) / 2

    def quantize_values(self, x: torch.Tensor) -> QuantizedKV:
        """Codes of values ``[..., T, D]``, per token and head."""
        assert self.grid is not None
        return quantize_kv(x, self.grid, self.ratio)

    def quantize_windows(self, x: torch.Tensor) -> QuantizedKV:
        """Codes of whole windows of keys ``[..., W * window, D]``: codes ``[..., W, D, window]``, scales ``[..., W, D]``.

        Raises ValueError where the tokens do not fill windows.
        """
        assert self.grid is not None
        if x.shape[-2] % self.window:
            raise ValueError(f"x: {x.shape[-2]} tokens do not fill windows of {self.window}")
        return quantize_kv(x.unflatten(-2, (-1, self.window)).transpose(-1, -2), self.grid, self.ratio)

    def round_values(self, x: torch.Tensor) -> torch.Tensor:
        """Values ``[..., T, D]`` as the cache returns them."""
        return x if self.grid is None else self.quantize_values(x).dequantize(x.dtype)

    def round_keys(self, x: torch.Tensor) -> torch.Tensor:
        """Keys ``[..., T, D]`` as the cache returns them; with ``Keys.CHANNEL`` an incomplete last window stays exact."""
        if self.grid is None or self.keys is Keys.TOKEN:
            return self.round_values(x)
        whole = x.shape[-2] // self.window * self.window
        if not whole:
            return x
        return torch.cat([dequantize_windows(self.quantize_windows(x[..., :whole, :]), x.dtype), x[..., whole:, :]], -2)


def dequantize_windows(keys: QuantizedKV, dtype: torch.dtype) -> torch.Tensor:
    """Keys ``[..., W * window, D]`` of the windows that `KVFormat.quantize_windows` made."""
    return keys.dequantize(dtype).transpose(-1, -2).flatten(-3, -2)
