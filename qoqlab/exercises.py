"""Checks for the exercises: each takes a student's function, and fails with a sentence that says what to look at.

A check calls the function on numbers small enough to follow by hand. It prints one fixed line when all is well, lets
NotImplementedError through, and raises AssertionError otherwise. Nothing is swallowed, so a wrong answer stops the cell.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import affine, progressive

Pair = tuple[torch.Tensor, torch.Tensor]


def check_cache_bytes(cache_bytes: Callable[[int, int, int, int, float], float]) -> None:
    """``cache_bytes(layers, kv_heads, head_dim, tokens, bits)`` -> bytes of a KV cache (codes only, no scales)."""
    got = cache_bytes(1, 1, 128, 1, 8)
    assert got != 128, "128 bytes hold the key of that one token; its value lies in the cache as well (factor 2)"
    assert got != 2048, "that is the number of bits; there are 8 of them in a byte"
    assert got == 256, f"1 layer, 1 head of 128 channels, 1 token at 8 bits: a key and a value are 256 bytes, got {got}"
    got = cache_bytes(1, 1, 128, 1, 4)
    assert got == 128, f"two 4-bit codes share a byte, so the same cache at 4 bits is 128 bytes, got {got}"
    got = cache_bytes(32, 8, 128, 1000, 4)
    assert got == 32_768_000, f"32 layers, 8 KV heads, 128 channels, 1000 tokens at 4 bits: 32768000 bytes, got {got}"
    print("check_cache_bytes: passed")


def check_outlier_ratio(outlier_ratio: Callable[[torch.Tensor], float]) -> None:
    """``outlier_ratio(x [T, K])`` -> largest channel over median channel, a channel being as large as its largest |x|."""
    x = torch.tensor([[1.0, -2.0, 0.5, -40.0, 3.0], [-2.0, 1.0, 1.0, 10.0, 1.0]])
    got = float(outlier_ratio(x))
    assert got != 10, "the outlier is -40, not 10: take magnitudes before you look for the largest"
    assert got != 40 and abs(got - 40 / 1.5) > 1e-4, (
        "your median is that of all numbers; reduce every channel (column) to its largest magnitude first"
    )
    assert got not in (4.0, 1.6), "you reduced every token (row); a channel is a column, reduced over all tokens"
    assert abs(got - 20) < 1e-4, f"channels are as large as [2, 2, 1, 40, 3]: median 2, so the ratio is 20, got {got:g}"
    print("check_outlier_ratio: passed")


def check_per_token_int8(quantize: Callable[[torch.Tensor], Pair]) -> None:
    """``quantize(x [T, K])`` -> ``(codes int8 [T, K], scales fp16 [T])``, symmetric, one scale per token."""
    x = torch.tensor([[0.5, -1.27, 0.0, 0.01], [12.7, 0.1, -5.0, 0.2]])
    codes, scales = quantize(x)
    assert scales.numel() != 1, "one scale for both tokens: the loud second token steals the first one's resolution"
    assert scales.numel() != 4, "one scale per channel cannot leave the sum over channels, so the GEMM could not use it"
    assert tuple(scales.shape) == (2,), f"2 tokens need 2 scales, got shape {list(scales.shape)}"
    assert codes.dtype == torch.int8, f"codes must be torch.int8, got {codes.dtype}"
    assert scales.dtype == torch.float16, f"scales are stored as torch.float16, got {scales.dtype}"
    assert int(codes[0, 1]) != -128 and abs(float(scales[0]) - 1.27 / 128) > 1e-5, (
        "the largest magnitude belongs at 127: the grid is -127..127, so divide by 127, not by 128"
    )
    expected = [[50, -127, 0, 1], [127, 1, -50, 2]]
    assert codes.tolist() == expected, f"expected codes {expected}, got {codes.tolist()} (round, do not truncate)"
    codes, scales = quantize(torch.zeros(1, 4))
    assert float(scales[0]) > 0 and not codes.any(), "an all-zero token has max|x| = 0; give it scale 1, codes 0"
    rows = torch.linspace(-3, 3, 4096).sin().view(8, 512)
    want = affine.quantize_per_token_s8(rows)
    assert torch.equal(quantize(rows)[0], want.codes), (
        "codes differ from the library's: divide by the scale as rounded to fp16, which is what the kernel multiplies by"
    )
    print("check_per_token_int8: passed")


def check_group_scale(choose: Callable[[float, float], tuple[int, int]]) -> None:
    """``choose(low, high)`` -> ``(group_scale, group_zero)`` of a group with first-level extremes ``low <= high``.

    ``group_scale = round((high - low) / 15)``, at least 1; ``group_zero = round(-low / group_scale)`` in 0..15; the range
    is widened to include 0 first.
    """
    scale, zero = choose(-60, 90)
    assert scale != 9 or zero != 7, "16 codes have 15 steps between them: divide the range by 15, not by 16"
    assert zero != -6, "the zero is the code that means 0: low + zero * scale = 0, so zero = -low / scale, positive here"
    assert (scale, zero) == (10, 6), (
        f"a group from -60 to 90 has scale 150 / 15 = 10 and zero 60 / 10 = 6, got {(scale, zero)}"
    )
    assert isinstance(scale, int) and isinstance(zero, int), "both are integers: the kernel never sees a float here"
    scale, zero = choose(30, 60)
    assert zero >= 0, (
        f"a group of positive numbers would get the zero {zero}, which is no 4-bit code; widen the range to hold 0"
    )
    assert (scale, zero) == (4, 0), f"a group from 30 to 60 is widened to 0..60: scale 4, zero 0, got {(scale, zero)}"
    scale, zero = choose(0, 0)
    assert scale >= 1, "an all-zero group would get scale 0, and the next line divides by it; use at least 1"
    print("check_group_scale: passed")


def check_progressive_dequant(
    dequantize: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor],
) -> None:
    """``dequantize(codes, group_scales, group_zeros, channel_scales, group_size)`` -> fp32 [N, K].

    Shapes: codes [N, K], group scales and zeros [N, G], channel scales [N].
    """
    codes = torch.tensor([[0, 14, 7, 8], [3, 0, 15, 1]], dtype=torch.uint8)
    group_scales = torch.tensor([[16, 2], [1, 4]], dtype=torch.int8)
    group_zeros = torch.tensor([[7, 0], [0, 15]], dtype=torch.uint8)
    channel_scales = torch.tensor([0.5, 2.0], dtype=torch.float16)
    got = dequantize(codes, group_scales, group_zeros, channel_scales, 2)
    assert tuple(got.shape) == (2, 4), f"4 codes per row come back as 4 values per row, got shape {list(got.shape)}"
    got = got.float()
    assert float(got[0, 0]) < 0, (
        f"code 0 with zero 7 is 7 steps below 0, yet you return {float(got[0, 0]):g}: "
        "uint8 has no negative numbers, convert the codes before you subtract"
    )
    assert float(got[0, 0]) != -3.5, "the group scale is missing: (code - zero) * group_scale * channel_scale"
    assert float(got[0, 1]) == 56, f"(14 - 7) * 16 = 112, times 0.5 is 56; got {float(got[0, 1]):g}"
    expected = [[-56.0, 56.0, 7.0, 8.0], [6.0, 0.0, 0.0, -112.0]]
    assert float(got[0, 2]) == 7, (
        f"column 2 lies in group 2 // 2 = 1, whose scale is 2 and whose zero is 0: expected 7, got {float(got[0, 2]):g}"
    )
    assert got.tolist() == expected, f"expected {expected}, got {got.tolist()}; each row has its own scales"
    weight = torch.linspace(-1, 1, 512).sin().view(2, 256)
    w = progressive.quantize(weight, group_size=64)
    got = dequantize(w.codes, w.group_scales, w.group_zeros, w.channel_scales, 64)
    assert torch.equal(got.float(), w.dequantize()), "small cases agree, a 2 x 256 weight in groups of 64 does not"
    print("check_progressive_dequant: passed")


def check_pack_u4(pack: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """``pack(codes uint8 [K])`` -> uint8 ``[K / 2]``, even positions in the low nibble (plain order, not the kernel's)."""
    got = pack(torch.arange(16, dtype=torch.uint8))
    assert got.dtype == torch.uint8, f"bytes are torch.uint8, got {got.dtype}"
    assert tuple(got.shape) == (8,), f"16 codes fill 8 bytes, got shape {list(got.shape)}"
    first = int(got[0])
    assert first != 0x01, (
        "code 0 comes first, so it belongs in the low nibble: byte 0 is 0x10, yours is 0x01 (nibbles swapped)"
    )
    assert first != 0x80, "neighbours share a byte (0 with 1), yours pairs 0 with 8; that is another layout"
    assert first == 0x10, f"code 0 in the low nibble, code 1 in the high one: byte 0 is 0x10, got {first:#04x}"
    assert got.tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], f"got {[f'{b:#04x}' for b in got.tolist()]}"
    print("check_pack_u4: passed")
