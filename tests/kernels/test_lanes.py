"""The lane map against the packed bytes, the emulated tensor core's operand, and the arithmetic of four codes in a word."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import qoqlab_kernels as qk
import torch
from qoqlab_kernels import cases, emulation, lanes
from qoqlab_kernels.layout import CODE_BYTES, pack_codes, unpack_codes

VERSIONS = ["v1", "v2", "v3", "v4", "v5"]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_weight_is_held_once(version: str) -> None:
    table = qk.lane_map(version)
    assert list(table.columns) == lanes.COLUMNS
    assert len(table) == 64 * 128
    assert not table.duplicated(["n", "k"]).any()
    assert not table.duplicated(["address", "shift"]).any()
    assert not table.duplicated(["block", "warp", "lane", "register", "byte"]).any()
    assert set(table.n) == set(range(64)) and set(table.k) == set(range(128))
    assert set(table["shift"]) == {0, 4} and set(table.address) == set(range(4096))


@pytest.mark.parametrize("version", VERSIONS)
def test_unpacking_by_the_map_is_unpack(version: str) -> None:
    """Of a packed weight's own bytes, not of codes made for the purpose."""
    w = cases.weight(128, 256, "g64")
    packed = qk.pack_weight(w)
    table = qk.lane_map(version)
    n, k, address, shift = (table[name].to_numpy() for name in ("n", "k", "address", "shift"))
    for block, unit in itertools.product((0, 1), (0, 1)):
        found = np.zeros((64, 128), np.uint8)
        found[n, k] = packed.units[block, unit].numpy()[address] >> shift & 15
        assert np.array_equal(found, w.codes[64 * block : 64 * block + 64, 128 * unit : 128 * unit + 128].numpy())
    assert torch.equal(unpack_codes(packed.units[..., :CODE_BYTES]), qk.unpack(packed).codes)


def registers(unit: np.ndarray) -> np.ndarray:
    """[thread, register] of a unit's codes: what the kernels' unpacking does with two 16-byte loads a thread."""
    words = unit.view("<u4").reshape(2, 128, 4).transpose(1, 0, 2).reshape(128, 8)
    return np.stack([words & 0x0F0F0F0F, words >> 4 & 0x0F0F0F0F], -1).reshape(128, 16)


def test_registers_hold_what_the_map_says() -> None:
    codes = cases.weight(64, 128).codes
    held = registers(pack_codes(codes)[0, 0].numpy()).astype("<u4").view(np.uint8).reshape(4, 32, 16, 4)
    table = qk.lane_map("v5")
    values = held[table.warp, table.lane, table.register, table.byte]
    assert np.array_equal(values, codes.numpy()[table.n, table.k])


def test_registers_are_the_tensor_cores_operand() -> None:
    """The emulated instruction reads them as the same 16 outputs x 32 inputs for every step."""
    codes = cases.weight(64, 128).codes
    held = registers(pack_codes(codes)[0, 0].numpy())
    for warp, step in itertools.product(range(4), range(4)):
        operand = emulation._weights([tuple(held[32 * warp + lane, 4 * step : 4 * step + 4]) for lane in range(32)])
        assert np.array_equal(operand, codes.numpy()[16 * warp : 16 * warp + 16, 32 * step : 32 * step + 32])


def test_a_version_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="version: 'v6' is not one of v1, v2, v3, v4, v5"):
        qk.lane_map("v6")


# -- four codes in a word -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 3, 15, 16])
@pytest.mark.parametrize("zero", [0, 1, 7, 8])
def test_multiplication_before_subtraction_is_right(scale: int, zero: int) -> None:
    """Every code in every byte, beside neighbours of 0 and 15, as far as the results are INT8 numbers."""
    for codes in itertools.product([0, 1, 7, 8, 14, 15], repeat=4):
        want = [(code - zero) * scale for code in codes]
        if min(want) < -128 or max(want) > 127:
            continue
        word = lanes.word_of(list(codes))
        assert lanes.signed_bytes(lanes.multiply_then_subtract(word, scale, zero)) == want
        assert lanes.multiply_then_add(word, scale, zero) ^ 0x80808080 == lanes.multiply_then_subtract(word, scale, zero)


def test_subtraction_before_multiplication_is_wrong_above_negative_bytes() -> None:
    """A byte is wrong if and only if the one below it is negative and the carry is not a multiple of 256."""
    wrong = total = 0
    for codes in itertools.product(range(0, 16, 3), repeat=4):
        scale, zero = 5, 6
        want = [(code - zero) * scale for code in codes]
        got = lanes.signed_bytes(lanes.subtract_then_multiply(lanes.word_of(list(codes)), scale, zero))
        assert got[0] == want[0]
        for i in (1, 2, 3):
            assert (got[i] == want[i]) == (codes[i - 1] >= zero)
        wrong += got != want
        total += 1
    assert 0 < wrong < total


def test_words_of_something_else_are_refused() -> None:
    for codes in ([1, 2, 3], [0, 0, 0, 16], [-1, 0, 0, 0]):
        with pytest.raises(ValueError, match=r"codes: expected four numbers in 0\.\.15"):
            lanes.word_of(codes)
