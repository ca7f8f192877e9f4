"""Grids: which codes exist, and that storing never wraps."""

import pytest
import torch

from qoqlab import grids
from qoqlab.grids import INT4, INT8, INT8_PROTECTED, INT8_PROTECTED_SCALED, UINT4, UINT8

ALL = [INT8, INT8_PROTECTED, INT8_PROTECTED_SCALED, UINT4, INT4, UINT8]


@pytest.mark.parametrize(
    ("grid", "low", "high", "levels", "bits"),
    [
        (INT8, -127, 127, 255, 8),
        (INT8_PROTECTED, -119, 119, 239, 8),
        (INT8_PROTECTED_SCALED, -120, 120, 241, 8),
        (UINT4, 0, 15, 16, 4),
        (INT4, -7, 7, 15, 4),
        (UINT8, 0, 255, 256, 8),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_limits(grid, low, high, levels, bits):
    assert (grid.low, grid.high, grid.levels, grid.steps, grid.bits) == (low, high, levels, levels - 1, bits)


@pytest.mark.parametrize("grid", ALL, ids=lambda grid: grid.name)
def test_every_code_is_stored_as_itself(grid):
    codes = torch.arange(grid.low, grid.high + 1)
    stored = grid.clamp(codes.float())
    assert stored.dtype == grid.dtype
    assert stored.tolist() == codes.tolist()


@pytest.mark.parametrize("grid", ALL, ids=lambda grid: grid.name)
def test_values_outside_are_clamped_and_never_wrap(grid):
    outside = torch.tensor([grid.low - 1.0, grid.low - 0.51, -1e30, grid.high + 0.5, grid.high + 1.0, 1e30])
    assert grid.clamp(outside).tolist() == [grid.low] * 3 + [grid.high] * 3


def test_rounding_is_half_to_even():
    assert INT8.clamp(torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])).tolist() == [-2, -2, 0, 0, 2, 2]


def test_a_grid_is_an_immutable_value():
    assert grids.Grid("UINT4", 0, 15, torch.uint8) == UINT4
    with pytest.raises(AttributeError):
        UINT4.high = 16
