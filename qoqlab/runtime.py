"""Quantised layers. They hold codes and scales, and compute in one of two modes (`attention.Mode`)."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any

import torch
from torch import nn

from . import arithmetic, attention, engine, online, reference
from .architecture import Architecture, Block, describe
from .attention import Mode
from .cached_attention import Attention, HeadNorms, KernelAttention, ReferenceAttention, Shape
from .checks import require_count, require_enum
from .engine import Engine
from .grids import INT8, Grid
from .grouped import Grouped
from .kv import KVFormat
from .online import Online, OnlineLinear
from .schemes import ActivationFormat, Scheme, WeightFormat, WeightKind, pack, quantize_activations
from .tensorfile import take

QuantizedWeight = reference.QuantizedWeight
#: Environment variable: "reference" keeps RUNTIME mode on `reference` where the GPU's kernels could compute the same.
CHOICE = "QOQLAB_RUNTIME"
#: Oldest GPU that the kernels run on.
CAPABILITY = (8, 0)


@functools.cache
def _kernels() -> ModuleType | None:
    """`qoqlab_kernels`, None (said once) where it or its compiler is not installed."""
    try:
        metadata.version("numba-cuda")  # numba alone only simulates kernels
        import qoqlab_kernels
        from qoqlab_kernels.ptx import SIMULATED

        return None if SIMULATED else qoqlab_kernels
    except Exception as error:  # of a broken driver too: the reference computes the same, only slower
        warnings.warn(
            f"qoqlab_kernels: not usable ({type(error).__name__}: {error}); layers on the GPU compute by qoqlab.reference",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def kernels(device: torch.device) -> ModuleType | None:
    """The kernels' package if it runs on ``device``: an NVIDIA GPU of compute capability 8.0 or newer, `numba-cuda`
    installed. None otherwise, and where the environment variable ``QOQLAB_RUNTIME`` is "reference"."""
    choice = os.environ.get(CHOICE, "")
    if choice not in ("", "kernels", "reference"):
        raise ValueError(f"{CHOICE}: expected kernels or reference, got {choice!r}")
    if choice == "reference" or device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        return None
    return _kernels()


class QuantLinear(nn.Module):
    """A linear layer with quantised weights and, optionally, dynamically quantised activations.

    Codes are stored packed beside their scales, in the buffers that `WeightFormat.layout` names. In SIMULATED mode the
    weight is dequantised once and kept; in RUNTIME mode an exact integer GEMM runs (`reference.w4a8_matmul`, or
    `reference.grouped_matmul` where floating-point scales change along K) and its fp16 result is cast to the input's dtype.
    On a GPU the same result, bit for bit, comes from `qoqlab_kernels.w4a8_gemm` where the kernels are installed and take the
    weight (`kernels`); its packed form is made once and kept, and inputs are not searched for NaN.
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
        self._packed: Any = None  # the weight as the kernels read it; False: they cannot hold it

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
        self._dequantized = self._packed = None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._dequantized = self._packed = None
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., K]`` -> ``[..., N]`` in x's dtype."""
        if self.online is not None:
            x = self.online(x)
        if self.mode is Mode.RUNTIME and self.activations is not None:
            self._dequantized = None
            y = self._by_kernels(x)
            if y is not None:
                return y
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

    def _by_kernels(self, x: torch.Tensor) -> torch.Tensor | None:
        """The layer's result by the GPU's kernels, None where they do not apply."""
        per_token = ActivationFormat(INT8)
        if self.activations not in (INT8, per_token) or x.numel() == 0 or x.shape[-1] != self.in_features:
            return None
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return None
        qk = kernels(x.device)
        if qk is None:
            return None
        if self._packed is None:
            try:
                self._packed = qk.pack_weight(self.quantized)
            except (TypeError, ValueError):  # another format, or sizes that are no multiples of 32
                self._packed = False
        if self._packed is False or self._packed.device != x.device:
            return None
        tokens = qk.quantize_activations(x.reshape(-1, x.shape[-1]))
        y = qk.w4a8_gemm(tokens, None, self._packed, self.bias)
        return y.reshape(*x.shape[:-1], -1).to(x.dtype)

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


