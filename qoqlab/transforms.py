"""Exact equivalences on weights: the network's function stays, its numbers become easier to quantise.

Everything here takes and returns tensors; `qoqlab.steps` applies these to a model's blocks. Matrix work is done in fp64 and
rounded once to the input's dtype. Linear layers are ``y = x @ weight.T + bias`` with ``weight [N, K]``: *inputs* are
columns, *outputs* are rows.
"""

from __future__ import annotations

import math

import torch

from . import hadamard

#: Elements of a weight that are in work at a time: fp64 temporaries of a large model's embedding would take 10 GB and more.
CHUNK = 2**22


def _rows(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The rows of ``weight [N, K]`` in parts of about `CHUNK` elements; what acts on rows alone does not feel it."""
    return weight.split(max(1, CHUNK // weight.shape[-1]))


def rotate_inputs(weight: torch.Tensor) -> torch.Tensor:
    """``W R``: undo a rotation ``x R`` of the input (paper section 4.3.1). ``weight [N, K]``."""
    return torch.cat([hadamard.transform(part.double()).to(weight.dtype) for part in _rows(weight)])


def rotate_outputs(weight: torch.Tensor) -> torch.Tensor:
    """``R^T W``: rotate what a linear layer writes. ``weight [N, K]``, or a bias ``[N]``."""
    if weight.ndim == 1:
        return rotate_inputs(weight[None])[0]
    return rotate_inputs(weight.T).T.contiguous()


def scale_inputs(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``W diag(scale)``: absorb a division of the input by ``scale [K]``, or a norm's gain."""
    return torch.cat([(part * scale.double()).to(weight.dtype) for part in _rows(weight)])


def scale_outputs(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``diag(scale) W``: multiply what a layer writes by ``scale [N]``; ``weight [N, K]`` or bias ``[N]``."""
    rows = scale.double() if weight.ndim == 1 else scale.double()[:, None]
    return (weight * rows).to(weight.dtype)


def smoothing_scale(
    activation_max: torch.Tensor, weight_max: torch.Tensor, alpha: float, beta: float | None = None
) -> torch.Tensor:
    """``s = activation_max ** alpha / weight_max ** beta`` per channel, fp32 (paper section 4.3.2).

    Activations are divided by ``s`` and the consuming weight's columns multiplied. ``beta`` defaults to ``1 - alpha``.
    Channels without a range, or with an unusable scale, get 1.

    >>> smoothing_scale(torch.tensor([4.0, 0.0]), torch.tensor([1.0, 1.0]), alpha=0.5).tolist()
    [2.0, 1.0]
    """
    for name, value in (("alpha", alpha), ("beta", 0 if beta is None else beta)):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value!r}")
    beta = 1 - alpha if beta is None else beta
    scale = activation_max.float() ** alpha / weight_max.float() ** beta
    usable = torch.isfinite(scale) & (scale > 0) & (activation_max > 0) & (weight_max > 0)
    return torch.where(usable, scale, torch.ones_like(scale))


def attention_scale(
    key_max: torch.Tensor, alpha: float, query_max: torch.Tensor | None = None, beta: float = 0.0
) -> torch.Tensor:
    """SmoothAttention's lambda (paper section 4.2), equal on both halves of every RoPE pair ``(i, i + D / 2)``.

    ``key_max``, ``query_max`` ``[..., D]``: largest magnitudes per channel after RoPE. Keys are divided and queries
    multiplied by the result; it commutes with RoPE because a pair is rotated as a whole.

    >>> attention_scale(torch.tensor([1.0, 1.0, 16.0, 1.0]), alpha=0.5).tolist()
    [4.0, 1.0, 4.0, 1.0]
    """

    def paired(values: torch.Tensor) -> torch.Tensor:
        return values.unflatten(-1, (2, -1)).amax(-2)

    queries = torch.ones_like(key_max) if query_max is None else query_max
    half = smoothing_scale(paired(key_max), paired(queries), alpha, beta)
    return torch.cat([half, half], -1)


def salience_order(activation_max: torch.Tensor) -> torch.Tensor:
    """Channel order by ascending activation magnitude along the last dimension (paper section 4.3.3).

    Channels of like salience then share a quantisation group. Ties keep their order, so the result is deterministic.

    >>> salience_order(torch.tensor([3.0, 1.0, 2.0])).tolist()
    [1, 2, 0]
    """
    return activation_max.argsort(dim=-1, stable=True)
