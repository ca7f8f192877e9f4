"""What fits into memory, against sums by hand and against what GPUs allocated."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from qoqlab import roofline
from qoqlab.machines import MODELS
from qoqlab.roofline import PRECISIONS, SERVED
from qoqlab.serve import bench, planner

LLAMA, QOQ, FP16 = MODELS["Llama-3-8B"], PRECISIONS["W4A8KV4"], PRECISIONS["fp16"]
RECORDS = Path(__file__).parents[1] / "data" / "benchmarks"
NAMES = {name.lower(): model for name, model in MODELS.items()}
#: Rounds whose planned bytes are more than 3 % off what was allocated: file, precision, batch -> planned over allocated - 1.
EXCEPTIONS = {
    # The round before had not given its cache back: that came after this record, with `bench_serve.forget`.
    ("serve_h100", "w4a8kv4", 128): -0.220,
    # The same run's first round per channel; why it takes 0.14 GB more than one with groups is not known.
    ("serve_h100", "w4a8kv4", 64): -0.0301,
    # torch's rounds are put together from a prefill and steps, whose activations and cache never lie side by side.
    ("serve_peers_h200", "w8a8kv8", 64): 0.0371,
}


def rounds():
    """Stored rounds with file, precision and batch."""
    for path in sorted(RECORDS.glob("serve_*.json")):
        for row in json.loads(path.read_text())["results"]:
            if row["op"] == "serve":
                yield (path.stem, row["precision"], row["batch"]), row


def planned(row, prefill=8192):
    """What the planner says of a stored round; of several GPUs each holds its share of heads and of the MLP."""
    model, gpus = NAMES[row["model"]], row.get("gpus", 1)
    model = replace(
        model, heads=model.heads // gpus, kv_heads=model.kv_heads // gpus, intermediate=model.intermediate // gpus
    )
    scheme = PRECISIONS[SERVED[row["precision"]]]
    return planner.memory(model, scheme, row["batch"], row["prompt"] + row["output"], prefill, gpus > 1)


def test_planned_bytes_are_within_3_per_cent_of_what_gpus_allocated():
    found = [(key, planned(row).total, row) for key, row in rounds()]
    assert len(found) >= 40
    beyond = set()
    for key, total, row in found:
        # an earlier planner did not count the sums that several GPUs exchange
        sums = 4 * 8192 * NAMES[row["model"]].hidden if row.get("gpus", 1) > 1 else 0
        assert row["planned_bytes"] in (total, total - sums), f"{key}: the record is of another planner"
        error = total / row["allocated_bytes"] - 1
        if abs(error) > 0.03:
            beyond.add(key)
            assert error == pytest.approx(EXCEPTIONS.get(key, 0.0), abs=6e-4), key
    assert beyond == set(EXCEPTIONS)


def test_exceptions_have_the_reasons_that_are_given_for_them():
    stored = dict(rounds())
    kept = stored["serve_h100", "w4a8kv4", 128]
    before = planned(stored["serve_h100", "w4a8kv4", 64]).cache
    assert planned(kept).total / (kept["allocated_bytes"] - before) - 1 == pytest.approx(0, abs=0.03)
    parts = stored["serve_peers_h200", "w8a8kv8", 64]
    assert planned(parts, prefill=1).total / parts["allocated_bytes"] - 1 == pytest.approx(0, abs=0.01)


def test_a_budget_holds_as_many_as_it_did_when_it_was_measured():
    """Batches of the runs that asked for as many as fit; with no room for the context or activations there would be more."""
    most: dict = {}
    for (_, precision, batch), row in rounds():
        if row.get("budget_gb"):
            limit = (precision, row["budget_gb"])
            most[limit] = max(most.get(limit, 0), batch)
    assert sorted(most) == [("fp16", 24), ("fp16", 80), ("w4a8kv4-g128", 24), ("w4a8kv4-g128", 48)]
    for (precision, gigabytes), batch in most.items():
        assert planner.largest_batch(LLAMA, PRECISIONS[SERVED[precision]], gigabytes * 1e9, 1536) == batch
    batch = planner.largest_batch(LLAMA, QOQ, 24e9, 1536)
    assert planner.memory(LLAMA, QOQ, batch, 1536).total <= 24e9 - 2.5e9


def test_activations_are_the_wider_of_a_layer_of_prompts_and_of_logits():
    few, many = (planner.memory(LLAMA, QOQ, batch, 1536) for batch in (8, 2048))
    assert few.activations == 8192 * (4 * 4096 + 4 * 14336 + 14336 + 4096)
    assert many.activations == 8192 * 4 * 4096 + 2048 * 128256 * 12
    assert few.total == few.weights + few.cache + few.activations


def test_pages_count_codes_scales_zeros_and_slack():
    assert planner.page_bytes(LLAMA, QOQ) == 32 * 2 * 8 * 64 * (128 // 2 + 4)
    assert planner.page_bytes(LLAMA, FP16) == 32 * 2 * 8 * 64 * 128 * 2
    one, two = (planner.memory(LLAMA, QOQ, 8, tokens).cache for tokens in (64, 65))
    assert two == 2 * one == 16 * planner.page_bytes(LLAMA, QOQ)


def test_the_largest_batch_fits_and_one_more_does_not():
    for scheme, budget in ((QOQ, 24e9), (QOQ, 80e9), (FP16, 80e9)):
        batch = planner.largest_batch(LLAMA, scheme, budget, 1536)
        used = [planner.memory(LLAMA, scheme, b, 1536).total + planner.CONTEXT for b in (batch, batch + 1)]
        assert batch > 0 and used[0] <= budget < used[1]
    assert planner.largest_batch(LLAMA, FP16, 16e9, 1536) == 0


def test_four_bits_hold_several_times_as_many():
    ours, theirs = (planner.largest_batch(LLAMA, scheme, 80e9, 1536) for scheme in (QOQ, FP16))
    assert ours > 3.5 * theirs


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: planner.largest_batch(LLAMA, QOQ, 0, 1), "budget: expected a finite, positive number of bytes, got 0"),
        (lambda: planner.largest_batch(LLAMA, QOQ, "80", 1), "budget: .* got '80'"),
        (lambda: planner.largest_batch(LLAMA, QOQ, math.inf, 1), "budget: .* got inf"),
        (lambda: planner.largest_batch(LLAMA, QOQ, math.nan, 1), "budget: .* got nan"),
        (lambda: planner.memory(LLAMA, QOQ, 0, 1), "batch"),
        (lambda: planner.memory(LLAMA, QOQ, 1, 0), "tokens"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda scheme: planner.largest_batch(LLAMA, scheme, 80e9, 1536),
        lambda scheme: planner.memory(LLAMA, scheme, 1, 1),
        lambda scheme: planner.page_bytes(LLAMA, scheme),
        lambda scheme: roofline.weight_bytes(LLAMA, scheme),
        lambda scheme: roofline.gemm(128, 128, 1, scheme, None),
    ],
)
def test_a_format_by_its_name_alone_is_refused(call):
    with pytest.raises(TypeError, match=r"scheme: expected a Scheme, such as .*, got 'W4A8KV4'"):
        call("W4A8KV4")


def test_the_benchmark_says_what_is_missing(capsys):
    pytest.importorskip("qoqlab_kernels")
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert bench.main(["--batches", "1"]) == 2
    assert "no CUDA GPU here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--precision", "fp3"])
    assert "--precision" in capsys.readouterr().err
