"""QoQ as a quantisation method of transformers: `QoQConfig` for ``from_pretrained(path, quantization_config=...)``.

Importing this module registers the method "qoq" with transformers, which needs it to load a folder that
``save_pretrained`` wrote; ``qoqlab.QoQConfig`` imports it on first use.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import attention, recipes
from .architecture import LINEARS, SUPPORTED, describe
from .bundled import load_text, spread, tokens
from .formats import recipe_from_json, recipe_to_json
from .offload import MappedTensors
from .pipeline import REPORT_COLUMNS, QuantizedModel, needs_calibration, quantize
from .recipes import Recipe
from .runtime import layer_from
from .tensorfile import CheckpointError, digest_of_tensor

METHOD = "qoq"
SCHEMA = 1


class QoQConfig(QuantizationConfigMixin):
    """Quantisation on load: ``AutoModelForCausalLM.from_pretrained(path, quantization_config=QoQConfig("qoq-g128", ...))``.

    ``recipe``: a preset's name or a `Recipe`. Recipes whose steps look at activations need one of

    - ``calibration``: int64 tokens ``[n, length]``
    - ``text``: what `load_text` takes as a name (such as the path of a text file), tokenised with the tokenizer beside the
      model; ``windows`` windows of ``length`` tokens from all over the text are used.

    ``save_pretrained`` keeps the recipe and drops calibration tokens and text. The resulting model is an ordinary one of
    transformers in simulated mode; `as_quantized` makes it the `QuantizedModel` that this library's functions take.
    ``digests``, SHA-256 by name of the tensors that quantisation made, is for ``save_pretrained`` to write and loading to
    check; folders of older versions have none.

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
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ValueError(
                f"quantization_config: entries {', '.join(sorted(unknown))} are not of a model that save_pretrained wrote; "
                "a QServe checkpoint is read by qoqlab.formats.import_qserve"
            )
        if quant_method != METHOD or schema != SCHEMA:
            raise ValueError(
                f"quant_method: expected {METHOD!r} of schema {SCHEMA}, got {quant_method!r} of schema {schema!r}"
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
        self.calibration, self.text, self.length, self.windows = calibration, text, length, windows
        self.digests = digests

    def to_dict(self) -> dict[str, Any]:
        """What goes into ``config.json``."""
        written = {"quant_method": METHOD, "schema": SCHEMA, "recipe": recipe_to_json(self.recipe)}
        return written | ({"digests": dict(self.digests)} if self.digests else {})

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
    _files: tuple[str, ...] = ()

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
            self._files = tuple(kwargs.get("checkpoint_files") or ())
            with torch.device("cpu"):  # transformers has made "meta" the default here, and online transforms are real
                _make_room(model, self.quantization_config, self._files)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            _require_intact(model, self.quantization_config.digests, self._files)
            # they describe the folder, not what becomes of the model
            self.quantization_config = model.config.quantization_config = _with_digests(self.quantization_config, {})
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
        model.config.quantization_config = _with_digests(self.quantization_config, _digests(model))
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
    CheckpointError for a tensor that the files lack: transformers would make one up.
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
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()  # type: ignore[union-attr]
    lacking = [name for name in model.state_dict() | config.digests if name not in stored and name not in tied]
    if files and lacking:  # without files the caller has passed a state dict
        raise CheckpointError(f"{Path(files[0]).parent}: tensor {lacking[0]} is missing")


def _digests(model: nn.Module) -> dict[str, str]:
    """SHA-256 by name of codes, scales, zeros and online transforms; offloaded ones are not at hand and have none."""
    found = {}
    for block in describe(model).blocks:
        for role in LINEARS:
            for part, tensor in block.linear(role).named_buffers():
                if part != "bias" and not tensor.is_meta:  # a bias follows the dtype that the model is loaded in
                    found[f"{block.name(role)}.{part}"] = digest_of_tensor(tensor.detach().cpu())
    return found


def _require_intact(model: nn.Module, digests: dict[str, str], files: tuple[str, ...]) -> None:
    """Raise CheckpointError for a loaded tensor that is not the one that was saved."""
    place = Path(files[0]).parent if files else "state_dict"
    state, stored = model.state_dict(), MappedTensors(files)
    for name, digest in digests.items():
        tensor = state.get(name)
        if tensor is None or tensor.is_meta:  # meta: not at hand in the model when it is offloaded to disk
            tensor = stored.get(name)
        if tensor is None:
            raise CheckpointError(f"{place}: tensor {name} is missing")
        if digest_of_tensor(tensor.detach().cpu()) != digest:
            raise CheckpointError(f"{place}: tensor {name}: SHA-256 differs from the one in config.json; damaged")


def _with_digests(config: QoQConfig, digests: dict[str, str]) -> QoQConfig:
    """A copy, since one configuration may serve several models."""
    noted = copy.copy(config)
    noted.digests = digests
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
        if there is not None and there.__module__ != __name__:
            raise ImportError(f"transformers has a quantisation method {METHOD!r} of {there.__module__} already")
        mapping[METHOD] = ours  # type: ignore[assignment]


_register()
