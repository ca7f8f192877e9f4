"""The paged KV4 cache: exactly the codes of `quantize_kv4`, in the bytes that the attention kernels read."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import qoqlab_kernels as qk
import torch
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from qoqlab_kernels import pages
from qoqlab_kernels.pages import HEAD_DIMS, PAGE_SIZES, ChunkLayout

from qoqlab.allocator import PagesExhausted
from qoqlab.kv import QuantizedKV, quantize_kv, quantize_kv4

LAYOUTS = [(d, size) for d in HEAD_DIMS for size in PAGE_SIZES]


def tokens(heads: int, count: int, dim: int, seed: int) -> torch.Tensor:
    """Keys or values [1, heads, count, dim] with outliers, an offset, a constant and a zero token."""
    x = torch.randn(1, heads, count, dim, generator=torch.Generator().manual_seed(seed))
    x[..., 3] *= 20
    x[:, :, ::5] += 300
    x[:, 0, ::7] = 1.5
    x[:, -1, ::11] = 0
    return x


def stored(x: torch.Tensor, kind: type) -> torch.Tensor:
    """What a cache of a kind gives back."""
    return x.half().float() if kind.grid is None else quantize_kv(x, kind.grid).dequantize()


def assert_same(got: QuantizedKV, want: QuantizedKV) -> None:
    assert torch.equal(got.codes, want.codes)
    assert torch.equal(got.scales, want.scales) and torch.equal(got.zeros, want.zeros)


# -- layout ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "size"), LAYOUTS)
def test_every_code_has_its_own_nibble(dim: int, size: int) -> None:
    layout = ChunkLayout(dim, size)
    keys = {pages.key_place(t, c, dim) for t in range(size) for c in range(dim)}
    values = {pages.value_place(t, c, dim, size) for t in range(size) for c in range(dim)}
    assert keys == {(at, shift) for at in range(layout.codes) for shift in (0, 4)}
    assert values == {(at, shift) for at in range(layout.codes, 2 * layout.codes) for shift in (0, 4)}
    assert layout.bytes == size * (dim + 8) and layout.bytes % 16 == 0


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("dim", "size"), LAYOUTS)
def test_every_wide_number_has_its_own_bytes(dim: int, size: int, bits: int) -> None:
    """And beside each other those that a 4-bit page has in one word: a lane's 8 of a tile."""
    layout, width = ChunkLayout(dim, size, bits), bits // 8
    keys = {pages.key_place(t, c, dim, bits) for t in range(size) for c in range(dim)}
    values = {pages.value_place(t, c, dim, size, bits) for t in range(size) for c in range(dim)}
    assert keys == {(at, 0) for at in range(0, layout.codes, width)}
    assert values == {(at, 0) for at in range(layout.codes, 2 * layout.codes, width)}
    assert layout.bytes == 2 * size * dim * width + (8 * size if bits == 8 else 0) and layout.bytes % 16 == 0
    for token, channel in ((0, 0), (5, 17), (size - 1, dim - 1)):
        word, wide = pages.key_place(token, channel, dim)[0] // 4, pages.key_place(token, channel, dim, bits)[0]
        assert wide // bits == word


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_words_are_operands_of_the_tensor_core(dim: int) -> None:
    """PTX ISA, mma.m16n8k16, A: lane 4 g + q holds (g, 2q), (g, 2q + 1); (g + 8, ..); (g, 2q + 8 ..); (g + 8, 2q + 8 ..)."""
    for g in range(8):
        for q in range(4):
            for odd in range(2):
                for high in range(2):
                    for half in range(2):
                        row, column = g + 8 * high, 2 * q + odd + 8 * half
                        word = 16 * (4 * g + q)  # of the first tile
                        assert pages.key_place(row, column, dim) == (word + 2 * odd + high, 4 * half)
                        at = ChunkLayout(dim).codes + word
                        assert pages.value_place(column, row, dim) == (at + 2 * odd + half, 4 * high)


