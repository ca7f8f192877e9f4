"""Every bit position: how 4-bit codes lie in bytes.

Two layouts. `pack_u4` is the plain one (KV pages, our own checkpoints): the even element in the low nibble. `pack_qserve` is
QServe's compute-aware weight order, in which one lane's 16 bytes are the B fragments of four n8 blocks of
``mma.m16n8k32``, so a kernel loads them with one 128-bit instruction and no address arithmetic (paper section 5.2.1).
"""

from __future__ import annotations

from enum import Enum

import torch

from .checks import require_codes, require_enum, require_tensor, shape_of


class ScaleOrder(Enum):
    """Order of second-level scales and zeros along N in a per-group checkpoint; the value is (outer, inner).

    Channels ``outer * inner`` at a time, seen as ``[outer, inner]``, are stored transposed.

    QSERVE           0, 8, 16, 24, 1, 9, ...: what the kernels of QServe and TensorRT-LLM read.
    DEEPCOMPRESSOR   0, 8, 1, 9, ..., 7, 15, 16, 24, ...: what deepcompressor's converter writes since February 2025, by
                     mistake. Kernels then take most channels' scales from another channel.
    """

    QSERVE = (4, 8)
    DEEPCOMPRESSOR = (2, 8)


def pack_u4(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes ``[..., K]`` in 0..15 -> uint8 bytes ``[..., K / 2]``; element 2i is the low nibble of byte i.

    >>> pack_u4(torch.tensor([3, 10], dtype=torch.uint8)).item() == 0xA3
    True
    """
    require_codes("codes", codes, 0, 15)
    if codes.ndim == 0 or codes.shape[-1] % 2:
        raise ValueError(f"codes: last dimension must be even to fill bytes, got shape {shape_of(codes)}")
    codes = codes.to(torch.uint8)
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack_u4(packed: torch.Tensor) -> torch.Tensor:
    """uint8 bytes ``[..., K / 2]`` -> uint8 codes ``[..., K]``; inverse of `pack_u4`."""
    require_tensor("packed", packed)
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed: expected uint8 bytes, got {packed.dtype}")
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def pack_s4(codes: torch.Tensor) -> torch.Tensor:
    """int8 codes ``[..., K]`` in -8..7 -> uint8 bytes ``[..., K / 2]``, as two's complement nibbles in `pack_u4`'s order.

    >>> pack_s4(torch.tensor([-1, 7], dtype=torch.int8)).item() == 0x7F
    True
    """
    require_codes("codes", codes, -8, 7)
    return pack_u4(codes & 15)


def unpack_s4(packed: torch.Tensor) -> torch.Tensor:
    """uint8 bytes ``[..., K / 2]`` -> int8 codes ``[..., K]``; inverse of `pack_s4`."""
    return (unpack_u4(packed) ^ 8).to(torch.int8) - 8


def _require_tiles(name: str, n: int, k: int) -> None:
    if n % 32 or k % 32 or n == 0 or k == 0:
        raise ValueError(f"{name}: {n}x{k} does not split into 32x32 tiles; N and K must be multiples of 32")


def pack_qserve(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes ``[N, K]`` in 0..15 -> int8 ``[N, K / 2]`` in QServe's byte order.

    The 2-D shape is nominal. Tile ``(N / 32, K / 32)`` is 512 bytes; lane ``4 * (n % 8) + (k % 16) // 4`` owns 16
    consecutive bytes; byte ``8 * kp + 4 * np + k % 4`` (``kp = k % 32 // 16``, ``np = n % 16 // 8``) holds channel
    ``n % 32 < 16`` in its low nibble and channel ``n + 16`` in its high nibble.

    Raises TypeError for non-integer codes, ValueError for codes outside 0..15 or sizes that are not multiples of 32.
    """
    require_codes("codes", codes, 0, 15)
    if codes.ndim != 2:
        raise ValueError(f"codes: expected [N, K], got shape {shape_of(codes)}")
    n, k = codes.shape
    _require_tiles("codes", n, k)
    tiles = codes.to(torch.uint8).reshape(n // 32, 2, 2, 8, k // 32, 2, 4, 4)  # nt, half, np, nl, kt, kp, kl, r
    nibbles = tiles.permute(0, 4, 3, 6, 5, 2, 7, 1)  # nt, kt, nl, kl, kp, np, r, half
    return (nibbles[..., 0] | (nibbles[..., 1] << 4)).reshape(n, k // 2).view(torch.int8)


def unpack_qserve(packed: torch.Tensor) -> torch.Tensor:
    """int8 ``[N, K / 2]`` in QServe's byte order -> uint8 codes ``[N, K]``; inverse of `pack_qserve`."""
    require_tensor("packed", packed)
    if packed.dtype != torch.int8 or packed.ndim != 2:
        raise TypeError(f"packed: expected an int8 matrix [N, K / 2], got {packed.dtype} of shape {shape_of(packed)}")
    n, k = packed.shape[0], packed.shape[1] * 2
    _require_tiles("packed", n, k)
    tiles = packed.contiguous().view(torch.uint8).reshape(n // 32, k // 32, 8, 4, 2, 2, 4)  # nt, kt, nl, kl, kp, np, r
    halves = torch.stack([tiles & 15, tiles >> 4])  # half, nt, kt, nl, kl, kp, np, r
    return halves.permute(1, 0, 6, 3, 2, 5, 4, 7).reshape(n, k)


def permute_qserve_scales(per_group: torch.Tensor, order: ScaleOrder = ScaleOrder.QSERVE) -> torch.Tensor:
    """Second-level scales or zeros ``[G, N]`` -> the same, channels reordered inside each 32 as QServe stores them.

    Position ``4 * nl + j`` holds channel ``8 * j + nl`` (0, 8, 16, 24, 1, 9, ...), so a lane reads the four scales of its
    n8 blocks as one 32-bit word. `unpermute_qserve_scales` inverts. Another ``order`` serves to repair checkpoints.

    >>> permute_qserve_scales(torch.arange(32)[None])[0, :8].tolist()
    [0, 8, 16, 24, 1, 9, 17, 25]
    """
    require_enum("order", order, ScaleOrder)
    outer, inner = order.value
    return _transpose_channels(per_group, outer, inner)


def unpermute_qserve_scales(per_group: torch.Tensor, order: ScaleOrder = ScaleOrder.QSERVE) -> torch.Tensor:
    """Inverse of `permute_qserve_scales`."""
    require_enum("order", order, ScaleOrder)
    outer, inner = order.value
    return _transpose_channels(per_group, inner, outer)


def _transpose_channels(per_group: torch.Tensor, outer: int, inner: int) -> torch.Tensor:
    require_tensor("per_group", per_group)
    if per_group.ndim != 2 or per_group.shape[1] % 32:
        raise ValueError(f"per_group: expected [G, N] with N a multiple of 32, got shape {shape_of(per_group)}")
    return per_group.unflatten(1, (-1, outer, inner)).transpose(-1, -2).reshape(per_group.shape)


def pack_u4_words(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes ``[..., K]`` in 0..15 -> int32 words ``[..., K / 8]``; element 8i + j is bits 4j..4j + 3 of word i.

    The order of compressed-tensors' ``weight_packed``: `pack_u4`'s bytes, four to a little-endian word.

    >>> hex(pack_u4_words(torch.arange(8, dtype=torch.uint8)).item())
    '0x76543210'
    """
    require_codes("codes", codes, 0, 15)
    if codes.ndim == 0 or codes.shape[-1] % 8:
        raise ValueError(f"codes: last dimension must be a multiple of 8 to fill words, got shape {shape_of(codes)}")
    parts = pack_u4(codes).unflatten(-1, (-1, 4)).to(torch.int32)
    return parts[..., 0] | parts[..., 1] << 8 | parts[..., 2] << 16 | parts[..., 3] << 24
