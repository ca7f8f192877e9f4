"""Every method of the paper's tables on the bundled model, as it is and with planted outliers.

    python data/benchmarks/comparison.py --wikitext WIKITEXT_2_FOLDER --out data/benchmarks/comparison.csv

One row per model, method and text. Texts: Python's documentation, which calibration also uses (other topics of it), and
WikiText-2, if its folder is given, which is unlike anything that the model was trained on (its test split as
`qoqlab.load_text` reads it; published perplexities are of the raw release in windows of 2048 tokens, the table beside this
script of the word-level release in windows of 512, as its JSON file says). Takes hours on two CPU cores and minutes on a
GPU, ``--device cuda``; ``--jobs`` measures several methods at a time. A JSON file beside the table says with which versions.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from datetime import date
from pathlib import Path
from typing import Any

import joblib
import pandas as pd
import torch
import transformers

import qoqlab
from qoqlab.bundled import spread
from qoqlab.comparison import resolve
from qoqlab.tour import ACTIVATION_RATIO, KEY_RATIO, LENGTH

CALIBRATION_WINDOWS = 16
#: Of `LENGTH` tokens, of every text. With 16 of them, methods that lie close to each other changed places from text to text.
TEST_WINDOWS = 128


def models_on(device: str) -> tuple[dict[str, torch.nn.Module], Any]:
    """(the bundled model as it is and with planted outliers, its tokeniser)."""
    model, tokenizer = qoqlab.load_tiny()
    model = model.to(device)
    return {"bundled": model, "planted": qoqlab.outliers.plant(model, ACTIVATION_RATIO, KEY_RATIO)}, tokenizer


def texts_of(wikitext: Path | None) -> dict[str, str]:
    """The texts that methods are tested on."""
    texts = {"Python documentation": qoqlab.load_text("python-docs", "test")}
    if wikitext:
        texts["WikiText-2"] = qoqlab.load_text("wikitext-2", "test", path=wikitext)
    return texts


def release_of(text: str) -> str:
    """Which of WikiText-2's two releases a text is of; their perplexities differ."""
    return "word-level release (rare words are <unk>)" if "<unk>" in text else "raw release"


def windows_of(tokenizer: Any, texts: dict[str, str]) -> dict[str, torch.Tensor]:
    """Tokens of the windows that are tested, from all over each text."""
    return {name: spread(qoqlab.tokens(tokenizer, text, LENGTH), TEST_WINDOWS) for name, text in texts.items()}


def facts_of(script: str, options: argparse.Namespace, texts: dict[str, str]) -> dict[str, Any]:
    """What a reader needs to make the same numbers."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": date.today().isoformat(),
        "commit": options.commit or commit.stdout.strip(),
        "command": f"python data/benchmarks/{script} --wikitext WIKITEXT_2_FOLDER --device {options.device} "
        f"--jobs {options.jobs} --out FILE",
        "gpu": torch.cuda.get_device_name() if options.device.startswith("cuda") else None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "qoqlab": qoqlab.__version__,
        },
        "window": LENGTH,
        "calibration_windows": CALIBRATION_WINDOWS,
        "test_windows": TEST_WINDOWS,
        **({"wikitext_2": f"test split of the {release_of(texts['WikiText-2'])}"} if "WikiText-2" in texts else {}),
        "activation_ratio": ACTIVATION_RATIO,
        "key_ratio": KEY_RATIO,
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wikitext", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="methods that are measured at the same time")
    parser.add_argument("--device", default="cpu", help="where models are quantised and measured")
    parser.add_argument("--commit", help="recorded where the code runs outside a git checkout")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="measure these again and replace their rows in OUT")
    options = parser.parse_args()
    models, tokenizer = models_on(options.device)
    texts = texts_of(options.wikitext)
    tests = windows_of(tokenizer, texts)
    calibration = spread(
        qoqlab.tokens(tokenizer, qoqlab.load_text("python-docs", "calibration"), LENGTH), CALIBRATION_WINDOWS
    )
    start = time.perf_counter()
    one = joblib.delayed(qoqlab.compare)
    recipes = resolve(options.only or "paper")
    pairs = [({name: network}, [recipe]) for name, network in models.items() for recipe in recipes]
    parts = joblib.Parallel(n_jobs=options.jobs)(one(recipe, network, calibration, tests) for network, recipe in pairs)
    table = pd.concat(parts, ignore_index=True)
    if options.only:
        before = pd.read_csv(options.out)
        order = list(dict.fromkeys(before["method"]))
        table = pd.concat([before[~before["method"].isin(options.only)], table])
        table = table.sort_values(["model", "method"], key=lambda c: c.map((order + list(models)).index), kind="stable")
    table.round(4).to_csv(options.out, index=False)
    print(table.to_string())
    if not options.only:
        facts = facts_of("comparison.py", options, texts) | {"minutes": round((time.perf_counter() - start) / 60, 1)}
        options.out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
