"""Decode attention on the paged KV4 cache: one new token's query against its sequence's 4-bit keys and values.

The ladder. Every version reads the same pages (`pages`) and computes ``softmax(q k^T * scale) v`` of the dequantised cache.
The first three, for reading, are in `kv4_ladder`; this is v4, for speed.

v1  one thread per query head: walks along the tokens, finds its nibbles by formula; accumulators in local memory
v2  one warp per query head, online softmax over 16 tokens at a time; lanes read whole words, codes become floats one by one
v3  two codes at a time become fp16 numbers by one logical and one fp16 operation: no conversion of integers
v4  tensor cores (mma.sync m16n8k16, fp16), scales and zeros by linearity, the query group on the n side, an equal run of
    pages for every block; codes are read as subnormal fp16 numbers. sm_80 and newer; on sm_90 pages come by bulk copies

Linearity. A cached number is ``s * (c - z)`` with a scale and zero per token, so neither meets the tensor cores. Codes enter
as ``c - 8`` (times `UNIT`), exact in fp16 and centred, which keeps the sums small (z' = z - 8)::

    score_t = scale * s_t * (sum_d (c_td - 8) q_d  -  z'_t * sum_d q_d)              K: s, z of the key
    out_d   = (sum_t w_t (c_td - 8)  -  sum_t w_t z'_t) / sum_t p_t,   w_t = p_t s_t  V: s, z of the value

w is rounded to fp16 for the tensor cores, p relative to the largest score of its page and s to the largest scale of its page
(a power of two), so w lies in [0, 2) with its largest element near 1 whatever the context's length: nothing underflows that
counts. The same rounded w multiplies codes and zeros. Every page's product is added to fp32 accumulators on its own.

Work. The flat list of (sequence, KV head, page) is cut into runs of equal work, one a block; a block's warps take pages by
turns, each through a ring of its own. What a block has of one (sequence, head) is a *segment*: its warps merge in shared
memory when it ends. That, and the next one's queries, take the time of several pages, so the list that is cut has as many
units more behind every head's pages, which nobody fetches: many short sequences do not all fall to one block. A (sequence,
head) that several blocks share is merged by whichever comes last, always in the order of blocks, so results repeat bit for
bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from numba import cuda, types

from . import ptx
from .gemm import first_unit, worker_of
from .launch import Program
from .pages import ChunkLayout
from .ptx import device, f32, i32, u32, u64

#: query, pool of one layer, page tables, lengths of that layer, sequences, out, log-sum-exp, partial results, their
#: counters; sequences, KV heads, pages of a table's row, window (0: none), bits of the scale and of the soft cap (fp32)
SIGNATURE = tuple(
    types.Array(t, 1, "C") for t in (types.uint16, ptx.u8, u32, u32, u32, types.uint16, f32, ptx.u8, u32)
) + (u32,) * 6  # fmt: skip
#: Below every score, and its difference to any finite one is far below what exp2 rounds to 0.
LOWEST = -1e30
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
#: What v4's tensor cores see as 1 of a code; as a pair of fp16 numbers; the exponent to add to what it is multiplied by.
UNIT, UNIT_PAIR, UNIT_BITS = 2.0**-9, 0x18001800, 9 << 23
#: How many partial results are fetched at a time when a head's blocks are merged.
BATCH = 16


@dataclass(frozen=True)
class Form:
    """What a kernel is compiled for: ``group`` query heads share a KV head (1..16); ``bfloat``: query and result in bf16
    instead of fp16; ``softcap``: scores pass ``cap * tanh(score / cap)``; ``lse``: scores' log-sum-exp is a result too;
    ``bits`` of a number in the cache; ``settled``: see `attention.kv4_attention`."""

    head_dim: int
    group: int
    page_size: int = 64
    bfloat: bool = False
    softcap: bool = False
    lse: bool = False
    bits: int = 4
    settled: bool = False

    @property
    def layout(self) -> ChunkLayout:
        """Where a page's numbers lie."""
        return ChunkLayout(self.head_dim, self.page_size, self.bits)

    @property
    def tiles(self) -> int:
        """Tiles of 8 queries on the n side."""
        return -(-self.group // 8)

    @property
    def row(self) -> int:
        """Bytes of a query's partial result: ``head_dim`` numbers, largest score, sum of weights, two unused."""
        return 4 * (self.head_dim + 4)


def spanner(form: Form) -> Callable:
    """Device function: (length, first token, first page, number of pages) of what a sequence attends to."""
    shift, last = form.page_size.bit_length() - 1, form.page_size - 1

    @device
    def span(lengths, slot, window):
        length, first = ptx.ldg1(ptx.address(lengths) + u64(slot) * u64(4)), u32(0)
        if window > u32(0) and length > window:
            first = u32(length - window)
        first_page = u32(first >> u32(shift))
        return length, first, first_page, u32((u32(length + u32(last)) >> u32(shift)) - first_page)

    return span


def capper(form: Form) -> Callable:
    """Device function: score in units of the exponent of 2, from the dot product times the scale of its key.

    ``scale``: softmax scale times log2(e); with a soft cap softmax scale times 2 log2(e) / cap, so that exp2 gives
    ``exp(2 score / cap)``, and ``cap``: soft cap times log2(e).
    """
    capped = form.softcap

    @device
    def finish(product, scale, cap):
        x = product * scale
        if capped:
            # tanh(x) = 1 - 2 / (1 + exp(2 x)); the exponential may be infinite or 0
            x = cap * (f32(1.0) - ptx.divide(f32(2.0), f32(1.0) + ptx.exp2(x)))
        return x

    return finish


@device
def exchange(value, mask):
    """A float of the lane whose number differs in the bits of the mask."""
    return ptx.as_float(u32(ptx.shuffle_xor(ptx.as_int(value), u32(mask))))


@device
def word_of(value):
    return u32(ptx.as_int(value))


@device
def natural(largest, total):
    """Log-sum-exp of scores in units of the exponent of 2, of which the largest and the sum relative to it are known."""
    return f32(LN_2) * (largest + ptx.log2(total))


@device
def shared_float(at):
    return ptx.as_float(ptx.lds1(at))


@device
def centred(word):
    """The 8 codes of a word, 8 less each, times `UNIT`, as four fp16 pairs: nibbles 0 and 4, 1 and 5, 2 and 6, 3 and 7.

    A nibble alone is an fp16 number as it stands, the subnormal c * 2**-24, or c * 2**-20 four bits further up. One fused
    multiplication by 2**15, the largest power that fp16 has, or 2**11 makes both c * 2**-9 and takes 8 * 2**-9 off, exactly.
    An exponent put in, as in v3, would be a second constant of a logical operation: there is room for one, so a register
    would have to be filled every time.
    """
    low, high = u32(0x000F000F), u32(0x00F000F0)
    x = u32(word >> u32(8))
    first, second, minus = u32(0x78007800), u32(0x68006800), u32(0xA400A400)  # 2**15, 2**11, -8 * 2**-9
    return (
        ptx.fuse_pair(u32(word & low), first, minus),
        ptx.fuse_pair(u32(word & high), second, minus),
        ptx.fuse_pair(u32(x & low), first, minus),
        ptx.fuse_pair(u32(x & high), second, minus),
    )


# -- v4: tensor cores -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ring:
    """Where v4 keeps what in shared memory."""

    form: Form
    warps: int
    stages: int

    @property
    def parts(self) -> int:
        """Offset of the warps' partial results."""
        return self.warps * self.stages * self.form.layout.bytes

    @property
    def barriers(self) -> int:
        """Offset of a barrier for every stage, then of a few words: sums of the warps, where the run starts and ends, a
        flag."""
        return self.parts + self.warps * self.form.group * self.form.row

    @property
    def words(self) -> int:
        """Offset of those words."""
        return self.barriers + 8 * self.warps * self.stages

    @property
    def total(self) -> int:
        """Bytes to ask for; 128 of them to align the rest."""
        return self.words + 4 * (2 * self.warps + 6) + 128


def v4(
    form: Form, warps: int, stages: int, bulk: bool, overlap: bool = False, weight: int = 0, residents: int = 1
) -> Program:
    """``warps`` in a block, ``stages`` pages on their way to each; ``bulk``: by bulk copies (sm_90); ``overlap``: start
    while the previous kernel of the stream ends, and wait for it inside (sm_90); ``weight``: pages that a segment counts for
    beside its own, where runs are at least as long; ``residents``: blocks for which a multiprocessor has registers."""
    layout, ring = form.layout, Ring(form, warps, stages)
    d, size, group, tiles, row_bytes = form.head_dim, form.page_size, form.group, form.tiles, form.row
    chunk_bytes, codes_bytes, key_pairs, value_pairs = layout.bytes, layout.codes, layout.scales, layout.value_scales
    parts_at, barriers_at, words_at = ring.parts, ring.barriers, ring.words
    token_tiles, steps, vectors, threads = size // 16, d // 16, d // 64, 32 * warps
    quads, bfloat, leaves_lse, shift = d // 4, form.bfloat, form.lse, size.bit_length() - 1
    late = overlap and form.settled  # pages are on their way before the previous kernel has ended
    span, finish, wait_oldest = spanner(form), capper(form), ptx.copy_wait(stages - 1)
    pack = ptx.pack_bfloat if bfloat else ptx.pack_half
    # registers of a thread, as arrays whose indices the compiler knows
    query_words, columns, rows, dot_words = tiles * 2 * steps, 2 * tiles, 2 * token_tiles, 4 * tiles
    at_once = 4 // tiles  # blocks of 16 channels whose sums over a page are open at a time
    acc_words, product_words, batch_words = tiles * 4 * steps, tiles * 4 * at_once, 4 * BATCH
    score_words, weight_words = tiles * 4 * token_tiles, tiles * 2 * token_tiles

    @device
    def prepare(barriers, lane):
        """The barriers of a warp's stages."""
        if lane == u32(0):
            for s in range(stages):
                ptx.barrier_init(barriers + u32(8 * s), u32(1))
            ptx.barrier_fence()

    @device
    def issue(pool, page, head, kv_heads, to, barrier, lane):
        """Start to fetch a chunk."""
        source = ptx.address(pool) + (u64(page) * u64(kv_heads) + u64(head)) * u64(chunk_bytes)
        if bulk:
            if lane == u32(0):
                ptx.barrier_expect(barrier, u32(chunk_bytes))
                ptx.bulk_load(to, source, u32(chunk_bytes), barrier)
        else:
            for i in range(lane, u32(chunk_bytes // 16), u32(32)):
                ptx.copy_async(to + u32(i) * u32(16), source + u64(i) * u64(16))
            ptx.copy_commit()

    @device
    def where(sequence, lengths, slots, window, width):
        """(pages that a sequence attends to, index of the first one's entry in the page tables)."""
        slot = ptx.ldg1(ptx.address(slots) + u64(sequence) * u64(4))
        _, _, first_page, count = span(lengths, slot, window)
        return count, u32(u32(slot * width) + first_page)

    @device
    def skip(sequence, head, page, count, line, by, lengths, slots, window, width, kv_heads):
        """Go ``by`` units on in the flat list: (sequence, head, page of what it attends to, number of these, its line)."""
        page = u32(page + by)
        while page >= count:
            page = u32(page - count)
            head = u32(head + u32(1))
            if head == kv_heads:
                head, sequence = u32(0), u32(sequence + u32(1))
                count, line = where(sequence, lengths, slots, window, width)
        return sequence, head, page, count, line

    @device
    def locate(rest, sequence, extra, lengths, slots, window, kv_heads):
        """(sequence, head, page of it, pages before it) ``rest`` units after the first of ``sequence``; the page may be one
        of the ``extra`` ones that the head does not have."""
        before = u32(0)
        pages = span(lengths, ptx.ldg1(ptx.address(slots) + u64(sequence) * u64(4)), window)[3]
        while pages == u32(0) or rest >= u32(pages + extra) * kv_heads:
            if pages > u32(0):
                rest, before = u32(rest - u32(pages + extra) * kv_heads), u32(before + pages * kv_heads)
            sequence = u32(sequence + u32(1))
            pages = span(lengths, ptx.ldg1(ptx.address(slots) + u64(sequence) * u64(4)), window)[3]
        head = ptx.quotient(rest, u32(pages + extra))
        page = u32(rest - head * u32(pages + extra))
        return sequence, head, page, u32(before + u32(head * pages + min(page, pages)))

    @device
    def number(tables, line, page):
        """Number of a page in the pool."""
        return ptx.ldg1(ptx.address(tables) + u64(u32(line + page)) * u64(4))

    @device
    def multiply_keys(word, step, queries, scores):
        a = centred(word)
        for n in range(tiles):
            b = (n * steps + step) * 2
            c = ptx.mma_half(
                scores[4 * n], scores[4 * n + 1], scores[4 * n + 2], scores[4 * n + 3],
                a[0], a[2], a[1], a[3], queries[b], queries[b + 1],
            )  # fmt: skip
            scores[4 * n], scores[4 * n + 1], scores[4 * n + 2], scores[4 * n + 3] = c[0], c[1], c[2], c[3]

    @device
    def multiply_values(word, j, t, weights, sums):
        a = centred(word)
        for n in range(tiles):
            b, s = (n * token_tiles + t) * 2, (n * at_once + j) * 4
            c = ptx.mma_half(
                sums[s], sums[s + 1], sums[s + 2], sums[s + 3], a[0], a[1], a[2], a[3], weights[b], weights[b + 1]
            )
            sums[s], sums[s + 1], sums[s + 2], sums[s + 3] = c[0], c[1], c[2], c[3]

    @device
    def load_queries(query, first_row, lane, queries, sums):
        """The B operand of all steps, and every query's sum; returns the power of two that it was divided by."""
        g, q = u32(lane >> u32(2)), u32(lane & u32(3))
        for n in range(tiles):
            r = u32(u32(n * 8) + g)
            for s in range(2 * steps):
                word = u32(0)
                if r < u32(group):
                    at = (u64(first_row + r) * u64(d // 2) + u64(u32(s * 4) + q)) * u64(4)
                    word = ptx.ldg1(ptx.address(query) + at)
                queries[n * 2 * steps + s] = word
        undo = f32(1.0)
        if bfloat:
            largest = f32(0.0)
            for i in range(tiles * 2 * steps):
                x = ptx.unpack_bfloat(queries[i])
                largest = ptx.maximum(largest, ptx.maximum(ptx.absolute(x[0]), ptx.absolute(x[1])))
            for b in range(5):
                largest = ptx.maximum(largest, exchange(largest, 1 << b))
            # fp16 holds the significand of bf16; a power of two brings the largest to 2**14 or a little more
            exponent = max(u32(word_of(largest) >> u32(23)), u32(15))
            exponent = min(exponent, u32(253))
            undo = ptx.as_float(u32(u32(exponent - u32(14)) << u32(23)))
            factor = ptx.as_float(u32(u32(u32(254 + 14) - exponent) << u32(23)))
            for i in range(tiles * 2 * steps):
                x = ptx.unpack_bfloat(queries[i])
                queries[i] = ptx.pack_half(x[0] * factor, x[1] * factor)
        one = u32(UNIT_PAIR)
        for n in range(tiles):
            c0 = c1 = c2 = c3 = f32(0.0)
            for s in range(steps):
                b = (n * steps + s) * 2
                c0, c1, c2, c3 = ptx.mma_half(c0, c1, c2, c3, one, one, one, one, queries[b], queries[b + 1])
            sums[2 * n], sums[2 * n + 1] = c0, c1
        return undo

    @device
    def merge_rows(quad, row, first, last, partials, quotient, remainder, head_first, extra):
        """Sum of a row's four numbers over the blocks ``first .. last``, fetched `BATCH` at a time, in their order."""
        largest, total = f32(LOWEST), f32(0.0)
        o0 = o1 = o2 = o3 = f32(0.0)
        ms, ls = cuda.local.array(BATCH, f32), cuda.local.array(BATCH, f32)
        fours = cuda.local.array(batch_words, f32)
        start = first
        while start <= last:
            for j in range(BATCH):
                other = min(u32(start + u32(j)), last)
                side = u32(0)
                if first_unit(other, quotient, remainder) + extra < head_first:
                    side = u32(1)  # their run began with the pages of another head, so it is their last segment of two
                spot = u64(u32(u32(other * u32(2) + side) * u32(group) + row)) * u64(row_bytes)
                at = ptx.address(partials) + spot
                v, w = ptx.ldg4(at + u64(quad * u32(16))), ptx.ldg4(at + u64(4 * d))
                fours[4 * j], fours[4 * j + 1] = ptx.as_float(v[0]), ptx.as_float(v[1])
                fours[4 * j + 2], fours[4 * j + 3] = ptx.as_float(v[2]), ptx.as_float(v[3])
                ms[j], ls[j] = ptx.as_float(w[0]), ptx.as_float(w[1])
            before = largest
            for j in range(BATCH):
                largest = ptx.maximum(largest, ms[j])
            f = ptx.exp2(before - largest)
            total, o0, o1, o2, o3 = total * f, o0 * f, o1 * f, o2 * f, o3 * f
            for j in range(BATCH):
                f = f32(0.0)
                if u32(start + u32(j)) <= last:
                    f = ptx.exp2(ms[j] - largest)
                total = ptx.fuse(f, ls[j], total)
                o0, o1 = ptx.fuse(f, fours[4 * j], o0), ptx.fuse(f, fours[4 * j + 1], o1)
                o2, o3 = ptx.fuse(f, fours[4 * j + 2], o2), ptx.fuse(f, fours[4 * j + 3], o3)
            start = u32(start + u32(BATCH))
        return o0, o1, o2, o3, total, largest

    @device
    def write_row(out, lse, row, quad, total, o0, o1, o2, o3, largest):
        """Four numbers of a query's result; once a query the log-sum-exp of its scores."""
        at, f = ptx.address(out) + (u64(row) * u64(d) + u64(quad * u32(4))) * u64(2), ptx.divide(f32(1.0), total)
        ptx.stg1(at, pack(o0 * f, o1 * f))
        ptx.stg1(at + u64(4), pack(o2 * f, o3 * f))
        if leaves_lse and quad == u32(0):
            ptx.stg1(ptx.address(lse) + u64(row) * u64(4), word_of(natural(largest, total)))

    @device
    def clear(lengths, slots, out, lse, batch, kv_heads, window):
        """Zeros for sequences without tokens, one after the other by all threads of one block each."""
        rows = u32(kv_heads * u32(group))
        for b in range(u32(cuda.blockIdx.x), batch, u32(cuda.gridDim.x)):
            if span(lengths, ptx.ldg1(ptx.address(slots) + u64(b) * u64(4)), window)[3] == u32(0):
                first = ptx.address(out) + u64(b) * u64(rows) * u64(2 * d)
                for item in range(u32(cuda.threadIdx.x), u32(rows * u32(d // 8)), u32(threads)):
                    ptx.stg4(first + u64(item) * u64(16), u32(0), u32(0), u32(0), u32(0))
                if leaves_lse:
                    first = ptx.address(lse) + u64(b) * u64(rows) * u64(4)
                    for item in range(u32(cuda.threadIdx.x), rows, u32(threads)):
                        ptx.stg1(first + u64(item) * u64(4), u32(0xFF800000))  # -inf

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
        thread, worker = u32(cuda.threadIdx.x), u32(cuda.blockIdx.x)
        warp, lane = u32(thread >> u32(5)), u32(thread & u32(31))
        g, q = u32(lane >> u32(2)), u32(lane & u32(3))
        base = u32((ptx.shared_base() + u32(127)) & u32(0xFFFFFF80))
        words, buffers = base + u32(words_at), base + u32(warp * u32(stages * chunk_bytes))
        barriers = base + u32(barriers_at) + u32(warp * u32(8 * stages))
        if bulk:
            prepare(barriers, lane)
        if overlap and not late:
            ptx.wait_for_previous_kernel()
            ptx.allow_next_kernel()
        # how many pages there are, and where this block's run of them starts
        some = ptx.quotient(u32(batch + u32(threads - 1)), u32(threads))
        from_, to_ = u32(thread * some), min(batch, u32(u32(thread + u32(1)) * some))
        count = filled = u32(0)
        for b in range(from_, to_):
            slot = ptx.ldg1(ptx.address(slots) + u64(b) * u64(4))
            pages = span(lengths, slot, window)[3]
            count = u32(count + pages)
            if pages > u32(0):
                filled = u32(filled + u32(1))
        inclusive, filled_inclusive = count, filled
        for k in range(5):
            other, another = ptx.shuffle_up(i32(inclusive), u32(1 << k)), ptx.shuffle_up(i32(filled_inclusive), u32(1 << k))
            if lane >= u32(1 << k):
                inclusive, filled_inclusive = u32(inclusive + u32(other)), u32(filled_inclusive + u32(another))
        if lane == u32(31):
            ptx.sts1(words + u32(warp * u32(8)), inclusive)
            ptx.sts1(words + u32(warp * u32(8)) + u32(4), filled_inclusive)
        cuda.syncthreads()
        total = filled_total = u32(0)
        for w in range(warps):
            two = ptx.lds2(words + u32(8 * w))
            if u32(w) < warp:
                inclusive, filled_inclusive = u32(inclusive + two[0]), u32(filled_inclusive + two[1])
            total, filled_total = u32(total + two[0]), u32(filled_total + two[1])
        pages_all = u32(total * kv_heads)
        workers = min(u32(cuda.gridDim.x), max(u32(1), ptx.quotient(u32(pages_all + u32(warps - 1)), u32(warps))))
        extra = u32(0)
        if pages_all >= workers * u32(weight):
            extra = u32(weight)  # shorter runs are cut so that all warps have equally many pages
        units = u32(pages_all + u32(filled_total * kv_heads) * extra)
        quotient = ptx.quotient(units, workers)
        remainder = u32(units - quotient * workers)
        unit, end = u32(0), u32(0)
        if worker < workers:
            below = u32(u32(inclusive - count) * kv_heads)
            below_units = u32(below + u32(u32(filled_inclusive - filled) * kv_heads) * extra)
            above_units = u32(u32(inclusive + filled_inclusive * extra) * kv_heads)
            for edge in range(2):
                target = first_unit(u32(worker + u32(edge)), quotient, remainder)
                if (edge == 0 or extra > u32(0)) and below_units <= target and target < above_units:
                    sequence, head, page, before = locate(
                        u32(target - below_units), from_, extra, lengths, slots, window, kv_heads
                    )
                    to = words + u32(8 * warps + 4 * edge)
                    ptx.sts1(to, u32(below + before))
                    if edge == 0:
                        ptx.sts1(to + u32(8), sequence)
                        ptx.sts1(to + u32(12), head)
                        ptx.sts1(to + u32(16), page)
            cuda.syncthreads()
            unit, end = ptx.lds1(words + u32(8 * warps)), first_unit(u32(worker + u32(1)), quotient, remainder)
            if end == units:
                end = pages_all
            elif extra > u32(0):
                end = ptx.lds1(words + u32(8 * warps + 4))
        if unit < end:
            sequence, head = ptx.lds1(words + u32(8 * warps + 8)), ptx.lds1(words + u32(8 * warps + 12))
            page = ptx.lds1(words + u32(8 * warps + 16))
            pages, line = where(sequence, lengths, slots, window, width)
            origin = u32(first_unit(worker, quotient, remainder) - page)  # of the head, in units
            if page >= pages:
                # the run starts behind the head's pages
                origin = u32(origin + u32(pages + extra))
                sequence, head, page, pages, line = skip(
                    sequence, head, pages, pages, line, u32(0), lengths, slots, window, width, kv_heads
                )
            # what this warp fetches next
            mine = ahead = u32(unit + warp)
            sequence_a, head_a, page_a, pages_a, line_a, number_a = sequence, head, page, pages, line, u32(0)
            if ahead < end:
                sequence_a, head_a, page_a, pages_a, line_a = skip(
                    sequence_a, head_a, page_a, pages_a, line_a, warp, lengths, slots, window, width, kv_heads
                )
                number_a = number(tables, line_a, page_a)
            for s in range(stages):
                if ahead < end:
                    to = buffers + u32(s * chunk_bytes)
                    issue(pool, number_a, head_a, kv_heads, to, barriers + u32(8 * s), lane)
                    ahead = u32(ahead + u32(warps))
                    if ahead < end:
                        sequence_a, head_a, page_a, pages_a, line_a = skip(
                            sequence_a, head_a, page_a, pages_a, line_a, u32(warps), lengths, slots, window, width, kv_heads
                        )
                        number_a = number(tables, line_a, page_a)
                elif not bulk:
                    ptx.copy_commit()
        if late:
            ptx.wait_for_previous_kernel()
            ptx.allow_next_kernel()
        if filled_total < batch:
            clear(lengths, slots, out, lse, batch, kv_heads, window)  # while the first pages come
        stage = phase = side = u32(0)
        scale_given, cap = ptx.as_float(scale_bits), ptx.as_float(cap_bits)
        queries, sums = cuda.local.array(query_words, u32), cuda.local.array(columns, f32)
        acc, products = cuda.local.array(acc_words, f32), cuda.local.array(product_words, f32)
        scores, dots = cuda.local.array(score_words, f32), cuda.local.array(dot_words, f32)
        weights = cuda.local.array(weight_words, u32)
        largest, totals = cuda.local.array(columns, f32), cuda.local.array(columns, f32)
        zeros = cuda.local.array(columns, f32)
        value_scales, value_zeros = (
            cuda.local.array(rows, f32),
            cuda.local.array(rows, f32),
        )
        while unit < end:
            slot = ptx.ldg1(ptx.address(slots) + u64(sequence) * u64(4))
            length, first, first_page, pages = span(lengths, slot, window)
            stop = min(end, u32(unit + u32(pages - page)))
            row = u32(u32(sequence * kv_heads + head) * u32(group))
            scale = scale_given * load_queries(query, row, lane, queries, sums) * f32(1 / UNIT)
            for i in range(tiles * 4 * steps):
                acc[i] = f32(0.0)
            for i in range(2 * tiles):
                largest[i], totals[i], zeros[i] = f32(LOWEST), f32(0.0), f32(0.0)
            while mine < stop:
                at = buffers + stage * u32(chunk_bytes)
                if bulk:
                    ptx.barrier_wait(barriers + stage * u32(8), phase)
                else:
                    wait_oldest()
                    ptx.warp_barrier()
                token = u32(u32(first_page + u32(page + u32(mine - unit))) << u32(shift))
                # scores of the page: tokens g and g + 8 of every 16, queries 2 q and 2 q + 1 of every 8
                for t in range(token_tiles):
                    for i in range(4 * tiles):
                        dots[i] = f32(0.0)
                    for v in range(vectors):
                        c = ptx.lds4(at + u32((t * vectors + v) * 512) + lane * u32(16))
                        multiply_keys(c[0], 4 * v, queries, dots)
                        multiply_keys(c[1], 4 * v + 1, queries, dots)
                        multiply_keys(c[2], 4 * v + 2, queries, dots)
                        multiply_keys(c[3], 4 * v + 3, queries, dots)
                    pair = at + u32(key_pairs + t * 64) + g * u32(4)
                    k0, k1 = ptx.unpack_half(ptx.lds1(pair)), ptx.unpack_half(ptx.lds1(pair + u32(32)))
                    s0, z0, s1, z1 = k0[0], f32(8.0) - k0[1], k1[0], f32(8.0) - k1[1]
                    for n in range(tiles):
                        i = (n * token_tiles + t) * 4
                        scores[i] = finish(ptx.fuse(z0, sums[2 * n], dots[4 * n]) * s0, scale, cap)
                        scores[i + 1] = finish(ptx.fuse(z0, sums[2 * n + 1], dots[4 * n + 1]) * s0, scale, cap)
                        scores[i + 2] = finish(ptx.fuse(z1, sums[2 * n], dots[4 * n + 2]) * s1, scale, cap)
                        scores[i + 3] = finish(ptx.fuse(z1, sums[2 * n + 1], dots[4 * n + 3]) * s1, scale, cap)
                    pair = at + u32(value_pairs + t * 64) + g * u32(4)
                    k0, k1 = ptx.unpack_half(ptx.lds1(pair)), ptx.unpack_half(ptx.lds1(pair + u32(32)))
                    value_scales[2 * t], value_zeros[2 * t] = k0[0], ptx.fuse(k0[1], f32(UNIT), f32(-8 * UNIT))
                    value_scales[2 * t + 1], value_zeros[2 * t + 1] = k1[0], ptx.fuse(k1[1], f32(UNIT), f32(-8 * UNIT))
                if token < first or u32(token + u32(size)) > length:
                    # beyond the ends a page may hold anything, NaN too
                    for t in range(token_tiles):
                        for h in range(2):
                            other = u32(token + u32(16 * t + 8 * h) + g)
                            if other < first or other >= length:
                                value_scales[2 * t + h] = value_zeros[2 * t + h] = f32(0.0)
                                for n in range(tiles):
                                    i = (n * token_tiles + t) * 4 + 2 * h
                                    scores[i] = scores[i + 1] = f32(LOWEST)
                top = value_scales[0]
                for i in range(1, 2 * token_tiles):
                    top = ptx.maximum(top, value_scales[i])
                for k in range(2, 5):
                    top = ptx.maximum(top, exchange(top, 1 << k))
                power = u32(word_of(top) & u32(0x7F800000))  # scales of the page are below twice this power of two
                back, normal = ptx.as_float(u32(power + u32(UNIT_BITS))), ptx.as_float(u32(u32(254 << 23) - power))
                for n in range(tiles):
                    i = n * token_tiles * 4
                    m0, m1 = scores[i], scores[i + 1]
                    for t in range(token_tiles):
                        j = i + 4 * t
                        m0, m1 = ptx.maximum(m0, scores[j]), ptx.maximum(m1, scores[j + 1])
                        m0, m1 = ptx.maximum(m0, scores[j + 2]), ptx.maximum(m1, scores[j + 3])
                    for k in range(2, 5):
                        m0, m1 = ptx.maximum(m0, exchange(m0, 1 << k)), ptx.maximum(m1, exchange(m1, 1 << k))
                    l0 = l1 = z0 = z1 = f32(0.0)
                    for t in range(token_tiles):
                        j = i + 4 * t
                        p0, p1 = ptx.exp2(scores[j] - m0), ptx.exp2(scores[j + 1] - m1)
                        p2, p3 = ptx.exp2(scores[j + 2] - m0), ptx.exp2(scores[j + 3] - m1)
                        l0, l1 = l0 + (p0 + p2), l1 + (p1 + p3)
                        s0, s1 = value_scales[2 * t] * normal, value_scales[2 * t + 1] * normal
                        low, high = ptx.pack_half(p0 * s0, p1 * s0), ptx.pack_half(p2 * s1, p3 * s1)
                        w0, w1 = ptx.unpack_half(low), ptx.unpack_half(high)
                        z0 = ptx.fuse(w0[0], value_zeros[2 * t], ptx.fuse(w1[0], value_zeros[2 * t + 1], z0))
                        z1 = ptx.fuse(w0[1], value_zeros[2 * t], ptx.fuse(w1[1], value_zeros[2 * t + 1], z1))
                        k = (n * token_tiles + t) * 2
                        weights[k], weights[k + 1] = ptx.transpose8(low), ptx.transpose8(high)
                    new0, new1 = ptx.maximum(largest[2 * n], m0), ptx.maximum(largest[2 * n + 1], m1)
                    f0, f1 = ptx.exp2(largest[2 * n] - new0), ptx.exp2(largest[2 * n + 1] - new1)
                    g0, g1 = ptx.exp2(m0 - new0), ptx.exp2(m1 - new1)
                    largest[2 * n], largest[2 * n + 1] = new0, new1
                    totals[2 * n] = ptx.fuse(totals[2 * n], f0, l0 * g0)
                    totals[2 * n + 1] = ptx.fuse(totals[2 * n + 1], f1, l1 * g1)
                    g0, g1 = g0 * back, g1 * back
                    zeros[2 * n] = ptx.fuse(zeros[2 * n], f0, z0 * g0)
                    zeros[2 * n + 1] = ptx.fuse(zeros[2 * n + 1], f1, z1 * g1)
                    # kept for the accumulators below
                    dots[4 * n], dots[4 * n + 1], dots[4 * n + 2], dots[4 * n + 3] = f0, f1, g0, g1
                for v in range(steps // at_once):
                    for i in range(product_words):
                        products[i] = f32(0.0)
                    for t in range(token_tiles):
                        values = at + u32(codes_bytes + (t * vectors + v * at_once // 4) * 512) + lane * u32(16)
                        if tiles == 1:
                            c = ptx.lds4(values)
                            multiply_values(c[0], 0, t, weights, products)
                            multiply_values(c[1], 1, t, weights, products)
                            multiply_values(c[2], 2, t, weights, products)
                            multiply_values(c[3], 3, t, weights, products)
                        else:
                            two = ptx.lds2(values + u32(v % 2 * 8))
                            multiply_values(two[0], 0, t, weights, products)
                            multiply_values(two[1], 1, t, weights, products)
                    for n in range(tiles):
                        f0, f1, g0, g1 = dots[4 * n], dots[4 * n + 1], dots[4 * n + 2], dots[4 * n + 3]
                        for j in range(at_once):
                            i, k = (n * steps + at_once * v + j) * 4, (n * at_once + j) * 4
                            acc[i] = ptx.fuse(acc[i], f0, products[k] * g0)
                            acc[i + 1] = ptx.fuse(acc[i + 1], f1, products[k + 1] * g1)
                            acc[i + 2] = ptx.fuse(acc[i + 2], f0, products[k + 2] * g0)
                            acc[i + 3] = ptx.fuse(acc[i + 3], f1, products[k + 3] * g1)
                ptx.warp_barrier()  # everybody has read the stage
                if ahead < end:
                    issue(pool, number_a, head_a, kv_heads, at, barriers + stage * u32(8), lane)
                    ahead = u32(ahead + u32(warps))
                    if ahead < end:
                        sequence_a, head_a, page_a, pages_a, line_a = skip(
                            sequence_a,
                            head_a,
                            page_a,
                            pages_a,
                            line_a,
                            u32(warps),
                            lengths,
                            slots,
                            window,
                            width,
                            kv_heads,
                        )
                        number_a = number(tables, line_a, page_a)
                elif not bulk:
                    ptx.copy_commit()
                mine = u32(mine + u32(warps))
                stage = u32(stage + u32(1))
                if stage == u32(stages):
                    stage, phase = u32(0), u32(phase ^ u32(1))
            # the segment ends: every warp leaves its rows in shared memory
            part = base + u32(parts_at) + u32(warp * u32(group * row_bytes))
            for n in range(tiles):
                for h in range(2):
                    mass, z = totals[2 * n + h], zeros[2 * n + h]
                    for k in range(2, 5):
                        mass, z = mass + exchange(mass, 1 << k), z + exchange(z, 1 << k)
                    r = u32(u32(8 * n + h) + q * u32(2))
                    if r < u32(group):
                        to = part + r * u32(row_bytes)
                        for j in range(steps):
                            i = (n * steps + j) * 4 + h
                            ptx.sts1(to + u32(64 * j) + g * u32(4), word_of(acc[i] - z))
                            ptx.sts1(to + u32(64 * j + 32) + g * u32(4), word_of(acc[i + 2] - z))
                        if g == u32(0):
                            ptx.sts1(to + u32(4 * d), word_of(largest[2 * n + h]))
                            ptx.sts1(to + u32(4 * d + 4), word_of(mass))
            cuda.syncthreads()
            whole = u32(stop - unit) == pages
            for item in range(thread, u32(group * quads), u32(threads)):
                r, quad = u32(u32(item) // u32(quads)), u32(u32(item) % u32(quads))
                place = base + u32(parts_at) + r * u32(row_bytes)
                top = f32(LOWEST)
                for w in range(warps):
                    top = ptx.maximum(top, shared_float(place + u32(w * group * row_bytes + 4 * d)))
                mass = o0 = o1 = o2 = o3 = f32(0.0)
                for w in range(warps):
                    theirs = place + u32(w * group * row_bytes)
                    f = ptx.exp2(shared_float(theirs + u32(4 * d)) - top)
                    mass = ptx.fuse(f, shared_float(theirs + u32(4 * d + 4)), mass)
                    four = ptx.lds4(theirs + quad * u32(16))
                    o0, o1 = ptx.fuse(f, ptx.as_float(four[0]), o0), ptx.fuse(f, ptx.as_float(four[1]), o1)
                    o2, o3 = ptx.fuse(f, ptx.as_float(four[2]), o2), ptx.fuse(f, ptx.as_float(four[3]), o3)
                if whole:
                    write_row(out, lse, u32(row + r), quad, mass, o0, o1, o2, o3, top)
                else:
                    spot = u64(u32(u32(worker * u32(2) + side) * u32(group) + r)) * u64(row_bytes)
                    to_part = ptx.address(partials) + spot
                    ptx.stg4(to_part + u64(quad * u32(16)), word_of(o0), word_of(o1), word_of(o2), word_of(o3))
                    if quad == u32(0):
                        ptx.stg4(to_part + u64(4 * d), word_of(top), word_of(mass), u32(0), u32(0))
            if not whole:
                cuda.syncthreads()
                first_worker = worker_of(origin, quotient, remainder)
                last_worker = worker_of(u32(origin + u32(pages - u32(1))), quotient, remainder)
                counter = ptx.address(counters) + u64(u32(sequence * kv_heads + head)) * u64(4)
                flag = words + u32(8 * warps + 20)
                if thread == u32(0):
                    # released and acquired for the whole block: barriers on both sides
                    ptx.sts1(flag, ptx.atomic_inc(counter))
                cuda.syncthreads()
                if ptx.lds1(flag) == u32(last_worker - first_worker):
                    for item in range(thread, u32(group * quads), u32(threads)):
                        r, quad = u32(u32(item) // u32(quads)), u32(u32(item) % u32(quads))
                        o0, o1, o2, o3, mass, top = merge_rows(
                            quad, r, first_worker, last_worker, partials, quotient, remainder, origin, extra
                        )
                        write_row(out, lse, u32(row + r), quad, mass, o0, o1, o2, o3, top)
                    if thread == u32(0):
                        ptx.stg1(counter, u32(0))  # ready for the next launch
            cuda.syncthreads()  # the rows and the flag may be written again
            unit, page, side, origin = stop, u32(0), u32(1), u32(origin + u32(pages + extra))
            if unit < end:
                sequence, head, page, pages, line = skip(
                    sequence, head, u32(pages - u32(1)), pages, line, u32(1), lengths, slots, window, width, kv_heads
                )

    return Program(kernel, SIGNATURE, threads, ring.total, overlap=overlap, residents=residents)
