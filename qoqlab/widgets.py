"""Sliders around figure functions. The only module that imports ipywidgets.

`explore` puts controls above one figure, `dashboard` controls beside a table and a figure. Both need a running kernel; for a
slider that also lives in a saved page see `viz.with_slider`. Every control answers to the keyboard, and `explore` sees to it
that the sliders of `viz.with_slider` on its page do as well.
"""

from __future__ import annotations

import html
import inspect
from collections.abc import Callable
from typing import Any

import anywidget
import ipywidgets
import pandas as pd
import plotly.graph_objects as go

from . import themes, viz

#: What a control can be made from: ``(low, high)`` or ``(low, high, step)`` numbers, or a list of options.
Range = tuple[float, ...] | list[Any]


class _Page(anywidget.AnyWidget):
    """Nothing to see: as long as it lives, figures of its page have the page's width, and arrow keys move their sliders."""

    _esm = (
        viz.STEER
        + """export default {initialize() {
  const tries = new WeakMap();
  const look = (place) => {
    if (window.Plotly && !place.onkeydown) steer(place);
    // a figure that was drawn before it had a place has a width of its own. One that is busy may miss the event, and one of
    // a fixed width never follows: five times for each width that the page gives it
    const drawn = place.querySelector('.main-svg')?.getBoundingClientRect().width, given = place.clientWidth;
    const [width, count] = tries.get(place) ?? [given, 0], tried = width === given ? count : 0;
    if (!drawn || !given || Math.abs(drawn - given) < 1 || tried === 5) return;
    tries.set(place, [given, tried + 1]);
    window.dispatchEvent(new Event('resize'));
  };
  // figures come and go with the cells that are run
  const timer = setInterval(() => document.querySelectorAll('.js-plotly-plot').forEach(look), 500);
  return () => clearInterval(timer);
}};
"""
    )


class Panel(ipywidgets.VBox):
    """Controls above a live figure: ``panel.children`` holds the controls in order, then the figure."""

    def __init__(self, name: str, controls: dict[str, Any], canvas: Any) -> None:
        self._name, self._controls, self._page = name, controls, _Page()
        super().__init__([*controls.values(), canvas])

    def __repr__(self) -> str:
        """Stable text, so that a notebook's stored output does not change from run to run."""
        values = ", ".join(f"{name}={control.value!r}" for name, control in self._controls.items())
        return f"explore({self._name}, {values})"


def explore(figure: Callable[..., go.Figure], **ranges: Range) -> Panel:
    """Redraw ``figure(**values)`` in place as controls move; each control starts at the function's default.

    One control per keyword: ``bits=(2, 8)`` whole numbers, ``ratio=(0.5, 1.0, 0.05)`` floats with a step,
    ``layer=["first", "last"]`` a drop-down of texts, ``group=[32, 64, 128]`` a slider over other options,
    ``on=[False, True]`` a box to tick.

    Every figure must have the same number of traces. No Output widget is used, so nothing is printed from callbacks and an
    error in ``figure`` surfaces in the cell that moved the control.

    Raises ValueError for a keyword without a default in ``figure``, or for a default outside its range.
    """
    parameters = inspect.signature(figure).parameters
    controls = {name: _control(name, values, parameters) for name, values in ranges.items()}
    canvas = _canvas(figure(**{name: control.value for name, control in controls.items()}))

    def redraw(_change: object) -> None:
        _replace(canvas, figure(**{name: control.value for name, control in controls.items()}))

    for control in controls.values():
        control.observe(redraw, names="value")
    return Panel(getattr(figure, "__name__", "figure"), controls, canvas)


def _canvas(figure: go.Figure) -> Any:
    """A live figure that follows the width of the page."""
    canvas = go.FigureWidget(themes.shown(figure))
    canvas._config = {**canvas._config, "responsive": True}
    return canvas


def _replace(canvas: Any, fresh: go.Figure) -> None:
    """Redraw ``canvas`` as ``fresh``, in one message."""
    if len(fresh.data) != len(canvas.data):
        raise ValueError(f"figure: had {len(canvas.data)} traces, now has {len(fresh.data)}; keep their number fixed")
    fresh = themes.shown(fresh)
    layout = fresh.layout.to_plotly_json()
    layout.pop("template", None)  # the canvas has it; sending it again would be most of the message
    with canvas.batch_update():
        # lists are merged item by item, so marks that went away have to be cleared first
        canvas.layout.annotations, canvas.layout.shapes = (), ()
        canvas.update(data=[trace.to_plotly_json() for trace in fresh.data], layout=layout)


