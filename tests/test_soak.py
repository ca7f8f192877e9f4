"""Hours of traffic in short: the bundled model serves waves of requests, and the process stays as large as it is."""

import gc
import os
import time
from pathlib import Path

import pytest
import torch

from qoqlab import load_tiny, quantize, runtime
from qoqlab.sampling import Sampling
from qoqlab.serve.requests import Finish, Request
from qoqlab.serve.scheduler import Policy
from qoqlab.serve.server import Server

#: Bytes that the process may grow by in the second half: fragments, not tensors, of which a step makes hundreds.
SLACK = 12 << 20


def resident() -> int:
    """Bytes of memory that this process has."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def engine():
    """The bundled model with room for eight sequences and pages for fewer, so that some are preempted."""
    model, _ = load_tiny()
    return runtime.compile(quantize(model, "rtn-w4a8kv4-g128", progress=False), "cpu", max_batch=8, max_tokens=192, pages=5)


def wave(server: Server, number: int) -> None:
    """Eight requests of all kinds: long and short, drawn and not, listened to, stopped, cancelled, broken."""
    generator = torch.Generator().manual_seed(number)

    def prompt(length: int) -> list[int]:
        return torch.randint(4000, (length,), generator=generator).tolist()

    def fails(*_: int) -> None:
        raise RuntimeError("nobody listens")

    numbers = [server.submit(Request(prompt(60 + i), 8 + i)) for i in range(3)]
    numbers.append(server.submit(Request(prompt(1), 1)))
    numbers.append(server.submit(Request(prompt(5), 12, sampling=Sampling(1.0, top_k=9, top_p=0.9, seed=number))))
    numbers.append(server.submit(Request(prompt(9), 12, stop=range(2000))))
    numbers.append(server.submit(Request(prompt(9), 12, on_token=fails)))
    numbers.append(server.submit(Request(prompt(20), 40)))
    for _ in range(4):
        server.step()
    server.cancel(numbers[-1])
    server.run()
    ends = [server.requests[n].finish for n in numbers]
    assert ends[:5] == [Finish.LENGTH] * 5 and ends[6:] == [Finish.ERROR, Finish.CANCELLED]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc, which says how large a process is")
def test_memory_stays_flat(engine):
    """As many seconds as QOQLAB_SOAK_S says, 30 in CI; 8 if it says nothing."""
    end = time.monotonic() + float(os.environ.get("QOQLAB_SOAK_S", "8"))
    sizes, preempted = [], 0
    servers = [Server(engine, policy) for policy in Policy]
    while time.monotonic() < end or len(sizes) < 8:
        server = servers[len(sizes) % 2]
        wave(server, len(sizes))
        preempted += sum(p.preemptions for p in server.requests.values())
        server.forget()
        sizes.append(resident())
    half = len(sizes) // 2
    assert max(sizes[half:]) - max(sizes[:half]) < SLACK, [size >> 20 for size in sizes]
    assert preempted and engine.attend.cache.free_pages == 5 and not engine.lengths
    assert all(server.idle and not server.requests and not server._sequences for server in servers)
