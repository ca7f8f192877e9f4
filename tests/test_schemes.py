"""Formats: what they store, counted in bytes, and how they dispatch."""

import json

import pytest
import torch

from qoqlab import affine, kv, packing, progressive, recipes
from qoqlab.grids import INT4, INT8, UINT4, UINT8, Zero
from qoqlab.kv import Keys, KVFormat
from qoqlab.schemes import (
    ActivationFormat,
    Scheme,
    WeightFormat,
    WeightKind,
    assemble,
    scheme_from_json,
    scheme_to_json,
)


def weight(n=32, k=256):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0))


def stored_bytes(*tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("zero", Zero)
@pytest.mark.parametrize("k", [128, 640])
def test_progressive_bits_are_those_of_the_stored_tensors(group_size, zero, k):
    form = WeightFormat(WeightKind.PROGRESSIVE_U4, group_size, zero)
    w = progressive.quantize(weight(k=k), group_size, zero)
    stored = stored_bytes(packing.pack_u4(w.codes), w.group_scales, w.group_zeros, w.channel_scales)
    assert form.bits_per_weight(k) * w.codes.numel() == 8 * stored
    assert packing.pack_qserve(w.codes).nbytes == packing.pack_u4(w.codes).nbytes


@pytest.mark.parametrize("zero", Zero)
@pytest.mark.parametrize("k", [128, 640])
def test_per_channel_bits_are_those_of_the_stored_tensors(zero, k):
    p = affine.quantize_per_channel_u4(weight(k=k), zero)
    stored = stored_bytes(packing.pack_u4(p.codes), p.scales, p.zeros)
    assert WeightFormat(WeightKind.CHANNEL_U4, zero=zero).bits_per_weight(k) * p.codes.numel() == 8 * stored


def test_eight_bit_weights():
    form = WeightFormat(WeightKind.CHANNEL_S8)
    scales = form.choose(weight())
    codes = scales.encode(weight())
    assert codes.dtype == torch.int8
    assert form.bits_per_weight(256) * codes.numel() == 8 * stored_bytes(codes, scales.scales)


def test_literal_bits():
    assert WeightFormat(WeightKind.PROGRESSIVE_U4).bits_per_weight(4096) == 4 + 16 / 128 + 16 / 4096
    assert WeightFormat(WeightKind.CHANNEL_U4).bits_per_weight(4096) == 4 + 24 / 4096
    assert Scheme(kv=UINT4).kv_bits_per_value(128) == 4.25
    assert Scheme(kv=UINT8).kv_bits_per_value(128) == 8.25
    assert Scheme().kv_bits_per_value(128) == 16


@pytest.mark.parametrize("head_dim", [64, 128])
def test_kv_bits_are_those_of_the_stored_tensors(head_dim):
    x = torch.randn(5, 2, head_dim, generator=torch.Generator().manual_seed(0))
    four, eight = kv.quantize_kv4(x), kv.quantize_kv(x, UINT8)
    stored = stored_bytes(packing.pack_u4(four.codes), four.scales, four.zeros)
    assert Scheme(kv=UINT4).kv_bits_per_value(head_dim) * x.numel() == 8 * stored
    stored = stored_bytes(eight.codes, eight.scales, eight.zeros)
    assert Scheme(kv=UINT8).kv_bits_per_value(head_dim) * x.numel() == 8 * stored


def test_choose_and_assemble_give_what_the_modules_give():
    x = weight()
    for zero in Zero:
        form = WeightFormat(WeightKind.PROGRESSIVE_U4, 64, zero)
        w = assemble(form.choose(x), form.choose(x).encode(x))
        assert isinstance(w, progressive.ProgressiveWeight)
        assert torch.equal(w.codes, progressive.quantize(x, 64, zero).codes)
        form = WeightFormat(WeightKind.CHANNEL_U4, zero=zero)
        p = assemble(form.choose(x), form.choose(x).encode(x))
        assert isinstance(p, affine.Affine)
        assert torch.equal(p.codes, affine.quantize_per_channel_u4(x, zero).codes)


def test_group_counts():
    assert WeightFormat(WeightKind.PROGRESSIVE_U4, 64).groups(256) == 4
    assert WeightFormat(WeightKind.CHANNEL_U4, 64).groups(256) == 1


@pytest.mark.parametrize("kind", WeightKind)
def test_ratios_are_accepted_as_numbers_and_per_group(kind):
    x, form = weight(), WeightFormat(kind, 64)
    table = torch.full((32, form.groups(256)), 0.8)
    table[1] = 1.0
    scales, uniform, plain = form.choose(x, table), form.choose(x, 0.8), form.choose(x)
    codes = scales.encode(x)
    assert torch.equal(codes[0], uniform.encode(x)[0]) and torch.equal(codes[1], plain.encode(x)[1])
    assert not torch.equal(codes[0], plain.encode(x)[0])


def test_bad_weights_are_refused_for_every_kind():
    # finite weights are the caller's duty, yet NaN and infinity must not slip through: their scales are not finite
    for kind in WeightKind:
        for value in (float("nan"), float("inf"), 1e38):
            with pytest.raises(ValueError):
                WeightFormat(kind).choose(torch.full((2, 128), value))
    with pytest.raises(ValueError, match="groups of 128"):
        WeightFormat(WeightKind.PROGRESSIVE_U4).choose(torch.ones(2, 100))


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        (Scheme(), "W16A16KV16"),
        (Scheme(WeightFormat(WeightKind.PROGRESSIVE_U4), INT8, UINT4), "W4A8KV4 g128"),
        (Scheme(WeightFormat(WeightKind.CHANNEL_U4), INT8, UINT4), "W4A8KV4"),
        (Scheme(WeightFormat(WeightKind.CHANNEL_S8), INT8, UINT8), "W8A8KV8"),
        (Scheme(WeightFormat(WeightKind.GROUP_U4)), "W4A16KV16 g128"),
        (Scheme(WeightFormat(WeightKind.CHANNEL_S4), ActivationFormat(INT4, ratio=0.9), KVFormat(ratio=0.9)), "W4A4KV4"),
        (Scheme(WeightFormat(WeightKind.GROUP_S4, outliers=128), INT4, UINT8), "W4A4KV8 g128 + INT8 outliers"),
        (Scheme(kv=KVFormat(keys=Keys.CHANNEL)), "W16A16KV4 keys per channel"),
        (Scheme(kv=KVFormat(None, rotate_keys=True)), "W16A16KV16"),
    ],
)
def test_names(scheme, name):
    assert str(scheme) == name


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"weights": "W4"}, TypeError, "weights: expected a WeightFormat or None, got 'W4'"),
        ({"weights": WeightKind.CHANNEL_U4}, TypeError, "weights: expected a WeightFormat or None, got <WeightKind"),
        ({"activations": "A8"}, TypeError, "activations: expected a Grid, an ActivationFormat or None, got 'A8'"),
        ({"kv": "KV4"}, TypeError, "kv: expected a Grid, a KVFormat or None, got 'KV4'"),
        ({"kv": INT8}, ValueError, "grid: keys and values need an unsigned grid, got INT8"),
        ({"activations": INT8}, ValueError, "activations: INT8 needs quantised weights, got weights=None"),
        ({"activations": ActivationFormat(INT4, 32)}, ValueError, "activations: INT4 g32 needs quantised weights"),
    ],
)
def test_parts_that_mean_nothing_are_refused(parts, error, message):
    with pytest.raises(error, match=message):
        Scheme(**parts)


