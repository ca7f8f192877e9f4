"""The GEMM's epilogue on its own, for sums that several GPUs have added up.

Where the inputs of a layer lie on several GPUs, each leaves the integers of its part (`gemm.Form` with ``raw``); added, they
are those of the whole, and scales and bias come in once, here, rounded as on a single GPU. A thread takes 4 outputs of 8
tokens, one after the other: 16 bytes of sums, 8 of results.
"""

from __future__ import annotations

from numba import cuda, types

from . import gemm, ptx
from .launch import Program
from .ptx import device, f32, i32, u32, u64

THREADS, OUTPUTS, TOKENS = 128, 4, 8


def scale_sums(form: gemm.Form, overlap: bool = False) -> Program:
    """int32 sums ``[m, n]`` -> results of a form. ``overlap``: launched while the previous kernel ends (compute capability
    9.0)."""
    finish, scaled, biased = gemm.epilogue(form), form.scaled, form.bias
    pack = ptx.pack_bfloat if form.bfloat else ptx.pack_half

    @device
    def bits_of_bias(bias, column):
        if biased:
            return ptx.ldg4(ptx.address(bias) + u64(column) * u64(4))
        return u32(0), u32(0), u32(0), u32(0)

    def kernel(sums, tokens, token_sums, rows, bias, out, m, n):
        if overlap:
            ptx.allow_next_kernel()
            ptx.wait_for_previous_kernel()
        column = u32((u32(cuda.blockIdx.x) * u32(THREADS) + u32(cuda.threadIdx.x)) * u32(OUTPUTS))
        if column < n:
            at = ptx.address(rows) + u64(column) * u64(16)
            r0, r1, r2, r3 = ptx.ldg4(at), ptx.ldg4(at + u64(16)), ptx.ldg4(at + u64(32)), ptx.ldg4(at + u64(48))
            b0, b1, b2, b3 = bits_of_bias(bias, column)
            z0 = z1 = z2 = z3 = u32(0)  # integer zeros have left the sums already
            if scaled:
                z0, z1, z2, z3 = r0[1], r1[1], r2[1], r3[1]
            for i in range(TOKENS):
                token = u32(u32(cuda.blockIdx.y) * u32(TOKENS) + u32(i))
                if token < m:
                    place = u64(token) * u64(n) + u64(column)
                    c0, c1, c2, c3 = ptx.ldg4(ptx.address(sums) + place * u64(4))
                    s, x = i32(0), ptx.as_float(ptx.ldr1(ptx.address(tokens) + u64(token) * u64(8) + u64(4)))
                    if scaled:
                        s = i32(ptx.ldr1(ptx.address(token_sums) + u64(token) * u64(4)))
                    y0 = finish(i32(c0), s, x, ptx.as_float(r0[0]), z0, ptx.as_float(b0))
                    y1 = finish(i32(c1), s, x, ptx.as_float(r1[0]), z1, ptx.as_float(b1))
                    y2 = finish(i32(c2), s, x, ptx.as_float(r2[0]), z2, ptx.as_float(b2))
                    y3 = finish(i32(c3), s, x, ptx.as_float(r3[0]), z3, ptx.as_float(b3))
                    ptx.stg2(ptx.address(out) + place * u64(2), pack(y0, y1), pack(y2, y3))

    arrays = (u32, u32, u32, u32, f32, types.uint16)
    signature = tuple(types.Array(t, 1, "C") for t in arrays) + (u32,) * 2
    return Program(kernel, signature, THREADS, overlap=overlap)
