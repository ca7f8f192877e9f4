"""Quantised layers in both modes of arithmetic."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qoqlab import affine, attention, progressive, reference, runtime
from qoqlab.architecture import describe
from qoqlab.attention import Mode
from qoqlab.grids import INT4, INT8, UINT4, Zero
from qoqlab.grouped import Grouped
from qoqlab.online import OnlineHadamard, OnlineReorder
from qoqlab.recipes import GROUPS, MIXED, PER_CHANNEL, PER_CHANNEL_INT4, PER_CHANNEL_INT8, PROGRESSIVE
from qoqlab.runtime import QuantLinear
from qoqlab.schemes import ActivationFormat, Scheme, WeightFormat, WeightKind, assemble, quantize_activations

from .families import FAMILIES, build, cast_parameters, logits, random_ids, relative_error, wide

IDS = random_ids(2, 12)
FORMS = {
    "progressive-integer": PROGRESSIVE,
    "progressive-scaled": WeightFormat(WeightKind.PROGRESSIVE_U4, 128, Zero.SCALED),
    "progressive-32": WeightFormat(WeightKind.PROGRESSIVE_U4, 32),
    "channel-integer": PER_CHANNEL,
    "channel-scaled": WeightFormat(WeightKind.CHANNEL_U4, zero=Zero.SCALED),
    "channel-int8": PER_CHANNEL_INT8,
    "channel-int4": PER_CHANNEL_INT4,
    "groups": GROUPS,
    "groups-scaled": WeightFormat(WeightKind.GROUP_U4, 64, Zero.SCALED),
    "groups-symmetric": WeightFormat(WeightKind.GROUP_S4, 32),
    "mixed": MIXED,
}
ACTIVATIONS = {
    "INT4": INT4,
    "INT4-clipped": ActivationFormat(INT4, ratio=0.9),
    "INT4-groups": ActivationFormat(INT4, 32),
    "INT4-mixed": ActivationFormat(INT4, 128, 128),
    "INT8-apart": ActivationFormat(INT8, None, 128),
}


def make(form: WeightFormat, n: int = 24, k: int = 128, seed: int = 0):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    scales = form.choose(weight)
    return weight, assemble(scales, scales.encode(weight))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_codes_survive_packing(form: WeightFormat) -> None:
    _, quantized = make(form)
    restored = QuantLinear(quantized, None, INT8).quantized
    assert type(restored) is type(quantized)
    for name, value in vars(quantized).items():
        other = getattr(restored, name)
        assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value, name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_simulated_mode_is_a_float_layer_on_rounded_operands(form: WeightFormat, bias: bool) -> None:
    _, quantized = make(form)
    x, b = torch.randn(2, 5, 128), torch.randn(24) if bias else None
    expected = affine.quantize_per_token_s8(x).dequantize() @ quantized.dequantize().T
    expected = expected if b is None else expected + b
    torch.testing.assert_close(QuantLinear(quantized, b, INT8)(x), expected, rtol=1e-5, atol=1e-5)


def test_unquantised_activations_pass_unrounded() -> None:
    _, quantized = make(PER_CHANNEL)
    x = torch.randn(3, 128)
    for mode in Mode:
        layer = QuantLinear(quantized, None, None)
        layer.mode = mode
        assert torch.equal(layer(x), torch.nn.functional.linear(x, quantized.dequantize()))


@pytest.mark.parametrize("grid", [INT8, INT4])
def test_simulated_mode_uses_the_activation_grid(grid) -> None:
    _, quantized = make(PER_CHANNEL)
    x = torch.randn(3, 128)
    expected = affine.quantize_per_token_s8(x, grid).dequantize() @ quantized.dequantize().T
    torch.testing.assert_close(QuantLinear(quantized, None, grid)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_runtime_mode_is_the_reference_matmul_exactly(form: WeightFormat, bias: bool, dtype: torch.dtype) -> None:
    _, quantized = make(form)
    x, b = torch.randn(2, 5, 128).to(dtype), torch.randn(24) if bias else None
    layer = QuantLinear(quantized, b, INT8)
    layer.mode = Mode.RUNTIME
    out = layer(x)
    assert out.dtype == dtype
    if isinstance(quantized, Grouped):
        expected = reference.grouped_matmul(affine.quantize_per_token_s8(x), quantized, b)
    else:
        expected = reference.w4a8_matmul(x, quantized, b)
    assert torch.equal(out, expected.to(dtype))


@pytest.mark.parametrize("activations", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_pair_of_formats_computes_in_both_modes(form: WeightFormat, activations) -> None:
    """Groups of weights and activations need not coincide; RUNTIME is the rounded operands' product up to fp16."""
    _, quantized = make(form, k=256)
    layer, x = QuantLinear(quantized, None, activations), torch.randn(2, 5, 256)
    rounded = quantize_activations(x, activations).dequantize()
    exact = rounded.double() @ quantized.dequantize().double().T
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-4)
    layer.mode = Mode.RUNTIME
    # fp16 keeps 11 bits; the fp32 sum over pieces loses a little more where large terms cancel
    cancelled = 1e-5 * (rounded.double().abs() @ quantized.dequantize().double().abs().T)
    assert bool(((layer(x).double() - exact).abs() <= 2**-11 * exact.abs() + cancelled).all())


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 40),
    groups=st.integers(1, 4),
    tokens=st.integers(1, 9),
    kind=st.sampled_from(sorted(FORMS)),
    seed=st.integers(0, 2**31),
)
def test_modes_agree_up_to_fp16(n: int, groups: int, tokens: int, kind: str, seed: int) -> None:
    _, quantized = make(FORMS[kind], n, 128 * groups, seed)
    layer = QuantLinear(quantized, None, INT8)
    x = torch.randn(tokens, 128 * groups, generator=torch.Generator().manual_seed(seed))
    simulated = layer(x)
    layer.mode = Mode.RUNTIME
    # fp16 keeps 11 bits; the sum in fp32 loses a little more where large terms cancel
    cancelled = 1e-5 * (x.abs() @ quantized.dequantize().abs().T)
    assert bool(((layer(x) - simulated).abs() <= 2**-11 * simulated.abs() + cancelled + 1e-6).all())


