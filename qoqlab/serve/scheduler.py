"""Who runs in the next step: in-flight batching over the pages of a cache. Plain Python, no model inside.

Requests wait in the order in which they came. One is admitted when all its tokens and one more fit into free pages, and
another free page remains for each running request, so that it is not thrown out at once; and never before one that came
earlier. A running request takes a page when it grows beyond its last; where none is free, the request that came last loses
its pages and waits at the front of the queue until it is computed again (paper section 5: paged KV cache, in-flight
batching). Prompts that keep coming do not hold running requests up: one that comes while others are taken in waits for a
decode.

Prompts are taken in whole. A prompt attends to its exact keys and values, which only its own step has; the cache holds their
4-bit codes. `Policy.BUDGET` therefore limits how many tokens of prompts a step takes beside its decodes, but does not cut a
prompt; one that is longer than the budget goes alone. The price: a step is never shorter than the longest prompt makes it.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ..allocator import PageAllocator
from ..checks import require_count, require_enum
from .requests import Finish, Progress, Request


class Policy(Enum):
    """PREFILL_FIRST: as soon as a waiting prompt fits, a step takes in prompts alone; after those that waited at the first
    such step comes a decode. BUDGET: every step decodes, and takes in prompts beside as far as the budget of tokens goes, so
    that running requests wait less."""

    PREFILL_FIRST = "prefill first"
    BUDGET = "budget"


@dataclass(frozen=True)
class Limits:
    """``batch`` requests run at once; ``pages`` of ``page_size`` tokens; a request has at most ``max_tokens``, prompt
    included; a step takes in at most ``budget`` tokens of prompts (or one prompt)."""

    batch: int
    pages: int
    max_tokens: int
    page_size: int = 64
    budget: int = 8192

    def __post_init__(self) -> None:
        for name in ("batch", "pages", "max_tokens", "page_size", "budget"):
            require_count(name, getattr(self, name), 1)

    def pages_of(self, tokens: int) -> int:
        """Pages that so many tokens of one request take."""
        return -(-tokens // self.page_size)


@dataclass(frozen=True)
class Step:
    """Numbers of requests: whose pages were taken away before the step, whose prompts it takes in, whose next token it
    decodes, ``repeat`` times in a row."""

    preempted: tuple[int, ...] = ()
    prefill: tuple[int, ...] = ()
    decode: tuple[int, ...] = ()
    repeat: int = 1


@dataclass(frozen=True)
class Failure:
    """Instead of a token: what went wrong with a request."""

    message: str


class Scheduler:
    """Queue, running requests and their pages. `submit` and `cancel` at any time; then `plan` and `complete` in turn."""

    def __init__(self, limits: Limits, policy: Policy = Policy.PREFILL_FIRST) -> None:
        require_enum("policy", policy, Policy)
        self.limits, self.policy = limits, policy
        self.allocator = PageAllocator(limits.pages)
        self.waiting: deque[Progress] = deque()
        self.running: list[Progress] = []  # in the order in which they came, as whoever is preempted came last
        self._pages: dict[int, list[int]] = {}
        self._count = 0
        self._known = 0  # requests that had come before the first of the prefills in a row
        self._decoded = True  # the last step has

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self.waiting and not self.running

    def pages_of(self, number: int) -> list[int]:
        """Pages that a request holds."""
        return list(self._pages.get(number, ()))

    def submit(self, request: Request) -> Progress:
        """Put a request at the end of the queue. Raises as `check` does."""
        self.check(request)
        progress = Progress(self._count, request)
        self._count += 1
        self.waiting.append(progress)
        return progress

    def check(self, request: Request) -> None:
        """Raise TypeError for what is no request, ValueError for one that can never run."""
        if not isinstance(request, Request):
            raise TypeError(f"request: expected a Request, got {request!r}")
        limits, total = self.limits, len(request.prompt) + request.max_new_tokens - 1
        if total > limits.max_tokens or limits.pages_of(total) > limits.pages:
            raise ValueError(
                f"request: a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones need {total} "
                f"places in the cache; there are {limits.max_tokens} for a request and {limits.pages} pages of "
                f"{limits.page_size} tokens"
            )

    def cancel(self, progress: Progress) -> bool:
        """End a request wherever it is; False if it has ended before."""
        return self._end(progress, Finish.CANCELLED)

    def _end(self, progress: Progress, finish: Finish) -> bool:
        if progress.finish is not None:
            return False
        progress.finish = finish
        if progress in self.running:
            self.running.remove(progress)
        else:
            self.waiting.remove(progress)
        self.allocator.drop(self._pages.pop(progress.number, []))
        return True

    # -- a step -----------------------------------------------------------------------------------------------------------

    def plan(self, most: int = 1) -> Step | None:
        """The next step; None where nothing waits or runs. Its pages are reserved. Where no prompt comes in and every
        running request has so many tokens and pages left, it decodes up to ``most`` tokens in a row."""
        first = self.policy is Policy.PREFILL_FIRST
        if self._decoded or not self.running:
            self._known = self._count
        if first:
            admitted = self._admit(self._known)
            if admitted:
                self._decoded = False
                return Step(prefill=tuple(p.number for p in admitted))
        held_up = first and bool(self.waiting) and self.waiting[0].number >= self._known
        self._decoded = True
        preempted = self._grow()
        decode = tuple(p.number for p in self.running)
        admitted = [] if first else self._admit(self._count)  # never who was preempted just now: its pages are one too few
        if not decode and not admitted:
            return None
        repeat = 1 if admitted or held_up else self._repeat(most)
        return Step(tuple(p.number for p in preempted), tuple(p.number for p in admitted), decode, repeat)

    def follow(self, step: Step, most: int) -> Step | None:
        """The step after ``step``, whose results have not come, with its pages; None where they decide who is in it: where
        somebody ends and others wait, or waits and would fit, or where pages are short. Prompts alone are followed by
        prompts, steps that only decode by such."""
        if step.prefill:
            admitted = self._admit(self._known) if self.policy is Policy.PREFILL_FIRST else []
            return Step(prefill=tuple(p.number for p in admitted)) if admitted else None
        decoded = set(step.decode)
        running = [p for p in self.running if p.number in decoded]
        going = [p for p in running if p.request.max_new_tokens - len(p.tokens) > step.repeat]
        if not going or any(self._known_tokens(p) > 1 for p in going):
            return None
        if self.waiting and (len(going) < len(running) or self._fits(self.waiting[0])):
            return None
        left = min(p.request.max_new_tokens - len(p.tokens) for p in going) - step.repeat
        repeat = self._in_a_row(going, step.repeat, min(most, left))
        return Step(decode=tuple(p.number for p in going), repeat=repeat) if repeat else None

    def _repeat(self, most: int) -> int:
        """How many tokens all running requests can take in a row, and pages for them."""
        for progress in self.running:
            missing = progress.request.max_new_tokens - len(progress.tokens)
            # tokens from before a preemption are fed one by one
            most = min(most, missing if self._known_tokens(progress) == 1 else 1)
        return max(1, self._in_a_row(self.running, 0, most))

    @staticmethod
    def _known_tokens(progress: Progress) -> int:
        """Tokens of a request that are not cached yet."""
        return len(progress.request.prompt) + len(progress.tokens) - progress.cached

    def _in_a_row(self, going: Sequence[Progress], done: int, most: int) -> int:
        """How many tokens, at most ``most``, these can take after ``done`` more, and pages for them."""
        while most > 0:
            totals = {p.number: self.limits.pages_of(p.cached + done + most) for p in going}
            short = {number: max(0, total - len(self._pages[number])) for number, total in totals.items()}
            if sum(short.values()) <= self.allocator.free:
                for number, count in short.items():
                    self._pages[number] += self.allocator.take(count)
                return most
            most -= 1
        return 0

    def _need(self, progress: Progress) -> int:
        """Pages for what a waiting request has and one token more."""
        new = min(len(progress.tokens) + 1, progress.request.max_new_tokens - 1)
        return self.limits.pages_of(len(progress.request.prompt) + new)

    def _fits(self, progress: Progress) -> bool:
        """Whether a waiting request could run, with a page left for each that does."""
        room = self._need(progress) + len(self.running) <= self.allocator.free
        return room and len(self.running) < self.limits.batch

    def _admit(self, before: int) -> list[Progress]:
        """Requests from the front of the queue with numbers below ``before`` that fit, now running, with pages for what they
        have and one token more."""
        admitted: list[Progress] = []
        tokens = 0
        while self.waiting and self.waiting[0].number < before and self._fits(self.waiting[0]):
            prompt = len(self.waiting[0].request.prompt)
            if admitted and tokens + prompt > self.limits.budget:
                break
            progress = self.waiting.popleft()
            self._pages[progress.number] = self.allocator.take(self._need(progress))
            self.running.append(progress)
            admitted.append(progress)
            tokens += prompt
        return admitted

    def _grow(self) -> list[Progress]:
        """Room for one more token of every running request, those that came last giving theirs up where it is short."""
        preempted: list[Progress] = []
        for progress in list(self.running):  # who came first is served first
            if progress.number not in self._pages:
                continue
            while self.limits.pages_of(progress.cached + 1) > len(self._pages[progress.number]):
                if self.allocator.free:
                    self._pages[progress.number] += self.allocator.take(1)
                    continue
                last = self.running[-1]
                self._preempt(last)
                preempted.append(last)
                if last is progress:
                    break
        return preempted

    def _preempt(self, progress: Progress) -> None:
        self.running.remove(progress)
        self.allocator.drop(self._pages.pop(progress.number))
        progress.cached, progress.preemptions = 0, progress.preemptions + 1
        self.waiting.appendleft(progress)

    def complete(self, step: Step, results: Mapping[int, Sequence[int | Failure]]) -> list[Progress]:
        """Take in what a step brought to some of its requests, those that have not ended meanwhile: a token, for a step that
        repeats so many of them (in one call, or in several in turn); or a `Failure`, which is the last. Tokens behind the
        one that ends a request, and those that are known from before a preemption, are left out. Returns the requests that
        ended."""
        ended = []
        taken = set(step.prefill)
        by_number = {p.number: p for p in self.running if p.number in results}
        for number in (*step.prefill, *step.decode):
            progress = by_number.get(number)
            if progress is None:
                continue  # cancelled during the step, or not in these results
            progress.cached = len(progress.request.prompt) if number in taken else progress.cached + 1
            finish = self._take_in(progress, results[number])
            if finish is not None:
                self._end(progress, finish)
                ended.append(progress)
        return ended

    @staticmethod
    def _take_in(progress: Progress, found: Sequence[int | Failure]) -> Finish | None:
        """Add tokens to a request, of which the first one's input is counted as cached; how they end it, if they do."""
        request, last = progress.request, found[-1]
        if progress.fresh:
            progress.cached += len(found) - 1
            tokens = [token for token in found if not isinstance(token, Failure)]
            tokens = tokens[: request.max_new_tokens - len(progress.tokens)]
            stop = next((i for i, token in enumerate(tokens) if token in request.stop), None) if request.stop else None
            progress.tokens += tokens if stop is None else tokens[: stop + 1]
            if stop is not None:
                return Finish.STOP
            if len(progress.tokens) == request.max_new_tokens:
                return Finish.LENGTH
        if isinstance(last, Failure):
            progress.error = last.message
            return Finish.ERROR
        return None


