"""Functions whose every rounding is laid down: close to the mathematics, independent of how sums are shared."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qoqlab import exact, reference


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def every(dtype: torch.dtype) -> torch.Tensor:
    """Every finite number of a 16-bit type."""
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    return x[x.isfinite()]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 300), parts=st.sampled_from([1, 2, 4, 8, 32]))
def test_a_fold_may_be_shared_by_any_power_of_two(n: int, parts: int) -> None:
    """Worker t folds the numbers t, t + parts, ..., then the workers' sums are folded: the same bits."""
    x = numbers(n, seed=n)
    whole = torch.nn.functional.pad(x, (0, -n % parts))
    assert torch.equal(exact.fold(exact.fold(whole.view(-1, parts).T)), exact.fold(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_exp_for_every_number(dtype: torch.dtype) -> None:
    x = every(dtype)
    x = x[x.float().abs() <= exact.EXP_LIMIT]
    want = (-x.double()).exp()
    normal = want > 2.0**-125
    error = ((exact.exp_minus(x).double() - want) / want).abs()[normal]
    assert error.max() < 2.0**-22


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_silu_for_every_number_is_off_by_less_than_rounding_twice(dtype: torch.dtype) -> None:
    x = every(dtype)
    want = x.double() * (1 / (1 + (-x.double()).exp()))
    ulp = torch.finfo(dtype).eps * torch.maximum(want.abs(), torch.full_like(want, torch.finfo(dtype).tiny))
    big = x.float() > -exact.EXP_LIMIT  # below, the result is as good as zero
    assert (((exact.silu(x).double() - want).abs() / ulp)[big] < 0.51).all()
    assert (exact.silu(x)[~big].float().abs() <= 2.0**-118).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rms_norm_is_that_of_transformers(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight = (numbers(5, 96) * 3).to(dtype), numbers(96, seed=1).to(dtype)
    module = LlamaRMSNorm(96, 1e-5).to(dtype)
    module.weight.data.copy_(weight)
    # the two may differ before the first rounding by the last bits of fp32: then by one step of the dtype after it
    torch.testing.assert_close(exact.rms_norm(x, weight, 1e-5), module(x).detach(), rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_rotate_is_that_of_transformers() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x, angle = numbers(1, 3, 7, 64).half(), numbers(1, 7, 32, seed=1)
    cos, sin = angle.cos().half(), angle.sin().half()
    wide = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    want, _ = apply_rotary_pos_emb(x, x, *wide)
    assert torch.equal(exact.rotate(x, cos[:, None], sin[:, None]), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_zero_tokens_give_zero_codes_and_a_finite_scale(dtype: torch.dtype) -> None:
    x, weight = torch.zeros(2, 64, dtype=dtype), torch.ones(64, dtype=dtype)
    for a in (
        reference.rms_norm_s8(x, weight, 1e-6),
        reference.add_rms_norm_s8(x, x, weight, 1e-6)[0],
        reference.silu_mul_s8(x),
    ):
        assert not a.codes.any() and (a.scales == 1).all()


def test_a_mean_is_not_subtracted() -> None:
    """A constant token keeps its value; where the mean is subtracted, as in QServe's kernel, it would vanish."""
    a = reference.rms_norm_s8(torch.full((1, 64), 5.0), torch.ones(64), 1e-6)
    torch.testing.assert_close(a.dequantize(), torch.ones(1, 64), rtol=1e-3, atol=0)


def test_the_residual_comes_back() -> None:
    x, residual, weight = numbers(3, 64).half(), numbers(3, 64, seed=1).half(), torch.ones(64).half()
    a, total = reference.add_rms_norm_s8(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(a.codes, reference.rms_norm_s8(total, weight, 1e-6).codes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: reference.rms_norm_s8(x, w[:32], 1e-6), "weight: expected shape 64, one gain per input, got 32"),
        (lambda x, w: reference.rms_norm_s8(x, w, 0.0), "eps: expected a positive number, got 0.0"),
        (lambda x, w: reference.rms_norm_s8(x, w * torch.nan, 1e-6), "weight: holds 64 NaN"),
        (lambda x, w: reference.rms_norm_s8(x * torch.inf, w, 1e-6), "x: holds"),
        (lambda x, w: reference.add_rms_norm_s8(x, x[:1], w, 1e-6), "residual: expected torch.float32 of shape 2x64 as x"),
        (lambda x, w: reference.silu_mul_s8(x[:, :63]), "gate_up: expected .*, got 2x63"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(numbers(2, 64), torch.ones(64))
