"""Sizes of the attention kernel by shared memory, and the options of its benchmark."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from qoqlab_kernels import attention, bench, bench_kv4
from qoqlab_kernels.attention import WEIGHT, AttentionPlan, plan_for
from qoqlab_kernels.bench_kv4 import POINTS, Point
from qoqlab_kernels.kv4 import Form, Ring

HOPPER, AMPERE, ADA = (232448, 233472), (166912, 167936), (101376, 102400)


def test_two_blocks_where_two_stages_of_each_fit() -> None:
    assert plan_for(Form(128, 4), (9, 0), 132, *HOPPER) == AttentionPlan("v4", 4, 2, True, 264, True, WEIGHT, 2)
    assert plan_for(Form(64, 4), (9, 0), 132, *HOPPER) == AttentionPlan("v4", 4, 4, True, 264, True, WEIGHT, 2)
    assert plan_for(Form(128, 4), (8, 0), 108, *AMPERE) == AttentionPlan("v4", 4, 2, False, 216, weight=WEIGHT, residents=2)
    assert plan_for(Form(128, 4), (8, 9), 142, *ADA) == AttentionPlan("v4", 4, 2, False, 142, weight=WEIGHT)


@pytest.mark.parametrize("limits", [HOPPER, AMPERE, ADA])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("group", [1, 8, 16])
@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
def test_every_plan_fits(limits: tuple, dim: int, group: int, page_size: int) -> None:
    form = Form(dim, group, page_size)
    plan = plan_for(form, (8, 0), 1, *limits)
    used = Ring(form, plan.warps, plan.stages).total
    assert plan.stages >= 1 and used <= limits[0] and plan.blocks * (used + 1024) <= limits[1]


def test_pages_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="page_size: pages of 128 tokens do not fit in 32768 bytes"):
        plan_for(Form(128, 4, 128), (8, 0), 1, 32768, 65536)


def test_bytes_of_a_point() -> None:
    """64 x 1536 tokens, 8 heads: 64 bytes of codes and 4 of scale and zero, for K and V."""
    point = Point(64, 1536)
    assert point.cache_bytes == 64 * 1536 * 8 * 2 * (64 + 4)
    assert point.least_bytes - point.cache_bytes == 2 * 2 * 64 * 32 * 128
    assert all(p.heads % p.kv_heads == 0 for p in POINTS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "x"], "--batch: expected positive numbers"),
        (["--batch", "7"], "--batch: none of 7 is measured"),
        (["--plans", "4x2x2,4x1"], "--plans: expected warps, stages and blocks on a multiprocessor, such as 4x1x3"),
        (["--plans", "4x2x2,4x0x2"], "got '4x0x2'"),
    ],
)
def test_options_of_the_benchmark(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        bench.main(["kv4_decode", *words])
    assert message in capsys.readouterr().err


def test_other_plans_are_timed_where_they_fit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    limits = {"multi_processor_count": 132, "shared_memory_per_block_optin": HOPPER[0]}
    there = SimpleNamespace(**limits, shared_memory_per_multiprocessor=HOPPER[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: there)
    monkeypatch.setattr(attention, "attention_plan", lambda form, device: plan_for(form, (9, 0), 132, *HOPPER))
    monkeypatch.setattr(bench_kv4, "time_kernel", lambda data, form, about_us, plan: (plan.blocks / plan.stages, 0.0, plan))
    data = SimpleNamespace(query=torch.empty(0))
    times = bench_kv4.time_plans(data, Form(128, 4), 1.0, ["4x2x2", "4x1x3", "4x2x3"])
    assert times == {"4x2x2": 132.0, "4x1x3": 396.0}
    assert "no plan 4x2x3: 78328 bytes of shared memory a block, 76800 are there" in capsys.readouterr().out
    result = {"batch": 1, "tokens": 1024, "head_dim": 128, "us": 7.7}
    table = bench_kv4.plan_table([result | {"plans": times}, result | {"plans": {"4x2x2": 8.0}}]).splitlines()
    assert table[0].split()[-2:] == ["4x2x2", "4x1x3"] and table[1].split()[-2:] == ["132", "396"]


def test_the_table_names_the_best_peer() -> None:
    result = {
        "batch": 64, "tokens": 1536, "heads": 32, "kv_heads": 8, "head_dim": 128, "us": 30.0, "bound_us": 24.0,
        "of_bandwidth": 0.8, "tb_per_s": 3.5, "relative_error": 3e-4, "peers": {"slow": 200.0, "fast": 99.0},
        "target_us": 32.0, "with_append_us": {"waiting": 33.0, "settled": 31.5},
    }  # fmt: skip
    line = bench_kv4.point_table([result]).splitlines()[1].split()
    assert line[-4:] == ["fast", "99.0", "32.0", "met"] and "80.0" in line
