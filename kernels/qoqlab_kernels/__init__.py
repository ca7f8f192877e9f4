"""numba.cuda kernels of qoqlab: W4A8 GEMM and KV4 attention. What they must equal: `qoqlab.reference`.

Nothing is here yet.
"""
