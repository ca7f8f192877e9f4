"""Decode attention in the CUDA simulator, at tiny sizes: within fp16's rounding of fp64 on the dequantised cache."""

from __future__ import annotations

from typing import Any

import pytest

from .simulator import Simulator

V4 = {"version": "v4", "warps": 2, "stages": 2, "bulk": True, "blocks": 2}
ASYNC = V4 | {"bulk": False}
ALONE = V4 | {"warps": 1}
LADDER = [{"version": "v1"}, {"version": "v2"}, {"version": "v3"}]
EVERY = pytest.mark.parametrize("plan", [*LADDER, V4], ids=lambda plan: plan["version"])


def check(simulator: Simulator, plan: dict, form: dict, lengths: list[int], kv_heads: int = 1, **options: Any) -> None:
    found = simulator("attention_case", form=form, plan=plan, kv_heads=kv_heads, lengths=lengths, **options)
    error = found.pop("error")
    assert found == {"right": True, "kept": True, "repeats": True, "counters": 0}, error


def form(head_dim: int, group: int, page_size: int = 16, lse: bool = True, **more: bool) -> dict:
    return {"head_dim": head_dim, "group": group, "page_size": page_size, "lse": lse, **more}


@pytest.mark.parametrize("group", [1, 8, 9, 16])
def test_groups(simulator: Simulator, group: int) -> None:
    check(simulator, V4, form(64, group), [17])


@pytest.mark.parametrize("plan", LADDER, ids=lambda plan: plan["version"])
def test_groups_of_the_ladder(simulator: Simulator, plan: dict) -> None:
    check(simulator, plan, form(64, 5), [17])


@pytest.mark.parametrize("plan", [*LADDER, V4, ASYNC], ids=["v1", "v2", "v3", "v4-bulk", "v4-async"])
def test_ragged_lengths(simulator: Simulator, plan: dict) -> None:
    """Empty, one token, a full page, one more; two KV heads."""
    check(simulator, plan, form(64, 1), [0, 1, 16, 17, 0], kv_heads=2)


@EVERY
def test_head_dim_128(simulator: Simulator, plan: dict) -> None:
    check(simulator, plan, form(128, 2, 32), [35])


@pytest.mark.parametrize("page_size", [16, 64, 128])
def test_page_sizes(simulator: Simulator, page_size: int) -> None:
    check(simulator, V4, form(64, 2, page_size, lse=False), [page_size + 3])


@pytest.mark.parametrize("window", [1, 17, 1000])
def test_window(simulator: Simulator, window: int) -> None:
    check(simulator, V4, form(64, 2), [36, 3], window=window)


@pytest.mark.parametrize("plan", LADDER, ids=lambda plan: plan["version"])
def test_window_of_the_ladder(simulator: Simulator, plan: dict) -> None:
    check(simulator, plan, form(64, 2), [36, 3], window=17)


@EVERY
def test_softcap_scale_and_bf16(simulator: Simulator, plan: dict) -> None:
    check(simulator, plan, form(64, 3, softcap=True, bfloat=True), [20], softcap=2.0, scale=0.5)


@pytest.mark.parametrize(
    ("bits", "form_", "options"),
    [
        (8, form(64, 3), {}),
        (8, form(128, 1, 32, bfloat=True, softcap=True), {"softcap": 3.0}),
        (16, form(64, 2), {"window": 17}),
        (16, form(128, 1, 32), {}),
    ],
)
def test_pages_of_8_and_16_bits(simulator: Simulator, bits: int, form_: dict, options: dict) -> None:
    check(simulator, LADDER[1], form_ | {"bits": bits}, [0, 33, 7], kv_heads=2, **options)


def test_softcap_in_fp16(simulator: Simulator) -> None:
    check(simulator, V4, form(64, 3, softcap=True), [20], softcap=2.0, scale=0.5)


@pytest.mark.parametrize("what", ["uniform", "offset", "constant", "peaked", "tiny"])
def test_hostile_numbers(simulator: Simulator, what: str) -> None:
    check(simulator, V4, form(64, 2), [18], what=what)


@pytest.mark.parametrize("what", ["offset", "peaked"])
@pytest.mark.parametrize("plan", LADDER, ids=lambda plan: plan["version"])
def test_hostile_numbers_of_the_ladder(simulator: Simulator, plan: dict, what: str) -> None:
    check(simulator, plan, form(64, 1), [18], what=what)


@pytest.mark.parametrize(("blocks", "reverse"), [(1, False), (4, False), (4, True), (7, False)])
def test_blocks_share_heads(simulator: Simulator, blocks: int, reverse: bool) -> None:
    """Two heads of three pages: one block has all, four share both, seven are more than there is to do; blocks run in either
    order, so the first or the last one merges; again, and the same in every bit."""
    check(simulator, ALONE | {"blocks": blocks}, form(64, 2), [34], kv_heads=2, reverse=reverse, repeats=1 + reverse)


