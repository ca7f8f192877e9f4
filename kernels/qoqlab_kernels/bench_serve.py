"""Tokens per second that one GPU serves at most, for 4-bit QoQ on these kernels and for fp16 on torch's.

    python -m qoqlab.serve.bench --model llama-3-8b --precision w4a8kv4-g128,fp16 --budget-gb 80 --json FILE

The paper's setting: prompts of 1024 tokens, 512 new ones each, pages of 64, the batch as large as memory allows. Weights are
random and made on the GPU. A *round* is ``batch`` requests that come at once; tokens per second are all new tokens over the
time of the round, prompts included.

QoQ rounds are served by `qoqlab.serve.server.Server`, from the first prompt to the last token, the host's work included;
``overhead`` is the share of decoding during which the GPU does not run a step. fp16, w8a8, w8a8kv8 and w4a16 are
`torch_model`: torch at its best, with a static cache and CUDA graphs made for a context; a round is put together from the
measured time of a prefill and of steps at the first, the middle and the last context, without any work of a host. That is
in their favour. So is that 8-bit products may use FP8 where it is faster than INT8. Caches are of 16 bits, that of w8a8kv8
of 8: fp8 through FlexAttention, or our pages, whichever is faster (`torch_caches`); the record names it.

Several models and precisions may be named; what does not fit is left out with a line that says so.

``--arrivals 8 --requests 200`` has so many requests arrive at random, 8 a second on average, with prompts and outputs of
half the length to all of it, and records every request, step and prefill: what `data/benchmarks/replay.py` holds the
simulator of `qoqlab.serve.fleet` against.

``--tensor-parallel 2`` serves QoQ rounds on two GPUs of this machine that share every layer (`qoqlab.parallel`), with a
process for each; tokens per second are those of all GPUs together, bytes those of one.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import multiprocessing

import qoqlab_kernels
from qoqlab import parallel, prediction, progressive, roofline
from qoqlab.affine import quantize_per_channel_u4
from qoqlab.arithmetic import KernelOps, Projection
from qoqlab.cached_attention import KernelAttention, Shape
from qoqlab.engine import Engine, Layer, Network, step_size
from qoqlab.machines import GPUS, MODELS, Geometry, Gpu
from qoqlab.serve import planner
from qoqlab.serve.requests import Finish, Request
from qoqlab.serve.server import Server

from . import bench_decode, matmul, measure, torch_model
from .bench_decode import DTYPE
from .torch_model import EPS, GROUP

MODULE = "qoqlab.serve.bench"
#: Tokens of prompts that a step takes in at most.
PREFILL = 8192
#: Seconds that a call on several GPUs may take, with kernels to compile.
TIMEOUT = 600.0


@dataclass(frozen=True)
class Round:
    """``batch`` requests of ``prompt`` tokens, ``output`` new ones each."""

    batch: int
    prompt: int
    output: int


def slice_of(model: Geometry, ranks: int) -> Geometry:
    """What one of several GPUs holds of a model. Raises ValueError where it cannot be cut."""
    return replace(
        model,
        heads=parallel.share("heads", model.heads, ranks),
        kv_heads=parallel.share("KV heads", model.kv_heads, ranks),
        intermediate=parallel.share("intermediate", model.intermediate, ranks, GROUP),
    )


def random_network(model: Geometry, precision: str) -> Network:
    """Weights of the engine, one random layer copied to all places of memory that a real model's would take."""

    def packed(n: int, k: int) -> Any:
        w = bench_decode._weight(n, k)
        return qoqlab_kernels.pack_weight(
            progressive.quantize(w, GROUP) if precision == "w4a8kv4-g128" else quantize_per_channel_u4(w)
        )

    made = [packed(*shape) for shape in model.shapes.values()]
    bias = torch_model.random_bias(model) if model.qkv_bias else None
    ones, layers = torch.ones(model.hidden, device="cuda", dtype=DTYPE), []
    for i in range(model.layers):
        own = made if i == 0 else [replace(w, units=w.units.clone()) for w in made]
        qkv, out, gate_up, down = (Projection(w, None) for w in own)
        layers.append(Layer(replace(qkv, bias=bias), out, gate_up, down, ones, ones, model.window))
    torch.cuda.synchronize()  # kernels fetch weights before they wait for the one that wrote them
    embedding, head = (bench_decode._weight(model.vocabulary, model.hidden) for _ in range(2))
    return Network(layers, embedding, ones, EPS, head)


