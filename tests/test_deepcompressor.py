"""model.pt and scale.pt of deepcompressor: both kinds of zeros, in both directions, against formulas written out here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qoqlab import formats, quantize
from qoqlab.architecture import describe
from qoqlab.deepcompressor import weight_of
from qoqlab.formats import CheckpointError, export_deepcompressor, import_deepcompressor
from qoqlab.grids import INT8, UINT4, Zero
from qoqlab.pipeline import QuantizedModel
from qoqlab.progressive import FirstLevel
from qoqlab.recipes import Recipe
from qoqlab.schemes import Scheme, WeightFormat, WeightKind

from .families import random_ids, wide

pytestmark = pytest.mark.filterwarnings("ignore:export_qserve")
IDS = random_ids(3, 12)
KINDS = {
    "g128": WeightFormat(WeightKind.PROGRESSIVE_U4),
    "g128-scaled": WeightFormat(WeightKind.PROGRESSIVE_U4, zero=Zero.SCALED),
    "channel": WeightFormat(WeightKind.CHANNEL_U4),
    "channel-scaled": WeightFormat(WeightKind.CHANNEL_U4, zero=Zero.SCALED),
    "w8a8": WeightFormat(WeightKind.CHANNEL_S8),
}


def rtn(form: WeightFormat, family: str = "llama", **config: object) -> QuantizedModel:
    return quantize(wide(family, **config), Recipe("rtn", Scheme(form, INT8, UINT4)), progress=False, report=False)


def linears(q: QuantizedModel):
    for block in describe(q.model).blocks:
        for role, layer in block.linears():
            yield block.name(role), layer


def write(q: QuantizedModel, folder: Path, zero_name: str = "zero", offset: int = 0) -> None:
    """model.pt and scale.pt as their specification has them: scales [N, 1, G, 1] in fp32, weights fake-quantised in fp16."""
    folder.mkdir(exist_ok=True)
    model = {n: p.detach().half() for n, p in q.model.named_parameters()}
    model["lm_head.weight"] = q.model.lm_head.weight.detach().half()
    scales = {}
    for name, layer in linears(q):
        w = layer.quantized
        if layer.bias is not None:
            model[f"{name}.bias"] = layer.bias.half()
        model[f"{name}.weight"] = w.dequantize(torch.float32).half()
        stored = {"scale.0": getattr(w, "channel_scales", None)}
        if stored["scale.0"] is None:
            stored = {"scale.0": w.scales, zero_name: w.zeros}
        else:
            stored |= {"scale.1": w.group_scales, zero_name: w.group_zeros}
        for part, tensor in stored.items():
            if tensor is not None:
                tensor = tensor.float().reshape(tensor.shape[0], 1, -1, 1)
                scales[f"{name}.weight.{part}"] = tensor - offset if part == "zero" else tensor
    torch.save(model, folder / "model.pt")
    torch.save(scales, folder / "scale.pt")
    config = json.loads(q.model.config.to_json_string())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [type(q.model).__name__]}))


def assert_same_weights(a: QuantizedModel, b: QuantizedModel) -> None:
    for (name, x), (_, y) in zip(linears(a), linears(b), strict=True):
        assert x.form == y.form, name
        assert all(torch.equal(t, y.get_buffer(n)) for n, t in x.named_buffers() if n != "bias"), name


# --- reading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_follow_from_weights_and_scales(kind: str, family: str, tmp_path: Path) -> None:
    form = KINDS[kind]
    q = rtn(form, family)
    write(q, tmp_path, "scaled_zero" if form.zero is Zero.SCALED else "zero")
    back = import_deepcompressor(tmp_path)
    assert_same_weights(q, back)
    # the files do not name the cache: 4 bits beside 4-bit weights
    assert back.recipe.scheme == Scheme(form, INT8, None if form.kind is WeightKind.CHANNEL_S8 else UINT4)
    assert torch.equal(back.model.model.embed_tokens.weight, q.model.model.embed_tokens.weight.half())


@pytest.mark.parametrize("kind", ["g128", "channel"])
def test_signed_zeros(kind: str, tmp_path: Path) -> None:
    """LMQuant can store codes and zeros as -8..7. A layer without negative zeros follows the others."""
    q = rtn(KINDS[kind])
    write(q, tmp_path, offset=8)
    scales = torch.load(tmp_path / "scale.pt", weights_only=True)
    name = "model.layers.0.self_attn.v_proj.weight"
    # this layer: codes shifted so that all its zeros are 0 or more when signed
    model = torch.load(tmp_path / "model.pt", weights_only=True)
    layer = dict(linears(q))[name.removesuffix(".weight")].quantized
    codes = layer.codes.clamp(max=7).int()  # whatever the codes, with a zero of 8 they decode to (code - 8) * scale
    step = (
        layer.scales.float()[:, None] if kind == "channel" else (layer.channel_scales[:, None] * layer.group_scales).float()
    )
    model[name] = ((codes - 8) * step).half()
    scales[f"{name}.zero"] = torch.zeros_like(scales[f"{name}.zero"])
    torch.save(model, tmp_path / "model.pt")
    torch.save(scales, tmp_path / "scale.pt")
    back = dict(linears(import_deepcompressor(tmp_path)))
    for other, expected in linears(q):
        if not name.startswith(other):
            assert torch.equal(back[other].quantized.codes, expected.quantized.codes)
    assert torch.equal(back[name.removesuffix(".weight")].quantized.codes.int(), codes)


def test_a_configuration_from_elsewhere(tmp_path: Path) -> None:
    q = rtn(KINDS["g128"])
    write(q, tmp_path / "quantised")
    (tmp_path / "quantised" / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"config.json: no such file"):
        import_deepcompressor(tmp_path / "quantised")
    assert_same_weights(q, import_deepcompressor(tmp_path / "quantised", tmp_path))
    assert_same_weights(q, import_deepcompressor(tmp_path / "quantised", tmp_path / "config.json"))


@pytest.mark.parametrize("kind", KINDS)
def test_converting_to_qserve(kind: str, tmp_path: Path) -> None:
    """deepcompressor -> engine: scales in the order that kernels read."""
    q = rtn(KINDS[kind])
    write(q, tmp_path / "dc", "scaled_zero" if KINDS[kind].zero is Zero.SCALED else "zero")
    formats.export_qserve(import_deepcompressor(tmp_path / "dc"), tmp_path / "engine")
    formats.export_qserve(q, tmp_path / "direct")
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("engine", "direct"))
    header = int.from_bytes(a[:8], "little"), int.from_bytes(b[:8], "little")
    assert a[8 + header[0] :] == b[8 + header[1] :]


def test_literal_values() -> None:
    """One group by hand: units -112..48, scale 16, zero 7 -> codes 0..10."""
    units = torch.tensor([[-112.0, -96.0, 0.0, 48.0]])
    form = WeightFormat(WeightKind.PROGRESSIVE_U4, 4, Zero.INTEGER, FirstLevel.UNROUNDED)
    scales = {"scale.0": torch.tensor([[0.125]]), "scale.1": torch.tensor([[16.0]]), "zero": torch.tensor([[7.0]])}
    w = weight_of(units * 0.125, scales, form)
    assert w.codes.tolist() == [[0, 1, 7, 10]] and w.int8().tolist() == [[-112, -96, 0, 48]]
    scaled = WeightFormat(WeightKind.PROGRESSIVE_U4, 4, Zero.SCALED)
    w = weight_of(units * 0.125, {**scales, "scaled_zero": torch.tensor([[112.0]])}, scaled)
    assert w.codes.tolist() == [[0, 1, 7, 10]] and w.group_zeros.tolist() == [[112]]


# --- writing --------------------------------------------------------------------------------------------------------------


def trt_codes(weight: torch.Tensor, scales: dict[str, torch.Tensor], name: str, group: int) -> torch.Tensor:
    """What TensorRT-LLM's converter computes: divide, round to INT8, add the scaled zero, divide, round."""
    n = weight.shape[0]
    y = weight / scales[f"{name}.scale.0"].reshape(n, 1)
    if f"{name}.scale.1" not in scales:
        return ((weight + scales[f"{name}.scaled_zero"].reshape(n, 1)) / scales[f"{name}.scale.0"].reshape(n, 1)).round()
    y = y.round().reshape(n, -1, group) + scales[f"{name}.scaled_zero"].reshape(n, -1, 1)
    return (y / scales[f"{name}.scale.1"].reshape(n, -1, 1)).round().reshape(weight.shape)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "w8a8"])
