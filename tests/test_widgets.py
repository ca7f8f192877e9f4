"""explore(): controls start at the defaults, moving them redraws in place, mistakes are named."""

from __future__ import annotations

import ipywidgets
import pandas as pd
import plotly.graph_objects as go
import pytest

from qoqlab import widgets


def figure(bits=4, ratio=0.5, kind="a", group=64):
    drawing = go.Figure(go.Scatter(y=[bits, ratio, group]), layout={"title": {"text": f"{kind} {bits}"}})
    for index in range(bits):
        drawing.add_annotation(x=index, y=0, text=str(index))
    return drawing


def test_controls_start_at_the_defaults():
    panel = widgets.explore(figure, bits=(2, 8), ratio=(0.0, 1.0, 0.25), kind=["a", "b"], group=[32, 64, 128])
    *controls, canvas = panel.children
    assert [type(c) for c in controls] == [
        ipywidgets.IntSlider,
        ipywidgets.FloatSlider,
        ipywidgets.Dropdown,
        ipywidgets.SelectionSlider,
    ]
    assert [c.value for c in controls] == [4, 0.5, "a", 64]
    assert isinstance(canvas, go.FigureWidget) and canvas.layout.title.text == "a 4"
    assert canvas._config["responsive"], "it follows the width of the page"
    assert all(control.layout.max_width == "100%" for control in panel.children[:-1] if control.layout.width)


def test_moving_a_control_redraws():
    panel = widgets.explore(figure, bits=(2, 8), kind=["a", "b"])
    bits, kind, canvas = panel.children
    bits.value, kind.value = 6, "b"
    assert canvas.layout.title.text == "b 6" and list(canvas.data[0].y) == [6, 0.5, 64]


def test_marks_that_went_away_are_cleared():
    bits, canvas = widgets.explore(figure, bits=(1, 8)).children
    bits.value = 7
    assert len(canvas.layout.annotations) == 7
    bits.value = 2
    assert [note.text for note in canvas.layout.annotations] == ["0", "1"]


def test_text_is_stable():
    panel = widgets.explore(figure, bits=(2, 8), kind=["a", "b"])
    assert repr(panel) == "explore(figure, bits=4, kind='a')"


def test_whole_number_range_on_a_float_default_is_a_float_slider():
    control, _ = widgets.explore(figure, ratio=(0, 1)).children
    assert isinstance(control, ipywidgets.FloatSlider)


def test_an_error_in_the_figure_surfaces_where_the_control_moved():
    def fragile(bits=4):
        if bits == 6:
            raise RuntimeError("six")
        return go.Figure(go.Scatter(y=[bits]))

    slider, _ = widgets.explore(fragile, bits=(2, 8)).children
    with pytest.raises(RuntimeError, match="six"):
        slider.value = 6


def test_a_changing_number_of_traces_is_refused():
    def growing(count=1):
        return go.Figure([go.Scatter(y=[0])] * count)

    slider, _ = widgets.explore(growing, count=(1, 3)).children
    with pytest.raises(ValueError, match="had 1 traces, now has 2"):
        slider.value = 2


@pytest.mark.parametrize(
    ("ranges", "sentence"),
    [
        ({"missing": (0, 1)}, "missing: the figure function needs a parameter"),
        ({"bits": (5, 8)}, "bits: the default 4 is outside 5..8"),
        ({"kind": ["b", "c"]}, "kind: the default 'a' is not among"),
    ],
)
def test_wrong_ranges_are_named(ranges, sentence):
    with pytest.raises(ValueError, match=sentence):
        widgets.explore(figure, **ranges)


def view(bits=4, on=True, kind="a"):
    if bits == 7:
        raise ValueError("bits: seven is <forbidden>")
    return figure(bits, kind=kind), pd.DataFrame({"bits": [bits], "on": [on]})


def test_a_dashboard_has_controls_a_table_and_a_figure():
    board = widgets.dashboard(view, bits=(2, 8), on=[False, True], kind=["a", "b"])
    assert [type(c) for c in board.controls.values()] == [ipywidgets.IntSlider, ipywidgets.Checkbox, ipywidgets.Dropdown]
    assert isinstance(board.canvas, go.FigureWidget) and board.canvas.layout.title.text == "a 4"
    assert "<td>4</td>" in board.table.value and "ready" in board.state.value
    assert repr(board) == "dashboard(view, bits=4, on=True, kind='a')"


def test_a_dashboard_redraws_figure_and_table():
    board = widgets.dashboard(view, bits=(2, 8), on=[False, True], kind=["a", "b"])
    board.controls["bits"].value, board.controls["on"].value, board.controls["kind"].value = 6, False, "b"
    assert board.canvas.layout.title.text == "b 6"
    assert "<td>6</td>" in board.table.value and "<td>False</td>" in board.table.value


def test_a_dashboard_says_what_does_not_fit_and_goes_on():
    board = widgets.dashboard(view, bits=(2, 8))
    board.controls["bits"].value = 7
    assert "seven is &lt;forbidden&gt;" in board.state.value and board.canvas.layout.title.text == "a 4"
    board.controls["bits"].value = 8
    assert "ready" in board.state.value and board.canvas.layout.title.text == "a 8"


def test_other_errors_of_a_dashboard_surface():
    def fragile(bits=4):
        if bits == 6:
            raise RuntimeError("six")
        return view(bits)

    board = widgets.dashboard(fragile, bits=(2, 8))
    with pytest.raises(RuntimeError, match="six"):
        board.controls["bits"].value = 6
