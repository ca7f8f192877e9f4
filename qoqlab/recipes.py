"""Recipes: a quantisation method as data, an ordered list of steps with their parameters and the formats they aim at."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from . import baselines, steps
from .grids import INT4, INT8, UINT4
from .kv import Keys, KVFormat
from .schemes import ActivationFormat, Scheme, WeightFormat, WeightKind


@dataclass(frozen=True)
class Step:
    """A function of `qoqlab.steps` or `qoqlab.baselines` and its keyword arguments."""

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
        if not isinstance(self.name, str) or not isinstance(self.source, str):
            raise TypeError(f"name, source: expected strings, got {self.name!r} and {self.source!r}")
        if not isinstance(self.scheme, Scheme):
            raise TypeError(f"scheme: expected a Scheme, got {self.scheme!r}")
        for step in self.steps:
            if not isinstance(step, Step):
                raise TypeError(f"steps: expected Step(function, parameters), got {type(step).__name__}")

    def with_steps(self, name: str, *more: Step) -> Recipe:
        """This recipe under another name with further steps at the end."""
        return replace(self, name=name, steps=(*self.steps, *more))


PROGRESSIVE = WeightFormat(WeightKind.PROGRESSIVE_U4)
PER_CHANNEL = WeightFormat(WeightKind.CHANNEL_U4)
PER_CHANNEL_INT8 = WeightFormat(WeightKind.CHANNEL_S8)

PER_CHANNEL_INT4 = WeightFormat(WeightKind.CHANNEL_S4)
GROUPS = WeightFormat(WeightKind.GROUP_U4)
SYMMETRIC_GROUPS = WeightFormat(WeightKind.GROUP_S4)
#: Atom's weights: symmetric groups, 128 channels of each input (in small models 1 in 32) at INT8.
MIXED = WeightFormat(WeightKind.GROUP_S4, outliers=128)

_PAPER = "QServe, arXiv 2405.04532, section 4"
_ROTATE = Step(steps.rotate)
_SMOOTH_ATTENTION = Step(steps.smooth_attention, {"alpha": 0.5})
# The paper finds strengths near 0 best, the released recipes use 0 to 0.35, chosen by hand per model; 0.3 is their default
# for groups. `qoq-g128-search` chooses per layer.
_SMOOTH_OUTPUT = Step(steps.smooth_output, {"alpha": 0.3})
_REORDER = Step(steps.reorder)
_CLIP = Step(steps.clip)
_GPTQ = Step(steps.gptq)


def _round_to_nearest() -> list[Recipe]:
    """No method at all, at every precision."""
    rtn = "round to nearest"
    a4_g128 = ActivationFormat(INT4, group_size=128)
    return [
        Recipe("rtn-w8a8", Scheme(PER_CHANNEL_INT8, INT8), source=rtn),
        Recipe("rtn-w4a16-g128", Scheme(GROUPS), source=f"{rtn}, groups of 128 with fp16 scales"),
        Recipe("rtn-w4a8", Scheme(PER_CHANNEL, INT8), source=f"{rtn}, per channel"),
        Recipe("rtn-w4a8kv4", Scheme(PER_CHANNEL, INT8, UINT4), source=f"{rtn}, per channel"),
        Recipe("rtn-w4a8kv4-g128", Scheme(PROGRESSIVE, INT8, UINT4), source=f"{rtn} on progressive groups of 128"),
        Recipe("rtn-w4a4", Scheme(PER_CHANNEL, INT4), source=f"{rtn}; activations per token, symmetric"),
        Recipe("rtn-w4a4-g128", Scheme(GROUPS, a4_g128), source=f"{rtn}; weights and activations in groups of 128"),
        Recipe("rtn-kv4", Scheme(kv=UINT4), source=f"{rtn}; keys and values per token and head, nothing else quantised"),
        Recipe(
            "kivi-kv4",
            Scheme(kv=KVFormat(UINT4, Keys.CHANNEL, window=32)),
            source="KIVI, arXiv 2402.02750, at 4 bits (there: 2), against rtn-kv4: keys per channel in windows of 32 "
            "tokens, exact until a window is complete. Values as in rtn-kv4 (KIVI also keeps its newest values exact).",
        ),
    ]


def _baselines() -> list[Recipe]:
    """The methods of the paper's comparison, each from its own paper."""
    smoothquant = (Step(baselines.smooth_inputs, {"alpha": 0.5}),)
    awq = (Step(baselines.awq_scale), Step(steps.clip, {"count": 10, "lowest": 0.55, "block_count": 1}))
    quarot = (Step(steps.rotate, {"values": True}), Step(baselines.hadamard_inputs), _CLIP, _GPTQ)
    atom = (Step(baselines.reorder_outliers), Step(baselines.clip_to, {"ratio": 0.85}), _GPTQ)
    smoothquant_source = (
        "SmoothQuant, arXiv 2211.10438, section 4, strength 0.5. Scales per output channel and dynamically per token, as in "
        "the QServe paper's comparison (the original's fastest variant: per tensor)"
    )
    awq_source = (
        "AWQ, arXiv 2306.00978, section 3.2: searched scales, then clipping of all but q and k. Statistics from a sample of "
        "1024 tokens; grouped-query models scale o_proj too (the original leaves it out); the clipping search is QoQ's"
    )
    quarot_source = (
        "QuaRot, arXiv 2404.00456: all rotations, three of them online; symmetric weights per channel with GPTQ; KV ranges "
        "clipped to 0.95. Hadamard matrices without random signs; weight clipping is QoQ's search (the original: by the "
        "weight's own error); GPTQ's inputs are unquantised"
    )
    atom_source = (
        "Atom, arXiv 2310.19102: 128 outlier channels at INT8 (in small models 1 in 32), sorted to the end; symmetric "
        "groups of 128; weights clipped to 0.85, then GPTQ, whose inputs are unquantised"
    )
    kv_rotated = KVFormat(UINT4, rotate_keys=True, ratio=0.95)
    a4 = ActivationFormat(INT4, ratio=0.9)
    a4_mixed, a8_mixed = ActivationFormat(INT4, 128, 128, ratio=0.9), ActivationFormat(INT8, None, 128)
    return [
        Recipe("smoothquant-w8a8", Scheme(PER_CHANNEL_INT8, INT8), smoothquant, f"{smoothquant_source}."),
        Recipe(
            "smoothquant-w4a8kv4",
            Scheme(PER_CHANNEL, INT8, UINT4),
            smoothquant,
            f"{smoothquant_source}. Made for 8-bit weights; here at QoQ's bits.",
        ),
        Recipe(
            "gptq-w4a16-g128",
            Scheme(GROUPS),
            (_GPTQ,),
            "GPTQ, arXiv 2210.17323, with columns in order of their Hessian diagonal (GPTQ-R in the QServe paper). Group "
            "scales are fixed beforehand; the inputs of every layer are those of the unquantised network; a row that error "
            "feedback would make worse is rounded to nearest.",
        ),
        Recipe(
            "gptq-w4a8-g128",
            Scheme(SYMMETRIC_GROUPS, INT8),
            (_GPTQ,),
            "GPTQ, arXiv 2210.17323, as in gptq-w4a16-g128, on symmetric groups and with activations at 8 bits per token: "
            "what engines run as W4A8 of compressed-tensors (`formats.Layout.W4A8`).",
        ),
        Recipe("awq-w4a16-g128", Scheme(GROUPS), awq, f"{awq_source}."),
        Recipe(
            "awq-w4a8kv4-g128",
            Scheme(PROGRESSIVE, INT8, UINT4),
            awq,
            f"{awq_source}. Made for 16-bit activations; here at QoQ's bits, on progressive groups.",
        ),
        Recipe("quarot-w4a4kv4", Scheme(PER_CHANNEL_INT4, a4, kv_rotated), quarot, f"{quarot_source}."),
        Recipe(
            "quarot-w4a8kv4",
            Scheme(PER_CHANNEL_INT4, INT8, kv_rotated),
            quarot,
            f"{quarot_source}. Activations at 8 bits, as in the QServe paper's comparison; not clipped.",
        ),
        Recipe("atom-w4a4kv4-g128", Scheme(MIXED, a4_mixed, UINT4), atom, f"{atom_source}; activations likewise, at 0.9."),
        Recipe(
            "atom-w4a8kv4-g128",
            Scheme(MIXED, a8_mixed, UINT4),
            atom,
            f"{atom_source}. Activations at 8 bits as in the QServe paper's comparison, per token, outliers apart.",
        ),
    ]


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
        *_round_to_nearest(),
        *_baselines(),
        qoq_channel,
        qoq_g128,
        qoq_channel.with_steps("qoq-per-channel-gptq", _GPTQ),
        qoq_g128.with_steps("qoq-g128-gptq", _GPTQ),
        Recipe("qoq-g128-search", w4a8kv4_g128, searched, "qoq-g128 with alpha and beta searched in every layer"),
        Recipe(
            "qoq-plus",
            w4a8kv4_g128,
            (_ROTATE, Step(steps.search_value_rotation), *searched[1:]),
            "ours: qoq-g128-search with value heads rotated by a searched Hadamard matrix (SpinQuant, arXiv 2405.16406, "
            "learns such rotations). No GPTQ: on a small model it follows the calibration text and loses on other text.",
        ),
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