def test_kv_bits_of_keys_per_channel():
    # keys: 32 bits of scale and zero for 32 tokens of a channel; values: for the 128 channels of a token
    assert Scheme(kv=KVFormat(keys=Keys.CHANNEL, window=32)).kv_bits_per_value(128) == 4 + (32 / 32 + 32 / 128) / 2
    assert Scheme(kv=KVFormat(UINT8, rotate_keys=True)).kv_bits_per_value(64) == 8.5
    assert Scheme(kv=KVFormat(None)).kv_bits_per_value(64) == 16


SCHEMES = [
    *[recipes.get(name).scheme for name in recipes.names()],
    Scheme(WeightFormat(WeightKind.GROUP_U4, 32, Zero.SCALED), ActivationFormat(INT8, 32), KVFormat(None, rotate_keys=True)),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_schemes_survive_json(scheme):
    text = json.dumps(scheme_to_json(scheme))
    assert scheme_from_json(json.loads(text)) == scheme


def test_json_of_the_first_release_is_still_read():
    data = {
        "weights": {"kind": "progressive-u4", "group_size": 128, "zero": "integer", "first_level": "unrounded"},
        "activations": "INT8",
        "kv": "UINT4",
    }
    assert scheme_from_json(data) == Scheme(WeightFormat(WeightKind.PROGRESSIVE_U4), INT8, UINT4)


def test_nonsense_in_json_is_refused():
    good = scheme_to_json(Scheme(WeightFormat(WeightKind.PROGRESSIVE_U4), INT8, KVFormat()))
    for part, value in (
        ("weights", {"kind": "u2"}),
        ("weights", {**good["weights"], "group_size": "128"}),
        ("weights", {**good["weights"], "zero": 3}),
        ("activations", "INT9"),
        ("activations", {"grid": "INT8", "colour": 1}),
        ("activations", {"grid": "INT8", "ratio": 2}),
        ("kv", {**good["kv"], "keys": "row"}),
        ("kv", {**good["kv"], "window": -2}),
        ("kv", {}),
        ("kv", ["UINT4"]),
    ):
        with pytest.raises((KeyError, TypeError, ValueError)):
            scheme_from_json({**good, part: value})
