"""QServe's layout: literal bytes, an independent reading of its kernels and loader, and everything that it cannot hold."""

from __future__ import annotations

import json
import re
import struct
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qoqlab import formats, perplexity, quantize, steps
from qoqlab.affine import Affine
from qoqlab.architecture import LINEARS, describe
from qoqlab.attention import Mode
from qoqlab.formats import CheckpointError, Engine, export_qserve, import_qserve
from qoqlab.grids import INT4, INT8, UINT4, UINT8, Zero
from qoqlab.kv import KVFormat
from qoqlab.packing import ScaleOrder, permute_qserve_scales, unpermute_qserve_scales
from qoqlab.pipeline import QuantizedModel
from qoqlab.progressive import FirstLevel, ProgressiveWeight
from qoqlab.qserve_format import limits, scale_order_errors, tensors_of, weight_of
from qoqlab.recipes import Recipe, Step
from qoqlab.schemes import Scheme, WeightFormat, WeightKind

from .families import LLAMA3_ROPE, build, logits, random_ids, wide

IDS = random_ids(3, 12)
#: Engine limits are warnings, and every tiny model meets some of them.
pytestmark = pytest.mark.filterwarnings("ignore:export_qserve")

G128 = Scheme(WeightFormat(WeightKind.PROGRESSIVE_U4), INT8, UINT4)
SCALED = Scheme(WeightFormat(WeightKind.PROGRESSIVE_U4, zero=Zero.SCALED), INT8, UINT4)
CHANNEL = Scheme(WeightFormat(WeightKind.CHANNEL_U4), INT8, UINT4)
CHANNEL_SCALED = Scheme(WeightFormat(WeightKind.CHANNEL_U4, zero=Zero.SCALED), INT8, UINT8)
EIGHT = Scheme(WeightFormat(WeightKind.CHANNEL_S8), INT8)
SCHEMES = {"g128": G128, "g128-scaled": SCALED, "channel": CHANNEL, "channel-scaled": CHANNEL_SCALED, "w8a8": EIGHT}


def rtn(scheme: Scheme, family: str = "llama", **config: object) -> QuantizedModel:
    return quantize(wide(family, **config), Recipe("rtn", scheme), progress=False, report=False)


def linears(q: QuantizedModel):
    for block in describe(q.model).blocks:
        for role, layer in block.linears():
            yield block.name(role), layer


def assert_same_weights(a: QuantizedModel, b: QuantizedModel) -> None:
    for (name, x), (_, y) in zip(linears(a), linears(b), strict=True):
        assert x.form == y.form, name
        for part, tensor in x.named_buffers():
            other = y.get_buffer(part)
            if part == "bias":
                assert torch.equal(tensor.half(), other.half()), name
            else:
                assert tensor.dtype == other.dtype and torch.equal(tensor, other), f"{name}.{part}"


def read(folder: Path) -> tuple[dict, dict[str, bytes]]:
    """A safetensors file by its specification alone: header and the bytes of every tensor."""
    raw = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    return header, {n: raw[8 + length + e["data_offsets"][0] : 8 + length + e["data_offsets"][1]] for n, e in header.items()}


# --- golden bytes ---------------------------------------------------------------------------------------------------------


