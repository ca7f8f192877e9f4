"""A server for one engine: requests come and go while others run (paper section 5, in-flight batching).

A measuring instrument, not a web service: it runs in the caller's thread, step by step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pandas as pd
import torch

from ..checks import require_count
from ..engine import Engine
from ..paged import PAGE
from ..sampling import Sampling, choose, draws_of
from ..transfer import sent
from .requests import Finish, Progress, Request
from .scheduler import Failure, Limits, Policy, Scheduler, Step

#: Tokens that a step brought to each request, by its number; a `Failure` is the last.
Results = dict[int, list[int | Failure]]


@dataclass(frozen=True)
class Turn:
    """What the device has been given: prompts, or steps in a row. The ``tokens`` int64 [steps, B] of requests ``numbers``
    there, and they and which are spoilt where the host reads them, ``found`` int64 [2 steps, B], once ``done``;
    ``nearly``: all steps but the last are."""

    numbers: tuple[int, ...]
    tokens: torch.Tensor
    found: torch.Tensor
    nearly: torch.cuda.Event | None
    done: torch.cuda.Event | None

    @classmethod
    def of(
        cls, numbers: tuple[int, ...], tokens: torch.Tensor, spoilt: torch.Tensor, nearly: torch.cuda.Event | None = None
    ) -> Turn:
        """From what the device has been given; its tokens are copied to the host as soon as they are there."""
        both, on_gpu = torch.cat([tokens, spoilt.long()]), tokens.is_cuda
        found = torch.empty(both.shape, dtype=both.dtype, pin_memory=on_gpu)
        found.copy_(both, non_blocking=True)
        done = torch.cuda.Event() if on_gpu else None
        if done is not None:
            done.record(torch.cuda.current_stream(tokens.device))
        return cls(numbers, tokens, found, nearly, done)

    def results(self) -> Results:
        """What it brought to each request; waits for it."""
        if self.done is not None:
            self.done.synchronize()
        steps, results = len(self.found) // 2, {}
        for number, row in zip(self.numbers, self.found.T.tolist(), strict=True):
            good = row.index(1, steps) - steps if 1 in row[steps:] else steps
            results[number] = row[:good] if good == steps else [*row[:good], Failure("the model's logits are not finite")]
        return results


@dataclass(frozen=True)
class Apart:
    """A turn whose results are known: its requests were computed one by one, since together they failed."""

    known: Results

    def results(self) -> Results:
        """What it brought to each request."""
        return self.known


class Server:
    """Serves requests on an engine: `submit` them, `step` until `idle`, or `run` a list.

    ``ahead``: steps that the device takes in a row before the host looks at their tokens, where no prompt can come in.
    Python's work is shared among them; tokens are handed out in turns of so many, a new request waits for the end of a turn,
    and what follows a stop token in its turn is computed for nothing. ``overlap``: the device is given the next turn, or
    the next prompts, before the host has looked at the tokens of this one, where they cannot change who is in it, so that it
    need not wait for Python; a stop token then costs the next turn too. None: where it gains something, on a GPU by itself.
    On the CPU, and where several processes wait for each other, a call of the engine returns when its work is done; there
    tokens would only come later.

    A request's tokens are a function of its logits, and on the CPU these do not depend on what else is served. On a GPU they
    may in their last bits: attention adds up a long context's parts in an order that depends on the batch, and so does
    torch's product with the head. A request whose logits are not finite, whose listener raises or whose own part of a step
    raises ends with `Finish.ERROR`; the others go on. (An engine of several processes raises instead.)

    ``requests``: all that were submitted, by number, with their tokens, times (seconds of ``clock`` since the server was
    made) and ends. ``steps``: what every step had to do (sequences decoded, tokens cached for them, tokens of prompts) and
    its seconds in prefill, in decode, and in everything else.
    """

    def __init__(
        self,
        engine: Engine,
        policy: Policy = Policy.PREFILL_FIRST,
        budget: int = 8192,
        ahead: int = 8,
        clock: Callable[[], float] = time.perf_counter,
        overlap: bool | None = None,
    ) -> None:
        if engine.lengths:
            raise ValueError(f"engine: {len(engine.lengths)} sequences are open in it; a server needs all of its cache")
        limits = Limits(engine.max_batch, engine.pages, engine.max_tokens, PAGE, budget)
        require_count("ahead", ahead, 1)
        self.engine, self.scheduler, self.ahead = engine, Scheduler(limits, policy), ahead
        self.requests: dict[int, Progress] = {}
        self.steps: list[dict[str, float]] = []
        self._clock, self._start = clock, clock()
        self._sequences: dict[int, int] = {}  # the engine's, of running requests
        self._coming: deque[Request] = deque()  # of `run`, and those of them that have arrived
        self._arrived: list[Progress] = []
        self._overlap = engine.early if overlap is None else overlap
        self._given: deque[tuple[Step, list[Turn | Apart]]] = deque()  # what the device has, and what is not read yet
        self._telling = False

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return self.scheduler.idle

    def now(self) -> float:
        """Seconds since the server was made."""
        return self._clock() - self._start

    def submit(self, request: Request) -> int:
        """The request's number. Raises as `check` does."""
        self.check(request)
        progress = self.scheduler.submit(request)
        self.requests[progress.number] = progress
        return progress.number

    def check(self, request: Request) -> None:
        """Raise TypeError for what is no request or has a sampling that is none, ValueError for a token outside the
        vocabulary and a request that can never fit."""
        self.scheduler.check(request)
        if max(request.prompt) >= self.engine.vocabulary:
            raise ValueError(f"prompt: token {max(request.prompt)} is outside 0..{self.engine.vocabulary - 1}")
        if not isinstance(request.sampling, Sampling | None):
            raise TypeError(f"sampling: expected a Sampling or None, got {request.sampling!r}")

    def cancel(self, number: int) -> bool:
        """End a request; False if it has ended before. Raises ValueError for a number that is no request's."""
        if number not in self.requests:
            raise ValueError(f"number: {number} is not a request's")
        progress = self.requests[number]
        done = self.scheduler.cancel(progress)
        if done:
            self._close(progress)
            self._drop_ended()
        return done

    def run(self, requests: Iterable[Request] = ()) -> list[Progress]:
        """Submit requests as they arrive, step until nothing is left, and return them as they ended. Raises as `check` does,
        before the first is submitted."""
        requests = list(requests)
        for request in requests:
            self.check(request)
        self._refuse_listeners()
        self._coming, self._arrived = deque(sorted(requests, key=lambda r: r.arrival)), []
        try:
            while self._coming or not self.idle:
                self._arrive()
                if not self.step() and self._coming:
                    time.sleep(min(0.01, max(0.0, self._coming[0].arrival - self.now())))
            return self._arrived
        finally:
            self._coming, self._arrived = deque(), []

    def _arrive(self) -> None:
        """Submit the requests of `run` that have arrived."""
        now = self.engine.agreed(self.now()) if self._coming else 0.0
        while self._coming and self._coming[0].arrival <= now:
            self._arrived.append(self.requests[self.submit(self._coming.popleft())])

    def step(self) -> bool:
        """One step, or turn of them, if there is anything to do. Raises RuntimeError where a listener calls it."""
        self._refuse_listeners()
        start = self.now()
        if not self._given:
            planned_step = self.scheduler.plan(self.ahead)
            if planned_step is None:
                return False
            for number in planned_step.preempted:
                self._free(number)
            self._given.append((planned_step, []))
        step, turns = self._given[0]
        planned = self.now()
        cached = sum(self.requests[number].cached for number in step.decode if number in self.requests)
        prompts = sum(len(self.requests[number].request.prompt) for number in step.prefill if number in self.requests)
        results: Results = {}
        if step.prefill:
            if not turns:
                turns.append(self._take_in(step.prefill))
            results |= self._read(step, turns[0])
        prefilled = self.now()
        if step.decode:
            if len(turns) == bool(step.prefill):
                turns.append(self._decode(step.decode, step.repeat))
            results |= self._read(step, turns[-1])
        self._given.popleft()  # not before all is read: whoever interrupts the wait may go on with `step`
        decoded = self.now()
        self._finish(step, results)
        row: dict[str, float] = {
            "batch": len(step.decode),
            "repeat": step.repeat,
            "cached": cached,
            "preempted": len(step.preempted),
            "prompts": prompts,
        }
        row |= {"prefill_s": prefilled - planned, "decode_s": decoded - prefilled}
        self.steps.append(row | {"other_s": self.now() - start - (decoded - planned)})
        return True

    def _refuse_listeners(self) -> None:
        if self._telling:
            raise RuntimeError(
                "run, step: a listener was told a token of a step that is not finished; submit requests instead"
            )

    def _read(self, step: Step, turn: Turn | Apart) -> Results:
        """What a step's prompts or decodes brought. What follows the step is the device's before that is read."""
        if self._overlap and len(self._given) == 1 and isinstance(turn, Turn):
            self._follow(step, turn)
        return turn.results()

    def _follow(self, step: Step, turn: Turn) -> None:
        """Give the device what comes after a step that is under way, if its tokens cannot change who is in it. Of a turn
        only the last step is left then: a request that has come meanwhile is looked at first."""
        if turn.nearly is not None:
            turn.nearly.synchronize()
        self._arrive()
        coming = self.scheduler.follow(step, self.ahead)
        if coming is None:
            return
        if coming.prefill:
            self._given.append((coming, [self._take_in(coming.prefill)]))
            return
        places = {number: row for row, number in enumerate(turn.numbers)}
        rows = sent([places[number] for number in coming.decode], turn.tokens.device)
        try:
            self._given.append((coming, [self._steps(coming.decode, coming.repeat, turn.tokens[-1][rows])]))
        except Exception:
            if not self.engine.alone:
                raise  # otherwise it is planned again, and fails again, once this one's tokens are known

    def _take_in(self, numbers: tuple[int, ...]) -> Turn | Apart:
        """Give the device prompts: the first token of each. Of a request that is fed again after a preemption it is one that
        nobody asks for."""
        progress = [self.requests[number] for number in numbers]
        sequences: list[int] = []
        try:
            sequences, logits = self.engine.prefill([p.request.prompt for p in progress])
            draws = draws_of([p.request.sampling for p in progress], self.engine.vocabulary, self.engine.device)
            places = sent([len(p.request.prompt) + len(p.tokens) for p in progress], self.engine.device)
            tokens, spoilt = choose(logits, draws, places)
            turn = Turn.of(numbers, tokens[None], spoilt[None])
        except Exception as error:
            self.engine.free(sequences)
            return self._apart(numbers, error, self._take_in)
        self._sequences |= dict(zip(numbers, sequences, strict=True))
        return turn

    def _decode(self, numbers: tuple[int, ...], repeat: int = 1) -> Turn | Apart:
        """Give the device steps of requests whose last tokens are known; one step, if each has to be computed by itself."""
        inputs = torch.tensor([self.requests[number].next_input for number in numbers])
        try:
            return self._steps(numbers, repeat, inputs)
        except Exception as error:
            return self._apart(numbers, error, self._decode)

    def _steps(self, numbers: tuple[int, ...], repeat: int, inputs: torch.Tensor) -> Turn | Apart:
        """Give the device steps in a row; the first takes ``inputs`` in. Raises as the engine does. Where their tokens
        cannot be fetched, the requests end: the engine has taken the steps and cannot take them again."""
        sequences = [self._sequences[number] for number in numbers]
        samplings = [self.requests[number].request.sampling for number in numbers]
        nearly = torch.cuda.Event() if self.engine.device.type == "cuda" else None
        tokens, spoilt = self.engine.decode_ahead(sequences, inputs, repeat, samplings, nearly)
        try:
            return Turn.of(numbers, tokens, spoilt, nearly)
        except Exception as error:
            if not self.engine.alone:
                raise
            return Apart({number: [Failure(f"{type(error).__name__}: {error}")] for number in numbers})

    def _apart(self, numbers: tuple[int, ...], error: Exception, way: Callable[[tuple[int, ...]], Turn | Apart]) -> Apart:
        """Requests whose part of a step has failed, each by itself, so that one's fault is its own. The engine has not kept
        anything of the attempt. Where other processes take part, which may not have failed, the error is raised."""
        if not self.engine.alone:
            raise error
        if len(numbers) == 1:
            return Apart({numbers[0]: [Failure(f"{type(error).__name__}: {error}")]})
        return Apart({number: found for one in numbers for number, found in way((one,)).results().items()})

    def _finish(self, step: Step, results: Results) -> None:
        """Results to the scheduler and to whoever listens; sequences of ended requests back to the engine."""
        # of a turn that was given to the device early, some may have ended; and a listener may have the server forget
        asked = {n: self.requests[n] for n in results if n in self.requests and self.requests[n].finish is None}
        results = {n: results[n] for n in asked}
        heard = {n: found for n, found in results.items() if asked[n].request.on_token is not None}
        ended = self.scheduler.complete(step, {n: found for n, found in results.items() if n not in heard})
        for turn in range(step.repeat if heard else 0):  # token by token: who listens may cancel before the next one
            listening = [n for n, found in heard.items() if turn < len(found) and asked[n].finish is None]
            before = [len(asked[n].tokens) for n in listening]
            ended += self.scheduler.complete(step, {n: [heard[n][turn]] for n in listening})
            for number, count in zip(listening, before, strict=True):
                if len(asked[number].tokens) > count:
                    self._tell(asked[number], ended)
        for progress in asked.values():
            if progress.tokens and progress.first is None:
                progress.first = self.now()
        for progress in ended:
            self._close(progress)
        self._drop_ended()

    def _drop_ended(self) -> None:
        """Forget what the device has been given for requests that have all ended: nobody is left to read it."""
        self._given = deque(
            (step, turns) for step, turns in self._given if not all(map(self._ended, (*step.prefill, *step.decode)))
        )

    def _ended(self, number: int) -> bool:
        """Whether a request has ended, and may be forgotten."""
        return number not in self.requests or self.requests[number].finish is not None

    def _tell(self, progress: Progress, ended: list[Progress]) -> None:
        """A request's last token to its listener; one that raises ends the request."""
        if progress.first is None:
            progress.first = self.now()
        self._telling = True
        try:
            assert progress.request.on_token is not None
            progress.request.on_token(progress.number, progress.tokens[-1])
        except Exception as error:
            progress.error = f"on_token: {type(error).__name__}: {error}"
            if self.scheduler.cancel(progress):
                ended.append(progress)
            progress.finish = Finish.ERROR
        finally:
            self._telling = False

    def _free(self, number: int) -> None:
        sequence = self._sequences.pop(number, None)
        if sequence is not None:
            self.engine.free([sequence])

    def _close(self, progress: Progress) -> None:
        progress.end = self.now()
        self._free(progress.number)

    def forget(self) -> None:
        """Drop what is known of ended requests and past steps, so that a server that runs for long stays small."""
        self.requests = {n: p for n, p in self.requests.items() if p.finish is None}
        self.steps.clear()

    def record(self) -> pd.DataFrame:
        """A row per ended request: ``arrival``, ``prompt``, ``output`` (tokens), ``first``, ``finish`` (seconds),
        ``reason``, ``preemptions``. `fleet.replay` and `fleet.latencies` read it, once rows without a token are left out."""
        rows = [
            {
                "arrival": p.request.arrival,
                "prompt": len(p.request.prompt),
                "output": len(p.tokens),
                "first": p.first,
                "finish": p.end,
                "reason": p.finish.value,
                "preemptions": p.preemptions,
            }
            for p in self.requests.values()
            if p.finish is not None
        ]
        columns = ["arrival", "prompt", "output", "first", "finish", "reason", "preemptions"]
        return pd.DataFrame(rows, columns=columns)
