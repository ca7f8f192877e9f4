"""``make tour``: quantise the bundled model with QoQ, stage by stage, print one table and write one interactive page."""

from __future__ import annotations

import argparse
import html
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from . import capture, outliers, recipes
from .bundled import load_text, load_tiny, spread, tokens
from .comparison import Bench
from .comparison import measure as measure_recipe
from .pipeline import QuantizedModel, quantize
from .recipes import Recipe
from .schemes import Scheme

#: Tokens per window; calibration and test windows. Small enough for two laptop cores, large enough to rank methods.
LENGTH, CALIBRATION_WINDOWS, TEST_WINDOWS = 512, 8, 16
ACTIVATION_RATIO, KEY_RATIO = 30.0, 10.0
#: The layer whose insides the page shows.
LAYER = 2


@dataclass
class Result:
    """One model under every recipe: the printed table and the complete recipe's quantised model."""

    table: pd.DataFrame
    best: QuantizedModel


def tour_recipes() -> list[Recipe]:
    """Unquantised, round-to-nearest on groups, then the paper's ladder, whose last two complete rungs are QoQ's variants."""
    return [recipes.get("fp16"), recipes.get("rtn-w4a8kv4-g128"), *recipes.ladder()]


def measure(name: str, model: nn.Module, calibration: torch.Tensor, test: torch.Tensor, bar: tqdm) -> Result:
    """Quantise ``model`` with every recipe of the tour; one table row each."""
    rows = []
    bench = Bench(model, calibration, {"test": test})
    last = tour_recipes()[-1]
    for recipe in tour_recipes():
        bar.set_description(f"{name}: {recipe.name}"[:40].ljust(40))
        found, quantized = measure_recipe(recipe, bench, runtime=False, report=recipe == last)
        rows += [{"model": name, **row} for row in found]
        bar.update()
    table = pd.DataFrame(rows).rename(columns={"method": "step"})
    table["fp16"] = table["perplexity"].iloc[0]
    table["change"] = table["perplexity"].diff()
    # the ladder starts afresh after the two methods in front of it
    table.loc[:2, "change"] = float("nan")
    return Result(table, quantized)


