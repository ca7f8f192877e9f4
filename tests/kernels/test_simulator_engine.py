"""An engine on simulated kernels, from embedding to logits."""

from __future__ import annotations

import pytest

from .simulator import Simulator


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_an_engine_on_the_kernels(simulator: Simulator, family: str) -> None:
    """All that differs is attention, within 1e-3 of its reference; one INT8 code may fall to the neighbour for it."""
    found = simulator("engine_case", family=family)
    assert found["prefill"] <= 1e-5 and found["cache"]
    assert found["decode"] <= 0.02
