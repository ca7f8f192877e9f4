"""Hadamard matrices: entries, orthogonality, sizes that models use, sizes that do not exist here."""

import pytest
import torch

from qoqlab import hadamard

#: Powers of two, every base that models need, and bases doubled.
SIZES = [1, 2, 4, 12, 16, 20, 24, 28, 36, 40, 44, 52, 60, 64, 76, 92, 108, 140, 148, 172, 344]
#: Hidden sizes of SmolLM, Qwen2.5, Llama-3.2 and others, with the size of the constructed factor.
MODELS = {576: 36, 896: 28, 960: 60, 1536: 12, 2048: 1, 3584: 28}


@pytest.mark.parametrize("n", SIZES)
def test_entries_are_signs_and_rows_are_orthogonal(n):
    h = hadamard.hadamard(n) * n**0.5
    signs = h.round()
    assert h.dtype == torch.float64 and h.shape == (n, n)
    assert ((h - signs).abs() < 1e-12).all() and (signs.abs() == 1).all()
    assert torch.equal(signs @ signs.T, n * torch.eye(n, dtype=torch.float64))  # exact: sums of +-1
    assert torch.equal(signs.T @ signs, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize(("n", "base"), MODELS.items())
def test_model_sizes(n, base):
    assert hadamard.base_size(n) == base
    x = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    h = hadamard.hadamard(n)
    y = hadamard.transform(x)
    # sums of n terms in fp64: n * 2**-53 times their magnitude, here below 1e-11
    torch.testing.assert_close(y, x @ h, rtol=0, atol=1e-11)
    torch.testing.assert_close(y @ h.T, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-13, atol=0)


@pytest.mark.parametrize("n", [4096, 5120, 6656, 7168, 8192, 11008, 14336, 53248])
def test_sizes_of_large_models_are_covered(n):
    base = hadamard.base_size(n)
    assert n % base == 0 and (n // base).bit_count() == 1


def test_powers_of_two_are_sylvesters():
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    assert torch.equal((hadamard.hadamard(8) * 8**0.5).round(), torch.kron(torch.kron(two, two), two))


def test_other_sizes_are_a_base_times_sylvesters():
    doubled = torch.kron(hadamard.hadamard(12), hadamard.hadamard(4))
    torch.testing.assert_close(hadamard.hadamard(48), doubled, rtol=0, atol=1e-15)


@pytest.mark.parametrize("n", [8, 12, 24, 92])
def test_transform_equals_multiplication_for_any_shape_and_dtype(n):
    x = torch.randn(3, 2, n, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ hadamard.hadamard(n)
    for dtype, ulp in ((torch.float64, 2.0**-53), (torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-9)):
        y = hadamard.transform(x.to(dtype))
        assert y.dtype == dtype and y.shape == x.shape
        # rounding the input, at most n additions and the division: n + 2 roundings of sums below sum|x| / sqrt(n)
        bound = (n + 2) * ulp * x.abs().sum(-1, keepdim=True) / n**0.5
        assert ((y.double() - exact).abs() <= bound).all()


def test_transforming_with_a_symmetric_matrix_twice_gives_the_input():
    x = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(hadamard.transform(hadamard.transform(x)), x, rtol=0, atol=1e-14)


def test_matrices_are_deterministic_and_arguments_stay():
    assert torch.equal(hadamard.hadamard(28), hadamard.hadamard(28))
    x = torch.ones(28)
    hadamard.transform(x)
    assert x.tolist() == [1.0] * 28


@pytest.mark.parametrize("n", [3, 6, 116, 0, -4, 2.0])
def test_impossible_sizes_are_refused(n):
    with pytest.raises(ValueError, match="n: "):
        hadamard.base_size(n)
    if isinstance(n, int) and n > 0:
        with pytest.raises(ValueError, match=f"order {n}"):
            hadamard.hadamard(n)
