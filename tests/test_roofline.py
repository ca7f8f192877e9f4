"""Bounds: hand-counted bytes and times, the paper's crossing points, and published results that no bound may undercut."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import qoqlab
from qoqlab import roofline
from qoqlab.machines import GPUS, MODELS, Geometry
from qoqlab.roofline import PRECISIONS, Cores, Serving

PAPER = Path(__file__).parents[1] / "data" / "paper"
LLAMA = MODELS["Llama-3-8B"]
#: What each of the paper's systems keeps in its cache; TensorRT-LLM's W8A8 agrees with the appendix's W8A8KV8 within 0.4 %.
SCHEME_OF = {"fp16": "fp16", "W4A16": "W4A16", "W8A8": "W8A8KV8", "W4A4": "W4A4KV4", "W4A8KV4": "W4A8KV4"}


def published():
    table = pd.read_csv(PAPER / "throughput.csv")
    return table[table["gpu"].isin(GPUS)]


def test_a_gemm_is_counted_by_hand():
    ceiling = GPUS["H200"].sheet
    bound = roofline.gemm(4096, 4096, 16, PRECISIONS["W8A8"], ceiling)
    moved = 4096 * 4096 + 2 * 4096 + 16 * 4096 + 2 * 16 + 2 * 16 * 4096  # codes, fp16 scales, input, its scales, output
    assert bound.memory == pytest.approx(moved / 4.8e12, rel=1e-12)
    assert bound.compute == pytest.approx(2 * 16 * 4096 * 4096 / 1979e12, rel=1e-12)
    assert (bound.seconds, bound.limit) == (bound.memory, "memory")
    many = roofline.gemm(4096, 4096, 4096, PRECISIONS["W8A8"], ceiling)
    assert (many.seconds, many.limit) == (many.compute, "compute")


def test_progressive_groups_store_a_byte_of_scale_and_one_of_zero():
    assert roofline.weight_bits(PRECISIONS["W4A8"], 4096) == 4 + 16 / 128 + 16 / 4096
    assert roofline.weight_bits(PRECISIONS["fp16"], 4096) == 16


def test_a_token_leaves_codes_scale_and_zero_of_every_head():
    heads = LLAMA.layers * 2 * LLAMA.kv_heads
    assert roofline.cache_bytes_per_token(LLAMA, PRECISIONS["fp16"]) == heads * 256
    assert roofline.cache_bytes_per_token(LLAMA, PRECISIONS["W4A8KV4"]) == heads * (64 + 4)


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        ("A100", {"fp16": 156, "W4A16": 39, "W8A8": 156, "W4A8": 78}),
        ("L40S", {"fp16": 419, "W4A16": 105, "W8A8": 424, "W4A8": 212}),
        ("H100", {"fp16": 295, "W4A16": 74, "W8A8": 295, "W4A8": 148}),
        ("H200", {"fp16": 206, "W4A16": 52, "W8A8": 206, "W4A8": 103}),
    ],
)
def test_crossing_points(gpu, expected):
    found = {name: round(roofline.crossing(PRECISIONS[name], GPUS[gpu].sheet)) for name in expected}
    assert found == expected


def test_w4a8_is_never_slower_than_its_parents():
    """Paper section 3: it stores like W4A16 and multiplies like W8A8."""
    for gpu in GPUS.values():
        for m in (1, 8, 64, 100, 128, 256, 1024):
            times = {p: roofline.gemm(8192, 8192, m, PRECISIONS[p], gpu.best).seconds for p in ("W4A16", "W8A8", "W4A8")}
            assert times["W4A8"] <= min(times["W4A16"], times["W8A8"]) * 1.001


def test_attention_waits_for_memory_on_tensor_cores_but_not_on_cuda_cores():
    """Four query heads share a KV head: 15 operations per byte of KV4, more than the H200's CUDA cores keep up with."""
    card, kv4 = GPUS["H200"], PRECISIONS["W4A8KV4"]
    assert roofline.attention(LLAMA, 64, 8192, kv4, card.sheet).limit == "memory"
    assert roofline.attention(LLAMA, 64, 8192, kv4, card.sheet, card.fp32).limit == "compute"
    assert roofline.attention(LLAMA, 64, 8192, PRECISIONS["fp16"], card.sheet, card.fp32).limit == "memory"


def test_a_step_adds_up():
    args = (LLAMA, 64, 1024, PRECISIONS["W4A8KV4"], GPUS["A100"])
    step = roofline.decode_step(*args).set_index("part")["seconds"]
    assert list(step.index) == ["qkv", "o", "gate_up", "down", "attention", "head"]
    one = roofline.gemm(6144, 4096, 64, PRECISIONS["W4A8KV4"], GPUS["A100"].best)
    assert step["qkv"] == pytest.approx(32 * one.seconds, rel=1e-12)
    slow = roofline.decode_step(*args, Cores.CUDA).set_index("part")["seconds"]
    assert slow["attention"] > step["attention"] and slow["qkv"] == step["qkv"]


