"""Threads, blocks and clusters for numba's CUDA simulator, on which the instructions of `emulation` run.

numba's simulator runs every thread of a block as a Python thread and one block at a time. Here threads are greenlets, and
the blocks of a cluster run together: one thread runs until it has to wait for others, then another of those that can go on,
drawn by lot from a fixed seed. So a run can be repeated, a thread that does not wait where it should gets far ahead of the
others, and threads that all wait for ever are noticed at once.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from greenlet import getcurrent, greenlet
from numba import types
from numba.cuda.simulator import kernelapi
from numba.cuda.simulator.kernel import BlockManager
from numba.np.numpy_support import as_dtype

#: Where dynamic shared memory starts: not at a multiple of 1024, as on hardware.
SHARED_BASE = 16
#: What shared memory holds before anybody writes it.
POISON = 0xA5


class Thread(greenlet):
    """A thread of a block, with the names that numba's simulator asks for."""

    def __init__(self, block: Block, work: Callable[[], None], at: tuple) -> None:
        super().__init__(work)
        self.block = block
        self.blockIdx, self.threadIdx = kernelapi.Dim3(*block.place), kernelapi.Dim3(*at)
        x, y, _ = block.shape
        self.thread_id = at[0] + x * (at[1] + y * at[2])
        self.brought: tuple = ()  # to an instruction of its warp
        self.taken: Any = None  # from it
        self.arrived = -1  # the phase of the cluster's barrier at which it last arrived

    def syncthreads(self) -> None:
        """Wait for all threads of the block that have not ended."""
        self.block.meet("syncthreads", self.block.live)


class Barrier:
    """An mbarrier: completes a phase when the expected arrivals and bytes have come."""

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes = 0
        self.phase = 0


class Block:
    """A block while it runs: its threads, its shared memory full of poison, and its barriers."""

    def __init__(
        self, cluster: Cluster, place: tuple, grid: tuple, shape: tuple, work: Callable[[], None], shared: int
    ) -> None:
        self.cluster, self.place, self.grid, self.shape = cluster, place, grid, shape
        self.shared = np.full(shared, POISON, np.uint8)
        self.static: dict[tuple, np.ndarray] = {}  # arrays of `cuda.shared.array`, by the line that asks
        self.barriers: dict[int, Barrier] = {}
        self.arrays: list[tuple[int, np.ndarray]] = []
        self.threads = [Thread(self, work, at) for at in np.ndindex(*shape)]
        self.live = len(self.threads)

    def wait(self, what: Any) -> None:
        """Let others run until somebody wakes those of this block that wait for ``what``."""
        self.cluster.wait((what, self.place))

    def wake(self, what: Any) -> None:
        """Threads of this block that wait for ``what`` can go on."""
        self.cluster.wake((what, self.place))

    def waiting(self, what: Any) -> list[Thread]:
        """The threads of this block that wait for ``what``."""
        return self.cluster.waiting[what, self.place]

    def meet(self, what: Any, count: int) -> None:
        """Wait until ``count`` threads are here."""
        if len(self.waiting(what)) + 1 == count:
            self.wake(what)
        else:
            self.wait(what)

    def end_one(self) -> None:
        """A thread has ended: nobody waits for it."""
        self.live -= 1
        if self.live and len(self.waiting("syncthreads")) == self.live:
            self.wake("syncthreads")

    def shared_bytes(self, at: int, count: int, align: int) -> np.ndarray:
        """A view of ``count`` bytes of shared memory."""
        start = int(at) - SHARED_BASE
        if int(at) % align:
            raise ValueError(f"shared memory: address {at} is not a multiple of {align}")
        if start < 0 or start + count > self.shared.size:
            raise IndexError(f"shared memory: {count} bytes at {start} of {self.shared.size}")
        return self.shared[start : start + count]

    def global_bytes(self, at: int, count: int, align: int) -> np.ndarray:
        """A view of ``count`` bytes of global memory that lie in one of the kernel's arrays."""
        at = int(at)
        if at % align:
            raise ValueError(f"global memory: address is not a multiple of {align}")
        for start, view in self.arrays:
            if start <= at and at + count <= start + view.size:
                return view[at - start : at - start + count]
        raise IndexError(f"global memory: {count} bytes outside every array")


