"""The compared methods against independent statements of what they do."""

from __future__ import annotations

import copy

import pytest
import torch

from qoqlab import (
    attention,
    baselines,
    capture,
    generate,
    gptq,
    load_text,
    load_tiny,
    online,
    outliers,
    perplexity,
    quantize,
    recipes,
    runtime,
    steps,
    tokens,
)
from qoqlab.architecture import SITES, describe
from qoqlab.attention import Mode
from qoqlab.grids import INT4, INT8, UINT4
from qoqlab.hadamard import hadamard
from qoqlab.kv import Keys, KVFormat
from qoqlab.online import OnlineHadamard, OnlineLinear, OnlineReorder
from qoqlab.recipes import GROUPS, MIXED, PER_CHANNEL, Step
from qoqlab.runtime import QuantLinear
from qoqlab.schemes import ActivationFormat, Scheme, WeightFormat, WeightKind

from .families import FAMILIES, LLAMA3_ROPE, build, logits, only, random_ids, relative_error, wide

IDS = random_ids(3, 16)
TIGHT = 1e-9
MODELS = {
    **{f: (f, {}) for f in FAMILIES},
    "mha": ("llama", {"kv_heads": 4}),
    "tied": ("llama", {"tied": True}),
    "one-kv-head": ("llama", {"kv_heads": 1}),
    "all-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "hidden-96": ("llama", {"hidden_size": 96, "head_dim": 24, "intermediate_size": 160}),
}
QUAROT = (Step(steps.rotate, {"values": True}), Step(baselines.hadamard_inputs))
AWQ = (Step(baselines.awq_scale),)
#: AWQ looks at the weights' format, so its equivalence is checked through the weights that it leaves behind.
EQUIVALENCES = {
    "smoothquant": (Step(baselines.smooth_inputs),),
    "smoothquant-strong": (Step(baselines.smooth_inputs, {"alpha": 0.85}),),
    "quarot": QUAROT,
    "quarot-online-only": (Step(baselines.hadamard_inputs),),
    "atom": (Step(baselines.reorder_outliers),),
    "smoothquant-then-quarot": (Step(baselines.smooth_inputs), *QUAROT),
}


def double(name: str) -> torch.nn.Module:
    family, config = MODELS[name]
    return build(family, dtype=torch.float64, **config)


@torch.no_grad()
def run_steps(model: torch.nn.Module, *listed: Step, scheme: Scheme | None = None) -> torch.nn.Module:
    """The model after steps alone: no layer is replaced by a quantised one."""
    model = copy.deepcopy(model)
    attention.install(model)
    architecture = describe(model)
    batches = capture.first_inputs(model, IDS)
    for block in architecture.blocks:
        outputs = [capture.Batch(capture.run_block(block, b), b.arguments) for b in batches]
        context = steps.Context(block, batches, [], scheme or Scheme())
        for one in listed:
            one(context)
        batches = outputs
    return model


@pytest.mark.parametrize("transform", EQUIVALENCES)
@pytest.mark.parametrize("name", MODELS)
def test_before_rounding_the_network_is_the_original(name: str, transform: str, exact_norms: None) -> None:
    model = double(name)
    changed = quantize(model, only(*EQUIVALENCES[transform]), IDS, progress=False).model
    unseen = random_ids(2, 32, seed=9)
    assert relative_error(logits(changed, unseen), logits(model, unseen)) < TIGHT
    weights = dict(model.named_parameters())
    assert any(not torch.equal(p, weights[n]) for n, p in changed.named_parameters())


@pytest.mark.parametrize("name", MODELS)
def test_awq_is_an_equivalence_before_rounding(name: str, exact_norms: None) -> None:
    model = double(name)
    changed = run_steps(model, Step(baselines.awq_scale), scheme=Scheme(WeightFormat(WeightKind.GROUP_U4, 8)))
    assert relative_error(logits(changed, IDS), logits(model, IDS)) < TIGHT
    assert any(not torch.equal(p, dict(model.named_parameters())[n]) for n, p in changed.named_parameters())


