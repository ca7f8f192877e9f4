"""Quantised layers. They hold codes and scales, and compute in one of two modes (`attention.Mode`)."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from . import attention, online, reference
from .architecture import Block, describe
from .attention import Mode
from .checks import require_enum
from .grids import Grid
from .grouped import Grouped
from .online import Online, OnlineLinear
from .schemes import ActivationFormat, Scheme, WeightFormat, WeightKind, pack, quantize_activations
from .tensorfile import take

QuantizedWeight = reference.QuantizedWeight


class QuantLinear(nn.Module):
    """A linear layer with quantised weights and, optionally, dynamically quantised activations.

    Codes are stored packed beside their scales, in the buffers that `WeightFormat.layout` names. In SIMULATED mode the
    weight is dequantised once and kept; in RUNTIME mode an exact integer GEMM runs (`reference.w4a8_matmul`, or
    `reference.grouped_matmul` where floating-point scales change along K) and its fp16 result is cast to the input's dtype.
    Unquantised activations meet the dequantised weight in both modes, as in weight-only kernels. ``transform`` is
    applied to the input first (see `online`).
    """

    bias: torch.Tensor | None

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: torch.Tensor | None,
        activations: Grid | ActivationFormat | None,
        transform: Online | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.activations = activations
        self.mode = Mode.SIMULATED
        self.form = WeightFormat.of(weight)
        for name, tensor in pack(weight).items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", bias)
        self.online = transform
        self._dequantized: torch.Tensor | None = None

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight with its codes unpacked, ``[N, K]``."""
        return self.form.unpack({name: t for name, t in self.named_buffers(recurse=False) if name != "bias"})

    def storage_bytes(self) -> int:
        """Bytes of codes, scales, zeros, bias and what the online transform stores."""
        return sum(t.numel() * t.element_size() for t in self.buffers())

    def _apply(self, fn: Any, recurse: bool = True) -> QuantLinear:
        """Moves between devices, but ``.half()`` or ``.to(dtype)`` must not round scales to another type."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            if name != "bias":
                moved = self.get_buffer(name)
                setattr(self, name, moved if moved.dtype == tensor.dtype else tensor.to(moved.device))
        self._dequantized = None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._dequantized = None
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., K]`` -> ``[..., N]`` in x's dtype."""
        if self.online is not None:
            x = self.online(x)
        if self.mode is Mode.RUNTIME and self.activations is not None:
            self._dequantized = None
            codes, weight = quantize_activations(x, self.activations), self.quantized
            if isinstance(codes, Grouped) or isinstance(weight, Grouped):
                return reference.grouped_matmul(codes, weight, self.bias).to(x.dtype)
            return reference.w4a8_matmul(codes, weight, self.bias).to(x.dtype)
        if self._dequantized is None or self._dequantized.dtype != x.dtype:
            self._dequantized = self.quantized.dequantize(x.dtype)
        if self.activations is not None:
            x = quantize_activations(x, self.activations).dequantize(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self._dequantized, bias)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        kind = self.form.kind
        rows = f"g{self.form.group_size}" if kind.grouped else "per channel"
        rows = f"progressive {rows}" if kind is WeightKind.PROGRESSIVE_U4 else rows
        rows += f" + {self.form.outliers} INT8 outliers" if self.form.outliers else ""
        grid = self.activations.name if self.activations else "unquantised"
        bits = 8 if kind is WeightKind.CHANNEL_S8 else 4
        return f"{self.in_features}, {self.out_features}, {bits}-bit {rows}, activations {grid}"


def set_mode(model: nn.Module, mode: Mode, prefill: int | None = None) -> None:
    """Switch every quantised layer of ``model`` to a mode; ``prefill`` as in `attention.AttentionState`."""
    require_enum("mode", mode, Mode)
    for block in describe(model).blocks:
        here = attention.state(block.attention)
        here.mode, here.prefill = mode, prefill
        for _, linear in block.linears():
            if isinstance(linear, QuantLinear):
                linear.mode = mode


@contextmanager
def mode(model: nn.Module, value: Mode, prefill: int | None = None) -> Iterator[None]:
    """`set_mode` for the length of a ``with`` block, SIMULATED afterwards."""
    set_mode(model, value, prefill)
    try:
        yield
    finally:
        set_mode(model, Mode.SIMULATED)


@contextmanager
def quantized(block: Block, weights: dict[str, QuantizedWeight], scheme: Scheme) -> Iterator[None]:
    """Run a block with given quantised weights (role -> weight) and the scheme's activations and KV, then undo it."""
    originals = dict(block.linears())
    here = attention.state(block.attention)
    before = here.grid
    try:
        install(block, weights, scheme)
        yield
    finally:
        here.grid = before
        for role, linear in originals.items():
            block.set_linear(role, linear)


def install(block: Block, weights: dict[str, QuantizedWeight], scheme: Scheme) -> None:
    """Replace a block's linears by quantised ones and set its KV grid."""
    attention.state(block.attention).grid = scheme.kv
    for role, weight in weights.items():
        linear = block.linear(role)
        bias = None if linear.bias is None else linear.bias.detach()
        block.set_linear(role, QuantLinear(weight, bias, scheme.activations, online.of(linear)))


def take_bias(state: MutableMapping[str, torch.Tensor], name: str, linear: nn.Linear) -> torch.Tensor | None:
    """A bias of any floating-point type, where the architecture has one (another one stays, and is refused later)."""
    return None if linear.bias is None else take(state, f"{name}.bias", (linear.out_features,), None)


def layer_from(
    state: MutableMapping[str, torch.Tensor], name: str, linear: nn.Linear, scheme: Scheme
) -> QuantLinear | OnlineLinear | None:
    """The layer that stands for ``linear`` under a scheme, from tensors ``{name}.codes`` and so on, which are taken out of
    ``state``; None where the linear stays as it is. Where weights are not quantised, neither weight nor bias is taken.

    Raises KeyError for tensors that are missing, ValueError for shapes or dtypes other than the scheme's.
    """
    n, k = linear.out_features, linear.in_features
    transform = online.take(state, name, k)
    form = scheme.weights
    if form is None:
        return None if transform is None else OnlineLinear(linear, transform)
    if k % form.multiple:
        raise ValueError(f"{n}x{k} is not divisible into groups of {form.multiple} along K")
    parts = {part: take(state, f"{name}.{part}", *expected) for part, expected in form.layout(n, k).items()}
    return QuantLinear(form.unpack(parts), take_bias(state, name, linear), scheme.activations, transform)


def weight_bytes(model: nn.Module) -> int:
    """Bytes that the model's parameters and quantised layers would take on disk, unquantised ones counted as 16-bit.

    A tied embedding counts once.
    """
    quantized_layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    floats = {id(p): p.numel() * 2 for p in model.parameters()}
    return sum(floats.values()) + sum(m.storage_bytes() for m in quantized_layers)


__all__ = [
    "Mode",
    "QuantLinear",
    "install",
    "layer_from",
    "mode",
    "quantized",
    "set_mode",
    "take_bias",
    "weight_bytes",
]
