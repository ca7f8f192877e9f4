"""Rotary position embedding of a token's queries and keys, and its keys and values into the KV4 cache, in one kernel.

One block a token, ``head_dim / 8`` lanes a head, 8 channels a lane: a pair of channels c, c + 1 and those 8, D/2 and D/2 + 8
further. So the two channels that turn together (c, c + D/2) and the two that share a byte of the cache (c, c + 8) meet in
one lane. Equals `qoqlab.exact.rotate`, `qoqlab.kv.quantize_kv4` and `cache.PagedKV4.write` bit for bit.
"""

from __future__ import annotations

from numba import cuda, types

from qoqlab import exact, kv

from . import ptx
from .elementwise import PAIRS
from .launch import Program
from .layout import blocks
from .pages import ChunkLayout
from .ptx import device, f32, u32, u64

#: Threads of a block at most; heads beyond take further rounds.
MOST_THREADS = 512


@device
def _code(x, high, scale, zero):
    """``clamp(round(x / scale + zero))``, 0..15; ``high``: 1 / scale. The quotient is that of an IEEE division: corrected
    by what it leaves, for all numbers of 11 bits (Markstein, IBM J. Res. Dev. 34, 1990; a test tries all of them)."""
    guess = ptx.multiply(x, high)
    quotient = ptx.fuse(ptx.fuse(-guess, scale, x), high, guess)
    clamped = ptx.minimum(ptx.maximum(ptx.add(quotient, zero), f32(0.0)), f32(15.0))
    return u32(u32(ptx.as_int(ptx.add(clamped, f32(exact.ROUNDING)))) & u32(15))


