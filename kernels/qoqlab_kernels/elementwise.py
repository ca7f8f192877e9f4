"""What lies between the GEMMs of a layer, each in one pass: RMSNorm, residual add, SiLU, and INT8 per token.

One block a token. A thread takes *pieces* of 8 inputs (16 bytes), keeps them in registers from the load to the codes, and
the block meets three times: for the sum of squares, for the largest value, for the sum of codes. What the kernels equal, bit
for bit, is `qoqlab.reference.rms_norm_s8` and its neighbours: sums are folded in the order of `qoqlab.exact.fold`, which
does not depend on how many threads share the work.

Quotients. ``round(y / scale)`` must be that of an IEEE division, but 4096 divisions a token cost more time than the token's
bytes. With ``1 / scale = high + low`` (`low` is exact but for its own rounding), ``fuse(y, high, y * low)`` is the quotient
but for 2**-46 of it and one rounding. A tie, code + 1/2, is a number that fp32 holds and comes out exactly; any other
quotient of an 11-bit y by an 11-bit scale is further than 2**-14 from a tie, much more than fp32's rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from numba import cuda, types

from qoqlab import exact

from . import ptx
from .launch import Program
from .layout import UNIT_K, blocks
from .ptx import device, f32, i32, u32, u64

#: What each operation reads and does: "plain" and "norm" x; "add_norm" x + residual, written too; "silu" gate and up.
OPERATIONS = ("plain", "norm", "add_norm", "silu")
PIECE_BYTES = 2 * exact.PIECE
#: The smallest fp16 number with all its 11 bits.
SMALLEST_NORMAL = 2.0**-14
#: Pieces a thread up to which gains, or the values of ``up``, wait in registers beside the values.
HELD = 4
#: Blocks have at least and at most this many threads; a multiprocessor of compute capability 9.0 holds so many, one of 8.9
#: a quarter less.
FEWEST_THREADS, MOST_THREADS, RESIDENT_THREADS = 64, 1024, 2048
#: Tokens of a multiprocessor beyond which threads take two pieces each: of operations that read more than they keep, and of
#: the others ("plain" and norms).
QUEUE, SHORT_QUEUE = 8, 4
#: Blocks that fetch the gains ahead of time. If all of them do, they queue for the same lines: 2 us more for 1024 tokens.
FETCHING = 8


def threads_for(m: int, k: int, processors: int, queue: int = QUEUE) -> int:
    """Threads of a block, a power of two: one for each piece, but where multiprocessors have several tokens no more than
    half of the most, unless a thread would hold over 8 pieces; and half as many where a multiprocessor has more than
    ``queue`` tokens (measured on an H100)."""
    pieces = blocks(k, UNIT_K) * UNIT_K // exact.PIECE
    few = m <= processors or pieces > 4 * MOST_THREADS
    wanted = 1 << (blocks(pieces, 1 if m <= queue * processors else 2) - 1).bit_length()
    return max(FEWEST_THREADS, min(wanted, MOST_THREADS if few else MOST_THREADS // 2))


@dataclass(frozen=True)
class Pairs:
    """Instructions on words that hold two numbers of a 16-bit type."""

    unpack: Callable
    pack: Callable
    multiply: Callable
    add: Callable
    largest: Callable


PAIRS = {
    "half": Pairs(ptx.unpack_half, ptx.pack_half, ptx.multiply_halves, ptx.add_halves, ptx.largest_halves),
    "bfloat": Pairs(ptx.unpack_bfloat, ptx.pack_bfloat, ptx.multiply_bfloats, ptx.add_bfloats, ptx.largest_bfloats),
}


@device
def exp_minus(t):
    """`qoqlab.exact.exp_minus` of a number whose size is at most `exact.EXP_LIMIT`."""
    head = ptx.multiply(t, f32(-exact.LOG2_E[0]))
    shifted = ptx.add(head, f32(exact.ROUNDING))
    f = ptx.add(ptx.subtract(head, ptx.subtract(shifted, f32(exact.ROUNDING))), ptx.multiply(t, f32(-exact.LOG2_E[1])))
    p = ptx.multiply(f, f32(exact.EXP2[5]))
    p = ptx.multiply(ptx.add(p, f32(exact.EXP2[4])), f)
    p = ptx.multiply(ptx.add(p, f32(exact.EXP2[3])), f)
    p = ptx.multiply(ptx.add(p, f32(exact.EXP2[2])), f)
    p = ptx.multiply(ptx.add(p, f32(exact.EXP2[1])), f)
    p = ptx.add(p, f32(exact.EXP2[0]))
    # the low bits of `shifted` are the integer part: into the exponent with it
    return ptx.as_float(u32(u32(ptx.as_int(p)) + (u32(ptx.as_int(shifted)) << u32(23))))


@device
def silu(x):
    """`qoqlab.exact.silu` of an fp32 number, not yet rounded to 16 bits."""
    kept = ptx.maximum(x, f32(-exact.EXP_LIMIT))
    power = exp_minus(ptx.minimum(kept, f32(exact.EXP_LIMIT)))
    return ptx.multiply(kept, ptx.reciprocal(ptx.add(f32(1.0), power)))


@device
def fold8(x0, x1, x2, x3, x4, x5, x6, x7):
    """`qoqlab.exact.fold` of the eight numbers of a piece."""
    even = ptx.add(ptx.add(x0, x4), ptx.add(x2, x6))
    return ptx.add(even, ptx.add(ptx.add(x1, x5), ptx.add(x3, x7)))


@device
def code(y, high, low):
    """``round(y / scale)`` in the low byte, of a quotient that rounds to -127..127."""
    return u32(ptx.as_int(ptx.add(ptx.fuse(y, high, ptx.multiply(y, low)), f32(exact.ROUNDING))))


@device
def clamped_code(y, high, low):
    """``round(y / scale)`` clamped to -127..127, in the low byte."""
    quotient = ptx.fuse(y, high, ptx.multiply(y, low))
    clamped = ptx.minimum(ptx.maximum(quotient, f32(-127.0)), f32(127.0))
    return u32(ptx.as_int(ptx.add(clamped, f32(exact.ROUNDING))))


def int8_writers(kind: str, k: int, threads: int, trusted: bool = True) -> tuple[Callable, Callable, Callable]:
    """How a token ends, as three device functions of a block of ``threads``.

    Codes need no clamp where the scale is a normal number of fp16: no quotient is over 127 (1 + 2**-11). ``trusted``: no
    value is larger than ``best``; otherwise all are clamped.

    ``largest(values, maxima, thread)``: the largest absolute value of a token's 16-bit numbers in registers.
    ``write(values, best, tiles, tokens, token, padded, sums, thread)``: the numbers as INT8 codes in the GEMM's order, their
    sum and scale, of which ``best`` is 127. ``maxima``, ``sums``: 32 words of shared memory each.
    ``fill(tiles, tokens, token, padded, thread)``: zeros, for what fills up the last group of 8 tokens.
    """
    unpack, larger = PAIRS[kind].unpack, PAIRS[kind].largest
    written = blocks(k, UNIT_K) * UNIT_K // exact.PIECE  # the last unit is filled up with zeros
    pieces, warps = blocks(written, threads), threads // 32
    none = ptx.zeros(4 * pieces)

    @device
    def largest_of_piece(j, a0, a1, a2, a3):
        return larger(larger(a0, a1), larger(a2, a3))

    @device
    def plus(a, b):
        return i32(a + b)

    def writer(one: Callable) -> Callable:
        """For all pieces of a thread: store codes made by ``one``, return their sum."""

        @device
        def word_of_codes(a, b, high, low):
            x0, x1 = unpack(a)
            x2, x3 = unpack(b)
            first = ptx.permute(one(x0, high, low), one(x1, high, low), u32(0x0040))
            return ptx.permute(first, ptx.permute(one(x2, high, low), one(x3, high, low), u32(0x0040)), u32(0x5410))

        @device
        def codes_of_piece(j, a0, a1, a2, a3, high, low, at, stride, token, thread):
            piece = u32(u32(j * threads) + thread)
            if (j + 1) * threads <= written or piece < u32(written):
                first, second = word_of_codes(a0, a1, high, low), word_of_codes(a2, a3, high, low)
                chunk = u32(((piece >> u32(1)) ^ token) & u32(7))
                ptx.stg2(
                    at + u64(piece >> u32(4)) * u64(stride) + u64(chunk * u32(16) + (piece & u32(1)) * u32(8)), first, second
                )
                return ptx.dp4a(u32(0x01010101), first, ptx.dp4a(u32(0x01010101), second, i32(0)))
            return i32(0)

        return ptx.fold_quads(codes_of_piece, pieces, plus)

    largest_of_thread = ptx.fold_quads(largest_of_piece, pieces, larger)
    write_clamped, write_codes = writer(clamped_code), writer(code)

    @device
    def largest(values, maxima, thread):
        word = largest_of_thread(values)
        low, high = unpack(larger(word, word))
        best = ptx.largest_of_warp(u32(ptx.as_int(ptx.maximum(low, high))))  # bits of numbers >= 0 are in their order
        if thread & u32(31) == u32(0):
            maxima[thread >> u32(5)] = best
        ptx.named_barrier(u32(0), u32(threads))
        best = maxima[0]
        for w in range(1, warps):
            best = max(best, maxima[w])
        return ptx.as_float(best)

    @device
    def write(values, best, tiles, tokens, token, padded, sums, thread):
        warp, lane = u32(thread >> u32(5)), u32(thread & u32(31))
        scale = ptx.round_half(ptx.divide(best, f32(127.0)))
        if scale == f32(0.0):
            scale = f32(1.0)
        high = ptx.reciprocal(scale)
        low = ptx.multiply(ptx.fuse(-high, scale, f32(1.0)), high)
        place = ptx.address(tiles) + u64(token) * u64(UNIT_K)
        count, stride = i32(0), u32(padded * u32(UNIT_K))
        if trusted and scale >= f32(SMALLEST_NORMAL):
            count = write_codes(values, high, low, place, stride, token, thread)
        else:
            count = write_clamped(values, high, low, place, stride, token, thread)
        count = ptx.sum_of_warp(count)
        if lane == u32(0):
            sums[warp] = count
        ptx.named_barrier(u32(0), u32(threads))
        if thread == u32(0):
            count = sums[0]
            for w in range(1, warps):
                count = i32(count + sums[w])
            ptx.stg2(ptx.address(tokens) + u64(token) * u64(8), u32(count), u32(ptx.as_int(scale)))

    @device
    def fill(tiles, tokens, token, padded, thread):
        place = ptx.address(tiles) + u64(token) * u64(UNIT_K)
        write_codes(none(), f32(0.0), f32(0.0), place, u32(padded * u32(UNIT_K)), token, thread)
        if thread == u32(0):
            ptx.stg2(ptx.address(tokens) + u64(token) * u64(8), u32(0), u32(0))

    return largest, write, fill


def storer(k: int, threads: int) -> Callable:
    """Device function ``store(values, at, thread)``: a token's 16-bit numbers, from registers to memory."""
    filled, pieces = k // exact.PIECE, blocks(blocks(k, UNIT_K) * UNIT_K // exact.PIECE, threads)

    @device
    def store_piece(j, a0, a1, a2, a3, at, thread):
        piece = u32(u32(j * threads) + thread)
        if (j + 1) * threads <= filled or piece < u32(filled):
            ptx.stg4(at + u64(piece) * u64(PIECE_BYTES), a0, a1, a2, a3)

    return ptx.each_quad(store_piece, pieces)


