"""The stages of the methods that QoQ is compared with, one function each, as in `steps`.

`smooth_inputs` (SmoothQuant), `awq_scale` (AWQ), `hadamard_inputs` (QuaRot) and `reorder_outliers` (Atom) are exact
equivalences of the unquantised network; `clip_to` fixes quantisation ranges. Rotation, GPTQ and the clipping search are
shared with QoQ and live in `steps`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from . import transforms
from .architecture import SITES, Block, replace_parameter
from .online import Online, OnlineHadamard, OnlineLinear, OnlineReorder
from .schemes import WeightFormat
from .steps import AttentionProbe, Context, edit_outputs, fold_input_scale, per_query_head, require_direct_inputs, step


@step
def smooth_inputs(context: Context, alpha: float = 0.5) -> None:
    """SmoothQuant (arXiv 2211.10438, section 4): move outliers of the activations behind both norms into the weights.

    Activations are divided by ``s = max|x|^alpha / max|W|^(1 - alpha)`` per channel, where W stands for all linears that
    read them; the division is folded into the norm's gain.
    """
    for site in ("qkv", "gate_up"):
        require_direct_inputs(context.block, "smooth_inputs", SITES[site])
        linears = [context.block.linear(role) for role in SITES[site]]
        weight_max = torch.stack([linear.weight.detach().float().abs().amax(0) for linear in linears]).amax(0)
        scale = transforms.smoothing_scale(context.observe().absmax[site], weight_max, alpha)
        fold_input_scale(context.block, site, scale)
    context.changed()


# --- AWQ ------------------------------------------------------------------------------------------------------------------


@step
def awq_scale(context: Context, count: int = 20) -> None:
    """AWQ (arXiv 2306.00978, section 3.2): protect weight columns that meet large activations by scaling them up.

    Columns are multiplied by ``s = mean|x|^alpha`` and activations divided by it, folded into the layer before. Out of
    ``count`` values of alpha from 0 (nothing) upwards, each site takes the one with the smallest error of what reads it
    with rounded weights: the attention's output for q, k and v together, the feed-forward's for gate and up, the layer's
    own for o and down. Activations are not rounded in this search.
    """
    if context.scheme.weights is None:
        return
    block = context.block
    require_direct_inputs(block, "awq_scale", [role for roles in SITES.values() for role in roles])
    samples = context.observe().sample
    for site, roles in SITES.items():
        mean = samples[site].abs().mean(0)
        if site == "o":  # query heads of a group share one scale per value channel
            mean = mean.unflatten(0, (block.kv_heads, -1, block.head_dim)).mean(1)
        candidates = awq_candidates(mean, count)
        if site == "qkv":
            with AttentionProbe(context) as probe:
                scale = _best_scale(context, roles, candidates, functools.partial(_attention_error, probe))
        else:
            scale = _best_scale(context, roles, candidates, _output_error(block, site, samples[site]))
        fold_input_scale(block, site, scale)
    context.changed()


def awq_candidates(mean: torch.Tensor, count: int) -> list[torch.Tensor]:
    """``mean ** alpha`` for alpha = 0, 1 / count, ... below 1, centred so that the largest times the smallest is 1.

    The first candidate is all ones. Channels below 1/10000 of the largest count as that.

    >>> [s.tolist() for s in awq_candidates(torch.tensor([1.0, 16.0]), 2)]
    [[1.0, 1.0], [0.5, 2.0]]
    """
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"count: expected a positive integer, got {count!r}")
    largest = mean.max()
    relative = (mean / torch.where(largest > 0, largest, 1)).clamp(min=1e-4)
    powers = [relative ** (i / count) for i in range(count)]
    return [p / (p.max() * p.min()).sqrt() for p in powers]


def round_scaled(form: WeightFormat, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What a weight ``[N, K]`` effectively becomes when its columns are multiplied by ``scale [K]`` before rounding."""
    scaled = weight.float() * scale
    chosen = form.choose(scaled)
    return (chosen.decode(chosen.encode(scaled)) / scale).to(weight.dtype)


def _best_scale(
    context: Context,
    roles: tuple[str, ...],
    candidates: list[torch.Tensor],
    error: Callable[[dict[str, torch.Tensor]], float],
) -> torch.Tensor:
    """Candidate for which the effective weights of ``roles`` have the smallest ``error``; ties go to the earlier one."""
    form, block = context.scheme.weights, context.block
    assert form is not None
    errors = []
    for scale in candidates:
        columns = per_query_head(block, scale).flatten() if roles == SITES["o"] else scale
        errors.append(error({role: round_scaled(form, block.linear(role).weight.detach(), columns) for role in roles}))
    return candidates[min(range(len(errors)), key=errors.__getitem__)]


