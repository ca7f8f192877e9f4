"""Light and dark: figures are made in light colours, and shown in dark ones where that is asked for.

A theme is a table of colours and nothing else, so `qoqlab.viz` knows only one look, and the course's site can apply the same
table in the browser.
"""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import plotly.io
from plotly.io.base_renderers import MimetypeRenderer

from .viz import _GRID, _INK, _MUTED, PALETTE
from .viz_kernels import _FIELDS, _HOLDERS

#: Where figures of the dark theme lie.
DARK_PAPER = "#181b20"
#: What becomes of each colour in the dark; colours that are not here stay.
DARK: dict[str, str] = {
    "white": DARK_PAPER,
    "#ffffff": DARK_PAPER,
    "rgba(255,255,255,0.85)": "rgba(24,27,32,0.85)",
    _INK: "#e6eaef",
    _MUTED: "#8b96a3",
    _GRID: "#2f353d",
    PALETTE[0]: "#2a86c8",
    "#000000": "#f2f4f7",
    "#333333": "#dddddd",
    "#888888": "#999999",
    "#cccccc": "#666666",
    **dict(zip([zero for zero, _ in _FIELDS], ("#22303b", "#3a2a20", "#1f352d", "#362734"), strict=True)),
    **dict(zip(_HOLDERS, ("#2f6d99", "#a35a2c", "#2f8163", "#8d4f74", "#8a6a1c", "#48667c"), strict=True)),
}
THEMES = ("light", "dark")
_PREFIX = "dark-"
_in_use = "light"


def recolour(value: Any) -> Any:
    """``value``, anything made of dicts, lists and strings, in dark colours; the argument is left alone.

    >>> recolour({"color": ["white", "red"]})
    {'color': ['#181b20', 'red']}
    """
    if isinstance(value, str):
        return DARK.get(value, value)
    if isinstance(value, dict):
        return {name: recolour(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [recolour(inner) for inner in value]
    return value


def dark(figure: go.Figure) -> go.Figure:
    """A copy of a figure, its frames included, in dark colours."""
    # part by part: a whole figure's `to_dict` turns arrays into text, which a live figure's traces would then hold
    data, frames = ([part.to_plotly_json() for part in parts] for parts in (figure.data, figure.frames))
    return go.Figure(recolour(data), recolour(figure.layout.to_plotly_json()), recolour(frames))


class _Dark(MimetypeRenderer):
    """Another renderer, in the dark."""

    def __init__(self, inner: MimetypeRenderer) -> None:
        self.inner = inner

    def activate(self) -> None:
        self.inner.activate()

    def to_mimebundle(self, fig_dict: dict[str, Any]) -> Any:
        return self.inner.to_mimebundle(recolour(fig_dict))


def use(theme: str) -> None:
    """Show figures in ``theme``, "light" or "dark", from now on, those behind sliders as well; run cells again to see it.

    Only what is displayed changes: figures themselves stay as they are. Raises ValueError for another name.
    """
    if theme not in THEMES:
        raise ValueError(f"theme: expected one of {THEMES}, got {theme!r}")
    global _in_use
    _in_use = theme
    renderers = plotly.io.renderers
    names = [name.removeprefix(_PREFIX) for name in renderers.default.split("+") if name]
    if theme == "dark":
        for index, name in enumerate(names):
            if isinstance(renderers[name], MimetypeRenderer):
                names[index] = _PREFIX + name
                renderers[names[index]] = _Dark(renderers[name])
    renderers.default = "+".join(names)


def shown(figure: go.Figure) -> go.Figure:
    """The figure as the theme in use shows it, for places that no renderer reaches."""
    return dark(figure) if _in_use == "dark" else figure
