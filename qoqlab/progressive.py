"""Progressive group quantisation: 4-bit codes that a kernel turns into INT8 with integers alone (paper section 4.1).

Level 1, per output channel:  ``y = w / channel_scale``            in the protective range (+-119), not rounded
Level 2, per group of K:      ``code = round(y / group_scale + group_zero)``   in 0..15

so that ``(code - group_zero) * group_scale`` is an INT8 integer, the GEMM runs on INT8 tensor cores, and one fp16
multiplication per output restores the channel scale.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch

from .affine import divide, symmetric_scales
from .checks import require_enum, require_groups, require_matrix, require_ratio
from .grids import INT8_PROTECTED, INT8_PROTECTED_SCALED, UINT4, Grid, Zero

__all__ = ["FirstLevel", "ProgressiveScales", "ProgressiveWeight", "Zero", "first_level_grid", "overflows", "quantize"]


class FirstLevel(Enum):
    """Whether level 1 is rounded to INT8 before level 2 sees it.

    UNROUNDED is what released checkpoints do; ROUNDED is the paper's literal formula (about 2 % of the codes differ).
    """

    UNROUNDED = "unrounded"
    ROUNDED = "rounded"


def first_level_grid(zero: Zero) -> Grid:
    """The protective range that belongs to a kind of zero: +-119 for INTEGER, +-120 for SCALED."""
    return INT8_PROTECTED if zero is Zero.INTEGER else INT8_PROTECTED_SCALED


@dataclass(frozen=True)
class ProgressiveScales:
    """Both levels of scales of a weight ``[N, K]`` with ``G = K / group_size`` groups per row, without the codes.

    ``channel_scales`` fp16 [N]; ``group_scales`` int8 [N, G] in 1..16; ``group_zeros`` [N, G], uint8 codes in 0..15
    (``Zero.INTEGER``) or int8 first-level units (``Zero.SCALED``).
    """

    channel_scales: torch.Tensor
    group_scales: torch.Tensor
    group_zeros: torch.Tensor
    group_size: int
    zero: Zero
    first_level: FirstLevel

    def _columns(self, per_group: torch.Tensor, columns: slice) -> torch.Tensor:
        """``[N, G]`` -> fp32, broadcasting to ``[N, columns]``: the value of the group that each column lies in."""
        start, stop, _ = columns.indices(per_group.shape[1] * self.group_size)
        first, last = start // self.group_size, -(-stop // self.group_size)
        touched = per_group[:, first:last].float()
        if last - first == 1:  # one group: broadcast instead of copying
            return touched
        offset = first * self.group_size
        return touched.repeat_interleave(self.group_size, 1)[:, start - offset : stop - offset]

    def encode(self, weight: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        """uint8 codes of ``weight[:, columns]``, given as ``[N, len(columns)]``."""
        limit = first_level_grid(self.zero).high
        y = (weight.float() / self.channel_scales.float()[:, None]).clamp_(-limit, limit)
        if self.first_level is FirstLevel.ROUNDED:
            y.round_()
        s, z = self._columns(self.group_scales, columns), self._columns(self.group_zeros, columns)
        return UINT4.clamp(y.div_(s).add_(z) if self.zero is Zero.INTEGER else y.add_(z).div_(s))

    def _decode_first_level(self, codes: torch.Tensor, columns: slice) -> torch.Tensor:
        """Level-1 integers as fp32."""
        s, z = self._columns(self.group_scales, columns), self._columns(self.group_zeros, columns)
        return (codes.float() - z).mul_(s) if self.zero is Zero.INTEGER else (codes.float() * s).sub_(z)

    def decode_int8(self, codes: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        """int8 ``[N, len(columns)]``: level-1 integers that the tensor core multiplies; never wraps (see `overflows`)."""
        return self._decode_first_level(codes, columns).to(torch.int8)

    def decode(self, codes: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        """fp32 values of ``codes``."""
        return self._decode_first_level(codes, columns).mul_(self.channel_scales.float()[:, None])


@dataclass(frozen=True)
class ProgressiveWeight(ProgressiveScales):
    """A progressively quantised weight: ``codes`` uint8 [N, K] in 0..15 beside both levels of scales."""

    codes: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """``[N, K]``."""
        return self.codes.shape

    def int8(self) -> torch.Tensor:
        """int8 [N, K]: what the INT8 tensor core multiplies."""
        return self.decode_int8(self.codes)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[N, K] values that the codes stand for, computed in fp32 and rounded once to ``dtype``."""
        return self.decode(self.codes).to(dtype)


