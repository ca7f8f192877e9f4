"""Bounds: how many bytes and operations a step of generation needs, and how long a card takes for them at least.

A GPU moves bytes and multiplies at the same time, so a time is the larger of both (paper section 3). These are bounds:
launches, waiting and everything element-wise come on top, and no kernel reaches them. Units are bytes, operations and
seconds. Weights and cache count their scales and zeros; activations are counted at the width that is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import pandas as pd

from .checks import require_count, require_enum
from .grids import INT4, INT8, UINT4, UINT8
from .machines import Ceiling, Geometry, Gpu
from .recipes import GROUPS, PER_CHANNEL, PER_CHANNEL_INT4, PER_CHANNEL_INT8, PROGRESSIVE
from .schemes import ActivationFormat, Scheme

#: Formats by the names that throughput tables use. Those without a KV part keep it at 16 bits.
PRECISIONS: dict[str, Scheme] = {
    "fp16": Scheme(),
    "W4A16": Scheme(GROUPS),
    "W8A8": Scheme(PER_CHANNEL_INT8, INT8),
    "W8A8KV8": Scheme(PER_CHANNEL_INT8, INT8, UINT8),
    "W4A8": Scheme(PROGRESSIVE, INT8),
    "W4A8KV4": Scheme(PROGRESSIVE, INT8, UINT4),
    "W4A8KV4 per channel": Scheme(PER_CHANNEL, INT8, UINT4),
    "W4A4KV4": Scheme(PER_CHANNEL_INT4, INT4, UINT4),
}
#: Formats that are served, by their names on command lines and in records.
SERVED = {
    "w4a8kv4-g128": "W4A8KV4",
    "w4a8kv4": "W4A8KV4 per channel",
    "fp16": "fp16",
    "w8a8": "W8A8",
    "w8a8kv8": "W8A8KV8",
    "w4a16": "W4A16",
}
#: Bytes of an fp16 number.
FP16 = 2
#: Share of a card's memory that is left for weights and cache; the rest is for activations, the CUDA context and tables.
USABLE = 0.95


class Cores(Enum):
    """Which units do the arithmetic of attention: TENSOR cores, or CUDA cores in fp32."""

    TENSOR = "tensor cores"
    CUDA = "CUDA cores"


@dataclass(frozen=True)
class Bound:
    """Seconds that moving bytes and that arithmetic take at least; they overlap, so the longer one counts."""

    memory: float
    compute: float

    @property
    def seconds(self) -> float:
        """The larger of both."""
        return max(self.memory, self.compute)

    @property
    def limit(self) -> str:
        """What the step waits for: "memory" or "compute"."""
        return "memory" if self.memory >= self.compute else "compute"


def require_scheme(scheme: object) -> None:
    """Raise TypeError for anything but a `Scheme`; its name would not do."""
    if not isinstance(scheme, Scheme):
        raise TypeError(f'scheme: expected a Scheme, such as roofline.PRECISIONS["W4A8KV4"], got {scheme!r}')


def unit(scheme: Scheme) -> str:
    """What tensor cores multiply: both operands as wide as the wider of them, so activations decide."""
    require_scheme(scheme)
    form = scheme.activations
    grid = form.grid if isinstance(form, ActivationFormat) else form
    return "fp16" if grid is None else f"int{grid.bits}"


def weight_bits(scheme: Scheme, columns: int) -> float:
    """Stored bits per weight of a row with ``columns`` inputs, scales and zeros included."""
    require_scheme(scheme)
    return 8.0 * FP16 if scheme.weights is None else scheme.weights.bits_per_weight(columns)


def weight_bytes(model: Geometry, scheme: Scheme) -> float:
    """Bytes of all weights: linear layers in the scheme's format, embedding and head in fp16."""
    linear = sum(n * k * weight_bits(scheme, k) / 8 for n, k in model.shapes.values())
    return model.layers * linear + FP16 * model.table_weights


