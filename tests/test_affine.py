"""Affine quantisation against a scalar implementation, derived error bounds, and hostile inputs."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from qoqlab import affine
from qoqlab.grids import INT4, INT8, UINT4, UINT8, Zero

F32 = np.float32
#: Relative rounding error of fp16 scales, and the absolute one below fp16's smallest normal number 2**-14.
HALF, SUBNORMAL = 2.0**-11, 2.0**-25
#: fp32 slack, in steps: codes are at most 255 before rounding and every operation is off by at most 2**-24 of that.
SLACK = 2.0**-14


def half(value):
    """Round to fp16, keep as fp32."""
    return F32(np.float16(F32(value)))


def encode(value, grid):
    return int(min(max(np.rint(value), grid.low), grid.high))


def scalar_symmetric(row, grid):
    """Codes and scale of one row, one number at a time."""
    scale = half(F32(max(abs(v) for v in row)) / F32(grid.high)) or F32(1)
    return [encode(v / scale, grid) for v in row], scale


def scalar_asymmetric(row, grid, zero):
    """Codes, scale and zero of one row, one number at a time."""
    low, high = min(row), max(row)
    if zero is Zero.INTEGER:
        low, high = min(low, F32(0)), max(high, F32(0))
    scale = half((high - low) / F32(grid.steps)) or F32(1)
    z = F32(encode(-low / scale, grid)) if zero is Zero.INTEGER else half(-low)
    codes = [encode(v / scale + z if zero is Zero.INTEGER else (v + z) / scale, grid) for v in row]
    return codes, scale, z


def rows():
    """Random, planted and hostile rows [N, 32], fp32."""
    random = torch.Generator().manual_seed(0)
    normal = torch.randn(40, 32, generator=random)
    planted = torch.randn(8, 32, generator=random)
    planted[:, 5] *= 100  # an outlier channel
    single = torch.zeros(2, 32)
    single[0, 3], single[1, 31] = 7.0, -7.0
    constant = torch.tensor([0.0, 1.0, -1.0, 0.37, 2.0**-24, 1e4])[:, None].expand(-1, 32)
    signed = torch.cat([normal[:4].abs() + 3, -normal[:4].abs() - 3])
    scaled = torch.cat([normal[:6] * factor for factor in (1e-7, 1e-6, 3e-6, 1e-5, 1e-4, 1e4)])
    ties = torch.arange(-16, 16)[None] / 2.0 * torch.tensor([[1.0], [1.5]])
    offset = torch.tensor([[1000.0], [-1000.01]]) + torch.linspace(0, 0.01, 32)  # where order of operations matters
    return torch.cat([normal, planted, single, constant, signed, scaled, ties, offset])


@pytest.mark.parametrize("grid", [INT8, INT4], ids=lambda grid: grid.name)
def test_per_token_equals_the_scalar_formula(grid):
    x = rows()
    a = affine.quantize_per_token_s8(x, grid)
    assert a.codes.dtype == torch.int8 and a.scales.dtype == torch.float16 and a.zeros is None
    for row, codes, scale in zip(x.numpy(), a.codes.tolist(), a.scales.tolist(), strict=True):
        assert (codes, scale) == scalar_symmetric(row, grid)


@pytest.mark.parametrize("zero", Zero)
def test_per_channel_equals_the_scalar_formula(zero):
    x = rows()
    p = affine.quantize_per_channel_u4(x, zero)
    assert p.codes.dtype == torch.uint8 and p.scales.dtype == torch.float16
    assert p.zeros.dtype == (torch.uint8 if zero is Zero.INTEGER else torch.float16)
    for row, codes, scale, z in zip(x.numpy(), p.codes.tolist(), p.scales.tolist(), p.zeros.tolist(), strict=True):
        assert (codes, scale, z) == scalar_asymmetric(row, UINT4, zero)


def test_literal_values():
    a = affine.quantize_per_token_s8(torch.tensor([[127.0, -127.0, 0.5, 1.5, -2.5]]))
    assert (a.codes.tolist(), a.scales.tolist()) == ([[127, -127, 0, 2, -2]], [1.0])
    p = affine.quantize_per_channel_u4(torch.tensor([[-4.0, -0.5, 0.5, 11.0]]))
    # -0.5 + 4 and 0.5 + 4 are ties: half to even gives 4 and 4
    assert (p.codes.tolist(), p.scales.tolist(), p.zeros.tolist()) == ([[0, 4, 4, 15]], [1.0], [4])
    s = affine.quantize_per_channel_u4(torch.tensor([[2.25, 3.25, 17.25]]), Zero.SCALED)
    assert (s.codes.tolist(), s.scales.tolist(), s.zeros.tolist()) == ([[0, 1, 15]], [1.0], [-2.25])


def test_symmetric_error_is_at_most_half_a_step():
    # Clamping adds nothing for normal scales: max|x| - 127 s <= 127 * 2**-11 * s / (1 - 2**-11) < 0.063 s < s / 2.
    x = rows()[:40].double()
    a = affine.quantize_per_token_s8(x.float())
    steps = a.scales.double()[:, None]
    assert ((x - a.dequantize(torch.float64)).abs() <= steps * (0.5 + SLACK)).all()


def test_symmetric_error_with_subnormal_scales():
    # The scale is off by at most 2**-25, so the largest code can miss by 127 times that.
    x = rows()
    small = x[x.abs().amax(-1) < 127 * 2.0**-14].double()
    a = affine.quantize_per_token_s8(small.float())
    stored = torch.where(a.codes.any(-1), a.scales.double(), 0)[:, None]  # a scale below fp16's smallest became 1
    assert len(small) > 10
    assert ((small - a.dequantize(torch.float64)).abs() <= torch.maximum(stored / 2, stored * 0 + 127 * SUBNORMAL)).all()


def test_integer_zero_error_is_half_a_step_plus_the_scale_rounding():
    # zero = round(-min / s) moves both ends by at most half a step; the top additionally by 15 * 2**-11 of a step.
    x = rows()
    x = x[(x.amax(-1).clamp(min=0) - x.amin(-1).clamp(max=0)) >= 15 * 2.0**-14].double()
    p = affine.quantize_per_channel_u4(x.float())
    bound = p.scales.double()[:, None] * (0.5 + 15 * HALF * 1.01 + SLACK)
    assert ((x - p.dequantize(torch.float64)).abs() <= bound).all()


def test_scaled_zero_error_is_half_a_step_or_the_rounding_of_the_zero():
    x = rows()
    x = x[x.amax(-1) - x.amin(-1) >= 15 * 2.0**-14].double()
    p = affine.quantize_per_channel_u4(x.float(), Zero.SCALED)
    zero_error = (p.zeros.double() + x.amin(-1)).abs()
    steps = p.scales.double()
    inside, clamped = steps * (0.5 + SLACK), zero_error + steps * (15 * HALF * 1.01 + SLACK)
    assert ((x - p.dequantize(torch.float64)).abs() <= torch.maximum(inside, clamped)[:, None]).all()


def test_zero_rows_have_scale_one_and_stay_zero():
    zeros = torch.zeros(2, 8)
    for q in (
        affine.quantize_per_token_s8(zeros),
        affine.quantize_per_channel_u4(zeros),
        affine.quantize_per_channel_u4(zeros, Zero.SCALED),
    ):
        assert q.scales.tolist() == [1, 1]
        assert q.dequantize().tolist() == zeros.tolist()


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 0.75, -2048.0, 2.0**-24])
def test_scaled_zero_keeps_constant_fp16_rows_exactly(value):
    p = affine.quantize_per_channel_u4(torch.full((1, 4), value), Zero.SCALED)
    assert p.dequantize().tolist() == [[value] * 4]


def test_zero_itself_is_exact_with_an_integer_zero():
    x = rows().clone()
    x[:, 7] = 0
    assert (affine.quantize_per_channel_u4(x).dequantize()[:, 7] == 0).all()


def test_a_ratio_shrinks_the_range():
    x = torch.tensor([[-1.5, 0.0, 1.5], [-1.5, 0.0, 1.5]])
    p = affine.quantize_per_channel_u4(x, ratio=torch.tensor([1.0, 0.5]))
    assert p.scales.tolist() == [half(0.2), half(0.1)]
    assert p.dequantize().abs().amax(-1).tolist() == [pytest.approx(1.6, rel=HALF), pytest.approx(0.8, rel=HALF)]


@pytest.mark.parametrize("quantize", [affine.quantize_per_token_s8, affine.quantize_per_channel_u4])
@pytest.mark.parametrize(
    ("argument", "error"),
    [
        (torch.ones(2, 2, dtype=torch.int64), TypeError),
        ([[1.0]], TypeError),
        (torch.tensor([[1.0, math.nan]]), ValueError),
        (torch.tensor([[1.0, math.inf]]), ValueError),
        (torch.ones(2, 0), ValueError),
        (torch.full((1, 2), 1e38) * torch.tensor([1.0, -1.0]), ValueError),
    ],
)
def test_bad_input_is_refused(quantize, argument, error):
    with pytest.raises(error, match=r"^(x|weight): "):
        quantize(argument)


def test_a_scaled_zero_that_fp16_cannot_hold_is_refused():
    # the scale, 1 / 15, fits; the zero, 70000, does not
    with pytest.raises(ValueError, match="too large"):
        affine.quantize_per_channel_u4(torch.tensor([[-70000.0, -69999.0]]), Zero.SCALED)


def test_arguments_stay_as_they_are():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    before = x.clone()
    affine.quantize_per_token_s8(x)
    affine.quantize_per_channel_u4(x)
    assert torch.equal(x, before)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    grid=st.sampled_from([INT8, INT4, UINT4, UINT8]),
    seed=st.integers(0, 2**16),
)
def test_shapes_dtypes_and_ranges(shape, dtype, grid, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    symmetric = grid.low < 0
    scales = affine.symmetric_scales(x, grid) if symmetric else affine.asymmetric_scales(x, grid)
    q = affine.quantize(x, scales)
    assert q.shape == q.codes.shape == x.shape and q.scales.shape == x.shape[:-1]
    assert grid.low <= int(q.codes.min()) and int(q.codes.max()) <= grid.high
    assert q.dequantize(dtype).dtype == dtype
    # every dtype converts to fp32 with no more than the error of fp64 -> fp32, so the half-step bound holds
    bound = q.scales.double()[..., None] * (0.5 + grid.steps * HALF + SLACK)
    assert ((x.double() - q.dequantize(torch.float64)).abs() <= bound).all()
