"""Who holds which page of a cache: a free list with reference counts, in plain Python."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from .checks import require_count


class PagesExhausted(RuntimeError):
    """More pages were asked for than are free."""


class PageAllocator:
    """Hands out page numbers ``0 .. pages - 1``; a page returns to the free ones when its last holder lets go.

    Several sequences may hold the same page (a shared prefix): `take` makes the first holder, `share` further ones, `drop`
    ends one. The page that was freed last is handed out first, since it may still lie in the L2 cache.

    >>> a = PageAllocator(3)
    >>> a.take(2)
    [0, 1]
    >>> a.share([1])
    >>> a.drop([0, 1]), a.free, a.holders(1)
    ([0], 2, 1)
    """

    def __init__(self, pages: int) -> None:
        require_count("pages", pages, 1)
        self.pages = int(pages)
        self._free = list(range(self.pages - 1, -1, -1))
        self._holders = [0] * self.pages

    @property
    def free(self) -> int:
        """Number of pages that nobody holds."""
        return len(self._free)

    def holders(self, page: int) -> int:
        """How many hold a page. Raises ValueError for a number that is no page's."""
        if isinstance(page, bool) or not isinstance(page, int) or not 0 <= page < self.pages:
            raise ValueError(f"page: {page!r} is not one of the pages 0..{self.pages - 1}")
        return self._holders[page]

    def take(self, count: int) -> list[int]:
        """``count`` free pages, held once each. Raises `PagesExhausted`, and takes none, where there are fewer."""
        require_count("count", count, 0)
        if count > len(self._free):
            raise PagesExhausted(f"pages: {count} asked for, {len(self._free)} of {self.pages} free; free a sequence first")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def _require_held(self, pages: list[int], what: str, often: bool = False) -> None:
        for page, count in Counter(pages).items():
            if self.holders(page) < (count if often else 1):
                raise ValueError(f"page: {page} is free (or would be) and cannot be {what}")

    def share(self, pages: Iterable[int]) -> None:
        """One more holder of each page. Raises ValueError, and changes nothing, if one of them is free."""
        pages = list(pages)
        self._require_held(pages, "shared")
        for page in pages:
            self._holders[page] += 1

    def drop(self, pages: Iterable[int]) -> list[int]:
        """One holder of each page less; returns the pages that became free. Raises ValueError, and changes nothing, if one
        of them is free already, or named more often than held."""
        pages = list(pages)
        self._require_held(pages, "dropped", often=True)
        freed = []
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                freed.append(page)
        self._free += reversed(freed)
        return freed
