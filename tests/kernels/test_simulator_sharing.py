"""Stream-K in the CUDA simulator: whoever shares a tile and whoever comes last, every result equals the reference."""

from __future__ import annotations

import pytest

from .simulator import Simulator

GOOD = {"equal": True, "finite": True, "repeats": True, "kept": True, "counters": 0}


def run(simulator: Simulator, version: str, shape: tuple, name: str, plan: dict, **options: object) -> dict:
    m, n, k = shape
    return simulator(
        "gemm_case", case={"m": m, "n": n, "k": k, "format": name}, plan={"version": version, **plan}, **options
    )


@pytest.mark.parametrize(("workers", "reverse"), [(1, False), (2, False), (2, True), (4, False), (7, True), (15, False)])
@pytest.mark.parametrize("version", ["v4", "v5"])
def test_workers_share_tiles(simulator: Simulator, version: str, workers: int, reverse: bool) -> None:
    """Three tiles of five units, so one worker has all of them, two have one and a half each, of seven two or three share a
    tile, of fifteen five; blocks run in either order, so the first or the last of a tile's workers adds up."""
    plan = {"tokens": 8, "stages": 2, "workers": workers}
    assert run(simulator, version, (5, 160, 640), "g128", plan, reverse=reverse) == GOOD


@pytest.mark.parametrize("reverse", [False, True])
def test_two_warpgroups_share_tiles(simulator: Simulator, reverse: bool) -> None:
    """Each warpgroup of a block adds up its own half of a tile."""
    plan = {"tokens": 8, "stages": 2, "workers": 4, "warpgroups": 2}
    assert run(simulator, "v5", (11, 192, 384), "g32", plan, reverse=reverse) == GOOD


@pytest.mark.parametrize("version", ["v4", "v5"])
def test_runs_repeat_bit_for_bit(simulator: Simulator, version: str) -> None:
    plan = {"tokens": 8, "stages": 3, "workers": 4, "warpgroups": 2 if version == "v5" else 1}
    assert run(simulator, version, (11, 96, 384), "channel-scaled", plan, repeats=2, bias=True) == GOOD


def test_an_odd_number_of_blocks_leaves_a_warpgroup_idle(simulator: Simulator) -> None:
    plan = {"tokens": 8, "stages": 4, "workers": 3, "warpgroups": 2}
    assert run(simulator, "v5", (3, 160, 384), "g128", plan) == GOOD