def test_golden_bytes() -> None:
    """A page written out: token 0 holds codes 0..15 over and over, token 9 a constant."""
    cache = qk.PagedKV4(1, 1, 64, 1, page_size=16)
    x = torch.zeros(1, 1, 10, 64)
    x[0, 0, 0] = torch.arange(64) % 16
    x[0, 0, 9] = 2.0
    s = cache.open()
    cache.append(0, [s], x, -x)
    chunk = cache.pool.flatten()
    # token 0's key: lane q holds channels 2q (byte 0) and 2q + 1 (byte 2); channel c + 8 in the high nibble
    assert chunk[:64:16].tolist() == [0x80, 0xA2, 0xC4, 0xE6] and chunk[2:64:16].tolist() == [0x91, 0xB3, 0xD5, 0xF7]
    # token 9's key: its range is 0, so the scale is 2 / 2048, the zero -2048, and every code round(2048 - 2048) = 0
    assert chunk[17:80:16].tolist() == [0] * 4
    # token 0's value, negated: lane 4 g holds channels g and g + 8 in byte 0
    assert chunk[512 : 512 + 8 * 64 : 64].tolist() == [(15 - g) | (7 - g) << 4 for g in range(8)]
    assert chunk[1024:1028].view(torch.float16).tolist() == [1.0, 0.0]
    assert chunk[1024 + 36 : 1024 + 40].view(torch.float16).tolist() == [2 / 2048, -2048.0]
    assert chunk[1088:1092].view(torch.float16).tolist() == [1.0, 15.0]
    assert chunk[1088 + 36 : 1088 + 40].view(torch.float16).tolist() == [2 / 2048, 2048.0]
    assert chunk.numel() == 16 * 72


