"""v1, v2, v3 and the public functions in the CUDA simulator: every result equals the reference."""

from __future__ import annotations

import pytest
from qoqlab_kernels.cases import FORMATS

from .simulator import Simulator

#: (M, N, K): one token, one group; tails in all three; several units of K. v2 is the slowest to simulate.
SHAPES = {
    "v1": [(1, 32, 128), (1, 96, 256)],
    "v2": [(1, 32, 128), (9, 32, 160)],
    "v3": [(1, 32, 128), (2, 96, 256)],
}
GOOD = {"equal": True, "finite": True, "repeats": True, "kept": True, "flags": 0}


#: What v1 and v2, which unpack alike and are the slowest to simulate, are tried with; v3 with everything.
SOME = ("g128", "g32-scaled", "channel", "channel-scaled")


@pytest.mark.parametrize(("version", "name"), [(v, name) for v in SHAPES for name in FORMATS if v == "v3" or name in SOME])
def test_every_format(simulator: Simulator, version: str, name: str) -> None:
    small, large = SHAPES[version]
    m, n, k = large if large[2] % max(32, FORMATS[name][0]) == 0 and version != "v2" else small
    assert simulator("gemm_case", case={"m": m, "n": n, "k": k, "format": name}, plan={"version": version}) == GOOD


@pytest.mark.parametrize(
    ("version", "m", "n", "k", "name"),
    [
        ("v1", 8, 32, 32, "g32"),
        ("v1", 17, 32, 160, "channel"),
        ("v2", 8, 32, 32, "g32-scaled"),
        ("v2", 9, 32, 160, "channel-scaled"),
        ("v3", 8, 32, 32, "channel"),
        ("v3", 9, 32, 288, "g32"),
    ],
)
@pytest.mark.parametrize("options", [{"bias": True}, {"dtype": "bfloat16", "bias": True}, {"extreme": True}])
def test_tails_with_bias_bf16_and_extreme_codes(
    simulator: Simulator, version: str, m: int, n: int, k: int, name: str, options: dict
) -> None:
    case = {"m": m, "n": n, "k": k, "format": name}
    assert simulator("gemm_case", case=case, plan={"version": version}, **options) == GOOD


@pytest.mark.parametrize("version", ["v2", "v4", "v5"])
def test_the_public_functions_end_to_end(simulator: Simulator, version: str) -> None:
    answer = simulator(
        "public_case", case={"m": 3, "n": 96, "k": 160, "format": "g32"}, version=version, tiled=version == "v2"
    )
    assert answer == {"equal": True, "version": version, "out": True}


@pytest.mark.parametrize("how", ["codes", "floats"])
def test_torch_compile_takes_the_public_functions_in_one_graph(simulator: Simulator, how: str) -> None:
    assert simulator("compiled_case", case={"m": 3, "n": 32, "k": 64, "format": "g32"}, how=how) == {"equal": [True, True]}
