"""A fleet of GPUs under load, simulated from event to event: latency percentiles and cost for 1 to 10,000 of them.

Every GPU is a server with continuous batching, described by a `Surface`. Between two events (an arrival that finds room, a
sequence that ends) the batch is constant and the time of any number of steps has a closed form, so nothing is simulated step
by step.

The server is simpler than a real one. Prompts wait for the end of a turn of steps and go first, in order of arrival, as many
as fit; prefill makes the first token. Memory for prompt and output is reserved on admission, so nobody is ever preempted.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import pandas as pd
import simpy

from .. import roofline
from ..checks import require_columns, require_count, require_enum
from .surface import Surface


class Router(Enum):
    """Where a request goes: ROUND_ROBIN to the next GPU, LEAST_LOADED to the one with the fewest requests, RANDOM to any."""

    ROUND_ROBIN = "round robin"
    LEAST_LOADED = "least loaded"
    RANDOM = "random"


class Lengths(Enum):
    """Numbers of tokens: all the same (FIXED), or exponential around the mean, rounded up (EXPONENTIAL)."""

    FIXED = "fixed"
    EXPONENTIAL = "exponential"


@dataclass
class _Request:
    index: int
    prompt: int
    output: int
    gpu: int


class _Server:
    """One GPU: who waits, who runs until which of its own steps, and how many tokens lie in its cache."""

    def __init__(self, env: simpy.Environment, surface: Surface, results: np.ndarray, finished: _Loads) -> None:
        self.env, self.surface, self.results, self.finished = env, surface, results, finished
        self.waiting: deque[_Request] = deque()
        self.running: list[tuple[int, int, _Request]] = []  # a heap by last step
        self.reserved = self.cached = self.steps = 0
        self.bell: simpy.Event | None = None
        env.process(self._serve())

    def accept(self, request: _Request) -> None:
        """A request arrives; it rings if it could start now."""
        self.waiting.append(request)
        if self.bell is not None and not self.bell.triggered and self._fits(self.waiting[0]):
            self.bell.succeed()

    def _fits(self, request: _Request) -> bool:
        room = self.reserved + request.prompt + request.output <= self.surface.tokens
        return room and len(self.running) < self.surface.sequences

    def _admit(self) -> list[_Request]:
        admitted: list[_Request] = []
        prompts = 0
        while self.waiting and len(self.running) + len(admitted) < self.surface.sequences:
            request = self.waiting[0]
            if not self._fits(request) or (admitted and prompts + request.prompt > self.surface.burst):
                break
            admitted.append(self.waiting.popleft())
            prompts += request.prompt
            self.reserved += request.prompt + request.output
        return admitted

    def _start(self, requests: list[_Request]) -> None:
        for request in requests:
            self.results[request.index, 0] = self.env.now
            heapq.heappush(self.running, (self.steps + request.output - 1, request.index, request))
            self.cached += request.prompt
        self._end()

    def _end(self) -> None:
        while self.running and self.running[0][0] <= self.steps:
            request = heapq.heappop(self.running)[2]
            self.results[request.index, 1] = self.env.now
            self.reserved -= request.prompt + request.output
            self.cached -= request.prompt + request.output - 1
            self.finished.less(request.gpu)

    def _serve(self) -> Generator[simpy.Event, Any, None]:
        while True:
            if admitted := self._admit():
                yield self.env.timeout(self.surface.prefill_seconds([r.prompt for r in admitted]))
                self._start(admitted)
                continue
            self.bell = self.env.event()
            if not self.running:
                yield self.bell
                continue
            batch, since = len(self.running), self.env.now
            steps = self.running[0][0] - self.steps
            yield self.env.timeout(self.surface.decode_seconds(steps, batch, self.cached)) | self.bell
            if self.bell.triggered:  # the turn under way is finished first
                elapsed, turn = self.env.now - since, self.surface.turn
                steps = min(steps, math.ceil(self.surface.steps_within(elapsed, batch, self.cached) / turn) * turn)
                yield self.env.timeout(max(0.0, self.surface.decode_seconds(steps, batch, self.cached) - elapsed))
            self.bell = None
            self.steps += steps
            self.cached += steps * batch
            self._end()


class _Loads:
    """Requests at every GPU, and which GPU has the fewest (the first of them)."""

    def __init__(self, gpus: int) -> None:
        self.count = [0] * gpus
        self.heap = [(0, gpu) for gpu in range(gpus)]

    def _move(self, gpu: int, by: int) -> None:
        self.count[gpu] += by
        heapq.heappush(self.heap, (self.count[gpu], gpu))

    def more(self, gpu: int) -> None:
        self._move(gpu, 1)

    def less(self, gpu: int) -> None:
        self._move(gpu, -1)

    def least(self) -> int:
        while self.count[self.heap[0][1]] != self.heap[0][0]:
            heapq.heappop(self.heap)  # an earlier count
        return self.heap[0][1]


def poisson(
    rate: float, count: int, prompt: int = 1024, output: int = 512, lengths: Lengths = Lengths.FIXED, seed: int = 0
) -> pd.DataFrame:
    """``count`` requests that arrive independently, ``rate`` of them per second: columns ``arrival`` (seconds), ``prompt``,
    ``output`` (tokens), the latter ``prompt`` and ``output`` each, or on average."""
    require_enum("lengths", lengths, Lengths)
    for name, value in (("count", count), ("prompt", prompt), ("output", output)):
        require_count(name, value, 1)
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"rate: expected a positive number of requests per second, got {rate!r}")
    rng = np.random.default_rng(seed)
    arrival = rng.exponential(1 / rate, count).cumsum()
    sizes = [np.full(count, mean) for mean in (prompt, output)]
    if lengths is Lengths.EXPONENTIAL:
        sizes = [np.ceil(rng.exponential(mean, count)).astype(int) for mean in (prompt, output)]
    return pd.DataFrame({"arrival": arrival, "prompt": sizes[0], "output": sizes[1]})


def simulate(
    requests: pd.DataFrame, surface: Surface, gpus: int = 1, router: Router = Router.LEAST_LOADED, seed: int = 0
) -> pd.DataFrame:
    """``requests`` (columns ``arrival``, ``prompt``, ``output``, in order of arrival: of `poisson`, or a trace) served.

    Adds ``gpu``, ``first`` and ``finish``: seconds at which a request got its first token and its last. ``seed`` is for
    RANDOM. ValueError for a column missing, arrivals that are negative, no numbers or out of order, prompts and outputs that
    are not whole numbers of at least one token, or a request that no GPU can hold.
    """
    require_enum("router", router, Router)
    require_count("gpus", gpus, 1)
    require_columns("requests", requests, ("arrival", "prompt", "output"))
    arrival, prompt, output = (requests[name].to_numpy() for name in ("arrival", "prompt", "output"))
    if not (right := np.isfinite(arrival) & (arrival >= 0)).all():
        raise ValueError(f"requests: arrival is in seconds of at least 0, got {float(arrival[~right][0])!r}")
    if len(requests) and (np.diff(arrival) < 0).any():
        raise ValueError("requests: arrivals have to be in order; sort them by arrival")
    for name, tokens in (("prompt", prompt), ("output", output)):
        if not (right := np.isfinite(tokens) & (tokens >= 1) & (tokens % 1 == 0)).all():
            raise ValueError(f"requests: {name} is a whole number of at least one token, got {tokens[~right][0]}")
    if len(requests) and (longest := int((prompt + output).max())) > surface.tokens:
        raise ValueError(f"requests: one of {longest} tokens is more than the {surface.tokens} that fit on a GPU")
    env, loads = simpy.Environment(), _Loads(gpus)
    results = np.full((len(requests), 2), np.nan)
    servers = [_Server(env, surface, results, loads) for _ in range(gpus)]
    if router is Router.RANDOM:
        targets = np.random.default_rng(seed).integers(gpus, size=len(requests))
    else:
        targets = np.arange(len(requests)) % gpus

    def arrive() -> Generator[simpy.Event, Any, None]:
        for index in range(len(requests)):
            yield env.timeout(arrival[index] - env.now)
            if router is Router.LEAST_LOADED:
                targets[index] = loads.least()
            gpu = int(targets[index])
            loads.more(gpu)
            servers[gpu].accept(_Request(index, int(prompt[index]), int(output[index]), gpu))

    env.process(arrive())
    env.run()
    return requests.assign(gpu=targets, first=results[:, 0], finish=results[:, 1])


#: Names of what `latencies` gives.
LATENCIES = tuple(f"{name}_{kind}" for name in ("ttft", "total", "tpot") for kind in ("mean", "p50", "p95", "p99"))


def latencies(served: pd.DataFrame, warm_up: float = 0.1) -> dict[str, float]:
    """Seconds: mean, median, 95th and 99th percentile of the time to the first token (``ttft_``), to the last (``total_``),
    and between tokens (``tpot_``, a request's mean; requests of one token left out).

    The first ``warm_up`` of the requests is left out: they find an empty fleet. ``served`` is what `simulate` returns, or a
    real server's own record with the same columns. ValueError where one of them is missing.
    """
    if not 0 <= warm_up < 1:
        raise ValueError(f"warm_up: a share of the requests, 0 <= warm_up < 1, got {warm_up!r}")
    require_columns("served", served, ("arrival", "output", "first", "finish"))
    part = served.iloc[int(warm_up * len(served)) :]
    if part.empty:
        raise ValueError("served: no request is left to measure")
    longer = part[part["output"] > 1]
    times = {
        "ttft": part["first"] - part["arrival"],
        "total": part["finish"] - part["arrival"],
        "tpot": (longer["finish"] - longer["first"]) / (longer["output"] - 1),
    }
    found: dict[str, float] = {}
    for name, seconds in times.items():
        found |= {f"{name}_mean": float(seconds.mean())}
        found |= {f"{name}_p{q}": float(seconds.quantile(q / 100)) for q in (50, 95, 99)}
    return found


def replay(measured: pd.DataFrame, surface: Surface) -> pd.DataFrame:
    """The same requests through the simulator as a real server on one GPU had.

    ``measured``: columns ``arrival``, ``prompt``, ``output``, and what was measured, ``first`` and ``finish``. Returns a row
    for the mean and the 95th percentile of the time to the first token and to the last: ``measured``, ``simulated``,
    ``error`` (simulated over measured, minus 1). ValueError as from `simulate`.
    """
    require_columns("measured", measured, ("arrival", "prompt", "output", "first", "finish"))
    ordered = measured.sort_values("arrival", kind="stable").reset_index(drop=True)
    real = latencies(ordered, warm_up=0.0)
    ours = latencies(simulate(ordered[["arrival", "prompt", "output"]], surface), warm_up=0.0)
    names = ["ttft_mean", "ttft_p95", "total_mean", "total_p95"]
    table = pd.DataFrame({"latency": names, "measured": [real[n] for n in names], "simulated": [ours[n] for n in names]})
    return table.assign(error=table["simulated"] / table["measured"] - 1)


@dataclass(frozen=True)
class Traffic:
    """Requests of a load curve: tokens in and out, their distribution, and how many are simulated for each GPU."""

    prompt: int = 1024
    output: int = 512
    lengths: Lengths = Lengths.EXPONENTIAL
    count: int = 2000


#: GPUs that stand for a larger fleet.
SAMPLE = 4


def load_curve(
    surfaces: dict[str, Surface],
    loads: Sequence[float],
    gpus: int,
    hourly: float,
    traffic: Traffic | None = None,
) -> pd.DataFrame:
    """Latency and cost against load, one row for every name in ``surfaces`` and every load (requests per second of the whole
    fleet): columns ``precision``, ``load``, ``utilisation`` (of the capacity at full batch), the `latencies`, and
    ``dollars_per_million`` generated tokens with a card at ``hourly`` dollars, busy or not. Loads beyond 98 % of a
    fleet's capacity have no steady state and are left out; where all are, the table has these columns and no row. ValueError
    for a load that is no positive number.

    More than `SAMPLE` GPUs are not simulated one by one. With a router that draws at random every GPU is a server of its own
    with its own Poisson stream, so a sample stands for all, exactly. The least loaded router used here evens out more the
    more GPUs it sees: a large fleet is at least as good as its sample.
    """
    require_count("gpus", gpus, 1)
    for load in loads:
        if not (math.isfinite(load) and load > 0):
            raise ValueError(f"loads: expected positive numbers of requests per second, got {load!r}")
    traffic = traffic or Traffic()
    rows = []
    some = min(gpus, SAMPLE)
    for name, server in surfaces.items():
        capacity = gpus * server.capacity(traffic.prompt, traffic.output)
        for load in loads:
            if load > 0.98 * capacity:
                continue
            requests = poisson(load * some / gpus, some * traffic.count, traffic.prompt, traffic.output, traffic.lengths)
            fitting = requests[requests["prompt"] + requests["output"] <= server.tokens]  # a tail of the exponential
            found = latencies(simulate(fitting, server, some), warm_up=0.3)
            cost = roofline.dollars_per_million(load * traffic.output, gpus * hourly)
            row = {"precision": name, "load": load, "utilisation": load / capacity, **found, "dollars_per_million": cost}
            rows.append(row)
    return pd.DataFrame(rows, columns=["precision", "load", "utilisation", *LATENCIES, "dollars_per_million"])
