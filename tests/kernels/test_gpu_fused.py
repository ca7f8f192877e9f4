"""The fused element-wise kernels on a GPU: equal to the reference in every bit, alone, in chains and in CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import qoqlab_kernels as qk
import torch
from qoqlab_kernels import bench_elementwise, cases, elementwise
from qoqlab_kernels.bench_elementwise import same

from qoqlab import affine, exact, kv, progressive, reference, runtime
from qoqlab.attention import Mode
from qoqlab.grids import INT8, Zero
from qoqlab.runtime import QuantLinear

from .gpus import on_a_gpu
from .joined import own_operands

pytestmark = on_a_gpu
DTYPES = [torch.float16, torch.bfloat16]
SHAPES = [(1, 32), (9, 160), (17, 1056), (133, 4096), (600, 4096), (5, 14336), (2, 53248)]
TURNS = [(128, 32, 8), (64, 9, 3), (128, 64, 8)]


@pytest.fixture(autouse=True)
def settled() -> Iterator[None]:
    """Errors of a kernel are reported by the test that caused them."""
    yield
    torch.cuda.synchronize()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten of its outputs is noticed."""
    empty = torch.empty

    def poisoned_empty(*size: Any, **options: Any) -> torch.Tensor:
        made = empty(*size, **options)
        made.view(torch.uint8).fill_(0xA5)
        return made

    monkeypatch.setattr(torch, "empty", poisoned_empty)


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Tokens of very different sizes, one all zeros; the same on every device."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    sizes = torch.logspace(2, -3, shape[0])[:, None]
    sizes[shape[0] // 2] = 0 if shape[0] > 1 else 1
    return (x * sizes).to(dtype).cuda()


def gains(k: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(k, generator=torch.Generator().manual_seed(k)).to(dtype).cuda()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_every_shape(m: int, k: int, dtype: torch.dtype) -> None:
    x, residual, weight = numbers(m, k, dtype=dtype), numbers(m, k, dtype=dtype, seed=1), gains(k, dtype)
    assert same(qk.rms_norm_s8(x, weight, 1e-5), reference.rms_norm_s8(x, weight, 1e-5))
    assert same(qk.add_rms_norm_s8(x, residual, weight, 1e-6), reference.add_rms_norm_s8(x, residual, weight, 1e-6))
    assert same(qk.rms_norm(x, weight, 1e-5), exact.rms_norm(x, weight, 1e-5))
    assert same(qk.add_rms_norm(x, residual, weight, 1e-5), exact.rms_norm(x + residual, weight, 1e-5))
    gate_up = torch.cat([x.clamp(-200, 200), residual.clamp(-200, 200)], -1)
    assert same(qk.silu_mul_s8(gate_up), reference.silu_mul_s8(gate_up))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_slices_of_tokens(m: int, k: int, dtype: torch.dtype) -> None:
    """Two slices with the larger of their largest numbers: the codes of the whole token, the slices' own sums."""
    halves = [numbers(m, 2 * k, dtype=dtype, seed=seed).clamp(-200, 200) for seed in (0, 1)]
    parts = [qk.silu_mul(half) for half in halves]
    largest = torch.maximum(parts[0][1], parts[1][1])
    whole = affine.quantize_per_token_s8(torch.cat([exact.silu_mul(half) for half in halves], 1))
    for (x, best), half, codes in zip(parts, halves, whole.codes.chunk(2, 1), strict=True):
        assert torch.equal(x, exact.silu_mul(half)) and torch.equal(best, x.float().abs().amax(-1))
        got = qk.quantize_activations(x, largest=largest)
        assert torch.equal(got.codes, codes) and torch.equal(got.scales, whole.scales)
        assert torch.equal(got.sums.long(), codes.sum(-1, dtype=torch.int64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_gives_the_same_bits_on_the_cpu(dtype: torch.dtype) -> None:
    x, weight = numbers(9, 4096, dtype=dtype).clamp(-200, 200), gains(4096, dtype)  # whose products fp16 holds
    for on_gpu, on_cpu in (
        (reference.rms_norm_s8(x, weight, 1e-5), reference.rms_norm_s8(x.cpu(), weight.cpu(), 1e-5)),
        (reference.silu_mul_s8(x), reference.silu_mul_s8(x.cpu())),
    ):
        assert torch.equal(on_gpu.codes.cpu(), on_cpu.codes) and torch.equal(on_gpu.scales.cpu(), on_cpu.scales)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("threads", [64, 128, 256, 512, 1024])
def test_any_number_of_threads_gives_the_same_bits(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "threads_for", lambda *_: threads)
    x, weight = numbers(5, 2592, dtype=torch.float16), gains(2592, torch.float16)
    assert same(qk.add_rms_norm_s8(x, x, weight, 1e-5), reference.add_rms_norm_s8(x, x, weight, 1e-5))
    assert same(qk.silu_mul_s8(x[:, :2560]), reference.silu_mul_s8(x[:, :2560]))


def test_silu_of_every_half() -> None:
    gate = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16)
    gate = torch.where(gate.isfinite(), gate, torch.zeros_like(gate)).cuda().view(-1, 64)
    gate_up = torch.cat([gate, torch.ones_like(gate)], -1)
    assert same(qk.silu_mul_s8(gate_up), reference.silu_mul_s8(gate_up))


@pytest.mark.parametrize("m", [1, 16, 200])
def test_a_chain_of_norms_and_products_in_a_graph(m: int) -> None:
    """Kernels start while their predecessors end; replayed with other inputs, everything equals the reference."""
    ws = [progressive.quantize(torch.randn(n, k, device="cuda") / k**0.5) for n, k in ((1024, 1024), (2048, 1024))]
    ws.append(progressive.quantize(torch.randn(1024, 1024, device="cuda") / 32))
    packed = [qk.pack_weight(w) for w in ws]
    weight = gains(1024, torch.float16)
    x = numbers(m, 1024, dtype=torch.float16)

    def fast(x: torch.Tensor) -> torch.Tensor:
        residual = x
        for _ in range(3):
            y = qk.w4a8_gemm(qk.rms_norm_s8(residual, weight, 1e-5), None, packed[0])
            a, residual = qk.add_rms_norm_s8(y, residual, weight, 1e-5)
            y = qk.w4a8_gemm(qk.silu_mul_s8(qk.w4a8_gemm(a, None, packed[1])), None, packed[2])
            residual = residual + y
        return residual

    def slow(x: torch.Tensor) -> torch.Tensor:
        residual = x
        for _ in range(3):
            y = reference.w4a8_matmul(reference.rms_norm_s8(residual, weight, 1e-5), ws[0])
            a, residual = reference.add_rms_norm_s8(y, residual, weight, 1e-5)
            y = reference.w4a8_matmul(reference.silu_mul_s8(reference.w4a8_matmul(a, ws[1])), ws[2])
            residual = residual + y
        return residual

    fast(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fast(x)
    for seed in range(5):
        x.copy_(numbers(m, 1024, dtype=torch.float16, seed=seed))
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, slow(x)), seed


def test_gains_written_just_before_are_seen() -> None:
    x, weight = numbers(64, 4096, dtype=torch.float16), torch.zeros(4096, dtype=torch.float16, device="cuda")
    want = [reference.rms_norm_s8(x, torch.full_like(weight, i), 1e-5) for i in range(1, 6)]
    for _ in range(20):
        got = []
        for i in range(1, 6):
            weight.fill_(i)
            got.append(qk.rms_norm_s8(x, weight, 1e-5))
        assert all(same(a, b) for a, b in zip(got, want, strict=True))


def test_every_measured_operation_is_right_where_it_is_measured() -> None:
    for name, op in bench_elementwise.OPERATIONS.items():
        sets = op.operands(33, op.k, torch.float16)
        assert same(op.run(*sets), op.want(*sets)), name


def test_the_operators_registrations_are_sound() -> None:
    x, weight = numbers(5, 96, dtype=torch.float16), gains(96, torch.float16)
    torch.library.opcheck(torch.ops.qoqlab.rms_norm_s8.default, (x, weight, 1e-5))
    torch.library.opcheck(torch.ops.qoqlab.add_rms_norm_s8.default, (x, x, weight, 1e-5))
    torch.library.opcheck(torch.ops.qoqlab.silu_mul_s8.default, (x[:, :64],))
    operands = own_operands(5, 4, 2, 64, torch.float16, "cuda")
    torch.library.opcheck(torch.ops.qoqlab.attend_own_s8.default, (*operands, 0.125, None))


# -- RoPE and the cache ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("dim", "heads", "kv_heads"), TURNS)
def test_a_prompt_then_steps_in_a_graph(dim: int, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    """Prompts with given positions, then replayed steps: codes, scales and zeros are those of `quantize_kv4`."""
    cache = qk.PagedKV4(2, kv_heads, dim, pages=24, sequences=4, device="cuda")
    lengths, steps = [63, 1, 130], 3
    numbers_ = [cache.open() for _ in lengths]
    angles = torch.randn(256, dim // 2, device="cuda")
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    wide = heads + 2 * kv_heads

    def tokens(count: int, seed: int) -> torch.Tensor:
        x = numbers(count, wide * dim, dtype=torch.float32, seed=seed).clamp(-500, 500).view(count, wide, dim)
        x[0, -1] = 3.0
        return x.to(dtype)

    def turned(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return exact.rotate(x[:, : heads + kv_heads], cos[places.long(), None], sin[places.long(), None])

    kept: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {n: [] for n in numbers_}
    for n, count in zip(numbers_, lengths, strict=True):
        x, places = tokens(count, n), torch.arange(count, dtype=torch.int32, device="cuda")
        cache.reserve([n], count + steps + 1)
        q, k = qk.rope_kv4_append(cache, 1, torch.full_like(places, n), x.flatten(1), cos, sin, places)
        y = turned(x, places)
        assert torch.equal(q, y[:, :heads]) and torch.equal(k, y[:, heads:])
        kept[n] += zip(y[:, heads:], x[:, heads + kv_heads :], strict=True)
        cache.lengths[1, n] = count
        cache._length[n] = [0, count]
    slots = torch.tensor(numbers_, dtype=torch.int32, device="cuda")
    x = tokens(len(lengths), 9)
    qk.rope_kv4_append(cache, 1, slots, x.flatten(1), cos, sin)  # compiles
    cache.lengths[1] -= torch.tensor([1, 1, 1, 0], dtype=torch.int32, device="cuda")  # and is undone
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q, k = qk.rope_kv4_append(cache, 1, slots, x.flatten(1), cos, sin)
    for step in range(steps):
        x.copy_(tokens(len(lengths), 10 + step))
        places = cache.lengths[1, slots.long()].clone()
        q.fill_(torch.nan)
        k.fill_(torch.nan)
        graph.replay()
        y = turned(x, places)
        assert torch.equal(q, y[:, :heads]) and torch.equal(k, y[:, heads:])
        for i, n in enumerate(numbers_):
            kept[n].append((y[i, heads:], x[i, heads + kv_heads :].clone()))
    assert cache.lengths[1].tolist() == [*(count + steps for count in lengths), 0] and not cache.lengths[0].any()
    for n, count in zip(numbers_, lengths, strict=True):
        cache._length[n] = [0, count + steps]
        for mine, rows in zip(cache.codes(1, n), zip(*kept[n], strict=True), strict=True):
            want = kv.quantize_kv4(torch.stack(rows, 1))
            for name, value in vars(want).items():
                assert torch.equal(getattr(mine, name), value), name
    assert not cache.pool[0].any()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "heads", "kv_heads", "dim"),
    [(1, 32, 8, 128), (64, 32, 32, 128), (300, 32, 8, 128), (9, 3, 1, 64), (5, 16, 1, 64), (2, 96, 8, 128), (7, 9, 3, 128)],
)
def test_a_token_joins_its_past(
    m: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, softcap: float | None
) -> None:
    operands = own_operands(m, heads, kv_heads, dim, dtype, "cuda")
    want = reference.attend_own_s8(*operands, softcap=softcap)
    got = [qk.attend_own_s8(*operands, softcap=softcap) for _ in range(3)]
    assert all(same(each, want) for each in got)
    joined, largest = qk.attend_own(*operands, softcap=softcap)
    assert same(qk.quantize_activations(joined), want) and torch.equal(largest, joined.float().abs().amax(-1))
    on_cpu = reference.attend_own_s8(*(x.cpu() for x in operands), softcap=softcap)
    assert torch.equal(on_cpu.codes, want.codes.cpu()) and torch.equal(on_cpu.scales, want.scales.cpu())
    value = operands[4][0].repeat_interleave(heads // kv_heads, 0).flatten()
    assert torch.equal(got[0].codes[0], affine.quantize_per_token_s8(value).codes)  # which has no past


# -- layers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_layers_compute_by_the_kernels(dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' result is the reference's, and the kernels are what runs."""
    calls = []
    multiply = qk.w4a8_gemm
    monkeypatch.setattr(qk, "w4a8_gemm", lambda *a, **o: calls.append(a) or multiply(*a, **o))
    w = torch.randn(96, 256, generator=torch.Generator().manual_seed(0))
    b = torch.linspace(-1, 1, 96) if bias else None
    for made in (progressive.quantize(w, 64), progressive.quantize(w, 32, Zero.SCALED), affine.quantize_per_channel_u4(w)):
        layer = QuantLinear(made, b, INT8).cuda()
        layer.mode = Mode.RUNTIME
        x = numbers(2 * 7, 256, dtype=dtype).view(2, 7, 256)
        monkeypatch.setenv(runtime.CHOICE, "reference")
        want, before = layer(x), len(calls)
        monkeypatch.delenv(runtime.CHOICE)
        got = layer(x)
        assert len(calls) == before + 1 and got.dtype == dtype and torch.equal(got, want)
        on_cpu = QuantLinear(made, b, INT8)
        on_cpu.mode = Mode.RUNTIME
        assert torch.equal(on_cpu(x.cpu()), got.cpu())


def test_layers_that_the_kernels_cannot_hold_compute_by_the_reference() -> None:
    w = torch.randn(40, 256, generator=torch.Generator().manual_seed(0))
    for made in (affine.quantize_per_channel_u4(w), progressive.quantize(w, 16)):
        layer = QuantLinear(made, None, INT8).cuda()
        layer.mode = Mode.RUNTIME
        x = numbers(3, 256, dtype=torch.float16)
        assert torch.equal(layer(x), reference.w4a8_matmul(x, layer.quantized))


def test_the_widest_product_of_silu_fits_the_gemm() -> None:
    x = numbers(3, 2 * cases.WIDEST_K, dtype=torch.float16).clamp(-100, 100)
    a = qk.silu_mul_s8(x)
    assert (a.m, a.k) == (3, cases.WIDEST_K)
