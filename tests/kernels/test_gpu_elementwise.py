"""The element-wise kernels on a GPU against the reference, and in a chain with the GEMM."""

from __future__ import annotations

import pytest
import qoqlab_kernels as qk
import torch
from qoqlab_kernels import cases, fused, layout

from qoqlab import exact, reference
from qoqlab.affine import Affine

HERE = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not HERE or torch.cuda.get_device_capability() < (8, 0),
        reason="needs an NVIDIA GPU of compute capability 8.0 or newer",
    ),
]
DTYPES = [torch.float16, torch.bfloat16]
EPS = 1e-5


def check(got: layout.Activations, want: Affine, what: str) -> None:
    tiled = layout.tile_activations(want.codes, want.scales)
    wrong = int((got.tiles != tiled.tiles).sum())
    assert wrong == 0, f"{what}: {wrong} of {want.codes.numel()} codes differ"
    assert torch.equal(got.tokens, tiled.tokens), f"{what}: sums or scales differ"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [32, 160, 512, 896, 4096, 5120, 14336, 16384])
def test_against_the_reference(k: int, dtype: torch.dtype) -> None:
    for m in (1, 2, 9, 16, 133, 600):
        x, residual, weight, gate_up = cases.elementwise_operands(m, k, dtype, seed=m, device="cuda")
        check(qk.rms_norm_s8(x, weight, EPS), reference.rms_norm_s8(x, weight, EPS), f"norm {m} x {k}")
        (got, total), (want, sums) = (f(x, residual, weight, EPS) for f in (qk.add_rms_norm_s8, reference.add_rms_norm_s8))
        check(got, want, f"add_norm {m} x {k}")
        assert torch.equal(total, sums)
        check(qk.silu_mul_s8(gate_up), reference.silu_mul_s8(gate_up), f"silu {m} x {k}")
        assert torch.equal(qk.rms_norm(x, weight, EPS), exact.rms_norm(x, weight, EPS))
        assert torch.equal(qk.add_rms_norm(x, residual, weight, EPS), exact.rms_norm(x + residual, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_and_gpu_references_agree(dtype: torch.dtype) -> None:
    x, _, weight, gate_up = cases.elementwise_operands(64, 1184, dtype)
    for function, operands in (
        (exact.rms_norm, (x, weight)),
        (exact.silu_mul, (gate_up,)),
        (exact.sum_of_squares, (x,)),
    ):
        more = (EPS,) if function is exact.rms_norm else ()
        here, there = function(*operands, *more), function(*(t.cuda() for t in operands), *more)
        assert torch.equal(here, there.cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_of_every_number(dtype: torch.dtype) -> None:
    numbers = torch.arange(-(1 << 15), 1 << 15, device="cuda").to(torch.int16).view(dtype)
    gate = torch.where(numbers.isfinite(), numbers, 0).view(64, 1024)
    for up in (1.0, 0.7070312):
        gate_up = torch.cat([gate, torch.full_like(gate, up)], 1)
        check(qk.silu_mul_s8(gate_up), reference.silu_mul_s8(gate_up), f"up = {up}")


def test_every_quotient_that_is_a_tie() -> None:
    """Tokens whose scale is a power of two, and values that lie half-way between two codes."""
    for power in (-8, -4, -1, 0):
        codes = torch.arange(-127, 128, device="cuda") / 2
        x = torch.zeros(1, 512, device="cuda")
        x[0, :255], x[0, 255] = codes, 127.0
        gate_up = torch.cat([torch.full_like(x, 40.0), x * 2.0**power / 40], 1).half()
        check(qk.silu_mul_s8(gate_up), reference.silu_mul_s8(gate_up), f"2**{power}")


@pytest.mark.parametrize("m", [1, 16, 300])
def test_any_number_of_threads(m: int) -> None:
    x, residual, weight, _ = cases.elementwise_operands(m, 4096, torch.float16, device="cuda")
    want, sums = reference.add_rms_norm_s8(x, residual, weight, EPS)
    for threads in (64, 128, 256, 512, 1024):
        got, total = fused._launch("add_norm", x, residual, weight, EPS, threads=threads)
        check(got, want, f"{threads} threads")
        assert torch.equal(total, sums)


@pytest.mark.parametrize("m", [1, 16, 130])
def test_a_chain_in_a_graph(m: int) -> None:
    """Norm, GEMM, SiLU, GEMM with the residual carried along: each kernel starts while the one before it ends."""
    weights = [cases.weight(n, k, "g128", seed, "cuda") for seed, (n, k) in enumerate([(1792, 512), (512, 896)])]
    packed = [qk.pack_weight(w) for w in weights]
    x, residual, gain, _ = cases.elementwise_operands(m, 512, torch.float16, device="cuda")
    gain = gain / 64

    def kernels() -> list[torch.Tensor]:
        y, r, seen = x, residual, []
        for _ in range(6):
            a, r = qk.add_rms_norm_s8(y, r, gain, EPS)
            y = qk.w4a8_gemm(qk.silu_mul_s8(qk.w4a8_gemm(a, None, packed[0])), None, packed[1])
            seen += [r, y]
        return seen

    def plain() -> list[torch.Tensor]:
        y, r, seen = x, residual, []
        for _ in range(6):
            a, r = reference.add_rms_norm_s8(y, r, gain, EPS)
            y = reference.w4a8_matmul(reference.silu_mul_s8(reference.w4a8_matmul(a, weights[0])), weights[1])
            seen += [r, y]
        return seen

    want = plain()
    assert all(t.isfinite().all() for t in want)
    assert all(map(torch.equal, kernels(), want))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = kernels()
    for _ in range(20):
        for t in got:
            t.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rotary_positions_and_the_cache(head_dim: int, dtype: torch.dtype) -> None:
    for heads, kv_heads in ((3, 2), (8, 1), (32, 8)):
        for normed in (False, True):
            for decode in (False, True):
                agrees = cases.rope_agrees(head_dim, dtype, normed, decode, heads, kv_heads, "cuda")
                assert all(agrees.values()), (heads, kv_heads, normed, decode, agrees)
