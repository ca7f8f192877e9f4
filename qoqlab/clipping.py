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

    ``weight [N, K]``, ``inputs [S, K]`` sample of unquantised activations -> ratios fp32 ``[N, groups]``. Groups are judged
    separately, each on its own columns. A later (smaller) ratio must be strictly better to win.
    """
    groups = form.groups(weight.shape[1])
    x = inputs.float().unflatten(1, (groups, -1)).transpose(0, 1)  # [groups, S, K / groups]
    # || x d ||^2 = || R d ||^2 with x = Q R: for narrow groups R is much smaller than the sample
    factor = torch.linalg.qr(x, mode="r").R if x.shape[1] > x.shape[2] else x
    best = torch.full((groups, weight.shape[0]), torch.inf, device=weight.device)
    chosen = torch.ones_like(best)
    for ratio in ratios:
        scales = form.choose(weight, ratio)
        delta = scales.decode(scales.encode(weight)) - weight.float()
        delta = delta.unflatten(1, (groups, -1)).permute(1, 2, 0)  # [groups, K / groups, N]
        error = (factor @ delta).square().sum(1)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, ratio, chosen)
    return chosen.T.contiguous()


def search_block_error(error: Callable[[float], float], ratios: list[float]) -> float:
    """Best single ratio by a caller's objective, used for q and k, whose outputs only matter through the attention map.

    ``error(ratio)`` is the squared error of the attention block's output. A smaller ratio must be strictly better to win.
    """
    errors = [error(ratio) for ratio in ratios]
    return ratios[min(range(len(ratios)), key=errors.__getitem__)]
