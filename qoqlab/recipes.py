"""Recipes: a quantisation method as data, an ordered list of steps with their parameters and the formats they aim at."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from . import steps
from .grids import INT8, UINT4
from .schemes import Scheme, WeightFormat, WeightKind


@dataclass(frozen=True)
class Step:
    """A function of `qoqlab.steps` and its keyword arguments."""

    function: Callable[..., None]
    parameters: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            inspect.signature(self.function).bind(None, **self.parameters)
        except TypeError as error:
            names = [p for p in inspect.signature(self.function).parameters][1:]
            raise TypeError(f"step {self.name}: {error}; its parameters: {', '.join(names) or 'none'}") from None

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.__name__

    def __call__(self, context: steps.Context) -> None:
        self.function(context, **self.parameters)


@dataclass(frozen=True)
class Recipe:
    """A named method: formats, then steps in order. ``source`` says where it comes from and where it deviates."""

    name: str
    scheme: Scheme
    steps: tuple[Step, ...] = ()
    source: str = ""

    def __post_init__(self) -> None:
        for step in self.steps:
            if not isinstance(step, Step):
                raise TypeError(f"steps: expected Step(function, parameters), got {type(step).__name__}")

    def with_steps(self, name: str, *more: Step) -> Recipe:
        """This recipe under another name with further steps at the end."""
        return replace(self, name=name, steps=(*self.steps, *more))


PROGRESSIVE = WeightFormat(WeightKind.PROGRESSIVE_U4)
PER_CHANNEL = WeightFormat(WeightKind.CHANNEL_U4)
PER_CHANNEL_INT8 = WeightFormat(WeightKind.CHANNEL_S8)

_PAPER = "QServe, arXiv 2405.04532, section 4"
_ROTATE = Step(steps.rotate)
_SMOOTH_ATTENTION = Step(steps.smooth_attention, {"alpha": 0.5})
# The paper finds strengths near 0 best, the released recipes use 0 to 0.35, chosen by hand per model; 0.3 is their default
# for groups. `qoq-g128-search` chooses per layer.
_SMOOTH_OUTPUT = Step(steps.smooth_output, {"alpha": 0.3})
_REORDER = Step(steps.reorder)
_CLIP = Step(steps.clip)
_GPTQ = Step(steps.gptq)


def _presets() -> dict[str, Recipe]:
    """Every preset by name."""
    w4a8kv4_g128 = Scheme(PROGRESSIVE, INT8, UINT4)
    w4a8kv4 = Scheme(PER_CHANNEL, INT8, UINT4)
    qoq_g128 = Recipe(
        "qoq-g128",
        w4a8kv4_g128,
        (_ROTATE, _REORDER, _SMOOTH_ATTENTION, _SMOOTH_OUTPUT, _CLIP),
        f"{_PAPER}; progressive groups. Output smoothing at 0.3 (the paper: near 0; the "
        "released default for groups: 0.3). Clipping is searched per group (the released code: per channel only).",
    )
    qoq_channel = Recipe(
        "qoq-per-channel",
        w4a8kv4,
        (_ROTATE, _SMOOTH_ATTENTION, _SMOOTH_OUTPUT, _CLIP),
        f"{_PAPER}; per-channel weights, where reordering has no effect. Output smoothing at 0.3.",
    )
    searched = (
        _ROTATE,
        _REORDER,
        Step(steps.smooth_attention, {"alpha": None}),
        Step(steps.smooth_output, {"alpha": None}),
        _CLIP,
    )
    all_presets = (
        Recipe("fp16", Scheme(), source="the model as it is"),
        Recipe("rtn-w8a8", Scheme(PER_CHANNEL_INT8, INT8), source="round to nearest"),
        Recipe("rtn-w4a8kv4", w4a8kv4, source="round to nearest, per channel"),
        Recipe("rtn-w4a8kv4-g128", w4a8kv4_g128, source="round to nearest on progressive groups of 128"),
        qoq_channel,
        qoq_g128,
        qoq_channel.with_steps("qoq-per-channel-gptq", _GPTQ),
        qoq_g128.with_steps("qoq-g128-gptq", _GPTQ),
        Recipe("qoq-g128-search", w4a8kv4_g128, searched, "qoq-g128 with alpha and beta searched in every layer"),
    )
    return {recipe.name: recipe for recipe in all_presets}


def names() -> list[str]:
    """Names of all presets."""
    return list(_presets())


def get(name: str) -> Recipe:
    """The preset of a name. Raises ValueError listing the names there are.

    >>> str(get("qoq-g128").scheme), [step.name for step in get("qoq-g128").steps]
    ('W4A8KV4 g128', ['rotate', 'reorder', 'smooth_attention', 'smooth_output', 'clip'])
    """
    presets = _presets()
    if name not in presets:
        raise ValueError(f"recipe: {name!r} is not a preset; presets: {', '.join(presets)}")
    # a copy: nobody can change a preset through the object they got
    return copy.deepcopy(presets[name])


def ladder() -> list[Recipe]:
    """The order of the paper's ablation study: each recipe adds one thing to the one before it.

    From W8A8 down to 4-bit weights, then rotation, block-output smoothing and clipping; the KV cache to 4 bits, then
    SmoothAttention; then progressive groups and reordering, which completes `qoq-g128`.
    """
    w4a8, w4a8kv4, g128 = Scheme(PER_CHANNEL, INT8), Scheme(PER_CHANNEL, INT8, UINT4), Scheme(PROGRESSIVE, INT8, UINT4)
    return [
        Recipe("W8A8, round to nearest", Scheme(PER_CHANNEL_INT8, INT8)),
        Recipe("weights to 4 bits", w4a8),
        Recipe("+ rotation", w4a8, (_ROTATE,)),
        Recipe("+ output smoothing", w4a8, (_ROTATE, _SMOOTH_OUTPUT)),
        Recipe("+ clipping", w4a8, (_ROTATE, _SMOOTH_OUTPUT, _CLIP)),
        Recipe("KV cache to 4 bits", w4a8kv4, (_ROTATE, _SMOOTH_OUTPUT, _CLIP)),
        Recipe("+ SmoothAttention = qoq-per-channel", w4a8kv4, (_ROTATE, _SMOOTH_ATTENTION, _SMOOTH_OUTPUT, _CLIP)),
        Recipe("+ progressive groups", g128, (_ROTATE, _SMOOTH_ATTENTION, _SMOOTH_OUTPUT, _CLIP)),
        Recipe("+ reordering = qoq-g128", g128, get("qoq-g128").steps),
    ]