def cache_bytes_per_token(model: Geometry, scheme: Scheme) -> float:
    """Bytes that one token leaves behind in the KV cache, over all layers, scales and zeros included."""
    require_scheme(scheme)
    return model.layers * 2 * model.kv_heads * model.head_dim * scheme.kv_bits_per_value(model.head_dim) / 8


def activation_bytes(scheme: Scheme, m: int, k: int) -> float:
    """Bytes of the input of one GEMM: ``m`` tokens of ``k`` channels in the scheme's format, with a scale per token."""
    width = {"fp16": FP16, "int8": 1, "int4": 0.5}[unit(scheme)]
    return m * k * width + (0 if scheme.activations is None else FP16 * m)


def gemm(n: int, k: int, m: int, scheme: Scheme, ceiling: Ceiling) -> Bound:
    """Bound of a matrix product: ``n`` outputs, ``k`` inputs, ``m`` tokens; each operand is moved once, the output in fp16.

    >>> from qoqlab.machines import GPUS
    >>> bound = gemm(28672, 4096, 16, PRECISIONS["W4A8"], GPUS["H200"].sheet)
    >>> f"{1e6 * bound.seconds:.1f} us, {bound.limit}"
    '12.8 us, memory'
    """
    for name, value in (("n", n), ("k", k), ("m", m)):
        require_count(name, value, 1)
    moved = n * k * weight_bits(scheme, k) / 8 + activation_bytes(scheme, m, k) + FP16 * m * n
    return Bound(moved / ceiling.bandwidth, 2 * m * n * k / ceiling.rate(unit(scheme)))


def crossing(scheme: Scheme, ceiling: Ceiling) -> float:
    """Tokens at which a GEMM turns from waiting for memory to waiting for arithmetic, weights alone (large N and K).

    The codes' bits count, without scales: it is a property of format and card, not of a shape.

    >>> from qoqlab.machines import GPUS
    >>> [crossing(PRECISIONS[name], GPUS["A100"].sheet) for name in ("fp16", "W4A16", "W8A8", "W4A8")]
    [156.0, 39.0, 156.0, 78.0]
    """
    bits = round(weight_bits(scheme, 1 << 20))
    return bits / 8 * ceiling.rate(unit(scheme)) / (2 * ceiling.bandwidth)


def attention(
    model: Geometry, batch: int, context: int, scheme: Scheme, ceiling: Ceiling, fp32: float | None = None
) -> Bound:
    """Bound of one layer's attention while decoding: ``batch`` new tokens, each against ``context`` cached ones.

    Every cached number is read once for all query heads that share it, and used for two operations by each of them. Tensor
    cores multiply in fp16; ``fp32``, if given, is the rate of the CUDA cores that do it instead (operations per second).
    """
    require_count("batch", batch, 1)
    require_count("context", context, 1)
    moved = batch * context * cache_bytes_per_token(model, scheme) / model.layers
    moved += 2 * FP16 * batch * model.heads * model.head_dim  # query and output
    work = 4 * batch * context * model.heads * model.head_dim
    return Bound(moved / ceiling.bandwidth, work / (fp32 or ceiling.rate("fp16")))


def decode_step(
    model: Geometry, batch: int, context: int, scheme: Scheme, gpu: Gpu, cores: Cores = Cores.TENSOR
) -> pd.DataFrame:
    """One generated token for each of ``batch`` sequences: a row per part with columns ``part``, ``seconds``, ``limit``.

    Parts are the linear layers by name (all layers together), "attention" and "head". Bounds at the card's `Gpu.best`.
    """
    require_enum("cores", cores, Cores)
    ceiling = gpu.best
    parts = {name: gemm(n, k, batch, scheme, ceiling) for name, (n, k) in model.shapes.items()}
    parts["attention"] = attention(model, batch, context, scheme, ceiling, gpu.fp32 if cores is Cores.CUDA else None)
    rows = [{"part": name, "seconds": model.layers * bound.seconds, "limit": bound.limit} for name, bound in parts.items()]
    head = gemm(model.vocabulary, model.hidden, batch, PRECISIONS["fp16"], ceiling)
    return pd.DataFrame([*rows, {"part": "head", "seconds": head.seconds, "limit": head.limit}])


