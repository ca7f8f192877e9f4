"""Pictures of kernels: bits of words, lanes of a warp and what they hold, measured times beside their bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from .viz import _INK, _MUTED, PALETTE, SEQUENTIAL, _colour_bar, _layout, _legend_above, _log_axis, _numbers

#: Fills of neighbouring fields of a word, for a 0 and for a 1: light enough for black digits.
_FIELDS = (("#dcebf6", "#9cc7e6"), ("#fae3d5", "#efb08a"), ("#d4efe6", "#86cfb5"), ("#f6e6ee", "#dea9c6"))


#: Fills of the pages that a sequence holds, light enough for black names.
_HOLDERS = ("#9cc7e6", "#efb08a", "#86cfb5", "#dea9c6", "#f0cd7a", "#bcd9ee")
#: The fields of two fp16 numbers in a word, from the lowest bit on: mantissa, exponent, sign, twice.
HALVES = (10, 5, 1, 10, 5, 1)


def bit_rows(words: Mapping[str, int], title: str, width: int | Sequence[int] = 8, notes: Sequence[str] = ()) -> go.Figure:
    """32-bit words under each other, a cell a bit, the highest on the left; the bits of a field share a colour.

    ``words``: name -> value in 0 .. 2**32 - 1; ``width``: bits of every field, or of each from the lowest on (`HALVES`);
    ``notes``: a text for the right end of each row. Always one trace. Raises ValueError for a value that is no 32-bit word
    and for fields that are not 32 bits.
    """
    widths = [width] * (32 // width) if isinstance(width, int) else list(width)
    if sum(widths) != 32:
        raise ValueError(f"width: fields of {width} bits do not make 32")
    # fields of one length alternate in colour; of several lengths, each has its own
    kinds = list(range(len(widths))) if isinstance(width, int) else [widths.index(size) for size in widths]
    field = [kind for kind, size in zip(kinds, widths, strict=True) for _ in range(size)]  # of every bit, lowest first
    for name, word in words.items():
        if not 0 <= word < 1 << 32:
            raise ValueError(f"words: {name} is {word}, which is no 32-bit word")
    bits = [[word >> (31 - i) & 1 for i in range(32)] for word in words.values()]
    shades = [colour for pair in _FIELDS for colour in pair]
    figure = go.Figure(
        go.Heatmap(
            x=list(range(31, -1, -1)),
            y=list(range(len(words))),
            z=[[field[31 - i] % 4 * 2 + bit for i, bit in enumerate(row)] for row in bits],
            text=[[f"<b>{bit}</b>" if bit else "0" for bit in row] for row in bits],
            texttemplate="%{text}",
            textfont={"size": 11, "color": _INK},
            colorscale=[[(i + end) / len(shades), shade] for i, shade in enumerate(shades) for end in (0, 1)],
            zmin=-0.5,
            zmax=len(shades) - 0.5,
            xgap=1,
            ygap=14,
            showscale=False,
            hovertemplate="bit %{x}: %{text}<extra></extra>",
        )
    )
    for row, note in enumerate(notes):
        figure.add_annotation(x=-1, y=row, text=note, showarrow=False, xanchor="left", font={"size": 12})
    _layout(figure, title, "bit (index)", "", height=150 + 44 * len(words), showlegend=False)
    end = -1.3 - 0.5 * max(map(len, notes)) if notes else -0.8  # at 800 pixels a letter is as wide as half a bit
    figure.update_xaxes(range=[31.8, min(end, -9) if notes else end], tickvals=[31, 24, 16, 8, 0], showgrid=False)
    return figure.update_yaxes(
        range=[len(words) - 0.4, -0.6], tickvals=list(range(len(words))), ticktext=list(words), showgrid=False
    )


def lane_cells(table: pd.DataFrame, lane: int, title: str) -> go.Figure:
    """The weights of one tile, outputs down and inputs across, coloured by lane; the cells of ``lane`` carry its registers.

    ``table``: rows of `qoqlab_kernels.lane_map` for one warp, columns ``n``, ``k``, ``lane``, ``register``. Always two
    traces.
    """
    n, k = table["n"].to_numpy(), table["k"].to_numpy()
    rows, columns = np.unique(n), np.unique(k)
    owner = np.full((len(rows), len(columns)), np.nan, dtype=np.float32)
    owner[np.searchsorted(rows, n), np.searchsorted(columns, k)] = table["lane"]
    mine = table[table["lane"] == lane]
    mark = "r" if len(mine) <= 16 else ""  # side by side on a narrow page there is room for the number alone
    figure = go.Figure(
        go.Heatmap(
            z=owner,
            x=columns,
            y=rows,
            colorscale=SEQUENTIAL,
            zmin=0,
            zmax=31,
            xgap=1,
            ygap=1,
            colorbar=_colour_bar("lane"),
            hovertemplate="output %{y}, input %{x}: lane %{z}<extra></extra>",
        )
    )
    figure.add_scatter(
        x=mine["k"].to_list(),
        y=mine["n"].to_list(),
        text=[f"{mark}{register}" for register in mine["register"]],
        mode="markers+text",
        marker={"symbol": "square", "size": 17, "color": "white", "line": {"color": PALETTE[1], "width": 2}},
        textfont={"size": 10, "color": _INK},
        hovertemplate="lane " + str(lane) + ", %{text}<extra></extra>",
    )
    _layout(figure, title, "input k (index in the tile)", "output n (index)", height=470, showlegend=False)
    return figure.update_yaxes(autorange="reversed", showgrid=False).update_xaxes(showgrid=False)


def times(table: pd.DataFrame, title: str, counts: str = "tokens at once, M") -> go.Figure:
    """Times in microseconds against a count, log-log: ``table`` has the count (``counts`` says of what) as index and a line
    per column, the first of them the bound (dashed). Missing values are left out; always as many traces as columns."""
    figure = go.Figure()
    for index, (name, column) in enumerate(table.items()):
        values = column.dropna()
        bound = index == 0
        figure.add_scatter(
            x=[int(m) for m in values.index],
            y=values.round(2).to_list(),
            name=str(name),
            mode="lines" if bound else "lines+markers",
            line={"color": _INK if bound else PALETTE[index - 1], "width": 2, "dash": "dash" if bound else "solid"},
            marker={"size": 8, "symbol": max(index - 1, 0)},
            hovertemplate=counts + " = %{x}: %{y:.1f} µs<extra>%{fullData.name}</extra>",
        )
    _layout(figure, title, f"{counts} (log scale)", "time (µs, log scale)", height=480, legend=_legend_above())
    figure.update_layout(margin={"l": 70, "r": 30, "t": 96, "b": 60})
    ticks = [int(m) for m in table.index]
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=[str(m) for m in ticks])
    return figure.update_yaxes(**_log_axis([torch.tensor(table.to_numpy()).nan_to_num(0.0)]))


def timeline(table: pd.DataFrame, title: str) -> go.Figure:
    """Who works when in a pipeline: a row per worker, a bar per piece of work with the piece's number in it.

    ``table``: columns ``worker`` (in the order of the rows), ``piece``, ``start`` and ``end`` (ticks). As many traces as
    workers.
    """
    figure = go.Figure()
    for index, worker in enumerate(dict.fromkeys(table["worker"])):
        part = table[table["worker"] == worker]
        figure.add_bar(
            base=_numbers(part["start"].to_list()),
            x=_numbers((part["end"] - part["start"]).to_list()),
            y=[worker] * len(part),
            orientation="h",
            name=worker,
            text=[str(piece) for piece in part["piece"]],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            marker={"color": PALETTE[index % len(PALETTE)], "line": {"color": "white", "width": 2}},
            hovertemplate=f"{worker}, piece %{{text}}: tick %{{base}}, for %{{x}}<extra></extra>",
        )
    workers = table["worker"].nunique()
    _layout(figure, title, "time (ticks)", "", height=150 + 60 * workers, barmode="overlay", showlegend=False)
    return figure.update_yaxes(autorange="reversed", showgrid=False)


def running_weights(weights: Sequence[torch.Tensor], final: torch.Tensor, page_size: int, title: str) -> go.Figure:
    """Softmax weights of the tokens read so far, a colour per page, and the line of what they become in the end.

    ``weights``: one tensor ``[tokens of the page]`` per page read; ``final [T]``, of which the rest is still to come. Log
    scale from the smallest of ``final``. Always one trace more than ``final`` has pages.
    """
    pages = -(-len(final) // page_size)
    floor = max(float(final.min()), 1e-6)
    figure = go.Figure()
    for page in range(pages):
        seen = weights[page] if page < len(weights) else final[:0]
        figure.add_bar(
            x=list(range(page * page_size, page * page_size + len(seen))),
            y=_numbers(seen.clamp(min=floor)),
            width=1,
            name=f"page {page}",
            marker={"color": PALETTE[page % len(PALETTE)], "line": {"width": 0}},
            hovertemplate="token %{x}: %{y:.2g}<extra>%{fullData.name}</extra>",
        )
    figure.add_scatter(
        x=list(range(len(final))),
        y=_numbers(final.clamp(min=floor)),
        name="in the end",
        mode="lines",
        line={"color": _INK, "width": 1.2},
        hovertemplate="token %{x}: %{y:.2g} in the end<extra></extra>",
    )
    _layout(figure, title, "token (position)", "weight (log scale)", bargap=0, legend=_legend_above())
    figure.update_layout(margin={"l": 70, "r": 30, "t": 96, "b": 60}, showlegend=True)
    figure.update_xaxes(range=[-1, len(final)])
    return figure.update_yaxes(**_log_axis([final.clamp(min=floor), torch.ones(1)]))


def page_pool(holders: Sequence[Sequence[str]], title: str, columns: int = 8) -> go.Figure:
    """The pages of a pool as cells in the order of their numbers, coloured by who holds them; free ones are empty.

    ``holders``: for every page the names of its holders; a page with several is shared and shows them all. A name's first
    letter chooses the colour, so that a sequence keeps its colour from picture to picture. Always one trace.
    """
    rows = -(-len(holders) // columns)
    shades = ["#ffffff", *(light for light in _HOLDERS)]
    z = np.full((rows, columns), np.nan, dtype=np.float32)
    text = np.full((rows, columns), "", dtype=object)
    for page, names in enumerate(holders):
        at = divmod(page, columns)
        z[at] = 1 + (ord(names[0][0]) - ord("A")) % len(_HOLDERS) if names else 0
        text[at] = f"<b>{' + '.join(names)}</b><br>page {page}" if names else f"page {page}"
    figure = go.Figure(
        go.Heatmap(
            z=z,
            text=text.tolist(),
            texttemplate="%{text}",
            textfont={"size": 12, "color": _INK},
            colorscale=[[(i + end) / len(shades), shade] for i, shade in enumerate(shades) for end in (0, 1)],
            zmin=-0.5,
            zmax=len(shades) - 0.5,
            xgap=3,
            ygap=3,
            showscale=False,
            hovertemplate="%{text}<extra></extra>",
        )
    )
    _layout(figure, title, "pages of the pool, by number", height=140 + 62 * rows, plot_bgcolor=_MUTED)
    figure.update_xaxes(showticklabels=False, showgrid=False, ticks="")
    return figure.update_yaxes(autorange="reversed", showticklabels=False, showgrid=False, ticks="")
