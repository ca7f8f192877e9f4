"""Decode attention in the CUDA simulator, at tiny sizes: within fp16's rounding of fp64 on the dequantised cache."""

from __future__ import annotations

from typing import Any

import pytest

from .simulator import Simulator

V1 = {"version": "v1"}
V4 = {"version": "v4", "warps": 2, "stages": 2, "bulk": True, "blocks": 3}
ASYNC = V4 | {"bulk": False}


def check(simulator: Simulator, plan: dict, form: dict, lengths: list[int], kv_heads: int = 1, **options: Any) -> None:
    found = simulator("attention_case", form=form, plan=plan, kv_heads=kv_heads, lengths=lengths, **options)
    error = found.pop("error")
    assert found == {"right": True, "kept": True, "repeats": True, "counters": 0}, error


def form(head_dim: int, group: int, page_size: int = 16, **more: bool) -> dict:
    return {"head_dim": head_dim, "group": group, "page_size": page_size, **more}


@pytest.mark.parametrize("group", [1, 4, 8, 9, 16])
@pytest.mark.parametrize("plan", [V1, V4], ids=lambda plan: plan["version"])
def test_groups(simulator: Simulator, plan: dict, group: int) -> None:
    check(simulator, plan, form(64, group), [5, 17])


@pytest.mark.parametrize("plan", [V1, V4, ASYNC], ids=["v1", "v4-bulk", "v4-async"])
def test_ragged_lengths(simulator: Simulator, plan: dict) -> None:
    """Empty, one token, a full page, one more, several pages; two KV heads."""
    check(simulator, plan, form(64, 2), [0, 1, 16, 17, 0, 37], kv_heads=2)


@pytest.mark.parametrize("plan", [V1, V4], ids=lambda plan: plan["version"])
@pytest.mark.parametrize("page_size", [16, 64, 128])
def test_head_dim_128_and_page_sizes(simulator: Simulator, plan: dict, page_size: int) -> None:
    check(simulator, plan, form(128, 4, page_size), [page_size + 3])


@pytest.mark.parametrize("window", [1, 15, 16, 17, 40, 1000])
@pytest.mark.parametrize("plan", [V1, V4], ids=lambda plan: plan["version"])
def test_window(simulator: Simulator, plan: dict, window: int) -> None:
    check(simulator, plan, form(64, 2), [45, 3], window=window)


@pytest.mark.parametrize("bfloat", [False, True])
@pytest.mark.parametrize("plan", [V1, V4], ids=lambda plan: plan["version"])
def test_softcap_scale_and_dtypes(simulator: Simulator, plan: dict, bfloat: bool) -> None:
    check(simulator, plan, form(64, 3, softcap=True, bfloat=bfloat), [20], softcap=2.0, scale=0.5)


@pytest.mark.parametrize("what", ["uniform", "offset", "constant", "peaked", "tiny"])
@pytest.mark.parametrize("plan", [V1, V4], ids=lambda plan: plan["version"])
def test_hostile_numbers(simulator: Simulator, plan: dict, what: str) -> None:
    check(simulator, plan, form(64, 2), [33], what=what)


@pytest.mark.parametrize(("blocks", "reverse"), [(1, False), (2, False), (2, True), (5, False), (5, True), (40, False)])
def test_blocks_share_heads(simulator: Simulator, blocks: int, reverse: bool) -> None:
    """Two heads of seven pages: one block has all, two share nothing, five share both, forty are more than there is to do;
    blocks run in either order, so the first or the last one merges."""
    check(simulator, V4 | {"blocks": blocks}, form(64, 2), [100], kv_heads=2, reverse=reverse)


def test_more_blocks_than_are_fetched_at_a_time(simulator: Simulator) -> None:
    """19 blocks of two pages share one head; their results are fetched 16 at a time."""
    check(simulator, V4 | {"blocks": 40}, form(64, 1), [16 * 38])


@pytest.mark.parametrize(("warps", "stages"), [(1, 1), (1, 3), (3, 1), (4, 2)])
@pytest.mark.parametrize("bulk", [True, False])
def test_rings(simulator: Simulator, warps: int, stages: int, bulk: bool) -> None:
    check(simulator, V4 | {"warps": warps, "stages": stages, "bulk": bulk, "blocks": 2}, form(64, 2), [70, 30, 9])


def test_more_sequences_than_threads(simulator: Simulator) -> None:
    """With one warp every thread adds up several sequences' pages; runs start in the middle of a thread's share."""
    plan = V4 | {"warps": 1, "blocks": 3}
    check(simulator, plan, form(64, 1), [1 + 5 * i % 23 for i in range(35)])


def test_runs_repeat_bit_for_bit(simulator: Simulator) -> None:
    check(simulator, V4 | {"blocks": 5}, form(64, 2), [100], repeats=2)


@pytest.mark.parametrize(
    "what", ["weights of neighbours", "no transposition", "no largest score", "counts no arrivals", "offset of the codes"]
)
def test_changed_kernels_are_noticed(simulator: Simulator, what: str) -> None:
    assert simulator("attention_mutant_case", what="nothing")["right"]
    assert not simulator("attention_mutant_case", what=what)["right"]


@pytest.mark.parametrize("options", [{}, {"window": 7}, {"softcap": 3.0}, {"scale": 1.0}, {"dtype": "bfloat16"}])
def test_public_function(simulator: Simulator, options: dict) -> None:
    found = simulator("public_attention_case", **options)
    bfloat = options.get("dtype") == "bfloat16"
    assert found.pop("error") <= (5e-3 if bfloat else 1e-3)
    assert found == {"same": True, "lse": True, "dtype": "torch.bfloat16" if bfloat else "torch.float16"}


MESSAGES = {
    "cache: a tensor": ["TypeError", "cache: expected a PagedKV4, got Tensor"],
    "query: a list": ["TypeError", "query: expected a torch.Tensor, got list"],
    "query: fp32": ["TypeError", "query: expected fp16 or bf16, got torch.float32"],
    "query: two dimensions": ["ValueError", "query: expected [1, Hq, 64], got 4x64"],
    "query: other sequences": ["ValueError", "query: expected [1, Hq, 64], got 2x4x64"],
    "query: other D": ["ValueError", "query: expected [1, Hq, 64], got 1x4x128"],
    "query: 3 heads": ["ValueError", "query: 3 heads; expected a multiple of the cache's 2 KV heads"],
    "query: 34 heads": ["ValueError", "query: 34 heads; expected a multiple of the cache's 2 KV heads, at most 16"],
    "query: elsewhere": ["ValueError", "query: on meta, the cache on cpu"],
    "layer: 1": ["ValueError", "layer: 1 is not one of 0..0"],
    "sequences: not open": ["ValueError", "sequence: 5 is not open"],
    "sequences: int64": ["ValueError", "sequences: expected int32 [B] on cpu, got torch.int64"],
    "scale: 0": ["ValueError", "scale: expected a positive number or None, got 0"],
    "scale: NaN": ["ValueError", "scale: expected a positive number or None, got nan"],
    "softcap: negative": ["ValueError", "softcap: expected a positive number or None, got -1.0"],
    "window: 0": ["ValueError", "window: expected a positive integer, got 0"],
    "window: 1.5": ["ValueError", "window: expected a positive integer, got 1.5"],
}


def test_bad_input_is_named(simulator: Simulator) -> None:
    found = simulator("attention_errors")
    assert found.keys() == MESSAGES.keys()
    for name, (kind, start) in MESSAGES.items():
        assert found[name][0] == kind and found[name][1].startswith(start), (name, found[name])
