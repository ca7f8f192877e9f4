"""Recipes as data, and every preset on every family."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest

from qoqlab import outliers, quantize, recipes, steps
from qoqlab.grids import INT8, UINT4
from qoqlab.pipeline import REPORT_COLUMNS, QuantizedModel
from qoqlab.recipes import PER_CHANNEL, PER_CHANNEL_INT8, PROGRESSIVE, Recipe, Step
from qoqlab.schemes import Scheme, WeightFormat, WeightKind

from .families import FAMILIES, logits, random_ids, relative_error

#: Largest relative error of the logits. INT8 rounds each operand to about 1 %; a 4-bit weight of ~N(0, 1) has steps of
#: 6 / 15 = 0.4 and so an error of 0.4 / sqrt(12) = 12 % per matrix, of which a token meets four in a row and block. A 4-bit
#: activation adds as much again, that is a factor of sqrt(2). Symmetric weights have 15 codes instead of 16 for a range
#: that is a little larger.
ALLOWED_W4 = 0.5
ALLOWED_W4_SYMMETRIC = 0.55


def allowed(recipe: Recipe) -> float:
    scheme = recipe.scheme
    if scheme.weights is None:
        return 0.2 if scheme.kv else 0.0
    if scheme.weights == PER_CHANNEL_INT8:
        return 0.1
    four = ALLOWED_W4 if scheme.weights.kind.asymmetric else ALLOWED_W4_SYMMETRIC
    return four * 2**0.5 if "A4" in str(scheme) else four


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", recipes.names())
def test_every_preset_runs_on_every_family(preset: str, family: str, quantized, wide_model) -> None:
    result = quantized(family, preset)
    assert isinstance(result, QuantizedModel) and result.recipe == recipes.get(preset)
    ids = random_ids(3, 24, seed=5)
    error = relative_error(logits(result.model, ids), logits(wide_model(family), ids))
    assert error <= allowed(recipes.get(preset)) and (error > 0) == (preset != "fp16")
    assert list(result.report.columns) == REPORT_COLUMNS
    expected = ["round to nearest", *(step.name for step in result.recipe.steps)]
    assert result.report.stage.tolist() == ([] if preset == "fp16" else expected * 2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("preset", "rtn"), [("qoq-g128", "rtn-w4a8kv4-g128"), ("qoq-per-channel", "rtn-w4a8kv4")])
def test_qoq_is_better_than_rounding_where_there_are_outliers(preset: str, rtn: str, family: str, wide_model) -> None:
    """Random weights have no outliers, and then there is little to gain; planted ones are what the method is for."""
    model = outliers.plant(wide_model(family), activation_ratio=100.0, key_ratio=20.0)
    ids = random_ids(3, 24, seed=5)
    exact = logits(model, ids)
    errors = {}
    for name in (preset, rtn):
        result = quantize(model, name, random_ids(4, 24), progress=False)
        errors[name] = relative_error(logits(result.model, ids), exact)
    assert errors[preset] < 0.8 * errors[rtn], errors


@pytest.mark.parametrize("preset", recipes.names())
def test_a_presets_name_says_its_bits(preset: str) -> None:
    bits = re.search(r"w(\d+)a(\d+)(?:kv(\d+))?(?:-(g\d+))?$", preset)
    if bits is None:
        return
    text = "W{}A{}KV{}".format(*(part or 16 for part in bits.groups()[:3])) + (f" {bits[4]}" if bits[4] else "")
    assert str(recipes.get(preset).scheme).removesuffix(" + INT8 outliers") == text


@pytest.mark.parametrize("method", ["smoothquant", "gptq", "awq", "quarot", "atom", "kivi", "qoq"])
def test_methods_cite_their_papers(method: str) -> None:
    sources = [recipes.get(name).source for name in recipes.names() if name.startswith(f"{method}-")]
    assert sources and all("arXiv" in source or "qoq-g128 with" in source for source in sources)


def test_names_and_presets() -> None:
    names = recipes.names()
    required = {"fp16", "qoq-g128", "qoq-per-channel", "rtn-w4a8kv4-g128", "rtn-w4a8kv4", "rtn-w8a8", "rtn-w4a16-g128"}
    required |= {"rtn-w4a8", "rtn-w4a4", "rtn-w4a4-g128", "rtn-kv4", "kivi-kv4", "smoothquant-w8a8", "smoothquant-w4a8kv4"}
    required |= {"gptq-w4a16-g128", "awq-w4a16-g128", "awq-w4a8kv4-g128", "quarot-w4a4kv4", "quarot-w4a8kv4"}
    required |= {"atom-w4a4kv4-g128", "atom-w4a8kv4-g128"}
    assert required <= set(names) and len(names) == len(set(names))
    assert all(recipes.get(name).name == name and recipes.get(name).source for name in names)
    assert recipes.get("fp16").scheme == Scheme() and not recipes.get("fp16").steps


@pytest.mark.parametrize(
    ("name", "scheme", "stages"),
    [
        ("rtn-w4a8kv4", Scheme(PER_CHANNEL, INT8, UINT4), []),
        ("rtn-w4a8kv4-g128", Scheme(PROGRESSIVE, INT8, UINT4), []),
        (
            "qoq-per-channel",
            Scheme(PER_CHANNEL, INT8, UINT4),
            ["rotate", "smooth_attention", "smooth_output", "clip"],
        ),
        (
            "qoq-g128",
            Scheme(PROGRESSIVE, INT8, UINT4),
            ["rotate", "reorder", "smooth_attention", "smooth_output", "clip"],
        ),
    ],
)
def test_presets_are_what_their_names_say(name: str, scheme: Scheme, stages: list[str]) -> None:
    recipe = recipes.get(name)
    assert recipe.scheme == scheme and [step.name for step in recipe.steps] == stages
    assert PROGRESSIVE.group_size == 128


@pytest.mark.parametrize(
    ("scheme", "text"),
    [
        (Scheme(), "W16A16KV16"),
        (Scheme(PROGRESSIVE, INT8, UINT4), "W4A8KV4 g128"),
        (Scheme(PER_CHANNEL, INT8), "W4A8KV16"),
        (Scheme(WeightFormat(WeightKind.CHANNEL_S8), INT8), "W8A8KV16"),
        (Scheme(kv=UINT4), "W16A16KV4"),
    ],
)
def test_a_scheme_prints_its_usual_name(scheme: Scheme, text: str) -> None:
    assert str(scheme) == text


def test_bits_count_scales_and_zeros() -> None:
    assert PROGRESSIVE.bits_per_weight(4096) == 4 + 16 / 128 + 16 / 4096
    assert PER_CHANNEL.bits_per_weight(4096) == 4 + (16 + 8) / 4096
    assert Scheme(kv=UINT4).kv_bits_per_value(128) == 4.25
    assert Scheme().kv_bits_per_value(128) == 16


def test_the_ladder_adds_one_thing_at_a_time() -> None:
    ladder = recipes.ladder()
    assert len({recipe.name for recipe in ladder}) == len(ladder)
    for before, after in itertools.pairwise(ladder):
        more_steps = [step for step in after.steps if step not in before.steps]
        assert (before.scheme != after.scheme) + len(more_steps) == 1
        assert all(step in after.steps for step in before.steps)
    assert ladder[-1].steps == recipes.get("qoq-g128").steps and ladder[-1].scheme == recipes.get("qoq-g128").scheme


def test_a_recipe_is_extended_by_copying() -> None:
    base = recipes.get("qoq-g128")
    longer = base.with_steps("mine", Step(steps.gptq, {"damp": 0.1}))
    assert longer.name == "mine" and longer.steps[:-1] == base.steps and len(base.steps) == 5
    assert longer.steps[-1].parameters == {"damp": 0.1}
    with pytest.raises(dataclasses.FrozenInstanceError):
        base.name = "other"  # type: ignore[misc]


def test_presets_cannot_be_changed_through_a_shared_object() -> None:
    recipes.get("qoq-g128").steps[0].parameters["values"] = "broken"
    try:
        assert recipes.get("qoq-g128").steps[0].parameters == {}
    finally:
        recipes.get("qoq-g128").steps[0].parameters.pop("values", None)


def test_unknown_names_and_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"recipe: 'qoq' is not a preset; presets: fp16, .*qoq-g128"):
        recipes.get("qoq")
    with pytest.raises(TypeError, match=r"step rotate: .*unexpected keyword argument 'angle'"):
        Step(steps.rotate, {"angle": 1})
    assert Recipe("plain", Scheme()).steps == ()
