"""numba.cuda kernels of qoqlab: W4A8 GEMM and KV4 attention. Nothing is here yet; `qoqlab.reference` defines what they equal."""
