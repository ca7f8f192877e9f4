"""Predicted times: what `roofline` counts, divided by what kernels achieve.

A bound lets memory and tensor cores work side by side without a gap. Real kernels wait: here every kind of work takes its
seconds by the card's data sheet over an achieved share, all of them *add*, and a fixed time per kernel comes on top. That
makes a prediction linear in a handful of numbers, which `fit` finds by least squares. It is a choice: added times fit our
GEMMs a little better than the longer of both (12 % against 13 %, root mean square), and cuBLAS worse (15 % against 6 %),
which does overlap them. The shares are of the data sheet, not of a measured ceiling, because only the data sheet is known
for every card.

`OURS` and `TORCH_FP16` come from measurements on one H200, `PUBLISHED` from the paper's own table;
``data/benchmarks/calibrate.py`` makes them and keeps the error of every point.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, fields, replace

import numpy as np

from . import roofline
from .checks import require_count
from .machines import Geometry, Gpu
from .roofline import FP16, PRECISIONS, Cores, Serving
from .schemes import Scheme, WeightKind

#: CUDA-core instructions to unpack a weight, as counted (``data/paper/dequantisation.csv``). Others need none.
INSTRUCTIONS = {WeightKind.CHANNEL_U4: 0.375, WeightKind.PROGRESSIVE_U4: 1.625, WeightKind.GROUP_U4: 1.125}
#: The same for a cached 4-bit value, once for every query head that reads it, where CUDA cores do attention.
CACHED_INSTRUCTIONS = 1.125
#: To convert, scale and add one group's partial sum (lesson 08).
SUM_INSTRUCTIONS = 3.0
GROUP = 128


@dataclass(frozen=True)
class Work:
    """What there is to do, by kind, on one card: seconds at its data sheet, and counts of GEMMs, attentions and layers.

    ``weights``: operands and results of GEMMs moved; ``multiply``: tensor cores; ``cache``: attention's bytes;
    ``elementwise``: bytes between kernels; ``unpack``: instructions of CUDA cores. ``sustained``: those seconds of
    ``multiply`` that belong to prompts, thousands of tokens at a time.
    """

    weights: float = 0.0
    multiply: float = 0.0
    cache: float = 0.0
    elementwise: float = 0.0
    unpack: float = 0.0
    gemms: float = 0.0
    attentions: float = 0.0
    layers: float = 0.0
    sustained: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * a for a in astuple(self)))


@dataclass(frozen=True)
class Efficiency:
    """What kernels achieve: shares of the data sheet's bandwidth (``weights``, ``cache``, ``elementwise``) and tensor rate
    (``multiply``); ``tax``, instruction times of CUDA cores per counted instruction that nothing hides (0: all hidden; more
    than 1: loads, addresses and sums, which are not counted, take their share); fixed seconds per GEMM, per layer's
    attention and per layer for everything else; and ``slowing``, seconds that a second of ``sustained`` multiplication takes
    longer than the short runs that ``multiply`` comes from: a card that multiplies without a pause lowers its clock.
    """

    weights: float = 1.0
    multiply: float = 1.0
    cache: float = 1.0
    elementwise: float = 1.0
    tax: float = 0.0
    gemm_seconds: float = 0.0
    attention_seconds: float = 0.0
    layer_seconds: float = 0.0
    slowing: float = 0.0

    def __post_init__(self) -> None:
        for index, (f, value) in enumerate(zip(fields(self), astuple(self), strict=True)):
            if index < 4 and not 0 < value <= 1:
                raise ValueError(f"{f.name}: a share of the data sheet, 0 < {f.name} <= 1, got {value!r}")
            if value < 0:
                raise ValueError(f"{f.name}: expected a number of at least 0, got {value!r}")

    @property
    def factors(self) -> tuple[float, ...]:
        """Seconds per unit of every kind of `Work`."""
        values = astuple(self)
        return tuple(1 / share for share in values[:4]) + values[4:]

    def seconds(self, work: Work) -> float:
        """How long ``work`` takes.

        >>> Efficiency(weights=0.5, layer_seconds=1e-6).seconds(Work(weights=1e-3, layers=100))
        0.0021
        """
        return sum(f * w for f, w in zip(self.factors, astuple(work), strict=True))


@dataclass(frozen=True)
class System:
    """Software that serves: its efficiencies, the units that do its attention, and whether it scales every group's partial
    sum inside the main loop (Atom)."""

    name: str
    efficiency: Efficiency
    cores: Cores = field(default=Cores.TENSOR, kw_only=True)
    partial_sums: bool = field(default=False, kw_only=True)


#: Fitted on measurements of our kernels and our server on one H200; ``data/benchmarks/calibration.json`` has the error of
#: each. Unpacking shows in none of them.
OURS = System("qoqlab", Efficiency(0.993, 0.935, 0.656, 0.522, 0.0, 3.86e-6, 7.73e-6, 9.11e-6, 0.412))
#: Fitted on measurements on the same card: cuBLAS, torch's fastest attention, what is between fused by torch.compile.
TORCH_FP16 = System("torch fp16", Efficiency(1.0, 0.986, 0.954, 0.554, 0.0, 3.81e-6, 7.02e-6, 22.5e-6, 0.589))
#: torch's systems by format. Of 8 bits only what 6 measurements each can tell differs from fp16.
TORCH = {
    "fp16": TORCH_FP16,
    "W8A8": System("torch W8A8", Efficiency(1.0, 0.986, 0.954, 0.554, 0.0, 12.8e-6, 7.02e-6, 22.5e-6, 0.856)),
    "W8A8KV8": System("torch W8A8KV8", Efficiency(1.0, 0.986, 0.509, 0.554, 0.0, 10.5e-6, 7.02e-6, 22.5e-6, 0.81)),
}
#: One set a system, fitted on its rows of ``data/paper/throughput.csv``. QServe does attention on CUDA cores; Atom scales
#: partial sums there. Two rows are too few to tell more than one number of Atom's.
PUBLISHED = {
    system.name: system
    for system in (
        System("TensorRT-LLM", Efficiency(0.638, 0.546, 0.956, 0.114)),
        System("QServe", Efficiency(multiply=0.754, tax=3.23), cores=Cores.CUDA),
        System("QuaRot", Efficiency(multiply=0.109, layer_seconds=3.24e-3)),
        System("Atom", Efficiency(tax=12.5), partial_sums=True),
    )
}


def elementwise_bytes(model: Geometry, scheme: Scheme) -> float:
    """Bytes that one token moves in one layer outside of GEMMs and attention, every kernel fused as far as it can be.

    Two norms read the stream and what to add to it, and write both the sum and the next input; RoPE reads and writes queries
    and keys; the gated activation reads two tensors and writes one.
    """
    wide = 1 if roofline.unit(scheme) != "fp16" else FP16
    query = model.heads * model.head_dim
    rope = 2 * FP16 * (query + 2 * model.kv_heads * model.head_dim)
    output = query * (FP16 + wide) if wide == 1 else 0  # attention's output is quantised
    return 2 * (3 * FP16 + wide) * model.hidden + rope + output + (2 * FP16 + wide) * model.intermediate


def gemm_work(n: int, k: int, m: int, scheme: Scheme, gpu: Gpu, partial_sums: bool = False) -> Work:
    """Of one matrix product, ``n`` outputs, ``k`` inputs, ``m`` tokens."""
    bound = roofline.gemm(n, k, m, scheme, gpu.sheet)
    instructions = 0.0 if scheme.weights is None else INSTRUCTIONS.get(scheme.weights.kind, 0.0)
    unpack = roofline.dequantisation(n, k, m, instructions, gpu)
    if partial_sums:
        unpack += roofline.partial_sums(n, k, m, SUM_INSTRUCTIONS, gpu, GROUP)
    return Work(weights=bound.memory, multiply=bound.compute, unpack=unpack, gemms=1)


def attention_work(model: Geometry, batch: int, context: int, scheme: Scheme, gpu: Gpu, cores: Cores = Cores.TENSOR) -> Work:
    """Of one layer's attention while decoding: ``batch`` new tokens, each against ``context`` cached ones."""
    bound = roofline.attention(model, batch, context, scheme, gpu.sheet)
    if cores is Cores.TENSOR:
        return Work(multiply=bound.compute, cache=bound.memory, attentions=1)
    values = 2 * batch * context * model.heads * model.head_dim
    return Work(cache=bound.memory, unpack=values * CACHED_INSTRUCTIONS / gpu.lanes, attentions=1)


