"""The simulator's threads, blocks and clusters: what a kernel's result does not show."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from qoqlab_kernels import emulation, simulation


def run(work: Callable[[], None], threads: int = 4, blocks: int = 1, shared: int = 32) -> None:
    places = [(rank, 0, 0) for rank in range(blocks)]
    simulation.Cluster(places, (blocks, 1, 1), (threads, 1, 1), work, shared).run()


def thread() -> simulation.Thread:
    return simulation.getcurrent()  # type: ignore[return-value]


def test_a_shared_array_belongs_to_a_block_and_to_the_line_that_asks() -> None:
    found: list[tuple[int, np.ndarray, np.ndarray]] = []

    def work() -> None:
        first = simulation.shared_array(None, 4, np.uint32)
        second = simulation.shared_array(None, 4, np.uint32)
        found.append((int(emulation.cluster_rank()), first, second))

    run(work, threads=8, blocks=2)
    arrays = {rank: [f[1:] for f in found if f[0] == rank] for rank in (0, 1)}
    for rank in (0, 1):
        assert len(arrays[rank]) == 8
        assert all(one is arrays[rank][0][0] and two is arrays[rank][0][1] for one, two in arrays[rank])
    assert len({id(array) for rank in arrays.values() for pair in rank for array in pair}) == 4
    assert all((array.view(np.uint8) == simulation.POISON).all() for _, *pair in found for array in pair)


def test_dynamic_shared_memory_is_everybodys() -> None:
    def work() -> None:
        mine = simulation.shared_array(None, 0, np.uint32)
        mine[thread().thread_id] = thread().thread_id
        thread().syncthreads()
        assert mine.tolist() == [0, 1, 2, 3]

    run(work, shared=18)  # two bytes too many for a word


def test_syncthreads_waits_for_all_but_those_that_have_ended() -> None:
    order: list[str] = []

    def work() -> None:
        if thread().thread_id == 3:
            return
        order.append("before")
        thread().syncthreads()
        order.append("after")

    run(work)
    assert order == ["before"] * 3 + ["after"] * 3


def test_threads_run_in_an_order_that_is_mixed_and_always_the_same() -> None:
    orders: list[list[int]] = [[], []]
    for order in orders:

        def work(order: list[int] = order) -> None:
            order.append(thread().thread_id)
            thread().syncthreads()
            order.append(thread().thread_id)

        run(work, threads=16)
    assert orders[0] == orders[1]
    assert sorted(orders[0][:16]) == list(range(16)) != orders[0][:16] != orders[0][16:]


def test_the_first_failure_is_raised_with_its_thread() -> None:
    def work() -> None:
        if thread().thread_id == 2:
            raise ValueError("no")
        thread().syncthreads()

    with pytest.raises(ValueError, match=r"tid=\[2, 0, 0\] ctaid=\[0, 0, 0\]: no"):
        run(work)


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: emulation.named_barrier(1, 5), "4 at ('named barrier', 1, 5) of (0, 0, 0)"),
        (lambda: emulation.warp_barrier(), "4 at ('warp_barrier.<locals>.<lambda>', 'of warp', 0) of (0, 0, 0)"),
        (
            lambda: (thread().thread_id and emulation.cluster_sync()) or thread().syncthreads(),
            "1 at syncthreads of (0, 0, 0)",
        ),
    ],
)
def test_waiting_for_ever_is_an_error_that_says_where(work: Callable[[], None], message: str) -> None:
    with pytest.raises(RuntimeError, match="threads wait for ever") as raised:
        run(work)
    assert message in str(raised.value)


def test_a_clusters_barrier_counts_the_threads_of_all_its_blocks_that_have_not_ended() -> None:
    order: list[str] = []

    def work() -> None:
        if thread().thread_id == 0:
            return
        for turn in range(2):
            order.append(f"before {turn}")
            emulation.cluster_arrive()
            emulation.cluster_wait()
            order.append(f"after {turn}")

    run(work, blocks=2)
    assert set(order[:6]) == {"before 0"} and "after 1" not in order[: order.index("before 1") + 6]
    assert order.count("after 1") == 6


def test_who_arrives_at_a_clusters_barrier_may_end_without_waiting() -> None:
    seen: list[int] = []

    def work() -> None:
        emulation.cluster_arrive()
        if thread().thread_id:
            emulation.cluster_wait()
            seen.append(thread().thread_id)

    run(work, blocks=2)
    assert sorted(seen) == [1, 1, 2, 2, 3, 3]


def test_blocks_of_a_cluster_write_to_each_other_until_they_end() -> None:
    seen: list[int] = []

    def work() -> None:
        rank, at = int(emulation.cluster_rank()), simulation.SHARED_BASE
        emulation.sts4_remote(emulation.map_shared(at, 1 - rank), 10 + rank, 0, 0, 0)
        emulation.cluster_sync()
        seen.append(int(emulation.lds1(at)))

    run(work, threads=1, blocks=2)
    assert sorted(seen) == [10, 11]

    def leaves() -> None:
        if emulation.cluster_rank():
            return
        for _ in range(100):  # until the other one has ended
            thread().syncthreads()
        emulation.sts4_remote(emulation.map_shared(simulation.SHARED_BASE, 1), 0, 0, 0, 0)

    with pytest.raises(RuntimeError, match="cluster: block 1 has ended"):
        run(leaves, threads=2, blocks=2)
    with pytest.raises(IndexError, match="cluster: block 2 of 2"):
        run(lambda: emulation.sts4_remote(emulation.map_shared(16, 2), 0, 0, 0, 0), blocks=2)
