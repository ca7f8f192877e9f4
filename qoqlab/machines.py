"""GPUs and models as numbers: what a card can move and multiply, and what shapes a model's layers have.

Data sheets state what a card could do; a measured `Ceiling` says what it was seen to do, and how. `roofline` turns both into
times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from .checks import require_count

#: The linear layers of a decoder block as kernels run them: q, k and v in one GEMM, gate and up in one.
LINEARS = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True)
class Ceiling:
    """What a card delivers at best: ``bandwidth`` in bytes per second, ``peak`` in operations per second by type of number.

    An addition and a multiplication are two operations. ``peak`` has "fp16", "int8" and, where the card has it, "int4".
    ``source`` says who states that, or how it was measured.
    """

    bandwidth: float
    peak: dict[str, float]
    source: str

    def rate(self, unit: str) -> float:
        """Operations per second of tensor cores on ``unit``; ValueError if the card has no such unit."""
        if unit not in self.peak:
            raise ValueError(f"unit: these tensor cores multiply {', '.join(self.peak)}, not {unit!r}")
        return self.peak[unit]


@dataclass(frozen=True)
class Gpu:
    """One card: memory in bytes, its data sheet, what was measured if anything, and the rate of its CUDA cores.

    ``lanes`` are integer or logic instructions per second of one lane each, ``fp32`` floating-point operations per second.
    """

    name: str
    memory: float
    sheet: Ceiling
    sms: int
    clock: float
    fp32: float
    watts: float
    measured: Ceiling | None = None

    @property
    def lanes(self) -> float:
        """Integer or logic lane-instructions per second: 64 lanes in every multiprocessor."""
        return 64 * self.sms * self.clock

    @property
    def best(self) -> Ceiling:
        """What was measured, or the data sheet where nothing was."""
        return self.measured or self.sheet


def _sheet(bandwidth: float, fp16: float, int8: float, int4: float | None = None) -> Ceiling:
    peak = {"fp16": fp16, "int8": int8} | ({} if int4 is None else {"int4": int4})
    return Ceiling(bandwidth, peak, "NVIDIA's data sheet, dense rates")


#: Memory below is what the driver reports, which is a little less than the chips hold.
_MIB = 2.0**20

#: The cards of the paper and the two that followed. Hopper has no INT4 tensor cores.
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 81920 * _MIB, _sheet(2.0e12, 312e12, 624e12, 1248e12), 108, 1.41e9, 19.5e12, 400),
        Gpu("L40S", 46068 * _MIB, _sheet(0.864e12, 362e12, 733e12, 733e12), 142, 2.52e9, 91.6e12, 350),
        Gpu("H100", 81559 * _MIB, _sheet(3.35e12, 989e12, 1979e12), 132, 1.98e9, 66.9e12, 700),
        Gpu(
            "H200",
            143771 * _MIB,
            _sheet(4.8e12, 989e12, 1979e12),
            132,
            1.98e9,
            66.9e12,
            700,
            Ceiling(
                4.2e12,
                {"fp16": 740e12, "int8": 1720e12},
                "one H200, November 2026, CUDA 13.0: copy, read plus write; cuBLAS fp16 on 8192 x 8192 x 8192; "
                "wgmma m64n128k32 on random INT8 data with operands in place",
            ),
        ),
    )
}


@dataclass(frozen=True)
class Geometry:
    """Shapes of a Llama-like decoder. ``tied``: embedding and head are one matrix; ``qkv_bias``: q, k and v have biases;
    ``window``: tokens that attention sees, if not all."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    head_dim: int = 128
    tied: bool = False
    qkv_bias: bool = False
    window: int | None = None
    shapes: dict[str, tuple[int, int]] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "kv_heads", "intermediate", "vocabulary", "head_dim"):
            require_count(name, getattr(self, name), 1)
        if self.window is not None:
            require_count("window", self.window, 1)
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: {self.heads} query heads cannot share {self.kv_heads} KV heads evenly")
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = (
            (width + 2 * kv_width, self.hidden),
            (self.hidden, width),
            (2 * self.intermediate, self.hidden),
            (self.hidden, self.intermediate),
        )
        object.__setattr__(self, "shapes", dict(zip(LINEARS, shapes, strict=True)))

    @classmethod
    def of(cls, config: Any, name: str = "") -> Geometry:
        """From the config of a transformers model; without a ``name``, the folder's it came from, or else its type."""
        return cls(
            name or PurePath(getattr(config, "_name_or_path", "")).name or config.model_type,
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.intermediate_size,
            config.vocab_size,
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            bool(config.tie_word_embeddings),
            bool(getattr(config, "attention_bias", config.model_type == "qwen2")),
            config.sliding_window if getattr(config, "use_sliding_window", hasattr(config, "sliding_window")) else None,
        )

    @property
    def linear_weights(self) -> int:
        """Weights of all linear layers, embedding and head left out."""
        return self.layers * sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def table_weights(self) -> int:
        """Weights of embedding and head, which stay at 16 bits; tied ones are stored once."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden


#: The models of the paper's throughput tables, and Llama-3-70B. Shapes as in their published configurations.
MODELS: dict[str, Geometry] = {
    model.name: model
    for model in (
        Geometry("Llama-3-8B", 32, 4096, 32, 8, 14336, 128256),
        Geometry("Llama-2-7B", 32, 4096, 32, 32, 11008, 32000),
        Geometry("Mistral-7B", 32, 4096, 32, 8, 14336, 32000, window=4096),
        Geometry("Llama-2-13B", 40, 5120, 40, 40, 13824, 32000),
        Geometry("Llama-30B", 60, 6656, 52, 52, 17920, 32000),
        Geometry("Yi-34B", 60, 7168, 56, 8, 20480, 64000),
        Geometry("Llama-2-70B", 80, 8192, 64, 8, 28672, 32000),
        Geometry("Qwen1.5-72B", 80, 8192, 64, 64, 24576, 152064, qkv_bias=True),
        Geometry("Llama-3-70B", 80, 8192, 64, 8, 28672, 128256),
    )
}
