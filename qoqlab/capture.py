"""Run a model, or one block of it, and keep what passes: instrument, do not fork."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import attention, online
from .architecture import SITES, Block, describe
from .checks import shape_of


@dataclass(frozen=True)
class Batch:
    """Input of one block for a few sequences, ``hidden [B, T, hidden]``.

    ``arguments`` holds, for every block by index, what it takes besides: masks (which differ where only some layers use a
    sliding window) and position embeddings.
    """

    hidden: torch.Tensor
    arguments: tuple[dict[str, Any], ...]


def require_ids(name: str, ids: torch.Tensor, vocabulary: int) -> None:
    """Raise unless ``ids`` is a non-empty int64 matrix [n, length] of tokens below ``vocabulary``."""
    if not isinstance(ids, torch.Tensor):
        kind = type(ids).__name__
        raise TypeError(f"{name}: expected a torch.Tensor of token ids [n, length], got {kind}; qoqlab.tokens makes one")
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"{name}: expected int64 token ids, got {ids.dtype}")
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < vocabulary):
        raise ValueError(f"{name}: token ids must lie in 0..{vocabulary - 1}, got {int(ids.min())}..{int(ids.max())}")
    if ids.dtype != torch.int64 or ids.ndim != 2 or ids.numel() == 0:
        raise ValueError(f"{name}: expected non-empty int64 tokens [n, length], got {ids.dtype} of shape {shape_of(ids)}")


@torch.no_grad()
def first_inputs(model: nn.Module, ids: torch.Tensor, batch_size: int = 2) -> list[Batch]:
    """Inputs of the first block for token ids ``[n, length]``, in batches, with the other arguments of every block."""
    layers = [block.layer for block in describe(model).blocks]
    calls: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def pass_on(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        calls.append(
            (hidden_states, {k: v for k, v in kwargs.items() if k not in ("past_key_values", "cache", "use_cache")})
        )
        return hidden_states

    batches: list[Batch] = []
    hooked = [vars(layer).get("forward") for layer in layers]  # accelerate's hooks shadow the method, too
    for layer in layers:
        layer.forward = pass_on  # shadows the class's method: every block hands its input on, so this run is cheap
    try:
        for chunk in ids.split(batch_size):
            calls.clear()
            model.get_submodule("model")(chunk.to(next(model.parameters()).device), use_cache=False)
            batches.append(Batch(calls[0][0], tuple(arguments for _, arguments in calls)))
    finally:
        for layer, forward in zip(layers, hooked, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward
    return batches


@torch.no_grad()
def run_block(block: Block, batch: Batch) -> torch.Tensor:
    """Output ``[B, T, hidden]`` of a block."""
    out = block.layer(batch.hidden, **batch.arguments[block.index])
    return out[0] if isinstance(out, tuple) else out


@dataclass
class Observation:
    """Statistics of one block over all calibration tokens.

    ``absmax`` [K] and ``hessian`` [K, K] fp32 (sum of x x^T, if asked for) per site of `architecture.SITES`; ``sample``
    [S, K], a strided sample of at most ``keep`` tokens; ``keys``, ``queries``, ``values`` [H, D], largest magnitudes after
    RoPE.
    """

    absmax: dict[str, torch.Tensor] = field(default_factory=dict)
    hessian: dict[str, torch.Tensor] = field(default_factory=dict)
    sample: dict[str, torch.Tensor] = field(default_factory=dict)
    keys: torch.Tensor | None = None
    queries: torch.Tensor | None = None
    values: torch.Tensor | None = None


@contextmanager
def taps(block: Block, on_site: Any, on_attention: Any) -> Iterator[None]:
    """Call ``on_site(site, x [tokens, K])`` at every linear input and ``on_attention(q, k, v)`` after RoPE.

    Where a linear's input passes an online transform, ``x`` is what comes out of it.
    """
    hooks = []
    for site, roles in SITES.items():

        def tap(module: nn.Module, args: tuple[torch.Tensor, ...], site: str = site) -> None:
            on_site(site, args[0].flatten(0, -2))

        linear = block.linear(roles[0])
        transform = online.of(linear)
        if transform is None:
            hooks.append(linear.register_forward_pre_hook(tap))
        else:
            hooks.append(transform.register_forward_hook(functools.partial(_tap_output, tap)))
    here = attention.state(block.attention)
    before, here.observer = here.observer, on_attention
    try:
        yield
    finally:
        here.observer = before
        for hook in hooks:
            hook.remove()


def _tap_output(tap: Any, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    tap(module, (output,))


@torch.no_grad()
def observe(block: Block, batches: list[Batch], keep: int = 1024, hessian: bool = False) -> Observation:
    """Run ``block`` over all batches and reduce what passes (see `Observation`). The model must use our attention."""
    seen = Observation()
    total = sum(b.hidden.shape[0] * b.hidden.shape[1] for b in batches)
    stride = -(-total // keep)
    samples: dict[str, list[torch.Tensor]] = {site: [] for site in SITES}

    def on_site(site: str, x: torch.Tensor) -> None:
        largest = x.float().abs().amax(0)
        seen.absmax[site] = torch.maximum(seen.absmax[site], largest) if site in seen.absmax else largest
        samples[site].append(x[::stride].to(torch.float32, copy=True))  # a view would keep all of x alive
        if hessian:
            gram = x.float().T @ x.float()
            seen.hessian[site] = seen.hessian[site] + gram if site in seen.hessian else gram

    def on_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        for name, tensor in (("queries", query), ("keys", key), ("values", value)):
            largest = tensor.float().abs().amax((0, 2))
            before = getattr(seen, name)
            setattr(seen, name, largest if before is None else torch.maximum(before, largest))

    with taps(block, on_site, on_attention):
        for batch in batches:
            run_block(block, batch)
    seen.sample = {site: torch.cat(rows) for site, rows in samples.items()}
    return seen


@torch.no_grad()
def layer_tensors(model: nn.Module, ids: torch.Tensor, layer: int) -> dict[str, torch.Tensor]:
    """Everything one layer sees for tokens ``[1, T]``: sites ``[T, K]`` and ``queries``, ``keys``, ``values`` ``[H, T, D]``.

    Keys and queries are taken after RoPE. The model itself is left as it was. Raises IndexError for a layer out of range.
    """
    from .architecture import clone

    twin = clone(model)
    attention.install(twin)
    blocks = describe(twin).blocks
    if not 0 <= layer < len(blocks):
        raise IndexError(f"layer: {layer} is not in 0..{len(blocks) - 1}")
    require_ids("ids", ids, describe(twin).embedding.num_embeddings)
    found: dict[str, torch.Tensor] = {}

    def on_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        found.update(queries=query[0].float(), keys=key[0].float(), values=value[0].float())

    with taps(blocks[layer], lambda site, x: found.__setitem__(site, x.float()), on_attention):
        twin(ids[:1], use_cache=False)
    return found
