"""Figures of the method's stages: titles, sizes, marks at minima, and no lost outlier."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from qoqlab import viz, viz_methods

MAP = torch.rand(100, 100, generator=torch.Generator().manual_seed(0)).tril()
ERRORS = pd.DataFrame({"method": ["a", "b"], "layer": [0, 0], "weight_db": [16.0, 20.0], "output_db": [25.0, 19.0]})
#: What three methods lose on four draws: b always a tenth less than a, c about as much as a.
DRAWS = pd.DataFrame(
    [
        (i, m, "planted", "docs", g * s)
        for i, g in enumerate((1.0, 2.0, 3.0, 4.0))
        for m, s in (("a", 1), ("b", 0.9), ("c", 1 + 0.05 * (-1) ** i))
    ],
    columns=["draw", "method", "model", "text", "gap"],
)
FIGURES = {
    "vectors": lambda: viz_methods.vectors({"x": torch.tensor([1.0, -2.0]), "y": torch.tensor([0.0, 1.0])}, "title"),
    "error_curves": lambda: viz_methods.error_curves([0.0, 0.5, 1.0], {"a": [3.0, 1.0, 2.0]}, "title", "knob", "error"),
    "attention_maps": lambda: viz_methods.attention_maps(MAP, {"plain": MAP / 3, "smoothed": MAP / 9}, "title"),
    "positions": lambda: viz_methods.positions({"a": torch.arange(256.0)}, 128, "title", "largest |x|"),
    "two_errors": lambda: viz_methods.two_errors(ERRORS, "title"),
    "recipe_result": lambda: viz_methods.recipe_result(
        {"rtn": pd.Series([10.0, 11.0]), "mine": pd.Series([12.0, 13.0])}, {"rtn": 30.0, "mine": 22.0, "fp16": 20.0}, "title"
    ),
    "against": lambda: viz_methods.against(DRAWS, "a", "title"),
}


def test_every_figure_is_covered():
    own = {n for n, f in vars(viz_methods).items() if getattr(f, "__module__", "") == viz_methods.__name__}
    assert {n for n in own if not n.startswith("_")} == set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_template_titles_and_size(name):
    figure = FIGURES[name]()
    layout = figure.to_plotly_json()["layout"]
    assert figure.layout.template.layout.colorway == viz.PALETTE and figure.layout.title.text == "title"
    for letter in "xy":
        assert any(v.get("title", {}).get("text") for k, v in layout.items() if k.startswith(f"{letter}axis"))
    assert len(figure.to_json()) < 330_000


def test_a_star_marks_the_minimum():
    line, star = FIGURES["error_curves"]().data
    assert list(star.x) == [0.5] and list(star.y) == [1.0] and len(line.x) == 3
    _, unmarked = viz_methods.error_curves([0.0, 1.0], {"a": [2.0, 1.0]}, "t", "x", "y", marked=()).data
    assert not len(unmarked.x or ()), "as many traces, without a star"


def test_curves_that_coincide_share_a_number():
    both = viz_methods.error_curves([0.0, 1.0], {"a": [2.0, 1.0], "b": [2.0, 1.0], "c": [1.0, 2.0]}, "t", "x", "y")
    assert [note.text for note in both.layout.annotations] == ["1.00", "0.00"] and len(both.data) == 6


def test_errors_of_maps_share_one_scale_and_lonely_ones_survive():
    lonely = torch.zeros(200, 200)
    lonely[150, 7] = 0.9
    _, plain, smoothed = viz_methods.attention_maps(MAP, {"plain": lonely, "smoothed": lonely / 9}, "t").data
    assert plain.zmax == smoothed.zmax and float(plain.z.max()) == pytest.approx(0.9)


def test_groups_are_told_apart():
    even, odd = FIGURES["positions"]().data
    assert list(even.x) == list(range(128)) and list(odd.x) == list(range(128, 256))


def test_methods_are_compared_draw_by_draw():
    rings, less, level, more = FIGURES["against"]().data[:4]
    assert len(rings.x) == 8 and list(less.y) == ["b"] and list(level.y) == ["a", "c"] and not len(more.y)
    assert list(less.x) == pytest.approx([0.9]) and list(less.error_x.array) == pytest.approx([0.0], abs=1e-6)
    assert list(level.x) == pytest.approx([1.0, 0.9975**0.5]) and level.error_x.arrayminus[1] > 0.01
    _, nothing, _, both = viz_methods.against(DRAWS, "b", "title").data[:4]
    assert not len(nothing.y) and list(both.y) == ["a", "c"]


def test_axis_titles_of_two_panels_fit_a_narrow_page():
    draws = DRAWS.assign(method=DRAWS["method"].map({"a": "atom-w4a8kv4-g128", "b": "qoq-g128", "c": "qoq-plus"}))
    both = pd.concat([draws, draws.assign(text="other")])
    figure = viz_methods.against(both, "atom-w4a8kv4-g128", "title")
    lines = figure.layout.xaxis.title.text.split("<br>")
    assert max(map(len, lines)) * 6.5 < 0.46 * 570, "letters of 6.5 pixels, two panels on 570"


def test_a_number_keeps_off_the_curves_where_it_can():
    knob = [i / 10 for i in range(11)]
    valley = [10 ** (4 * (x - 0.5) ** 2) for x in knob]
    for shift, side in ((0.85, "bottom"), (1.18, "top"), (0.1, "top")):
        figure = viz_methods.error_curves(knob, {"a": valley, "b": [shift] * 11}, "t", "x", "y", marked=["a"])
        assert figure.layout.annotations[0].yanchor == side, f"another curve at {shift}, the star at 1"


def test_a_curve_under_another_one_is_wider():
    curves = {"a": [2.0, 1.0], "b": [2.0, 1.001], "c": [1.0, 2.0]}
    figure = viz_methods.error_curves([0.0, 1.0], curves, "t", "x", "y")
    assert [trace.line.width for trace in figure.data[::2]] == pytest.approx([5.2, 2.2, 2.2])


def test_methods_that_failed_in_a_draw_are_left_out():
    failed = DRAWS.assign(gap=DRAWS["gap"].where((DRAWS["method"] != "c") | (DRAWS["draw"] != DRAWS["draw"].max())))
    assert failed["gap"].isna().any()
    figure = viz_methods.against(failed, "a", "title")
    assert {name for trace in figure.data for name in trace.y or ()} == {"a", "b"}
    with pytest.raises(ValueError, match="reference: 'c' failed in some draw"):
        viz_methods.against(failed, "c", "title")
