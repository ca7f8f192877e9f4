"""Time a whole decode step of an engine beside fp16.

    python -m qoqlab_kernels.bench decode --json data/benchmarks/decode.json

The geometry is Llama-3-8B's; weights are random and made on the GPU. Both sides run as one CUDA graph: here the W4A8 GEMMs,
the fused element-wise kernels and KV4 attention; there `torch_model`'s fp16: cuBLAS, `scaled_dot_product_attention` on a
static cache, and torch.compile's fused kernels in between. ``gemm`` and ``attention`` are graphs of these kernels alone;
``bound`` is the least bytes of weights, head and cache over the bandwidth of a large copy, or the GEMMs' operations over the
integer rate if longer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import qoqlab_kernels
from qoqlab import progressive
from qoqlab.arithmetic import KernelOps, Projection
from qoqlab.cached_attention import Batch, KernelAttention, Shape, batch_of
from qoqlab.engine import Engine, Layer, Network, Step
from qoqlab.machines import MODELS, Geometry

from . import gemm, matmul, measure, torch_model
from .torch_model import EPS, GROUP

MODULE = "qoqlab_kernels.bench"
BATCHES = (1, 16, 64, 128, 256)
DTYPE = torch.float16


LLAMA = MODELS["Llama-3-8B"]


def _weight(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k, device="cuda", dtype=DTYPE) / k**0.5


def _rotary(tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(tokens, device="cuda")[:, None] * 500000.0 ** (-torch.arange(0, dim, 2, device="cuda") / dim)
    return angle.cos().to(DTYPE), angle.sin().to(DTYPE)


def make_engine(g: Geometry, batch: int, context: int) -> tuple[Engine, Batch]:
    """An engine of random weights whose ``batch`` sequences have ``context - 1`` tokens each, and its next step."""
    packed = [qoqlab_kernels.pack_weight(progressive.quantize(_weight(n, k), GROUP)) for n, k in g.shapes.values()]
    ones, layers = torch.ones(g.hidden, device="cuda", dtype=DTYPE), []
    for _ in range(g.layers):
        own = [Projection(replace(w, units=w.units.clone()), None) for w in packed]
        layers.append(Layer(own[0], own[1], own[2], own[3], ones, ones, None))
    torch.cuda.synchronize()  # kernels fetch weights before they wait for the one that wrote them
    network = Network(layers, _weight(g.vocabulary, g.hidden), ones, EPS, _weight(g.vocabulary, g.hidden))
    shape = Shape(g.layers, g.heads, g.kv_heads, g.head_dim, batch, context)
    attend = KernelAttention(qoqlab_kernels, shape, _rotary(context, g.head_dim), [None] * g.layers)
    engine = Engine(network, KernelOps(qoqlab_kernels, DTYPE), attend, (batch, context))
    sequences = [attend.open() for _ in range(batch)]
    attend.reserve(sequences, [context] * batch)
    cache, past = attend.cache, context - 1
    keys, values = torch.randn(2, 1, g.kv_heads, past, g.head_dim, device="cuda")
    cache.append(0, sequences[:1], keys, values)
    source = cache.pool[0, cache.pages_of(sequences[0])].clone()
    cache._length[sequences[0]][0] = 0  # `advance` counts it with all layers
    for sequence in sequences:
        cache.pool[:, cache.pages_of(sequence)] = source
    attend.advance(batch_of(sequences, [past] * batch, [0] * batch, engine.device))
    return engine, batch_of(sequences, [1] * batch, [past] * batch, engine.device)


def replay_time(graph: torch.cuda.CUDAGraph, replays: int = 15) -> float:
    """Microseconds of a graph, median."""
    times = []
    for i in range(replays + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) * 1e3)
    return sorted(times)[len(times) // 2]


def capture(compute: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A graph of what a function launches, after one run without."""
    compute()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute()
    return graph


