"""Measure how many tokens per second one GPU serves: the paper's headline experiment (section 6).

    python -m qoqlab.serve.bench --model llama-3-8b --precision w4a8kv4-g128,fp16 --json data/benchmarks/serve_h200.json

What it does and its options: `qoqlab_kernels.bench_serve`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 2 where the kernels' package is missing."""
    if importlib.util.find_spec("qoqlab_kernels") is None:
        print('qoqlab.serve.bench: needs the kernels; pip install "qoqlab[cu13]" (or cu12)', file=sys.stderr)
        return 2
    benchmark = importlib.import_module("qoqlab_kernels.bench_serve")
    return int(benchmark.main(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
