"""Decode attention on the paged KV4 cache, the versions for reading: v1 to v3 of the ladder in `kv4`.

In v1 a thread is alone with a query head, in v2 and v3 a warp is. There lane ``4 g + q`` reads the words that `pages` has
laid out for it: of every 16 tokens it has keys of tokens g and g + 8 in a quarter of the channels, and values of channels g
and g + 8 of every 16 in a quarter of the tokens. Softmax runs online: what has been added up shrinks when a larger score
comes.

Scale s and zero z of a token leave the loops over channels by linearity, as in v4, with codes ``c`` (v2) or ``c - 8`` (v3)::

    score = s (sum_d c_d q_d - z sum_d q_d)          out_d = (sum_t p_t s_t c_td - sum_t p_t s_t z_t) / sum_t p_t
"""

from __future__ import annotations

import math
from collections.abc import Callable

from numba import cuda, types

from . import ptx
from .kv4 import LOWEST, SIGNATURE, Form, capper, exchange, natural, spanner
from .launch import Program
from .ptx import device, f32, i32, u32, u64

#: Warps in a block of v2 and v3.
WARPS = 4

# -- v1: one thread per query head ----------------------------------------------------------------------------------------


def v1(form: Form) -> Program:
    """32 query heads a block, each thread alone with its own."""
    layout, d, group, size = form.layout, form.head_dim, form.group, form.page_size
    span, finish = spanner(form), capper(form)
    chunk_bytes, codes_bytes, key_pairs, value_pairs = layout.bytes, layout.codes, layout.scales, layout.value_scales
    widen, pack = (ptx.unpack_bfloat, ptx.pack_bfloat) if form.bfloat else (ptx.unpack_half, ptx.pack_half)
    leaves_lse = form.lse

    @device
    def code(pool, chunk, inside, channel, value):
        row, column = (channel, inside) if value else (inside, channel)
        lane = 4 * (row % 8) + column % 8 // 2
        byte = 2 * (column % 2) + (column % 16 // 8 if value else row % 16 // 8)
        at = ((inside // 16 * (d // 64) + channel // 64) * 32 + lane) * 16 + channel // 16 % 4 * 4 + byte
        if value:
            at = at + codes_bytes
        return f32(i32(i32(pool[chunk + at]) >> i32(channel % 16 // 8 * 4)) & i32(15))

    @device
    def pair(pool, at):
        scale, zero = i32(pool[at]) | (i32(pool[at + 1]) << 8), i32(pool[at + 2]) | (i32(pool[at + 3]) << 8)
        return ptx.widen_half(u32(scale)), ptx.widen_half(u32(zero))

    def kernel(
        query,
        pool,
        tables,
        lengths,
        slots,
        out,
        lse,
        partials,
        counters,
        batch,
        kv_heads,
        width,
        window,
        scale_bits,
        cap_bits,
    ):
        scale, cap = ptx.as_float(scale_bits), ptx.as_float(cap_bits)
        index = u32(u32(cuda.blockIdx.x) * u32(32) + u32(cuda.threadIdx.x))
        if index < u32(batch * u32(kv_heads * u32(group))):
            head = ptx.quotient(index, u32(group))
            sequence = ptx.quotient(head, kv_heads)
            head = u32(head - sequence * kv_heads)
            slot = slots[sequence]
            length, first, _, _ = span(lengths, slot, window)
            acc = cuda.local.array(d, f32)
            for c in range(d):
                acc[c] = f32(0.0)
            largest, total = f32(LOWEST), f32(0.0)
            for t in range(first, length):
                page = tables[slot * width + t // size]
                chunk, inside = (i32(page) * i32(kv_heads) + i32(head)) * chunk_bytes, i32(t) % size
                s, z = pair(pool, chunk + key_pairs + 4 * inside)
                dot = f32(0.0)
                for c in range(d):
                    x = widen(u32(query[index * u32(d) + u32(c)]))[0]
                    dot += x * (code(pool, chunk, inside, c, False) - z)
                score = finish(dot * s, scale, cap)
                before, largest = largest, ptx.maximum(largest, score)
                shrink, weight = ptx.exp2(before - largest), ptx.exp2(score - largest)
                total = total * shrink + weight
                s, z = pair(pool, chunk + value_pairs + 4 * inside)
                for c in range(d):
                    acc[c] = acc[c] * shrink + weight * s * (code(pool, chunk, inside, c, True) - z)
            for c in range(d):
                y = f32(0.0)
                if total > f32(0.0):
                    y = ptx.divide(acc[c], total)
                out[index * u32(d) + u32(c)] = types.uint16(pack(y, f32(0.0)) & u32(0xFFFF))
            if leaves_lse:
                lse[index] = natural(largest, total) if total > f32(0.0) else -math.inf

    return Program(kernel, SIGNATURE, 32)


# -- v2 and v3: one warp per query head -----------------------------------------------------------------------------------


@device
def plain(word):
    """The 8 codes of a word as fp32: nibbles 0 and 4, 1 and 5, 2 and 6, 3 and 7. A shift, a mask and a conversion each."""
    return (
        ptx.to_float(i32(word & u32(15))),
        ptx.to_float(i32((word >> u32(16)) & u32(15))),
        ptx.to_float(i32((word >> u32(4)) & u32(15))),
        ptx.to_float(i32((word >> u32(20)) & u32(15))),
        ptx.to_float(i32((word >> u32(8)) & u32(15))),
        ptx.to_float(i32((word >> u32(24)) & u32(15))),
        ptx.to_float(i32((word >> u32(12)) & u32(15))),
        ptx.to_float(i32(word >> u32(28))),
    )


@device
def halves(a, b, c, d):
    """The 8 fp16 numbers of four words as fp32."""
    a0, a1 = ptx.unpack_half(a)
    b0, b1 = ptx.unpack_half(b)
    c0, c1 = ptx.unpack_half(c)
    d0, d1 = ptx.unpack_half(d)
    return a0, a1, b0, b1, c0, c1, d0, d1


@device
def magic(word):
    """The codes of `plain`, 8 less each, in packed halves until they are widened.

    A nibble under the exponent of 1024 is the fp16 number 1024 + c, or 1024 + 16 c four bits further up.
    """
    low, high, exponent = u32(0x000F000F), u32(0x00F000F0), u32(0x64006400)
    x = u32(word >> u32(8))
    offset, sixteenth, minus = u32(0x64086408), u32(0x2C002C00), u32(0xD480D480)  # 1032, 1 / 16, -72
    return halves(
        ptx.subtract_pair(u32(u32(word & low) | exponent), offset),
        ptx.fuse_pair(u32(u32(word & high) | exponent), sixteenth, minus),
        ptx.subtract_pair(u32(u32(x & low) | exponent), offset),
        ptx.fuse_pair(u32(u32(x & high) | exponent), sixteenth, minus),
    )


@device
def bytes_of(a, b):
    """The 8 codes of two words of 8-bit pages as fp32."""
    return (
        ptx.to_float(i32(a & u32(255))),
        ptx.to_float(i32((a >> u32(8)) & u32(255))),
        ptx.to_float(i32((a >> u32(16)) & u32(255))),
        ptx.to_float(i32(a >> u32(24))),
        ptx.to_float(i32(b & u32(255))),
        ptx.to_float(i32((b >> u32(8)) & u32(255))),
        ptx.to_float(i32((b >> u32(16)) & u32(255))),
        ptx.to_float(i32(b >> u32(24))),
    )


@device
def plain_codes(at):
    """What a lane has of 64 channels: four times 8 codes."""
    a, b, c, d = ptx.ldg4(at)
    return plain(a), plain(b), plain(c), plain(d)


@device
def magic_codes(at):
    """The same by `magic`."""
    a, b, c, d = ptx.ldg4(at)
    return magic(a), magic(b), magic(c), magic(d)


@device
def byte_codes(at):
    """The same in 8-bit pages."""
    a, b, c, d = ptx.ldg4(at)
    e, f, g, h = ptx.ldg4(at + u64(16))
    return bytes_of(a, b), bytes_of(c, d), bytes_of(e, f), bytes_of(g, h)


@device
def fp16_numbers(at):
    """The same in pages of fp16 numbers."""
    a0, a1, a2, a3 = ptx.ldg4(at)
    b0, b1, b2, b3 = ptx.ldg4(at + u64(16))
    c0, c1, c2, c3 = ptx.ldg4(at + u64(32))
    d0, d1, d2, d3 = ptx.ldg4(at + u64(48))
    return halves(a0, a1, a2, a3), halves(b0, b1, b2, b3), halves(c0, c1, c2, c3), halves(d0, d1, d2, d3)


def v2(form: Form) -> Program:
    """Codes by shifts, masks and conversions; also for pages of 8 bits and of fp16 numbers."""
    return _by_warps(form, {4: plain_codes, 8: byte_codes, 16: fp16_numbers}[form.bits], 0)


def v3(form: Form) -> Program:
    """Codes by magic numbers, two at a time."""
    return _by_warps(form, magic_codes, 8)


def _by_warps(form: Form, spread: Callable, centre: int) -> Program:
    """`WARPS` query heads a block. ``spread``: what a lane has of 64 channels, four times 8 codes, ``centre`` less each."""
    layout, d, group, size = form.layout, form.head_dim, form.group, form.page_size
    span, finish, leaves_lse = spanner(form), capper(form), form.lse
    chunk_bytes, codes_bytes, key_pairs, value_pairs = layout.bytes, layout.codes, layout.scales, layout.value_scales
    steps, vectors, of_page = d // 16, d // 64, size // 16  # blocks of 16 channels, of 64; 16 tokens of a page
    unpack, pack = (ptx.unpack_bfloat, ptx.pack_bfloat) if form.bfloat else (ptx.unpack_half, ptx.pack_half)
    parts, sums, coded = 4 * steps, 2 * steps, form.bits < 16
    lane_bytes, vector_bytes = 4 * form.bits, 128 * form.bits  # of 64 channels, of a tile of 16 tokens
    threads, places = 32 * WARPS, 16 * WARPS

    @device
    def query_of(query, row, q, channels):
        """A lane's channels of every 16, 2 q, 2 q + 1 and those 8 further; returns the sum of all."""
        total = f32(0.0)
        for s in range(steps):
            for h in range(2):
                at = (u64(row) * u64(d // 2) + u64(u32(8 * s + 4 * h) + q)) * u64(4)
                x, y = unpack(ptx.ldg1(ptx.address(query) + at))
                channels[4 * s + 2 * h], channels[4 * s + 2 * h + 1] = x, y
                total += x + y
        total += exchange(total, 1)
        return total + exchange(total, 2)

    @device
    def add_keys(c, step, channels, dot0, dot1):
        """The part of 8 codes in the dot products of two tokens."""
        i = 4 * step
        x0, x1, x2, x3 = channels[i], channels[i + 1], channels[i + 2], channels[i + 3]
        dot0 = ptx.fuse(c[0], x0, ptx.fuse(c[1], x1, ptx.fuse(c[2], x2, ptx.fuse(c[3], x3, dot0))))
        return dot0, ptx.fuse(c[4], x0, ptx.fuse(c[5], x1, ptx.fuse(c[6], x2, ptx.fuse(c[7], x3, dot1))))

    @device
    def weighted(x, weight, total):
        """One more product; none where the weight is 0, for beyond the ends fp16 pages may hold NaN."""
        if coded or weight != f32(0.0):
            return ptx.fuse(x, weight, total)
        return total

    @device
    def add_values(c, step, weights, shrink, acc):
        """The part of 8 codes in the sums of two channels, by the weights of four tokens."""
        i = 2 * step
        w0, w1, w2, w3 = weights
        low = weighted(c[0], w0, weighted(c[1], w1, weighted(c[4], w2, weighted(c[5], w3, f32(0.0)))))
        high = weighted(c[2], w0, weighted(c[3], w1, weighted(c[6], w2, weighted(c[7], w3, f32(0.0)))))
        acc[i], acc[i + 1] = ptx.fuse(acc[i], shrink, low), ptx.fuse(acc[i + 1], shrink, high)

    @device
    def pair(at, known):
        """Scale and zero of a token; zeros where it is not one, whatever is there."""
        if not known:
            return f32(0.0), f32(0.0)
        if not coded:
            return f32(1.0), f32(0.0)
        s, z = ptx.unpack_half(ptx.ldg1(at))
        return s, z - f32(centre)

    @device
    def score_of(dot, total, at, known, scale, cap):
        s, z = pair(at, known)
        score = finish(ptx.fuse(-z, total, dot) * s, scale, cap)
        return score if known else f32(LOWEST)

    def kernel(
        query,
        pool,
        tables,
        lengths,
        slots,
        out,
        lse,
        partials,
        counters,
        batch,
        kv_heads,
        width,
        window,
        scale_bits,
        cap_bits,
    ):
        weights = cuda.shared.array(places, f32)
        warp, lane = u32(u32(cuda.threadIdx.x) >> u32(5)), u32(u32(cuda.threadIdx.x) & u32(31))
        g, q, own = u32(lane >> u32(2)), u32(lane & u32(3)), u32(warp * u32(16))
        scale, cap = ptx.as_float(scale_bits), ptx.as_float(cap_bits)
        row = u32(u32(cuda.blockIdx.x) * u32(WARPS) + warp)
        if row < u32(batch * u32(kv_heads * u32(group))):
            head = ptx.quotient(row, u32(group))
            sequence = ptx.quotient(head, kv_heads)
            head = u32(head - sequence * kv_heads)
            slot = ptx.ldg1(ptx.address(slots) + u64(sequence) * u64(4))
            length, first, _, _ = span(lengths, slot, window)
            channels, acc = cuda.local.array(parts, f32), cuda.local.array(sums, f32)
            query_sum = query_of(query, row, q, channels)
            for i in range(sums):
                acc[i] = f32(0.0)
            largest, total, zeros = f32(LOWEST), f32(0.0), f32(0.0)
            for tile in range(first >> u32(4), u32(length + u32(15)) >> u32(4)):
                entry = u64(u32(slot * width) + u32(u32(tile) // u32(of_page)))
                page, inside = ptx.ldg1(ptx.address(tables) + entry * u64(4)), u32(u32(tile) % u32(of_page))
                chunk = ptx.address(pool) + (u64(page) * u64(kv_heads) + u64(head)) * u64(chunk_bytes)
                words = chunk + u64(u32(inside * u32(vectors * vector_bytes)) + lane * u32(lane_bytes))
                pairs = chunk + u64(u32(inside * u32(64)) + g * u32(4))
                token = u32(u32(u32(tile) << u32(4)) + g)
                known0, known1 = first <= token < length, first <= token + u32(8) < length
                # scores of tokens g and g + 8: a quarter of the channels in each of four lanes
                dot0 = dot1 = f32(0.0)
                for v in range(vectors):
                    a, b, c, e = spread(words + u64(vector_bytes * v))
                    dot0, dot1 = add_keys(a, 4 * v, channels, dot0, dot1)
                    dot0, dot1 = add_keys(b, 4 * v + 1, channels, dot0, dot1)
                    dot0, dot1 = add_keys(c, 4 * v + 2, channels, dot0, dot1)
                    dot0, dot1 = add_keys(e, 4 * v + 3, channels, dot0, dot1)
                for k in range(2):
                    dot0, dot1 = dot0 + exchange(dot0, 1 << k), dot1 + exchange(dot1, 1 << k)
                score0 = score_of(dot0, query_sum, pairs + u64(key_pairs), known0, scale, cap)
                score1 = score_of(dot1, query_sum, pairs + u64(key_pairs + 32), known1, scale, cap)
                # softmax so far
                before, largest = largest, ptx.maximum(largest, ptx.maximum(score0, score1))
                for k in range(2, 5):
                    largest = ptx.maximum(largest, exchange(largest, 1 << k))
                shrink = ptx.exp2(before - largest)
                p0, p1 = ptx.exp2(score0 - largest), ptx.exp2(score1 - largest)
                s0, z0 = pair(pairs + u64(value_pairs), known0)
                s1, z1 = pair(pairs + u64(value_pairs + 32), known1)
                w0, w1 = p0 * s0, p1 * s1
                total = ptx.fuse(total, shrink, p0 + p1)
                zeros = ptx.fuse(zeros, shrink, ptx.fuse(w0, z0, w1 * z1))
                # every lane needs the weights of four other tokens
                weights[own + g], weights[own + g + u32(8)] = w0, w1
                ptx.warp_barrier()
                t = u32(own + q * u32(2))
                others = weights[t], weights[t + u32(1)], weights[t + u32(8)], weights[t + u32(9)]
                ptx.warp_barrier()
                for v in range(vectors):
                    a, b, c, e = spread(words + u64(codes_bytes + vector_bytes * v))
                    add_values(a, 4 * v, others, shrink, acc)
                    add_values(b, 4 * v + 1, others, shrink, acc)
                    add_values(c, 4 * v + 2, others, shrink, acc)
                    add_values(e, 4 * v + 3, others, shrink, acc)
            for k in range(2, 5):
                total, zeros = total + exchange(total, 1 << k), zeros + exchange(zeros, 1 << k)
            part = f32(0.0)
            if total > f32(0.0):
                part = ptx.divide(f32(1.0), total)
            for i in range(sums):
                y = acc[i]
                for k in range(2):
                    y = y + exchange(y, 1 << k)
                if q == u32(0):
                    place = row * u32(d) + u32(8 * i) + g
                    out[place] = types.uint16(pack((y - zeros) * part, f32(0.0)) & u32(0xFFFF))
            if leaves_lse and lane == u32(0):
                lse[row] = natural(largest, total) if total > f32(0.0) else -math.inf

    return Program(kernel, SIGNATURE, threads)


VERSIONS: dict[str, Callable[[Form], Program]] = {"v1": v1, "v2": v2, "v3": v3}
#: Query heads in a block.
HEADS = {"v1": 32, "v2": WARPS, "v3": WARPS}
