"""Caches of 8 bits for `torch_model`, and attention on them: what torch, or a simple kernel of ours, does with W8A8KV8.

Two ways. An fp8 cache, one scale for all, read by FlexAttention's kernel for few queries, which widens it in registers and
multiplies on tensor cores; that is what torch has. And our pages of 8-bit codes with a scale and a zero per token and head,
which only version v2 of our attention reads: a warp for each query head, on CUDA cores. Caches are static: every sequence
has the same number of tokens, and a step's token takes the last place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from qoqlab.machines import Geometry

from . import attention, measure
from .cache import PagedKV8
from .pages import byte_tables

FP8 = torch.float8_e4m3fn
PAGE = 64
#: Blocks of keys, pipeline stages and warps that FlexAttention is tried with; left alone it has one stage on Hopper.
FLEX_OPTIONS = ((64, 3, 2), (64, 3, 4), (128, 3, 4))

#: Attention of queries ``[B, Hq, D]`` to keys and values ``[B, Hkv, T, D]`` -> ``[B, Hq D]``.
Look = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
#: Attention of a layer with a step's turned queries ``[B, Hq, D]``, turned keys and values ``[B, Hkv, D]`` -> ``[B, Hq D]``.
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """Of a static cache: ``batch`` sequences of ``context`` tokens, the new one included."""

    batch: int
    context: int


# -- fp8 ------------------------------------------------------------------------------------------------------------------


def fp8_cache(model: Geometry, sizes: Sizes) -> torch.Tensor:
    """Random ``[layers, 2, B, Hkv, T, D]``; all sequences have the same tokens, since more would need memory to make."""
    shape = (model.layers, 2, sizes.batch, model.kv_heads, sizes.context, model.head_dim)
    cache = torch.empty(shape, device="cuda", dtype=FP8)
    one = torch.randn(2, 1, *shape[3:], device="cuda").to(FP8)
    cache.view(torch.uint8).copy_(one.view(torch.uint8))
    return cache


def flex(options: tuple[int, int, int]) -> Look:
    """FlexAttention on a cache of any type. A group of query heads is its sequence of queries: without a mask that is the
    same product."""
    from torch.nn.attention.flex_attention import flex_attention  # which takes seconds to import

    keys, stages, warps = options
    kernel: Any = {"BLOCK_N": keys, "num_stages": stages, "num_warps": warps}

    def compute(query: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flex_attention(query, k, v, kernel_options=kernel)

    run = torch.compile(compute, dynamic=False)

    def look(query: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return run(query.unflatten(1, (k.shape[1], -1)), k, v).reshape(len(query), -1)

    return look


@functools.cache
def flex_options(heads: int, kv_heads: int, head_dim: int, sizes: Sizes) -> tuple[int, int, int]:
    """The fastest of `FLEX_OPTIONS` for a layer's bf16 queries and fp8 cache."""
    query = torch.randn(sizes.batch, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    cache = [fp8_cache(Geometry("", 1, 1, heads, kv_heads, 1, 1, head_dim), sizes)[0] for _ in range(2)]
    us = {}
    for options in FLEX_OPTIONS:
        look = flex(options)
        us[options] = measure.graph_time([partial(look, query, k, v) for k, v in cache], replays=5)
    return min(us, key=us.__getitem__)


# -- pages of 8 bits ------------------------------------------------------------------------------------------------------


def to_u8(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 ``[2, B, H, D]`` of keys and values ``[B, H, D]``, and (scale, zero) fp16 ``[2, B, H, 2]``."""
    x = torch.stack([k, v]).float()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / 255).clamp(min=1e-6)
    zero = -low / scale
    return (x / scale + zero).round().clamp(0, 255).to(torch.uint8), torch.cat([scale, zero], -1).half()


def last_token(cache: PagedKV8, token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where token number ``token`` of every sequence lies in a layer's pool: its codes ``[2 B H D]`` in bytes, its scales
    and zeros ``[2 B H 2]`` in fp16 numbers."""
    layout, inside = cache.layout, token % cache.page_size
    page = cache.tables[:, token // cache.page_size].long()
    chunk = (page[:, None] * cache.kv_heads + torch.arange(cache.kv_heads, device=cache.device)) * layout.bytes
    codes = [chunk[..., None] + places[inside].to(cache.device) for places in byte_tables(layout)]
    pairs = [chunk + at + 4 * inside for at in (layout.scales, layout.value_scales)]
    halves = torch.stack(pairs)[..., None] // 2 + torch.arange(2, device=cache.device)
    return torch.stack(codes).flatten(), halves.flatten()


def paged_cache(model: Geometry, sizes: Sizes, device: str = "cuda") -> PagedKV8:
    """Random pages; the device's lengths count the step's token."""
    pages = sizes.batch * -(-sizes.context // PAGE)
    options: dict[str, Any] = {"sequences": sizes.batch, "max_tokens": sizes.context, "device": device}
    cache = PagedKV8(model.layers, model.kv_heads, model.head_dim, pages, PAGE, **options)
    cache.grow({cache.open(): sizes.context for _ in range(sizes.batch)})
    cache.lengths.fill_(sizes.context)
    cache.pool.random_(0, 256)
    pairs = cache.pool[..., cache.layout.scales :].view(torch.float16)
    pairs[..., ::2], pairs[..., 1::2] = 0.02, 128
    return cache


def paged(cache: PagedKV8, write: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Attend:
    """Attention by our kernel, keys and values quantised by ``write`` (`to_u8`)."""
    places = last_token(cache, int(cache.lengths[0, 0]) - 1)
    slots = torch.arange(cache.sequences, device=cache.device, dtype=torch.int32)

    def attend(i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        pool = cache.pool[i].view(-1)
        for to, at, new in zip((pool, pool.view(torch.float16)), places, write(k, v), strict=True):
            to[at] = new.flatten()
        return attention.kv4_attention(q, cache, i, slots).flatten(1)

    return attend
