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
from collections.abc import Sequence
from dataclasses import asdict, fields
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qoqlab import prediction, validation
from qoqlab.machines import GPUS, MODELS, Geometry
from qoqlab.prediction import Efficiency, Work
from qoqlab.roofline import PRECISIONS, SERVED

HERE = Path(__file__).resolve().parent
H200 = GPUS["H200"]
LLAMA = MODELS["Llama-3-8B"]
SCHEMES = {"w4a8-g128": PRECISIONS["W4A8KV4"], "w4a8-channel": PRECISIONS["W4A8KV4 per channel"]}
#: Rounds of serving.
ROUNDS = (
    "24gb", "24gb_fp16", "48gb", "72b", "72b_w8", "80gb_fp16", "channel", "fp16", "llama2", "llama2_13b", "llama2_fp16",
    "mistral", "mistral_fp16", "peers", "yi", "yi_fp16",
)  # fmt: skip
RECORDS = ("serve_h200", *(f"serve_{name}_h200" for name in ROUNDS))
#: What differs from fp16 in torch's other formats, as far as a few rounds can tell.
FREE = {"w8a8": frozenset({"slowing", "gemm_seconds"}), "w8a8kv8": frozenset({"slowing", "gemm_seconds", "cache"})}
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


def rounds(files: Sequence[str], precision: str, system: prediction.System) -> list[Point]:
    """Measured rounds of serving, each in two points: its prompts, and its steps. (8192 tokens of prompts at a time.)"""
    found: list[Point] = []
    names = {name.lower(): model for name, model in MODELS.items()}
    for row in (row for file in files for row in read(file) if row["precision"] == precision):
        model, batch, prompt, output = names[row["model"]], row["batch"], row["prompt"], row["output"]
        scheme, together = PRECISIONS[SERVED[precision]], max(1, min(batch, 8192 // prompt))
        prefill = prediction.prefill_work(model, together, prompt, scheme, H200, system) * (batch / together)
        step = prediction.step_work(model, batch, prompt + output // 2, scheme, H200, system) * (output - 1)
        for part, work in (("prefill", prefill), ("decode", step)):
            label = {"op": "serve", "part": part, "model": row["model"], "precision": precision, "batch": batch}
            found.append((label, work, 1e6 * row[f"{part}_s"]))
    return found


def calibrated() -> dict[str, tuple[Efficiency, list[Point]]]:
    """Efficiencies by name, with the points they come from. Our unpacking is hidden: with a tax the fit is no better."""
    ours, whole = steps()
    served = [*rounds(RECORDS, "w4a8kv4-g128", prediction.OURS), *rounds(RECORDS, "w4a8kv4", prediction.OURS)]
    sets = {"OURS": gemms() + attentions(peers=False) + ours + served}
    sets["TORCH_FP16"] = (
        gemms("cublas_fp16") + attentions(peers=True) + whole + rounds(RECORDS, "fp16", prediction.TORCH_FP16)
    )
    found = {name: (fitted(points, frozenset({"tax"})), points) for name, points in sets.items()}
    fp16 = found["TORCH_FP16"][0]
    for name, free in FREE.items():
        points = rounds(RECORDS, name, prediction.TORCH_FP16)
        fixed = frozenset(f.name for f in fields(Efficiency)) - free
        found[f"TORCH_{name.upper()}"] = fitted(points, fixed, fp16), points
    return found


def unseen(points: list[Point], model: str) -> list[dict[str, Any]]:
    """Whole rounds of every model but ``model``, foreseen by efficiencies that were fitted without them."""
    known = [point for point in points if point[0].get("model", model) == model]
    efficiency = fitted(known, frozenset({"tax"}))
    times: dict[tuple[str, int], dict[str, Any]] = {}
    for label, work, us in (point for point in points if point[0].get("model", model) != model):
        row = times.setdefault(
            (label["model"], label["batch"]),
            {"model": label["model"], "batch": label["batch"], "us": 0.0, "predicted_us": 0.0},
        )
        row["us"] += us
        row["predicted_us"] += 1e6 * efficiency.seconds(work)
    return [row | {"error": row["predicted_us"] / row["us"] - 1} for row in times.values()]


def fitted(points: list[Point], fixed: frozenset[str], known: Efficiency | None = None) -> Efficiency:
    """Efficiencies of points."""
    return prediction.fit([p[1] for p in points], [1e-6 * p[2] for p in points], fixed, known or Efficiency())


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """A row with four digits behind the point."""
    return {key: round(float(value), 4) if isinstance(value, float) else value for key, value in row.items()}


def main() -> None:
    """Fit, print, write."""
    results, others = [], []
    efficiencies = {}
    for name, (efficiency, points) in calibrated().items():
        efficiencies[name] = asdict(efficiency)
        for label, work, us in points:
            predicted = 1e6 * efficiency.seconds(work)
            results.append(rounded({"set": name, **label, "us": us, "predicted_us": predicted, "error": predicted / us - 1}))
        if name in ("OURS", "TORCH_FP16"):  # 8 bits were measured on too few models
            others += [rounded({"set": name, **row}) for row in unseen(points, "llama-3-8b")]
    rows = validation.served(pd.read_csv(HERE.parent / "paper" / "throughput.csv"))
    published = validation.fitted(rows)
    efficiencies |= {name: asdict(efficiency) for name, efficiency in published.items()}
    for name, values in efficiencies.items():
        print(name, {key: float(f"{value:.3g}") for key, value in values.items()})
    errors = pd.DataFrame(results).assign(size=lambda t: t["error"].abs())
    print(errors.groupby(["set", "op"])["size"].agg(["count", "median", lambda s: s.quantile(0.9), "max"]).round(3))
    print("fitted on Llama-3-8B alone, rounds of other models:")
    print(pd.DataFrame(others).round(3).to_string(index=False))
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
        "unseen_models": others,
    }
    (HERE / "calibration.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
