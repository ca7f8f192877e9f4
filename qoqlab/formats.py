"""Checkpoints of our own: bit-exact, crash-safe to write and safe to read from a stranger. Other formats pass through here.

A folder holds ``qoqlab.json`` (schema version, model configuration, recipe, report, and every tensor's dtype, shape and
SHA-256, all under a SHA-256 of its own) and ``weights-<digest>.safetensors``. The manifest is replaced last and atomically;
weight files never share a name unless they share their content. So a save that is killed at any moment leaves the previous
checkpoint whole, and a folder that was not there before appears complete or not at all.

Nothing is unpickled and no code is loaded; sizes, digests, tensor names, shapes and dtypes are checked before use. Digests
find damage, not malice: whoever can write the folder can write digests that fit.

Formats of engines have modules of their own: `qserve_format`, `deepcompressor` and `compressed_tensors`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pandas as pd

from . import runtime
from .architecture import describe
from .compressed_tensors import Layout, export_compressed_tensors
from .deepcompressor import export_deepcompressor, import_deepcompressor
from .pipeline import REPORT_COLUMNS, QuantizedModel
from .qserve_format import Engine, export_qserve, import_qserve
from .rebuild import ROTARY, empty_model, fill, recipe_from_json, recipe_to_json
from .tensorfile import (
    NAMES,
    CheckpointError,
    LazyTensors,
    TensorFile,
    digest_of,
    open_plain,
    read_json,
    staged,
    write_json,
    write_tensors,
)

__all__ = [
    "CheckpointError",
    "Engine",
    "Layout",
    "export_compressed_tensors",
    "export_deepcompressor",
    "export_qserve",
    "import_deepcompressor",
    "import_qserve",
    "load",
    "recipe_from_json",
    "recipe_to_json",
    "save",
]

MANIFEST = "qoqlab.json"
#: Version of the manifest that `save` writes. `load` also reads 1, which had one digest for all weights and none for itself.
SCHEMA = 2
_ENTRIES = {
    "architecture": str,
    "config": dict,
    "recipe": dict,
    "report": list,
    "weights": dict,
    "generation_config": dict,
}
_WEIGHT_FILE = re.compile(r"weights-[0-9a-f]{16}\.safetensors")


# --- save -----------------------------------------------------------------------------------------------------------------


def save(quantized: QuantizedModel, folder: str | os.PathLike[str]) -> None:
    """Write a checkpoint into ``folder`` (created if need be); an older checkpoint there is replaced atomically.

    Raises TypeError for anything but a `QuantizedModel`, ValueError for a recipe that cannot be written down, and OSError
    where the folder cannot be written; the previous checkpoint is then untouched.
    """
    if not isinstance(quantized, QuantizedModel):
        raise TypeError(f"quantized: expected a QuantizedModel, got {type(quantized).__name__}")
    model: Any = quantized.model
    manifest = {
        "format": "qoqlab",
        "schema": SCHEMA,
        "architecture": type(model).__name__,
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "recipe": recipe_to_json(quantized.recipe),
        "generation_config": model.generation_config.to_dict(),
        "report": [{k: _plain(v) for k, v in row.items()} for row in quantized.report.to_dict("records")],
    }
    manifest = json.loads(json.dumps(manifest, allow_nan=False))  # may fail, and does so before anything is written
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if describe(model).tied:
        state.pop("lm_head.weight")
    # not part of the state dict, yet its dtype follows casts of the model
    state[ROTARY] = model.get_buffer(ROTARY).detach()
    path = Path(folder)
    with staged(path, last=MANIFEST) as temporary:
        tensors = write_tensors(temporary / "weights", state)
        name = f"weights-{digest_of(tensors)[:16]}.safetensors"
        os.rename(temporary / "weights", temporary / name)
        manifest["weights"] = {"file": name, "bytes": (temporary / name).stat().st_size, "tensors": tensors}
        write_json(temporary / MANIFEST, {**manifest, "sha256": digest_of(manifest)})
    for stale in path.glob("weights-*.safetensors"):
        if stale.name != name and _WEIGHT_FILE.fullmatch(stale.name):
            stale.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """Infinite and missing numbers as strings, which JSON lacks."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# --- load -----------------------------------------------------------------------------------------------------------------


