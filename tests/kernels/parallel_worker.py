"""What `test_gpu_parallel` runs on every GPU, in processes of their own.

python -m tests.kernels.parallel_worker FOLDER      by hand; answers go to FOLDER/RANK.json
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

if not hasattr(np, "row_stack"):  # as in `conftest`, which these processes do not see
    np.row_stack = np.vstack  # noqa: NPY201

from qoqlab import parallel, runtime
from qoqlab.parallel import Ranks
from qoqlab.sampling import Sampling
from qoqlab.serve.requests import Request
from qoqlab.serve.server import Server

from ..parallel_worker import forced, message, quantized

MODELS = ("bundled, per channel", "bundled, groups")
STEPS = 48


def same_as_alone(ranks: Ranks, name: str) -> dict[str, Any]:
    """Tokens and logits of both GPUs together, by captured steps, beside those of one, which the first rank makes."""
    q, prompts = quantized(name)
    prompts = [*prompts, prompts[0].repeat(4)]
    engine = parallel.compile(q, ranks, 4, 256)
    said = engine.generate(prompts, STEPS)
    logits = forced(engine, prompts, said)
    found: dict[str, Any] = {
        "tokens": said,
        "again": engine.generate(prompts, STEPS) == said,
        "drawn": engine.generate(prompts, STEPS, Sampling(1.0, seed=3)),
        "digest": float(logits.double().sum()),
        "steps": sorted(engine._steps),
    }
    if ranks.rank == 0:
        alone = runtime.compile(q, ranks.device, 4, 256)
        found["alone"] = alone.generate(prompts, STEPS), alone.generate(prompts, STEPS, Sampling(1.0, seed=3))
        want = forced(alone, prompts, said)
        errors = (logits - want).norm(dim=-1) / want.norm(dim=-1)
        found |= {"prefill_error": float(errors[0].max()), "decode_error": float(errors[1:].max())}
    return found


def served(ranks: Ranks) -> dict[str, Any]:
    """A server on each GPU, with too few pages, whose clocks differ."""
    q, prompts = quantized("bundled, groups")
    requests = [Request(tuple(prompts[i % 2].tolist()), 70, arrival=0.01 * i) for i in range(12)]
    clock = time.perf_counter if ranks.rank == 0 else (lambda: 0.0)
    server = Server(parallel.compile(q, ranks, 5, 128, pages=7), clock=clock)
    found: dict[str, Any] = {"tokens": [p.tokens for p in server.run(requests)]}
    found["steps"] = [[row["batch"], row["prompts"], row["repeat"], row["preempted"]] for row in server.steps]
    if ranks.rank == 0:
        alone = runtime.compile(q, ranks.device, 1, 128)
        found["alone"] = [alone.generate([request.prompt], 70)[0] for request in requests]
    return found


def work(ranks: Ranks, folder: Path) -> None:
    """Everything that goes well; answers go to ``folder/RANK.json``."""
    found: dict[str, Any] = {name: same_as_alone(ranks, name) for name in MODELS}
    found["served"] = served(ranks)
    q, _ = quantized("biases of q, k, v")
    found["differing"] = message(lambda: parallel.compile(q, ranks, max_batch=2 + ranks.rank))
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found), encoding="utf-8")


def lose(ranks: Ranks, folder: Path, what: str) -> None:
    """The second rank ends without a word; what the first finds in a captured step, or in a prompt."""
    q, prompts = quantized("bundled, groups")
    engine = parallel.compile(q, ranks, 4, 256)
    engine.generate(prompts, 3)  # everything is compiled and captured
    sequences, _ = engine.prefill(prompts)
    torch.cuda.synchronize()
    if ranks.rank:
        os._exit(0)
    ranks.timeout = 10.0
    call = (lambda: engine.decode(sequences, [1, 2])) if what == "step" else (lambda: engine.prefill(prompts))
    (folder / f"lost-{what}.json").write_text(json.dumps(message(call)), encoding="utf-8")
    os._exit(0)  # the group is no more


def main() -> None:
    """All of it, with a line for each file of answers."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    parallel.spawn(work, 2, (folder,))
    for what in ("step", "prompt"):
        parallel.spawn(lose, 2, (folder, what))
    for path in sorted(folder.glob("*.json")):
        print(path, path.read_text(encoding="utf-8")[:2000])


if __name__ == "__main__":
    main()
