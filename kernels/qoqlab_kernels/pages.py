"""How a page of the cache lies in memory: pure functions from (token, channel) to bytes.

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

Pages of 8 and 16 bits, for comparison, keep the order of tiles, lanes and blocks of 16 channels; a lane's 8 codes of a tile
then take 8 or 16 bytes, code ``4 h + 2 c + odd`` with h for high_token or half_token and c for the channel 8 further. Pages
of 16 bits hold the fp16 numbers themselves, without scales and zeros.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

HEAD_DIMS = (64, 128)
PAGE_SIZES = (16, 32, 64, 128)
BITS = (4, 8, 16)


@dataclass(frozen=True)
class ChunkLayout:
    """Sizes and offsets of a chunk, in bytes."""

    head_dim: int
    page_size: int = 64
    bits: int = 4

    def __post_init__(self) -> None:
        if self.head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim: expected one of {HEAD_DIMS}, got {self.head_dim!r}")
        if self.page_size not in PAGE_SIZES:
            raise ValueError(f"page_size: expected one of {PAGE_SIZES}, got {self.page_size!r}")
        if self.bits not in BITS:
            raise ValueError(f"bits: expected one of {BITS}, got {self.bits!r}")

    @property
    def codes(self) -> int:
        """Bytes of the codes of K, and of those of V; where V's codes start."""
        return self.page_size * self.head_dim * self.bits // 8

    @property
    def scales(self) -> int:
        """Where the (scale, zero) pairs of K start."""
        return 2 * self.codes

    @property
    def pairs(self) -> int:
        """Bytes of the (scale, zero) pairs of K, and of those of V."""
        return 4 * self.page_size if self.bits < 16 else 0

    @property
    def value_scales(self) -> int:
        """Where the (scale, zero) pairs of V start."""
        return self.scales + self.pairs

    @property
    def bytes(self) -> int:
        """Size of a chunk."""
        return self.scales + 2 * self.pairs


def _place(row: int, column: int, tile: int, step: int, half: int, high: int, layout: ChunkLayout) -> tuple[int, int]:
    """(byte, shift) of the number in ``row, column`` of an 8 x 8 quarter of a tile; ``tile`` of 16 tokens, ``step`` of 16
    channels; ``half``, ``high``: whether its token, its channel is one of the later 8."""
    lane, odd, bits = 4 * row + column // 2, column % 2, layout.bits
    at = ((tile * (layout.head_dim // 64) + step // 4) * 32 + lane) * 4 * bits + step % 4 * bits
    return (at + 2 * odd + half, 4 * high) if bits == 4 else (at + (4 * half + 2 * high + odd) * bits // 8, 0)


def key_place(token: int, channel: int, head_dim: int, bits: int = 4) -> tuple[int, int]:
    """Where the code of a key lies: (byte of the chunk, bits to shift it right).

    >>> key_place(0, 0, 128), key_place(0, 8, 128), key_place(8, 0, 128), key_place(63, 127, 128)
    ((0, 0), (0, 4), (1, 0), (4095, 4))
    """
    half, high = token % 16 // 8, channel % 16 // 8
    return _place(token % 8, channel % 8, token // 16, channel // 16, half, high, ChunkLayout(head_dim, bits=bits))


def value_place(token: int, channel: int, head_dim: int, page_size: int = 64, bits: int = 4) -> tuple[int, int]:
    """Where the code of a value lies: (byte of the chunk, bits to shift it right).

    >>> value_place(0, 0, 128), value_place(1, 0, 128), value_place(0, 8, 128), value_place(63, 127, 128)
    ((4096, 0), (4098, 0), (4096, 4), (8191, 4))
    """
    half, high, layout = token % 16 // 8, channel % 16 // 8, ChunkLayout(head_dim, page_size, bits)
    at, shift = _place(channel % 8, token % 8, token // 16, channel // 16, half, high, layout)
    return layout.codes + at, shift


def low_channels(head_dim: int) -> list[int]:
    """Channels in the low nibbles of a token's ``head_dim / 2`` bytes, in ascending order; 8 more are in the high ones."""
    return [channel for channel in range(head_dim) if channel % 16 < 8]


@functools.cache
def byte_tables(layout: ChunkLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets int64 ``[page_size, head_dim bits / 8]`` of the bytes of every token, of its key and of its value, in the
    order of `token_bytes`."""
    d, size, bits = layout.head_dim, layout.page_size, layout.bits
    channels = low_channels(d) if bits == 4 else range(d)
    own = range(max(1, bits // 8))  # bytes of a number
    keys = [[key_place(t, c, d, bits)[0] + i for c in channels for i in own] for t in range(size)]
    values = [[value_place(t, c, d, size, bits)[0] + i for c in channels for i in own] for t in range(size)]
    return torch.tensor(keys), torch.tensor(values)


def token_bytes(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8, or fp16 numbers, ``[..., D]`` -> their bytes ``[..., D bits / 8]``, two codes of 4 bits in each."""
    return pack_token_codes(numbers) if bits == 4 else numbers.contiguous().view(torch.uint8)


def token_numbers(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `token_bytes`."""
    if bits == 4:
        return unpack_token_codes(stored)
    return stored if bits == 8 else stored.contiguous().view(torch.float16)


def pack_token_codes(codes: torch.Tensor) -> torch.Tensor:
    """Codes uint8 ``[..., D]`` -> bytes ``[..., D / 2]`` in the order of `low_channels`."""
    halves = codes.unflatten(-1, (-1, 2, 8))
    return (halves[..., 0, :] | halves[..., 1, :] << 4).flatten(-2)


def unpack_token_codes(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_token_codes`."""
    words = packed.unflatten(-1, (-1, 8))
    return torch.stack([words & 15, words >> 4], -2).flatten(-3)