def stages(model: nn.Module, calibration: torch.Tensor, ids: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    """What layer `LAYER` sees before any stage and after each equivalence of `qoq-g128`, unquantised."""
    found = {"original": capture.layer_tensors(model, ids, LAYER)}
    steps = [s for s in recipes.get("qoq-g128").steps if s.name not in ("clip", "gptq")]
    for count in range(1, len(steps) + 1):
        changed = quantize(model, Recipe("transforms", Scheme(), tuple(steps[:count])), calibration, progress=False)
        found[f"after {steps[count - 1].name}"] = capture.layer_tensors(changed.model, ids, LAYER)
    return found


def side_by_side(heads: torch.Tensor) -> torch.Tensor:
    """``[H, T, D]`` -> ``[T, H * D]``."""
    return heads.movedim(0, 1).flatten(1)


def same_scale(*maps: Any) -> list[Any]:
    """Give heat maps one common colour range, so that they compare."""
    ranges = [(m.data[0].zmin, m.data[0].zmax) for m in maps]
    for m in maps:
        m.update_traces(zmin=min(low for low, _ in ranges), zmax=max(high for _, high in ranges))
    return list(maps)


def render(results: dict[str, Result], seen: dict[str, dict[str, torch.Tensor]], python: str) -> str:
    """The page: one self-contained HTML document, plotly embedded once."""
    from . import viz

    table = pd.concat([r.table for r in results.values()], ignore_index=True)
    keys = {stage: tensors["keys"].abs().amax((0, 1)) for stage, tensors in seen.items()}
    parts: list[tuple[str, str, list[Any]]] = [
        (
            "The ladder",
            "Each rung adds one thing to the rung before it, in the order of the paper's ablation. Going to 4-bit "
            "weights and to a 4-bit cache costs perplexity; rotation, clipping and SmoothAttention win most of it "
            "back. Steps of 0.2 and less say little on a model this small: another choice of calibration text moves "
            "the result as much. There the signal-to-error ratio of the logits is the steadier judge (the paper's 7B "
            "model gains 0.05 to 0.07 from progressive groups and reordering together).",
            [viz.ladder(ladder_rows(table))],
        ),
        (
            "Error per layer",
            "How faithfully each layer of the planted model computes what it adds to the residual stream, if it were "
            "quantised after each stage: SQNR is the ratio of signal to error in decibels, so higher is better, and 6 dB "
            "halve the error. Stages are in the order in which the finished recipe runs them, not in the ladder's; lines "
            "that lie on top of each other are stages that leave the error as it is.",
            [viz.error_by_layer(results["planted"].best.report, "Output SQNR of every layer, stage by stage")],
        ),
        (
            "Activations, before and after rotation",
            "Input of the query, key and value projections. A few channels tower over the others, so one scale per "
            "token leaves little room for the rest; multiplying by a Hadamard matrix spreads them evenly. Both maps use "
            "the same colours.",
            same_scale(
                viz.outlier_map(seen["original"]["qkv"], "Attention input before rotation, planted model"),
                viz.outlier_map(seen["after rotate"]["qkv"], "After rotation: the same tokens"),
            ),
        ),
        (
            "Keys, before and after SmoothAttention",
            "Keys carry fixed outlier channels in RoPE pairs (i, i + 64). Rotation cannot reach them, since RoPE stands "
            "in between; SmoothAttention divides them by lambda and multiplies the queries instead. The maps show all KV "
            "heads side by side, 128 channels each.",
            [
                *same_scale(
                    viz.outlier_map(side_by_side(seen["original"]["keys"]), "Keys before SmoothAttention"),
                    viz.outlier_map(side_by_side(seen["after smooth_attention"]["keys"]), "Keys after SmoothAttention"),
                ),
                viz.channel_profile(
                    {k: keys[k] for k in ("original", "after smooth_attention")}, "Largest key magnitude per channel"
                ),
            ],
        ),
        (
            "Inputs of down_proj, stage by stage",
            "Reordering sorts channels by their largest magnitude on the calibration text, so that salient ones, now at "
            "the right, share a group of 128 weights. Output smoothing then divides every channel by a scale of its own: "
            "in the last figure, channels by rank, the cliff of a few dominant ones at the left gets lower.",
            [
                *same_scale(
                    *(
                        viz.outlier_map(seen[stage]["down"], f"Input of down_proj, {stage}", log=True)
                        for stage in ("original", "after reorder", "after smooth_output")
                    )
                ),
                viz.channel_profile(
                    {
                        stage: seen[stage]["down"].abs().amax(0) / seen[stage]["down"].abs().amax(0).median()
                        for stage in ("original", "after smooth_output")
                    },
                    "Channels of down_proj's input by rank",
                    ranked=True,
                    y="largest |x| over the median",
                ),
            ],
        ),
    ]
    body, embedded = [], False
    for title, text, figures in parts:
        body.append(f"<h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>")
        for figure in figures:
            body.append(figure.to_html(full_html=False, include_plotlyjs=not embedded, include_mathjax=False))
            embedded = True
    numbers = format_table(table).to_html(index=False, border=0, escape=True)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>qoqlab tour</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }}
