"""What the explorers show: each function takes the positions of the controls and returns a figure and a table.

`widgets.dashboard` puts controls beside them; `notebooks/explorers` holds the three pages. Nothing here knows a slider, so
everything can be called, and tested, by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from torch import nn

from . import affine, capture, recipes, roofline, steps
from .architecture import describe
from .checks import require_count
from .comparison import Bench, measure
from .grids import INT8, UINT4, UINT8, Grid
from .machines import GPUS, Geometry
from .pipeline import quantize
from .recipes import Recipe, Step
from .schemes import Scheme, WeightFormat
from .viz_explorers import grid_and_error, stage_map
from .viz_serving import step_and_memory

View = tuple[go.Figure, pd.DataFrame]

#: What shares one scale; numbers are groups along a row.
SHARED = ("whole tensor", "row", "column", "group of 128", "group of 64", "group of 32")
#: Bits of one scale, and of the zero beside it, as fp16.
SCALE_BITS = 16
WEIGHTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ACTIVATIONS = ("input of qkv", "input of o", "input of gate_up", "input of down", "keys", "values")


def integer_grid(bits: int, symmetric: bool) -> Grid:
    """All codes of ``bits`` bits: -7..7 symmetric, 0..15 with a zero, for 4 of them."""
    require_count("bits", bits, 1)
    if not 2 <= bits <= 8:
        raise ValueError(f"bits: codes have 2 to 8 of them, got {bits}")
    if symmetric:
        return Grid(f"INT{bits}", 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1, torch.int8)
    return Grid(f"UINT{bits}", 0, 2**bits - 1, torch.uint8)


def share_scales(x: torch.Tensor, shared: str) -> torch.Tensor:
    """A matrix rearranged so that values with one scale form a row; `back` undoes it."""
    if shared not in SHARED:
        raise ValueError(f"shared: expected one of {', '.join(SHARED)}, got {shared!r}")
    if shared == "column":
        return x.T
    size = {"whole tensor": x.numel(), "row": x.shape[1]}.get(shared) or int(shared.split()[-1])
    if x.shape[1] % size and shared != "whole tensor":
        raise ValueError(f"shared: rows of {x.shape[1]} columns do not split into groups of {size}")
    return x.reshape(-1, size)


def back(rows: torch.Tensor, shape: torch.Size, shared: str) -> torch.Tensor:
    """Inverse of `share_scales`."""
    return rows.T if shared == "column" else rows.reshape(shape)


class Playground:
    """Any tensor of some models, on any integer grid.

    ``models``: models by name. ``ids``: one window of tokens ``[1, T]`` that makes the activations.
    """

    def __init__(self, models: dict[str, nn.Module], ids: torch.Tensor) -> None:
        self.models, self.ids = models, ids
        self._seen: dict[tuple[str, int], dict[str, torch.Tensor]] = {}

    @property
    def layers(self) -> int:
        """Number of layers of the smallest model."""
        return min(len(describe(model).blocks) for model in self.models.values())

    def tensor(self, model: str, layer: int, name: str) -> torch.Tensor:
        """A weight ``[outputs, inputs]`` or what one layer sees ``[tokens, channels]``; heads lie side by side."""
        network = self.models[model]
        if name in WEIGHTS:
            linears = dict(describe(network).blocks[layer].linears())
            return linears[name.removesuffix("_proj")].weight.detach().float()
        key = (model, layer)
        if key not in self._seen:
            self._seen[key] = capture.layer_tensors(network, self.ids, layer)
        found = self._seen[key][name.removeprefix("input of ")]
        return found.movedim(0, 1).flatten(1) if found.ndim == 3 else found

    def view(
        self,
        model: str = "planted",
        layer: int = 2,
        tensor: str = "input of qkv",
        bits: int = 4,
        zero: bool = False,
        shared: str = "row",
        clip: float = 1.0,
    ) -> View:
        """The tensor rounded: histogram with its grid, error map; signal to error, error and stored bits."""
        x = self.tensor(model, layer, tensor)
        grid = integer_grid(bits, symmetric=not zero)
        rows = share_scales(x, shared)
        choose = affine.asymmetric_scales if zero else affine.symmetric_scales
        scales = choose(rows, grid, ratio=clip)
        decoded = affine.quantize(rows, scales).dequantize()
        error = back(decoded - rows, x.shape, shared)
        loudest = int(rows.abs().amax(1).argmax())
        every_code = torch.arange(grid.low, grid.high + 1)
        one = affine.AffineScales(
            scales.scales[loudest], None if scales.zeros is None else scales.zeros[loudest], grid, scales.zero
        )
        ratio = x.square().sum() / error.square().sum().clamp(min=1e-30)
        # a zero is itself a code
        stored = bits + (SCALE_BITS + (bits if zero else 0)) * len(rows) / x.numel()
        title = f"{tensor}, layer {layer}, {model} model: {grid.name}, one scale per {shared}"
        table = pd.DataFrame(
            {
                "signal to error (dB)": [f"{10 * torch.log10(ratio).item():.1f}"],
                "largest error": [f"{error.abs().max().item():.3g}"],
                "largest value": [f"{x.abs().max().item():.3g}"],
                "rounded to zero": [f"{(decoded == 0).float().mean().item():.0%}"],
                "bits per value": [f"{stored:.3f}"],
                "scales": [f"{len(rows):,}"],
            }
        )
        return grid_and_error(rows[loudest], one.decode(every_code), error, title), table


#: Group sizes by the name of the control's option.
GROUPINGS = {"groups of 32": 32, "groups of 64": 64, "groups of 128": 128, "per channel": None}
CACHES: dict[str, Grid | None] = {"4 bits": UINT4, "8 bits": UINT8, "16 bits": None}


@dataclass
class RecipeLab:
    """A recipe put together from stages, quantised and measured at once.

    ``models``: models by name; ``calibration`` and ``test``: tokens ``[n, length]``. Results are kept, so that going back
    costs nothing.
    """

    models: dict[str, nn.Module]
    calibration: torch.Tensor
    test: torch.Tensor
    _benches: dict[str, Bench] = field(default_factory=dict)
    _kept: dict[Any, tuple[dict[str, Any], pd.DataFrame]] = field(default_factory=dict)

    def _bench(self, model: str) -> Bench:
        if model not in self._benches:
            self._benches[model] = Bench(self.models[model], self.calibration, {"test": self.test})
        return self._benches[model]

    def _measure(self, model: str, recipe: Recipe) -> tuple[dict[str, Any], pd.DataFrame]:
        """What `comparison.measure` finds, and the report of a recipe with steps (an empty one otherwise)."""
        key = (model, repr(recipe.scheme), tuple((s.name, tuple(s.parameters.items())) for s in recipe.steps))
        if key not in self._kept:
            rows, quantized = measure(recipe, self._bench(model), runtime=False, report=bool(recipe.steps))
            self._kept[key] = rows[0], quantized.report if recipe.steps else pd.DataFrame()
        return self._kept[key]

    def _row(self, model: str, recipe: Recipe) -> dict[str, str]:
        facts, _ = self._measure(model, recipe)
        return {
            "recipe": recipe.name,
            "format": facts["format"],
            "perplexity": f"{facts['perplexity']:.2f}",
            "lost to fp16": f"{facts['gap']:+.2f}",
            "logits, dB": f"{facts['logits_sqnr_db']:.1f}",
            "bits per weight": f"{facts['weight_bits']:.2f}",
            "KV, bytes per token": f"{facts['kv_bytes_per_token']:.0f}",
        }

    def _exact(self, model: str) -> dict[str, str]:
        cache = roofline.cache_bytes_per_token(Geometry.of(self.models[model].config), Scheme())
        return {
            "recipe": "fp16",
            "format": str(Scheme()),
            "perplexity": f"{self._bench(model).perplexities['test']:.2f}",
            "lost to fp16": "",
            "logits, dB": "exact",
            "bits per weight": "16.00",
            "KV, bytes per token": f"{cache:.0f}",
        }

    def view(
        self,
        model: str = "planted",
        rotate: bool = True,
        smooth_attention: bool = True,
        key_alpha: float = 0.5,
        smooth_output: bool = False,
        output_alpha: float = 0.3,
        reorder: bool = False,
        clip: bool = False,
        weights: str = "groups of 128",
        cache: str = "4 bits",
    ) -> View:
        """The recipe's layers after every stage, and a table beside no quantisation and rounding to nearest."""
        group = GROUPINGS[weights]
        form = recipes.PER_CHANNEL if group is None else WeightFormat(recipes.PROGRESSIVE.kind, group)
        scheme = Scheme(form, INT8, CACHES[cache])
        chosen = [
            (rotate, Step(steps.rotate)),
            (reorder, Step(steps.reorder)),
            (smooth_attention and cache != "16 bits", Step(steps.smooth_attention, {"alpha": key_alpha})),
            (smooth_output, Step(steps.smooth_output, {"alpha": output_alpha})),
            # a coarser search than the presets', so that an answer takes seconds
            (clip, Step(steps.clip, {"count": 6, "block_count": 2})),
        ]
        mine = Recipe("your recipe", scheme, tuple(step for wanted, step in chosen if wanted))
        rows = [self._exact(model), self._row(model, Recipe("round to nearest", scheme)), self._row(model, mine)]
        report = self._measure(model, mine)[1]
        if not mine.steps:  # outputs are compared on calibration text, which a recipe without steps does not get
            report = quantize(self.models[model], mine, self.calibration, progress=False).report
        return stage_map(report, f"{model} model, {scheme}: layer by layer"), pd.DataFrame(rows)


