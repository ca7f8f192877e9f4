"""Drawing the next token: what is drawn and how often; that nothing else in the batch has a part in it."""

import math
import random

import pytest
import torch

from qoqlab.sampling import Sampling, choose, draws_of, signed, uniform

CPU = torch.device("cpu")


def drawn(logits, samplings, positions):
    """Tokens of rows."""
    return choose(logits, draws_of(samplings, logits.shape[-1], CPU), torch.as_tensor(positions))[0]


def shares(**options):
    """How often each of four tokens comes up in 8000 draws: a standard deviation of at most 0.0056."""
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0]).expand(8000, 4)
    return drawn(logits, [Sampling(**options)] * 8000, range(8000)).bincount(minlength=4) / 8000


def test_the_generator_is_splitmix64():
    """With Python's integers. The first numbers of SplitMix64 with seed 0 are known."""

    def mixed(z):
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    step = 0x9E3779B97F4A7C15
    assert [hex(mixed(n * step % 2**64)) for n in (1, 2)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]
    seeds, positions = [0, 1, -1, 2**63 - 1, -(2**63), 2**64 + 5, 123456789], [0, 1, 7, 4096, 131071, 3, 10**6]
    want = [
        (mixed((mixed((s + step) % 2**64) + p * step) % 2**64) >> 11) / 2**53 for s, p in zip(seeds, positions, strict=True)
    ]
    assert uniform(torch.tensor([signed(s) for s in seeds]), torch.tensor(positions)).tolist() == want


def test_neighbouring_seeds_and_positions_are_as_good_as_independent():
    grid = uniform(torch.arange(300)[:, None], torch.arange(300)[None])
    assert abs(float(grid.mean()) - 0.5) < 0.004 and abs(float(grid.var()) - 1 / 12) < 0.002
    for other in (grid.roll(1, 0), grid.roll(1, 1)):
        assert abs(float(torch.corrcoef(torch.stack([grid.flatten(), other.flatten()]))[0, 1])) < 0.015


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])
    torch.testing.assert_close(shares(temperature=1.0), logits.softmax(-1), rtol=0, atol=0.02)
    torch.testing.assert_close(shares(temperature=2.0), (logits / 2).softmax(-1), rtol=0, atol=0.02)
    two = shares(temperature=1.0, top_k=2)
    assert two[:2].sum() == 0
    torch.testing.assert_close(two[2:], logits[2:].softmax(-1), rtol=0, atol=0.02)
    assert shares(temperature=1.0, top_p=0.6).tolist() == [0, 0, 0, 1]  # the likeliest alone holds 0.64
    assert shares(temperature=1.0, top_p=0.7)[:2].sum() == 0 and shares(temperature=1.0, top_p=0.7)[2] > 0.2
    assert shares(temperature=1.0, top_p=0.9, top_k=2)[2] > 0.2  # 0.73 of what top_k leaves, so both stay
    assert shares(temperature=1.0, top_p=0.7, top_k=2).tolist() == [0, 0, 0, 1]
    for temperature in (1e-9, 1e-300, 0.0):
        assert shares(temperature=temperature).tolist() == [0, 0, 0, 1]


def test_equally_likely_tokens_stay_or_go_together():
    logits = torch.tensor([1.0, 2.0, 2.0, 0.0]).expand(200, 4)
    for options in ({"top_k": 1}, {"top_p": 0.1}):
        assert set(drawn(logits, [Sampling(1.0, **options)] * 200, range(200)).tolist()) == {1, 2}


def test_a_row_is_drawn_alike_in_any_company():
    torch.manual_seed(0)
    chance, vocabulary = random.Random(0), 700
    logits = torch.randn(40, vocabulary) * 3
    kinds = [
        None,
        Sampling(),
        Sampling(0.7, seed=3),
        Sampling(1.0, top_k=9),
        Sampling(1.3, top_p=0.8),
        Sampling(2.0, 50, 0.5, 8),
    ]
    ways = [chance.choice(kinds) for _ in range(40)]
    positions = torch.randint(5000, (40,), dtype=torch.int32)
    together = drawn(logits, ways, positions)
    for _ in range(20):
        some = chance.sample(range(40), chance.randint(1, 40))
        assert torch.equal(drawn(logits[some], [ways[i] for i in some], positions[some]), together[some])
    plain = [i for i, way in enumerate(ways) if way is None or not way.temperature]
    assert torch.equal(together[plain], logits.argmax(-1)[plain])


def test_nan_is_told_apart_and_leaves_the_others_alone():
    logits = torch.randn(3, 50)
    ways, positions = [Sampling(1.0, 5, 0.9, seed) for seed in range(3)], torch.arange(3)
    want = drawn(logits, ways, positions)
    logits[1, 7] = math.nan
    tokens, spoilt = choose(logits, draws_of(ways, 50, CPU), positions)
    assert spoilt.tolist() == [False, True, False]
    assert (tokens[[0, 2]] == want[[0, 2]]).all() and 0 <= tokens[1] < 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected a number of at least 0"),
        ({"temperature": float("nan")}, "temperature: expected"),
        ({"temperature": float("inf")}, "temperature: expected"),
        ({"top_k": 0}, "top_k: expected a positive integer"),
        ({"top_p": 0.0}, "top_p: expected a number with 0 < top_p <= 1"),
    ],
)
def test_bad_sampling_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_a_seed_is_an_integer():
    with pytest.raises(TypeError, match=r"seed: expected an integer, got 1\.5"):
        Sampling(1.0, seed=1.5)