def progressive(zero: Zero = Zero.INTEGER) -> ProgressiveWeight:
    """N = 32, K = 256 with values that differ along every axis, few enough to follow by hand."""
    n, k = torch.arange(32)[:, None], torch.arange(256)
    codes = ((3 * (n // 8) + k) % 16).to(torch.uint8)
    scales = torch.stack([1 + n[:, 0] % 16, 16 - n[:, 0] % 16], 1).to(torch.int8)  # group 0: 1..16, group 1: 16..1
    zeros = torch.stack([n[:, 0] % 8, 7 - n[:, 0] % 8], 1)
    channel = (0.5 + n[:, 0] / 64).half()
    return ProgressiveWeight(
        channel,
        scales,
        zeros.to(torch.uint8 if zero is Zero.INTEGER else torch.int8),
        128,
        zero,
        FirstLevel.UNROUNDED,
        codes,
    )


def test_golden_bytes_of_groups() -> None:
    held = {name: tensor.numpy().tobytes() for name, tensor in tensors_of(progressive()).items()}
    # lane 0 of the first tile: k = 0..3 and 16..19; low nibbles of channels 0 and 8, high ones of 16 and 24
    assert held["qweight"][:16].hex(" ", 4) == "60718293 93a4b5c6 60718293 93a4b5c6"
    assert len(held["qweight"]) == 32 * 256 // 2
    # fp16 0.5, 0.515625, 0.53125, little-endian
    assert held["s1_scales"][:6].hex(" ", 2) == "0038 2038 4038"
    # [K / 128, N]; stored channels 0, 8, 16, 24, 1, 9, 17, 25, ...; group 0 has 1 + n % 16
    assert held["s2_scales"][:8].hex(" ") == "01 09 01 09 02 0a 02 0a"
    assert held["s2_scales"][32:40].hex(" ") == "10 08 10 08 0f 07 0f 07"  # group 1 has 16 - n % 16
    # -(zero * scale) mod 256. Group 0, channels 0, 8, 16, 24: zero 0; 1, 9, 17, 25: zero 1, scales 2, 10, 2, 10;
    # 2, 10, 18, 26: zero 2, scales 3, 11, 3, 11
    assert held["s2_zeros"][:12].hex(" ") == "00 00 00 00 fe f6 fe f6 fa ea fa ea"
    # group 1: zero 7, scales 16, 8, 16, 8: -112, -56
    assert held["s2_zeros"][32:36].hex(" ") == "90 c8 90 c8"


def test_golden_bytes_of_scaled_zeros() -> None:
    """`Zero.SCALED` is in INT8 units already: only the sign changes."""
    held = tensors_of(progressive(Zero.SCALED))["s2_zeros"].numpy().tobytes()
    assert held[:12].hex(" ") == "00 00 00 00 ff ff ff ff fe fe fe fe"
    extreme = ProgressiveWeight(
        torch.ones(32).half(),
        torch.ones(32, 1).to(torch.int8),
        torch.full((32, 1), -128).to(torch.int8),  # an all-positive group: the negation wraps and means +128
        128,
        Zero.SCALED,
        FirstLevel.UNROUNDED,
        torch.zeros(32, 128, dtype=torch.uint8),
    )
    assert tensors_of(extreme)["s2_zeros"].unique().tolist() == [-128]


def test_golden_bytes_per_channel() -> None:
    codes = progressive().codes
    scales = torch.full((32,), 0.25).half()
    weight = Affine(scales, torch.arange(32).remainder(16).to(torch.uint8), UINT4, Zero.INTEGER, codes)
    held = {name: tensor.numpy().tobytes() for name, tensor in tensors_of(weight).items()}
    assert held["qweight"][:16].hex(" ", 4) == "60718293 93a4b5c6 60718293 93a4b5c6"
    # zero * scale: 0, 0.25, 0.5, 0.75, 1.0 in fp16; channels stay in order
    assert held["s1_szeros"][:10].hex(" ", 2) == "0000 0034 0038 003a 003c"
    real = Affine(scales, torch.full((32,), 0.1).half(), UINT4, Zero.SCALED, codes)
    assert tensors_of(real)["s1_szeros"].numpy().tobytes()[:4].hex(" ", 2) == "662e 662e"


def test_deepcompressors_order_by_hand() -> None:
    channels = torch.arange(64)[None]
    order = [*(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15)]
    order += [16 + c for c in order]
    wrong = permute_qserve_scales(channels, ScaleOrder.DEEPCOMPRESSOR)
    assert wrong[0].tolist() == order + [32 + c for c in order]
    assert torch.equal(unpermute_qserve_scales(wrong, ScaleOrder.DEEPCOMPRESSOR), channels)


# --- files, as an engine reads them ---------------------------------------------------------------------------------------

PARTS = {
    "g128": {"qweight": "I8", "s1_scales": "F16", "s2_scales": "I8", "s2_zeros": "I8"},
    "channel": {"qweight": "I8", "s1_scales": "F16", "s1_szeros": "F16"},
    "w8a8": {"weight": "I8", "dequant_scale": "F16"},
}


@pytest.mark.parametrize("kind", PARTS)
def test_names_shapes_and_dtypes(kind: str, tmp_path: Path) -> None:
    q = rtn(SCHEMES[kind], "qwen2")
    export_qserve(q, tmp_path)
    header, _ = read(tmp_path)
    expected = {"model.embed_tokens.weight": ("F16", [128, 128]), "lm_head.weight": ("F16", [128, 128])}
    expected["model.norm.weight"] = ("F16", [128])
    shapes = {"q": (128, 128), "k": (64, 128), "v": (64, 128), "o": (128, 128), "gate": (256, 128), "up": (256, 128)}
    shapes["down"] = (128, 256)
    for i in range(2):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            expected[f"model.layers.{i}.{norm}.weight"] = ("F16", [128])
        for role, (n, k) in shapes.items():
            name = f"model.layers.{i}.{LINEARS[role]}"
            sizes = {"qweight": [n, k // 2], "weight": [n, k], "s2_scales": [k // 128, n], "s2_zeros": [k // 128, n]}
            for part, dtype in PARTS[kind].items():
                expected[f"{name}.{part}"] = (dtype, sizes.get(part, [n]))
            if role in "qkv":
                expected[f"{name}.bias"] = ("F16", [n])
    assert {name: (e["dtype"], e["shape"]) for name, e in header.items()} == expected


class Engine4Bit:
    """What an engine does with a block: concatenate along N, then decode each lane's registers as the kernels do.

    Written from the description of the layout, in plain Python, without the library's packing.
    """

    def __init__(self, header: dict, data: dict[str, bytes]) -> None:
        self.header, self.data = header, data

    def fused(self, names: list[str], part: str) -> tuple[bytes, int]:
        """Concatenation along N: rows of most tensors, columns of second-level ones. Also the total N."""
        shapes = [self.header[f"{n}.{part}"]["shape"] for n in names]
        raw = [self.data[f"{n}.{part}"] for n in names]
        if part in ("s2_scales", "s2_zeros"):
            groups, total = shapes[0][0], sum(s[1] for s in shapes)
            rows = [b"".join(r[g * s[1] : (g + 1) * s[1]] for r, s in zip(raw, shapes, strict=True)) for g in range(groups)]
            return b"".join(rows), total
        return b"".join(raw), sum(s[0] for s in shapes)

    def codes(self, names: list[str]) -> torch.Tensor:
        packed, n = self.fused(names, "qweight")
        k = len(packed) * 2 // n
        out = torch.zeros(n, k, dtype=torch.int64)
        for address, byte in enumerate(packed):
            tile, inside = divmod(address, 512)
            (nt, kt), (lane, b) = divmod(tile, k // 32), divmod(inside, 16)
            row, column = 32 * nt + 8 * (b % 8 // 4) + lane // 4, 32 * kt + 16 * (b // 8) + 4 * (lane % 4) + b % 4
            out[row, column], out[row + 16, column] = byte & 15, byte >> 4
        return out

    def int8(self, names: list[str]) -> torch.Tensor:
        """INT8 weights of the per-group kernel: multiply, then add a byte, both modulo 256."""
        codes, (scales, n), (zeros, _) = self.codes(names), self.fused(names, "s2_scales"), self.fused(names, "s2_zeros")
        out = torch.zeros_like(codes)
        for row in range(n):
            position = 32 * (row // 32) + 4 * (row % 8) + row % 32 // 8
            for g in range(codes.shape[1] // 128):
                here = slice(128 * g, 128 * (g + 1))
                out[row, here] = (codes[row, here] * scales[g * n + position] + zeros[g * n + position]) % 256
        return torch.where(out > 127, out - 256, out)


@pytest.mark.parametrize("kind", ["g128", "g128-scaled"])
@pytest.mark.parametrize("roles", [("q", "k", "v"), ("gate", "up"), ("o",), ("down",)])
def test_an_engine_decodes_the_weights_of_groups(kind: str, roles: tuple[str, ...], tmp_path: Path) -> None:
    q = rtn(SCHEMES[kind])
    export_qserve(q, tmp_path)
    engine = Engine4Bit(*read(tmp_path))
    layers = dict(linears(q))
    names = [f"model.layers.1.{LINEARS[role]}" for role in roles]
    expected = torch.cat([layers[name].quantized.int8() for name in names])
    assert torch.equal(engine.int8(names), expected.long())


@pytest.mark.parametrize("kind", ["channel", "channel-scaled"])
def test_an_engine_computes_per_channel_layers(kind: str, tmp_path: Path) -> None:
    """``as * ws * sum(qx * qw) - szero * sum(x)``, as its kernel does, against the dequantised weights."""
    q = rtn(SCHEMES[kind])
    export_qserve(q, tmp_path)
    header, data = read(tmp_path)
    names = [f"model.layers.0.{LINEARS[role]}" for role in ("q", "k", "v")]
    codes = Engine4Bit(header, data).codes(names)
    scales, szeros = (
        torch.frombuffer(bytearray(b"".join(data[f"{n}.{part}"] for n in names)), dtype=torch.float16).double()
        for part in ("s1_scales", "s1_szeros")
    )
    layers = dict(linears(q))
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = x @ torch.cat([layers[n].quantized.dequantize(torch.float64) for n in names]).T
    actual = scales * (x @ codes.double().T) - szeros * x.sum(1, keepdim=True)
    # zero * scale is rounded to fp16, half a unit in 11 bits, times sums of 128 activations
    bound = szeros.abs() * x.sum(1, keepdim=True).abs() * 2**-11 + 1e-5
    assert bool(((actual - expected).abs() <= bound).all())


def test_the_configuration_serves_old_and_new_engines(tmp_path: Path) -> None:
    from transformers import AutoConfig

    q = rtn(G128, "llama", tied=True, rope_parameters=LLAMA3_ROPE | {"rope_theta": 500000.0})
    export_qserve(q, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "qoq", "wbits": 4, "group_size": 128}  # SGLang
    assert config["torch_dtype"] == config["dtype"] == "float16"
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"] is False
    # without this entry an engine on transformers 4 takes a theta of 10000
    assert config["rope_theta"] == 500000.0 and config["rope_scaling"]["rope_type"] == "llama3"
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == q.model.config.rope_parameters
    state = load_file(tmp_path / "model.safetensors")
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    export_qserve(rtn(CHANNEL, "qwen2"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["group_size"] == -1
    assert config["attention_bias"] is True and config["rope_scaling"] is None  # QServe allocates biases by the former
    export_qserve(rtn(EIGHT), tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_a_tokenizer_travels_along(tmp_path: Path) -> None:
    import qoqlab

    _, tokenizer = qoqlab.load_tiny()
    export_qserve(rtn(G128), tmp_path / "new", tokenizer)
    assert (tmp_path / "new" / "tokenizer.json").is_file()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["new"]


# --- import ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", SCHEMES)
def test_codes_and_scales_come_back(kind: str, family: str, tmp_path: Path) -> None:
    q = rtn(SCHEMES[kind], family)
    export_qserve(q, tmp_path)
    back = import_qserve(tmp_path)
    assert back.recipe == q.recipe
    assert_same_weights(q, back)
    assert back.model.dtype == torch.float16
    for name, parameter in back.model.named_parameters():
        assert torch.equal(parameter, q.model.get_parameter(name).half()), name


@pytest.mark.parametrize("preset", ["qoq-g128", "qoq-per-channel", "qoq-g128-gptq"])
def test_an_imported_model_is_usable(preset: str, quantized, tmp_path: Path) -> None:
    q = quantized("llama", preset)
    export_qserve(q, tmp_path)
    back = import_qserve(tmp_path)
    assert back.recipe == q.recipe
    a, b = (perplexity(m, IDS, Mode.RUNTIME) for m in (q, back))
    assert a == pytest.approx(b, rel=0.02)  # embeddings and head in fp16
    assert back.model.generate(IDS[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)
    formats.save(back, tmp_path / "native")
    assert_same_weights(formats.load(tmp_path / "native"), back)


@pytest.mark.parametrize("kind", SCHEMES)
def test_a_checkpoint_without_our_notes(kind: str, tmp_path: Path) -> None:
    """Of other tools: the kind of zeros follows from their values; norms, all ones, may be left out."""
    q = quantize(wide("llama"), Recipe("rotated", SCHEMES[kind], (Step(steps.rotate),)), IDS, progress=False, report=False)
    export_qserve(q, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({n: t for n, t in state.items() if "norm" not in n}, tmp_path / "model.safetensors")
    back = import_qserve(tmp_path)
    assert_same_weights(q, back)
    assert back.recipe.scheme == Scheme(SCHEMES[kind].weights, INT8, UINT4)
    assert bool((back.model.model.layers[0].input_layernorm.weight == 1).all())


@pytest.mark.parametrize("suffix", ["pt", "bin"])
def test_pickled_tensors_are_read_without_unpickling(suffix: str, tmp_path: Path) -> None:
    q = rtn(G128)
    export_qserve(q, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    torch.save(state, tmp_path / f"quant_model.{suffix}")
    (tmp_path / "model.safetensors").unlink()
    assert_same_weights(q, import_qserve(tmp_path))
    torch.save(state | {"evil": Path("x")}, tmp_path / f"quant_model.{suffix}")
    with pytest.raises(CheckpointError, match=rf"quant_model\.{suffix}: not readable as tensors"):
        import_qserve(tmp_path)


def test_several_files(tmp_path: Path) -> None:
    q = rtn(G128)
    export_qserve(q, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    names = sorted(state)
    (tmp_path / "model.safetensors").unlink()
    for i, part in enumerate((names[:9], names[9:])):
        save_file({n: state[n] for n in part}, tmp_path / f"model-{i}.safetensors")
    assert_same_weights(q, import_qserve(tmp_path))
    save_file({names[0]: state[names[0]]}, tmp_path / "model-2.safetensors")
    with pytest.raises(CheckpointError, match=r"model-2.safetensors: tensor .* is in model-0.safetensors, too"):
        import_qserve(tmp_path)


# --- deepcompressor's wrong order -----------------------------------------------------------------------------------------


def spoil(folder: Path, order: ScaleOrder = ScaleOrder.DEEPCOMPRESSOR) -> None:
    """Rewrite second-level tensors as deepcompressor's converter orders them, and drop our notes."""
    state = load_file(folder / "model.safetensors")
    for name, tensor in state.items():
        if name.endswith(("s2_scales", "s2_zeros")):
            state[name] = permute_qserve_scales(unpermute_qserve_scales(tensor), order).contiguous()
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["g128", "g128-scaled"])
def test_deepcompressors_order_is_found_and_repaired(kind: str, tmp_path: Path) -> None:
    q = rtn(SCHEMES[kind])
    export_qserve(q, tmp_path)
    spoil(tmp_path)
    with pytest.warns(UserWarning, match="per-group scales are in deepcompressor's wrong order; repaired"):
        assert_same_weights(q, import_qserve(tmp_path))
    assert_same_weights(q, import_qserve(tmp_path, ScaleOrder.DEEPCOMPRESSOR))
    spoil(tmp_path, ScaleOrder.QSERVE)  # already wrong: this leaves it neither way
    export_qserve(q, tmp_path)
    spoil(tmp_path, ScaleOrder.QSERVE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_weights(q, import_qserve(tmp_path))


def test_taken_at_its_word_the_wrong_order_decodes_wrongly(tmp_path: Path) -> None:
    q = rtn(G128)
    export_qserve(q, tmp_path)
    spoil(tmp_path)
    try:
        wrong = import_qserve(tmp_path, ScaleOrder.QSERVE)
    except CheckpointError as error:
        assert "would wrap in INT8; are scales in another order" in str(error)
    else:
        pairs = zip(linears(q), linears(wrong), strict=True)
        assert all(not torch.equal(a.quantized.int8(), b.quantized.int8()) for (_, a), (_, b) in pairs)


@pytest.mark.parametrize("zero", Zero)
@pytest.mark.parametrize("seed", range(5))
def test_the_right_order_fits_codes_far_better(zero: Zero, seed: int) -> None:
    from qoqlab import progressive as p

    weight = p.quantize(torch.randn(64, 256, generator=torch.Generator().manual_seed(seed)), zero=zero)
    tensors = tensors_of(weight)
    for order, other in zip(ScaleOrder, reversed(ScaleOrder), strict=True):
        stored = dict(tensors)
        for name in ("s2_scales", "s2_zeros"):
            stored[name] = permute_qserve_scales(unpermute_qserve_scales(tensors[name]), order)
        errors = scale_order_errors(stored)
        assert errors[order] < 0.5 * errors[other]


# --- what the layout or an engine cannot hold -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (Scheme(), "'mine' has unquantised weights; QServe holds progressive 4-bit weights in groups of 128"),
        (Scheme(kv=UINT4), "'mine' has unquantised weights"),
        (Scheme(WeightFormat(WeightKind.PROGRESSIVE_U4, 64), INT8), "progressive-u4 weights in groups of 64"),
        (Scheme(WeightFormat(WeightKind.GROUP_U4), INT8), "group-u4 weights in groups of 128"),
        (Scheme(WeightFormat(WeightKind.GROUP_S4, 64), INT8), "group-s4 weights"),
        (Scheme(WeightFormat(WeightKind.CHANNEL_S4), INT8), "channel-s4 weights"),
        (Scheme(G128.weights), "unquantised activations; QServe's are INT8, one scale per token"),
        (Scheme(G128.weights, INT4), "INT4 activations"),
        (
            Scheme(G128.weights, INT8, KVFormat(UINT4, rotate_keys=True)),
            "rotate_keys=True.*; QServe's cache is UINT4 or UINT8",
        ),
        (Scheme(G128.weights, INT8, KVFormat(UINT4, ratio=0.9)), "QServe's cache"),
    ],
)
def test_other_recipes_are_refused(scheme: Scheme, message: str, tmp_path: Path) -> None:
    q = quantize(wide("llama"), Recipe("mine", scheme), IDS, progress=False, report=False)
    with pytest.raises(ValueError, match=f"recipe: .*{message}"):
        export_qserve(q, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_online_transforms_are_refused(quantized, tmp_path: Path) -> None:
    q = quantized("llama", "quarot-w4a8kv4")
    q = QuantizedModel(q.model, Recipe("mine", G128), q.report)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.o_proj transforms its input at run time \(OnlineHadamard\)"):
        export_qserve(q, tmp_path)


def test_shapes_that_do_not_tile_are_refused(tmp_path: Path) -> None:
    model = build("llama", hidden_size=128, intermediate_size=256, head_dim=8, kv_heads=2)
    q = quantize(model, Recipe("mine", CHANNEL), progress=False, report=False)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.k_proj: codes: 16x128 does not split into 32x32 tiles"):
        export_qserve(q, tmp_path)


def test_values_beyond_fp16_are_refused(tmp_path: Path) -> None:
    q = rtn(G128)
    q.model.model.embed_tokens.weight[3, 4] = 1e5
    with pytest.raises(ValueError, match=r"embed_tokens.weight reaches 100000.0, engines of this format compute in fp16"):
        export_qserve(q, tmp_path)
    weight = Affine(
        torch.full((32,), 6e4).half(), torch.full((32,), 15).to(torch.uint8), UINT4, Zero.INTEGER, progressive().codes
    )
    with pytest.raises(ValueError, match=r"zero \* scale reaches 900000.0, more than fp16 holds"):
        tensors_of(weight)


def test_only_quantised_models(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="quantized: expected a QuantizedModel, got LlamaForCausalLM"):
        export_qserve(build("llama"), tmp_path)
    with pytest.raises(TypeError, match=r"engine: expected one of Engine.QSERVE, Engine.SGLANG, got 'vllm'"):
        export_qserve(rtn(G128), tmp_path, engine="vllm")
    with pytest.raises(TypeError, match="scale_order: expected one of"):
        import_qserve(tmp_path, "qserve")


def eight_heads(**config: object) -> QuantizedModel:
    """A geometry that QServe's kernels take: heads of 128, all sizes multiples of 128."""
    sizes = {"hidden_size": 256, "num_attention_heads": 2, "intermediate_size": 256, "head_dim": 128}
    model = build("llama", kv_heads=1, **(sizes | config))
    return quantize(model, Recipe("rotated", G128, (Step(steps.rotate),)), IDS, progress=False, report=False)


def test_a_model_without_limits_warns_of_nothing(tmp_path: Path) -> None:
    q = eight_heads()
    assert limits(q) == {Engine.QSERVE: [], Engine.SGLANG: []}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for engine in (None, *Engine):
            export_qserve(q, tmp_path, engine=engine)


def test_limits_of_engines_are_named() -> None:
    def reasons(q: QuantizedModel, engine: Engine = Engine.QSERVE) -> str:
        return "; ".join(limits(q)[engine])

    assert "skips norm gains, and model.layers.0.input_layernorm.weight is not all ones" in reasons(rtn(G128))
    assert "attention kernels for heads of 128, not 32" in reasons(rtn(G128))
    assert "whole tiles of 128 channels and inputs only: model.layers.0.self_attn.k_proj 64x128" in reasons(rtn(G128))
    assert "Llama and Mistral only, not Qwen3ForCausalLM (and skips the QK-norms of Qwen3)" in reasons(rtn(G128, "qwen3"))
    assert reasons(eight_heads(rope_parameters=LLAMA3_ROPE)) == "ignores rope scaling, here llama3"
    assert "takes hidden_size / heads for the head size, here 128, not 256" in reasons(eight_heads(head_dim=256))
    assert reasons(rtn(EIGHT), Engine.SGLANG) == "reads 4-bit weights only under quant_method qoq"
    assert reasons(rtn(G128, "qwen3"), Engine.SGLANG) == ""


def test_limits_are_warnings_or_errors(tmp_path: Path) -> None:
    q = rtn(G128)
    with pytest.warns(UserWarning, match="export_qserve: QServe skips norm gains"):
        export_qserve(q, tmp_path / "a")
    with pytest.raises(ValueError, match="export_qserve: QServe skips norm gains"):
        export_qserve(q, tmp_path / "b", engine=Engine.QSERVE)
    assert not (tmp_path / "b").exists()
    export_qserve(q, tmp_path / "b", engine=Engine.SGLANG)


# --- damaged checkpoints --------------------------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(f"{Q}.s2_zeros"), f"{Q}.s2_zeros is missing|KeyError"),
        (lambda s: s.update({f"{Q}.qweight": s[f"{Q}.qweight"][:-32]}), rf"{Q}.qweight: expected torch.int8 \[128, 64\]"),
        (lambda s: s.update({f"{Q}.s1_scales": s[f"{Q}.s1_scales"].float()}), f"{Q}.s1_scales: expected torch.float16"),
        (lambda s: s.update({f"{Q}.s1_scales": s[f"{Q}.s1_scales"] / 0}), "s1_scales: holds"),
        (lambda s: s[f"{Q}.s2_scales"].zero_(), r"s2_scales: expected 1..127, got 0"),
        (lambda s: s[f"{Q}.s2_scales"].fill_(127), "would wrap in INT8; are scales in another order"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected tensors .*extra"),
        (lambda s: s.pop("model.embed_tokens.weight"), "missing tensors .*embed_tokens"),
    ],
)
def test_damaged_checkpoints_are_refused(change, message: str, tmp_path: Path) -> None:
    export_qserve(rtn(G128), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        import_qserve(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(architectures=["GPT2LMHeadModel"]), "'GPT2LMHeadModel' is not supported"),
        (lambda c: c.update(architectures=[]), "architectures: expected a list of one name"),
        (lambda c: c.update(num_hidden_layers=10**9), "num_hidden_layers"),
        (lambda c: c.update(hidden_size=256), "config: describes"),
        (lambda c: c.pop("num_attention_heads"), "config: describes"),
        (lambda c: c.update(torch_dtype="os"), "dtype"),
    ],
)
def test_nonsense_in_a_configuration_is_refused(change, message: str, tmp_path: Path) -> None:
    export_qserve(rtn(G128), tmp_path)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")  # drops our notes
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("dtype")
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        import_qserve(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "was"),
    [
        ("rope_theta", 20000.0, "10000.0"),
        ("rms_norm_eps", 0.1, "1e-06"),
        ("num_attention_heads", 8, "4"),
        ("model_type", "mistral", '"llama"'),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}, "null"),
        ("sliding_window", 4, "absent"),
    ],
)
def test_an_edited_configuration_of_our_own_export_is_refused(name: str, value: object, was: str, tmp_path: Path) -> None:
    export_qserve(rtn(G128), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
    message = f"{tmp_path / 'config.json'}: {name} is {json.dumps(value)}, was {was} when the weights were exported"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        import_qserve(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": 5, "torch_dtype": "bfloat16"}))
    import_qserve(tmp_path)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")  # an older version's export
    (tmp_path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert import_qserve(tmp_path).model.config.rms_norm_eps == 0.1


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json: no such file"):
        import_qserve(tmp_path)
    export_qserve(rtn(G128), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no \*.safetensors, \*.pt or \*.bin file"):
        import_qserve(tmp_path)


def test_zeros_of_the_wrong_kind_are_refused() -> None:
    tensors = tensors_of(progressive(Zero.SCALED))
    with pytest.raises(ValueError, match=r"zeros are not whole multiples 0..15 of the scales"):
        weight_of(tensors, G128.weights, ScaleOrder.QSERVE)


def test_logits_of_an_imported_model_are_those_of_its_fp16_parts(tmp_path: Path) -> None:
    """With unquantised parts in fp16 already, nothing is lost at all."""
    q = quantize(wide("llama").half(), "rtn-w4a8kv4-g128", IDS, progress=False, report=False)
    export_qserve(q, tmp_path)
    back = import_qserve(tmp_path)
    q.model.model.rotary_emb.inv_freq = back.model.model.rotary_emb.inv_freq  # `half` rounded the saved one
    assert torch.equal(logits(back.model, IDS), logits(q.model, IDS))