#: Precisions that the calculator compares.
SERVED = ("fp16", "W4A16", "W8A8", "W8A8KV8", "W4A8KV4")


def serving(
    models: dict[str, Geometry],
    gpu: str = "H200",
    model: str = "Llama-3-8B",
    batch: int = 64,
    context: int = 2048,
    dollars_per_hour: float = 3.0,
) -> View:
    """Bounds of one step and what memory holds; a table with what fits, tokens per second and cost. ``models`` by name."""
    card, shape, steps_, memory, rows = GPUS[gpu], models[model], [], [], []
    for name in SERVED:
        scheme = roofline.PRECISIONS[name]
        seconds = roofline.decode_step(shape, batch, context, scheme, card).set_index("part")["seconds"]
        linear = float(seconds.drop(["attention", "head"]).sum())
        parts = {"linear layers": linear, "attention": float(seconds["attention"]), "head": float(seconds["head"])}
        steps_ += [{"precision": name, "part": part, "ms": 1e3 * value} for part, value in parts.items()]
        held = {
            "weights": roofline.weight_bytes(shape, scheme),
            "KV cache": batch * context * roofline.cache_bytes_per_token(shape, scheme),
        }
        memory += [{"precision": name, "part": part, "gib": value / 2**30} for part, value in held.items()]
        most, step = roofline.largest_batch(shape, context, scheme, card), sum(parts.values())
        rate = batch / step
        rows.append(
            {
                "precision": name,
                "fits": "yes" if batch <= most else "no",
                "most users": f"{most:,}",
                "one step, ms": f"{1e3 * step:.2f}",
                "tokens/s per user": f"{1 / step:.0f}",
                "tokens/s in all": f"{rate:,.0f}",
                "$ per million": f"{roofline.dollars_per_million(rate, dollars_per_hour):.3f}",
            }
        )
    title = f"{model} on one {gpu}: {batch} users, {context} tokens each (bounds)"
    figure = step_and_memory(pd.DataFrame(steps_), pd.DataFrame(memory), roofline.USABLE * card.memory / 2**30, title)
    return figure, pd.DataFrame(rows)
