"""How much does the choice of calibration text matter? QoQ on the planted bundled model, over several disjoint samples.

    python data/benchmarks/calibration_spread.py --out data/benchmarks/calibration_spread.json

Runs on the CPU in about two minutes. Prints, per preset, mean and standard deviation of the perplexity gap to fp16 and
of the logits' signal-to-error ratio.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

import pandas as pd
import torch
import transformers

import qoqlab
from qoqlab.bundled import spread
from qoqlab.evaluate import logits_sqnr_db
from qoqlab.tour import ACTIVATION_RATIO, CALIBRATION_WINDOWS, KEY_RATIO, LENGTH, TEST_WINDOWS

PRESETS = ("qoq-per-channel", "qoq-g128")
DRAWS = 4


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    model, tokenizer = qoqlab.load_tiny()
    planted = qoqlab.outliers.plant(model, ACTIVATION_RATIO, KEY_RATIO)
    windows = qoqlab.tokens(tokenizer, qoqlab.load_text("python-docs", "calibration"), LENGTH)
    test = spread(qoqlab.tokens(tokenizer, qoqlab.load_text("python-docs", "test"), LENGTH), TEST_WINDOWS)
    base = qoqlab.perplexity(planted, test)
    with torch.no_grad():
        exact = planted(test[:4], use_cache=False).logits.float()
    rows = []
    for draw in range(DRAWS):
        sample = spread(windows[draw:], CALIBRATION_WINDOWS)
        for preset in PRESETS:
            q = qoqlab.quantize(planted, preset, sample, progress=False, report=False)
            gap, sqnr = qoqlab.perplexity(q, test) - base, logits_sqnr_db(exact, q, test[:4])
            rows.append({"op": "calibration_spread", "preset": preset, "draw": draw, "gap": gap, "logits_sqnr_db": sqnr})
    record = {
        "gpu": None,
        "date": date.today().isoformat(),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "command": " ".join(["python", *sys.argv]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "results": rows,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(pd.DataFrame(rows).groupby("preset", sort=False)[["gap", "logits_sqnr_db"]].agg(["mean", "std"]).round(2))


if __name__ == "__main__":
    main()