class Cluster:
    """Blocks that run together, side by side along the grid's x."""

    def __init__(self, places: list[tuple], grid: tuple, shape: tuple, work: Callable[[], None], shared: int) -> None:
        self.waiting: dict[Any, list[Thread]] = defaultdict(list)  # by what they wait for
        self.blocks = [Block(self, place, grid, shape, work, shared) for place in places]
        self.ready = [thread for block in self.blocks for thread in block.threads]
        self.phase, self.missing = 0, len(self.ready)  # of the cluster's barrier: threads that have not arrived

    @property
    def live(self) -> int:
        """Threads that have not ended."""
        return sum(block.live for block in self.blocks)

    def run(self) -> None:
        """Run all threads to their end. Raises what the first to fail raises, with its number, or that none can go on."""
        draw = random.Random(0).random
        while self.ready:
            at = int(draw() * len(self.ready))
            self.ready[at], self.ready[-1] = self.ready[-1], self.ready[at]
            thread = self.ready.pop()
            try:
                thread.switch()
            except Exception as error:
                where = f"tid={list(thread.threadIdx)} ctaid={list(thread.blockIdx)}"
                raise type(error)(f"{where}: {error}" if str(error) else where) from error
            if thread.dead:
                thread.block.end_one()
                self.arrive(thread)
        if self.live:
            stuck = ", ".join(
                f"{len(threads)} at {what} of {place}" for (what, place), threads in self.waiting.items() if threads
            )
            raise RuntimeError(f"threads wait for ever, since a phase never completed or threads never met: {stuck}")

    def wait(self, place: Any) -> None:
        """Let others run until somebody wakes those that wait at ``place``."""
        thread: Any = getcurrent()
        self.waiting[place].append(thread)
        thread.parent.switch()

    def wake(self, place: Any) -> None:
        """Whoever waits at ``place`` can go on."""
        self.ready += self.waiting.pop(place, ())

    def arrive(self, thread: Thread) -> None:
        """The first half of the cluster's barrier; who ends has arrived."""
        if thread.arrived == self.phase:
            return
        thread.arrived = self.phase
        self.missing -= 1
        if not self.missing:
            self.phase, self.missing = self.phase + 1, self.live
            self.wake(("cluster", None))

    def finish(self, thread: Thread) -> None:
        """The second half of the cluster's barrier."""
        while thread.arrived == self.phase:
            self.wait(("cluster", None))


def block() -> Block:
    """The block of the thread that asks."""
    return getcurrent().block  # type: ignore[attr-defined]


def warp(values: tuple, compute: Callable[[list], list]) -> Any:
    """All 32 lanes bring ``values`` to the same instruction; the last computes the list of results; each takes its own."""
    thread: Any = getcurrent()
    here, what = thread.block, (compute.__qualname__, "of warp", thread.thread_id // 32)
    thread.brought = values
    if len(here.waiting(what)) == 31:
        lanes = sorted([thread, *here.waiting(what)], key=lambda lane: lane.thread_id)
        for lane, result in zip(lanes, compute([lane.brought for lane in lanes]), strict=True):
            lane.taken = result
    here.meet(what, 32)
    return thread.taken


def shared_array(shared: Any, shape: Any, dtype: Any, alignment: None = None) -> np.ndarray:
    """numba's `cuda.shared.array`, with the same rule: an array belongs to the line that asks for it. Full of poison."""
    kind = as_dtype(dtype) if isinstance(dtype, types.Type) else np.dtype(dtype)
    here, asking = block(), sys._getframe(1)
    if not shape:  # dynamic shared memory, which everybody shares
        return here.shared[: here.shared.size // kind.itemsize * kind.itemsize].view(kind)
    line = (asking.f_code.co_filename, asking.f_lineno)
    if line not in here.static:
        here.static[line] = np.empty(shape, kind)
        here.static[line].reshape(-1).view(np.uint8)[:] = POISON
    return here.static[line]


@contextlib.contextmanager
def running(cluster: int = 1, shared: int = 0, backwards: bool = False) -> Iterator[None]:
    """Kernels that numba's simulator runs meanwhile have clusters of so many blocks and ``shared`` bytes of dynamic memory.

    ``backwards``: the last block, or cluster, runs first.
    """

    def run(manager: Any, place: tuple, *arguments: Any) -> None:
        if backwards:
            place = tuple(size - 1 - p for size, p in zip(manager._grid_dim, place, strict=True))
        if place[0] % cluster == 0:
            places = [(place[0] + rank, *place[1:]) for rank in range(cluster)]
            Cluster(places, manager._grid_dim, manager._block_dim, lambda: manager._f(*arguments), shared).run()

    with (
        mock.patch.object(kernelapi.FakeCUDAShared, "array", shared_array),
        mock.patch.object(kernelapi, "threading", SimpleNamespace(current_thread=getcurrent)),
        mock.patch.object(BlockManager, "run", run),
    ):
        yield
