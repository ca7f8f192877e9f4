"""v4 and v5 in the CUDA simulator: tensor-core operands, rings of stages; every result equals the reference."""

from __future__ import annotations

import pytest
from qoqlab_kernels.cases import FORMATS

from .simulator import Simulator

GOOD = {"equal": True, "finite": True, "repeats": True, "kept": True, "flags": 0}


def run(simulator: Simulator, version: str, shape: tuple, name: str, plan: dict, **options: object) -> dict:
    m, n, k = shape
    return simulator(
        "gemm_case", case={"m": m, "n": n, "k": k, "format": name}, plan={"version": version, **plan}, **options
    )


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("version", ["v4", "v5"])
def test_every_format(simulator: Simulator, version: str, name: str) -> None:
    """Three units of K in a ring of two, tails in M and N, two tiles shared by three workers."""
    plan = {"tokens": 8, "stages": 2, "workers": 3}
    assert run(simulator, version, (3, 96, 384), name, plan) == GOOD


@pytest.mark.parametrize(("m", "n", "k"), [(1, 32, 32), (8, 32, 160), (9, 96, 288), (17, 64, 32)])
@pytest.mark.parametrize("version", ["v4", "v5"])
@pytest.mark.parametrize("options", [{"extreme": True}, {"dtype": "bfloat16", "bias": True}])
def test_tails_with_bias_bf16_and_extreme_codes(
    simulator: Simulator, version: str, m: int, n: int, k: int, options: dict
) -> None:
    name = "channel" if k % 64 else "g32-scaled"
    assert run(simulator, version, (m, n, k), name, {"tokens": 16, "stages": 3, "workers": 2}, **options) == GOOD


@pytest.mark.parametrize(
    ("version", "tokens", "m"),
    [("v4", 32, 33), ("v4", 64, 17), ("v5", 32, 33), ("v5", 64, 17), ("v5", 128, 65), ("v5", 256, 9)],
)
def test_every_width_of_tile(simulator: Simulator, version: str, tokens: int, m: int) -> None:
    """Wide tiles with few tokens in them, and one token too many for a tile."""
    plan = {"tokens": tokens, "stages": 2, "workers": 1, "warpgroups": 2 if tokens >= 128 else 1}
    assert run(simulator, version, (m, 32, 256), "g64", plan) == GOOD


def test_clusters_are_refused(simulator: Simulator) -> None:
    kind, message = simulator("cluster_case")["raised"]
    assert kind == "ValueError"
    assert message == "cluster: 2; the simulator runs one block at a time, take 1"