@pytest.mark.parametrize("name", MODELS)
def test_rotating_queries_and_keys_keeps_the_function(name: str, exact_norms: None) -> None:
    """The last online rotation of QuaRot, together with all the others, in fp64 and without any rounding."""
    model = double(name)
    scheme = Scheme(kv=KVFormat(None, rotate_keys=True))
    changed = quantize(model, only(*QUAROT, scheme=scheme), IDS, progress=False).model
    assert relative_error(logits(changed, IDS), logits(model, IDS)) < TIGHT
    seen = []
    block = describe(changed).blocks[0]
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, *args, **kwargs):
        seen.append(key)
        return original(query, key, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        logits(changed, IDS)
        rotated = seen[0]
        seen.clear()
        block.attention.qoq.grid = None
        logits(changed, IDS)
    torch.testing.assert_close(rotated, seen[0] @ hadamard(rotated.shape[-1]), rtol=1e-9, atol=1e-12)


# --- SmoothQuant ----------------------------------------------------------------------------------------------------------


def test_smoothing_divides_by_the_papers_scale(exact_norms: None) -> None:
    model = build("llama", dtype=torch.float64)
    block = describe(run_steps(model)).blocks[0]
    absmax = capture.observe(block, capture.first_inputs(model, IDS)).absmax["qkv"].double()
    weights = torch.cat([block.linear(r).weight.detach() for r in "qkv"])
    scale = absmax**0.7 / weights.abs().amax(0) ** 0.3
    smoothed = describe(run_steps(model, Step(baselines.smooth_inputs, {"alpha": 0.7}))).blocks[0]
    # scales are fp32
    torch.testing.assert_close(smoothed.input_norm.weight, block.input_norm.weight / scale, rtol=1e-5, atol=0)
    torch.testing.assert_close(smoothed.linear("k").weight, block.linear("k").weight * scale, rtol=1e-5, atol=0)


def test_smoothing_helps_8_bit_activations_with_outliers() -> None:
    planted = outliers.plant(wide("llama"), activation_ratio=100.0, key_ratio=1.0)
    exact = logits(planted, IDS)
    results = {p: quantize(planted, p, IDS, progress=False) for p in ("rtn-w8a8", "smoothquant-w8a8")}
    error = {preset: relative_error(logits(result.model, IDS), exact) for preset, result in results.items()}
    assert error["smoothquant-w8a8"] < 0.6 * error["rtn-w8a8"]


# --- GPTQ and AWQ ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", [GROUPS, MIXED, PER_CHANNEL, WeightFormat(WeightKind.CHANNEL_S4)], ids=lambda f: f.kind.value
)
@pytest.mark.parametrize("tokens", [40, 2000])  # fewer tokens than columns and plenty
def test_gptq_is_never_worse_than_rounding_for_any_row(form: WeightFormat, tokens: int) -> None:
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(32, 256, generator=generator)
        x = torch.randn(tokens, 256, generator=generator) * torch.rand(256, generator=generator) ** 3
        hessian, scales = x.T @ x, form.choose(weight)
        codes = gptq.quantize(weight, hessian, scales)
        nearest = scales.encode(weight)
        errors = [((scales.decode(c) - weight).double() @ x.double().T).square().sum(1) for c in (codes, nearest)]
        # the choice is made in fp32 from sums of 256 x 256 terms
        assert bool((errors[0] <= errors[1] * (1 + 1e-4)).all())
        assert float(errors[0].sum()) < float(errors[1].sum())
        assert torch.equal(gptq.quantize(weight, torch.eye(256), scales), nearest)


