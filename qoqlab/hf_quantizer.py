"""QoQ as a quantisation method of transformers: `QoQConfig` for ``from_pretrained(path, quantization_config=...)``.

`registration` tells transformers of the method "qoq", which needs it to load a folder that ``save_pretrained`` wrote, and
imports this module when the method is first used.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import attention, recipes, registration
from .architecture import LINEARS, SUPPORTED, defining, describe
from .bundled import load_text, spread, tokens
from .formats import recipe_from_json, recipe_to_json
from .offload import MappedTensors
from .pipeline import REPORT_COLUMNS, QuantizedModel, needs_calibration, quantize
from .recipes import Recipe
from .runtime import layer_from
from .tensorfile import CheckpointError, digest_of, digest_of_tensor, parse_json

METHOD = registration.METHOD
#: Version of what ``save_pretrained`` writes. Version 1, read as well, has digests of quantised parts' bytes alone, or none.
SCHEMA = 2


class QoQConfig(QuantizationConfigMixin):
    """Quantisation on load: ``AutoModelForCausalLM.from_pretrained(path, quantization_config=QoQConfig("qoq-g128", ...))``.

    ``recipe``: a preset's name or a `Recipe`. Recipes whose steps look at activations need one of

    - ``calibration``: int64 tokens ``[n, length]``
    - ``text``: what `load_text` takes as a name (such as the path of a text file), tokenised with the tokenizer beside the
      model; ``windows`` windows of ``length`` tokens from all over the text are used.

    ``save_pretrained`` keeps the recipe and drops calibration tokens and text. The resulting model is an ordinary one of
    transformers in simulated mode; `as_quantized` makes it the `QuantizedModel` that this library's functions take.
    ``digests`` (SHA-256 by name of every tensor, with its dtype and shape) and ``sha256`` (of digests, recipe and what
    defines the model in ``config.json``) are for ``save_pretrained`` to write and loading to check, before anything is
    cast to another dtype; damage is a `CheckpointError`. Who edits ``config.json`` on purpose removes both entries.

    Raises TypeError or ValueError for an unknown recipe, calibration of the wrong kind, or both sources at once.
    """

    def __init__(
        self,
        recipe: str | Recipe | dict[str, Any] = "qoq-g128",
        calibration: torch.Tensor | None = None,
        text: str | os.PathLike[str] | None = None,
        length: int = 2048,
        windows: int = 128,
        schema: int = SCHEMA,
        quant_method: str = METHOD,
        digests: dict[str, str] | None = None,
        sha256: str = "",
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ValueError(
                f"quantization_config: entries {', '.join(sorted(unknown))} are not of a model that save_pretrained wrote; "
                "a QServe checkpoint is read by qoqlab.formats.import_qserve"
            )
        if quant_method != METHOD or type(schema) is not int or not 1 <= schema <= SCHEMA:
            raise ValueError(
                f"quant_method: expected {METHOD!r} of schema 1 to {SCHEMA}, got {quant_method!r} of schema {schema!r}"
            )
        self.quant_method = METHOD  # type: ignore[assignment]
        if isinstance(recipe, dict):
            try:
                recipe = recipe_from_json(recipe)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"recipe: not one that this version knows ({type(error).__name__}: {error})") from error
        self.recipe = recipes.get(recipe) if isinstance(recipe, str) else recipe
        if not isinstance(self.recipe, Recipe):
            raise TypeError(f"recipe: expected a preset's name or a Recipe, got {type(recipe).__name__}")
        if calibration is not None and text is not None:
            raise ValueError("calibration: give tokens or text, not both")
        if calibration is not None and not isinstance(calibration, torch.Tensor):
            raise TypeError(f"calibration: expected int64 tokens [n, length], got {type(calibration).__name__}")
        if not isinstance(windows, int) or windows < 1:
            raise ValueError(f"windows: expected a positive integer, got {windows!r}")
        digests = {} if digests is None else digests
        if not isinstance(digests, dict) or not all(isinstance(text, str) for pair in digests.items() for text in pair):
            raise ValueError(f"digests: expected SHA-256 in hexadecimal by tensor name, got {type(digests).__name__}")
        if not isinstance(sha256, str) or (schema > 1 and bool(sha256) != bool(digests)):
            raise ValueError(f"sha256: expected the SHA-256 of digests and configuration, beside digests, got {sha256!r}")
        self.calibration, self.text, self.length, self.windows = calibration, text, length, windows
        self.digests, self.sha256 = digests, sha256

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """What transformers makes of a ``config.json``'s entry. Raises CheckpointError where it is not one of ours."""
        try:
            return super().from_dict(config_dict, *args, **kwargs)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"config.json: quantization_config: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """What goes into ``config.json``."""
        written = {"quant_method": METHOD, "schema": SCHEMA, "recipe": recipe_to_json(self.recipe)}
        return written | ({"digests": dict(self.digests), "sha256": self.sha256} if self.digests else {})

    def calibration_for(self, path: str) -> torch.Tensor | None:
        """Tokens ``[n, length]`` for the model of that folder or cached repository, or None."""
        if self.text is None:
            return self.calibration
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"text: {path!r} has no tokenizer ({str(error).splitlines()[0]}); pass calibration=..."
            ) from None
        return spread(tokens(tokenizer, load_text(os.fspath(self.text), "calibration"), self.length), self.windows)


class QoQHfQuantizer(HfQuantizer):
    """Runs the pipeline after transformers has loaded an unquantised model, or makes room for a quantised checkpoint."""

    quantization_config: QoQConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what cannot work, before weights are read."""
        config = self.quantization_config
        if (
            not self.pre_quantized
            and needs_calibration(config.recipe)
            and config.calibration is None
            and config.text is None
        ):
            raise ValueError(
                f"calibration: recipe {config.recipe.name!r} looks at activations; give QoQConfig calibration tokens or text"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if type(model).__name__ not in SUPPORTED:
            kind = type(model).__name__
            raise TypeError(f"model: {kind} is not a supported architecture; supported: {', '.join(SUPPORTED)}")
        if self.pre_quantized:
            files = tuple(kwargs.get("checkpoint_files") or ())
            with torch.device("cpu"):  # transformers has made "meta" the default here, and online transforms are real
                if files:  # otherwise the caller has passed a state dict, which is no file that could be damaged
                    _require_intact(self.quantization_config, files)
                _make_room(model, self.quantization_config, files)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            # they describe the folder, not what becomes of the model
            self.quantization_config = model.config.quantization_config = _with_digests(self.quantization_config)
            attention.install(model)
            model.requires_grad_(False)
            return
        config = self.quantization_config
        calibration = config.calibration_for(model.config.name_or_path)
        shown = logging.is_progress_bar_enabled()  # where transformers shows no bars, neither do we
        result = quantize(model, config.recipe, calibration, inplace=True, progress=shown)
        model.qoq_report = result.report

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Called by ``save_pretrained`` before it writes the configuration, which gets the tensors' digests here."""
        model.config.dtype, model.config.architectures = model.dtype, [type(model).__name__]  # as transformers is about to
        digests = {name: _digest(tensor) for name, tensor in _saved(model)}
        plain = _with_digests(self.quantization_config, digests)
        model.config.quantization_config = plain
        written = json.loads(model.config.to_json_string())
        model.config.quantization_config = _with_digests(plain, digests, _digest_of_config(written))
        return None, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """`save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradients."""
        return False


def _make_room(model: nn.Module, config: QoQConfig, files: tuple[str, ...]) -> None:
    """Replace linears by quantised ones without memory, for transformers to load codes and scales into.

    Online transforms are taken from the checkpoint's files at once, since their tensors decide what they compute. Raises
    CheckpointError for a tensor that the files lack (transformers would make one up) or have in another shape or dtype.
    """
    stored, recipe = MappedTensors(files), config.recipe
    half = model.config.dtype not in (torch.float32, torch.float64)
    for block in describe(model).blocks:
        attention.state(block.attention).grid = recipe.scheme.kv
        for role in LINEARS:
            name, linear = block.name(role), block.linear(role)
            n, k = linear.out_features, linear.in_features
            parts = {key: stored[key] for key in (f"{name}.online.hadamard", f"{name}.online.order") if key in stored}
            if recipe.scheme.weights is not None:
                layout = recipe.scheme.weights.layout(n, k)
                parts |= {f"{name}.{part}": torch.empty(s, dtype=d, device="meta") for part, (s, d) in layout.items()}
                if linear.bias is not None:  # biases stay in the precision that blocks are quantised in
                    dtype = torch.float32 if half else linear.bias.dtype
                    parts[f"{name}.bias"] = torch.empty(n, dtype=dtype, device="meta")
            layer = layer_from(parts, name, linear, recipe.scheme)
            if layer is not None:
                block.set_linear(role, layer)
    if files:  # otherwise the caller has passed a state dict
        _require_same(model, stored, Path(files[0]).parent)


def _require_same(model: nn.Module, stored: MappedTensors, folder: Path) -> None:
    """Raise CheckpointError for a tensor that the files lack, or have in another shape or kind of dtype."""
    tied = _tied(model)
    for name, tensor in model.state_dict().items():
        if name not in stored:
            if name in tied:
                continue
            raise CheckpointError(f"{folder}: tensor {name} is missing")
        shape, dtype = stored.shape(name), stored.dtype(name)
        # transformers casts floating-point numbers to what the model asks for, and takes integers as they are
        if shape != list(tensor.shape) or (
            dtype != tensor.dtype and not (dtype.is_floating_point and tensor.is_floating_point())
        ):
            expected = f"{tensor.dtype} {list(tensor.shape)}"
            raise CheckpointError(f"{folder}: tensor {name}: expected {expected}, got {dtype} {shape}")


def _tied(model: nn.Module) -> set[str]:
    """Names of the state dict that files leave out."""
    return {"lm_head.weight"} if model.config.tie_word_embeddings else set()  # type: ignore[union-attr]


# --- digests --------------------------------------------------------------------------------------------------------------


def _saved(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of what ``save_pretrained`` writes, one after the other; offloaded ones are fetched, as it does."""
    for name, tensor in model.state_dict().items():
        if name in _tied(model):
            continue
        if tensor.is_meta:
            from transformers.integrations.accelerate import load_offloaded_parameter

            tensor = load_offloaded_parameter(model, name)  # type: ignore[arg-type]
        yield name, tensor.detach().cpu()


def _digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a CPU tensor's dtype, shape and bytes."""
    kind = f"{tensor.dtype} {list(tensor.shape)} ".removeprefix("torch.")
    return hashlib.sha256((kind + digest_of_tensor(tensor)).encode()).hexdigest()


def _digest_of_config(written: Mapping[str, Any]) -> str:
    """SHA-256 of what a ``config.json`` says of quantisation and of the model (`architecture.defining`)."""
    method = {key: value for key, value in written["quantization_config"].items() if key != "sha256"}
    return digest_of({"model": defining(written), "quantization": method})


def _require_intact(config: QoQConfig, files: tuple[str, ...]) -> None:
    """Raise CheckpointError where the files, or ``config.json`` beside them, are not what was saved."""
    folder = Path(files[0]).parent
    if not config.sha256:
        noted = "digests of quantised parts alone" if config.digests else "no digests"
        text = f"{folder}: has {noted}, so damage elsewhere would go unnoticed; save_pretrained writes all of them"
        warnings.warn(text, stacklevel=2)
    else:
        path = folder / "config.json"
        if path.is_file():  # a configuration may have been passed from elsewhere
            written = parse_json(path.read_bytes(), str(path))
            if not isinstance(written.get("quantization_config"), dict) or _digest_of_config(written) != config.sha256:
                raise CheckpointError(
                    f"{path}: SHA-256 of what defines model and quantisation differs from its entry 'sha256'; damaged, or "
                    "edited without removing its entries 'digests' and 'sha256'"
                )
    stored, digest = MappedTensors(files), _digest if config.sha256 else digest_of_tensor
    for name, expected in config.digests.items():
        if name not in stored:
            raise CheckpointError(f"{folder}: tensor {name} is missing")
        if digest(stored[name]) != expected:
            raise CheckpointError(f"{folder}: tensor {name}: SHA-256 differs from the one in config.json; damaged")


def _with_digests(config: QoQConfig, digests: dict[str, str] | None = None, sha256: str = "") -> QoQConfig:
    """A copy, since one configuration may serve several models."""
    noted = copy.copy(config)
    noted.digests, noted.sha256 = digests or {}, sha256
    return noted


def as_quantized(model: nn.Module) -> QuantizedModel:
    """The `QuantizedModel` of a model that was loaded with a `QoQConfig`, for `perplexity`, `generate`, `save` and others.

    Raises TypeError for other models.
    """
    import pandas as pd

    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if not isinstance(config, QoQConfig):
        raise TypeError(f"model: {type(model).__name__} was not loaded with a QoQConfig")
    report = getattr(model, "qoq_report", pd.DataFrame(columns=REPORT_COLUMNS))
    return QuantizedModel(model, config.recipe, report)


def save_pretrained(quantized: QuantizedModel, folder: str | os.PathLike[str], **options: Any) -> None:
    """Write a `QuantizedModel` of any origin as ``save_pretrained`` writes one that was loaded with a `QoQConfig`.

    ``options`` go to the model's ``save_pretrained``. The model itself stays as it was.
    """
    model: Any = quantized.model
    before, quantizer = getattr(model.config, "quantization_config", None), getattr(model, "hf_quantizer", None)
    config = QoQConfig(quantized.recipe)
    model.config.quantization_config, model.hf_quantizer = config, QoQHfQuantizer(config)
    try:
        model.save_pretrained(folder, **options)
    finally:
        model.hf_quantizer = quantizer
        if before is None:
            del model.config.quantization_config
        else:
            model.config.quantization_config = before


def _register() -> None:
    """Tell transformers about the method; again after a reload of this module, but never over somebody else's."""
    for mapping, ours in ((AUTO_QUANTIZATION_CONFIG_MAPPING, QoQConfig), (AUTO_QUANTIZER_MAPPING, QoQHfQuantizer)):
        there = mapping.get(METHOD)
        if there is not None and there.__module__ not in (__name__, registration.__name__):
            raise ImportError(f"transformers has a quantisation method {METHOD!r} of {there.__module__} already")
        mapping[METHOD] = ours  # type: ignore[assignment]


_register()
