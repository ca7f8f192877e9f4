"""The packed weight and the tiled activations, byte by byte."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from qoqlab_kernels import cases
from qoqlab_kernels.layout import (
    CODE_BYTES,
    MAX_K,
    Activations,
    PackedWeight,
    pack_codes,
    pack_weight,
    quantize_activations_torch,
    tile_activations,
    unpack,
    unpack_codes,
)

from qoqlab import affine, progressive
from qoqlab.affine import Affine
from qoqlab.grids import INT8, UINT4, Zero
from qoqlab.progressive import FirstLevel, ProgressiveWeight

SHAPES = [(32, 32), (64, 128), (96, 160), (160, 384), (224, 288), (128, 640)]
SIZED = [(n, k, name) for n, k in SHAPES for name in cases.FORMATS if k % max(32, cases.FORMATS[name][0]) == 0]


def assert_same(one: ProgressiveWeight | Affine, two: ProgressiveWeight | Affine) -> None:
    """Every field is equal, tensors in dtype and value."""
    assert type(one) is type(two)
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(two, field.name)
        if isinstance(a, torch.Tensor):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), field.name
            assert torch.equal(a, b), field.name
        else:
            assert a == b, field.name


# -- weights: there and back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k", "name"), SIZED)
@pytest.mark.parametrize("make", [cases.weight, cases.extreme_weight])
def test_unpack_inverts_pack(n: int, k: int, name: str, make) -> None:
    w = make(n, k, name)
    packed = pack_weight(w)
    size, zero = cases.FORMATS[name]
    assert (packed.n, packed.k, packed.group_size, packed.zero) == (n, k, size, zero)
    assert packed.groups == (128 // size if size else 0)
    assert packed.units.shape == (-(-n // 64), -(-k // 128), 4096 + 128 * packed.groups)
    assert packed.nbytes == packed.units.nbytes + packed.rows.nbytes
    assert packed.units.is_contiguous() and packed.rows.is_contiguous()
    assert_same(unpack(packed), w)
    assert_same(unpack(packed.to("cpu")), w)


def test_what_fills_up_a_unit_is_zero() -> None:
    """So the tensor cores add nothing for inputs beyond K, and outputs beyond N only meet zero scales."""
    w = cases.weight(96, 160, "g32")
    packed = pack_weight(w)
    codes = unpack_codes(packed.units[..., :CODE_BYTES])
    assert codes.shape == (128, 256)
    assert not codes[96:].any() and not codes[:, 160:].any()
    groups = packed.units[..., CODE_BYTES:].reshape(2, 2, 4, 4, 8, 2, 2)  # block unit group warp g high (scale, offset)
    assert not groups[:, 1, 1:].any() and not groups[1, :, :, 2:].any()
    assert not packed.rows[96:].any()


def test_packing_does_not_change_the_weight() -> None:
    w = cases.weight(64, 128)
    before = {k: v.clone() for k, v in vars(w).items() if isinstance(v, torch.Tensor)}
    pack_weight(w)
    assert all(torch.equal(getattr(w, name), value) for name, value in before.items())


def test_a_weight_that_is_not_contiguous_packs_the_same() -> None:
    w = cases.weight(96, 160, "g32")
    other = dataclasses.replace(w, codes=w.codes.T.contiguous().T, group_scales=w.group_scales.T.contiguous().T)
    assert torch.equal(pack_weight(other).units, pack_weight(w).units)


# -- weights: golden bytes ------------------------------------------------------------------------------------------------


def numbered(n: int, k: int) -> torch.Tensor:
    """Codes that differ from their neighbours in both directions."""
    rows, columns = torch.arange(n)[:, None], torch.arange(k)[None]
    return ((rows * 7 + columns * 3 + columns // 16 * 5 + rows // 8) % 16).to(torch.uint8)


def by_formula(codes: torch.Tensor) -> np.ndarray:
    """A unit's bytes, one nibble at a time, from the description of the layout and nothing else."""
    unit = np.zeros(4096, np.uint8)
    for n in range(64):
        for k in range(128):
            warp, high, g = n // 16, n % 16 // 8, n % 8
            step, half, q, byte = k // 32, k % 32 // 16, k % 16 // 4, k % 4
            thread = 32 * warp + 4 * g + q
            at = 8 * step + 4 * half + byte  # of the thread's 32 bytes, which are two loads of 16
            spot = at // 16 * 2048 + 16 * thread + at % 16
            unit[spot] |= int(codes[n, k]) << 4 * high
    return unit


