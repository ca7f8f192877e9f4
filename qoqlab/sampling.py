"""How the next token is chosen, for many requests at once and without a wait for the device.

A request's randomness is a function of its seed and of the position that the token will have: a counter-based generator
(SplitMix64's mixing of both). So a draw can be repeated, and nothing else that is served has a part in it, nor how many
steps are taken in a row. Probabilities are turned into integers before they are added up, so that their sums are exact in
any order: a token depends on its row of logits alone, bit for bit.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .checks import require_count
from .transfer import sent

#: The weight of the likeliest token; with 2^17 tokens sums stay below 2^53, which fp64 counts exactly.
ONE = 1 << 30
#: Constants of SplitMix64, as signed numbers: its step, and two factors.
STEP, FACTORS = -0x61C8864680B583EB, (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: ``temperature`` 0 takes the likeliest; otherwise it is drawn from the ``top_k``
    likeliest (None: all), and of these from the likeliest that together hold ``top_p`` of the probability; tokens that are
    as likely as the last of them belong to them. ``seed``: any integer."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"{name}: expected a number, got {value!r}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected a number of at least 0, got {self.temperature!r}")
        if self.top_k is not None:
            require_count("top_k", self.top_k, 1)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number with 0 < top_p <= 1, got {self.top_p!r}")
        if not isinstance(self.seed, int):
            raise TypeError(f"seed: expected an integer, got {self.seed!r}")


#: The likeliest token.
GREEDY = Sampling()


@dataclass(frozen=True)
class Draws:
    """The rows of a batch that are drawn, on its device: ``rows`` int64 [R], ``seeds`` int64 [R], ``temperatures`` fp32
    [R, 1]; ``top_k`` int64 [R, 1], None where no row is limited, and ``most``, the largest of them; ``top_p`` fp64 [R, 1],
    None where no row is limited."""

    rows: torch.Tensor
    seeds: torch.Tensor
    temperatures: torch.Tensor
    top_k: torch.Tensor | None
    most: int
    top_p: torch.Tensor | None


def draws_of(samplings: Sequence[Sampling | None], vocabulary: int, device: torch.device) -> Draws | None:
    """What `choose` needs of the ways to sample of every row (None: the likeliest token); None where nothing is drawn."""
    drawn = [(i, s) for i, s in enumerate(samplings) if s is not None and s.temperature]
    if not drawn:
        return None
    rows, seeds = sent([[i for i, _ in drawn], [signed(s.seed) for _, s in drawn]], device)
    ways = [s for _, s in drawn]
    most = [min(s.top_k or vocabulary, vocabulary) for s in ways]
    shares = sent([[s.temperature, s.top_p] for s in ways], device, torch.float64)
    return Draws(
        rows,
        seeds,
        shares[:, :1].float().clamp(min=torch.finfo(torch.float32).tiny),  # 0 / 0 would be no weight of the likeliest
        sent(most, device)[:, None] if min(most) < vocabulary else None,
        max(most),
        shares[:, 1:] if any(s.top_p < 1 for s in ways) else None,
    )


def choose(logits: torch.Tensor, draws: Draws | None, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of every row of ``logits [B, V]``: (int64 tokens [B], whether a row has NaN or infinity, bool [B]).

    ``positions`` integer [B]: places that the tokens will have in their sequences. Does not wait for the device.
    """
    best, tokens = logits.max(-1)  # NaN is the largest of all
    if draws is not None:
        tokens[draws.rows] = _drawn(logits[draws.rows], draws, positions[draws.rows].long())
    return tokens, best - best != 0  # NaN where it is infinite or NaN; `isfinite` takes twice as many kernels


def _drawn(logits: torch.Tensor, draws: Draws, positions: torch.Tensor) -> torch.Tensor:
    """int64 [R] from the rows that are drawn ``[R, V]``."""
    logits = logits.float()
    weights = ((logits - logits.amax(-1, keepdim=True)) / draws.temperatures).exp().mul(ONE).round().long()
    if draws.top_k is not None:
        least = logits.topk(draws.most).values.gather(-1, draws.top_k - 1)
        weights = weights.masked_fill(logits < least, 0)
    if draws.top_p is not None:
        ordered = weights.sort(-1, descending=True).values
        before = ordered.cumsum(-1) - ordered
        kept = before.double() < draws.top_p * ordered.sum(-1, keepdim=True).double()  # the likeliest always
        weights = weights.masked_fill(weights < ordered.masked_fill(~kept, ONE).amin(-1, keepdim=True), 0)
    sums = weights.cumsum(-1)
    total = sums[:, -1]
    target = (uniform(draws.seeds, positions) * total.double()).long().minimum(total - 1)
    found = torch.searchsorted(sums, target[:, None], right=True)[:, 0]
    return found.clamp(max=logits.shape[-1] - 1)  # NaN leads anywhere


def signed(number: int) -> int:
    """The last 64 bits of an integer, as int64 holds them."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """fp64 in [0, 1), one for each pair of int64 numbers."""
    return _shifted(_mixed(_mixed(seeds + STEP) + positions * STEP), 11).double() * 2.0**-53


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """int64 moved to the right as if it had no sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finish."""
    x = (x ^ _shifted(x, 30)) * FACTORS[0]
    x = (x ^ _shifted(x, 27)) * FACTORS[1]
    return x ^ _shifted(x, 31)