def _linears(model: Geometry, m: int, heads: int, scheme: Scheme, gpu: Gpu, partial_sums: bool) -> Work:
    """All layers without attention for ``m`` tokens, and the head for ``heads`` of them."""
    layer = Work(elementwise=m * elementwise_bytes(model, scheme) / gpu.sheet.bandwidth, layers=1)
    for n, k in model.shapes.values():
        layer += gemm_work(n, k, m, scheme, gpu, partial_sums)
    return layer * model.layers + gemm_work(model.vocabulary, model.hidden, heads, PRECISIONS["fp16"], gpu)


def step_work(model: Geometry, batch: int, context: int, scheme: Scheme, gpu: Gpu, system: System = OURS) -> Work:
    """Of a decode step: one new token for each of ``batch`` sequences with ``context`` cached tokens each."""
    attention = attention_work(model, batch, context, scheme, gpu, system.cores)
    return _linears(model, batch, batch, scheme, gpu, system.partial_sums) + attention * model.layers


def prefill_work(model: Geometry, count: int, prompt: int, scheme: Scheme, gpu: Gpu, system: System = OURS) -> Work:
    """Of ``count`` prompts of ``prompt`` tokens in one go; causal attention in fp16 on tensor cores, nothing read twice."""
    require_count("count", count, 1)
    require_count("prompt", prompt, 1)
    causal = 2 * count * prompt**2 * model.heads * model.head_dim / gpu.sheet.rate("fp16")
    attention = Work(multiply=causal, attentions=1) * model.layers
    work = _linears(model, count * prompt, count, scheme, gpu, system.partial_sums) + attention
    return replace(work, sustained=work.multiply)


