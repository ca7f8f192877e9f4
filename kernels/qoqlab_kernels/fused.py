"""The element-wise kernels as torch sees them: checks, launch, custom operators. The kernels are in `elementwise`."""

from __future__ import annotations

import functools

import numpy as np
import torch

from qoqlab import exact
from qoqlab.checks import require_positive, require_tensor, shape_of

from . import elementwise, own_token, ptx, rope
from .cache import PagedKV4
from .layout import UNIT_K, Activations, blocks
from .matmul import KINDS, _aligned, _gpu, _require_place, _run
from .pages import HEAD_DIMS

#: 16-bit types that the kernels take.
DTYPES = (torch.float16, torch.bfloat16)


def rms_norm_s8(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Activations:
    """RMSNorm, then INT8 per token in the GEMM's order, in one kernel.

    ``x [M, K]`` fp16 or bf16, K a multiple of 32; ``weight [K]`` of the same dtype; ``eps`` > 0. Equals
    `qoqlab.reference.rms_norm_s8` bit for bit; NaN and infinity are not looked for. Raises TypeError or ValueError for
    another dtype, shape or device.
    """
    return _compiled(_norm_operator, "norm", x, None, weight, eps)[0]


def add_rms_norm_s8(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[Activations, torch.Tensor]:
    """``x + residual``, its RMSNorm, INT8 per token: (quantised norm in the GEMM's order, the sum ``[M, K]``).

    ``residual [M, K]`` as ``x``, which is left alone; otherwise as `rms_norm_s8`. Equals `qoqlab.reference.add_rms_norm_s8`
    bit for bit.
    """
    made, total = _compiled(_add_norm_operator, "add_norm", x, residual, weight, eps)
    return made, total


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm alone, ``[M, K]`` in x's dtype: what feeds the head. As `rms_norm_s8`; equals `qoqlab.exact.rms_norm`."""
    _check_norm(x, None, weight, eps)
    return _launch("norm", x, None, weight, eps, codes=False)[0]


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of ``x + residual``, ``[M, K]`` in x's dtype; as `add_rms_norm_s8`."""
    _check_norm(x, residual, weight, eps)
    return _launch("add_norm", x, residual, weight, eps, codes=False)[0]


def silu_mul_s8(gate_up: torch.Tensor) -> Activations:
    """``silu(gate) * up``, then INT8 per token in the GEMM's order, in one kernel.

    ``gate_up [M, 2 I]`` fp16 or bf16, the gate in the first half; I a multiple of 32. Equals `qoqlab.reference.silu_mul_s8`
    bit for bit; NaN and infinity are not looked for. Raises TypeError or ValueError for another dtype, shape or device.
    """
    require_tensor("gate_up", gate_up)
    _require_matrix("gate_up", gate_up, 64)
    if torch.compiler.is_compiling():
        tiles, tokens = _silu_operator(gate_up)
        return Activations(tiles, tokens, gate_up.shape[0], gate_up.shape[1] // 2)
    return _launch("silu", gate_up, None, None, 1.0)[0]


def silu_mul(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(``silu(gate) * up``, ``[M, I]`` in gate_up's dtype; the largest absolute value of every token, fp32 [M]).

    For tokens of which ``gate_up`` holds a slice: `quantize_activations` takes the largest of all slices, once that is
    known. As `silu_mul_s8` otherwise.
    """
    require_tensor("gate_up", gate_up)
    _require_matrix("gate_up", gate_up, 64)
    return _launch("silu", gate_up, None, None, 1.0, codes=False)


def rope_kv4_append(
    cache: PagedKV4,
    layer: int,
    slots: torch.Tensor,
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RoPE, and a layer's keys and values into the cache, in one kernel. Returns the turned queries ``[M, Hq, D]`` and the
    turned keys ``[M, Hkv, D]``.

    ``qkv [M, (Hq + 2 Hkv) D]`` fp16 or bf16: queries, keys, values of M tokens, as the fused GEMM leaves them. ``cos``,
    ``sin`` ``[positions, D/2]`` of the same dtype: any kind of RoPE. ``slots`` int32 [M]: the token's sequence. Without
    ``positions``, M different sequences grow by one token each, and so do the cache's ``lengths`` (the device's only: see
    `PagedKV4.reserve` and `PagedKV4.advance`, which a caller needs before and after). ``positions`` int32 [M]: where each
    token belongs; lengths stay. Equals `qoqlab.exact.rotate` and `qoqlab.kv.quantize_kv4` bit for bit; may be captured in a
    CUDA graph. What slots and positions hold is not looked at: that would wait for the GPU.

    Raises TypeError or ValueError for another dtype, shape or device.
    """
    if not isinstance(cache, PagedKV4):
        raise TypeError(f"cache: expected a PagedKV4, got {type(cache).__name__}")
    cache._layer(layer)
    for name, value in (("qkv", qkv), ("cos", cos), ("sin", sin), ("slots", slots)):
        require_tensor(name, value)
    dim, kv_heads = cache.head_dim, cache.kv_heads
    _require_matrix("qkv", qkv, dim)
    m, heads = qkv.shape[0], qkv.shape[1] // dim - 2 * kv_heads
    if heads < 1:
        raise ValueError(f"qkv: {qkv.shape[1]} columns are not queries beside {kv_heads} keys and values of {dim}")
    if cache.pool.device != qkv.device:
        raise ValueError(f"cache: on {cache.pool.device}, qkv on {qkv.device}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != qkv.dtype or table.ndim != 2 or table.shape[1] != dim // 2 or table.device != qkv.device:
            raise ValueError(
                f"{name}: expected {qkv.dtype} [positions, {dim // 2}] on {qkv.device}, got {table.dtype} of shape "
                f"{shape_of(table)} on {table.device}"
            )
    if cos.shape != sin.shape:
        raise ValueError(f"sin: {shape_of(sin)} does not have cos's shape {shape_of(cos)}")
    for name, numbers in (("slots", slots), *([] if positions is None else [("positions", positions)])):
        if numbers.dtype != torch.int32 or numbers.shape != (m,) or numbers.device != qkv.device:
            raise ValueError(
                f"{name}: expected int32 [{m}] on {qkv.device}, one number per token, got {numbers.dtype} of shape "
                f"{shape_of(numbers)} on {numbers.device}"
            )
    queries, keys = (torch.empty(m, count, dim, dtype=qkv.dtype, device=qkv.device) for count in (heads, kv_heads))
    arrays = [_aligned(qkv), _aligned(cos), _aligned(sin), slots.contiguous()]
    arrays += [slots if positions is None else positions.contiguous(), cache.tables, cache.lengths[layer], cache.pool[layer]]
    arrays += [queries, keys]
    if ptx.SIMULATED:
        arrays = [t.view(torch.int16) if t.element_size() == 2 else t for t in arrays]
    overlap = not ptx.SIMULATED and _gpu(qkv.device.index)[0] >= (9, 0)
    constants = (KINDS[qkv.dtype], heads, kv_heads, cache.layout, positions is None, overlap)
    _run(rope.rope_kv4, constants, (m, 1, 1), [*arrays, cache.tables.shape[1]])
    return queries, keys


def attend_own_s8(
    seen: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None = None,
    softcap: float | None = None,
) -> Activations:
    """A decoded token's own key and value join what its query saw in the cache, then INT8 per token in the GEMM's order.

    ``seen [M, Hq, D]``, ``lse`` fp32 ``[M, Hq]``: from ``kv4_attention(..., lse=True)``; ``query [M, Hq, D]``, ``key``,
    ``value`` ``[M, Hkv, D]``, Hkv a divisor of Hq, not quantised, in seen's dtype, fp16 or bf16; D 64 or 128. Tokens of
    ``value`` may lie apart, as in a slice of ``qkv``. ``scale`` defaults to ``D ** -0.5``; ``softcap`` as in the attention.
    Equals `qoqlab.reference.attend_own_s8` bit for bit; NaN and infinity are not looked for. Raises TypeError or ValueError
    for another dtype, shape or device.
    """
    options = _check_join(seen, lse, query, key, value, scale, softcap)
    if torch.compiler.is_compiling():
        tiles, tokens = _own_operator(seen, lse, query, key, value, *options)
        return Activations(tiles, tokens, seen.shape[0], seen.shape[1] * seen.shape[2])
    m, k, tiles, tokens = _join(seen, lse, query, key, value, options)
    return Activations(tiles, tokens, m, k)


def attend_own(
    seen: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(What `attend_own_s8` quantises, ``[M, Hq D]`` in seen's dtype; the largest absolute value of every token, fp32 [M]).

    For tokens of whose heads others hold the rest, see `silu_mul`.
    """
    options = _check_join(seen, lse, query, key, value, scale, softcap)
    m, k, joined, largest = _join(seen, lse, query, key, value, options, codes=False)
    return joined.view(m, k), largest


def _check_join(
    seen: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
    softcap: float | None,
) -> tuple[float, float | None]:
    """Check the operands of `attend_own_s8`: (scale, soft cap)."""
    for name, x in (("seen", seen), ("query", query), ("key", key), ("value", value)):
        require_tensor(name, x)
        if x.dtype not in DTYPES or x.dtype != seen.dtype:
            raise TypeError(f"{name}: expected fp16 or bf16, as seen, got {x.dtype}")
        if x.ndim != 3 or 0 in x.shape or x.device != seen.device:
            raise ValueError(f"{name}: expected [M, heads, D] on {seen.device}, got shape {shape_of(x)} on {x.device}")
    require_tensor("lse", lse)
    m, count, dim = seen.shape
    if dim not in HEAD_DIMS:
        raise ValueError(f"seen: expected a head_dim of {' or '.join(map(str, HEAD_DIMS))}, got shape {shape_of(seen)}")
    if query.shape != seen.shape:
        raise ValueError(f"query: {shape_of(query)} does not have seen's shape {shape_of(seen)}")
    if lse.dtype != torch.float32 or lse.shape != (m, count) or lse.device != seen.device:
        raise ValueError(
            f"lse: expected fp32 [{m}, {count}] on {seen.device}, got {lse.dtype} of shape {shape_of(lse)} on {lse.device}"
        )
    if key.shape != (m, key.shape[1], dim) or count % key.shape[1]:
        raise ValueError(f"key: expected [{m}, Hkv, {dim}] with Hkv a divisor of {count}, got {shape_of(key)}")
    if value.shape != key.shape:
        raise ValueError(f"value: expected [{m}, {key.shape[1]}, {dim}], as key, got {shape_of(value)}")
    for option, number in (("scale", scale), ("softcap", softcap)):
        if number is not None:
            require_positive(option, number)
    _require_place("seen", seen)
    return dim**-0.5 if scale is None else scale, softcap


def _join(
    seen: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: tuple[float, float | None],
    codes: bool = True,
) -> tuple[int, int, torch.Tensor, torch.Tensor]:
    """Launch `attend_own_s8`, or without ``codes`` `attend_own`, whose operands are checked: M, K, and its two results.
    ``options``: scale, soft cap."""
    (m, heads, dim), kv_heads, (scale, softcap) = seen.shape, key.shape[1], options
    k, padded = heads * dim, blocks(m, 8) * 8
    if value.stride()[1:] != (dim, 1) or value.stride(0) % exact.PIECE or value.data_ptr() % 16:
        value = value.clone(memory_format=torch.contiguous_format)
    row = value.stride(0)
    value = value.as_strided(((m - 1) * row + kv_heads * dim,), (1,))  # from the first token to the end of the last
    if codes:
        made, constants_of_tokens = _empty(seen, m, k)
    else:
        made, constants_of_tokens = seen.new_empty(m * k), seen.new_empty(m, dtype=torch.float32)
    arrays = [_aligned(seen), lse.contiguous(), _aligned(query), _aligned(key), value, made, constants_of_tokens]
    capability, processors = ((8, 0), 132) if ptx.SIMULATED else _gpu(seen.device.index)[:2]
    if ptx.SIMULATED:
        arrays = [t.view(torch.int16) if t.element_size() == 2 else t for t in arrays]
    threads = elementwise.threads_for(m, k, processors)
    constants = (KINDS[seen.dtype], heads, kv_heads, dim, softcap is not None, threads, capability >= (9, 0), codes)
    numbers = [m, padded, row, _bits(scale), _bits(softcap or 0.0)]
    _run(own_token.attend_own, constants, (padded if codes else m, 1, 1), [*arrays, *numbers])
    return m, k, made, constants_of_tokens


def _require_matrix(name: str, x: torch.Tensor, multiple: int) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected fp16 or bf16, got {x.dtype}")
    if x.ndim != 2 or 0 in x.shape or x.shape[1] % multiple:
        raise ValueError(f"{name}: expected a matrix with a multiple of {multiple} columns, got {shape_of(x)}")
    _require_place(name, x)


def _check_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> None:
    for name, value in (("x", x), ("weight", weight), *([] if residual is None else [("residual", residual)])):
        require_tensor(name, value)
    _require_matrix("x", x, 32)
    if weight.dtype != x.dtype or weight.shape != x.shape[1:] or weight.device != x.device:
        raise ValueError(
            f"weight: expected {x.dtype} of shape {x.shape[1]} on {x.device}, one gain per input, got {weight.dtype} of "
            f"shape {shape_of(weight)} on {weight.device}"
        )
    if residual is not None and (residual.dtype != x.dtype or residual.shape != x.shape or residual.device != x.device):
        raise ValueError(
            f"residual: expected {x.dtype} of shape {shape_of(x)} on {x.device} as x, got {residual.dtype} of shape "
            f"{shape_of(residual)} on {residual.device}"
        )
    if not eps > 0:
        raise ValueError(f"eps: expected a positive number, got {eps!r}")


def _compiled(
    operator: torch.library.CustomOpDef,
    operation: str,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
) -> tuple:
    """(activations, sum) of a norm: the operator while torch compiles, the kernel otherwise."""
    _check_norm(x, residual, weight, eps)
    if not torch.compiler.is_compiling():
        return _launch(operation, x, residual, weight, eps)
    tiles, tokens, *total = operator(x, weight, eps) if residual is None else operator(x, residual, weight, eps)
    return Activations(tiles, tokens, *x.shape), total[0] if total else None


@functools.lru_cache
def _bits(number: float) -> int:
    """An fp32 number as the word that a kernel takes."""
    return int(np.float32(number).view(np.uint32))


def _launch(
    operation: str,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    codes: bool = True,
) -> tuple:
    """(activations, or 16-bit numbers without ``codes``; the sum, None without a residual, or for "silu" without ``codes``
    the largest of every token)."""
    m, k = x.shape[0], x.shape[1] // (2 if operation == "silu" else 1)
    units, padded = blocks(k, UNIT_K), blocks(m, 8) * 8
    x = _aligned(x)
    largest = operation == "silu" and not codes
    tokens = torch.empty(m if largest else padded, 1 if largest else 2, dtype=torch.int32, device=x.device)
    if codes:
        out = torch.empty(units, padded, UNIT_K, dtype=torch.int8, device=x.device)
    else:
        out = torch.empty(m, k, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(x)
    arrays = [
        x,
        x if residual is None else _aligned(residual),
        x if weight is None else _aligned(weight),
        x if total is None else total,
        out,
        tokens,
    ]
    capability, processors = ((8, 0), 132) if ptx.SIMULATED else _gpu(x.device.index)[:2]
    if ptx.SIMULATED:  # whose arrays are numpy's, which has no bf16
        arrays = [t.view(torch.int16) if t.element_size() == 2 else t for t in arrays]
    queue = elementwise.QUEUE if operation == "silu" else elementwise.SHORT_QUEUE
    threads = elementwise.threads_for(m, k, processors, queue)
    constants = (operation, KINDS[x.dtype], k, threads, codes, capability >= (9, 0))
    _run(elementwise.elementwise, constants, (padded if codes else m, 1, 1), [*arrays, m, padded, _bits(eps)])
    if largest:
        return out, tokens.view(torch.float32)[:, 0]
    return Activations(out, tokens, m, k) if codes else out, total


# -- operators ------------------------------------------------------------------------------------------------------------


def _empty(x: torch.Tensor, m: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles and tokens of ``[m, k]`` activations where x lies."""
    units, padded = blocks(k, UNIT_K), blocks(m, 8) * 8
    tiles = torch.empty(units, padded, UNIT_K, dtype=torch.int8, device=x.device)
    return tiles, torch.empty(padded, 2, dtype=torch.int32, device=x.device)


@torch.library.custom_op("qoqlab::rms_norm_s8", mutates_args=())
def _norm_operator(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    made = rms_norm_s8(x, weight, eps)
    return made.tiles, made.tokens


@_norm_operator.register_fake
def _(x, weight, eps):  # type: ignore[no-untyped-def]
    return _empty(x, *x.shape)


@torch.library.custom_op("qoqlab::add_rms_norm_s8", mutates_args=())
def _add_norm_operator(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made, total = add_rms_norm_s8(x, residual, weight, eps)
    return made.tiles, made.tokens, total


@_add_norm_operator.register_fake
def _(x, residual, weight, eps):  # type: ignore[no-untyped-def]
    return (*_empty(x, *x.shape), torch.empty_like(x))


@torch.library.custom_op("qoqlab::silu_mul_s8", mutates_args=())
def _silu_operator(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    made = silu_mul_s8(gate_up)
    return made.tiles, made.tokens


@_silu_operator.register_fake
def _(gate_up):  # type: ignore[no-untyped-def]
    return _empty(gate_up, gate_up.shape[0], gate_up.shape[1] // 2)


@torch.library.custom_op("qoqlab::attend_own_s8", mutates_args=())
def _own_operator(
    seen: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    made = attend_own_s8(seen, lse, query, key, value, scale, softcap)
    return made.tiles, made.tokens


@_own_operator.register_fake
def _(seen, lse, query, key, value, scale, softcap):  # type: ignore[no-untyped-def]
    return _empty(seen, seen.shape[0], seen.shape[1] * seen.shape[2])
