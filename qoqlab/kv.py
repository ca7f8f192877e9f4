"""KV cache codes: one asymmetric scale and zero per token and head (paper section 4.2 and 5.3).

The zero is real-valued fp16 in units of codes, as in QServe's cache pages: ``x ~ scale * (code - zero)``.

Two corners that the original gets wrong are ruled out here. A head with no range (constant, or all zero) would divide by
zero; a head whose offset dwarfs its range would need a zero that fp16 cannot hold, and its top code would wrap from 16 to 0.
The scale is therefore at least ``max|x| / 2048``, one fp16 rounding step of the values themselves, which keeps ``|zero|``
within fp16's exact integers, and codes are clamped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .affine import divide, to_scale
from .checks import require_rows
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


def quantize_kv(x: torch.Tensor, grid: Grid = UINT4) -> QuantizedKV:
    """Quantise ``x [..., D]`` with one scale and zero per leading index (token and head) on an unsigned ``grid``.

    All arithmetic in fp32: ``scale = fp16(max((max - min) / steps, max|x| / 2048))`` (1 for an all-zero head),
    ``zero = fp16(-min / scale)``, ``code = clamp(round(x / scale + zero))``.

    Raises TypeError for a non-float ``x``; ValueError for NaN, infinity or an empty last dimension.

    >>> c = quantize_kv(torch.tensor([-1.0, 0.0, 0.5, 2.0]))
    >>> c.codes.tolist(), round(c.scales.item(), 2), round(c.zeros.item(), 2)
    ([0, 5, 8, 15], 0.2, 5.0)
    """
    require_rows("x", x)
    values = x.float()
    low, high = values.amin(-1), values.amax(-1)
    largest = torch.maximum(low.abs(), high.abs())
    scale = to_scale("x", torch.maximum(divide(high - low, grid.steps), divide(largest, FP16_EXACT_INTEGERS)))
    zero = (-low / scale.float()).half()
    codes = grid.clamp(values / scale.float()[..., None] + zero.float()[..., None])
    return QuantizedKV(codes, scale, zero)


def quantize_kv4(x: torch.Tensor) -> QuantizedKV:
    """Quantise ``x [..., D]`` (keys after RoPE, or values) to 4 bits per token and head; see `quantize_kv`."""
    return quantize_kv(x, UINT4)
