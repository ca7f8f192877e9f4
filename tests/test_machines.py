"""Cards and models: published parameter counts come out, configs are read, nonsense is named."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

import qoqlab
from qoqlab.machines import GPUS, MODELS, Geometry

#: Parameters in billions as their publishers count them; norms, under 0.01 % of them, are not in a geometry.
PUBLISHED = {
    "Llama-3-8B": 8.030,
    "Llama-2-7B": 6.738,
    "Mistral-7B": 7.242,
    "Llama-2-13B": 13.016,
    "Llama-30B": 32.529,
    "Yi-34B": 34.389,
    "Llama-2-70B": 68.977,
    "Qwen1.5-72B": 72.288,
    "Llama-3-70B": 70.554,
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_the_published_ones(name):
    model = MODELS[name]
    assert (model.linear_weights + model.table_weights) / 1e9 == pytest.approx(PUBLISHED[name], rel=1e-4)


def test_the_bundled_model_counts_its_own_weights():
    model, _ = qoqlab.load_tiny()
    shape = Geometry.of(model.config)
    linear = sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
    tables = {p.data_ptr(): p.numel() for name, p in model.named_parameters() if "embed" in name or "lm_head" in name}
    assert shape.linear_weights == linear
    assert shape.table_weights == sum(tables.values())


def test_width_of_heads_and_tied_tables_come_from_the_config():
    config = LlamaConfig(hidden_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True)
    shape = Geometry.of(config, "odd")
    assert (shape.name, shape.head_dim) == ("odd", 32)
    assert shape.shapes["qkv"] == (4 * 32 + 2 * 2 * 32, 96) and shape.shapes["o"] == (96, 128)
    assert shape.table_weights == config.vocab_size * 96


def test_cards_are_in_order_of_their_bandwidth_and_lanes_are_those_of_the_sheet():
    assert [g.name for g in sorted(GPUS.values(), key=lambda g: g.sheet.bandwidth)] == ["L40S", "A100", "H100", "H200"]
    # two fp32 operations per lane and clock; Ada and Hopper have 128 fp32 lanes for 64 integer ones
    for gpu in GPUS.values():
        fp32_lanes = 1 if gpu.name == "A100" else 2
        assert 2 * fp32_lanes * gpu.lanes == pytest.approx(gpu.fp32, rel=0.01)


def test_measured_ceilings_lie_below_the_data_sheet():
    measured = [g for g in GPUS.values() if g.measured]
    assert measured
    for gpu in measured:
        assert gpu.best is gpu.measured and gpu.measured.bandwidth < gpu.sheet.bandwidth
        assert all(rate < gpu.sheet.peak[unit] for unit, rate in gpu.measured.peak.items())
    assert GPUS["A100"].best is GPUS["A100"].sheet


def test_hopper_has_no_int4_tensor_cores():
    with pytest.raises(ValueError, match=r"unit: these tensor cores multiply fp16, int8, not 'int4'"):
        GPUS["H100"].sheet.rate("int4")


@pytest.mark.parametrize(("change", "rule"), [({"layers": 0}, "layers"), ({"kv_heads": 3}, "kv_heads: 4 query heads")])
def test_impossible_shapes_are_named(change, rule):
    good = {"layers": 1, "hidden": 8, "heads": 4, "kv_heads": 2, "intermediate": 16, "vocabulary": 10}
    with pytest.raises(ValueError, match=rule):
        Geometry("bad", **(good | change))
