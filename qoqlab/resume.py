"""Finished blocks on disk, so that a quantisation run that was killed continues after the last of them.

A folder holds ``run.json``, which says what the run is made of, and ``block-00000.safetensors`` and so on, each written
beside its name and renamed when complete. Calibration activations are not stored: running the original block is cheap
beside quantising it, and gives the next block's inputs bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import attention, runtime
from .architecture import LINEARS, Block
from .recipes import Recipe
from .schemes import Scheme, scheme_to_json
from .tensorfile import CheckpointError, LazyTensors, TensorFile, digest_of_tensor, read_json, write_json, write_tensors

MANIFEST = "run.json"
SCHEMA = 1
#: Entries of a model's configuration that differ between equal models.
_VOLATILE = ("_name_or_path", "name_or_path", "transformers_version")


def recipe_facts(recipe: Recipe) -> dict[str, Any]:
    """What a recipe does, as JSON: formats, and steps by name with their parameters."""
    return {"scheme": scheme_to_json(recipe.scheme), "steps": [[step.name, step.parameters] for step in recipe.steps]}


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's configuration and of the name, shape, dtype and bytes of each of its tensors."""
    tensors = {
        name: [str(tensor.dtype), *tensor.shape, digest_of_tensor(tensor.detach().cpu())]
        for name, tensor in model.state_dict().items()
    }
    return hashlib.sha256(json.dumps([_config(model), tensors], sort_keys=True).encode()).hexdigest()


def _config(model: nn.Module) -> dict[str, Any]:
    config = json.loads(model.config.to_json_string(use_diff=False))  # type: ignore[union-attr, operator]
    return {key: value for key, value in config.items() if key not in _VOLATILE}


class Journal:
    """The finished blocks of one run.

    Raises ValueError where ``folder`` holds a run of another model, recipe, calibration or kind of report, or other files.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: nn.Module,
        recipe: Recipe,
        calibration: torch.Tensor | None,
        report: bool,
    ) -> None:
        self.folder = Path(folder)
        run: dict[str, Any] = {
            "format": "qoqlab run",
            "schema": SCHEMA,
            "model": _config(model),
            "recipe": recipe_facts(recipe),
            "calibration": None if calibration is None else [list(calibration.shape), digest_of_tensor(calibration.cpu())],
            "report": report,
        }
        run = json.loads(json.dumps(run))
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / MANIFEST).exists():
            if any(path.suffix != ".partial" for path in self.folder.iterdir()):
                raise ValueError(f"resume: {self.folder} holds files, and no {MANIFEST} of a run")
            self._write(MANIFEST, lambda path: write_json(path, run))
        found = read_json(self.folder / MANIFEST)
        other = [key for key in run if found.get(key) != run[key]]
        if other:
            raise ValueError(
                f"resume: {self.folder} holds another run (its {other[0]} differs); delete it or choose another folder"
            )

    def _write(self, name: str, write: Any) -> None:
        for leftover in self.folder.glob(f".{name}.*.partial"):  # of a run that was killed
            leftover.unlink(missing_ok=True)
        beside = self.folder / f".{name}.{secrets.token_hex(4)}.partial"
        write(beside)
        os.replace(beside, self.folder / name)

    @staticmethod
    def _name(block: Block) -> str:
        return f"block-{block.index:05d}.safetensors"

    @staticmethod
    def evidence(block: Block, outputs: list[torch.Tensor]) -> str:
        """SHA-256 of an unquantised block's first outputs, or of its weights where there is no calibration."""
        tensors = outputs[:1] or list(block.layer.parameters())
        digests = [digest_of_tensor(tensor.detach().cpu()) for tensor in tensors]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def save(self, block: Block, evidence: str, rows: list[dict[str, object]]) -> None:
        """Write a quantised block, the `evidence` of what it was made from, and its rows of the report."""
        metadata = {"evidence": evidence, "rows": json.dumps(rows)}
        tensors = {name: tensor.detach() for name, tensor in block.layer.state_dict().items()}
        self._write(self._name(block), lambda path: write_tensors(path, tensors, metadata))

    def restore(self, block: Block, evidence: str, scheme: Scheme) -> list[dict[str, object]] | None:
        """Turn a block into the finished one of the folder and return its rows of the report; None if it is not there.

        One that was made from something else, by the `evidence`, is left alone. Raises CheckpointError for a damaged file.
        """
        path = self.folder / self._name(block)
        if not path.exists():
            return None
        device = next(block.layer.parameters()).device
        try:
            with TensorFile(path) as file:
                if file.metadata.get("evidence") != evidence:
                    warnings.warn(
                        f"{path}: belongs to other weights, another device or thread count; the block is quantised again",
                        stacklevel=4,
                    )
                    return None
                lazy = LazyTensors([file])
                state = {name: lazy[name].to(device) for name in lazy}
                rows = json.loads(file.metadata["rows"])
            fill_block(block, state, scheme)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}; delete it to quantise the block again") from error
        return rows


def fill_block(block: Block, state: dict[str, torch.Tensor], scheme: Scheme) -> None:
    """Give a block its quantised layers, KV format and other tensors; ``state`` is keyed as the layer's state dict."""
    layers = {role: runtime.layer_from(state, path, block.linear(role), scheme) for role, path in LINEARS.items()}
    for role, layer in layers.items():
        if layer is not None:
            block.set_linear(role, layer)
    attention.state(block.attention).grid = scheme.kv
    expected = dict(block.layer.named_parameters())
    if expected.keys() != state.keys() or any(state[name].shape != p.shape for name, p in expected.items()):
        raise ValueError(f"other tensors than the model's: {sorted(expected.keys() ^ state.keys())[:3]}")
    block.layer.load_state_dict(state, strict=False, assign=True)
    block.layer.requires_grad_(False)
