"""The attention function that quantised models run: where keys and values meet the KV grid.

Registered with transformers under the name "qoqlab" on first use. Each attention module may carry an `AttentionState` that
says what to do with keys (after RoPE) and values; without one it is plain scaled-dot-product attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn

from .architecture import Block
from .grids import Grid
from .hadamard import transform
from .kv import Keys, KVFormat

NAME = "qoqlab"


class Mode(Enum):
    """Which arithmetic a quantised model performs.

    SIMULATED  fake quantisation everywhere, as papers report: all keys and values are rounded, linears run in the model's
               floating-point type on rounded operands.
    RUNTIME    what the kernels compute: exact integer GEMMs with fp16 outputs; a prompt attends to unquantised keys and
               values, a decoded token to the quantised cache and to its own unquantised key and value.
    """

    SIMULATED = "simulated"
    RUNTIME = "runtime"


@dataclass
class AttentionState:
    """What one attention module does with keys and values."""

    grid: Grid | KVFormat | None = None
    mode: Mode = Mode.SIMULATED
    #: RUNTIME without a cache: how many leading tokens form the prompt; later ones are computed as decode steps.
    #: None leaves quantisation to the cache (`qoqlab.hf.KV4Cache`).
    prefill: int | None = None
    #: called with (query, key, value), each [B, H, T, D] after RoPE
    observer: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None


def state(module: nn.Module) -> AttentionState:
    """The state of an attention module, made on first use."""
    if not isinstance(getattr(module, "qoq", None), AttentionState):
        module.qoq = AttentionState()  # type: ignore[assignment]
    return module.qoq  # type: ignore[return-value]


def require_unquantized(blocks: tuple[Block, ...]) -> None:
    """Raise TypeError naming the first linear or cache that is quantised already."""
    for block in blocks:
        for role, linear in block.linears():
            if not isinstance(linear, nn.Linear):
                kind = type(linear).__name__
                raise TypeError(f"model: {block.name(role)} is a {kind}, expected an unquantised nn.Linear")
        if getattr(getattr(block.attention, "qoq", None), "grid", None) is not None:
            raise TypeError(f"model: the attention of layer {block.index} rounds its keys and values already")


def install(model: nn.Module) -> None:
    """Make ``model`` use this module's attention function."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register(NAME, forward)
    # without a mask function of the same name no causal mask is built, silently
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(NAME)  # type: ignore[operator]


def forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers: query [B, Hq, T, D], key and value [B, Hkv, S, D] -> [B, T, Hq, D]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    here = state(module)
    if here.observer is not None:
        here.observer(query, key, value)
    form, scale = KVFormat.of(here.grid), kwargs.get("scaling")
    cached = getattr(key, "from_quantized_cache", False)
    if form is not None and form.rotate_keys:
        # the same orthogonal matrix on both sides leaves every score alone; a quantised cache has rotated its keys
        query, key = transform(query), key if cached else transform(key)
    if form is not None and here.mode is Mode.RUNTIME and here.prefill is not None:
        return decode_attention(query, key, value, attention_mask, form, here.prefill, scale), None
    if form is not None and here.mode is Mode.SIMULATED and not cached:
        if form.keys is Keys.CHANNEL:
            nothing = torch.zeros((), dtype=torch.bool, device=query.device)
            return _cache_attention(query, key, value, attention_mask, form, nothing, scale), None
        key, value = form.round_keys(key), form.round_values(value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0], None


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    grid: Grid | KVFormat,
    prefill: int,
    scale: float | None = None,
) -> torch.Tensor:
    """All decode steps of a sequence at once: token i sees quantised keys and values of earlier tokens and its own exact.

    The first ``prefill`` tokens are a prompt and see each other exactly. Keys that share scales across tokens are exact for
    tokens of their own window, which is not complete yet (see `KVFormat`). Shapes as in `forward`, with S == T.
    """
    form = KVFormat.of(grid)
    assert form is not None
    i = torch.arange(query.shape[2], device=query.device)
    exact = (i[:, None] == i) | ((i[:, None] < prefill) & (i < prefill))
    return _cache_attention(query, key, value, attention_mask, form, exact, scale)


def _cache_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    form: KVFormat,
    exact: torch.Tensor,
    scale: float | None,
) -> torch.Tensor:
    """Attention of the last T of S tokens on their cache; where ``exact [T, S]`` holds, on unquantised keys and values.

    Keys with scales per channel are exact also where query and key lie in one window.
    """
    repeats, (count, total) = query.shape[1] // key.shape[1], (query.shape[2], key.shape[2])
    key, value = key.float(), value.float()
    exact_k, exact_v, cached_k, cached_v = (
        t.repeat_interleave(repeats, 1) for t in (key, value, form.round_keys(key), form.round_values(value))
    )
    j = torch.arange(total, device=query.device)
    i = j[total - count :, None]
    exact_keys = exact | (i // form.window == j // form.window) if form.keys is Keys.CHANNEL else exact
    allowed = i >= j if attention_mask is None else attention_mask[..., :total]
    q = query.float() * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.where(exact_keys, q @ exact_k.transpose(-1, -2), q @ cached_k.transpose(-1, -2))
    scores = scores.masked_fill(~allowed, -torch.inf) if allowed.dtype == torch.bool else scores + allowed
    nothing = scores.isneginf().all(-1, keepdim=True)  # padding that may look at nobody
    weights = scores.softmax(-1).masked_fill(nothing, 0)
    out = weights.masked_fill(~exact, 0) @ exact_v + weights.masked_fill(exact, 0) @ cached_v
    return out.transpose(1, 2).to(query.dtype)
