"""What fits into memory, against sums by hand."""

import pytest

from qoqlab.machines import MODELS
from qoqlab.roofline import PRECISIONS
from qoqlab.serve import bench, planner

LLAMA, QOQ, FP16 = MODELS["Llama-3-8B"], PRECISIONS["W4A8KV4"], PRECISIONS["fp16"]


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
        (lambda: planner.largest_batch(LLAMA, QOQ, 0, 1), "budget"),
        (lambda: planner.memory(LLAMA, QOQ, 0, 1), "batch"),
        (lambda: planner.memory(LLAMA, QOQ, 1, 0), "tokens"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


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
