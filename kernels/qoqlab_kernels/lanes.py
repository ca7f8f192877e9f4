"""Which thread holds which weight, as a table; and what happens to four codes in one 32-bit word. For lessons and tests.

A tensor core takes its operands from the registers of 32 lanes in a fixed pattern. Weights are packed so that every lane
finds its share in two 16-byte loads and each loaded byte serves two outputs: `lane_map` says where everything is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from .layout import UNIT_K, UNIT_N

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ["block", "warp", "lane", "register", "byte", "n", "k", "address", "shift"]


def address_of(n: int, k: int) -> tuple[int, int]:
    """Where the code of output ``n``, input ``k`` of a unit of 64 x 128 lies: (byte of the unit, bits to shift right).

    >>> address_of(0, 0), address_of(8, 0), address_of(0, 4), address_of(63, 127)
    ((0, 0), (0, 4), (16, 0), (4095, 4))
    """
    warp, high, g = n // 16, n % 16 // 8, n % 8
    step, half, q, byte = k // 32, k % 32 // 16, k % 16 // 4, k % 4
    at = 8 * step + 4 * half + byte  # among the thread's 32 bytes, which it loads as two times 16
    return at // 16 * 2048 + 16 * (32 * warp + 4 * g + q) + at % 16, 4 * high


def _elements() -> Iterator[tuple[int, int, int, int, int, int]]:
    """v1: thread t walks along output t, one weight after the other."""
    for thread, k in itertools.product(range(UNIT_N), range(UNIT_K)):
        yield 0, thread, k, 0, thread, k


def _shared_tiles() -> Iterator[tuple[int, int, int, int, int, int]]:
    """v2: 16 x 16 threads of a block decode 16 outputs x 16 inputs at a time into shared memory."""
    for block, i, j, turn in itertools.product(range(UNIT_N // 16), range(16), range(16), range(UNIT_K // 16)):
        yield block, 16 * i + j, turn, 0, 16 * block + i, 16 * turn + j


def _fragments() -> Iterator[tuple[int, int, int, int, int, int]]:
    """v3 to v5: operand A of mma.sync m16n8k32 and of wgmma, four registers for each step of 32 inputs."""
    for thread, register, byte in itertools.product(range(128), range(16), range(4)):
        warp, g, q = thread // 32, thread % 32 // 4, thread % 4
        step, half, high = register // 4, register % 4 // 2, register % 2
        yield 0, thread, register, byte, 16 * warp + 8 * high + g, 32 * step + 16 * half + 4 * q + byte


_MAPS: dict[str, Callable[[], Iterator[tuple[int, int, int, int, int, int]]]] = {
    "v1": _elements,
    "v2": _shared_tiles,
    "v3": _fragments,
    "v4": _fragments,
    "v5": _fragments,
}


def lane_map(version: str = "v5") -> pd.DataFrame:
    """For every thread and register of a kernel version: which weight of a 64 x 128 unit it holds. One row per weight.

    Columns: ``block`` (0 unless several blocks share a unit), ``warp`` and ``lane`` in the block, ``register`` and ``byte``
    in it; ``n``, ``k``: output and input in the unit; ``address``, ``shift``: the byte of the packed unit that holds the
    code, and the bits to shift it right. v1 and v2 hold one weight at a time, so ``register`` counts them. In v3 to v5
    registers ``4 s .. 4 s + 3`` are the tensor core's operand for inputs ``32 s .. 32 s + 31``.

    Raises ValueError for a version that does not exist.

    >>> lane_map("v5").query("warp == 0 and lane == 5 and register == 3")[["byte", "n", "k"]].values.tolist()
    [[0, 9, 20], [1, 9, 21], [2, 9, 22], [3, 9, 23]]
    """
    import pandas as pd

    if version not in _MAPS:
        raise ValueError(f"version: {version!r} is not one of {', '.join(_MAPS)}")
    rows = [
        (block, thread // 32, thread % 32, register, byte, n, k, *address_of(n, k))
        for block, thread, register, byte, n, k in _MAPS[version]()
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


# -- four codes in a word -------------------------------------------------------------------------------------------------


def word_of(codes: list[int]) -> int:
    """Four codes 0..15 as the bytes of a 32-bit word, the first one lowest.

    >>> hex(word_of([0, 1, 2, 15]))
    '0xf020100'
    """
    if len(codes) != 4 or any(not 0 <= code <= 15 for code in codes):
        raise ValueError(f"codes: expected four numbers in 0..15, got {codes}")
    return sum(code << 8 * i for i, code in enumerate(codes))


def signed_bytes(word: int) -> list[int]:
    """The four bytes of a word as INT8 numbers, the lowest one first.

    >>> signed_bytes(0x7F80FF01)
    [1, -1, -128, 127]
    """
    return [((word >> shift & 0xFF) ^ 0x80) - 0x80 for shift in (0, 8, 16, 24)]


def _subtract_bytes(word: int, byte: int) -> int:
    """`vsub4`: subtract a byte from each of the four, none borrowing from its neighbour."""
    return sum(((word >> shift) - byte & 0xFF) << shift for shift in (0, 8, 16, 24))


def multiply_then_subtract(word: int, scale: int, zero: int) -> int:
    """``code * scale - zero * scale`` for four codes in a word, as QServe does it (paper section 5.2.3): one 32-bit
    multiplication, one `vsub4`. Right as long as ``15 * scale < 256``, which the protective range ensures (scale <= 16).

    >>> signed_bytes(multiply_then_subtract(word_of([0, 1, 2, 3]), scale=3, zero=2))
    [-6, -3, 0, 3]

    A scale of 18 is beyond that range: 15 * 18 = 270 does not fit in a byte and carries into the next.

    >>> signed_bytes(multiply_then_subtract(word_of([15, 8, 8, 8]), scale=18, zero=8))[1]  # (8 - 8) * 18 = 0
    1
    """
    return _subtract_bytes(word * scale & 0xFFFFFFFF, zero * scale & 0xFF)


def subtract_then_multiply(word: int, scale: int, zero: int) -> int:
    """``(code - zero) * scale`` the other way round, in which QServe's paper shows the mistake (section 5.2.3).

    After `vsub4` a byte may be negative, that is 256 too large as an unsigned number, and the 32-bit multiplication carries
    ``256 * scale`` of it into the byte above. A word of 32 bits cannot multiply signed bytes.

    >>> signed_bytes(subtract_then_multiply(word_of([0, 1, 2, 3]), scale=3, zero=2))  # [-6, -3, 0, 3] would be right
    [-6, -1, 2, 3]

    With no negative difference nothing is carried:

    >>> signed_bytes(subtract_then_multiply(word_of([2, 3, 4, 5]), scale=3, zero=2))
    [0, 3, 6, 9]
    """
    return _subtract_bytes(word, zero) * scale & 0xFFFFFFFF


def multiply_then_add(word: int, scale: int, zero: int) -> int:
    """``code * scale + (128 - zero * scale)``: what v3 to v5 do. All bytes stay unsigned, 128 too large, so one 32-bit
    multiplication-addition does all four and no `vsub4` is needed; the 128 leaves in the epilogue.

    >>> [byte & 0xFF for byte in signed_bytes(multiply_then_add(word_of([0, 1, 2, 3]), scale=3, zero=2))]
    [122, 125, 128, 131]
    """
    return word * scale + (128 - zero * scale) * 0x01010101 & 0xFFFFFFFF
