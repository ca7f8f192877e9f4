"""The kernels on a GPU: every version and plan against the reference, and everything that only hardware can get wrong."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator

import pytest
import qoqlab_kernels as qk
import torch
from qoqlab_kernels import cases, gemm, layout, matmul
from qoqlab_kernels.cases import Case
from qoqlab_kernels.plan import TOKENS, Plan

from qoqlab import affine
from qoqlab.affine import Affine
from qoqlab.parallel import inputs
from qoqlab.progressive import ProgressiveWeight

from .expected import product
from .gpus import CAPABILITY, on_a_gpu

pytestmark = on_a_gpu
VERSIONS = ["v1", "v2", "v3", "v4", *(["v5"] if CAPABILITY == (9, 0) else [])]
hopper = pytest.mark.skipif(CAPABILITY != (9, 0), reason="v5 needs a GPU of compute capability 9.0")
GUARD = 4096  # elements of poison before and after an output


@pytest.fixture(autouse=True)
def by_rules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No override from outside; errors of a kernel are reported by the test that caused them."""
    monkeypatch.delenv("QOQLAB_KERNEL", raising=False)
    yield
    torch.cuda.synchronize()


def moved(w: ProgressiveWeight | Affine, device: str = "cuda") -> ProgressiveWeight | Affine:
    """A quantised weight on another device."""
    return type(w)(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in vars(w).items()})


def operands(c: Case, extreme: bool = False, seed: int = 0) -> tuple:
    """(weight, codes, scales) on the GPU."""
    if extreme:
        codes, scales = cases.extreme_codes(c.m, c.k, seed + 1)
        return moved(cases.extreme_weight(c.n, c.k, c.format, seed)), codes.cuda(), scales.cuda()
    a = cases.activations(c.m, c.k, seed + 1)
    return moved(cases.weight(c.n, c.k, c.format, seed)), a.codes.cuda(), a.scales.cuda()


