"""Progressive weights: the protective range by enumeration, the scalar formula, error bounds and hostile inputs."""

import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from qoqlab import progressive
from qoqlab.progressive import FirstLevel, Zero

F32 = np.float32
LIMIT = {Zero.INTEGER: 119, Zero.SCALED: 120}


def half(value):
    """Round to fp16, keep as fp32."""
    return F32(np.float16(F32(value)))


def clip(value, low, high):
    return min(max(value, low), high)


def scalar(row, group_size, zero, first_level, ratios=()):
    """Codes, channel scale, group scales and group zeros of one row, one number at a time; ``ratios``: of its groups."""
    limit = F32(LIMIT[zero])
    channel = half(max(abs(v) for v in row) / limit) or F32(1)
    y = [clip(v / channel, -limit, limit) for v in row]
    if first_level is FirstLevel.ROUNDED:
        y = [np.rint(v) for v in y]
    codes, scales, zeros = [], [], []
    for start in range(0, len(row), group_size):
        group = y[start : start + group_size]
        low, high = min(group), max(group)
        if len(ratios):
            low, high = low * F32(ratios[start // group_size]), high * F32(ratios[start // group_size])
        if zero is Zero.INTEGER:
            low, high = min(low, F32(0)), max(high, F32(0))
        s = clip(np.rint((high - low) / F32(15)), F32(1), F32(127))
        if zero is Zero.INTEGER:
            z = clip(np.rint(-low / s), F32(0), F32(15))
            codes += [int(clip(np.rint(v / s + z), 0, 15)) for v in group]
        else:
            z = clip(np.rint(-low), F32(-128), F32(127))
            codes += [int(clip(np.rint((v + z) / s), 0, 15)) for v in group]
        scales.append(int(s))
        zeros.append(int(z))
    return codes, float(channel), scales, zeros


def weights():
    """Random, planted and hostile rows [N, 64], fp32."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(24, 64, generator=generator)
    planted = torch.randn(8, 64, generator=generator)
    planted[:, 9] *= 50
    single = torch.zeros(2, 64)
    single[0, 3], single[1, 40] = 5.0, -5.0
    constant = torch.tensor([0.0, 1.0, -1.0, 0.37, 1e-7, 1e4])[:, None].expand(-1, 64)
    one_sided = torch.cat([normal[:3].abs() + 2, -normal[:3].abs() - 2])
    scaled = torch.cat([normal[:4] * factor for factor in (1e-7, 1e-6, 3e-6, 1e-5, 1e-4, 1e4)])
    half_steps = torch.arange(-32, 32)[None] * torch.tensor([[0.5], [119 / 32], [120 / 32]])  # many exact ties
    return torch.cat([normal, planted, single, constant, one_sided, scaled, half_steps])


@pytest.mark.parametrize("group_size", [64, 32, 8])
@pytest.mark.parametrize(("zero", "first_level"), list(itertools.product(Zero, FirstLevel)))
def test_equals_the_scalar_formula(zero, first_level, group_size):
    x = weights()
    w = progressive.quantize(x, group_size, zero, first_level)
    assert (w.codes.dtype, w.channel_scales.dtype, w.group_scales.dtype) == (torch.uint8, torch.float16, torch.int8)
    assert w.group_zeros.dtype == (torch.uint8 if zero is Zero.INTEGER else torch.int8)
    fields = (w.codes, w.channel_scales, w.group_scales, w.group_zeros)
    for row, *got in zip(x.numpy(), *(field.tolist() for field in fields), strict=True):
        assert tuple(got) == scalar(row, group_size, zero, first_level)


def test_literal_values():
    # channel scale 1; group 0 spans -119..119 (s = 16, z = 7), group 1 spans 0..30 (s = 2, z = 0)
    x = torch.tensor([[-119.0, 119.0, 8.0, -100.0, 30.0, 1.0, 3.0, 0.0]])
    w = progressive.quantize(x, group_size=4)
    assert (w.channel_scales.tolist(), w.group_scales.tolist(), w.group_zeros.tolist()) == ([1.0], [[16, 2]], [[7, 0]])
    # 8 / 16 + 7 and 1 / 2 and 3 / 2 are ties, rounded to even codes
    assert w.codes.tolist() == [[0, 14, 8, 1, 15, 0, 2, 0]]
    assert w.int8().tolist() == [[-112, 112, 16, -96, 30, 0, 4, 0]]
    assert w.dequantize().tolist() == w.int8().float().tolist()


# The protective range


def test_the_protective_range_is_exactly_tight():
    assert list(progressive.overflows(119)) == []
    assert list(progressive.overflows(120))
    assert list(progressive.overflows(120, Zero.SCALED)) == []
    assert list(progressive.overflows(121, Zero.SCALED))


def test_every_overflow_of_120_is_a_step_of_sixteen_beyond_127():
    assert {(scale, decoded) for _, _, scale, _, decoded in progressive.overflows(120)} == {(16, 128)}


def divide_half_even(numerator, denominator):
    """Integer division of int64 tensors, rounded half to even; no floating point."""
    quotient = numerator.div(denominator, rounding_mode="floor")
    twice = 2 * (numerator - quotient * denominator)
    return quotient + ((twice > denominator) | ((twice == denominator) & (quotient % 2 == 1))).long()


@pytest.mark.parametrize("zero", Zero)
def test_every_pair_of_first_level_integers_decodes_inside_int8(zero):
    # Group 0 holds the limit, which forces a channel scale of exactly 1; group 1 holds the pair and values between.
    limit = LIMIT[zero]
    low, high = torch.combinations(torch.arange(-limit, limit + 1), with_replacement=True).T
    assert len(low) == (2 * limit + 1) * (2 * limit + 2) // 2
    between = low + (high - low) * torch.randint(0, 1001, low.shape, generator=torch.Generator().manual_seed(0)) // 1000
    y = torch.stack([low, high, (low + high) // 2, between], 1)
    anchor = torch.tensor([limit, 0, 0, 0]).expand(len(y), -1)
    w = progressive.quantize(torch.cat([anchor, y], 1).float(), group_size=4, zero=zero)
    assert (w.channel_scales == 1).all()

    bottom, top = (low.clamp(max=0), high.clamp(min=0)) if zero is Zero.INTEGER else (low, high)
    s = divide_half_even(top - bottom, torch.tensor(15)).clamp(min=1)
    if zero is Zero.INTEGER:
        z = divide_half_even(-bottom, s).clamp(0, 15)
        codes = divide_half_even(y + z[:, None] * s[:, None], s[:, None])  # the same ties as y / s + z: z is an integer
    else:
        z = -bottom
        codes = divide_half_even(y + z[:, None], s[:, None])
    codes = codes.clamp(0, 15)
    decoded = (codes - z[:, None]) * s[:, None] if zero is Zero.INTEGER else codes * s[:, None] - z[:, None]

    assert torch.equal(w.group_scales[:, 1].long(), s)
    assert torch.equal(w.group_zeros[:, 1].long(), z)
    assert torch.equal(w.codes[:, 4:].long(), codes)
    assert torch.equal(w.int8()[:, 4:].long(), decoded)  # int8 would differ from int64 if it had wrapped
    assert int(decoded.min()) >= -128 and int(decoded.max()) <= 127
    assert int(s.max()) == 16 and int((w.codes.long() * w.group_scales.long().repeat_interleave(4, 1)).max()) <= 240


def wide(w):
    """Decoded weights in int64 instead of int8."""
    s, z = (t.long().repeat_interleave(w.group_size, 1) for t in (w.group_scales, w.group_zeros))
    return (w.codes.long() - z) * s if w.zero is Zero.INTEGER else w.codes.long() * s - z


@pytest.mark.parametrize("zero", Zero)
def test_unrounded_first_level_stays_inside_int8_too(zero):
    # The first level is not rounded, so half steps (all the ties) and their neighbours occur as well.
    limit = LIMIT[zero]
    ends = torch.arange(-2 * limit, 2 * limit + 1, 3) / 2
    ends = torch.cat([ends, torch.arange(-limit, -limit + 20, 0.5), torch.arange(limit - 20, limit + 0.5, 0.5)])
    low, high = torch.combinations(ends.unique(), with_replacement=True).T
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    pairs = torch.stack([low, high, low.nextafter(up).clamp(max=limit), high.nextafter(down).clamp(min=-limit)], 1)
    rows = torch.cat([pairs[:, :2], pairs[:, 1:3], pairs[:, [0, 3]], pairs[:, 2:]])
    anchor = torch.tensor([limit, 0.0]).expand(len(rows), -1)
    w = progressive.quantize(torch.cat([anchor, rows], 1), group_size=2, zero=zero)
    decoded = wide(w)
    assert int(decoded.min()) >= -128 and int(decoded.max()) <= 127
    assert torch.equal(w.int8().long(), decoded)


# Errors


@pytest.mark.parametrize("zero", Zero)
@pytest.mark.parametrize("group_size", [64, 8])
def test_error_is_half_a_step_plus_what_the_rounded_scales_cut_off(zero, group_size):
    # In units of the channel scale: half a group step; the group scale may be rounded down by half, which cuts
    # (range - 15 s) off the top; the channel scale is off by at most 2**-11, which cuts 120 * 2**-11 off.
    x = weights()
    x = x[x.abs().amax(-1) >= LIMIT[zero] * 2.0**-14].double()  # normal fp16 channel scales
    w = progressive.quantize(x.float(), group_size, zero)
    unit = w.channel_scales.double()[:, None]
    groups = (x / unit).unflatten(1, (-1, group_size))
    low, high = groups.amin(-1), groups.amax(-1)
    if zero is Zero.INTEGER:
        low, high = low.clamp(max=0), high.clamp(min=0)
    s = w.group_scales.double()
    bound = s / 2 + (high - low - 15 * s).clamp(min=0) + 120 * 2.0**-11 * 1.01 + 2.0**-12  # the last term: fp32 slack
    error = (x / unit - w.dequantize(torch.float64) / unit).abs().unflatten(1, (-1, group_size)).amax(-1)
    assert (error <= bound).all()


def test_rounding_the_first_level_changes_a_small_share_of_the_codes():
    x = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    plain, rounded = (progressive.quantize(x, first_level=level) for level in FirstLevel)
    share = (plain.codes != rounded.codes).float().mean().item()
    assert 0 < share < 0.05  # "about 2 %"
    # each is within 16 / 2 + 7.5 of its own first level (see the error bound), and those are half an integer apart
    assert (plain.int8().int() - rounded.int8().int()).abs().max() <= 31


def test_zero_rows_decode_to_zeros():
    for zero in Zero:
        w = progressive.quantize(torch.zeros(2, 8), 4, zero)
        assert w.channel_scales.tolist() == [1, 1]
        assert w.int8().tolist() == [[0] * 8] * 2


def test_groups_do_not_influence_each_other():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    x[:, 0] = 9.0  # fixes the channel scale
    changed = x.clone()
    changed[:, 32:] /= 3
    first, second = progressive.quantize(x, 32), progressive.quantize(changed, 32)
    assert torch.equal(first.codes[:, :32], second.codes[:, :32])
    assert torch.equal(first.group_scales[:, 0], second.group_scales[:, 0])
    assert not torch.equal(first.group_scales[:, 1], second.group_scales[:, 1])


def test_columns_can_be_encoded_and_decoded_on_their_own():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    w = progressive.quantize(x, 16)
    for columns in (slice(0, 1), slice(15, 17), slice(40, 64)):
        assert torch.equal(w.encode(x[:, columns], columns), w.codes[:, columns])
        assert torch.equal(w.decode(w.codes[:, columns], columns), w.dequantize()[:, columns])


def test_a_ratio_shrinks_single_groups():
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(4))
    plain = progressive.quantize(x, 16)
    shrunk = progressive.quantize(x, 16, ratio=torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    changed = plain.group_scales != shrunk.group_scales
    assert changed.tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize(
    ("argument", "group_size", "error", "message"),
    [
        (torch.ones(2, 100), 128, ValueError, "2x100 is not divisible into groups of 128"),
        (torch.ones(2, 8), 0, ValueError, "group_size"),
        (torch.ones(2, 8, dtype=torch.int32), 8, TypeError, "weight"),
        (torch.ones(8), 8, ValueError, "weight"),
        (torch.full((2, 8), math.nan), 8, ValueError, "NaN"),
        (torch.full((2, 8), 1e8), 8, ValueError, "too large"),
    ],
)
def test_bad_input_is_refused(argument, group_size, error, message):
    with pytest.raises(error, match=message):
        progressive.quantize(argument, group_size)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 6),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([1, 2, 16, 32, 128]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    zero=st.sampled_from(Zero),
    first_level=st.sampled_from(FirstLevel),
    clipped=st.sampled_from(["not", "alike", "group by group"]),
    exponent=st.integers(-12, 4),
    seed=st.integers(0, 2**16),
)
def test_shapes_dtypes_and_ranges(rows, groups, group_size, dtype, zero, first_level, clipped, exponent, seed):
    ratios = 0.2 + 0.8 * torch.rand(rows, groups, generator=torch.Generator().manual_seed(seed + 1))
    ratio = {"not": 1.0, "alike": float(ratios[0, 0]), "group by group": ratios}[clipped]
    x = torch.randn(rows, groups * group_size, generator=torch.Generator().manual_seed(seed))
    x = (x * 2.0**exponent).to(dtype)
    before = x.clone()
    w = progressive.quantize(x, group_size, zero, first_level, ratio)
    assert torch.equal(x, before)
    assert w.shape == x.shape and w.group_scales.shape == w.group_zeros.shape == (rows, groups)
    assert int(w.codes.max()) <= 15 and int(w.group_scales.min()) >= 1 and int(w.group_scales.max()) <= 16
    assert torch.equal(w.int8().long(), wide(w))
    assert torch.equal(w.codes, progressive.quantize(x.float(), group_size, zero, first_level, ratio).codes)
    last = ratios[-1].tolist() if clipped == "group by group" else [ratio] * groups
    codes, channel, scales, zeros = scalar(x[-1].float().numpy(), group_size, zero, first_level, last)
    assert (w.codes[-1].tolist(), float(w.channel_scales[-1])) == (codes, channel)
    assert (w.group_scales[-1].tolist(), w.group_zeros[-1].tolist()) == (scales, zeros)
    assert w.dequantize(dtype).dtype == dtype
