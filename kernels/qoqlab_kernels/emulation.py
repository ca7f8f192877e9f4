"""The instructions of `ptx` in plain Python, for numba's CUDA simulator as `simulation` runs it.

Instructions of one thread read and write the block's memory at once; instructions of a warp meet: the last of its 32 threads
computes all results. What hardware would leave undefined (memory outside every array, a bulk copy of a wrong size, a barrier
nobody will complete) is an error here; shared memory that nobody wrote holds a pattern that spoils results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from greenlet import getcurrent

from .simulation import SHARED_BASE, Barrier, Block
from .simulation import block as _block
from .simulation import warp as _warp

#: Where the shared memory of a cluster's blocks lies for each other: block r's at ``(r + 1) * WINDOW``.
WINDOW = 1 << 24


def nothing(*_: Any) -> None:
    """An instruction without an effect that a program could see."""


# -- addresses and plain memory -------------------------------------------------------------------------------------------


def address(array: Any) -> np.uint64:
    data = array._item._ary if hasattr(array, "_item") else array
    block, start = _block(), data.ctypes.data
    if all(start != known for known, _ in block.arrays):
        block.arrays.append((start, data.reshape(-1).view(np.uint8)))
    return np.uint64(start)


def shared_base() -> np.uint32:
    return np.uint32(SHARED_BASE)


def _load(view: np.ndarray) -> tuple:
    return tuple(view.view(np.uint32))


def lds1(at: int) -> np.uint32:
    return _load(_block().shared_bytes(at, 4, 4))[0]


def lds2(at: int) -> tuple:
    return _load(_block().shared_bytes(at, 8, 8))


def lds4(at: int) -> tuple:
    return _load(_block().shared_bytes(at, 16, 16))


def sts1(at: int, value: Any) -> None:
    _block().shared_bytes(at, 4, 4).view(np.uint32)[0] = value


def ldg1(at: int) -> np.uint32:
    return _load(_block().global_bytes(at, 4, 4))[0]


ldr1 = ldg1


def ldg4(at: int) -> tuple:
    return _load(_block().global_bytes(at, 16, 16))


def stg1(at: int, value: Any) -> None:
    _block().global_bytes(at, 4, 4).view(np.uint32)[0] = value


def st_byte(at: int, value: Any) -> None:
    _block().global_bytes(at, 1, 1)[0] = int(value) & 0xFF


def prefetch(at: int) -> None:
    _block().global_bytes(at, 1, 1)


def stg2(at: int, *values: Any) -> None:
    _block().global_bytes(at, 8, 8).view(np.uint32)[:] = values


def stg4(at: int, *values: Any) -> None:
    _block().global_bytes(at, 16, 16).view(np.uint32)[:] = values


store_release = stg1


def wait_until_set(at: int) -> None:
    """Blocks run one after the other: a flag that is not set now will never be."""
    if not ldg1(at):
        raise RuntimeError("wait_until_set: nobody before has set the flag")


def atomic_inc(at: int) -> np.uint32:
    word = _block().global_bytes(at, 4, 4).view(np.uint32)
    before = np.uint32(word[0])
    word[0] = before + 1
    return before


# -- arithmetic -----------------------------------------------------------------------------------------------------------


def _bytes(value: Any) -> list[int]:
    return [int(value) >> shift & 0xFF for shift in (0, 8, 16, 24)]


def permute(a: Any, b: Any, selector: Any) -> np.uint32:
    pool = _bytes(a) + _bytes(b)
    return np.uint32(sum(pool[int(selector) >> 4 * i & 7] << 8 * i for i in range(4)))


def quotient(a: Any, b: Any) -> np.uint32:
    return np.uint32(int(a) // int(b))


def modulo(a: Any, b: Any) -> np.uint32:
    return np.uint32(int(a) % int(b))


def multiply(a: Any, b: Any) -> np.float32:
    return np.float32(a) * np.float32(b)


def add(a: Any, b: Any) -> np.float32:
    return np.float32(a) + np.float32(b)


def subtract(a: Any, b: Any) -> np.float32:
    return np.float32(a) - np.float32(b)


def as_float(word: Any) -> np.float32:
    return np.uint32(word).view(np.float32)


def to_float(number: Any) -> np.float32:
    return np.float32(np.int32(number))


def pack_half(low: Any, high: Any) -> np.uint32:
    with np.errstate(over="ignore"):
        return np.array([low, high], np.float32).astype(np.float16).view(np.uint32)[0]


def pack_bfloat(low: Any, high: Any) -> np.uint32:
    words = np.array([low, high], np.float32).view(np.uint32).astype(np.uint64)
    rounded = (words + 0x7FFF + (words >> 16 & 1)) >> 16  # to nearest, ties to even
    return np.uint32(rounded[0] | rounded[1] << np.uint64(16))


def unpack_half(word: Any) -> tuple:
    return tuple(np.uint32(word).reshape(1).view(np.float16).astype(np.float32))


def unpack_bfloat(word: Any) -> tuple:
    return as_float(int(word) << 16 & 0xFFFFFFFF), as_float(int(word) & 0xFFFF0000)


def widen_half(word: Any) -> np.float32:
    return unpack_half(word)[0]


def round_half(value: Any) -> np.float32:
    with np.errstate(over="ignore"):
        return np.float32(np.float16(np.float32(value)))


def _pairwise(unpack: Callable, pack: Callable, operation: Callable) -> Callable:
    """An operation on pairs of 16-bit numbers: fp32 holds their products, and sums whose second rounding does no harm."""

    def paired(a: Any, b: Any) -> np.uint32:
        return pack(*(operation(x, y) for x, y in zip(unpack(a), unpack(b), strict=True)))

    return paired


multiply_halves, multiply_bfloats = (
    _pairwise(unpack_half, pack_half, multiply),
    _pairwise(unpack_bfloat, pack_bfloat, multiply),
)
add_halves, add_bfloats = _pairwise(unpack_half, pack_half, add), _pairwise(unpack_bfloat, pack_bfloat, add)


def fuse(a: Any, b: Any, c: Any) -> np.float32:
    """In fp64 the product is exact; the sum is rounded to odd there, so that rounding it once more is rounding once."""
    product, c = float(a) * float(b), float(c)
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    if error and not np.float64(total).view(np.uint64) & np.uint64(1):
        total = float(np.nextafter(total, np.inf if error > 0 else -np.inf))
    return np.float32(total)


def divide(a: Any, b: Any) -> np.float32:
    return np.float32(a) / np.float32(b)


def root(value: Any) -> np.float32:
    return np.sqrt(np.float32(value))


def reciprocal(value: Any) -> np.float32:
    return np.float32(1) / np.float32(value)


def absolute(value: Any) -> np.float32:
    return np.float32(abs(value))


def maximum(a: Any, b: Any) -> np.float32:
    return np.float32(np.fmax(a, b))


def minimum(a: Any, b: Any) -> np.float32:
    return np.float32(np.fmin(a, b))


def _larger(x: Any, y: Any) -> np.float32:
    return maximum(absolute(x), absolute(y))


largest_halves, largest_bfloats = _pairwise(unpack_half, pack_half, _larger), _pairwise(unpack_bfloat, pack_bfloat, _larger)


def as_int(value: Any) -> np.int32:
    return np.float32(value).view(np.int32)


def round_to_byte(value: Any) -> np.uint32:
    return np.uint32(int(np.clip(np.rint(value), -127, 127)) & 0xFF)


def exp2(value: Any) -> np.float32:
    with np.errstate(over="ignore", under="ignore"):
        result = np.exp2(np.float32(value))
    return result if result >= np.float32(2.0**-126) or np.isnan(result) else np.float32(0)


def log2(value: Any) -> np.float32:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log2(np.float32(value))


def subtract_pair(a: Any, b: Any) -> np.uint32:
    return pack_half(*(x - y for x, y in zip(unpack_half(a), unpack_half(b), strict=True)))


def fuse_pair(a: Any, b: Any, c: Any) -> np.uint32:
    return pack_half(*(x * y + z for x, y, z in zip(unpack_half(a), unpack_half(b), unpack_half(c), strict=True)))


def dp4a(weights: Any, activations: Any, total: Any) -> np.int32:
    signed = [b - 256 if b > 127 else b for b in _bytes(activations)]
    return np.int32(int(total) + sum(w * x for w, x in zip(_bytes(weights), signed, strict=True)))


def shuffle_xor(value: Any, mask: Any) -> np.int32:
    return _warp((value,), lambda lanes: [lanes[k ^ int(mask)][0] for k in range(32)])


def largest_of_warp(value: Any) -> np.uint32:
    return _warp((int(value),), lambda lanes: [np.uint32(max(lane[0] for lane in lanes))] * 32)


def sum_of_warp(value: Any) -> np.int32:
    return _warp((int(value),), lambda lanes: [np.int32(sum(lane[0] for lane in lanes))] * 32)


def shuffle_up(value: Any, by: Any) -> np.int32:
    return _warp((value,), lambda lanes: [lanes[k - int(by) if k >= int(by) else k][0] for k in range(32)])


def warp_barrier() -> None:
    _warp((), lambda lanes: [None] * 32)


# -- barriers and copies --------------------------------------------------------------------------------------------------


def _barrier(block: Block, at: int) -> Barrier:
    if int(at) not in block.barriers:
        raise RuntimeError(f"mbarrier at {int(at) - SHARED_BASE}: used before it was initialised")
    return block.barriers[int(at)]


def _settle(block: Block, at: int) -> None:
    """Start the next phase of a barrier if this one is complete."""
    barrier = _barrier(block, at)
    if barrier.pending < 0:
        raise RuntimeError("mbarrier: more arrivals than expected")
    if not barrier.pending and not barrier.bytes:
        barrier.phase ^= 1
        barrier.pending = barrier.count
        block.wake(("mbarrier", int(at)))


def _arrive(block: Block, at: int) -> None:
    barrier = _barrier(block, at)
    barrier.pending -= 1
    if barrier.bytes < 0:
        raise RuntimeError("mbarrier: more bytes than expected")
    _settle(block, at)


def barrier_init(at: int, count: Any) -> None:
    block = _block()
    block.shared_bytes(at, 8, 8)
    block.barriers[int(at)] = Barrier(int(count))


def barrier_expect(at: int, count: Any) -> None:
    barrier = _barrier(_block(), at)
    barrier.bytes += int(count)
    barrier.pending -= 1
    _settle(_block(), at)


def barrier_arrive(at: int) -> None:
    _arrive(_block(), at)


def barrier_arrive_at(at: int, rank: Any) -> None:
    _arrive(_neighbour(rank), at)


def barrier_wait(at: int, parity: Any) -> None:
    block = _block()
    while _barrier(block, at).phase == int(parity):
        block.wait(("mbarrier", int(at)))


barrier_wait_cluster = barrier_wait
barrier_fence = nothing


def _bulk_load(block: Block, to: int, source: int, count: Any, at: int) -> None:
    size = int(count)
    if size % 16 or size <= 0:
        raise ValueError(f"bulk copy: {size} bytes; a positive multiple of 16 is needed")
    block.shared_bytes(to, size, 16)[:] = _block().global_bytes(source, size, 16)
    _barrier(block, at).bytes -= size  # bytes may be reported before they are announced; only a completed sum counts
    _settle(block, at)


def bulk_load(to: int, source: int, count: Any, at: int) -> None:
    _bulk_load(_block(), to, source, count, at)


def bulk_load_multicast(to: int, source: int, count: Any, at: int, mask: Any) -> None:
    for rank in range(int(mask).bit_length()):
        if int(mask) >> rank & 1:
            _bulk_load(_neighbour(rank), to, source, count, at)


# -- clusters -------------------------------------------------------------------------------------------------------------


def _neighbour(rank: Any) -> Block:
    """A block of this cluster; its memory is gone when it has ended."""
    blocks = _block().cluster.blocks
    if int(rank) >= len(blocks):
        raise IndexError(f"cluster: block {int(rank)} of {len(blocks)}")
    if not blocks[int(rank)].live:
        raise RuntimeError(f"cluster: block {int(rank)} has ended")
    return blocks[int(rank)]


def cluster_rank() -> np.uint32:
    block = _block()
    return np.uint32(block.cluster.blocks.index(block))


def cluster_index() -> np.uint32:
    block = _block()
    return np.uint32(block.place[0] // len(block.cluster.blocks))


def cluster_count() -> np.uint32:
    block = _block()
    return np.uint32(block.grid[0] // len(block.cluster.blocks))


def cluster_arrive() -> None:
    thread: Any = getcurrent()
    thread.block.cluster.arrive(thread)


def cluster_wait() -> None:
    thread: Any = getcurrent()
    thread.block.cluster.finish(thread)


def cluster_sync() -> None:
    cluster_arrive()
    cluster_wait()


def map_shared(at: int, rank: Any) -> np.uint32:
    return np.uint32(WINDOW * (int(rank) + 1) + int(at))


def sts4_remote(at: int, *values: Any) -> None:
    rank, place = divmod(int(at), WINDOW)
    _neighbour(rank - 1).shared_bytes(place, 16, 16).view(np.uint32)[:] = values


# -- barriers of threads --------------------------------------------------------------------------------------------------


def named_barrier(number: Any, threads: Any) -> None:
    _block().meet(("named barrier", int(number), int(threads)), int(threads))


allow_next_kernel = wait_for_previous_kernel = nothing


def copy_async(to: int, source: int) -> None:
    block = _block()
    block.shared_bytes(to, 16, 16)[:] = block.global_bytes(source, 16, 16)


copy_commit = nothing


# -- tensor cores ---------------------------------------------------------------------------------------------------------


def _weights(registers: list[tuple]) -> np.ndarray:
    """Unsigned A operand [16, 32 * steps] of a warp from every lane's registers, four for each step of 32."""
    words = np.array(registers, np.uint32)  # lane, register
    b = words.view(np.uint8).reshape(8, 4, -1, 2, 2, 4)  # g, q, step, half, high, byte
    return b.transpose(4, 0, 2, 3, 1, 5).reshape(16, -1).astype(np.int32)


