"""Number formats of a quantised model: which grid weights, activations and the KV cache use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from . import affine, grids, grouped, progressive
from .affine import Affine, AffineScales
from .checks import require_count, require_enum, require_ratio, require_rows
from .grids import INT4, INT8, UINT4, Grid, Zero
from .grouped import Grouped, GroupedScales
from .kv import Keys, KVFormat
from .packing import pack_s4, pack_u4, unpack_s4, unpack_u4
from .progressive import FirstLevel, ProgressiveScales, ProgressiveWeight
from .reference import QuantizedWeight

#: Bits of an fp16 scale.
SCALE_BITS = 16

Scales = ProgressiveScales | AffineScales | GroupedScales


class WeightKind(Enum):
    """Granularity and bits of weights.

    PROGRESSIVE_U4  4-bit codes whose groups have integer scales (QoQ)
    GROUP_U4        4-bit codes whose groups have fp16 scales and a zero (GPTQ, AWQ)
    GROUP_S4        the same, symmetric, optionally with outlier columns at INT8 (Atom)
    CHANNEL_U4, CHANNEL_S4, CHANNEL_S8  one scale per output channel: 4 bits with a zero, 4 bits symmetric (QuaRot), 8 bits
    """

    PROGRESSIVE_U4 = "progressive-u4"
    GROUP_U4 = "group-u4"
    GROUP_S4 = "group-s4"
    CHANNEL_U4 = "channel-u4"
    CHANNEL_S4 = "channel-s4"
    CHANNEL_S8 = "channel-s8"

    @property
    def grouped(self) -> bool:
        """Whether rows are split into groups."""
        return self in (WeightKind.PROGRESSIVE_U4, WeightKind.GROUP_U4, WeightKind.GROUP_S4)

    @property
    def asymmetric(self) -> bool:
        """Whether there is a zero beside each scale."""
        return self in (WeightKind.PROGRESSIVE_U4, WeightKind.GROUP_U4, WeightKind.CHANNEL_U4)


@dataclass(frozen=True)
class WeightFormat:
    """How weights are quantised.

    ``group_size`` matters for grouped kinds, ``zero`` for asymmetric ones and ``first_level`` for PROGRESSIVE_U4. GROUP_S4
    keeps the last ``outliers`` columns at INT8, but never more than `grouped.OUTLIER_SHARE` of them.
    """

    kind: WeightKind
    group_size: int = 128
    zero: Zero = Zero.INTEGER
    first_level: FirstLevel = FirstLevel.UNROUNDED
    outliers: int = 0

    def __post_init__(self) -> None:
        require_enum("kind", self.kind, WeightKind)
        require_enum("zero", self.zero, Zero)
        require_enum("first_level", self.first_level, FirstLevel)
        require_count("group_size", self.group_size, 1)
        require_count("outliers", self.outliers, 0)
        if self.outliers and self.kind is not WeightKind.GROUP_S4:
            raise ValueError(f"outliers: only GROUP_S4 keeps outlier columns, got {self.outliers} for {self.kind.name}")

    @classmethod
    def of(cls, weight: QuantizedWeight) -> WeightFormat:
        """The format that a quantised weight is in."""
        if isinstance(weight, ProgressiveWeight):
            return cls(WeightKind.PROGRESSIVE_U4, weight.group_size, weight.zero, weight.first_level)
        if isinstance(weight, Grouped):
            kind = WeightKind.GROUP_S4 if weight.zeros is None else WeightKind.GROUP_U4
            return cls(kind, weight.group_size, weight.zero, outliers=weight.outliers)
        if weight.zeros is None:
            return cls(WeightKind.CHANNEL_S8 if weight.grid == INT8 else WeightKind.CHANNEL_S4)
        return cls(WeightKind.CHANNEL_U4, zero=weight.zero)

    @property
    def multiple(self) -> int:
        """What K must be a multiple of: whole groups, or pairs of 4-bit codes. The group before outliers may be shorter."""
        if self.kind.grouped and not self.outliers:
            return self.group_size
        return 1 if self.kind is WeightKind.CHANNEL_S8 else 2

    def outlier_columns(self, columns: int) -> int:
        """How many of ``columns`` are kept at INT8."""
        return grouped.outlier_columns(columns, self.outliers)

    def slices(self, columns: int) -> list[slice]:
        """Columns of every separately scaled group in a row of ``columns`` inputs."""
        size = self.group_size if self.kind.grouped else columns
        return grouped.group_slices(columns, size, self.outlier_columns(columns))

    def groups(self, columns: int) -> int:
        """Number of separately scaled groups in a row of ``columns`` inputs, outliers included."""
        return len(self.slices(columns))

    def choose(self, weight: torch.Tensor, ratio: torch.Tensor | float = 1.0) -> Scales:
        """Scales of a finite ``weight [N, K]``; ``ratio`` is a scalar or ``[N, groups]`` and shrinks each range.

        A scalar leaves outlier columns whole.
        """
        match self.kind:
            case WeightKind.PROGRESSIVE_U4:
                return progressive.choose_scales(weight, self.group_size, self.zero, self.first_level, ratio)
            case WeightKind.GROUP_U4:
                return grouped.choose_asymmetric(weight, self.group_size, UINT4, self.zero, ratio)
            case WeightKind.GROUP_S4:
                outliers = self.outlier_columns(weight.shape[1])
                return grouped.choose_symmetric(weight, self.group_size, INT4, outliers, ratio, "weight")
        row_ratio = ratio.squeeze(-1) if isinstance(ratio, torch.Tensor) and ratio.ndim == 2 else ratio
        if self.kind is WeightKind.CHANNEL_U4:
            return affine.asymmetric_scales(weight, zero=self.zero, ratio=row_ratio, name="weight")
        grid = INT8 if self.kind is WeightKind.CHANNEL_S8 else INT4
        return affine.symmetric_scales(weight, grid, row_ratio, "weight")

    def layout(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor that stores a weight ``[N, K]`` in this format; codes are packed (see `pack`)."""
        outliers, zero_dtype = self.outlier_columns(k), torch.uint8 if self.zero is Zero.INTEGER else torch.float16
        if self.kind is WeightKind.CHANNEL_S8:
            return {"codes": ((n, k), torch.int8), "scales": ((n,), torch.float16)}
        stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"codes": ((n, (k - outliers) // 2), torch.uint8)}
        if outliers:
            stored["outlier_codes"] = ((n, outliers), torch.int8)
        if self.kind is WeightKind.PROGRESSIVE_U4:
            groups = (n, self.groups(k))
            stored["channel_scales"] = ((n,), torch.float16)
            stored["group_scales"] = (groups, torch.int8)
            stored["group_zeros"] = (groups, torch.uint8 if self.zero is Zero.INTEGER else torch.int8)
            return stored
        rows = (n, self.groups(k)) if self.kind.grouped else (n,)
        stored["scales"] = (rows, torch.float16)
        if self.kind.asymmetric:
            stored["zeros"] = (rows, zero_dtype)
        return stored

    def unpack(self, tensors: dict[str, torch.Tensor]) -> QuantizedWeight:
        """A weight from the tensors that `layout` describes; inverse of `pack`."""
        codes = tensors["codes"]
        if self.kind is not WeightKind.CHANNEL_S8:
            codes = unpack_u4(codes) if self.kind.asymmetric else unpack_s4(codes)
        if self.kind is WeightKind.PROGRESSIVE_U4:
            scales = (tensors["channel_scales"], tensors["group_scales"], tensors["group_zeros"])
            return ProgressiveWeight(*scales, self.group_size, self.zero, self.first_level, codes)
        grid = {WeightKind.CHANNEL_S8: INT8}.get(self.kind, UINT4 if self.kind.asymmetric else INT4)
        zero = self.zero if self.kind.asymmetric else Zero.INTEGER
        if not self.kind.grouped:
            return Affine(tensors["scales"], tensors.get("zeros"), grid, zero, codes)
        tail = tensors.get("outlier_codes", codes.new_empty(len(codes), 0))
        codes = torch.cat([codes, tail], 1)
        sizes = (codes.shape[1], self.group_size, tail.shape[1])
        return Grouped(tensors["scales"], tensors.get("zeros"), *sizes, grid, zero, codes)

    def bits_per_weight(self, columns: int) -> float:
        """Stored bits per weight, scales and zeros included, for rows of ``columns`` inputs."""
        return sum(8 * dtype.itemsize * math.prod(shape) for shape, dtype in self.layout(1, columns).values()) / columns


def assemble(scales: Scales, codes: torch.Tensor) -> QuantizedWeight:
    """A quantised weight from its scales and codes [N, K]."""
    if isinstance(scales, GroupedScales):
        return Grouped(**vars(scales), codes=codes)
    kind = ProgressiveWeight if isinstance(scales, ProgressiveScales) else Affine
    return kind(**vars(scales), codes=codes)


def pack(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """The tensors that store a weight, by name: 4-bit codes two per byte, outliers apart, scales and zeros as they are."""
    tensors = {name: value for name, value in vars(weight).items() if isinstance(value, torch.Tensor)}
    kind = WeightFormat.of(weight).kind
    if kind is WeightKind.CHANNEL_S8:
        return tensors
    outliers = weight.outliers if isinstance(weight, Grouped) else 0
    body, tail = weight.codes.tensor_split([weight.shape[1] - outliers], 1)
    tensors["codes"] = pack_u4(body) if kind.asymmetric else pack_s4(body)
    return {**tensors, "outlier_codes": tail.contiguous()} if outliers else tensors


@dataclass(frozen=True)
class ActivationFormat:
    """How activations are quantised, dynamically and symmetrically: one scale per token, or per token and group.

    ``group_size`` None is one scale per token. The last ``outliers`` channels (at most `grouped.OUTLIER_SHARE`) have a
    scale of their own and lie on INT8. ``ratio`` clips the others' ranges.
    """

    grid: Grid = INT8
    group_size: int | None = None
    outliers: int = 0
    ratio: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.grid, Grid):
            raise TypeError(f"grid: expected a Grid, got {self.grid!r}")
        if self.group_size is not None:
            require_count("group_size", self.group_size, 1)
        require_count("outliers", self.outliers, 0)
        require_ratio(self.ratio)

    @property
    def name(self) -> str:
        """Such as ``INT4 g128 + 128 INT8``."""
        text = self.grid.name + (f" g{self.group_size}" if self.group_size else "")
        return text + (f" + {self.outliers} INT8" if self.outliers else "")

    def quantize(self, x: torch.Tensor) -> Affine | Grouped:
        """Codes of ``x [..., K]``. Raises TypeError or ValueError for what is not finite floating-point rows."""
        require_rows("x", x)
        outliers = grouped.outlier_columns(x.shape[-1], self.outliers)
        if self.group_size is None and not outliers:
            return affine.quantize(x, affine.symmetric_scales(x, self.grid, self.ratio))
        return grouped.quantize(x, grouped.choose_symmetric(x, self.group_size, self.grid, outliers, self.ratio))


def quantize_activations(x: torch.Tensor, form: Grid | ActivationFormat) -> Affine | Grouped:
    """Codes of activations ``x [..., K]`` in a format; a `Grid` alone means one scale per token."""
    return (form if isinstance(form, ActivationFormat) else ActivationFormat(form)).quantize(x)


@dataclass(frozen=True)
class Scheme:
    """Formats of a whole model; None leaves that part unquantised.

    A `Grid` alone is the usual granularity: activations with a scale per token, keys and values per token and head.

    Raises TypeError for other kinds of formats, ValueError for activations without weights (the layers that quantise
    activations are the ones with quantised weights) or a signed grid for keys and values.
    """

    weights: WeightFormat | None = None
    activations: Grid | ActivationFormat | None = None
    kv: Grid | KVFormat | None = None

    def __post_init__(self) -> None:
        if self.weights is not None and not isinstance(self.weights, WeightFormat):
            raise TypeError(f"weights: expected a WeightFormat or None, got {self.weights!r}")
        if self.activations is not None and not isinstance(self.activations, Grid | ActivationFormat):
            raise TypeError(f"activations: expected a Grid, an ActivationFormat or None, got {self.activations!r}")
        KVFormat.of(self.kv)
        if self.activations is not None and self.weights is None:
            form = self.activations
            raise ValueError(
                f"activations: {form.name} needs quantised weights, got weights=None; WeightFormat(WeightKind.CHANNEL_S8) "
                "loses least"
            )

    def kv_bits_per_value(self, head_dim: int) -> float:
        """Stored bits per cached number, averaged over keys and values, scale and zero included.

        Keys scaled per channel count as in a long cache, where all windows are complete.
        """
        form = KVFormat.of(self.kv)
        return 16.0 if form is None else form.bits_per_value(head_dim)

    def __str__(self) -> str:
        form, acts, kv = self.weights, self.activations, KVFormat.of(self.kv)
        grid = acts.grid if isinstance(acts, ActivationFormat) else acts
        weight_bits = 16 if form is None else 8 if form.kind is WeightKind.CHANNEL_S8 else 4
        text = f"W{weight_bits}A{grid.bits if grid else 16}KV{kv.grid.bits if kv and kv.grid else 16}"
        text += f" g{form.group_size}" if form and form.kind.grouped else ""
        text += " + INT8 outliers" if form and form.outliers else ""
        return text + (" keys per channel" if kv and kv.keys is Keys.CHANNEL else "")


# --- scheme <-> JSON ------------------------------------------------------------------------------------------------------

_GRIDS: dict[str, Grid] = {grid.name: grid for grid in vars(grids).values() if isinstance(grid, Grid)}


def scheme_to_json(scheme: Scheme) -> dict[str, Any]:
    """A scheme as plain JSON values; `scheme_from_json` inverts it."""
    return {name: _to_json(value) for name, value in vars(scheme).items()}


def _to_json(value: Any) -> Any:
    if isinstance(value, Grid):
        return value.name
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, WeightFormat | ActivationFormat | KVFormat):
        return {name: _to_json(field) for name, field in vars(value).items()}
    return value


def scheme_from_json(data: dict[str, Any]) -> Scheme:
    """Inverse of `scheme_to_json`; raises KeyError, TypeError or ValueError for anything it does not know."""
    weights, activations, kv = data["weights"], data["activations"], data["kv"]
    if weights is not None:
        weights = WeightFormat(
            WeightKind(weights["kind"]),
            weights["group_size"],
            Zero(weights["zero"]),
            FirstLevel(weights["first_level"]),
            weights.get("outliers", 0),
        )
    if isinstance(activations, dict):
        activations = ActivationFormat(**{**activations, "grid": _GRIDS[activations["grid"]]})
    elif activations is not None:
        activations = _GRIDS[activations]
    if isinstance(kv, dict):
        grid = None if kv["grid"] is None else _GRIDS[kv["grid"]]
        kv = KVFormat(**{**kv, "grid": grid, "keys": Keys(kv["keys"])})
    elif kv is not None:
        kv = _GRIDS[kv]
    return Scheme(weights, activations, kv)
