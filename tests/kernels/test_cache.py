"""The paged cache on a CPU: what comes out is what `qoqlab.kv.quantize_kv4` made of what went in, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qoqlab_kernels.allocator import OutOfPages
from qoqlab_kernels.cache import PagedKV4, PagedKV8, PagedKV16
from qoqlab_kernels.rows import PAGE

from qoqlab.grids import UINT8
from qoqlab.kv import QuantizedKV, quantize_kv, quantize_kv4

KINDS = {"kv4": PagedKV4, "kv8": PagedKV8, "kv16": PagedKV16}


def numbers(seed: int, tokens: int, heads: int, dim: int) -> torch.Tensor:
    """Rows of many sizes and offsets, some constant, some all zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, heads, dim, generator=generator)
    x = x * torch.logspace(-4, 2, tokens)[:, None, None] + torch.randn(tokens, heads, 1, generator=generator) * 10
    x[::5] = x[::5, :, :1]
    x[::7] = 0
    return x.half()


def same(got: QuantizedKV | torch.Tensor, want: QuantizedKV | torch.Tensor) -> bool:
    if isinstance(want, torch.Tensor):
        return torch.equal(got, want)
    return all(torch.equal(getattr(got, name), getattr(want, name)) for name in ("codes", "scales", "zeros"))


def expected(kind: str, x: torch.Tensor) -> QuantizedKV | torch.Tensor:
    """``x [T, heads, D]`` as the cache should keep it, ``[heads, T, D]``."""
    x = x.transpose(0, 1)
    return x if kind == "kv16" else quantize_kv(x, UINT8) if kind == "kv8" else quantize_kv4(x)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), lengths=st.lists(st.integers(0, 140), min_size=1, max_size=4), steps=st.integers(0, 3))
def test_prompts_and_steps_come_out_as_they_were_quantised(
    kind: str, dim: int, seed: int, lengths: list[int], steps: int
) -> None:
    heads = 2
    cache = KINDS[kind](2, heads, dim, 16, sequences=4)
    opened = [cache.open() for _ in lengths]
    kept: list[list[list[torch.Tensor]]] = [[[], []] for _ in lengths]
    for step in range(steps + 1):
        counts = lengths if step == 0 else [1] * len(lengths)
        cache.extend(opened, counts)
        rows = [[numbers(seed + 10 * step + i + 1000 * j, n, heads, dim) for i, n in enumerate(counts)] for j in (0, 1)]
        cache.append(1, opened, torch.cat(rows[0]), torch.cat(rows[1]), counts if step == 0 else None)
        for i in range(len(lengths)):
            for j in (0, 1):
                kept[i][j].append(rows[j][i])
    for i, sequence in enumerate(opened):
        stored, values = cache.stored(1, sequence), cache.gather(1, sequence)
        assert cache.tokens(sequence) == lengths[i] + steps
        for j in (0, 1):
            want = expected(kind, torch.cat(kept[i][j]))
            assert same(stored[j], want)
            assert torch.equal(values[j], want.float() if kind == "kv16" else want.dequantize())
    assert not cache.data[0].any()  # the other layer


