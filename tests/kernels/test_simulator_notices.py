"""The simulator's tests can fail: one wrong bit in an operand or one wrong instruction in a kernel is noticed."""

from __future__ import annotations

import re

import pytest

from .simulator import Simulator


@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v4", "v5"])
def test_right_operands_give_right_results(simulator: Simulator, version: str) -> None:
    assert simulator("spoilt_case", version=version, what="nothing") == {"wrong": 0}


@pytest.mark.parametrize(
    ("version", "what"),
    [
        ("v1", "code"),
        ("v2", "activation"),
        ("v3", "group scale"),
        ("v4", "code"),
        ("v4", "token sum"),
        ("v5", "code"),
        ("v5", "group scale"),
        ("v5", "activation"),
        ("v5", "token sum"),
        ("v5", "output zero"),
    ],
)
def test_one_wrong_bit_gives_wrong_results(simulator: Simulator, version: str, what: str) -> None:
    assert simulator("spoilt_case", version=version, what=what)["wrong"] > 0


@pytest.mark.parametrize(
    ("version", "what", "message"),
    [
        ("v5", "announces too few bytes", "mbarrier"),
        ("v5", "announces too many bytes", "never completed"),
        ("v5", "never initialises", "used before it was initialised"),
        ("v5", "never releases", "never completed"),
        ("v5", "copies a wrong size", "a positive multiple of 16"),
        ("v5", "copies from beyond", "outside every array"),
        ("v5", "copies to beyond", "shared memory: .* bytes at"),
        ("v5", "stores beyond", "outside every array"),
        ("v4", "stores beyond", "outside every array"),
        ("v4", "misaligned store", "not a multiple of 16"),
    ],
)
def test_what_hardware_leaves_undefined_is_an_error(simulator: Simulator, version: str, what: str, message: str) -> None:
    answer = simulator.answer("mutant_case", version=version, what=what)
    assert "error" in answer
    assert re.search(message, answer["message"]), answer


@pytest.mark.parametrize(
    ("version", "what"),
    [
        ("v5", "announces no bytes"),
        ("v5", "never waits"),
        ("v5", "swaps scale and offset"),
        ("v5", "tells nobody"),
        ("v4", "tells nobody"),
        ("v3", "swaps scale and offset"),
    ],
)
def test_wrong_kernels_give_wrong_results_or_none(simulator: Simulator, version: str, what: str) -> None:
    answer = simulator.answer("mutant_case", version=version, what=what)
    assert "error" in answer or answer["result"]["wrong"] > 0
