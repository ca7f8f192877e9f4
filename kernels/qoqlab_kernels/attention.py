"""Decode attention over a paged KV4 cache: one query token of every sequence against its cached keys and values.

`v4` works on tensor cores (mma.sync m16n8k16): scale and zero are taken out by linearity, the query heads of a group are on
the n side, pages come through a ring of asynchronous copies (bulk copies on Hopper), and the work is divided evenly over
persistent blocks. For sm_80 and newer. Softmax is computed in fp32.

Linearity. A token's key is ``s (code - z)``, the same s and z for all its channels, so

    q . k = s (q . code - z sum(q))          one tensor-core product with plain codes, one multiplication a token
    sum_t p_t v_t = sum_t (p_t s_t) code_t - sum_t p_t s_t z_t      the scale goes into p, the zeros into a number a head

Codes as numbers, for nothing. A nibble in the lowest bits of an fp16 word is the subnormal number ``code * 2^-24``, one
four bits higher ``code * 2^-20``. Tensor cores take subnormals as what they are and sum in fp32, so eight codes take one
shift and four ANDs; the powers of two leave in the epilogue. Nothing large is ever added, so nothing has to cancel, at any
length. (The usual magic number, 1024 + code, makes every sum 1024 times the sum of probabilities too large.)

Work. The units are (sequence, kv head, page), in that order; every block takes an equal run of them, found from the lengths
on the device, so the grid stays while sequences grow. A (sequence, head) that several blocks share is merged by whichever of
them comes last, always in the same order: results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numba import cuda, types

from . import ptx
from .gemm import first_unit, worker_of
from .launch import Program
from .ptx import device, f32, i32, u32, u64
from .rows import PAGE

#: Sequences of one launch: their lengths are kept in shared memory.
MOST_SEQUENCES = 256
LOG2E = 1.4426950408889634
#: Stands for minus infinity where a difference of two of them must be zero.
LOWEST = -1.0e30


def _array(dtype: object) -> object:
    return types.Array(dtype, 1, "C")


#: query, data, tables, lengths, sequences, out, partial results, their counters,
#: sequences, kv heads, pages, layer, width of the tables, window (0: none), scale and soft-cap (bits of fp32)
SIGNATURE = tuple(map(_array, (types.uint16, ptx.u8, u32, u32, u32, types.uint16, ptx.u8, u32))) + (u32,) * 8


@dataclass(frozen=True)
class Form:
    """What a kernel is compiled for besides its sizes.

    ``dim``: head_dim; ``group``: query heads of a kv head, 1 to 16; ``bfloat``: query and result in bf16 instead of fp16;
    ``capped``: logits are soft-capped.
    """

    dim: int
    group: int
    bfloat: bool = False
    capped: bool = False

    @property
    def chunk(self) -> int:
        """Bytes of a page's keys and values of one head."""
        return 2 * PAGE * (self.dim // 2 + 4)

    @property
    def splits(self) -> int:
        """How often a head's pages are read: the n side of an mma holds 8 query heads."""
        return -(-self.group // 8)

    @property
    def share(self) -> int:
        """Query heads that are computed together."""
        return -(-self.group // self.splits)


@device
def page_range(length, window):
    """(first page, number of pages) that a sequence's query looks at; one page even if there is no token."""
    first = u32(0)
    if window > u32(0) and length > window:
        first = u32(u32(length - window) >> u32(6))
    last = u32(u32(length + u32(PAGE - 1)) >> u32(6))
    return first, u32(max(u32(last - first), u32(1)))


def capper(form: Form) -> Callable:
    """Device function: what softmax's powers of two take, from the logit: soft-capped, ``cap tanh(x / cap)
    log2(e)``, or, where the log2(e) is in its factor already, the number itself."""
    capped = form.capped

    @device
    def cap_logit(x, cap):
        if capped:
            # tanh.approx would be off by 2^-11 of the cap; this by a few units in the last place
            e = ptx.exp2(f32(x * f32(2.0 * LOG2E)) * ptx.reciprocal(cap))
            return f32(f32(cap * f32(LOG2E)) * (f32(1.0) - f32(2.0) * ptx.reciprocal(e + f32(1.0))))
        return x

    return cap_logit


# -- v4 -------------------------------------------------------------------------------------------------------------------


def written_out(source: str, name: str, **scope: Any) -> Callable:
    """A device function from its text, with loops over registers written out."""
    scope |= {"u32": u32, "f32": f32, "ptx": ptx}
    exec(source, scope)
    return device(scope[name])


def _products(dim: int, at: str, b: str, c: str, rows: int) -> str:
    """Text: the mma of a tile of 16 x ``dim`` codes. ``rows``: 0 where the low and the high nibble of a byte lie in the same
    row of the fragment (keys), 1 where they lie in the same column (values)."""
    lines = []
    for step in range(dim // 16):
        if step % 4 == 0:
            lines.append(f"v = ptx.lds4(u32({at} + u32({step // 4 * 512})))")
        lines.append(f"w, h = v[{step % 4}], u32(v[{step % 4}] >> u32(8))")
        low, high = "u32({} & u32(0x000F000F))", "u32({} & u32(0x00F000F0))"
        first, second = (low.format("h"), high.format("w")) if rows == 0 else (high.format("w"), low.format("h"))
        a = f"{low.format('w')}, {first}, {second}, {high.format('h')}"
        b0, b1 = b.format(i=2 * step), b.format(i=2 * step + 1)
        acc = [c.format(i=k if rows == 0 else 4 * step + k) for k in range(4)]
        lines.append(f"{', '.join(acc)} = ptx.mma_half({', '.join(acc)}, {a}, {b0}, {b1})")
    return "".join(f"    {line}\n" for line in lines)


def page_multiplier(form: Form) -> Callable:
    """Device function: online softmax over one page for up to 8 query heads.

    ``page(state, q, keys, values, lane, token, start, length, f0, f1, s0, s1, cap)`` -> state. ``q``: fragments of the
    query; ``token``: of the page's first; tokens outside ``start .. length - 1`` are masked; ``f``, ``s``: of the lane's two
    heads the factor of its logits and the sum of its query. State: maxima m, sums l, sums of zeros z of the two heads, unit
    of the probabilities, accumulators.
    """
    dim, outputs = form.dim, form.dim // 4
    cap_logit = capper(form)
    step = "{}{}".format
    names = [f"o{i}" for i in range(outputs)]
    qs = [f"q{i}" for i in range(dim // 8)]
    code = [
        "def page(state, q, keys, values, lane, token, start, length, f0, f1, s0, s1, cap):",
        "    m0, m1, l0, l1, z0, z1, unit = state[0], state[1], state[2], state[3], state[4], state[5], state[6]",
        *(f"    {name} = state[{7 + i}]" for i, name in enumerate(names)),
        *(f"    {name} = q[{i}]" for i, name in enumerate(qs)),
        "    g = u32(lane >> u32(2))",
        "    k_at, v_at, most = u32(keys + lane * u32(16)), u32(values + lane * u32(16)), f32(2.0 ** -24)",
    ]
    for t in range(4):
        code.append("    a0 = a1 = a2 = a3 = f32(0.0)")
        code.append(_products(dim, f"k_at + u32({t * 8 * dim})", "q{i}", "a{i}", 0).rstrip("\n"))
        for half in (0, 1):  # tokens g and g + 8 of the tile
            offset = 16 * t + 8 * half
            x, y = step("x", 2 * t + half), step("y", 2 * t + half)
            code += [
                f"    k = ptx.unpack_half(ptx.lds1(u32(keys + u32({PAGE * dim // 2 + 4 * offset}) + g * u32(4))))",
                f"    {x} = cap_logit(f32(f32(a{2 * half} * f32(2.0 ** 24)) - k[1] * s0) * f32(k[0] * f0), cap)",
                f"    {y} = cap_logit(f32(f32(a{2 * half + 1} * f32(2.0 ** 24)) - k[1] * s1) * f32(k[0] * f1), cap)",
                f"    v{2 * t + half} = ptx.lds1(u32(values + u32({PAGE * dim // 2 + 4 * offset}) + g * u32(4)))",
                f"    t = u32(token + u32({offset}) + g)",
                "    if t < start or t >= length:",
                f"        {x} = {y} = minus",
                f"        v{2 * t + half} = u32(0)",
                f"    c{2 * t + half} = ptx.unpack_half(v{2 * t + half})",
                f"    most = ptx.maximum(most, c{2 * t + half}[0])",
            ]
    code.append("    n0, n1 = m0, m1")
    for k in range(8):
        code.append(f"    n0, n1 = ptx.maximum(n0, x{k}), ptx.maximum(n1, y{k})")
    for mask in (4, 8, 16):
        code += [f"    {n} = ptx.maximum({n}, over({n}, u32({mask})))" for n in ("n0", "n1", "most")]
    code += [
        # p times the values' scale must fit fp16 well: measured in the largest power of two among the scales so far
        "    newer = ptx.maximum(unit, ptx.as_float(u32(u32(ptx.as_int(most)) & u32(0x7F800000))))",
        "    inverse = ptx.as_float(u32(u32(0x7F000000) - u32(ptx.as_int(newer))))",
        "    r0, r1, ru = ptx.exp2(m0 - n0), ptx.exp2(m1 - n1), f32(unit * inverse)",
        "    m0, m1, unit = n0, n1, newer",
        "    l0, l1 = f32(l0 * r0), f32(l1 * r1)",
        "    r0, r1 = f32(r0 * ru), f32(r1 * ru)",
        "    z0, z1 = f32(z0 * r0), f32(z1 * r1)",
        *(f"    o{i} = f32(o{i} * r{i % 2})" for i in range(outputs)),
    ]
    for t in range(4):
        for half in (0, 1):
            k = 2 * t + half
            code += [
                f"    e0, e1, s = ptx.exp2(x{k} - m0), ptx.exp2(y{k} - m1), f32(c{k}[0] * inverse)",
                "    l0, l1 = f32(l0 + e0), f32(l1 + e1)",
                f"    p{half} = ptx.pack_half(f32(e0 * s), f32(e1 * s))",
                f"    p = ptx.unpack_half(p{half})",
                f"    z0, z1 = f32(z0 + p[0] * c{k}[1]), f32(z1 + p[1] * c{k}[1])",
            ]
        code.append("    b0, b1 = ptx.transpose8(p0), ptx.transpose8(p1)")
        text = _products(dim, f"v_at + u32({t * 8 * dim})", "b{i}", "o{i}", 1)
        for i in range(dim // 16 - 1, 0, -1):  # every product has the same probabilities
            text = text.replace(f", b{2 * i}, b{2 * i + 1})", ", b0, b1)")
        code.append(text.rstrip("\n"))
    code.append(f"    return (m0, m1, l0, l1, z0, z1, unit, {', '.join(names)})")
    return written_out("\n".join(code), "page", cap_logit=cap_logit, over=over, minus=f32(float("-inf")))


@device
def over(x, mask):
    """The fp32 of the lane whose number differs in the bits of the mask."""
    return ptx.as_float(u32(ptx.shuffle_xor(ptx.as_int(x), mask)))


def query_reader(form: Form) -> Callable:
    """Device function ``read(at, valid, lane)``: one query head's fragments, and (sum, power of two) it was scaled by.

    The head's numbers become fp16 after multiplication by a power of two, so that bf16 fits and that what meets the high
    nibbles can be divided by 16.
    """
    dim, read = form.dim, ptx.unpack_bfloat if form.bfloat else ptx.unpack_half
    words = dim // 8
    code = [
        "def fragments(at, valid, lane):",
        "    best, total, at = f32(0.0), f32(0.0), at + u64((lane & u32(3)) * u32(4))",
    ]
    for i in range(words):  # word i: channels 8 i + 2 q and the next
        code += [
            f"    w{i} = u32(0)",
            "    if valid:",
            f"        w{i} = ptx.load1(at + u64({16 * i}))",
            f"    f{i} = read(w{i})",
            f"    best = ptx.maximum(best, ptx.maximum(ptx.absolute(f{i}[0]), ptx.absolute(f{i}[1])))",
        ]
    code += [
        "    best = ptx.maximum(best, over(best, u32(1)))",
        "    best = ptx.maximum(best, over(best, u32(2)))",
        # the largest becomes 2^8 .. 2^9: the power of two that brings it there, from its exponent
        "    exponent = u32(u32(ptx.as_int(best)) >> u32(23))",
        "    exponent = min(max(exponent, u32(16)), u32(240))",
        "    up, down = ptx.as_float(u32(u32(262) - exponent) << u32(23)), ptx.as_float(u32(exponent - u32(8)) << u32(23))",
    ]
    for i in range(words):
        low = "f32(0.0625)" if i % 2 else "f32(1.0)"
        back = "f32(16.0)" if i % 2 else "f32(1.0)"
        code += [
            f"    q{i} = ptx.pack_half(f32(f32(f{i}[0] * up) * {low}), f32(f32(f{i}[1] * up) * {low}))",
            f"    r = ptx.unpack_half(q{i})",
            f"    total = f32(total + f32(r[0] + r[1]) * {back})",
        ]
    code += [
        "    total = f32(total + over(total, u32(1)))",
        "    total = f32(total + over(total, u32(2)))",
        f"    return ({', '.join(f'q{i}' for i in range(words))}), total, down",
    ]
    return written_out("\n".join(code), "fragments", read=read, over=over, u64=u64)


@dataclass(frozen=True)
class Room:
    """Where v4 keeps what in shared memory."""

    form: Form
    warps: int
    stages: int

    @property
    def acc(self) -> int:
        """Offset of the block's result: 8 heads x (dim + 4) fp32; behind the stages of all warps."""
        return self.warps * self.stages * self.form.chunk

    @property
    def pairs(self) -> int:
        """Offset of every warp's maximum and sum of 8 heads, then the block's."""
        return self.acc + 8 * (self.form.dim + 4) * 4

    @property
    def ends(self) -> int:
        """Offset of the first unit of every sequence, and one past the last; then their lengths; then their numbers."""
        return self.pairs + (self.warps + 1) * 64

    @property
    def barriers(self) -> int:
        """Offset of a barrier for each stage of each warp, and 16 bytes for a flag."""
        return self.ends + 3 * (MOST_SEQUENCES + 4) * 4

    @property
    def total(self) -> int:
        """Bytes to ask for; 128 of them to align the rest."""
        return self.barriers + 8 * self.warps * self.stages + 16 + 128


def part_bytes(form: Form) -> int:
    """Bytes of a partial result: maximum and sum of 8 heads, then their accumulators."""
    return 64 + form.share * form.dim * 4


def v4(form: Form, warps: int, stages: int, bulk: bool) -> Program:
    """Tensor cores. ``warps`` a block, each with a ring of ``stages`` pages; ``bulk``: Hopper's bulk copies and programmatic
    dependent launch instead of cp.async."""
    room, chunk, dim = Room(form, warps, stages), form.chunk, form.dim
    acc_at, pairs_at, ends_at, barriers_at = room.acc, room.pairs, room.ends, room.barriers
    flag_at = barriers_at + 8 * warps * stages
    lengths_at, numbers_at = ends_at + (MOST_SEQUENCES + 4) * 4, ends_at + 2 * (MOST_SEQUENCES + 4) * 4
    group, splits, share, threads = form.group, form.splits, form.share, 32 * warps
    row, quads, part = (dim + 4) * 4, form.share * dim // 4, part_bytes(form)
    half_chunk = chunk // 2
    page, fragments = page_multiplier(form), query_reader(form)
    wait_stage = ptx.copy_wait(stages - 1)
    pack = ptx.pack_bfloat if form.bfloat else ptx.pack_half
    outputs = dim // 4

    @device
    def prepare(base, sequences, lengths, batch, heads, window, thread):
        """Lengths and first units of all sequences into shared memory."""
        for i in range(thread, batch, u32(threads)):
            number = ptx.load1(ptx.address(sequences) + u64(i) * u64(4))
            length = ptx.load1(ptx.address(lengths) + u64(number) * u64(4))
            ptx.sts1(base + u32(numbers_at) + u32(i) * u32(4), number)
            ptx.sts1(base + u32(lengths_at) + u32(i) * u32(4), length)
        cuda.syncthreads()
        if thread < u32(32):
            each = u32(u32(batch + u32(31)) >> u32(5))
            start, total = u32(thread * each), u32(0)
            stop = u32(min(u32(start + each), batch))
            for i in range(start, stop):
                _, count = page_range(ptx.lds1(base + u32(lengths_at) + u32(i) * u32(4)), window)
                total = u32(total + count * heads)
            below = total
            for distance in (1, 2, 4, 8, 16):
                other = u32(ptx.shuffle_from(i32(below), u32(thread - u32(distance))))
                if thread >= u32(distance):
                    below = u32(below + other)
            below = u32(below - total)
            for i in range(start, stop):
                ptx.sts1(base + u32(ends_at) + u32(i) * u32(4), below)
                _, count = page_range(ptx.lds1(base + u32(lengths_at) + u32(i) * u32(4)), window)
                below = u32(below + count * heads)
                if u32(i) + u32(1) == batch:
                    ptx.sts1(base + u32(ends_at) + batch * u32(4), below)
        cuda.syncthreads()

    @device
    def sequence_of(base, unit, batch):
        """The sequence that a unit belongs to: bisection."""
        low, high = u32(0), batch
        while u32(high - low) > u32(1):
            middle = u32(u32(low + high) >> u32(1))
            if ptx.lds1(base + u32(ends_at) + middle * u32(4)) <= unit:
                low = middle
            else:
                high = middle
        return low

    @device
    def later(base, unit, b):
        """The same for a unit not before sequence ``b``."""
        while ptx.lds1(base + u32(ends_at) + u32(b + u32(1)) * u32(4)) <= unit:
            b = u32(b + u32(1))
        return b

    @device
    def find(base, unit, b, tables, window, width):
        """(head, number of the page) of a unit of sequence ``b``; the number is on its way from memory."""
        first, count = page_range(ptx.lds1(base + u32(lengths_at) + b * u32(4)), window)
        inside = u32(unit - ptx.lds1(base + u32(ends_at) + b * u32(4)))
        head = ptx.quotient(inside, count)
        entry = u32(first + u32(inside - head * count))
        entry = u32(min(entry, u32(width - u32(1))))
        number = ptx.lds1(base + u32(numbers_at) + b * u32(4))
        return head, ptx.load1(ptx.address(tables) + (u64(number) * u64(width) + u64(entry)) * u64(4))

    @device
    def fetch(to, barrier, data, number, head, pages, kv_heads, layer, lane):
        """Start to copy a page of a head into a stage."""
        if number >= pages:  # a sequence without tokens has no page: any will do, all of it is masked
            number = u32(0)
        chunk_number = u64(u32(layer * pages + number)) * u64(kv_heads) + u64(ptx.quotient(head, u32(splits)))
        source = ptx.address(data) + chunk_number * u64(chunk)
        if bulk:
            if lane == u32(0):
                ptx.barrier_expect(barrier, u32(chunk))
                ptx.bulk_load(to, source, u32(chunk), barrier)
        else:
            for i in range(lane, u32(chunk // 16), u32(32)):
                ptx.copy_async(to + u32(i) * u32(16), source + u64(i) * u64(16))

    def accumulate(first):
        """Device function: a warp's accumulators into the block's, in fp32; the first writes, the others add."""

        @device
        def quad(j, c0, c1, c2, c3, at, f0, f1, zero0, zero1, big):
            """Channels 16 j + g and 8 more, heads 2 q and 2 q + 1."""
            small = f32(big * f32(0.0625))
            r0, r1 = f32(f32(c0 * big) - zero0) * f0, f32(f32(c1 * big) - zero1) * f1
            r2, r3 = f32(f32(c2 * small) - zero0) * f0, f32(f32(c3 * small) - zero1) * f1
            here = u32(at + u32(j * 64))
            if not first:
                r0, r1 = f32(r0 + ptx.as_float(ptx.lds1(here))), f32(r1 + ptx.as_float(ptx.lds1(here + u32(row))))
                r2 = f32(r2 + ptx.as_float(ptx.lds1(here + u32(32))))
                r3 = f32(r3 + ptx.as_float(ptx.lds1(here + u32(row + 32))))
            ptx.sts1(here, u32(ptx.as_int(f32(r0))))
            ptx.sts1(here + u32(row), u32(ptx.as_int(f32(r1))))
            ptx.sts1(here + u32(32), u32(ptx.as_int(f32(r2))))
            ptx.sts1(here + u32(row + 32), u32(ptx.as_int(f32(r3))))

        return ptx.each_quad(quad, dim // 16)

    write_first, add_to = accumulate(True), accumulate(False)
    tail = written_out(f"def tail(state):\n    return ({', '.join(f'state[{7 + i}]' for i in range(outputs))})", "tail")
    fresh = written_out(
        "def fresh():\n    z = f32(0.0)\n"
        f"    return (f32({LOWEST}), f32({LOWEST}), z, z, z, z, f32(2.0 ** -24), {', '.join('z' for _ in range(outputs))})",
        "fresh",
    )

    @device
    def load_pair(at):
        return ptx.as_float(ptx.lds1(at)), ptx.as_float(ptx.lds1(at + u32(4)))

    @device
    def store_pair(at, m, total):
        ptx.sts1(at, u32(ptx.as_int(m)))
        ptx.sts1(at + u32(4), u32(ptx.as_int(total)))

    @device
    def merge_warps(base, state, warp, lane, thread):
        """All warps' results of a segment -> the block's, in shared memory."""
        q, g = u32(lane & u32(3)), u32(lane >> u32(2))
        m0, m1, l0, l1, z0, z1, unit = state[0], state[1], state[2], state[3], state[4], state[5], state[6]
        for mask in (4, 8, 16):
            l0, l1 = f32(l0 + over(l0, u32(mask))), f32(l1 + over(l1, u32(mask)))
            z0, z1 = f32(z0 + over(z0, u32(mask))), f32(z1 + over(z1, u32(mask)))
        if g == u32(0):
            mine = base + u32(pairs_at) + warp * u32(64) + q * u32(16)
            store_pair(mine, m0, l0)
            store_pair(mine + u32(8), m1, l1)
        cuda.syncthreads()
        n0, n1 = m0, m1
        for w in range(warps):
            theirs = base + u32(pairs_at) + u32(w * 64) + q * u32(16)
            n0 = ptx.maximum(n0, ptx.as_float(ptx.lds1(theirs)))
            n1 = ptx.maximum(n1, ptx.as_float(ptx.lds1(theirs + u32(8))))
        f0, f1 = ptx.exp2(m0 - n0), ptx.exp2(m1 - n1)
        at = base + u32(acc_at) + q * u32(2 * row) + g * u32(4)
        zero0, zero1, big = f32(z0 * unit), f32(z1 * unit), f32(unit * f32(2.0**24))
        if warp == u32(0):
            write_first(tail(state), at, f0, f1, zero0, zero1, big)
            if lane < u32(8):  # maximum and sum of all warps, a lane for each head
                here = base + u32(pairs_at) + lane * u32(8)
                best, total = f32(LOWEST), f32(0.0)
                for w in range(warps):
                    best = ptx.maximum(best, ptx.as_float(ptx.lds1(here + u32(w * 64))))
                for w in range(warps):
                    m, part_sum = load_pair(here + u32(w * 64))
                    total = f32(total + part_sum * ptx.exp2(m - best))
                store_pair(base + u32(pairs_at + warps * 64) + lane * u32(8), best, total)
        for w in range(1, warps):
            cuda.syncthreads()
            if warp == u32(w):
                add_to(tail(state), at, f0, f1, zero0, zero1, big)
        cuda.syncthreads()

    @device
    def spot(parts, worker, side):
        return ptx.address(parts) + u64(u32(worker * u32(2) + side)) * u64(part)

    @device
    def store_part(base, at, thread):
        """The block's result into its place for partial ones."""
        for i in range(thread, u32(quads), u32(threads)):
            head = u32(u32(i) // u32(dim // 4))
            v = ptx.lds4(base + u32(acc_at) + head * u32(row) + u32(u32(i) - head * u32(dim // 4)) * u32(16))
            ptx.stg4(at + u64(64) + u64(i) * u64(16), v[0], v[1], v[2], v[3])
        if thread < u32(4):
            v = ptx.lds4(base + u32(pairs_at + warps * 64) + thread * u32(16))
            ptx.stg4(at + u64(thread) * u64(16), v[0], v[1], v[2], v[3])

    @device
    def store(out, at, a0, a1, a2, a3, total):
        """Four numbers over the sum of probabilities; zeros where there was no token."""
        inverse = f32(0.0)
        if total > f32(0.0):
            inverse = ptx.divide(f32(1.0), total)
        low, high = pack(f32(a0 * inverse), f32(a1 * inverse)), pack(f32(a2 * inverse), f32(a3 * inverse))
        ptx.stg2(ptx.address(out) + u64(at) * u64(2), low, high)

    @device
    def add_part(acc, v, pair, odd, weight):
        """Online: (m, l, four numbers) and a partial result -> the same of both; ``weight`` 0 leaves it out."""
        m, total = ptx.as_float(pair[0]), ptx.as_float(pair[1])
        if odd:
            m, total = ptx.as_float(pair[2]), ptx.as_float(pair[3])
        best = ptx.maximum(acc[0], m)
        old, new = ptx.exp2(acc[0] - best), f32(ptx.exp2(m - best) * weight)
        return (
            best,
            f32(acc[1] * old + total * new),
            f32(acc[2] * old + ptx.as_float(v[0]) * new),
            f32(acc[3] * old + ptx.as_float(v[1]) * new),
            f32(acc[4] * old + ptx.as_float(v[2]) * new),
            f32(acc[5] * old + ptx.as_float(v[3]) * new),
        )

    @device
    def side_of(other, quotient, remainder, start):
        """Which of a worker's two places holds its part of the segment that starts at unit ``start``."""
        if first_unit(other, quotient, remainder) < start:
            return u32(1)
        return u32(0)

    @device
    def merge_parts(parts, first, last, quotient, remainder, start, i):
        """Quad ``i`` of all partial results of a segment, four loads at a time, always in the same order."""
        head = u32(u32(i) // u32(dim // 4))
        at, pair_at = u64(64) + u64(i) * u64(16), u64(u32(head >> u32(1)) * u32(16))
        odd = (head & u32(1)) == u32(1)
        acc = (f32(LOWEST), f32(0.0), f32(0.0), f32(0.0), f32(0.0), f32(0.0))
        other = first
        while other <= last:
            o1, o2, o3 = min(u32(other + u32(1)), last), min(u32(other + u32(2)), last), min(u32(other + u32(3)), last)
            p0 = spot(parts, other, side_of(other, quotient, remainder, start))
            p1 = spot(parts, o1, side_of(o1, quotient, remainder, start))
            p2 = spot(parts, o2, side_of(o2, quotient, remainder, start))
            p3 = spot(parts, o3, side_of(o3, quotient, remainder, start))
            m0, m1, m2, m3 = ptx.ldg4(p0 + pair_at), ptx.ldg4(p1 + pair_at), ptx.ldg4(p2 + pair_at), ptx.ldg4(p3 + pair_at)
            v0, v1, v2, v3 = ptx.ldg4(p0 + at), ptx.ldg4(p1 + at), ptx.ldg4(p2 + at), ptx.ldg4(p3 + at)
            acc = add_part(acc, v0, m0, odd, f32(1.0))
            acc = add_part(acc, v1, m1, odd, f32(1.0) if other + u32(1) <= last else f32(0.0))
            acc = add_part(acc, v2, m2, odd, f32(1.0) if other + u32(2) <= last else f32(0.0))
            acc = add_part(acc, v3, m3, odd, f32(1.0) if other + u32(3) <= last else f32(0.0))
            other = u32(other + u32(4))
        return acc

    @device
    def finish(base, out, parts, counters, index, b, head, heads, whole, start, count, side, worker, quotient, remainder,
               thread):  # fmt: skip
        """The block's result of a segment to where it belongs: out if it is the whole, else a place for partial ones;
        whoever comes last merges those."""
        kv_head = ptx.quotient(head, u32(splits))
        split = u32(head - kv_head * u32(splits))
        valid = u32(min(u32(share), u32(u32(group) - split * u32(share))))
        out_head = u32(b * ptx.quotient(heads, u32(splits)) * u32(group) + kv_head * u32(group) + split * u32(share))
        if whole:
            for i in range(thread, valid * u32(dim // 4), u32(threads)):
                k = u32(u32(i) // u32(dim // 4))
                d = u32(u32(u32(i) - k * u32(dim // 4)) * u32(4))
                v = ptx.lds4(base + u32(acc_at) + k * u32(row) + d * u32(4))
                total = ptx.as_float(ptx.lds1(base + u32(pairs_at + warps * 64) + k * u32(8) + u32(4)))
                store(out, u32(u32(out_head + k) * u32(dim) + d), ptx.as_float(v[0]), ptx.as_float(v[1]),
                      ptx.as_float(v[2]), ptx.as_float(v[3]), total)  # fmt: skip
        else:
            store_part(base, spot(parts, worker, side), thread)
            cuda.threadfence()
            cuda.syncthreads()
            first, last = worker_of(start, quotient, remainder), worker_of(u32(start + count - u32(1)), quotient, remainder)
            counter = ptx.address(counters) + u64(index) * u64(4)
            if thread == u32(0):
                ptx.sts1(base + u32(flag_at), ptx.atomic_inc(counter))
            cuda.syncthreads()
            if ptx.lds1(base + u32(flag_at)) == u32(last - first):
                cuda.threadfence()
                for i in range(thread, valid * u32(dim // 4), u32(threads)):
                    k = u32(u32(i) // u32(dim // 4))
                    d = u32(u32(u32(i) - k * u32(dim // 4)) * u32(4))
                    r = merge_parts(parts, first, last, quotient, remainder, start, u32(i))
                    store(out, u32(u32(out_head + k) * u32(dim) + d), r[2], r[3], r[4], r[5], r[1])
                if thread == u32(0):
                    ptx.stg1(counter, u32(0))  # ready for the next launch

    def kernel(query, data, tables, lengths, sequences, out, parts, counters, batch, kv_heads, pages, layer, width, window,
               scale_bits, cap_bits):  # fmt: skip
        thread = u32(cuda.threadIdx.x)
        warp, lane = u32(thread >> u32(5)), u32(thread & u32(31))
        base = u32((ptx.shared_base() + u32(127)) & u32(0xFFFFFF80))
        ring = base + warp * u32(stages * chunk)
        barrier = base + u32(barriers_at) + warp * u32(8 * stages)
        if bulk:
            if thread == u32(0):
                for s in range(warps * stages):
                    ptx.barrier_init(base + u32(barriers_at) + u32(s) * u32(8), u32(1))
                ptx.barrier_fence()
            ptx.wait_for_previous_kernel()
            ptx.allow_next_kernel()
        heads = u32(kv_heads * u32(splits))
        prepare(base, sequences, lengths, batch, heads, window, thread)
        total = ptx.lds1(base + u32(ends_at) + batch * u32(4))
        worker, workers = u32(cuda.blockIdx.x), u32(cuda.gridDim.x)
        quotient = ptx.quotient(total, workers)
        remainder = u32(total - quotient * workers)
        unit, end = first_unit(worker, quotient, remainder), first_unit(u32(worker + u32(1)), quotient, remainder)
        mine = u32(unit + warp)  # this warp's next page; every warp takes every warps-th of the block's
        ahead, ahead_b = mine, u32(0)
        b = u32(0)
        next_head = next_number = u32(0)
        if unit < end:
            b = ahead_b = sequence_of(base, unit, batch)
        for s in range(stages):
            if ahead < end:
                ahead_b = later(base, ahead, ahead_b)
                next_head, next_number = find(base, ahead, ahead_b, tables, window, width)
                fetch(u32(ring + u32(s) * u32(chunk)), u32(barrier + u32(s) * u32(8)), data, next_number, next_head, pages,
                      kv_heads, layer, lane)  # fmt: skip
            if not bulk:
                ptx.copy_commit()
            ahead = u32(ahead + u32(warps))
        if ahead < end:
            ahead_b = later(base, ahead, ahead_b)
            next_head, next_number = find(base, ahead, ahead_b, tables, window, width)
        stage = phase = side = u32(0)
        cap = ptx.as_float(cap_bits)
        while unit < end:
            b = later(base, unit, b)
            length = ptx.lds1(base + u32(lengths_at) + b * u32(4))
            first, count = page_range(length, window)
            begin = ptx.lds1(base + u32(ends_at) + b * u32(4))
            head = ptx.quotient(u32(unit - begin), count)
            start = u32(begin + head * count)
            stop = u32(min(end, u32(start + count)))
            kv_head = ptx.quotient(head, u32(splits))
            split = u32(head - kv_head * u32(splits))
            # the query's heads: lane 4 g + q holds head g, and needs the constants of heads 2 q and 2 q + 1
            g = u32(lane >> u32(2))
            own = u32(split * u32(share) + g)
            at = u64(u32(b * kv_heads + kv_head) * u32(group) + own) * u64(2 * dim)
            q, total_q, down = fragments(ptx.address(query) + at, g < u32(share) and own < u32(group), lane)
            two = u32(u32(lane & u32(3)) * u32(8))
            factor = f32(down * ptx.as_float(scale_bits))
            if not form_capped:
                factor = f32(factor * f32(LOG2E))
            f0 = ptx.as_float(u32(ptx.shuffle_from(ptx.as_int(factor), two)))
            f1 = ptx.as_float(u32(ptx.shuffle_from(ptx.as_int(factor), u32(two + u32(4)))))
            s0 = ptx.as_float(u32(ptx.shuffle_from(ptx.as_int(total_q), two)))
            s1 = ptx.as_float(u32(ptx.shuffle_from(ptx.as_int(total_q), u32(two + u32(4)))))
            oldest = u32(0)
            if window > u32(0) and length > window:
                oldest = u32(length - window)
            state = fresh()
            while mine < stop:
                here = u32(ring + stage * u32(chunk))
                if bulk:
                    ptx.barrier_wait(u32(barrier + stage * u32(8)), phase)
                else:
                    wait_stage()
                    ptx.warp_sync()
                token = u32(u32(first + u32(mine - start)) * u32(PAGE))
                state = page(state, q, here, u32(here + u32(half_chunk)), lane, token, oldest, length, f0, f1, s0, s1, cap)
                ptx.warp_sync()  # everybody has read the stage
                if ahead < end:
                    fetch(here, u32(barrier + stage * u32(8)), data, next_number, next_head, pages, kv_heads, layer, lane)
                if not bulk:
                    ptx.copy_commit()
                ahead = u32(ahead + u32(warps))
                if ahead < end:
                    ahead_b = later(base, ahead, ahead_b)
                    next_head, next_number = find(base, ahead, ahead_b, tables, window, width)
                mine = u32(mine + u32(warps))
                stage = u32(stage + u32(1))
                if stage == u32(stages):
                    stage = u32(0)
                    phase = u32(phase ^ u32(1))
            merge_warps(base, state, warp, lane, thread)
            whole = unit == start and stop == u32(start + count)
            finish(base, out, parts, counters, u32(b * heads + head), b, head, heads, whole, start, count, side, worker,
                   quotient, remainder, thread)  # fmt: skip
            cuda.syncthreads()
            unit = stop
            side = u32(1)

    form_capped = form.capped
    residents = 2 if 2 * (room.total + 1024) <= 233472 and warps <= 4 else 1
    return Program(kernel, SIGNATURE, threads, room.total, 1, bulk, residents)


VERSIONS: dict[str, Callable[..., Program]] = {"v4": v4}
