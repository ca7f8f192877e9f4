"""Pictures of serving and of the explorers: titles and units, fixed numbers of traces, and what they are given is shown."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

from qoqlab import viz, viz_explorers, viz_serving

SPEEDS = pd.DataFrame({"precision": ["a", "a", "b", "b"], "tokens": [1, 64, 1, 64], "tops": [1.0, 60.0, 4.0, 100.0]})
STEP = pd.DataFrame({"precision": ["a", "a", "b", "b"], "part": ["linear", "head"] * 2, "ms": [4.0, 1.0, 2.0, 1.0]})
MEMORY = pd.DataFrame({"precision": ["a", "b"], "part": ["weights", "weights"], "gib": [10.0, 3.0]})
KERNELS = pd.DataFrame(
    {"kernel": ["x", "x", "limit"], "tokens": [1, 64, 64], "speedup": [2.0, 0.5, 4.0], "bound": [False, False, True]}
)
SHARES = pd.DataFrame({"name": ["x", "y"] * 2, "group": ["few", "few", "many", "many"], "share": [0.1, 0.9, 1.4, 0.5]})
LINES = pd.DataFrame({"precision": ["a", "a"], "batch": [0, 9], "gib": [3.0, 12.0]})
SERVED = pd.DataFrame(
    {"system": ["s", "t"], "gpu": ["A", "B"], "model": ["m", "n"], "tokens_per_s": [50.0, 300.0], "bound": [100.0, 400.0]}
)
COST = pd.DataFrame({"name": ["m", "m"], "group": ["s", "t"], "value": [0.1, 1.0]})
ROUNDS = pd.DataFrame(
    {
        "name": ["m, 8 at once", "n, 2 at once"],
        "group": ["QoQ", "torch"],
        "tokens_per_s": [1234.0, 600.0],
        "predicted": [1300.0, None],
    }
)
LOADS = pd.DataFrame(
    {
        "precision": ["a", "a", "b"],
        "load": [1.0, 9.0, 1.0],
        "total_p50": [1.0, 2.0, 0.5],
        "total_p95": [2.0, 5.0, 1.0],
        "dollars_per_million": [3.0, 0.3, 3.0],
    }
)
FILLS = pd.DataFrame({"precision": ["a", "a", "b"], "step": [0, 1, 0], "running": [1, 2, 1], "taken": [4, 8, 3]})
REPORT = pd.DataFrame({"layer": [0, 1] * 2, "stage": ["rtn"] * 2 + ["clip_it"] * 2, "output_sqnr_db": [10.0, 11, 12, 13]})
EXPECTED = pd.DataFrame({"token": ["a", "b"] * 2, "model": ["x", "x", "y", "y"], "probability": [0.6, 0.4, 0.5, 0.5]})
VALUES = torch.randn(64, generator=torch.Generator().manual_seed(0))

FIGURES = {
    "roof_and_step": lambda: viz_serving.roof_and_step(SPEEDS, STEP, 64, "title"),
    "step_and_memory": lambda: viz_serving.step_and_memory(STEP, MEMORY, 20.0, "title"),
    "speedups": lambda: viz_serving.speedups(KERNELS, "title"),
    "shares": lambda: viz_serving.shares(SHARES, "title", "time (%)"),
    "memory_by_batch": lambda: viz_serving.memory_by_batch(LINES, 12.0, "title"),
    "published_and_bound": lambda: viz_serving.published_and_bound(SERVED, "title"),
    "rounds": lambda: viz_serving.rounds(ROUNDS, "title"),
    "bars": lambda: viz_serving.bars(COST, "title", "model", "cost in dollars"),
    "filling": lambda: viz_serving.filling(FILLS, {"a": 8, "b": 4}, "title"),
    "load_and_cost": lambda: viz_serving.load_and_cost(LOADS, "title"),
    "grid_and_error": lambda: viz_explorers.grid_and_error(VALUES, torch.arange(-3, 4), VALUES.view(8, 8), "title"),
    "next_tokens": lambda: viz_explorers.next_tokens(EXPECTED, "title"),
    "stage_map": lambda: viz_explorers.stage_map(REPORT, "title"),
}


def test_every_figure_is_covered():
    public = set()
    for module in (viz_serving, viz_explorers):
        public |= {n for n, f in vars(module).items() if getattr(f, "__module__", "") == module.__name__ and n[0] != "_"}
    assert public == set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_template_titles_and_size(name):
    figure = FIGURES[name]()
    assert isinstance(figure, go.Figure) and figure.layout.title.text == "title"
    assert figure.layout.template.layout.colorway == viz.PALETTE
    layout = figure.to_plotly_json()["layout"]
    for letter in "xy":
        titles = [v.get("title", {}).get("text") for k, v in layout.items() if k.startswith(f"{letter}axis")]
        assert all(titles) or (name in ("shares", "rounds") and letter == "y"), "the names of bars speak for themselves"
    assert len(figure.to_json()) < 60_000


def test_roofs_have_a_mark_at_the_batch_and_bars_their_totals():
    figure = FIGURES["roof_and_step"]()
    marks = [t for t in figure.data if t.type == "scatter" and t.mode == "markers"]
    assert [(float(t.x[0]), float(t.y[0])) for t in marks] == [(64, 60), (64, 100)]
    assert [note.text.strip() for note in figure.layout.annotations if note.xanchor == "left"] == ["5", "3"]


def test_the_card_is_always_in_sight():
    small = MEMORY.assign(gib=[0.1, 0.2])
    figure = viz_serving.step_and_memory(STEP, small, 20.0, "title")
    assert figure.layout.xaxis2.range[1] > 20


def test_bounds_are_dashed_and_kernels_are_not():
    dashes = {t.name: t.line.dash for t in FIGURES["speedups"]().data}
    assert dashes["x"] == "solid" and dashes["limit"] != "solid"


def test_labels_keep_off_the_line_at_one_hundred():
    few, many = FIGURES["shares"]().data
    assert list(few.text) == ["10 %", "90 %"] and list(few.textposition) == ["outside", "inside"]
    assert list(many.textposition) == ["outside", "outside"]


def test_a_grid_of_many_points_is_thinned_and_a_constant_draws():
    figure = viz_explorers.grid_and_error(torch.ones(8), torch.arange(256), torch.zeros(2, 4), "title")
    assert len(figure.data) == 3 and len(figure.data[1].x) <= 3 * viz_explorers.MOST_LINES


def test_stages_keep_their_order():
    figure = FIGURES["stage_map"]()
    assert list(figure.data[0].x) == ["rtn", "clip<br>it"]
    assert figure.data[0].z.tolist() == [[10, 12], [11, 13]]


def test_latency_stands_left_and_cost_right():
    figure = FIGURES["load_and_cost"]()
    left, half, right = (t for t in figure.data if t.name == "a")
    assert [t.y.tolist() for t in (left, half, right)] == [[2, 5], [1, 2], pytest.approx([3, 0.3])]
    assert (left.xaxis, half.xaxis, right.xaxis) == ("x", "x", "x2") and figure.layout.yaxis2.type == "log"


def test_pages_are_shown_as_a_share_of_their_own_pool():
    figure = FIGURES["filling"]()
    shares = [t.y.tolist() for t in figure.data if t.yaxis == "y2"]
    assert shares == [[50, 100], [75]]


def test_published_may_stand_against_a_prediction():
    predicted = SERVED.assign(predicted=[60.0, 250.0])
    figure = viz_serving.published_and_bound(predicted, "title", "predicted")
    marks = [t for t in figure.data if t.mode == "markers" and len(t.x)]
    assert [float(t.x[0]) for t in marks] == [60, 250] and "predicted" in figure.layout.xaxis.title.text
    everything = [*predicted["tokens_per_s"], *predicted["predicted"]]
    assert list(figure.data[0].x) == [min(everything), max(everything)], "the line goes as far as the marks"


def test_rounds_are_bars_with_their_number_and_a_mark_where_something_was_predicted():
    figure = FIGURES["rounds"]()
    ours, torchs, marks, numbers = figure.data
    assert (ours.name, ours.x.tolist(), list(ours.y)) == ("QoQ", [1234], ["m, 8 at once"]) and torchs.x.tolist() == [600]
    assert (marks.x.tolist(), list(marks.y)) == ([1300], ["m, 8 at once"])
    assert [text.strip() for text in numbers.text] == ["1,234", "600"] and numbers.x.tolist() == [1300, 600], "beyond both"
    assert list(figure.layout.yaxis.categoryarray) == ["m, 8 at once", "n, 2 at once"], "in the order of the table"
    assert figure.layout.xaxis.range[0] == 0 and figure.layout.xaxis.range[1] > 1300
    assert len(viz_serving.rounds(ROUNDS[:1], "title").data) == 4, "as many traces, so that a slider may swap them"
