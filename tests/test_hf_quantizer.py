"""QoQ as a quantisation method of transformers."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.quantizers import auto

import qoqlab
from qoqlab import Mode, QoQConfig, hf_quantizer, perplexity, quantize, registration
from qoqlab.bundled import model_folder
from qoqlab.grids import INT8, UINT4
from qoqlab.hf import KV4Cache
from qoqlab.hf_quantizer import as_quantized
from qoqlab.recipes import PROGRESSIVE, Recipe, Step
from qoqlab.runtime import QuantLinear
from qoqlab.schemes import Scheme
from qoqlab.steps import rotate
from qoqlab.tensorfile import CheckpointError

from .families import FAMILIES, cast_parameters, logits, random_ids, wide
from .quick import QUICK, without_clipping

IDS = random_ids(4, 24)
CHANNEL = without_clipping("qoq-per-channel")
GREEDY = {"do_sample": False, "max_new_tokens": 6}


def load(path: Path, config: QoQConfig | None = None, **options: object) -> torch.nn.Module:
    if config is not None:  # transformers takes None for "not quantised", whatever config.json says
        options["quantization_config"] = config
    return AutoModelForCausalLM.from_pretrained(path, **options)


def require_same_tensors(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if ours[n].dtype != theirs[n].dtype or not torch.equal(ours[n], theirs[n])] == []


# --- quantise on load, save, load -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_load_equals_quantize_and_round_trips(family: str, tied: bool, tmp_path: Path) -> None:
    wide(family, tied=tied).save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain", QoQConfig(QUICK, calibration=IDS))
    expected = quantize(load(tmp_path / "plain"), QUICK, IDS, progress=False)
    require_same_tensors(model, expected.model)
    before = logits(model, IDS)
    assert torch.equal(before, logits(expected.model, IDS))

    model.save_pretrained(tmp_path / "quantised")
    again = load(tmp_path / "quantised")
    require_same_tensors(again, model)
    assert torch.equal(logits(again, IDS), before)
    assert sum(isinstance(m, QuantLinear) for m in again.modules()) == 14
    assert not any(p.requires_grad for p in again.parameters())
    sizes = [sum(f.stat().st_size for f in (tmp_path / name).glob("*.safetensors")) for name in ("plain", "quantised")]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("preset", qoqlab.recipes.names())
def test_every_preset_round_trips(preset: str, quantized, tmp_path: Path) -> None:
    result = quantized("qwen2", preset)
    hf_quantizer.save_pretrained(result, tmp_path)
    assert not hasattr(result.model.config, "quantization_config")
    again = load(tmp_path)
    require_same_tensors(again, result.model)
    assert torch.equal(logits(again, IDS), logits(result.model, IDS))
    loaded = as_quantized(again)
    assert perplexity(loaded, IDS, Mode.RUNTIME) == perplexity(result, IDS, Mode.RUNTIME)
    assert loaded.recipe == result.recipe


def test_half_precision_round_trips(tmp_path: Path) -> None:
    cast_parameters(wide("qwen2"), torch.bfloat16).save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain", QoQConfig(QUICK, calibration=IDS))
    model.save_pretrained(tmp_path / "quantised")
    again = load(tmp_path / "quantised")
    assert again.dtype == torch.bfloat16
    require_same_tensors(again, model)
    assert torch.equal(logits(again, IDS), logits(model, IDS))


def test_a_quantised_folder_can_be_saved_again(tmp_path: Path) -> None:
    wide("llama").save_pretrained(tmp_path / "0")
    load(tmp_path / "0", QoQConfig("rtn-w4a8kv4-g128")).save_pretrained(tmp_path / "1")
    load(tmp_path / "1").save_pretrained(tmp_path / "2")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_data_free_recipes_need_no_calibration(tmp_path: Path) -> None:
    wide("llama").save_pretrained(tmp_path)
    recipe = Recipe("rotated", Scheme(PROGRESSIVE, INT8, UINT4), (Step(rotate),), "test")
    model = load(tmp_path, QoQConfig(recipe))
    require_same_tensors(model, quantize(load(tmp_path), recipe, progress=False).model)


def test_calibration_from_a_text_file(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(qoqlab.load_text("python-docs", "calibration")[:20000])
    model = load(model_folder(), QoQConfig(CHANNEL, text=text, length=64, windows=4), dtype=torch.float32)
    plain, tokenizer = qoqlab.load_tiny()
    windows = qoqlab.tokens(tokenizer, text.read_text(), 64)
    chosen = windows[:: len(windows) // 4][:4]
    assert len(windows) > 8  # spread over the text, not its beginning
    require_same_tensors(model, quantize(plain, CHANNEL, chosen, progress=False).model)


def test_the_native_checkpoint_takes_it_too(tmp_path: Path) -> None:
    wide("llama").save_pretrained(tmp_path / "plain")
    result = as_quantized(load(tmp_path / "plain", QoQConfig(QUICK, calibration=IDS)))
    assert result.report.layer.tolist() == [0] * 5 + [1] * 5
    qoqlab.save(result, tmp_path / "native")
    again = qoqlab.load(tmp_path / "native")
    require_same_tensors(again.model, result.model)
    assert again.recipe == result.recipe


def test_device_map_with_disk_offload(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    wide("llama").save_pretrained(tmp_path / "plain")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "disk", "model.layers.1": "disk"}
    config = QoQConfig(QUICK, calibration=IDS)
    model = load(tmp_path / "plain", config, device_map=places, offload_folder=tmp_path / "offload")
    require_same_tensors(model, load(tmp_path / "plain", config))


# --- generation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_with_the_cache(family: str, tmp_path: Path) -> None:
    wide(family).save_pretrained(tmp_path / "plain")
    load(tmp_path / "plain", QoQConfig(QUICK, calibration=IDS)).save_pretrained(tmp_path / "quantised")
    model = load(tmp_path / "quantised")
    prompt = IDS[:2, :5]
    cache = KV4Cache()
    out = model.generate(prompt, past_key_values=cache, **GREEDY)
    assert out.shape == (2, 11) and cache.get_seq_length() == 10
    steps = KV4Cache()
    with torch.no_grad():
        first = model(prompt, past_key_values=steps).logits[:, -1].argmax(-1)
        second = model(first[:, None], past_key_values=steps).logits[:, -1].argmax(-1)
    assert torch.equal(out[:, 5:7], torch.stack([first, second], 1))
    in_integers = qoqlab.generate(as_quantized(model), prompt, **GREEDY)
    assert torch.equal(in_integers, qoqlab.generate(quantize(load(tmp_path / "plain"), QUICK, IDS), prompt, **GREEDY))


# --- what is written ------------------------------------------------------------------------------------------------------


def test_the_configuration_holds_the_recipe_and_no_data(tmp_path: Path) -> None:
    wide("llama").save_pretrained(tmp_path / "plain")
    load(tmp_path / "plain", QoQConfig(QUICK, calibration=IDS)).save_pretrained(tmp_path / "quantised")
    written = json.loads((tmp_path / "quantised" / "config.json").read_text())["quantization_config"]
    assert written.keys() == {"quant_method", "schema", "recipe", "digests", "sha256"}
    assert (written["quant_method"], written["schema"], written["recipe"]["name"]) == ("qoq", 2, QUICK.name)
    assert QoQConfig(**written).to_dict() == written
    stored = load_file(tmp_path / "quantised" / "model.safetensors")
    expected = {}
    for name, tensor in stored.items():
        content = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        text = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {content}"
        expected[name] = hashlib.sha256(text.encode()).hexdigest()
    assert written["digests"] == expected
    assert json.loads(QoQConfig().to_json_string()) == QoQConfig().to_dict()


QOQLAB_FIRST = """
import sys, qoqlab
def waiting(): return [finder for finder in sys.meta_path if type(finder).__module__ == "qoqlab.registration"]
assert "transformers" not in sys.modules and len(waiting()) == 1
import inspect, transformers.quantizers.auto as tables
assert "qoqlab.hf_quantizer" not in sys.modules and not waiting()
assert inspect.getsource(tables)  # the loader is the usual one
"""
TRANSFORMERS_FIRST = """
import transformers.quantizers.auto
import qoqlab
"""
LOAD = """
import transformers
model = transformers.AutoModelForCausalLM.from_pretrained({folder!r})
print([type(m).__name__ for m in model.modules()].count("QuantLinear"), type(model.config.quantization_config).__name__)
"""


@pytest.mark.parametrize("imports", [QOQLAB_FIRST, TRANSFORMERS_FIRST])
def test_importing_the_package_is_enough_whatever_comes_first(imports: str, saved: Path) -> None:
    code = imports + LOAD.format(folder=str(saved))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (run.stdout.strip(), run.returncode) == ("14 QoQConfig", 0), run.stderr


def test_a_method_of_somebody_else_is_kept_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "qoq", Fraction)
    registration.register()
    assert auto.AUTO_QUANTIZER_MAPPING["qoq"] is Fraction
    with pytest.raises(ImportError, match="transformers has a quantisation method 'qoq' of fractions already"):
        hf_quantizer._register()


def test_the_module_can_be_imported_again() -> None:
    try:
        importlib.reload(hf_quantizer)
    finally:
        for name in ("QoQConfig", "as_quantized"):  # this file's names belong to the first import
            globals()[name] = getattr(hf_quantizer, name)


# --- damage ---------------------------------------------------------------------------------------------------------------

CODES = "model.layers.1.mlp.up_proj.codes"


@pytest.fixture
def saved(quantized, tmp_path: Path) -> Path:
    """A folder that may be damaged; its layers have codes, scales, biases and, in o and down, online transforms."""
    hf_quantizer.save_pretrained(quantized("qwen2", "quarot-w4a4kv4"), tmp_path)
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def drop_digests(folder: Path) -> None:
    """What folders looked like before there were digests."""

    def change(config: dict) -> None:
        del config["quantization_config"]["digests"], config["quantization_config"]["sha256"]
        config["quantization_config"]["schema"] = 1

    edit(folder, change)


def as_of_schema_1(folder: Path) -> None:
    """What folders looked like when quantised parts alone had digests, of their bytes."""

    def change(config: dict) -> None:
        parts = ("codes", "scales", "zeros", "online.hadamard", "online.order")
        stored = load_file(folder / "model.safetensors")
        digests = {n: hashlib.sha256(t.numpy().tobytes()).hexdigest() for n, t in stored.items() if n.endswith(parts)}
        del config["quantization_config"]["sha256"]
        config["quantization_config"] |= {"schema": 1, "digests": digests}

    edit(folder, change)


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize(
    "name",
    [CODES, "model.layers.0.self_attn.q_proj.scales", "model.layers.0.self_attn.q_proj.bias", "model.norm.weight"],
)
def test_a_missing_tensor_is_named(name: str, digests: bool, saved: Path) -> None:
    rewrite(saved, lambda tensors: tensors.pop(name))
    if not digests:
        drop_digests(saved)
    with note(None if digests else "has no digests"), raises(f"{saved}: tensor {name} is missing"):
        load(saved)


def test_a_missing_online_transform_is_named(saved: Path) -> None:
    name = "model.layers.0.mlp.down_proj.online.hadamard"
    rewrite(saved, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=re.escape(f"{saved}: tensor {name} is missing")):
        load(saved)


def raises(message: str) -> AbstractContextManager:
    return pytest.raises(CheckpointError, match=re.escape(message))


def note(text: str | None) -> AbstractContextManager:
    return pytest.warns(UserWarning, match=text) if text else contextlib.nullcontext()


def flip(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors[name].view(torch.uint8).view(-1)[7].bitwise_xor_(1)


OTHERS = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.bias"]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", [CODES, CODES.replace("codes", "scales"), *OTHERS])
def test_a_flipped_bit_is_named_in_whatever_dtype_is_asked_for(name: str, dtype: torch.dtype | None, saved: Path) -> None:
    options = {"dtype": dtype} if dtype else {}
    assert load(saved, **options).dtype == (dtype or torch.float32)
    rewrite(saved, flip(name))
    with raises(f"{saved}: tensor {name}: SHA-256 differs"):
        load(saved, **options)


def test_folders_of_older_versions_load_and_say_what_they_lack(saved: Path) -> None:
    before = load(saved)
    as_of_schema_1(saved)
    with note("has digests of quantised parts alone"):
        require_same_tensors(load(saved), before)
    rewrite(saved, flip("model.norm.weight"))
    with note("has digests of quantised parts alone"):
        load(saved)
    rewrite(saved, flip(CODES))
    with note("has digests of quantised parts alone"), raises(f"{saved}: tensor {CODES}: SHA-256 differs"):
        load(saved)
    edit(saved, lambda config: config["quantization_config"].pop("digests"))
    with note("has no digests"):
        assert isinstance(load(saved).get_submodule(CODES.removesuffix(".codes")), QuantLinear)


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.embed_tokens.weight", lambda tensor: tensor.reshape(-1, 32)),
        (CODES, lambda tensor: tensor.T.contiguous()),
        (CODES, lambda tensor: tensor.view(torch.int8)),
        ("model.norm.weight", lambda tensor: tensor[:-1].clone()),
        ("model.norm.weight", lambda tensor: tensor.view(torch.int32)),
    ],
)
def test_other_shapes_and_dtypes_are_named(name: str, change: Callable, digests: bool, saved: Path) -> None:
    if not digests:
        drop_digests(saved)
    rewrite(saved, lambda tensors: tensors.update({name: change(tensors[name])}))
    with note(None if digests else "has no digests"), raises(f"{saved}: tensor {name}: "):
        load(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(rms_norm_eps=0.1),
        lambda config: config["rope_parameters"].update(rope_theta=20000.0),
        lambda config: config.pop("rms_norm_eps"),
        lambda config: config.update(dtype="float16"),
        lambda config: config["quantization_config"]["recipe"]["scheme"].update(activations="INT8"),
        lambda config: config["quantization_config"]["recipe"].update(name="qoq-g128"),
        lambda config: config["quantization_config"]["digests"].pop("model.norm.weight"),
    ],
)
def test_an_edited_configuration_is_refused(change: Callable[[dict], object], saved: Path) -> None:
    edit(saved, change)
    with raises(f"{saved / 'config.json'}: SHA-256 of what defines model and quantisation differs"):
        load(saved)
    drop_digests(saved)  # edited on purpose
    with note("has no digests"):
        load(saved)


def test_what_does_not_define_the_model_may_be_edited(saved: Path) -> None:
    before = load(saved)
    edit(saved, lambda config: config.update(eos_token_id=7, use_cache=False, transformers_version="6.0"))
    require_same_tensors(load(saved), before)


def test_offloaded_tensors_have_digests_too(saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    places = {"model.embed_tokens": "disk", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = load(saved, device_map=places, offload_folder=tmp_path / "offload", offload_buffers=True)
    assert model.get_input_embeddings().weight.is_meta
    with note("offloaded modules"):
        model.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_damage_is_found_where_layers_are_offloaded_to_disk(saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    options = {"device_map": places, "offload_folder": tmp_path / "offload", "offload_buffers": True}
    load(saved, **options)
    rewrite(saved, lambda tensors: tensors[CODES].view(-1)[0].bitwise_xor_(1))
    with pytest.raises(ValueError, match=re.escape(f"tensor {CODES}: SHA-256 differs")):
        load(saved, **options)


def test_digests_are_of_what_is_saved(saved: Path, tmp_path: Path) -> None:
    model = load(saved)
    assert model.config.quantization_config.digests == {}
    model.get_buffer(CODES).view(-1)[0] ^= 1
    model.save_pretrained(tmp_path / "again")
    require_same_tensors(load(tmp_path / "again"), model)


# --- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"recipe": "qoq"}, ValueError, "recipe: 'qoq' is not a preset"),
        ({"recipe": 3}, TypeError, "recipe: expected a preset's name or a Recipe, got int"),
        ({"recipe": {"name": "x"}}, ValueError, "recipe: not one that this version knows"),
        ({"calibration": [1]}, TypeError, "calibration: expected int64 tokens"),
        ({"calibration": IDS, "text": "a.txt"}, ValueError, "calibration: give tokens or text, not both"),
        ({"windows": 0}, ValueError, "windows: expected a positive integer, got 0"),
        ({"schema": 3}, ValueError, "got 'qoq' of schema 3"),
        (
            {"sha256": "ab"},
            ValueError,
            "sha256: expected the SHA-256 of digests and configuration, beside digests, got",
        ),
        ({"quant_method": "awq"}, ValueError, "got 'awq' of schema 2"),
        ({"digests": ["a"]}, ValueError, "digests: expected SHA-256 in hexadecimal by tensor name, got list"),
        ({"wbits": 4, "group_size": 128}, ValueError, "quantization_config: entries group_size, wbits are not of a model"),
    ],
)
def test_bad_configurations_are_named(arguments: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        QoQConfig(**arguments)


def test_missing_calibration_is_named_before_anything_is_read(tmp_path: Path) -> None:
    wide("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="calibration: recipe 'qoq-g128' looks at activations"):
        load(tmp_path, QoQConfig("qoq-g128"))


def test_text_without_a_tokenizer_or_file(tmp_path: Path) -> None:
    wide("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer"):
        load(tmp_path, QoQConfig("qoq-g128", text=__file__, length=16))
    with pytest.raises(ValueError, match=r"name: 'no/such/file\.txt' is not a text"):
        load(model_folder(), QoQConfig("qoq-g128", text="no/such/file.txt"))


def test_unsupported_models_are_named(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64)).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="model: GPT2LMHeadModel is not a supported architecture"):
        load(tmp_path, QoQConfig("rtn-w8a8"))


def test_only_its_own_models_are_quantised_ones() -> None:
    with pytest.raises(TypeError, match="model: LlamaForCausalLM was not loaded with a QoQConfig"):
        as_quantized(wide("llama"))