def choose_scales(
    weight: torch.Tensor,
    group_size: int = 128,
    zero: Zero = Zero.INTEGER,
    first_level: FirstLevel = FirstLevel.UNROUNDED,
    ratio: torch.Tensor | float = 1.0,
) -> ProgressiveScales:
    """Both levels of scales for a finite ``weight [N, K]``; ``ratio`` (scalar or [N, G]) shrinks each group's range.

    Raises ValueError where ``group_size`` does not divide K or values are too large for fp16 scales.
    """
    require_groups("weight", weight, group_size)
    grid = first_level_grid(zero)
    channel_scales = symmetric_scales(weight, grid, name="weight").scales
    y = (weight.float() / channel_scales.float()[:, None]).clamp(grid.low, grid.high)
    if first_level is FirstLevel.ROUNDED:
        y = y.round()
    groups = y.unflatten(1, (-1, group_size))
    low, high = groups.amin(-1) * ratio, groups.amax(-1) * ratio
    if zero is Zero.INTEGER:
        low, high = low.clamp(max=0), high.clamp(min=0)
    scales = divide(high - low, UINT4.steps).round().clamp(1, 127)
    zeros = UINT4.clamp(-low / scales) if zero is Zero.INTEGER else (-low).round().clamp(-128, 127).to(torch.int8)
    return ProgressiveScales(channel_scales, scales.to(torch.int8), zeros, group_size, zero, first_level)


def quantize(
    weight: torch.Tensor,
    group_size: int = 128,
    zero: Zero = Zero.INTEGER,
    first_level: FirstLevel = FirstLevel.UNROUNDED,
    ratio: torch.Tensor | float = 1.0,
) -> ProgressiveWeight:
    """Quantise ``weight [N, K]`` to 4 bits in two levels (paper section 4.1).

    Returns ``codes`` uint8 [N, K] in 0..15, ``group_scales`` int8 [N, G], ``group_zeros`` [N, G] (uint8 for INTEGER, int8
    for SCALED) and ``channel_scales`` fp16 [N]. All-zero rows get scale 1 and decode to exact zeros.

    Raises TypeError for a non-float ``weight``; ValueError for NaN, infinity, a wrong shape, a K that ``group_size`` does
    not divide, or values too large for fp16 scales.

    >>> w = quantize(torch.tensor([[0.0, 1.19, -1.19, 0.5]]), group_size=4)
    >>> w.codes.tolist(), w.group_scales.tolist(), w.group_zeros.tolist(), w.int8().tolist()
    ([[7, 14, 0, 10]], [[16]], [[7]], [[0, 112, -112, 48]])
    """
    require_matrix("weight", weight)
    require_enum("zero", zero, Zero)
    require_enum("first_level", first_level, FirstLevel)
    require_ratio(ratio)
    scales = choose_scales(weight, group_size, zero, first_level, ratio)
    return ProgressiveWeight(**vars(scales), codes=scales.encode(weight))


def _nearest(value: float) -> set[int]:
    """The nearest integer, or both neighbours of a tie: rounding modes differ there (half even, half up)."""
    return {math.floor(value + 0.5), math.ceil(value - 0.5)}


def overflows(limit: int, zero: Zero = Zero.INTEGER) -> Iterator[tuple[int, int, int, int, int]]:
    """Every pair of group extremes in ``-limit..limit`` whose decoded end points may leave INT8.

    Yields ``(low, high, group_scale, group_zero, decoded)``. Decoding is monotone in the code, so the codes of the two
    extremes decide. A tie may be rounded either way, since converters and kernels differ there. Nothing is yielded for 119
    (INTEGER) and 120 (SCALED), and one more overflows: these limits are exactly tight. (With an unrounded first level and
    SCALED zeros the two ties must be rounded alike, as this library does.)

    >>> list(overflows(119)), next(overflows(120))
    ([], (-120, 120, 16, 7, 128))
    """
    for low in range(-limit, limit + 1):
        for high in range(low, limit + 1):
            bottom, top = (min(low, 0), max(high, 0)) if zero is Zero.INTEGER else (low, high)
            scale = max(round((top - bottom) / UINT4.steps), 1)
            zeros = _nearest(-bottom / scale) if zero is Zero.INTEGER else {-bottom}
            for z, value in itertools.product(sorted(zeros), (low, high)):
                exact = value / scale + z if zero is Zero.INTEGER else (value + z) / scale
                for code in sorted(min(max(c, 0), 15) for c in _nearest(exact)):
                    decoded = (code - z) * scale if zero is Zero.INTEGER else code * scale - z
                    if not -128 <= decoded <= 127:
                        yield low, high, scale, z, decoded