def _scatter(result: np.ndarray) -> list[np.ndarray]:
    """[16, tokens] -> what each lane holds of it: for 8 tokens (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1)."""
    v = result.reshape(2, 8, -1, 4, 2)  # high, g, block of tokens, q, odd
    return list(v.transpose(1, 3, 2, 0, 4).reshape(32, -1))


def mma(*registers: Any) -> tuple:
    def compute(lanes: list) -> list:
        weights = _weights([lane[4:8] for lane in lanes])
        words = np.array([lane[8:10] for lane in lanes], np.uint32)
        x = words.view(np.int8).reshape(8, 4, 2, 4).transpose(0, 2, 1, 3).reshape(8, 32).astype(np.int32)
        parts = _scatter(weights @ x.T)
        return [
            tuple(np.int32(c) + p for c, p in zip(lane[:4], part, strict=True))
            for lane, part in zip(lanes, parts, strict=True)
        ]

    return _warp(registers, compute)


def mma_half(*registers: Any) -> tuple:
    def compute(lanes: list) -> list:
        words = np.array([lane[4:10] for lane in lanes], np.uint32)
        numbers = words.view(np.float16).astype(np.float32).reshape(8, 4, 6, 2)  # g, q, register, odd
        a = numbers[:, :, :4].reshape(8, 4, 2, 2, 2).transpose(3, 0, 2, 1, 4).reshape(16, 16)  # high g, half q odd
        b = numbers[:, :, 4:].transpose(0, 2, 1, 3).reshape(8, 16)
        parts = _scatter(a.astype(np.float64) @ b.astype(np.float64).T)
        return [
            tuple(np.float32(np.float64(c) + p) for c, p in zip(lane[:4], part, strict=True))
            for lane, part in zip(lanes, parts, strict=True)
        ]

    return _warp(registers, compute)


