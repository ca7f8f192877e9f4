"""Checkpoints: safetensors beside one JSON manifest, crash-safe to write and safe to read from a stranger.

A folder holds ``qoqlab.json`` (schema version, model configuration, recipe, report, and name, size and SHA-256 of the weight
file) and ``weights-<digest>.safetensors``. The manifest is replaced last and atomically; weight files never share a name
unless they share their bytes. So a save that is killed at any moment leaves the previous checkpoint whole.

Nothing is unpickled and no code is loaded; sizes, digests, tensor names, shapes and dtypes are checked before use.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from . import attention, grids, runtime, steps
from .affine import Affine
from .architecture import LINEARS, SUPPORTED, describe
from .grids import Grid, Zero
from .pipeline import REPORT_COLUMNS, QuantizedModel
from .progressive import FirstLevel, ProgressiveWeight
from .recipes import Recipe, Step
from .schemes import Scheme, WeightFormat, WeightKind

MANIFEST = "qoqlab.json"
SCHEMA = 1
ROTARY = "model.rotary_emb.inv_freq"
_WEIGHT_FILE = re.compile(r"weights-[0-9a-f]{16}\.safetensors")
_GRIDS: dict[str | None, Grid | None] = {g.name: g for g in vars(grids).values() if isinstance(g, Grid)}


class CheckpointError(ValueError):
    """A checkpoint folder that is missing, damaged, or not one of ours."""


# --- recipe <-> JSON ------------------------------------------------------------------------------------------------------


def recipe_to_json(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain JSON values. Raises ValueError for a step that `load` could not find again."""
    for step in recipe.steps:
        if steps.STEPS.get(step.name) is not step.function:
            raise ValueError(f"recipe: step {step.name!r} is not registered; decorate it with qoqlab.steps.step")
    scheme, form = recipe.scheme, recipe.scheme.weights
    return {
        "name": recipe.name,
        "source": recipe.source,
        "scheme": {
            "weights": form
            and {
                "kind": form.kind.value,
                "group_size": form.group_size,
                "zero": form.zero.value,
                "first_level": form.first_level.value,
            },
            "activations": scheme.activations and scheme.activations.name,
            "kv": scheme.kv and scheme.kv.name,
        },
        "steps": [{"name": step.name, "parameters": step.parameters} for step in recipe.steps],
    }


def recipe_from_json(data: dict[str, Any]) -> Recipe:
    """Inverse of `recipe_to_json`; raises KeyError, TypeError or ValueError for anything it does not know."""
    scheme = data["scheme"]
    form = scheme["weights"]
    weights = form and WeightFormat(
        WeightKind(form["kind"]), int(form["group_size"]), Zero(form["zero"]), FirstLevel(form["first_level"])
    )
    grid_of = {None: None, **_GRIDS}
    listed = []
    for entry in data["steps"]:
        if entry["name"] not in steps.STEPS:
            raise ValueError(f"steps: {entry['name']!r} is not a step; import the module that registers it")
        listed.append(Step(steps.STEPS[entry["name"]], dict(entry["parameters"])))
    formats = Scheme(weights, grid_of[scheme["activations"]], grid_of[scheme["kv"]])
    return Recipe(str(data["name"]), formats, tuple(listed), str(data["source"]))


# --- save -----------------------------------------------------------------------------------------------------------------


