"""W4A8 GEMM: 4-bit weights x INT8 activations on integer tensor cores, y[m, n] = sum_k x[m, k] w[n, k] times both scales.

The ladder. Every version reads the same packed weights and tiled activations (`layout`) and computes the same integers.

v1  one thread per output element: finds its nibbles by formula, one multiplication at a time
v2  blocks of 16 x 16 outputs share weights and activations through shared memory
v3  register-level parallelism: four codes in one 32-bit word, multiplied and offset by one instruction, summed by dp4a
    (paper section 5.2.3, "subtraction after multiplication")
v4  tensor cores (mma.sync m16n8k32) on the same registers, a ring of asynchronous copies, stream-K. sm_80 and newer
v5  Hopper: bulk copies into a ring guarded by mbarriers, wgmma with the unpacked weights as its register operand, producer
    and consumer warpgroups, activations multicast in clusters, programmatic dependent launch. sm_90a

The unsigned trick. Weights stay unsigned bytes: ``code * s + (128 - zero * s)`` lies in 0..255 for every INT8 weight, so
four codes take one multiplication-addition in a 32-bit word, no byte carries into its neighbour, and no sign has to be
repaired. The tensor cores multiply u8 x s8; what is too much, ``128 * sum_k x``, leaves with the zero points in the
epilogue:

    y = (acc - zero * sum_x) * (x_scale * scale)        zero: 128 for progressive weights, the output's own per channel
    y = acc * (x_scale * scale) - sum_x * x_scale * zero     per channel with a scaled (fp16) zero

Stream-K. The work is ``row tiles x token tiles x units of 128 inputs``, in that order; every worker takes an equal run of
it, last tile first. So what lies in a tile that the next worker ends is computed and handed over at once, and what the
worker before has handed over is needed last: hardly anybody waits. Integers make the order of summation irrelevant: results
repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from numba import cuda, types

from . import ptx
from .launch import Program
from .ptx import device, f32, i32, u32, u64

UNIT_CODES = 4096  # bytes of codes in a unit of 64 outputs x 128 inputs
GROUP_BYTES = 128  # bytes of scales and offsets for each of its groups
#: Shared memory that one block may use on Hopper, and what lets two blocks share a multiprocessor.
SHARED_LIMIT, SHARED_HALF, SHARED_THIRD = 232448, 115712, 76800


def _array(dtype: object) -> object:
    return types.Array(dtype, 1, "C")


#: units, activation tiles, token constants, row constants, bias, out, partial sums, their flags,
#: m, n, blocks of 64 outputs, units of 128 inputs, row tiles, token tiles
SIGNATURE = tuple(map(_array, (ptx.u8, ptx.u8, u32, u32, f32, types.uint16, ptx.u8, u32))) + (u32,) * 6


@dataclass(frozen=True)
class Form:
    """What a kernel is compiled for besides its sizes.

    ``groups`` of K in a unit of 128 (0: per channel); ``scaled``: per-channel zeros are fp16 numbers, not codes; ``bfloat``:
    results in bf16 instead of fp16; ``bias``: fp32 bias of every output is added. ``raw``: what several GPUs add up, int32
    sums less integer zeros, no scale or bias in them.
    """

    groups: int
    scaled: bool = False
    bfloat: bool = False
    bias: bool = False
    raw: bool = False

    @property
    def unit(self) -> int:
        """Bytes of a unit."""
        return UNIT_CODES + GROUP_BYTES * self.groups


# -- shared by all versions -----------------------------------------------------------------------------------------------


def unpacker(groups: int, load1: Callable, load4: Callable) -> Callable:
    """Device function ``unpack(unit, thread)``: a thread's 64 codes of a unit -> 16 registers of four unsigned bytes.

    Registers 4 s .. 4 s + 3 belong to inputs 32 s .. 32 s + 31: outputs g and g + 8 with inputs 4 q .. 4 q + 3, then both
    with inputs 16 more. That is the A operand of mma.sync m16n8k32 and of wgmma.
    """

    @device
    def widen(even, odd, scales):
        low, four = u32(0x0F0F0F0F), u32(4)
        if groups == 0:
            return (u32(even & low), u32((even >> four) & low), u32(odd & low), u32((odd >> four) & low))
        # one word holds scale and offset of output g, then of output g + 8
        s0, s1 = u32(scales & u32(0xFF)), ptx.permute(scales, u32(0), u32(0x4442))
        a0, a1 = ptx.permute(scales, u32(0), u32(0x1111)), ptx.permute(scales, u32(0), u32(0x3333))
        return (
            u32(u32(even & low) * s0 + a0),
            u32(u32((even >> four) & low) * s1 + a1),
            u32(u32(odd & low) * s0 + a0),
            u32(u32((odd >> four) & low) * s1 + a1),
        )

    @device
    def unpack(unit, thread):
        v, w = load4(unit + thread * u32(16)), load4(unit + u32(2048) + thread * u32(16))
        at = unit + u32(UNIT_CODES) + ((thread >> u32(5)) * u32(8) + ((thread & u32(31)) >> u32(2))) * u32(4)
        if groups == 0:
            g0 = g1 = g2 = g3 = u32(0)
        elif groups == 1:
            g0 = g1 = g2 = g3 = load1(at)
        elif groups == 2:
            g0 = g1 = load1(at)
            g2 = g3 = load1(at + u32(128))
        else:
            g0, g1 = load1(at), load1(at + u32(128))
            g2, g3 = load1(at + u32(256)), load1(at + u32(384))
        return widen(v[0], v[1], g0) + widen(v[2], v[3], g1) + widen(w[0], w[1], g2) + widen(w[2], w[3], g3)

    return unpack


def epilogue(form: Form) -> Callable:
    """Device function: int32 accumulator -> fp32 result, each operation rounded as in `qoqlab.reference.w4a8_epilogue`."""
    scaled, biased = form.scaled, form.bias

    @device
    def finish(total, token_sum, token_scale, row_scale, zero, bias):
        both = ptx.multiply(token_scale, row_scale)
        if scaled:
            shift = ptx.multiply(ptx.multiply(ptx.to_float(token_sum), token_scale), ptx.as_float(zero))
            y = ptx.subtract(ptx.multiply(ptx.to_float(total), both), shift)
        else:
            y = ptx.multiply(ptx.to_float(i32(total - i32(token_sum * i32(zero)))), both)
        if biased:
            y = ptx.add(y, bias)
        return y

    return finish


def less_zero(form: Form) -> Callable:
    """Device function: int32 accumulator -> what the results of several GPUs are summed from, see `Form`."""
    scaled = form.scaled

    @device
    def rest(total, token_sum, zero):
        if scaled:
            return u32(total)
        return u32(total - i32(token_sum * i32(zero)))

    return rest


def storer(form: Form) -> Callable:
    """Device function that finishes and stores one output element; v1 to v3 use it."""
    finish, biased, rest = epilogue(form), form.bias, less_zero(form)
    pack = ptx.pack_bfloat if form.bfloat else ptx.pack_half

    @device
    def store_raw(total, tokens, rows, bias, out, token, row, n):
        place = u64(token) * u64(n) + u64(row)
        ptx.stg1(ptx.address(out) + place * u64(4), rest(total, i32(tokens[2 * token]), rows[4 * row + 1]))

    @device
    def store(total, tokens, rows, bias, out, token, row, n):
        b = f32(0.0)
        if biased:
            b = bias[row]
        scale, zero = ptx.as_float(rows[4 * row]), rows[4 * row + 1]
        y = finish(total, i32(tokens[2 * token]), ptx.as_float(tokens[2 * token + 1]), scale, zero, b)
        out[token * n + row] = types.uint16(pack(y, f32(0.0)) & u32(0xFFFF))

    return store_raw if form.raw else store


# -- v1: one thread per output element ------------------------------------------------------------------------------------


def element_readers(form: Form) -> tuple[Callable, Callable]:
    """Device functions that find one weight (as an unsigned byte) and one activation by its indices."""
    groups, unit_bytes = form.groups, form.unit

    @device
    def weight(units, row, k, k_blocks):
        start = ((row // 64) * k_blocks + k // 128) * unit_bytes
        warp, high, g = row % 64 // 16, row % 16 // 8, row % 8
        step, half, q, byte = k % 128 // 32, k % 32 // 16, k % 16 // 4, k % 4
        at = step * 8 + half * 4 + byte  # among the thread's 32 bytes
        code = (i32(units[start + at // 16 * 2048 + (32 * warp + 4 * g + q) * 16 + at % 16]) >> (4 * high)) & 15
        if groups == 0:
            return code
        pair = start + UNIT_CODES + k % 128 // (128 // groups) * GROUP_BYTES + (warp * 8 + g) * 4 + 2 * high
        return i32(code * i32(units[pair]) + i32(units[pair + 1]))

    @device
    def activation(x, token, k, padded):
        chunk = (k % 128 // 16) ^ (token % 8)
        byte = i32(x[(k // 128 * padded + token) * 128 + chunk * 16 + k % 16])
        return byte - 256 if byte > 127 else byte

    return weight, activation


def v1(form: Form) -> Program:
    """One thread per output element."""
    weight, activation = element_readers(form)
    store = storer(form)

    def kernel(units, x, tokens, rows, bias, out, partials, flags, m, n, n_blocks, k_blocks, row_tiles, token_tiles):
        row, token = i32(cuda.blockIdx.y * 64 + cuda.threadIdx.x), i32(cuda.blockIdx.x)
        if row < n:
            padded = i32((m + 7) // 8 * 8)
            total = i32(0)
            for k in range(i32(k_blocks) * 128):
                total = i32(total + weight(units, row, k, i32(k_blocks)) * activation(x, token, k, padded))
            store(total, tokens, rows, bias, out, token, row, i32(n))

    return Program(kernel, SIGNATURE, 64)


# -- v2: shared memory ----------------------------------------------------------------------------------------------------


def v2(form: Form) -> Program:
    """16 outputs x 16 tokens a block; 32 inputs at a time are decoded once into shared memory and used 16 times."""
    weight, activation = element_readers(form)
    store = storer(form)

    def kernel(units, x, tokens, rows, bias, out, partials, flags, m, n, n_blocks, k_blocks, row_tiles, token_tiles):
        ws = cuda.shared.array((16, 33), i32)  # 33: rows start in different banks
        xs = cuda.shared.array((16, 33), i32)
        thread = i32(cuda.threadIdx.x)
        i, j = thread // 16, thread % 16
        row, token = i32(cuda.blockIdx.x * 16 + j), i32(cuda.blockIdx.y * 16 + i)
        padded = i32((m + 7) // 8 * 8)
        total = i32(0)
        for start in range(0, i32(k_blocks) * 128, 32):
            for part in range(2):
                k = start + part * 16 + j
                ws[i, part * 16 + j] = weight(units, i32(cuda.blockIdx.x * 16 + i), k, i32(k_blocks))
                xs[i, part * 16 + j] = activation(x, token, k, padded) if token < padded else 0
            cuda.syncthreads()
            for k in range(32):
                total = i32(total + ws[j, k] * xs[i, k])
            cuda.syncthreads()
        if row < n and token < m:
            store(total, tokens, rows, bias, out, token, row, i32(n))

    return Program(kernel, SIGNATURE, 256)


# -- v3: register-level parallelism ---------------------------------------------------------------------------------------


def v3(form: Form) -> Program:
    """64 outputs x 1 token a block: four codes per word are unpacked, scaled and offset at once, and summed by dp4a."""
    unpack = unpacker(form.groups, ptx.ldg1, ptx.ldg4)
    store, unit_bytes = storer(form), form.unit

    @device
    def four_dots(a0, a1, a2, a3, x0, x1, total0, total1):
        return ptx.dp4a(a2, x1, ptx.dp4a(a0, x0, total0)), ptx.dp4a(a3, x1, ptx.dp4a(a1, x0, total1))

    def kernel(units, x, tokens, rows, bias, out, partials, flags, m, n, n_blocks, k_blocks, row_tiles, token_tiles):
        thread, token = u32(cuda.threadIdx.x), u32(cuda.blockIdx.x)
        g, q, turn = u32((thread & u32(31)) >> u32(2)), u32(thread & u32(3)), u32(token & u32(7))
        padded = u32(((m + u32(7)) >> u32(3)) << u32(3))
        unit = ptx.address(units) + u64(u32(cuda.blockIdx.y) * k_blocks) * u64(unit_bytes)
        line = ptx.address(x) + u64(token) * u64(128) + u64(q) * u64(4)
        t0 = t1 = i32(0)
        for _ in range(k_blocks):
            a = unpack(unit, thread)
            x0, x1 = ptx.ldg1(line + u64(u32(0) ^ turn) * u64(16)), ptx.ldg1(line + u64(u32(1) ^ turn) * u64(16))
            t0, t1 = four_dots(a[0], a[1], a[2], a[3], x0, x1, t0, t1)
            x0, x1 = ptx.ldg1(line + u64(u32(2) ^ turn) * u64(16)), ptx.ldg1(line + u64(u32(3) ^ turn) * u64(16))
            t0, t1 = four_dots(a[4], a[5], a[6], a[7], x0, x1, t0, t1)
            x0, x1 = ptx.ldg1(line + u64(u32(4) ^ turn) * u64(16)), ptx.ldg1(line + u64(u32(5) ^ turn) * u64(16))
            t0, t1 = four_dots(a[8], a[9], a[10], a[11], x0, x1, t0, t1)
            x0, x1 = ptx.ldg1(line + u64(u32(6) ^ turn) * u64(16)), ptx.ldg1(line + u64(u32(7) ^ turn) * u64(16))
            t0, t1 = four_dots(a[12], a[13], a[14], a[15], x0, x1, t0, t1)
            unit += u64(unit_bytes)
            line += u64(padded) * u64(128)
        for mask in (1, 2):  # the four lanes of an output hold different inputs
            t0 = i32(t0 + ptx.shuffle_xor(t0, u32(mask)))
            t1 = i32(t1 + ptx.shuffle_xor(t1, u32(mask)))
        row = i32(u32(cuda.blockIdx.y) * u32(64) + (thread >> u32(5)) * u32(16) + g)
        if q == u32(0):
            if row < n:
                store(t0, tokens, rows, bias, out, i32(token), row, i32(n))
            if row + 8 < n:
                store(t1, tokens, rows, bias, out, i32(token), row + 8, i32(n))

    return Program(kernel, SIGNATURE, 128)


# -- stream-K and the epilogue of v4 and v5 -------------------------------------------------------------------------------


@device
def first_unit(worker, quotient, remainder):
    """Where a worker's run of units starts: the first ``remainder`` workers take one unit more."""
    return u32(worker * quotient + min(worker, remainder))


