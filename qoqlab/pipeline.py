"""Run a recipe over a model, block by block.

Memory: beside the model's own weights (shared with the original unless ``inplace``), one block in fp32 and the calibration
activations of one block's input and output are held; see `peak_bytes`.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from . import attention, capture, offload, recipes, runtime, transforms
from .architecture import Block, clone, describe, own, replace_parameter, require_finite_weights
from .capture import Batch
from .checks import require_finite
from .recipes import Recipe
from .resume import Journal
from .schemes import Scheme
from .steps import Context

REPORT_COLUMNS = ["stage", "layer", "weight_mse", "weight_nmse", "output_sqnr_db", "seconds"]
#: Batches on which each stage's output error is measured (all of them would double the run time).
REPORT_BATCHES = 1


@dataclass
class QuantizedModel:
    """A quantised model: ``model`` is a usable Hugging Face causal LM, ``report`` one row per layer and stage.

    Report columns: ``stage`` (state after that step, everything not yet decided rounded to nearest), ``layer`` index,
    ``weight_mse`` (mean squared error over all weights of the layer), ``weight_nmse`` (that over the mean squared weight),
    ``output_sqnr_db`` (signal-to-error ratio of what the layer adds to the residual stream), ``seconds`` of the step.
    """

    model: nn.Module
    recipe: Recipe
    report: pd.DataFrame

    def weight_bytes(self) -> int:
        """Bytes of all weights, scales and zeros as stored; unquantised parameters count 16 bits."""
        return runtime.weight_bytes(self.model)

    def kv_bytes_per_token(self) -> float:
        """Bytes that one token adds to the KV cache, all layers, scales and zeros included."""
        blocks = describe(self.model).blocks
        bits = self.recipe.scheme.kv_bits_per_value(blocks[0].head_dim)
        return sum(2 * b.kv_heads * b.head_dim * bits / 8 for b in blocks)


def sqnr_db(signal: torch.Tensor, error: torch.Tensor) -> float:
    """``10 log10(|signal|^2 / |error|^2)``; infinite without error.

    >>> sqnr_db(torch.tensor([10.0]), torch.tensor([1.0]))
    20.0
    """
    noise = error.double().square().sum()
    return float("inf") if noise == 0 else float(10 * torch.log10(signal.double().square().sum() / noise))


@torch.no_grad()
def quantize(
    model: nn.Module,
    recipe: str | Recipe,
    calibration: torch.Tensor | None = None,
    inplace: bool = False,
    progress: bool | Callable[[tuple[Block, ...]], Iterable[Block]] = True,
    report: bool = True,
    resume: str | os.PathLike[str] | None = None,
) -> QuantizedModel:
    """Quantise a Hugging Face causal language model.

    ``recipe``: a preset's name (`recipes.names`) or a `Recipe`; ``calibration``: int64 tokens ``[n, length]``, used for
    statistics and for the report (None is fine for recipes whose steps need no data, and then no output error is reported).
    ``inplace=False`` leaves ``model`` untouched; ``inplace=True`` frees its weights block by block, so a model whose run
    fails half-way (out of memory, NaN in calibration) is spent and has to be loaded again. ``progress`` shows a bar over
    the blocks, or is a function that wraps them, as ``rich.progress.track`` does; ``report=False`` skips the measurements
    after each stage and leaves the report empty. ``resume``: a folder in which finished blocks are kept; after a kill the
    same call takes them from there. It may be deleted once the result is saved.

    Weights may be on disk or offloaded (`offload.open_model`, or accelerate's ``device_map``): with ``inplace=True`` blocks
    are fetched one at a time, and the quantised model has to fit.

    Deterministic: the same seed, inputs and thread count give bit-identical codes, resumed or not.

    Raises TypeError for an unsupported architecture or wrong types, ValueError for an unknown preset, NaN or infinite
    weights (naming the parameter), empty calibration, tokens outside the vocabulary, a layer that the format's groups do not
    divide, offloaded weights without ``inplace=True``, or a ``resume`` folder of another run.
    """
    if isinstance(recipe, str):
        recipe = recipes.get(recipe)
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe: expected a preset's name or a Recipe, got {type(recipe).__name__}")
    architecture = describe(model)
    _require_quantizable(architecture.blocks, recipe)
    require_finite_weights(architecture)
    if calibration is None and needs_calibration(recipe):
        raise ValueError(f"calibration: recipe {recipe.name!r} needs tokens [n, length], got None")
    if not inplace and offload.is_spread(model):
        raise ValueError("inplace: weights that are offloaded or on several devices cannot be shared; pass inplace=True")
    if calibration is not None:
        capture.require_ids("calibration", calibration, architecture.embedding.num_embeddings)
    original = model
    if not inplace:
        model = clone(model)
        architecture = describe(model)
    model.eval()
    journal = None if resume is None else Journal(resume, model, recipe, calibration, report)
    residence = offload.enter(model)
    if recipe.scheme == Scheme() and not recipe.steps:
        for block in architecture.blocks:
            offload.fetch(block, residence)
            offload.settle(block, residence)
        offload.leave(model, residence)
        if not inplace:
            own(model, original)
        return QuantizedModel(model, recipe, pd.DataFrame(columns=REPORT_COLUMNS))
    attention.install(model)
    with offload.ends_at_work(model, residence):
        batches = [] if calibration is None else capture.first_inputs(model, calibration)
    rows: list[dict[str, object]] = []
    bar = functools.partial(tqdm, desc=recipe.name, unit="block", disable=not progress)
    for block in (progress if callable(progress) else bar)(architecture.blocks):
        offload.fetch(block, residence)
        batches = _quantize_block(block, batches, recipe, rows if report else None, journal)
        offload.settle(block, residence)
    with offload.ends_at_work(model, residence):
        for step in recipe.steps:
            if hasattr(step.function, "prepare"):
                step.function.prepare(architecture)
    offload.leave(model, residence)
    if not inplace:
        own(model, original)
    return QuantizedModel(model, recipe, pd.DataFrame(rows, columns=REPORT_COLUMNS))


def needs_calibration(recipe: Recipe) -> bool:
    """Whether a recipe has steps that look at activations."""
    return not all(getattr(step.function, "data_free", False) for step in recipe.steps)


def _require_quantizable(blocks: tuple[Block, ...], recipe: Recipe) -> None:
    """Check every linear's shape before any work starts."""
    attention.require_unquantized(blocks)
    form = recipe.scheme.weights
    for block in blocks:
        for role, linear in block.linears():
            n, k = linear.weight.shape
            if form is not None and k % form.multiple:
                raise ValueError(
                    f"model: {block.name(role)} is {n}x{k}, not divisible into groups of {form.multiple} along K; "
                    "use another group_size, or per-channel weights as in qoq-per-channel"
                )


def _quantize_block(
    block: Block,
    batches: list[Batch],
    recipe: Recipe,
    rows: list[dict[str, object]] | None,
    journal: Journal | None = None,
) -> list[Batch]:
    """Run all steps on one block, install its quantised layers, append report rows, return the next block's inputs.

    Consumes ``batches``. The next block sees this block's exact outputs: quantisation error is not propagated (as in the
    original).
    """
    dtype = next(block.layer.parameters()).dtype
    working = torch.float64 if dtype == torch.float64 else torch.float32
    _cast(block.layer, working)
    arguments = [batch.arguments for batch in batches]
    for i, batch in enumerate(batches):  # in place: each copy of the activations would be gigabytes for a large model
        moved = offload.move(batch, block)
        batches[i] = Batch(moved.hidden.to(working), moved.arguments)
    outputs = []
    for batch, unmoved in zip(batches, arguments, strict=True):
        y = capture.run_block(block, batch)
        require_finite(f"calibration: output of model.layers.{block.index}", y)
        outputs.append(Batch(y, unmoved))
    evidence = journal.evidence(block, [y.hidden for y in outputs]) if journal else ""
    finished = journal.restore(block, evidence, recipe.scheme) if journal else None
    if finished is not None:
        if rows is not None:
            rows.extend(finished)
        return outputs
    context = Context(block, batches, [y.hidden for y in outputs[:REPORT_BATCHES]], recipe.scheme)
    if rows is not None:
        rows.append(_measure(context, "round to nearest", 0.0))
    for step in recipe.steps:
        start = time.perf_counter()
        step(context)
        if rows is not None:
            rows.append(_measure(context, step.name, time.perf_counter() - start))
    runtime.install(block, _quantized_weights(context), recipe.scheme)
    _cast(block.layer, dtype)
    if journal is not None:
        journal.save(block, evidence, [row for row in rows or [] if row["layer"] == block.index])
    return outputs


def _quantized_weights(context: Context) -> dict[str, runtime.QuantizedWeight]:
    if context.scheme.weights is None:
        return {}
    return {role: context.quantize_weight(role) for role, _ in context.block.linears()}


def _cast(layer: nn.Module, dtype: torch.dtype) -> None:
    """Parameters to ``dtype``, by replacement (a cloned model shares its tensors)."""
    for module in layer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            replace_parameter(module, name, parameter.detach().to(dtype))


def _measure(context: Context, stage: str, seconds: float) -> dict[str, object]:
    """Report row: error of the block if it were quantised in its present state."""
    weights = _quantized_weights(context)
    error = signal = count = 0.0
    for role, weight in weights.items():
        original = context.block.linear(role).weight.detach()
        error += float((weight.dequantize() - original).double().square().sum())
        signal += float(original.double().square().sum())
        count += original.numel()
    sqnr = float("nan")
    if context.batches:
        batches, exact = context.batches[: len(context.exact)], torch.cat(context.exact)
        with runtime.quantized(context.block, weights, context.scheme):
            rounded = torch.cat([capture.run_block(context.block, b) for b in batches])
        sqnr = sqnr_db(exact - torch.cat([b.hidden for b in batches]), rounded - exact)
    return {
        "stage": stage,
        "layer": context.block.index,
        "weight_mse": error / max(count, 1),
        "weight_nmse": error / max(signal, 1e-300),
        "output_sqnr_db": sqnr,
        "seconds": seconds,
    }


def peak_bytes(hidden: int, intermediate: int, kv_width: int, tokens: int, gptq: bool = False) -> dict[str, int]:
    """What `quantize` holds beside the model's own weights, in bytes, for a geometry and a number of calibration tokens.

    ``block``: one block in fp32, exact, being transformed and dequantised; ``activations``: the block's fp32 inputs and
    outputs for all tokens; ``workspace``: temporaries of a transform of the largest weight, partly in fp64; ``gptq``: the
    four Hessians and the factorisation of the largest; ``total``. Query width is taken as ``hidden``. An 8B geometry
    took 8 % less than this on a GPU: ``data/benchmarks/peak_memory.json``.

    >>> round(peak_bytes(4096, 14336, 1024, 128 * 1024)["total"] / 2**30, 2)
    7.25
    """
    weights = hidden * (2 * hidden + 2 * kv_width + 3 * intermediate)
    parts = {
        "block": 3 * 4 * weights,
        "activations": 2 * 4 * tokens * hidden,
        "workspace": 12 * hidden * intermediate + 5 * 8 * transforms.CHUNK,
        "gptq": gptq * 4 * (3 * hidden**2 + 5 * intermediate**2),
    }
    return {**parts, "total": sum(parts.values())}
