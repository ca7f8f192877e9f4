"""How much does the choice of calibration text matter? The closest methods, each calibrated on several disjoint samples.

    python data/benchmarks/calibration_spread.py --wikitext WIKITEXT_2_FOLDER --out data/benchmarks/calibration_spread.json

Bundled and planted model, the texts and windows of `comparison.py`. Prints, per model, method and text, mean and standard
deviation of the perplexity gap to fp16 and of the logits' signal-to-error ratio. Minutes on a GPU (``--device cuda``).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import joblib
import pandas as pd
from comparison import CALIBRATION_WINDOWS, complete, facts_of, models_on, texts_of, windows_of

import qoqlab
from qoqlab.bundled import spread
from qoqlab.tour import LENGTH

PRESETS = ("quarot-w4a8kv4", "qoq-per-channel", "qoq-g128", "qoq-plus", "awq-w4a8kv4-g128", "atom-w4a8kv4-g128")
DRAWS = 4
KEPT = ["model", "method", "text", "gap", "logits_sqnr_db"]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wikitext", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="methods that are measured at the same time")
    parser.add_argument("--device", default="cpu", help="where models are quantised and measured")
    parser.add_argument("--commit", help="recorded where the code runs outside a git checkout")
    options = parser.parse_args()
    models, tokenizer = models_on(options.device)
    windows = qoqlab.tokens(tokenizer, qoqlab.load_text("python-docs", "calibration"), LENGTH)
    samples = [spread(windows[draw:], CALIBRATION_WINDOWS) for draw in range(DRAWS)]
    texts = texts_of(options.wikitext)
    tests = windows_of(tokenizer, texts)
    one = joblib.delayed(qoqlab.compare)
    cases = [(draw, name, preset) for draw in range(DRAWS) for name in models for preset in PRESETS]
    tables = joblib.Parallel(n_jobs=options.jobs)(
        one([preset], {name: models[name]}, samples[draw], tests, runtime=False, progress=False)
        for draw, name, preset in cases
    )
    parts = [complete(t)[KEPT].assign(draw=draw) for t, (draw, _, _) in zip(tables, cases, strict=True)]
    table = pd.concat(parts, ignore_index=True)
    record = facts_of("calibration_spread.py", options, texts) | {"results": table.round(4).to_dict("records")}
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table.groupby(["model", "text", "method"], sort=False)[["gap", "logits_sqnr_db"]].agg(["mean", "std"]).round(2))


if __name__ == "__main__":
    main()
