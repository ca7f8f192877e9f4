"""Choose scales, quantise, dequantise: one scale (and zero) per row.

Every granularity is a view. Rows are the last dimension, so per token is ``x [..., K]`` as it is, per output channel is
``weight [N, K]``, per head is ``x [..., H, D]``, per group is ``weight.view(N, G, group_size)`` and per tensor is
``x.reshape(1, -1)``.

All arithmetic is fp32; scales are rounded to fp16 *before* codes are computed, because the rounded scale is what a kernel
multiplies with. Rounding is half to even. The meaning is always ``x ~ scale * (code - zero)`` (or ``scale * code - zero``
for ``Zero.SCALED``), never the reciprocal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .checks import require_enum, require_matrix, require_ratio, require_rows, require_scale_fits
from .grids import INT8, UINT4, Grid, Zero


@dataclass(frozen=True)
class AffineScales:
    """Scale and zero of every row, without the codes.

    ``scales`` fp16 [...]; ``zeros`` None for symmetric formats, otherwise uint8 codes (``Zero.INTEGER``) or fp16
    (``Zero.SCALED``), same shape as ``scales``.
    """

    scales: torch.Tensor
    zeros: torch.Tensor | None
    grid: Grid
    zero: Zero

    def encode(self, x: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        """Codes of ``x [..., K]`` on this grid; ``columns`` is accepted for symmetry with per-group scales."""
        scale = self.scales.float().unsqueeze(-1)
        if self.zeros is None:
            return self.grid.clamp(x.float() / scale)
        zero = self.zeros.float().unsqueeze(-1)
        if self.zero is Zero.INTEGER:
            return self.grid.clamp(x.float() / scale + zero)
        return self.grid.clamp((x.float() + zero) / scale)

    def decode(self, codes: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        """fp32 values of ``codes [..., K]``."""
        scale = self.scales.float().unsqueeze(-1)
        if self.zeros is None:
            return codes.float() * scale
        zero = self.zeros.float().unsqueeze(-1)
        return (codes.float() - zero) * scale if self.zero is Zero.INTEGER else codes.float() * scale - zero


@dataclass(frozen=True)
class Affine(AffineScales):
    """A quantised tensor: ``codes [..., K]`` beside the scales of their rows."""

    codes: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape of the quantised tensor."""
        return self.codes.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Values ``[..., K]`` that the codes stand for, computed in fp32 and rounded once to ``dtype``."""
        return self.decode(self.codes).to(dtype)


def divide(x: torch.Tensor, by: int) -> torch.Tensor:
    """``x / by`` correctly rounded on every device (CUDA multiplies by the reciprocal when given a Python number)."""
    return x / torch.full_like(x, by)


def to_scale(name: str, step: torch.Tensor) -> torch.Tensor:
    """A step size rounded to fp16; 1 where it rounds to zero. Raises ValueError where fp16 cannot hold it."""
    scale = step.half()
    require_scale_fits(name, scale)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def symmetric_scales(x: torch.Tensor, grid: Grid = INT8, ratio: torch.Tensor | float = 1.0, name: str = "x") -> AffineScales:
    """One fp16 scale per row of ``x [..., K]`` such that ``ratio * max|x|`` meets the end of the grid; zero rows get 1."""
    largest = x.float().abs().amax(-1) * ratio
    return AffineScales(to_scale(name, divide(largest, grid.high)), None, grid, Zero.INTEGER)


def asymmetric_scales(
    x: torch.Tensor,
    grid: Grid = UINT4,
    zero: Zero = Zero.INTEGER,
    ratio: torch.Tensor | float = 1.0,
    name: str = "x",
) -> AffineScales:
    """One fp16 scale and one zero per row of ``x [..., K]``, covering ``ratio * (min, max)``.

    With an integer zero the range is widened to include 0, so that 0 is exactly representable. Zero rows get scale 1; a
    constant row keeps its value (exactly with ``Zero.SCALED``, to half a step otherwise).
    """
    low, high = x.float().amin(-1) * ratio, x.float().amax(-1) * ratio
    if zero is Zero.INTEGER:
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = to_scale(name, divide(high - low, grid.steps))
    if zero is Zero.INTEGER:
        return AffineScales(scale, grid.clamp(-low / scale.float()), grid, zero)
    zeros = (-low).half()
    require_scale_fits(name, zeros)
    return AffineScales(scale, zeros, grid, zero)


def quantize(x: torch.Tensor, scales: AffineScales) -> Affine:
    """Codes of ``x [..., K]`` on given scales."""
    return Affine(scales.scales, scales.zeros, scales.grid, scales.zero, scales.encode(x))


def quantize_per_token_s8(x: torch.Tensor, grid: Grid = INT8) -> Affine:
    """Activations, one symmetric INT8 scale per token (paper section 4.1; QServe quantises them dynamically).

    ``x [..., K]`` float -> ``codes`` int8 [..., K] in -127..127, ``scales`` fp16 [...] = max|x| / 127 rounded to fp16.
    An all-zero token gets zero codes and scale 1.

    Raises TypeError for a non-float ``x``, ValueError for NaN, infinity or an empty last dimension.

    >>> a = quantize_per_token_s8(torch.tensor([[0.5, -1.27, 0.0]]))
    >>> a.codes.tolist(), round(a.scales.item(), 4)
    ([[50, -127, 0]], 0.01)
    """
    require_rows("x", x)
    return quantize(x, symmetric_scales(x, grid))


def quantize_per_channel_u4(weight: torch.Tensor, zero: Zero = Zero.INTEGER, ratio: torch.Tensor | float = 1.0) -> Affine:
    """Per-channel 4-bit weights: one scale and zero per output channel (paper section 4.1, "per-channel" variant).

    ``weight [N, K]`` float -> ``codes`` uint8 [N, K] in 0..15, ``scales`` fp16 [N], ``zeros`` uint8 [N] in 0..15
    (``Zero.INTEGER``) or fp16 [N] (``Zero.SCALED``). ``ratio`` shrinks the range, a scalar or [N].

    Raises TypeError for a non-float ``weight``, ValueError for NaN, infinity, a wrong shape or an overflowing scale.

    >>> p = quantize_per_channel_u4(torch.tensor([[-0.5, 0.0, 0.25, 1.0]]))
    >>> p.codes.tolist(), p.zeros.tolist(), round(p.scales.item(), 4)
    ([[0, 5, 8, 15]], [5], 0.1)
    """
    require_matrix("weight", weight)
    require_enum("zero", zero, Zero)
    require_ratio(ratio)
    return quantize(weight, asymmetric_scales(weight, UINT4, zero, ratio, "weight"))
