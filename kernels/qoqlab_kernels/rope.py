"""Rotary positions and the KV4 cache in one pass over what the q, k, v GEMM leaves.

A few lanes take one head of one token: ``head_dim / 4`` lanes, each with the channels 2 l, 2 l + 1 and their partners half a
head further. Queries are rotated and written; keys are rotated, quantised and put into their page; values are quantised and
put into theirs. Before that, queries and keys pass the RMSNorm of their head where the model has one (Qwen3). Equal, bit for
bit, to `qoqlab.exact.rms_norm`, `qoqlab.exact.rotate` and `qoqlab.kv.quantize_kv4`.
"""

from __future__ import annotations

from dataclasses import dataclass

from numba import cuda, types

from qoqlab import exact
from qoqlab.kv import FP16_EXACT_INTEGERS

from . import ptx
from .elementwise import PAIRS
from .launch import Program
from .pages import ChunkLayout
from .ptx import device, f32, u32, u64

THREADS = 128
SIGN = 0x80008000


@dataclass(frozen=True)
class RopeForm:
    """What a kernel is compiled for. ``kind``: of `elementwise.PAIRS`; ``normed``: heads pass an RMSNorm first; ``decode``:
    one token a sequence, whose length becomes its position + 1, and keys go to the cache alone; otherwise tokens of prompts,
    whose rotated keys are also written ``[m, kv_heads, head_dim]``. ``overlap``: see `launch.Program`."""

    kind: str
    head_dim: int
    page_size: int = 64
    normed: bool = False
    decode: bool = True
    overlap: bool = False


