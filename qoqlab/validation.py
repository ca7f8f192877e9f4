"""Predictions beside published throughput: an error for every cell, what the table says to every large one, and dollars.

Published systems have efficiencies of their own (`prediction.PUBLISHED`), one set a system for all its formats and both
cards. They are fitted on the table that they are compared with, so their errors say whether a handful of numbers can
describe it, not whether it could have been foreseen; `foreseen` fits on one card and predicts the other.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Any

import pandas as pd

from . import prediction, roofline
from .machines import GPUS, MODELS, Geometry, Gpu
from .prediction import Efficiency, System, Work
from .recipes import PER_CHANNEL
from .roofline import PRECISIONS, Serving
from .schemes import Scheme

#: What each format of the table keeps in its cache. TensorRT-LLM's W8A8 agrees with the paper's appendix on W8A8KV8.
SERVED = {"fp16": "fp16", "W4A16": "W4A16", "W8A8": "W8A8KV8", "W4A4": "W4A4KV4", "W4A8KV4": "W4A8KV4"}
#: No server of the table ran more sequences at once.
MOST = 256
#: Errors above this share get a remark.
LARGE = 0.25
#: What the table itself can tell: too little to find all of a system's numbers, so these keep their defaults.
FIXED = frozenset({"gemm_seconds", "attention_seconds"})


@dataclass(frozen=True)
class Cell:
    """A row of the table with what it takes to predict it; ``batch`` is the published one, or what fits, up to 256."""

    gpu: Gpu
    model: Geometry
    scheme: Scheme
    system: System
    batch: int

    def work(self, batch: int | None = None) -> Work:
        """Of the paper's job, 1024 tokens in and 512 out, per generated token."""
        job = Serving(batch or self.batch)
        work = prediction.job_work(self.model, job, self.scheme, self.gpu, self.system)
        return work * (1 / (job.batch * job.output))

    def throughput(self, efficiency: Efficiency, batch: int | None = None) -> float:
        """Tokens per second."""
        return 1 / efficiency.seconds(self.work(batch))


def cell(row: Any) -> Cell:
    """From a row of ``data/paper/throughput.csv`` (as `DataFrame.itertuples` gives it) that fits into memory.

    QServe ran per-channel weights on the A100 and groups on the L40S.
    """
    gpu, model, scheme = GPUS[row.gpu], MODELS[row.model], PRECISIONS[SERVED[row.precision]]
    if row.system == "QServe" and row.gpu == "A100":
        scheme = Scheme(PER_CHANNEL, scheme.activations, scheme.kv)
    fits = min(MOST, roofline.largest_batch(model, 1536, scheme, gpu))
    return Cell(gpu, model, scheme, prediction.PUBLISHED[row.system], fits if pd.isna(row.batch) else int(row.batch))


def served(published: pd.DataFrame) -> pd.DataFrame:
    """The rows of the paper's table that ran: its two cards, with a throughput."""
    return published[published["gpu"].isin(("A100", "L40S"))].dropna(subset="tokens_per_s").reset_index(drop=True)


def fitted(rows: pd.DataFrame) -> dict[str, Efficiency]:
    """A set of efficiencies for every system in ``rows`` (of `served`)."""
    found = {}
    for name, part in rows.groupby("system", sort=False):
        works = [cell(row).work() for row in part.itertuples()]
        found[str(name)] = prediction.fit(works, [1 / t for t in part["tokens_per_s"]], FIXED)
    return found


def compared(rows: pd.DataFrame, efficiencies: dict[str, Efficiency] | None = None) -> pd.DataFrame:
    """``rows`` (of `served`) with columns ``used_batch``, ``bound``, ``predicted`` (tokens per second), ``error``
    (predicted over published, minus 1) and ``reason``, empty where the error is at most 25 % (`reason` says what it tells).

    ``efficiencies`` by system; `prediction.PUBLISHED` where none are given.
    """
    sets = efficiencies or {name: system.efficiency for name, system in prediction.PUBLISHED.items()}
    table, cells = rows.copy(), [cell(row) for row in rows.itertuples()]
    table["used_batch"] = [c.batch for c in cells]
    table["bound"] = [roofline.throughput(c.model, Serving(c.batch), c.scheme, c.gpu) for c in cells]
    table["predicted"] = [c.throughput(sets[name]) for c, name in zip(cells, table["system"], strict=True)]
    table["error"] = table["predicted"] / table["tokens_per_s"] - 1
    table["reason"] = [
        reason(row, c, sets[name], table) if abs(error) > LARGE else ""
        for row, c, name, error in zip(table.itertuples(), cells, table["system"], table["error"], strict=True)
    ]
    return table


