"""Plain groups and outlier columns: against independent arithmetic, and what they store."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qoqlab import affine, grouped
from qoqlab.grids import INT4, INT8, UINT4, Zero
from qoqlab.schemes import ActivationFormat, WeightFormat, WeightKind, assemble, pack, quantize_activations


def matrix(n: int = 6, k: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("zero", Zero)
def test_an_asymmetric_group_is_a_row_of_affine(zero: Zero) -> None:
    x = matrix()
    got = grouped.quantize(x, grouped.choose_asymmetric(x, 16, UINT4, zero))
    rows = affine.quantize(x.view(-1, 16), affine.asymmetric_scales(x.view(-1, 16), UINT4, zero))
    assert torch.equal(got.codes.view(-1, 16), rows.codes)
    assert torch.equal(got.scales.flatten(), rows.scales) and torch.equal(got.zeros.flatten(), rows.zeros)
    assert torch.equal(got.dequantize().view(-1, 16), rows.dequantize())


@settings(max_examples=40, deadline=None)
@given(
    lead=st.sampled_from([(3,), (2, 3), ()]),
    columns=st.integers(2, 70),
    group_size=st.integers(1, 40),
    share=st.floats(0, 0.9),
    seed=st.integers(0, 2**31),
)
def test_symmetric_groups_and_outliers_are_rows_of_affine(lead, columns, group_size, share, seed) -> None:
    """Every group, the shorter last one and the outliers' too, is a symmetric row of its own."""
    outliers = int(share * (columns - 1))
    x = torch.randn(*lead, columns, generator=torch.Generator().manual_seed(seed))
    got = grouped.quantize(x, grouped.choose_symmetric(x, group_size, INT4, outliers))
    assert got.codes.dtype == torch.int8 and got.scales.dtype == torch.float16 and got.shape == x.shape
    assert got.scales.shape == (*lead, len(got.slices()))
    for i, group in enumerate(got.slices()):
        row = affine.quantize(
            x[..., group], affine.symmetric_scales(x[..., group], INT8 if group.start >= columns - outliers else INT4)
        )
        assert torch.equal(got.codes[..., group], row.codes) and torch.equal(got.scales[..., i], row.scales)
        assert torch.equal(got.dequantize()[..., group], row.dequantize())


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([1, 2, 16, 32, 64, 128]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    zero=st.sampled_from(list(Zero)),
    exponent=st.integers(-3, 3),
    shift=st.floats(-4, 4),
    seed=st.integers(0, 2**31),
)
def test_asymmetric_groups_of_any_shape_and_dtype(rows, groups, group_size, dtype, zero, exponent, shift, seed) -> None:
    """GROUP_U4, as GPTQ and AWQ use it: codes, stored types and the error that the grid allows."""
    form, k = WeightFormat(WeightKind.GROUP_U4, group_size, zero), groups * group_size
    weight = ((matrix(rows, k, seed) + shift) * 10.0**exponent).to(dtype)
    before, scales = weight.clone(), form.choose(weight)
    got = assemble(scales, scales.encode(weight))
    assert torch.equal(weight, before)
    assert got.codes.dtype == torch.uint8 and got.codes.shape == weight.shape and int(got.codes.max()) <= 15
    assert got.scales.dtype == torch.float16 and got.scales.shape == got.zeros.shape == (rows, groups)
    assert got.zeros.dtype == (torch.uint8 if zero is Zero.INTEGER else torch.float16)
    for wanted in (torch.float16, torch.float32, torch.float64):
        assert got.dequantize(wanted).dtype == wanted
    # half a step; the fp16 scale may be short of the range by one part in 2048 (or half fp16's smallest step), 15 times
    # over, and an fp16 zero off by one part in 2048 of the largest value; the last 1% is fp32's rounding
    split, step = weight.double().unflatten(-1, (groups, -1)), got.scales.double()[..., None]
    largest = split.abs().amax(-1, keepdim=True)
    allowed = step / 2 + 15 * (step * 2.0**-11 + 2.0**-25) + 1.01 * largest * 2.0**-11 + 2.0**-25
    assert bool(((got.dequantize(torch.float64).unflatten(-1, (groups, -1)) - split).abs() <= allowed).all())
    if group_size % 2 == 0:
        restored = form.unpack(pack(got))
        assert torch.equal(restored.codes, got.codes) and torch.equal(restored.dequantize(), got.dequantize())


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.sampled_from([32, 64, 96, 256, 320]),
    group_size=st.sampled_from([2, 16, 32, 64, 128]),
    outliers=st.sampled_from([0, 2, 128]),
    ratio=st.floats(0.3, 1.0),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    exponent=st.integers(-3, 3),
    seed=st.integers(0, 2**31),
)
def test_symmetric_groups_of_any_shape_and_dtype(rows, columns, group_size, outliers, ratio, dtype, exponent, seed) -> None:
    """GROUP_S4, as Atom uses it: stored types, scales, half a step of error, and what is clipped on the grid's end."""
    form = WeightFormat(WeightKind.GROUP_S4, group_size, outliers=outliers)
    weight = (matrix(rows, columns, seed) * 10.0**exponent).to(dtype)
    before, scales = weight.clone(), form.choose(weight, ratio)
    got, kept = assemble(scales, scales.encode(weight)), grouped.outlier_columns(columns, outliers)
    assert torch.equal(weight, before)
    assert got.codes.dtype == torch.int8 and got.codes.shape == weight.shape and got.zeros is None
    assert got.scales.dtype == torch.float16 and got.scales.shape == (rows, form.groups(columns))
    restored = got.dequantize(torch.float64)
    for i, part in enumerate(form.slices(columns)):
        outlying = kept > 0 and part.stop == columns
        high, x, step = (127 if outlying else 7), weight[:, part].double(), got.scales[:, i, None].double()
        wanted = x.abs().amax(1, keepdim=True) * (1.0 if outlying else ratio) / high
        # fp16's rounding, 1 part in 2048 or half its smallest step; a scale that would be 0 is 1
        close = (step - wanted).abs() <= 1.001 * torch.maximum(wanted * 2.0**-11, torch.tensor(2.0**-25).double())
        assert bool((close | ((step == 1) & (wanted <= 1.001 * 2.0**-25))).all())
        inside = x.abs() <= (high + 0.499) * step
        assert bool(((restored[:, part] - x).abs()[inside] <= (0.5001 * step).expand_as(x)[inside]).all())
        beyond = x.abs() >= (high + 0.501) * step
        assert bool((got.codes[:, part].double() == high * x.sign())[beyond].all())
        assert int(got.codes[:, part].abs().max()) <= high
    if (columns - kept) % 2 == 0:
        unpacked = form.unpack(pack(got))
        assert torch.equal(unpacked.codes, got.codes) and torch.equal(unpacked.dequantize(torch.float64), restored)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    lead=st.sampled_from([(3,), (2, 3), ()]),
    columns=st.integers(1, 160),
    group_size=st.sampled_from([None, 1, 7, 32, 128]),
    outliers=st.sampled_from([0, 2, 128]),
    grid=st.sampled_from([INT4, INT8]),
    ratio=st.floats(0.3, 1.0),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_activations_of_any_shape_and_dtype(lead, columns, group_size, outliers, grid, ratio, dtype, seed) -> None:
    """Every token, and group within it, is a symmetric row of its own; outliers lie on INT8 and are not clipped."""
    x = torch.randn(*lead, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    before = x.clone()
    got = ActivationFormat(grid, group_size, outliers, ratio).quantize(x)
    assert torch.equal(x, before) and got.codes.shape == x.shape and got.codes.dtype == torch.int8
    kept = grouped.outlier_columns(columns, outliers)
    assert kept == 0 or columns >= 64  # at most 1 in 32
    restored, start = got.dequantize(torch.float64), 0
    for size in [*_sizes(columns - kept, group_size), *([kept] if kept else [])]:
        part = slice(start, start + size)
        outlying = kept > 0 and start == columns - kept
        scales = affine.symmetric_scales(x[..., part], INT8 if outlying else grid, 1.0 if outlying else ratio)
        row = affine.quantize(x[..., part], scales)
        assert torch.equal(got.codes[..., part], row.codes)
        assert torch.equal(restored[..., part], row.dequantize(torch.float64))
        start += size
    assert start == columns
    assert bool((got.codes[..., : columns - kept].abs() <= grid.high).all())


def _sizes(columns: int, group_size: int | None) -> list[int]:
    """Group sizes of a row, the last one shorter where it has to be."""
    size = group_size or columns
    return [min(size, columns - start) for start in range(0, columns, size)]


def test_columns_can_be_encoded_and_decoded_alone() -> None:
    x = matrix(k=50)
    for scales in (grouped.choose_symmetric(x, 16, INT4, 6), grouped.choose_asymmetric(x, 10)):
        whole = scales.encode(x)
        for part in (slice(3, 4), slice(0, 16), slice(10, 40), slice(44, 50), slice(47, 48), slice(30, 50)):
            assert torch.equal(scales.encode(x[:, part], part), whole[:, part])
            assert torch.equal(scales.decode(whole[:, part], part), scales.decode(whole)[:, part])


def test_literal_codes() -> None:
    """Two groups of two on -7..7 and two outliers on -127..127, by hand."""
    x = torch.tensor([[0.7, -0.35, 7.0, 1.0, 127.0, -64.0]])
    got = grouped.quantize(x, grouped.choose_symmetric(x, 2, INT4, 2))
    assert got.codes.tolist() == [[7, -4, 7, 1, 127, -64]] or got.codes.tolist() == [[7, -3, 7, 1, 127, -64]]
    torch.testing.assert_close(got.scales.float(), torch.tensor([[0.1, 1.0, 1.0]]), rtol=1e-3, atol=0)


def test_ratios_shrink_each_group_and_a_number_spares_outliers() -> None:
    x = matrix(k=40)
    plain, half = grouped.choose_symmetric(x, 16, INT4, 8), grouped.choose_symmetric(x, 16, INT4, 8, 0.5)
    torch.testing.assert_close(half.scales[:, :-1], plain.scales[:, :-1] / 2, rtol=2e-3, atol=0)
    assert torch.equal(half.scales[:, -1], plain.scales[:, -1])
    table = torch.ones(6, 3)
    table[2, 1] = table[4, 2] = 0.5
    mixed = grouped.choose_symmetric(x, 16, INT4, 8, table)
    changed = (mixed.scales != plain.scales).nonzero().tolist()
    assert changed == [[2, 1], [4, 2]]


def test_outlier_counts() -> None:
    assert [grouped.outlier_columns(k, 128) for k in (4096, 14336, 2048, 896, 512, 128, 63)] == [128, 128, 64, 28, 16, 4, 0]
    assert grouped.outlier_columns(4096, 0) == 0


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"groups of 7"):
        grouped.choose_asymmetric(matrix(), 7)
    for outliers in (-1, 64, 65):
        with pytest.raises(ValueError, match=r"outliers: expected 0\.\.63 of 64 columns"):
            grouped.choose_symmetric(matrix(), 16, INT4, outliers)
    with pytest.raises(ValueError, match="only GROUP_S4 keeps outlier columns, got 4 for GROUP_U4"):
        WeightFormat(WeightKind.GROUP_U4, outliers=4)
    for value in (-1, 1.5, True):
        with pytest.raises(ValueError, match="outliers: expected an integer of at least 0"):
            WeightFormat(WeightKind.GROUP_S4, outliers=value)