def job_work(model: Geometry, job: Serving, scheme: Scheme, gpu: Gpu, system: System = OURS) -> Work:
    """Of a whole job: prefill once, then a step per output token; the middle of the output stands for all steps."""
    step = step_work(model, job.batch, job.prompt + job.output // 2, scheme, gpu, system)
    return prefill_work(model, job.batch, job.prompt, scheme, gpu, system) + step * job.output


def throughput(model: Geometry, job: Serving, scheme: Scheme, gpu: Gpu, system: System = OURS) -> float:
    """Generated tokens per second, predicted. `roofline.throughput` is the bound for the same job.

    >>> from qoqlab.machines import GPUS, MODELS
    >>> args = MODELS["Llama-3-8B"], Serving(128), PRECISIONS["W4A8KV4"], GPUS["H200"]
    >>> throughput(*args) < roofline.throughput(*args)
    True
    """
    return job.batch * job.output / system.efficiency.seconds(job_work(model, job, scheme, gpu, system))


def fit(
    works: Sequence[Work],
    seconds: Sequence[float],
    fixed: frozenset[str] = frozenset(),
    known: Efficiency = Efficiency(),
) -> Efficiency:
    """The efficiencies that predict ``seconds`` with the least sum of squared *relative* errors.

    Shares are at most 1 and times at least 0; those named in ``fixed`` are ``known`` ones, by default share 1 and no time.
    What no work asks for is share 1, no time. ValueError if lengths differ, a time is not positive, or a name in ``fixed``
    is unknown.
    """
    names = [f.name for f in fields(Efficiency)]
    if len(works) != len(seconds) or not works:
        raise ValueError(f"seconds: expected one for each of {len(works)} works (at least one), got {len(seconds)}")
    if unknown := fixed - set(names):
        raise ValueError(f"fixed: expected names among {', '.join(names)}, got {', '.join(sorted(unknown))}")
    times = np.asarray(seconds, dtype=float)
    if not (times > 0).all():
        raise ValueError(f"seconds: expected positive numbers, got {times.min()!r}")
    matrix = np.array([astuple(work) for work in works]) / times[:, None]
    low = np.array([(known if name in fixed else Efficiency()).factors[i] for i, name in enumerate(names)])
    free = [i for i, name in enumerate(names) if name not in fixed and matrix[:, i].any()]
    factors = low.copy()
    factors[free] += _nonnegative(matrix[:, free], 1 - matrix @ low)
    return Efficiency(*(1 / factors[:4]), *factors[4:])


def least_squares(features: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Numbers of at least 0 that make ``features @ numbers`` come nearest to ``seconds`` in relative error.

    ``features`` ``[points, numbers]``, at most eight numbers; ``seconds`` ``[points]``, positive.
    """
    return _nonnegative(features / seconds[:, None], np.ones(len(seconds)))


def _nonnegative(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least squares with no negative number in the result. With at most eight columns, every choice of those that are not
    zero can be tried: the best one whose plain solution has no negative number is the answer."""
    columns = matrix.shape[1]
    scale = np.maximum(np.linalg.norm(matrix, axis=0), np.finfo(float).tiny)
    gram, right = (matrix / scale).T @ (matrix / scale), (matrix / scale).T @ target
    best, least = np.zeros(columns), 0.0
    for chosen in itertools.chain.from_iterable(itertools.combinations(range(columns), n) for n in range(1, columns + 1)):
        index = list(chosen)
        part = np.linalg.lstsq(gram[np.ix_(index, index)], right[index], rcond=None)[0]
        cost = float(part @ gram[np.ix_(index, index)] @ part - 2 * part @ right[index])
        if (part >= 0).all() and cost < least:
            best, least = np.zeros(columns), cost
            best[index] = part
    return best / scale
