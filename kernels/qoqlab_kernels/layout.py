"""How the GEMM's operands lie in memory, and the way there and back.

Weights: *units* of 64 outputs x 128 inputs, all units of 64 outputs in a row. A unit is 4096 bytes of codes, then 128 bytes
for each group of K that it touches (none for per-channel weights). Thread ``t = 32 warp + 4 g + q`` of a warpgroup finds its
operands of the tensor core in two 16-byte loads, at ``16 t`` and ``2048 + 16 t``::

    word 2 step + half, byte b     input 32 step + 16 half + 4 q + b     (step 0..3, half 0..1)
    low nibble                     output 16 warp + g
    high nibble                    output 16 warp + g + 8

Activations: for every 128 inputs, all tokens, 128 bytes each; the 16-byte chunk c of token m lies at position
``c ^ (m % 8)`` (the 128-byte swizzle of wgmma). Tokens are padded to a multiple of 8, inputs to a multiple of 128, with
zeros.

kernels/README.md draws both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.nn.functional import pad

from qoqlab.affine import Affine, quantize_per_token_s8
from qoqlab.grids import UINT4, Zero
from qoqlab.progressive import FirstLevel, ProgressiveWeight

UNIT_N, UNIT_K = 64, 128
CODE_BYTES = UNIT_N * UNIT_K // 2
GROUP_BYTES = 2 * UNIT_N
#: The largest K whose accumulator provably stays in int32, whatever the codes: K * 255 * 128 < 2**31.
MAX_K = 65792


def blocks(size: int, unit: int) -> int:
    """How many units cover ``size``."""
    return -(-size // unit)


@dataclass(frozen=True)
class PackedWeight:
    """A 4-bit weight ``[n, k]`` in the order in which the kernels read it.

    ``units`` uint8 [N/64, K/128, bytes of a unit]; ``rows`` fp32 [N padded to 64, 4]: the output's scale, what its sum of
    activation codes is multiplied with before it is subtracted (int32 bits, or fp32 for a per-channel scaled zero), and two
    unused numbers. ``group_size`` 0: per channel.
    """

    units: torch.Tensor
    rows: torch.Tensor
    n: int
    k: int
    group_size: int
    zero: Zero

    @property
    def groups(self) -> int:
        """Groups in one unit of 128 inputs."""
        return UNIT_K // self.group_size if self.group_size else 0

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        return self.units.device

    @property
    def nbytes(self) -> int:
        """Bytes in device memory."""
        return self.units.nbytes + self.rows.nbytes

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight on another device."""
        return replace(self, units=self.units.to(device), rows=self.rows.to(device))