def check(
    c: Case,
    plan: Plan | None = None,
    dtype: torch.dtype = torch.float16,
    bias: bool = False,
    extreme: bool = False,
    seed: int = 0,
) -> None:
    """A case by a plan (None: by the rules), into poisoned memory, equals the reference and spares what lies around."""
    w, codes, scales = operands(c, extreme, seed)
    x, packed = qk.quantize_activations(codes, scales), qk.pack_weight(w)
    b = torch.linspace(-3, 3, c.n, device="cuda") if bias else None
    buffer = torch.full((2 * GUARD + c.m * c.n,), torch.nan, dtype=dtype, device="cuda")
    out = buffer[GUARD:-GUARD].view(c.m, c.n)
    if plan is None:
        assert qk.w4a8_gemm(x, None, packed, b, out, dtype) is out
    else:
        parts, _ = matmul.workspace(plan, x.device)
        parts.fill_(0xA5)
        matmul.run(
            plan, gemm.Form(packed.groups, c.format == "channel-scaled", dtype == torch.bfloat16, bias), x, packed, b, out
        )
    want = product(codes, scales, w, b, dtype)
    assert want.isfinite().all()
    wrong = int((out != want).sum())
    assert wrong == 0, f"{c} {plan}: {wrong} of {out.numel()} differ"
    assert buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all(), f"{c} {plan}: wrote outside of the output"
    for space in matmul._workspaces.values():
        assert not space.counters.any(), f"{c} {plan}: counters are left at {int(space.counters.abs().sum())}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", cases.FORMATS)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 4096, 2048), (7, 96, 256), (64, 8192, 4096), (300, 4096, 1024), (2048, 4096, 512)]
)
def test_sums_of_halves_are_those_of_the_whole(m: int, n: int, k: int, name: str, dtype: torch.dtype) -> None:
    """What two GPUs that share a layer's inputs compute, by whatever plan the rules choose; twice, in a graph."""
    c = Case(m, n, k, name)
    w, codes, scales = operands(c)
    bias = torch.linspace(-3, 3, n, device="cuda")
    parts = (slice(0, k // 2), slice(k // 2, k))
    xs = [qk.quantize_activations(codes[:, part].contiguous(), scales) for part in parts]
    packed = [qk.pack_weight(inputs(w, part)) for part in parts]
    token_sums = codes.sum(-1, dtype=torch.int32) if name == "channel-scaled" else None

    def both() -> torch.Tensor:
        total = sum(qk.w4a8_sums(x, p) for x, p in zip(xs, packed, strict=True))
        return qk.scale_sums(total, xs[0], packed[0], bias, dtype, token_sums)

    want = product(codes, scales, w, bias, dtype)
    assert torch.equal(both(), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = both()
    for _ in range(2):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, want)


# -- shapes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_edges_of_units_and_tiles(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QOQLAB_KERNEL", version)
    for i, c in enumerate(cases.edge_cases()):
        check(c, bias=i % 2 == 1, dtype=torch.bfloat16 if i % 3 == 1 else torch.float16)
        check(c, extreme=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_random_shapes(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QOQLAB_KERNEL", version)
    generator = torch.Generator().manual_seed(int(version[1]))
    for i in range(60 if version in ("v4", "v5") else 20):
        c = cases.random_case(generator)
        check(c, bias=i % 2 == 0, dtype=torch.bfloat16 if i % 5 == 0 else torch.float16, extreme=i % 4 == 3, seed=i)


@pytest.mark.parametrize("m", cases.TAILS)
def test_every_tail_by_the_rules(m: int) -> None:
    check(Case(m, 544, 1056, "g32"))
    check(Case(m, 1056, 544, "channel"), bias=True)


@pytest.mark.parametrize("layer", cases.LAYERS)
@pytest.mark.parametrize("name", ["g128", "channel"])
def test_measured_layers(layer: str, name: str) -> None:
    n, k = cases.LAYERS[layer]
    for m in (1, 16, 64, 129, 1024):
        check(Case(m, n, k, name))


# -- plans ----------------------------------------------------------------------------------------------------------------


def random_plan(c: Case, version: str, draw: random.Random) -> Plan:
    """Any plan that may be tuned: few or many workers, short or long rings."""
    groups = 128 // cases.FORMATS[c.format][0] if cases.FORMATS[c.format][0] else 0
    tokens = draw.choice(TOKENS[version])
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    if version == "v4":
        p = Plan("v4", tokens, 1, draw.choice([2, 3, 4]), 1, 1)
    else:
        warpgroups, cluster = draw.choice([1, 2]) if tokens < 128 else 2, draw.choice([1, 2, 4])
        most = gemm.stages_that_fit(tokens, warpgroups, gemm.Form(groups).unit)
        p = Plan("v5", tokens, warpgroups, draw.randint(2, most), cluster, 1, draw.random() < 0.5)
    rows, columns = p.tiles(c.m, c.n)
    units = rows * columns * -(-c.k // 128)
    workers = min(units, draw.choice([1, 2, 3, processors // p.cluster, draw.randint(1, 2 * processors)]))
    return Plan(p.version, tokens, p.warpgroups, p.stages, p.cluster, workers, p.overlap)


@pytest.mark.parametrize("version", [v for v in VERSIONS if v in TOKENS])
def test_random_plans(version: str) -> None:
    draw, generator = random.Random(5), torch.Generator().manual_seed(5)
    for i in range(60):
        c = cases.random_case(generator, 300, 1024, 1024)
        check(c, random_plan(c, version, draw), bias=i % 2 == 0, seed=i)


@hopper
@pytest.mark.parametrize("cluster", [1, 2, 4])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("tokens", TOKENS["v5"])
def test_clusters_and_overlap(cluster: int, overlap: bool, tokens: int) -> None:
    """Tails in every dimension, clusters whose last blocks have no outputs, tiles shared by several clusters."""
    for name in ("g128", "g32", "channel"):
        c = Case(tokens + 9, 160 + 128 * cluster, 640, name)
        stages = gemm.stages_that_fit(tokens, 2, gemm.Form(4).unit)
        for workers in (1, 3, 7):
            check(c, Plan("v5", tokens, 2, stages, cluster, workers, overlap))


# -- extremes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [v for v in VERSIONS if v != "v2"])
@pytest.mark.parametrize("name", ["g128", "g32-scaled", "channel", "channel-scaled"])
def test_the_widest_layer_of_extreme_codes(version: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """K = 53248, every activation -128 or 127, every weight at the end of its range: nothing overflows."""
    monkeypatch.setenv("QOQLAB_KERNEL", version)
    check(Case(9, 96, cases.WIDEST_K, name), extreme=True)


def test_all_codes_alike_at_the_widest_layer() -> None:
    w = cases.extreme_weight(64, cases.WIDEST_K, "g128-scaled")
    for code in (0, 15):
        for x in (-128, 127):
            same = type(w)(**{**vars(w), "codes": torch.full_like(w.codes, code)})
            codes = torch.full((3, cases.WIDEST_K), x, dtype=torch.int8, device="cuda")
            scales = torch.full((3,), 2.0**-4, dtype=torch.float16, device="cuda")
            y = qk.w4a8_gemm(codes, scales, qk.pack_weight(moved(same)))
            assert torch.equal(y, product(codes, scales, moved(same)))


def test_results_beyond_fp16_are_infinite_as_in_the_reference() -> None:
    w, codes, _ = operands(Case(8, 64, 4096), extreme=True)
    scales = torch.full((8,), 1000.0, dtype=torch.float16, device="cuda")
    y, want = qk.w4a8_gemm(codes, scales, qk.pack_weight(w)), product(codes, scales, w)
    assert want.isinf().any() and torch.equal(y, want)


# -- repetition and concurrency -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_runs_repeat_bit_for_bit(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QOQLAB_KERNEL", version)
    w, codes, scales = operands(Case(33, 1056, 2080, "g32"))
    packed = qk.pack_weight(w)
    first = qk.w4a8_gemm(codes, scales, packed)
    assert torch.equal(first, product(codes, scales, w))
    outputs = [qk.w4a8_gemm(codes, scales, packed) for _ in range(200)]
    assert all(torch.equal(y, first) for y in outputs)


@pytest.mark.parametrize("m", [1, 16, 100])
def test_a_chain_of_layers_reads_what_the_previous_kernel_wrote(m: int) -> None:
    """Kernels start while their predecessors end: quantisation and product take turns, each on the other's fresh result."""
    ws = [moved(cases.weight(1024, 1024, "g128", seed)) for seed in range(4)]
    packed = [qk.pack_weight(w) for w in ws]
    x0 = torch.randn(m, 1024, device="cuda", dtype=torch.float16)

    def chain(step) -> list[torch.Tensor]:
        x, seen = x0, []
        for i in range(24):
            y = step(x, i % 4)
            x = y / y.abs().amax().clamp(min=1e-3)
            seen.append(y)
        return seen

    def slowly(x: torch.Tensor, i: int) -> torch.Tensor:
        a = affine.quantize_per_token_s8(x)
        return product(a.codes, a.scales, ws[i])

    want = chain(slowly)
    for _ in range(10):
        got = chain(lambda x, i: qk.w4a8_gemm(qk.quantize_activations(x), None, packed[i]))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_back_to_back_without_anything_between() -> None:
    """No other kernel separates them: the workspace and its counters pass from one to the next."""
    shapes = [Case(m, n, 2048, "g128") for m, n in ((5, 96), (70, 512), (1, 1024), (200, 256))]
    made = [operands(c, seed=i) for i, c in enumerate(shapes)]
    packed = [qk.pack_weight(w) for w, _, _ in made]
    tiled = [qk.quantize_activations(codes, scales) for _, codes, scales in made]
    want = [product(codes, scales, w) for w, codes, scales in made]
    outs = [torch.empty_like(y) for y in want]
    for _ in range(100):
        for y in outs:
            y.fill_(torch.nan)
        for x, p, y in zip(tiled, packed, outs, strict=True):
            qk.w4a8_gemm(x, None, p, out=y)
        assert all(torch.equal(a, b) for a, b in zip(outs, want, strict=True))


def test_streams_do_not_disturb_each_other() -> None:
    made = [operands(Case(9 + i, 512, 4096, "g128"), seed=i) for i in range(4)]
    packed = [qk.pack_weight(w) for w, _, _ in made]
    want = [product(codes, scales, w) for w, codes, scales in made]
    streams = [torch.cuda.Stream() for _ in made]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[] for _ in made]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(qk.w4a8_gemm(made[i][1], made[i][2], packed[i]))
    torch.cuda.synchronize()
    for got, expected in zip(results, want, strict=True):
        assert all(torch.equal(y, expected) for y in got)


# -- CUDA graphs and torch.compile ----------------------------------------------------------------------------------------


def captured(packed: layout.PackedWeight, x: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of quantisation and product of a static input, and its output."""
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        qk.w4a8_gemm(qk.quantize_activations(x), None, packed)  # compiles and loads
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = qk.w4a8_gemm(qk.quantize_activations(x), None, packed)
    return graph, y


def matmul_of(x: torch.Tensor, w: ProgressiveWeight | Affine) -> torch.Tensor:
    a = affine.quantize_per_token_s8(x)
    return product(a.codes, a.scales, w)


@pytest.mark.parametrize("m", [1, 17, 200])
def test_a_graph_replays_with_changed_inputs(m: int) -> None:
    w = moved(cases.weight(1056, 2080, "g32"))
    packed, x = qk.pack_weight(w), torch.randn(m, 2080, device="cuda", dtype=torch.float16)
    graph, y = captured(packed, x)
    for seed in range(20):
        x.copy_(torch.randn(m, 2080, generator=torch.Generator().manual_seed(seed)))
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, matmul_of(x, w)), seed


def test_two_graphs_and_the_stream_between_them_keep_apart() -> None:
    """Each graph has its own workspace: they may be replayed at the same time, beside ordinary launches."""
    ws = [moved(cases.weight(512, 4096, "g128", seed)) for seed in range(3)]
    packed = [qk.pack_weight(w) for w in ws]
    xs = [torch.randn(12, 4096, device="cuda", dtype=torch.float16) for _ in ws]
    graphs = [captured(p, x) for p, x in zip(packed[:2], xs[:2], strict=True)]
    want = [matmul_of(x, w) for x, w in zip(xs, ws, strict=True)]
    streams = [torch.cuda.Stream() for _ in ws]
    for _ in range(50):
        torch.cuda.synchronize()
        for i in (0, 1):
            with torch.cuda.stream(streams[i]):
                graphs[i][0].replay()
        with torch.cuda.stream(streams[2]):
            third = qk.w4a8_gemm(qk.quantize_activations(xs[2]), None, packed[2])
        torch.cuda.synchronize()
        assert torch.equal(graphs[0][1], want[0])
        assert torch.equal(graphs[1][1], want[1])
        assert torch.equal(third, want[2])


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_torch_compile_in_one_graph(mode: str) -> None:
    w = moved(cases.weight(512, 1024, "g128"))
    packed, bias = qk.pack_weight(w), torch.linspace(-1, 1, 512, device="cuda")

    @torch.compile(fullgraph=True, mode=mode)
    def layer(x: torch.Tensor) -> torch.Tensor:
        return qk.w4a8_gemm(qk.quantize_activations(x * 2), None, packed, bias) + 1

    for m in (1, 16, 33):
        for seed in range(4):
            x = torch.randn(m, 1024, generator=torch.Generator().manual_seed(seed)).half().cuda()
            a = affine.quantize_per_token_s8(x * 2)
            assert torch.equal(layer(x), product(a.codes, a.scales, w, bias) + 1), (m, seed)


def test_the_operators_registrations_are_sound() -> None:
    w, codes, scales = operands(Case(5, 96, 160, "g32"))
    p, x = qk.pack_weight(w), qk.quantize_activations(codes, scales)
    torch.library.opcheck(torch.ops.qoqlab.quantize_activations.default, (codes, scales))
    torch.library.opcheck(
        torch.ops.qoqlab.w4a8_gemm.default,
        (x.tiles, x.tokens, x.m, p.units, p.rows, p.n, p.k, p.group_size, False, None, torch.float16),
    )


# -- arguments ------------------------------------------------------------------------------------------------------------


def test_where_operands_lie_does_not_matter() -> None:
    w, codes, scales = operands(Case(9, 96, 160, "g32"))
    packed, want = qk.pack_weight(w), product(codes, scales, w)
    buffer = torch.zeros(codes.numel() + 1, dtype=torch.int8, device="cuda")
    buffer[1:] = codes.flatten()
    wide = torch.stack([codes, torch.zeros_like(codes)], -1).flatten(1)
    for same in (codes.T.contiguous().T, buffer[1:].view(codes.shape), wide[:, ::2]):
        assert torch.equal(qk.w4a8_gemm(same, scales, packed), want)
    assert torch.equal(qk.w4a8_gemm(codes, torch.stack([scales, scales], -1)[:, 0], packed), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_bias_of_every_dtype(dtype: torch.dtype, kind: torch.dtype) -> None:
    w, codes, scales = operands(Case(9, 96, 160, "channel"))
    bias = torch.linspace(-3, 3, 96).to(kind).cuda()
    y = qk.w4a8_gemm(codes, scales, qk.pack_weight(w), bias, dtype=dtype)
    assert y.dtype == dtype and torch.equal(y, product(codes, scales, w, bias, dtype))


def test_what_does_not_fit_is_refused() -> None:
    w, codes, scales = operands(Case(9, 96, 160, "g32"))
    packed = qk.pack_weight(w)
    out = torch.empty(9, 192, dtype=torch.float16, device="cuda")
    with pytest.raises(ValueError, match="out: must be contiguous"):
        qk.w4a8_gemm(codes, scales, packed, out=out[:, :96])
    with pytest.raises(ValueError, match="packed: on cpu"):
        qk.w4a8_gemm(codes, scales, packed.to("cpu"))
    with pytest.raises(ValueError, match="x_scales: expected fp16"):
        qk.w4a8_gemm(codes, scales.cpu(), packed)
    with pytest.raises(ValueError, match="bias: expected a float"):
        qk.w4a8_gemm(codes, scales, packed, torch.zeros(96))


# -- packing and quantisation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases.FORMATS)
def test_packing_on_the_gpu_gives_the_cpus_bytes(name: str) -> None:
    w = cases.weight(224, 640, name)
    here, there = qk.pack_weight(w), qk.pack_weight(moved(w))
    assert there.units.is_cuda and torch.equal(there.units.cpu(), here.units) and torch.equal(there.rows.cpu(), here.rows)
    back = qk.unpack(there)
    assert all(torch.equal(getattr(back, k).cpu(), v) for k, v in vars(w).items() if isinstance(v, torch.Tensor))


def test_a_wide_layer_is_packed_in_under_a_second() -> None:
    n, k = cases.LAYERS["gate_up"]
    w = cases.weight(n, k, device="cuda")
    qk.pack_weight(cases.weight(64, 128, device="cuda"))
    torch.cuda.synchronize()
    start = time.perf_counter()
    packed = qk.pack_weight(w)
    torch.cuda.synchronize()
    assert time.perf_counter() - start < 1.0
    assert torch.equal(qk.unpack(packed).codes, w.codes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_activations_are_quantised_as_on_the_cpu(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for m, k in [(1, 32), (3, 160), (9, 4096), (257, 14336), (2, cases.WIDEST_K), (64, 1024)]:
        x = torch.randn(m, k, generator=generator) * torch.logspace(-6, 3, m)[:, None]
        x[m // 2] = 0
        x = x.to(dtype)
        a = affine.quantize_per_token_s8(x)
        for same in (x.cuda(), x.cuda().T.contiguous().T):
            got = qk.quantize_activations(same)
            want = layout.tile_activations(a.codes, a.scales)
            assert torch.equal(got.tiles.cpu(), want.tiles), (m, k)
            assert torch.equal(got.tokens.cpu(), want.tokens), (m, k)


def test_int8_codes_are_only_brought_into_order() -> None:
    for m, k in [(1, 32), (17, 160), (100, 4096)]:
        codes, scales = cases.extreme_codes(m, k)
        got, want = qk.quantize_activations(codes.cuda(), scales.cuda()), layout.tile_activations(codes, scales)
        assert torch.equal(got.tiles.cpu(), want.tiles) and torch.equal(got.tokens.cpu(), want.tokens)


# -- the cache of compiled kernels ----------------------------------------------------------------------------------------


def test_compiled_kernels_are_kept_on_disk(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qoqlab_kernels import launch

    monkeypatch.setenv("QOQLAB_CACHE", str(tmp_path))
    constants = (gemm.Form(2, bias=True),)
    _, first = launch.binary(gemm.v3, constants, CAPABILITY)
    assert [path.suffix for path in tmp_path.iterdir()] == [".cubin"]
    monkeypatch.setattr(launch, "to_ltoir", lambda *_: pytest.fail("compiled again"))
    assert launch.binary(gemm.v3, constants, CAPABILITY)[1] == first
    assert os.listdir(tmp_path)
