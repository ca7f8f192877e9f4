"""Every transform is an exact equivalence of the unquantised network, on every family, to fp64 rounding."""

from __future__ import annotations

import pytest
import torch

from qoqlab import outliers, quantize, steps
from qoqlab.architecture import describe
from qoqlab.grids import INT8, UINT4
from qoqlab.recipes import PER_CHANNEL, PROGRESSIVE, Recipe, Step
from qoqlab.schemes import Scheme

from .families import FAMILIES, LLAMA3_ROPE, VOCABULARY, build, logits, only, random_ids, relative_error

#: Name -> keyword arguments of `build`: every family, tied and untied, grouped and plain multi-head attention.
MODELS = {
    f"{family}-{'tied' if tied else 'untied'}-{'gqa' if kv_heads == 2 else 'mha'}": (
        family,
        {"tied": tied, "kv_heads": kv_heads},
    )
    for family in FAMILIES
    for tied in (False, True)
    for kv_heads in (2, 4)
} | {
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama3-rope-tied": ("llama", {"rope_parameters": LLAMA3_ROPE, "tied": True}),
    "llama-all-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3-all-biases": ("qwen3", {"attention_bias": True}),
    "llama-one-kv-head": ("llama", {"kv_heads": 1}),
    "llama-hidden-96": ("llama", {"hidden_size": 96, "head_dim": 24, "intermediate_size": 160}),
}
ROTATE = Step(steps.rotate)
SEARCHED = Step(steps.smooth_attention, {"alpha": None})
EQUIVALENCES = {
    "rotate": (ROTATE,),
    "rotate-values": (Step(steps.rotate, {"values": True}),),
    "smooth-attention": (Step(steps.smooth_attention, {"alpha": 0.5}),),
    "smooth-attention-beta": (Step(steps.smooth_attention, {"alpha": 0.5, "beta": 0.5}),),
    "smooth-output": (Step(steps.smooth_output),),
    "smooth-output-alpha": (Step(steps.smooth_output, {"alpha": 0.5, "beta": 0.5}),),
    "reorder": (Step(steps.reorder),),
    "all": (
        Step(steps.rotate, {"values": True}),
        Step(steps.reorder),
        Step(steps.smooth_attention),
        Step(steps.smooth_output),
    ),
}
IDS = random_ids(3, 16)
TIGHT = 1e-9


@pytest.fixture(autouse=True)
def _exact(exact_norms: None) -> None:
    """All models here run in fp64 throughout."""


def double(name: str) -> torch.nn.Module:
    family, config = MODELS[name]
    return build(family, dtype=torch.float64, **config)


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("transform", EQUIVALENCES)
@pytest.mark.parametrize("name", MODELS)
def test_transform_keeps_the_function(name: str, transform: str) -> None:
    model = double(name)
    expected = logits(model, IDS)
    changed = quantize(model, only(*EQUIVALENCES[transform]), IDS, progress=False).model
    assert relative_error(logits(changed, IDS), expected) < TIGHT
    # and on tokens that the statistics have not seen
    unseen = random_ids(2, 32, seed=9)
    assert relative_error(logits(changed, unseen), logits(model, unseen)) < TIGHT


@pytest.mark.parametrize("transform", EQUIVALENCES)
@pytest.mark.parametrize("name", ["llama-untied-gqa", "qwen3-untied-gqa"])
def test_transform_changes_the_weights(name: str, transform: str) -> None:
    """An equivalence that does nothing would pass the test above."""
    model = double(name)
    before = parameters(model)
    after = parameters(quantize(model, only(*EQUIVALENCES[transform]), IDS, progress=False).model)
    assert any(not torch.equal(before[p], after[p]) for p in before)


@pytest.mark.parametrize("name", MODELS)
def test_searched_smooth_attention_keeps_the_function(name: str) -> None:
    """The search needs a KV grid, so its result is moved to the unquantised model: the grid is taken away afterwards."""
    model = double(name)
    changed = quantize(model, only(SEARCHED, scheme=Scheme(kv=UINT4)), IDS, progress=False).model
    for block in describe(changed).blocks:
        block.attention.qoq.grid = None
    assert relative_error(logits(changed, IDS), logits(model, IDS)) < TIGHT


@pytest.mark.parametrize("name", MODELS)
def test_planting_outliers_keeps_the_function(name: str) -> None:
    model = double(name)
    planted = outliers.plant(model, activation_ratio=30.0, key_ratio=10.0)
    expected, actual = logits(model, IDS), logits(planted, IDS)
    assert relative_error(actual, expected) < TIGHT
    assert float((actual - expected).abs().max()) <= TIGHT


@pytest.mark.parametrize("name", ["llama-tied-gqa", "qwen2-untied-gqa", "qwen3-tied-mha", "llama3-rope"])
def test_everything_on_a_planted_model_keeps_the_function(name: str) -> None:
    model = double(name)
    planted = outliers.plant(model)
    changed = quantize(planted, only(*EQUIVALENCES["all"]), IDS, progress=False).model
    assert relative_error(logits(changed, IDS), logits(model, IDS)) < TIGHT