#: Methods of the paper's tables, from the least to the most aggressive precision, and ours.
PAPER = (
    "fp16",
    "rtn-w8a8",
    "smoothquant-w8a8",
    "rtn-w4a16-g128",
    "gptq-w4a16-g128",
    "awq-w4a16-g128",
    "rtn-w4a8",
    "rtn-w4a8kv4",
    "smoothquant-w4a8kv4",
    "quarot-w4a8kv4",
    "qoq-per-channel",
    "rtn-w4a8kv4-g128",
    "awq-w4a8kv4-g128",
    "atom-w4a8kv4-g128",
    "qoq-g128",
    "qoq-plus",
    "rtn-w4a4",
    "rtn-w4a4-g128",
    "quarot-w4a4kv4",
    "atom-w4a4kv4-g128",
    "rtn-kv4",
    "kivi-kv4",
)


#: Names that `suite` knows.
SUITES = ("paper", "ladder")


def suite(name: str) -> list[Recipe]:
    """A named list of recipes: "paper" (`PAPER`, every method of its tables) or "ladder" (`ladder`, its ablation).

    Raises ValueError for another name.
    """
    if name == "paper":
        return [get(method) for method in PAPER]
    if name == "ladder":
        return ladder()
    known = f"recipes: {name!r} is not a suite; suites: {', '.join(SUITES)}"
    raise ValueError(f"{known}; to take this one recipe, pass [{name!r}]" if name in names() else known)


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
