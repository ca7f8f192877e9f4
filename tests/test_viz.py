"""Figures: they return, carry the template and their titles, lose no outlier, and leave their inputs and plotly alone."""

from __future__ import annotations

import json
import math

import pandas as pd
import plotly.graph_objects as go
import plotly.io
import pytest
import torch

from qoqlab import viz

TOKENS = torch.randn(300, 700, generator=torch.Generator().manual_seed(0))
KEYS = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(1))
STAGES = ["round to nearest", "rotate", "smooth_attention", "clip"]
REPORT = pd.DataFrame(
    [
        {"stage": s, "layer": n, "weight_mse": 0.1, "weight_nmse": 0.01, "output_sqnr_db": 10.0 + i + n, "seconds": 0.1}
        for n in range(3)
        for i, s in enumerate(STAGES)
    ]
)
LADDER = pd.DataFrame(
    [
        {"step": step, "perplexity": value, "change": change, "model": model, "fp16": 20.0}
        for model, worst in (("bundled", 25.0), ("planted", 2500.0))
        for step, value, change in (("W8A8", 20.1, float("nan")), ("W4A8", worst, worst - 20.1))
    ]
)
CURVE = pd.DataFrame({"label": ["row", 128], "bits": [4.06, 4.16], "sqnr_db": [18.0, 19.8], "kind": ["a", "b"]})
BYTES = pd.DataFrame({"format": ["fp16", "W4"], "part": ["weights", "weights"], "size": [2.0, 0.5]})
ROOF = pd.DataFrame({"precision": ["W4A8"] * 2, "intensity": [1.0, 100.0], "speed": [4.0, 400.0]})
COMPARED = pd.DataFrame(
    [
        {
            "model": model,
            "method": method,
            "format": form,
            "text": text,
            "perplexity": 20 + gap,
            "gap": gap,
            "runtime_perplexity": 20 + gap + 0.5,
            "weight_bits": bits,
            "kv_bits": 4.25,
        }
        for model in ("bundled", "planted")
        for method, form, gap, bits in (
            ("fp16", "W16A16KV16", 0.0, 16.0),
            ("plain", "W4A8KV4", 30.0, 4.04),
            ("grouped", "W4A8KV4 g128", 3.0, 4.15),
            ("worse", "W4A8KV4 g128 + INT8 outliers", 3.5, 4.3),
            ("careful", "W8A8KV4", -0.2, 8.1),
        )
        for text in ("one", "two")
    ]
)
COST = (COMPARED.query("model == 'planted' and text == 'one'"), "weight_bits", "trade-off", "bits a weight")
MEASURED = pd.DataFrame({"layer": [0, 1], "site": ["qkv", "qkv"], "ratio": [3.0, 30.0]})

FIGURES = {
    "outlier_map": lambda: viz.outlier_map(TOKENS, "map"),
    "outlier_map_log": lambda: viz.outlier_map(TOKENS, "map", log=True),
    "outlier_surface": lambda: viz.outlier_surface(TOKENS, "surface"),
    "channel_profile": lambda: viz.channel_profile({"a": TOKENS[0].abs(), "b": TOKENS[1, :9].abs()}, "profile"),
    "channel_profile_ranked": lambda: viz.channel_profile({"a": TOKENS[0].abs()}, "profile", log=False, ranked=True),
    "outlier_ratios": lambda: viz.outlier_ratios({"bundled": MEASURED}, "ratios"),
    "key_strips": lambda: viz.key_strips(KEYS),
    "histogram_with_grid": lambda: viz.histogram_with_grid(TOKENS, torch.linspace(-3, 3, 16), "histogram"),
    "grid_lines": lambda: viz.grid_lines({"INT4": torch.arange(-7, 8)}, "grids"),
    "staircase": lambda: viz.staircase(TOKENS[0], TOKENS[0].round(), "stairs", TOKENS[0].round().int()),
    "overflow_counts": lambda: viz.overflow_counts({119: 0, 120: 8}),
    "group_size_curve": lambda: viz.group_size_curve(CURVE),
    "error_by_layer": lambda: viz.error_by_layer(REPORT),
    "waterfall": lambda: viz.waterfall(REPORT),
    "ladder": lambda: viz.ladder(LADDER),
    "comparison": lambda: viz.comparison(COMPARED),
    "trade_off": lambda: viz.trade_off(*COST),
    "stacked_bytes": lambda: viz.stacked_bytes(BYTES, "bytes"),
    "roofline": lambda: viz.roofline(ROOF, "roof", "tokens", "TOP/s"),
    "with_slider": lambda: viz.with_slider({str(i): viz.outlier_map(TOKENS[i:], f"from {i}") for i in range(3)}, "from: "),
}


