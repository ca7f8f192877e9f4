"""Pictures of kernels: the bits of 32-bit words, and which lane of a warp holds which weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from .viz import _INK, PALETTE, SEQUENTIAL, _layout

#: Fills of neighbouring fields of a word: light enough for black digits, told apart by lightness as well as by hue.
_FIELDS = ("#cfe3f2", "#f6d2bd", "#bfe6d9", "#f0d7e4")


def bit_rows(words: Mapping[str, int], title: str, width: int = 8, notes: Sequence[str] = ()) -> go.Figure:
    """32-bit words under each other, a cell a bit, the highest on the left; fields of ``width`` bits share a colour.

    ``words``: name -> value in 0 .. 2**32 - 1; ``notes``: a text for the right end of each row. Always one trace. Raises
    ValueError for a value that is no 32-bit word.
    """
    for name, word in words.items():
        if not 0 <= word < 1 << 32:
            raise ValueError(f"words: {name} is {word}, which is no 32-bit word")
    bits = [[word >> (31 - i) & 1 for i in range(32)] for word in words.values()]
    colours = [[_FIELDS[(31 - i) // width % 4] for i in range(32)] for _ in words]
    figure = go.Figure(
        go.Scatter(
            x=[31 - i for _ in words for i in range(32)],
            y=[row for row in range(len(words)) for _ in range(32)],
            text=[str(bit) for row in bits for bit in row],
            mode="markers+text",
            marker={
                "symbol": "square",
                "size": 19,
                "color": [c for row in colours for c in row],
                "line": {"width": [1.6 if bit else 0.4 for row in bits for bit in row], "color": _INK},
            },
            textfont={"size": 11, "color": _INK},
            hovertemplate="bit %{x}: %{text}<extra></extra>",
        )
    )
    for row, note in enumerate(notes):
        figure.add_annotation(x=-1, y=row, text=note, showarrow=False, xanchor="left", font={"size": 12})
    _layout(figure, title, "bit (index)", "", height=150 + 44 * len(words), showlegend=False)
    figure.update_xaxes(range=[31.8, -9 if notes else -0.8], tickvals=[31, 24, 16, 8, 0], showgrid=False)
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
            colorbar={"title": {"text": "lane", "side": "right", "font": {"size": 12}}, "thickness": 12},
            hovertemplate="output %{y}, input %{x}: lane %{z}<extra></extra>",
        )
    )
    figure.add_scatter(
        x=mine["k"].to_list(),
        y=mine["n"].to_list(),
        text=[f"r{register}" for register in mine["register"]],
        mode="markers+text",
        marker={"symbol": "square", "size": 17, "color": "white", "line": {"color": PALETTE[1], "width": 2}},
        textfont={"size": 10, "color": _INK},
        hovertemplate="lane " + str(lane) + ", %{text}<extra></extra>",
    )
    _layout(figure, title, "input k (index in the tile)", "output n (index)", height=470, showlegend=False)
    return figure.update_yaxes(autorange="reversed", showgrid=False).update_xaxes(showgrid=False)