# --- formats --------------------------------------------------------------------------------------------------------------

FORMATS = [
    WeightFormat(WeightKind.GROUP_U4, 32),
    WeightFormat(WeightKind.GROUP_U4, 128, Zero.SCALED),
    WeightFormat(WeightKind.GROUP_S4, 64),
    WeightFormat(WeightKind.GROUP_S4, 128, outliers=128),
    WeightFormat(WeightKind.CHANNEL_S4),
]


def name(form: WeightFormat) -> str:
    return f"{form.kind.value}-{form.group_size}-{form.outliers}-{form.zero.value}"


@pytest.mark.parametrize("form", FORMATS, ids=name)
@pytest.mark.parametrize("k", [128, 512, 896])
def test_what_is_stored_is_what_layout_and_bits_say(form: WeightFormat, k: int) -> None:
    weight = matrix(24, k)
    scales = form.choose(weight)
    quantized = assemble(scales, scales.encode(weight))
    stored = pack(quantized)
    assert {n: (tuple(t.shape), t.dtype) for n, t in stored.items()} == form.layout(24, k)
    assert form.bits_per_weight(k) * 24 * k == pytest.approx(8 * sum(t.nbytes for t in stored.values()), rel=1e-12)
    restored = form.unpack(stored)
    assert type(restored) is type(quantized)
    assert torch.equal(restored.codes, quantized.codes) and torch.equal(restored.dequantize(), quantized.dequantize())
    assert WeightFormat.of(quantized).layout(24, k) == form.layout(24, k)