# -- traces ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """Before step ``at`` (counted from 0) a request comes, or the one of number ``cancel`` is cancelled."""

    at: int
    request: Request | None = None
    cancel: int | None = None

    def __post_init__(self) -> None:
        require_count("at", self.at, 0)
        if self.cancel is not None:
            require_count("cancel", self.cancel, 0)


def read_trace(path: Path) -> list[Event]:
    """Events from JSON lines: ``{"at": 0, "prompt": [1, 2], "max_new_tokens": 8, "stop": [2]}``, ``{"at": 3, "cancel": 0}``.

    Raises ValueError naming the line that is not one of these.
    """
    events = []
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            fields: dict[str, Any] = json.loads(line)
            at = fields.pop("at")
            event = Event(at, None, fields["cancel"]) if "cancel" in fields else Event(at, Request(**fields))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"path: {path}, line {i} is no event of a trace ({error})") from None
        events.append(event)
    return events


def replay(
    events: Iterable[Event],
    scheduler: Scheduler,
    model: Callable[[Progress], int | Failure],
    most: int = 1,
    overlap: bool = False,
) -> Iterator[tuple[Step, list[Progress]]]:
    """Every step of a trace with the requests that ended in it. ``model`` gives the token that follows what a request has;
    ``most``: as in `Scheduler.plan`; ``overlap``: a step that can be planned before the results of the one before it is, as
    `server.Server` does. The same trace gives the same steps."""
    queue = deque(sorted(events, key=lambda e: e.at))
    known: list[Progress] = []
    early: Step | None = None
    at = 0
    while queue or not scheduler.idle:
        while queue and queue[0].at <= at:
            event = queue.popleft()
            if event.request is not None:
                known.append(scheduler.submit(event.request))
            elif event.cancel is not None and event.cancel < len(known):
                scheduler.cancel(known[event.cancel])
        if early is not None and all(known[n].finish is not None for n in (*early.prefill, *early.decode)):
            early = None
        step = scheduler.plan(most) if early is None else early
        early = scheduler.follow(step, most) if overlap and step is not None else None
        at += 1
        if step is not None:
            ended = []
            for _ in range(step.repeat):
                running = [n for n in (*step.prefill, *step.decode) if known[n].finish is None]
                ended += scheduler.complete(step, {number: [model(known[number])] for number in running})
            yield step, ended