def save(quantized: QuantizedModel, folder: str | os.PathLike[str]) -> None:
    """Write a checkpoint into ``folder`` (created if need be); an older checkpoint there is replaced atomically.

    Raises TypeError for anything but a `QuantizedModel`, and OSError where the folder cannot be written; the previous
    checkpoint is then untouched.
    """
    from safetensors.torch import save as serialize

    if not isinstance(quantized, QuantizedModel):
        raise TypeError(f"quantized: expected a QuantizedModel, got {type(quantized).__name__}")
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(f"folder: {path} is a file") from None
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in quantized.model.state_dict().items()}
    if describe(quantized.model).tied:
        state.pop("lm_head.weight")
    # not part of the state dict, yet its dtype follows casts of the model
    state[ROTARY] = quantized.model.get_buffer(ROTARY).detach().cpu().contiguous()
    for leftover in path.glob(".*.partial"):  # of a save that was killed
        leftover.unlink(missing_ok=True)
    payload = serialize(state)
    digest = hashlib.sha256(payload).hexdigest()
    name = f"weights-{digest[:16]}.safetensors"
    manifest = {
        "format": "qoqlab",
        "schema": SCHEMA,
        "architecture": type(quantized.model).__name__,
        "config": json.loads(quantized.model.config.to_json_string(use_diff=False)),  # type: ignore[union-attr, operator]
        "recipe": recipe_to_json(quantized.recipe),
        "generation_config": quantized.model.generation_config.to_dict(),  # type: ignore[union-attr, operator]
        "report": [{k: _plain(v) for k, v in row.items()} for row in quantized.report.to_dict("records")],
        "weights": {"file": name, "bytes": len(payload), "sha256": digest},
    }
    text = json.dumps(manifest, indent=1, allow_nan=False)  # before anything is written: it may fail
    _write_atomically(path / name, payload)
    _write_atomically(path / MANIFEST, text.encode())
    for stale in path.glob("weights-*.safetensors"):
        if stale.name != name and _WEIGHT_FILE.fullmatch(stale.name):
            stale.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """Infinite and missing numbers as strings, which JSON lacks."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _write_atomically(path: Path, payload: bytes) -> None:
    """Write beside ``path``, flush to disk, then rename over it."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(beside, "xb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        _flush_folder(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _flush_folder(path: Path) -> None:
    """Make a rename durable, where the system can flush folders."""
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        with contextlib.suppress(OSError):  # the rename itself has succeeded, and not every file system can do this
            os.fsync(folder)
        os.close(folder)


# --- load -----------------------------------------------------------------------------------------------------------------


def load(folder: str | os.PathLike[str]) -> QuantizedModel:
    """Read a checkpoint that `save` wrote; codes, scales and all other tensors come back bit for bit.

    Raises `CheckpointError` (a ValueError) naming the file and what is wrong with it.
    """
    from transformers import GenerationConfig

    path = Path(folder)
    manifest = _read_manifest(path / MANIFEST)
    payload = _read_weights(path, manifest["weights"])
    try:
        recipe = recipe_from_json(manifest["recipe"])
        model = _empty_model(manifest["architecture"], manifest["config"])
        model.generation_config = GenerationConfig.from_dict(manifest["generation_config"])  # type: ignore[assignment]
        report = pd.DataFrame(manifest["report"], columns=REPORT_COLUMNS)
        numbers = {c: float for c in REPORT_COLUMNS if c not in ("stage", "layer")}
        report = report.astype(numbers)  # "inf" and "nan" come back as numbers
    except Exception as error:  # a stranger's configuration can make transformers raise anything
        raise CheckpointError(f"{path / MANIFEST}: {type(error).__name__}: {error}") from error
    _fill(model, payload, recipe.scheme, path / manifest["weights"]["file"])
    attention.install(model)
    return QuantizedModel(model.eval(), recipe, report)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; is this a folder that qoqlab.save wrote?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != "qoqlab":
        raise CheckpointError(f"{path}: not a qoqlab checkpoint")
    if manifest.get("schema") != SCHEMA:
        raise CheckpointError(f"{path}: schema {manifest.get('schema')!r}, this version reads {SCHEMA}")
    for key, kind in {
        "architecture": str,
        "config": dict,
        "recipe": dict,
        "report": list,
        "weights": dict,
        "generation_config": dict,
    }.items():
        if not isinstance(manifest.get(key), kind):
            raise CheckpointError(f"{path}: entry {key!r} is missing or not a {kind.__name__}")
    return manifest


def _read_weights(folder: Path, entry: dict[str, Any]) -> bytes:
    """The weight file's bytes, after its name, size and digest have been checked."""
    name = entry.get("file")
    if not isinstance(name, str) or not _WEIGHT_FILE.fullmatch(name):
        raise CheckpointError(f"{folder / MANIFEST}: {name!r} is not a weight file's name")
    path = folder / name
    try:
        size = path.stat().st_size
        if size != entry.get("bytes"):
            raise CheckpointError(f"{path}: has {size} bytes, the manifest says {entry.get('bytes')}; truncated or damaged")
        payload = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: not readable ({error})") from error
    if hashlib.sha256(payload).hexdigest() != entry.get("sha256"):
        raise CheckpointError(f"{path}: SHA-256 differs from the manifest's; the file is damaged")
    return payload


def _empty_model(architecture: str, config: dict[str, Any]) -> nn.Module:
    """An unquantised model without memory (meta device) of a supported class."""
    import transformers

    if architecture not in SUPPORTED:
        raise ValueError(f"architecture: {architecture!r} is not supported; supported: {', '.join(SUPPORTED)}")
    model_class = getattr(transformers, architecture)
    config = {k: v for k, v in config.items() if k not in ("auto_map", "quantization_config")}
    dtype = getattr(torch, str(config.get("dtype") or "float32"))
    with torch.device("meta"):
        return model_class(model_class.config_class(**config)).to(dtype)


def _fill(model: nn.Module, payload: bytes, scheme: Scheme, path: Path) -> None:
    """Replace linears by quantised ones and load every tensor, after checking names, shapes and dtypes."""
    from safetensors import SafetensorError
    from safetensors.torch import load as parse

    try:
        state = parse(payload)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as safetensors ({error})") from error
    architecture = describe(model)
    for block in architecture.blocks:
        attention.state(block.attention).grid = scheme.kv
        for role in LINEARS if scheme.weights else ():
            name = block.name(role)
            try:
                linear = block.linear(role)
                weight = _take_weight(state, name, tuple(linear.weight.shape), scheme.weights)
                bias = _take_bias(state, f"{name}.bias", linear)
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{path}: {name}: {error}") from error
            block.set_linear(role, runtime.QuantLinear(weight, bias, scheme.activations))
    _load_rest(model, state, path)


def _take(state: dict[str, torch.Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Remove and return a tensor, checking what it is."""
    tensor = state.pop(name, None)
    if tensor is None:
        raise KeyError(f"tensor {name} is missing")
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(f"tensor {name}: expected {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
    return tensor


def _take_bias(state: dict[str, torch.Tensor], name: str, linear: nn.Linear) -> torch.Tensor | None:
    """A bias of any floating-point type, where the architecture has one (another one stays, and is refused later)."""
    if linear.bias is None:
        return None
    dtype = state[name].dtype if name in state and state[name].is_floating_point() else linear.bias.dtype
    return _take(state, name, (linear.out_features,), dtype)


def _take_weight(
    state: dict[str, torch.Tensor], name: str, shape: tuple[int, ...], form: WeightFormat | None
) -> runtime.QuantizedWeight:
    from .packing import unpack_u4

    assert form is not None
    n, k = shape
    if form.kind is WeightKind.CHANNEL_S8:
        codes = _take(state, f"{name}.codes", shape, torch.int8)
        return Affine(_take(state, f"{name}.scales", (n,), torch.float16), None, grids.INT8, Zero.INTEGER, codes)
    codes = unpack_u4(_take(state, f"{name}.codes", (n, k // 2), torch.uint8))
    if form.kind is WeightKind.CHANNEL_U4:
        zeros = _take(state, f"{name}.zeros", (n,), torch.uint8 if form.zero is Zero.INTEGER else torch.float16)
        return Affine(_take(state, f"{name}.scales", (n,), torch.float16), zeros, grids.UINT4, form.zero, codes)
    groups = (n, form.groups(k))
    return ProgressiveWeight(
        _take(state, f"{name}.channel_scales", (n,), torch.float16),
        _take(state, f"{name}.group_scales", groups, torch.int8),
        _take(state, f"{name}.group_zeros", groups, torch.uint8 if form.zero is Zero.INTEGER else torch.int8),
        form.group_size,
        form.zero,
        form.first_level,
        codes,
    )


def _load_rest(model: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Load unquantised parameters into the meta model and rebuild buffers that are not stored."""
    architecture = describe(model)
    rotary = model.get_submodule("model.rotary_emb")
    model.set_submodule("model.rotary_emb", type(rotary)(config=model.config))
    expected: dict[str, torch.Tensor] = {**dict(model.named_parameters()), ROTARY: model.get_buffer(ROTARY)}
    if getattr(model.config, "tie_word_embeddings", False):
        expected.pop("lm_head.weight", None)
    unknown, missing = sorted(state.keys() - expected.keys()), sorted(expected.keys() - state.keys())
    if unknown or missing:
        raise CheckpointError(f"{path}: unexpected tensors {unknown[:3]}, missing tensors {missing[:3]}")
    for name, parameter in expected.items():
        tensor = state[name]
        if tensor.shape != parameter.shape or not tensor.is_floating_point():
            raise CheckpointError(
                f"{path}: tensor {name}: expected float {list(parameter.shape)}, got {tensor.dtype} {list(tensor.shape)}"
            )
    model.get_submodule("model.rotary_emb").inv_freq = state.pop(ROTARY)
    model.load_state_dict(state, strict=False, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if getattr(model.config, "tie_word_embeddings", False):
        architecture.head.weight = architecture.embedding.weight