th, td {{ padding: .25em .7em; text-align: right; border-bottom: 1px solid #ddd; }}
td:nth-child(-n+3), th:nth-child(-n+3) {{ text-align: left; }}
td {{ white-space: nowrap; }}
.wide {{ overflow-x: auto; }}
</style></head><body>
<h1>QoQ on a small language model, stage by stage</h1>
<p>{html.escape(verdict(table))}</p>
<p>The planted model computes the same function as the bundled one, but a few of its activation channels are about
{ACTIVATION_RATIO:.0f} times and a few of its key channels about {KEY_RATIO:.0f} times the median, as large models have by
themselves. Perplexities depend on the interpreter's own documentation, here Python {html.escape(python)}.</p>
<div class="wide">{numbers}</div>
<p><b>Reading the table.</b> W4A8KV4 g128: 4-bit weights in groups of 128, 8-bit activations, 4-bit keys and values. rtn:
round to nearest, no preparation. change: perplexity against the row above. logits SQNR: signal over error of the model's
output in decibels, higher is better. KV, B/token: bytes that one token adds to the cache. The lessons (make lab) explain
each of them.</p>
{"".join(body)}
</body></html>
"""


def ladder_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that form the ladder, round-to-nearest on top."""
    return table[table["step"] != "fp16"]


def format_table(table: pd.DataFrame) -> pd.DataFrame:
    """The table that people read: text columns, rounded numbers with units in the headings."""

    def signed(value: float) -> str:
        return "" if pd.isna(value) else f"{value:+.2f}"

    return pd.DataFrame(
        {
            "model": table["model"],
            "step": table["step"],
            "format": table["format"],
            "perplexity": table["perplexity"].map("{:.2f}".format),
            "gap to fp16": table["gap"].map(signed),
            "change": table["change"].map(signed),
            "logits SQNR, dB": table["logits_sqnr_db"].map(lambda v: "exact" if v > 60 else f"{v:.1f}"),
            "weights, MB": table["weight_mb"].map("{:.1f}".format),
            "KV, B/token": table["kv_bytes_per_token"].map("{:.0f}".format),
            "quantised in, s": table["seconds"].map("{:.1f}".format),
        }
    )


def verdict(table: pd.DataFrame) -> str:
    """Two sentences that compare QoQ with round to nearest on both models, from the numbers."""
    said = []
    for name, rows in table.groupby("model", sort=False):
        gap = rows.set_index("step")["gap"]
        rtn, qoq = gap["rtn-w4a8kv4-g128"], gap.iloc[-1]
        share = f"{qoq / rtn:.0%} of" if rtn > 0 else "against"
        said.append(
            f"On the {name} model round-to-nearest W4A8KV4 g128 loses {rtn:.2f} perplexity and QoQ {qoq:.2f}, {share} that."
        )
        if rtn < 0.05 * rows["fp16"].iloc[0]:
            said.append("That model is easy to quantise: its differences are small, so look at the planted one.")
    return " ".join(said)


def main(arguments: list[str] | None = None) -> int:
    """Command line of ``qoqlab-tour``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/tour.html"), help="where the page goes")
    parser.add_argument("--figure", type=Path, help="also write the ladder as SVG or PNG (needs kaleido and Chrome)")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    model, tokenizer = load_tiny()
    calibration = spread(tokens(tokenizer, load_text("python-docs", "calibration"), LENGTH), CALIBRATION_WINDOWS)
    test = spread(tokens(tokenizer, load_text("python-docs", "test"), LENGTH), TEST_WINDOWS)
    models = {
        "bundled": model,
        "planted": outliers.plant(model, activation_ratio=ACTIVATION_RATIO, key_ratio=KEY_RATIO),
    }
    with tqdm(total=len(models) * len(tour_recipes()), unit="recipe") as bar:
        results = {name: measure(name, network, calibration, test, bar) for name, network in models.items()}
    seen = stages(models["planted"], calibration, test[:1, :256])
    table = pd.concat([r.table for r in results.values()], ignore_index=True)
    with pd.option_context("display.width", 200, "display.max_columns", 20):
        print(format_table(table).to_string(index=False))
    print(f"\n{verdict(table)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(render(results, seen, sys.version.split()[0]))
    if options.figure:
        from . import viz

        viz.ladder(ladder_rows(table)).write_image(options.figure, width=1000, height=480)
    print(f"\nDone in {time.perf_counter() - start:.0f} s. Open {options.out} in a browser; `make lab` opens the lessons.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
