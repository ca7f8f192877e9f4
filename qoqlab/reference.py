"""What a kernel must equal: plain torch on quantised operands.

Integer accumulations are exact by construction, not by luck: products are summed in floating point only as far as every
partial sum is an integer that the mantissa holds, so any summation order gives the same number.
"""

from __future__ import annotations

import torch

from .affine import Affine, quantize_per_token_s8
from .checks import require_codes, require_finite, require_float, shape_of
from .grids import Zero
from .grouped import Grouped
from .progressive import ProgressiveWeight

#: Largest K for which sums of products of two int8 numbers stay exact in fp32: 1024 * 128 * 128 = 2**24.
FP32_EXACT_K = 1024

QuantizedWeight = ProgressiveWeight | Affine | Grouped


def int_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Exact integer product: int8 or uint8 codes ``a [M, K]`` and ``b [N, K]`` -> int64 ``[M, N]`` = a @ b.T.

    Entries must lie in -128..127 in both operands (4-bit codes do). Fast on a CPU, where integer matmul is slow: slices of
    `FP32_EXACT_K` are multiplied in fp32, exactly, and added in int64.
    """
    require_codes("a", a, -128, 127)
    require_codes("b", b, -128, 127)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a, b: expected [M, K] and [N, K], got {shape_of(a)} and {shape_of(b)}")
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int64, device=a.device)
    for x, w in zip(a.float().split(FP32_EXACT_K, 1), b.float().split(FP32_EXACT_K, 1), strict=True):
        total += (x @ w.T).long()
    return total


def w4a8_accumulate(x_codes: torch.Tensor, weight: ProgressiveWeight | Affine) -> torch.Tensor:
    """The integer accumulator of the W4A8 GEMM: int8 ``[M, K]`` x quantised ``[N, K]`` -> int64 ``[M, N]``.

    Progressive weights multiply their decoded INT8 values; per-channel weights multiply their raw codes 0..15, because
    their zero leaves the main loop by linearity (paper section 5.2.2). No GEMM with K <= 53248 leaves int32.
    """
    return int_matmul(x_codes, weight.int8() if isinstance(weight, ProgressiveWeight) else weight.codes)


def w4a8_epilogue(
    total: torch.Tensor,
    x_scales: torch.Tensor,
    x_sums: torch.Tensor,
    weight: ProgressiveWeight | Affine,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """fp32 epilogue: int64 accumulator ``[M, N]``, fp16 scales and int64 sums of codes ``[M]`` -> fp16 ``[M, N]``.

    Progressive: ``y = total * (x_scale * channel_scale)``. Per channel, integer zero:
    ``y = (total - x_sum * zero) * (x_scale * scale)``, the difference exact; scaled zero:
    ``y = total * (x_scale * scale) - (x_sum * x_scale) * zero``.

    The sums are those of the integer codes. QServe takes fp16 sums of the unquantised activations instead, which overflow
    beyond 65504, depend on the order of addition, and leave an error in proportion to the code instead of code - zero.
    """
    rows = x_scales.float()[:, None]
    if isinstance(weight, ProgressiveWeight):
        y = total.float() * (rows * weight.channel_scales.float())
    elif weight.zeros is None:
        y = total.float() * (rows * weight.scales.float())
    elif weight.zero is Zero.INTEGER:
        y = (total - x_sums[:, None] * weight.zeros.long()).float() * (rows * weight.scales.float())
    else:
        y = total.float() * (rows * weight.scales.float()) - x_sums.float()[:, None] * rows * weight.zeros.float()
    return (y if bias is None else y + bias.float()).half()


def w4a8_matmul(
    x: torch.Tensor | Affine, weight: ProgressiveWeight | Affine, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Linear layer on INT8 activations and 4-bit weights: exact integer accumulation, then the fp32 epilogue.

    ``x [..., K]``: floating-point (quantised here, per token), or already quantised (`affine.quantize_per_token_s8`).
    ``weight``: `ProgressiveWeight` or per-channel `Affine` [N, K]; ``bias`` float [N]. Returns fp16 ``[..., N]``. Results
    beyond fp16's range become infinite, as in a kernel.

    Raises TypeError or ValueError for wrong operands, NaN or infinity.

    >>> from qoqlab import affine
    >>> w = affine.quantize_per_channel_u4(torch.tensor([[-0.5, 0.0, 0.25, 1.0]]))
    >>> round(w4a8_matmul(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), w).item(), 2)
    0.5
    """
    if not isinstance(weight, ProgressiveWeight | Affine):
        raise TypeError(f"weight: expected a ProgressiveWeight or a per-channel Affine, got {type(weight).__name__}")
    a = x if isinstance(x, Affine) else quantize_per_token_s8(x)
    if a.shape[-1] != weight.shape[-1]:
        raise ValueError(f"x: last dimension {a.shape[-1]} does not match the weight's K = {weight.shape[-1]}")
    _require_bias(bias, weight)
    codes = a.codes.reshape(-1, a.shape[-1])
    sums = codes.sum(-1, dtype=torch.int64)
    y = w4a8_epilogue(w4a8_accumulate(codes, weight), a.scales.reshape(-1), sums, weight, bias)
    return y.reshape(*a.shape[:-1], -1)