def test_tensorrt_llm_finds_the_same_codes(kind: str, tmp_path: Path) -> None:
    q = rtn(KINDS[kind])
    export_deepcompressor(q, tmp_path)
    model, scales = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("model", "scale"))
    assert {t.dtype for t in scales.values()} == {torch.float32} and {t.ndim for t in scales.values()} == {4}
    for name, layer in linears(q):
        assert torch.equal(trt_codes(model[f"{name}.weight"], scales, f"{name}.weight", 128), layer.quantized.codes.float())
        if "g128" in kind:  # TensorRT-LLM casts it to int8
            assert float(scales[f"{name}.weight.scaled_zero"].max()) <= 127
    assert {"lm_head.weight", "model.norm.weight"} <= model.keys()
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float16"


@pytest.mark.parametrize("preset", ["qoq-g128", "qoq-per-channel", "rtn-w8a8"])
def test_round_trip(preset: str, quantized, tmp_path: Path) -> None:
    q = quantized("qwen2", preset)
    export_deepcompressor(q, tmp_path)
    for (_, a), (_, b) in zip(linears(q), linears(import_deepcompressor(tmp_path)), strict=True):
        assert torch.equal(a.quantized.codes, b.quantized.codes)
        expected, actual = a.quantized.dequantize(), b.quantized.dequantize()
        if preset == "qoq-per-channel":  # zero * scale is stored in fp16, half a unit in 11 bits
            bound = (a.quantized.zeros.float() * a.quantized.scales.float())[:, None] * 2**-11 + 1e-7
            assert bool(((actual - expected).abs() <= bound).all())
        else:
            assert torch.equal(actual, expected)


