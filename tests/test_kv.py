"""KV codes: the scalar formula, the corners that originals get wrong, and independence of tokens and heads."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from qoqlab import kv
from qoqlab.grids import UINT4, UINT8

F32 = np.float32
#: Half an ulp of fp16, relative, for normal numbers.
HALF = 2.0**-11


def half(value):
    """Round to fp16, keep as fp32."""
    return F32(np.float16(F32(value)))


def scalar(row, grid):
    """Codes, scale and zero of one head, one number at a time."""
    low, high = min(row), max(row)
    scale = half(max((high - low) / F32(grid.steps), max(abs(low), abs(high)) / F32(2048))) or F32(1)
    zero = half(-low / scale)
    codes = [int(min(max(np.rint(v / scale + zero), grid.low), grid.high)) for v in row]
    return codes, float(scale), float(zero)


def heads():
    """Random, planted and hostile heads [N, 64], fp32."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(24, 64, generator=generator)
    planted = torch.randn(8, 64, generator=generator)
    planted[:, 5] += 30
    single = torch.zeros(2, 64)
    single[0, 0], single[1, 63] = 3.0, -3.0
    constant = torch.tensor([0.0, 1.0, -1.0, 0.37, 2.0**-24, 1e-7, 1e4, -6e4])[:, None].expand(-1, 64)
    shifted = torch.cat([normal[:2] + offset for offset in (8.0, -8.0, 100.0, -1000.0, 2e4)])
    scaled = torch.cat([normal[:4] * factor for factor in (1e-7, 1e-6, 1e-5, 1e-4, 1e4)])
    return torch.cat([normal, planted, single, constant, shifted, scaled])


@pytest.mark.parametrize("grid", [UINT4, UINT8], ids=lambda grid: grid.name)
def test_equals_the_scalar_formula(grid):
    x = heads()
    c = kv.quantize_kv(x, grid)
    assert (c.codes.dtype, c.scales.dtype, c.zeros.dtype) == (torch.uint8, torch.float16, torch.float16)
    for row, *got in zip(x.numpy(), c.codes.tolist(), c.scales.tolist(), c.zeros.tolist(), strict=True):
        assert tuple(got) == scalar(row, grid)


def test_literal_values():
    c = kv.quantize_kv4(torch.tensor([[-3.0, -0.5, 0.5, 12.0], [16.0, 18.0, 31.0, 17.0], [0.0, 0.0, 0.0, 0.0]]))
    # row 0: -0.5 + 3 and 0.5 + 3 are ties, to even
    assert c.codes.tolist() == [[0, 2, 4, 15], [0, 2, 15, 1], [0, 0, 0, 0]]
    assert c.scales.tolist() == [1, 1, 1]
    assert c.zeros.tolist() == [3, -16, 0]


def error_in_steps(x, c):
    return (x.double() - c.dequantize(torch.float64)).abs() / c.scales.double()[..., None]


def test_error_is_half_a_step_when_the_range_covers_zero():
    # |zero| <= 15.01, so fp16 holds it to 2**-8 of a code; the scale's rounding cuts 15 * 2**-11 off the top.
    x = heads()[:24]
    assert (x.amin(-1) < 0).all() and (x.amax(-1) > 0).all()
    bound = 0.5 + 2.0**-8 + 15 * HALF * 1.01
    assert (error_in_steps(x, kv.quantize_kv4(x)) <= bound).all()


@pytest.mark.parametrize("ratio", [10.0**exponent for exponent in range(7)])
@pytest.mark.parametrize("sign", [1, -1])
def test_no_code_wraps_however_large_the_offset(ratio, sign):
    # QServe's kernel wraps code 16 to 0 here, an error of 16 steps. A zero of up to 2050 is off by at most one code.
    x = torch.rand(64, 128, generator=torch.Generator().manual_seed(0)) - 0.5
    x = x / (x.amax(-1) - x.amin(-1))[:, None] + sign * ratio
    c = kv.quantize_kv4(x)
    assert int(c.codes.max()) <= 15
    assert (c.zeros.abs() <= 2050).all()
    assert (error_in_steps(x, c) <= 1 + 15 * HALF * 1.01 + 2.0**-10).all()  # the last term: fp32 at |x / s| <= 2049
    # the floor of the scale costs no more than a rounding step of fp16 values
    largest = x.abs().amax(-1).double()
    assert (c.scales.double() <= torch.maximum(largest / 2048, 1 / torch.full_like(largest, 15)) * (1 + 2 * HALF)).all()


