"""Methods side by side on equal terms: the same pipeline, calibration text, test text and counting of bits."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import nn

from . import offload, resume
from . import recipes as presets
from .architecture import describe
from .capture import require_ids
from .evaluate import logits_sqnr_db, perplexity
from .pipeline import QuantizedModel, quantize
from .recipes import Recipe
from .runtime import Mode, QuantLinear
from .sweeps import sweep
from .tensorfile import digest_of_tensor

#: Test windows on which logits are compared (a whole set of logits is large).
SQNR_WINDOWS = 4
#: Tokens of a window that RUNTIME evaluation takes as a prompt; the rest are decode steps on the quantised cache.
PREFILL = 1

COLUMNS = [
    "model",
    "method",
    "format",
    "text",
    "perplexity",
    "gap",
    "runtime_perplexity",
    "logits_sqnr_db",
    "weight_bits",
    "kv_bits",
    "weight_mb",
    "kv_bytes_per_token",
    "seconds",
]
#: Column after `COLUMNS` in what `compare` returns: None, or the one line of a method that failed.
ERROR = "error"


def resolve(methods: str | Iterable[str | Recipe]) -> list[Recipe]:
    """Recipes from preset names, recipes, or the name of a suite: "paper" (every method of the paper's tables) or "ladder"
    (its ablation study).

    Raises TypeError for other things, ValueError for an empty list, a name that does not exist, or two recipes of one name.
    """
    if isinstance(methods, str):
        chosen = presets.suite(methods)
    elif not isinstance(methods, Iterable):
        raise TypeError(f"recipes: expected a suite's name or a list, got {type(methods).__name__}")
    else:
        chosen = [presets.get(method) if isinstance(method, str) else method for method in methods]
    for recipe in chosen:
        if not isinstance(recipe, Recipe):
            raise TypeError(f"recipes: expected presets' names or Recipes, got {type(recipe).__name__}")
    names = [recipe.name for recipe in chosen]
    if not chosen or len(set(names)) < len(names):
        raise ValueError(f"recipes: expected one or more, each name once, got {', '.join(names) or 'none'}")
    return chosen


def weight_bits(quantized: QuantizedModel) -> float:
    """Stored bits per weight of the quantised layers, scales, zeros and outliers included; 16 where none is quantised."""
    layers = [m for m in quantized.model.modules() if isinstance(m, QuantLinear)]
    values = sum(layer.in_features * layer.out_features for layer in layers)
    stored = sum(layer.storage_bytes() - (0 if layer.bias is None else layer.bias.nbytes) for layer in layers)
    return 8 * stored / values if values else 16.0


@dataclass
class Bench:
    """An unquantised model with the texts on which methods are measured: tokens [n, length] by name, and what the model
    itself makes of them."""

    model: nn.Module
    calibration: torch.Tensor
    tests: dict[str, torch.Tensor]
    perplexities: dict[str, float] = field(init=False)
    logits: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.perplexities = {text: perplexity(self.model, ids) for text, ids in self.tests.items()}
        with torch.no_grad():
            self.logits = {
                text: self.model(ids[:SQNR_WINDOWS].to(next(self.model.parameters()).device), use_cache=False).logits.float()
                for text, ids in self.tests.items()
            }


def measure(
    recipe: Recipe, bench: Bench, runtime: bool = True, report: bool = False
) -> tuple[list[dict[str, Any]], QuantizedModel]:
    """Quantise a model by one recipe and measure it on every text: rows with all `COLUMNS` but "model", and the quantised
    model with its report, if asked for."""
    start = time.perf_counter()
    data = bench.calibration if recipe.steps else None
    quantized = quantize(bench.model, recipe, data, progress=False, report=report)
    seconds = time.perf_counter() - start
    facts = {
        "method": recipe.name,
        "format": str(recipe.scheme),
        "weight_bits": weight_bits(quantized),
        "kv_bits": recipe.scheme.kv_bits_per_value(describe(quantized.model).blocks[0].head_dim),
        "weight_mb": quantized.weight_bytes() / 1e6,
        "kv_bytes_per_token": quantized.kv_bytes_per_token(),
        "seconds": seconds,
    }
    rows = []
    for text, ids in bench.tests.items():
        value = perplexity(quantized, ids)
        row = facts | {
            "text": text,
            "perplexity": value,
            "gap": value - bench.perplexities[text],
            "runtime_perplexity": perplexity(quantized, ids, Mode.RUNTIME, PREFILL) if runtime else float("nan"),
            "logits_sqnr_db": logits_sqnr_db(bench.logits[text], quantized, ids[:SQNR_WINDOWS]),
        }
        rows.append(row)
    return rows, quantized


def compare(
    recipes: str | Iterable[str | Recipe],
    model: nn.Module | Mapping[str, nn.Module],
    calibration: torch.Tensor,
    test: torch.Tensor | Mapping[str, torch.Tensor],
    runtime: bool = True,
    progress: bool = True,
    out: str | os.PathLike[str] | None = None,
) -> pd.DataFrame:
    """Quantise models by several methods and measure them all alike.

    ``recipes``: preset names or `Recipe` objects, or a suite: "paper" (every method of the paper's tables), "ladder" (its
    ablation). ``model``: a causal language model, or several by name. ``calibration``, ``test``: int64 tokens [n, length];
    ``test`` may be several texts by name. ``runtime=False`` leaves out the second evaluation mode, which takes longer.

    Returns one row per model, method and text: ``perplexity`` (everything rounded, as papers report) and its ``gap`` to the
    unquantised model, ``runtime_perplexity`` (what kernels compute), ``logits_sqnr_db``, ``weight_bits`` and ``kv_bits`` per
    stored value with scales and zeros, ``weight_mb`` of the whole model, ``kv_bytes_per_token``, ``seconds`` to quantise,
    ``error``: None, or one line where a method failed (it does not suit the model's shape, memory ran out), without numbers
    then, while the others go on. `qoqlab.viz.comparison` draws it, without those.

    ``out``: a ``.jsonl`` or ``.parquet`` file, as `qoqlab.sweep` writes it: a record for every model and method the moment
    it is measured. The same call after a kill takes finished methods from there and measures those that are left and those
    that failed, whose tracebacks the file has. What was measured with other weights, recipes, texts or ``runtime`` stays in
    the file and is not taken for this; devices, versions and the code of steps are not compared.

    Raises ValueError or TypeError for unknown recipes, no recipes, an unsupported model, tokens outside the vocabulary, or
    an ``out`` that no comparison wrote.
    """
    chosen = resolve(recipes)
    models = dict(model) if isinstance(model, Mapping) else {"model": model}
    tests = dict(test) if isinstance(test, Mapping) else {"test": test}
    if not models or not tests:
        raise ValueError("model, test: expected at least one of each")
    for network in models.values():
        vocabulary = describe(network).embedding.num_embeddings
        require_ids("calibration", calibration, vocabulary)
        for text, ids in tests.items():
            require_ids(f"test {text!r}", ids, vocabulary)
        if offload.is_spread(network):
            raise ValueError("model: weights that are offloaded or on several devices cannot be quantised several times")
    benches: dict[str, Bench] = {}
    methods = {recipe.name: recipe for recipe in chosen}

    def measured(model: str, method: str, **_: Any) -> dict[str, Any]:
        if model not in benches:
            benches.clear()  # the logits of one model at a time
            benches[model] = Bench(models[model], calibration, tests)
        rows, _quantized = measure(methods[method], benches[model], runtime)
        return {"texts": {row["text"]: row for row in rows}}

    points: list[dict[str, Any]] = [{"model": name, "method": recipe.name} for name in models for recipe in chosen]
    if out is not None:  # what a record has to agree in to be taken for this; digests of all weights take a while
        texts = {"calibration": _digest(calibration), "texts": {text: _digest(ids) for text, ids in tests.items()}}
        weights = {name: resume.fingerprint(network) for name, network in models.items()}
        for point in points:
            recipe = resume.recipe_facts(methods[point["method"]])
            point["terms"] = {"weights": weights[point["model"]], "recipe": recipe, **texts, "runtime": runtime}
    table = sweep(points, measured, out=out, jobs=1, progress=progress)
    found = table["texts"] if "texts" in table else [None] * len(table)  # no such column where all have failed
    rows = []
    for name, method, texts, error in zip(table["model"], table["method"], found, table["error"], strict=True):
        known = {"model": name, "method": method, "format": str(methods[method].scheme), ERROR: error}
        rows += [known | ({"text": text} if error else texts[text]) for text in tests]
    return pd.DataFrame(rows, columns=[*COLUMNS, ERROR])


def _digest(ids: torch.Tensor) -> list[Any]:
    """Shape and digest of tokens."""
    return [*ids.shape, digest_of_tensor(ids.cpu())]
