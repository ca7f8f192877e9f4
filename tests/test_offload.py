"""Weights that stay on disk or offloaded until their block is due: the result is that of a model in memory, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from qoqlab import offload, perplexity, quantize
from qoqlab.architecture import describe
from qoqlab.pipeline import QuantizedModel
from qoqlab.recipes import Recipe

from .families import FAMILIES, cast_parameters, logits, random_ids, wide
from .quick import QUICK

IDS = random_ids(4, 24)


def written(model: torch.nn.Module, folder: Path, **options: object) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def require_same(result: QuantizedModel, expected: QuantizedModel) -> None:
    ours, theirs = state(result.model), state(expected.model)
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if ours[n].dtype != theirs[n].dtype or not torch.equal(ours[n], theirs[n])] == []
    assert not any(t.is_meta for t in [*result.model.parameters(), *result.model.buffers()])
    columns = ["stage", "layer", "weight_mse", "weight_nmse", "output_sqnr_db"]
    assert result.report[columns].equals(expected.report[columns])
    assert torch.equal(logits(result.model, IDS), logits(expected.model, IDS))
    assert result.model.config.tie_word_embeddings == expected.model.config.tie_word_embeddings


# --- from disk ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "preset", "tied"),
    [
        *((family, QUICK, i % 2 == 0) for i, family in enumerate(FAMILIES)),
        *(("llama", preset, tied) for preset in ("fp16", "rtn-w4a8kv4") for tied in (False, True)),
    ],
)
def test_from_disk_equals_in_memory(family: str, preset: str | Recipe, tied: bool, tmp_path: Path) -> None:
    model = wide(family, tied=tied)
    folder = written(model, tmp_path / "model")
    result = quantize(offload.open_model(folder), preset, IDS, inplace=True, progress=False)
    require_same(result, quantize(model, preset, IDS, progress=False))
    assert perplexity(result, IDS) > 1


def test_blocks_wait_on_disk_until_they_are_due(tmp_path: Path) -> None:
    model = offload.open_model(written(wide("llama", num_hidden_layers=3), tmp_path))
    assert all(p.is_meta for p in model.parameters()) and not model.training
    waiting = []

    def watch(blocks):
        for block in blocks:
            waiting.append([b.index for b in describe(model).blocks if any(p.is_meta for p in b.layer.parameters())])
            yield block

    quantize(model, QUICK, IDS, inplace=True, progress=watch)
    assert waiting == [[0, 1, 2], [1, 2], [2]]
    assert not hasattr(model, "qoq_storage")


def test_several_files_and_half_precision(tmp_path: Path) -> None:
    model = cast_parameters(wide("qwen2"), torch.bfloat16)
    folder = written(model, tmp_path, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    result = quantize(offload.open_model(folder), QUICK, IDS, inplace=True, progress=False)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    require_same(result, quantize(loaded, QUICK, IDS, progress=False))
    assert result.model.dtype == torch.bfloat16


def test_another_dtype_than_the_files(tmp_path: Path) -> None:
    folder = written(wide("llama"), tmp_path)
    result = quantize(offload.open_model(folder, torch.float16), "rtn-w8a8", IDS, inplace=True, progress=False)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    require_same(result, quantize(loaded, "rtn-w8a8", IDS, progress=False))


def test_the_files_may_change_afterwards(tmp_path: Path) -> None:
    folder = written(wide("llama"), tmp_path)
    result = quantize(offload.open_model(folder), QUICK, IDS, inplace=True, progress=False)
    before = logits(result.model, IDS)
    path = folder / "model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(logits(result.model, IDS), before)


def test_a_named_work_device_changes_nothing() -> None:
    model = wide("llama")
    result = quantize(offload.work_on(model, "cpu"), QUICK, IDS, progress=False)
    del model.qoq_storage
    require_same(result, quantize(model, QUICK, IDS, progress=False))


@pytest.mark.parametrize("preset", [QUICK, "smoothquant-w4a8kv4"])
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False), ("qwen3", True)])
def test_embedding_and_head_visit_the_work_device_too(family: str, tied: bool, preset: object, tmp_path: Path) -> None:
    """The CPU under its other name is another device to torch, so everything moves there and back."""
    expected = quantize(wide(family, tied=tied), preset, IDS, progress=False)
    folder = written(wide(family, tied=tied), tmp_path / "model")
    for model in (offload.open_model(folder, device="cpu:0", home="cpu"), offload.work_on(wide(family, tied=tied), "cpu:0")):
        result = quantize(model, preset, IDS, inplace=True, progress=False)
        require_same(result, expected)
        assert describe(result.model).tied == describe(expected.model).tied


# --- accelerate -----------------------------------------------------------------------------------------------------------

DISK = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}


def spread_over(places: dict[str, str], tied: bool = False) -> dict[str, str]:
    blocks = {f"model.layers.{i}": place for i, place in enumerate(places)}
    return DISK | blocks


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False), ("qwen3", True)])
def test_disk_offload_of_accelerate_equals_in_memory(family: str, tied: bool, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    folder = written(wide(family, tied=tied, num_hidden_layers=3), tmp_path / "model")
    places = spread_over(["disk", "cpu", "disk"])
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offload")
    assert sum(p.is_meta for p in model.parameters()) >= 2 * 9  # two blocks really are away
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(model, IDS), logits(plain, IDS))
    result = quantize(model, QUICK, IDS, inplace=True, progress=False)
    require_same(result, quantize(plain, QUICK, IDS, progress=False))
    assert not any(hasattr(m, "_hf_hook") for m in model.modules()) and not hasattr(model, "hf_device_map")
    result.model.save_pretrained(tmp_path / "saved")  # not taken for an offloaded one


def test_everything_on_disk(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    expected = quantize(wide("llama"), QUICK, IDS, progress=False)
    model = accelerate.disk_offload(wide("llama"), tmp_path / "offload", execution_device="cpu")
    assert all(p.is_meta for p in model.parameters())
    require_same(quantize(model, QUICK, IDS, inplace=True, progress=False), expected)


def test_cpu_offload(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    expected = quantize(wide("qwen3"), QUICK, IDS, progress=False)
    model = accelerate.cpu_offload(wide("qwen3"), execution_device="cpu")
    require_same(quantize(model, QUICK, IDS, inplace=True, progress=False), expected)


# --- bad input ------------------------------------------------------------------------------------------------------------


def test_offloaded_weights_need_inplace(tmp_path: Path) -> None:
    model = offload.open_model(written(wide("llama"), tmp_path))
    with pytest.raises(ValueError, match=r"inplace: weights that are offloaded .* pass inplace=True"):
        quantize(model, QUICK, IDS, progress=False)


@pytest.mark.parametrize("layer", [0, 1])
def test_bad_weights_on_disk_are_named_when_they_are_read(layer: int, tmp_path: Path) -> None:
    model = wide("llama")
    model.model.layers[layer].mlp.up_proj.weight.data[3, 4] = float("nan")
    lazy = offload.open_model(written(model, tmp_path))
    with pytest.raises(ValueError, match=rf"model weight model\.layers\.{layer}\.mlp\.up_proj\.weight: holds 1 NaN"):
        quantize(lazy, QUICK, IDS, inplace=True, progress=False)


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    folder = written(wide("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.ones(3)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model: model\.norm\.weight is \[3\] in .*, expected \[128\]"):
        offload.open_model(folder)
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model: .* lacks the tensor model\.norm\.weight"):
        offload.open_model(folder)
    (folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"model: .*model\.safetensors is not readable as safetensors"):
        offload.open_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model: there is no model\.safetensors in"):
        offload.open_model(folder)


@pytest.mark.parametrize(
    "index", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../b"}}', "x", '{"weight_map": {"a": 3}}']
)
def test_a_damaged_index_is_named(index: str, tmp_path: Path) -> None:
    folder = written(wide("llama"), tmp_path)
    (folder / offload.INDEX).write_text(index)
    with pytest.raises(ValueError, match=r"model: .*index\.json is not an index of tensors"):
        offload.open_model(folder)


def test_folders_without_a_supported_model(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"is neither a folder with a config\.json nor a repository in the local cache"
    ):
        offload.open_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing is downloaded here"):
        offload.open_model("nobody/no-such-model")
    folder = written(wide("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for change, kind, message in (
        ({"architectures": ["GPT2LMHeadModel"]}, TypeError, "GPT2LMHeadModel is not a supported architecture"),
        ({"quantization_config": {"quant_method": "fp8"}}, ValueError, "is quantised already"),
        ({"model_type": "nonsense"}, ValueError, r"has no usable config\.json"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(kind, match=message):
            offload.open_model(folder)


def test_generation_settings_are_kept(tmp_path: Path) -> None:
    model = wide("llama")
    model.generation_config.max_new_tokens = 3
    lazy = offload.open_model(written(model, tmp_path))
    assert isinstance(lazy, LlamaForCausalLM) and lazy.generation_config.max_new_tokens == 3
