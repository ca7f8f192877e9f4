"""Checks for the exercises of lesson 10; `qoqlab.exercises` has them under its own name, and says how they behave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import kv
from .progress import passed

State = tuple[float, float, torch.Tensor]


def _halves(word: int) -> list[float]:
    """The two fp16 numbers in a 32-bit word, the low one first."""
    return torch.tensor([word], dtype=torch.uint32).view(torch.float16).tolist()


def check_magic(magic: Callable[[int], tuple[int, int]]) -> None:
    """``magic(word)`` -> two 32-bit words, pairs of fp16 numbers: ``1024 + code`` of the low nibble of either 16-bit half,
    and the pair to subtract from it so that ``code - 8`` is left."""
    word = 0xABC5DEF3  # the low nibbles of its halves are 5 and 3
    pattern, offset = magic(word)
    for name, value in (("the pattern", pattern), ("the offset", offset)):
        assert isinstance(value, int) and 0 <= value < 1 << 32, f"{name} has to be a 32-bit word, got {value!r}"
    assert pattern != word & 0x000F000F, (
        "codes as they are, without an exponent, are tiny fp16 numbers; put that of 1024 above"
    )
    assert pattern >> 16 & 0xFF00 == 0x6400, (
        f"the high half is {pattern >> 16:#06x}: it needs the exponent of 1024 as well, so the constant is 0x64006400"
    )
    low, high = _halves(pattern)
    assert (low, high) != (1267, 1221), "the mask lets more than one nibble of each half pass: 0x000F000F keeps four bits"
    assert (low, high) == (1027, 1029), f"codes 3 (low half) and 5: 1027 and 1029, got {low:g} and {high:g}"
    less = _halves(offset)
    assert less[0] == less[1], f"the same number is subtracted from both halves, got {less[0]:g} and {less[1]:g}"
    assert less[0] != 1024, "1024 would leave the code; 8 more is centred, and sums over many codes stay small"
    assert less[0] == 1032, f"1024 + code - 1032 = code - 8, so subtract 1032 (0x6408), got {less[0]:g}"
    pattern, offset = magic(0xFFF0FFFF)
    got = (_halves(pattern)[0] - _halves(offset)[0], _halves(pattern)[1] - _halves(offset)[1])
    assert got == (7, -8), f"codes 15 and 0 become 7 and -8, got {got}"
    passed("check_magic")


class _Elementwise(TorchDispatchMode):
    """Notes the largest result of an addition, subtraction, multiplication or division of elements."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__.rstrip("_") in {"add", "sub", "mul", "div", "rsub"}:
            self.largest = max(self.largest, result.numel())
        return result


def check_linear_scores(scores: Callable[..., torch.Tensor]) -> None:
    """``scores(query [D], codes uint8 [T, D], scales [T], zeros [T])`` -> ``q . k`` of every token ``[T]``, in fp32.

    A key is ``scales[t] * (codes[t] - zeros[t])``; scales and zeros may meet only numbers of which there is one per token.
    """
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(8, generator=generator)
    cached = kv.quantize_kv4(torch.randn(5, 8, generator=generator) + 0.5)
    with _Elementwise() as seen:
        got = scores(query, cached.codes, cached.scales.float(), cached.zeros.float())
    assert tuple(got.shape) == (5,), f"5 tokens have 5 scores, got shape {list(got.shape)}"
    products = cached.codes.float() @ query
    assert not torch.allclose(got, products * cached.scales.float(), atol=1e-4), "the zero is missing: subtract z * sum(q)"
    wrong = (products - cached.zeros.float()) * cached.scales.float()
    assert not torch.allclose(got, wrong, atol=1e-4), "every channel of the key is off by the zero: z * sum(q), not z"
    wrong = products * cached.scales.float() - cached.zeros.float() * query.sum()
    assert not torch.allclose(got, wrong, atol=1e-4), (
        "the zero is in units of codes, so it is scaled as well: s * (... - z * sum(q))"
    )
    want = cached.dequantize() @ query
    assert torch.allclose(got, want, atol=1e-4), f"token 0 scores {want[0]:.3f}, yours {got[0]:.3f}"
    assert seen.largest < 5 * 8, (
        "right, but you scaled or shifted all T x D codes; s and z are one per token, so multiply codes and query first"
    )
    passed("check_linear_scores")


def check_merge(merge: Callable[[State, State], State]) -> None:
    """``merge(a, b)`` -> the state of both parts together; a state is ``(largest score, sum of exp(score - largest), sum of
    exp(score - largest) * value)``, two floats and a tensor ``[D]``."""
    a, b = (1.0, 2.0, torch.tensor([2.0, 0.0])), (1.0, 3.0, torch.tensor([0.0, 6.0]))
    largest, total, out = merge(a, b)
    assert largest == 1, f"both parts have the largest score 1, so the whole has, got {largest:g}"
    assert abs(float(total) - 5) < 1e-5, f"with equal maxima sums just add: 2 + 3 = 5, got {float(total):g}"
    assert torch.allclose(out, torch.tensor([2.0, 6.0])), f"and so do weighted values: [2, 6], got {[float(v) for v in out]}"
    scores = torch.tensor([0.5, 3.0, -1.0, 90.0, 88.0])
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0], [0.0, 4.0]])

    def state(part: slice) -> State:
        weights = (scores[part] - scores[part].max()).exp()
        return float(scores[part].max()), float(weights.sum()), weights @ values[part]

    want = scores.softmax(0) @ values
    for first, second in ((state(slice(0, 3)), state(slice(3, 5))), (state(slice(3, 5)), state(slice(0, 3)))):
        largest, total, out = merge(first, second)
        assert largest == 90, f"the larger of both maxima, 90, whichever comes first; got {largest:g}"
        assert torch.isfinite(out).all() and float(total) < float("inf"), (
            "exp(90 - 3) overflows sooner or later: rescale by exp(own maximum - common maximum), which is at most 1"
        )
        assert abs(float(total) - (1 + float(torch.tensor(-2.0).exp()))) < 1e-4, (
            f"sums are relative to their own maxima: multiply each by exp(own - common) before you add, got {float(total):g}"
        )
        assert torch.allclose(out / total, want, atol=1e-4), (
            "the sums are right, the values are not: they are relative to the same maxima, so rescale them alike"
        )
    passed("check_merge")


def check_locate(locate: Callable[[list[int], int, int], tuple[int, int]]) -> None:
    """``locate(table, token, page_size)`` -> (page of the pool, place within it) of a sequence's ``token``.

    ``table`` lists the sequence's pages in the order of its tokens.
    """
    got = tuple(locate([7, 2, 5], 0, 64))
    assert got != (0, 0), "a sequence's page 0 may be any page of the pool: the table says which, here 7"
    assert got == (7, 0), f"token 0 is the first of page 7: (7, 0), got {got}"
    got = tuple(locate([7, 2, 5], 64, 64))
    assert got != (7, 64), "a page has places 0 to 63; token 64 is the first of the next page"
    assert got == (2, 0), f"token 64 is the first of the second page, which is page 2: (2, 0), got {got}"
    got = tuple(locate([7, 2, 5], 130, 64))
    assert got != (5, 130), "the place is counted within the page: what is left after whole pages"
    assert got == (5, 2), f"130 = 2 * 64 + 2: place 2 of page 5, got {got}"
    got = tuple(locate([3, 1], 17, 16))
    assert got == (1, 1), f"pages of 16: token 17 is place 1 of page 1, got {got}"
    passed("check_locate")
