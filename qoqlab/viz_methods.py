"""Pictures of the method's stages: vectors before and after, errors along a knob, attention maps, positions and groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from .viz import (
    _INK,
    _MUTED,
    PALETTE,
    SEQUENTIAL,
    _colour_bar,
    _layout,
    _legend_above,
    _log_axis,
    _numbers,
    _widths,
    pool_max,
)

_DASHES = ("solid", "dash", "dot", "dashdot")
_SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x")


def vectors(rows: Mapping[str, torch.Tensor], title: str, y: str = "value", digits: int = 2) -> go.Figure:
    """Short vectors as bars, one panel under the other on one scale, every bar with its number."""
    figure = make_subplots(
        rows=len(rows), cols=1, shared_xaxes=True, vertical_spacing=0.34 / len(rows), subplot_titles=list(rows)
    )
    most = max(float(v.abs().max()) for v in rows.values())
    low = min(
        0.0, 1.3 * min(float(v.min()) for v in rows.values()), -0.35 * most * any(bool((v < 0).any()) for v in rows.values())
    )
    for index, values in enumerate(rows.values(), 1):
        numbers = [float(v) for v in values]
        figure.add_bar(
            x=list(range(len(numbers))),
            y=_numbers(numbers),
            text=[f"{v:.{digits}f}" for v in numbers],
            textposition="outside",
            textangle=0,
            cliponaxis=False,
            marker={"color": PALETTE[(index - 1) % len(PALETTE)]},
            hovertemplate="channel %{x}: %{y:.4g}<extra></extra>",
            row=index,
            col=1,
        )
        figure.update_yaxes(range=[low, 1.3 * most], title_text=y, row=index, col=1)
    _layout(figure, title, height=140 + 165 * len(rows), showlegend=False)
    figure.update_xaxes(dtick=1, showgrid=False)
    return figure.update_xaxes(title_text="channel (index)", row=len(rows), col=1).update_annotations(font_size=13)


def error_curves(
    knob: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    title: str,
    x: str,
    y: str,
    marked: Sequence[str] | None = None,
) -> go.Figure:
    """Errors along one knob, a line per curve, each with a star at its minimum (only those in ``marked``, if given).

    Logarithmic upwards. The number of traces is twice that of curves.
    """
    figure = go.Figure()
    axis = _log_axis([torch.tensor([v for values in curves.values() for v in values], dtype=torch.float64)])
    low, high = cast(list[float], axis["range"])
    axis["range"] = low, high = [low - 0.08 * (high - low), high]  # room for the number under a star
    widths = _widths([dict(zip(knob, values, strict=True)) for values in curves.values()], 2.2)
    labelled: set[tuple[str, str]] = set()  # curves may coincide, and with them the numbers under their stars
    for index, (name, values) in enumerate(curves.items()):
        colour = PALETTE[index % len(PALETTE)]
        best = min(range(len(values)), key=values.__getitem__)
        stars = [best] if marked is None or name in marked else []
        figure.add_scatter(
            x=_numbers(knob),
            y=_numbers(values),
            name=name,
            mode="lines+markers",
            line={"color": colour, "width": widths[index], "dash": _DASHES[index % len(_DASHES)]},
            marker={"size": 3.8 + widths[index], "color": colour},
            hovertemplate=f"{x}: %{{x:.3g}}<br>error %{{y:.3g}}<extra>{name}</extra>",
        )
        figure.add_scatter(
            x=[knob[i] for i in stars],
            y=[values[i] for i in stars],
            mode="markers",
            showlegend=False,
            cliponaxis=False,
            marker={"size": 15, "symbol": "star", "color": colour, "line": {"color": "white", "width": 1}},
            hoverinfo="skip",
        )
        for i in stars:  # a text of the trace would have no background, and lines run through it
            place = (f"{knob[i]:.3g}", f"{values[i]:.2g}")
            if place in labelled:
                continue
            labelled.add(place)
            above = _label_above(knob, curves, name, i, (high - low) / 264)
            figure.add_annotation(
                x=knob[i],
                y=math.log10(values[i]),
                text=f"{knob[i]:.2f}",
                font={"color": _INK, "size": 13},
                bgcolor="white",
                opacity=0.9,
                borderpad=0,
                showarrow=False,
                yanchor="bottom" if above else "top",
                yshift=9 if above else -9,
            )
    _layout(
        figure,
        title,
        x,
        y + " (log scale)",
        legend=_legend_above(),
        showlegend=True,
        margin={"l": 70, "r": 30, "t": 96, "b": 60},
    )
    return figure.update_yaxes(**axis)


def _label_above(knob: Sequence[float], curves: Mapping[str, Sequence[float]], name: str, at: int, pixel: float) -> bool:
    """Whether the number of the star at place ``at`` of a curve hides less of the curves above the star than below it, where
    it lies otherwise. ``pixel``: the decades that a pixel is high."""
    near = np.linspace(-20, 20, 9) * (max(knob) - min(knob)) / 520 + knob[at]  # as wide as a number on a page of 800 pixels
    order = np.argsort(knob)
    hidden = {-1: 0, 1: 0}
    for values in curves.values():
        line = np.interp(near, np.asarray(knob)[order], np.log10(np.asarray(values))[order]) - math.log10(curves[name][at])
        for side in hidden:
            hidden[side] += int(((9 * pixel < side * line) & (side * line < 27 * pixel)).sum())
    return hidden[1] < hidden[-1]


def attention_maps(exact: torch.Tensor, errors: Mapping[str, torch.Tensor], title: str) -> go.Figure:
    """Left: an attention map, who looks at whom. Beside it: how far other maps are off, all on one scale.

    ``exact`` and every error ``[T, T]``, queries down, keys across; shrunk by block maxima to at most 64 x 64. The colour of
    the errors ends at the first one's brightest 0.5 %.
    """
    panels = {"attention (probability)": exact, **errors}
    figure = make_subplots(rows=1, cols=len(panels), horizontal_spacing=0.07, subplot_titles=list(panels), shared_yaxes=True)
    top = 0.0
    for column, values in enumerate(panels.values(), 1):
        pooled, high, wide = pool_max(values, 64, 64)
        if column == 2:
            top = float(pooled[pooled > 0].quantile(0.995)) if bool((pooled > 0).any()) else 1e-6
        last = column == len(panels)
        figure.add_heatmap(
            z=pooled.numpy().round(4),
            x0=0,
            dx=wide,
            y0=0,
            dy=high,
            zmin=0,
            zmax=float(pooled.quantile(0.98)) if column == 1 else top,
            colorscale=SEQUENTIAL,
            showscale=last,
            colorbar=_colour_bar("|error|, probability"),
            hovertemplate="query %{y} looks at key %{x}: %{z:.3f}<extra></extra>",
            row=1,
            col=column,
        )
    _layout(figure, title, height=430, margin={"l": 70, "r": 30, "t": 100, "b": 60})
    figure.update_xaxes(title_text="key (position)", showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure.update_yaxes(title_text="query (position)", col=1).update_annotations(font_size=12)


def positions(rows: Mapping[str, torch.Tensor], group_size: int, title: str, y: str) -> go.Figure:
    """Channel magnitudes in the order in which they lie in memory, one panel per entry, groups told apart by colour.

    A loud channel among quiet ones spoils its group's resolution. Always two traces per panel.
    """
    figure = make_subplots(
        rows=len(rows), cols=1, shared_xaxes=True, vertical_spacing=0.3 / len(rows), subplot_titles=list(rows)
    )
    for index, values in enumerate(rows.values(), 1):
        place = torch.arange(len(values))
        for odd in (0, 1):
            mine = (place // group_size) % 2 == odd
            figure.add_bar(
                x=_numbers(place[mine]),
                y=_numbers(values[mine].clamp(min=1e-6)),
                width=1,
                name=f"groups of {group_size}: {('even', 'odd')[odd]}",
                legendgroup=str(odd),
                showlegend=index == 1,
                marker={"color": PALETTE[odd], "line": {"width": 0}},
                hovertemplate="place %{x}: %{y:.3g}<extra></extra>",
                row=index,
                col=1,
            )
        figure.update_yaxes(**_log_axis([values.clamp(min=1e-6)]), title_text=y, row=index, col=1)
    _layout(figure, title, height=150 + 190 * len(rows), bargap=0, legend=_legend_above() | {"y": 1.03})
    figure.update_layout(margin={"l": 70, "r": 30, "t": 100, "b": 60})
    figure.update_xaxes(title_text="place of the channel in memory", row=len(rows), col=1)
    return figure.update_annotations(font_size=13, x=0, xanchor="left")


def two_errors(table: pd.DataFrame, title: str) -> go.Figure:
    """Error of the weights against error of what they compute: one mark per layer, one colour and shape per method.

    ``table``: columns ``method``, ``layer``, ``weight_db``, ``output_db``. On the dashed line both are equal.
    """
    figure = go.Figure()
    low, high = float(table["weight_db"].min()) - 0.5, float(table["weight_db"].max()) + 0.5
    figure.add_scatter(
        x=[low, high], y=[low, high], mode="lines", name="equal", line={"color": _MUTED, "dash": "dash"}, hoverinfo="skip"
    )
    for index, method in enumerate(dict.fromkeys(table["method"])):
        part = table[table["method"] == method]
        figure.add_scatter(
            x=_numbers(part["weight_db"].to_list()),
            y=_numbers(part["output_db"].to_list()),
            customdata=part["layer"].to_list(),
            mode="markers",
            name=method,
            marker={"size": 11, "symbol": _SYMBOLS[index % len(_SYMBOLS)], "color": PALETTE[index % len(PALETTE)]},
            hovertemplate="layer %{customdata}<br>weights %{x:.1f} dB, output %{y:.1f} dB<extra>%{fullData.name}</extra>",
        )
    return _layout(
        figure, title, "SQNR of the weights (dB, higher is better)", "SQNR of the output (dB)",
        legend=_legend_above(), margin={"l": 70, "r": 30, "t": 96, "b": 60},
    )  # fmt: skip


def recipe_result(reports: Mapping[str, pd.Series], perplexities: Mapping[str, float], title: str) -> go.Figure:
    """Left: output SQNR of every layer, one line per recipe. Right: the perplexity of each, and the exact model's as a line.

    ``reports``: recipe -> SQNR in dB by layer. ``perplexities``: the same names, and ``fp16``.
    """
    figure = make_subplots(
        rows=1,
        cols=2,
        column_widths=[0.58, 0.42],
        horizontal_spacing=0.14,
        subplot_titles=("layer by layer", "the whole model"),
    )
    for index, (name, values) in enumerate(reports.items()):
        colour = PALETTE[(1, 0, 2)[index % 3]]
        figure.add_scatter(
            x=[int(layer) for layer in values.index],
            y=_numbers(values.to_list()),
            name=name,
            mode="lines+markers",
            line={"color": colour, "width": 2.4, "dash": _DASHES[(1, 0, 2)[index % 3]]},
            marker={"size": 9, "symbol": _SYMBOLS[index]},
            hovertemplate="layer %{x}: %{y:.2f} dB<extra>%{fullData.name}</extra>",
            row=1,
            col=1,
        )
    names = list(reports)
    values_ = [perplexities[name] for name in names]
    figure.add_bar(
        x=[name.replace(" ", "<br>", 1) for name in names],
        y=_numbers(values_),
        text=[f"{v:.2f}" for v in values_],
        textposition="outside",
        cliponaxis=False,
        showlegend=False,
        marker={"color": [PALETTE[(1, 0, 2)[i % 3]] for i in range(len(names))]},
        hovertemplate="%{x}: perplexity %{y:.2f}<extra></extra>",
        row=1,
        col=2,
    )
    exact = perplexities["fp16"]
    figure.add_hline(y=exact, line={"dash": "dash", "color": _INK, "width": 1.5}, row=1, col=2)
    span = max([*values_, exact]) - min([*values_, exact])
    base = exact - max(0.35 * span, 0.2)
    figure.update_yaxes(
        title_text=f"perplexity (dashed: fp16, {exact:.2f})", range=[base, max(values_) + 0.2 * span + 0.2], row=1, col=2
    )
    figure.update_xaxes(title_text="layer (index)", dtick=1, row=1, col=1)
    figure.update_xaxes(title_text="recipe", showgrid=False, row=1, col=2)
    figure.update_yaxes(title_text="output SQNR (dB, higher is better)", row=1, col=1)
    _layout(figure, title, legend=_legend_above() | {"x": 0.5, "y": 1.1}, margin={"l": 70, "r": 30, "t": 110, "b": 60})
    return figure.update_annotations(font_size=12)


def against(draws: pd.DataFrame, reference: str, title: str) -> go.Figure:
    """What methods lose, as a multiple of what ``reference`` loses: one panel per model (down) and text (across).

    ``draws``: columns ``draw``, ``method``, ``model``, ``text`` and ``gap`` (positive), every method once per draw of the
    calibration text. Small rings are single draws, each compared with the reference's loss on the same draw; large marks are
    their (geometric) means, with bands of twice the standard error. A method whose band leaves out 1 loses clearly less or
    clearly more; the others cannot be told apart from the reference. Four traces per panel, and three for the legend.
    Methods that failed (``gap`` is NaN) in any draw are left out; ValueError is raised where ``reference`` is one.
    """
    failed = set(draws.loc[draws["gap"].isna(), "method"])
    if reference in failed:
        raise ValueError(f"reference: {reference!r} failed in some draw, so nothing can be compared with it")
    draws = draws[~draws["method"].isin(failed)]
    models, texts, methods = (list(dict.fromkeys(draws[name])) for name in ("model", "text", "method"))
    kinds = {
        "loses clearly less": (PALETTE[2], "circle"),
        "cannot be told apart": (_MUTED, "diamond-open"),
        "loses clearly more": (PALETTE[1], "square"),
    }
    titles = [f"{model} model, {text}" for model in models for text in texts]
    figure = make_subplots(
        rows=len(models), cols=len(texts), shared_xaxes=True, shared_yaxes=True, subplot_titles=titles,
        horizontal_spacing=0.04, vertical_spacing=0.12,
    )  # fmt: skip
    drawn: list[float] = []
    for panel, (model, text) in enumerate((model, text) for model in models for text in texts):
        place = {"row": panel // len(texts) + 1, "col": panel % len(texts) + 1}
        here = draws[(draws["model"] == model) & (draws["text"] == text)].pivot(index="draw", columns="method", values="gap")
        logs = here[methods].div(here[reference], axis=0).map(math.log)
        mean, band = logs.mean(), 2 * logs.std() / len(logs) ** 0.5
        kind = pd.Series("cannot be told apart", methods)
        kind[mean < -band], kind[mean > band] = "loses clearly less", "loses clearly more"
        rings = logs.drop(columns=reference).map(math.exp).melt(var_name="method", value_name="times")
        figure.add_scatter(
            x=_numbers(rings["times"].to_list()),
            y=rings["method"].to_list(),
            mode="markers",
            name="one calibration sample",
            legendgroup="rings",
            showlegend=panel == 0,
            marker={"size": 6, "symbol": "circle-open", "color": _MUTED},
            hovertemplate="%{y}: %{x:.2f} times<extra>one calibration sample</extra>",
            **place,
        )
        for name, (colour, symbol) in kinds.items():
            mine = kind.index[kind == name]
            centre, low, high = (part[mine].map(math.exp) for part in (mean, mean - band, mean + band))
            drawn += [*low, *high, *rings["times"]]
            figure.add_scatter(
                x=_numbers(centre.to_list()),
                y=list(mine),
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": _numbers((high - centre).to_list()),
                    "arrayminus": _numbers((centre - low).to_list()),
                    "thickness": 3,
                    "width": 0,
                },
                mode="markers",
                name=name,
                legendgroup=name,
                showlegend=False,
                marker={"size": 11, "symbol": symbol, "color": colour, "line": {"width": 2 if "open" in symbol else 0}},
                hovertemplate=f"%{{y}}: %{{x:.2f}} times what {reference} loses<extra>{name}</extra>",
                **place,
            )
    for name, (colour, symbol) in kinds.items():  # a panel may lack a kind, the legend has all of them
        figure.add_scatter(
            x=[None], y=[methods[0]], mode="markers", name=name, legendgroup=name,
            marker={"size": 11, "symbol": symbol, "color": colour},
        )  # fmt: skip
    figure.add_vline(x=1, line={"color": _INK, "width": 1, "dash": "dot"})
    figure.update_xaxes(**_log_axis([torch.tensor(drawn, dtype=torch.float64)]))
    figure.update_xaxes(title_text=f"times the loss of {reference}<br>(log scale)", row=len(models))
    figure.update_yaxes(categoryorder="array", categoryarray=methods, range=[len(methods) - 0.5, -0.5])
    below = {"orientation": "h", "x": 0, "xanchor": "left", "y": 0, "yref": "container", "yanchor": "bottom"}
    _layout(
        figure, title, height=208 + 34 * len(methods) * len(models), legend=below, showlegend=True,
        margin={"l": 70, "r": 30, "t": 84, "b": 128},
    )  # fmt: skip
    return figure.update_yaxes(title_text="method", col=1).update_annotations(font_size=12)
