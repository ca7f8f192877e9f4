"""Planted outliers: as large as asked for, where asked for, without changing the function (see also test_steps)."""

from __future__ import annotations

import pytest
import torch

from qoqlab import outliers, quantize
from qoqlab.architecture import describe

from .families import FAMILIES, build, logits, random_ids, relative_error, wide

IDS = random_ids(3, 24)


def ratios(model: torch.nn.Module, *sites: str) -> torch.Tensor:
    table = outliers.measure(model, IDS)
    return torch.tensor(table[table.site.isin(sites)].ratio.to_numpy())


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_outliers_grow_with_the_ratio(family: str) -> None:
    model = wide(family)
    growth = [ratios(outliers.plant(model, ratio, 1.0), "qkv", "gate_up").mean() for ratio in (1.0, 10.0, 30.0, 100.0)]
    assert growth[0] < 6 and growth[0] < growth[1] < growth[2] < growth[3]
    assert 15 < growth[2] < 90 and 50 < growth[3] < 300
    # the other sites are not touched
    untouched = ratios(outliers.plant(model, 30.0, 1.0), "o", "down")
    torch.testing.assert_close(untouched, ratios(model, "o", "down"), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])  # qwen2's biases make key channels large on their own
def test_key_outliers_grow_with_the_ratio(family: str) -> None:
    model = wide(family)
    growth = [ratios(outliers.plant(model, 1.0, ratio), "keys").mean() for ratio in (1.0, 10.0, 30.0)]
    assert growth[0] < 6 and 5 < growth[1] < 25 and 15 < growth[2] < 75
    untouched = ratios(outliers.plant(model, 1.0, 10.0), "qkv", "gate_up", "values")
    torch.testing.assert_close(untouched, ratios(model, "qkv", "gate_up", "values"), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_is_kept_in_fp32_and_the_original_untouched(family: str) -> None:
    model = wide(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    expected = logits(model, IDS)
    planted = outliers.plant(model)
    assert relative_error(logits(planted, IDS), expected) < 1e-5
    assert planted is not model and type(planted) is type(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    changed = {name for name, p in planted.named_parameters() if not torch.equal(p, before[name])}
    expected_kinds = {"input_layernorm", "post_attention_layernorm", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    if family == "qwen3":
        expected_kinds |= {"q_norm", "k_norm"}
    assert {name.split(".")[-2] for name in changed} == expected_kinds


def test_a_ratio_of_one_plants_nothing() -> None:
    model = build("llama")
    planted = outliers.plant(model, 1.0, 1.0)
    assert all(torch.equal(p, planted.get_parameter(name)) for name, p in model.named_parameters())


def test_the_seed_decides_where() -> None:
    model = wide("llama", kv_heads=4)
    first, again, other = (outliers.plant(model, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in first.named_parameters())
    assert any(not torch.equal(p, other.get_parameter(name)) for name, p in first.named_parameters())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    outliers.plant(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_channels_stand_out_in_every_block() -> None:
    model = wide("llama")
    planted = outliers.plant(model, 50.0, 1.0)
    found = set()
    for block, original in zip(describe(planted).blocks, describe(model).blocks, strict=True):
        for norm, before in ((block.input_norm, original.input_norm), (block.mlp_norm, original.mlp_norm)):
            found.add(tuple((norm.weight != before.weight).nonzero().flatten().tolist()))
            changed = norm.weight[norm.weight != before.weight].abs()
            torch.testing.assert_close(changed, 50 * before.weight.abs().median().expand_as(changed))
    assert len(found) == 1 and len(found.pop()) == 1  # one channel in 128


def test_planted_outliers_make_quantisation_harder() -> None:
    """What the laboratory animal is for: rounding to nearest suffers, the keys as well as the activations."""
    model = wide("llama")
    errors = []
    for ratio in ((1.0, 1.0), (100.0, 1.0), (1.0, 30.0)):
        animal = outliers.plant(model, *ratio)
        result = quantize(animal, "rtn-w4a8kv4-g128", IDS, progress=False)
        errors.append(relative_error(logits(result.model, IDS), logits(animal, IDS)))
    assert errors[1] > 1.1 * errors[0] and errors[2] > 1.1 * errors[0]


def test_measure_reports_a_row_per_layer_and_site() -> None:
    model = build("qwen3")
    table = outliers.measure(model, IDS)
    assert list(table.columns) == ["layer", "site", "median", "max", "ratio"]
    sites = ["qkv", "o", "gate_up", "down", "keys", "values"]
    assert sorted(table.site) == sorted(sites * 2) and sorted(table.layer.unique()) == [0, 1]
    torch.testing.assert_close(
        torch.tensor((table["max"] / table["median"]).to_numpy()), torch.tensor(table.ratio.to_numpy())
    )
    with torch.no_grad():
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(IDS)).flatten(0, 1).abs().amax(0)
    row = table[(table.layer == 0) & (table.site == "qkv")].iloc[0]
    assert row["max"] == pytest.approx(float(x.max()), rel=1e-5) and row["median"] == pytest.approx(
        float(x.median()), rel=1e-5
    )
    assert not any(hasattr(layer.self_attn, "qoq") for layer in model.model.layers)


def test_a_dead_gain_is_left_alone() -> None:
    """A channel whose gain is (nearly) zero cannot be raised by a finite factor."""
    model = build("llama")
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[:] = torch.where(torch.arange(64) % 3 == 0, 0.0, 1.0)
    expected = logits(model, IDS)
    for seed in range(4):
        actual = logits(outliers.plant(model, seed=seed), IDS)
        assert bool(torch.isfinite(actual).all()) and relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("value", [0.5, 0, -3, float("nan")])
@pytest.mark.parametrize("name", ["activation_ratio", "key_ratio"])
def test_ratios_below_one_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}: expected a finite number of at least 1, got"):
        outliers.plant(build("llama"), **{name: value})
