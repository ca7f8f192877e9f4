"""Export to compressed-tensors, the format of vLLM's own quantisation tools, which today's engines run on any GPU.

The format has no progressive weights. Ways around, chosen by `Layout`:

W8A8   the INT8 weights that QoQ's kernels decode to, stored as they are, with per-token INT8 activations. The same weights
       to the last bit, at 8 bits each. Also for per-channel 4-bit weights with an integer zero: code - zero fits INT8.
W4A16  4-bit codes with a scale (and zero) per group or channel; activations stay fp16. For progressive groups the scale is
       the product of both levels, rounded to fp16: each weight within 1 part in 2048.
W4A8   the same with per-token INT8 activations. Engines run it with symmetric weights only: not QoQ's, but those of the
       preset gptq-w4a8-g128. (QuaRot's are symmetric too, but need Hadamard transforms at run time, which no layout holds.)

The KV cache is the engine's own affair; nothing in this format describes QoQ's 4-bit cache.
"""

from __future__ import annotations

import os
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

from .affine import Affine
from .checks import require_enum
from .engine_files import engine_config, float_tensors, quantized_layers, write_export
from .grids import INT4, INT8, Zero
from .grouped import Grouped
from .packing import pack_u4_words
from .pipeline import QuantizedModel
from .progressive import ProgressiveWeight
from .reference import QuantizedWeight
from .schemes import ActivationFormat, Scheme, WeightFormat, WeightKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Layout(Enum):
    """How weights and activations are represented; see the module."""

    W8A8 = "W8A8"
    W4A16 = "W4A16"
    W4A8 = "W4A8"


# --- one linear layer -----------------------------------------------------------------------------------------------------


def tensors_of(weight: QuantizedWeight, layout: Layout) -> dict[str, torch.Tensor]:
    """A quantised weight ``[N, K]`` as compressed-tensors stores it, G groups per row (1 per channel).

    W8A8: ``weight`` int8 [N, K], ``weight_scale`` fp16 [N, 1]. 4 bits: ``weight_packed`` int32 [N, K / 8]
    (`packing.pack_u4_words` of code + 8 for signed codes), ``weight_scale`` fp16 [N, G], ``weight_shape`` int64 [2], and for
    asymmetric weights ``weight_zero_point`` int32 [N / 8, G], packed along N; ``w = (code - zero) * scale``.

    Raises ValueError where the layout cannot hold the weight.
    """
    if layout is Layout.W8A8:
        codes, scales = _eight_bits(weight)
        return {"weight": codes, "weight_scale": scales[:, None]}
    codes, scales, zeros = _four_bits(weight)
    if layout is Layout.W4A8 and zeros is not None:
        raise ValueError(
            "weights have a zero; engines run W4A8 with symmetric weights only, use Layout.W8A8 or Layout.W4A16"
        )
    n, k = codes.shape
    if n % 8 or k % 8:
        raise ValueError(f"{n}x{k} does not fill 32-bit words; N and K must be multiples of 8")
    tensors = {
        "weight_packed": pack_u4_words(codes),
        "weight_scale": scales,
        "weight_shape": torch.tensor([n, k], dtype=torch.int64),
    }
    return tensors if zeros is None else {**tensors, "weight_zero_point": pack_u4_words(zeros.T).T.contiguous()}


