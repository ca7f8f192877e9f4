"""The element-wise kernels as torch sees them: checks, launch, custom operators. The kernels are in `elementwise`."""

from __future__ import annotations

import functools

import numpy as np
import torch

from qoqlab import exact
from qoqlab.checks import require_tensor, shape_of

from . import elementwise, ptx
from .layout import UNIT_K, Activations, blocks
from .matmul import KINDS, _aligned, _gpu, _require_place, _run

#: 16-bit types that the kernels take.
DTYPES = (torch.float16, torch.bfloat16)
#: Blocks have at least and at most this many threads.
FEWEST_THREADS, MOST_THREADS = 64, 1024


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


def threads_for(m: int, k: int, processors: int) -> int:
    """Threads of a block: a piece each where tokens are few, four at most where they are many; a power of two."""
    pieces = blocks(k, UNIT_K) * UNIT_K // exact.PIECE
    each = 1 if m <= processors else 2 if m <= 4 * processors else 4
    wanted = 1 << max(0, blocks(pieces, each) - 1).bit_length()
    return max(FEWEST_THREADS, min(wanted, MOST_THREADS))


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
    threads: int = 0,
) -> tuple:
    """(activations, or 16-bit numbers without ``codes``; the sum, None without a residual)."""
    m, k = x.shape[0], x.shape[1] // (2 if operation == "silu" else 1)
    units, padded = blocks(k, UNIT_K), blocks(m, 8) * 8
    x = _aligned(x)
    tokens = torch.empty(padded, 2, dtype=torch.int32, device=x.device)
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
    constants = (operation, KINDS[x.dtype], k, threads or threads_for(m, k, processors), codes, capability >= (9, 0))
    _run(elementwise.elementwise, constants, (padded if codes else m, 1, 1), [*arrays, m, padded, _bits(eps)])
    return Activations(out, tokens, m, k) if codes else out, total


# -- operators ------------------------------------------------------------------------------------------------------------


def _empty(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    units, padded = blocks(k, UNIT_K), blocks(x.shape[0], 8) * 8
    return x.new_empty((units, padded, UNIT_K), dtype=torch.int8), x.new_empty((padded, 2), dtype=torch.int32)


@torch.library.custom_op("qoqlab::rms_norm_s8", mutates_args=())
def _norm_operator(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    made = rms_norm_s8(x, weight, eps)
    return made.tiles, made.tokens


@_norm_operator.register_fake
def _(x, weight, eps):  # type: ignore[no-untyped-def]
    return _empty(x, x.shape[1])


@torch.library.custom_op("qoqlab::add_rms_norm_s8", mutates_args=())
def _add_norm_operator(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made, total = add_rms_norm_s8(x, residual, weight, eps)
    return made.tiles, made.tokens, total


@_add_norm_operator.register_fake
def _(x, residual, weight, eps):  # type: ignore[no-untyped-def]
    return (*_empty(x, x.shape[1]), torch.empty_like(x))


@torch.library.custom_op("qoqlab::silu_mul_s8", mutates_args=())
def _silu_operator(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    made = silu_mul_s8(gate_up)
    return made.tiles, made.tokens


@_silu_operator.register_fake
def _(gate_up):  # type: ignore[no-untyped-def]
    return _empty(gate_up, gate_up.shape[1] // 2)