def test_throughput_is_tokens_over_time():
    job, scheme, gpu = Serving(8, prompt=100, output=50), PRECISIONS["W8A8"], GPUS["L40S"]
    step = roofline.decode_step(LLAMA, 8, 125, scheme, gpu)["seconds"].sum()
    seconds = roofline.prefill(LLAMA, 800, scheme, gpu) + 50 * step
    assert roofline.throughput(LLAMA, job, scheme, gpu) == pytest.approx(400 / seconds, rel=1e-12)


def test_the_middle_of_the_output_stands_for_all_its_steps():
    args = (LLAMA, 32), (PRECISIONS["fp16"], GPUS["A100"])
    steps = [float(roofline.decode_step(*args[0], 1024 + t, *args[1])["seconds"].sum()) for t in range(0, 512, 8)]
    middle = float(roofline.decode_step(*args[0], 1024 + 256, *args[1])["seconds"].sum())
    assert sum(steps) / len(steps) == pytest.approx(middle, rel=2e-3)


def test_no_published_throughput_beats_its_bound():
    rows = published().dropna(subset="tokens_per_s")
    assert len(rows) > 60
    for row in rows.itertuples():
        scheme, gpu, model = PRECISIONS[SCHEME_OF[row.precision]], GPUS[row.gpu], MODELS[row.model]
        batch = min(256, roofline.largest_batch(model, 1536, scheme, gpu)) if pd.isna(row.batch) else int(row.batch)
        share = row.tokens_per_s / roofline.throughput(model, Serving(batch), scheme, gpu)
        assert 0.05 < share < 0.9, f"{row.gpu} {row.precision} {row.model}"


def test_memory_predicts_who_runs_out_of_it():
    for row in published().itertuples():
        fits = roofline.largest_batch(MODELS[row.model], 1536, PRECISIONS[SCHEME_OF[row.precision]], GPUS[row.gpu])
        assert (fits == 0) == pd.isna(row.tokens_per_s), f"{row.gpu} {row.precision} {row.model}: {fits}"
        assert pd.isna(row.batch) or row.batch <= fits


def test_unpacking_is_paid_once_a_tile_and_an_epilogue_once_an_output():
    gpu = GPUS["A100"]
    once = roofline.dequantisation(4096, 4096, 128, 1.0, gpu)
    assert once == pytest.approx(4096 * 4096 / (64 * 108 * 1.41e9), rel=1e-12)
    assert roofline.dequantisation(4096, 4096, 129, 1.0, gpu) == 2 * once
    inside = roofline.partial_sums(4096, 4096, 16, 3.0, gpu, group_size=128)
    assert inside == pytest.approx(32 * roofline.partial_sums(4096, 4096, 16, 3.0, gpu, group_size=4096), rel=1e-12)


def test_cost():
    hourly = roofline.dollars_per_hour(26280, 1000, years=3, dollars_per_kwh=0.5)
    assert hourly == pytest.approx(1.5)
    assert roofline.dollars_per_million(1000, 3.6) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: roofline.gemm(0, 1, 1, PRECISIONS["fp16"], GPUS["A100"].sheet), "n: expected a positive integer"),
        (lambda: roofline.attention(LLAMA, 1, 0, PRECISIONS["fp16"], GPUS["A100"].sheet), "context: expected"),
        (lambda: roofline.largest_batch(LLAMA, 1024, PRECISIONS["fp16"], GPUS["A100"], 1.5), "usable: a share"),
        (lambda: Serving(1, 0), "prompt: expected a positive integer"),
        (lambda: roofline.dequantisation(1, 1, 1, 1.0, GPUS["A100"], tile=0), "tile: expected"),
        (lambda: roofline.partial_sums(1, 1, 1, 1.0, GPUS["A100"], group_size=0), "group_size: expected"),
        (lambda: roofline.dollars_per_million(0, 1), "tokens_per_second: expected a positive number"),
        (lambda: roofline.dollars_per_hour(-1, 100), "price: expected a positive number"),
        (lambda: roofline.gemm(8, 8, 1, PRECISIONS["W4A4KV4"], GPUS["H100"].sheet), "unit: these tensor cores"),
    ],
)
def test_bad_input_is_named(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_cores_are_an_enum():
    with pytest.raises(TypeError, match=r"cores: expected one of Cores\.TENSOR"):
        roofline.decode_step(LLAMA, 1, 1, PRECISIONS["fp16"], GPUS["A100"], "tensor")


def test_a_geometry_need_not_have_heads_of_128():
    small = Geometry("small", 2, 64, 4, 2, 96, 100, head_dim=16)
    assert roofline.cache_bytes_per_token(small, PRECISIONS["W4A8KV4"]) == 2 * 2 * 2 * (8 + 4)


def test_bytes_are_those_that_a_quantised_model_stores():
    model, _ = qoqlab.load_tiny()
    shape = Geometry.of(model.config)
    norms = 2 * sum(p.numel() for name, p in model.named_parameters() if "norm" in name)  # fp16, not in a geometry
    for name in ("rtn-w4a8kv4-g128", "rtn-w8a8"):
        q = qoqlab.quantize(model, name, progress=False)
        scheme = qoqlab.recipes.get(name).scheme
        assert q.weight_bytes() == roofline.weight_bytes(shape, scheme) + norms
        assert q.kv_bytes_per_token() == roofline.cache_bytes_per_token(shape, scheme)
