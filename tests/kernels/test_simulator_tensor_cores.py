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


@pytest.mark.parametrize(
    ("version", "tokens", "name", "options"),
    [
        ("v1", 8, "g32-scaled", {}),
        ("v3", 8, "channel", {"bias": True}),
        ("v4", 8, "channel-scaled", {"bias": True}),
        ("v5", 16, "g64", {"dtype": "bfloat16"}),
    ],
)
def test_sums_of_halves_are_those_of_the_whole(
    simulator: Simulator, version: str, tokens: int, name: str, options: dict
) -> None:
    """What two GPUs that share a layer's inputs compute; tails in M and N, tiles shared by workers."""
    plan = {"version": version, "tokens": tokens, "stages": 2, "workers": 2}
    m, n, k = {"v1": (1, 32, 64), "v3": (3, 96, 64)}.get(version, (9, 96, 512))
    case = {"m": m, "n": n, "k": k, "format": name}
    assert simulator("sums_case", case=case, plan=plan, **options) == {"equal": True, "kept": True}


def test_bad_sums_are_named(simulator: Simulator) -> None:
    assert simulator("sums_errors") == {
        "x: codes": ["TypeError", "x: expected Activations, got Tensor"],
        "x: other K": ["ValueError", "x: K = 32 on cpu does not match the weight's K = 64 on cpu"],
        "total: fp32": ["ValueError", "total: expected int32 [3, 32] on cpu, got torch.float32 of shape 3x32 on cpu"],
        "dtype": ["TypeError", "dtype: expected torch.float16 or torch.bfloat16, got torch.float32"],
        "token_sums": ["ValueError", "token_sums: weights with scaled zeros need them, others have none"],
    }


@pytest.mark.parametrize(
    ("plan", "shape", "name"),
    [
        ({"cluster": 2, "workers": 1}, (9, 192, 256), "g128"),  # the last cluster has one block with outputs
        ({"cluster": 2, "workers": 2}, (17, 256, 384), "g64-scaled"),  # clusters share tiles
        ({"cluster": 4, "workers": 1, "tokens": 32}, (5, 256, 128), "channel"),
        ({"split": 2}, (9, 96, 384), "g128"),  # an odd number of units
        ({"split": 4, "warpgroups": 2}, (3, 128, 512), "channel-scaled"),
    ],
)
def test_blocks_of_a_cluster_work_together(simulator: Simulator, plan: dict, shape: tuple, name: str) -> None:
    """Activations multicast to blocks with other outputs; inputs split over blocks whose sums meet in shared memory."""
    assert run(simulator, "v5", shape, name, {"tokens": 16, "stages": 2, **plan}) == GOOD