@pytest.mark.parametrize("value", [1.0, -1.0, 0.37, -0.1, 3.14159, 1e-4, -2.5e-4, 1000.3, 65504.0, -4e5])
def test_a_head_without_range_is_accurate(value):
    # The original divides by zero. Here: scale = |x| / 2048, and a code is off by at most one of those 2048 steps.
    c = kv.quantize_kv4(torch.full((1, 64), value))
    assert c.zeros.isfinite().all()
    error = (c.dequantize(torch.float64) - torch.tensor(value).double()).abs().max()
    assert error <= 2.0**-11 * (1 + 2 * HALF) * abs(value)


@pytest.mark.parametrize("value", [0.0, 2.0**-24, -(2.0**-20), 2.0**-14])
def test_tiny_heads_without_range_are_exact(value):
    c = kv.quantize_kv4(torch.full((1, 64), value))
    assert c.dequantize().tolist() == [[value] * 64]


def test_values_below_the_smallest_scale_collapse_to_their_minimum():
    # No fp16 scale is smaller than 2**-24; the error stays below 15 of the half steps that round to no scale at all.
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * 1e-8
    assert (x - kv.quantize_kv4(x).dequantize()).abs().max() <= 15 * 2.0**-25 + 2.0**-25


def test_tokens_and_heads_are_independent():
    x = torch.randn(7, 3, 64, generator=torch.Generator().manual_seed(1))  # [T, H, D]
    x[4] *= 50
    x[:, 1] += 10
    whole = kv.quantize_kv4(x)
    assert whole.scales.shape == whole.zeros.shape == (7, 3)
    for t in range(7):
        for h in range(3):
            one = kv.quantize_kv4(x[t, h])
            assert torch.equal(one.codes, whole.codes[t, h])
            assert one.scales == whole.scales[t, h] and one.zeros == whole.zeros[t, h]


def test_a_group_never_spans_two_heads():
    # With D = 64, groups of 128 channels would join a quiet head with a loud one and flatten the quiet one.
    x = torch.randn(5, 2, 64, generator=torch.Generator().manual_seed(2))
    x[:, 1] *= 100
    per_head = kv.quantize_kv4(x).dequantize()
    joined = kv.quantize_kv4(x.flatten(1)).dequantize().unflatten(1, (2, 64))
    quiet = x[:, 0].abs().max()
    assert (per_head[:, 0] - x[:, 0]).abs().max() < 0.2 * quiet
    assert (joined[:, 0] - x[:, 0]).abs().max() > 0.9 * quiet


@pytest.mark.parametrize(
    ("argument", "error"),
    [
        (torch.ones(2, 4, dtype=torch.int8), TypeError),
        (torch.tensor([1.0, math.nan]), ValueError),
        (torch.tensor([1.0, -math.inf]), ValueError),
        (torch.ones(2, 0), ValueError),
        (torch.tensor([-1e38, 1e38]), ValueError),
    ],
)
def test_bad_input_is_refused(argument, error):
    with pytest.raises(error, match="x: "):
        kv.quantize_kv4(argument)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    offset=st.floats(-100, 100),
    grid=st.sampled_from([UINT4, UINT8]),
    seed=st.integers(0, 2**16),
)
def test_shapes_dtypes_and_errors(shape, dtype, offset, grid, seed):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + offset).to(dtype)
    before = x.clone()
    c = kv.quantize_kv(x, grid)
    assert torch.equal(x, before)
    assert c.codes.shape == x.shape and c.scales.shape == c.zeros.shape == x.shape[:-1]
    assert int(c.codes.max()) <= grid.high
    assert c.dequantize(dtype).dtype == dtype
    assert (error_in_steps(x, c) <= 1 + grid.steps * HALF * 1.01 + 2.0**-10).all()


