"""One GPU as a server, in a handful of numbers: how long a step and a prefill take, and how much fits.

Times are affine in the number of sequences and of cached tokens, because predicted times add (`qoqlab.prediction`).
`surface` takes them from there, `measured_surface` from a real server's own steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from .. import prediction, roofline
from ..checks import require_columns, require_count
from ..machines import Geometry, Gpu
from ..prediction import OURS, System
from ..schemes import Scheme


@dataclass(frozen=True)
class Surface:
    """One GPU as a server; seconds and tokens.

    A step of B sequences with S cached tokens in all takes ``step + per_sequence * B + per_cached * S``. Prompts of P tokens
    in all take ``prefill + per_prompt * P``, and ``per_square`` times the sum of their squares. At most ``sequences`` run at
    once, with room for ``tokens`` of prompt and output; one prefill takes at most ``burst`` prompt tokens (or one prompt).
    A new prompt waits for the end of a turn of ``turn`` steps (`server.Server`'s ``ahead``).
    """

    step: float
    per_sequence: float
    per_cached: float
    prefill: float
    per_prompt: float
    sequences: int
    tokens: int
    per_square: float = 0.0
    burst: int = 8192
    turn: int = 1

    def __post_init__(self) -> None:
        for name in ("step", "per_sequence", "per_cached", "prefill", "per_prompt", "per_square"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: expected a number of seconds of at least 0, got {value!r}")
        if self.step + self.per_sequence == 0:
            raise ValueError("step: a step of one sequence has to take time; step and per_sequence are both 0")
        for name in ("sequences", "tokens", "burst", "turn"):
            require_count(name, getattr(self, name), 1)

    def decode_seconds(self, steps: float, batch: int, cached: float) -> float:
        """Of ``steps`` steps in a row of the same ``batch``: ``cached`` tokens at first, one more a sequence every step."""
        first = self.step + self.per_sequence * batch + self.per_cached * cached
        return steps * first + self.per_cached * batch * steps * (steps - 1) / 2

    def steps_within(self, seconds: float, batch: int, cached: float) -> int:
        """The fewest steps that take at least ``seconds``: the inverse of `decode_seconds`, rounded up."""
        first, growth = self.decode_seconds(1, batch, cached), self.per_cached * batch
        linear = first - growth / 2
        # the root of growth / 2 * n^2 + linear * n = seconds, in the form that stays exact for growth = 0
        steps = 2 * seconds / (linear + math.sqrt(linear**2 + 2 * growth * seconds))
        return max(1, math.ceil(steps - 1e-9))

    def prefill_seconds(self, prompts: Sequence[int]) -> float:
        """Of these prompts in one go."""
        return self.prefill + self.per_prompt * sum(prompts) + self.per_square * sum(p * p for p in prompts)

    def most(self, prompt: int, output: int) -> int:
        """How many such requests run at once. Raises ValueError unless both are positive integers, as `capacity` does."""
        require_count("prompt", prompt, 1)
        require_count("output", output, 1)
        return min(self.sequences, self.tokens // (prompt + output))

    def capacity(self, prompt: int, output: int) -> float:
        """Requests per second that one GPU finishes at most: always full, the middle of the output stands for all steps."""
        batch = self.most(prompt, output)
        if batch == 0:
            raise ValueError(f"prompt: {prompt} + {output} tokens are more than the {self.tokens} that fit")
        step = self.decode_seconds(1, batch, batch * (prompt + output / 2))
        together = max(1, self.burst // prompt)  # prompts that share a prefill
        return 1 / (self.prefill_seconds([prompt] * together) / together + (output - 1) * step / batch)


def surface(
    model: Geometry, scheme: Scheme, gpu: Gpu, system: System = OURS, memory: float | None = None, most: int = 256
) -> Surface:
    """The predicted surface (`prediction`): affine because predicted times add.

    A prediction knows kernels, not all that a server does. The steps of a server under random arrivals
    (``data/benchmarks/serve_arrivals_h200.json``) took half as long again, more than half of that for zeros of rows without
    a sequence, which have become faster since; its prefills took a fifth longer. Latencies by this surface are a lower
    bound, and comparing formats is what it is for. `measured_surface` has no such gap.

    ``memory`` in bytes emulates a smaller card; ``most`` is how many sequences run at once even if more fit. ValueError if
    the weights leave no room.
    """

    def step(batch: int, context: int) -> float:
        return system.efficiency.seconds(prediction.step_work(model, batch, context, scheme, gpu, system))

    def prefill(count: int, prompt: int) -> float:
        return system.efficiency.seconds(prediction.prefill_work(model, count, prompt, scheme, gpu, system))

    card = gpu if memory is None else replace(gpu, memory=memory)
    tokens = roofline.largest_batch(model, 1, scheme, card)
    if tokens == 0:
        raise ValueError(
            f"memory: {card.memory / 2**30:.0f} GiB leave no room for a cache beside the weights of {model.name}"
        )
    # differences of whole tiles of 128 tokens, between which unpacking repeats
    per_cached = (step(128, 4097) - step(128, 1)) / (128 * 4096)
    per_sequence = (step(256, 1) - step(128, 1)) / 128 - per_cached
    once, twice, longer = prefill(1, 2048), prefill(2, 2048), prefill(1, 4096)
    square = max(0.0, longer - twice) / (2 * 2048**2)  # of one prompt of 4096 tokens against two of 2048
    per_prompt = (twice - once) / 2048 - square * 2048
    return Surface(
        step=max(0.0, step(128, 1) - 128 * (per_sequence + per_cached)),
        per_sequence=per_sequence,
        per_cached=per_cached,
        prefill=max(0.0, 2 * once - twice),
        per_prompt=per_prompt,
        per_square=square,
        sequences=most,
        tokens=tokens,
    )


def measured_surface(steps: pd.DataFrame, prefills: pd.DataFrame, sequences: int, tokens: int) -> Surface:
    """A surface from measured times, by least squares of the relative error.

    ``steps``: columns ``batch``, ``cached`` (tokens of all sequences) and ``seconds``; ``prefills``: columns ``prompts``
    (tokens of all) and ``seconds``. ValueError with fewer than three steps or two prefills, a column missing, seconds that
    are not positive, or tokens and sequences that are no numbers of at least 0.
    """
    for name, table, least, columns in (
        ("steps", steps, 3, ("batch", "cached")),
        ("prefills", prefills, 2, ("prompts",)),
    ):
        if len(table) < least:
            raise ValueError(f"{name}: at least {least} measurements are needed, got {len(table)}")
        require_columns(name, table, (*columns, "seconds"))
        for column in (*columns, "seconds"):
            values = table[column].to_numpy(dtype=float)
            wrong = ~np.isfinite(values) | (values < 0) | ((values == 0) & (column == "seconds"))
            if wrong.any():
                rule = "positive numbers" if column == "seconds" else "numbers of at least 0"
                raise ValueError(f"{name}: {column} are {rule}, got {float(values[wrong][0])!r}")
    step = prediction.least_squares(
        np.stack([np.ones(len(steps)), steps["batch"], steps["cached"]], 1), steps["seconds"].to_numpy()
    )
    prefill = prediction.least_squares(
        np.stack([np.ones(len(prefills)), prefills["prompts"]], 1), prefills["seconds"].to_numpy()
    )
    fixed, per_sequence, per_cached = map(float, step)
    return Surface(fixed, per_sequence, per_cached, float(prefill[0]), float(prefill[1]), sequences, tokens)
