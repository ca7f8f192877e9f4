"""A decoded token's own key and value join what its query saw in the cache, and INT8 per token, in one kernel.

Attention on the cache (`kv4`) leaves its result and the log-sum-exp of its scores; this kernel adds the one token that is
not in the cache yet, or is there only quantised. One block a token; a thread takes pieces of 8 channels of the query heads
(16 bytes each), so ``head_dim / 8`` neighbouring lanes share a head and its score. Equals `qoqlab.reference.attend_own_s8`
bit for bit.
"""

from __future__ import annotations

from numba import cuda, types

from qoqlab import exact

from . import ptx
from .elementwise import PAIRS, PIECE_BYTES, exp_minus, fold8, int8_writers, storer
from .launch import Program
from .layout import UNIT_K, blocks
from .ptx import device, f32, i32, u32, u64


@device
def capped(score, limit):
    """`qoqlab.exact.cap`."""
    x = ptx.divide(score, limit)
    x = ptx.maximum(ptx.minimum(-ptx.add(x, x), f32(exact.EXP_LIMIT)), f32(-exact.EXP_LIMIT))
    part = ptx.divide(f32(2.0), ptx.add(f32(1.0), exp_minus(x)))
    return ptx.multiply(limit, ptx.subtract(f32(1.0), part))


def attend_own(
    kind: str,
    heads: int,
    kv_heads: int,
    dim: int,
    softcap: bool,
    threads: int,
    overlap: bool = False,
    codes: bool = True,
) -> Program:
    """The kernel for tokens of ``heads`` query heads of a type in `PAIRS`, by blocks of ``threads`` (a power of two).

    ``overlap``: launched while the previous kernel ends (compute capability 9.0). Without ``codes``: the 16-bit numbers
    themselves, ``[m, heads * dim]``, and the bits of the largest of every token in ``tokens``.
    """
    unpack, pack = PAIRS[kind].unpack, PAIRS[kind].pack
    k, lanes, group = heads * dim, dim // exact.PIECE, heads // kv_heads
    filled, pieces = k // exact.PIECE, blocks(blocks(k, UNIT_K) * UNIT_K // exact.PIECE, threads)
    row_bytes, key_bytes = 2 * k, 2 * kv_heads * dim
    none, store, (largest, write, fill) = ptx.zeros(4 * pieces), storer(k, threads), int8_writers(kind, k, threads)
    masks = tuple(lanes >> i for i in range(1, lanes.bit_length()))  # halves, as `exact.fold` adds them

    @device
    def products(a, b):
        x0, x1 = unpack(a)
        y0, y1 = unpack(b)
        return ptx.multiply(x0, y0), ptx.multiply(x1, y1)

    @device
    def mixed(a, b, past, own):
        x0, x1 = unpack(a)
        y0, y1 = unpack(b)
        return pack(
            ptx.add(ptx.multiply(x0, past), ptx.multiply(y0, own)), ptx.add(ptx.multiply(x1, past), ptx.multiply(y1, own))
        )

    @device
    def join_piece(j, a0, a1, a2, a3, seen, lse, query, key, value, scale, limit, thread):
        piece = u32(u32(j * threads) + thread)
        known = min(piece, u32(filled - 1))  # lanes without a piece go along, for the exchanges
        head = u32(known // u32(lanes))
        at = u64(known) * u64(PIECE_BYTES)
        own_at = u64(u32(u32(head // u32(group)) * u32(lanes)) + u32(known % u32(lanes))) * u64(PIECE_BYTES)
        s0, s1, s2, s3 = ptx.ldg4(seen + at)
        v0, v1, v2, v3 = ptx.ldg4(value + own_at)
        q0, q1, q2, q3 = ptx.ldg4(query + at)
        k0, k1, k2, k3 = ptx.ldg4(key + own_at)
        past = ptx.as_float(ptx.ldr1(lse + u64(head) * u64(4)))
        x0, x1 = products(q0, k0)
        x2, x3 = products(q1, k1)
        x4, x5 = products(q2, k2)
        x6, x7 = products(q3, k3)
        score = fold8(x0, x1, x2, x3, x4, x5, x6, x7)
        for mask in masks:
            score = ptx.add(score, ptx.as_float(u32(ptx.shuffle_xor(ptx.as_int(score), u32(mask)))))
        score = ptx.multiply(score, scale)
        if softcap:
            score = capped(score, limit)
        less = exp_minus(ptx.minimum(ptx.absolute(ptx.subtract(score, past)), f32(exact.EXP_LIMIT)))
        share = ptx.reciprocal(ptx.add(f32(1.0), less))
        other = ptx.multiply(less, share)
        mine = share
        if past >= score:
            mine, other = other, share
        if piece < u32(filled):
            return (
                mixed(s0, v0, other, mine),
                mixed(s1, v1, other, mine),
                mixed(s2, v2, other, mine),
                mixed(s3, v3, other, mine),
            )
        return u32(0), u32(0), u32(0), u32(0)

    joined = ptx.map_quads(join_piece, pieces)

    def kernel(seen, lse, query, key, value, tiles, tokens, m, padded, value_row, scale_bits, limit_bits):
        maxima = cuda.shared.array(32, u32)
        sums = cuda.shared.array(32, i32)
        token, thread = u32(cuda.blockIdx.x), u32(cuda.threadIdx.x)
        if overlap:
            ptx.allow_next_kernel()
            ptx.wait_for_previous_kernel()
        if token < m:
            row = u64(token) * u64(row_bytes)
            values = joined(
                none(),
                ptx.address(seen) + row,
                ptx.address(lse) + u64(token) * u64(4 * heads),
                ptx.address(query) + row,
                ptx.address(key) + u64(token) * u64(key_bytes),
                ptx.address(value) + u64(token) * u64(value_row) * u64(2),
                ptx.as_float(scale_bits),
                ptx.as_float(limit_bits),
                thread,
            )
            best = largest(values, maxima, thread)
            if codes:
                write(values, best, tiles, tokens, token, padded, sums, thread)
            else:
                store(values, ptx.address(tiles) + row, thread)
                if thread == u32(0):
                    ptx.stg1(ptx.address(tokens) + u64(token) * u64(4), u32(ptx.as_int(best)))
        elif codes:
            fill(tiles, tokens, token, padded, thread)

    arrays = (types.uint16, f32, types.uint16, types.uint16, types.uint16, ptx.u8, u32)
    return Program(kernel, (*(types.Array(t, 1, "C") for t in arrays), *(u32,) * 5), threads, overlap=overlap)
