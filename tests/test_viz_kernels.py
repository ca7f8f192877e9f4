"""Pictures of kernels: bits are those of the number, cells those of the lane."""

from __future__ import annotations

import re

import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from qoqlab_kernels import lane_map

from qoqlab import viz, viz_kernels

TILE = lane_map("v5").query("warp == 0 and n < 16 and k < 32")


def test_bits_read_from_the_highest_to_the_lowest():
    figure = viz_kernels.bit_rows({"a": 0x80000001, "b": 0xFF}, "title", notes=("one", "two"))
    assert isinstance(figure, go.Figure) and len(figure.data) == 1 and figure.layout.title.text == "title"
    text = re.sub("</?b>", "", "".join(bit for row in figure.data[0].text for bit in row))
    assert text == f"{0x80000001:032b}{0xFF:032b}" and list(figure.data[0].x[:3]) == [31, 30, 29]
    assert [note.text for note in figure.layout.annotations] == ["one", "two"]
    assert figure.layout.template.layout.colorway == viz.PALETTE


@pytest.mark.parametrize("word", [-1, 1 << 32])
def test_what_is_no_word_is_named(word):
    with pytest.raises(ValueError, match=r"words: a is .*, which is no 32-bit word"):
        viz_kernels.bit_rows({"a": word}, "title")


def test_fields_share_a_colour():
    (zeros, ones) = viz_kernels.bit_rows({"a": 0, "b": 0xFFFFFFFF}, "title", width=4).data[0].z
    assert (
        len(set(zeros[:4])) == 1
        and zeros[3] != zeros[4]
        and all(one == zero + 1 for zero, one in zip(zeros, ones, strict=True))
    )


def test_cells_are_those_of_the_lane():
    figure = viz_kernels.lane_cells(TILE, 5, "title")
    heat, marks = figure.data
    assert heat.z.shape == (16, 32) and {int(heat.z[n, k]) for n, k in zip(marks.y, marks.x, strict=True)} == {5}
    assert sorted(set(marks.text)) == ["r0", "r1", "r2", "r3"] and len(marks.x) == 16
    assert len(viz_kernels.lane_cells(TILE, 99, "nobody").data) == 2
    whole = TILE.assign(lane=5)
    assert "r" not in "".join(viz_kernels.lane_cells(whole, 5, "crowded").data[1].text), "no room for more than a number"


def test_times_are_drawn_beside_the_bound_and_missing_ones_left_out():
    table = pd.DataFrame({"bound": [1.0, 2.0], "ours": [1.5, 2.5], "late": [float("nan"), 9.0]}, index=[1, 16])
    bound, ours, late = viz_kernels.times(table, "title").data
    assert bound.line.dash == "dash" and list(ours.x) == [1, 16] and list(ours.y) == [1.5, 2.5]
    assert list(late.x) == [16] and list(late.y) == [9.0]


def test_fields_of_different_widths():
    (row,) = viz_kernels.bit_rows({"a": 0}, "title", width=viz_kernels.HALVES).data[0].z
    assert len({*row[1:6]}) == len({*row[6:16]}) == 1 and len({row[0], row[1], row[6]}) == 3
    assert list(row[:16]) == list(row[16:]), "sign, exponent and mantissa look alike in both halves"
    with pytest.raises(ValueError, match=r"width: fields of \(8, 8\) bits do not make 32"):
        viz_kernels.bit_rows({"a": 0}, "title", width=(8, 8))


def test_weights_of_pages_that_were_read():
    final = torch.tensor([0.1, 0.2, 0.3, 0.4])
    first, second, line = viz_kernels.running_weights([final[:2] / 0.3], final, 2, "title").data
    assert list(first.x) == [0, 1] and list(first.y) == pytest.approx([1 / 3, 2 / 3]) and not len(second.y)
    assert list(line.y) == pytest.approx(final.tolist())


def test_a_pool_shows_who_holds_what():
    cells = viz_kernels.page_pool([["A"], [], ["A", "B"]], "title", columns=2).data[0]
    assert cells.text[0][0].startswith("<b>A</b>") and cells.text[1][0].startswith("<b>A + B</b>")
    assert cells.z[0][0] == cells.z[1][0] != cells.z[0][1] and cells.text[0][1] == "page 1"


def test_a_timeline_has_a_row_per_worker_and_a_bar_per_piece():
    table = pd.DataFrame({"worker": ["copy", "copy", "multiply"], "piece": [0, 1, 0], "start": [0, 4, 4], "end": [4, 8, 5]})
    copy, multiply = viz_kernels.timeline(table, "title").data
    assert list(copy.base) == [0, 4] and list(copy.x) == [4, 4] and list(copy.text) == ["0", "1"]
    assert list(multiply.base) == [4] and list(multiply.x) == [1] and set(multiply.y) == {"multiply"}
