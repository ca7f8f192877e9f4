"""One token's keys or values of one head on their way into the KV4 cache: quantised and written by one warp.

`row_writer` is a device function for kernels that make keys and values themselves (RoPE, say); `append` is the kernel that
takes them from memory. Bit-exact with `qoqlab.kv.quantize_kv4`. Where the bytes go: `cache.KV4Layout`.
"""

from __future__ import annotations

from collections.abc import Callable

from numba import cuda, types

from . import ptx
from .launch import Program
from .ptx import device, f32, u32, u64

PAGE = 64  #: tokens of a page
WARPS = 4


def row_writer(dim: int) -> Callable:
    """Device function ``write(part, token, lane, x0, x1, x2, x3, values)``: all 32 lanes of a warp write one row.

    ``part``: address of the keys' or values' part of a page's chunk; ``token`` 0..63 in the page; ``lane``'s numbers in fp32
    are channels d, d + 1, d + 8, d + 9 with ``d = first_channel(lane)``; ``values``: whether the part holds values. With
    head_dim 64 lanes 16.. repeat what lanes 0..15 bring.
    """
    code_bytes, lanes = PAGE * dim // 2, dim // 4

    @device
    def byte_of(low, high, scale, zero):
        """Two codes as a byte."""
        first = ptx.round_to_nibble(ptx.add(ptx.divide(low, scale), zero))
        return u32(first | (ptx.round_to_nibble(ptx.add(ptx.divide(high, scale), zero)) << u32(4)))

    @device
    def write(part, token, lane, x0, x1, x2, x3, values):
        low = ptx.minimum(ptx.minimum(x0, x1), ptx.minimum(x2, x3))
        high = ptx.maximum(ptx.maximum(x0, x1), ptx.maximum(x2, x3))
        for mask in (1, 2, 4, 8, 16):
            low = ptx.minimum(low, ptx.as_float(u32(ptx.shuffle_xor(ptx.as_int(low), u32(mask)))))
            high = ptx.maximum(high, ptx.as_float(u32(ptx.shuffle_xor(ptx.as_int(high), u32(mask)))))
        largest = ptx.maximum(ptx.absolute(low), ptx.absolute(high))
        step = ptx.maximum(ptx.divide(ptx.subtract(high, low), f32(15.0)), ptx.divide(largest, f32(2048.0)))
        scale = ptx.round_half(step)
        if scale == f32(0.0):
            scale = f32(1.0)
        zero = ptx.round_half(ptx.divide(ptx.multiply(low, f32(-1.0)), scale))
        step16, q = u32(lane >> u32(2)), u32(lane & u32(3))  # 16 channels; four of them: 2 q, 2 q + 1 and both plus 8
        row, high_row = u32(token & u32(7)), u32((token >> u32(3)) & u32(1))
        at = u32((token >> u32(4)) * u32(8 * dim) + (step16 >> u32(2)) * u32(512) + (step16 & u32(3)) * u32(4))
        first, second = byte_of(x0, x2, scale, zero), byte_of(x1, x3, scale, zero)
        if lane < u32(lanes):
            if values:  # rows of the fragment are channels, columns tokens
                at = u32(at + (row >> u32(1)) * u32(16) + high_row + (row & u32(1)) * u32(2))
                ptx.store_byte(part + u64(u32(at + q * u32(128))), first)
                ptx.store_byte(part + u64(u32(at + q * u32(128) + u32(64))), second)
            else:  # rows are tokens, columns channels
                at = u32(at + (row * u32(4) + q) * u32(16) + high_row)
                ptx.store_byte(part + u64(at), first)
                ptx.store_byte(part + u64(u32(at + u32(2))), second)
        if lane == u32(0):
            ptx.stg1(part + u64(u32(u32(code_bytes) + token * u32(4))), ptx.pack_half(scale, zero))

    return write


@device
def first_channel(lane, lanes):
    """The first of a lane's four channels; ``lanes``: head_dim / 4."""
    used = u32(lane & u32(lanes - 1))
    return u32((used >> u32(2)) * u32(16) + (used & u32(3)) * u32(2))


def append(dim: int, bfloat: bool) -> Program:
    """Quantise ``keys`` and ``values [rows, heads, dim]`` and write each row to its token of the cache.

    Row r belongs to sequence ``owners[r]``, ``back[r]`` tokens before the end of it. One warp a row and head.
    """
    write, read = row_writer(dim), ptx.unpack_bfloat if bfloat else ptx.unpack_half
    part_bytes, lanes = PAGE * (dim // 2 + 4), dim // 4

    def kernel(keys, values, data, tables, lengths, owners, back, rows, heads, pages, layer, width):
        thread = u32(cuda.threadIdx.x)
        lane = u32(thread & u32(31))
        item = u32(u32(cuda.blockIdx.x) * u32(WARPS) + (thread >> u32(5)))
        row = ptx.quotient(item, u32(heads * u32(2)))
        if row < rows:
            rest = u32(item - row * heads * u32(2))
            head, is_value = u32(rest >> u32(1)), u32(rest & u32(1))
            owner = ptx.load1(ptx.address(owners) + u64(row) * u64(4))
            token = u32(
                ptx.load1(ptx.address(lengths) + u64(owner) * u64(4)) - ptx.load1(ptx.address(back) + u64(row) * u64(4))
            )
            entry = ptx.address(tables) + (u64(owner) * u64(width) + u64(token >> u32(6))) * u64(4)
            page = u32(0xFFFFFFFF)
            if token < width * u32(PAGE):
                page = ptx.load1(entry)
            if page < pages:  # a sequence that has outgrown its pages loses tokens, nobody else's memory
                source = ptx.address(keys)
                if is_value == u32(1):
                    source = ptx.address(values)
                source += (u64(row * heads + head) * u64(dim) + u64(first_channel(lane, lanes))) * u64(2)
                x0, x1 = read(ptx.ldg1(source))
                x2, x3 = read(ptx.ldg1(source + u64(16)))
                chunk = u64(u32(layer * pages + page)) * u64(heads) + u64(head)
                part = ptx.address(data) + (chunk * u64(2) + u64(is_value)) * u64(part_bytes)
                write(part, u32(token & u32(63)), lane, x0, x1, x2, x3, is_value == u32(1))

    arrays = (types.uint16, types.uint16, ptx.u8, u32, u32, u32, u32)
    return Program(kernel, tuple(types.Array(t, 1, "C") for t in arrays) + (u32,) * 5, WARPS * 32)
