"""The stages of QoQ, one function each: a step takes a block's `Context` and replaces the block's weights.

Steps `rotate`, `smooth_attention`, `smooth_output` and `reorder` are exact equivalences of the unquantised network; `clip`
chooses quantisation ranges and `gptq` codes. A new method is one more function here and one line in a recipe.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import attention, capture, clipping, hadamard, online, transforms
from . import gptq as gptq_module
from .architecture import SITES, Architecture, Block, replace_parameter
from .capture import Batch, Observation
from .checks import require_count
from .reference import QuantizedWeight
from .schemes import Scheme, assemble, quantize_activations

#: Every step by name: what recipes may hold and checkpoints may name.
STEPS: dict[str, Callable[..., None]] = {}


def step(function: Callable[..., None]) -> Callable[..., None]:
    """Register a step, so that checkpoints made with it can be loaded: ``function(context, **parameters)``."""
    STEPS[function.__name__] = function
    return function


#: Site whose activations feed each role.
SITE_OF = {role: site for site, roles in SITES.items() for role in roles}


@dataclass
class Context:
    """One block under work: its calibration inputs and what steps decided so far."""

    block: Block
    batches: list[Batch]
    #: exact outputs of the first few batches, for the report
    exact: list[torch.Tensor]
    scheme: Scheme
    #: clipping ratios per role, [N, groups] or scalar tensors
    ratios: dict[str, torch.Tensor] = field(default_factory=dict)
    #: weights that a step quantised itself; the others are rounded to nearest
    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    _observed: Observation | None = None

    def observe(self, hessian: bool = False) -> Observation:
        """Statistics of the block as it is now (cached until a step changes the block)."""
        if self._observed is None or (hessian and not self._observed.hessian):
            self._observed = capture.observe(self.block, self.batches, hessian=hessian)
        return self._observed

    def changed(self) -> None:
        """Forget statistics and decisions after a change of weights."""
        self._observed = None
        self.ratios.clear()
        self.weights.clear()

    def quantize_weight(self, role: str) -> QuantizedWeight:
        """Quantised weight of a role: what a step decided, else round to nearest with its clipping ratio."""
        if role in self.weights:
            return self.weights[role]
        if self.scheme.weights is None:
            raise ValueError("scheme: has no weight format, so there is no weight to quantise")
        weight = self.block.linear(role).weight.detach()
        try:
            scales = self.scheme.weights.choose(weight, self.ratios.get(role, 1.0))
        except ValueError as error:
            raise ValueError(f"model: {self.block.name(role)}: {error}") from None
        return assemble(scales, scales.encode(weight))


def require_direct_inputs(block: Block, name: str, roles: Iterable[str]) -> None:
    """Raise ValueError where step ``name`` would fold something into linears whose inputs pass an online transform."""
    for role in roles:
        if online.of(block.linear(role)) is not None:
            kind = type(online.of(block.linear(role))).__name__
            raise ValueError(
                f"steps: {name} changes the inputs of {block.name(role)}, which pass an {kind}; put steps that add online "
                "transforms after it"
            )


def edit_outputs(module: nn.Module, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], by: torch.Tensor) -> None:
    """Apply an output-side transform to a linear's weight and bias, or to a norm's gain."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        replace_parameter(module, name, change(parameter.detach(), by))


def scale_columns(linear: nn.Linear, scale: torch.Tensor) -> None:
    """Multiply a linear's weight columns by ``scale [K]``."""
    replace_parameter(linear, "weight", transforms.scale_inputs(linear.weight.detach(), scale))


def per_kv_head(block: Block, per_query_channel: torch.Tensor) -> torch.Tensor:
    """``[Hq * D]`` -> ``[Hkv, D]``: the largest value among the query heads that share a KV head."""
    return per_query_channel.unflatten(0, (block.kv_heads, -1, block.head_dim)).amax(1)