def engine_of(model: Geometry, network: Network, job: Round, ranks: parallel.Ranks | None = None) -> Engine:
    """An engine with room for a round; with ``ranks`` this one's part, ``model`` and ``network`` being its slice."""
    tokens = job.prompt + job.output
    shape = Shape(model.layers, model.heads, model.kv_heads, model.head_dim, job.batch, tokens)
    rotary, norms = bench_decode._rotary(tokens, model.head_dim), [None] * model.layers
    if ranks is None:
        attend = KernelAttention(qoqlab_kernels, shape, rotary, norms)
        return Engine(network, KernelOps(qoqlab_kernels, DTYPE), attend, (job.batch, tokens))
    sliced = parallel.SlicedKernelAttention(qoqlab_kernels, shape, rotary, norms, ranks)
    ops = parallel.SlicedKernelOps(qoqlab_kernels, DTYPE, ranks)
    return parallel.ParallelEngine(network, ops, sliced, (job.batch, tokens), ranks)


class Timed:
    """A captured graph whose replays are timed by events."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self.graph, self.events = graph, []  # type: ignore[var-annotated]

    def replay(self) -> None:
        """Replay it."""
        pair = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
        pair[0].record()
        self.graph.replay()
        pair[1].record()
        self.events.append(pair)

    def seconds(self) -> float:
        """Of all replays."""
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self.events) / 1e3


def requests_of(job: Round, vocabulary: int) -> list[Request]:
    """A round of random prompts."""
    prompts = torch.randint(vocabulary, (job.batch, job.prompt)).tolist()
    return [Request(tuple(prompt), job.output) for prompt in prompts]


def serve_round(engine: Engine, job: Round, overlap: bool | None = None) -> dict[str, Any]:
    """A round through the server. Raises `measure.WrongResult` where a request did not get its tokens."""
    together = min(job.batch, max(1, PREFILL // job.prompt))
    for warm in (Round(together, job.prompt, 1), Round(job.batch, min(job.prompt, 64), 3)):  # of a prefill, and of the step
        Server(engine, budget=PREFILL).run(requests_of(warm, engine.vocabulary))  # compiles, and captures the step
    timed = []
    for step in engine._steps.values():
        step.graph = Timed(step.graph)  # type: ignore[assignment]
        timed.append(step.graph)
    server, requests = Server(engine, budget=PREFILL, overlap=overlap), requests_of(job, engine.vocabulary)
    torch.cuda.synchronize()
    start = time.perf_counter()
    done = server.run(requests)
    seconds = time.perf_counter() - start
    if any(p.finish is not Finish.LENGTH or len(p.tokens) != job.output for p in done):
        raise measure.WrongResult(f"requests ended as {sorted({str(p.finish) + p.error for p in done})}")
    record = server.record()
    steps = [row for row in server.steps if row["batch"]]
    decoding = sum(row["decode_s"] + row["other_s"] for row in steps)
    gpu = sum(t.seconds() for t in timed)  # type: ignore[attr-defined]
    return {
        "seconds": seconds,
        "prefill_s": sum(row["prefill_s"] for row in server.steps),
        "decode_s": decoding,
        "overhead": 1 - gpu / decoding,
        "first_token_p50_s": float((record["first"] - record["arrival"]).quantile(0.5)),
        "first_token_p95_s": float((record["first"] - record["arrival"]).quantile(0.95)),
        "between_tokens_s": decoding / sum(row["repeat"] for row in steps),
        "total_p95_s": float((record["finish"] - record["arrival"]).quantile(0.95)),
    }


def arriving(job: Round, rate: float, count: int, vocabulary: int, seed: int = 0) -> list[Request]:
    """Requests that arrive at random, ``rate`` a second on average, of half the round's lengths to all of them."""
    random = np.random.default_rng(seed)
    times = random.exponential(1 / rate, count).cumsum()
    prompts, outputs = (random.integers(-(-most // 2), most + 1, count) for most in (job.prompt, job.output))
    return [
        Request(tuple(random.integers(vocabulary, size=prompt).tolist()), int(output), arrival=float(time))
        for time, prompt, output in zip(times, prompts, outputs, strict=True)
    ]


def serve_arrivals(engine: Engine, job: Round, rate: float, count: int, overlap: bool | None = None) -> dict[str, Any]:
    """Requests through the server as they arrive. Raises `measure.WrongResult` where one did not get its tokens."""
    for size in sorted({step_size(n) for n in range(1, job.batch + 1)}):  # compiles, and captures all steps
        warm = Round(min(size, job.batch), min(job.prompt, 64), 3)
        Server(engine, budget=PREFILL).run(requests_of(warm, engine.vocabulary))
    for tokens in (1 << i for i in range(PREFILL.bit_length())):  # prefills of all sizes have kernels of their own
        lengths = [min(job.prompt, tokens - at) for at in range(0, tokens, job.prompt)][: job.batch]
        engine.free(engine.prefill([torch.randint(engine.vocabulary, (length,)) for length in lengths])[0])
    requests = arriving(job, rate, count, engine.vocabulary)
    server = Server(engine, budget=PREFILL, overlap=overlap)
    done = server.run(requests)
    if any(p.finish is not Finish.LENGTH for p in done):
        raise measure.WrongResult(f"requests ended as {sorted({str(p.finish) + p.error for p in done})}")
    table = server.record()
    steps = [
        {name: s[name] for name in ("batch", "cached", "repeat")} | {"seconds": (s["decode_s"] + s["other_s"]) / s["repeat"]}
        for s in server.steps
        if s["batch"] and not s["prompts"]
    ]
    prefills = [{"prompts": s["prompts"], "seconds": s["prefill_s"]} for s in server.steps if s["prompts"]]
    return {
        "sequences": job.batch,
        "tokens": engine.pages * planner.PAGE,
        "turn": server.ahead,
        "seconds": float(table["finish"].max()),
        "requests": table.drop(columns=["reason", "preemptions"]).to_dict("records"),
        "steps": steps,
        "prefills": prefills,
    }


def torch_round(model: Geometry, precision: str, job: Round) -> dict[str, Any]:
    """A round of a baseline on torch's kernels, from its parts."""
    together = max(1, min(job.batch, PREFILL // job.prompt))
    start = torch_model.prefill_time(model, precision, together, job.prompt)
    prefill, steps = start.us * 1e-6 * job.batch / together, []
    for context in (job.prompt + 1, job.prompt + job.output // 2, job.prompt + job.output):
        torch.cuda.empty_cache()  # of another context's cache
        steps.append(torch_model.step_time(model, precision, job.batch, context))
    first, middle, last = (step.us * 1e-6 for step in steps)
    decode = (job.output - 1) * (first + 4 * middle + last) / 6  # Simpson's rule; the first token comes with the prefill
    return {
        "seconds": prefill + decode,
        "prefill_s": prefill,
        "decode_s": decode,
        "step_first_s": first,
        "step_middle_s": middle,
        "step_last_s": last,
        "prefill_linears": start.products,
        "step_linears": steps[-1].products,
        "prefill_attention": start.attention,
        "step_attention": [step.attention for step in steps],
        "refused": start.refused | steps[-1].refused,
    }


def gpu_here() -> Gpu | None:
    """The card, as `machines` knows it."""
    name = torch.cuda.get_device_name()
    return next((gpu for key, gpu in GPUS.items() if key in name), None)


def batches_of(
    model: Geometry, precision: str, known: argparse.Namespace, ranks: parallel.Ranks | None = None
) -> tuple[int, ...]:
    """Batches to measure, the largest that fits (on the first of ``ranks``) last. Raises `measure.Unavailable` where none
    fits."""
    device = torch.cuda.get_device_properties().total_memory
    budget = min(device, known.budget_gb * 1e9 if known.budget_gb else device)
    scheme = roofline.PRECISIONS[roofline.SERVED[precision]]
    most = planner.largest_batch(model, scheme, budget, known.prompt + known.output, PREFILL, ranks is not None)
    most = most if ranks is None else int(ranks.first(most))
    if not most:
        raise measure.Unavailable(f"{model.name} in {precision} does not fit into {budget / 1e9:.0f} GB")
    wanted = (64, 256) if known.batches == "auto" else measure.numbers(known.batches, "--batches")
    fitting = [batch for batch in wanted if batch < most]
    return (*fitting, most) if known.batches == "auto" or len(fitting) < len(wanted) else tuple(fitting)


def forget() -> None:
    """Give memory back: the last engine and its captured steps refer to each other."""
    matmul._workspaces.clear()
    gc.collect()
    torch.cuda.empty_cache()


def measured(
    model: Geometry, precision: str, known: argparse.Namespace, ranks: parallel.Ranks | None = None
) -> Iterator[dict[str, Any]]:
    """Every batch in turn. With ``ranks``, ``model`` is this one's slice; bounds are those of a single GPU only."""
    scheme, gpu = roofline.PRECISIONS[roofline.SERVED[precision]], gpu_here() if ranks is None else None
    batches = batches_of(model, precision, known, ranks)
    forget()
    network = None if precision in torch_model.PRODUCTS else random_network(model, precision)
    overlap = network is not None and (ranks is None if known.overlap is None else known.overlap)  # as `Server` has it
    for batch in batches:
        job = Round(batch, known.prompt, known.output)
        forget()
        torch.cuda.reset_peak_memory_stats()
        if known.arrivals:
            assert network is not None  # options has seen to it
            engine = engine_of(model, network, job)
            served = serve_arrivals(engine, job, known.arrivals, known.requests, overlap)
            yield {
                "op": "serve_arrivals",
                "model": model.name.lower(),
                "precision": precision,
                "batch": batch,
                "prompt": known.prompt,
                "output": known.output,
                "rate": known.arrivals,
                "overlap": overlap,
                "tokens_per_s": sum(r["output"] for r in served["requests"]) / served["seconds"],
                **served,
            }
            continue
        if network is None:
            times = torch_round(model, precision, job)
        else:
            engine = engine_of(model, network, job, ranks)
            times = serve_round(engine, job, overlap)
            del engine
        planned = planner.memory(model, scheme, batch, known.prompt + known.output, PREFILL, ranks is not None)
        serving = roofline.Serving(batch, known.prompt, known.output)
        system = prediction.TORCH.get(roofline.SERVED[precision]) if network is None else prediction.OURS
        yield {
            "op": "serve",
            "model": model.name.lower(),
            "precision": precision,
            "batch": batch,
            "prompt": known.prompt,
            "output": known.output,
            "layers": model.layers,
            "gpus": 1 if ranks is None else ranks.size,
            "budget_gb": known.budget_gb,
            "overlap": overlap,
            "tokens_per_s": batch * known.output / times["seconds"],
            "predicted_tokens_per_s": prediction.throughput(model, serving, scheme, gpu, system) if gpu and system else None,
            "bound_tokens_per_s": roofline.throughput(model, serving, scheme, gpu) if gpu else None,
            **times,
            "planned_bytes": planned.total,
            "allocated_bytes": torch.cuda.max_memory_allocated(),
        }


COLUMNS = (
    "model", "precision", "batch", "tokens_per_s", "predicted_tokens_per_s", "prefill_s", "decode_s", "overhead",
    "planned_bytes", "allocated_bytes",
)  # fmt: skip


def options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[Geometry]]:
    """The command's options, and the models, or what one GPU of several holds of them; ends the process for wrong ones."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description="Tokens per second that this GPU serves.")
    names = {name.lower(): model for name, model in MODELS.items()}
    parser.add_argument("--model", default="llama-3-8b", help=f"of {', '.join(names)}, by commas")
    parser.add_argument("--precision", default="w4a8kv4-g128,fp16", help=f"of {', '.join(roofline.SERVED)}, by commas")
    parser.add_argument("--batches", default="auto", help="numbers by commas; auto: 64, 256 and the largest that fits")
    parser.add_argument("--budget-gb", type=float, help="memory to use, to stand for a smaller card")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of each prompt")
    parser.add_argument("--output", type=int, default=512, help="new tokens of each request")
    parser.add_argument("--layers", type=int, help="fewer for a quick look")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs that share every layer")
    parser.add_argument("--arrivals", type=float, help="requests that arrive a second, at random, instead of all at once")
    parser.add_argument("--requests", type=int, default=200, help="with --arrivals: how many")
    parser.add_argument(
        "--overlap",
        action=argparse.BooleanOptionalAction,
        help="give the GPU its next turn before this one's tokens are read (default: on one GPU)",
    )
    parser.add_argument("--json", type=Path, help="write the record here")
    parser.add_argument("--commit", default="", help="recorded where the code runs outside a git checkout")
    known = parser.parse_args(list(arguments))
    try:
        models = [names[name] for name in measure.choices(known.model, "--model", list(names))]
        known.precisions = measure.choices(known.precision, "--precision", list(roofline.SERVED))
        if known.batches != "auto":
            measure.numbers(known.batches, "--batches")
    except ValueError as error:
        parser.error(str(error))
    least = min(known.prompt, known.output, known.tensor_parallel, known.layers or 1)
    if least < 1 or not (known.budget_gb or 1) > 0:
        parser.error("--prompt, --output, --layers, --tensor-parallel and --budget-gb are positive")
    if known.arrivals is not None and not (known.arrivals > 0 and known.requests > 0):
        parser.error("--arrivals and --requests are positive")
    if known.arrivals and (known.tensor_parallel > 1 or any(name in torch_model.PRODUCTS for name in known.precisions)):
        parser.error("--arrivals: for W4A8KV4 on one GPU")
    alone = [name for name in known.precisions if name in torch_model.PRODUCTS]
    if known.tensor_parallel > 1 and alone:
        parser.error(f"--tensor-parallel: {alone[0]} is measured on one GPU only; pass --precision w4a8kv4-g128")
    if known.layers:
        models = [replace(model, layers=known.layers) for model in models]
    try:
        return known, [slice_of(model, known.tensor_parallel) if known.tensor_parallel > 1 else model for model in models]
    except ValueError as error:
        parser.error(f"--tensor-parallel: {known.model}: {error}")


def work(arguments: Sequence[str], ranks: parallel.Ranks | None = None) -> None:
    """Measure; of several ranks the first prints and records. What one GPU cannot do is left out with a line; raises
    `measure.Unavailable` if nothing is left."""
    measure.require_gpu()
    known, models = options(arguments)
    command, first = measure.command_line(MODULE, list(arguments)), ranks is None or not ranks.rank
    results: list[dict[str, Any]] = []
    problems: list[str] = []
    for model, precision in itertools.product(models, known.precisions):
        try:
            for row in measured(model, precision, known, ranks):
                results.append(row)
                if not first:
                    continue
                print(measure.table(COLUMNS, [[r.get(name) for name in COLUMNS] for r in results]) + "\n", flush=True)
                if known.json:  # after every point: what is done is kept if time runs out
                    measure.write_record(known.json, measure.record(command, known.commit, results))
        except (measure.Unavailable, torch.cuda.OutOfMemoryError) as error:
            if isinstance(error, torch.cuda.OutOfMemoryError) and ranks is not None:
                raise  # the other ranks would wait
            problems.append(f"{model.name} in {precision} left out: {str(error).splitlines()[0]}")
            if first:
                print(problems[-1], flush=True)
    if not results:
        raise measure.Unavailable("; ".join(problems))


def work_on_rank(ranks: parallel.Ranks, arguments: tuple[str, ...]) -> None:
    """One process of several."""
    torch.manual_seed(0)  # prompts, embedding and head are the same on all ranks
    code = measure.guarded(MODULE, lambda: work(arguments, ranks))
    if code:
        sys.exit(code)


def work_on_ranks(arguments: tuple[str, ...], count: int) -> None:
    """A process for each of ``count`` GPUs."""
    if torch.cuda.device_count() < count:
        raise measure.Unavailable(f"--tensor-parallel {count}: there are {torch.cuda.device_count()} GPUs")
    parallel.spawn(work_on_rank, count, (arguments,), timeout=TIMEOUT)


def main(arguments: Sequence[str]) -> int:
    """The command."""
    count = options(arguments)[0].tensor_parallel
    if count == 1:
        return measure.guarded(MODULE, lambda: work(arguments))
    try:
        return measure.guarded(MODULE, lambda: work_on_ranks(tuple(arguments), count))
    except multiprocessing.ProcessExitedException as error:
        return error.exit_code  # of a process that has said why
