"""Pages of a cache: who holds which, in plain Python.

A page is held by one sequence, or by several that share a prefix. It returns to the free ones when the last lets go.
"""

from __future__ import annotations

from collections.abc import Iterable

from qoqlab.checks import require_count


class OutOfPages(RuntimeError):
    """More pages were asked for than are free; nothing was taken."""


class PageAllocator:
    """Hands out the numbers ``0 .. pages - 1``, each with a count of its holders.

    >>> pages = PageAllocator(3)
    >>> first = pages.take(2)
    >>> pages.share(first[:1])
    >>> pages.release(first)
    >>> pages.free, pages.holders(first[0]), pages.holders(first[1])
    (2, 1, 0)
    """

    def __init__(self, pages: int) -> None:
        """Raises TypeError or ValueError unless ``pages`` is a positive integer."""
        require_count("pages", pages, 1)
        self.pages = pages
        self._holders = [0] * pages
        self._free = list(range(pages - 1, -1, -1))  # a stack: what was released last is taken first, perhaps still cached

    @property
    def free(self) -> int:
        """How many pages nobody holds."""
        return len(self._free)

    def holders(self, page: int) -> int:
        """How many hold a page."""
        self._require(page)
        return self._holders[page]

    def take(self, count: int = 1) -> list[int]:
        """``count`` pages for one holder. Raises `OutOfPages`, and takes none, where fewer are free."""
        require_count("count", count, 0)
        if count > self.free:
            raise OutOfPages(f"count: {count} pages asked for, {self.free} of {self.pages} free")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One holder more for each page. Raises ValueError, and changes nothing, where nobody holds one of them."""
        wanted = list(pages)
        for page in wanted:
            self._require(page)
            if not self._holders[page]:
                raise ValueError(f"pages: {page} is free; only pages in use can be shared")
        for page in wanted:
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> list[int]:
        """One holder less for each page; returns those that are free now.

        Raises ValueError, and changes nothing, where a page is named more often than it is held.
        """
        given = list(pages)
        for page in given:
            self._require(page)
            if self._holders[page] < given.count(page):
                raise ValueError(f"pages: {page} is released more often than it is held ({self._holders[page]} times)")
        freed = []
        for page in given:
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)
                freed.append(page)
        return freed

    def _require(self, page: int) -> None:
        if not isinstance(page, int) or isinstance(page, bool) or not 0 <= page < self.pages:
            raise ValueError(f"pages: {page!r} is not a page of this cache; expected an integer in 0 .. {self.pages - 1}")