class Dashboard(ipywidgets.HBox):
    """Controls on the left; a line of state, a table and a live figure on the right (below, on narrow screens)."""

    def __init__(self, name: str, controls: dict[str, Any], shown: tuple[Any, Any, Any]) -> None:
        self._name, self.controls, self._page = name, controls, _Page()
        self.state, self.table, self.canvas = shown
        left = ipywidgets.VBox([*controls.values()], layout={"flex": "0 0 320px"})
        # hidden overflow lets the figure shrink with a narrow page
        picture = ipywidgets.Box([self.canvas], layout={"display": "block", "overflow": "hidden", "width": "100%"})
        right = ipywidgets.VBox(
            [self.table, picture, self.state], layout={"flex": "1 1 560px", "min_width": "0", "overflow": "hidden"}
        )
        super().__init__([left, right], layout={"flex_flow": "row wrap"})

    def __repr__(self) -> str:
        """Stable text, as `Panel` has."""
        values = ", ".join(f"{name}={control.value!r}" for name, control in self.controls.items())
        return f"dashboard({self._name}, {values})"


def dashboard(view: Callable[..., tuple[go.Figure, pd.DataFrame]], **ranges: Range) -> Dashboard:
    """Controls beside what ``view(**values)`` returns, a figure and a table; everything is redrawn when a control moves.

    Controls as for `explore`, each starting at the function's default. A ValueError of ``view``, such as groups that do not
    fit, is shown under the figure and leaves the rest as it was; any other error surfaces where the control was moved.
    The state line says "ready" or what is wrong.
    """
    parameters = inspect.signature(view).parameters
    controls = {name: _control(name, values, parameters) for name, values in ranges.items()}
    figure, table = view(**{name: control.value for name, control in controls.items()})
    canvas = _canvas(figure)
    state, shown = ipywidgets.HTML(_state("ready")), ipywidgets.HTML(_table(table))

    def redraw(_change: object) -> None:
        state.value = _state("computing ...")
        try:
            figure, table = view(**{name: control.value for name, control in controls.items()})
        except ValueError as error:
            state.value = _state(str(error))
            return
        _replace(canvas, figure)
        shown.value, state.value = _table(table), _state("ready")

    for control in controls.values():
        if hasattr(control, "continuous_update"):
            control.continuous_update = False  # one answer per move, not one per pixel
        control.layout.width = "300px"
        control.observe(redraw, names="value")
    return Dashboard(getattr(view, "__name__", "view"), controls, (state, shown, canvas))


def _state(text: str) -> str:
    return f'<p class="qoqlab-state" role="status" style="margin:0">{html.escape(text)}</p>'


def _table(table: pd.DataFrame) -> str:
    style = "<style>.qoqlab-table td,.qoqlab-table th{padding:2px 10px;text-align:right;line-height:1.4}</style>"
    return style + str(table.to_html(index=False, border=0, classes="qoqlab-table"))


def _control(name: str, values: Range, parameters: Any) -> Any:
    """The control of one keyword."""
    if name not in parameters or parameters[name].default is inspect.Parameter.empty:
        raise ValueError(
            f"{name}: the figure function needs a parameter of that name with a default, where the control starts"
        )
    start = parameters[name].default
    style = {"description": name.replace("_", " "), "style": {"description_width": "initial"}}
    if isinstance(start, bool):
        return ipywidgets.Checkbox(start, indent=False, **style)
    wide = style | {"layout": {"width": "420px", "max_width": "100%"}}  # never wider than the page
    if isinstance(values, list):
        if start not in values:
            raise ValueError(f"{name}: the default {start!r} is not among the options {values!r}")
        kind = ipywidgets.Dropdown if all(isinstance(v, str) for v in values) else ipywidgets.SelectionSlider
        return kind(options=values, value=start, **wide)
    low, high, *step = values
    if not low <= start <= high:
        raise ValueError(f"{name}: the default {start!r} is outside {low!r}..{high!r}")
    whole = all(isinstance(v, int) for v in (*values, start))
    kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
    spacing = step[0] if step else (1 if whole else (high - low) / 50)
    return kind(start, min=low, max=high, step=spacing, **wide)