def foreseen(rows: pd.DataFrame, gpu: str) -> pd.DataFrame:
    """`compared` on the other card, with efficiencies fitted on the rows of ``gpu`` alone."""
    known = rows[rows["gpu"] == gpu]
    return compared(rows[(rows["gpu"] != gpu) & rows["system"].isin(known["system"])], fitted(known))


def reason(row: Any, c: Cell, efficiency: Efficiency, table: pd.DataFrame) -> str:
    """What the table itself says to a prediction that is far off.

    INT8 that is no faster than the same system's 16 bits is a reason. A batch that nobody published is none, only an open
    question: throughput grows with the batch from next to nothing, so a prediction above the published figure nearly always
    meets it at some smaller batch. The text says which one would be consistent.
    """
    same = table[(table["gpu"] == row.gpu) & (table["system"] == row.system) & (table["model"] == row.model)]
    wide = same[same["precision"].isin(("fp16", "W4A16"))]["tokens_per_s"].max()
    if row.error > 0 and row.precision == "W8A8" and row.tokens_per_s < 1.2 * wide:
        return (
            f"INT8 is {row.tokens_per_s / wide:.2f} times as fast as the same system's best 16-bit format here, although "
            "the card multiplies INT8 twice as fast; one share of the tensor rate serves both"
        )
    if pd.isna(row.batch):
        # more at once is faster, so a search by halves finds the batch
        above = bisect.bisect_left(range(1, c.batch), row.tokens_per_s, key=lambda b: c.throughput(efficiency, b)) + 1
        rates = {b: c.throughput(efficiency, b) for b in (max(1, above - 1), above)}
        near, rate = min(rates.items(), key=lambda item: abs(item[1] - row.tokens_per_s))
        if abs(rate / row.tokens_per_s - 1) < 0.1:
            return (
                f"the batch is not published: {row.tokens_per_s:.0f} tokens/s would be consistent with a batch of {near}, "
                f"for which the prediction is {rate:.0f}; memory would hold {c.batch}"
            )
    than = "less" if row.error > 0 else "more"
    return f"no batch explains it: the system reaches {row.tokens_per_s / row.bound:.0%} of the bound, {than} than elsewhere"


def dollars(table: pd.DataFrame, prices: pd.DataFrame, rate: str = "tokens_per_s") -> pd.DataFrame:
    """Dollars per million generated tokens for the fastest format of every system, card and model.

    ``table``: of `compared`; ``prices``: columns ``gpu`` and ``dollars`` (what a card costs to buy); ``rate``: the column of
    tokens per second, "tokens_per_s" as published or "predicted". Cards in use without a pause for three years.
    """
    price = dict(zip(prices["gpu"], prices["dollars"], strict=True))
    if missing := set(table["gpu"]) - set(price):
        raise ValueError(f"prices: no price for {', '.join(sorted(missing))}")
    best = table.loc[table.groupby(["gpu", "system", "model"], sort=False)[rate].idxmax()]
    best = best[["gpu", "system", "precision", "model", rate]].reset_index(drop=True)
    hourly = {name: roofline.dollars_per_hour(price[name], GPUS[name].watts) for name in best["gpu"].unique()}
    best["dollars_per_million"] = [
        roofline.dollars_per_million(r, hourly[gpu]) for r, gpu in zip(best[rate], best["gpu"], strict=True)
    ]
    return best


def claim(table: pd.DataFrame, prices: pd.DataFrame, rate: str = "tokens_per_s") -> pd.DataFrame:
    """The paper's claim, model by model: QServe on an L40S against TensorRT-LLM at its best on an A100.

    Columns ``model``, ``speed`` (how many times as fast the L40S is) and ``saving`` (how many times less a token costs). A
    model that TensorRT-LLM cannot serve on the A100 is left out. Arguments as for `dollars`.
    """
    cost = dollars(table, prices, rate)
    small, large = (
        cost[(cost["system"] == system) & (cost["gpu"] == gpu)].set_index("model")
        for system, gpu in (("QServe", "L40S"), ("TensorRT-LLM", "A100"))
    )
    both = [model for model in small.index if model in large.index]
    speed = small.loc[both, rate] / large.loc[both, rate]
    saving = large.loc[both, "dollars_per_million"] / small.loc[both, "dollars_per_million"]
    return pd.DataFrame({"model": both, "speed": speed.to_numpy(), "saving": saving.to_numpy()})