def test_windows_of_keys_are_rows_of_one_channel():
    x = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0))
    form = kv.KVFormat(UINT4, kv.Keys.CHANNEL, window=4)
    got = form.quantize_windows(x)
    assert (got.codes.shape, got.scales.shape) == ((2, 3, 5, 4), (2, 3, 5))
    for b, w, c in ((0, 0, 0), (1, 2, 4), (0, 1, 3)):
        codes, scale, zero = scalar(x[b, 4 * w : 4 * w + 4, c].numpy(), UINT4)
        row = got.codes[b, w, c].tolist(), got.scales[b, w, c].item(), got.zeros[b, w, c].item()
        assert row == (codes, scale, zero)
    whole = kv.dequantize_windows(got, torch.float32)
    assert whole.shape == x.shape and torch.equal(form.round_keys(x), whole)
    # three tokens wait for a fourth
    assert torch.equal(form.round_keys(x[:, :11]), torch.cat([whole[:, :8], x[:, 8:11]], 1))
    assert torch.equal(form.round_keys(x[:, :3]), x[:, :3])
    with pytest.raises(ValueError, match="x: 11 tokens do not fill windows of 4"):
        form.quantize_windows(x[:, :11])


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    lead=st.lists(st.integers(1, 3), max_size=2),
    tokens=st.integers(1, 13),
    channels=st.integers(1, 9),
    grid=st.sampled_from([None, UINT4, UINT8]),
    keys=st.sampled_from(list(kv.Keys)),
    window=st.sampled_from([2, 4, 6]),
    ratio=st.floats(0.3, 1.0),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_formats_of_any_shape_and_dtype(lead, tokens, channels, grid, keys, window, ratio, dtype, seed):
    """What a format returns is what its scalars say: rows of values per token, rows of keys per token or per channel."""
    form = kv.KVFormat(grid, keys, window, ratio=ratio)
    x = torch.randn(*lead, tokens, channels, generator=torch.Generator().manual_seed(seed)).to(dtype)
    before, values, rounded = x.clone(), form.round_values(x), form.round_keys(x)
    assert torch.equal(x, before)
    assert values.shape == rounded.shape == x.shape and values.dtype == rounded.dtype == dtype
    if grid is None:
        assert torch.equal(values, x) and torch.equal(rounded, x)
        return
    assert torch.equal(values, kv.quantize_kv(x, grid, ratio).dequantize(dtype))
    if keys is kv.Keys.TOKEN:
        assert torch.equal(rounded, values)
        return
    whole = tokens // window * window
    assert torch.equal(rounded[..., whole:, :], x[..., whole:, :])  # an incomplete window is exact
    for first in range(0, whole, window):
        for channel in range(channels):
            row = kv.quantize_kv(x[..., first : first + window, channel], grid, ratio)
            assert torch.equal(rounded[..., first : first + window, channel], row.dequantize(dtype))
    # more tokens never change what complete windows hold
    longer = form.round_keys(torch.cat([x, x[..., :1, :] * 100], -2))
    assert torch.equal(longer[..., :whole, :], rounded[..., :whole, :])


def test_a_ratio_clips_both_ends():
    x = torch.tensor([[-1.0, 0.0, 1.0, 3.0]])
    got = kv.quantize_kv(x, UINT4, 0.5)
    assert got.dequantize()[0, 3].item() == pytest.approx(1.5, rel=1e-2) and got.scales.item() == pytest.approx(
        2 / 15, rel=1e-3
    )
    assert got.codes[0, 3] == 15 and got.codes[0, 0] == 0
    with pytest.raises(ValueError, match="ratio"):
        kv.quantize_kv(x, UINT4, 0.0)
