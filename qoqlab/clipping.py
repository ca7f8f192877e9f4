"""Weight clipping: shrink the quantisation range where that lowers the layer's output error (paper section 4.3.4)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .schemes import WeightFormat


def candidate_ratios(count: int, lowest: float) -> list[float]:
    """``count`` evenly spaced ratios from 1 down to ``lowest``.

    >>> candidate_ratios(3, 0.5)
    [1.0, 0.75, 0.5]
    """
    if count < 1 or not 0 < lowest <= 1:
        raise ValueError(f"count, lowest: expected count >= 1 and 0 < lowest <= 1, got {count} and {lowest}")
    return [1.0 - (1.0 - lowest) * i / max(count - 1, 1) for i in range(count)]


def search_output_error(weight: torch.Tensor, inputs: torch.Tensor, form: WeightFormat, ratios: list[float]) -> torch.Tensor:
    """Best ratio for every row and group by the error of the layer's output, ``|| x (W^ - W)^T ||^2``.

    ``weight [N, K]``, ``inputs [S, K]`` sample of unquantised activations -> ratios fp32 ``[N, groups]``. Groups are decided
    from left to right, each on top of the output error that the groups before it left, so that errors may cancel. A
    later (smaller) ratio must be strictly better to win, and a row that would end
    worse than unclipped stays unclipped.
    """
    weight, x = weight.float(), inputs.float()
    # || x d ||^2 = || R d ||^2 with x = Q R, and R has at most K rows
    factor = torch.linalg.qr(x, mode="r").R if x.shape[0] > x.shape[1] else x
    candidates = [(ratio, form.choose(weight, ratio)) for ratio in ratios]
    left = unclipped = factor.new_zeros(factor.shape[0], weight.shape[0])
    chosen = []
    for group in form.slices(weight.shape[1]):
        part, part_factor = weight[:, group], factor[:, group]
        # the group only changes the output error within the space of its columns, few against those of a wide layer
        basis, root = _basis(part_factor)
        inside = left if basis is None else basis.T @ left
        best, picked, kept = part.new_full((len(weight),), torch.inf), part.new_ones(len(weight)), torch.zeros_like(part.T)
        for ratio, scales in candidates:
            change = (scales.decode(scales.encode(part, group), group) - part).T
            if ratio == 1:
                unclipped = unclipped + part_factor @ change
            error = (inside + root @ change).square().sum(0)
            better = error < best
            best, picked = torch.where(better, error, best), torch.where(better, ratio, picked)
            kept = torch.where(better, change, kept)
        left = left + part_factor @ kept
        chosen.append(picked)
    worse = left.square().sum(0) > unclipped.square().sum(0) if ratios[0] == 1 else best.isnan()
    return torch.where(worse[:, None], 1.0, torch.stack(chosen, 1))


def _basis(factor: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """``factor = basis @ root`` with orthonormal columns; None stands for the identity, where nothing would be gained."""
    if factor.shape[0] <= factor.shape[1]:
        return None, factor
    basis, root = torch.linalg.qr(factor)
    return basis, root


def search_block_error(error: Callable[[float], float], ratios: list[float]) -> float:
    """Best single ratio by a caller's objective, used for q and k, whose outputs only matter through the attention map.

    ``error(ratio)`` is the squared error of the attention block's output. A smaller ratio must be strictly better to win.
    """
    errors = [error(ratio) for ratio in ratios]
    return ratios[min(range(len(ratios)), key=errors.__getitem__)]
