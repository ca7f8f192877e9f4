"""Fit the predicted times to measurements, and keep the error of every point.

    python data/benchmarks/calibrate.py

Reads the H200's measurements beside this script and the paper's table, and writes ``calibration.json`` (efficiencies and the
error of every measured point) and ``validation.csv`` (every cell of the paper's table: predicted, published, error, reason).
`qoqlab.prediction` holds the efficiencies that this prints; a test compares them. Seconds on a CPU.
"""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qoqlab import prediction, validation
from qoqlab.machines import GPUS, MODELS, Geometry
from qoqlab.prediction import Efficiency, Work
from qoqlab.roofline import PRECISIONS

HERE = Path(__file__).resolve().parent
H200 = GPUS["H200"]
LLAMA = MODELS["Llama-3-8B"]
SCHEMES = {"w4a8-g128": PRECISIONS["W4A8KV4"], "w4a8-channel": PRECISIONS["W4A8KV4 per channel"]}
Point = tuple[dict[str, Any], Work, float]


def read(name: str) -> list[dict[str, Any]]:
    """Rows of a benchmark."""
    rows: list[dict[str, Any]] = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))["results"]
    return rows


def gemms(peer: str | None = None) -> list[Point]:
    """The measured GEMMs, ours or a peer's in fp16."""
    found = []
    for row in read("gemm_h200"):
        if peer and row["precision"] != "w4a8-g128":
            continue
        scheme = PRECISIONS["fp16"] if peer else SCHEMES[row["precision"]]
        label = {"op": "gemm", "precision": peer or row["precision"], **{key: row[key] for key in "nkm"}}
        work = prediction.gemm_work(row["n"], row["k"], row["m"], scheme, H200)
        found.append((label, work, row["peers"][peer] if peer else row["us"]))
    return found


def attentions(peers: bool) -> list[Point]:
    """The measured decode attention on KV4, or the fastest peer on an fp16 cache."""
    scheme, found = PRECISIONS["fp16" if peers else "W4A8KV4"], []
    for row in read("kv4_decode"):
        width = row["heads"] * row["head_dim"]
        model = Geometry("one layer", 1, width, row["heads"], row["kv_heads"], width, 2, row["head_dim"])
        work = prediction.attention_work(model, row["batch"], row["tokens"], scheme, H200)
        label = {"op": "attention", **{key: row[key] for key in ("batch", "tokens", "heads", "kv_heads", "head_dim")}}
        found.append((label, work, min(row["peers"].values()) if peers else row["us"]))
    return found


def steps() -> tuple[list[Point], list[Point]]:
    """The measured decode steps: ours in three parts each, and fp16 as a whole."""
    ours: list[Point] = []
    whole: list[Point] = []
    for row in read("decode"):
        batch, context, scheme = row["batch"], row["context"], PRECISIONS["W4A8KV4"]
        total = prediction.step_work(LLAMA, batch, context, scheme, H200)
        linear = sum((prediction.gemm_work(n, k, batch, scheme, H200) for n, k in LLAMA.shapes.values()), Work())
        parts = {
            "gemm": linear * LLAMA.layers,
            "attention": prediction.attention_work(LLAMA, batch, context, scheme, H200) * LLAMA.layers,
        }
        parts["rest"] = total + (parts["gemm"] + parts["attention"]) * -1.0
        ours += [
            ({"op": "decode_step", "part": part, "batch": batch, "context": context}, work, row[f"{part}_us"])
            for part, work in parts.items()
        ]
        work = prediction.step_work(LLAMA, batch, context, PRECISIONS["fp16"], H200)
        whole.append(({"op": "decode_step", "part": "all", "batch": batch, "context": context}, work, row["fp16_us"]))
    return ours, whole


def calibrated() -> dict[str, tuple[Efficiency, list[Point]]]:
    """Efficiencies by name, with the points they come from. Our unpacking is hidden: with a tax the fit is no better."""
    ours, whole = steps()
    sets = {"OURS": gemms() + attentions(peers=False) + ours}
    sets["TORCH_FP16"] = gemms("cublas_fp16") + attentions(peers=True) + whole
    return {
        name: (prediction.fit([p[1] for p in points], [1e-6 * p[2] for p in points], frozenset({"tax"})), points)
        for name, points in sets.items()
    }


def main() -> None:
    """Fit, print, write."""
    results = []
    efficiencies = {}
    for name, (efficiency, points) in calibrated().items():
        efficiencies[name] = asdict(efficiency)
        for label, work, us in points:
            predicted = 1e6 * efficiency.seconds(work)
            row = {"set": name, **label, "us": us, "predicted_us": predicted, "error": predicted / us - 1}
            results.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
    rows = validation.served(pd.read_csv(HERE.parent / "paper" / "throughput.csv"))
    published = validation.fitted(rows)
    efficiencies |= {name: asdict(efficiency) for name, efficiency in published.items()}
    for name, values in efficiencies.items():
        print(name, {key: float(f"{value:.3g}") for key, value in values.items()})
    errors = pd.DataFrame(results).assign(size=lambda t: t["error"].abs())
    print(errors.groupby(["set", "op"])["size"].agg(["count", "median", lambda s: s.quantile(0.9), "max"]).round(3))
    table = validation.compared(rows, published)
    table["error"] = table["error"].round(3)
    table[["bound", "predicted"]] = table[["bound", "predicted"]].round().astype(int)
    table["tokens_per_s"] = table["tokens_per_s"].astype(int)
    print(table.groupby("system")["error"].agg(["count", lambda e: e.abs().median(), lambda e: (e.abs() <= 0.25).sum()]))
    for gpu in ("A100", "L40S"):
        other = validation.foreseen(rows, gpu)
        print(f"fitted on {gpu} alone, the other card:", other.groupby("system")["error"].agg(lambda e: e.abs().median()))
    columns = ["gpu", "system", "precision", "model", "used_batch", "tokens_per_s", "bound", "predicted", "error", "reason"]
    table[columns].to_csv(HERE / "validation.csv", index=False)
    record = {
        "gpu": "NVIDIA H200",
        "date": date.today().isoformat(),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip(),
        "command": "python data/benchmarks/calibrate.py",
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "efficiencies": efficiencies,
        "results": results,
    }
    (HERE / "calibration.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