def public_figures() -> set[str]:
    functions = {n: f for n, f in vars(viz).items() if callable(f) and getattr(f, "__module__", "") == "qoqlab.viz"}
    return {n for n in functions if not n.startswith("_")} - {"pool_max"}


def test_every_figure_is_covered():
    assert public_figures() <= {name.removesuffix("_log").removesuffix("_ranked") for name in FIGURES}


@pytest.mark.parametrize("name", FIGURES)
def test_template_titles_and_units(name):
    figure = FIGURES[name]()
    assert isinstance(figure, go.Figure) and figure.data
    assert figure.layout.template.layout.colorway == viz.PALETTE
    assert figure.layout.title.text
    layout = figure.to_plotly_json()["layout"]
    if name == "outlier_surface":
        titles = [layout["scene"][f"{axis}axis"]["title"]["text"] for axis in "xyz"]
    else:
        titles = []
        for letter in "xy":
            named = [v for k, v in layout.items() if k.startswith(f"{letter}axis") and v.get("title", {}).get("text")]
            assert named, f"no {letter} axis has a title"
            titles += [v["title"]["text"] for v in named]
    assert all(titles)


@pytest.mark.parametrize("name", FIGURES)
def test_small_and_serialisable(name):
    text = FIGURES[name]().to_json()
    json.loads(text)
    assert len(text) < 330_000


def test_import_changes_no_global_template():
    assert plotly.io.templates.default == "plotly"


def test_pooling_keeps_a_lonely_outlier():
    x = torch.zeros(1000, 5000)
    x[777, 4321] = -9.0
    pooled, high, wide = viz.pool_max(x)
    assert pooled.shape[0] <= viz.MAP_ROWS and pooled.shape[1] <= viz.MAP_COLUMNS
    assert pooled.max() == 9.0 and pooled[777 // high, 4321 // wide] == 9.0 and int((pooled > 0).sum()) == 1
    assert float(viz.outlier_map(x, "lonely").data[0].z.max()) == 9.0


def test_pooling_small_inputs_is_the_identity():
    x = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
    assert viz.pool_max(x)[0].tolist() == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(0, 4), torch.zeros(2, 2, 2)])
def test_maps_name_a_wrong_shape(bad):
    with pytest.raises(ValueError, match=r"x: expected a non-empty matrix"):
        viz.outlier_map(bad, "bad")


def test_strips_name_a_wrong_shape():
    with pytest.raises(ValueError, match=r"keys: expected \[heads, tokens, head_dim\]"):
        viz.key_strips(torch.zeros(3, 4))


def test_strips_mark_the_rope_partner():
    keys = KEYS.clone()
    keys[0, :, 3] = 50.0
    texts = [note.text for note in viz.key_strips(keys).layout.annotations]
    assert texts[:2] == ["3", "11 (partner)"]


@pytest.mark.parametrize(("loudest", "side"), [(8, "left"), (7, "right")])
def test_a_partner_at_the_edge_is_labelled_inwards(loudest, side):
    keys = torch.ones(1, 3, 16)
    keys[0, :, loudest] = 50.0
    _, partner = viz.key_strips(keys).layout.annotations[-2:]
    assert "partner" in partner.text and partner.xanchor == side


