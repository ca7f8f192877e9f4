"""Measure what `qoqlab.quantize` holds at its peak and how long it takes, on a large model's geometry with random weights.

    python data/benchmarks/peak_memory.py --out data/benchmarks/peak_memory.json

Needs an NVIDIA GPU (its allocator counts exactly). Takes models of one and of three decoder blocks and projects the whole
model, in both places where it may rest: "device", all weights on the GPU, and "memory", all weights in main memory while
blocks visit the GPU one at a time (`qoqlab.offload.work_on`). ``--blocks 32`` runs the whole model instead.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a bare checkout will do

import qoqlab  # noqa: E402
from qoqlab.pipeline import peak_bytes  # noqa: E402

#: Llama-3-8B: hidden, intermediate, query heads, KV heads, head_dim, layers, vocabulary.
GEOMETRY = {
    "hidden": 4096,
    "intermediate": 14336,
    "heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "layers": 32,
    "vocabulary": 128256,
}


def configuration(layers: int, length: int) -> transformers.LlamaConfig:
    """The geometry with a number of layers."""
    g = GEOMETRY
    return transformers.LlamaConfig(
        vocab_size=g["vocabulary"],
        hidden_size=g["hidden"],
        intermediate_size=g["intermediate"],
        num_hidden_layers=layers,
        num_attention_heads=g["heads"],
        num_key_value_heads=g["kv_heads"],
        head_dim=g["head_dim"],
        max_position_embeddings=length,
        dtype=torch.bfloat16,
    )


def model_bytes(layers: int) -> int:
    """Bytes of the unquantised bf16 model."""
    with torch.device("meta"):
        return 2 * sum(p.numel() for p in transformers.LlamaForCausalLM(configuration(layers, 1024)).parameters())


def random_model(layers: int, length: int) -> torch.nn.Module:
    """A bf16 model on the GPU, weights of unit gain."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return transformers.LlamaForCausalLM(configuration(layers, length)).eval()
    finally:
        torch.set_default_dtype(default)


def run(recipe: str, where: str, blocks: int, sequences: int, length: int) -> dict[str, Any]:
    """Quantise a model of so many blocks in place and report bytes and seconds."""
    g = GEOMETRY
    model = random_model(blocks, length)
    ids = torch.randint(0, g["vocabulary"], (sequences, length))
    if where == "memory":
        model = qoqlab.offload.work_on(model.cpu(), "cuda")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    q = qoqlab.quantize(model, recipe, ids, inplace=True, progress=False)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated()
    stages = q.report.groupby("stage", sort=False)["seconds"].sum() / blocks
    return {
        "blocks": blocks,
        "peak_bytes": peak,
        "peak_bytes_beside_model": peak - before,
        "seconds": seconds,
        "stage_seconds_per_block": stages.round(3).to_dict(),
    }


def measure(recipe: str, where: str, blocks: int, sequences: int, length: int) -> dict[str, Any]:
    """Bytes and seconds of so many blocks, and of all: what a block adds to a model of one is what each further one adds."""
    g = GEOMETRY
    first, found = run(recipe, where, 1, sequences, length), run(recipe, where, blocks, sequences, length)
    per_block = (found["seconds"] - first["seconds"]) / (blocks - 1)
    # the peak is at the first block, while all others are unquantised
    more = model_bytes(g["layers"]) - model_bytes(blocks) if where == "device" else 0
    kv_width = g["kv_heads"] * g["head_dim"]
    return {
        "op": "quantize",
        "recipe": recipe,
        "weights_rest_on": where,
        "geometry": g,
        "calibration": [sequences, length],
        **found,
        "peak_bytes_on_paper": peak_bytes(
            g["hidden"], g["intermediate"], kv_width, sequences * length, gptq="gptq" in recipe
        ),
        "seconds_per_block": per_block,
        "projected": blocks < g["layers"],
        "peak_bytes_all_blocks": found["peak_bytes"] + more,
        "seconds_all_blocks": found["seconds"] + per_block * (g["layers"] - blocks),
    }


def report(r: dict[str, Any]) -> None:
    """Print one result."""
    peak, beside, paper = r["peak_bytes"], r["peak_bytes_beside_model"], r["peak_bytes_on_paper"]["total"]
    place, per_block = r["weights_rest_on"], r["seconds_per_block"]
    print(f"{r['recipe']}, weights rest on {place}, {r['blocks']} blocks: {per_block:.2f} s a block")
    print(f"  peak {peak / 1e9:.1f} GB, {beside / 1e9:.1f} GB beside the model (on paper {paper / 1e9:.1f} GB)")
    how = f"projected from {r['blocks']}" if r["projected"] else "measured"
    whole, seconds = r["peak_bytes_all_blocks"] / 1e9, r["seconds_all_blocks"]
    print(f"  all {r['geometry']['layers']} blocks, {how}: {seconds:.0f} s, peak {whole:.1f} GB", flush=True)


def main() -> None:
    """Run all variants and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=3, help="blocks that are really run, 2 to 32")
    parser.add_argument("--recipes", nargs="+", default=["qoq-g128"])
    parser.add_argument("--where", nargs="+", default=["device", "memory"], choices=["device", "memory"])
    parser.add_argument("--commit", help="recorded where the code runs outside a git checkout")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: this measurement reads the GPU allocator's peak")
    if not 2 <= options.blocks <= GEOMETRY["layers"]:
        raise SystemExit(f"--blocks: expected 2 to {GEOMETRY['layers']}, got {options.blocks}")
    run("qoq-g128", "device", 1, 8, 1024)  # warms up
    results = []
    for recipe in options.recipes:
        for where in options.where:
            results.append(r := measure(recipe, where, options.blocks, 128, 1024))
            report(r)
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT)
    record = {
        "gpu": torch.cuda.get_device_name(),
        "date": date.today().isoformat(),
        "commit": options.commit or git.stdout.strip(),
        "command": " ".join(["python", *sys.argv]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "results": results,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
