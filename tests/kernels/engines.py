"""Engines to compare: the same model on the kernels and on what they must equal."""

from __future__ import annotations

import qoqlab_kernels as qk
import torch

from qoqlab import engine
from qoqlab.architecture import describe
from qoqlab.arithmetic import KernelOps, ReferenceOps
from qoqlab.cached_attention import KernelAttention, ReferenceAttention, Shape
from qoqlab.kv import KVFormat
from qoqlab.pipeline import QuantizedModel


def pair(
    result: QuantizedModel, device: str, dtype: torch.dtype, limits: tuple[int, int]
) -> tuple[engine.Engine, engine.Engine]:
    """(on the kernels, which may be simulated; on the reference) of a quantised model, for (sequences, tokens)."""
    architecture, place = describe(result.model), torch.device(device)
    first = architecture.blocks[0]
    shape = Shape(len(architecture.blocks), first.heads, first.kv_heads, first.head_dim, *limits)
    cos, sin = (t.to(place) for t in architecture.rotary(limits[1], dtype))
    norms = [engine.head_norms(block, dtype, place) for block in architecture.blocks]
    made = []
    for ops, attend in (
        (KernelOps(qk, dtype), KernelAttention(qk, shape, (cos, sin), norms)),
        (ReferenceOps(dtype), ReferenceAttention(shape, KVFormat(), (cos, sin), norms, dtype)),
    ):
        made.append(engine.Engine(engine.network_of(architecture, ops, place), ops, attend, limits))
    return made[0], made[1]
