"""Plain group quantisation: a fp16 scale per row and group of columns, optionally with outlier columns kept at INT8.

The format of weight-only methods (GPTQ, AWQ: 4-bit weights in groups of 128) and of Atom (arXiv 2310.19102), which groups
weights and activations alike and keeps the last columns, sorted there beforehand, at INT8. Unlike `progressive` groups these
need a floating-point multiplication per group in the GEMM's main loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .affine import asymmetric_scales, symmetric_scales
from .checks import require_groups
from .grids import INT4, INT8, UINT4, Grid, Zero

#: Never more outlier columns than this share of them: 128 of 4096, as Atom has in its 7B models.
OUTLIER_SHARE = 1 / 32


def outlier_columns(columns: int, most: int) -> int:
    """How many of ``columns`` are outliers: ``most``, but at most 1 in 32, and an even number (codes are packed in pairs).

    >>> outlier_columns(4096, 128), outlier_columns(512, 128), outlier_columns(512, 0)
    (128, 16, 0)
    """
    return min(most, 2 * int(columns * OUTLIER_SHARE / 2))


def group_slices(columns: int, group_size: int, outliers: int = 0) -> list[slice]:
    """Columns of every group, in order: whole groups, a shorter one if the size does not fit, then the outliers.

    >>> group_slices(10, 4, outliers=2)
    [slice(0, 4, None), slice(4, 8, None), slice(8, 10, None)]
    """
    body = columns - outliers
    slices = [slice(start, min(start + group_size, body)) for start in range(0, body, group_size)]
    return [*slices, slice(body, columns)] if outliers else slices


@dataclass(frozen=True)
class GroupedScales:
    """Scales of every row and group, without the codes; rows are leading dimensions, as in `affine`.

    ``scales`` fp16 [..., G]; ``zeros`` None (symmetric), or uint8 codes or fp16 [..., G] by ``zero``, as in `AffineScales`.
    Of ``columns``, the last ``outliers`` form the last group and lie on INT8; the others lie on ``grid``.
    """

    scales: torch.Tensor
    zeros: torch.Tensor | None
    columns: int
    group_size: int
    outliers: int
    grid: Grid
    zero: Zero

    def slices(self) -> list[slice]:
        """Columns of every group."""
        return group_slices(self.columns, self.group_size, self.outliers)

    def _spread(self, per_group: torch.Tensor, columns: slice) -> torch.Tensor:
        """``[..., G]`` -> fp32 broadcasting to ``[..., len(columns)]``: the value of each column's group."""
        start, stop, _ = columns.indices(self.columns)
        body = self.columns - self.outliers
        last = per_group.shape[-1] - 1
        if start >= body and self.outliers:
            return per_group[..., -1:].float()
        if stop <= body and start // self.group_size == (stop - 1) // self.group_size:
            return per_group[..., start // self.group_size, None].float()
        index = torch.arange(start, stop, device=per_group.device)
        group = torch.where(index < body, index // self.group_size, last)
        return per_group.float().index_select(-1, group)

    def encode(self, x: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        """Codes of ``x[..., columns]``, given as ``[..., len(columns)]``; int8 for symmetric formats, otherwise uint8."""
        scale = self._spread(self.scales, columns)
        if self.zeros is not None:
            zeros = self._spread(self.zeros, columns)
            return self.grid.clamp(x.float() / scale + zeros if self.zero is Zero.INTEGER else (x.float() + zeros) / scale)
        start, stop, _ = columns.indices(self.columns)
        inside = max(0, min(stop, self.columns - self.outliers) - start)
        body, tail = (x.float() / scale).tensor_split([inside], -1)
        return torch.cat([self.grid.clamp(body), INT8.clamp(tail)], -1)

    def decode(self, codes: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        """fp32 values of ``codes [..., len(columns)]``."""
        scale = self._spread(self.scales, columns)
        if self.zeros is None:
            return codes.float() * scale
        zeros = self._spread(self.zeros, columns)
        return (codes.float() - zeros) * scale if self.zero is Zero.INTEGER else codes.float() * scale - zeros


@dataclass(frozen=True)
class Grouped(GroupedScales):
    """A quantised tensor: ``codes [..., K]`` beside the scales of their rows and groups."""

    codes: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape of the quantised tensor."""
        return self.codes.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Values ``[..., K]`` that the codes stand for, computed in fp32 and rounded once to ``dtype``."""
        return self.decode(self.codes).to(dtype)


def choose_asymmetric(
    x: torch.Tensor,
    group_size: int,
    grid: Grid = UINT4,
    zero: Zero = Zero.INTEGER,
    ratio: torch.Tensor | float = 1.0,
) -> GroupedScales:
    """Scale and zero of every row and group of a finite ``x [..., K]``; ``ratio`` (scalar or [..., G]) shrinks ranges.

    Raises ValueError where ``group_size`` does not divide K or values are too large for fp16 scales.
    """
    require_groups("weight", x, group_size)
    found = asymmetric_scales(x.unflatten(-1, (-1, group_size)), grid, zero, ratio, "weight")
    return GroupedScales(found.scales, found.zeros, x.shape[-1], group_size, 0, grid, zero)


def choose_symmetric(
    x: torch.Tensor,
    group_size: int | None = None,
    grid: Grid = INT4,
    outliers: int = 0,
    ratio: torch.Tensor | float = 1.0,
    name: str = "x",
) -> GroupedScales:
    """Scale of every row and group of a finite ``x [..., K]``: groups of ``group_size`` (None: one), then the outliers.

    ``ratio`` (scalar or [..., G]) shrinks ranges; a scalar leaves the outliers whole. The last group before the outliers may
    be shorter. Raises ValueError for values too large for fp16 scales, or when nothing is left beside the outliers.
    """
    columns = x.shape[-1]
    if not 0 <= outliers < columns:
        raise ValueError(f"outliers: expected 0..{columns - 1} of {columns} columns, got {outliers!r}")
    size = columns - outliers if group_size is None else group_size
    parts = []
    for i, group in enumerate(group_slices(columns, size, outliers)):
        tail = outliers > 0 and group.stop == columns
        shrink = ratio[..., i] if isinstance(ratio, torch.Tensor) and ratio.ndim else (1.0 if tail else ratio)
        parts.append(symmetric_scales(x[..., group], INT8 if tail else grid, shrink, name).scales)
    return GroupedScales(torch.stack(parts, -1), None, columns, size, outliers, grid, Zero.INTEGER)


def quantize(x: torch.Tensor, scales: GroupedScales) -> Grouped:
    """Codes of ``x [..., K]`` on given scales."""
    return Grouped(**vars(scales), codes=scales.encode(x))
