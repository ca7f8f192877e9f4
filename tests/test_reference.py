"""What kernels must equal: exact integers, the epilogue within fp16 rounding, attention against torch's own."""

import dataclasses
import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from qoqlab import affine, grouped, kv, progressive, reference
from qoqlab.grids import INT8, Zero
from qoqlab.reference import grouped_matmul, w4a8_matmul

#: Relative half ulp of fp16 and fp32, and fp16's absolute one below its normal range.
HALF, SINGLE, SUBNORMAL = 2.0**-11, 2.0**-24, 2.0**-25
LARGEST_K = 53248  # the widest layer we know of: Llama-3.1-405B's down_proj


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Integers


@pytest.mark.parametrize("k", [1, 32, 1024, 1025, 4096, LARGEST_K])
def test_int_matmul_is_exact_on_extreme_codes(k):
    codes = torch.tensor([-128, 127, 15, 0, -127])
    pick = torch.Generator().manual_seed(k)
    a = torch.cat([codes[torch.randint(0, 5, (3, k), generator=pick)], torch.full((1, k), -128), torch.full((1, k), 127)])
    b = torch.cat([codes[torch.randint(0, 5, (2, k), generator=pick)], torch.full((1, k), -128), torch.full((1, k), 15)])
    got = reference.int_matmul(a.to(torch.int8), b.to(torch.int8))
    assert got.dtype == torch.int64
    assert torch.equal(got, a @ b.T)
    assert got[3, 2] == 128 * 128 * k and got[4, 3] == 127 * 15 * k


def test_fp32_slices_hold_every_partial_sum():
    assert reference.FP32_EXACT_K * 128 * 128 == 2**24  # fp32's 24-bit mantissa holds every integer up to this one


def test_the_accumulator_fits_int32():
    activation = 127  # codes are symmetric
    assert LARGEST_K * activation * 128 < 2**31  # progressive: decoded int8
    assert LARGEST_K * activation * 15 < 2**31  # per channel: raw codes
    x = torch.full((1, LARGEST_K), activation, dtype=torch.int8)
    extreme = torch.full((1, LARGEST_K), -1.0)
    w = progressive.quantize(extreme, 128)
    assert reference.w4a8_accumulate(x, w).item() == LARGEST_K * activation * int(w.int8()[0, 0])
    p = affine.quantize_per_channel_u4(-extreme)
    assert reference.w4a8_accumulate(x, p).item() == LARGEST_K * activation * 15


def test_int_matmul_refuses_what_it_cannot_do_exactly():
    ones = torch.ones(2, 4, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"-128\.\.127"):
        reference.int_matmul(ones, torch.full((2, 4), 200))
    with pytest.raises(TypeError, match="a: "):
        reference.int_matmul(ones.float(), ones)
    with pytest.raises(ValueError, match="2x4 and 2x3"):
        reference.int_matmul(ones, ones[:, :3])


# The W4A8 layer


@pytest.mark.parametrize("zero", Zero)
@pytest.mark.parametrize("bias", [False, True])
def test_progressive_matmul_equals_fp64(zero, bias):
    x, weight, b = random(5, 256), random(24, 256, seed=1) * 0.05, random(24, seed=2).half() if bias else None
    w = progressive.quantize(weight, 64, zero)
    got = reference.w4a8_matmul(x, w, b)
    exact = affine.quantize_per_token_s8(x).dequantize(torch.float64) @ w.dequantize(torch.float64).T
    # dequantize computes in fp32: one rounding per factor, so the sum of magnitudes bounds what that adds
    magnitude = affine.quantize_per_token_s8(x).dequantize(torch.float64).abs() @ w.dequantize(torch.float64).abs().T
    if bias:
        exact, magnitude = exact + b.double(), magnitude + b.double().abs()
    assert got.dtype == torch.float16 and got.shape == (5, 24)
    # half an ulp of fp16, and some fp32 roundings on the way
    assert ((got.double() - exact).abs() <= HALF * exact.abs() + SUBNORMAL + 4 * SINGLE * magnitude).all()


@pytest.mark.parametrize("zero", Zero)
@pytest.mark.parametrize("bias", [False, True])
def test_per_channel_matmul_equals_fp64(zero, bias):
    x, weight, b = random(5, 256), random(24, 256, seed=1) * 0.05 + 0.01, random(24, seed=2).half() if bias else None
    p = affine.quantize_per_channel_u4(weight, zero)
    a = affine.quantize_per_token_s8(x)
    got = reference.w4a8_matmul(x, p, b).double()

    codes, scales = a.codes.double(), p.scales.double() * a.scales.double()[:, None]
    raw = (codes @ p.codes.double().T) * scales
    zeros = p.zeros.double() * (scales if zero is Zero.INTEGER else a.scales.double()[:, None])
    exact = raw - codes.sum(-1, keepdim=True) * zeros + (b.double() if bias else 0)
    # the integer zero is subtracted exactly, the scaled one after two fp32 roundings of each product
    magnitude = raw.abs() + (codes.sum(-1, keepdim=True) * zeros).abs() + 1
    assert ((got - exact).abs() <= HALF * exact.abs() + SUBNORMAL + 4 * SINGLE * magnitude).all()

    plain = a.dequantize(torch.float64) @ p.dequantize(torch.float64).T + (b.double() if bias else 0)
    assert ((exact - plain).abs() <= 8 * SINGLE * (magnitude + raw.abs().sum())).all()