@device
def worker_of(unit, quotient, remainder):
    """Inverse of `first_unit`: who computes this unit."""
    long_run = u32(quotient + u32(1))
    long_runs = u32(remainder * long_run)
    if unit < long_runs:
        return ptx.quotient(unit, long_run)
    return u32(remainder + ptx.quotient(u32(unit - long_runs), quotient))


@device
def last_segment(unit, end, k_blocks):
    """The part of a run ``unit .. end`` that lies in its last tile: (tile, first unit in it, one past the last)."""
    tile = ptx.quotient(u32(end - u32(1)), k_blocks)
    start = u32(tile * k_blocks)
    return tile, u32(max(unit, start) - start), u32(end - start)


def part_movers(store: Callable, load: Callable, number: Callable, quads: int) -> tuple[Callable, Callable]:
    """Device functions that leave a thread's accumulators at an address of the type ``number``, and that add what another
    block left there. Quads of a thread lie 2048 bytes apart, those of neighbouring threads side by side."""

    @device
    def store_quad(j, c0, c1, c2, c3, at):
        store(at + number(j * 2048), u32(c0), u32(c1), u32(c2), u32(c3))

    @device
    def add_quad(j, c0, c1, c2, c3, at):
        v = load(at + number(j * 2048))
        return i32(c0 + i32(v[0])), i32(c1 + i32(v[1])), i32(c2 + i32(v[2])), i32(c3 + i32(v[3]))

    return ptx.each_quad(store_quad, quads), ptx.map_quads(add_quad, quads)


