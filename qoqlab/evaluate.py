"""Perplexity and generation, in both modes of arithmetic."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pandas as pd
import torch
from torch import nn

from . import runtime
from .attention import Mode
from .capture import require_ids
from .checks import require_enum
from .kv import KVFormat
from .pipeline import QuantizedModel, sqnr_db


def _plain(model: nn.Module | QuantizedModel) -> nn.Module:
    network = model.model if isinstance(model, QuantizedModel) else model
    if not isinstance(network, nn.Module) or not hasattr(network, "get_input_embeddings"):
        kind = type(model).__name__
        raise TypeError(f"model: expected a Hugging Face causal language model or a QuantizedModel, got {kind}")
    return network


@torch.no_grad()
def perplexity(
    model: nn.Module | QuantizedModel,
    ids: torch.Tensor,
    mode: Mode = Mode.SIMULATED,
    prefill: int = 1,
    batch_size: int = 4,
) -> float:
    """Token-level perplexity: ``exp`` of the mean negative log-likelihood over all predicted tokens.

    ``ids``: int64 tokens ``[n, length]``; each row is one window, its first token is given and the other ``length - 1`` are
    predicted with everything before them in the window as context. Windows count equally.

    ``mode`` (quantised models): ``Mode.SIMULATED`` rounds everything everywhere, as papers report; ``Mode.RUNTIME`` is what
    kernels compute, the first ``prefill`` tokens of a window as a prompt and the rest as decode steps.

    Raises ValueError for tokens outside the vocabulary, a window shorter than 2, a ``prefill`` outside 1..length
    or a ``batch_size`` below 1; TypeError for a ``mode`` that is not a `Mode`.
    """
    network = _plain(model)
    require_ids("ids", ids, network.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    length = ids.shape[1]
    if length < 2:
        raise ValueError(f"ids: windows of {length} token leave nothing to predict; expected length >= 2")
    require_enum("mode", mode, Mode)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected a positive integer, got {batch_size!r}")
    if not isinstance(prefill, int) or not 1 <= prefill <= length:
        raise ValueError(f"prefill: expected 1..{length}, got {prefill!r}")
    quantized = isinstance(model, QuantizedModel)
    if mode is Mode.RUNTIME and not quantized:
        raise TypeError("mode: RUNTIME needs a QuantizedModel, as qoqlab.quantize and qoqlab.load return it")
    device = next(network.parameters()).device
    total = 0.0
    with runtime.mode(network, mode, prefill) if quantized else nullcontext():
        for batch in ids.split(batch_size):
            batch = batch.to(device)
            logits = network(batch, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            total += float(nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").double())
    return math.exp(total / (ids.shape[0] * (length - 1)))


@torch.no_grad()
def generate(model: nn.Module | QuantizedModel, ids: torch.Tensor, max_new_tokens: int, **options: Any) -> torch.Tensor:
    """Continue ``ids [B, T]`` as the kernels would: RUNTIME arithmetic, and a quantised cache where the recipe has one.

    ``options`` go to ``model.generate``. Returns int64 ``[B, <= T + max_new_tokens]``. A plain model just generates.
    """
    network = _plain(model)
    require_ids("ids", ids, network.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    if not isinstance(model, QuantizedModel):
        return network.generate(ids, max_new_tokens=max_new_tokens, **options)  # type: ignore[operator]
    from .hf import KV4Cache, cache_keyword

    form = KVFormat.of(model.recipe.scheme.kv)
    if form is not None and form.grid is not None and not {"cache", "past_key_values"} & options.keys():
        options[cache_keyword()] = KV4Cache(form)
    with runtime.mode(network, Mode.RUNTIME):
        return network.generate(ids, max_new_tokens=max_new_tokens, **options)  # type: ignore[operator]


@torch.no_grad()
def logits_sqnr_db(exact: torch.Tensor, quantized: QuantizedModel, ids: torch.Tensor) -> float:
    """Signal-to-error ratio of the quantised model's logits in dB, in simulated mode.

    ``exact [B, T, V]``: the original model's logits for ``ids [B, T]``. A constant added to all logits of a token does not
    count, since it changes no probability.
    """
    rounded = quantized.model(ids.to(exact.device), use_cache=False).logits.float()
    return sqnr_db(exact - exact.mean(-1, keepdim=True), rounded - exact - (rounded - exact).mean(-1, keepdim=True))


def lm_eval(
    model: nn.Module | QuantizedModel,
    tasks: str | Sequence[str],
    tokenizer: Any = None,
    include_path: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    batch_size: int = 4,
    mode: Mode = Mode.SIMULATED,
) -> pd.DataFrame:
    """Run tasks of the lm-evaluation-harness (extra ``eval``) on a model.

    ``tasks``: names the harness knows, or of task files (YAML) in the folder ``include_path``, whose ``dataset_path: json``
    may name local files; ``tokenizer``: None loads the one beside the model's checkpoint; ``limit``: documents per task;
    ``mode`` as in `perplexity`, where RUNTIME computes every task's text as a prompt (so keys and values stay exact).

    Returns a row per task and metric: ``task``, ``metric``, ``filter``, ``value``, ``stderr`` (NaN where there is none).
    Tasks with data on the Hub are downloaded by the harness unless ``HF_HUB_OFFLINE`` is set.

    Raises ImportError without the extra, ValueError for tasks that are not found or a tokenizer that cannot be loaded,
    TypeError for anything but a causal language model.
    """
    network = _plain(model)
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"tasks: expected a task's name or a list of names, got {tasks!r}")
    require_enum("mode", mode, Mode)
    quantized = isinstance(model, QuantizedModel)
    if mode is Mode.RUNTIME and not quantized:
        raise TypeError("mode: RUNTIME needs a QuantizedModel, as qoqlab.quantize and qoqlab.load return it")
    try:
        import lm_eval as harness
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError(f'lm_eval: needs the lm-evaluation-harness; pip install "qoqlab[eval]" ({error})') from None
    manager = _task_manager(names, include_path)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ValueError(f"tasks: {unknown[0]!r} is neither a task of the harness nor one of {include_path}")
    if tokenizer is None:
        tokenizer = _tokenizer_of(network)
    device = str(next(network.parameters()).device)
    wrapped = HFLM(pretrained=network, tokenizer=tokenizer, batch_size=batch_size, device=device)
    with runtime.mode(network, mode) if quantized else nullcontext():
        found = harness.simple_evaluate(wrapped, tasks=names, task_manager=manager, limit=limit)
    rows = []
    for task, values in found["results"].items():
        for label, value in values.items():
            metric, _, filtered = label.partition(",")
            if filtered and not metric.endswith("_stderr"):
                stderr = pd.to_numeric(values.get(f"{metric}_stderr,{filtered}"), errors="coerce")
                rows.append({"task": task, "metric": metric, "filter": filtered, "value": value, "stderr": stderr})
    return pd.DataFrame(rows, columns=["task", "metric", "filter", "value", "stderr"]).astype({"stderr": float})


def _task_manager(names: list[str], include_path: str | os.PathLike[str] | None) -> Any:
    """A task manager that knows the folder's tasks, and the harness's own unless the folder's are enough: reading thousands
    of task files takes it longer than many an evaluation."""
    from lm_eval.tasks import TaskManager

    folder = None if include_path is None else str(include_path)
    if folder is not None:
        alone = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(alone.all_subtasks):  # groups may name tasks of the harness
            return alone
    return TaskManager(include_path=folder)


def _tokenizer_of(network: nn.Module) -> Any:
    """The tokenizer in the folder (or cached repository) that a model was loaded from."""
    from transformers import AutoTokenizer

    name = getattr(network.config, "name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"tokenizer: none given, and none found for the model's name {name!r} ({reason})") from None
