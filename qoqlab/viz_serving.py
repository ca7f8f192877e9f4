"""Pictures of serving: rooflines with a batch on them, parts of a step, memory, unpacking, published against predicted,
fleets under load."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from .viz import _INK, _MUTED, PALETTE, _layout, _legend_above, _log_axis, _numbers

_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


def roof_and_step(speeds: pd.DataFrame, step: pd.DataFrame, tokens: int, title: str) -> go.Figure:
    """Left: attainable speed of the linear layers by tokens at once, one roof per precision, and a mark at ``tokens``.
    Right: what one whole step takes, part by part.

    ``speeds``: columns ``precision``, ``tokens``, ``tops`` (10^12 operations per second). ``step``: columns ``precision``,
    ``part``, ``ms``. The number of traces depends on the names of precisions and parts alone.
    """
    figure = make_subplots(
        rows=1,
        cols=2,
        column_widths=[0.5, 0.5],
        horizontal_spacing=0.17,
        subplot_titles=("linear layers: attainable speed", "one step, all parts"),
    )
    for index, name in enumerate(dict.fromkeys(speeds["precision"])):
        part = speeds[speeds["precision"] == name]
        here = part[part["tokens"] == tokens]
        colour, dash = PALETTE[index % len(PALETTE)], _DASHES[index % len(_DASHES)]
        for rows, mode, legend in ((part, "lines", True), (here, "markers", False)):
            figure.add_scatter(
                x=_numbers(rows["tokens"].to_list()),
                y=_numbers(rows["tops"].to_list()),
                name=name,
                legendgroup=name,
                showlegend=legend,
                mode=mode,
                line={"color": colour, "width": 2.5, "dash": dash},
                marker={"color": colour, "size": 11, "line": {"color": "white", "width": 1.5}},
                hovertemplate="%{x:.0f} tokens: %{y:.3g} TOP/s<extra>%{fullData.name}</extra>",
                row=1,
                col=1,
            )
    _stack(figure, step, "ms", "time of one step (ms)", column=2)
    _layout(figure, title, barmode="stack", height=480, margin={"l": 70, "r": 30, "t": 100, "b": 120})
    figure.update_layout(
        legend=_below(),
        legend2=_below() | {"y": -0.3},  # side by side they cut each other off on a narrow page
    )
    figure.update_xaxes(
        **_log_axis([torch.tensor(speeds["tokens"].to_list())]), title_text="tokens at once, M (log scale)", row=1, col=1
    )
    figure.update_yaxes(
        **_log_axis([torch.tensor(speeds["tops"].to_list())]), title_text="speed (TOP/s, log scale)", row=1, col=1
    )
    return figure.update_annotations(font_size=12)


def _stack(figure: go.Figure, table: pd.DataFrame, value: str, x: str, column: int, legend: str = "legend2") -> None:
    """Stacked horizontal bars in a panel of ``figure``, with their totals: columns ``precision``, ``part`` and ``value``."""
    for index, part_name in enumerate(dict.fromkeys(table["part"])):
        rows = table[table["part"] == part_name]
        figure.add_bar(
            x=_numbers(rows[value].to_list()),
            y=rows["precision"].to_list(),
            orientation="h",
            name=part_name,
            legend=legend,
            marker={"color": ("#333333", "#888888", "#cccccc")[index % 3], "pattern": {"shape": ("", "/", "")[index % 3]}},
            hovertemplate=f"{part_name}: %{{x:.3g}}<extra>%{{y}}</extra>",
            row=1,
            col=column,
        )
    totals = table.groupby("precision", sort=False)[value].sum()
    for name, total in totals.items():
        figure.add_annotation(
            x=total,
            y=name,
            text=f" {total:.3g}",
            showarrow=False,
            xanchor="left",
            font={"size": 12},
            bgcolor="white",  # a dashed line may run behind it
            borderpad=0,
            row=1,
            col=column,
        )
    figure.update_xaxes(range=[0, 1.25 * float(totals.max())], title_text=x, row=1, col=column)
    figure.update_yaxes(autorange="reversed", showgrid=False, title_text="precision", row=1, col=column)


def step_and_memory(step: pd.DataFrame, memory: pd.DataFrame, capacity: float, title: str) -> go.Figure:
    """Left: what one step takes, part by part. Right: what memory holds, with a dashed line at the card's ``capacity``.

    ``step``: columns ``precision``, ``part``, ``ms``; ``memory``: ``precision``, ``part``, ``gib``. Capacity in GiB.
    """
    heads = ("one step", "memory (dashed: the card's)")
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.2, subplot_titles=heads)
    _stack(figure, step, "ms", "time of one step (ms)", column=1, legend="legend")
    _stack(figure, memory, "gib", "weights and KV cache (GiB)", column=2)
    figure.add_vline(x=capacity, line={"color": PALETTE[1], "width": 2.5, "dash": "dash"}, row=1, col=2)
    widest = float(memory.groupby("precision")["gib"].sum().max())
    figure.update_xaxes(range=[0, max(1.25 * widest, 1.08 * capacity)], row=1, col=2)
    _layout(figure, title, barmode="stack", height=440, margin={"l": 70, "r": 30, "t": 100, "b": 120})
    figure.update_layout(legend=_below(), legend2=_below() | {"y": -0.32})  # side by side they cut each other off
    return figure.update_annotations(font_size=12)


def speedups(table: pd.DataFrame, title: str, against: str = "cuBLAS in fp16") -> go.Figure:
    """How much faster or slower than a reference each kernel is, by tokens at once; below the line at 1 it is slower.

    ``table``: columns ``kernel``, ``tokens``, ``speedup``, and ``bound``, True for what no kernel can exceed (dashed).
    """
    figure = go.Figure()
    for index, name in enumerate(dict.fromkeys(table["kernel"])):
        part = table[table["kernel"] == name]
        ideal = bool(part["bound"].iloc[0])
        dash = _DASHES[1 + index % 3] if ideal else "solid"
        figure.add_scatter(
            x=_numbers(part["tokens"].to_list()),
            y=_numbers(part["speedup"].to_list()),
            name=name,
            mode="lines" if ideal else "lines+markers",
            line={"color": _MUTED if ideal else PALETTE[index % len(PALETTE)], "width": 2, "dash": dash},
            marker={"size": 8, "symbol": index},
            hovertemplate="%{x:.0f} tokens: %{y:.2f} times as fast<extra>%{fullData.name}</extra>",
        )
    figure.add_hline(y=1, line={"color": _INK, "width": 1.5})
    _layout(
        figure,
        title,
        "tokens at once, M (log scale)",
        f"speed relative to {against}",
        height=480,
        legend=_below(),
        margin={"l": 70, "r": 30, "t": 72, "b": 150},
    )
    ticks = sorted(set(table["tokens"]))
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=[str(t) for t in ticks])
    low, high = math.log10(table["speedup"].min()), math.log10(table["speedup"].max())
    ticks = [t for e in range(-3, 4) for t in (10**e, 2 * 10**e, 5 * 10**e) if low <= math.log10(t) <= high + 0.1]
    return figure.update_yaxes(
        type="log", range=[low - 0.1, high + 0.12], tickvals=ticks, ticktext=[f"{t:g}x" for t in ticks]
    )


def _below() -> dict[str, object]:
    """A horizontal legend under the axis title."""
    return {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top", "traceorder": "normal"}


def shares(table: pd.DataFrame, title: str, x: str) -> go.Figure:
    """Grouped bars with a line at 100 %: ``table`` has columns ``name``, ``group`` and ``share`` (1 is 100 %)."""
    figure = go.Figure()
    for index, group in enumerate(dict.fromkeys(table["group"])):
        part = table[table["group"] == group]
        values = [100 * float(v) for v in part["share"]]
        figure.add_bar(
            x=_numbers(values),
            y=part["name"].to_list(),
            name=group,
            orientation="h",
            text=[f"{v:.0f} %" for v in values],
            # a label beside the bar, unless it would lie on the line at 100 %
            textposition=["inside" if 80 < v < 100 else "outside" for v in values],
            cliponaxis=False,
            textangle=0,
            marker={"color": PALETTE[index % len(PALETTE)]},
            hovertemplate=f"%{{y}}, {group}: %{{x:.0f}} %<extra></extra>",
        )
    figure.add_vline(x=100, line={"color": _INK, "width": 1.5, "dash": "dash"})
    names, groups = table["name"].nunique(), table["group"].nunique()
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(range=[0, max(115.0, 115 * float(table["share"].max()))])
    return _layout(figure, title, x, "", barmode="group", height=170 + names * (14 + 17 * groups), legend=_legend_above())


def memory_by_batch(table: pd.DataFrame, capacity: float, title: str) -> go.Figure:
    """Weights plus cache against the number of sequences, one line per precision; the dashed line is what fits.

    ``table``: columns ``precision``, ``batch``, ``gib``; ``capacity`` in GiB. Lines end where the card is full.
    """
    figure = go.Figure()
    for index, name in enumerate(dict.fromkeys(table["precision"])):
        part = table[table["precision"] == name]
        figure.add_scatter(
            x=_numbers(part["batch"].to_list()),
            y=_numbers(part["gib"].to_list()),
            name=name,
            mode="lines",
            line={"color": PALETTE[index % len(PALETTE)], "width": 2.5, "dash": _DASHES[index % len(_DASHES)]},
            hovertemplate="%{x:.0f} sequences: %{y:.3g} GiB<extra>%{fullData.name}</extra>",
        )
    figure.add_hline(y=capacity, line={"color": _INK, "width": 1.5, "dash": "dash"})
    figure.add_annotation(x=0.01, xref="paper", y=capacity, text="full", showarrow=False, xanchor="left", yanchor="bottom")
    _layout(
        figure, title, "sequences at once (batch)", "weights and KV cache (GiB)", showlegend=True, legend=_legend_above()
    )
    return figure.update_yaxes(range=[0, 1.25 * capacity])


def published_and_bound(table: pd.DataFrame, title: str, against: str = "bound") -> go.Figure:
    """Measured by others against our bound, log-log: nothing may lie above the diagonal. Or ``against`` "predicted", another
    column of the table: then marks should lie on it.

    ``table``: columns ``system``, ``gpu``, ``model``, ``tokens_per_s``, ``bound``. A colour a system, a shape a card.
    """
    figure = go.Figure()
    systems, gpus = list(dict.fromkeys(table["system"])), list(dict.fromkeys(table["gpu"]))
    both = [float(speed) for column in ("tokens_per_s", against) for speed in table[column]]
    low, high = min(both), max(both)  # as far as any mark
    name = "the bound" if against == "bound" else against
    for factor, dash, text in ((1.0, "solid", f"as fast as {name}"), (0.5, "dot", "half of it")):
        figure.add_scatter(
            x=[low, high],
            y=[factor * low, factor * high],
            mode="lines",
            name=text,
            line={"color": _MUTED, "width": 1.5, "dash": dash},
            hoverinfo="skip",
        )
    for index, system in enumerate(systems):
        for shape, gpu in enumerate(gpus):
            part = table[(table["system"] == system) & (table["gpu"] == gpu)]
            figure.add_scatter(
                x=_numbers(part[against].to_list()),
                y=_numbers(part["tokens_per_s"].to_list()),
                text=part["model"].to_list(),
                mode="markers",
                name=f"{system}, {gpu}",
                marker={
                    "color": PALETTE[index % len(PALETTE)],
                    "symbol": ("circle", "diamond-open")[shape % 2],
                    "size": 10,
                    "line": {"width": 1.5 * (shape % 2)},
                },
                hovertemplate=f"%{{text}}: %{{y:.0f}} tokens/s, {against} %{{x:.0f}}<extra>%{{fullData.name}}</extra>",
            )
    unit = "(tokens per second, log scale)"
    _layout(figure, title, f"{against} {unit}", f"published {unit}", height=520)
    figure.update_layout(showlegend=True)
    figure.update_xaxes(**_log_axis([torch.tensor(table[against].to_list())]))
    return figure.update_yaxes(**_log_axis([torch.tensor(table["tokens_per_s"].to_list())]))


def rounds(table: pd.DataFrame, title: str) -> go.Figure:
    """Rounds of serving: a bar each with its tokens per second, and a diamond where a prediction lies.

    ``table``: columns ``name``, ``group`` ("QoQ" or "torch", a colour each), ``tokens_per_s``, and ``predicted``, which may
    be missing. From top to bottom in the table's order. Four traces, whatever the table holds.
    """
    figure = go.Figure()
    for colour, group in zip(PALETTE, ("QoQ", "torch"), strict=False):
        part = table[table["group"] == group]
        figure.add_bar(
            x=_numbers(part["tokens_per_s"].to_list()),
            y=part["name"].to_list(),
            name=group,
            orientation="h",
            marker={"color": colour},
            hovertemplate="%{y}: %{x:,.0f} tokens/s<extra>%{fullData.name}, measured</extra>",
        )
    known = table.dropna(subset="predicted")
    figure.add_scatter(
        x=_numbers(known["predicted"].to_list()),
        y=known["name"].to_list(),
        name="predicted",
        mode="markers",
        marker={"color": "white", "symbol": "diamond", "size": 11, "line": {"color": _INK, "width": 2}},
        hovertemplate="%{y}: %{x:,.0f} tokens/s<extra>predicted</extra>",
    )
    ends = table[["tokens_per_s", "predicted"]].max(axis=1)
    figure.add_scatter(  # behind the mark, which may lie beyond the bar
        x=_numbers(ends.to_list()),
        y=table["name"].to_list(),
        text=[f"   {value:,.0f}" for value in table["tokens_per_s"]],
        mode="text",
        textposition="middle right",
        cliponaxis=False,
        showlegend=False,
        hoverinfo="skip",
    )
    # room for the longest name, the same in every figure: a slider's frames do not make any
    room = {"l": 256, "r": 30, "t": 100, "b": 60}
    _layout(figure, title, "tokens per second", "", height=480, barmode="overlay", margin=room, legend=_legend_above())
    figure.update_layout(showlegend=True)
    figure.update_xaxes(range=[0, 1.2 * float(ends.max())])
    names = table["name"].to_list()
    order = {"categoryorder": "array", "categoryarray": names, "range": [len(names) - 0.4, -0.6]}
    return figure.update_yaxes(type="category", showgrid=False, automargin=False, **order)


def filling(table: pd.DataFrame, pages: dict[str, int], title: str) -> go.Figure:
    """A cache that fills. Left: sequences that run, step by step. Right: the share of its pages that is taken.

    ``table``: columns ``precision``, ``step``, ``running``, ``taken`` (pages); ``pages`` of the whole pool by precision.
    """
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.13, subplot_titles=("batch", "memory"))
    for index, name in enumerate(dict.fromkeys(table["precision"])):
        part = table[table["precision"] == name]
        shown = {1: _numbers(part["running"].to_list()), 2: 100 * _numbers(part["taken"].to_list()) / pages[name]}
        for place, values in shown.items():
            figure.add_scatter(
                x=_numbers(part["step"].to_list()),
                y=values,
                name=name,
                legendgroup=name,
                showlegend=place == 1,
                line={"color": PALETTE[index % len(PALETTE)], "width": 2, "dash": _DASHES[index % len(_DASHES)]},
                hovertemplate="step %{x:.0f}: %{y:.3g}<extra>%{fullData.name}</extra>",
                row=1,
                col=place,
            )
    _layout(figure, title, height=440, margin={"l": 70, "r": 30, "t": 100, "b": 110}, legend=_below(), showlegend=True)
    figure.update_xaxes(title_text="step").update_yaxes(rangemode="tozero")
    figure.update_yaxes(title_text="sequences that run", col=1).update_yaxes(title_text="pages taken (%)", col=2)
    return figure.update_annotations(font_size=12)


def load_and_cost(table: pd.DataFrame, title: str) -> go.Figure:
    """A fleet under load. Left: how long requests take, 95 % of them (solid) and half (dotted). Right: what tokens cost.

    ``table``: columns ``precision``, ``load`` (requests per second), ``total_p50``, ``total_p95`` (seconds) and
    ``dollars_per_million``. A line ends where its fleet is full. The number of traces depends on the precisions alone.
    """
    heads = ("latency (solid: 95 % of requests, dotted: half)", "cost")
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.14, subplot_titles=heads)
    for index, name in enumerate(dict.fromkeys(table["precision"])):
        part = table[table["precision"] == name]
        lines = (("total_p95", "solid", 1), ("total_p50", "dot", 1), ("dollars_per_million", "solid", 2))
        for column, dash, place in lines:
            wide = place == 2 and index == 0  # costs coincide where both fleets serve the load: it lies under the others
            figure.add_scatter(
                x=_numbers(part["load"].to_list()),
                y=_numbers(part[column].to_list()),
                name=name,
                legendgroup=name,
                showlegend=column == "total_p95",
                mode="lines+markers",
                line={"color": PALETTE[index % len(PALETTE)], "width": 7 if wide else 2.5, "dash": dash},
                marker={"size": 6, "symbol": index},
                hovertemplate=f"{column} at %{{x:.3g}} requests/s: %{{y:.3g}}<extra>%{{fullData.name}}</extra>",
                row=1,
                col=place,
            )
    _layout(figure, title, height=460, margin={"l": 70, "r": 30, "t": 100, "b": 110}, legend=_below(), showlegend=True)
    figure.update_xaxes(title_text="load (requests per second)", rangemode="tozero")
    figure.update_yaxes(title_text="seconds from arrival to last token", rangemode="tozero", col=1)
    figure.update_yaxes(**_log_axis([torch.tensor(table["dollars_per_million"].to_list())]), col=2)
    figure.update_yaxes(title_text="dollars per million tokens (log scale)", col=2)
    return figure.update_annotations(font_size=12)


def bars(table: pd.DataFrame, title: str, x: str, y: str, order: Sequence[str] = ()) -> go.Figure:
    """Grouped vertical bars on a log scale: columns ``name`` (along the axis), ``group`` (a colour each, in ``order``) and
    ``value``."""
    figure = go.Figure()
    for index, group in enumerate(order or dict.fromkeys(table["group"])):
        part = table[table["group"] == group]
        figure.add_bar(
            x=part["name"].to_list(),
            y=_numbers(part["value"].to_list()),
            name=group,
            marker={"color": PALETTE[index % len(PALETTE)]},
            hovertemplate=f"%{{x}}, {group}: %{{y:.3g}}<extra></extra>",
        )
    room = {"l": 70, "r": 30, "t": 96, "b": 60}  # for a legend of two lines
    _layout(figure, title, x, f"{y} (log scale)", barmode="group", legend=_legend_above(), bargap=0.25, margin=room)
    axis = _log_axis([torch.tensor(table["value"].to_list())])
    axis["range"] = [axis["range"][0] - 0.15, axis["range"][1]]  # type: ignore[index]
    long = max(map(len, table["name"])) > 8
    return figure.update_yaxes(**axis).update_xaxes(type="category", tickangle=-25 if long else 0, showgrid=False)
