"""Sliders around figure functions. The only module that imports ipywidgets.

There is one function, `explore`. It needs a running kernel; for a slider that also lives in a saved page see
`viz.with_slider`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import ipywidgets
import plotly.graph_objects as go

#: What a control can be made from: ``(low, high)`` or ``(low, high, step)`` numbers, or a list of options.
Range = tuple[float, ...] | list[Any]


class Panel(ipywidgets.VBox):
    """Controls above a live figure: ``panel.children`` holds the controls in order, then the figure."""

    def __init__(self, name: str, controls: dict[str, Any], canvas: Any) -> None:
        self._name, self._controls = name, controls
        super().__init__([*controls.values(), canvas])

    def __repr__(self) -> str:
        """Stable text, so that a notebook's stored output does not change from run to run."""
        values = ", ".join(f"{name}={control.value!r}" for name, control in self._controls.items())
        return f"explore({self._name}, {values})"


def explore(figure: Callable[..., go.Figure], **ranges: Range) -> Panel:
    """Redraw ``figure(**values)`` in place as controls move; each control starts at the function's default.

    One control per keyword: ``bits=(2, 8)`` whole numbers, ``ratio=(0.5, 1.0, 0.05)`` floats with a step,
    ``layer=["first", "last"]`` a drop-down of texts, ``group=[32, 64, 128]`` a slider over other options.

    Every figure must have the same number of traces. No Output widget is used, so nothing is printed from callbacks and an
    error in ``figure`` surfaces in the cell that moved the control.

    Raises ValueError for a keyword without a default in ``figure``, or for a default outside its range.
    """
    parameters = inspect.signature(figure).parameters
    controls = {name: _control(name, values, parameters) for name, values in ranges.items()}
    canvas = go.FigureWidget(figure(**{name: control.value for name, control in controls.items()}))

    def redraw(_change: object) -> None:
        fresh = figure(**{name: control.value for name, control in controls.items()})
        if len(fresh.data) != len(canvas.data):
            raise ValueError(f"figure: had {len(canvas.data)} traces, now has {len(fresh.data)}; keep their number fixed")
        layout = fresh.layout.to_plotly_json()
        layout.pop("template", None)  # the canvas has it; sending it again would be most of the message
        with canvas.batch_update():
            # lists are merged item by item, so marks that went away have to be cleared first
            canvas.layout.annotations, canvas.layout.shapes = (), ()
            canvas.update(data=[trace.to_plotly_json() for trace in fresh.data], layout=layout)

    for control in controls.values():
        control.observe(redraw, names="value")
    return Panel(getattr(figure, "__name__", "figure"), controls, canvas)


def _control(name: str, values: Range, parameters: Any) -> Any:
    """The control of one keyword."""
    if name not in parameters or parameters[name].default is inspect.Parameter.empty:
        raise ValueError(
            f"{name}: the figure function needs a parameter of that name with a default, where the control starts"
        )
    start = parameters[name].default
    style = {"description": name.replace("_", " "), "style": {"description_width": "initial"}}
    if isinstance(values, list):
        if start not in values:
            raise ValueError(f"{name}: the default {start!r} is not among the options {values!r}")
        kind = ipywidgets.Dropdown if all(isinstance(v, str) for v in values) else ipywidgets.SelectionSlider
        return kind(options=values, value=start, **style)
    low, high, *step = values
    if not low <= start <= high:
        raise ValueError(f"{name}: the default {start!r} is outside {low!r}..{high!r}")
    whole = all(isinstance(v, int) for v in (*values, start))
    kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
    spacing = step[0] if step else (1 if whole else (high - low) / 50)
    return kind(start, min=low, max=high, step=spacing, layout={"width": "420px"}, **style)
