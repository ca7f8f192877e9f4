"""numba.cuda kernels of qoqlab: the W4A8 GEMM and KV4 decode attention. What they must equal: `qoqlab.reference`.

    packed = qk.pack_weight(w)              a quantised weight in the kernels' order
    x = qk.quantize_activations(tokens)     per-token INT8, in the kernels' order
    y = qk.w4a8_gemm(x, None, packed)

    cache = qk.PagedKV4(layers, kv_heads, head_dim, pages, device="cuda")
    y = qk.kv4_attention(query, cache, layer, sequences)

Needs numba-cuda (``pip install "qoqlab[cu13]"``) and a GPU of compute capability 8.0 or newer, or, slowly, numba's CUDA
simulator (``NUMBA_ENABLE_CUDASIM=1`` before the import).
"""

from .allocator import OutOfPages, PageAllocator
from .cache import PagedKV4, PagedKV8, PagedKV16
from .decode import kv4_attention
from .lanes import lane_map
from .layout import Activations, PackedWeight, pack_weight, unpack
from .matmul import plan, quantize_activations, w4a8_gemm
from .plan import Plan

__all__ = [
    "Activations",
    "OutOfPages",
    "PackedWeight",
    "PageAllocator",
    "PagedKV4",
    "PagedKV8",
    "PagedKV16",
    "Plan",
    "kv4_attention",
    "lane_map",
    "pack_weight",
    "plan",
    "quantize_activations",
    "unpack",
    "w4a8_gemm",
]