def prefill(model: Geometry, tokens: int, scheme: Scheme, gpu: Gpu) -> float:
    """Seconds that the linear layers need at least for ``tokens`` of prompts in one go (their attention is left out)."""
    return model.layers * sum(gemm(n, k, tokens, scheme, gpu.best).seconds for n, k in model.shapes.values())


def largest_batch(model: Geometry, context: int, scheme: Scheme, gpu: Gpu, usable: float = USABLE) -> int:
    """How many sequences of ``context`` tokens fit beside the weights into a share ``usable`` of the memory; 0 if none."""
    require_count("context", context, 1)
    if not 0 < usable <= 1:
        raise ValueError(f"usable: a share of the memory, 0 < usable <= 1, got {usable!r}")
    left = usable * gpu.memory - weight_bytes(model, scheme)
    return max(0, int(left // (context * cache_bytes_per_token(model, scheme))))


@dataclass(frozen=True)
class Serving:
    """A job of ``batch`` requests at once, ``prompt`` tokens in and ``output`` out each; the paper has 1024 and 512."""

    batch: int
    prompt: int = 1024
    output: int = 512

    def __post_init__(self) -> None:
        for name in ("batch", "prompt", "output"):
            require_count(name, getattr(self, name), 1)


def throughput(model: Geometry, job: Serving, scheme: Scheme, gpu: Gpu, cores: Cores = Cores.TENSOR) -> float:
    """Generated tokens per second at most: prefill once, then a step per output token with the context growing.

    Attention's bound is linear in the context, so the middle of the output stands for all steps. `prediction.throughput`
    says what kernels with given efficiencies reach of it.
    """
    middle = job.prompt + job.output // 2
    step = float(decode_step(model, job.batch, middle, scheme, gpu, cores)["seconds"].sum())
    return job.batch * job.output / (prefill(model, job.batch * job.prompt, scheme, gpu) + job.output * step)


def dequantisation(n: int, k: int, m: int, instructions: float, gpu: Gpu, tile: int = 128) -> float:
    """Seconds of CUDA-core work to unpack a weight ``[n, k]``: ``instructions`` per weight, again for every ``tile`` tokens.

    A kernel holds the results of ``tile`` tokens in registers; for more tokens it reads and unpacks the weight again. The
    work overlaps with memory and tensor cores at best, and adds to them at worst.
    """
    for name, value in (("n", n), ("k", k), ("m", m), ("tile", tile)):
        require_count(name, value, 1)
    return n * k * instructions * -(-m // tile) / gpu.lanes


def partial_sums(n: int, k: int, m: int, instructions: float, gpu: Gpu, group_size: int) -> float:
    """Seconds of CUDA-core work if every group's partial sum is scaled inside the main loop: ``instructions`` per output,
    token and group. With ``group_size = k`` that is an epilogue: once per output, after the loop."""
    for name, value in (("n", n), ("k", k), ("m", m), ("group_size", group_size)):
        require_count(name, value, 1)
    return n * m * -(-k // group_size) * instructions / gpu.lanes


def dollars_per_hour(price: float, watts: float, years: float = 3.0, dollars_per_kwh: float = 0.12) -> float:
    """What an hour of a card costs: its ``price`` in dollars spread over ``years`` of use, and its electricity."""
    for name, value in (("price", price), ("years", years)):
        if not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value!r}")
    return price / (years * 365 * 24) + watts / 1000 * dollars_per_kwh


def dollars_per_million(tokens_per_second: float, hourly: float) -> float:
    """Cost of a million generated tokens on a card that costs ``hourly`` dollars and is busy all the time."""
    if not tokens_per_second > 0:
        raise ValueError(f"tokens_per_second: expected a positive number, got {tokens_per_second!r}")
    return hourly / 3600 / tokens_per_second * 1e6