def load_matrices(at: int) -> tuple:
    """ldmatrix x4: lane ``8 i + r`` gives the address of row r of matrix i; lane ``4 r + q`` gets 4 bytes of each row r."""
    block = _block()

    def compute(lanes: list) -> list:
        rows = [block.shared_bytes(lane[0], 16, 16).view(np.uint32) for lane in lanes]
        return [tuple(np.uint32(rows[8 * i + lane // 4][lane % 4]) for i in range(4)) for lane in range(32)]

    return _warp((at,), compute)


def _transposed(words: list) -> np.ndarray:
    return np.array(words, np.uint32).view(np.uint16).reshape(8, 8).T.copy()


def transpose8(word: Any) -> np.uint32:
    return _warp((word,), lambda lanes: list(_transposed([lane[0] for lane in lanes]).reshape(-1).view(np.uint32)))


def store_transposed(at: int, first: Any, second: Any) -> None:
    block = _block()

    def compute(lanes: list) -> list:
        for matrix in (0, 1):
            rows = _transposed([lane[1 + matrix] for lane in lanes])
            for r in range(8):
                block.shared_bytes(lanes[8 * matrix + r][0], 16, 16).view(np.uint16)[:] = rows[r]
        return [None] * 32

    _warp((at, first, second), compute)


def wgmma(tokens: int) -> Callable:
    def start(accumulators: tuple, a: tuple, descriptor: Any) -> tuple:
        block, word = _block(), int(descriptor)
        if (word >> 62, word >> 32 & 0x3FFF, word >> 49 & 7) != (1, 64, 0):
            raise ValueError(f"wgmma: descriptor {word:#x} is not K-major with a 128-byte swizzle and 1024-byte groups")
        at = (word & 0x3FFF) << 4
        if at % 1024:
            raise ValueError(f"wgmma: activations at {at} are not aligned to the 1024-byte pattern of the swizzle")

        def compute(lanes: list) -> list:
            tile = block.shared_bytes(at, tokens * 128, 16).view(np.int8).reshape(tokens, 8, 16)
            row = np.arange(tokens)[:, None]
            x = tile[row, np.arange(8)[None] ^ row % 8].reshape(tokens, 128).astype(np.int32)
            parts = _scatter(_weights([lane[1] for lane in lanes]) @ x.T)
            return [tuple(np.array(lane[0], np.int32) + part) for lane, part in zip(lanes, parts, strict=True)]

        return _warp((accumulators, a), compute)

    return start


def wgmma_wait(accumulators: tuple) -> tuple:
    return accumulators
