"""What a kernel must equal: plain torch on quantised operands.

Integer accumulations are exact by construction, not by luck: products are summed in floating point only as far as every
partial sum is an integer that the mantissa holds, so any summation order gives the same number.
"""

from __future__ import annotations

import torch

from . import exact
from .affine import Affine, quantize_per_token_s8
from .checks import require_codes, require_finite, require_float, require_rows, shape_of
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


def rms_norm_s8(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Affine:
    """RMSNorm, then INT8 per token: what feeds the q, k, v GEMM (paper section 5.1, figure 11).

    ``x [..., K]`` float, ``weight [K]``, ``eps`` > 0. The norm is `exact.rms_norm`, a true RMSNorm (QServe's kernel
    subtracts the mean). An all-zero token gives zero codes and scale 1. Raises TypeError or ValueError for wrong
    operands, NaN, infinity.
    """
    _require_norm("x", x, weight, eps)
    return quantize_per_token_s8(exact.rms_norm(x, weight, eps))


def add_rms_norm_s8(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[Affine, torch.Tensor]:
    """Residual add, RMSNorm, INT8 per token: (quantised norm of the sum, the sum ``x + residual`` in x's dtype).

    ``x``, ``residual`` ``[..., K]`` of one dtype; otherwise as `rms_norm_s8`.
    """
    _require_norm("x", x, weight, eps)
    require_finite("residual", residual)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual: expected {x.dtype} of shape {shape_of(x)} as x, got {residual.dtype} of shape {shape_of(residual)}"
        )
    total = residual + x
    return rms_norm_s8(total, weight, eps), total


def silu_mul_s8(gate_up: torch.Tensor) -> Affine:
    """``silu(gate) * up``, then INT8 per token: what feeds the down projection.

    ``gate_up [..., 2 I]`` float, the gate in the first half, as the fused GEMM leaves them; codes ``[..., I]``. The
    activation is `exact.silu_mul`. Raises TypeError or ValueError for wrong operands, NaN, infinity.
    """
    require_finite("gate_up", gate_up)
    if gate_up.ndim == 0 or gate_up.shape[-1] % 2 or gate_up.shape[-1] == 0:
        raise ValueError(f"gate_up: expected [..., 2 I], gate and up side by side, got {shape_of(gate_up)}")
    return quantize_per_token_s8(exact.silu_mul(gate_up))


def attend_own_s8(
    seen: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None = None,
    softcap: float | None = None,
) -> Affine:
    """A decoded token's own, unquantised key and value join what its query saw in the cache; then INT8 per token.

    ``seen [M, Hq, D]`` and ``lse`` fp32 ``[M, Hq]``: attention over the cache and the log-sum-exp of its scores, -inf where
    nothing is cached; ``query [M, Hq, D]``, ``key``, ``value`` ``[M, Hkv, D]`` after RoPE, all of seen's dtype; Hq a
    multiple of Hkv. The own score is ``scale * q k`` (``scale`` defaults to ``D ** -0.5``), with ``softcap``
    ``softcap * tanh(score / softcap)``; then `exact.join`. Codes ``[M, Hq D]``: what feeds the output projection. Raises
    TypeError or ValueError for wrong operands, NaN, infinity.
    """
    for name, x in (("seen", seen), ("query", query), ("key", key), ("value", value)):
        require_finite(name, x)
        if x.ndim != 3 or x.dtype != seen.dtype:
            raise ValueError(f"{name}: expected {seen.dtype} of shape [M, heads, D], got {x.dtype} of shape {shape_of(x)}")
    require_float("lse", lse)
    m, heads, dim = seen.shape
    if query.shape != seen.shape or lse.shape != seen.shape[:2] or lse.dtype != torch.float32:
        raise ValueError(
            f"query, lse: expected {shape_of(seen)} as seen and fp32 of shape {m}x{heads}, got {shape_of(query)} and "
            f"{lse.dtype} of shape {shape_of(lse)}"
        )
    if key.shape != value.shape or key.shape[0] != m or key.shape[2] != dim or heads % key.shape[1]:
        raise ValueError(
            f"key, value: expected [{m}, Hkv, {dim}], Hkv a divisor of {heads}, got {shape_of(key)} and {shape_of(value)}"
        )
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    score = exact.dot(query, key)
    score = score * torch.full_like(score, dim**-0.5 if scale is None else scale)
    if softcap is not None:
        score = exact.cap(score, softcap)
    return quantize_per_token_s8(exact.join(seen, lse, score, value).flatten(1))


def _require_norm(name: str, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    require_rows(name, x)
    require_finite("weight", weight)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight: expected shape {x.shape[-1]}, one gain per input, got {shape_of(weight)}")
    if not eps > 0:
        raise ValueError(f"eps: expected a positive number, got {eps!r}")
