"""Dark figures: every text, line and mark stands out from what it lies on, and only what is shown changes."""

from __future__ import annotations

import json
import re

import plotly.graph_objects as go
import plotly.io
import pytest
import torch

from qoqlab import site, themes, viz, viz_kernels, widgets

FIGURES = {
    "lines": lambda: viz.channel_profile({"a": torch.rand(9), "b": torch.rand(9)}, "title"),
    "keys": lambda: viz.key_strips(torch.rand(1, 5, 8)),
    "bits": lambda: viz_kernels.bit_rows({"a": 5}, "title"),
    "pool": lambda: viz_kernels.page_pool([["A"], ["B"], []], "title"),
    "frames": lambda: viz.with_slider({n: viz.channel_profile({"a": torch.rand(9)}, n) for n in "ab"}, "x: "),
}


@pytest.fixture(autouse=True)
def light():
    """A renderer as notebooks have it, and afterwards everything as it was."""
    before = plotly.io.renderers.default
    plotly.io.renderers.default = "plotly_mimetype"
    yield
    themes.use("light")
    plotly.io.renderers.default = before


def luminance(colour: str) -> float:
    """Relative luminance of ``#rrggbb``, as WCAG defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_what_is_drawn_stands_out_from_the_paper():
    for colour in viz.PALETTE:
        assert contrast(themes.recolour(colour), themes.DARK_PAPER) >= 3, f"{colour}: WCAG asks 3 of graphics"
    ink = themes.recolour(viz._INK)
    assert contrast(ink, themes.DARK_PAPER) >= 7
    for fill in (*(shade for pair in viz_kernels._FIELDS for shade in pair), *viz_kernels._HOLDERS):
        assert contrast(ink, themes.recolour(fill)) >= 3, f"text on {fill}"
        assert contrast(viz._INK, fill) >= 4.5, f"text on {fill}, by day"


def test_the_knob_of_a_slider_stands_out_by_day_and_by_night():
    figure = FIGURES["frames"]()
    for paper, shown in (("#ffffff", figure), (themes.DARK_PAPER, themes.dark(figure))):
        slider = shown.layout.sliders[0]
        assert contrast(slider.bordercolor, paper) >= 3 and contrast(slider.bordercolor, slider.bgcolor) >= 3, paper
        assert contrast(slider.tickcolor, paper) >= 3, paper


@pytest.mark.parametrize("name", FIGURES)
def test_no_light_paper_and_no_dark_ink_are_left(name):
    figure = FIGURES[name]()
    before = figure.to_json()
    text = themes.dark(figure).to_json()
    assert figure.to_json() == before, "the figure itself stays"
    assert not re.search(f'"white"|"#ffffff"|"{viz._INK}"|"{viz._GRID}"', text)
    assert len(themes.dark(figure).frames) == len(figure.frames)


def test_a_theme_changes_what_is_shown():
    figure = FIGURES["lines"]()
    plain = json.dumps(plotly.io.renderers._build_mime_bundle(figure.to_dict()), default=str)
    themes.use("dark")
    themes.use("dark")  # twice is once
    night = json.dumps(plotly.io.renderers._build_mime_bundle(figure.to_dict()), default=str)
    assert themes.DARK_PAPER in night and themes.DARK_PAPER not in plain
    themes.use("light")
    assert themes.shown(figure) is figure
    with pytest.raises(ValueError, match=r"theme: expected one of .*, got 'blue'"):
        themes.use("blue")


def test_live_figures_follow():
    def picture(size: int = 3) -> go.Figure:
        return viz.channel_profile({"a": torch.arange(1.0, size + 1)}, f"size {size}")

    themes.use("dark")
    slider, canvas = widgets.explore(picture, size=(2, 5)).children
    slider.value = 4
    assert canvas.layout.template.layout.paper_bgcolor == themes.DARK_PAPER
    assert canvas.layout.title.text == "size 4" and canvas.data[0].line.color == themes.recolour(viz.PALETTE[0])
    assert list(canvas.data[0].y) == [1, 2, 3, 4], "numbers stay numbers, which lessons read"


def test_the_site_has_the_same_table():
    table = re.search(r"const colours = (\{.*?\});", site._FIGURES_JS)
    assert table and json.loads(table[1]) == themes.DARK and themes.DARK_PAPER in site._STYLE
