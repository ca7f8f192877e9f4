"""Stream-K in the CUDA simulator: whoever shares a tile and whoever comes last, every result equals the reference."""

from __future__ import annotations

import pytest

from .simulator import Simulator

GOOD = {"equal": True, "finite": True, "repeats": True, "kept": True, "flags": 0}


def run(simulator: Simulator, version: str, shape: tuple, name: str, plan: dict, **options: object) -> dict:
    m, n, k = shape
    return simulator(
        "gemm_case", case={"m": m, "n": n, "k": k, "format": name}, plan={"version": version, **plan}, **options
    )


@pytest.mark.parametrize("workers", [1, 2, 4, 7, 15])
@pytest.mark.parametrize("version", ["v4", "v5"])
def test_workers_share_tiles(simulator: Simulator, version: str, workers: int) -> None:
    """Three tiles of five units, so one worker has all of them, two have one and a half each, of seven two or three share a
    tile, of fifteen five. Blocks run one after the other, so a flag that a worker waits for must come from one before it."""
    plan = {"tokens": 8, "stages": 2, "workers": workers}
    assert run(simulator, version, (5, 160, 640), "g128", plan) == GOOD


@pytest.mark.parametrize("warpgroups", [2, 3])
def test_warpgroups_share_tiles(simulator: Simulator, warpgroups: int) -> None:
    """Each warpgroup of a block adds up its own part of a tile."""
    plan = {"tokens": 8, "stages": 2, "workers": 4, "warpgroups": warpgroups}
    assert run(simulator, "v5", (11, 192, 384), "g32", plan) == GOOD


@pytest.mark.parametrize("version", ["v4", "v5"])
def test_runs_repeat_bit_for_bit(simulator: Simulator, version: str) -> None:
    plan = {"tokens": 8, "stages": 3, "workers": 4, "warpgroups": 2 if version == "v5" else 1}
    assert run(simulator, version, (11, 96, 384), "channel-scaled", plan, repeats=2, bias=True) == GOOD


def test_an_odd_number_of_blocks_leaves_a_warpgroup_idle(simulator: Simulator) -> None:
    plan = {"tokens": 8, "stages": 4, "workers": 3, "warpgroups": 2}
    assert run(simulator, "v5", (3, 160, 384), "g128", plan) == GOOD