def test_a_unit_is_what_the_formula_says() -> None:
    codes = numbered(64, 128)
    packed = pack_codes(codes)
    assert packed.shape == (1, 1, 4096)
    assert np.array_equal(packed[0, 0].numpy(), by_formula(codes))


def test_units_follow_each_other_along_k() -> None:
    codes = numbered(128, 256)
    packed = pack_codes(codes)
    for block in (0, 1):
        for unit in (0, 1):
            part = codes[64 * block : 64 * block + 64, 128 * unit : 128 * unit + 128]
            assert np.array_equal(packed[block, unit].numpy(), by_formula(part)), (block, unit)


def test_some_bytes_written_out() -> None:
    """Only output n, input k is not zero: where it is found."""
    for (n, k), (spot, value) in {
        (0, 0): (0, 0x0D),  # thread 0, first byte, low nibble
        (8, 0): (0, 0xD0),  # g + 8: high nibble
        (0, 3): (3, 0x0D),
        (0, 4): (16, 0x0D),  # the next lane
        (1, 0): (64, 0x0D),  # g = 1: lane 4
        (0, 16): (4, 0x0D),  # the other half of a step of 32
        (0, 32): (8, 0x0D),
        (0, 64): (2048, 0x0D),  # the second 16-byte load
        (16, 0): (512, 0x0D),  # the next warp
        (63, 127): (4095, 0xD0),
    }.items():
        codes = torch.zeros(64, 128, dtype=torch.uint8)
        codes[n, k] = 13
        unit = pack_codes(codes)[0, 0]
        assert unit.nonzero().tolist() == [[spot]], (n, k)
        assert int(unit[spot]) == value, (n, k)


def test_scales_and_offsets_written_out() -> None:
    """Behind the codes: for each group 4 bytes for every output g, (scale, offset) of g and of g + 8."""
    codes = torch.zeros(64, 128, dtype=torch.uint8)
    scales = torch.ones(64, 2, dtype=torch.int8)
    zeros = torch.zeros(64, 2, dtype=torch.uint8)
    scales[9, 1], zeros[9, 1] = 5, 3  # output 9 = warp 0, high, g 1; second group of 64
    scales[16, 0], zeros[16, 0] = 7, 2  # output 16 = warp 1, low, g 0; first group
    w = ProgressiveWeight(torch.ones(64).half(), scales, zeros, 64, Zero.INTEGER, FirstLevel.UNROUNDED, codes)
    tail = pack_weight(w).units[0, 0, 4096:]
    assert tail.shape == (256,)
    assert tail[128 + 4 : 128 + 8].tolist() == [1, 128, 5, 128 - 15]
    assert tail[32:36].tolist() == [7, 128 - 14, 1, 128]
    assert tail[:4].tolist() == [1, 128, 1, 128]
    scaled = dataclasses.replace(w, group_zeros=zeros.to(torch.int8), zero=Zero.SCALED)
    assert pack_weight(scaled).units[0, 0, 4096 + 128 + 4 : 4096 + 128 + 8].tolist() == [1, 128, 5, 125]


def test_row_constants_written_out() -> None:
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    scales = torch.full((32,), 0.5, dtype=torch.float16)
    integer = Affine(scales, torch.full((32,), 9, dtype=torch.uint8), UINT4, Zero.INTEGER, codes)
    scaled = Affine(scales, torch.full((32,), 1.25, dtype=torch.float16), UINT4, Zero.SCALED, codes)
    one, two = pack_weight(integer).rows, pack_weight(scaled).rows
    assert one.shape == (64, 4) and one.dtype == torch.float32
    assert one[31, 0] == 0.5 and one.view(torch.int32)[31].tolist()[1:] == [9, 0, 0]
    assert two[31].tolist() == [0.5, 1.25, 0.0, 0.0]
    three = pack_weight(progressive.quantize(torch.randn(32, 32), 32)).rows.view(torch.int32)
    assert three[:32, 1].tolist() == [128] * 32 and not three[32:].any()


