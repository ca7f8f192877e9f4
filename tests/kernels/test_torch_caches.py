"""Caches of 8 bits beside torch's products: where a token lies in our pages, what attention sees of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from qoqlab_kernels import torch_caches
from qoqlab_kernels.cache import PagedKV8
from qoqlab_kernels.torch_caches import Sizes

from qoqlab import reference
from qoqlab.kv import quantize_kv
from qoqlab.machines import Geometry

from .gpus import CAPABILITY

GROUPED, SINGLE = Geometry("grouped", 2, 512, 14, 2, 512, 1000), Geometry("single", 2, 512, 4, 4, 512, 1000)


def on_hopper(test: Callable[..., None]) -> Callable[..., None]:
    """Marks of a test of attention with a step's token in the last place of a cache, against fp32."""
    for mark in (
        pytest.mark.gpu,
        pytest.mark.skipif(CAPABILITY < (9, 0), reason="needs a Hopper GPU"),
        pytest.mark.parametrize("context", [65, 200]),
        pytest.mark.parametrize("model", [GROUPED, SINGLE], ids=lambda model: model.name),
    ):
        test = mark(test)
    return test


def operands(model: Geometry) -> list[torch.Tensor]:
    """Queries, keys, values of a step of three sequences."""
    heads = (model.heads, model.kv_heads, model.kv_heads)
    return [torch.randn(3, count, 128, device="cuda", dtype=torch.bfloat16) for count in heads]


@pytest.mark.parametrize("tokens", [64, 70])
def test_the_last_token_of_8_bit_pages_is_written_where_they_are_read(tokens: int) -> None:
    torch.manual_seed(0)
    cache = PagedKV8(1, 2, 64, 6, sequences=3, max_tokens=tokens)
    numbers = [cache.open() for _ in range(3)]
    keys, values = torch.randn(2, 3, 2, tokens, 64)
    cache.append(0, numbers, keys, values)
    k, v = torch.randn(2, 3, 2, 64).bfloat16()
    pool, (at, pairs_at) = cache.pool[0].view(-1), torch_caches.last_token(cache, tokens - 1)
    codes, pairs = torch_caches.to_u8(k, v)
    pool[at] = codes.flatten()
    pool.view(torch.float16)[pairs_at] = pairs.flatten()
    for sequence in numbers:
        for found, before, new in zip(cache.codes(0, sequence), (keys, values), (k, v), strict=True):
            dequantised = found.dequantize()
            assert torch.equal(dequantised[:, :-1], quantize_kv(before[sequence], cache.grid).dequantize()[:, :-1])
            assert (dequantised[:, -1] - new[sequence].float()).abs().amax() < 0.03  # a step of 256 over +-3.5


def test_random_pages_hold_small_numbers_everywhere() -> None:
    cache = torch_caches.paged_cache(Geometry("small", 2, 64, 2, 2, 64, 10, 64), Sizes(3, 65), "cpu")
    assert (cache.lengths == 65).all() and cache.allocator.free == 0
    for sequence in range(3):
        cache._length[sequence] = [65, 65]  # the host has not been told of the tokens
        for numbers in cache.gather(1, sequence):
            assert numbers.shape == (2, 65, 64) and numbers.abs().amax() < 2.57 and 1.3 < numbers.std() < 1.6


@on_hopper
def test_fp8(model: Geometry, context: int) -> None:
    torch.compiler.reset()  # there is room for few shapes
    q, k, v = operands(model)
    cache = torch_caches.fp8_cache(model, Sizes(3, context))
    keys, values = cache[1]
    keys[:, :, -1], values[:, :, -1] = k, v
    want = reference.kv4_attention(q.float(), keys.float(), values.float()).flatten(1)
    for options in torch_caches.FLEX_OPTIONS:
        got = torch_caches.flex(options)(q, keys, values)
        assert (got.float() - want).norm() < 1e-2 * want.norm(), options
    torch.compiler.reset()
    assert torch_caches.flex_options(model.heads, model.kv_heads, 128, Sizes(3, context)) in torch_caches.FLEX_OPTIONS


@on_hopper
def test_pages(model: Geometry, context: int) -> None:
    q, k, v = operands(model)
    cache = torch_caches.paged_cache(model, Sizes(3, context))
    got = torch_caches.paged(cache, torch_caches.to_u8)(1, q, k, v)
    for sequence in range(3):
        cache._length[sequence] = [context] * 2
    keys, values = (torch.stack(t) for t in zip(*(cache.gather(1, s) for s in range(3)), strict=True))
    for new, there in ((k, keys), (v, values)):
        assert (there[:, :, -1] - new).norm() < 0.01 * new.norm()
    want = reference.kv4_attention(q.float(), keys, values).flatten(1)
    assert (got.float() - want).norm() < 1e-2 * want.norm()
