"""What cannot work is refused with the argument, what came and the rule; what merely looks odd works."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import qoqlab
from qoqlab import quantize, recipes, steps
from qoqlab.attention import Mode
from qoqlab.grids import INT8, UINT4
from qoqlab.recipes import PROGRESSIVE, Recipe, Step
from qoqlab.schemes import Scheme, WeightFormat, WeightKind

from .families import FAMILIES, build, logits, random_ids, relative_error, wide

IDS = random_ids(2, 12)


# --- tensors --------------------------------------------------------------------------------------------------------------

MATRICES = {
    "weight": (qoqlab.progressive.quantize, qoqlab.affine.quantize_per_channel_u4),
}
ROWS = (qoqlab.affine.quantize_per_token_s8, qoqlab.kv.quantize_kv4)


@pytest.mark.parametrize("function", MATRICES["weight"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([[1.0]], TypeError, "weight: expected a torch.Tensor, got list"),
        (None, TypeError, "weight: expected a torch.Tensor, got NoneType"),
        (
            torch.zeros(4, 128, dtype=torch.int8),
            TypeError,
            "weight: expected a floating-point tensor, got torch.int8 .*4x128",
        ),
        (torch.zeros(128), ValueError, r"weight: expected a non-empty matrix \[N, K\], got shape 128"),
        (torch.zeros(2, 2, 128), ValueError, r"weight: expected a non-empty matrix \[N, K\], got shape 2x2x128"),
        (torch.tensor(1.0), ValueError, r"weight: expected a non-empty matrix \[N, K\], got shape scalar"),
        (torch.zeros(0, 128), ValueError, r"weight: expected a non-empty matrix \[N, K\], got shape 0x128"),
        (torch.full((2, 128), torch.nan), ValueError, "weight: holds 256 NaN and 0 infinite values"),
        (torch.full((2, 128), -torch.inf), ValueError, "weight: holds 0 NaN and 256 infinite values"),
        (torch.full((2, 128), 1e9), ValueError, "weight|x: values are too large for torch.float16 scales"),
    ],
)
def test_weights(function, value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        function(value)


@pytest.mark.parametrize("function", ROWS)
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("text", TypeError, "x: expected a torch.Tensor, got str"),
        (
            torch.zeros(4, 8, dtype=torch.int64),
            TypeError,
            "x: expected a floating-point tensor, got torch.int64 of shape 4x8",
        ),
        (torch.tensor(1.0), ValueError, r"x: expected shape \[..., D\] with D >= 1, got scalar"),
        (torch.zeros(3, 0), ValueError, r"x: expected shape \[..., D\] with D >= 1, got 3x0"),
        (torch.tensor([1.0, torch.nan]), ValueError, "x: holds 1 NaN and 0 infinite values"),
        (torch.tensor([1.0, torch.inf]), ValueError, "x: holds 0 NaN and 1 infinite values"),
        (torch.tensor([1e9, 0.0]), ValueError, "x: values are too large for torch.float16 scales"),
    ],
)
def test_activations_and_keys(function, value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        function(value)


@pytest.mark.parametrize("group_size", [128, 96])
def test_k_that_groups_do_not_divide(group_size: int) -> None:
    message = f"weight: 4096x100 is not divisible into groups of {group_size} along K; pass group_size=... or pad"
    with pytest.raises(ValueError, match=re.escape(message)):
        qoqlab.progressive.quantize(torch.zeros(4096, 100), group_size=group_size)


@pytest.mark.parametrize("group_size", [0, -128, 64.0, "128", None])
def test_group_sizes_that_are_none(group_size: object) -> None:
    with pytest.raises(ValueError, match=f"group_size: expected a positive integer, got {group_size!r}"):
        qoqlab.progressive.quantize(torch.zeros(4, 128), group_size=group_size)


def test_codes_and_bytes() -> None:
    pack, unpack = qoqlab.packing.pack_qserve, qoqlab.packing.unpack_qserve
    with pytest.raises(TypeError, match=r"codes: expected integer codes, got torch\.float32"):
        pack(torch.zeros(32, 32))
    with pytest.raises(ValueError, match=r"codes: codes must lie in 0\.\.15, got 0\.\.16"):
        pack(torch.arange(17).repeat(32, 2)[:, :32])
    with pytest.raises(ValueError, match="codes: 32x16 does not split into 32x32 tiles; N and K must be multiples of 32"):
        pack(torch.zeros(32, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"codes: expected \[N, K\], got shape 32"):
        pack(torch.zeros(32, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"packed: expected an int8 matrix \[N, K / 2\], got torch.uint8 of shape 32x16"):
        unpack(torch.zeros(32, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="packed: 32x16 does not split into 32x32 tiles"):
        unpack(torch.zeros(32, 8, dtype=torch.int8))


def test_operands_of_the_references() -> None:
    w = qoqlab.progressive.quantize(torch.randn(8, 128))
    matmul, attend = qoqlab.reference.w4a8_matmul, qoqlab.reference.kv4_attention
    with pytest.raises(TypeError, match="weight: expected a ProgressiveWeight or a per-channel Affine, got Tensor"):
        matmul(torch.randn(2, 128), torch.randn(8, 128))
    with pytest.raises(ValueError, match="x: last dimension 64 does not match the weight's K = 128"):
        matmul(torch.randn(2, 64), w)
    with pytest.raises(TypeError, match=r"x: expected a floating-point tensor, got torch\.int8"):
        matmul(torch.zeros(2, 128, dtype=torch.int8), w)
    with pytest.raises(ValueError, match="x: holds 256 NaN"):
        matmul(torch.full((2, 128), torch.nan), w)
    q, kv = torch.randn(2, 4, 16), torch.randn(2, 2, 5, 16)
    with pytest.raises(ValueError, match=r"query, keys, values: expected \[B, Hq, D\].*got 4x16"):
        attend(q[0], kv, kv)
    with pytest.raises(ValueError, match=r"query, keys, values: .*T >= 1.*2x2x0x16"):
        attend(q, kv[:, :, :0], kv[:, :, :0])
    with pytest.raises(ValueError, match="query: 2x3x16 does not fit keys 2x2x5x16: B and D equal, Hq a multiple of Hkv"):
        attend(q[:, :3], kv, kv)
    with pytest.raises(ValueError, match="keys: holds"):
        attend(q, kv * torch.nan, kv)
    with pytest.raises(TypeError, match=r"query: expected a floating-point tensor, got torch\.int64"):
        attend(q.long(), kv, kv)


# --- odd, but fine --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 1e-7, 6e4])
def test_constant_and_zero_rows(value: float) -> None:
    x = torch.full((4, 128), value)
    for function in (*MATRICES["weight"], *ROWS):
        restored = function(x).dequantize(torch.float32)
        assert bool(torch.isfinite(restored).all())
        # half a step of a grid that reaches from 0 to the value
        assert float((restored - x).abs().max()) <= abs(value) / 15 / 2 + abs(value) / 1000 + 1e-7
    mixed = torch.randn(4, 128)
    mixed[1], mixed[2] = 0, value
    for function in (*MATRICES["weight"], *ROWS):
        restored = function(mixed).dequantize(torch.float32)
        assert not bool(restored[1].any()) and bool(torch.isfinite(restored).all())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", ["rtn-w4a8kv4", "qoq-g128-gptq", "qoq-per-channel", "qoq-g128-search"])
def test_models_with_dead_and_constant_rows(preset: str, family: str) -> None:
    """Zero rows and columns, a constant row, a dead block output and a dead token: finite everywhere, and still close."""
    model = wide(family)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data[3] = 0
        layer.self_attn.k_proj.weight.data[5] = 0.25
        layer.self_attn.v_proj.weight.data[:2] = 0
        layer.mlp.up_proj.weight.data[7] = 0
        layer.mlp.gate_proj.weight.data[:, 9] = 0
        layer.mlp.down_proj.weight.data[:, 11] = 0
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    model.model.embed_tokens.weight.data[int(IDS[0, 0])] = 0
    expected = logits(model, IDS)
    result = quantize(model, preset, IDS, progress=False)
    for mode in Mode:
        with qoqlab.runtime.mode(result.model, mode, 1):
            actual = logits(result.model, IDS)
        assert bool(torch.isfinite(actual).all())
        assert relative_error(actual, expected) < 0.6
    assert torch.isfinite(torch.tensor(result.report.output_sqnr_db.to_numpy())).all()


@pytest.mark.parametrize("preset", recipes.names())
def test_a_model_of_zeros(preset: str) -> None:
    model = wide("llama")
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.data.zero_()
    result = quantize(model, preset, IDS, progress=False)
    assert torch.equal(logits(result.model, IDS).isfinite(), torch.ones(2, 12, 128, dtype=torch.bool))


def test_one_token_of_calibration() -> None:
    model = wide("llama")
    result = quantize(model, "qoq-g128-gptq", IDS[:1, :1], progress=False)
    assert relative_error(logits(result.model, IDS), logits(model, IDS)) < 1


# --- models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "path",
    [
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.input_layernorm.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("preset", ["rtn-w4a8kv4-g128", "qoq-g128"])
def test_weights_that_are_not_numbers(preset: str, path: str, value: float) -> None:
    model = wide("qwen2")
    model.get_parameter(path).data.view(-1)[5] = value
    nans, infs = (1, 0) if value != value else (0, 1)
    message = f"model weight {path}: holds {nans} NaN and {infs} infinite values; quantisation needs finite numbers"
    with pytest.raises(ValueError, match=re.escape(message)):
        quantize(model, preset, IDS, progress=False)


@pytest.mark.parametrize("preset", ["rtn-w4a8kv4-g128", "qoq-g128", "qoq-g128-gptq"])
def test_calibration_that_leaves_the_numbers(preset: str) -> None:
    """Finite weights whose products overflow: the layer at fault is named."""
    model = wide("llama")
    for role in ("up_proj", "down_proj"):
        model.model.layers[1].mlp.get_submodule(role).weight.data.fill_(1e30)
    with pytest.raises(ValueError, match=r"calibration: output of model\.layers\.1: holds \d+ NaN and \d+ infinite values"):
        quantize(model, preset, IDS, progress=False)


def test_weights_too_large_for_fp16_scales_are_named() -> None:
    model = wide("llama")
    model.model.layers[1].mlp.gate_proj.weight.data.fill_(1e8)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.gate_proj.*too large for torch\.float16 scales"):
        quantize(model, "rtn-w4a8kv4-g128", progress=False)


def test_k_not_divisible_into_groups_is_named() -> None:
    model = build("llama", hidden_size=128, intermediate_size=192, head_dim=32)
    message = (
        "model: model.layers.0.mlp.down_proj is 128x192, not divisible into groups of 128 along K; use another group_size"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        quantize(model, "rtn-w4a8kv4-g128", progress=False)
    smaller = Recipe("g64", Scheme(WeightFormat(WeightKind.PROGRESSIVE_U4, 64), INT8))
    assert quantize(model, smaller, progress=False).model is not None


@pytest.mark.parametrize("preset", ["fp16", "qoq-g128"])
def test_an_unknown_architecture(preset: str) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2))
    message = "model: GPT2LMHeadModel is not a supported architecture; supported: LlamaForCausalLM, MistralForCausalLM"
    for call in (lambda: quantize(model, preset, IDS), lambda: qoqlab.outliers.plant(model)):
        with pytest.raises(TypeError, match=message):
            call()


@pytest.mark.parametrize("model", [nn.Linear(4, 4), nn.Sequential(), None, "llama", {"weights": 1}])
def test_a_thing_that_is_no_model(model: object) -> None:
    name = type(model).__name__
    with pytest.raises(TypeError, match=f"model: {name} is not a supported architecture; supported: LlamaForCausalLM"):
        quantize(model, "fp16")


@pytest.mark.parametrize("model", [nn.Linear(4, 4), None, "llama"])
def test_perplexity_of_a_thing_that_is_no_model(model: object) -> None:
    with pytest.raises(TypeError, match=f"model: .*{type(model).__name__}"):
        qoqlab.perplexity(model, IDS)


def test_a_quantised_model_is_not_quantised_again(quantized) -> None:
    result = quantized("llama", "qoq-g128")
    message = "model: model.layers.0.self_attn.q_proj is a QuantLinear, expected an unquantised nn.Linear"
    for preset in ("qoq-g128", "rtn-w4a8kv4", "rtn-w8a8"):
        with pytest.raises(TypeError, match=re.escape(message)):
            quantize(result.model, preset, IDS)
    with pytest.raises(TypeError, match="model: QuantizedModel"):
        quantize(result, "qoq-g128", IDS)


def test_outliers_are_not_planted_in_a_quantised_model(quantized) -> None:
    with pytest.raises(TypeError, match=r"model: .*QuantLinear"):
        qoqlab.outliers.plant(quantized("llama", "qoq-g128").model)


def test_a_quantised_cache_is_not_inherited_silently() -> None:
    """A model whose keys and values are rounded already is neither a source of exact outputs nor an fp16 model."""
    rounded = quantize(build("llama"), Recipe("kv only", Scheme(kv=UINT4)), progress=False).model
    exact = logits(build("llama"), IDS)
    try:
        again = quantize(rounded, "fp16").model
    except TypeError:
        return
    torch.testing.assert_close(logits(again, IDS), exact, rtol=1e-5, atol=1e-5)


# --- recipes and calibration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        (None, ValueError, r"calibration: recipe 'qoq-g128' needs tokens \[n, length\], got None"),
        (torch.zeros(0, 16, dtype=torch.int64), ValueError, r"calibration: expected non-empty int64 tokens .*shape 0x16"),
        (torch.zeros(4, 0, dtype=torch.int64), ValueError, r"calibration: expected non-empty int64 tokens .*shape 4x0"),
        (
            torch.zeros(16, dtype=torch.int64),
            ValueError,
            r"calibration: .*int64 tokens \[n, length\], got torch.int64 .*shape 16",
        ),
        (torch.zeros(1, 2, 3, dtype=torch.int64), ValueError, r"calibration: .*tokens \[n, length\], .*shape 1x2x3"),
        (torch.zeros(2, 8, dtype=torch.int32), ValueError, "calibration: .*int64 tokens.*got torch.int32"),
        (torch.zeros(2, 8), TypeError, "calibration: expected int64 token ids, got torch.float32"),
        (torch.zeros(2, 8, dtype=torch.bool), TypeError, "calibration: expected int64 token ids, got torch.bool"),
        (torch.full((2, 8), 128), ValueError, r"calibration: token ids must lie in 0\.\.127, got 128\.\.128"),
        (torch.full((2, 8), -1), ValueError, r"calibration: token ids must lie in 0\.\.127, got -1\.\.-1"),
        ([[1, 2, 3]], TypeError, r"calibration: expected a torch\.Tensor of token ids \[n, length\], got list"),
        ("some text", TypeError, r"calibration: expected a torch\.Tensor of token ids \[n, length\], got str"),
    ],
)
def test_calibration(calibration: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize(wide("llama"), "qoq-g128", calibration)


@pytest.mark.parametrize("recipe", [None, 3, Scheme(), ["qoq-g128"], {"name": "qoq-g128"}])
def test_a_thing_that_is_no_recipe(recipe: object) -> None:
    with pytest.raises(TypeError, match=f"recipe: expected a preset's name or a Recipe, got {type(recipe).__name__}"):
        quantize(build("llama"), recipe, IDS)


@pytest.mark.parametrize("name", ["", "qoq", "QOQ-G128", "gptq"])
def test_an_unknown_preset_lists_the_known_ones(name: str) -> None:
    for call in (lambda: recipes.get(name), lambda: quantize(build("llama"), name, IDS)):
        with pytest.raises(ValueError, match=f"recipe: '{name}' is not a preset; presets: .*qoq-g128"):
            call()


def test_step_parameters_that_do_not_exist() -> None:
    for function, parameters in ((steps.rotate, {"angle": 1}), (steps.clip, {"ratio": 1}), (steps.gptq, {"damping": 1})):
        (name,) = parameters
        with pytest.raises(TypeError, match=f"step {function.__name__}: .*unexpected keyword argument '{name}'"):
            Step(function, parameters)


@pytest.mark.parametrize(
    ("parameters", "message"), [({"count": 0}, "count"), ({"lowest": 0.0}, "lowest"), ({"lowest": 1.5}, "lowest")]
)
def test_step_parameters_out_of_range(parameters: dict[str, float], message: str) -> None:
    recipe = Recipe("bad", Scheme(PROGRESSIVE, INT8), (Step(steps.clip, parameters),))
    with pytest.raises(ValueError, match=f"{message}.*expected"):
        quantize(wide("llama"), recipe, IDS, progress=False)


def test_a_failed_run_leaves_the_original_alone() -> None:
    model = wide("llama")
    model.model.layers[1].mlp.up_proj.weight.data.fill_(1e30)
    model.model.layers[1].mlp.down_proj.weight.data.fill_(1e30)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="calibration"):
        quantize(model, "qoq-g128", IDS, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(isinstance(layer.self_attn.q_proj, nn.Linear) for layer in model.model.layers)
    assert not any(hasattr(layer.self_attn, "qoq") for layer in model.model.layers)


# --- options of the wrong kind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["runtime", "simulated", None, 1])
def test_modes_are_members_of_the_enum(mode: object, quantized) -> None:
    """A string must not quietly compute something between the two modes."""
    result = quantized("llama", "qoq-g128")
    with pytest.raises(TypeError, match=r"mode: expected one of Mode\.SIMULATED, Mode\.RUNTIME, got"):
        qoqlab.perplexity(result, IDS, mode=mode)
    with (
        pytest.raises(TypeError, match=r"mode: expected one of"),
        qoqlab.runtime.mode(result.model, mode),
    ):
        pass


def test_zeros_and_first_levels_are_members_of_their_enums() -> None:
    weight = torch.randn(4, 128)
    with pytest.raises(TypeError, match=r"zero: expected one of Zero\.INTEGER, Zero\.SCALED, got 'integer'"):
        qoqlab.progressive.quantize(weight, zero="integer")
    with pytest.raises(TypeError, match=r"zero: expected one of"):
        qoqlab.affine.quantize_per_channel_u4(weight, zero="scaled")
    with pytest.raises(TypeError, match=r"first_level: expected one of FirstLevel\.UNROUNDED"):
        qoqlab.progressive.quantize(weight, first_level="rounded")
    with pytest.raises(TypeError, match=r"kind: expected one of WeightKind"):
        WeightFormat("progressive-u4")


@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.5, float("nan"), torch.tensor([0.5, 0.5, 2.0, 0.5])])
def test_clipping_ratios_lie_between_0_and_1(ratio: object) -> None:
    for quantizer in (qoqlab.progressive.quantize, qoqlab.affine.quantize_per_channel_u4):
        with pytest.raises(ValueError, match="ratio: expected numbers with 0 < ratio <= 1"):
            quantizer(torch.randn(4, 128), ratio=ratio)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), "x"])
def test_smoothing_strengths_are_finite(alpha: object) -> None:
    recipe = Recipe("mine", Scheme(PROGRESSIVE, INT8), (Step(steps.smooth_output, {"alpha": alpha}),))
    with pytest.raises(ValueError, match="alpha: expected a finite number"):
        quantize(wide("llama"), recipe, IDS, progress=False)


@pytest.mark.parametrize("ratio", [0.5, float("inf"), float("nan"), "a"])
def test_planted_ratios_are_finite(ratio: object) -> None:
    with pytest.raises(ValueError, match="activation_ratio: expected a finite number of at least 1"):
        qoqlab.outliers.plant(wide("llama"), activation_ratio=ratio)
    with pytest.raises(ValueError, match="key_ratio: expected a finite number of at least 1"):
        qoqlab.outliers.plant(wide("llama"), key_ratio=ratio)


def test_windows_and_texts() -> None:
    model = wide("llama")
    with pytest.raises(ValueError, match="batch_size: expected a positive integer, got 0"):
        qoqlab.perplexity(model, IDS, batch_size=0)
    with pytest.raises(ValueError, match=r"prefill: expected 1\.\.\d+, got 1.5"):
        qoqlab.perplexity(model, IDS, prefill=1.5)
    with pytest.raises(TypeError, match="text: expected a string, got int"):
        qoqlab.tokens(None, 5, 512)
    with pytest.raises(TypeError, match=r"steps: expected Step\(function, parameters\), got function"):
        Recipe("mine", Scheme(), (steps.rotate,))


def test_a_recipe_that_could_not_be_loaded_is_not_saved(tmp_path) -> None:
    def mine(context: steps.Context) -> None:
        context.changed()

    result = quantize(wide("llama"), Recipe("mine", Scheme(PROGRESSIVE), (Step(mine),)), IDS, progress=False)
    with pytest.raises(ValueError, match="recipe: step 'mine' is not registered"):
        qoqlab.save(result, tmp_path / "checkpoint")
    assert not list(tmp_path.glob("**/*.safetensors"))
    steps.step(mine)
    try:
        qoqlab.save(result, tmp_path / "checkpoint")
        assert qoqlab.load(tmp_path / "checkpoint").recipe == result.recipe
    finally:
        del steps.STEPS["mine"]


def test_a_name_is_not_a_model_for_compare() -> None:
    with pytest.raises(TypeError, match="model: expected Module, got 'tiny'"):
        qoqlab.compare(["fp16"], "tiny", IDS, IDS)  # type: ignore[arg-type]


@pytest.mark.parametrize(("value", "error"), [("x", TypeError), (None, TypeError), (qoqlab.kv.KVFormat(None), ValueError)])
def test_a_cache_refuses_a_wrong_grid_when_it_is_made(value: object, error: type[Exception]) -> None:
    from qoqlab.hf import KV4Cache

    with pytest.raises(error, match="grid: expected"):
        KV4Cache(value)  # type: ignore[arg-type]