@pytest.mark.parametrize("form", [GROUPS, PER_CHANNEL], ids=lambda f: f.kind.value)
def test_awq_searches_from_the_identity_and_is_never_worse_on_its_objective(form: WeightFormat) -> None:
    model = outliers.plant(wide("llama"), activation_ratio=30.0, key_ratio=1.0)
    candidates = baselines.awq_candidates(torch.rand(128), 20)
    assert len(candidates) == 20 and bool((candidates[0] == 1).all())
    scheme = Scheme(form)
    changed = describe(run_steps(model, Step(baselines.awq_scale), scheme=scheme)).blocks[0]
    original = describe(run_steps(model)).blocks[0]
    batches = capture.first_inputs(model, IDS)
    samples = [capture.observe(b, batches).sample for b in (original, changed)]
    better = 0
    for site in ("o", "gate_up", "down"):
        errors = []
        for block, sample in zip((original, changed), samples, strict=True):
            weights = {role: block.linear(role).weight.detach() for role in SITES[site]}
            rounded = {r: form.choose(w).decode(form.choose(w).encode(w)) for r, w in weights.items()}
            errors.append(_site_error(block, site, sample[site], weights, rounded))
        assert errors[1] <= errors[0] * (1 + 1e-4), site
        better += errors[1] < 0.999 * errors[0]
    assert better > 0  # outliers are there to be protected


@pytest.mark.parametrize("form", [GROUPS, PER_CHANNEL], ids=lambda f: f.kind.value)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_awq_of_q_k_and_v_is_never_worse_for_the_attention(family: str, form: WeightFormat) -> None:
    """Together they are judged by the attention's output: with rounded q, k and v it is no further from the exact one."""
    model = outliers.plant(wide(family), activation_ratio=30.0, key_ratio=1.0)
    blocks = [describe(run_steps(model, *listed, scheme=Scheme(form))).blocks[0] for listed in ((), AWQ)]
    (batch,) = capture.first_inputs(run_steps(model), IDS, batch_size=len(IDS))
    errors = []
    for block in blocks:
        exact = _attention(block, batch)
        for role in SITES["qkv"]:
            weight = block.linear(role).weight.detach()
            block.linear(role).weight.data = form.choose(weight).decode(form.choose(weight).encode(weight))
        errors.append(float((_attention(block, batch) - exact).double().square().sum()))
    assert errors[1] <= errors[0] * (1 + 1e-4)
    assert errors[1] < 0.9 * errors[0]  # outliers are there to be protected


def _attention(block, batch: capture.Batch) -> torch.Tensor:
    """Output of a block's attention, its norm included."""
    return block.attention(block.input_norm(batch.hidden), **batch.arguments[block.index])[0]


def _site_error(block, site, sample, weights, rounded) -> float:
    def out(w):
        if site != "gate_up":
            return sample @ w[site].T
        gate, up = sample @ w["gate"].T, sample @ w["up"].T
        return (torch.nn.functional.silu(gate) * up) @ down.T

    # the two blocks' feed-forwards differ by a scale that down undoes: measure behind it
    down = block.linear("down").weight.detach()
    return float((out(rounded) - out(weights)).double().square().sum())


def test_awq_leaves_the_block_as_it_was_while_searching(exact_norms: None) -> None:
    """The search tries weights in place; with one candidate, the identity, nothing may change."""
    model = build("llama", dtype=torch.float64)
    changed = run_steps(model, Step(baselines.awq_scale, {"count": 1}), scheme=Scheme(WeightFormat(WeightKind.GROUP_U4, 8)))
    before = dict(model.named_parameters())
    assert all(torch.equal(p, before[n]) for n, p in changed.named_parameters())


def test_awq_candidates_are_refused_or_guarded() -> None:
    with pytest.raises(ValueError, match="count: expected a positive integer, got 0"):
        baselines.awq_candidates(torch.ones(4), 0)
    assert all(bool(torch.isfinite(s).all()) for s in baselines.awq_candidates(torch.zeros(4), 5))
    assert all(bool(torch.isfinite(s).all()) for s in baselines.awq_candidates(torch.tensor([0.0, 1e-30, 5.0]), 5))


