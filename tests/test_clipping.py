"""Clipping search: never worse than no clipping, and the reduced objective is the direct one."""

import pytest
import torch

from qoqlab import clipping
from qoqlab.grids import Zero
from qoqlab.schemes import WeightFormat, WeightKind

FORMATS = [
    WeightFormat(WeightKind.CHANNEL_U4),
    WeightFormat(WeightKind.CHANNEL_U4, zero=Zero.SCALED),
    WeightFormat(WeightKind.PROGRESSIVE_U4, 16),
    WeightFormat(WeightKind.PROGRESSIVE_U4, 32, Zero.SCALED),
]
RATIOS = clipping.candidate_ratios(17, 0.2)


def name(form):
    return f"{form.kind.value}-{form.group_size}-{form.zero.value}"


def layer(tokens=96):
    """A weight [12, 64] with some heavy tails and correlated inputs [tokens, 64]."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 64, generator=generator)
    weight[::3, ::16] *= 6
    inputs = torch.randn(tokens, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    return weight, inputs


def errors(weight, inputs, form, ratio):
    """What every group's columns add to the error of every output at a ratio, fp64: ``[groups, S, N]``."""
    scales = form.choose(weight, ratio)
    delta = (scales.decode(scales.encode(weight)) - weight).double()
    groups = form.groups(weight.shape[1])
    return torch.stack([x @ d.T for x, d in zip(inputs.double().chunk(groups, 1), delta.chunk(groups, 1), strict=True)])


def total(weight, inputs, form, ratio):
    """Squared error of every row's output: ``[N]``."""
    return errors(weight, inputs, form, ratio).sum(0).square().sum(0)


@pytest.mark.parametrize("form", FORMATS, ids=name)
@pytest.mark.parametrize("tokens", [96, 8])  # more and fewer tokens than columns: with and without the QR reduction
def test_each_group_is_best_on_top_of_those_before_it(form, tokens):
    weight, inputs = layer(tokens)
    chosen = clipping.search_output_error(weight, inputs, form, RATIOS)
    assert chosen.shape == (12, form.groups(64)) and chosen.dtype == torch.float32
    clipped = (chosen != 1).any(1)
    assert clipped.any()
    picked = errors(weight, inputs, form, chosen)
    added = torch.stack([errors(weight, inputs, form, ratio) for ratio in RATIOS])  # [ratios, groups, S, N]
    for g in range(form.groups(64)):
        before = picked[:g].sum(0)
        reached = (before + picked[g]).square().sum(0)
        best = (before + added[:, g]).square().sum(1).amin(0)
        # the search sums in fp32: a candidate within 64 + 96 roundings of the best may be preferred
        assert (reached <= best * (1 + 2.0**-12))[clipped].all()


@pytest.mark.parametrize("form", FORMATS, ids=name)
def test_never_worse_than_no_clipping(form):
    weight, inputs = layer()
    chosen = clipping.search_output_error(weight, inputs, form, RATIOS)
    with_clipping, without = total(weight, inputs, form, chosen), total(weight, inputs, form, 1.0)
    assert (with_clipping <= without * (1 + 2.0**-12)).all()
    assert with_clipping.sum() < 0.95 * without.sum()


def test_groups_that_know_of_each_other_do_better_than_alone():
    weight, inputs = layer()
    form = FORMATS[2]
    together = clipping.search_output_error(weight, inputs, form, RATIOS)
    added = torch.stack([errors(weight, inputs, form, ratio) for ratio in RATIOS])
    alone = torch.tensor(RATIOS)[added.square().sum(2).argmin(0)].T  # [N, groups]
    assert total(weight, inputs, form, together).sum() < total(weight, inputs, form, alone).sum()


def test_ties_keep_the_first_ratio():
    weight, _ = layer()
    form = FORMATS[0]
    # nothing is seen, so every ratio has error 0
    assert (clipping.search_output_error(weight, torch.zeros(4, 64), form, [1.0, 0.9, 0.5]) == 1).all()
    # zero rows have no error at any ratio
    weight[2] = 0
    chosen = clipping.search_output_error(weight, layer()[1], form, [1.0, 0.9, 0.5])
    assert chosen[2].tolist() == [1.0]


def test_a_row_on_the_grid_is_not_clipped():
    weight = torch.arange(16.0).repeat(1, 4)
    assert clipping.search_output_error(weight, layer()[1], FORMATS[0], RATIOS).tolist() == [[1.0]]


def test_arguments_stay_as_they_are():
    weight, inputs = layer()
    before = weight.clone(), inputs.clone()
    clipping.search_output_error(weight, inputs, FORMATS[2], RATIOS)
    assert torch.equal(weight, before[0]) and torch.equal(inputs, before[1])


def test_block_search_takes_the_first_best_ratio():
    assert clipping.search_block_error(lambda ratio: (ratio - 0.6) ** 2, [1.0, 0.8, 0.6, 0.4]) == 0.6
    assert clipping.search_block_error(lambda ratio: 1.0, [1.0, 0.8, 0.6]) == 1.0
    assert clipping.search_block_error({1.0: 2.0, 0.8: 1.0, 0.6: 1.0}.__getitem__, [1.0, 0.8, 0.6]) == 0.8


def test_candidate_ratios():
    ratios = clipping.candidate_ratios(81, 0.2)
    assert len(ratios) == 81 and ratios[0] == 1.0
    assert ratios[1] == pytest.approx(0.99) and ratios[-1] == pytest.approx(0.2)
    assert clipping.candidate_ratios(1, 0.2) == [1.0]
    for count, lowest in ((0, 0.5), (3, 0.0), (3, 1.1)):
        with pytest.raises(ValueError, match="count, lowest"):
            clipping.candidate_ratios(count, lowest)
