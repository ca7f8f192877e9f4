"""The kernels' divisions by reciprocals are IEEE divisions, for all numbers that they meet: 11 bits by 11 bits.

Powers of two change no rounding here, so mantissas are enough: a million pairs each, in fp32 as the instructions round.
"""

from __future__ import annotations

import numpy as np

ONE = np.float32(1)
MANTISSAS = (np.arange(1024, 2048) / 1024).astype(np.float32)
X, SCALE = MANTISSAS[:, None], MANTISSAS[None]
HIGH = ONE / SCALE


def fuse(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``a * b + c``, rounded once but for what fp64 (or longer) rounds beforehand."""
    return (a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)).astype(np.float32)


def test_rope_corrects_a_quotient_by_what_it_leaves() -> None:
    guess = X * HIGH
    assert (guess != X / SCALE).any(), "the correction has something to do"
    assert np.array_equal(fuse(fuse(-guess, SCALE, X), HIGH, guess), X / SCALE)


def test_activations_divide_by_a_reciprocal_in_two_parts() -> None:
    """The integers that quotients of up to 127 round to are those of the division, ties included."""
    low = fuse(-HIGH, SCALE, ONE) * HIGH
    for power in range(8):
        x = X * np.float32(2**power)
        quotient = fuse(x, HIGH, x * low)
        assert np.array_equal(np.rint(quotient), np.rint(x / SCALE))