def rope_kv4(kind: str, heads: int, kv_heads: int, chunk: ChunkLayout, stepwise: bool, overlap: bool = False) -> Program:
    """The kernel for tokens ``[heads + 2 kv_heads, head_dim]`` of a type in `elementwise.PAIRS`.

    ``stepwise``: one token a sequence, behind those that it has; otherwise positions are given. ``overlap``: launched while
    the previous kernel ends (compute capability 9.0).
    """
    pair = PAIRS[kind]
    unpack, times, plus = pair.unpack, pair.multiply, pair.add
    dim, size, total = chunk.head_dim, chunk.page_size, heads + 2 * kv_heads
    chunk_bytes, value_codes, key_scales, value_scales = chunk.bytes, chunk.codes, chunk.scales, chunk.value_scales
    lanes, steps = dim // 8, dim // 32  # steps: blocks of 16 channels in half a head
    rounds = blocks(total * lanes, MOST_THREADS)
    threads = 32 * blocks(total * lanes, 32 * rounds)
    at_once, together = threads // lanes, 32 // lanes  # heads of a round, and of a warp
    masks = tuple(1 << k for k in range(lanes.bit_length() - 1))
    none = ptx.zeros(4 * rounds)

    @device
    def turned(low, high, c, s):
        """Two pairs that turn together."""
        minus = u32(high ^ u32(0x80008000))
        return plus(times(low, c), times(minus, s)), plus(times(high, c), times(low, s))

    @device
    def two_bytes(low, high, inverse, scale, zero):
        """Channels c and c + 1 with those 8 further: one byte each, in the low bytes of two words."""
        x0, x1 = unpack(low)
        y0, y1 = unpack(high)
        first = u32(_code(x0, inverse, scale, zero) | (_code(y0, inverse, scale, zero) << u32(4)))
        second = u32(_code(x1, inverse, scale, zero) | (_code(y1, inverse, scale, zero) << u32(4)))
        return first, second

    @device
    def store_key(at, word, token, first, second):
        """``at``: of the 16 tokens' codes in half a head; ``word``: block of 16 channels; ``token``: within its 16."""
        place = at + u64(u32(token & u32(7)) * u32(64) + word) + u64(token >> u32(3))
        ptx.st_byte(place, first)
        ptx.st_byte(place + u64(2), second)

    @device
    def store_value(at, word, token, first, second):
        place = at + u64(u32(u32(token & u32(7)) >> u32(1)) * u32(16) + word)
        place = place + u64(u32(u32(token & u32(1)) * u32(2)) + u32(token >> u32(3)))
        ptx.st_byte(place, first)
        ptx.st_byte(place + u64(64), second)

    @device
    def head_of(j, thread):
        return u32(u32(thread // u32(lanes)) + u32(j * at_once))

    @device
    def channel_of(part):
        """The first of a lane's 8."""
        return u32((part >> u32(2)) * u32(16) + (part & u32(3)) * u32(2))

    @device
    def load_head(j, a0, a1, a2, a3, at, thread):
        known = min(head_of(j, thread), u32(total - 1))  # lanes without a head go along, for the exchanges
        place = at + u64(known) * u64(2 * dim)
        return ptx.ldr1(place), ptx.ldr1(place + u64(16)), ptx.ldr1(place + u64(dim)), ptx.ldr1(place + u64(dim + 16))

    @device
    def turn_head(j, w0, w1, w2, w3, c0, c1, s0, s1, thread):
        if head_of(j, thread) < u32(heads + kv_heads):
            v0, v2 = turned(w0, w2, c0, s0)
            v1, v3 = turned(w1, w3, c1, s1)
            return v0, v1, v2, v3
        return w0, w1, w2, w3

    @device
    def store_head(j, w0, w1, w2, w3, queries, keys, thread):
        head = head_of(j, thread)
        if head < u32(heads + kv_heads):
            at = queries + u64(head) * u64(2 * dim)
            if head >= u32(heads):
                at = keys + u64(u32(head - u32(heads))) * u64(2 * dim)
            ptx.stg1(at, w0)
            ptx.stg1(at + u64(16), w1)
            ptx.stg1(at + u64(dim), w2)
            ptx.stg1(at + u64(dim + 16), w3)

    @device
    def cache_head(j, w0, w1, w2, w3, page_at, inside, thread):
        head, part = head_of(j, thread), u32(thread % u32(lanes))
        if u32(head | u32(together - 1)) >= u32(heads):  # the whole warp, since its lanes exchange
            x0, x1 = unpack(w0)
            x2, x3 = unpack(w1)
            x4, x5 = unpack(w2)
            x6, x7 = unpack(w3)
            low = ptx.minimum(ptx.minimum(ptx.minimum(x0, x1), ptx.minimum(x2, x3)),
                              ptx.minimum(ptx.minimum(x4, x5), ptx.minimum(x6, x7)))  # fmt: skip
            high = ptx.maximum(ptx.maximum(ptx.maximum(x0, x1), ptx.maximum(x2, x3)),
                               ptx.maximum(ptx.maximum(x4, x5), ptx.maximum(x6, x7)))  # fmt: skip
            for mask in masks:
                low = ptx.minimum(low, ptx.as_float(u32(ptx.shuffle_xor(ptx.as_int(low), u32(mask)))))
                high = ptx.maximum(high, ptx.as_float(u32(ptx.shuffle_xor(ptx.as_int(high), u32(mask)))))
            if head >= u32(heads) and head < u32(total):
                largest = ptx.maximum(ptx.absolute(low), ptx.absolute(high))
                step = ptx.divide(ptx.subtract(high, low), f32(15.0))
                scale = ptx.round_half(ptx.maximum(step, ptx.divide(largest, f32(kv.FP16_EXACT_INTEGERS))))
                if scale == f32(0.0):
                    scale = f32(1.0)
                zero, inverse = ptx.round_half(ptx.divide(-low, scale)), ptx.reciprocal(scale)
                low_half = two_bytes(w0, w1, inverse, scale, zero)
                high_half = two_bytes(w2, w3, inverse, scale, zero)
                value = head >= u32(heads + kv_heads)
                own = u32(head - u32(heads))
                if value:
                    own = u32(own - u32(kv_heads))
                at = page_at + u64(own) * u64(chunk_bytes)
                block = u32(part >> u32(2))  # of 16 channels; the other half's is `steps` further
                other = u32(block + u32(steps))
                tile = u32((inside >> u32(4)) * u32(dim // 64) * u32(512))
                first = u32(tile + (block >> u32(2)) * u32(512) + (block & u32(3)) * u32(4))
                second = u32(tile + (other >> u32(2)) * u32(512) + (other & u32(3)) * u32(4))
                row = u32(inside & u32(15))
                if value:
                    codes = at + u64(value_codes) + u64(u32(part & u32(3)) * u32(128))
                    store_value(codes, first, row, low_half[0], low_half[1])
                    store_value(codes, second, row, high_half[0], high_half[1])
                    at = at + u64(value_scales)
                else:
                    codes = at + u64(u32(part & u32(3)) * u32(16))
                    store_key(codes, first, row, low_half[0], low_half[1])
                    store_key(codes, second, row, high_half[0], high_half[1])
                    at = at + u64(key_scales)
                if part == u32(0):
                    ptx.stg1(at + u64(inside) * u64(4), ptx.pack_half(scale, zero))

    load, turn = ptx.map_quads(load_head, rounds), ptx.map_quads(turn_head, rounds)
    store, write = ptx.each_quad(store_head, rounds), ptx.each_quad(cache_head, rounds)

    def kernel(qkv, cosines, sines, slots, positions, tables, lengths, pool, queries, keys, width):
        token, thread = u32(cuda.blockIdx.x), u32(cuda.threadIdx.x)
        if overlap:
            ptx.wait_for_previous_kernel()
            ptx.allow_next_kernel()  # not before: attention may fetch pages at once, see `attention.kv4_attention`
        slot = ptx.ldr1(ptx.address(slots) + u64(token) * u64(4))
        offset = u64(channel_of(u32(thread % u32(lanes)))) * u64(2)
        # all heads at once, while slot, position and page are looked up one after the other
        values = load(none(), ptx.address(qkv) + u64(token) * u64(2 * total * dim) + offset, thread)
        length_at = ptx.address(lengths) + u64(slot) * u64(4)
        position = ptx.ldr1(length_at if stepwise else ptx.address(positions) + u64(token) * u64(4))
        at = u64(position) * u64(dim) + offset
        c0, c1 = ptx.ldr1(ptx.address(cosines) + at), ptx.ldr1(ptx.address(cosines) + at + u64(16))
        s0, s1 = ptx.ldr1(ptx.address(sines) + at), ptx.ldr1(ptx.address(sines) + at + u64(16))
        page_at = ptx.address(tables) + (u64(slot) * u64(width) + u64(u32(position // u32(size)))) * u64(4)
        page, inside = ptx.ldr1(page_at), u32(position % u32(size))
        values = turn(values, c0, c1, s0, s1, thread)
        query_at = ptx.address(queries) + u64(token) * u64(2 * heads * dim) + offset
        key_at = ptx.address(keys) + u64(token) * u64(2 * kv_heads * dim) + offset
        store(values, query_at, key_at, thread)
        write(values, ptx.address(pool) + u64(page) * u64(kv_heads * chunk_bytes), inside, thread)
        if stepwise:
            cuda.syncthreads()  # everybody has read the length
            if thread == u32(0):
                ptx.stg1(length_at, u32(position + u32(1)))

    arrays = (types.uint16,) * 3 + (u32,) * 4 + (ptx.u8, types.uint16, types.uint16)
    return Program(kernel, (*(types.Array(t, 1, "C") for t in arrays), u32), threads, overlap=overlap)
