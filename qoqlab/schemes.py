"""Number formats of a quantised model: which grid weights, activations and the KV cache use."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from . import affine, progressive
from .affine import Affine, AffineScales
from .checks import require_enum
from .grids import INT8, Grid, Zero
from .progressive import FirstLevel, ProgressiveScales, ProgressiveWeight

#: Bits of an fp16 scale.
SCALE_BITS = 16


class WeightKind(Enum):
    """Granularity and bits of weights."""

    PROGRESSIVE_U4 = "progressive-u4"
    CHANNEL_U4 = "channel-u4"
    CHANNEL_S8 = "channel-s8"


@dataclass(frozen=True)
class WeightFormat:
    """How weights are quantised; `group_size` and `first_level` matter for PROGRESSIVE_U4 only."""

    kind: WeightKind
    group_size: int = 128
    zero: Zero = Zero.INTEGER
    first_level: FirstLevel = FirstLevel.UNROUNDED

    def __post_init__(self) -> None:
        require_enum("kind", self.kind, WeightKind)
        require_enum("zero", self.zero, Zero)
        require_enum("first_level", self.first_level, FirstLevel)
        if self.group_size < 1:
            raise ValueError(f"group_size: expected a positive integer, got {self.group_size!r}")

    def groups(self, columns: int) -> int:
        """Number of separately scaled groups in a row of ``columns`` inputs."""
        return columns // self.group_size if self.kind is WeightKind.PROGRESSIVE_U4 else 1

    def choose(self, weight: torch.Tensor, ratio: torch.Tensor | float = 1.0) -> ProgressiveScales | AffineScales:
        """Scales of a finite ``weight [N, K]``; ``ratio`` is a scalar or ``[N, groups]`` and shrinks each range."""
        if self.kind is WeightKind.PROGRESSIVE_U4:
            return progressive.choose_scales(weight, self.group_size, self.zero, self.first_level, ratio)
        row_ratio = ratio.squeeze(-1) if isinstance(ratio, torch.Tensor) and ratio.ndim == 2 else ratio
        if self.kind is WeightKind.CHANNEL_U4:
            return affine.asymmetric_scales(weight, zero=self.zero, ratio=row_ratio, name="weight")
        return affine.symmetric_scales(weight, INT8, row_ratio, "weight")

    def bits_per_weight(self, columns: int) -> float:
        """Stored bits per weight, scales and zeros included, for rows of ``columns`` inputs."""
        if self.kind is WeightKind.PROGRESSIVE_U4:
            return 4 + (8 + 8) / self.group_size + SCALE_BITS / columns
        if self.kind is WeightKind.CHANNEL_S8:
            return 8 + SCALE_BITS / columns
        return 4 + (SCALE_BITS + (8 if self.zero is Zero.INTEGER else SCALE_BITS)) / columns


def assemble(scales: ProgressiveScales | AffineScales, codes: torch.Tensor) -> ProgressiveWeight | Affine:
    """A quantised weight from its scales and codes [N, K]."""
    kind = ProgressiveWeight if isinstance(scales, ProgressiveScales) else Affine
    return kind(**vars(scales), codes=codes)


@dataclass(frozen=True)
class Scheme:
    """Formats of a whole model; None leaves that part unquantised."""

    weights: WeightFormat | None = None
    activations: Grid | None = None
    kv: Grid | None = None

    def kv_bits_per_value(self, head_dim: int) -> float:
        """Stored bits per cached number, scale and zero included."""
        return 16.0 if self.kv is None else self.kv.bits + 2 * SCALE_BITS / head_dim

    def __str__(self) -> str:
        bits = {None: 16, WeightKind.CHANNEL_S8: 8}
        kind = self.weights.kind if self.weights else None
        text = f"W{bits.get(kind, 4)}A{self.activations.bits if self.activations else 16}"
        text += f"KV{self.kv.bits if self.kv else 16}"
        return f"{text} g{self.weights.group_size}" if self.weights and kind is WeightKind.PROGRESSIVE_U4 else text
