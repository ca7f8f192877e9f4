"""Outliers: how large they are in a model, and how to plant some of a chosen size without changing what it computes.

Large language models have activation channels 10 to 100 times larger than the median one, and fixed key channels about 10
times larger (paper sections 4.2 and 4.3). The bundled model has some of its own (its card lists them);
`plant` makes a laboratory animal of a chosen difficulty: the same function, the same text.
"""

from __future__ import annotations

import math

import pandas as pd
import torch
from torch import nn

from . import attention, capture
from .architecture import Block, clone, describe, own, replace_parameter
from .capture import require_ids
from .steps import fold_attention_scale

#: Share of residual channels that `plant` enlarges; published counts are a handful per layer.
PLANTED_CHANNELS = 1 / 128
#: RoPE pairs per KV head that `plant` enlarges.
PLANTED_PAIRS = 2


@torch.no_grad()
def plant(model: nn.Module, activation_ratio: float = 30.0, key_ratio: float = 10.0, seed: int = 0) -> nn.Module:
    """A variant of ``model`` with planted outliers and unchanged function (logits equal up to rounding).

    ``activation_ratio``: at both norms of every block, a few residual channels' gains become ``activation_ratio`` times the
    median gain while the consuming columns shrink to match. The channels are the same in every block, as in real models.
    ``key_ratio``: in every KV head, two RoPE pairs of key rows become that much larger than the head's median channel and
    the matching query rows of the whole group smaller (with QK-norm through the norms' gains, the same pairs in every head).
    A ratio of 1 plants nothing of that kind. ``seed`` chooses channels and pairs.

    The planted activation outliers sit in norm gains, so folding the norms (part of rotation) already removes them: rotation
    is at its very best here. Raises ValueError for ratios below 1.
    """
    for name, ratio in (("activation_ratio", activation_ratio), ("key_ratio", key_ratio)):
        if not isinstance(ratio, int | float) or not 1 <= ratio < math.inf:
            raise ValueError(f"{name}: expected a finite number of at least 1, got {ratio!r}")
    attention.require_unquantized(describe(model).blocks)
    planted = clone(model)
    blocks = describe(planted).blocks
    generator = torch.Generator().manual_seed(seed)
    hidden = blocks[0].linear("q").in_features
    channels = torch.randperm(hidden, generator=generator)[: max(1, round(hidden * PLANTED_CHANNELS))]
    for block in blocks:
        if activation_ratio > 1:
            _plant_channels(block.input_norm, [block.linear(r) for r in ("q", "k", "v")], channels, activation_ratio)
            _plant_channels(block.mlp_norm, [block.linear(r) for r in ("gate", "up")], channels, activation_ratio)
        if key_ratio > 1:
            fold_attention_scale(block, 1 / _key_growth(block, key_ratio, generator))
    own(planted, model)
    return planted


def _plant_channels(norm: nn.Module, consumers: list[nn.Linear], channels: torch.Tensor, ratio: float) -> None:
    """Raise a norm's gain at ``channels`` to ``ratio`` times the median gain; consumers' columns make up for it.

    A channel whose gain is nearly 0 stays as it is: its columns would have to grow beyond measure.
    """
    gain = norm.get_parameter("weight").detach()
    raised = gain.clone()
    median, channels = gain.abs().median(), channels.to(gain.device)
    usable = channels[gain[channels].abs() > 1e-3 * median]
    raised[usable] = ratio * median * gain[usable].sign()
    replace_parameter(norm, "weight", raised)
    growth = (raised.double() / gain.double()).nan_to_num(1.0)
    for linear in consumers:
        replace_parameter(linear, "weight", (linear.weight.detach().double() / growth).to(linear.weight.dtype))


def _key_growth(block: Block, ratio: float, generator: torch.Generator) -> torch.Tensor:
    """``[Hkv, D]`` factors, equal on RoPE pairs, that lift chosen pairs to ``ratio`` times the head's median channel."""
    half = block.head_dim // 2
    if block.key_norm is not None:
        size = block.key_norm.get_parameter("weight").detach().abs().expand(block.kv_heads, -1)
    else:
        size = block.linear("k").weight.detach().float().unflatten(0, (block.kv_heads, -1)).norm(dim=-1)
    paired = size.float().unflatten(1, (2, half)).amax(1)  # [Hkv, D / 2]
    growth = torch.ones_like(paired)
    heads = 1 if block.key_norm is not None else block.kv_heads
    for head in range(heads):
        # the slow-turning half of the pairs, where real key outliers sit; fast pairs would smear over positions
        pairs = half // 2 + torch.randperm(half - half // 2, generator=generator)[:PLANTED_PAIRS]
        rows = slice(None) if block.key_norm is not None else head
        growth[rows, pairs] = (ratio * size[head].float().median() / paired[head, pairs]).clamp(min=1)
    return torch.cat([growth, growth], 1).double()


@torch.no_grad()
def measure(model: nn.Module, ids: torch.Tensor) -> pd.DataFrame:
    """How far the largest channel stands out, per layer and site: one row each for the four linear inputs, keys and values.

    ``ids``: int64 tokens ``[n, length]``. Columns: ``layer``, ``site`` (qkv, o, gate_up, down, keys, values), ``median`` and
    ``max`` of the channels' largest magnitudes, ``ratio`` = max / median. Keys are taken after RoPE; for keys and values the
    row describes the head with the largest ratio.
    """
    twin = clone(model)
    attention.install(twin)
    require_ids("ids", ids, describe(twin).embedding.num_embeddings)
    batches = capture.first_inputs(twin, ids)
    rows = []
    for block in describe(twin).blocks:
        seen = capture.observe(block, batches)
        assert seen.keys is not None and seen.values is not None
        sites = {site: largest[None] for site, largest in seen.absmax.items()} | {"keys": seen.keys, "values": seen.values}
        for site, largest in sites.items():
            median, top = largest.median(-1).values, largest.amax(-1)
            head = int((top / median).argmax())
            rows.append(
                {
                    "layer": block.index,
                    "site": site,
                    "median": float(median[head]),
                    "max": float(top[head]),
                    "ratio": float(top[head] / median[head]),
                }
            )
        batches = [capture.Batch(capture.run_block(block, b), b.arguments) for b in batches]
    return pd.DataFrame(rows)