# --- defects of the originals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_defect_tied_embeddings_under_rotation(family: str) -> None:
    """Folding and rotating the one shared matrix twice costs over 100 % of the logits; the head must get its own copy."""
    model = build(family, tied=True, dtype=torch.float64)
    assert describe(model).tied
    changed = quantize(model, only(ROTATE), IDS, progress=False).model
    architecture = describe(changed)
    assert not architecture.tied and changed.config.tie_word_embeddings is False
    assert not torch.equal(architecture.head.weight, architecture.embedding.weight)
    assert relative_error(logits(changed, IDS), logits(model, IDS)) < TIGHT
    assert describe(model).tied and model.config.tie_word_embeddings is True


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_defect_qk_biases_under_smooth_attention(kv_heads: int, beta: float) -> None:
    """q and k biases of standard deviation 2, left unscaled, change the logits by tens of percent."""
    model = build("qwen2", kv_heads=kv_heads, dtype=torch.float64)
    expected, before = logits(model, IDS), parameters(model)
    changed = quantize(model, only(Step(steps.smooth_attention, {"beta": beta})), IDS, progress=False).model
    assert relative_error(logits(changed, IDS), expected) < TIGHT
    for role in "qk":
        name = f"model.layers.0.self_attn.{role}_proj"
        weight, bias = changed.get_parameter(f"{name}.weight"), changed.get_parameter(f"{name}.bias")
        growth = weight.norm(dim=1) / before[f"{name}.weight"].norm(dim=1)
        assert float((growth - 1).abs().max()) > 0.1
        torch.testing.assert_close(bias, before[f"{name}.bias"] * growth, rtol=1e-12, atol=0)
    # the defect itself, on the same weights
    for layer in (0, 1):
        for role in "qk":
            name = f"model.layers.{layer}.self_attn.{role}_proj"
            changed.get_submodule(name).bias = torch.nn.Parameter(before[f"{name}.bias"])
    assert relative_error(logits(changed, IDS), expected) > 0.01


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_defect_qk_norm_under_smooth_attention(kv_heads: int) -> None:
    """Qwen3 normalises keys after k_proj, so lambda in k_proj's rows would vanish: it belongs into the norms' gains."""
    model = build("qwen3", kv_heads=kv_heads, dtype=torch.float64)
    before = parameters(model)
    changed = quantize(model, only(Step(steps.smooth_attention)), IDS, progress=False).model
    after = parameters(changed)
    assert relative_error(logits(changed, IDS), logits(model, IDS)) < TIGHT
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"model.layers.{i}.self_attn.{r}_norm.weight" for i in (0, 1) for r in "qk"}
    gain = before["model.layers.0.self_attn.k_norm.weight"] / after["model.layers.0.self_attn.k_norm.weight"]
    torch.testing.assert_close(gain[:8], gain[8:], rtol=1e-12, atol=0)  # RoPE pairs move as one
    assert float(gain.std()) > 1e-3


def test_defect_rope_scaling_ignored() -> None:
    """The scaled frequencies take part in the function and survive every transform."""
    scaled = build("llama", rope_parameters=LLAMA3_ROPE, dtype=torch.float64)
    plain = build("llama", dtype=torch.float64)
    long = random_ids(2, 64, seed=3)
    assert relative_error(logits(plain, long), logits(scaled, long)) > 1e-3
    changed = quantize(scaled, only(*EQUIVALENCES["all"]), IDS, progress=False).model
    assert relative_error(logits(changed, long), logits(scaled, long)) < TIGHT
    assert torch.equal(changed.model.rotary_emb.inv_freq, scaled.model.rotary_emb.inv_freq)
    assert changed.config.rope_parameters["rope_type"] == "llama3"


# --- what each step is for ------------------------------------------------------------------------------------------------


def key_maxima(model: torch.nn.Module) -> torch.Tensor:
    found = outliers.measure(model, IDS)
    return torch.tensor(found[found.site == "keys"].ratio.to_numpy())


def test_smooth_attention_lowers_key_outliers() -> None:
    planted = outliers.plant(build("llama", dtype=torch.float64), activation_ratio=1.0, key_ratio=10.0)
    changed = quantize(planted, only(Step(steps.smooth_attention)), IDS, progress=False).model
    assert bool((key_maxima(changed) < 0.6 * key_maxima(planted)).all())


def test_rotation_lowers_activation_outliers() -> None:
    planted = outliers.plant(build("llama", dtype=torch.float64), activation_ratio=50.0, key_ratio=1.0)
    changed = quantize(planted, only(ROTATE), IDS, progress=False).model
    ratios = [outliers.measure(m, IDS).query("site in ('qkv', 'gate_up')").ratio.to_numpy() for m in (planted, changed)]
    assert (ratios[1] < 0.2 * ratios[0]).all()


def test_reorder_sorts_channels_by_their_largest_activation() -> None:
    changed = quantize(build("llama", dtype=torch.float64), only(Step(steps.reorder)), IDS, progress=False).model
    from qoqlab import capture

    blocks = describe(changed).blocks
    observed = capture.observe(blocks[0], capture.first_inputs(changed, IDS))
    down, o = observed.absmax["down"], observed.absmax["o"]
    assert bool((down.diff() >= 0).all())
    per_kv_head = o.view(2, 2, 16).amax(1)  # the two query heads of a group share one order
    assert bool((per_kv_head.diff(dim=-1) >= 0).all())


