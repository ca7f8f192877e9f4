"""What all checkpoint formats share: recipes as JSON, and a model from its configuration and tensors, possibly a stranger's.

The model is made without memory first; every tensor's shape and dtype is compared with it before the tensor is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import torch
from torch import nn

from . import attention, steps
from .architecture import LINEARS, SUPPORTED, describe
from .recipes import Recipe, Step
from .schemes import Scheme, scheme_from_json, scheme_to_json
from .tensorfile import CheckpointError, take

ROTARY = "model.rotary_emb.inv_freq"
#: Entries of a configuration that name code to load or kernels to fetch; quantised models bring their own attention.
_UNTRUSTED = ("auto_map", "quantization_config", "trust_remote_code", "attn_implementation", "experts_implementation")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


# --- recipes --------------------------------------------------------------------------------------------------------------


def recipe_to_json(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain JSON values. Raises ValueError for a step that `recipe_from_json` could not find again."""
    for step in recipe.steps:
        if steps.STEPS.get(step.name) is not step.function:
            raise ValueError(f"recipe: step {step.name!r} is not registered; decorate it with qoqlab.steps.step")
    return {
        "name": recipe.name,
        "source": recipe.source,
        "scheme": scheme_to_json(recipe.scheme),
        "steps": [{"name": step.name, "parameters": step.parameters} for step in recipe.steps],
    }


def recipe_from_json(data: dict[str, Any]) -> Recipe:
    """Inverse of `recipe_to_json`; raises KeyError, TypeError or ValueError for anything it does not know."""
    listed = []
    for entry in data["steps"]:
        if entry["name"] not in steps.STEPS:
            raise ValueError(f"steps: {entry['name']!r} is not a step; import the module that registers it")
        listed.append(Step(steps.STEPS[entry["name"]], dict(entry["parameters"])))
    return Recipe(str(data["name"]), scheme_from_json(data["scheme"]), tuple(listed), str(data["source"]))


# --- models ---------------------------------------------------------------------------------------------------------------


def empty_model(architecture: object, config: dict[str, Any], names: Iterable[str], size: int) -> nn.Module:
    """An unquantised model without memory (meta device) of a supported class.

    ``names`` and ``size``: the tensors there are and their bytes together. A configuration may not ask for another number of
    layers than they have, nor for more parameters than they can hold at 4 bits: both cost time and memory to no end.
    Raises ValueError for an unsupported architecture or wrong sizes, and whatever transformers raises for nonsense.
    """
    import transformers

    if architecture not in SUPPORTED:
        raise ValueError(f"architecture: {architecture!r} is not supported; supported: {', '.join(SUPPORTED)}")
    model_class = getattr(transformers, str(architecture))
    config = {k: v for k, v in config.items() if k not in _UNTRUSTED and not k.startswith("_")}
    layers = {match[1] for match in map(_LAYER.match, names) if match}
    wanted = config.get("num_hidden_layers")
    if type(wanted) is not int or wanted != len(layers):
        raise ValueError(f"num_hidden_layers: the configuration says {wanted!r}, there are tensors of {len(layers)} layers")
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"))
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype: {dtype} is not a floating-point type")
    with torch.device("meta"):
        model = model_class(model_class.config_class(**config)).to(dtype)
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > 2 * size:
        raise ValueError(f"config: describes {count} parameters, the tensors there are hold at most {2 * size}")
    return model


def fill(
    model: nn.Module,
    state: MutableMapping[str, torch.Tensor],
    scheme: Scheme,
    replacement: Callable[[str, nn.Linear], nn.Module | None],
    where: object,
    norms_may_be_missing: bool = False,
) -> None:
    """Give a model without memory its layers and tensors; ``state`` is emptied.

    ``replacement(name, linear)`` makes the quantised layer of a linear from tensors that it takes out of ``state``, or
    returns None where it stays. Everything else must be there under the model's own names, and nothing more
    (``norms_may_be_missing``: their gains are then 1). Raises CheckpointError, beginning with ``where``.
    """
    for block in describe(model).blocks:
        attention.state(block.attention).grid = scheme.kv
        for role in LINEARS:
            name = block.name(role)
            try:
                layer = replacement(name, block.linear(role))
            except CheckpointError:
                raise
            except Exception as error:  # nonsense in a stranger's configuration can make torch raise anything
                raise CheckpointError(f"{where}: {name}: {error}") from error
            if layer is not None:
                block.set_linear(role, layer)
    _fill_rest(model, state, where, norms_may_be_missing)
    attention.install(model)
    model.eval()


def _fill_rest(
    model: nn.Module, state: MutableMapping[str, torch.Tensor], where: object, norms_may_be_missing: bool
) -> None:
    """Load unquantised parameters and rebuild buffers that are not stored."""
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    expected = dict(model.named_parameters())
    if tied:
        expected.pop("lm_head.weight", None)
    unknown = sorted(state.keys() - expected.keys() - {ROTARY})
    missing = sorted(expected.keys() - state.keys())
    if norms_may_be_missing:
        missing = [name for name in missing if not name.endswith("norm.weight")]
    if unknown or missing:
        raise CheckpointError(f"{where}: unexpected tensors {unknown[:3]}, missing tensors {missing[:3]}")
    loaded: dict[str, torch.Tensor] = {}
    try:
        for name, parameter in expected.items():
            shape = tuple(parameter.shape)
            loaded[name] = take(state, name, shape, None) if name in state else torch.ones(shape, dtype=parameter.dtype)
        rotary = model.get_submodule("model.rotary_emb")
        fresh: Any = type(rotary)(config=model.config)
        if ROTARY in state:
            fresh.inv_freq = take(state, ROTARY, tuple(fresh.inv_freq.shape), None)
    except CheckpointError:
        raise
    except Exception as error:  # as above, from transformers
        raise CheckpointError(f"{where}: {error}") from error
    model.set_submodule("model.rotary_emb", fresh)
    model.load_state_dict(loaded, strict=False, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if tied:
        architecture = describe(model)
        architecture.head.weight = architecture.embedding.weight
