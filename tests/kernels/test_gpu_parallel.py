"""An engine on two GPUs (NCCL, captured steps): the tokens of one; a rank that is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qoqlab import parallel

from .gpus import CAPABILITY
from .parallel_worker import MODELS, lose, work

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        CAPABILITY < (8, 0) or torch.cuda.device_count() < 2,
        reason="needs two NVIDIA GPUs of compute capability 8.0 or newer",
    ),
]


@pytest.fixture(scope="module")
def on_path():
    """The processes find this package of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        yield


@pytest.fixture(scope="module")
def answers(on_path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What both ranks have found, from one start of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    parallel.spawn(work, 2, (folder,))
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_one_gpu(answers: list[dict], name: str) -> None:
    """Sums are taken of integers, and so short a context is cut into the same pieces: no bit differs."""
    first, second = (answer[name] for answer in answers)
    assert (first["prefill_error"], first["decode_error"]) == (0, 0)
    assert [first["tokens"], first["drawn"]] == first["alone"]
    assert first["again"] and first["steps"] == [4]
    assert second == {key: value for key, value in first.items() if key in second}


def test_servers_whose_clocks_differ_do_the_same(answers: list[dict]) -> None:
    first, second = (answer["served"] for answer in answers)
    assert first["tokens"] == first["alone"] == second["tokens"]
    assert first["steps"] == second["steps"] and sum(row[3] for row in first["steps"])  # some were preempted


def test_ranks_that_differ_are_told_so(answers: list[dict]) -> None:
    for rank, answer in enumerate(answers):
        kind, words, _ = answer["differing"]
        assert kind == "ValueError" and "ranks differ; here shape=" in words and f"max_batch={2 + rank}" in words


@pytest.mark.parametrize("what", ["step", "prompt"])
def test_a_lost_rank_is_an_error_and_no_wait(on_path, what: str, tmp_path: Path) -> None:
    parallel.spawn(lose, 2, (tmp_path, what))
    kind, words, seconds = json.loads((tmp_path / f"lost-{what}.json").read_text(encoding="utf-8"))
    assert kind == "RuntimeError" and "(nccl), rank 0 of 2: another rank is lost" in words and seconds < 60