def sharers(tokens: int, parts: int) -> tuple[Callable, Callable, Callable]:
    """Device functions for tiles that workers share; ``parts``: groups of 128 threads in a worker, each on its own.

    ``give`` leaves accumulators for the worker that has the tile's last units; ``publish`` tells it that they are there;
    ``take`` adds those that all others have left. A worker gives at most once, its first segment, and takes at most once,
    its last. It waits for workers before it only, which the hardware has started before it, and they have published before
    they wait themselves.
    """
    store_part, add_part = part_movers(ptx.stg4, ptx.ldg4, u64, tokens // 8)
    part_bytes = 64 * tokens * 4

    @device
    def place(partials, worker, part, thread):
        return ptx.address(partials) + u64(u32(worker * u32(parts) + part)) * u64(part_bytes) + u64(thread * u32(16))

    @device
    def flag_of(flags, worker, part):
        return ptx.address(flags) + u64(u32(worker * u32(parts) + part)) * u64(4)

    @device
    def give(acc, worker, part, partials, thread):
        store_part(acc, place(partials, worker, part, thread))

    @device
    def publish(worker, part, flags, thread, barrier):
        ptx.named_barrier(barrier, u32(128))
        if thread == u32(0):
            ptx.store_release(flag_of(flags, worker, part), u32(1))

    @device
    def take(acc, tile, worker, part, quotient, remainder, k_blocks, partials, flags, thread, barrier):
        first = worker_of(u32(tile * k_blocks), quotient, remainder)
        for i in range(first, worker):
            ptx.wait_until_set(flag_of(flags, u32(i), part))
            acc = add_part(acc, place(partials, u32(i), part, thread))
        ptx.named_barrier(barrier, u32(128))
        for i in range(first, worker):
            if thread == u32(0):
                ptx.stg1(flag_of(flags, u32(i), part), u32(0))  # ready for the next launch
        return acc

    return give, publish, take


def gatherer(tokens: int, split: int) -> Callable:
    """Device function: the blocks of a cluster, which split a tile's inputs, bring their sums together through each other's
    shared memory. Outputs of warpgroup ``g`` are finished by block ``g % split``.

    Returns (accumulators, whether they are complete). Every thread of the cluster has to meet the barrier inside.
    """
    send, receive = part_movers(ptx.sts4_remote, ptx.lds4, u32, tokens // 8)
    part_bytes = 64 * tokens * 4

    @device
    def gather(acc, received, rank, group, thread):
        owner = u32(group & u32(split - 1))
        mine = received + u32(group // u32(split)) * u32((split - 1) * part_bytes) + thread * u32(16)
        if rank != owner:
            slot = u32(u32(rank - owner - u32(1)) & u32(split - 1))
            send(acc, ptx.map_shared(mine + slot * u32(part_bytes), owner))
        ptx.cluster_arrive()
        ptx.cluster_wait()
        complete = rank == owner
        if complete:
            for i in range(split - 1):
                acc = receive(acc, mine + u32(i) * u32(part_bytes))
        return acc, complete

    return gather


def writer(tokens: int, form: Form, store: Callable) -> Callable:
    """Device function: 128 threads bring their accumulators (64 outputs x ``tokens``) through shared memory to the result.

    32 tokens at a time, in two buffers by turns: finish, convert, transpose with ``store``, then 16-byte stores, eight
    threads to a row of 64 outputs. Raw sums go without a detour.
    """
    chunk = min(tokens, 32)
    finish, biased = epilogue(form), form.bias
    pack = ptx.pack_bfloat if form.bfloat else ptx.pack_half

    @device
    def eight_tokens(j, c0, c1, c2, c3, row0, row1, b0, b1, constants, buffer, thread, barrier, at, stride, left, columns):
        t = ptx.lds4(constants + u32(j * 64) + u32(thread & u32(3)) * u32(16))  # sum, scale of tokens 2q and 2q + 1
        sum0, sum1, scale0, scale1 = i32(t[0]), i32(t[2]), ptx.as_float(t[1]), ptx.as_float(t[3])
        r0, r1 = ptx.as_float(row0[0]), ptx.as_float(row1[0])
        low = pack(finish(c0, sum0, scale0, r0, row0[1], b0), finish(c1, sum1, scale1, r0, row0[1], b0))
        high = pack(finish(c2, sum0, scale0, r1, row1[1], b1), finish(c3, sum1, scale1, r1, row1[1], b1))
        part = buffer + u32(j * 8 // chunk % 2 * chunk * 128)
        store(part + u32(j * 8 % chunk * 128), thread, low, high)
        if (j + 1) * 8 % chunk == 0:
            ptx.named_barrier(barrier, u32(128))
            first = u32((j + 1) * 8 - chunk)
            column = u32(thread & u32(7))
            for i in range((chunk + 15) // 16):
                token = u32(i * 16) + (thread >> u32(3))
                if token < u32(chunk) and first + token < left and column < columns:
                    v = ptx.lds4(part + token * u32(128) + ((column ^ (token & u32(7))) << u32(4)))
                    ptx.stg4(at + u64(first + token) * u64(stride) + u64(column * u32(16)), v[0], v[1], v[2], v[3])

    each = ptx.each_quad(eight_tokens, tokens // 8)

    rest = less_zero(form)

    @device
    def eight_raw(j, c0, c1, c2, c3, zero0, zero1, constants, thread, at, n, left):
        pair = u32(thread & u32(3))
        t = ptx.lds4(constants + u32(j * 64) + pair * u32(16))
        token = u32(u32(j * 8) + pair * u32(2))
        line = at + u64(token) * u64(n) * u64(4)
        if token < left:
            ptx.stg1(line, rest(c0, i32(t[0]), zero0))
            ptx.stg1(line + u64(32), rest(c2, i32(t[0]), zero1))
        if token + u32(1) < left:
            ptx.stg1(line + u64(n) * u64(4), rest(c1, i32(t[2]), zero0))
            ptx.stg1(line + u64(n) * u64(4) + u64(32), rest(c3, i32(t[2]), zero1))

    each_raw = ptx.each_quad(eight_raw, tokens // 8)

    @device
    def write_raw(acc, block, first_token, constants, rows, bias, out, buffer, thread, barrier, m, n):
        """From registers to the result: the 8 outputs of 8 lanes fill a sector of 32 bytes."""
        row = u32(u32(block * u32(64)) + (thread >> u32(5)) * u32(16) + ((thread & u32(31)) >> u32(2)))
        if row < n:  # and row + 8, N being a multiple of 32
            zero0 = ptx.ldg4(ptx.address(rows) + u64(row) * u64(16))[1]
            zero1 = ptx.ldg4(ptx.address(rows) + u64(row + u32(8)) * u64(16))[1]
            at = ptx.address(out) + (u64(first_token) * u64(n) + u64(row)) * u64(4)
            each_raw(acc, zero0, zero1, constants, thread, at, n, u32(m - first_token))

    @device
    def write(acc, block, first_token, constants, rows, bias, out, buffer, thread, barrier, m, n):
        if tokens <= 32:  # one buffer serves every tile: nobody may still be reading the last one
            ptx.named_barrier(barrier, u32(128))
        n0 = u32(block * u32(64))
        row = u32(n0 + (thread >> u32(5)) * u32(16) + ((thread & u32(31)) >> u32(2)))
        row0 = ptx.ldg4(ptx.address(rows) + u64(row) * u64(16))
        row1 = ptx.ldg4(ptx.address(rows) + u64(row + u32(8)) * u64(16))
        b0 = b1 = f32(0.0)
        if biased:
            if row < n:
                b0 = bias[row]
            if row + u32(8) < n:
                b1 = bias[row + u32(8)]
        at = ptx.address(out) + (u64(first_token) * u64(n) + u64(n0)) * u64(2)
        left, columns = u32(m - first_token), u32(min(u32(64), u32(n - n0)) >> u32(3))
        each(acc, row0, row1, b0, b1, constants, buffer, thread, barrier, at, u32(n * u32(2)), left, columns)

    return write_raw if form.raw else write


# -- v4: mma.sync ---------------------------------------------------------------------------------------------------------


@device
def store_sm80(block, thread, low, high):
    """8 tokens x 16 outputs of a warp, transposed lane to lane, into rows of 64 outputs with swizzled 16-byte chunks."""
    lane = u32(thread & u32(31))
    token, q, column = u32(lane >> u32(2)), u32(lane & u32(3)), u32((thread >> u32(5)) * u32(2))
    line = block + token * u32(128) + q * u32(4)
    ptx.sts1(line + ((column ^ token) << u32(4)), ptx.transpose8(low))
    ptx.sts1(line + (((column + u32(1)) ^ token) << u32(4)), ptx.transpose8(high))


def v4(form: Form, tokens: int, stages: int) -> Program:
    """64 outputs x ``tokens`` (8 to 64) a block of four warps; ``stages`` units are on their way at a time."""
    unit_bytes, x_bytes, chunk = form.unit, tokens * 128, min(tokens, 32)
    stage_bytes = unit_bytes + x_bytes
    constants_at = stages * stage_bytes
    out_at = constants_at + tokens * 8
    unpack, write = unpacker(form.groups, ptx.lds1, ptx.lds4), writer(tokens, form, store_sm80)
    (give, publish, take), zeros = sharers(tokens, 1), ptx.zeros(tokens // 2)
    wait_stage, wait_all = ptx.copy_wait(stages - 2), ptx.copy_wait(0)

    @device
    def multiply(j, c0, c1, c2, c3, a, tile, lane):
        token = u32(lane & u32(7))
        line, chunk = tile + u32(j * 1024) + token * u32(128), u32(lane >> u32(3))
        b = ptx.load_matrices(line + ((chunk ^ token) << u32(4)))
        c = ptx.mma(c0, c1, c2, c3, a[0], a[1], a[2], a[3], b[0], b[1])
        c = ptx.mma(c[0], c[1], c[2], c[3], a[4], a[5], a[6], a[7], b[2], b[3])
        b = ptx.load_matrices(line + (((chunk + u32(4)) ^ token) << u32(4)))
        c = ptx.mma(c[0], c[1], c[2], c[3], a[8], a[9], a[10], a[11], b[0], b[1])
        return ptx.mma(c[0], c[1], c[2], c[3], a[12], a[13], a[14], a[15], b[2], b[3])

    multiply_all = ptx.map_quads(multiply, tokens // 8)

    @device
    def fetch(to, source, count, thread):
        i = thread
        while i < count >> u32(4):
            ptx.copy_async(to + i * u32(16), source + u64(i) * u64(16))
            i = u32(i + u32(128))

    def kernel(units, x, constants, rows, bias, out, partials, flags, m, n, n_blocks, k_blocks, row_tiles, token_tiles):
        thread, worker, workers = u32(cuda.threadIdx.x), u32(cuda.blockIdx.x), u32(cuda.gridDim.x)
        base = u32((ptx.shared_base() + u32(127)) & u32(0xFFFFFF80))
        padded = u32(((m + u32(7)) >> u32(3)) << u32(3))
        total = u32(row_tiles * token_tiles * k_blocks)
        quotient = ptx.quotient(total, workers)
        remainder = u32(total - quotient * workers)
        unit, end = first_unit(worker, quotient, remainder), first_unit(u32(worker + u32(1)), quotient, remainder)
        given = u32(0)
        while unit < end:
            tile, k, stop = last_segment(unit, end, k_blocks)
            count = u32(stop - k)
            block, first = ptx.quotient(tile, token_tiles), u32(ptx.modulo(tile, token_tiles) * u32(tokens))
            have = min(u32(tokens), u32(padded - first))
            source = ptx.address(units) + (u64(block) * u64(k_blocks) + u64(k)) * u64(unit_bytes)
            activations = ptx.address(x) + (u64(k) * u64(padded) + u64(first)) * u64(128)
            fetch(base + u32(constants_at), ptx.address(constants) + u64(first) * u64(8), u32(have * u32(8)), thread)
            acc = zeros()
            for i in range(count + u32(stages - 1)):
                ahead, now = u32(i), i - (stages - 1)
                if now >= 0:
                    wait_stage()
                    cuda.syncthreads()  # the unit has come, and everybody has left the stage that is filled next
                if ahead < count:
                    to = base + ptx.modulo(ahead, u32(stages)) * u32(stage_bytes)
                    fetch(to, activations + u64(ahead) * u64(padded) * u64(128), u32(have * u32(128)), thread)
                    fetch(to + u32(x_bytes), source + u64(ahead) * u64(unit_bytes), u32(unit_bytes), thread)
                ptx.copy_commit()
                if now >= 0:
                    here = base + ptx.modulo(u32(now), u32(stages)) * u32(stage_bytes)
                    acc = multiply_all(acc, unpack(here + u32(x_bytes), thread), here, u32(thread & u32(31)))
            wait_all()
            cuda.syncthreads()
            if given == u32(1):  # a segment ago: it has arrived meanwhile
                publish(worker, u32(0), flags, thread, u32(1))
                given = u32(2)
            if stop < k_blocks:
                give(acc, worker, u32(0), partials, thread)
                given = u32(1)
            else:
                if k > u32(0):
                    acc = take(acc, tile, worker, u32(0), quotient, remainder, k_blocks, partials, flags, thread, u32(1))
                write(acc, block, first, base + u32(constants_at), rows, bias, out, base + u32(out_at), thread, u32(1), m, n)
            cuda.syncthreads()
            end = u32(end - count)
        if given == u32(1):
            publish(worker, u32(0), flags, thread, u32(1))

    return Program(kernel, SIGNATURE, 128, out_at + 2 * chunk * 128 + 128)


# -- v5: Hopper -----------------------------------------------------------------------------------------------------------


@device
def store_sm90(block, thread, low, high):
    """The same as `store_sm80` by one instruction, stmatrix."""
    lane = u32(thread & u32(31))
    token, column = u32(lane & u32(7)), u32((thread >> u32(5)) * u32(2) + ((lane >> u32(3)) & u32(1)))
    ptx.store_transposed(block + token * u32(128) + ((column ^ token) << u32(4)), low, high)


@device
def descriptor(at):
    """Activations in shared memory: K-major, 128-byte swizzle, 1024 bytes from one group of 8 tokens to the next."""
    return (u64(1) << u64(62)) | (u64(64) << u64(32)) | (u64(1) << u64(16)) | (u64(at & u32(0x3FFFF)) >> u64(4))


@dataclass(frozen=True)
class Ring:
    """Where v5 keeps what in shared memory. Every stage holds 128 inputs of the block's outputs and tokens."""

    tokens: int
    warpgroups: int
    unit: int
    stages: int
    split: int = 1

    @property
    def weights(self) -> int:
        """Offset of the stages' weights, behind their activations."""
        return self.stages * self.tokens * 128

    @property
    def constants(self) -> int:
        """Offset of the stages' token constants: sum and scale, 8 bytes a token, filled in a tile's last stage only."""
        return self.weights + self.stages * self.warpgroups * self.unit

    @property
    def out(self) -> int:
        """Offset of the buffers through which results leave, two for each warpgroup."""
        return self.constants + self.stages * self.tokens * 8

    @property
    def received(self) -> int:
        """Offset of what the other blocks of a split tile send: 64 outputs x tokens from each, for every warpgroup whose
        outputs this block finishes."""
        return self.out + self.warpgroups * 2 * min(self.tokens, 32) * 128

    @property
    def barriers(self) -> int:
        """Offset of the barriers, 16 bytes a stage: filled, emptied."""
        finished = -(-self.warpgroups // self.split)
        return self.received + finished * (self.split - 1) * 64 * self.tokens * 4

    @property
    def total(self) -> int:
        """Bytes to ask for; 1024 of them to align the rest."""
        return self.barriers + 16 * self.stages + 1024


def stages_that_fit(tokens: int, warpgroups: int, unit: int, limit: int = SHARED_LIMIT, split: int = 1) -> int:
    """The most stages of v5 that fit in ``limit`` bytes of shared memory."""
    return (limit - Ring(tokens, warpgroups, unit, 0, split).total) // (tokens * 136 + warpgroups * unit + 16)


#: (tokens, warpgroups) of wide tiles -> registers of a producer's thread and of a consumer's: together no more than what
#: all threads have at first, an equal share of 65536, rounded down to a multiple of 8.
REGISTERS = {(128, 2): (56, 224), (256, 2): (40, 232), (128, 3): (48, 152)}


def v5(form: Form, tokens: int, warpgroups: int, stages: int, cluster: int, overlap: bool = True, split: int = 1) -> Program:
    """64 x ``warpgroups`` outputs x ``tokens`` a block. The blocks of a cluster either have different outputs and share
    their activations (``cluster``), or share one tile and split its inputs (``split``, a power of two).

    ``overlap``: start while the previous kernel of the stream ends; weights are fetched at once, activations once it is
    over.
    """
    ring, unit_bytes = Ring(tokens, warpgroups, form.unit, stages, split), form.unit
    x_bytes, w_bytes, share_of_block = tokens * 128, warpgroups * unit_bytes, tokens // cluster
    weights_at, constants_at, out_at, barriers_at = ring.weights, ring.constants, ring.out, ring.barriers
    received_at = ring.received
    out_bytes, everybody = 2 * min(tokens, 32) * 128, (1 << cluster) - 1
    # With half of the shared memory two blocks share a multiprocessor: one computes while the other waits, finishes a tile,
    # or, as a block of the next kernel, already fetches. At 64 tokens half of the registers hold one unit at a time only.
    residents = 2 if ring.total <= SHARED_HALF and tokens <= 64 and warpgroups <= 2 else 1
    deep = (residents == 1 or tokens <= 32) and warpgroups < 4
    # wide tiles take nearly all registers for their accumulators: the producers give theirs away
    wide = tokens >= 128
    few, many = REGISTERS.get((tokens, warpgroups), (0, 0))
    shrink, grow = ptx.limit_registers(few), ptx.claim_registers(many)
    unpack, write = unpacker(form.groups, ptx.lds1, ptx.lds4), writer(tokens, form, store_sm90)
    give, publish, take = sharers(tokens, cluster * warpgroups)
    zeros, start = ptx.zeros(tokens // 2), ptx.wgmma(tokens)
    gather = gatherer(tokens, split)
    wait_previous, wait_all = ptx.wgmma_wait(tokens, 1), ptx.wgmma_wait(tokens, 0)
    wait_empty = ptx.barrier_wait_cluster if cluster > 1 else ptx.barrier_wait

    @device
    def advance(stage, phase):
        if stage + u32(1) == u32(stages):
            return u32(0), u32(phase ^ u32(1))
        return u32(stage + u32(1)), phase

    @device
    def release(barriers, stage, lane):
        """This warp has read the stage; with clusters all blocks must have before any of them refills it."""
        ptx.warp_barrier()  # lane 0 speaks for all
        if lane == u32(0):
            if cluster > 1:
                for rank in range(cluster):
                    ptx.barrier_arrive_at(barriers + u32(16) * stage + u32(8), u32(rank))
            else:
                ptx.barrier_arrive(barriers + u32(16) * stage + u32(8))

    @device
    def queue(acc, base, weights, stage, phase, thread):
        """Unpack the weights of a stage once it is filled, and queue their products with its activations."""
        ptx.barrier_wait(base + u32(barriers_at) + u32(16) * stage, phase)
        a = unpack(weights + stage * u32(w_bytes), thread)
        return start(acc, a, descriptor(base + stage * u32(x_bytes)))

    @device
    def load_weights(units, base, unit, end, rank, n_blocks, k_blocks, token_tiles):
        """One thread. No kernel writes weights, so this one need not wait for anybody."""
        stage, phase = u32(0), u32(1)
        while unit < end:
            tile, k, stop = last_segment(unit, end, k_blocks)
            end = u32(end - (stop - k))
            block = u32(u32(ptx.quotient(tile, token_tiles) * u32(cluster) + rank) * u32(warpgroups))
            have = u32(0)
            if block < n_blocks:
                have = min(u32(warpgroups), u32(n_blocks - block))
            source = ptx.address(units) + (u64(block) * u64(k_blocks) + u64(k)) * u64(unit_bytes)
            while k < stop:
                filled = base + u32(barriers_at) + u32(16) * stage
                wait_empty(filled + u32(8), phase)
                ptx.barrier_expect(filled, u32(have * u32(unit_bytes)))
                for i in range(have):
                    to = base + u32(weights_at) + stage * u32(w_bytes) + u32(i) * u32(unit_bytes)
                    ptx.bulk_load(to, source + u64(i) * u64(k_blocks) * u64(unit_bytes), u32(unit_bytes), filled)
                source += u64(unit_bytes)
                k = u32(k + u32(1))
                stage, phase = advance(stage, phase)

    @device
    def load_activations(x, constants, base, unit, end, rank, m, k_blocks, token_tiles):
        """One thread; the previous kernel may be the one that quantised them."""
        ptx.wait_for_previous_kernel()
        ptx.allow_next_kernel()
        stage, phase = u32(0), u32(1)
        padded = u32(((m + u32(7)) >> u32(3)) << u32(3))
        while unit < end:
            tile, k, stop = last_segment(unit, end, k_blocks)
            end = u32(end - (stop - k))
            first = u32(ptx.modulo(tile, token_tiles) * u32(tokens))
            have = min(u32(tokens), u32(padded - first))
            mine = min(u32(rank * u32(share_of_block)), have)  # this block fetches its share for the whole cluster
            share = u32(min(u32(share_of_block), u32(have - mine)) * u32(128))
            source = ptx.address(x) + (u64(k) * u64(padded) + u64(first + mine)) * u64(128)
            while k < stop:
                filled = base + u32(barriers_at) + u32(16) * stage
                wait_empty(filled + u32(8), phase)
                k = u32(k + u32(1))
                if k < stop:
                    ptx.barrier_expect(filled, u32(have * u32(128)))
                else:
                    ptx.barrier_expect(filled, u32(have * u32(128 + 8)))
                    at = ptx.address(constants) + u64(first) * u64(8)
                    ptx.bulk_load(base + u32(constants_at) + stage * u32(tokens * 8), at, u32(have * u32(8)), filled)
                to = base + stage * u32(x_bytes) + mine * u32(128)
                if cluster == 1:
                    ptx.bulk_load(to, source, share, filled)
                elif share > u32(0):
                    ptx.bulk_load_multicast(to, source, share, filled, u32(everybody))
                source += u64(padded) * u64(128)
                stage, phase = advance(stage, phase)

    def kernel(units, x, constants, rows, bias, out, partials, flags, m, n, n_blocks, k_blocks, row_tiles, token_tiles):
        thread = u32(cuda.threadIdx.x)
        base = u32((ptx.shared_base() + u32(1023)) & u32(0xFFFFFC00))
        barriers = base + u32(barriers_at)
        if cluster > 1 or split > 1:
            rank, worker, workers = ptx.cluster_rank(), ptx.cluster_index(), ptx.cluster_count()
        else:
            rank, worker, workers = u32(0), u32(cuda.blockIdx.x), u32(cuda.gridDim.x)
        if thread == u32(0):
            for s in range(stages):
                ptx.barrier_init(barriers + u32(16 * s), u32(2))  # filled: both producers have announced their bytes
                ptx.barrier_init(barriers + u32(16 * s + 8), u32(4 * warpgroups * cluster))  # emptied: every warp
            ptx.barrier_fence()
        if cluster > 1 or split > 1:
            ptx.cluster_sync()
        else:
            cuda.syncthreads()
        total = u32(row_tiles * token_tiles * k_blocks)
        quotient = ptx.quotient(total, workers)
        remainder = u32(total - quotient * workers)
        unit, end = first_unit(worker, quotient, remainder), first_unit(u32(worker + u32(1)), quotient, remainder)
        section = rank
        if split > 1:  # a cluster has one tile, its blocks take a section of the inputs each
            unit = u32(worker * k_blocks + ptx.quotient(u32(rank * k_blocks), u32(split)))
            end = u32(worker * k_blocks + ptx.quotient(u32(u32(rank + u32(1)) * k_blocks), u32(split)))
            rank = u32(0)
        group = u32(thread >> u32(7))
        if group == u32(warpgroups):
            if wide:
                shrink()
            if thread == u32(warpgroups * 128):
                load_weights(units, base, unit, end, rank, n_blocks, k_blocks, token_tiles)
            elif thread == u32(warpgroups * 128 + 32):
                load_activations(x, constants, base, unit, end, rank, m, k_blocks, token_tiles)
            if split > 1:
                ptx.cluster_arrive()  # the barrier of `gather` counts every thread
        else:
            if wide:
                grow()
            stage = phase = given = u32(0)
            t, lane = u32(thread & u32(127)), u32(thread & u32(31))
            part, number = u32(rank * u32(warpgroups) + group), u32(group + u32(1))
            weights = base + u32(weights_at) + group * u32(unit_bytes)
            while unit < end:
                tile, k, stop = last_segment(unit, end, k_blocks)
                end = u32(end - (stop - k)) if split == 1 else unit  # a split tile is all there is
                block = u32(u32(ptx.quotient(tile, token_tiles) * u32(cluster) + rank) * u32(warpgroups) + group)
                acc = zeros()
                rest = u32(stop - k - u32(1))
                acc = queue(acc, base, weights, stage, phase, t)
                if deep:
                    # While the tensor cores work on one unit the next is unpacked and queued. Its registers must not be
                    # those of the running one: two calls, two sets of registers.
                    while rest >= u32(2):
                        before = stage
                        stage, phase = advance(stage, phase)
                        acc = wait_previous(queue(acc, base, weights, stage, phase, t))
                        release(barriers, before, lane)
                        before = stage
                        stage, phase = advance(stage, phase)
                        acc = wait_previous(queue(acc, base, weights, stage, phase, t))
                        release(barriers, before, lane)
                        rest = u32(rest - u32(2))
                while rest > u32(0):
                    acc = wait_all(acc)
                    release(barriers, stage, lane)
                    stage, phase = advance(stage, phase)
                    acc = queue(acc, base, weights, stage, phase, t)
                    rest = u32(rest - u32(1))
                acc = wait_all(acc)
                complete = block < n_blocks
                if split > 1:
                    acc, owner = gather(acc, base + u32(received_at), section, group, t)
                    complete = complete and owner
                else:
                    if given == u32(1):  # a segment ago: it has arrived meanwhile
                        publish(worker, part, flags, t, number)
                        given = u32(2)
                    if stop < k_blocks:
                        give(acc, worker, part, partials, t)
                        given, complete = u32(1), False
                    elif k > u32(0):
                        acc = take(acc, tile, worker, part, quotient, remainder, k_blocks, partials, flags, t, number)
                if complete:
                    first = u32(ptx.modulo(tile, token_tiles) * u32(tokens))
                    at = base + u32(constants_at) + stage * u32(tokens * 8)
                    buffer = base + u32(out_at) + group * u32(out_bytes)
                    write(acc, block, first, at, rows, bias, out, buffer, t, number, m, n)
                release(barriers, stage, lane)  # the last stage also held the token constants
                stage, phase = advance(stage, phase)
            if given == u32(1):
                publish(worker, part, flags, t, number)
        if cluster > 1:
            ptx.cluster_sync()  # nobody leaves while others may still write to its memory

    threads = warpgroups * 128 + (128 if wide else 64)
    return Program(kernel, SIGNATURE, threads, ring.total, cluster * split, overlap, residents)


VERSIONS: dict[str, Callable[..., Program]] = {"v1": v1, "v2": v2, "v3": v3, "v4": v4, "v5": v5}
