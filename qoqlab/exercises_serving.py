"""Checks for the exercises of lesson 12; `qoqlab.exercises` has them under its own name, and says how they behave."""

from __future__ import annotations

import math
from collections.abc import Callable

from .progress import passed


def check_admit(admit: Callable[[list[int], int, int], int]) -> None:
    """``admit(prompts, free, page_size)`` -> how many of the waiting ``prompts`` (tokens), from the first on, may start.

    ``free`` pages are left; each needs room for its prompt and its first new token.
    """
    got = admit([100, 100, 100], 5, 64)
    assert got != 3, "three prompts of 100 tokens take two pages of 64 each: a started page belongs to one sequence alone"
    assert got == 2, f"prompts of 100 tokens take two pages of 64 each, so 5 free pages hold 2 of them, got {got}"
    got = admit([63, 64], 2, 64)
    assert got != 2, "64 tokens fill a page; the first new token needs another one, so two prompts of 63 and 64 take 1 + 2"
    assert got == 1, f"63 tokens and a new one fit on one page of 64, 64 and a new one do not: 1 may start, got {got}"
    got = admit([10, 500, 10], 4, 64)
    assert got != 2, "the second does not fit, and the third must not overtake it: small requests would starve large ones"
    assert got == 1, f"only the first fits before one that does not: 1, got {got}"
    got = admit([], 4, 64)
    assert got == 0, f"nobody waits, so nobody starts, got {got}"
    got = admit([16, 15], 2, 16)
    assert got == 1, f"pages of 16: 16 tokens and a new one take both that are free, so only the first starts, got {got}"
    passed("check_admit")


def check_fleet_cost(cost: Callable[[float, int, float, float, float], tuple[int, float]]) -> None:
    """``cost(load, output, capacity, hourly, busy)`` -> (GPUs, dollars per million generated tokens).

    ``load`` requests per second of ``output`` tokens each; one GPU serves ``capacity`` requests per second at most and shall
    be at most ``busy`` (a share) of that; it costs ``hourly`` dollars whether it works or not.
    """
    gpus, dollars = cost(10.0, 500, 4.0, 3.6, 0.75)
    assert gpus != 3, "3 GPUs could do it only if they were always full, and then the queue grows without end: mind `busy`"
    assert gpus == 4 and isinstance(gpus, int), f"10 requests per second, 4 * 0.75 a GPU: 3.33, so 4 GPUs, got {gpus!r}"
    assert not math.isclose(dollars, 3.6 / 3600 / 5000 * 1e6), "all GPUs of the fleet have to be paid, not one"
    assert not math.isclose(dollars, 4 * 3.6 / 10 / 3600 * 1e6), "per million *tokens*: a request has `output` of them"
    assert not math.isclose(dollars, 4 * 3.6 / 5000 * 1e6), "`hourly` is per hour, `load` per second"
    assert not math.isclose(dollars, 10 / 3 * 3.6 / 3600 / 5000 * 1e6), "a third of a GPU cannot be rented: pay for 4"
    assert math.isclose(dollars, 0.8), f"4 * 3.60 dollars an hour, 5000 tokens a second: 0.80 a million, got {dollars:.3g}"
    gpus, dollars = cost(12.0, 100, 4.0, 1.0, 0.75)
    assert gpus == 4, f"12 / (4 * 0.75) is 4 exactly, got {gpus}"
    gpus, dollars = cost(0.1, 100, 4.0, 3.6, 0.75)
    assert gpus == 1, f"a little load still needs a GPU, got {gpus}"
    assert math.isclose(dollars, 100), f"it waits most of the time: 3.60 an hour for 10 tokens a second, got {dollars:.3g}"
    passed("check_fleet_cost")
