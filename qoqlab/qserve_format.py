"""Checkpoints in the layout of QServe's kernels, which QServe and SGLang load: 4-bit weights per channel or groups of 128.

Per linear layer, tensors of `tensors_of`; everything else in fp16 under its Hugging Face name, the head untied; a
``config.json`` that engines of 2024 understand as well. Engines concatenate q, k, v and gate, up along N, which is possible
because tiles of packed codes and the order of scales span 32 channels. The 4-bit KV cache needs nothing in the file.

Formulas and byte orders: mit-han-lab/qserve at de6a2ec, ``w4a8_linear.py``, ``w8a8_linear.py`` and ``llama_w4a8_unpad.py``.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import nn

from . import packing, runtime
from .affine import Affine
from .architecture import LINEARS, describe
from .checks import require_enum, require_finite
from .engine_files import (
    engine_config,
    float_tensors,
    model_of_config,
    open_state,
    quantized_layers,
    recorded_recipe,
    require_recorded,
    write_export,
)
from .grids import INT8, UINT4, UINT8, Grid, Zero
from .kv import KVFormat
from .packing import ScaleOrder
from .pipeline import REPORT_COLUMNS, QuantizedModel
from .progressive import FirstLevel, ProgressiveWeight
from .rebuild import fill
from .recipes import Recipe
from .reference import QuantizedWeight
from .schemes import ActivationFormat, Scheme, WeightFormat, WeightKind
from .tensorfile import CheckpointError, read_json, take

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: The group size that QServe's and TensorRT-LLM's per-group kernels are compiled for.
GROUP_SIZE = 128


class Engine(Enum):
    """Engines that read this layout, in the versions that `limits` names."""

    QSERVE = "QServe"
    SGLANG = "SGLang"


# --- one linear layer -----------------------------------------------------------------------------------------------------


def tensors_of(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """A quantised weight ``[N, K]`` as the tensors that QServe's linear layer holds.

    Progressive (groups of 128, N and K multiples of 32):
    ``qweight`` int8 [N, K / 2] (`packing.pack_qserve`), ``s1_scales`` fp16 [N], ``s2_scales`` int8 [K / 128, N] and
    ``s2_zeros`` int8 [K / 128, N], both in `packing.ScaleOrder.QSERVE`; ``s2_zeros`` is what the kernel *adds* after
    multiplying: ``-(zero * scale)`` mod 256 (``-zero`` for ``Zero.SCALED``).
    Per channel: ``qweight``, ``s1_scales`` fp16 [N], ``s1_szeros`` fp16 [N] = ``zero * scale`` (``zero`` for
    ``Zero.SCALED``), what it *subtracts*. INT8: ``weight`` int8 [N, K], ``dequant_scale`` fp16 [N].

    Raises ValueError for a weight that the layout cannot hold.

    >>> w = ProgressiveWeight(*(torch.full((32, 1), v) for v in (1, 16, 7)), 128, Zero.INTEGER, FirstLevel.UNROUNDED,
    ...                       torch.zeros(32, 128, dtype=torch.uint8))
    >>> tensors_of(w)["s2_zeros"][0, 0].item()
    -112
    """
    if isinstance(weight, ProgressiveWeight):
        if weight.group_size != GROUP_SIZE:
            raise ValueError(f"group_size: QServe's kernels read groups of {GROUP_SIZE}, got {weight.group_size}")
        scaled = weight.group_zeros.to(torch.int16)
        if weight.zero is Zero.INTEGER:
            scaled = scaled * weight.group_scales.to(torch.int16)
        added = (-scaled).bitwise_and(255).to(torch.uint8).view(torch.int8)
        return {
            "qweight": packing.pack_qserve(weight.codes),
            "s1_scales": weight.channel_scales.flatten(),
            "s2_scales": packing.permute_qserve_scales(weight.group_scales.to(torch.int8).T).contiguous(),
            "s2_zeros": packing.permute_qserve_scales(added.T).contiguous(),
        }
    if not isinstance(weight, Affine) or weight.grid not in (UINT4, INT8):
        kind = WeightFormat.of(weight).kind.value
        raise ValueError(f"weight: QServe holds progressive-u4 (groups of 128), channel-u4 and channel-s8, not {kind}")
    if weight.zeros is None:
        return {"weight": weight.codes, "dequant_scale": weight.scales}
    szeros = weight.zeros.float() * (weight.scales.float() if weight.zero is Zero.INTEGER else 1)
    if not bool(torch.isfinite(szeros.half()).all()):
        raise ValueError(f"weight: zero * scale reaches {float(szeros.abs().max())}, more than fp16 holds")
    return {"qweight": packing.pack_qserve(weight.codes), "s1_scales": weight.scales, "s1_szeros": szeros.half()}


def weight_of(tensors: Mapping[str, torch.Tensor], form: WeightFormat, order: ScaleOrder) -> QuantizedWeight:
    """Inverse of `tensors_of`: codes, scales and zeros bit for bit, for second-level tensors stored in ``order``.

    Raises ValueError where zeros are not of ``form.zero``'s kind, or a decoded weight would leave INT8.
    """
    for name in ("s1_scales", "s1_szeros", "dequant_scale"):
        if name in tensors:
            require_finite(name, tensors[name])
    if form.kind is WeightKind.CHANNEL_S8:
        return Affine(tensors["dequant_scale"], None, INT8, Zero.INTEGER, tensors["weight"])
    codes = packing.unpack_qserve(tensors["qweight"])
    if form.kind is WeightKind.CHANNEL_U4:
        zeros = tensors["s1_szeros"]
        if form.zero is Zero.INTEGER:
            zeros = _integer_zeros(zeros.float(), tensors["s1_scales"].float())
        return Affine(tensors["s1_scales"], zeros, UINT4, form.zero, codes)
    scales, added = (packing.unpermute_qserve_scales(tensors[n], order).T.contiguous() for n in ("s2_scales", "s2_zeros"))
    if int(scales.min()) < 1:
        raise ValueError(f"s2_scales: expected 1..127, got {int(scales.min())}")
    if form.zero is Zero.INTEGER:
        zeros = _integer_zeros((-added.int() & 255).float(), scales.float())
    else:
        zeros = (-added.int()).to(torch.int8)
    weight = ProgressiveWeight(tensors["s1_scales"], scales, zeros, GROUP_SIZE, form.zero, form.first_level, codes)
    decoded = replace(weight, channel_scales=torch.ones_like(weight.channel_scales)).dequantize()
    if float(decoded.min()) < -128 or float(decoded.max()) > 127:
        raise ValueError(
            f"decoded weights reach {int(decoded.min())}..{int(decoded.max())} and would wrap in INT8; "
            "are scales in another order (pass scale_order=...)?"
        )
    return weight


def _integer_zeros(scaled: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes whose products with ``scales``, rounded to fp16, are ``scaled``; ValueError where there are none."""
    zeros = (scaled / scales).round()
    fits = (zeros * scales).half() == scaled.half()
    if not bool((fits & (zeros >= 0) & (zeros <= 15)).all()):
        raise ValueError("zeros are not whole multiples 0..15 of the scales")
    return zeros.to(torch.uint8)


