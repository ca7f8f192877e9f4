"""What `test_parallel` runs on every rank, in processes of their own."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qoqlab import load_text, load_tiny, parallel, quantize, runtime, tokens
from qoqlab.engine import Engine
from qoqlab.grids import INT8, UINT4, Zero
from qoqlab.parallel import Ranks
from qoqlab.pipeline import QuantizedModel
from qoqlab.sampling import Sampling
from qoqlab.schemes import Scheme, WeightFormat, WeightKind
from qoqlab.serve.requests import Request
from qoqlab.serve.server import Server

from .families import only, random_ids, wide

PER_CHANNEL = WeightFormat(WeightKind.CHANNEL_U4)
SCALED = WeightFormat(WeightKind.CHANNEL_U4, zero=Zero.SCALED)
GROUPS = WeightFormat(WeightKind.PROGRESSIVE_U4, 64)
#: Name -> (family, format of weights, options of its configuration); "bundled" is the trained model.
MODELS: dict[str, tuple[str, WeightFormat, dict]] = {
    "bundled, per channel": ("bundled", PER_CHANNEL, {}),
    "bundled, groups": ("bundled", GROUPS, {}),
    "biases of q, k, v": ("qwen2", GROUPS, {}),
    "biases everywhere, tied": ("llama", SCALED, {"attention_bias": True, "mlp_bias": True, "tied": True}),
    "norms of heads, a window": ("qwen3", GROUPS, {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}),
}

#: What the CPU has time for; `kernels/parallel_worker` takes the bundled ones on GPUs.
HERE = [name for name in MODELS if name != "bundled, groups"]


def quantized(name: str) -> tuple[QuantizedModel, list[torch.Tensor]]:
    """A model, and prompts of different lengths."""
    family, form, options = MODELS[name]
    if family == "bundled":
        model, tokenizer = load_tiny()
        ids = tokens(tokenizer, load_text("python-docs", "test"), 64)
        model = model.float()
    else:
        model, ids = wide(family, **options), random_ids(2, 64)
    q = quantize(model, only(scheme=Scheme(form, INT8, UINT4)), progress=False, report=False)
    return q, [ids[0, :14], ids[1, :5]]


def forced(engine: Engine, prompts: list[torch.Tensor], said: list[list[int]]) -> torch.Tensor:
    """Logits ``[steps, B, V]`` of an engine that is fed with given tokens."""
    sequences, logits = engine.prefill(prompts)
    rows = [logits] + [engine.decode(sequences, list(step)) for step in zip(*said, strict=True)]
    engine.free(sequences)
    return torch.stack(rows)


def same_as_alone(ranks: Ranks, name: str) -> dict[str, Any]:
    """Tokens and logits of all ranks together beside those of one engine, which the first rank makes."""
    q, prompts = quantized(name)
    engine = parallel.compile(q, ranks, 2, 64)
    said = engine.generate(prompts, 6)
    logits = forced(engine, prompts, said)
    drawn = engine.generate(prompts, 4, Sampling(1.0, seed=3))
    kv_heads = engine.attend.shape.kv_heads
    found = {"tokens": said, "drawn": drawn, "kv_heads": kv_heads, "digest": float(logits.double().sum())}
    if ranks.rank == 0:
        alone = runtime.compile(q, "cpu", 2, 64)
        found["alone"] = alone.generate(prompts, 6), alone.generate(prompts, 4, Sampling(1.0, seed=3))
        found["equal"] = torch.equal(logits, forced(alone, prompts, said))
    return found


def served(ranks: Ranks) -> dict[str, Any]:
    """A server on every rank, whose clocks differ: without an agreement the second would never see a request arrive."""
    q, prompts = quantized("biases of q, k, v")
    requests = [Request(tuple(prompts[i % 2].tolist()), 5, arrival=0.02 * i) for i in range(4)]
    clock = time.perf_counter if ranks.rank == 0 else (lambda: 0.0)
    server = Server(parallel.compile(q, ranks, 2, 64, pages=3), budget=32, clock=clock)
    found = {"tokens": [p.tokens for p in server.run(requests)]}
    found["steps"] = [[row["batch"], row["prompts"], row["repeat"]] for row in server.steps]
    if ranks.rank == 0:
        found["alone"] = [runtime.compile(q, "cpu", 1, 64).generate([r.prompt], 5)[0] for r in requests]
    return found


def message(call: Any) -> list[Any]:
    """[error's class, its words, seconds until then]."""
    start = time.perf_counter()
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error), time.perf_counter() - start]
    return []


def work(ranks: Ranks, folder: Path) -> None:
    """Everything in turn; answers go to ``folder/RANK.json``."""
    torch.set_num_threads(1)  # whether it is a copy or not
    found: dict[str, Any] = {name: same_as_alone(ranks, name) for name in HERE}
    found["served"] = served(ranks)
    q, prompts = quantized("biases of q, k, v")
    found["differing"] = message(lambda: parallel.compile(q, ranks, max_batch=2 + ranks.rank))
    x = torch.tensor([[1.0, 2.0], [3.0, torch.nan if ranks.rank else 4.0]])
    found["spoilt"] = message(lambda: parallel.quantize_slice(x, ranks))
    found["other device"] = message(lambda: Ranks("cuda:0"))
    slow = Ranks("cpu", dist.new_group(backend="gloo"), timeout=0.3)
    found["slow"] = message(lambda: slow.first(1.0)) if ranks.rank == 0 else []  # the other is busy elsewhere
    engine = parallel.compile(q, ranks, 2, 64)
    sequences, _ = engine.prefill(prompts)
    engine.decode(sequences, [1, 2])
    if ranks.rank == 0:
        found["lost"] = [message(lambda: engine.decode(sequences, [1, 2])) for _ in range(2)]
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    if ranks.rank:
        os._exit(0)  # without a farewell, as a process that is killed