def load(folder: str | os.PathLike[str]) -> QuantizedModel:
    """Read a checkpoint that `save` wrote; codes, scales and all other tensors come back bit for bit.

    Raises `CheckpointError` (a ValueError) naming the file and what is wrong with it.
    """
    from transformers import GenerationConfig

    manifest_path = Path(folder) / MANIFEST
    manifest = _read_manifest(manifest_path)
    with _open_weights(Path(folder), manifest) as file:
        try:
            recipe = recipe_from_json(manifest["recipe"])
            model: Any = empty_model(manifest["architecture"], manifest["config"], file.entries, file.bytes)
            model.generation_config = GenerationConfig.from_dict(manifest["generation_config"])
            report = pd.DataFrame(manifest["report"], columns=REPORT_COLUMNS)
            numbers = {c: float for c in REPORT_COLUMNS if c not in ("stage", "layer")}
            report = report.astype(numbers)  # "inf" and "nan" come back as numbers
        except Exception as error:  # a stranger's configuration can make transformers raise anything
            raise CheckpointError(f"{manifest_path}: {type(error).__name__}: {error}") from error
        if ROTARY not in file.entries:
            raise CheckpointError(f"{file.path}: tensor {ROTARY} is missing")
        tensors = manifest["weights"].get("tensors")
        state = LazyTensors([file], tensors and {name: entry["sha256"] for name, entry in tensors.items()})
        replacement = functools.partial(runtime.layer_from, state, scheme=recipe.scheme)
        fill(model, state, recipe.scheme, replacement, file.path)
    return QuantizedModel(model, recipe, report)


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, after its own digest and the kinds of its entries have been checked."""
    try:
        manifest = read_json(path)
    except CheckpointError as error:
        if path.exists():
            raise
        raise CheckpointError(f"{error}; is this a folder that qoqlab.save wrote?") from None
    if manifest.get("format") != "qoqlab":
        raise CheckpointError(f"{path}: not a qoqlab checkpoint")
    schema = manifest.get("schema")
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        raise CheckpointError(f"{path}: schema {schema!r}, this version reads 1 to {SCHEMA}")
    for key, kind in _ENTRIES.items():
        if not isinstance(manifest.get(key), kind):
            raise CheckpointError(f"{path}: entry {key!r} is missing or not a {kind.__name__}")
    if schema > 1 and manifest.pop("sha256", None) != digest_of(manifest):
        raise CheckpointError(f"{path}: SHA-256 of its entries differs from its entry 'sha256'; damaged or edited")
    return manifest


def _open_weights(folder: Path, manifest: dict[str, Any]) -> TensorFile:
    """The weight file, after its name, size and header have been checked."""
    entry = manifest["weights"]
    name = entry.get("file")
    if not isinstance(name, str) or not _WEIGHT_FILE.fullmatch(name):
        raise CheckpointError(f"{folder / MANIFEST}: {name!r} is not a weight file's name")
    path = folder / name
    with open_plain(path) as plain:
        size = os.fstat(plain.fileno()).st_size
        if size != entry.get("bytes"):
            raise CheckpointError(f"{path}: has {size} bytes, the manifest says {entry.get('bytes')}; truncated or damaged")
        if manifest["schema"] == 1 and hashlib.file_digest(plain, "sha256").hexdigest() != entry.get("sha256"):
            raise CheckpointError(f"{path}: SHA-256 differs from the manifest's; the file is damaged")
    file = TensorFile(path)
    if manifest["schema"] > 1:
        listed = entry.get("tensors")
        held = {n: {"dtype": NAMES[e.dtype], "shape": list(e.shape)} for n, e in file.entries.items()}
        if not isinstance(listed, dict) or {n: _without_digest(e) for n, e in listed.items()} != held:
            file.close()
            raise CheckpointError(f"{path}: names, dtypes or shapes of its tensors differ from the manifest's; damaged")
    return file


def _without_digest(entry: Any) -> Any:
    """A tensor's description without its digest; None where there is none, which equals no description."""
    if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
        return None
    return {key: value for key, value in entry.items() if key != "sha256"}
