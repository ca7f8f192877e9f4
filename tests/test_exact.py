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


def joined(past: int, dtype: torch.dtype = torch.float32, softcap: float | None = None) -> tuple[torch.Tensor, ...]:
    """(what `reference.attend_own_s8` is given, softmax over past and own token in fp64): 3 tokens, 4 heads of 2 keys."""
    query, key, value = (numbers(3, h, 64, seed=h + past) for h in (4, 2, 2))
    keys, values = (numbers(3, 4, past, 64, seed=s) for s in (7, 8))
    query, key, value = (x.to(dtype) for x in (query, key, value))
    scores = (keys.double() @ query.double()[..., None])[..., 0] / 8
    own = (query.double() * key.double().repeat_interleave(2, 1)).sum(-1, keepdim=True) / 8
    if softcap:
        scores, own = (softcap * torch.tanh(s / softcap) for s in (scores, own))
    seen = (scores.softmax(-1)[..., None] * values.double()).sum(-2).to(dtype)
    both = torch.cat([values.double(), value.double().repeat_interleave(2, 1)[..., None, :]], -2)
    want = (torch.cat([scores, own], -1).softmax(-1)[..., None] * both).sum(-2)
    lse = scores.logsumexp(-1).float()
    return seen, lse, query, key, value, want


@pytest.mark.parametrize("softcap", [None, 1.0])
@pytest.mark.parametrize("past", [0, 1, 3, 50])
def test_a_token_that_joins_its_past_is_softmax_over_both(past: int, softcap: float | None) -> None:
    seen, lse, query, key, value, want = joined(past, softcap=softcap)
    assert past or bool((lse == -torch.inf).all())
    own = exact.dot(query, key.repeat_interleave(2, 1)) / 8
    own = own if softcap is None else exact.cap(own, softcap)
    got = exact.join(seen, lse, own, value.repeat_interleave(2, 1))
    torch.testing.assert_close(got, want.float(), rtol=2e-5, atol=2e-5)
    a = reference.attend_own_s8(seen, lse, query, key, value, softcap=softcap)
    assert (a.dequantize(torch.float32) - want.flatten(1)).abs().max() <= 0.51 * a.scales.float().max()


def test_a_token_without_a_past_or_far_above_it_is_its_value() -> None:
    seen, lse, _, _, value, _ = joined(3, torch.float16)
    score, v = torch.zeros(3, 4), value.repeat_interleave(2, 1)
    for nothing in (torch.full_like(lse, -torch.inf), torch.full_like(lse, -1000.0)):
        assert torch.equal(exact.join(seen * 0, nothing, score, v), v)
    assert torch.equal(exact.join(seen, torch.full_like(lse, 1000.0), score, v), seen)


def test_a_dot_product_is_folded_and_a_cap_is_odd_and_bounded() -> None:
    x, y = numbers(5, 128), numbers(5, 128, seed=1)
    torch.testing.assert_close(exact.dot(x, y).double(), (x.double() * y.double()).sum(-1), rtol=1e-5, atol=1e-5)
    scores = torch.tensor([-1e30, -100.0, -1.0, 0.0, 1.0, 100.0, 1e30])
    got = exact.cap(scores, 30.0)
    torch.testing.assert_close(got, 30 * torch.tanh(scores / 30), rtol=1e-5, atol=1e-5)


def test_operands_that_do_not_join_are_named() -> None:
    seen, lse, query, key, value, _ = joined(3, torch.float16)
    for changed, message in (
        ({"seen": seen[0]}, "seen: expected torch.float16 of shape"),
        ({"query": query.float()}, "query: expected torch.float16 of shape"),
        ({"lse": lse.half()}, "query, lse: expected 3x4x64 as seen and fp32 of shape 3x4"),
        ({"key": key[:, :1]}, "key, value: expected"),
        ({"value": value * torch.nan}, "value: holds"),
    ):
        operands = {"seen": seen, "lse": lse, "query": query, "key": key, "value": value}
        with pytest.raises(ValueError, match=message):
            reference.attend_own_s8(**(operands | changed))