# --- what engines can run -------------------------------------------------------------------------------------------------


def limits(quantized: QuantizedModel) -> dict[Engine, list[str]]:
    """Why an engine would not load, or silently miscompute, this model's export; empty lists where nothing is known.

    From their sources: QServe at de6a2ec, SGLang's ``qoq.py`` (from pull request 6521 of May 2025 to 31109 of July 2026).
    """
    model: Any = quantized.model
    blocks, config = describe(model).blocks, model.config
    qserve, sglang = [], []
    kind = type(model).__name__
    if kind not in ("LlamaForCausalLM", "MistralForCausalLM"):
        qserve.append(f"builds Llama and Mistral only, not {kind} (and skips the QK-norms of Qwen3)")
    gains = [n for n, p in model.named_parameters() if n.endswith("norm.weight") and not bool((p == 1).all())]
    if gains:
        qserve.append(f"skips norm gains, and {gains[0]} is not all ones; use a recipe that rotates, which folds them")
    block = blocks[0]
    if block.heads * block.head_dim != config.hidden_size:
        qserve.append(
            f"takes hidden_size / heads for the head size, here {config.hidden_size // block.heads}, not {block.head_dim}"
        )
    if block.head_dim != 128:
        qserve.append(f"has attention kernels for heads of 128, not {block.head_dim}")
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") != "default":
        qserve.append(f"ignores rope scaling, here {config.rope_parameters['rope_type']}")
    odd = [
        f"{block.name(role)} {linear.out_features}x{linear.in_features}"
        for role, linear in block.linears()
        if linear.out_features % 128 or linear.in_features % 128
    ]
    if odd:
        qserve.append(f"computes whole tiles of 128 channels and inputs only: {odd[0]}")
    if quantized.recipe.scheme.weights and quantized.recipe.scheme.weights.kind is WeightKind.CHANNEL_S8:
        sglang.append("reads 4-bit weights only under quant_method qoq")
    return {Engine.QSERVE: qserve, Engine.SGLANG: sglang}