def time_engine(engine: Engine, batch: Batch) -> dict[str, float]:
    """Microseconds of the step, of its GEMMs alone, of its attention alone."""
    size, ops = len(batch.sequences), engine.ops
    ids = torch.randint(engine.vocabulary, (size,), device="cuda")
    attend: Any = engine.attend
    step = Step(lambda i, b: engine._logits(*engine._hidden(i, b, prompt=False)), size, attend.idle, engine.device)
    logits = step(ids, batch)
    if not bool(logits.isfinite().all()):
        raise measure.WrongResult("the step's logits are not finite")
    first = engine.network.layers[0]
    linears = (first.qkv, first.out, first.gate_up, first.down)
    inputs = [
        qoqlab_kernels.quantize_activations(torch.randn(size, p.weight.k, device="cuda", dtype=DTYPE)) for p in linears
    ]

    def gemms() -> None:
        for layer in engine.network.layers:
            for a, p in zip(inputs, (layer.qkv, layer.out, layer.gate_up, layer.down), strict=True):
                ops.linear(a, p)

    query = torch.randn(size, attend.shape.heads, attend.shape.head_dim, device="cuda", dtype=DTYPE)

    def attention() -> None:
        for i in range(len(engine.network.layers)):
            qoqlab_kernels.kv4_attention(query, attend.cache, i, batch.slots, lse=True)

    return {
        "us": replay_time(step.graph),
        "gemm_us": replay_time(capture(gemms)),
        "attention_us": replay_time(capture(attention)),
    }


def bound_us(g: Geometry, batch: int, context: int, ceilings: measure.Ceilings) -> float:
    """The least microseconds of a step."""
    moved = (
        sum(measure.gemm_bytes(batch, n, k, GROUP) for n, k in g.shapes.values()) * g.layers + 2 * g.vocabulary * g.hidden
    )
    moved += g.layers * batch * context * g.kv_heads * (g.head_dim + 8)
    ops = sum(measure.gemm_ops(batch, n, k) for n, k in g.shapes.values()) * g.layers
    return ceilings.bound(moved, ops)


def measured(
    g: Geometry, batches: Sequence[int], context: int, ceilings: measure.Ceilings, peers: bool
) -> Iterator[dict[str, Any]]:
    """Every batch in turn."""
    for batch in batches:
        engine, step = make_engine(g, batch, context)
        times = time_engine(engine, step)
        del engine, step
        matmul._workspaces.clear()
        torch.cuda.empty_cache()
        fp16 = torch_model.step_time(g, "fp16", batch, context).us if peers else None
        torch.cuda.empty_cache()
        bound = bound_us(g, batch, context, ceilings)
        yield {
            "op": "decode_step",
            "batch": batch,
            "context": context,
            **times,
            "rest_us": times["us"] - times["gemm_us"] - times["attention_us"],
            "bound_us": bound,
            "ratio": times["us"] / bound,
            "fp16_us": fp16,
            "speedup": fp16 / times["us"] if fp16 else None,
            "tokens_per_s": batch / times["us"] * 1e6,
        }


COLUMNS = ("batch", "us", "gemm_us", "attention_us", "rest_us", "bound_us", "ratio", "fp16_us", "speedup", "tokens_per_s")


def compile_all(g: Geometry, batches: Sequence[int]) -> None:
    """Compile the GEMMs that a run needs beforehand, in parallel."""
    capability, processors, gpu = matmul._gpu(torch.cuda.current_device())
    form = gemm.Form(128 // GROUP)
    plans = [
        (matmul.plan_for(m, n, k, form, capability, processors, gpu), form) for m in batches for n, k in g.shapes.values()
    ]
    measure.compile_ahead(plans, capability)


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE} decode", description="Time a decode step of Llama-3-8B's shape."
    )
    parser.add_argument("--batch", default=",".join(map(str, BATCHES)), help="numbers of sequences, separated by commas")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each sequence, the new one included")
    parser.add_argument("--layers", type=int, default=32, help="fewer for a quick look")
    parser.add_argument("--no-peers", action="store_true", help="leave fp16 out")
    parser.add_argument("--json", type=Path, help="write the record here")
    parser.add_argument("--commit", default="", help="recorded where the code runs outside a git checkout")
    known = parser.parse_args(list(arguments))
    try:
        batches = measure.numbers(known.batch, "--batch")
    except ValueError as error:
        parser.error(str(error))
    if known.context < 2 or known.layers < 1:
        parser.error("--context is at least 2, --layers at least 1")
    command, g = measure.command_line(MODULE, ["decode", *arguments]), replace(LLAMA, layers=known.layers)

    def work() -> None:
        capability = measure.require_gpu()
        compile_all(g, batches)
        ceilings, results = measure.measure_ceilings(capability), []
        for row in measured(g, batches, known.context, ceilings, not known.no_peers):
            results.append(row)
            print(measure.table(COLUMNS, [[r[name] for name in COLUMNS] for r in results]) + "\n", flush=True)
            if known.json:  # after every point: what is done is kept if time runs out
                more = {"ceilings": measure.ceilings_record(ceilings), "layers": known.layers}
                measure.write_record(known.json, measure.record(command, known.commit, results, **more))

    return measure.guarded(MODULE, work)
