"""Measure what `qoqlab.quantize` holds at its peak, on one decoder block of a large model's geometry with random weights.

    python data/benchmarks/peak_memory.py --out data/benchmarks/peak_memory.json

Needs an NVIDIA GPU (its allocator counts exactly). Prints the measured peak beside `qoqlab.pipeline.peak_bytes`, and
the time for the block, from which the time for the whole model follows.
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

import torch
import transformers

import qoqlab
from qoqlab.pipeline import peak_bytes

#: Llama-3-8B: hidden, intermediate, query heads, KV heads, head_dim, layers.
GEOMETRY = {"hidden": 4096, "intermediate": 14336, "heads": 32, "kv_heads": 8, "head_dim": 128, "layers": 32}


def measure(recipe: str, sequences: int, length: int) -> dict[str, object]:
    """Quantise one block and report bytes and seconds."""
    g = GEOMETRY
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=g["hidden"],
        intermediate_size=g["intermediate"],
        num_hidden_layers=1,
        num_attention_heads=g["heads"],
        num_key_value_heads=g["kv_heads"],
        head_dim=g["head_dim"],
        max_position_embeddings=length,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    ids = torch.randint(0, 1024, (sequences, length))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    q = qoqlab.quantize(model, recipe, ids, progress=False)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    kv_width = g["kv_heads"] * g["head_dim"]
    return {
        "op": "quantize",
        "recipe": recipe,
        "geometry": g,
        "calibration": [sequences, length],
        "peak_bytes_beside_model": torch.cuda.max_memory_allocated() - before,
        "peak_bytes_on_paper": peak_bytes(
            g["hidden"], g["intermediate"], kv_width, sequences * length, gptq="gptq" in recipe
        ),
        "seconds_per_block": seconds,
        "seconds_for_all_blocks": seconds * g["layers"],
        "stage_seconds": q.report.groupby("stage", sort=False)["seconds"].sum().round(3).to_dict(),
    }


def main() -> None:
    """Run both variants and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", help="recorded where the code runs outside a git checkout")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: this measurement reads the GPU allocator's peak")
    results = [measure("rtn-w4a8kv4-g128", 8, 1024)]  # also warms up
    results += [measure("qoq-g128", 128, 1024), measure("qoq-g128-gptq", 128, 1024)]
    commit = options.commit or subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    record = {
        "gpu": torch.cuda.get_device_name(),
        "date": date.today().isoformat(),
        "commit": commit,
        "command": " ".join(["python", *sys.argv]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "results": results,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    for r in results:
        paper, peak = r["peak_bytes_on_paper"]["total"], r["peak_bytes_beside_model"]  # type: ignore[index]
        print(
            f"{r['recipe']}: peak {peak / 2**30:.1f} GiB, on paper {paper / 2**30:.1f} GiB, "
            f"{r['seconds_per_block']:.1f} s a block"
        )


if __name__ == "__main__":
    main()