def require_representable(recipe: Recipe) -> WeightFormat:
    """The weight format, or ValueError for what no checkpoint in this layout can say."""
    scheme, form = recipe.scheme, recipe.scheme.weights
    kinds = (WeightKind.PROGRESSIVE_U4, WeightKind.CHANNEL_U4, WeightKind.CHANNEL_S8)
    if form is None or form.kind not in kinds or (form.kind is WeightKind.PROGRESSIVE_U4 and form.group_size != GROUP_SIZE):
        got = "unquantised weights" if form is None else f"{form.kind.value} weights"
        got += f" in groups of {form.group_size}" if form and form.kind.grouped else ""
        raise ValueError(
            f"recipe: {recipe.name!r} has {got}; QServe holds progressive 4-bit weights in groups of {GROUP_SIZE}, "
            "4-bit and 8-bit weights per channel"
        )
    if scheme.activations not in (INT8, ActivationFormat(INT8)):
        name = scheme.activations.name if scheme.activations else "unquantised"
        raise ValueError(f"recipe: {recipe.name!r} has {name} activations; QServe's are INT8, one scale per token")
    if not _plain_kv(scheme.kv):
        raise ValueError(f"recipe: {recipe.name!r} caches {scheme.kv}; QServe's cache is UINT4 or UINT8 per token and head")
    return form


def _plain_kv(kv: Grid | KVFormat | None) -> bool:
    return KVFormat.of(kv) in (None, KVFormat(None), KVFormat(UINT4), KVFormat(UINT8))


# --- export ---------------------------------------------------------------------------------------------------------------