def _attention_error(probe: AttentionProbe, weights: dict[str, torch.Tensor]) -> float:
    with probe.restored():
        for role, weight in weights.items():
            replace_parameter(probe.block.linear(role), "weight", weight)
        return probe.error()


def _output_error(block: Block, site: str, sample: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], float]:
    """Squared error of the feed-forward's output ("gate_up"), or of one linear's, on a sample ``[S, K]`` of its inputs."""
    originals = {role: block.linear(role).weight.detach() for role in SITES[site]}
    x = sample.to(next(iter(originals.values())).dtype)

    def install(weights: dict[str, torch.Tensor]) -> None:
        for role, weight in weights.items():
            replace_parameter(block.linear(role), "weight", weight)

    def run(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        if site != "gate_up":
            return x @ weights[site].T
        try:
            install(weights)
            return block.mlp(x)
        finally:
            install(originals)

    exact = run(originals)
    return lambda weights: float((run(weights) - exact).square().sum())


# --- QuaRot and Atom ------------------------------------------------------------------------------------------------------


def _attach(block: Block, role: str, transform: Online) -> None:
    """Let a linear's input pass an orthogonal ``transform`` and undo it in the weight's columns."""
    weight = block.linear(role).weight.detach()
    linear = OnlineLinear(block.linear(role), transform.to(weight.device))
    replace_parameter(linear, "weight", transform(weight.double()).to(weight.dtype))
    block.set_linear(role, linear)


@step
def hadamard_inputs(context: Context) -> None:
    """QuaRot's online rotations (arXiv 2404.00456, stages 1b and 1c) of what enters o_proj and down_proj.

    down_proj's input is multiplied by a Hadamard matrix, and o_proj's across heads; each weight's columns undo it. With
    ``rotate(values=True)``, whose rotation inside each head is free, o_proj's input is rotated as a whole. Costs run time,
    which is why QoQ smooths instead. (Stage 1d, queries and keys, is `kv.KVFormat.rotate_keys`.)

    Raises ValueError naming the layer where no Hadamard matrix has the size (such as 14 heads).
    """
    block = context.block
    require_direct_inputs(block, "hadamard_inputs", ("o", "down"))
    for role, size in (("o", block.heads), ("down", block.linear("down").in_features)):
        try:
            transform = OnlineHadamard(size)
        except ValueError as error:
            raise ValueError(f"model: {block.name(role)}: {error}") from None
        _attach(block, role, transform)
    context.changed()


hadamard_inputs.data_free = True  # type: ignore[attr-defined]  # needs no calibration


@step
def reorder_outliers(context: Context) -> None:
    """Atom's reordering (arXiv 2310.19102, section 4.1): channels with large activations go to the end of every input.

    Sorted by the sum of squares over calibration tokens, so that formats with outlier columns keep the largest channels at
    INT8 and groups hold channels of like size. down_proj's order is folded into gate_proj and up_proj; all others are
    gathered as the network runs.
    """
    block, samples = context.block, context.observe().sample
    require_direct_inputs(block, "reorder_outliers", [role for roles in SITES.values() for role in roles])
    orders = {site: transforms.salience_order(x.square().sum(0)) for site, x in samples.items()}
    down = orders.pop("down")
    for role in ("gate", "up"):
        edit_outputs(block.linear(role), lambda t, index: t[index], down)
    replace_parameter(block.linear("down"), "weight", block.linear("down").weight.detach()[:, down])
    for site, order in orders.items():
        for role in SITES[site]:
            _attach(block, role, OnlineReorder(order))
    context.changed()


@step
def clip_to(context: Context, ratio: float) -> None:
    """Shrink the range of every weight group by one fixed ``ratio``, outlier columns excepted (Atom: 0.85)."""
    if not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise ValueError(f"ratio: expected a number with 0 < ratio <= 1, got {ratio!r}")
    context.weights.clear()  # codes that an earlier step chose belong to other ranges
    for role, _ in context.block.linears():
        context.ratios[role] = torch.tensor(float(ratio))


clip_to.data_free = True  # type: ignore[attr-defined]  # needs no calibration