# -- append and gather ----------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([qk.PagedKV8, qk.PagedKV16]),
    st.sampled_from(LAYOUTS),
    st.lists(st.integers(1, 70), min_size=1, max_size=4),
)
def test_any_pieces_give_what_wide_pages_hold(kind: type, layout: tuple[int, int], pieces: list[int]) -> None:
    (dim, size), total = layout, sum(pieces)
    cache = kind(1, 2, dim, pages=-(-total // size) + 1, page_size=size)
    cache.pool.fill_(0xA5)
    k, v = (tokens(2, total, dim, seed) for seed in (1, 2))
    s = cache.open()
    for part_k, part_v in zip(k.split(pieces, 2), v.split(pieces, 2), strict=True):
        cache.append(0, [s], part_k, part_v)
    for got, x in zip(cache.gather(0, s), (k, v), strict=True):
        assert torch.equal(got, stored(x[0], kind))
    if kind.grid is not None:
        for got, x in zip(cache.codes(0, s), (k, v), strict=True):
            assert_same(got, quantize_kv(x[0], kind.grid))
    copy = cache.fork(s)
    assert torch.equal(cache.gather(0, copy)[0], cache.gather(0, s)[0])


def test_fp16_pages_refuse_what_fp16_cannot_hold() -> None:
    cache = qk.PagedKV16(1, 1, 64, pages=1)
    s, x = cache.open(), torch.ones(1, 1, 2, 64)
    for wrong in (x * 1e5, x * torch.nan):
        with pytest.raises(ValueError, match="x: holds"):
            cache.append(0, [s], x, wrong)
    assert cache.length(0, s) == 0 and cache.allocator.free == 1


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(LAYOUTS),
    st.integers(1, 3),
    st.lists(st.integers(1, 70), min_size=1, max_size=4),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_any_pieces_give_the_codes_of_quantize_kv4(
    layout: tuple[int, int], heads: int, pieces: list[int], dtype: torch.dtype
) -> None:
    (dim, size), total = layout, sum(pieces)
    cache = qk.PagedKV4(2, heads, dim, pages=-(-total // size) + 1, page_size=size)
    cache.pool.fill_(0xA5)
    k, v = (tokens(heads, total, dim, seed).to(dtype) for seed in (1, 2))
    s = cache.open()
    for part_k, part_v in zip(k.split(pieces, 2), v.split(pieces, 2), strict=True):
        cache.append(1, [s], part_k, part_v)
    assert (cache.length(0, s), cache.length(1, s)) == (0, total)
    assert cache.lengths[:, s].tolist() == [0, total]
    want = quantize_kv4(k[0]), quantize_kv4(v[0])
    for got, expected in zip(cache.codes(1, s), want, strict=True):
        assert_same(got, expected)
    for got, expected in zip(cache.gather(1, s), want, strict=True):
        assert torch.equal(got, expected.dequantize())
    assert cache.allocator.free == cache.pages - -(-total // size)


class Machine(RuleBasedStateMachine):
    """Sequences are opened, grow, fork and go; each must keep exactly its own tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = qk.PagedKV4(2, 1, 64, pages=9, page_size=16, sequences=3, max_tokens=70)
        self.model: dict[int, list[torch.Tensor]] = {}
        self.seed = 0

    @rule()
    def open(self) -> None:
        if len(self.model) == 3:
            with pytest.raises(RuntimeError, match="sequences: all 3 are open"):
                self.cache.open()
            return
        s = self.cache.open()
        assert s not in self.model
        self.model[s] = [torch.zeros(1, 0, 64)] * 2

    @precondition(lambda self: self.model)
    @rule(data=st.data(), count=st.integers(1, 40))
    def append(self, data: st.DataObject, count: int) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.model)), min_size=1, unique=True))
        self.seed += 1
        x = tokens(len(chosen), count, 64, self.seed).transpose(0, 1)
        before = self.cache.allocator.free
        try:
            for layer in (0, 1):
                self.cache.append(layer, chosen, x + layer, -x)
        except (PagesExhausted, ValueError) as error:
            assert self.cache.allocator.free == before, error
            short = sum(-(-(self.model[s][0].shape[1] + count) // 16) - -(-self.model[s][0].shape[1] // 16) for s in chosen)
            long = any(self.model[s][0].shape[1] + count > 80 for s in chosen)
            assert long if isinstance(error, ValueError) else short > before
            return
        for s, new in zip(chosen, x, strict=True):
            self.model[s] = [torch.cat([old, new + layer], 1) for layer, old in enumerate(self.model[s])]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        s = data.draw(st.sampled_from(sorted(self.model)))
        before = self.cache.allocator.free
        try:
            copy = self.cache.fork(s)
        except RuntimeError:  # all sequences open, or no page for the partial one
            assert self.cache.allocator.free == before
            assert len(self.model) == 3 or not before
            return
        self.model[copy] = list(self.model[s])

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        s = data.draw(st.sampled_from(sorted(self.model)))
        self.cache.free(s)
        del self.model[s]
        with pytest.raises(ValueError, match=f"sequence: {s} is not open"):
            self.cache.free(s)

    @invariant()
    def holds_what_was_appended(self) -> None:
        for s, layers in self.model.items():
            for layer, x in enumerate(layers):
                assert self.cache.length(layer, s) == int(self.cache.lengths[layer, s]) == x.shape[1]
                if x.shape[1]:
                    assert torch.equal(self.cache.gather(layer, s)[0], quantize_kv4(x).dequantize())
        held = {page for s in self.model for page in self.cache.pages_of(s)}
        assert self.cache.allocator.free == 9 - len(held)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)


def test_one_token_for_each_of_several_sequences() -> None:
    cache = qk.PagedKV4(1, 2, 128, pages=8)
    numbers = [cache.open() for _ in range(3)]
    prompts = [tokens(2, n, 128, n) for n in (5, 64, 63)]
    for s, x in zip(numbers, prompts, strict=True):
        cache.append(0, [s], x, x * 2)
    step = torch.cat([tokens(2, 1, 128, 90 + i) for i in range(3)])
    cache.append(0, numbers[::-1], step, step * 2)
    for s, x, new in zip(numbers, prompts, step.flip(0), strict=True):
        keys, values = cache.gather(0, s)
        whole = torch.cat([x[0], new], 1)
        assert torch.equal(keys, quantize_kv4(whole).dequantize())
        assert torch.equal(values, quantize_kv4(whole * 2).dequantize())


def test_what_a_replayed_graph_does() -> None:
    """`reserve`, then only device work (`write`), then `advance`: the same as `append`."""
    cache = qk.PagedKV4(1, 1, 64, pages=4, page_size=16)
    s = cache.open()
    x = tokens(1, 20, 64, 0)
    tables, lengths = cache.tables.data_ptr(), cache.lengths.data_ptr()
    for i in range(20):
        cache.reserve([s])
        q = quantize_kv4(x[:, :, i : i + 1])
        cache.write(0, torch.tensor([s]), q, q)
        cache.advance([s])
    assert_same(cache.codes(0, s)[1], quantize_kv4(x[0]))
    assert (cache.tables.data_ptr(), cache.lengths.data_ptr()) == (tables, lengths)
    with pytest.raises(ValueError, match="tokens: sequence 0 has room for 32 tokens only"):
        cache.advance([s], 13)


# -- errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers: expected a positive integer"),
        ({"kv_heads": 1.5}, "kv_heads: expected a positive integer"),
        ({"head_dim": 96}, r"head_dim: expected one of \(64, 128\), got 96"),
        ({"pages": -1}, "pages: expected a positive integer"),
        ({"page_size": 48}, r"page_size: expected one of \(16, 32, 64, 128\), got 48"),
        ({"sequences": 0}, "sequences: expected a positive integer"),
        ({"max_tokens": 0}, "max_tokens: expected a positive integer"),
    ],
)
def test_impossible_sizes(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qk.PagedKV4(**({"layers": 1, "kv_heads": 2, "head_dim": 64, "pages": 2} | change))


def test_bad_input_is_named_and_changes_nothing() -> None:
    cache = qk.PagedKV4(1, 2, 64, pages=2)
    s, t = cache.open(), cache.open()
    x = torch.ones(1, 2, 3, 64)
    bad = [
        ((1, [s], x, x), ValueError, r"layer: 1 is not one of 0\.\.0"),
        ((0, [s, s], x, x), ValueError, "sequences: each may be named once"),
        ((0, [7], x, x), ValueError, "sequence: 7 is not open"),
        ((0, [s], x.long(), x), TypeError, "keys: expected a floating-point tensor"),
        ((0, [s], x[0], x), ValueError, r"keys: expected \[1, 2, T, 64\]"),
        ((0, [s, t], x, x), ValueError, r"keys: expected \[2, 2, T, 64\]"),
        ((0, [s], x, x[..., :32]), ValueError, r"values: expected \[1, 2, T, 64\]"),
        ((0, [s], x, x[:, :, :2]), ValueError, "values: 1x2x2x64 does not have the keys' shape"),
        ((0, [s], x[:, :, :0], x), ValueError, "keys: .* with T >= 1"),
        ((0, [s], x * torch.nan, x), ValueError, "x: holds 384 NaN"),
        ((0, [s], torch.ones(1, 2, 129, 64), torch.ones(1, 2, 129, 64)), ValueError, "tokens: sequence 0 would grow beyond"),
    ]
    for arguments, kind, message in bad:
        with pytest.raises(kind, match=message):
            cache.append(*arguments)
    cache.append(0, [t], torch.ones(1, 2, 100, 64), torch.ones(1, 2, 100, 64))
    with pytest.raises(PagesExhausted, match="pages: 1 asked for, 0 of 2 free"):
        cache.append(0, [s], x, x)
    assert cache.length(0, s) == 0 and not cache.lengths[0, s]