def test_more_blocks_than_are_fetched_at_a_time(simulator: Simulator) -> None:
    """Five blocks of a page each share one head; their results are fetched two at a time (16 in earnest)."""
    check(simulator, ALONE | {"blocks": 5}, form(64, 1), [16 * 5], at_once=2)


@pytest.mark.parametrize(("warps", "stages", "bulk"), [(1, 1, True), (1, 3, False), (3, 1, False), (4, 2, True)])
def test_rings(simulator: Simulator, warps: int, stages: int, bulk: bool) -> None:
    check(simulator, V4 | {"warps": warps, "stages": stages, "bulk": bulk}, form(64, 2, lse=False), [50, 9])


def test_more_sequences_than_threads(simulator: Simulator) -> None:
    """With one warp every thread adds up two sequences' pages; runs start in the middle of a thread's share."""
    lengths = [0] * 35
    for i, count in ((3, 1), (4, 17), (21, 20), (34, 5)):
        lengths[i] = count
    check(simulator, ALONE | {"blocks": 3}, form(64, 1), lengths)


def test_zeros_of_empty_sequences_go_to_their_own_rows(simulator: Simulator) -> None:
    """Amid others and behind them, more heads than one; two of them to the same block."""
    check(simulator, ALONE | {"blocks": 2}, form(64, 2), [5, 0, 9, 0], kv_heads=2)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("weight", "lengths", "kv_heads"), [(2, [16, 0, 50, 33], 1), (1, [0, 50, 5], 2)], ids=["one head", "two heads"]
)
def test_segments_have_a_weight(simulator: Simulator, weight: int, lengths: list[int], kv_heads: int, reverse: bool) -> None:
    """Runs start and end in the units behind a head's pages, at its first page and amid them; heads are shared by two blocks
    and by more; empty sequences weigh nothing. Whoever leaves these units out is noticed: where a run starts, where a head
    does (by a block that comes to it later, so blocks run in either order), and in which of a block's two partial results is
    which."""
    check(simulator, ALONE | {"blocks": 4, "weight": weight}, form(64, 1), lengths, kv_heads=kv_heads, reverse=reverse)


def test_codes_become_exact_numbers(simulator: Simulator) -> None:
    assert simulator("codes_case") == {"v3": True, "v4": True}


@pytest.mark.parametrize("version", ["v2", "v3", "v4"])
def test_unchanged_kernels_are_right(simulator: Simulator, version: str) -> None:
    assert simulator("attention_mutant_case", version=version, what="nothing")["right"]


@pytest.mark.parametrize(
    ("version", "what"),
    [
        *(("v4", what) for what in ("weights of neighbours", "no transposition", "no largest score")),
        *(("v4", what) for what in ("counts no arrivals", "offset of the codes", "logarithm of another base")),
        *(("v2", what) for what in ("conversion of the codes", "lanes do not meet")),
        *(("v3", what) for what in ("offset of the codes", "lanes do not meet")),
    ],
)
def test_changed_kernels_are_noticed(simulator: Simulator, version: str, what: str) -> None:
    assert not simulator("attention_mutant_case", version=version, what=what)["right"]


@pytest.mark.parametrize(
    "options",
    [{}, {"version": "v2", "dtype": "bfloat16"}, {"version": "v3", "window": 7, "softcap": 3.0, "scale": 1.0}],
)
def test_public_function(simulator: Simulator, options: dict) -> None:
    found = simulator("public_attention_case", **options)
    bfloat = options.get("dtype") == "bfloat16"
    assert found.pop("error") <= (5e-3 if bfloat else 1e-3)
    assert found == {
        "same": True,
        "lse": True,
        "dtype": "torch.bfloat16" if bfloat else "torch.float16",
        "version": options.get("version", "v4"),
    }


MESSAGES = {
    "cache: a tensor": ["TypeError", "cache: expected a PagedKV4, PagedKV8 or PagedKV16, got Tensor"],
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
    "version: v5": ["ValueError", "QOQLAB_ATTENTION: 'v5' is not one of v1, v2, v3, v4 for pages of 4 bits"],
    "version: v4 on 8 bits": ["ValueError", "QOQLAB_ATTENTION: 'v4' is not one of v2 for pages of 8 bits"],
}


def test_bad_input_is_named(simulator: Simulator) -> None:
    found = simulator("attention_errors")
    assert found.keys() == MESSAGES.keys()
    for name, (kind, start) in MESSAGES.items():
        assert found[name][0] == kind and found[name][1].startswith(start), (name, found[name])