def _require_bias(bias: torch.Tensor | None, weight: QuantizedWeight) -> None:
    if bias is not None:
        require_finite("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: expected shape {weight.shape[0]}, one number per output, got {shape_of(bias)}")


def grouped_matmul(x: Affine | Grouped, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Linear layer on operands whose scales change along K: fp16 ``[..., N]`` from ``x [..., K]`` and ``weight [N, K]``.

    Columns are cut wherever a group of either operand ends. Each piece is an exact integer product; in fp32 it is multiplied
    by its two scales and added to the pieces before it, from left to right: the floating-point work in the main loop that
    progressive groups avoid (paper section 5.2.3). A weight's zero leaves the integer product by linearity.

    Raises ValueError for operands that do not fit each other.
    """
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"x: last dimension {x.shape[-1]} does not match the weight's K = {weight.shape[-1]}")
    _require_bias(bias, weight)
    columns = weight.shape[-1]
    codes = x.codes.reshape(-1, columns)
    w_codes = weight.int8() if isinstance(weight, ProgressiveWeight) else weight.codes
    cuts = sorted({group.stop for value in (x, weight) for group in _groups(value)})
    total = torch.zeros(len(codes), weight.shape[0], device=codes.device)
    for start, stop in zip([0, *cuts], cuts, strict=False):
        piece = codes[:, start:stop]
        product = int_matmul(piece, w_codes[:, start:stop])
        x_scale = _column(x, x.scales.reshape(len(codes), -1), start).float()[:, None]
        w_scale = _column(weight, _row_scales(weight), start).float()
        zeros = None if isinstance(weight, ProgressiveWeight) else weight.zeros
        if zeros is None:
            total += product.float() * (x_scale * w_scale)
            continue
        zero = _column(weight, zeros.reshape(weight.shape[0], -1), start)
        sums = piece.sum(1, keepdim=True, dtype=torch.int64)
        if weight.zero is Zero.INTEGER:
            total += (product - sums * zero.long()).float() * (x_scale * w_scale)
        else:
            total += product.float() * (x_scale * w_scale) - sums.float() * x_scale * zero.float()
    y = (total if bias is None else total + bias.float()).half()
    return y.reshape(*x.shape[:-1], -1)


def _groups(value: QuantizedWeight) -> list[slice]:
    """Columns that share a floating-point scale."""
    return value.slices() if isinstance(value, Grouped) else [slice(0, value.shape[-1])]


def _row_scales(weight: QuantizedWeight) -> torch.Tensor:
    """Floating-point scales ``[N, groups]``."""
    scales = weight.channel_scales if isinstance(weight, ProgressiveWeight) else weight.scales
    return scales.reshape(weight.shape[0], -1)


def _column(value: QuantizedWeight, per_group: torch.Tensor, start: int) -> torch.Tensor:
    """``per_group [rows, groups]`` of the group that column ``start`` lies in."""
    index = next(i for i, group in enumerate(_groups(value)) if start < group.stop)
    return per_group[:, index]


def kv4_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """One decode step of attention: every query head against its cached keys and values, softmax in fp32.

    ``query [B, Hq, D]``; ``keys``, ``values`` ``[B, Hkv, T, D]`` (dequantised cache, T >= 1), or `QuantizedKV` of those
    shapes; Hq a multiple of Hkv, consecutive query heads share a KV head. ``scale`` defaults to ``D ** -0.5``.
    Returns ``[B, Hq, D]`` in ``query``'s dtype.
    """
    require_float("query", query)
    k, v = (t if isinstance(t, torch.Tensor) else t.dequantize() for t in (keys, values))
    for name, tensor in (("query", query), ("keys", k), ("values", v)):
        require_finite(name, tensor)
    if query.ndim != 3 or k.ndim != 4 or v.shape != k.shape or k.shape[2] == 0:
        raise ValueError(
            f"query, keys, values: expected [B, Hq, D] and twice [B, Hkv, T, D] with T >= 1, got {shape_of(query)}, "
            f"{shape_of(k)}, {shape_of(v)}"
        )
    batch, heads, dim = query.shape
    if k.shape[0] != batch or k.shape[3] != dim or heads % k.shape[1]:
        raise ValueError(f"query: {shape_of(query)} does not fit keys {shape_of(k)}: B and D equal, Hq a multiple of Hkv")
    grouped = query.float().unflatten(1, (k.shape[1], -1))  # [B, Hkv, Hq / Hkv, D]
    scores = grouped @ k.float().transpose(-1, -2) * (dim**-0.5 if scale is None else scale)
    return (scores.softmax(-1) @ v.float()).flatten(1, 2).to(query.dtype)
