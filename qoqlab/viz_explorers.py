"""Pictures of the explorers: a tensor on its grid and the error it makes, and a recipe's layers stage by stage."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from .viz import PALETTE, SEQUENTIAL, _colour_bar, _layout, _legend_above, _numbers, pool_max

#: Bins of the histogram, and grid points beyond which lines would only paint the panel.
BINS, MOST_LINES = 60, 64


def grid_and_error(values: torch.Tensor, points: torch.Tensor, error: torch.Tensor, title: str) -> go.Figure:
    """Left: a histogram of ``values`` (those that share one scale) with the ``points`` they can be rounded to. Right: the
    error ``[rows, columns]`` of the whole tensor, shrunk by block maxima.

    Always three traces. More than 64 points are thinned for drawing.
    """
    figure = make_subplots(
        rows=1, cols=2, horizontal_spacing=0.14, subplot_titles=("values that share a scale, and their grid", "error")
    )
    values = values.detach().float().flatten()
    low, high = float(values.min()), float(values.max())
    counts = torch.histc(values, BINS, low, high)
    width = max((high - low) / BINS, 1e-12)
    figure.add_bar(
        x=_numbers(low + width * (torch.arange(BINS) + 0.5)),
        y=_numbers(counts),
        width=width,
        name="values",
        marker={"color": PALETTE[5], "line": {"width": 0}},
        hovertemplate="around %{x:.3g}: %{y} values<extra></extra>",
        row=1,
        col=1,
    )
    points = points.detach().double().flatten().unique()
    points = points[:: -(-len(points) // MOST_LINES)]
    top = float(counts.max())
    figure.add_scatter(
        x=_numbers(torch.stack([points, points, torch.full_like(points, float("nan"))], 1)),
        y=_numbers(torch.tensor([0.0, top, float("nan")], dtype=torch.float64).repeat(len(points))),
        mode="lines",
        name="representable",
        line={"color": PALETTE[1], "width": 1.2},
        opacity=0.7,
        hovertemplate="grid point %{x:.3g}<extra></extra>",
        row=1,
        col=1,
    )
    pooled, tall, wide = pool_max(error, 48, 96)
    figure.add_heatmap(
        z=pooled.numpy().round(6),
        x0=0,
        dx=wide,
        y0=0,
        dy=tall,
        zmin=0,
        zmax=max(float(pooled.quantile(0.99)), 1e-9),
        colorscale=SEQUENTIAL,
        colorbar=_colour_bar("largest |error|"),
        hovertemplate="row %{y}, column %{x}: %{z:.3g}<extra></extra>",
        row=1,
        col=2,
    )
    _layout(
        figure, title, bargap=0, legend=_legend_above() | {"x": 0.43, "y": 1.1}, margin={"l": 70, "r": 30, "t": 110, "b": 60}
    )
    figure.update_xaxes(title_text="value", row=1, col=1)
    figure.update_yaxes(title_text="values per bin (count)", row=1, col=1)
    figure.update_xaxes(title_text="column (index)", row=1, col=2)
    figure.update_yaxes(title_text="row (index)", autorange="reversed", row=1, col=2)
    return figure.update_annotations(font_size=12)


def stage_map(report: pd.DataFrame, title: str) -> go.Figure:
    """Output SQNR of every layer (down) after every stage (across), written into the cells; lighter is better.

    ``report`` as `QuantizedModel.report`, stages in order of appearance. Always one trace.
    """
    table = report.pivot_table(index="layer", columns="stage", values="output_sqnr_db", sort=False)
    figure = go.Figure(
        go.Heatmap(
            z=table.to_numpy(dtype="float32"),
            x=[str(stage).replace("_", " ").replace(" ", "<br>", 1) for stage in table.columns],
            y=[str(layer) for layer in table.index],
            texttemplate="%{z:.1f}",
            colorscale=SEQUENTIAL,
            zmin=5,
            zmax=25,
            colorbar=_colour_bar("output SQNR (dB, higher is better)"),
            hovertemplate="layer %{y}, after %{x}: %{z:.2f} dB<extra></extra>",
        )
    )
    _layout(figure, title, "after the stage", "layer (index)")
    return figure.update_yaxes(type="category", autorange="reversed", showgrid=False).update_xaxes(showgrid=False)


def next_tokens(table: pd.DataFrame, title: str) -> go.Figure:
    """What models expect next: one group of bars per token, one colour per model.

    ``table``: columns ``token`` (as shown, in order), ``model`` and ``probability``. As many traces as models.
    """
    figure = go.Figure()
    for index, model in enumerate(dict.fromkeys(table["model"])):
        part = table[table["model"] == model]
        figure.add_bar(
            x=_numbers([100 * float(p) for p in part["probability"]]),
            y=part["token"].to_list(),
            orientation="h",
            name=model,
            marker={"color": PALETTE[index % len(PALETTE)]},
            hovertemplate=f"%{{y}}, {model}: %{{x:.1f}} %<extra></extra>",
        )
    _layout(figure, title, "probability (%)", "next token", barmode="group", legend=_legend_above(), height=440)
    return figure.update_yaxes(autorange="reversed", showgrid=False)
