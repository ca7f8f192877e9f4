"""Pictures: a tensor or a table in, a plotly Figure out. Nothing here is shown, printed or saved, and no maths happens
beyond layout (pooling for display, ranking, logarithms).

Every figure carries `TEMPLATE`, set on the figure itself, so importing this module changes no global plotting state.
"""
# ruff: noqa: E402  (one line has to run before plotly is imported)

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import cast

# jsonschema imports this package in every process that displays a plotly figure; it costs two seconds of CPU and serves one
# string format ("iri") that no figure uses. A None entry makes jsonschema skip that check. Remove once jsonschema is lazy.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch.nn import functional

#: Okabe and Ito's palette: eight colours that stay apart under every common colour blindness. Yellow is left out (too pale).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
#: Sequential scale of all maps: even in lightness, the same to colour-blind eyes.
SEQUENTIAL = "Cividis"
_INK, _MUTED, _GRID = "#1f2933", "#7b8794", "#e4e7eb"

_AXIS = {
    "showgrid": True,
    "gridcolor": _GRID,
    "linecolor": _MUTED,
    "showline": True,
    "ticks": "outside",
    "tickcolor": _MUTED,
    "zeroline": False,
    "automargin": True,
    "title": {"standoff": 8, "font": {"size": 13}},
}
#: The look of every figure; small on purpose, since a notebook stores it with each of them.
TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif", "size": 13, "color": _INK},
        # at the figure's edge, not the plot's: beside long names on the left a title would have half the width
        "title": {"x": 0.012, "xref": "container", "xanchor": "left", "y": 0.965, "yanchor": "top", "font": {"size": 16}},
        "colorway": list(PALETTE),
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "legend": {"bgcolor": "rgba(255,255,255,0.85)", "font": {"size": 12}},
        "margin": {"l": 70, "r": 30, "t": 72, "b": 60},
        "hovermode": "closest",
    }
)
HEIGHT = 420
#: Longest line of a title, in characters: what fits into a page of 800 pixels.
TITLE_WIDTH = 76
#: Largest number of rows and columns that a map keeps; more than a laptop screen can tell apart only makes files heavy.
MAP_ROWS, MAP_COLUMNS = 64, 192


