"""Byte layouts, pinned by literal bytes, and the register arithmetic that reads them."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from qoqlab import packing, progressive

#: Where a channel's scale lies inside each 32: one 32-bit word holds channels c, c + 8, c + 16, c + 24.
QSERVE_ORDER = [
    *(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27),
    *(4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31),
]
#: The order that deepcompressor's converter writes since February 2025; kernels then read wrong scales.
DEEPCOMPRESSOR_ORDER = [
    *(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15),
    *(16, 24, 17, 25, 18, 26, 19, 27, 20, 28, 21, 29, 22, 30, 23, 31),
]


def random_codes(n, k, seed=0):
    return torch.randint(0, 16, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


# Plain nibbles


def test_u4_golden_bytes():
    codes = torch.tensor([[1, 2, 3, 4], [15, 0, 0, 15], [10, 11, 12, 13]], dtype=torch.uint8)
    assert packing.pack_u4(codes).tolist() == [[0x21, 0x43], [0x0F, 0xF0], [0xBA, 0xDC]]


def test_u4_unpacks_every_byte():
    every = torch.arange(256).to(torch.uint8)
    codes = packing.unpack_u4(every[:, None])
    assert codes.tolist() == [[byte % 16, byte // 16] for byte in range(256)]
    assert torch.equal(packing.pack_u4(codes)[:, 0], every)


# QServe's weight order


@pytest.mark.parametrize(
    ("n", "k", "byte", "nibble"),
    [
        # one bit of the closed form at a time: n = 32 nt + 16 half + 8 np + nl, k = 32 kt + 16 kp + 4 kl + r
        (0, 0, 0, "low"),
        (0, 1, 1, "low"),  # r: next byte
        (8, 0, 4, "low"),  # np: 4 bytes on
        (0, 16, 8, "low"),  # kp: 8 bytes on
        (0, 4, 16, "low"),  # kl: next lane
        (1, 0, 64, "low"),  # nl: 4 lanes on
        (16, 0, 0, "high"),  # half: high nibble
        (0, 32, 512, "low"),  # kt: next tile
        (32, 0, 1536, "low"),  # nt: after the 96 / 32 tiles of the row
        # and together
        (31, 31, 511, "high"),  # lane 31, byte 8 + 4 + 3
        (45, 50, 2382, "low"),  # tile 1 * 3 + 1, lane 5 * 4, byte 8 + 4 + 2: 2048 + 320 + 14
        (63, 95, 3071, "high"),
    ],
)
def test_qserve_positions(n, k, byte, nibble):
    codes = torch.zeros(64, 96, dtype=torch.uint8)
    codes[n, k] = 9
    packed = packing.pack_qserve(codes)
    assert packed.shape == (64, 48) and packed.dtype == torch.int8
    flat = packed.view(torch.uint8).flatten()
    assert flat.nonzero().tolist() == [[byte]]
    assert flat[byte].item() == {"low": 0x09, "high": 0x90}[nibble]


def test_qserve_golden_bytes():
    n, k = torch.arange(32)[:, None], torch.arange(32)
    codes = ((3 * (n // 8) + k) % 16).to(torch.uint8)
    lanes = packing.pack_qserve(codes).view(torch.uint8).reshape(32, 16).numpy()
    # lane 0: k = 0..3 and 16..19; low nibbles from channels 0 and 8, high ones from 16 and 24
    assert lanes[0].tobytes().hex(" ", 4) == "60718293 93a4b5c6 60718293 93a4b5c6"
    # lane 1: k = 4..7 and 20..23
    assert lanes[1].tobytes().hex(" ", 4) == "a4b5c6d7 d7e8f90a a4b5c6d7 d7e8f90a"
    # lane 4 is channel 1, which has the codes of channel 0
    assert (lanes[4] == lanes[0]).all()


def test_qserve_equals_its_closed_form_everywhere():
    codes = random_codes(64, 96)
    flat = packing.pack_qserve(codes).view(torch.uint8).flatten().tolist()
    expected = [0] * len(flat)
    for n in range(64):
        for k in range(96):
            lane = n % 8 * 4 + k % 16 // 4
            address = (n // 32 * 3 + k // 32) * 512 + lane * 16 + k % 32 // 16 * 8 + n % 16 // 8 * 4 + k % 4
            expected[address] |= int(codes[n, k]) << (4 if n % 32 >= 16 else 0)
    assert flat == expected


def test_qserve_scale_order():
    order = packing.permute_qserve_scales(torch.arange(64)[None])[0].tolist()
    assert order == QSERVE_ORDER + [32 + channel for channel in QSERVE_ORDER]
    assert order[:32] != DEEPCOMPRESSOR_ORDER
    restored = packing.unpermute_qserve_scales(torch.tensor([order, order]))
    assert restored.tolist() == [list(range(64))] * 2


# What a kernel does with those bytes


def vadd4(a, b):
    """Four independent byte additions in 32-bit words: CUDA's ``__vadd4``."""
    return ((a & 0x7F7F7F7F) + (b & 0x7F7F7F7F)) ^ ((a ^ b) & 0x80808080)