def _eight_bits(weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [N, K] and fp16 scales [N] that stand for exactly the same weights."""
    if isinstance(weight, ProgressiveWeight):
        return weight.int8(), weight.channel_scales
    if isinstance(weight, Affine) and weight.zeros is None:
        return weight.codes, weight.scales
    if isinstance(weight, Affine) and weight.zero is Zero.INTEGER and weight.zeros is not None:
        return weight.codes.to(torch.int8) - weight.zeros.to(torch.int8)[:, None], weight.scales
    kind = "real-valued zeros" if isinstance(weight, Affine) else "fp16 scales per group"
    raise ValueError(f"weights with {kind} are no INT8 integers times one scale per channel; use Layout.W4A16")


def _four_bits(weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """uint8 codes [N, K] in 0..15, fp16 scales [N, G] and uint8 zeros [N, G], or None where all are 8."""
    if isinstance(weight, ProgressiveWeight):
        scales = (weight.channel_scales.float()[:, None] * weight.group_scales.float()).half()
        zeros = weight.group_zeros
    else:
        grouped = isinstance(weight, Grouped)
        scales = weight.scales if grouped else weight.scales[:, None]
        if weight.zeros is None:
            if weight.grid != INT4 or (isinstance(weight, Grouped) and weight.outliers):
                raise ValueError(f"{WeightFormat.of(weight).kind.value} weights have codes beyond 4 bits; use Layout.W8A8")
            return (weight.codes + 8).to(torch.uint8), scales, None
        zeros = weight.zeros if grouped else weight.zeros[:, None]
    if weight.zero is Zero.SCALED:
        raise ValueError("zeros are no codes; the format holds integer zeros only, as Zero.INTEGER makes them")
    if not bool(torch.isfinite(scales).all()):
        raise ValueError("products of both scales are more than fp16 holds")
    return weight.codes, scales, zeros


# --- a model --------------------------------------------------------------------------------------------------------------


def export_compressed_tensors(
    quantized: QuantizedModel,
    folder: str | os.PathLike[str],
    layout: Layout | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write a compressed-tensors checkpoint: ``model.safetensors`` and ``config.json`` with its ``quantization_config``.

    ``layout``: see `Layout`; by default W8A8 for INT8 activations (W4A8 if weights are symmetric and 4-bit) and W4A16 for
    unquantised ones. ``tokenizer`` is saved beside them. A new folder appears complete or not at all.

    Raises TypeError for anything but a `QuantizedModel` or for a wrong ``layout``, ValueError naming what the layout cannot
    hold.
    """
    if not isinstance(quantized, QuantizedModel):
        raise TypeError(f"quantized: expected a QuantizedModel, got {type(quantized).__name__}")
    recipe = quantized.recipe
    if layout is None:
        layout = _default_layout(recipe.scheme)
    require_enum("layout", layout, Layout)
    form, activations = recipe.scheme.weights, recipe.scheme.activations
    if form is None:
        raise ValueError(f"recipe: {recipe.name!r} has unquantised weights; save the model as it is")
    allowed = (INT8, ActivationFormat(INT8), *((None,) if layout is Layout.W4A16 else ()))
    if activations not in allowed:
        name, rule = activations.name if activations else "unquantised", "INT8 ones, with one scale per token"
        rule += ", or unquantised ones" if layout is Layout.W4A16 else ""
        raise ValueError(f"recipe: {recipe.name!r} has {name} activations; layout {layout.value} is for {rule}")
    state = float_tensors(quantized)
    for path, layer in quantized_layers(quantized):
        try:
            state.update({f"{path}.{part}": tensor for part, tensor in tensors_of(layer.quantized, layout).items()})
        except ValueError as error:
            raise ValueError(f"quantized: {path}: {error}") from None
    config = {**engine_config(quantized), "quantization_config": quantization_config(form, layout)}
    write_export(folder, state, config, quantized, tokenizer)


def _default_layout(scheme: Scheme) -> Layout:
    if scheme.activations is None:
        return Layout.W4A16
    symmetric = scheme.weights is not None and scheme.weights.kind in (WeightKind.GROUP_S4, WeightKind.CHANNEL_S4)
    return Layout.W4A8 if symmetric else Layout.W8A8


def quantization_config(form: WeightFormat, layout: Layout) -> dict[str, Any]:
    """The entry of ``config.json`` that tells engines how weights are stored."""
    eight = layout is Layout.W8A8
    grouped = form.kind.grouped and not eight
    weights = {
        "num_bits": 8 if eight else 4,
        "type": "int",
        "symmetric": eight or not form.kind.asymmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": form.group_size if grouped else None,
        "dynamic": False,
    }
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    storage = "int-quantized" if eight else "pack-quantized"
    group: dict[str, Any] = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None if layout is Layout.W4A16 else activations,
        "output_activations": None,
    }
    if layout is Layout.W4A8:
        group["format"] = storage  # the package would infer unpacked INT8; releases before 0.11 refuse the entry
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": storage,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
