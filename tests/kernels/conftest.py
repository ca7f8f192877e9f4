"""Fixtures of the kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from .simulator import Simulator

if not hasattr(np, "row_stack"):  # NumPy 2.5 dropped the name, numba-cuda 0.30 still looks it up when it is imported
    np.row_stack = np.vstack  # noqa: NPY201


@pytest.fixture(scope="session")
def simulator() -> Iterator[Simulator]:
    """The CUDA simulator, started once."""
    started = Simulator()
    yield started
    started.close()