def per_query_head(block: Block, per_kv_channel: torch.Tensor) -> torch.Tensor:
    """``[Hkv, D]`` -> ``[Hq, D]``: every query head gets its KV head's row."""
    return per_kv_channel.repeat_interleave(block.heads // block.kv_heads, 0)


# --- rotation -------------------------------------------------------------------------------------------------------------


def fold_norm(norm: nn.Module, consumers: list[nn.Linear]) -> None:
    """Move an RMSNorm's gain into the linears that read it, so that the norm commutes with rotations."""
    gain = norm.get_parameter("weight").detach()
    for linear in consumers:
        scale_columns(linear, gain)
    replace_parameter(norm, "weight", torch.ones_like(gain))


def rotate_ends(architecture: Architecture) -> None:
    """The part of `rotate` outside blocks: untie first, then rotate what enters and leaves the residual stream."""
    architecture.untie()
    fold_norm(architecture.final_norm, [architecture.head])
    for module in (architecture.embedding, architecture.head):
        replace_parameter(module, "weight", transforms.rotate_inputs(module.weight.detach()))


@step
def rotate(context: Context, values: bool = False) -> None:
    """Block-input rotation: the residual stream is multiplied by a Hadamard matrix (paper section 4.3.1).

    Outliers of single channels spread over all of them. Folded into the weights, so it is free at run time. ``values`` also
    rotates each value head into o_proj (deepcompressor does, the paper does not).
    """
    block = context.block
    require_direct_inputs(block, "rotate", ("q", "k", "v", "gate", "up", *(("o",) if values else ())))
    for norm, site in ((block.input_norm, "qkv"), (block.mlp_norm, "gate_up")):
        consumers = [block.linear(role) for role in SITES[site]]
        fold_norm(norm, consumers)
        for linear in consumers:
            replace_parameter(linear, "weight", transforms.rotate_inputs(linear.weight.detach()))
    for role in ("o", "down"):
        linear = block.linear(role)
        for name, parameter in list(linear.named_parameters()):
            replace_parameter(linear, name, transforms.rotate_outputs(parameter.detach()))
    if values:
        _rotate_values(block)
    for i, batch in enumerate(context.batches):
        context.batches[i] = Batch(_rotate_like(batch.hidden), batch.arguments)
    context.exact = [_rotate_like(y) for y in context.exact]
    context.changed()


rotate.prepare = rotate_ends  # type: ignore[attr-defined]
rotate.data_free = True  # type: ignore[attr-defined]  # needs no calibration


def _rotate_like(x: torch.Tensor) -> torch.Tensor:
    return hadamard.transform(x.double()).to(x.dtype)


def _rotate_values(block: Block, signs: torch.Tensor | float = 1.0) -> None:
    """Per head: ``v <- v diag(signs) H``, undone in o_proj's columns. The same for all heads, so grouped queries are no
    obstacle."""
    v, o = block.linear("v"), block.linear("o")
    for name, parameter in list(v.named_parameters()):
        heads = parameter.detach().double().unflatten(0, (block.kv_heads, block.head_dim)).movedim(1, -1)
        rotated = hadamard.transform(heads * signs).movedim(-1, 1).flatten(0, 1)
        replace_parameter(v, name, rotated.to(parameter.dtype))
    columns = o.weight.detach().double().unflatten(1, (block.heads, block.head_dim))
    replace_parameter(o, "weight", hadamard.transform(columns * signs).flatten(1).to(o.weight.dtype))


@step
def search_value_rotation(context: Context, count: int = 7, seed: int = 0) -> None:
    """Rotate value heads by whichever of ``count`` Hadamard matrices with random signs serves the layer best, or by none.

    Candidates are judged by the error of the attention block's output with v and o weights, keys and values quantised.
    Folded into v_proj and o_proj, so it costs nothing at run time. A search in place of the gradient descent by which
    SpinQuant (arXiv 2405.16406) learns this rotation.
    """
    require_count("count", count, 0)
    require_count("seed", seed, 0)
    form, block = context.scheme.weights, context.block
    generator = torch.Generator().manual_seed(seed)
    shape = (count, block.head_dim)
    signs = torch.randint(0, 2, shape, generator=generator).mul(2).sub(1).double().to(block.linear("v").weight.device)
    candidates: list[torch.Tensor | None] = [None, *signs]
    errors = []
    with AttentionProbe(context) as probe:
        for candidate in candidates:
            with probe.restored():
                if candidate is not None:
                    _rotate_values(block, candidate)
                for role in ("v", "o") if form else ():
                    weight = block.linear(role).weight.detach()
                    scales = form.choose(weight)  # type: ignore[union-attr]
                    rounded = scales.decode(scales.encode(weight)).to(weight.dtype)
                    replace_parameter(block.linear(role), "weight", rounded)
                errors.append(probe.error(context.scheme.kv))
    best = candidates[min(range(len(errors)), key=errors.__getitem__)]
    if best is not None:
        _rotate_values(block, best)
    context.changed()


# --- SmoothAttention ------------------------------------------------------------------------------------------------------


@step
def smooth_attention(context: Context, alpha: float | None = 0.5, beta: float = 0.0) -> None:
    """SmoothAttention: divide keys by lambda and multiply queries, so that key outliers fit 4 bits (paper section 4.2).

    Folded into q_proj and k_proj, biases included; with QK-norm (Qwen3) into the norms' gains, which forces one lambda for
    all heads. ``alpha=None`` searches alpha and beta for the smallest error of the attention block's output with quantised
    keys and values.
    """
    observed = context.observe()
    assert observed.keys is not None and observed.queries is not None
    keys, queries = observed.keys, per_kv_head(context.block, observed.queries.flatten())
    if context.block.key_norm is not None:
        shape = keys.shape
        keys, queries = keys.amax(0).expand(shape), queries.amax(0).expand(shape)
    if alpha is None:
        scale = _search_attention_scale(context, keys, queries)
    else:
        scale = transforms.attention_scale(keys, alpha, queries if beta else None, beta)
    fold_attention_scale(context.block, scale)
    context.changed()


def fold_attention_scale(block: Block, scale: torch.Tensor) -> None:
    """Divide keys and multiply queries by ``scale [Hkv, D]``, equal on RoPE pairs (and on all heads with QK-norm)."""
    if block.key_norm is not None and block.query_norm is not None:
        edit_outputs(block.key_norm, transforms.scale_outputs, 1 / scale[0].double())
        edit_outputs(block.query_norm, transforms.scale_outputs, scale[0])
        return
    edit_outputs(block.linear("k"), transforms.scale_outputs, 1 / scale.double().flatten())
    edit_outputs(block.linear("q"), transforms.scale_outputs, per_query_head(block, scale).flatten())


def _search_attention_scale(context: Context, keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Best lambda among no smoothing, ``K^a`` and ``K^a / Q^(1-a)`` for a = 0.05 .. 0.95."""
    grid = context.scheme.kv
    alphas = [i / 20 for i in range(1, 20)]
    candidates = [torch.ones_like(keys)]
    candidates += [transforms.attention_scale(keys, a) for a in alphas]
    candidates += [transforms.attention_scale(keys, a, queries, 1 - a) for a in alphas]
    if grid is None:
        return candidates[0]
    with AttentionProbe(context) as probe:
        errors = []
        for scale in candidates:
            with probe.restored():
                fold_attention_scale(context.block, scale)
                errors.append(probe.error(grid))
    return candidates[min(range(len(errors)), key=errors.__getitem__)]


class AttentionProbe:
    """Measures the squared error of the attention block's output while q, k and the KV grid are changed."""

    #: Calibration tokens used; the objective is a smooth function of one number, so few are enough.
    TOKENS = 1024

    def __init__(self, context: Context) -> None:
        self.block = context.block
        count = max(1, self.TOKENS // max(1, context.batches[0].hidden.shape[0] * context.batches[0].hidden.shape[1]))
        self.batches = context.batches[:count]
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __enter__(self) -> AttentionProbe:
        hook = self.block.attention.register_forward_pre_hook(
            lambda module, args, kwargs: self.calls.append((args, kwargs)), with_kwargs=True
        )
        for batch in self.batches:
            capture.run_block(self.block, batch)
        hook.remove()
        self.exact = [self._run(*call) for call in self.calls]
        return self

    def __exit__(self, *_: object) -> None:
        self.calls = []

    @torch.no_grad()
    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        return self.block.attention(*args, **kwargs)[0]

    def error(self, grid: Any = None) -> float:
        """Sum of squared differences from the unchanged block's attention output, keys and values on ``grid``."""
        here = attention.state(self.block.attention)
        before, here.grid = here.grid, grid
        try:
            return sum(float((self._run(*c) - y).square().sum()) for c, y in zip(self.calls, self.exact, strict=True))
        finally:
            here.grid = before

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Undo, on exit, any parameter replaced inside the attention module."""
        modules = [m for m in self.block.attention.modules() if m is not self.block.attention]
        saved = [dict(m._parameters) for m in modules]
        try:
            yield
        finally:
            for module, parameters in zip(modules, saved, strict=True):
                module._parameters.update(parameters)


# --- block-output smoothing and reordering --------------------------------------------------------------------------------


@step
def smooth_output(context: Context, alpha: float | None = 0.3, beta: float | None = None) -> None:
    """Block-output smoothing of o_proj's and down_proj's inputs (paper section 4.3.2).

    Their inputs cannot be rotated for free, so channels are scaled instead: activations divided by
    ``s = max|x|^alpha / max|W|^beta`` (``beta`` defaults to 1 - alpha), folded into v_proj and up_proj. The paper finds
    alpha near 0 best. ``alpha=None`` searches 0, 0.05, ... 0.95 and no smoothing, per layer, for the smallest output error.
    """
    block = context.block
    require_direct_inputs(block, "smooth_output", ("o", "down"))
    o_max = per_kv_head(block, context.observe().absmax["o"])
    o_weight_max = per_kv_head(block, block.linear("o").weight.detach().float().abs().amax(0))
    down_weight_max = block.linear("down").weight.detach().float().abs().amax(0)

    def o_scale(a: float, b: float | None) -> torch.Tensor:
        return transforms.smoothing_scale(o_max, o_weight_max, a, b)

    def down_scale(a: float, b: float | None) -> torch.Tensor:
        return transforms.smoothing_scale(context.observe().absmax["down"], down_weight_max, a, b)

    def widen(scale: torch.Tensor) -> torch.Tensor:
        return per_query_head(block, scale).flatten()

    o = o_scale(alpha, beta) if alpha is not None else _search_output_scale(context, "o", o_scale, widen)
    down = down_scale(alpha, beta) if alpha is not None else _search_output_scale(context, "down", down_scale)
    fold_input_scale(block, "o", o)
    fold_input_scale(block, "down", down)
    context.changed()


def fold_input_scale(block: Block, site: str, scale: torch.Tensor) -> None:
    """Divide what enters a site of `architecture.SITES` by ``scale`` and multiply the columns that read it.

    The division goes into the norm or the linear in front of the site. ``scale`` is ``[K]``; for "o" it is per KV channel
    ``[Hkv, D]``, since grouped query heads share their values.
    """
    producer = {"qkv": block.input_norm, "o": block.linear("v"), "gate_up": block.mlp_norm, "down": block.linear("up")}
    edit_outputs(producer[site], transforms.scale_outputs, 1 / scale.double().flatten())
    columns = per_query_head(block, scale).flatten() if site == "o" else scale
    for role in SITES[site]:
        scale_columns(block.linear(role), columns)


def _search_output_scale(
    context: Context,
    role: str,
    candidate: Callable[[float, float | None], torch.Tensor],
    widen: Callable[[torch.Tensor], torch.Tensor] = lambda scale: scale,
) -> torch.Tensor:
    """Candidate scale with the smallest output error of the quantised layer on the calibration sample."""
    if context.scheme.weights is None:
        return torch.ones_like(candidate(0.5, None))
    weight, x = context.block.linear(role).weight.detach().float(), context.observe().sample[role]
    exact = x @ weight.T
    scales = [torch.ones_like(candidate(0.5, None))] + [candidate(i / 20, None) for i in range(20)]
    errors = []
    for scale in scales:
        s = widen(scale)
        chosen = context.scheme.weights.choose(weight * s)
        w = chosen.decode(chosen.encode(weight * s))
        errors.append(float((_round_activations(x / s, context.scheme) @ w.T - exact).square().sum()))
    return scales[min(range(len(errors)), key=errors.__getitem__)]


def _round_activations(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    return x if scheme.activations is None else quantize_activations(x, scheme.activations).dequantize()


@step
def reorder(context: Context) -> None:
    """Activation-aware channel reordering of o_proj's (within heads) and down_proj's inputs (paper section 4.3.3).

    Channels are sorted by their largest activation, so that salient ones share a quantisation group. Folded into the rows of
    the producing layers. Matters for per-group weights only.
    """
    require_direct_inputs(context.block, "reorder", ("o", "down"))
    block, observed = context.block, context.observe()
    order = transforms.salience_order(observed.absmax["down"])
    for role in ("gate", "up"):
        edit_outputs(block.linear(role), lambda t, index: t[index], order)
    replace_parameter(block.linear("down"), "weight", block.linear("down").weight.detach()[:, order])

    per_head = transforms.salience_order(per_kv_head(block, observed.absmax["o"]))  # [Hkv, D]
    offsets = torch.arange(block.heads, device=per_head.device)[:, None] * block.head_dim
    edit_outputs(block.linear("v"), lambda t, index: t[index], (per_head + offsets[: block.kv_heads]).flatten())
    columns = (per_query_head(block, per_head) + offsets).flatten()
    replace_parameter(block.linear("o"), "weight", block.linear("o").weight.detach()[:, columns])
    context.changed()


# --- clipping and GPTQ ----------------------------------------------------------------------------------------------------


@step
def clip(context: Context, count: int = 16, lowest: float = 0.5, block_count: int = 6) -> None:
    """Weight clipping (paper section 4.3.4): ``count`` ratios from 1 to ``lowest``, best one per row and group.

    v, o, gate, up and down are judged by their own output error; q and k, one ratio per matrix out of ``block_count``, by
    the error of the attention block's output.
    """
    form = context.scheme.weights
    if form is None:
        return
    context.weights.clear()  # codes that an earlier step chose belong to other ranges
    ratios = clipping.candidate_ratios(count, lowest)
    observed = context.observe()
    for role in ("v", "o", "gate", "up", "down"):
        weight = context.block.linear(role).weight.detach()
        context.ratios[role] = clipping.search_output_error(weight, observed.sample[SITE_OF[role]], form, ratios)
    with AttentionProbe(context) as probe:
        for role in ("q", "k"):
            objective = functools.partial(_clipped_error, context, probe, role)
            best = clipping.search_block_error(objective, clipping.candidate_ratios(block_count, lowest))
            context.ratios[role] = torch.tensor(best)


def _clipped_error(context: Context, probe: AttentionProbe, role: str, ratio: float) -> float:
    """Attention error with one matrix quantised at a clipping ratio."""
    linear, form = context.block.linear(role), context.scheme.weights
    assert form is not None
    weight = linear.weight.detach()
    scales = form.choose(weight, ratio)
    with probe.restored():
        replace_parameter(linear, "weight", scales.decode(scales.encode(weight)).to(weight.dtype))
        return probe.error()


@step
def gptq(context: Context, damp: float = 0.01, block_size: int = 128) -> None:
    """GPTQ error feedback on the scales chosen so far (optional in QoQ; run it last)."""
    form = context.scheme.weights
    if form is None:
        return
    observed = context.observe(hessian=True)
    for role, linear in context.block.linears():
        weight = linear.weight.detach()
        scales = form.choose(weight, context.ratios.get(role, 1.0))
        codes = gptq_module.quantize(weight, observed.hessian[SITE_OF[role]], scales, damp, block_size)
        context.weights[role] = assemble(scales, codes)
