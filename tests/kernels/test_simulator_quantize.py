"""The activations' kernel in the CUDA simulator: codes, scales, sums and order, bit for bit."""

from __future__ import annotations

import pytest

from .simulator import Simulator

GOOD = {"tiles": True, "tokens": True, "codes": True, "scales": True, "sums": True}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_every_dtype(simulator: Simulator, dtype: str) -> None:
    assert simulator("quantize_case", m=3, k=160, dtype=dtype) == GOOD


@pytest.mark.parametrize(("dtype", "m", "k"), [("float16", 3, 160), ("bfloat16", 9, 32)])
def test_slices_of_tokens(simulator: Simulator, dtype: str, m: int, k: int) -> None:
    same = simulator("sliced_case", m=m, k=k, dtype=dtype)
    assert same == {"values": True, "largest": True, "tiles": True, "tokens": True}


def test_bad_largest_numbers_are_named(simulator: Simulator) -> None:
    assert simulator("sliced_errors") == {
        "a list": ["TypeError", "largest: expected a torch.Tensor, got list"],
        "fp16": [
            "ValueError",
            "largest: expected fp32 [3] on cpu, one number per token, got torch.float16 of shape 3 on cpu",
        ],
        "too few": [
            "ValueError",
            "largest: expected fp32 [3] on cpu, one number per token, got torch.float32 of shape 2 on cpu",
        ],
        "of fp32 tokens": [
            "ValueError",
            "largest: only fp16 and bf16 tokens are quantised by a given number; x is torch.float32",
        ],
    }


def test_a_ninth_token(simulator: Simulator) -> None:
    assert simulator("quantize_case", m=9, k=32, dtype="int8") == GOOD


def test_more_inputs_than_threads_take_at_once(simulator: Simulator) -> None:
    assert simulator("quantize_case", m=2, k=4160, dtype="float16") == GOOD


@pytest.mark.parametrize(
    ("dtype", "how"),
    [("int8", "transposed"), ("float16", "misaligned"), ("int8", "strided")],
)
def test_where_the_input_lies_does_not_matter(simulator: Simulator, dtype: str, how: str) -> None:
    assert simulator("quantize_case", m=2, k=64, dtype=dtype, how=how) == GOOD