# --- QuaRot and Atom ------------------------------------------------------------------------------------------------------


def test_quarot_rotates_what_enters_o_and_down() -> None:
    model = build("llama", dtype=torch.float64)
    plain, turned = (describe(run_steps(model, *listed)).blocks[0] for listed in ((), QUAROT))
    batches = capture.first_inputs(model, IDS)
    before = capture.observe(plain, batches).sample
    rotated = [capture.Batch(b.hidden @ hadamard(64), b.arguments) for b in batches]
    after = capture.observe(turned, rotated).sample
    # o_proj's input: inside heads by the folded rotation of values, across heads online; together one Hadamard matrix
    across = torch.kron(hadamard(4), hadamard(16)).float()
    torch.testing.assert_close(after["o"], before["o"] @ across, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after["down"], before["down"] @ hadamard(128).float(), rtol=1e-4, atol=1e-4)


def test_a_size_without_a_hadamard_matrix_is_refused() -> None:
    model = build("llama", hidden_size=112, head_dim=8, num_attention_heads=14, intermediate_size=128)
    with pytest.raises(ValueError, match=r"model: model.layers.0.self_attn.o_proj: .*no Hadamard matrix of order 14"):
        quantize(model, only(Step(baselines.hadamard_inputs)), IDS, progress=False)


def test_atom_sorts_large_channels_to_the_end() -> None:
    model = outliers.plant(build("llama", dtype=torch.float64), activation_ratio=30.0, key_ratio=1.0)
    block = describe(run_steps(model, Step(baselines.reorder_outliers))).blocks[0]
    seen = capture.observe(block, capture.first_inputs(model, IDS)).sample
    for site in SITES:
        assert bool((seen[site].double().square().sum(0).diff() >= -1e-6).all()), site
    kinds = {role: type(getattr(linear, "online", None)) for role, linear in block.linears()}
    assert kinds == {r: OnlineReorder for r in ("q", "k", "v", "o", "gate", "up")} | {"down": type(None)}


def test_atom_with_one_outlier_share_keeps_the_largest_channels_at_8_bits() -> None:
    planted = outliers.plant(wide("llama"), activation_ratio=100.0, key_ratio=1.0)
    result = quantize(planted, "atom-w4a4kv4-g128", IDS, progress=False)
    layer = describe(result.model).blocks[0].linear("q")
    gain = describe(planted).blocks[0].input_norm.weight.abs()
    assert isinstance(layer, QuantLinear) and layer.quantized.outliers == 4
    assert int(gain.argmax()) in layer.online.order[-4:].tolist()
    codes = layer.quantized.codes
    assert int(codes[:, -4:].abs().max()) > 7 and int(codes[:, :-4].abs().max()) <= 7


def test_without_outliers_atom_is_grouping_and_loses_on_outliers() -> None:
    planted = outliers.plant(wide("llama"), activation_ratio=100.0, key_ratio=1.0)
    exact, errors = logits(planted, IDS), {}
    atom = recipes.get("atom-w4a4kv4-g128")
    plain = Scheme(WeightFormat(WeightKind.GROUP_S4), ActivationFormat(INT4, 128), UINT4)
    for name, scheme in (("mixed", atom.scheme), ("plain", plain)):
        result = quantize(planted, only(Step(baselines.reorder_outliers), scheme=scheme), IDS, progress=False)
        errors[name] = relative_error(logits(result.model, IDS), exact)
    assert errors["mixed"] < 0.8 * errors["plain"]


