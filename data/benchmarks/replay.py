"""Hold the simulator against a server's own record of a run on one GPU.

    python data/benchmarks/replay.py RECORD.json

The record is one of ``python -m qoqlab.serve.bench --arrivals``, or holds the same: ``requests``, a list of ``arrival``,
``prompt``, ``output``, ``first`` and ``finish`` (seconds from one clock, and tokens); ``sequences`` and ``tokens``, how many
ran at once at most and how many tokens the cache had room for; ``turn``, steps in a row while prompts wait. With
``steps`` (``batch``, ``cached``, ``seconds``) and ``prefills`` (``prompts``, ``seconds``) times are fitted on the run's
own steps, otherwise predicted for ``--model`` and ``--precision`` on an H200. Prints mean and 95th percentile of the time
to the first token and to the last: measured, simulated, error. The target is 15 %.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from qoqlab.machines import GPUS, MODELS
from qoqlab.prediction import OURS, TORCH_FP16
from qoqlab.roofline import PRECISIONS
from qoqlab.serve import fleet
from qoqlab.serve.surface import Surface, measured_surface, surface


def surface_of(record: dict[str, Any], model: str, precision: str) -> Surface:
    """The server as numbers: from its own steps where it kept them."""
    room = {name: int(record[name]) for name in ("sequences", "tokens", "turn") if name in record}
    if "steps" in record:
        steps, prefills = (pd.DataFrame(record[name]) for name in ("steps", "prefills"))
        return replace(measured_surface(steps, prefills, room["sequences"], room["tokens"]), **room)
    system = TORCH_FP16 if precision == "fp16" else OURS
    return replace(surface(MODELS[model], PRECISIONS[precision], GPUS["H200"], system), **room)


def main() -> None:
    """Read, replay, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--model", default="Llama-3-8B", choices=MODELS)
    parser.add_argument("--precision", default="W4A8KV4", choices=PRECISIONS)
    options = parser.parse_args()
    record = json.loads(options.record.read_text(encoding="utf-8"))
    record = record["results"][0] if "results" in record else record
    server = surface_of(record, options.model, options.precision)
    print(server)
    print(fleet.replay(pd.DataFrame(record["requests"]), server).round(4).to_string(index=False))


if __name__ == "__main__":
    main()
