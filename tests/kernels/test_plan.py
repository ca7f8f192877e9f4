"""The choice of version and sizes: rules that fit every problem, the tuned table over them, the override, the errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qoqlab_kernels import emulation, gemm
from qoqlab_kernels import plan as exported
from qoqlab_kernels.cases import BATCHES, LAYERS
from qoqlab_kernels.gemm import SHARED_HALF, SHARED_LIMIT, Form, Ring, stages_that_fit
from qoqlab_kernels.layout import MAX_K
from qoqlab_kernels.plan import SHIPPED, TOKENS, Plan, forget, key, plan_for, remember, rules, tuned, version_for

#: Shared memory of one block: GeForce of 8.6 and 8.9 have the least.
SHARED_LIMIT_SM89 = 99 * 1024

PROBLEMS = {
    "m": st.one_of(st.integers(1, 600), st.integers(1, 1 << 20)),
    "n": st.integers(1, 2048).map(lambda i: 32 * i),
    "k": st.integers(1, MAX_K // 32).map(lambda i: 32 * i),
    "groups": st.sampled_from([0, 1, 2, 4]),
    "processors": st.integers(1, 200),
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of this test's own."""
    monkeypatch.setenv("QOQLAB_CACHE", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache"
    forget()


def plain(function):
    """The Python behind a device function."""
    return getattr(function, "py_func", function)


# -- rules ----------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(**PROBLEMS)
def test_hopper_rules_fit(m: int, n: int, k: int, groups: int, processors: int) -> None:
    form, k_blocks = Form(groups), -(-k // 128)
    p = rules("v5", m, n, k_blocks, form, processors)
    ring = Ring(p.tokens, p.warpgroups, form.unit, p.stages, p.split)
    assert p.stages >= 2 and ring.total <= SHARED_LIMIT
    assert ring.total <= SHARED_HALF or p.tokens > 64 or m > 64 or p.split == 4
    rows, columns = p.tiles(m, n)
    height = 64 * p.warpgroups * p.cluster
    assert (rows - 1) * height < n <= rows * height
    assert (columns - 1) * p.tokens < m <= columns * p.tokens
    assert 1 <= p.workers <= rows * columns * k_blocks
    places = 2 * processors if p.tokens <= 64 else max(processors, p.cluster)
    count = rows * columns * p.split if p.split > 1 else p.workers * p.cluster
    assert p.grid(m, n) == (count, 1, 1) and count <= places
    assert p.split <= k_blocks  # every block of a cluster has inputs
    assert p.tokens >= min(m, 64) and (p.tokens == 8 or p.tokens < 2 * m)
    assert p.tokens % p.cluster == 0 and p.tokens // p.cluster % 8 == 0  # blocks fetch whole groups of 8 tokens


@settings(deadline=None, max_examples=100)
@given(**PROBLEMS)
def test_ampere_rules_fit(m: int, n: int, k: int, groups: int, processors: int) -> None:
    k_blocks = -(-k // 128)
    p = rules("v4", m, n, k_blocks, Form(groups), processors)
    rows, columns = p.tiles(m, n)
    assert (rows - 1) * 64 < n <= rows * 64
    assert (columns - 1) * p.tokens < m <= columns * p.tokens
    assert 1 <= p.workers <= rows * columns * k_blocks
    assert p.cluster == p.warpgroups == 1


@pytest.mark.parametrize("tokens", TOKENS["v4"])
@pytest.mark.parametrize("groups", [0, 1, 2, 4])
def test_ampere_tiles_fit_in_the_smallest_shared_memory(tokens: int, groups: int) -> None:
    p = rules("v4", tokens, 4096, 32, Form(groups), 108)
    assert p.tokens == tokens
    assert gemm.VERSIONS["v4"](*p.constants(Form(groups))).shared <= SHARED_LIMIT_SM89


@pytest.mark.parametrize("tokens", TOKENS["v5"])
@pytest.mark.parametrize("warpgroups", [1, 2, 3])
@pytest.mark.parametrize("limit", [SHARED_LIMIT, SHARED_HALF])
def test_stages_fill_shared_memory_but_for_one(tokens: int, warpgroups: int, limit: int) -> None:
    for groups in (0, 1, 2, 4):
        unit = Form(groups).unit
        stages = stages_that_fit(tokens, warpgroups, unit, limit)
        assert Ring(tokens, warpgroups, unit, stages).total <= limit < Ring(tokens, warpgroups, unit, stages + 1).total


def test_the_ring_does_not_overlap() -> None:
    for tokens in TOKENS["v5"]:
        ring = Ring(tokens, 2, Form(4).unit, 3)
        assert ring.weights == 3 * tokens * 128 and ring.weights % 128 == 0
        assert ring.constants - ring.weights == 3 * 2 * Form(4).unit
        assert ring.out - ring.constants == 3 * tokens * 8
        assert ring.barriers - ring.out == 2 * 2 * min(tokens, 32) * 128
        assert all(offset % 16 == 0 for offset in (ring.weights, ring.constants, ring.out, ring.barriers))


def test_the_older_versions_launch_what_covers_the_problem() -> None:
    """Tokens along the axis that may have 2**31 blocks; the others end at 65535."""
    assert Plan("v1").grid(5, 96) == Plan("v3").grid(5, 96) == (5, 2, 1)
    assert Plan("v2").grid(17, 96) == (6, 2, 1)
    assert rules("v3", 5, 96, 2, Form(1), 108) == Plan("v3")


# -- stream-K -------------------------------------------------------------------------------------------------------------


@mock.patch.object(gemm.ptx, "quotient", emulation.quotient)  # the instruction itself runs on GPUs only
@settings(deadline=None, max_examples=100)
@given(tiles=st.integers(1, 40), k_blocks=st.integers(1, 30), data=st.data())
def test_workers_divide_the_work(tiles: int, k_blocks: int, data: st.DataObject) -> None:
    """Runs follow each other without gap, differ by one unit at most, and meet other workers only in their last tile, which
    they begin with, and their first."""
    total = tiles * k_blocks
    workers = data.draw(st.integers(1, total))
    first, owner, last_segment = plain(gemm.first_unit), plain(gemm.worker_of), plain(gemm.last_segment)
    quotient, remainder = map(np.uint32, divmod(total, workers))
    starts = [int(first(np.uint32(w), quotient, remainder)) for w in range(workers + 1)]
    assert starts[0] == 0 and starts[-1] == total
    lengths = np.diff(starts)
    assert lengths.min() >= 1 and lengths.max() - lengths.min() <= 1
    for w in range(workers):
        parts, unit, end = [], starts[w], starts[w + 1]
        while unit < end:
            tile, k, stop = (int(v) for v in last_segment(np.uint32(unit), np.uint32(end), np.uint32(k_blocks)))
            assert 0 <= k < stop <= k_blocks and tile * k_blocks + stop == end
            parts.append((k, stop))
            end -= stop - k
        assert unit == end
        # given away: at most the first to be computed; completed with what others gave: at most the last
        assert all(stop == k_blocks for _, stop in parts[1:]) and all(k == 0 for k, _ in parts[:-1])
    for unit in {0, total - 1, *starts[1:-1], *(s - 1 for s in starts[1:-1])}:
        w = int(owner(np.uint32(unit), quotient, remainder))
        assert starts[w] <= unit < starts[w + 1]


# -- versions -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "version"),
    [((8, 0), "v4"), ((8, 6), "v4"), ((8, 9), "v4"), ((9, 0), "v5"), ((10, 0), "v4"), ((12, 0), "v4")],
)
def test_every_gpu_gets_its_version(capability: tuple, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QOQLAB_KERNEL", raising=False)
    assert version_for(capability) == version


@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v4"])
def test_the_override(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QOQLAB_KERNEL", version)
    assert version_for((8, 9)) == version_for((9, 0)) == version


@pytest.mark.parametrize(
    ("capability", "override", "error", "message"),
    [
        ((7, 5), None, RuntimeError, "GPU: compute capability 7.5; the kernels need 8.0"),
        ((7, 0), "v1", RuntimeError, "GPU: compute capability 7.0"),
        ((9, 0), "v6", ValueError, "QOQLAB_KERNEL: 'v6' is not one of v1, v2, v3, v4, v5"),
        ((9, 0), "", ValueError, "QOQLAB_KERNEL: '' is not one of"),
        ((8, 9), "v5", ValueError, r"QOQLAB_KERNEL: v5 needs compute capability 9.0 \(Hopper\), this GPU has 8.9"),
        ((10, 0), "v5", ValueError, "QOQLAB_KERNEL: v5 needs compute capability 9.0"),
    ],
)
def test_what_a_gpu_cannot_run(
    capability: tuple, override: str | None, error: type, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QOQLAB_KERNEL", raising=False)
    if override is not None:
        monkeypatch.setenv("QOQLAB_KERNEL", override)
    with pytest.raises(error, match=message):
        version_for(capability)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"version": "v9"}, "version: 'v9' is not one of v1, v2, v3, v4, v5"),
        ({"version": "v4", "tokens": 128}, r"tokens: 128 is not one of \(8, 16, 32, 64\) \(v4\)"),
        ({"version": "v5", "tokens": 24}, r"tokens: 24 is not one of .* \(v5\)"),
        ({"version": "v4", "stages": 1}, r"stages: 1; a ring has at least 2 \(v4\)"),
        (
            {"version": "v5", "tokens": 128, "stages": 2},
            r"warpgroups: 1; tiles of 128 tokens have registers for \(2, 3\)",
        ),
        ({"version": "v5", "stages": 2, "workers": 0}, "plan: workers, cluster and warpgroups are at least 1"),
        ({"version": "v5", "stages": 2, "cluster": 0}, "plan: workers, cluster and warpgroups are at least 1"),
    ],
)
def test_plans_that_cannot_be(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(**values)


# -- the tuned table ------------------------------------------------------------------------------------------------------


def test_names_of_tuned_points() -> None:
    assert key("H", 1, 4096, 14336, 1) == key("H", 8, 4096, 14336, 1) == "H|m8|4096x14336|g128"
    assert key("H", 17, 4096, 4096, 4) == "H|m32|4096x4096|g32"
    assert key("H", 64, 4096, 4096, 0) == "H|m64|4096x4096|channel"
    assert key("H", 65, 64, 32, 2) == "H|m128|64x32|g64"


TABLE = json.loads(SHIPPED.read_text(encoding="utf-8"))


@pytest.mark.parametrize("groups", [0, 1, 2, 4])
@pytest.mark.parametrize("name", TABLE)
def test_shipped_plans_fit_every_grouping(name: str, groups: int, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QOQLAB_KERNEL", raising=False)
    gpu, m, shape, form = name.split("|")
    n, k = map(int, shape.split("x"))
    assert (gpu, form) == ("sm_90ax132", "g128")
    p = plan_for(int(m[1:]), n, k, Form(groups), (9, 0), 132, gpu)
    measured = Plan(**TABLE[name])
    assert p == (measured if groups == 1 else dataclasses.replace(measured, stages=p.stages))
    program = gemm.VERSIONS["v5"](*p.constants(Form(groups)))
    assert 2 <= p.stages <= measured.stages and program.shared <= SHARED_LIMIT
    at_once = gemm.VERSIONS["v5"](*measured.constants(Form(1))).residents
    assert program.residents == at_once and p.split <= k // 128


def test_splits_that_cannot_work_are_refused() -> None:
    for split in (0, 3, 16):
        with pytest.raises(ValueError, match=f"split: {split}; 1, 2, 4 or 8 blocks"):
            Plan("v5", 16, 2, 4, split=split)
    with pytest.raises(ValueError, match="without a cluster of another kind"):
        Plan("v5", 16, 2, 4, 2, split=2)
    with pytest.raises(ValueError, match="split: 2; 1, 2, 4 or 8 blocks, only in v5"):
        Plan("v4", 16, 1, 4, split=2)


def test_tuned_points_come_before_rules(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QOQLAB_KERNEL", raising=False)
    arguments = (20, 4096, 4096, Form(1), (9, 0), 132, "a GPU of this test")
    ruled = plan_for(*arguments)
    assert ruled == rules("v5", 20, 4096, 32, Form(1), 132)
    measured = Plan("v5", 64, 1, 3, 1, 77, False)
    remember(key(arguments[-1], 20, 4096, 4096, 1), measured)
    assert plan_for(*arguments) == measured != ruled
    assert plan_for(32, *arguments[1:]) == measured  # the same power of two
    assert plan_for(33, *arguments[1:]) == rules("v5", 33, 4096, 32, Form(1), 132)
    assert plan_for(*arguments[:-1], "another GPU") == ruled
    other = plan_for(*arguments[:3], Form(4), *arguments[4:])
    assert (other.tokens, other.workers) == (64, 77), "other groups take the plan of groups of 128"
    monkeypatch.setenv("QOQLAB_KERNEL", "v4")  # a tuned point of another version is no answer
    assert plan_for(*arguments) == rules("v4", 20, 4096, 32, Form(1), 132)


def test_remembering_keeps_what_was_there_and_leaves_no_traces(cache: Path) -> None:
    one, two = Plan("v5", 16, 2, 4, 1, 132), Plan("v4", 8, 1, 4, 1, 12)
    remember("a", one)
    remember("b", two)
    remember("a", two)
    table = json.loads((cache / "tuned.json").read_text(encoding="utf-8"))
    assert {name: Plan(**values) for name, values in table.items()} == {"a": two, "b": two}
    assert [path.name for path in cache.iterdir()] == ["tuned.json"]
    assert Plan(**tuned()["a"]) == two


def test_a_half_written_table_is_never_seen(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If writing fails the old table stays."""
    remember("a", Plan("v5", 16, 2, 4, 1, 132))
    before = (cache / "tuned.json").read_text(encoding="utf-8")

    def fail(self: Path, *_: object, **__: object) -> int:
        with self.open("w", encoding="utf-8") as file:
            file.write("{")
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        remember("b", Plan("v4", 8, 1, 4))
    assert (cache / "tuned.json").read_text(encoding="utf-8") == before


def test_the_shipped_table_holds_plans_that_fit() -> None:
    from qoqlab_kernels.plan import SHIPPED

    table = json.loads(SHIPPED.read_text(encoding="utf-8")) if SHIPPED.is_file() else {}
    for name, values in table.items():
        p, kind = Plan(**values), name.rsplit("|", 1)[1]
        form = Form(0 if kind == "channel" else 128 // int(kind[1:]))
        assert gemm.VERSIONS[p.version](*p.constants(form)).shared <= SHARED_LIMIT, name


@pytest.mark.parametrize("layer", LAYERS)
def test_measured_layers_fill_an_h200(layer: str) -> None:
    n, k = LAYERS[layer]
    for m in BATCHES:
        p = rules("v5", m, n, k // 128, Form(1), 132)
        count = p.grid(m, n)[0]
        assert 96 <= count <= 264, m
        assert count <= 132 or p.tokens <= 64, m  # two to a multiprocessor


def test_the_package_exports_the_function() -> None:
    assert callable(exported)
