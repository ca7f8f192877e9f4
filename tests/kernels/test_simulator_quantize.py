"""The activations' kernel in the CUDA simulator: codes, scales, sums and order, bit for bit."""

from __future__ import annotations

import pytest

from .simulator import Simulator

GOOD = {"tiles": True, "tokens": True, "codes": True, "scales": True, "sums": True}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_every_dtype(simulator: Simulator, dtype: str) -> None:
    assert simulator("quantize_case", m=3, k=160, dtype=dtype) == GOOD


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