def export_qserve(
    quantized: QuantizedModel,
    folder: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    engine: Engine | None = None,
) -> None:
    """Write a checkpoint that QServe and SGLang load: ``model.safetensors`` and ``config.json``; see `tensors_of`.

    ``tokenizer`` is saved beside them, where engines look for one. Whatever an engine cannot run (`limits`) is a warning, or
    an error for the ``engine`` that you name. TensorRT-LLM reads another file, see `deepcompressor.export_deepcompressor`.
    A new folder appears complete or not at all.

    Raises TypeError for anything but a `QuantizedModel`, ValueError naming what the layout cannot hold: other formats than
    W4A8 and W8A8, groups other than 128, input transforms at run time, N or K that are not multiples of 32, values beyond
    fp16's range.
    """
    if not isinstance(quantized, QuantizedModel):
        raise TypeError(f"quantized: expected a QuantizedModel, got {type(quantized).__name__}")
    if engine is not None:
        require_enum("engine", engine, Engine)
    form = require_representable(quantized.recipe)
    for name, reasons in limits(quantized).items():
        text = f"export_qserve: {name.value} {'; '.join(reasons)}"
        if reasons and name is engine:
            raise ValueError(text)
        if reasons and engine is None:
            warnings.warn(text, stacklevel=2)
    state = float_tensors(quantized)
    for path, layer in quantized_layers(quantized):
        try:
            state.update({f"{path}.{part}": tensor for part, tensor in tensors_of(layer.quantized).items()})
        except ValueError as error:
            raise ValueError(f"quantized: {path}: {error}") from None
    config = engine_config(quantized)
    if form.kind is not WeightKind.CHANNEL_S8:
        group_size = GROUP_SIZE if form.kind is WeightKind.PROGRESSIVE_U4 else -1
        config["quantization_config"] = {"quant_method": "qoq", "wbits": 4, "group_size": group_size}
    write_export(folder, state, config, quantized, tokenizer)


# --- import ---------------------------------------------------------------------------------------------------------------


def import_qserve(folder: str | os.PathLike[str], scale_order: ScaleOrder | None = None) -> QuantizedModel:
    """Read a checkpoint in QServe's layout: our own, one of the published ones, or deepcompressor's output.

    Codes and scales come back bit for bit, everything else in the types of the file. The KV cache counts as 4-bit unless our
    own recipe in the file says otherwise. Per-group scales of deepcompressor's converter lie in a wrong order;
    ``scale_order=None`` finds out (`scale_order_errors`), repairs it and warns. ``*.pt`` and ``*.bin`` files are read when
    there is no ``*.safetensors`` (weights only, never arbitrary pickles).

    Raises `CheckpointError` (a ValueError) naming the file and what is wrong with it.
    """
    if scale_order is not None:
        require_enum("scale_order", scale_order, ScaleOrder)
    path = Path(folder)
    config = read_json(path / "config.json")
    with open_state(path) as (state, metadata):
        where = str(path)
        try:
            ours = recorded_recipe(metadata)
            require_recorded(config, metadata, path / "config.json")
            source = "a checkpoint in QServe's layout"
            recipe = ours or Recipe("imported", Scheme(_find_format(state), INT8, UINT4), source=source)
            form = require_representable(recipe)
            model = model_of_config(config, state, path)
            order = scale_order or (ScaleOrder.QSERVE if ours else _find_order(state, model, form))
        except CheckpointError:
            raise
        except Exception as error:  # a stranger's configuration can make transformers raise anything
            raise CheckpointError(f"{where}: {type(error).__name__}: {error}") from error
        if order is ScaleOrder.DEEPCOMPRESSOR and scale_order is None:
            warnings.warn(
                f"import_qserve: {path}: per-group scales are in deepcompressor's wrong order; repaired", stacklevel=2
            )
        replacement = functools.partial(_replacement, state, recipe.scheme, form, order)
        fill(model, state, recipe.scheme, replacement, where, norms_may_be_missing=True)
    return QuantizedModel(model, recipe, pd.DataFrame(columns=REPORT_COLUMNS))


def _replacement(
    state: MutableMapping[str, torch.Tensor],
    scheme: Scheme,
    form: WeightFormat,
    order: ScaleOrder,
    name: str,
    linear: nn.Linear,
) -> nn.Module:
    n, k = linear.out_features, linear.in_features
    parts = {part: take(state, f"{name}.{part}", *expected) for part, expected in _layout(form, n, k).items()}
    if linear.bias is not None and name.endswith(LINEARS["o"]) and f"{name}.bias" not in state:
        bias: torch.Tensor | None = torch.zeros(n, dtype=torch.float16)  # QServe's are zero unless the file says otherwise
    else:
        bias = runtime.take_bias(state, name, linear)
    assert isinstance(scheme.activations, Grid | ActivationFormat)
    return runtime.QuantLinear(weight_of(parts, form, order), bias, scheme.activations)


