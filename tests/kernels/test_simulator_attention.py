"""Appending to the KV4 cache and decode attention in the CUDA simulator, against fp64 on the dequantised cache."""

from __future__ import annotations

import pytest

from .simulator import Simulator

#: Rounding of the result, fp16 and bf16, and of probabilities to fp16: 2^-11 each, 2^-8 for bf16.
LIMIT = {"float16": 1e-3, "bfloat16": 3e-3}


def plan(warps: int, stages: int, workers: int, bulk: bool) -> dict:
    return {"version": "v4", "warps": warps, "stages": stages, "workers": workers, "bulk": bulk}


@pytest.mark.parametrize(
    ("lengths", "heads", "group", "dim", "how", "options"),
    [
        ([70], 1, 4, 64, plan(1, 2, 1, True), {}),
        ([130, 1, 0, 64], 1, 4, 64, plan(2, 2, 3, True), {"reverse": True}),
        ([65, 3], 1, 1, 128, plan(1, 1, 2, True), {"dtype": "bfloat16", "softcap": 5.0}),
        ([150], 1, 9, 64, plan(2, 2, 5, False), {"window": 70}),
    ],
    ids=["plain", "shared", "bf16-capped", "two-splits-window"],
)
def test_attention(simulator: Simulator, lengths: list, heads: int, group: int, dim: int, how: dict, options: dict) -> None:
    got = simulator("attention_case", lengths=lengths, heads=heads, group=group, dim=dim, plan=how, **options)
    assert got["cache"] and got["kept"]
    assert got["error"] < LIMIT[options.get("dtype", "float16")]


def test_the_public_function(simulator: Simulator) -> None:
    got = simulator("attention_public_case")
    assert got["compiled"]
    expected = [
        ("TypeError", "query: expected fp16 or bf16, got torch.float32"),
        ("ValueError", "query: expected [1, Hq, 64] with B >= 1, got 2x64"),
        ("ValueError", "query: expected [1, Hq, 64] with B >= 1, got 2x2x64"),
        ("ValueError", "query: expected [1, Hq, 64] with B >= 1, got 1x2x32"),
        ("ValueError", "query: 18 heads; expected 1 to 16 for each of 1 kv heads"),
        ("TypeError", "cache: expected a PagedKV4, got PagedKV8"),
        ("ValueError", "layer: expected 0 .. 0, got 1"),
        ("ValueError", "sequences: 1 is not open"),
        ("ValueError", "sequences: expected int32 [B] on cpu (cache.batch), got torch.int64"),
        ("ValueError", "scale: expected a finite number, got nan"),
        ("ValueError", "window: expected a positive integer, got 0"),
        ("ValueError", "softcap: expected a positive number, got -1.0"),
    ]
    for (kind, message), found in zip(expected, got["errors"], strict=True):
        assert found[0] == kind and found[1].startswith(message)