def test_fixed_clipping_reaches_every_group_but_not_outliers() -> None:
    layers = []
    for listed in ((), (Step(baselines.clip_to, {"ratio": 0.5}),)):
        layers.append(
            describe(quantize(wide("llama"), only(*listed, scheme=Scheme(MIXED)), IDS, progress=False).model).blocks[0]
        )
    for role in ("q", "down"):
        plain, clipped = (block.linear(role).quantized.scales.float() for block in layers)
        torch.testing.assert_close(clipped[:, :-1], plain[:, :-1] / 2, rtol=2e-3, atol=0)
        assert torch.equal(clipped[:, -1], plain[:, -1])
    for bad in (0, 1.5, float("nan"), "half"):
        with pytest.raises(ValueError, match="ratio: expected a number with 0 < ratio <= 1"):
            quantize(wide("llama"), only(Step(baselines.clip_to, {"ratio": bad}), scheme=Scheme(MIXED)), IDS, progress=False)


# --- composing and running ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (baselines.hadamard_inputs, Step(steps.smooth_output)),
        (baselines.hadamard_inputs, Step(steps.reorder)),
        (baselines.hadamard_inputs, Step(steps.rotate, {"values": True})),
        (baselines.hadamard_inputs, Step(baselines.hadamard_inputs)),
        (baselines.hadamard_inputs, Step(baselines.reorder_outliers)),
        (baselines.reorder_outliers, Step(steps.rotate)),
        (baselines.reorder_outliers, Step(baselines.smooth_inputs)),
        (baselines.reorder_outliers, Step(baselines.awq_scale)),
    ],
)
def test_folding_behind_an_online_transform_is_refused(first, second: Step) -> None:
    """Folded into the layer before, it would meet the transform half-way: silently another network."""
    with pytest.raises(ValueError, match=rf"steps: {second.name} changes the inputs of model.layers.0.*online"):
        quantize(wide("llama"), only(Step(first), second, scheme=Scheme(GROUPS)), IDS, progress=False)


@pytest.mark.parametrize("preset", [n for n in recipes.names() if not n.startswith(("fp16", "qoq"))])
def test_both_modes_compute_nearly_the_same(preset: str, quantized) -> None:
    """With all keys and values exact, modes differ by fp16 outputs, which move some activations to another code: less than
    quantisation itself costs. With the format's cache, decode steps (prefill=1) differ in their own keys and values too.
    Layers are compared exactly in test_runtime.py."""
    model, ids = copy.deepcopy(quantized("llama", preset).model), random_ids(2, 40, seed=3)
    errors = []
    for _ in range(2):
        simulated = logits(model, ids)
        with runtime.mode(model, Mode.RUNTIME, prefill=1):
            run = logits(model, ids)
        assert bool(torch.isfinite(run).all())
        errors.append(relative_error(run, simulated))
        for block in describe(model).blocks:
            block.attention.qoq.grid = None
    # a code of 4 bits is a larger step than one of 8
    cache, linears = (0.5, 0.4) if "A4" in str(recipes.get(preset).scheme) else (0.3, 0.06)
    assert errors[0] < cache and errors[1] < linears, errors


@pytest.mark.parametrize("preset", ["quarot-w4a4kv4", "atom-w4a4kv4-g128", "awq-w4a16-g128", "kivi-kv4", "rtn-w4a4"])
def test_every_kind_of_preset_generates(preset: str, quantized) -> None:
    out = generate(quantized("qwen2", preset), random_ids(2, 5), max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 9)


def test_an_online_layer_knows_and_stores_its_transform() -> None:
    linear = torch.nn.Linear(8, 4)
    hadamard_layer, order = OnlineLinear(linear, OnlineHadamard(8)), torch.tensor([7, 6, 5, 4, 3, 2, 1, 0])
    x = torch.randn(3, 8)
    torch.testing.assert_close(hadamard_layer(x), linear(x @ hadamard(8, torch.float32)))
    reordered = OnlineLinear(linear, OnlineReorder(order))
    assert torch.equal(reordered(x), linear(x.flip(-1)))
    assert set(hadamard_layer.state_dict()) == {"weight", "bias", "online.hadamard"}
    assert "size=8" in str(hadamard_layer)
    with pytest.raises(ValueError, match=r"order: expected a permutation of 0\.\.2"):
        OnlineReorder(torch.tensor([0, 0, 2]))