@pytest.mark.parametrize("dim", [64, 128])
def test_every_byte_of_a_chunk_has_one_use(dim: int) -> None:
    for kind, size in (("kv4", dim // 2 + 4), ("kv8", dim + 4), ("kv16", 2 * dim)):
        cache = KINDS[kind](1, 1, dim, 1)
        assert cache.where.flatten().sort().values.equal(torch.arange(2 * PAGE * size))
        assert cache.nbytes == 2 * PAGE * size


def test_a_shared_prefix_is_kept_until_the_last_lets_go() -> None:
    cache = PagedKV4(1, 1, 64, 4, sequences=3)
    first = cache.open()
    cache.extend([first], [130])
    x = numbers(3, 130, 1, 64)
    cache.append(0, [first], x, x, [130])
    second = cache.open(first, 128)
    assert cache.allocator.free == 1 and cache.tokens(second) == 128
    cache.extend([second])
    cache.append(0, [second], x[:1] + 1, x[:1] + 1)
    assert cache.allocator.free == 0
    before = cache.gather(0, second)[0]
    cache.free([first])
    assert cache.allocator.free == 1  # the page of tokens 128 and 129
    assert torch.equal(cache.gather(0, second)[0], before)
    assert torch.equal(before[:, :128], quantize_kv4(x[:128].transpose(0, 1)).dequantize())
    cache.free([second])
    assert cache.allocator.free == 4
    with pytest.raises(ValueError, match=f"sequences: {second} is not open"):
        cache.free([second])


def test_tables_and_lengths_change_in_place() -> None:
    cache = PagedKV4(1, 1, 64, 4, sequences=2)
    tables, lengths = cache.tables, cache.lengths
    a = cache.open()
    cache.reserve([a], 65)
    assert int((tables[a] >= 0).sum()) == 2 and int(lengths[a]) == 0
    batch = cache.batch([a])
    for _ in range(65):
        cache.advance(batch)
    cache.advanced([a], 65)
    assert int(lengths[a]) == cache.tokens(a) == 65
    cache.extend([a])
    assert cache.allocator.free == 2 and int(lengths[a]) == 66
    assert tables is cache.tables and lengths is cache.lengths


def test_exhaustion_changes_nothing() -> None:
    cache = PagedKV4(1, 1, 64, 3, sequences=2)
    a, b = cache.open(), cache.open()
    with pytest.raises(OutOfPages, match="4 pages asked for, 3 of 3 free"):
        cache.extend([a, b], [100, 100])
    assert cache.allocator.free == 3 and cache.tokens(a) == 0 and not cache.lengths.any()
    with pytest.raises(RuntimeError, match="sequences: all 2 are in use"):
        cache.open()


def test_bad_input_is_named() -> None:
    for options, message in (
        ((0, 1, 64, 1), "layers: expected a positive integer"),
        ((1, 1, 96, 1), "head_dim: expected 64 or 128, got 96"),
        ((1, 1, 64, 0), "pages: expected a positive integer"),
        ((1, 1, 64, 1, 32), "page_size: pages hold 64 tokens, got 32"),
    ):
        with pytest.raises(ValueError, match=message):
            PagedKV4(*options)
    cache = PagedKV4(1, 2, 64, 2)
    a = cache.open()
    cache.extend([a], [3])
    x = torch.zeros(3, 2, 64)
    for call, error, message in (
        (lambda: cache.append(1, [a], x, x, [3]), ValueError, r"layer: expected 0 \.\. 0, got 1"),
        (lambda: cache.append(0, [a + 1], x, x, [3]), ValueError, "sequences: 1 is not open"),
        (lambda: cache.append(0, [a], x, x), ValueError, r"keys: expected \[1, 2, 64\] on cpu, got 3x2x64"),
        (lambda: cache.append(0, [a], x, x[:2], [3]), ValueError, "values: expected"),
        (lambda: cache.append(0, [a], x.int(), x, [3]), TypeError, "keys: expected a floating-point tensor"),
        (lambda: cache.append(0, [a], x / 0, x, [3]), ValueError, "keys: holds 384 NaN"),
        (lambda: cache.append(0, torch.zeros(1), x, x, [3]), ValueError, r"sequences: expected int32 \[B\] on cpu"),
        (lambda: cache.append(0, [a], x, x, [1, 2]), ValueError, "counts: expected one for each of 1 sequences, got 2"),
        (lambda: cache.extend([a], [126]), ValueError, "at most 128 tokens, not 129"),
        (lambda: cache.extend([a, a]), ValueError, "sequences: each may be named once"),
        (lambda: cache.open(a, 2), ValueError, "tokens: expected a multiple of 64 up to 3, got 2"),
    ):
        with pytest.raises(error, match=message):
            call()
