"""The operations that an engine's step is made of, on the reference or on the kernels, with the same meaning.

`ReferenceOps` computes with `reference` on any device. `KernelOps` is given the kernels' package and computes the same on a
GPU: activations stay in the GEMM's order from one kernel to the next.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from . import exact, reference
from .affine import Affine
from .grids import UINT4
from .progressive import ProgressiveWeight

Weight = ProgressiveWeight | Affine


@dataclass(frozen=True)
class Projection:
    """A linear layer: a quantised weight (the reference's or packed) and its bias, fp32, or None."""

    weight: Any
    bias: torch.Tensor | None


class Ops(Protocol):
    """What both sides offer. ``a``: quantised activations, of a kind that only they know."""

    dtype: torch.dtype

    def projection(self, weight: Weight, bias: torch.Tensor | None) -> Projection:
        """A linear layer ready to run."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
        """RMSNorm, INT8 per token."""

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[Any, torch.Tensor]:
        """(RMSNorm of the sum, INT8 per token; the sum)."""

    def last_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """RMSNorm of the sum ``[M, K]``, not quantised."""

    def silu_mul(self, gate_up: torch.Tensor) -> Any:
        """``silu(gate) * up``, INT8 per token."""

    def linear(self, a: Any, projection: Projection) -> torch.Tensor:
        """``[M, N]`` in the engine's dtype."""

    def row_linear(self, a: Any, projection: Projection) -> torch.Tensor:
        """`linear` of a layer whose inputs the ranks of a parallel engine share; everywhere else `linear` itself."""


class ReferenceOps:
    """`Ops` in plain torch, on any device; checks its operands, so it waits for a GPU at every step."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def projection(self, weight: Weight, bias: torch.Tensor | None) -> Projection:
        """The weight as it is."""
        return Projection(weight, bias)

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> Affine:
        """See `Ops`."""
        return reference.rms_norm_s8(x, weight, eps)

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[Affine, torch.Tensor]:
        """See `Ops`."""
        return reference.add_rms_norm_s8(x, residual, weight, eps)

    def last_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Ops`."""
        return exact.rms_norm(residual + x, weight, eps)

    def silu_mul(self, gate_up: torch.Tensor) -> Affine:
        """See `Ops`."""
        return reference.silu_mul_s8(gate_up)

    def linear(self, a: Affine, projection: Projection) -> torch.Tensor:
        """See `Ops`."""
        return reference.w4a8_matmul(a, projection.weight, projection.bias).to(self.dtype)

    def row_linear(self, a: Affine, projection: Projection) -> torch.Tensor:
        """See `Ops`."""
        return self.linear(a, projection)


class KernelOps:
    """`Ops` on a GPU, by ``kernels``: the package ``qoqlab_kernels``."""

    def __init__(self, kernels: Any, dtype: torch.dtype) -> None:
        self.kernels, self.dtype = kernels, dtype

    def projection(self, weight: Weight, bias: torch.Tensor | None) -> Projection:
        """The weight in the kernels' order. Raises ValueError where they cannot hold it."""
        return Projection(self.kernels.pack_weight(weight), None if bias is None else bias.float().contiguous())

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
        """See `Ops`."""
        return self.kernels.rms_norm_s8(x, weight, eps)

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[Any, torch.Tensor]:
        """See `Ops`."""
        return self.kernels.add_rms_norm_s8(x, residual, weight, eps)

    def last_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Ops`."""
        return self.kernels.add_rms_norm(x, residual, weight, eps)

    def silu_mul(self, gate_up: torch.Tensor) -> Any:
        """See `Ops`."""
        return self.kernels.silu_mul_s8(gate_up)

    def linear(self, a: Any, projection: Projection) -> torch.Tensor:
        """See `Ops`."""
        return self.kernels.w4a8_gemm(a, None, projection.weight, projection.bias, dtype=self.dtype)

    def row_linear(self, a: Any, projection: Projection) -> torch.Tensor:
        """See `Ops`."""
        return self.linear(a, projection)


def kernel_problem(weight: object) -> str:
    """Why the W4A8 kernels cannot multiply by ``weight``; empty if they can."""
    if not isinstance(weight, ProgressiveWeight | Affine):
        return f"a {type(weight).__name__} has floating-point scales along K"
    if isinstance(weight, Affine) and (weight.zeros is None or weight.grid != UINT4):
        return f"{weight.grid.name} codes, not UINT4 with zeros"
    n, k = weight.shape
    if n % 32 or k % 32:
        return f"{n}x{k}, not multiples of 32"
    if isinstance(weight, ProgressiveWeight) and weight.group_size not in (32, 64, 128):
        return f"groups of {weight.group_size}, not 32, 64 or 128"
    return ""


def side_by_side(weights: list[Weight]) -> Weight:
    """Several weights ``[N_i, K]`` of one format as one ``[sum N_i, K]``: their outputs follow each other.

    Raises ValueError where formats differ.
    """
    first = weights[0]
    joined: dict[str, torch.Tensor] = {}
    for name, value in vars(first).items():
        parts = [vars(w).get(name) for w in weights]
        if isinstance(value, torch.Tensor):
            if any(not isinstance(part, torch.Tensor) for part in parts):
                raise ValueError(f"weights: {name} is missing in some")
            joined[name] = torch.cat(parts)  # type: ignore[arg-type]
        elif any(part != value for part in parts):
            raise ValueError(f"weights: different {name}: {', '.join(map(str, parts))}")
    return replace(first, **joined)  # type: ignore[arg-type]
