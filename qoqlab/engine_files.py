"""What exports to engines and imports from them share: fp16 tensors, configurations of two generations, files of weights."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import runtime
from .architecture import defining, describe
from .pipeline import QuantizedModel
from .rebuild import empty_model, recipe_from_json, recipe_to_json
from .recipes import Recipe
from .tensorfile import (
    CheckpointError,
    LazyTensors,
    TensorFile,
    digest_of_tensor,
    open_plain,
    parse_json,
    read_json,
    staged,
    write_json,
    write_tensors,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Keys of our recipe, of tensors' SHA-256 and of the configuration's entries that define the model among a safetensors
#: file's metadata; engines ignore them.
_RECIPE, _DIGESTS, _CONFIG = "qoqlab_recipe", "qoqlab_sha256", "qoqlab_config"
#: Files that engines do not take for weights either.
_NOT_WEIGHTS = re.compile(r"training_args\.bin|(optimizer|scheduler|scaler)\.(bin|pt)")


# --- export ---------------------------------------------------------------------------------------------------------------


def quantized_layers(quantized: QuantizedModel) -> Iterator[tuple[str, runtime.QuantLinear]]:
    """``(path, layer)`` of all linears in blocks; ValueError for one that is not quantised or transforms its input."""
    for block in describe(quantized.model).blocks:
        for role, layer in block.linears():
            if not isinstance(layer, runtime.QuantLinear):
                raise ValueError(
                    f"quantized: {block.name(role)} is not quantised; engines expect all linears of a block to be"
                )
            if layer.online is not None:
                kind = type(layer.online).__name__
                raise ValueError(f"quantized: {block.name(role)} transforms its input at run time ({kind}); no engine does")
            yield block.name(role), layer


def float_tensors(quantized: QuantizedModel) -> dict[str, torch.Tensor]:
    """Everything but quantised weights in fp16 under its Hugging Face name, the head as a tensor of its own.

    Raises ValueError naming a tensor that fp16 cannot hold.
    """
    model = quantized.model
    state = {name: p.detach() for name, p in model.named_parameters()}
    state["lm_head.weight"] = describe(model).head.weight.detach()
    for path, layer in quantized_layers(quantized):
        if layer.bias is not None:
            state[f"{path}.bias"] = layer.bias.detach()
    halves = {name: tensor.half() for name, tensor in state.items()}
    for name, tensor in halves.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"quantized: {name} reaches {float(state[name].abs().max())}, engines of this format compute in fp16"
            )
    return halves


def engine_config(quantized: QuantizedModel) -> dict[str, Any]:
    """``config.json`` for engines old and new.

    transformers 5 keeps RoPE in ``rope_parameters``; engines built on older releases look for ``rope_theta`` and
    ``rope_scaling`` and silently fall back to a theta of 10000. Both are written. QServe allocates biases by
    ``attention_bias`` alone.
    """
    model: Any = quantized.model
    config = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("quantization_config", None)
    config.update(architectures=[type(model).__name__], tie_word_embeddings=False, dtype="float16", torch_dtype="float16")
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    config["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    if describe(model).blocks[0].linear("q").bias is not None:
        config["attention_bias"] = True
    return config


def write_export(
    folder: str | os.PathLike[str],
    state: Mapping[str, torch.Tensor],
    config: dict[str, Any],
    quantized: QuantizedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Write ``model.safetensors``, its metadata with recipe, digests and what defines the model, in an `export_folder`."""
    try:
        recipe = recipe_to_json(quantized.recipe)
    except ValueError:  # a step that nobody could look up; the formats are what matters
        recipe = recipe_to_json(replace(quantized.recipe, steps=()))
    digests = {name: digest_of_tensor(tensor.cpu()) for name, tensor in state.items()}
    metadata = {"format": "pt", _RECIPE: json.dumps(recipe), _DIGESTS: json.dumps(digests)}
    metadata[_CONFIG] = json.dumps(defining(config))
    with export_folder(folder, config, quantized, tokenizer) as temporary:
        write_tensors(temporary / "model.safetensors", state, metadata)