def _fields(codes: torch.Tensor) -> torch.Tensor:
    """``[N, K]`` (whole units) -> [N/64, K/128, warp, g, q, step, half, byte, high]: the packed order, nibble last."""
    n, k = codes.shape
    v = codes.reshape(n // UNIT_N, 4, 2, 8, k // UNIT_K, 4, 2, 4, 4)  # block warp high g | unit step half q byte
    return v.permute(0, 4, 1, 3, 7, 5, 6, 8, 2)


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes 0..15 ``[N, K]`` -> uint8 ``[N/64, K/128, 4096]``, padded with zeros to whole units."""
    n, k = codes.shape
    fields = _fields(pad(codes, (0, -k % UNIT_K, 0, -n % UNIT_N)))
    b = fields[..., 0] | fields[..., 1] << 4  # [block, unit, warp, g, q, step, half, byte]
    b = b.reshape(*b.shape[:2], 128, 2, 16)  # a thread's 32 bytes as two 16-byte loads
    return b.transpose(2, 3).reshape(*b.shape[:2], CODE_BYTES)


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_codes`, padding included: ``[N/64, K/128, 4096]`` -> uint8 ``[N, K]``."""
    blocks_n, blocks_k, _ = packed.shape
    b = packed.reshape(blocks_n, blocks_k, 2, 128, 16).transpose(2, 3).reshape(blocks_n, blocks_k, 4, 8, 4, 4, 2, 4)
    nibbles = torch.stack([b & 15, b >> 4], -1)  # block unit warp g q step half byte high
    return nibbles.permute(0, 2, 8, 3, 1, 5, 6, 4, 7).reshape(blocks_n * UNIT_N, blocks_k * UNIT_K)


def _pack_groups(scales: torch.Tensor, offsets: torch.Tensor, groups: int) -> torch.Tensor:
    """uint8 ``[N, G]`` twice -> [N/64, K/128, groups * 128]: (scale, offset) of outputs g and g + 8 in one word."""
    n, total = scales.shape
    both = torch.stack([scales, offsets], -1)
    both = pad(both, (0, 0, 0, -total % groups, 0, -n % UNIT_N))
    v = both.reshape(-1, 4, 2, 8, both.shape[1] // groups, groups, 2)  # block warp high g unit group (scale, offset)
    return v.permute(0, 4, 5, 1, 3, 2, 6).reshape(v.shape[0], v.shape[4], groups * GROUP_BYTES)


def _group_operands(w: ProgressiveWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, offset) uint8 ``[N, G]`` such that ``code * scale + offset - 128`` is the INT8 weight, in 0..255 before.

    The kernel multiplies four codes in one 32-bit word, so no byte may carry into the next: checked for the codes in use.
    """
    s = w.group_scales.int()
    a = 128 - (w.group_zeros.int() * s if w.zero is Zero.INTEGER else w.group_zeros.int())
    grouped = w.codes.reshape(*s.shape, w.group_size)
    low = a + s * grouped.amin(-1).int()
    high = a + s * grouped.amax(-1).int()
    bad = (s < 0) | (s > 255) | (a < 0) | (a > 255) | (low < 0) | (high > 255)
    if bool(bad.any()):
        n, g = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"weight: group {g} of output {n} decodes to INT8 values {low[n, g] - 128}..{high[n, g] - 128} with offset "
            f"{a[n, g] - 128}; the kernels need -128..127 (quantise with the protective range, paper section 4.1)"
        )
    return s.to(torch.uint8), a.to(torch.uint8)


def pack_weight(weight: ProgressiveWeight | Affine) -> PackedWeight:
    """Bring a quantised weight ``[N, K]`` into the order of the GEMM kernels, on the device where it lies.

    ``weight``: `qoqlab.progressive.ProgressiveWeight` with group_size 32, 64 or 128, or a per-channel
    `qoqlab.affine.Affine` of UINT4 codes. N and K must be multiples of 32. `unpack` inverts.

    Raises TypeError for another kind of weight, ValueError for shapes or codes that the kernels cannot hold.
    """
    if not isinstance(weight, ProgressiveWeight | Affine):
        raise TypeError(f"weight: expected a ProgressiveWeight or a per-channel Affine, got {type(weight).__name__}")
    four_bits = isinstance(weight, ProgressiveWeight) or (weight.zeros is not None and weight.grid == UINT4)
    if weight.codes.ndim != 2 or not four_bits:
        raise ValueError(
            f"weight: expected 4-bit codes [N, K] with one zero per output, got {weight.codes.dtype} codes of shape "
            f"{tuple(weight.codes.shape)}"
        )
    n, k = weight.codes.shape
    if n == 0 or k == 0 or n % 32 or k % 32 or k > MAX_K:
        raise ValueError(f"weight: {n}x{k} does not fit; N and K must be multiples of 32, K at most {MAX_K}")
    if isinstance(weight, ProgressiveWeight) and weight.group_size not in (32, 64, 128):
        raise ValueError(f"weight: group_size {weight.group_size} is not one of 32, 64, 128")
    if int(weight.codes.amax()) > 15:
        raise ValueError(f"weight: codes go up to {int(weight.codes.amax())}; 4-bit codes end at 15")
    units = pack_codes(weight.codes)
    rows = torch.zeros(units.shape[0] * UNIT_N, 4, device=units.device)
    words = rows.view(torch.int32)
    if isinstance(weight, ProgressiveWeight):
        groups = UNIT_K // weight.group_size
        units = torch.cat([units, _pack_groups(*_group_operands(weight), groups)], -1)
        rows[:n, 0] = weight.channel_scales.float()
        words[:n, 1] = 128  # the bytes of the weight are 128 too large
        size = weight.group_size
    else:
        rows[:n, 0] = weight.scales.float()
        assert weight.zeros is not None  # checked above
        if weight.zero is Zero.INTEGER:
            words[:n, 1] = weight.zeros.int()
        else:
            rows[:n, 1] = weight.zeros.float()
        size = 0
    packed = PackedWeight(units.contiguous(), rows, n, k, size, weight.zero)
    if units.is_cuda:
        # the GEMM prefetches weights before it waits for the previous kernel, so packing must be over
        torch.cuda.current_stream(units.device).synchronize()
    return packed


def unpack(packed: PackedWeight) -> ProgressiveWeight | Affine:
    """The weight behind a `PackedWeight`: the same codes, scales and zeros."""
    n, k = packed.n, packed.k
    codes = unpack_codes(packed.units[..., :CODE_BYTES])[:n, :k].contiguous()
    scale, words = packed.rows[:n, 0].half(), packed.rows.view(torch.int32)[:n, 1]
    if not packed.group_size:
        zeros = words.to(torch.uint8) if packed.zero is Zero.INTEGER else packed.rows[:n, 1].half()
        return Affine(scale, zeros, UINT4, packed.zero, codes)
    g = packed.groups
    v = packed.units[..., CODE_BYTES:].reshape(*packed.units.shape[:2], g, 4, 8, 2, 2)  # block unit group warp g high pair
    v = v.permute(0, 3, 5, 4, 1, 2, 6).reshape(packed.rows.shape[0], -1, 2)[:n, : k // packed.group_size].int()
    scales = v[..., 0].to(torch.int8)
    offsets = 128 - v[..., 1]
    zeros = (offsets // scales.int()).to(torch.uint8) if packed.zero is Zero.INTEGER else offsets.to(torch.int8)
    return ProgressiveWeight(scale, scales, zeros, packed.group_size, packed.zero, FirstLevel.UNROUNDED, codes)


@dataclass(frozen=True)
class Activations:
    """INT8 activations ``[m, k]`` in the order in which the GEMM reads them, with what its epilogue needs.

    ``tiles`` int8 [K/128, M padded to 8, 128], 16-byte chunks swizzled; ``tokens`` int32 [M padded to 8, 2]: sum of the
    codes, and the bits of the fp32 scale.
    """

    tiles: torch.Tensor
    tokens: torch.Tensor
    m: int
    k: int

    @property
    def shape(self) -> torch.Size:
        """``[m, k]``."""
        return torch.Size((self.m, self.k))

    @property
    def device(self) -> torch.device:
        """Where the activations lie."""
        return self.tiles.device

    @property
    def scales(self) -> torch.Tensor:
        """fp16 [m], one per token."""
        return self.tokens.view(torch.float32)[: self.m, 1].half()

    @property
    def sums(self) -> torch.Tensor:
        """int32 [m]: sum of each token's codes."""
        return self.tokens[: self.m, 0]

    @cached_property
    def codes(self) -> torch.Tensor:
        """int8 [m, k] in the usual order (a copy)."""
        units, padded, _ = self.tiles.shape
        v = _swizzle(self.tiles.reshape(units, padded // 8, 8, 8, 16))
        return v.reshape(units, padded, UNIT_K).transpose(0, 1).reshape(padded, -1)[: self.m, : self.k].contiguous()


def _swizzle(v: torch.Tensor) -> torch.Tensor:
    """Exchange chunks: position c of token r (last but two and last but one axis) takes chunk ``c ^ r``. Its own inverse."""
    r = torch.arange(8, device=v.device)
    index = (r[:, None] ^ r[None])[:, :, None].expand(v.shape)
    return v.gather(-2, index)


def tile_activations(codes: torch.Tensor, scales: torch.Tensor) -> Activations:
    """int8 codes ``[M, K]`` and fp16 scales ``[M]`` -> the GEMM's order. Plain torch; `quantize_activations` does it in one
    pass."""
    m, k = codes.shape
    padded = pad(codes, (0, -k % UNIT_K, 0, -m % 8))
    v = padded.reshape(padded.shape[0] // 8, 8, -1, 8, 16).permute(2, 0, 1, 3, 4)  # unit, 8 tokens, token, chunk, byte
    tokens = torch.zeros(padded.shape[0], 2, dtype=torch.int32, device=codes.device)
    tokens[:m, 0] = codes.sum(-1, dtype=torch.int32)
    tokens.view(torch.float32)[:m, 1] = scales.float()
    return Activations(_swizzle(v).reshape(-1, padded.shape[0], UNIT_K).contiguous(), tokens, m, k)


def quantize_activations_torch(x: torch.Tensor) -> Activations:
    """Per-token INT8 of ``x [M, K]`` in the GEMM's order, with torch."""
    a = quantize_per_token_s8(x)
    return tile_activations(a.codes, a.scales)
