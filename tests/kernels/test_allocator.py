"""The page allocator against a plain dictionary of counts: every page has as many holders as took it, and none is lost."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qoqlab_kernels.allocator import OutOfPages, PageAllocator

#: An operation: its name and a number that the test turns into pages.
STEPS = st.lists(st.tuples(st.sampled_from(["take", "share", "release"]), st.integers(0, 9)), max_size=60)


@given(st.integers(1, 9), STEPS)
def test_pages_are_never_lost_nor_given_twice(pages: int, steps: list[tuple[str, int]]) -> None:
    allocator, held = PageAllocator(pages), Counter()
    for step, number in steps:
        page = number % pages
        if step == "take":
            free = pages - len(+held)
            if number > free:
                with pytest.raises(OutOfPages, match=f"{number} pages asked for, {free} of {pages} free"):
                    allocator.take(number)
            else:
                taken = allocator.take(number)
                assert len(set(taken)) == number and not any(held[p] for p in taken)
                held.update(taken)
        elif not held[page]:
            with pytest.raises(ValueError, match=f"pages: {page} is"):
                (allocator.share if step == "share" else allocator.release)([page])
        elif step == "share":
            allocator.share([page])
            held[page] += 1
        else:
            held[page] -= 1
            assert allocator.release([page]) == ([] if held[page] else [page])
        assert allocator.free == pages - len(+held)
        assert [allocator.holders(p) for p in range(pages)] == [held[p] for p in range(pages)]


def test_a_refused_release_changes_nothing() -> None:
    allocator = PageAllocator(3)
    first, second = allocator.take(2)
    for pages in ([first, first], [second, 2], [first, 3], [first, -1], [first, True], [first, "0"]):
        with pytest.raises(ValueError, match="pages: "):
            allocator.release(pages)
        assert (allocator.holders(first), allocator.holders(second), allocator.free) == (1, 1, 1)


def test_a_refused_share_changes_nothing() -> None:
    allocator = PageAllocator(3)
    (page,) = allocator.take(1)
    with pytest.raises(ValueError, match="is free; only pages in use can be shared"):
        allocator.share([page, 2 if page != 2 else 1])
    assert allocator.holders(page) == 1


@pytest.mark.parametrize("pages", [0, -1, 1.5, True])
def test_sizes_are_checked(pages: object) -> None:
    with pytest.raises(ValueError, match="pages: expected a positive integer"):
        PageAllocator(pages)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="count: expected an integer of at least 0"):
        PageAllocator(1).take(-1)