@contextmanager
def export_folder(
    folder: str | os.PathLike[str],
    config: dict[str, Any],
    quantized: QuantizedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Iterator[Path]:
    """A temporary folder for an export's weights, which becomes ``folder`` together with configurations and tokenizer.

    A new folder appears complete or not at all. In one that is there, ``config.json``, without which nothing loads, is
    removed first and comes back last, so that a kill leaves no mixture of old and new.
    """
    model: Any = quantized.model
    path = Path(folder)
    with staged(path, last="config.json") as temporary:
        yield temporary
        write_json(temporary / "generation_config.json", json.loads(model.generation_config.to_json_string()))
        write_json(temporary / "config.json", config)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        (path / "config.json").unlink(missing_ok=True)


# --- import ---------------------------------------------------------------------------------------------------------------


def model_of_config(config: dict[str, Any], state: MutableMapping[str, torch.Tensor], folder: Path) -> nn.Module:
    """A model without memory from a ``config.json``; tied only where the head is missing.

    ``folder`` may hold a ``generation_config.json``. Raises whatever transformers raises for nonsense.
    """
    from transformers import GenerationConfig

    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise ValueError(f"architectures: expected a list of one name, got {architectures!r}")
    config = {**config, "tie_word_embeddings": "lm_head.weight" not in state}
    size = state.size if isinstance(state, LazyTensors) else sum(t.numel() * t.itemsize for t in state.values())
    model: Any = empty_model(architectures[0], config, state, size)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_dict(read_json(folder / "generation_config.json"))
    return model


@contextmanager
def open_state(folder: Path) -> Iterator[tuple[MutableMapping[str, torch.Tensor], dict[str, str]]]:
    """All tensors of a folder, lazily where they are safetensors, and the first file's metadata.

    Exports of our own carry digests, which are checked; other tools' have none.
    """
    paths = sorted(folder.glob("*.safetensors"))
    with ExitStack() as stack:
        if paths:
            files = [stack.enter_context(TensorFile(path)) for path in paths]
            digests: dict[str, str] = {}
            for file in files:
                if _DIGESTS in file.metadata:
                    noted = parse_json(file.metadata[_DIGESTS].encode(), f"{file.path}: {_DIGESTS}")
                    if noted.keys() != file.entries.keys():
                        raise CheckpointError(f"{file.path}: {_DIGESTS} and tensors have other names; damaged or edited")
                    digests.update(noted)
            yield LazyTensors(files, digests), files[0].metadata
            return
        paths = [p for p in sorted([*folder.glob("*.pt"), *folder.glob("*.bin")]) if not _NOT_WEIGHTS.fullmatch(p.name)]
        if not paths:
            raise CheckpointError(f"{folder}: has no *.safetensors, *.pt or *.bin file")
        state: dict[str, torch.Tensor] = {}
        for path in paths:
            loaded = load_tensors(path)
            if twice := state.keys() & loaded.keys():
                raise CheckpointError(f"{path}: tensor {min(twice)} is in another file, too")
            state.update(loaded)
        yield state, {}


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that ``torch.save`` wrote, on the CPU. Only tensors are unpickled; anything else is refused,
    before memory is allocated also what would grow beyond the file's size.

    Entries without a value, which deepcompressor writes for absent zeros, are left out.
    """
    with open_plain(path) as file:
        try:
            _require_stored(file)
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises pickle, zip, key, type and runtime errors for damaged or hostile files
            raise CheckpointError(f"{path}: not readable as tensors ({type(error).__name__}: {error})") from error
    if isinstance(loaded, dict):
        loaded = {name: value for name, value in loaded.items() if value is not None}
    if not isinstance(loaded, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in loaded.items()
    ):
        raise CheckpointError(f"{path}: expected a table of tensors by name")
    for name, tensor in loaded.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.is_meta:
            raise CheckpointError(f"{path}: tensor {name} is not an ordinary one")
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():  # strides of 0 make terabytes of one number
            raise CheckpointError(f"{path}: tensor {name} has more elements than the file holds")
    return {name: tensor.detach() for name, tensor in loaded.items()}


def _require_stored(file: BufferedReader) -> None:
    """An archive as ``torch.save`` writes it since torch 1.6 (2020): nothing compressed, nothing twice.

    A compressed one can hold a thousand times its size in zeros, and the format before it names sizes that nothing bears
    out before they are allocated.
    """
    if not zipfile.is_zipfile(file):
        raise ValueError("expected the zip format that torch writes since version 1.6")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in entries):
        raise ValueError("has compressed entries, which torch does not write")
    size, held = sum(entry.file_size for entry in entries), file.seek(0, os.SEEK_END)
    if size > held:
        raise ValueError(f"claims {size:,} bytes in a file of {held:,}")
    file.seek(0)


def recorded_recipe(metadata: Mapping[str, str]) -> Recipe | None:
    """The recipe that `write_export` noted."""
    text = metadata.get(_RECIPE)
    return None if text is None else recipe_from_json(parse_json(text.encode(), "metadata"))


def require_recorded(config: Mapping[str, Any], metadata: Mapping[str, str], path: Path) -> None:
    """Raise CheckpointError where ``config.json`` defines another model than the one that `write_export` noted.

    Exports of older versions, and other tools', have no note. An edited dtype is let pass: tensors have their own.
    """
    if _CONFIG not in metadata:
        return
    noted, found = parse_json(metadata[_CONFIG].encode(), "metadata"), defining(config)
    for name in sorted((noted.keys() | found.keys()) - {"dtype", "torch_dtype"}):
        if name not in noted or name not in found or noted[name] != found[name]:
            was, now = (json.dumps(entries[name]) if name in entries else "absent" for entries in (noted, found))
            changed = f"{name} is {now}, was {was} when the weights were exported"
            raise CheckpointError(f"{path}: {changed}; damaged or edited, undo it or export again")