def test_literal_bits_of_the_baselines() -> None:
    assert WeightFormat(WeightKind.GROUP_U4).bits_per_weight(4096) == 4 + (16 + 8) / 128
    assert WeightFormat(WeightKind.GROUP_U4, zero=Zero.SCALED).bits_per_weight(4096) == 4 + 32 / 128
    assert WeightFormat(WeightKind.CHANNEL_S4).bits_per_weight(4096) == 4 + 16 / 4096
    # Atom: 31 groups of 128 at 4 bits, 128 outliers at 8, a scale for each of the 32
    atom = WeightFormat(WeightKind.GROUP_S4, outliers=128).bits_per_weight(4096)
    assert atom == (31 * 128 * 4 + 128 * 8 + 32 * 16) / 4096


def test_without_outliers_mixed_precision_is_plain_grouping() -> None:
    """Atom with no outlier channels: the same codes as symmetric group quantisation, written out."""
    weight = matrix(8, 256)
    scales = WeightFormat(WeightKind.GROUP_S4, 64).choose(weight)
    groups = weight.view(8, 4, 64)
    step = (groups.abs().amax(-1, keepdim=True) / 7).half().float()
    codes = (groups / step).round().clamp(-7, 7)
    assert torch.equal(scales.encode(weight).float(), codes.view(8, 256))
    assert torch.equal(scales.decode(scales.encode(weight)), (codes * step).view(8, 256))