@dataclass(frozen=True)
class Setting:
    """What an engine is made of, checked. ``kernels``: their package on a GPU, None on the CPU."""

    architecture: Architecture
    form: KVFormat | None
    place: torch.device
    dtype: torch.dtype
    shape: Shape
    kernels: ModuleType | None

    @property
    def limits(self) -> tuple[int, int]:
        """Most sequences, most tokens of one."""
        return self.shape.max_batch, self.shape.max_tokens

    def rotary(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of all positions, where the engine runs."""
        cos, sin = self.architecture.rotary(self.shape.max_tokens, self.dtype)
        return cos.to(self.place), sin.to(self.place)

    def norms(self) -> list[HeadNorms]:
        """Norms of every layer's query and key heads."""
        return [engine.head_norms(block, self.dtype, self.place) for block in self.architecture.blocks]


def prepare(
    q: Any,
    device: str | torch.device = "cuda",
    max_batch: int = 64,
    max_tokens: int = 2048,
    dtype: torch.dtype | None = None,
    pages: int | None = None,
) -> Setting:
    """Check what `compile` is asked for; arguments and errors are those of `compile`."""
    architecture = describe(q.model if hasattr(q, "recipe") else q)
    require_count("max_batch", max_batch, 1)
    require_count("max_tokens", max_tokens, 1)
    if pages is not None:
        require_count("pages", pages, 1)
    place = torch.device(device)
    form = engine.check(architecture)
    own = architecture.embedding.weight.dtype
    on_gpu = place.type == "cuda"
    dtype = dtype or (torch.float16 if on_gpu and own == torch.float32 else own)
    known = (torch.float16, torch.bfloat16) if on_gpu else (torch.float16, torch.bfloat16, torch.float32)
    if dtype not in known:
        raise TypeError(f"dtype: expected one of {', '.join(map(str, known))} on {place.type}, got {dtype}")
    first = architecture.blocks[0]
    shape = Shape(len(architecture.blocks), first.heads, first.kv_heads, first.head_dim, max_batch, max_tokens, pages)
    if not on_gpu:
        return Setting(architecture, form, place, dtype, shape, None)
    if form != KVFormat():
        raise ValueError(f"q: keys and values in {form}; on a GPU an engine needs UINT4 per token, as in qoq-g128")
    for block in architecture.blocks:
        for role, linear in block.linears():
            problem = arithmetic.kernel_problem(linear.quantized)
            if problem:
                raise ValueError(f"q: the kernels cannot multiply by {block.name(role)}: {problem}")
    package = kernels(place) if torch.cuda.is_available() else None
    if package is None:
        raise RuntimeError(
            f"device: {place}; an engine on a GPU needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]}, the kernels "
            f'(pip install "qoqlab[cu13]", or cu12) and no {CHOICE}=reference'
        )
    if place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    return Setting(architecture, form, place, dtype, shape, package)


@torch.no_grad()
def compile(
    q: Any,
    device: str | torch.device = "cuda",
    max_batch: int = 64,
    max_tokens: int = 2048,
    dtype: torch.dtype | None = None,
    pages: int | None = None,
) -> Engine:
    """An `engine.Engine` that runs a quantised model: on the kernels where ``device`` is a GPU, on `reference` on the CPU.

    ``q``: a `pipeline.QuantizedModel` (or its ``.model``) of a W4A8 recipe with keys and values per token, such as
    "qoq-g128" and "qoq-per-channel". ``max_batch`` sequences at a time of at most ``max_tokens`` tokens each. ``dtype``: of
    activations, by default the model's own, but fp16 for an fp32 model on a GPU. ``pages``: of the cache, of `paged.PAGE`
    tokens each; by default enough for all sequences at their longest. Several GPUs: `parallel.compile`.

    Raises TypeError for another architecture or dtype; ValueError for a layer that engines cannot run, naming it;
    RuntimeError where ``device`` is a GPU and the kernels (extra "cu13" or "cu12") or the GPU are missing.
    """
    made = prepare(q, device, max_batch, max_tokens, dtype, pages)
    ops: arithmetic.Ops
    attend: Attention
    if made.kernels is None:
        ops = arithmetic.ReferenceOps(made.dtype)
        attend = ReferenceAttention(made.shape, made.form, made.rotary(), made.norms(), made.dtype)
        return Engine(engine.network_of(made.architecture, ops, made.place), ops, attend, made.limits)
    with torch.cuda.device(made.place):
        ops = arithmetic.KernelOps(made.kernels, made.dtype)
        attend = KernelAttention(made.kernels, made.shape, made.rotary(), made.norms())
        return Engine(engine.network_of(made.architecture, ops, made.place), ops, attend, made.limits)


__all__ = [
    "Mode",
    "QuantLinear",
    "Setting",
    "compile",
    "install",
    "kernels",
    "layer_from",
    "mode",
    "prepare",
    "quantized",
    "set_mode",
    "take_bias",
    "weight_bytes",
]
