"""What a server is asked for, and what became of it. Plain Python."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from ..checks import require_count

if TYPE_CHECKING:
    from ..sampling import Sampling


@dataclass(frozen=True)
class Request:
    """``prompt``: token numbers, at least one. At most ``max_new_tokens`` follow, up to and with a token of ``stop``.

    ``sampling`` (None: greedy) draws by its seed and the token's position alone, so of the same logits it makes the same
    tokens whatever else is served (for the logits see `server.Server`). ``arrival``: seconds after the server's start.
    ``on_token(number, token)`` is called with every new token.

    Raises TypeError for tokens that are not integers, an arrival that is not a number, an ``on_token`` that is no
    function; ValueError for a prompt without tokens, a negative token or arrival, a count below 1.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    arrival: float = 0.0
    sampling: Sampling | None = None
    stop: frozenset[int] = frozenset()
    on_token: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", tuple(_tokens("prompt", self.prompt)))
        object.__setattr__(self, "stop", frozenset(_tokens("stop", self.stop)))
        if not self.prompt:
            raise ValueError("prompt: no tokens; a model needs at least one to continue")
        if min(self.prompt) < 0:
            raise ValueError(f"prompt: token {min(self.prompt)} is negative")
        require_count("max_new_tokens", self.max_new_tokens, 1)
        if not isinstance(self.arrival, numbers.Real):
            raise TypeError(f"arrival: expected a number of seconds, got {self.arrival!r}")
        if not 0 <= self.arrival < float("inf"):
            raise ValueError(f"arrival: expected seconds of at least 0, got {self.arrival!r}")
        if self.on_token is not None and not callable(self.on_token):
            raise TypeError(f"on_token: expected a function of a request's number and a token, got {self.on_token!r}")


def _tokens(name: str, values: Iterable[int]) -> list[int]:
    """Numbers of tokens as Python's integers."""
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        raise TypeError(f"{name}: expected token numbers, integers, got {values!r}") from None


class Finish(Enum):
    """Why a request ended."""

    LENGTH = "length"
    STOP = "stop"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass
class Progress:
    """A request under way or ended: its new ``tokens``; ``finish`` (None: under way) and, for `Finish.ERROR`, ``error``;
    seconds of its ``first`` token and of its ``end``; how often it was preempted.

    ``cached``: tokens in the cache, of the prompt and new ones. It falls to 0 with a preemption; the new tokens stay, and
    are fed again one by one, in the same steps as a decoded token takes, so that what attention sees is what it saw before.
    """

    number: int
    request: Request
    tokens: list[int] = field(default_factory=list)
    cached: int = 0
    preemptions: int = 0
    finish: Finish | None = None
    error: str = ""
    first: float | None = None
    end: float | None = None

    @property
    def next_input(self) -> int:
        """The token that the next decode step takes in."""
        return self.tokens[self.cached - len(self.request.prompt)]

    @property
    def fresh(self) -> bool:
        """Whether what follows the cached tokens is not known yet."""
        return self.cached == len(self.request.prompt) + len(self.tokens)