def test_outlier_columns_are_int8_exactly() -> None:
    weight = matrix(8, 512)
    scales = WeightFormat(WeightKind.GROUP_S4, 128, outliers=128).choose(weight)
    got = assemble(scales, scales.encode(weight))
    tail = weight[:, -16:]
    expected = affine.quantize(tail, affine.symmetric_scales(tail, INT8))
    assert got.outliers == 16 and torch.equal(got.codes[:, -16:], expected.codes)
    assert torch.equal(got.dequantize()[:, -16:], expected.dequantize())
    assert int(got.codes[:, -16:].abs().max()) == 127 and int(got.codes[:, :-16].abs().max()) == 7


def test_activation_formats() -> None:
    x = matrix(5, 256)
    assert torch.equal(quantize_activations(x, INT8).codes, affine.quantize_per_token_s8(x).codes)
    clipped = quantize_activations(x, ActivationFormat(INT4, ratio=0.5))
    torch.testing.assert_close(clipped.scales.float(), x.abs().amax(-1) / 14, rtol=1e-3, atol=0)
    mixed = quantize_activations(x, ActivationFormat(INT4, 128, 128))
    assert mixed.outliers == 8 and mixed.scales.shape == (5, 3)
    apart = quantize_activations(x, ActivationFormat(INT8, None, 128))
    assert apart.scales.shape == (5, 2) and ActivationFormat(INT4, 128, 128).name == "INT4 g128 + 128 INT8"
    for bad in ({"grid": "INT8"}, {"ratio": 0.0}, {"group_size": 0}, {"outliers": -1}):
        with pytest.raises((TypeError, ValueError), match=next(iter(bad))):
            ActivationFormat(**bad)
    with pytest.raises(ValueError, match="x: holds 1 NaN"):
        quantize_activations(torch.tensor([[1.0, float("nan")]]), ActivationFormat(INT4, 2))