def test_runtime_mode_does_not_exchange_the_activation_grid() -> None:
    """There is no 4-bit activation kernel: computing with 8 bits instead would flatter the result silently."""
    _, quantized = make(PROGRESSIVE)
    layer, x = QuantLinear(quantized, None, INT4), torch.randn(3, 128)
    layer.mode = Mode.RUNTIME
    expected = reference.w4a8_matmul(affine.quantize_per_token_s8(x, INT4), quantized)
    try:
        assert torch.equal(layer(x), expected.to(x.dtype))
    except (TypeError, ValueError) as error:
        assert "INT4" in str(error)


def test_the_dequantised_weight_follows_the_input_dtype() -> None:
    _, quantized = make(PROGRESSIVE)
    layer = QuantLinear(quantized, None, INT8)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float32):
        assert layer(torch.randn(2, 128, dtype=dtype)).dtype == dtype


def test_the_dequantised_weight_follows_the_device() -> None:
    _, quantized = make(PROGRESSIVE)
    layer = QuantLinear(quantized, None, None)
    layer(torch.randn(2, 128))
    layer.to("meta")(torch.empty(2, 128, device="meta"))
    assert all(t.device.type == "meta" for t in vars(layer).values() if isinstance(t, torch.Tensor))


def test_the_dequantised_weight_follows_loaded_codes() -> None:
    layers = [QuantLinear(make(PROGRESSIVE, seed=seed)[1], None, None) for seed in (0, 1)]
    x = torch.randn(2, 128)
    before, expected = layers[0](x), layers[1](x)
    layers[0].load_state_dict(layers[1].state_dict())
    assert not torch.equal(before, expected) and torch.equal(layers[0](x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_casting_a_model_leaves_codes_and_scales_alone(form: WeightFormat, dtype: torch.dtype) -> None:
    """``model.to(dtype)`` casts floating-point buffers, but scales rounded to bf16 would be other scales."""
    _, quantized = make(form)
    restored = QuantLinear(quantized, torch.randn(24), INT8).to(dtype).quantized
    for name, value in vars(quantized).items():
        if isinstance(value, torch.Tensor):
            other = getattr(restored, name)
            assert other.dtype == value.dtype and torch.equal(other, value), name


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_storage_is_the_formats_bits(form: WeightFormat) -> None:
    _, quantized = make(form, n=64, k=256)
    bits = form.bits_per_weight(256)
    assert QuantLinear(quantized, None, INT8).storage_bytes() * 8 == bits * 64 * 256


def test_print_says_what_a_layer_is() -> None:
    assert "8-bit per channel" in str(QuantLinear(make(PER_CHANNEL_INT8)[1], None, None))
    assert "128, 24, 4-bit progressive g128, activations INT8" in str(QuantLinear(make(PROGRESSIVE)[1], None, INT8))
    mixed = str(QuantLinear(make(MIXED)[1], None, ActivationFormat(INT4, 128, 128), OnlineHadamard(128)))
    assert "128, 24, 4-bit g128 + 4 INT8 outliers, activations INT4 g128 + 128 INT8" in mixed
    assert "OnlineHadamard(size=128)" in mixed


@pytest.mark.parametrize("mode", list(Mode))
def test_an_online_transform_comes_before_everything_and_is_stored(mode: Mode) -> None:
    _, quantized = make(PROGRESSIVE)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 128)
    for transform in (OnlineHadamard(4), OnlineReorder(order)):
        layer, plain = QuantLinear(quantized, None, INT8, transform), QuantLinear(quantized, None, INT8)
        layer.mode = plain.mode = mode
        assert torch.equal(layer(x), plain(transform(x))) and not torch.equal(layer(x), plain(x))
        half = copy.deepcopy(layer).to(torch.bfloat16)
        assert torch.equal(half(x), layer(x))
        stored = sum(t.nbytes for t in layer.state_dict().values())
        assert layer.storage_bytes() == stored > plain.storage_bytes()


# --- models ---------------------------------------------------------------------------------------------------------------


def installed(form: WeightFormat = PROGRESSIVE):
    model = wide("qwen2")
    attention.install(model)
    for block in describe(model).blocks:
        weights = {}
        for role, linear in block.linears():
            scales = form.choose(linear.weight.detach())
            weights[role] = assemble(scales, scales.encode(linear.weight.detach()))
        runtime.install(block, weights, Scheme(form, INT8, UINT4))
    return model


def test_install_replaces_all_linears_and_keeps_biases() -> None:
    model, original = installed(), wide("qwen2")
    for block, exact in zip(describe(model).blocks, describe(original).blocks, strict=True):
        for role, linear in block.linears():
            assert isinstance(linear, QuantLinear)
            bias = exact.linear(role).bias
            assert (linear.bias is None) == (bias is None)
            assert bias is None or torch.equal(linear.bias, bias)
        assert block.attention.qoq.grid is UINT4


def test_mode_is_set_everywhere_and_undone() -> None:
    model = installed()
    with runtime.mode(model, Mode.RUNTIME, prefill=3):
        for block in describe(model).blocks:
            assert (block.attention.qoq.mode, block.attention.qoq.prefill) == (Mode.RUNTIME, 3)
            assert all(linear.mode is Mode.RUNTIME for _, linear in block.linears())
    for block in describe(model).blocks:
        assert (block.attention.qoq.mode, block.attention.qoq.prefill) == (Mode.SIMULATED, None)
        assert all(linear.mode is Mode.SIMULATED for _, linear in block.linears())
    with pytest.raises(RuntimeError), runtime.mode(model, Mode.RUNTIME):
        raise RuntimeError
    assert describe(model).blocks[1].attention.qoq.mode is Mode.SIMULATED


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_modes_are_close_on_a_model(form: WeightFormat) -> None:
    model = installed(form)
    simulated = logits(model, IDS)
    with runtime.mode(model, Mode.RUNTIME, prefill=1):
        assert relative_error(logits(model, IDS), simulated) < 0.15
    assert torch.equal(logits(model, IDS), simulated)


def test_trial_quantisation_is_undone() -> None:
    model = wide("llama")
    attention.install(model)
    block = describe(model).blocks[0]
    before, linears = logits(model, IDS), dict(block.linears())
    weights = {}
    for role, linear in linears.items():
        scales = PER_CHANNEL.choose(linear.weight.detach())
        weights[role] = assemble(scales, scales.encode(linear.weight.detach()))
    with runtime.quantized(block, weights, Scheme(PER_CHANNEL, INT8, UINT4)):
        assert relative_error(logits(model, IDS), before) > 0.01
    assert dict(block.linears()) == linears and block.attention.qoq.grid is None
    assert torch.equal(logits(model, IDS), before)
    with pytest.raises(RuntimeError), runtime.quantized(block, weights, Scheme(PER_CHANNEL, INT8, UINT4)):
        raise RuntimeError
    assert torch.equal(logits(model, IDS), before)


@pytest.mark.parametrize("tied", [False, True])
def test_weight_bytes_of_an_unquantised_model(tied: bool) -> None:
    model = build("qwen3", tied=tied)
    assert runtime.weight_bytes(model) == 2 * sum(p.numel() for p in model.parameters())


def test_weight_bytes_count_codes_scales_and_16_bit_rest() -> None:
    model = installed()
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    rest = 2 * sum(p.numel() for p in model.parameters())
    stored = sum(t.numel() * t.element_size() for m in layers for t in m.buffers())
    assert runtime.weight_bytes(model) == rest + stored
    assert stored < 0.3 * 2 * sum(m.in_features * m.out_features for m in layers)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", list(Mode))
def test_defect_all_zero_token(family: str, mode: Mode, quantized) -> None:
    """A token whose activations are all zero gives 127 / 0 in the original: NaN or infinity, then junk codes."""
    model = copy.deepcopy(quantized(family, "rtn-w4a8kv4-g128").model)
    model.model.embed_tokens.weight.data[7] = 0
    ids = IDS.clone()
    ids[:, 3] = 7
    with runtime.mode(model, mode, prefill=1):
        assert bool(torch.isfinite(logits(model, ids)).all())
    zeros = QuantLinear(progressive.quantize(torch.randn(8, 128)), None, INT8)
    zeros.mode = mode
    out = zeros(torch.cat([torch.zeros(1, 128), torch.randn(1, 128)]))
    assert not bool(out[0].any()) and bool(out[1].any())


def test_biases_of_a_16_bit_model_do_not_change_the_output_dtype() -> None:
    model = cast_parameters(wide("qwen2"), torch.bfloat16)
    layer = QuantLinear(make(PROGRESSIVE)[1], torch.randn(24), INT8)
    assert layer(torch.randn(2, 128, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16


class Kernels:
    """What a layer uses of `qoqlab_kernels`, computed by the reference."""

    def __init__(self) -> None:
        self.packed = 0
        self.products = 0

    def pack_weight(self, weight):
        self.packed += 1
        if weight.shape[0] % 32 or not isinstance(weight, progressive.ProgressiveWeight):
            raise ValueError("weight: does not fit")
        return type("Packed", (), {"weight": weight, "device": weight.codes.device})()

    def quantize_activations(self, x):
        assert x.ndim == 2
        return affine.quantize_per_token_s8(x)

    def w4a8_gemm(self, x, scales, packed, bias):
        self.products += 1
        return reference.w4a8_matmul(x, packed.weight, bias)


def test_runtime_mode_takes_the_kernels_where_they_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    used = Kernels()
    monkeypatch.setattr(runtime, "kernels", lambda device: used)
    _, quantized = make(PROGRESSIVE, 32)
    layer = QuantLinear(quantized, torch.randn(32), ActivationFormat(INT8))
    x = torch.randn(2, 3, 128).half()
    layer(x)
    assert used.products == 0  # SIMULATED mode
    layer.mode = Mode.RUNTIME
    want = reference.w4a8_matmul(x, quantized, layer.bias)
    assert torch.equal(layer(x), want) and torch.equal(layer(x), want)
    assert (used.packed, used.products) == (1, 2)
    layer.float()
    assert torch.equal(layer(x), want) and used.packed == 2  # packed again where buffers may have moved
    with pytest.raises(ValueError, match="x: last dimension 64"):
        layer(x[..., :64])


@pytest.mark.parametrize(
    ("form", "n", "activations"),
    [(PROGRESSIVE, 24, INT8), (GROUPS, 32, INT8), (PROGRESSIVE, 32, INT4), (PROGRESSIVE, 32, ACTIVATIONS["INT4-clipped"])],
)
def test_other_layers_compute_by_the_reference(form, n: int, activations, monkeypatch: pytest.MonkeyPatch) -> None:
    _, quantized = make(form, n)
    x = torch.randn(3, 128)
    layer = QuantLinear(quantized, None, activations)
    layer.mode = Mode.RUNTIME
    want, used = layer(x), Kernels()
    monkeypatch.setattr(runtime, "kernels", lambda device: used)
    assert torch.equal(layer(x), want) and torch.equal(layer(x), want)
    assert used.products == 0 and used.packed <= 1


def test_the_kernels_are_for_gpus_and_may_be_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime.kernels(torch.device("cpu")) is None
    monkeypatch.setenv(runtime.CHOICE, "reference")
    assert runtime.kernels(torch.device("cuda")) is None
    monkeypatch.setenv(runtime.CHOICE, "fast")
    with pytest.raises(ValueError, match="QOQLAB_RUNTIME: expected kernels or reference, got 'fast'"):
        runtime.kernels(torch.device("cpu"))


def test_missing_kernels_are_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime._kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "qoqlab_kernels", None)
    try:
        with pytest.warns(RuntimeWarning, match="qoqlab_kernels: not usable"):
            assert runtime._kernels() is None
        assert runtime._kernels() is None
    finally:
        runtime._kernels.cache_clear()