def test_large_row_sums_stay_finite():
    """QServe's fp16 sum of activations overflows beyond 65504; the sum of codes does not."""
    x = torch.full((1, 4096), 20.0)
    w = random(2, 4096).abs() * 0.1
    y = reference.w4a8_matmul(x, affine.quantize_per_channel_u4(w))
    assert x.sum() > 65504 and y.isfinite().all()
    assert torch.allclose(y.float(), x @ w.T, rtol=0.02)


def test_bias_is_checked():
    w = affine.quantize_per_channel_u4(random(4, 32))
    with pytest.raises(ValueError, match="bias: expected shape 4"):
        reference.w4a8_matmul(random(2, 32), w, torch.zeros(3))
    with pytest.raises(ValueError, match="bias: holds 1 NaN"):
        reference.w4a8_matmul(random(2, 32), w, torch.tensor([0.0, 1.0, math.nan, 0.0]))


def quantised_weights():
    weight = random(8, 64, seed=3)
    return [
        progressive.quantize(weight, 32),
        progressive.quantize(weight, 32, Zero.SCALED),
        affine.quantize_per_channel_u4(weight),
        affine.quantize_per_channel_u4(weight, Zero.SCALED),
    ]


@pytest.mark.parametrize("w", quantised_weights(), ids=["progressive", "progressive-scaled", "channel", "channel-scaled"])
class TestMatmul:
    def test_an_all_zero_token_gives_the_bias(self, w):
        x = random(3, 64)
        x[1] = 0
        bias = random(8, seed=5).half()
        assert reference.w4a8_matmul(x, w)[1].tolist() == [0] * 8
        assert torch.equal(reference.w4a8_matmul(x, w, bias)[1], bias)

    def test_tokens_do_not_influence_each_other(self, w):
        x = random(3, 64)
        together = reference.w4a8_matmul(x, w)
        for i in range(3):
            assert torch.equal(reference.w4a8_matmul(x[i : i + 1], w), together[i : i + 1])

    def test_leading_dimensions(self, w):
        x = random(2, 3, 64)
        y = reference.w4a8_matmul(x, w)
        assert y.shape == (2, 3, 8)
        assert torch.equal(y.flatten(0, 1), reference.w4a8_matmul(x.flatten(0, 1), w))
        assert torch.equal(reference.w4a8_matmul(x[0, 0], w), y[0, 0])

    def test_quantised_activations(self, w):
        x = random(3, 64, seed=6)
        assert torch.equal(reference.w4a8_matmul(affine.quantize_per_token_s8(x), w), reference.w4a8_matmul(x, w))

    def test_bad_input_is_refused(self, w):
        with pytest.raises(ValueError, match="32 does not match the weight's K = 64"):
            reference.w4a8_matmul(random(2, 32), w)
        with pytest.raises(ValueError, match="NaN"):
            reference.w4a8_matmul(torch.full((1, 64), math.nan), w)
        with pytest.raises(TypeError, match="weight"):
            reference.w4a8_matmul(random(2, 64), random(8, 64))


def test_results_beyond_fp16_become_infinite():
    w = progressive.quantize(torch.full((1, 64), 100.0), 64)
    assert reference.w4a8_matmul(torch.full((1, 64), 100.0), w).tolist() == [[math.inf]]