def test_constant_and_zero_inputs_draw():
    zeros = torch.zeros(4, 4)
    for log in (False, True):
        viz.outlier_map(zeros, "zeros", log=log)
    viz.channel_profile({"zeros": zeros[0]}, "zeros")
    viz.histogram_with_grid(zeros, zeros[0], "zeros")
    viz.key_strips(torch.zeros(1, 3, 4))


def test_inputs_stay_as_they_are():
    x, report = TOKENS.clone(), REPORT.copy()
    viz.outlier_map(x, "map")
    viz.error_by_layer(report)
    viz.waterfall(report)
    assert torch.equal(x, TOKENS)
    pd.testing.assert_frame_equal(report, REPORT)


def test_gradients_do_not_get_in_the_way():
    weight = torch.nn.Parameter(TOKENS[:8, :8].clone())
    viz.outlier_map(weight, "parameter")
    viz.channel_profile({"a": weight[0]}, "parameter")
    viz.staircase(weight[0], weight[0].round(), "parameter")


def test_error_by_layer_has_a_line_per_stage():
    figure = viz.error_by_layer(REPORT)
    assert [trace.name for trace in figure.data] == [s.replace("_", " ") for s in STAGES]
    assert list(figure.data[1].y) == [11.0, 12.0, 13.0]


def test_error_by_layer_draws_reports_without_calibration():
    viz.error_by_layer(REPORT.assign(output_sqnr_db=float("nan")))


def test_waterfall_adds_up():
    steps = viz.waterfall(REPORT).data[0].y
    assert steps[:-1].sum() == pytest.approx(steps[-1])


def test_ladder_shows_every_rung_and_the_reference():
    figure = viz.ladder(LADDER)
    markers = [trace for trace in figure.data if trace.mode == "markers+text"]
    assert [list(t.y) for t in markers] == [["W8A8", "W4A8"]] * 2
    assert markers[1].text[1].split() == ["2500", "(+2480)"]
    assert "20.00" in figure.layout.xaxis.title.text and "log" in figure.layout.xaxis.title.text


def test_comparison_has_a_row_per_method_a_colour_per_precision_and_a_panel_per_model_and_text():
    figure = viz.comparison(COMPARED)
    assert list(figure.layout.yaxis.categoryarray) == ["plain", "grouped", "worse", "careful"]
    assert [note.text for note in figure.layout.annotations] == [
        f"{model} model<br>{text}" for model in ("bundled", "planted") for text in ("one", "two")
    ]
    for axis in ("x", "x2", "x3", "x4"):
        drawn = {(t.name, t.marker.symbol): dict(zip(t.y, t.x, strict=True)) for t in figure.data if t.xaxis == axis}
        assert drawn["W4A8KV4", "circle"] == pytest.approx({"plain": 30.0, "grouped": 3.0, "worse": 3.5})
        assert drawn["W4A8KV4", "circle-open"] == pytest.approx({"plain": 30.5, "grouped": 3.5, "worse": 4.0})
        assert drawn["W8A8KV4", "circle"] == pytest.approx({"careful": 0.01}), "no logarithm of a gain: the left end"
        assert drawn["W8A8KV4", "circle-open"] == pytest.approx({"careful": 0.3})
        assert len({t.marker.color for t in figure.data}) == len({t.name for t in figure.data}) == 2
    assert sorted(t.name for t in figure.data if t.showlegend) == ["W4A8KV4", "W8A8KV4"]
    ranges = {tuple(figure.layout[name].range) for name in ("xaxis", "xaxis2", "xaxis3", "xaxis4")}
    assert len(ranges) == 1 and 10 ** ranges.pop()[1] > 30.5


def test_headings_of_narrow_panels_are_broken():
    figure = viz.comparison(COMPARED.replace({"text": {"one": "Python documentation"}}))
    lines = [line for note in figure.layout.annotations for line in note.text.split("<br>")]
    below = [line for axis in figure.select_xaxes() for line in axis.title.text.split("<br>")]
    assert max(map(len, lines)) * 6.3 < 93 and max(map(len, below)) * 6.5 < 103, "four panels on a page of 800 pixels"


