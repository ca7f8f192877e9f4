"""Decode attention on a GPU: every form against fp64 on the dequantised cache, long contexts, graphs that grow."""

from __future__ import annotations

import pytest
import qoqlab_kernels as qk
import torch
from qoqlab_kernels import attention
from qoqlab_kernels.attention import AttentionPlan
from qoqlab_kernels.kv4 import Form

from qoqlab.kv import quantize_kv4

from .attended import attend, expected, filled
from .gpus import on_a_gpu

pytestmark = on_a_gpu


def check(form: Form, kv_heads: int, lengths: list[int], plan: AttentionPlan | None = None, **options: object) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    plan = plan or attention.attention_plan(form, device)
    found = attend(plan, form, kv_heads, lengths, repeats=3, device="cuda", **options)  # type: ignore[arg-type]
    error = found.pop("error")
    assert found == {"right": True, "kept": True, "repeats": True}, error


@pytest.mark.parametrize("group", [1, 4, 7, 8, 12, 16])
@pytest.mark.parametrize(("dim", "page_size"), [(64, 16), (64, 64), (128, 32), (128, 64), (128, 128)])
def test_forms(dim: int, page_size: int, group: int) -> None:
    check(Form(dim, group, page_size), 3, [1, 0, 63, 64, 65, 1000, 300])


@pytest.mark.parametrize("bulk", [True, False])
def test_ways_to_fetch(bulk: bool) -> None:
    if bulk and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("bulk copies need compute capability 9.0")
    check(Form(128, 4), 8, [1, 100, 5000, 0, 64], AttentionPlan("v4", 4, 2, bulk, 200))


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
@pytest.mark.parametrize(
    ("form", "options"),
    [
        (Form(128, 4, lse=True), {}),
        (Form(128, 4), {"window": 50}),
        (Form(64, 7, 16, True, True), {"softcap": 20.0}),
        (Form(128, 16, 128), {"what": "offset"}),
        (Form(64, 1, 32), {"what": "peaked"}),
    ],
)
def test_the_ladder(version: str, form: Form, options: dict) -> None:
    check(form, 2, [1, 100, 0, 333, 64, 4097], AttentionPlan(version), **options)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("dim", "group", "bfloat"), [(128, 4, False), (64, 7, True), (128, 1, False)])
def test_pages_of_8_and_16_bits(dim: int, group: int, bfloat: bool, bits: int) -> None:
    check(Form(dim, group, 64, bfloat, lse=True, bits=bits), 3, [1, 0, 63, 64, 65, 1000, 5000])


def test_the_override(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, (s,) = filled(Form(128, 4), 2, [1000], device="cuda")
    query = torch.randn(1, 8, 128, device="cuda").half()
    found = []
    for version in ("v1", "v2", "v3", "v4"):
        monkeypatch.setenv(attention.OVERRIDE, version)
        assert attention.attention_plan(Form(128, 4), query.device).version == version
        found.append(qk.kv4_attention(query, cache, 1, [s]).float())
    assert all((y - found[-1]).norm() <= 1e-3 * found[-1].norm() for y in found)


@pytest.mark.parametrize("what", ["normal", "uniform", "offset", "constant", "peaked", "tiny"])
@pytest.mark.parametrize("tokens", [16384, 131072])
def test_long_contexts(tokens: int, what: str) -> None:
    check(Form(128, 4), 2, [tokens, 7], what=what)


@pytest.mark.parametrize("tokens", [1, 64, 1000, 131072])
@pytest.mark.parametrize("softcap", [None, 10.0])
def test_log_sum_exp(tokens: int, softcap: float | None) -> None:
    """Heads that one block has, that many share, and sequences without tokens; a window."""
    form = Form(128, 4, softcap=softcap is not None, lse=True)
    check(form, 2, [tokens, 0, 7, 300], softcap=softcap)
    check(form, 2, [tokens, 0, 7, 300], softcap=softcap, window=100)
    check(form, 2, [tokens % 5000, 0, 7], AttentionPlan("v1"), softcap=softcap)


@pytest.mark.parametrize("bfloat", [False, True])
def test_window_and_softcap(bfloat: bool) -> None:
    check(Form(128, 4, 64, bfloat, True), 2, [3000, 200, 5], window=333, softcap=20.0)


@pytest.mark.parametrize("lengths", [[5000], [64, 1, 0, 1000], [1536] * 16])
def test_pages_fetched_while_a_token_is_appended(lengths: list[int]) -> None:
    """``settled``, behind the kernel that writes the token after those that are attended to, twenty times in a row."""
    room = [length + 1 for length in lengths]
    cache, slots = filled(Form(128, 4), 2, room, device="cuda")
    sequences, past = torch.tensor(slots, dtype=torch.int32, device="cuda"), torch.tensor(lengths, device="cuda").int()
    cache.lengths[:, sequences.long()] = past
    cos = torch.ones(max(room), 64, device="cuda", dtype=torch.float16)
    for _ in range(20):
        qkv = torch.randn(len(lengths), 12 * 128, device="cuda").half()
        query, _ = qk.rope_kv4_append(cache, 1, sequences, qkv, cos, cos * 0, positions=past)
        got = qk.kv4_attention(query, cache, 1, sequences, lse=True, settled=True)
        assert all(map(torch.equal, got, qk.kv4_attention(query, cache, 1, sequences, lse=True)))
    assert got[0][past > 0].isfinite().all() and (got[0][past == 0] == 0).all()


def test_hundreds_of_sequences() -> None:
    check(Form(128, 4), 2, [1 + 7 * i for i in range(300)])


def test_a_graph_sees_lengths_grow() -> None:
    cache = qk.PagedKV4(2, 2, 64, 16, device="cuda", sequences=2)
    sequences = [cache.open(), cache.open()]
    x = torch.randn(2, 2, 70, 64, device="cuda")
    cache.append(1, sequences, x[:, :, :60], -x[:, :, :60])
    query = torch.randn(2, 8, 64, device="cuda").half()
    slots = torch.tensor(sequences, dtype=torch.int32, device="cuda")
    qk.kv4_attention(query, cache, 1, slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = qk.kv4_attention(query, cache, 1, slots)
    for i in range(60, 70):
        cache.append(1, sequences, x[:, :, i : i + 1], -x[:, :, i : i + 1])
        graph.replay()
        want, _ = expected(query, cache, sequences, 0.125, None, None)
        assert (out.double() - want).norm() <= 1e-3 * want.norm()


def test_append_on_the_gpu_is_bit_exact() -> None:
    x = torch.randn(1, 2, 100, 128, device="cuda")
    cache = qk.PagedKV4(1, 2, 128, 4, device="cuda")
    s = cache.open()
    cache.append(0, [s], x, x * 3)
    assert torch.equal(cache.gather(0, s)[1], quantize_kv4(x[0] * 3).dequantize())