def _layout(figure: go.Figure, title: str, x: str = "", y: str = "", **more: object) -> go.Figure:
    """Apply the template, the title and the axis titles. JupyterLab ignores a template's height, so the figure has it.

    A long title takes two lines, and the figure grows by the second one.
    """
    given = {"template": TEMPLATE, "title_text": title, "height": HEIGHT, "autosize": True, **more}
    if len(title) > TITLE_WIDTH and "<br>" not in title:
        title = "<br>".join(textwrap.wrap(title, max(TITLE_WIDTH // 2, len(title) // 2 + 8)))  # lines of a length
    if "<br>" in title:
        margin = {**TEMPLATE.layout.margin.to_plotly_json(), **cast(dict[str, int], given.get("margin", {}))}
        # a fraction of the height would cut the first line of a low figure
        given |= {"title_text": title, "title_y": 1, "title_pad_t": 26, "height": cast(int, given["height"]) + 20}
        given["margin"] = margin | {"t": margin["t"] + 20}
    figure.update_layout(**given)
    if x:
        figure.update_xaxes(title_text=x)
    if y:
        figure.update_yaxes(title_text=y)
    return figure


def _numbers(values: torch.Tensor | Sequence[float]) -> np.ndarray:
    """fp32 array, which plotly stores in a third of the space of a list of numbers."""
    return torch.as_tensor(values).detach().float().flatten().numpy()


def pool_max(x: torch.Tensor, rows: int = MAP_ROWS, columns: int = MAP_COLUMNS) -> tuple[torch.Tensor, int, int]:
    """Shrink ``|x| [R, C]`` to at most ``rows x columns`` by keeping every block's maximum, so that no outlier vanishes.

    Returns the map and how many rows and columns of ``x`` one cell stands for.

    >>> pool_max(torch.tensor([[1.0, -9.0, 2.0, 3.0]]), columns=2)[0].tolist()
    [[9.0, 3.0]]
    """
    if x.ndim != 2 or x.numel() == 0:
        raise ValueError(f"x: expected a non-empty matrix [rows, columns], got shape {list(x.shape)}")
    high, wide = -(-x.shape[0] // rows), -(-x.shape[1] // columns)
    pooled = functional.max_pool2d(x.detach().float().abs()[None], (high, wide), ceil_mode=True)[0]
    return pooled, high, wide


def _colour_bar(title: str) -> dict[str, object]:
    """The colour bar of every map, its title as large as an axis's."""
    return {"title": {"text": title, "side": "right", "font": {"size": 12}}, "thickness": 12, "outlinewidth": 0}


def _heat(x: torch.Tensor, log: bool) -> tuple[go.Heatmap, int, int]:
    """Heat map trace of ``|x|`` with a robust colour range: the brightest 1 % share one colour, the hover has the value."""
    pooled, high, wide = pool_max(x)
    z = pooled.clamp(min=1e-12).log10() if log else pooled
    low, top = (float(z.quantile(0.02)), float(z.max())) if log else (0.0, float(z.quantile(0.99)))
    bar = _colour_bar("largest |x|")
    if log:
        ticks = [t for t in range(-6, 7) if low <= t <= top]
        ticks = ticks if len(ticks) > 1 else _spread(low, top)  # type: ignore[assignment]
        bar |= {"tickvals": ticks, "ticktext": [f"{10**t:.3g}" for t in ticks]}
    trace = go.Heatmap(
        z=z.numpy().round(4),
        x0=0,
        dx=wide,
        y0=0,
        dy=high,
        zmin=low,
        zmax=max(top, low + 1e-6),
        colorscale=SEQUENTIAL,
        colorbar=bar,
        hovertemplate="token %{y}<br>channel %{x}<br>" + ("10^%{z:.2f}" if log else "|x| = %{z:.3g}") + "<extra></extra>",
    )
    return trace, high, wide


def _log_axis(values: Sequence[torch.Tensor], room: int = 6) -> dict[str, object]:
    """A log axis over the positive ``values`` with ticks at 1, 2, 5, 10, ..., or 1, 3, 10, ..., or powers of ten: the first
    of these of which no more than ``room`` fall on the axis."""
    flat = torch.cat([v.detach().double().flatten() for v in values])
    flat = flat[flat > 0]
    low, high = (float(flat.min()), float(flat.max())) if len(flat) else (0.1, 10.0)
    span = max(math.log10(high / low), 0.1)
    ends = math.log10(low) - 0.05 * span, math.log10(high) + 0.07 * span
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [digit * 10.0**decade for decade in decades for digit in digits]
        if sum(ends[0] <= math.log10(tick) <= ends[1] for tick in ticks) <= room:
            break
    return {
        "type": "log",
        "range": list(ends),
        "tickvals": ticks,
        "ticktext": [_tick(t) for t in ticks],
        "tickangle": 0,
    }


def _tick(value: float) -> str:
    """The name of a tick on a log axis.

    >>> _tick(0.003), _tick(3e-5)
    ('0.003', '3·10<sup>-5</sup>')
    """
    if 1e-4 <= value < 1e6:
        return f"{value:g}"
    digit, power = f"{value:.0e}".split("e")
    return ("" if digit == "1" else f"{digit}·") + f"10<sup>{int(power)}</sup>"


def _widths(lines: Sequence[Mapping[float, float]], width: float) -> list[float]:
    """A width for every line (x -> y), drawn in this order: a line that later ones cover along nine tenths of its way is
    wider by three pixels for each of those, so that it is seen beneath them."""
    widths = [width] * len(lines)
    for index, line in enumerate(lines):
        for other in lines[index + 1 :]:
            close = [abs(y - other[x]) <= 0.01 * abs(y) for x, y in line.items() if x in other]
            widths[index] += 3 * (len(close) > 0 and sum(close) >= 0.9 * len(line))
    return widths


def _spread(low: float, high: float, count: int = 4) -> list[float]:
    return [low + (high - low) * i / (count - 1) for i in range(count)]


# --- outliers -------------------------------------------------------------------------------------------------------------


def outlier_map(x: torch.Tensor, title: str, log: bool = False) -> go.Figure:
    """Heat map of magnitudes, tokens down, channels across: a fixed outlier channel is a bright vertical line.

    ``x [T, K]``. Shrunk for display by block maxima. On the linear scale the brightest 1 % of the cells share one colour,
    so that a single outlier does not black out the rest; on the log scale nothing is cut.
    """
    trace, high, wide = _heat(x, log)
    cell = "" if high * wide == 1 else f" (a cell: the largest of {high} x {wide})"
    return _layout(go.Figure(trace), title, f"channel (index){cell}", "token (position)", yaxis_autorange="reversed")


def outlier_surface(x: torch.Tensor, title: str) -> go.Figure:
    """The same magnitudes as a landscape to turn around: an outlier channel is a ridge, an outlier token a wall.

    ``x [T, K]``, shrunk by block maxima to at most 48 x 128 points.
    """
    pooled, high, wide = pool_max(x, 48, 128)
    surface = go.Surface(
        z=pooled.numpy().round(4),
        x=list(range(0, x.shape[1], wide)),
        y=list(range(0, x.shape[0], high)),
        colorscale=SEQUENTIAL,
        colorbar=_colour_bar("magnitude |x|") | {"len": 0.7},
        hovertemplate="channel %{x}<br>token %{y}<br>|x| = %{z:.3g}<extra></extra>",
    )
    figure = _layout(go.Figure(surface), title, height=520, margin={"l": 10, "r": 10, "t": 72, "b": 10})
    return figure.update_scenes(
        xaxis_title="channel (index)",
        yaxis_title="token (position)",
        zaxis_title="|x|",  # short: on a page of 800 pixels a longer title runs into that of the tokens
        aspectmode="manual",
        aspectratio={"x": 1.6, "y": 0.9, "z": 0.7},
        # far enough away that no axis title is cut off on a page of 800 pixels
        camera={"eye": {"x": -1.3, "y": -1.95, "z": 1.1}, "center": {"x": 0.02, "y": 0, "z": -0.2}},
    )


def channel_profile(
    profiles: Mapping[str, torch.Tensor],
    title: str,
    log: bool = True,
    ranked: bool = False,
    y: str = "largest |x| over all tokens",
) -> go.Figure:
    """Largest magnitude of every channel, one line per entry of ``profiles`` (name -> ``[K]``).

    By channel index, where the same spike in every line means a fixed channel; or ``ranked`` from largest to smallest,
    where a cliff at the left is what a quantiser has to pay for. ``y`` names the magnitude if it is another one.
    """
    figure = go.Figure()
    for index, (name, values) in enumerate(profiles.items()):
        values = values.detach().float().flatten()
        values = values.sort(descending=True).values if ranked else values
        figure.add_scatter(
            y=_numbers(values.clamp(min=1e-12) if log else values),
            name=name,
            mode="lines",
            line={"width": 1.6, "color": PALETTE[index % len(PALETTE)]},
            hovertemplate=f"{name}<br>channel %{{x}}<br>largest |x| = %{{y:.3g}}<extra></extra>",
        )
    axis = "channel, by rank (largest first)" if ranked else "channel (index)"
    _layout(figure, title, axis, y + (" (log scale)" if log else ""), showlegend=True)
    return figure.update_yaxes(**_log_axis(list(profiles.values()))) if log else figure


def key_strips(keys: torch.Tensor, title: str = "Keys: largest magnitude of every channel, head by head") -> go.Figure:
    """One strip of bars per head; a colour for each half; RoPE turns channel ``i`` together with ``i + D / 2``.

    ``keys [H, T, D]`` (after RoPE; or values, to compare). The dashed line is the head's median channel. The largest channel
    and its RoPE partner are labelled.
    """
    if keys.ndim != 3:
        raise ValueError(f"keys: expected [heads, tokens, head_dim], got shape {list(keys.shape)}")
    largest = keys.detach().float().abs().amax(1)  # [H, D]
    heads, width = largest.shape
    figure = make_subplots(rows=heads, cols=1, shared_xaxes=True, vertical_spacing=0.09)
    for head in range(heads):
        values = largest[head]
        top = int(values.argmax())
        partner = (top + width // 2) % width
        for half, name in enumerate(("first half: i", "second half: i + D/2")):
            figure.add_bar(
                x0=half * width // 2,
                y=_numbers(values.chunk(2)[half]),
                name=name,
                legendgroup=name,
                showlegend=head == 0,
                marker={"color": PALETTE[half], "line": {"width": 0}},
                hovertemplate=f"head {head}<br>channel %{{x}}<br>largest |x| = %{{y:.3g}}<extra></extra>",
                row=head + 1,
                col=1,
            )
        figure.add_hline(y=float(values.median()), line={"dash": "dash", "width": 1.5, "color": _INK}, row=head + 1, col=1)
        around = [
            float(v.max()) if len(v) else 0.0 for v in (values[max(0, partner - 12) : partner], values[partner + 1 :][:12])
        ]
        crowded = max(around) > float(values[partner])
        away = "center" if not crowded else "left" if around[0] > around[1] else "right"  # a label lies on no taller bar
        if partner < width // 10 or partner >= width - width // 10:  # nor does it leave the plot
            away = "left" if partner < width // 2 else "right"
        for channel, text, lift, side in ((top, f"{top}", 10, "center"), (partner, f"{partner} (partner)", 26, away)):
            figure.add_annotation(
                x=channel,
                y=float(values[channel]),
                text=text,
                xanchor=side,
                ax=0,
                ay=-lift,
                arrowhead=0,
                arrowwidth=1,
                arrowcolor=_INK,
                bgcolor="white",
                borderpad=0,
                row=head + 1,
                col=1,
            )
        figure.update_yaxes(title_text=f"head {head}<br>largest |x|", row=head + 1, col=1)
        figure.update_yaxes(range=[0, 1.18 * float(values.max())], row=head + 1, col=1)
    _layout(figure, title, height=150 + 170 * heads, bargap=0.15, legend=_legend_above())
    return figure.update_xaxes(title_text="channel within the head (index)", row=heads, col=1)


def _legend_above() -> dict[str, object]:
    return {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.0, "yanchor": "bottom"}


def outlier_ratios(measured: Mapping[str, pd.DataFrame], title: str) -> go.Figure:
    """Largest channel over median channel, one dot per layer and site, models side by side, logarithmic.

    ``measured``: model name -> table of `outliers.measure`. At 1 all channels are alike; at 10 the median channel gets a
    tenth of the levels.
    """
    figure = go.Figure()
    for index, (name, table) in enumerate(measured.items()):
        figure.add_scatter(
            x=table["site"].to_list(),
            y=_numbers(table["ratio"].to_list()),
            customdata=table["layer"].to_list(),
            name=name,
            mode="markers",
            marker={"size": 11, "symbol": index, "opacity": 0.75, "color": PALETTE[index % len(PALETTE)]},
            hovertemplate="layer %{customdata}, %{x}: %{y:.3g}<extra>%{fullData.name}</extra>",
        )
    _layout(figure, title, "site (what is quantised there)", "largest / median channel (ratio, log scale)")
    figure.update_layout(scattermode="group", showlegend=True, legend=_legend_above())
    return figure.update_yaxes(**_log_axis([torch.tensor(t["ratio"].to_list()) for t in measured.values()]))


# --- grids ----------------------------------------------------------------------------------------------------------------


def histogram_with_grid(
    values: torch.Tensor, grid_points: torch.Tensor, title: str, x: str = "value (units of the tensor)", bins: int = 80
) -> go.Figure:
    """Histogram of ``values`` with one vertical line per value that the quantiser can represent (``grid_points``).

    Lines far apart where the values crowd are wasted bits.
    """
    values = values.detach().float().flatten()
    low, high = float(values.min()), float(values.max())
    counts = torch.histc(values, bins, low, high)
    width = (high - low) / bins
    figure = go.Figure()
    figure.add_bar(
        x=_numbers(low + width * (torch.arange(bins) + 0.5)),
        y=[int(c) for c in counts],
        width=width,
        name="values",
        marker={"color": PALETTE[5], "line": {"width": 0}},
        hovertemplate="around %{x:.3g}: %{y} values<extra></extra>",
    )
    points = grid_points.detach().double().flatten().unique()
    lines_x: list[float | None] = []
    lines_y: list[float | None] = []
    for point in _numbers(points):
        lines_x += [point, point, None]
        lines_y += [0, float(counts.max()), None]
    figure.add_scatter(
        x=lines_x,
        y=lines_y,
        mode="lines",
        name=f"representable ({len(points)} values)",
        line={"color": PALETTE[1], "width": 1.2},
        opacity=0.7,
        hovertemplate="grid point %{x:.3g}<extra></extra>",
    )
    return _layout(figure, title, x, "count (values per bin)", legend=_legend_above(), bargap=0)


def grid_lines(grids: Mapping[str, torch.Tensor], title: str, x: str = "value") -> go.Figure:
    """The representable values of several grids under each other, one row of ticks per entry (name -> points)."""
    figure = go.Figure()
    for index, (name, points) in enumerate(grids.items()):
        ordered = _numbers(points.double().flatten().unique())
        figure.add_scatter(
            x=ordered,
            y=[f"{name}<br>({len(ordered)} values)"] * len(ordered),
            mode="markers",
            showlegend=False,
            marker={
                "symbol": "line-ns",
                "size": 22,
                "line": {"width": 1.6, "color": PALETTE[index % len(PALETTE)]},
            },
            hovertemplate=f"{name}: %{{x:.4g}}<extra></extra>",
        )
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return _layout(figure, title, x, "grid", height=150 + 70 * len(grids))


def staircase(values: torch.Tensor, decoded: torch.Tensor, title: str, codes: torch.Tensor | None = None) -> go.Figure:
    """What goes in against what comes back: the closer the stairs hug the diagonal, the smaller the error.

    ``values`` and ``decoded`` of one shape; ``codes`` are shown on hovering.
    """
    values, decoded = values.detach().flatten(), decoded.detach().flatten()
    order = values.argsort()
    sorted_values, sorted_decoded = values[order], decoded[order]
    ends = [float(sorted_values[0]), float(sorted_values[-1])]
    figure = go.Figure()
    figure.add_scatter(
        x=ends, y=ends, mode="lines", name="no error", line={"color": _MUTED, "dash": "dash", "width": 1.5}, hoverinfo="skip"
    )
    figure.add_scatter(
        x=_numbers(sorted_values),
        y=_numbers(sorted_decoded),
        mode="lines+markers",
        name="decoded",
        line={"color": PALETTE[0], "width": 1.6, "shape": "hvh"},
        marker={"size": 6},
        customdata=None if codes is None else [int(c) for c in codes.flatten()[order]],
        hovertemplate="%{x:.4g} -> %{y:.4g}" + ("" if codes is None else " (code %{customdata})") + "<extra></extra>",
    )
    return _layout(figure, title, "value before quantisation", "value after dequantisation", legend=_legend_above())


def overflow_counts(counts: Mapping[int, int], title: str = "How wide may the first level be?") -> go.Figure:
    """Number of group extremes that can leave INT8, for each limit of the first level; the first bar above 0 ends it."""
    figure = go.Figure(
        go.Bar(
            x=list(counts),
            y=list(counts.values()),
            text=[str(c) for c in counts.values()],
            textposition="outside",
            cliponaxis=False,
            marker={"color": [PALETTE[2] if c == 0 else PALETTE[1] for c in counts.values()]},
            hovertemplate="limit %{x}: %{y} overflowing cases<extra></extra>",
        )
    )
    figure.update_xaxes(dtick=1, showgrid=False)
    figure.update_yaxes(range=[0, 1.15 * max([1, *counts.values()])])
    return _layout(figure, title, "limit of the first level (INT8 units)", "overflowing cases (count)", showlegend=False)


def group_size_curve(table: pd.DataFrame, title: str = "Smaller groups: less error, more bits") -> go.Figure:
    """Error against storage: one point per row of ``table``, joined in order.

    Columns: ``label`` (group size), ``bits`` (bits per weight, scales and zeros included), ``sqnr_db``; an optional
    ``kind`` splits the points into several lines.
    """
    figure = go.Figure()
    kinds = list(dict.fromkeys(table["kind"])) if "kind" in table else [""]
    for index, kind in enumerate(kinds):
        part = table[table["kind"] == kind] if kind else table
        figure.add_scatter(
            x=_numbers(part["bits"].to_list()),
            y=_numbers(part["sqnr_db"].to_list()),
            text=[str(label) for label in part["label"]],
            mode="lines+markers+text",
            textposition="top center" if index == 0 else "bottom center",
            name=kind,
            showlegend=len(kinds) > 1,
            cliponaxis=False,
            line={"color": PALETTE[index % len(PALETTE)], "width": 2},
            marker={"size": 9},
            hovertemplate="%{text}<br>%{x:.3f} bits per weight<br>%{y:.2f} dB<extra></extra>",
        )
    low, high = float(table["sqnr_db"].min()), float(table["sqnr_db"].max())
    figure.update_yaxes(range=[low - 0.2 * (high - low) - 0.1, high + 0.25 * (high - low) + 0.1])
    return _layout(
        figure, title, "storage (bits per weight, scales included)", "weight SQNR (dB, higher is better)",
        legend=_legend_above(),
    )  # fmt: skip


# --- recipes --------------------------------------------------------------------------------------------------------------


def error_by_layer(report: pd.DataFrame, title: str = "Output SQNR of every layer, stage by stage") -> go.Figure:
    """One line per stage over the layers; the higher the line, the closer the quantised layer is to the exact one.

    ``report``: columns ``stage``, ``layer``, ``weight_mse``, ``weight_nmse``, ``output_sqnr_db``, ``seconds``, as in
    `pipeline.QuantizedModel.report`.
    """
    figure = go.Figure()
    parts = {stage: report[report["stage"] == stage].sort_values("layer") for stage in dict.fromkeys(report["stage"])}
    widths = _widths([dict(zip(part["layer"], part["output_sqnr_db"], strict=True)) for part in parts.values()], 2)
    for index, (stage, part) in enumerate(parts.items()):
        figure.add_scatter(
            x=part["layer"].to_list(),
            y=_numbers(part["output_sqnr_db"].to_list()),
            customdata=[float(f"{v:.3g}") for v in part["weight_nmse"]],
            name=stage.replace("_", " "),
            mode="lines+markers",
            line={"color": PALETTE[index % len(PALETTE)], "width": widths[index], "dash": "solid" if index else "dot"},
            marker={"size": 6 + widths[index], "symbol": index},
            hovertemplate="layer %{x}: %{y:.2f} dB<br>relative weight error %{customdata}<extra>%{fullData.name}</extra>",
        )
    _layout(figure, title, "layer (index)", "output SQNR (dB, higher is better)", showlegend=True)
    figure.update_layout(legend={"title": {"text": "after the stage"}})
    layers = int(report["layer"].max()) + 1 if len(report) else 1
    return figure.update_xaxes(dtick=1 if layers <= 16 else None)


def waterfall(report: pd.DataFrame, title: str = "What each stage changes, averaged over the layers") -> go.Figure:
    """Gain or loss of every stage in output SQNR (dB), from the first row's state to the finished model.

    ``report`` as for `error_by_layer`; stages in order of appearance.
    """
    mean = report.groupby("stage", sort=False)["output_sqnr_db"].mean()
    steps = [float(v) for v in (mean.iloc[0], *mean.diff().iloc[1:], mean.iloc[-1])]
    names = [*[s.replace("_", " ").replace(" ", "<br>", 1) for s in mean.index], "finished"]
    last = len(steps) - 1
    figure = go.Figure(
        go.Waterfall(
            x=names,
            y=_numbers(steps),
            measure=["absolute", *["relative"] * (last - 1), "total"],
            text=[f"{v:.1f}" if i in (0, last) else f"{v:+.1f}" for i, v in enumerate(steps)],
            textposition="outside",
            cliponaxis=False,
            connector={"line": {"color": _MUTED, "width": 1}},
            increasing={"marker": {"color": PALETTE[2]}},
            decreasing={"marker": {"color": PALETTE[1]}},
            totals={"marker": {"color": PALETTE[0]}},
            hovertemplate="%{x}: %{text} dB<extra></extra>",
        )
    )
    low, high = float(mean.min()), float(mean.max())
    figure.update_xaxes(tickangle=0, tickfont={"size": 12})
    figure.update_yaxes(range=[max(0.0, low - 0.6 * (high - low) - 1), high + 0.2 * (high - low) + 0.5])
    return _layout(figure, title, "stage", "mean output SQNR (dB)", showlegend=False)


def ladder(table: pd.DataFrame, title: str = "Perplexity, rung by rung") -> go.Figure:
    """Perplexity after every rung of a ladder of recipes, one panel per model: the shorter the arm, the better.

    ``table``: columns ``step`` (name of the rung, in order), ``perplexity``, ``change`` (against the rung before),
    ``model`` and ``fp16`` (that model's reference, the dashed line that the arms start from).
    """
    models, steps = list(dict.fromkeys(table["model"])), list(dict.fromkeys(table["step"]))
    figure = make_subplots(rows=1, cols=len(models), shared_yaxes=True, horizontal_spacing=0.05)
    log = bool((table["perplexity"] > 5 * table["fp16"]).any())
    measure = "perplexity (log scale)" if log else "perplexity"
    for column, model in enumerate(models, 1):
        part = table[table["model"] == model]
        values = [float(v) for v in part["perplexity"]]
        reference, colour = float(part["fp16"].iloc[0]), PALETTE[(column - 1) % len(PALETTE)]
        arms_x: list[float | None] = []
        arms_y: list[str | None] = []
        for value, step in zip(values, part["step"], strict=True):
            arms_x += [reference, value, None]
            arms_y += [step, step, None]
        figure.add_scatter(
            x=arms_x, y=arms_y, mode="lines", line={"color": colour, "width": 5}, opacity=0.45, hoverinfo="skip",
            row=1, col=column,
        )  # fmt: skip
        figure.add_scatter(
            x=values,
            y=part["step"].to_list(),
            text=[
                f" {_short(v)}" + ("" if math.isnan(c) else f"  ({'+' if c >= 0 else ''}{_short(c)})")
                for v, c in zip(values, [float(c) for c in part["change"]], strict=True)
            ],
            mode="markers+text",
            textposition="middle right",
            textfont={"size": 12},
            name=model,
            cliponaxis=False,
            marker={"size": 10, "color": colour},
            hovertemplate="%{y}<br>perplexity %{text}<extra></extra>",
            row=1,
            col=column,
        )
        figure.add_vline(x=reference, line={"dash": "dash", "color": _INK, "width": 1.5}, row=1, col=column)
        low, high = min([*values, reference]), max([*values, reference])
        if log:
            span = max(math.log10(high / low), 0.3)
            # the widened range has to have ticks, and few enough for a panel
            axis = _log_axis([torch.tensor([low, high * 10 ** (0.7 * span)])], room=6 if len(models) == 1 else 4)
            axis["range"] = [math.log10(low) - 0.06 * span, math.log10(high) + 0.8 * span]
        else:
            span = max(high - low, 0.02 * low)
            axis = {"range": [low - 0.06 * span, high + 0.6 * span]}
        figure.update_xaxes(
            title_text=f"{measure}<br>{model} model<br>dashed: fp16, {reference:.2f}",
            row=1,
            col=column,
            **axis,
        )
    figure.update_yaxes(categoryorder="array", categoryarray=steps, autorange="reversed")
    _layout(figure, title, height=190 + 36 * len(steps), showlegend=False)
    return figure.update_yaxes(title_text="recipe", col=1)


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.0f}"


def _precision(name: str) -> str:
    """The bits of a format's name, without group size and the like: ``W4A8KV4 g128`` -> ``W4A8KV4``."""
    return name.split(" ")[0]


def _measured(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a comparison whose methods did not fail."""
    kept = table[table["gap"].notna()]
    if kept.empty:
        raise ValueError("table: no method was measured; its column 'error' says why")
    return kept


def comparison(table: pd.DataFrame, title: str = "Every method, on equal terms", x: str = "") -> go.Figure:
    """What every method costs in perplexity: one row per method, one colour per precision, one panel per model and text.

    ``table``: as `qoqlab.compare` returns it. A filled mark is the gap to the unquantised model with everything rounded, a
    ring the same as kernels compute it (none where that was not measured). All panels share one log scale, because methods
    without any care for outliers lose by factors; gaps below 0.01 count as that. The unquantised model itself has no
    row; its perplexity stands under each panel, or the text ``x`` if the gaps are in other units. Methods that failed are
    left out.

    Raises ValueError where all have failed.
    """
    table = _measured(table)
    panels = list(dict.fromkeys(zip(table["model"], table["text"], strict=True)))
    quantised = table[table["gap"] != 0] if (table["gap"] != 0).any() else table
    methods, formats = (list(dict.fromkeys(quantised[column])) for column in ("method", "format"))
    precisions = list(dict.fromkeys(map(_precision, formats)))
    looks = {
        name: (PALETTE[i % len(PALETTE)], ("circle", "square", "diamond")[i // len(PALETTE) % 3])
        for i, name in enumerate(precisions)
    }
    texts = {text: "<br>".join(textwrap.wrap(text, 13)) for _, text in panels}  # panels may be ninety pixels wide
    titles = [model if len(texts) == 1 else f"{model} model<br>{texts[text]}" for model, text in panels]
    figure = make_subplots(rows=1, cols=len(panels), shared_yaxes=True, horizontal_spacing=0.025, subplot_titles=titles)
    smallest, drawn = 0.01, [1.0]
    for column, (model, text) in enumerate(panels, 1):
        here = (table["model"] == model) & (table["text"] == text)
        exact = float((table["perplexity"] - table["gap"])[here].iloc[0])
        part = quantised[(quantised["model"] == model) & (quantised["text"] == text)]
        for name in precisions:
            rows = part[part["format"].map(_precision) == name]
            colour, symbol = looks[name]
            for runtime in (False, True):
                gaps = (rows["runtime_perplexity"] - exact if runtime else rows["gap"]).dropna()
                if gaps.empty and (runtime or column > 1):
                    continue
                shown, lost = rows.loc[gaps.index], gaps.clip(lower=smallest).to_list()
                drawn += lost
                figure.add_scatter(
                    x=_numbers(lost),
                    y=shown["method"].to_list(),
                    customdata=np.stack(
                        [shown["format"], gaps.round(3), shown["weight_bits"].round(2), shown["kv_bits"]], -1
                    ),
                    mode="markers",
                    name=name,
                    legendgroup=name,
                    showlegend=not runtime and column == 1,
                    cliponaxis=False,
                    marker={
                        "size": 14 if runtime else 8,
                        "color": colour,
                        "symbol": symbol + ("-open" if runtime else ""),
                        "line": {"width": 1.5 if runtime else 0},
                    },
                    hovertemplate=f"%{{y}}, {'as kernels compute' if runtime else 'everything rounded'}<br>"
                    "gap %{customdata[1]:+.3f}<br>%{customdata[2]} bits a weight, %{customdata[3]} a cached value"
                    "<extra>%{customdata[0]}</extra>",
                    row=1,
                    col=column,
                )
        figure.update_xaxes(title_text=x or f"perplexity lost<br>(fp16: {exact:.2f})", row=1, col=column)
    wide = max(drawn) > 1e3 * min(drawn)
    axis = _log_axis([torch.tensor(drawn, dtype=torch.float64)], room=0 if wide else max(3, 16 // len(panels)))
    if wide:  # only even powers of ten are named, or narrow panels have no room
        powers = [round(math.log10(tick)) for tick in cast(list[float], axis["tickvals"])]
        axis["ticktext"] = ["" if p % 2 else f"{10.0**p:g}" if p < 3 else f"{10.0 ** (p - 3):g}k" for p in powers]
    figure.update_xaxes(**axis, tickfont={"size": 11})
    figure.update_yaxes(categoryorder="array", categoryarray=methods, range=[len(methods) - 0.4, -0.6])
    figure.update_annotations(font_size=12)
    below = {"orientation": "h", "x": 0, "xanchor": "left", "y": 0, "yref": "container", "yanchor": "bottom"}
    margin = {"l": 70, "r": 30, "t": 100, "b": 130}
    return _layout(figure, title, height=230 + 22 * len(methods), legend=below, margin=margin).update_yaxes(
        title_text="method", col=1
    )


#: `trade_off` labels every method if there are no more than these, otherwise only those worth having.
FEW = 10


def trade_off(table: pd.DataFrame, cost: str, title: str, x: str) -> go.Figure:
    """Perplexity lost against what it costs: methods on the staircase are worth having, the others lose to one of them.

    ``table``: rows of `qoqlab.compare` for one model and text; ``cost``: the column to count, on an axis named ``x``.
    A method is off the staircase if another one costs at most as much and loses at most as much. Gaps below 0.01 count as
    that. Labelled are those on the staircase, and the others where there are few. Always three traces. Methods that failed
    are left out; where all have, ValueError is raised.
    """
    rows = _measured(table).assign(shown=table["gap"].clip(lower=0.01)).sort_values([cost, "gap"], kind="stable")
    # by rising cost, a method is worth having if it loses less than all before it
    best = rows["shown"] < rows["shown"].cummin().shift(fill_value=math.inf)
    stairs = rows[best]
    low, high = float(rows[cost].min()), float(rows[cost].max())
    figure = go.Figure()
    figure.add_scatter(
        x=_numbers(stairs[cost].to_list()),
        y=_numbers(stairs["shown"].to_list()),
        mode="lines",
        line={"shape": "hv", "color": _MUTED, "width": 1.5, "dash": "dot"},
        name="the best there is for the cost",
        hoverinfo="skip",
    )
    for worth, name, colour in ((False, "loses to another method", PALETTE[5]), (True, "worth having", PALETTE[1])):
        part = rows[best == worth]
        figure.add_scatter(
            x=_numbers(part[cost].to_list()),
            y=_numbers(part["shown"].to_list()),
            customdata=part["gap"].round(3).to_list(),
            text=[f" {method} " for method in part["method"]],
            mode="markers+text" if not worth and len(rows) <= FEW else "markers",
            textposition=["middle left" if v > low + 0.75 * (high - low) else "middle right" for v in part[cost]],
            textfont={"size": 12, "color": _MUTED},
            cliponaxis=False,
            marker={"size": 12 if worth else 8, "color": colour, "symbol": "circle" if worth else "circle-open"},
            name=name,
            hovertemplate=f"%{{text}}<br>gap %{{customdata:+.3f}}<br>{x}: %{{x:.4g}}<extra></extra>",
        )
    room = {"l": 70, "r": 30, "t": 96, "b": 60}  # for a legend of two lines
    _layout(
        figure, title, x, "perplexity lost against fp16 (log scale)", legend=_legend_above(), showlegend=True, margin=room
    )
    # below the stairs there is room; names of neighbours share a label, in their order
    flights: list[list[tuple[float, float, str]]] = []
    for step in zip(stairs[cost], stairs["shown"], stairs["method"], strict=True):
        if flights and step[0] - flights[-1][-1][0] < 0.1 * (high - low):
            flights[-1].append(step)
        else:
            flights.append([step])
    for flight in flights:
        at, height, _ = flight[-1]
        side = "right" if at > low + 0.75 * (high - low) else "left"
        names = "<br>".join(name for *_, name in flight)
        figure.add_annotation(
            x=at, y=math.log10(height), text=names, align=side, xanchor=side, yanchor="top", yshift=-7, showarrow=False
        )
    pad = 0.04 * (high - low) or 1.0
    figure.update_xaxes(range=[low - pad, high + pad])
    values = rows["shown"].astype(float)
    axis = _log_axis([torch.tensor(values.to_list())])
    ticks = [tick for tick in cast(list[float], axis["tickvals"]) if tick >= 0.01]
    least, span = math.log10(values.min()), max(math.log10(values.max() / values.min()), 0.1)
    axis |= {"range": [least - 0.2 * span, least + 1.07 * span], "tickvals": ticks, "ticktext": [f"{t:g}" for t in ticks]}
    return figure.update_yaxes(**axis)


# --- why four, eight and four ---------------------------------------------------------------------------------------------


def stacked_bytes(table: pd.DataFrame, title: str, unit: str = "MiB") -> go.Figure:
    """Stacked horizontal bars: one bar per value of ``format``, one colour per ``part``, lengths from ``size`` (in
    ``unit``)."""
    figure = go.Figure()
    for index, part in enumerate(dict.fromkeys(table["part"])):
        rows = table[table["part"] == part]
        sizes = [float(v) for v in rows["size"]]
        figure.add_bar(
            x=_numbers(sizes),
            y=rows["format"].to_list(),
            name=part,
            orientation="h",
            marker={"color": PALETTE[index % len(PALETTE)]},
            text=[f"{v:.3g}" for v in sizes],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            hovertemplate=f"{part}: %{{x:.3g}} {unit}<extra>%{{y}}</extra>",
        )
    figure.update_yaxes(autorange="reversed", showgrid=False)
    bars = table["format"].nunique()
    return _layout(
        figure,
        title,
        f"size ({unit})",
        "format",
        barmode="stack",
        uniformtext={"minsize": 11, "mode": "hide"},
        height=190 + 46 * bars,
        legend=_legend_above() | {"traceorder": "normal"},  # as the bars are stacked, from left to right
    )


def roofline(table: pd.DataFrame, title: str, x: str, y: str) -> go.Figure:
    """Attainable speed against intensity, log-log, one roof per value of ``precision``; columns ``intensity``, ``speed``.

    The slope is memory's limit, the flat part arithmetic's.
    """
    figure = go.Figure()
    parts = {name: table[table["precision"] == name] for name in dict.fromkeys(table["precision"])}
    widths = _widths([dict(zip(part["intensity"], part["speed"], strict=True)) for part in parts.values()], 2.5)
    for index, (precision, part) in enumerate(parts.items()):
        figure.add_scatter(
            x=_numbers(part["intensity"].to_list()),
            y=_numbers(part["speed"].to_list()),
            name=precision,
            mode="lines",
            line={
                "color": PALETTE[index % len(PALETTE)],
                "width": widths[index],
                "dash": ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")[index % 6],
            },
            hovertemplate="%{x:.3g} -> %{y:.3g}<extra>%{fullData.name}</extra>",
        )
    _layout(figure, title, *(f"{name[:-1]}, log scale)" if name.endswith(")") else f"{name} (log scale)" for name in (x, y)))
    figure.update_xaxes(**_log_axis([torch.tensor(table["intensity"].to_list())]))
    return figure.update_yaxes(**_log_axis([torch.tensor(table["speed"].to_list())]))


# --- several figures in one -----------------------------------------------------------------------------------------------


def with_slider(figures: Mapping[str, go.Figure], prefix: str, start: str | None = None) -> go.Figure:
    """One figure with a slider that swaps between ``figures`` (label -> Figure), inside the browser, without a kernel.

    It keeps working in a saved HTML page. All figures need the same number of traces. ``prefix`` names what the slider
    chooses, as in "layer: "; ``start`` is the label shown first (default: the first one).
    """
    labels = list(figures)
    if len({len(f.data) for f in figures.values()}) != 1:
        raise ValueError("figures: a slider swaps traces one for one, so every figure needs the same number of traces")
    start = labels[0] if start is None else start
    base = go.Figure(figures[start])
    base.frames = [
        go.Frame(name=label, data=f.data, layout=_moving_parts(f), traces=list(range(len(f.data))))
        for label, f in figures.items()
    ]
    below = 17 * max(map(_lines_below, figures.values()))
    options = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    slider = {
        "active": labels.index(start),
        "currentvalue": {"prefix": prefix, "font": {"size": 14}},
        "pad": {"t": 44 + below, "b": 4},
        "bgcolor": "#ffffff",  # plotly's own colours are as pale as light paper, and its ticks as dark as dark paper
        "bordercolor": _MUTED,
        "activebgcolor": _MUTED,
        "tickcolor": _MUTED,
        "x": 0.04,
        "len": 0.92,
        "steps": [{"label": label, "method": "animate", "args": [[label], options]} for label in labels],
    }
    height = (base.layout.height or HEIGHT) + 90 + below
    return base.update_layout(sliders=[slider], height=height)


def _lines_below(figure: go.Figure) -> int:
    """How many lines more than one of tick labels and one of title there are under a figure's x axes."""
    axes = [axis for name, axis in figure.layout.to_plotly_json().items() if name.startswith("xaxis")]
    breaks = max((str(axis.get("title", {}).get("text", "")).count("<br>") for axis in axes), default=0)
    places = [place for trace in figure.data for place in trace.to_plotly_json().get("x", ())]
    return breaks + max((place.count("<br>") for place in places if isinstance(place, str)), default=0)


def _moving_parts(figure: go.Figure) -> dict[str, object]:
    """What a frame has to change beside its traces: the title, axis ranges and titles, marks; not template or size."""
    layout: dict[str, object] = figure.layout.to_plotly_json()
    kept: Sequence[str] = ("title", "margin", "annotations", "shapes")
    return {k: v for k, v in layout.items() if k in kept or k.startswith(("xaxis", "yaxis"))}


#: JavaScript for pages with figures of `with_slider`: plotly's sliders know the mouse alone, so ``steer(place)`` makes the
#: arrow keys move the slider of a figure that has the focus, and tells screen readers where it stands.
STEER = """const steer = (place) => {
  const slider = () => place.layout.sliders[0], labels = (place.layout?.sliders ?? [])[0]?.steps.map((step) => step.label);
  if (!labels) return;
  const say = () => Object.entries({role: 'slider', 'aria-label': slider().currentvalue?.prefix ?? 'shown',
    'aria-valuemin': 0, 'aria-valuemax': labels.length - 1, 'aria-valuenow': slider().active ?? 0,
    'aria-valuetext': labels[slider().active ?? 0]}).forEach(([name, value]) => place.setAttribute(name, value));
  place.tabIndex = 0;
  place.dataset.lmSuppressShortcuts = true;  // JupyterLab would keep the keys to itself
  place.onkeydown = (event) => {
    const from = slider().active ?? 0, to = from + ({ArrowRight: 1, ArrowLeft: -1}[event.key] ?? 0);
    if (to === from || !(to in labels)) return;
    event.preventDefault();
    Plotly.relayout(place, {'sliders[0].active': to})
      .then(() => Plotly.animate(place, ...slider().steps[to].args)).then(say);
  };
  place.on('plotly_sliderstart', () => place.focus({preventScroll: true}));
  place.on('plotly_sliderchange', say);
  say();
};
"""
