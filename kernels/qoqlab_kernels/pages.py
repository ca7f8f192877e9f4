"""How a page of the KV4 cache lies in memory: pure functions from (token, channel) to bytes.

A *chunk* holds ``page_size`` tokens of one layer and KV head, contiguous, so that one bulk copy brings it::

    page_size * head_dim / 2 bytes    codes of K
    page_size * head_dim / 2 bytes    codes of V
    page_size * 4 bytes               (scale, zero) of K, two fp16 numbers a token
    page_size * 4 bytes               the same of V

Codes lie in the order of the A operand of mma.sync m16n8k16: lane ``4 g + q`` of a warp finds 8 codes of a 16 x 16 tile in
one 32-bit word, and the words of four tiles in 16 bytes. Rows are tokens for K and channels for V::

    K: word of (16 tokens, 16 channels)   byte 2 odd + high_token    token 8 high + g, channels 2 q + odd (low nibble), + 8
    V: word of (16 channels, 16 tokens)   byte 2 odd + half_token    token 8 half + 2 q + odd, channels g (low nibble), + 8

A byte always holds two channels of one token, c and c + 8, so a token is appended by writing whole bytes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

HEAD_DIMS = (64, 128)
PAGE_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True)
class ChunkLayout:
    """Sizes and offsets of a chunk, in bytes."""

    head_dim: int
    page_size: int = 64

    def __post_init__(self) -> None:
        if self.head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim: expected one of {HEAD_DIMS}, got {self.head_dim!r}")
        if self.page_size not in PAGE_SIZES:
            raise ValueError(f"page_size: expected one of {PAGE_SIZES}, got {self.page_size!r}")

    @property
    def codes(self) -> int:
        """Bytes of the codes of K, and of those of V; where V's codes start."""
        return self.page_size * self.head_dim // 2

    @property
    def scales(self) -> int:
        """Where the (scale, zero) pairs of K start."""
        return 2 * self.codes

    @property
    def value_scales(self) -> int:
        """Where the (scale, zero) pairs of V start."""
        return self.scales + 4 * self.page_size

    @property
    def bytes(self) -> int:
        """Size of a chunk."""
        return self.scales + 8 * self.page_size


def _word(lane: int, tile: int, step: int, head_dim: int) -> int:
    """Byte offset of a lane's word of the ``step``-th block of 16 channels, in the ``tile``-th 16 tokens."""
    return ((tile * (head_dim // 64) + step // 4) * 32 + lane) * 16 + step % 4 * 4


def key_place(token: int, channel: int, head_dim: int) -> tuple[int, int]:
    """Where the code of a key lies: (byte of the chunk, bits to shift it right).

    >>> key_place(0, 0, 128), key_place(0, 8, 128), key_place(8, 0, 128), key_place(63, 127, 128)
    ((0, 0), (0, 4), (1, 0), (4095, 4))
    """
    row, column = token % 16, channel % 16
    lane = 4 * (row % 8) + column % 8 // 2
    byte = 2 * (column % 2) + row // 8
    return _word(lane, token // 16, channel // 16, head_dim) + byte, 4 * (column // 8)


def value_place(token: int, channel: int, head_dim: int, page_size: int = 64) -> tuple[int, int]:
    """Where the code of a value lies: (byte of the chunk, bits to shift it right).

    >>> value_place(0, 0, 128), value_place(1, 0, 128), value_place(0, 8, 128), value_place(63, 127, 128)
    ((4096, 0), (4098, 0), (4096, 4), (8191, 4))
    """
    row, column = channel % 16, token % 16
    lane = 4 * (row % 8) + column % 8 // 2
    byte = 2 * (column % 2) + column // 8
    at = _word(lane, token // 16, channel // 16, head_dim) + byte
    return page_size * head_dim // 2 + at, 4 * (row // 8)


def low_channels(head_dim: int) -> list[int]:
    """Channels in the low nibbles of a token's ``head_dim / 2`` bytes, in ascending order; 8 more are in the high ones."""
    return [channel for channel in range(head_dim) if channel % 16 < 8]


@functools.cache
def byte_tables(layout: ChunkLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets int64 ``[page_size, head_dim / 2]`` of the bytes of every token, of its key and of its value, in the order of
    `low_channels`."""
    d, size = layout.head_dim, layout.page_size
    keys = [[key_place(t, c, d)[0] for c in low_channels(d)] for t in range(size)]
    values = [[value_place(t, c, d, size)[0] for c in low_channels(d)] for t in range(size)]
    return torch.tensor(keys), torch.tensor(values)


def pack_token_codes(codes: torch.Tensor) -> torch.Tensor:
    """Codes uint8 ``[..., D]`` -> bytes ``[..., D / 2]`` in the order of `low_channels`."""
    halves = codes.unflatten(-1, (-1, 2, 8))
    return (halves[..., 0, :] | halves[..., 1, :] << 4).flatten(-2)


def unpack_token_codes(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_token_codes`."""
    words = packed.unflatten(-1, (-1, 8))
    return torch.stack([words & 15, words >> 4], -2).flatten(-3)
