"""The page allocator: every page has one place, whatever is taken, shared and dropped."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qoqlab.allocator import PageAllocator, PagesExhausted


class Machine(RuleBasedStateMachine):
    """Random use against a Counter of holders."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = 7
        self.allocator = PageAllocator(self.pages)
        self.model: Counter[int] = Counter()

    @rule(count=st.integers(0, 9))
    def take(self, count: int) -> None:
        free = self.pages - len(self.model)
        if count > free:
            with pytest.raises(PagesExhausted, match=f"{count} asked for, {free} of 7 free"):
                self.allocator.take(count)
            return
        taken = self.allocator.take(count)
        assert len(set(taken)) == count and not set(taken) & set(self.model)
        self.model.update(taken)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        pages = data.draw(st.lists(st.sampled_from(sorted(self.model)), max_size=3))
        self.allocator.share(pages)
        self.model.update(pages)

    @rule(pages=st.lists(st.integers(0, 6), max_size=5))
    def drop(self, pages: list[int]) -> None:
        counted = Counter(pages)
        if any(counted[page] > self.model[page] for page in counted):
            with pytest.raises(ValueError, match="cannot be dropped"):
                self.allocator.drop(pages)
            return
        freed = self.allocator.drop(pages)
        self.model = self.model - counted
        assert sorted(freed) == sorted(page for page in counted if not self.model[page])

    @invariant()
    def agrees(self) -> None:
        assert [self.allocator.holders(page) for page in range(self.pages)] == [self.model[p] for p in range(self.pages)]
        assert self.allocator.free == self.pages - len(self.model)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_double_free_changes_nothing() -> None:
    a = PageAllocator(4)
    pages = a.take(3)
    a.drop(pages[:1])
    for bad in (pages[:1], pages, [pages[1], pages[1]]):
        with pytest.raises(ValueError, match=r"page: .* cannot be dropped"):
            a.drop(bad)
    assert [a.holders(page) for page in pages] == [0, 1, 1] and a.free == 2


def test_use_after_free() -> None:
    a = PageAllocator(2)
    (page,) = a.take(1)
    a.drop([page])
    with pytest.raises(ValueError, match=f"page: {page} is free .* cannot be shared"):
        a.share([page])


@given(st.integers(1, 50))
def test_all_pages_come_once(pages: int) -> None:
    a = PageAllocator(pages)
    assert sorted(a.take(pages)) == list(range(pages))
    with pytest.raises(PagesExhausted):
        a.take(1)


@pytest.mark.parametrize("bad", [0, -1, 2.5, True, "3"])
def test_bad_sizes(bad: object) -> None:
    with pytest.raises(ValueError, match="pages: expected a positive integer"):
        PageAllocator(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [-1, 4, True, 1.0])
def test_pages_that_are_none(bad: object) -> None:
    a = PageAllocator(4)
    a.take(4)
    with pytest.raises(ValueError, match=r"page: .* is not one of the pages 0\.\.3"):
        a.drop([bad])  # type: ignore[list-item]
