"""Activations on their way into the GEMM: per-token INT8 with the sum of codes, written in the order that the GEMM reads.

For fp32 numbers, and for codes that exist already; 16-bit numbers take the way of the fused kernels (`elementwise`). One
block of 256 threads a token. Every thread takes 16 inputs at a time, which make one 16-byte chunk of the tiled layout.
"""

from __future__ import annotations

from numba import cuda, types

from . import ptx
from .launch import Program
from .ptx import device, f32, i32, u32, u64

THREADS = 256
#: What ``x`` may be: numba's type of the array, elements in a 4-byte word.
INPUTS = {"single": (f32, 1), "codes": (ptx.u8, 4)}


def quantize(kind: str) -> Program:
    """Quantise ``x [m, k]`` of one of `INPUTS` per token: ``scale = max|x| / 127`` in fp16, ``code = round(x / scale)``.

    "codes": the input is INT8 already, only order and sums are made; the scales come with it. Bit-exact with
    `qoqlab.affine.quantize_per_token_s8`: divisions and roundings are those of IEEE fp32.
    """
    array, per_word = INPUTS[kind]
    coded = kind == "codes"

    @device
    def word_at(at, index):
        return ptx.ldg1(at + u64(index) * u64(4))

    @device
    def pair(at, index):
        return ptx.as_float(word_at(at, index * u32(2))), ptx.as_float(word_at(at, index * u32(2) + u32(1)))

    @device
    def four_codes(at, index, scale):
        """One word of codes, from inputs 4 index .. 4 index + 3."""
        if coded:
            return word_at(at, index)
        x0, x1 = pair(at, index * u32(2))
        x2, x3 = pair(at, index * u32(2) + u32(1))
        low = u32(ptx.round_to_byte(ptx.divide(x0, scale)) | (ptx.round_to_byte(ptx.divide(x1, scale)) << u32(8)))
        high = u32(ptx.round_to_byte(ptx.divide(x2, scale)) | (ptx.round_to_byte(ptx.divide(x3, scale)) << u32(8)))
        return u32(low | (high << u32(16)))

    def kernel(x, scales, tiles, tokens, m, k, k_blocks):
        maxima = cuda.shared.array(8, f32)
        sums = cuda.shared.array(8, i32)
        token, thread = u32(cuda.blockIdx.x), u32(cuda.threadIdx.x)
        padded, warp, lane = u32(((m + u32(7)) >> u32(3)) << u32(3)), u32(thread >> u32(5)), u32(thread & u32(31))
        at = ptx.address(x) + u64(token) * u64(k) * u64(4 // per_word)
        inside = token < m  # the tokens that fill up the last group of 8 are zeros
        scale = f32(1.0)
        if not coded and inside:
            best = f32(0.0)
            for i in range(thread, k >> u32(1), u32(THREADS)):
                x0, x1 = pair(at, u32(i))
                best = ptx.maximum(ptx.absolute(x1), ptx.maximum(ptx.absolute(x0), best))
            for mask in (1, 2, 4, 8, 16):
                best = ptx.maximum(best, ptx.as_float(u32(ptx.shuffle_xor(ptx.as_int(best), u32(mask)))))
            if lane == u32(0):
                maxima[warp] = best
        if not coded:
            cuda.syncthreads()
            if inside:
                best = maxima[0]
                for w in range(1, 8):
                    best = ptx.maximum(best, maxima[w])
                scale = ptx.round_half(ptx.divide(best, f32(127.0)))
                if scale == f32(0.0):
                    scale = f32(1.0)
        total = i32(0)
        for c in range(thread, k_blocks * u32(8), u32(THREADS)):
            chunk = u32(c)
            a0 = a1 = a2 = a3 = u32(0)
            if inside and chunk * u32(16) < k:
                a0, a1 = four_codes(at, chunk * u32(4), scale), four_codes(at, chunk * u32(4) + u32(1), scale)
                a2, a3 = four_codes(at, chunk * u32(4) + u32(2), scale), four_codes(at, chunk * u32(4) + u32(3), scale)
            ones = u32(0x01010101)
            total = ptx.dp4a(ones, a3, ptx.dp4a(ones, a2, ptx.dp4a(ones, a1, ptx.dp4a(ones, a0, total))))
            place = u64(u32(chunk >> u32(3)) * padded + token) * u64(128) + u64((chunk ^ token) & u32(7)) * u64(16)
            ptx.stg4(ptx.address(tiles) + place, a0, a1, a2, a3)
        for mask in (1, 2, 4, 8, 16):
            total = i32(total + ptx.shuffle_xor(total, u32(mask)))
        if lane == u32(0):
            sums[warp] = total
        cuda.syncthreads()
        if thread == u32(0):
            total = i32(0)
            for w in range(8):
                total = i32(total + sums[w])
            if coded and inside:
                scale = ptx.widen_half(u32(scales[token]))
            tokens[u32(2) * token] = u32(total)
            tokens[u32(2) * token + u32(1)] = u32(ptx.as_int(scale)) if inside else u32(0)

    arrays = (array, types.uint16, ptx.u8, u32)
    return Program(kernel, tuple(types.Array(t, 1, "C") for t in arrays) + (u32,) * 3, THREADS)