# -- weights: rules -------------------------------------------------------------------------------------------------------


def channel(n: int, k: int) -> Affine:
    return affine.quantize_per_channel_u4(torch.randn(n, k))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: torch.zeros(64, 128),
            TypeError,
            "weight: expected a ProgressiveWeight or a per-channel Affine, got Tensor",
        ),
        (lambda: None, TypeError, "weight: expected .* got NoneType"),
        (lambda: channel(33, 32), ValueError, "weight: 33x32 does not fit; N and K must be multiples of 32"),
        (lambda: channel(32, 48), ValueError, "weight: 32x48 does not fit; N and K must be multiples of 32"),
        (lambda: progressive.quantize(torch.randn(64, 256), 16), ValueError, "group_size 16 is not one of 32, 64, 128"),
        (lambda: progressive.quantize(torch.randn(64, 256), 256), ValueError, "group_size 256 is not one of 32, 64, 128"),
        (
            lambda: affine.quantize_per_token_s8(torch.randn(64, 128)),
            ValueError,
            "weight: expected 4-bit codes .* got torch.int8 codes of shape",
        ),
        (
            lambda: dataclasses.replace(channel(64, 128), grid=INT8),
            ValueError,
            "weight: expected 4-bit codes",
        ),
        (
            lambda: dataclasses.replace(channel(64, 128), codes=torch.zeros(2, 64, 128, dtype=torch.uint8)),
            ValueError,
            r"weight: expected 4-bit codes \[N, K\]",
        ),
        (
            lambda: dataclasses.replace(channel(64, 128), codes=torch.full((64, 128), 16, dtype=torch.uint8)),
            ValueError,
            "weight: codes go up to 16; 4-bit codes end at 15",
        ),
        (
            lambda: dataclasses.replace(channel(64, 128), codes=torch.zeros(64, 0, dtype=torch.uint8)),
            ValueError,
            "weight: 64x0 does not fit",
        ),
        (
            lambda: dataclasses.replace(channel(32, 32), codes=torch.zeros(1, 1, dtype=torch.uint8).expand(32, MAX_K + 32)),
            ValueError,
            f"weight: 32x{MAX_K + 32} does not fit; .* K at most {MAX_K}",
        ),
    ],
)
def test_what_the_kernels_cannot_hold_is_refused(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pack_weight(make())


def one_group(code: int, scale: int, zero: int, kind: Zero) -> ProgressiveWeight:
    """Every weight decodes to the same number, except those of code 0 in other outputs."""
    codes = torch.full((32, 32), code, dtype=torch.uint8)
    zeros = torch.full((32, 1), zero, dtype=torch.uint8 if kind is Zero.INTEGER else torch.int8)
    ones = torch.ones(32).half()
    scales = torch.full((32, 1), scale, dtype=torch.int8)
    return ProgressiveWeight(ones, scales, zeros, 32, kind, FirstLevel.UNROUNDED, codes)


@pytest.mark.parametrize("kind", Zero)
def test_exactly_the_weights_inside_int8_are_packed(kind: Zero) -> None:
    """Codes, scales and zeros around the edges: packed if the weight and its offset are INT8 numbers, refused if not."""
    accepted = refused = 0
    for scale in (-1, 1, 8, 16, 17, 18, 127):
        for zero in (0, 1, 7, 8, 15) if kind is Zero.INTEGER else (-128, -127, -113, 0, 113, 127):
            for code in (0, 1, 7, 8, 15):
                product = scale * zero if kind is Zero.INTEGER else zero
                # four bytes are widened by one multiplication and one addition, so each step must fit in its byte
                fits = scale >= 0 and 0 <= 128 - product <= 255 and 0 <= code * scale - product + 128 <= 255
                w = one_group(code, scale, zero, kind)
                if fits:
                    assert_same(unpack(pack_weight(w)), w)
                    accepted += 1
                else:
                    with pytest.raises(
                        ValueError, match=r"weight: group 0 of output 0 decodes to INT8 values .* need -128..127"
                    ):
                        pack_weight(w)
                    refused += 1
    assert accepted > 20 and refused > 20


@pytest.mark.parametrize("kind", Zero)
def test_every_weight_that_the_quantiser_makes_fits(kind: Zero) -> None:
    """The protective range keeps level-2 weights inside INT8 (paper section 4.1), whatever the numbers."""
    generator = torch.Generator().manual_seed(3)
    for spread in (0.01, 1.0, 30.0):
        for shift in (-20.0, 0.0, 20.0):
            w = torch.randn(64, 256, generator=generator) * spread + shift
            packed = pack_weight(progressive.quantize(w, 32, kind))
            assert isinstance(packed, PackedWeight)


# -- accumulators ---------------------------------------------------------------------------------------------------------


def test_no_accumulator_leaves_int32_up_to_max_k() -> None:
    """The largest weight byte is 255, the largest activation 128 in size; K of them stay below 2**31 up to MAX_K, where the
    next multiple of 32 does not."""
    assert MAX_K % 32 == 0
    assert MAX_K * 255 * 128 < 2**31 <= (MAX_K + 32) * 255 * 128
    assert cases.WIDEST_K <= MAX_K
    # partial sums of different signs are smaller still, and what the epilogue subtracts, 128 * sum(x), is too
    assert MAX_K * 128 * 128 < 2**31


@pytest.mark.parametrize(("weight", "x"), [(255, -128), (255, 127), (0, -128)])
def test_the_widest_layer_of_extreme_codes(weight: int, x: int) -> None:
    products = torch.full((cases.WIDEST_K,), weight, dtype=torch.int64) * torch.full((cases.WIDEST_K,), x, dtype=torch.int64)
    total = products.cumsum(0)
    assert torch.equal(total.to(torch.int32).long(), total)
    shifted = total[-1] - 128 * x * cases.WIDEST_K
    assert int(shifted.to(torch.int32)) == cases.WIDEST_K * x * (weight - 128)


# -- activations ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "k"), [(1, 32), (3, 160), (8, 128), (9, 288), (17, 640)])
def test_tiles_hold_the_codes(m: int, k: int) -> None:
    a = cases.activations(m, k)
    x = tile_activations(a.codes, a.scales)
    assert x.shape == (m, k) and x.tiles.shape == (-(-k // 128), -(-m // 8) * 8, 128) and x.tiles.dtype == torch.int8
    assert torch.equal(x.codes, a.codes) and torch.equal(x.scales, a.scales)
    assert torch.equal(x.sums.long(), a.codes.sum(-1, dtype=torch.int64))
    for unit in range(-(-k // 128)):
        for token in range(m):
            for chunk in range(8):
                want = torch.zeros(16, dtype=torch.int8)
                have = a.codes[token, 128 * unit + 16 * chunk : 128 * unit + 16 * chunk + 16]
                want[: len(have)] = have
                at = 16 * (chunk ^ token % 8)
                assert torch.equal(x.tiles[unit, token, at : at + 16], want), (unit, token, chunk)
    assert not x.tiles[:, m:].any() and not x.tokens[m:].any()


def test_a_tile_written_out() -> None:
    codes = torch.arange(128).repeat(8, 1).sub(64).to(torch.int8)
    x = tile_activations(codes, torch.full((8,), 0.25, dtype=torch.float16))
    assert x.tiles[0, 0, :4].tolist() == [-64, -63, -62, -61]  # token 0: in order
    assert x.tiles[0, 1, :2].tolist() == [-48, -47]  # token 1: chunks exchanged in pairs
    assert x.tiles[0, 1, 16:18].tolist() == [-64, -63]
    assert x.tiles[0, 7, -16:].tolist() == list(range(-64, -48))  # token 7: backwards
    assert x.tokens[3].tolist() == [-64, 0x3E800000]  # the sum; 0.25 in fp32


def test_torch_quantises_into_the_same_order() -> None:
    x = torch.randn(5, 160)
    a = affine.quantize_per_token_s8(x)
    made = quantize_activations_torch(x)
    assert isinstance(made, Activations)
    assert torch.equal(made.codes, a.codes) and torch.equal(made.scales, a.scales)
