"""Functions of which every rounding is laid down: what they compute, and how far from the real numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from qoqlab import affine, exact, reference

HALVES = [torch.float16, torch.bfloat16]


def all_numbers(dtype: torch.dtype) -> torch.Tensor:
    """Every finite number of a 16-bit type."""
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    return x[x.isfinite()]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=70))
def test_fold_adds_everything_once(numbers: list[int]) -> None:
    assert exact.fold(torch.tensor(numbers, dtype=torch.float32)).item() == sum(numbers)


def test_fold_adds_halves_in_order() -> None:
    """fp32 forgets a 1 beside 2**24, so the result shows the order."""
    big = 2.0**24
    assert exact.fold(torch.tensor([big, 1.0, -big, 1.0])).item() == 2.0  # (big - big) + (1 + 1)
    assert exact.fold(torch.tensor([big, -big, 1.0, 1.0])).item() == 1.0  # (big + 1) + (-big + 1): one 1 is lost
    assert exact.fold(torch.tensor([1.0, big, 1.0])).item() == big + 2  # (1 + 1) + (big + 0)


def test_sum_of_squares_by_pieces_of_eight() -> None:
    x = normal(3, 72)
    squares = x * x
    pieces = torch.stack([exact.fold(squares[:, 8 * i : 8 * i + 8]) for i in range(9)], -1)
    assert torch.equal(exact.sum_of_squares(x), exact.fold(pieces))
    torch.testing.assert_close(exact.sum_of_squares(x), x.double().square().sum(-1).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", HALVES)
def test_exponential_of_every_16_bit_number(dtype: torch.dtype) -> None:
    x = all_numbers(dtype)
    x = x[x.abs() <= exact.EXP_LIMIT].double()
    error = (exact.exp_minus(x.to(dtype)).double() / torch.exp(-x) - 1).abs()
    assert error.max() < 2**-22.4  # as documented


def test_exponential_of_fp32_numbers() -> None:
    x = torch.linspace(-exact.EXP_LIMIT, exact.EXP_LIMIT, 100_003)
    assert (exact.exp_minus(x).double() / torch.exp(-x.double()) - 1).abs().max() < 2**-18


@pytest.mark.parametrize("dtype", HALVES)
def test_silu_of_every_16_bit_number(dtype: torch.dtype) -> None:
    """The nearest number of the type, but for at most a few cases next to a tie; nothing overflows."""
    x = all_numbers(dtype)
    got, real = exact.silu(x), x.double() * torch.sigmoid(x.double())
    inside = x >= -exact.EXP_LIMIT
    assert int((got != real.to(dtype))[inside].sum()) <= 20
    assert bool((got[~inside].abs() <= 87 * 2.0**-125).all()) and got.isfinite().all()
    torch.testing.assert_close(got[inside].double(), real[inside], rtol=2**-10 if dtype == HALVES[0] else 2**-7, atol=2**-24)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_norm_is_the_module_but_for_the_last_bits_of_fp32(dtype: torch.dtype) -> None:
    module = LlamaRMSNorm(160, 1e-5).to(dtype)
    module.weight.data = (1 + normal(160) / 4).to(dtype)
    x = (normal(64, 160, seed=1) * torch.logspace(-3, 2, 64)[:, None]).to(dtype)
    got, want = exact.rms_norm(x, module.weight.data, 1e-5), module(x).detach()
    assert got.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    else:  # the roundings to 16 bits fall alike wherever fp32 is not next to a tie
        assert (got != want).float().mean() < 1e-3
        torch.testing.assert_close(got, want)


def test_norm_does_not_subtract_the_mean() -> None:
    """QServe's kernel does: constant inputs would give 0 there."""
    y = exact.rms_norm(torch.full((1, 64), 3.0), torch.ones(64), 1e-12)
    torch.testing.assert_close(y, torch.ones(1, 64))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_rotation_is_that_of_transformers(dtype: torch.dtype) -> None:
    x, angle = normal(2, 4, 5, 32).to(dtype), normal(1, 5, 16, seed=1)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    want, _ = apply_rotary_pos_emb(x, x, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))
    assert torch.equal(exact.rotate(x, cos[:, None], sin[:, None]), want)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_references_quantise_what_the_functions_give(dtype: torch.dtype) -> None:
    x, residual, weight = normal(5, 64).to(dtype), normal(5, 64, seed=1).to(dtype), normal(64, seed=2).to(dtype)
    assert same(reference.rms_norm_s8(x, weight, 1e-6), affine.quantize_per_token_s8(exact.rms_norm(x, weight, 1e-6)))
    made, total = reference.add_rms_norm_s8(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual) and total.dtype == dtype
    assert same(made, reference.rms_norm_s8(total, weight, 1e-6))
    gate_up = torch.cat([x, residual], -1)
    assert same(reference.silu_mul_s8(gate_up), affine.quantize_per_token_s8(exact.silu_mul(gate_up)))
    torch.testing.assert_close(exact.silu_mul(gate_up), torch.nn.functional.silu(x) * residual)


def same(a: affine.Affine, b: affine.Affine) -> bool:
    return torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales)


def test_a_token_of_zeros_has_zero_codes_and_a_finite_scale() -> None:
    zeros = torch.zeros(2, 64)
    made, _ = reference.add_rms_norm_s8(zeros, zeros, torch.ones(64), 1e-6)
    for a in (reference.rms_norm_s8(zeros, torch.ones(64), 1e-6), made, reference.silu_mul_s8(zeros)):
        assert not a.codes.any() and bool((a.scales == 1).all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: reference.rms_norm_s8(x.long(), w, 1e-5), "x: expected a floating-point tensor"),
        (lambda x, w: reference.rms_norm_s8(x / 0, w, 1e-5), "x: holds"),
        (lambda x, w: reference.rms_norm_s8(x, w[:3], 1e-5), "weight: expected shape 64, one gain per input, got 3"),
        (lambda x, w: reference.rms_norm_s8(x, w, 0.0), "eps: expected a positive number, got 0.0"),
        (lambda x, w: reference.add_rms_norm_s8(x, x[:1], w, 1e-5), "residual: expected torch.float32 of shape 2x64 as x"),
        (lambda x, w: reference.add_rms_norm_s8(x, x.half(), w, 1e-5), "residual: expected torch.float32"),
        (lambda x, w: reference.silu_mul_s8(x[:, :3]), r"gate_up: expected \[..., 2 I\], gate and up side by side, got 2x3"),
    ],
)
def test_bad_operands_are_named(call, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(torch.ones(2, 64), torch.ones(64))