def test_what_the_files_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="quantized: expected a QuantizedModel"):
        export_deepcompressor(wide("llama"), tmp_path)
    with pytest.raises(ValueError, match="group-u4 weights"):
        export_deepcompressor(rtn(WeightFormat(WeightKind.GROUP_U4)), tmp_path)
    model = wide("llama")
    # a row far from 0: fp16 weights cannot tell its steps apart
    model.model.layers[1].mlp.up_proj.weight.data[3] = 60.0 + 0.01 * torch.rand(128)
    q = quantize(model, Recipe("rtn", Scheme(KINDS["channel-scaled"], INT8)), progress=False, report=False)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj: (weights are not multiples|fp16 weights and scales)"):
        export_deepcompressor(q, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- damage ---------------------------------------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        ("scale", lambda s: s.pop(f"{Q}.scale.0"), r"q_proj.weight.scale.0: expected \[128, 1, 1, 1\], got nothing"),
        ("scale", lambda s: s.update({f"{Q}.zero": s[f"{Q}.zero"][:5]}), r"zero: expected \[128, 1, 1, 1\]"),
        (
            "scale",
            lambda s: s.update({f"{Q}.scale.0": s[f"{Q}.scale.0"] * 1.1}),
            "scale.0: values .* are not all torch.float16",
        ),
        ("scale", lambda s: s[f"{Q}.scale.0"].mul_(2), "weights are not multiples of their scales"),
        ("scale", lambda s: s[f"{Q}.scale.0"].zero_(), "scale.0: expected positive scales"),
        ("scale", lambda s: s[f"{Q}.scale.1"].add_(1), "weights are not multiples|codes .* are outside"),
        ("scale", lambda s: s[f"{Q}.scale.1"].fill_(float("nan")), "scale.1: values"),
        ("scale", lambda s: s[f"{Q}.zero"].fill_(16), "zero: expected at most 15"),
        ("scale", lambda s: s[f"{Q}.zero"].fill_(0), "codes .* are outside 0..15"),
        ("scale", lambda s: s.update({"other.scale.0": torch.ones(1, 1, 1, 1)}), r"unexpected tensors \['other.scale.0'\]"),
        ("scale", lambda s: s.update({f"{Q}.scaled_zero": s[f"{Q}.zero"]}), "has both zero and scaled_zero"),
        ("scale", lambda s: s.clear(), "got nothing"),
        ("model", lambda m: m.pop(Q), "q_proj"),
        ("model", lambda m: m.update({Q: m[Q].float() + 0.01}), "weights are not multiples of their scales"),
        ("model", lambda m: m.update({Q: m[Q].to(torch.int8)}), "expected float"),
        ("model", lambda m: m.update({Q: m[Q].to_sparse()}), "is not an ordinary one"),
        (
            "scale",
            lambda s: s.update({f"{Q}.zero": torch.zeros(1).expand(10**9, 10**3)}),
            "more elements than the file holds",
        ),
        ("model", lambda m: m.pop("model.norm.weight"), "missing tensors .*model.norm.weight"),
        ("model", lambda m: m.update(more=[1]), "expected a table of tensors"),
    ],
)
def test_damaged_files_are_refused(which: str, change, message: str, tmp_path: Path) -> None:
    write(rtn(KINDS["g128"]), tmp_path)
    content = torch.load(tmp_path / f"{which}.pt", weights_only=True)
    change(content)
    torch.save(content, tmp_path / f"{which}.pt")
    with pytest.raises(CheckpointError, match=message):
        import_deepcompressor(tmp_path)


def test_entries_without_a_value_are_absent(tmp_path: Path) -> None:
    q = rtn(KINDS["w8a8"])
    write(q, tmp_path)
    scales = torch.load(tmp_path / "scale.pt", weights_only=True)
    torch.save(scales | {f"{Q}.scaled_zero": None}, tmp_path / "scale.pt")
    assert_same_weights(q, import_deepcompressor(tmp_path))
