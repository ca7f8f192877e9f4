"""Quantised layers. They hold codes and scales, and compute in one of two modes (`attention.Mode`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from . import attention, reference
from .affine import Affine, quantize_per_token_s8
from .architecture import Block, describe
from .attention import Mode
from .checks import require_enum
from .grids import INT8, UINT4, Grid, Zero
from .packing import pack_u4, unpack_u4
from .progressive import ProgressiveWeight
from .schemes import Scheme

QuantizedWeight = reference.QuantizedWeight


class QuantLinear(nn.Module):
    """A linear layer with quantised weights and, optionally, dynamic per-token INT8 activations.

    Codes are stored packed, two per byte, beside their scales. In SIMULATED mode the weight is dequantised once and kept; in
    RUNTIME mode the integer GEMM of `reference.w4a8_matmul` runs and its fp16 result is cast to the input's dtype.
    """

    bias: torch.Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: torch.Tensor | None, activations: Grid | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.activations = activations
        self.mode = Mode.SIMULATED
        self.progressive = isinstance(weight, ProgressiveWeight)
        self.zero = weight.zero
        self.signed = isinstance(weight, Affine) and weight.zeros is None
        self.register_buffer("codes", weight.codes if self.signed else pack_u4(weight.codes))
        if isinstance(weight, ProgressiveWeight):
            self.group_size = weight.group_size
            self.first_level = weight.first_level
            self.register_buffer("channel_scales", weight.channel_scales)
            self.register_buffer("group_scales", weight.group_scales)
            self.register_buffer("group_zeros", weight.group_zeros)
        else:
            self.register_buffer("scales", weight.scales)
            if weight.zeros is not None:
                self.register_buffer("zeros", weight.zeros)
        self.register_buffer("bias", bias)
        self._dequantized: torch.Tensor | None = None

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight with its codes unpacked, ``[N, K]``."""
        b = dict(self.named_buffers())
        if self.progressive:
            codes = unpack_u4(b["codes"])
            scales = (b["channel_scales"], b["group_scales"], b["group_zeros"])
            return ProgressiveWeight(*scales, self.group_size, self.zero, self.first_level, codes)
        if self.signed:
            return Affine(b["scales"], None, INT8, Zero.INTEGER, b["codes"])
        return Affine(b["scales"], b["zeros"], UINT4, self.zero, unpack_u4(b["codes"]))

    def storage_bytes(self) -> int:
        """Bytes of codes, scales, zeros and bias."""
        return sum(t.numel() * t.element_size() for t in self.buffers())

    def _apply(self, fn: Any, recurse: bool = True) -> QuantLinear:
        """Moves between devices, but ``.half()`` or ``.to(dtype)`` must not round scales to another type."""
        before = dict(self.named_buffers())
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
        if self.mode is Mode.RUNTIME and self.activations is not None:
            self._dequantized = None
            codes = quantize_per_token_s8(x, self.activations)
            return reference.w4a8_matmul(codes, self.quantized, self.bias).to(x.dtype)
        if self._dequantized is None or self._dequantized.dtype != x.dtype:
            self._dequantized = self.quantized.dequantize(x.dtype)
        if self.activations is not None:
            x = quantize_per_token_s8(x, self.activations).dequantize(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self._dequantized, bias)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        kind = f"progressive g{self.group_size}" if self.progressive else "per channel"
        grid = self.activations.name if self.activations else "unquantised"
        return f"{self.in_features}, {self.out_features}, {8 if self.signed else 4}-bit {kind}, activations {grid}"


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
        bias = block.linear(role).bias
        block.set_linear(role, QuantLinear(weight, None if bias is None else bias.detach(), scheme.activations))


def weight_bytes(model: nn.Module) -> int:
    """Bytes that the model's parameters and quantised layers would take on disk, unquantised ones counted as 16-bit.

    A tied embedding counts once.
    """
    quantized_layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    floats = {id(p): p.numel() * 2 for p in model.parameters()}
    return sum(floats.values()) + sum(m.storage_bytes() for m in quantized_layers)


__all__ = ["Mode", "QuantLinear", "install", "mode", "quantized", "set_mode", "weight_bytes"]