def test_an_online_transform_is_rebuilt_from_a_state_dict() -> None:
    state = {
        "a.online.order": torch.tensor([1, 0], dtype=torch.int32),
        "b.online.hadamard": torch.tensor(4),
        "c.weight": torch.ones(1),
    }
    assert isinstance(online.take(state, "a", 2), OnlineReorder) and isinstance(online.take(state, "b", 8), OnlineHadamard)
    assert online.take(state, "c", 2) is None and set(state) == {"c.weight"}
    bad = [("order", torch.tensor([0, 0], dtype=torch.int32)), ("order", torch.zeros(3, dtype=torch.int32))]
    bad += [("hadamard", torch.tensor(3)), ("hadamard", torch.tensor(0)), ("hadamard", torch.tensor(2.0))]
    bad += [("hadamard", torch.tensor([2]))]
    for key, value in bad:
        with pytest.raises(ValueError, match=r"tensor x.online.(order|hadamard): expected|order: expected a permutation"):
            online.take({f"x.online.{key}": value}, "x", 2)


def test_kivi_keeps_keys_better_than_tokens_do() -> None:
    """Key outliers stay in their channels, so a scale per channel is not stretched by them."""
    planted = outliers.plant(wide("llama"), activation_ratio=1.0, key_ratio=20.0)
    ids = random_ids(2, 64, seed=2)
    exact, errors = logits(planted, ids), {}
    for preset in ("rtn-kv4", "kivi-kv4"):
        errors[preset] = relative_error(logits(quantize(planted, preset, progress=False).model, ids), exact)
    assert errors["kivi-kv4"] < 0.7 * errors["rtn-kv4"]


def test_kv_formats_refuse_nonsense() -> None:
    for bad, rule in (
        ({"grid": INT8}, "grid: keys and values need an unsigned grid, got INT8"),
        ({"grid": "UINT4"}, "grid: expected a Grid or None"),
        ({"keys": "channel"}, "keys: expected one of Keys.TOKEN, Keys.CHANNEL"),
        ({"window": 0}, "window: expected a positive integer"),
        ({"window": 31}, "window: must be even"),
        ({"rotate_keys": 1}, "rotate_keys: expected True or False"),
        ({"ratio": 2.0}, "ratio: expected numbers with 0 < ratio <= 1"),
    ):
        with pytest.raises((TypeError, ValueError), match=rule):
            KVFormat(**bad)
    assert KVFormat.of(UINT4) == KVFormat() and KVFormat.of(None) is None and KVFormat.of(KVFormat()).keys is Keys.TOKEN


def test_more_bits_are_better_on_a_language_model() -> None:
    """On the bundled model, where perplexity means something; methods that take longer are the comparison's."""
    model, tokenizer = load_tiny()
    ids = tokens(tokenizer, load_text("python-docs", "test"), 256)[::40][:6]
    calibration = tokens(tokenizer, load_text("python-docs", "calibration"), 256)[::40][:2]
    ladders = [("fp16", "rtn-w8a8", "rtn-w4a8", "rtn-w4a8kv4"), ("rtn-w4a8", "rtn-w4a4-g128", "rtn-w4a4")]
    ladders += [("fp16", "kivi-kv4", "rtn-kv4"), ("smoothquant-w8a8", "smoothquant-w4a8kv4", "rtn-w4a8kv4")]
    found = {n: quantize(model, n, calibration, progress=False, report=False) for ladder in ladders for n in ladder}
    for mode in Mode:
        measured = {name: perplexity(result, ids, mode, prefill=32) for name, result in found.items()}
        for ladder in ladders:
            values = [measured[name] for name in ladder]
            assert values == sorted(values), {name: round(measured[name], 3) for name in ladder}