def _layout(form: WeightFormat, n: int, k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of a linear, see `tensors_of`."""
    if form.kind is WeightKind.CHANNEL_S8:
        return {"weight": ((n, k), torch.int8), "dequant_scale": ((n,), torch.float16)}
    parts = {"qweight": ((n, k // 2), torch.int8), "s1_scales": ((n,), torch.float16)}
    if form.kind is WeightKind.CHANNEL_U4:
        return {**parts, "s1_szeros": ((n,), torch.float16)}
    if k % GROUP_SIZE:
        raise ValueError(f"{n}x{k} is not divisible into groups of {GROUP_SIZE} along K")
    groups = ((k // GROUP_SIZE, n), torch.int8)
    return {**parts, "s2_scales": groups, "s2_zeros": groups}


def _find_format(state: MutableMapping[str, torch.Tensor]) -> WeightFormat:
    """The format of a checkpoint that does not say, from the names there are and the values of zeros and scales."""
    if any(name.endswith("proj.dequant_scale") for name in state):
        return WeightFormat(WeightKind.CHANNEL_S8)
    grouped = any(name.endswith("proj.s2_scales") for name in state)
    kind = WeightKind.PROGRESSIVE_U4 if grouped else WeightKind.CHANNEL_U4
    zeros, scales = ("s2_zeros", "s2_scales") if grouped else ("s1_szeros", "s1_scales")
    found = [name.removesuffix(zeros) for name in state if name.endswith(f"proj.{zeros}")]
    if not found:
        raise ValueError("there are neither s2_zeros nor s1_szeros nor dequant_scale")
    zero = Zero.INTEGER
    for name in found:
        stored, scale = state[name + zeros], state[name + scales].float()
        try:
            _integer_zeros((-stored.int() & 255).float() if grouped else stored.float(), scale)
        except (ValueError, RuntimeError):
            zero = Zero.SCALED
            break
    return WeightFormat(kind, GROUP_SIZE, zero, FirstLevel.UNROUNDED)


def _find_order(state: MutableMapping[str, torch.Tensor], model: nn.Module, form: WeightFormat) -> ScaleOrder:
    """The order that fits all layers of a checkpoint best."""
    if form.kind is not WeightKind.PROGRESSIVE_U4:
        return ScaleOrder.QSERVE
    total = dict.fromkeys(ScaleOrder, 0.0)
    for block in describe(model).blocks:
        for role in LINEARS:
            name, linear = block.name(role), block.linear(role)
            parts = {}
            for part, (shape, dtype) in _layout(form, linear.out_features, linear.in_features).items():
                tensor = state.get(f"{name}.{part}")
                if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != dtype:
                    return ScaleOrder.QSERVE  # `fill` will say what is wrong
                parts[part] = tensor
            for order, error in scale_order_errors(parts).items():
                total[order] += error
    return min(ScaleOrder, key=lambda order: total[order])


def scale_order_errors(tensors: Mapping[str, torch.Tensor]) -> dict[ScaleOrder, float]:
    """How badly each order of second-level scales fits a layer's codes.

    Weights average to nearly 0 over a group, so the mean code is nearly the zero point: the sum of squared differences is
    small for the order in which zeros were written and large where channels have each other's.
    """
    codes = packing.unpack_qserve(tensors["qweight"]).float().unflatten(1, (-1, GROUP_SIZE)).mean(-1)  # [N, G]
    errors = {}
    for order in ScaleOrder:
        scales, added = (packing.unpermute_qserve_scales(tensors[n], order).T.float() for n in ("s2_scales", "s2_zeros"))
        errors[order] = float((codes + added / scales.clamp(min=1)).square().sum())
    return errors
