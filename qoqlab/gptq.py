"""GPTQ error feedback on fixed scales (Frantar et al. 2023; optional in QoQ's recipes)."""

from __future__ import annotations

import torch

from .checks import require_count
from .schemes import Scales


def inverse_factor(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of the damped ``hessian [K, K]``; damping grows until it is positive definite.

    Raises ValueError when 250 increases do not help (the Hessian is not finite or far from symmetric).
    """
    mean = hessian.diagonal().mean()
    for attempt in range(250):
        damped = hessian + torch.eye(len(hessian), device=hessian.device) * mean * damp * (1 + 0.1 * attempt)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
    raise ValueError(f"hessian: {len(hessian)}x{len(hessian)} is not positive definite even with damping")


def quantize(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scales: Scales,
    damp: float = 0.01,
    block_size: int = 128,
) -> torch.Tensor:
    """Codes uint8 or int8 ``[N, K]`` that minimise ``(W^ - W) H (W^ - W)^T`` greedily, column by column.

    ``weight [N, K]``, ``hessian [K, K]`` = sum of x x^T over calibration tokens, ``scales`` chosen beforehand (static
    groups). Columns are visited by descending Hessian diagonal; dead columns (zero diagonal) are quantised as zeros. With a
    Hessian proportional to the identity the result is round-to-nearest. A row for which feedback does not lower the
    objective (a late column had to absorb more than it can represent) is rounded to nearest, so no row is ever worse.

    Raises ValueError unless ``damp`` (a share of the Hessian's mean diagonal) and ``block_size`` are positive.
    """
    require_count("block_size", block_size, 1)
    if not damp > 0:
        raise ValueError(f"damp: expected a number above 0, got {damp!r}")
    original = weight.float().clone()
    h = hessian.float().clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    original[:, dead] = 0
    codes = _feedback(original, h, scales, damp, block_size)
    nearest = scales.encode(original)
    better = _objective(original, h, scales, codes) < _objective(original, h, scales, nearest)
    return torch.where(better[:, None], codes, nearest)


def _objective(weight: torch.Tensor, hessian: torch.Tensor, scales: Scales, codes: torch.Tensor) -> torch.Tensor:
    """``(W^ - W) H (W^ - W)^T`` of every row ``[N]``."""
    error = scales.decode(codes) - weight
    return ((error @ hessian) * error).sum(1)


def _feedback(weight: torch.Tensor, h: torch.Tensor, scales: Scales, damp: float, block_size: int) -> torch.Tensor:
    """Codes ``[N, K]`` by error feedback alone; ``h`` has no zero on its diagonal."""
    order = h.diagonal().argsort(descending=True, stable=True)
    w, upper = weight[:, order], inverse_factor(h[order][:, order], damp)
    codes = torch.empty_like(scales.encode(w[:, :1], slice(0, 1))).expand(w.shape).clone()
    columns = order.tolist()
    for start in range(0, w.shape[1], block_size):
        end = min(start + block_size, w.shape[1])
        errors = torch.zeros_like(w[:, start:end])
        for j in range(start, end):
            column = slice(columns[j], columns[j] + 1)
            codes[:, j : j + 1] = scales.encode(w[:, j : j + 1], column)
            errors[:, j - start] = (w[:, j] - scales.decode(codes[:, j : j + 1], column)[:, 0]) / upper[j, j]
            w[:, j + 1 : end] -= errors[:, j - start, None] * upper[j, j + 1 : end]
        w[:, end:] -= errors @ upper[start:end, end:]
    restored = torch.empty_like(codes)
    restored[:, order] = codes
    return restored