def test_rotation_folds_every_norm_gain_that_it_passes() -> None:
    changed = quantize(build("qwen3", dtype=torch.float64), only(ROTATE), IDS, progress=False).model
    for name, parameter in changed.named_parameters():
        if "layernorm" in name or name == "model.norm.weight":
            assert bool((parameter == 1).all()), name


def test_searched_smooth_attention_is_at_least_as_good_as_none() -> None:
    planted = outliers.plant(build("llama"), activation_ratio=1.0, key_ratio=20.0)
    scheme = Scheme(kv=UINT4)
    report = quantize(planted, only(SEARCHED, scheme=scheme), IDS, progress=False).report
    first = report[report.layer == 0].set_index("stage").output_sqnr_db
    assert first["smooth_attention"] >= first["round to nearest"]


def test_searched_output_smoothing_does_nothing_without_a_weight_format() -> None:
    model = build("llama", dtype=torch.float64)
    changed = quantize(model, only(Step(steps.smooth_output, {"alpha": None})), IDS, progress=False).model
    assert torch.equal(logits(changed, IDS), logits(quantize(model, only(), IDS).model, IDS))


@pytest.mark.parametrize("step", [steps.clip, steps.gptq])
def test_weight_steps_without_a_weight_format_do_nothing(step) -> None:
    model = build("llama", dtype=torch.float64)
    before = parameters(model)
    after = parameters(quantize(model, only(Step(step), scheme=Scheme(kv=UINT4)), IDS, progress=False).model)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("form", [PER_CHANNEL, PROGRESSIVE], ids=["per-channel", "progressive"])
@pytest.mark.parametrize("step", [steps.clip, steps.gptq])
def test_weight_steps_lower_the_error_on_calibration_data(step, form) -> None:
    model = build("llama", hidden_size=128, intermediate_size=256, head_dim=32)
    report = quantize(model, only(Step(step), scheme=Scheme(form, INT8)), IDS, progress=False).report
    gained = report.pivot(index="layer", columns="stage", values="output_sqnr_db")
    assert (gained[step.__name__] > gained["round to nearest"]).all()


def test_statistics_are_taken_anew_after_a_step_changed_the_weights() -> None:
    context = steps.Context(describe(build("llama")).blocks[0], [], [], Scheme())
    first = object()
    context._observed = first  # type: ignore[assignment]
    context.changed()
    assert context._observed is None


def test_tokens_outside_calibration_reach_every_vocabulary_entry() -> None:
    """Rotation acts on embedding and head alike, whatever tokens were calibrated on."""
    model = build("llama", dtype=torch.float64)
    changed = quantize(model, only(ROTATE), torch.zeros(1, 4, dtype=torch.int64), progress=False).model
    everything = torch.arange(VOCABULARY).view(4, -1)
    assert relative_error(logits(changed, everything), logits(model, everything)) < TIGHT


@pytest.mark.parametrize("name", MODELS)
def test_rotations_of_values_with_signs_are_exact(name: str) -> None:
    model = double(name)
    exact = logits(model, IDS)
    for block in describe(model).blocks:
        steps._rotate_values(block, 1.0 - 2.0 * (torch.arange(block.head_dim) % 3 == 0).double())
    assert relative_error(logits(model, IDS), exact) < TIGHT


def test_the_searched_rotation_spreads_outliers_of_values() -> None:
    """One value channel is 100 times the others (undone in o_proj): rotating heads is then what quantisation needs."""
    model = build("llama", hidden_size=128, intermediate_size=256, head_dim=32)
    for block in describe(model).blocks:
        v, o = block.linear("v"), block.linear("o")
        per_head = block.heads // block.kv_heads
        with torch.no_grad():
            for head in range(block.kv_heads):
                v.weight[head * 32 + 3] *= 100
                for query in range(head * per_head, (head + 1) * per_head):
                    o.weight[:, query * 32 + 3] /= 100
    ids = random_ids(4, 24)
    exact = logits(model, IDS)
    scheme = Scheme(None, None, UINT4)
    errors = []
    for chosen in ((), (Step(steps.search_value_rotation),), (Step(steps.search_value_rotation, {"count": 0}),)):
        result = quantize(model, Recipe("values", scheme, chosen), ids, progress=False)
        errors.append(relative_error(logits(result.model, IDS), exact))
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] == errors[0]  # without candidates nothing changes


@pytest.mark.parametrize("parameters", [{"count": -1}, {"count": 1.5}, {"seed": "x"}])
def test_the_searched_rotation_names_wrong_parameters(parameters) -> None:
    recipe = only(Step(steps.search_value_rotation, parameters), scheme=Scheme(kv=UINT4))
    with pytest.raises(ValueError, match=f"{next(iter(parameters))}: expected an integer of at least 0"):
        quantize(build("llama"), recipe, IDS, progress=False)