def signed_bytes(word):
    return [(word >> shift & 0xFF) - 256 * (word >> shift + 7 & 1) for shift in (0, 8, 16, 24)]


def multiply_then_subtract(codes, scale, zero):
    """Four codes in a word -> four int8 bytes: one multiplication, one byte-wise addition of -(zero * scale)."""
    return vadd4(codes * scale & 0xFFFFFFFF, (-zero * scale & 0xFF) * 0x01010101)


def subtract_then_multiply(codes, scale, zero):
    """The other order: signed bytes times a scale, in one 32-bit multiplication."""
    return vadd4(codes, (-zero & 0xFF) * 0x01010101) * scale & 0xFFFFFFFF


def dequantize_registers(w, dequantize, order):
    """int8 ``[N, K]`` from packed words, lane by lane, as the per-group kernel forms its B fragments."""
    n, k = w.shape
    words = packing.pack_qserve(w.codes).view(torch.int32).reshape(n // 32, k // 32, 32, 4)
    scales, zeros = (t.T.int().unflatten(1, (-1, 32))[..., order] for t in (w.group_scales, w.group_zeros))
    out = torch.zeros(n, k, dtype=torch.int8)
    for nt in range(n // 32):
        for kt in range(k // 32):
            s, z = (t[kt * 32 // w.group_size, nt].tolist() for t in (scales, zeros))
            for lane, registers in enumerate((words[nt, kt].long() & 0xFFFFFFFF).tolist()):
                nl, kl = divmod(lane, 4)
                for i, word in enumerate(registers):  # registers: kp = i // 2, np = i % 2
                    for half_tile in range(2):
                        j = 2 * half_tile + i % 2  # n8 block
                        codes = word >> 4 * half_tile & 0x0F0F0F0F
                        row, column = 32 * nt + 8 * j + nl, 32 * kt + 16 * (i // 2) + 4 * kl
                        decoded = dequantize(codes, s[4 * nl + j], z[4 * nl + j])
                        out[row, column : column + 4] = torch.tensor(signed_bytes(decoded))
    return out


@pytest.fixture(scope="module")
def weight():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    x[:, ::7] *= torch.linspace(0.1, 4, 64)[:, None]  # scales and zeros that differ between channels
    return progressive.quantize(x, 32)


def test_register_arithmetic_equals_int8(weight):
    assert torch.equal(dequantize_registers(weight, multiply_then_subtract, QSERVE_ORDER), weight.int8())


def test_deepcompressors_scale_order_decodes_wrongly(weight):
    wrong = dequantize_registers(weight, multiply_then_subtract, DEEPCOMPRESSOR_ORDER) != weight.int8()
    assert wrong.float().mean() > 0.5


def test_the_scale_permutation_is_the_one_the_registers_need(weight):
    stored = packing.permute_qserve_scales(weight.group_scales.T.contiguous())
    assert torch.equal(stored, weight.group_scales.T.unflatten(1, (-1, 32))[..., QSERVE_ORDER].flatten(1))


def test_every_code_scale_and_zero_survives_the_word_multiplication():
    # Every combination that quantisation can produce: (code - zero) * scale in int8 and code * scale <= 240.
    for scale in range(1, 17):
        for zero in range(16):
            fits = [code for code in range(16) if -128 <= (code - zero) * scale <= 127]
            for code in fits:
                for other in (fits[0], fits[-1]):  # neighbours with the largest and smallest products
                    word = code | other << 8 | code << 16 | other << 24
                    expected = [(c - zero) * scale for c in (code, other, code, other)]
                    assert signed_bytes(multiply_then_subtract(word, scale, zero)) == expected


def test_subtracting_before_multiplying_carries_between_bytes(weight):
    # 0 - 7 = 0xF9 in every byte; times 16, each byte pushes 0xF into the next one
    assert signed_bytes(multiply_then_subtract(0x00000000, 16, 7)) == [-112, -112, -112, -112]
    assert subtract_then_multiply(0x00000000, 16, 7) == 0x9F9F9F90
    assert signed_bytes(subtract_then_multiply(0x00000000, 16, 7)) == [-112, -97, -97, -97]
    assert not torch.equal(dequantize_registers(weight, subtract_then_multiply, QSERVE_ORDER), weight.int8())


# Arguments


@pytest.mark.parametrize(
    ("call", "argument", "error"),
    [
        (packing.pack_u4, torch.tensor([16, 0]), ValueError),
        (packing.pack_u4, torch.tensor([-1, 0]), ValueError),
        (packing.pack_u4, torch.tensor([1, 2, 3]), ValueError),
        (packing.pack_u4, torch.tensor([1.0, 2.0]), TypeError),
        (packing.unpack_u4, torch.tensor([1, 2], dtype=torch.int8), TypeError),
        (packing.pack_qserve, torch.zeros(32, 31, dtype=torch.uint8), ValueError),
        (packing.pack_qserve, torch.zeros(33, 32, dtype=torch.uint8), ValueError),
        (packing.pack_qserve, torch.zeros(0, 32, dtype=torch.uint8), ValueError),
        (packing.pack_qserve, torch.zeros(1, 32, 32, dtype=torch.uint8), ValueError),
        (packing.pack_qserve, torch.full((32, 32), 16), ValueError),
        (packing.unpack_qserve, torch.zeros(32, 16, dtype=torch.uint8), TypeError),
        (packing.unpack_qserve, torch.zeros(32, 24, dtype=torch.int8), ValueError),
        (packing.permute_qserve_scales, torch.zeros(1, 31), ValueError),
        (packing.permute_qserve_scales, torch.zeros(32), ValueError),
    ],
)
def test_bad_input_is_refused(call, argument, error):
    with pytest.raises(error):
        call(argument)


@settings(derandomize=True, max_examples=30, deadline=None)
@given(
    leading=st.lists(st.integers(1, 4), max_size=3),
    pairs=st.integers(1, 20),
    dtype=st.sampled_from([torch.uint8, torch.int8, torch.int32, torch.int64]),
    seed=st.integers(0, 2**16),
)
def test_u4_round_trip(leading, pairs, dtype, seed):
    codes = torch.randint(0, 16, (*leading, 2 * pairs), generator=torch.Generator().manual_seed(seed)).to(dtype)
    packed = packing.pack_u4(codes)
    assert packed.shape == (*leading, pairs)
    assert torch.equal(packing.unpack_u4(packed), codes.to(torch.uint8))


@settings(derandomize=True, max_examples=20, deadline=None)
@given(n=st.integers(1, 4), k=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_qserve_round_trip(n, k, seed):
    codes = random_codes(32 * n, 32 * k, seed)
    packed = packing.pack_qserve(codes)
    assert packed.is_contiguous() and packed.nbytes * 2 == codes.nbytes
    assert torch.equal(packing.unpack_qserve(packed), codes)
    # rows of tiles are independent, so a checkpoint may stack q, k and v along N
    assert torch.equal(packed[:32], packing.pack_qserve(codes[:32]))
