"""Exact equivalences: in fp64 the network's function stays, before any quantiser is applied."""

import warnings

import pytest
import torch

from qoqlab import hadamard, transforms

#: fp64 sums of at most 64 terms of order 10.
EXACT = {"rtol": 0, "atol": 1e-12}


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def positive(*shape, seed=0):
    return random(*shape, seed=seed).exp()


def linear(x, weight, bias=0):
    return x @ weight.T + bias


# Rotation


@pytest.mark.parametrize("width", [16, 24])
def test_rotation_of_the_residual_stream_cancels(width):
    x = random(5, width)
    write, bias, read = random(width, 8, seed=1), random(width, seed=2), random(6, width, seed=3)
    plain = linear(linear(x[:, :8], write, bias), read)
    rotated = linear(
        linear(x[:, :8], transforms.rotate_outputs(write), transforms.rotate_outputs(bias)), (transforms.rotate_inputs(read))
    )
    torch.testing.assert_close(rotated, plain, **EXACT)


@pytest.mark.parametrize("width", [16, 24])
def test_rotations_are_products_with_the_hadamard_matrix(width):
    # 24 = 12 * 2 is not symmetric, so R and its transpose differ
    r = hadamard.hadamard(width)
    weight, bias = random(width, width), random(width, seed=1)
    torch.testing.assert_close(transforms.rotate_inputs(weight), weight @ r, **EXACT)
    torch.testing.assert_close(transforms.rotate_outputs(weight), r.T @ weight, **EXACT)
    torch.testing.assert_close(transforms.rotate_outputs(bias), r.T @ bias, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", [16, 24])
def test_rotating_in_parts_gives_the_same_bits(width, dtype, monkeypatch):
    weight = random(7, width).to(dtype)
    whole = transforms.rotate_inputs(weight), transforms.rotate_outputs(weight.T)
    scaled = transforms.scale_inputs(weight, positive(width))
    for chunk in (1, 2 * width, 3 * width):
        monkeypatch.setattr(transforms, "CHUNK", chunk)
        assert torch.equal(transforms.rotate_inputs(weight), whole[0])
        assert torch.equal(transforms.rotate_outputs(weight.T), whole[1])
        assert torch.equal(transforms.scale_inputs(weight, positive(width)), scaled)
    assert torch.equal(whole[0], hadamard.transform(weight.double()).to(dtype))


def test_rotation_keeps_root_mean_square_norms():
    x = random(5, 24)
    torch.testing.assert_close(hadamard.transform(x).norm(dim=-1), x.norm(dim=-1), **EXACT)


def test_rotating_a_bias_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert transforms.rotate_outputs(torch.ones(4)).tolist() == [2, 0, 0, 0]


def test_rotation_spreads_an_outlier():
    x = torch.zeros(1, 64)
    x[0, 5] = 64.0
    assert hadamard.transform(x).abs().tolist() == [[8.0] * 64]


# Scaling


def test_scaling_outputs_and_inputs_cancels():
    x, scale = random(5, 8), positive(16)
    write, bias, read = random(16, 8, seed=1), random(16, seed=2), random(6, 16, seed=3)
    smoothed = linear(x, transforms.scale_outputs(write, 1 / scale), transforms.scale_outputs(bias, 1 / scale))
    torch.testing.assert_close(
        linear(smoothed, transforms.scale_inputs(read, scale)), linear(linear(x, write, bias), read), **EXACT
    )


def test_a_gated_block_absorbs_the_scale_in_its_up_projection():
    x, scale = random(5, 8), positive(16)
    gate, up, down = random(16, 8, seed=1), random(16, 8, seed=2), random(8, 16, seed=3)
    silu = torch.nn.functional.silu(linear(x, gate))
    plain = linear(silu * linear(x, up), down)
    smoothed = linear(silu * linear(x, transforms.scale_outputs(up, 1 / scale)), transforms.scale_inputs(down, scale))
    torch.testing.assert_close(smoothed, plain, **EXACT)


def test_a_norms_gain_folds_into_its_consumers():
    x, gain, weight = random(5, 8), positive(8), random(6, 8, seed=1)
    torch.testing.assert_close(linear(x, transforms.scale_inputs(weight, gain)), linear(x * gain, weight), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_results_keep_dtype_and_arguments_keep_values(dtype):
    weight, scale = random(16, 16).to(dtype), positive(16).to(dtype)
    before = weight.clone(), scale.clone()
    for result in (
        transforms.rotate_inputs(weight),
        transforms.rotate_outputs(weight),
        transforms.rotate_outputs(weight[0]),
        transforms.scale_inputs(weight, scale),
        transforms.scale_outputs(weight, scale),
    ):
        assert result.dtype == dtype and result.is_contiguous()
    assert torch.equal(weight, before[0]) and torch.equal(scale, before[1])
    exact = weight.double() * scale.double()
    assert torch.equal(transforms.scale_inputs(weight, scale), exact.to(dtype))  # rounded once


def test_smoothing_scale_formula():
    activation, weight = torch.tensor([4.0, 9.0, 2.0]), torch.tensor([1.0, 4.0, 8.0])
    got = transforms.smoothing_scale(activation, weight, 0.5)
    torch.testing.assert_close(got, torch.tensor([2.0, 1.5, 0.5]), rtol=2**-20, atol=0)
    # alpha = 0: the weights alone decide, s = 1 / max|W|
    assert transforms.smoothing_scale(activation, weight, 0.0).tolist() == [1.0, 0.25, 0.125]
    assert transforms.smoothing_scale(activation, weight, 1.0, beta=0.0).tolist() == [4.0, 9.0, 2.0]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("beta", [None, 0.0, 0.7])
def test_channels_without_a_usable_scale_get_one(alpha, beta):
    activation = torch.tensor([0.0, 3.0, 0.0, 1e38, float("inf"), float("nan"), 1.0])
    weight = torch.tensor([2.0, 0.0, 0.0, 1e-38, 1.0, 1.0, float("nan")])
    scale = transforms.smoothing_scale(activation, weight, alpha, beta)
    assert (scale[:3] == 1).all()
    assert scale.isfinite().all() and (scale > 0).all()


# SmoothAttention


def rope(x, positions, base=10000.0):
    """Rotary embedding, written out: pair (i, i + D / 2) turns by position * base ** (-2 i / D)."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = positions * base ** (-2 * i / x.shape[-1])
        out[:, i] = x[:, i] * angle.cos() - x[:, i + half] * angle.sin()
        out[:, i + half] = x[:, i + half] * angle.cos() + x[:, i] * angle.sin()
    return out


def attention_setting():
    positions, x = torch.arange(7, dtype=torch.float64), random(7, 16)
    wq, wk, bq, bk = random(8, 16, seed=1), random(8, 16, seed=2), random(8, seed=3), random(8, seed=4)
    wk[0] *= 20  # an outlier channel
    keys = rope(linear(x, wk, bk), positions)
    return positions, x, (wq, bq), (wk, bk), keys


def test_attention_scale_commutes_with_rope():
    positions, x, q, k, keys = attention_setting()
    lam = transforms.attention_scale(keys.abs().amax(0), alpha=0.5).double()
    assert lam[0] > 1.5 * lam[1]
    # after RoPE, as calibrated ...
    plain = rope(linear(x, *q), positions) @ keys.T
    torch.testing.assert_close((rope(linear(x, *q), positions) * lam) @ (keys / lam).T, plain, rtol=1e-12, atol=1e-12)
    # ... and folded into weights and biases, before RoPE
    scaled_q = [transforms.scale_outputs(t, lam) for t in q]
    scaled_k = [transforms.scale_outputs(t, 1 / lam) for t in k]
    folded = rope(linear(x, *scaled_q), positions) @ rope(linear(x, *scaled_k), positions).T
    torch.testing.assert_close(folded, plain, rtol=1e-12, atol=1e-12)


def test_a_scale_that_splits_rope_pairs_does_not_commute():
    positions, x, q, k, keys = attention_setting()
    lam = torch.ones(8, dtype=torch.float64)
    lam[0] = 4  # half of the pair (0, 4), which turns by one radian per position
    folded = rope(linear(x, *(transforms.scale_outputs(t, lam) for t in q)), positions)
    folded = folded @ rope(linear(x, *(transforms.scale_outputs(t, 1 / lam) for t in k)), positions).T
    plain = rope(linear(x, *q), positions) @ keys.T
    assert (folded - plain).abs().max() > 0.1 * plain.abs().max()


def test_forgetting_the_biases_breaks_smooth_attention():
    positions, x, (wq, bq), (wk, bk), keys = attention_setting()
    lam = transforms.attention_scale(keys.abs().amax(0), alpha=0.5).double()
    q = rope(linear(x, transforms.scale_outputs(wq, lam), bq), positions)
    k = rope(linear(x, transforms.scale_outputs(wk, 1 / lam), bk), positions)
    plain = rope(linear(x, wq, bq), positions) @ keys.T
    assert (q @ k.T - plain).abs().max() > 0.1 * plain.abs().max()


def test_attention_scale_pairs_halves_and_keeps_heads_apart():
    key_max = torch.tensor([[1.0, 4.0, 16.0, 9.0], [0.0, 25.0, 0.0, 1.0]])
    assert transforms.attention_scale(key_max, 0.5).tolist() == [[4.0, 3.0, 4.0, 3.0], [1.0, 5.0, 1.0, 5.0]]
    query_max = torch.tensor([[4.0, 1.0, 1.0, 9.0], [1.0, 1.0, 1.0, 1.0]])
    with_queries = transforms.attention_scale(key_max, 0.5, query_max, beta=0.5)
    assert with_queries.tolist() == [[2.0, 1.0, 2.0, 1.0], [1.0, 5.0, 1.0, 5.0]]


# Reordering


def test_reordering_channels_cancels():
    x, up, down = random(5, 8), random(16, 8, seed=1), random(6, 16, seed=2)
    order = transforms.salience_order(linear(x, up).abs().amax(0))
    torch.testing.assert_close(linear(linear(x, up[order]), down[:, order]), linear(linear(x, up), down), **EXACT)


def test_salience_order_ascends_and_keeps_ties_in_place():
    values = torch.tensor([2.0, 1.0, 2.0, 0.0, 1.0, 2.0])
    assert transforms.salience_order(values).tolist() == [3, 1, 4, 0, 2, 5]
    assert transforms.salience_order(torch.ones(1000)).tolist() == list(range(1000))
    assert transforms.salience_order(torch.stack([values, -values])).tolist() == [[3, 1, 4, 0, 2, 5], [0, 2, 5, 1, 4, 3]]
