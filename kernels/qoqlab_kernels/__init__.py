"""numba.cuda kernels of qoqlab: the W4A8 GEMM. What they must equal: `qoqlab.reference`.

    packed = qk.pack_weight(w)              a quantised weight in the kernels' order
    x = qk.quantize_activations(tokens)     per-token INT8, in the kernels' order
    y = qk.w4a8_gemm(x, None, packed)

Needs numba-cuda (``pip install "qoqlab[cu13]"``) and a GPU of compute capability 8.0 or newer, or, slowly, numba's CUDA
simulator (``NUMBA_ENABLE_CUDASIM=1`` before the import).
"""

from .attention import kv4_attention
from .cache import PagedKV4, PagedKV8, PagedKV16
from .fused import (
    add_rms_norm,
    add_rms_norm_s8,
    attend_own,
    attend_own_s8,
    rms_norm,
    rms_norm_s8,
    rope_kv4_append,
    silu_mul,
    silu_mul_s8,
)
from .lanes import lane_map
from .layout import Activations, PackedWeight, pack_weight, unpack
from .matmul import plan, quantize_activations, scale_sums, w4a8_gemm, w4a8_sums
from .plan import Plan

__all__ = [
    "Activations",
    "PackedWeight",
    "PagedKV4",
    "PagedKV8",
    "PagedKV16",
    "Plan",
    "add_rms_norm",
    "add_rms_norm_s8",
    "attend_own",
    "attend_own_s8",
    "kv4_attention",
    "lane_map",
    "pack_weight",
    "plan",
    "quantize_activations",
    "rms_norm",
    "rms_norm_s8",
    "rope_kv4_append",
    "scale_sums",
    "silu_mul",
    "silu_mul_s8",
    "unpack",
    "w4a8_gemm",
    "w4a8_sums",
]
