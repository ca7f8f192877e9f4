"""deepcompressor's checkpoints: fake-quantised fp16 weights in ``model.pt`` beside their scales in ``scale.pt``.

What deepcompressor (and LMQuant, its ancestor) writes, and what TensorRT-LLM's ``convert_checkpoint.py`` reads. Codes are
not stored; they follow from weights and scales. For a weight ``W [N, K]`` with G groups:

``W.scale.0``      [N, 1, 1, 1]  scale per channel, fp16 values
``W.scale.1``      [N, 1, G, 1]  scale per group, int8 values; absent per channel
``W.zero``         [N, 1, G, 1]  zero in codes, ``w = (code - zero) * scale`` (LMQuant, the paper): 0..15, or -8..7 for codes
                   that are signed, too
``W.scaled_zero``  [N, 1, G, 1]  zero times scale, ``w = code * scale - zero`` (deepcompressor since 0.1): real per channel
                   (G = 1), in units of INT8 per group

Sources: mit-han-lab/deepcompressor at 69f3473, ``backend/qserve``; TensorRT-LLM's ``qserve_*`` functions in ``quantize.py``.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import nn

from . import runtime
from .affine import Affine
from .engine_files import (
    engine_config,
    export_folder,
    float_tensors,
    load_tensors,
    model_of_config,
    quantized_layers,
)
from .grids import INT8, UINT4, Grid, Zero
from .pipeline import REPORT_COLUMNS, QuantizedModel
from .progressive import FirstLevel, ProgressiveWeight
from .qserve_format import require_representable
from .rebuild import fill
from .recipes import Recipe
from .reference import QuantizedWeight
from .schemes import Scheme, WeightFormat, WeightKind
from .tensorfile import CheckpointError, read_json, take

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: How far from an integer a code may come out. fp16 rounds an INT8 value by at most 127 / 2**12 = 0.03; the wrong scales, or
#: weights that were never rounded to them, miss by up to 0.5.
TOLERANCE = 0.25
_ZEROS = {Zero.INTEGER: "zero", Zero.SCALED: "scaled_zero"}


# --- one weight -----------------------------------------------------------------------------------------------------------


def weight_of(
    values: torch.Tensor, scales: Mapping[str, torch.Tensor], form: WeightFormat, offset: int = 0
) -> QuantizedWeight:
    """Codes of a fake-quantised ``[N, K]``, given its ``scale.0`` [N], ``scale.1`` and ``zero`` or ``scaled_zero`` [N, G].

    ``offset`` is added to a ``zero``, and so to the codes: 8 where both are stored signed. Raises ValueError for weights
    that are not such multiples of their scales, codes outside 0..15 and scales that are not in their formats.
    """
    channel = _exact("scale.0", scales["scale.0"].flatten(), torch.float16)
    if not bool((channel > 0).all()):
        raise ValueError("scale.0: expected positive scales")
    y = values.float() / channel.float()[:, None]
    if form.kind is WeightKind.CHANNEL_S8:
        return Affine(channel, None, INT8, Zero.INTEGER, _whole(y, -128, 127).to(torch.int8))
    zeros = scales[_ZEROS[form.zero]].float()
    if form.kind is WeightKind.CHANNEL_U4:
        if form.zero is Zero.INTEGER:
            kept = _exact("zero", zeros[:, 0] + offset, torch.uint8, 15)
            return Affine(channel, kept, UINT4, form.zero, _whole(y + kept.float()[:, None], 0, 15).to(torch.uint8))
        kept = _exact("scaled_zero", zeros[:, 0], torch.float16)
        y = (values.float() + kept.float()[:, None]) / channel.float()[:, None]
        return Affine(channel, kept, UINT4, form.zero, _whole(y, 0, 15).to(torch.uint8))
    group = _exact("scale.1", scales["scale.1"], torch.int8)
    if not bool((group > 0).all()):
        raise ValueError("scale.1: expected positive scales")
    units, step = _whole(y, -128, 127).unflatten(1, (group.shape[1], -1)), group.float()[..., None]
    if form.zero is Zero.INTEGER:
        kept = _exact("zero", zeros + offset, torch.uint8, 15)
        codes = units / step + kept.float()[..., None]
    else:
        kept = _exact("scaled_zero", zeros, torch.int8)
        codes = (units + kept.float()[..., None]) / step
    # whole units that are no multiples of a group's scale miss an integer by 1 / 127 or more
    codes = _whole(codes.flatten(1), 0, 15, 1e-3).to(torch.uint8)
    return ProgressiveWeight(channel, group, kept, form.group_size, form.zero, form.first_level, codes)


def _whole(values: torch.Tensor, low: int, high: int, tolerance: float = TOLERANCE) -> torch.Tensor:
    """Values rounded to integers, which they must nearly be already, in ``low..high``."""
    rounded = values.round()
    off = float((values - rounded).abs().max())
    if not off <= tolerance:  # NaN is refused as well
        raise ValueError(
            f"weights are not multiples of their scales: one is {off:.2f} steps off; not fake-quantised with these"
        )
    if float(rounded.min()) < low or float(rounded.max()) > high:
        raise ValueError(
            f"codes {int(rounded.min())}..{int(rounded.max())} are outside {low}..{high}; other scales or zeros?"
        )
    return rounded


def _exact(name: str, values: torch.Tensor, dtype: torch.dtype, most: float = float("inf")) -> torch.Tensor:
    """Values in ``dtype``, which must hold each of them exactly."""
    stored = values.to(dtype)
    if not torch.equal(stored.double(), values.double()) or not bool(torch.isfinite(values.double()).all()):
        raise ValueError(f"{name}: values {float(values.min()):g}..{float(values.max()):g} are not all {dtype} numbers")
    if float(values.max()) > most:
        raise ValueError(f"{name}: expected at most {most:g}, got {float(values.max()):g}")
    return stored


# --- import ---------------------------------------------------------------------------------------------------------------


def import_deepcompressor(folder: str | os.PathLike[str], config: str | os.PathLike[str] | None = None) -> QuantizedModel:
    """Read ``model.pt`` and ``scale.pt`` of deepcompressor or LMQuant, whichever way zeros are stored.

    ``config``: the unquantised model's folder or ``config.json`` (default: ``folder``'s own). To convert, pass the result
    to `qserve_format.export_qserve`: scales then lie in the order that kernels read, unlike those of deepcompressor's own
    converter.

    The files do not name the cache's format: 4 bits are assumed beside 4-bit weights, none beside INT8 weights.

    Raises `CheckpointError` (a ValueError) naming the file or the weight, also where weights are no multiples of their
    scales.
    """
    path, config_path = Path(folder), Path(folder if config is None else config)
    settings = read_json(config_path / "config.json" if config_path.is_dir() else config_path)
    state: MutableMapping[str, torch.Tensor] = load_tensors(path / "model.pt")
    scales = load_tensors(path / "scale.pt")
    try:
        form, offset = _find_format(state, scales), _find_offset(scales)
        scheme = Scheme(form, INT8, None if form.kind is WeightKind.CHANNEL_S8 else UINT4)
        model = model_of_config(settings, state, path)
    except Exception as error:  # a stranger's configuration can make transformers raise anything
        raise CheckpointError(f"{path}: {type(error).__name__}: {error}") from error
    fill(model, state, scheme, functools.partial(_replacement, state, scales, scheme, offset), path)
    if scales:
        raise CheckpointError(f"{path / 'scale.pt'}: unexpected tensors {sorted(scales)[:3]}")
    recipe = Recipe("imported", scheme, source="deepcompressor's model.pt and scale.pt")
    return QuantizedModel(model, recipe, pd.DataFrame(columns=REPORT_COLUMNS))


def _find_format(state: Mapping[str, torch.Tensor], scales: Mapping[str, torch.Tensor]) -> WeightFormat:
    """The weight format that names and shapes tell of."""
    kinds = [zero for zero, name in _ZEROS.items() if any(n.endswith(f".weight.{name}") for n in scales)]
    if len(kinds) > 1:
        raise ValueError("scale.pt: has both zero and scaled_zero")
    for name, tensor in scales.items():
        if name.endswith(".scale.1") and kinds:
            weight = state[name.removesuffix(".scale.1")]
            if tensor.ndim != 4 or weight.ndim != 2 or not tensor.shape[2] or weight.shape[1] % tensor.shape[2]:
                raise ValueError(
                    f"{name}: shape {list(tensor.shape)} does not split {list(weight.shape)} into groups along K"
                )
            size = weight.shape[1] // tensor.shape[2]
            return WeightFormat(WeightKind.PROGRESSIVE_U4, size, kinds[0], FirstLevel.UNROUNDED)
    if kinds:
        return WeightFormat(WeightKind.CHANNEL_U4, zero=kinds[0])
    return WeightFormat(WeightKind.CHANNEL_S8)


def _find_offset(scales: Mapping[str, torch.Tensor]) -> int:
    """8 where zeros are signed. The recipe decides that: a layer whose zeros happen to be positive follows the others."""
    return 8 if any(bool((t < 0).any()) for name, t in scales.items() if name.endswith(".weight.zero")) else 0


def _replacement(
    state: MutableMapping[str, torch.Tensor],
    scales: MutableMapping[str, torch.Tensor],
    scheme: Scheme,
    offset: int,
    name: str,
    linear: nn.Linear,
) -> nn.Module:
    form, (n, k) = scheme.weights, (linear.out_features, linear.in_features)
    assert form is not None and isinstance(scheme.activations, Grid)
    if k % form.multiple:
        raise ValueError(f"{n}x{k} is not divisible into groups of {form.multiple} along K")
    shapes = {"scale.0": 1}
    if form.kind is WeightKind.PROGRESSIVE_U4:
        shapes["scale.1"] = form.groups(k)
    if form.kind is not WeightKind.CHANNEL_S8:
        shapes[_ZEROS[form.zero]] = form.groups(k)
    parts = {part: _take_scales(scales, f"{name}.weight.{part}", n, groups) for part, groups in shapes.items()}
    weight = weight_of(take(state, f"{name}.weight", (n, k), None), parts, form, offset)
    return runtime.QuantLinear(weight, runtime.take_bias(state, name, linear), scheme.activations)


def _take_scales(scales: MutableMapping[str, torch.Tensor], name: str, n: int, groups: int) -> torch.Tensor:
    """Remove and return ``[N, G]`` numbers of any real type, stored as [N, 1, G, 1]."""
    tensor = scales.pop(name, None)
    if tensor is None or tuple(tensor.shape) != (n, 1, groups, 1) or tensor.dtype == torch.bool:
        got = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise ValueError(f"scale.pt: {name}: expected {[n, 1, groups, 1]}, got {got}")
    return tensor[:, 0, :, 0]


# --- export ---------------------------------------------------------------------------------------------------------------


def export_deepcompressor(
    quantized: QuantizedModel, folder: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Write ``model.pt`` and ``scale.pt`` (with ``scaled_zero``) and ``config.json``: what TensorRT-LLM converts.

    Every weight is decoded again as TensorRT-LLM does it, and must give the same codes. ``tokenizer`` is saved beside them.

    Raises TypeError for anything but a `QuantizedModel`, ValueError for what QServe's kernels do not hold (see
    `qserve_format.export_qserve`) and for weights whose codes do not follow from fp16 values and scales.
    """
    if not isinstance(quantized, QuantizedModel):
        raise TypeError(f"quantized: expected a QuantizedModel, got {type(quantized).__name__}")
    require_representable(quantized.recipe)
    state = float_tensors(quantized)
    scales: dict[str, torch.Tensor] = {}
    for path, layer in quantized_layers(quantized):
        weight = layer.quantized
        values, parts = weight.dequantize(torch.float16), _scales_of(weight)
        form = WeightFormat.of(weight)
        try:
            again = weight_of(values, parts, WeightFormat(form.kind, form.group_size, Zero.SCALED))
            if not torch.equal(again.codes, weight.codes):
                raise ValueError("fp16 weights and scales do not determine the codes")
        except ValueError as error:
            raise ValueError(f"quantized: {path}: {error}") from None
        state[f"{path}.weight"] = values
        scales.update({f"{path}.weight.{part}": t.float()[:, None, :, None].cpu() for part, t in parts.items()})
    with export_folder(folder, engine_config(quantized), quantized, tokenizer) as temporary:
        torch.save({name: tensor.cpu().contiguous() for name, tensor in state.items()}, temporary / "model.pt")
        torch.save(scales, temporary / "scale.pt")


def _scales_of(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """Scales and scaled zeros of a weight, ``[N, 1]`` or ``[N, G]``."""
    if isinstance(weight, ProgressiveWeight):
        zeros = weight.group_zeros.int()
        if weight.zero is Zero.INTEGER:
            zeros = zeros * weight.group_scales.int()
        return {"scale.0": weight.channel_scales[:, None], "scale.1": weight.group_scales, "scaled_zero": zeros}
    assert isinstance(weight, Affine)
    if weight.zeros is None:
        return {"scale.0": weight.scales[:, None]}
    zeros = weight.zeros.float() * (weight.scales.float() if weight.zero is Zero.INTEGER else 1)
    return {"scale.0": weight.scales[:, None], "scaled_zero": zeros.half()[:, None]}