def elementwise(
    operation: str, kind: str, k: int, threads: int, codes: bool = True, overlap: bool = False, given: bool = False
) -> Program:
    """One of `OPERATIONS` on tokens of ``k`` outputs of a type in `PAIRS`, by blocks of ``threads`` (a power of two).

    ``codes``: INT8 in the GEMM's order; otherwise the 16-bit numbers themselves, ``[m, k]``, and, for "silu", the bits of
    the largest of every token in ``tokens``. ``overlap``: launched while the previous kernel ends (compute capability 9.0).
    ``given``, for "plain": largest numbers come as fp32 ``[m]`` in place of gains, since tokens are slices of longer ones.
    """
    pair = PAIRS[kind]
    unpack, pack, times, sum_of = pair.unpack, pair.pack, pair.multiply, pair.add
    pieces, filled, warps = blocks(blocks(k, UNIT_K) * UNIT_K // exact.PIECE, threads), k // exact.PIECE, threads // 32
    largest, write, fill = int8_writers(kind, k, threads, not given)
    gated, norm, adding = operation == "silu", "norm" in operation, operation == "add_norm"
    searching, noting = not given and (codes or gated), gated and not codes
    row_bytes, result_bytes = PIECE_BYTES * filled * (2 if gated else 1), PIECE_BYTES * filled
    held = pieces <= HELD  # the second operand is loaded together with the first, as far as registers reach
    none = ptx.zeros(4 * pieces)

    @device
    def load_piece(j, a0, a1, a2, a3, at, thread):
        piece = u32(u32(j * threads) + thread)
        if (j + 1) * threads <= filled or piece < u32(filled):
            return ptx.ldg4(at + u64(piece) * u64(PIECE_BYTES))
        return u32(0), u32(0), u32(0), u32(0)

    @device
    def fetch_piece(j, a0, a1, a2, a3, at, thread):
        piece = u32(u32(j * threads) + thread)
        if piece < u32(filled) and piece & u32(7) == u32(0):  # a line of the cache is 128 bytes
            ptx.prefetch(at + u64(piece) * u64(PIECE_BYTES))

    @device
    def add_piece(j, a0, a1, a2, a3, b0, b1, b2, b3):
        return sum_of(a0, b0), sum_of(a1, b1), sum_of(a2, b2), sum_of(a3, b3)

    @device
    def square(x):
        return ptx.multiply(x, x)

    @device
    def squares_of_piece(j, a0, a1, a2, a3):
        x0, x1 = unpack(a0)
        x2, x3 = unpack(a1)
        x4, x5 = unpack(a2)
        x6, x7 = unpack(a3)
        return fold8(square(x0), square(x1), square(x2), square(x3), square(x4), square(x5), square(x6), square(x7))

    @device
    def scaled(word, factor):
        low, high = unpack(word)
        return pack(ptx.multiply(low, factor), ptx.multiply(high, factor))

    @device
    def norm_piece(j, a0, a1, a2, a3, g0, g1, g2, g3, factor):
        return (
            times(g0, scaled(a0, factor)),
            times(g1, scaled(a1, factor)),
            times(g2, scaled(a2, factor)),
            times(g3, scaled(a3, factor)),
        )

    @device
    def silu_of(word):
        low, high = unpack(word)
        return pack(silu(low), silu(high))

    @device
    def silu_piece(j, a0, a1, a2, a3, b0, b1, b2, b3):
        return (
            times(silu_of(a0), b0),
            times(silu_of(a1), b1),
            times(silu_of(a2), b2),
            times(silu_of(a3), b3),
        )

    @device
    def norm_loading(j, a0, a1, a2, a3, factor, at, thread):
        g0, g1, g2, g3 = load_piece(j, a0, a1, a2, a3, at, thread)
        return norm_piece(j, a0, a1, a2, a3, g0, g1, g2, g3, factor)

    @device
    def silu_loading(j, a0, a1, a2, a3, at, thread):
        b0, b1, b2, b3 = load_piece(j, a0, a1, a2, a3, at, thread)
        return silu_piece(j, a0, a1, a2, a3, b0, b1, b2, b3)

    load, store = ptx.map_quads(load_piece, pieces), storer(k, threads)
    fetch = ptx.each_quad(fetch_piece, pieces)
    added, normed, gate = (ptx.zip_quads(step, pieces) for step in (add_piece, norm_piece, silu_piece))
    normed_loading, gate_loading = (ptx.map_quads(step, pieces) for step in (norm_loading, silu_loading))
    squares = ptx.fold_quads(squares_of_piece, pieces, ptx.add)
    across_warps = _folded_warps(warps)

    @device
    def block_sum(partial, shared, thread):
        """The threads' numbers, folded: thread t with t + threads/2, and so on. Every warp does the same work."""
        shared[thread] = partial
        cuda.syncthreads()
        lane = u32(thread & u32(31))
        total = across_warps(lane, shared)
        for mask in (16, 8, 4, 2, 1):
            total = ptx.add(total, ptx.as_float(u32(ptx.shuffle_xor(ptx.as_int(total), u32(mask)))))
        return total

    def kernel(x, residual, gain, result, tiles, tokens, m, padded, eps):
        sums = cuda.shared.array(threads, f32)
        maxima = cuda.shared.array(32, u32)
        code_sums = cuda.shared.array(32, i32)
        token, thread = u32(cuda.blockIdx.x), u32(cuda.threadIdx.x)
        if overlap:
            ptx.allow_next_kernel()
            if norm and token < u32(FETCHING):
                fetch(none(), ptx.address(gain), thread)  # into L2 only: whoever writes the gains may still be at it
            ptx.wait_for_previous_kernel()
        row = u64(token) * u64(row_bytes)
        if token < m:
            values = load(none(), ptx.address(x) + row, thread)
            gains = none()
            if norm and held:
                gains = load(none(), ptx.address(gain), thread)
            if gated and held:
                values = gate(values, load(none(), ptx.address(x) + row + u64(row_bytes // 2), thread))
            elif gated:
                values = gate_loading(values, ptx.address(x) + row + u64(row_bytes // 2), thread)
            if adding:
                values = added(values, load(none(), ptx.address(residual) + row, thread))
                store(values, ptx.address(result) + row, thread)
            if norm:
                total = block_sum(squares(values), sums, thread)
                mean = ptx.divide(total, f32(k))
                factor = ptx.reciprocal(ptx.root(ptx.add(mean, ptx.as_float(eps))))
                if held:  # noqa: SIM108 (numba drops the branch not taken)
                    values = normed(values, gains, factor)
                else:
                    values = normed_loading(values, factor, ptx.address(gain), thread)
            best = f32(0.0)
            if searching:
                best = largest(values, maxima, thread)
            if given:
                best = ptx.as_float(ptx.ldr1(ptx.address(gain) + u64(token) * u64(4)))
            if codes:
                write(values, best, tiles, tokens, token, padded, code_sums, thread)
            else:
                store(values, ptx.address(tiles) + u64(token) * u64(result_bytes), thread)
                if noting and thread == u32(0):
                    ptx.stg1(ptx.address(tokens) + u64(token) * u64(4), u32(ptx.as_int(best)))
        elif codes:
            fill(tiles, tokens, token, padded, thread)

    arrays = (types.uint16, types.uint16, types.uint16, types.uint16, ptx.u8, u32)
    signature = tuple(types.Array(t, 1, "C") for t in arrays) + (u32,) * 3
    narrow = overlap and operation == "plain" and pieces <= 2  # 32 registers do: as many threads as there is room for
    residents = RESIDENT_THREADS // threads if narrow else 1
    return Program(kernel, signature, threads, overlap=overlap, residents=residents)


def _folded_warps(warps: int) -> Callable:
    """``f(lane, shared)``: the numbers of one lane in all warps, folded."""
    names = [f"shared[lane + u32({32 * w})]" for w in range(warps)]
    while len(names) > 1:
        half = len(names) // 2
        names = [f"add({a}, {b})" for a, b in zip(names[:half], names[half:], strict=True)]
    scope = {"add": ptx.add, "u32": u32}
    exec(f"def folded(lane, shared):\n    return {names[0]}\n", scope)
    return device(scope["folded"])