def rope(form: RopeForm) -> Program:
    """The kernel of a `RopeForm`."""
    pair = PAIRS[form.kind]
    unpack, pack, times, sum_of = pair.unpack, pair.pack, pair.multiply, pair.add
    d, layout = form.head_dim, ChunkLayout(form.head_dim, form.page_size)
    lanes, page_shift, last_token = d // 4, form.page_size.bit_length() - 1, form.page_size - 1
    per_block = THREADS // lanes
    normed, decode, overlap = form.normed, form.decode, form.overlap
    tile_bytes, codes_at, pairs_at = d // 64 * 512, layout.codes, (layout.scales, layout.value_scales)
    key_pairs, value_pairs, chunk_bytes = pairs_at[0], pairs_at[1], layout.bytes

    @device
    def exchange(x, mask):
        return ptx.as_float(u32(ptx.shuffle_xor(ptx.as_int(x), u32(mask))))

    @device
    def piece_sum(word):
        """Sum of squares of the 8 channels that this lane and three neighbours hold, in the order of `exact.fold`."""
        x0, x1 = unpack(word)
        x0, x1 = ptx.multiply(x0, x0), ptx.multiply(x1, x1)
        for mask in (2, 1):
            x0, x1 = ptx.add(x0, exchange(x0, mask)), ptx.add(x1, exchange(x1, mask))
        return ptx.add(x0, x1)

    @device
    def scaled(word, factor):
        low, high = unpack(word)
        return pack(ptx.multiply(low, factor), ptx.multiply(high, factor))

    @device
    def factor_of(low, high, eps):
        total = ptx.add(piece_sum(low), piece_sum(high))
        if d == 128:
            total = ptx.add(total, exchange(total, 16))
        total = ptx.add(total, exchange(total, 8))
        total = ptx.add(total, exchange(total, 4))
        return ptx.reciprocal(ptx.root(ptx.add(ptx.divide(total, f32(d)), ptx.as_float(eps))))

    @device
    def code(x, scale, zero):
        shifted = ptx.add(ptx.divide(x, scale), zero)
        return u32(ptx.as_int(ptx.add(ptx.minimum(ptx.maximum(shifted, f32(0.0)), f32(15.0)), f32(exact.ROUNDING)))) & u32(
            15
        )

    @device
    def store(keep, chunk, token, lane, low, high, value):
        """Quantise a head and, if it is to be kept, put it in its place of the chunk. All lanes of a warp come along,
        because they exchange numbers."""
        x0, x1 = unpack(low)
        x2, x3 = unpack(high)
        least = ptx.minimum(ptx.minimum(x0, x1), ptx.minimum(x2, x3))
        most = ptx.maximum(ptx.maximum(x0, x1), ptx.maximum(x2, x3))
        for k in range(2 + d // 64 + 1):
            least, most = ptx.minimum(least, exchange(least, 1 << k)), ptx.maximum(most, exchange(most, 1 << k))
        largest = ptx.maximum(ptx.absolute(least), ptx.absolute(most))
        step = ptx.divide(ptx.subtract(most, least), f32(15.0))
        scale = ptx.round_half(ptx.maximum(step, ptx.divide(largest, f32(FP16_EXACT_INTEGERS))))
        if scale == f32(0.0):
            scale = f32(1.0)
        zero = ptx.round_half(ptx.divide(-least, scale))
        lows = u32(code(x0, scale, zero) | (code(x1, scale, zero) << u32(16)))
        highs = u32(code(x2, scale, zero) | (code(x3, scale, zero) << u32(16)))
        # a byte holds channels c and c + 8, four lanes apart: each of both lanes writes one half of the head
        second = (lane & u32(4)) != u32(0)
        theirs = u32(ptx.shuffle_xor(types.int32(lows if second else highs), u32(4)))
        both = u32(theirs | (highs << u32(4))) if second else u32(lows | (theirs << u32(4)))
        channel = u32(u32(2) * (lane & u32(0xFFFFFFFB)) + (u32(d // 2) if second else u32(0)))
        step16, column = u32(channel >> u32(4)), u32(channel & u32(7))
        word = u32((token >> u32(4)) * u32(tile_bytes) + (step16 >> u32(2)) * u32(512) + (step16 & u32(3)) * u32(4))
        if value:
            inner = u32(u32(64) * column + ((token & u32(7)) >> u32(1)) * u32(16))
            inner = u32(inner + u32(2) * (token & u32(1)) + ((token & u32(15)) >> u32(3)))
            first, apart = u32(u32(codes_at) + word + inner), u32(64)
        else:
            inner = u32(u32(64) * (token & u32(7)) + (column >> u32(1)) * u32(16) + ((token & u32(15)) >> u32(3)))
            first, apart = u32(word + inner), u32(2)
        if keep:
            ptx.stg_byte(chunk + u64(first), u32(both & u32(255)))
            ptx.stg_byte(chunk + u64(first + apart), u32(both >> u32(16)))
        if keep and lane == u32(0):
            place = u32((u32(value_pairs) if value else u32(key_pairs)) + u32(4) * token)
            ptx.stg1(chunk + u64(place), ptx.pack_half(scale, zero))

    def kernel(
        qkv, cos, sin, positions, slots, q_gain, k_gain, query, key, pool, tables, lengths, m, heads, kv_heads, width, eps
    ):
        thread = u32(cuda.threadIdx.x)
        lane = u32(thread & u32(lanes - 1))
        rows = u32(heads + kv_heads + kv_heads)
        unit = u32(u32(cuda.blockIdx.x) * u32(per_block) + ptx.quotient(thread, u32(lanes)))
        if overlap:
            ptx.allow_next_kernel()
            ptx.wait_for_previous_kernel()
        inside = unit < m * rows  # the other lanes of a warp work on the last head again, and write nothing
        if not inside:
            unit = u32(m * rows - u32(1))
        index = ptx.quotient(unit, rows)
        row = u32(unit - index * rows)
        at = ptx.address(qkv) + u64(unit) * u64(2 * d) + u64(lane * u32(4))
        low, high = ptx.ldg1(at), ptx.ldg1(at + u64(d))
        position = positions[index]
        is_query, is_value = row < heads, row >= heads + kv_heads
        if normed:
            factor = factor_of(low, high, eps)
            if not is_value:
                gain = (ptx.address(q_gain) if is_query else ptx.address(k_gain)) + u64(lane * u32(4))
                low = times(ptx.ldg1(gain), scaled(low, factor))
                high = times(ptx.ldg1(gain + u64(d)), scaled(high, factor))
        if not is_value:
            turn = u64(position) * u64(d) + u64(lane * u32(4))
            c, s = ptx.ldg1(ptx.address(cos) + turn), ptx.ldg1(ptx.address(sin) + turn)
            turned = sum_of(times(low, c), u32(times(high, s) ^ u32(SIGN)))
            high = sum_of(times(high, c), times(low, s))
            low = turned
        head = u32(row - heads - (kv_heads if is_value else u32(0)))
        slot = slots[index]
        page = tables[slot * width + (position >> u32(page_shift))]
        if inside and is_query:
            to = ptx.address(query) + (u64(index) * u64(heads) + u64(row)) * u64(2 * d) + u64(lane * u32(4))
            ptx.stg1(to, low)
            ptx.stg1(to + u64(d), high)
        if not decode and inside and not is_query and not is_value:
            to = ptx.address(key) + (u64(index) * u64(kv_heads) + u64(head)) * u64(2 * d) + u64(lane * u32(4))
            ptx.stg1(to, low)
            ptx.stg1(to + u64(d), high)
        if d < 128 or not is_query:  # a warp of narrow heads may hold a query and a key
            chunk = ptx.address(pool) + (u64(page) * u64(kv_heads) + u64(head)) * u64(chunk_bytes)
            store(inside and not is_query, chunk, u32(position & u32(last_token)), lane, low, high, is_value)
        if decode and inside and row == heads and lane == u32(0):
            lengths[slot] = position + u32(1)

    half, word = types.uint16, u32
    arrays = (half, half, half, word, word, half, half, half, half, ptx.u8, word, word)
    signature = tuple(types.Array(t, 1, "C") for t in arrays) + (u32,) * 5
    return Program(kernel, signature, THREADS, overlap=overlap)
