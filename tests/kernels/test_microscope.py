"""Counting reads in the simulator: numbers derived by hand, results equal to the reference, bad input named."""

from __future__ import annotations

import pytest
from qoqlab_kernels import microscope


def test_counts_are_those_of_the_source():
    """8 tokens, 64 outputs, 128 inputs in one group: a unit of 4096 bytes of codes and 128 of scales and offsets."""
    table = microscope.count(8, 64, 128).set_index("version")
    assert list(table.index) == list(microscope.VERSIONS) and table["equal"].all()
    v1, v2, v3, v4, v5 = (table.loc[version] for version in microscope.VERSIONS)
    # a code, a scale, an offset for every product; an activation
    assert (v1["weight_reads"], v1["activation_reads"]) == (8 * 64 * 128 * 3, 8 * 64 * 128)
    # each of 4 blocks decodes its 16 outputs once for all tokens; 8 tokens are read in each of them
    assert (v2["weight_bytes"], v2["activation_bytes"]) == (64 * 128 * 3, 4 * 8 * 128)
    # 8 blocks of 128 threads: two loads of 16 bytes and a word of scales each; 8 words of activations
    assert (v3["weight_reads"], v3["weight_bytes"]) == (8 * 128 * 3, 8 * 128 * (2 * 16 + 4))
    assert v3["activation_bytes"] == 8 * 128 * 8 * 4
    for version in (v4, v5):
        assert (version["weight_bytes"], version["activation_bytes"]) == (4096 + 128, 8 * 128), "every byte once"
    assert (v4["weight_reads"], v5["weight_reads"]) == ((4096 + 128) // 16, 1)


def test_groups_of_32_and_tails_are_counted_too():
    table = microscope.count(3, 32, 32, ("v1", "v3"))
    assert table["equal"].all() and (table["weight_bytes"] > 0).all()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"versions": ("v9",)}, "versions: 'v9' is not one of v1, v2"),
        ({"n": 48}, "m, n, k: n and k are multiples of 32"),
        ({"m": 0}, "m, n, k"),
        ({"m": 64, "n": 4096, "k": 4096}, "at most 131072"),
    ],
)
def test_bad_input_is_named(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        microscope.count(**arguments)


def test_a_failing_simulator_is_reported(monkeypatch):
    monkeypatch.setattr(microscope.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="the simulator ended with 1"):
        microscope.count(1, 32, 32, ("v1",))
