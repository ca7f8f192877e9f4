"""Export to compressed-tensors: literal words, an independent reading of the format, the package itself where installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qoqlab import quantize
from qoqlab.affine import Affine
from qoqlab.architecture import describe
from qoqlab.compressed_tensors import quantization_config, tensors_of
from qoqlab.formats import Layout, export_compressed_tensors
from qoqlab.grids import INT4, INT8, UINT4, Zero
from qoqlab.grouped import Grouped
from qoqlab.packing import pack_u4_words
from qoqlab.pipeline import QuantizedModel
from qoqlab.progressive import FirstLevel, ProgressiveWeight
from qoqlab.recipes import Recipe, get, names
from qoqlab.schemes import Scheme, WeightFormat, WeightKind

from .families import logits, random_ids, wide

IDS = random_ids(3, 12)
K = WeightKind
#: Scheme and layout -> whether the stored weights are exactly the model's.
CASES = {
    "progressive-w8a8": (Scheme(WeightFormat(K.PROGRESSIVE_U4), INT8, UINT4), Layout.W8A8, True),
    "progressive-scaled-w8a8": (Scheme(WeightFormat(K.PROGRESSIVE_U4, zero=Zero.SCALED), INT8), Layout.W8A8, True),
    "channel-u4-w8a8": (Scheme(WeightFormat(K.CHANNEL_U4), INT8, UINT4), Layout.W8A8, True),
    "channel-s4-w8a8": (Scheme(WeightFormat(K.CHANNEL_S4), INT8), Layout.W8A8, True),
    "channel-s8-w8a8": (Scheme(WeightFormat(K.CHANNEL_S8), INT8), Layout.W8A8, True),
    "progressive-w4a16": (Scheme(WeightFormat(K.PROGRESSIVE_U4, 64), INT8, UINT4), Layout.W4A16, False),
    "channel-u4-w4a16": (Scheme(WeightFormat(K.CHANNEL_U4), INT8), Layout.W4A16, True),
    "group-u4-w4a16": (Scheme(WeightFormat(K.GROUP_U4, 32)), Layout.W4A16, True),
    "group-s4-w4a16": (Scheme(WeightFormat(K.GROUP_S4)), Layout.W4A16, True),
    "group-s4-w4a8": (Scheme(WeightFormat(K.GROUP_S4), INT8), Layout.W4A8, True),
    "channel-s4-w4a8": (Scheme(WeightFormat(K.CHANNEL_S4), INT8), Layout.W4A8, True),
}


def rtn(scheme: Scheme, family: str = "llama", **config: object) -> QuantizedModel:
    return quantize(wide(family, **config), Recipe("rtn", scheme), progress=False, report=False)


def linears(q: QuantizedModel):
    for block in describe(q.model).blocks:
        for role, layer in block.linears():
            yield block.name(role), layer


# --- literal words --------------------------------------------------------------------------------------------------------


def test_words_by_hand() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 15, 0, 0, 0, 0, 0, 0, 15]], dtype=torch.uint8)
    assert [w & 0xFFFFFFFF for w in pack_u4_words(codes)[0].tolist()] == [0x87654321, 0xF000000F]
    with pytest.raises(ValueError, match="multiple of 8"):
        pack_u4_words(codes[:, :4])


def test_tensors_of_asymmetric_weights() -> None:
    """w = (code - zero) * scale; zeros of 8 rows share a word."""
    codes = torch.arange(8 * 8).reshape(8, 8).remainder(16).to(torch.uint8)
    zeros = torch.arange(8).to(torch.uint8)
    held = tensors_of(Affine(torch.ones(8).half(), zeros, UINT4, Zero.INTEGER, codes), Layout.W4A16)
    assert [w & 0xFFFFFFFF for w in held["weight_packed"][:2, 0].tolist()] == [0x76543210, 0xFEDCBA98]
    assert held["weight_zero_point"].tolist() == [[0x76543210]]
    assert held["weight_shape"].tolist() == [8, 8] and held["weight_shape"].dtype == torch.int64
    assert held["weight_scale"].tolist() == [[1.0]] * 8


def test_tensors_of_symmetric_weights_are_offset_by_8() -> None:
    codes = torch.arange(-7, 1).to(torch.int8).repeat(8, 1)
    held = tensors_of(Affine(torch.ones(8).half(), None, INT4, Zero.INTEGER, codes), Layout.W4A8)
    assert held["weight_packed"][0, 0].item() & 0xFFFFFFFF == 0x87654321 and "weight_zero_point" not in held


def test_tensors_of_progressive_weights() -> None:
    parts = (torch.full((8,), 0.5).half(), torch.full((8, 2), 3).to(torch.int8), torch.full((8, 2), 7).to(torch.uint8))
    weight = ProgressiveWeight(*parts, 8, Zero.INTEGER, FirstLevel.UNROUNDED, torch.full((8, 16), 9, dtype=torch.uint8))
    eight = tensors_of(weight, Layout.W8A8)
    assert eight["weight"].unique().tolist() == [6] and eight["weight_scale"].shape == (8, 1)
    four = tensors_of(weight, Layout.W4A16)
    assert four["weight_scale"].unique().tolist() == [1.5] and four["weight_scale"].shape == (8, 2)
    assert {w & 0xFFFFFFFF for w in four["weight_packed"].flatten().tolist()} == {0x99999999}


# --- files ----------------------------------------------------------------------------------------------------------------


def decode(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """fp32 weight from a checkpoint's tensors, word by word, as the format's documentation has it."""
    scale = state[f"{name}.weight_scale"].float()
    if f"{name}.weight" in state:
        return state[f"{name}.weight"].float() * scale
    shifts = 4 * torch.arange(8)
    codes = (state[f"{name}.weight_packed"].long()[..., None] >> shifts & 15).flatten(1).float()
    n, k = state[f"{name}.weight_shape"].tolist()
    assert codes.shape == (n, k)
    zeros = torch.full_like(scale, 8)
    if f"{name}.weight_zero_point" in state:
        words = state[f"{name}.weight_zero_point"].long()
        zeros = (words[:, None, :] >> shifts[:, None] & 15).flatten(0, 1).float()
    wide_zeros, wide_scale = (t.repeat_interleave(k // scale.shape[1], 1) for t in (zeros, scale))
    return (codes - wide_zeros) * wide_scale


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("case", CASES)
def test_weights_come_through(case: str, family: str, tmp_path: Path) -> None:
    scheme, layout, exact = CASES[case]
    q = rtn(scheme, family)
    export_compressed_tensors(q, tmp_path, layout)
    state = load_file(tmp_path / "model.safetensors")
    for name, layer in linears(q):
        expected, actual = layer.quantized.dequantize(), decode(state, name)
        if exact:
            assert torch.equal(actual, expected), name
        else:  # the product of both scales is rounded to fp16, half a unit in 11 bits
            assert bool(((actual - expected).abs() <= expected.abs() * 2**-11).all()), name
        if layer.bias is not None:
            assert torch.equal(state[f"{name}.bias"], layer.bias.half())
    others = {n for n in state if "proj" not in n}
    assert others == {n for n, _ in q.model.named_parameters() if "proj" not in n} | {"lm_head.weight"}
    assert all(state[n].dtype == torch.float16 for n in others)


@pytest.mark.parametrize("case", CASES)
def test_the_configuration_describes_the_tensors(case: str, tmp_path: Path) -> None:
    scheme, layout, _ = CASES[case]
    export_compressed_tensors(rtn(scheme, tied=True), tmp_path, layout)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == "float16" and config["tie_word_embeddings"] is False
    entry = config["quantization_config"]
    assert entry["quant_method"] == "compressed-tensors" and entry["ignore"] == ["lm_head"]
    assert entry["format"] == ("int-quantized" if layout is Layout.W8A8 else "pack-quantized")
    (group,) = entry["config_groups"].values()
    assert group["targets"] == ["Linear"]
    weights, state = group["weights"], load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    assert weights["num_bits"] == (8 if layout is Layout.W8A8 else 4)
    assert weights["symmetric"] == (f"{name}.weight_zero_point" not in state)
    groups = state[f"{name}.weight_scale"].shape[1]
    assert (weights["strategy"], weights["group_size"]) == (("channel", None) if groups == 1 else ("group", 256 // groups))
    activations = group["input_activations"]
    assert (activations is None) == (layout is Layout.W4A16)
    if activations:
        assert activations == {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("scheme", "layout"),
    [
        (CASES["progressive-w8a8"][0], Layout.W8A8),
        (CASES["channel-s8-w8a8"][0], Layout.W8A8),
        (CASES["group-u4-w4a16"][0], Layout.W4A16),
        (CASES["group-s4-w4a8"][0], Layout.W4A8),
    ],
)
def test_the_default_layout(scheme: Scheme, layout: Layout, tmp_path: Path) -> None:
    q = rtn(scheme)
    export_compressed_tensors(q, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"] == quantization_config(scheme.weights, layout)


@pytest.mark.parametrize("case", CASES)
def test_the_package_itself_reads_it(case: str, tmp_path: Path) -> None:
    """Decompressed by compressed-tensors, the weights are the model's; compressed again, the file's, byte for byte."""
    scheme, layout, exact = CASES[case]
    q = rtn(scheme)
    export_compressed_tensors(q, tmp_path, layout)
    require_package_reads(q, tmp_path, exact)


def test_a_preset_is_for_engines_w4a8(quantized, tmp_path: Path) -> None:
    q = quantized("llama", "gptq-w4a8-g128")
    export_compressed_tensors(q, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"] == quantization_config(WeightFormat(K.GROUP_S4), Layout.W4A8)
    state = load_file(tmp_path / "model.safetensors")
    for name, layer in linears(q):
        assert torch.equal(decode(state, name), layer.quantized.dequantize()), name
    require_package_reads(q, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = logits(q.model, IDS)  # the package rounds activations on a grid of its own, -128 to 127: 3 % of the logits
    assert float((logits(loaded, IDS) - ours).norm() / ours.norm()) < 0.1


@pytest.mark.parametrize("preset", sorted(set(names()) - {"gptq-w4a8-g128"}))
def test_no_other_preset_is(preset: str, tmp_path: Path) -> None:
    """What the documentation says of this layout."""
    recipe = get(preset)
    q = quantize(wide("llama"), recipe, IDS, progress=False, report=False)
    with pytest.raises(ValueError, match=r"quantized: |recipe: "):
        export_compressed_tensors(q, tmp_path, Layout.W4A8)


def require_package_reads(q: QuantizedModel, folder: Path, exact: bool = True) -> None:
    pytest.importorskip("compressed_tensors", minversion="0.15")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    group = QuantizationConfig.model_validate(entry).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(entry["format"])
    state = load_file(folder / "model.safetensors")
    for name, layer in linears(q):
        held = {n.removeprefix(f"{name}."): t for n, t in state.items() if n.startswith(f"{name}.")}
        assert held.keys() == set(compressor.compression_param_names(group))
        decompressed = compressor.decompress(held, group)
        if exact:
            assert torch.equal(decompressed["weight"], layer.quantized.dequantize(torch.float16)), name
        again = compressor.compress({n: t for n, t in decompressed.items() if n != "weight_shape"}, group)
        assert all(torch.equal(again[n], t) and again[n].dtype == t.dtype for n, t in held.items()), name


# --- refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "layout", "message"),
    [
        (Scheme(), None, "recipe: 'rtn' has unquantised weights"),
        (Scheme(WeightFormat(K.CHANNEL_U4), INT4), None, "'rtn' has INT4 activations; layout W8A8 is for INT8 ones"),
        (Scheme(WeightFormat(K.CHANNEL_U4), INT4), Layout.W4A16, "INT4 activations; layout W4A16 is for .*, or unquantised"),
        (Scheme(WeightFormat(K.CHANNEL_U4)), Layout.W8A8, "unquantised activations; layout W8A8"),
        (Scheme(WeightFormat(K.GROUP_U4), INT8), Layout.W8A8, "fp16 scales per group are no INT8 integers"),
        (Scheme(WeightFormat(K.CHANNEL_U4, zero=Zero.SCALED), INT8), Layout.W8A8, "real-valued zeros are no INT8 integers"),
        (Scheme(WeightFormat(K.CHANNEL_U4, zero=Zero.SCALED), INT8), Layout.W4A16, "integer zeros only"),
        (Scheme(WeightFormat(K.PROGRESSIVE_U4, zero=Zero.SCALED), INT8), Layout.W4A16, "integer zeros only"),
        (Scheme(WeightFormat(K.PROGRESSIVE_U4), INT8), Layout.W4A8, "weights have a zero; engines run W4A8 with symmetric"),
        (Scheme(WeightFormat(K.CHANNEL_S8), INT8), Layout.W4A16, "channel-s8 weights have codes beyond 4 bits"),
        (Scheme(WeightFormat(K.GROUP_S4, outliers=128), INT8), Layout.W4A8, "group-s4 weights have codes beyond 4 bits"),
    ],
)
def test_what_a_layout_cannot_hold(scheme: Scheme, layout: Layout | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export_compressed_tensors(rtn(scheme), tmp_path / "new", layout)
    assert not (tmp_path / "new").exists()


def test_wrong_arguments(quantized, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="quantized: expected a QuantizedModel, got LlamaForCausalLM"):
        export_compressed_tensors(wide("llama"), tmp_path)
    with pytest.raises(TypeError, match=r"layout: expected one of Layout.W8A8, Layout.W4A16, Layout.W4A8, got 'W4A16'"):
        export_compressed_tensors(rtn(CASES["group-u4-w4a16"][0]), tmp_path, "W4A16")
    q = quantized("llama", "quarot-w4a8kv4")
    with pytest.raises(ValueError, match=r"transforms its input at run time \(OnlineHadamard\)"):
        export_compressed_tensors(q, tmp_path)


def test_odd_shapes() -> None:
    scales = torch.ones(12, 1).half()
    weight = Grouped(scales, None, 8, 8, 0, INT4, Zero.INTEGER, torch.zeros(12, 8, dtype=torch.int8))
    with pytest.raises(ValueError, match="12x8 does not fill 32-bit words; N and K must be multiples of 8"):
        tensors_of(weight, Layout.W4A16)
