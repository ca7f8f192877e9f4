"""An engine on two ranks (gloo): the tokens, and the logits to the last bit, of one; what cannot be cut; lost ranks."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from qoqlab import affine, parallel, progressive
from qoqlab.architecture import describe
from qoqlab.parallel import Ranks, Slice, inputs, outputs, require_slices

from .parallel_worker import HERE, work

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What both ranks have found, from one start of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("a place with spaces")))
        patch.syspath_prepend(ROOT)  # where the processes find this package of tests
        parallel.spawn(work, 2, (folder,), "cpu", timeout=60, fork=sys.platform == "linux")
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.mark.parametrize("name", HERE)
def test_tokens_and_logits_are_those_of_one_engine(answers: list[dict], name: str) -> None:
    first, second = (answer[name] for answer in answers)
    assert first["equal"]
    assert [first["tokens"], first["drawn"]] == first["alone"]
    assert first["kv_heads"] == 1  # of two
    assert second == {key: value for key, value in first.items() if key in second}


def test_servers_whose_clocks_differ_do_the_same(answers: list[dict]) -> None:
    first, second = (answer["served"] for answer in answers)
    assert first["tokens"] == first["alone"] == second["tokens"]
    assert first["steps"] == second["steps"]


def test_ranks_that_differ_are_told_so(answers: list[dict]) -> None:
    for rank, answer in enumerate(answers):
        kind, words, _ = answer["differing"]
        assert kind == "ValueError" and f"rank {rank} of 2: ranks differ; here shape=" in words
        assert f"max_batch={2 + rank}" in words
        assert answer["other device"][:2] == ["ValueError", "group: its backend is gloo; an engine on cuda:0 needs nccl"]


def test_nan_of_one_rank_is_an_error_on_all(answers: list[dict]) -> None:
    for answer, words in zip(answers, ("x of another rank: holds 0 NaN and 1 infinite", "x: holds 1 NaN"), strict=True):
        kind, said, seconds = answer["spoilt"]
        assert kind == "ValueError" and said.startswith(words) and seconds < 10


def test_a_lost_rank_is_an_error_and_no_wait(answers: list[dict]) -> None:
    for kind, words, seconds in answers[0]["lost"]:
        assert kind == "RuntimeError" and "(gloo), rank 0 of 2: another rank is lost" in words
        assert seconds < 10
    kind, words, seconds = answers[0]["slow"]
    assert kind == "RuntimeError" and "took longer than 0.3 s" in words and 0.25 < seconds < 5


# -- without other processes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["groups", "per channel"])
def test_slices_hold_the_same_numbers(kind: str) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    w = progressive.quantize(weight, 32) if kind == "groups" else affine.quantize_per_channel_u4(weight)
    whole, bias = w.dequantize(), torch.arange(64.0)
    for rank in range(2):
        part = Slice(rank, 2)
        rows, kept = part.cut("down", w, bias)
        assert torch.equal(rows.dequantize(), whole[:, 128 * rank : 128 * (rank + 1)]) and kept is bias
        columns, cut = part.cut("up", w, bias)
        assert torch.equal(columns.dequantize(), whole[32 * rank : 32 * (rank + 1)])
        assert torch.equal(cut, bias[32 * rank : 32 * (rank + 1)])
    assert inputs(w, slice(32, 64)).shape == (64, 32) and outputs(w, slice(3, 5)).shape == (2, 256)


@pytest.mark.parametrize(
    ("preset", "ranks", "message"),
    [
        ("rtn-w4a8kv4-g128", 4, r"model.layers.0.self_attn.k_proj: KV heads: 2 cannot be cut into 4 equal slices"),
        ("rtn-w4a8kv4-g128", 2, r"model.layers.0.self_attn.o_proj: K: 128 cannot be cut into 2 slices of a multiple of 128"),
        ("rtn-w4a8kv4", 2, None),
    ],
)
def test_what_cannot_be_cut_is_named(preset: str, ranks: int, message: str | None, quantized) -> None:
    architecture = describe(quantized("llama", preset).model)
    if message is None:
        require_slices(architecture, ranks)
        return
    with pytest.raises(ValueError, match=message):
        require_slices(architecture, ranks)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(RuntimeError, match=r"group: torch.distributed is not initialised; see init_process_group"):
        Ranks("cpu")
    with pytest.raises(ValueError, match="ranks: expected a positive integer, got 0"):
        parallel.spawn(work, 0, device="cpu")
    with pytest.raises(ValueError, match="fork: CUDA does not work in a copied process"):
        parallel.spawn(work, 2, fork=True)
    with pytest.raises(ValueError, match="device: expected cuda or cpu, got 'tpu'"):
        parallel.spawn(work, 2, device="tpu")
    if torch.cuda.device_count() < 64:
        with pytest.raises(ValueError, match=r"ranks: 64 on \d+ GPUs; each needs its own"):
            parallel.spawn(work, 64)