# Attention


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (3, 1)])
@pytest.mark.parametrize("length", [1, 2, 37])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_equals_torch(heads, kv_heads, length, scale):
    query, keys, values = (
        random(2, heads, 64),
        random(2, kv_heads, length, 64, seed=1),
        random(2, kv_heads, length, 64, seed=2),
    )
    got = reference.kv4_attention(query, keys, values, scale)
    doubles = (query[:, :, None].double(), keys.double(), values.double())
    exact = scaled_dot_product_attention(*doubles, scale=scale, enable_gqa=True)[:, :, 0]
    # fp32 dot products of D terms are off by D ulps of their magnitude; a score that is off by d moves each weight by a
    # factor e**(2 d) at most, so the output by 2 d max|v|, next to the roundings of the T + 2 operations that follow.
    shared = keys.repeat_interleave(heads // kv_heads, 1).abs()
    score_error = (query.abs()[:, :, None] @ shared.mT).max() * (0.125 if scale is None else scale) * 66 * SINGLE
    bound = (2.1 * score_error + (length + 4) * SINGLE) * values.abs().max()
    assert bound < 1e-3
    assert (got.double() - exact).abs().max() <= bound


def test_consecutive_query_heads_share_a_kv_head():
    query, keys, values = random(1, 6, 32), random(1, 2, 9, 32, seed=1), random(1, 2, 9, 32, seed=2)
    got = reference.kv4_attention(query, keys, values)
    for head in range(6):
        shared = slice(head // 3, head // 3 + 1)
        alone = reference.kv4_attention(query[:, head : head + 1], keys[:, shared], values[:, shared])
        torch.testing.assert_close(got[:, head : head + 1], alone, rtol=0, atol=1e-6)


def test_one_cached_token_returns_its_value():
    values = random(2, 2, 1, 32, seed=2)
    got = reference.kv4_attention(random(2, 4, 32), random(2, 2, 1, 32, seed=1), values)
    assert torch.equal(got, values[:, :, 0].repeat_interleave(2, 1))


def test_attention_reads_quantised_caches():
    query, keys, values = random(2, 4, 64), random(2, 2, 11, 64, seed=1), random(2, 2, 11, 64, seed=2)
    k, v = kv.quantize_kv4(keys), kv.quantize_kv4(values)
    got = reference.kv4_attention(query.half(), k, v)
    assert got.dtype == torch.float16
    assert torch.equal(got, reference.kv4_attention(query.half(), k.dequantize(), v.dequantize()))


def test_softmax_survives_large_scores():
    query, keys = torch.full((1, 1, 4), 100.0), torch.tensor([100.0, -100.0])[None, None, :, None].expand(1, 1, 2, 4)
    values = torch.tensor([2.0, 5.0])[None, None, :, None].expand(1, 1, 2, 4)
    assert reference.kv4_attention(query, keys, values).tolist() == [[[2.0] * 4]]


@pytest.mark.parametrize(
    ("query", "keys"),
    [((1, 4, 32), (1, 3, 5, 32)), ((1, 4, 32), (2, 2, 5, 32)), ((1, 4, 32), (1, 2, 0, 32)), ((4, 32), (1, 2, 5, 32))],
)
def test_attention_refuses_shapes_that_do_not_fit(query, keys):
    with pytest.raises(ValueError, match="query"):
        reference.kv4_attention(torch.ones(query), torch.ones(keys), torch.ones(keys))


# --- operands with groups -------------------------------------------------------------------------------------------------


def test_grouped_matmul_by_hand():
    """Two groups of two columns: each integer product is multiplied by its own pair of scales."""
    weight = grouped.quantize(torch.tensor([[7.0, -7.0, 0.5, 1.0]]), grouped.choose_symmetric(torch.ones(1, 4) * 7, 2))
    weight = dataclasses.replace(weight, codes=torch.tensor([[1, -2, 3, 4]], dtype=torch.int8))
    weight = dataclasses.replace(weight, scales=torch.tensor([[0.5, 0.25]], dtype=torch.float16))
    x = affine.Affine(
        torch.tensor([2.0], dtype=torch.float16), None, INT8, Zero.INTEGER, torch.tensor([[10, 1, -1, 5]]).char()
    )
    # (10 * 1 + 1 * -2) * 0.5 * 2 + (-1 * 3 + 5 * 4) * 0.25 * 2
    assert grouped_matmul(x, weight).tolist() == [[8 * 0.5 * 2 + 17 * 0.25 * 2]]
    assert grouped_matmul(x, weight, torch.tensor([0.5])).tolist() == [[17.0]]


@pytest.mark.parametrize("zero", Zero)
def test_one_group_is_the_per_channel_matmul(zero):
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    x = affine.quantize_per_token_s8(torch.randn(3, 64, generator=torch.Generator().manual_seed(1)))
    one = grouped.quantize(w, grouped.choose_asymmetric(w, 64, zero=zero))
    torch.testing.assert_close(
        grouped_matmul(x, one), w4a8_matmul(x, affine.quantize_per_channel_u4(w, zero)), rtol=1e-3, atol=0
    )
    progressive_weight = progressive.quantize(w, 32)
    assert torch.equal(grouped_matmul(x, progressive_weight), w4a8_matmul(x, progressive_weight))


def test_grouped_matmul_refuses_operands_that_do_not_fit():
    w = torch.randn(8, 64)
    weight = grouped.quantize(w, grouped.choose_asymmetric(w, 16))
    with pytest.raises(ValueError, match="x: last dimension 32 does not match the weight's K = 64"):
        grouped_matmul(affine.quantize_per_token_s8(torch.randn(3, 32)), weight)
    with pytest.raises(ValueError, match="bias: expected shape 8"):
        grouped_matmul(affine.quantize_per_token_s8(torch.randn(3, 64)), weight, torch.ones(3))