def test_comparison_without_runtime_or_losses():
    alone = COMPARED[COMPARED["method"] == "fp16"].assign(runtime_perplexity=float("nan"))
    figure = viz.comparison(alone)
    assert {t.marker.symbol for t in figure.data} == {"circle"}
    assert {name for t in figure.data for name in t.y} == {"fp16"}


def test_comparison_says_what_it_counts():
    figure = viz.comparison(COMPARED, "in per cent", "perplexity lost (%)")
    assert {figure.layout[name].title.text for name in ("xaxis", "xaxis4")} == {"perplexity lost (%)"}


def test_trade_off_separates_the_stairs_from_the_rest():
    stairs, beaten, worth = viz.trade_off(*COST).data
    assert [name.strip() for name in worth.text] == ["plain", "grouped", "careful"], "16 bits lose to 8 that lose nothing"
    assert [name.strip() for name in beaten.text] == ["worse", "fp16"]
    assert list(stairs.x) == list(worth.x) == pytest.approx([4.04, 4.15, 8.1])
    notes = viz.trade_off(*COST).layout.annotations
    assert [note.text for note in notes] == ["plain<br>grouped", "careful"], "neighbours share a label"
    table, *rest = COST
    assert len(viz.trade_off(table[:1], *rest).data) == len(viz.trade_off(pd.concat([table] * 3), *rest).data) == 3


def test_slider_swaps_whole_figures():
    figure = FIGURES["with_slider"]()
    assert [frame.name for frame in figure.frames] == ["0", "1", "2"]
    assert [frame.layout.title.text for frame in figure.frames] == ["from 0", "from 1", "from 2"]
    assert len(figure.layout.sliders[0].steps) == 3
    with pytest.raises(ValueError, match="same number of traces"):
        viz.with_slider({"a": go.Figure(go.Scatter()), "b": go.Figure()}, "x: ")


def test_a_slider_has_room_under_labels_and_titles_of_several_lines():
    reports = REPORT.assign(stage="clip"), REPORT
    plain, broken = (viz.with_slider({"a": viz.waterfall(report)}, "model: ") for report in reports)
    assert broken.layout.sliders[0].pad.t - plain.layout.sliders[0].pad.t == broken.layout.height - plain.layout.height == 17
    titled = viz.with_slider({"c": viz.outlier_map(TOKENS, "map").update_xaxes(title_text="one<br>two<br>three")}, "model: ")
    assert titled.layout.sliders[0].pad.t - plain.layout.sliders[0].pad.t == 34


@pytest.mark.parametrize(
    ("high", "room", "shown"),
    [
        (20.0, 6, ["1", "2", "5", "10", "20"]),
        (500.0, 6, ["1", "3", "10", "30", "100", "300"]),
        (500.0, 4, ["1", "10", "100"]),
        (1e6, 6, ["1", "10", "100", "1000", "10000", "100000", "10<sup>6</sup>"]),
    ],
)
def test_a_log_axis_names_as_many_ticks_as_there_is_room_for(high, room, shown):
    axis = viz._log_axis([torch.tensor([1.0, high], dtype=torch.float64)], room)
    (low, top), names = axis["range"], zip(axis["tickvals"], axis["ticktext"], strict=True)
    assert [name for at, name in names if low <= math.log10(at) <= top] == shown


def test_a_line_under_another_one_is_wider():
    slow = pd.DataFrame({"precision": "W8A8", "intensity": [1.0, 100.0], "speed": [2.0, 400.0]})
    figure = viz.roofline(pd.concat([ROOF, slow, ROOF.assign(precision="W4A4")]), "roof", "tokens", "TOP/s")
    assert [trace.line.width for trace in figure.data] == [5.5, 2.5, 2.5]


@pytest.mark.parametrize("name", ["outlier_map", "outlier_map_log", "outlier_surface"])
def test_colour_bars_have_titles_no_larger_than_those_of_axes(name):
    bar = FIGURES[name]().data[0].colorbar
    assert "|x|" in bar.title.text and bar.title.font.size <= 13
