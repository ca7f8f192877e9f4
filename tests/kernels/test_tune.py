"""Which plans are measured, and what becomes of the fastest. The measuring itself needs a GPU."""

import importlib
import json

import pytest
from qoqlab_kernels import cases, gemm, measure, tune
from qoqlab_kernels.layout import blocks
from qoqlab_kernels.plan import Plan, rules

plan = importlib.import_module("qoqlab_kernels.plan")  # whose name the package gives to a function

H200 = (132, 232448)
RTX = (128, 101376)
FORMS = [gemm.Form(groups) for groups in (0, 1, 2, 4)]
SHAPES = [*cases.LAYERS.values(), (96, 416), (32, 32), (320, 53248)]


def candidates(version, m, n, k, form):
    return tune.candidates(version, m, n, k, form, *(H200 if version == "v5" else RTX))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("version", ["v4", "v5"])
@pytest.mark.parametrize("m", [1, 3, 16, 64, 128, 4096])
def test_candidates_hold_the_rules_plan_fit_and_are_useful(version, m, form):
    for n, k in SHAPES:
        found = candidates(version, m, n, k, form)
        assert found[0] == rules(version, m, n, blocks(k, 128), form, (H200 if version == "v5" else RTX)[0])
        assert len(found) == len(set(found)) >= 2 or (n, k) == (32, 32)
        for p in found:
            assert p.version == version
            assert tune.shared_bytes(p, form) <= (H200 if version == "v5" else RTX)[1]
            assert p.stages >= 2
            tiles = p.tiles(m, n)
            assert 1 <= p.workers <= tiles[0] * tiles[1] * blocks(k, 128)  # nobody without work
            assert (tiles[0] - 1) * p.warpgroups * p.cluster < blocks(n, 64)  # no row tile without outputs


@pytest.mark.parametrize("m", [1, 16, 64, 256, 4096])
def test_v5s_candidates_run_at_once_and_have_the_registers_that_they_need(m):
    for n, k in cases.LAYERS.values():
        for p in candidates("v5", m, n, k, gemm.Form(1)):
            program = gemm.VERSIONS["v5"](*p.constants(gemm.Form(1)))
            # two blocks a multiprocessor leave 96 registers a thread: enough up to 64 tokens, not for wider accumulators
            assert program.residents == 1 or p.tokens <= 64
            assert p.warpgroups <= 2 or program.residents == 1
            count, (rows, columns) = p.grid(m, n)[0], p.tiles(m, n)
            assert count <= 132 * program.residents or count == rows * columns * p.cluster


def test_every_kind_of_choice_is_tried():
    few = candidates("v5", 16, 6144, 4096, gemm.Form(1))
    assert {p.cluster for p in few} == {1, 2} and {p.split for p in few} == {1, 2, 4}
    assert {p.tokens for p in few} == {8, 16}
    assert {p.workers * p.cluster > 132 for p in few} == {False, True}  # alone and two to a multiprocessor
    assert {gemm.stages_that_fit(16, 2, 4224), gemm.stages_that_fit(16, 2, 4224, gemm.SHARED_HALF)} <= {
        p.stages for p in few
    }
    assert {p.tokens for p in candidates("v5", 4096, 6144, 4096, gemm.Form(1))} == {128, 256}
    assert {p.stages for p in candidates("v4", 16, 6144, 4096, gemm.Form(1))} >= set(tune.DEPTHS)


def test_deep_plans_of_v4_are_left_out_where_shared_memory_is_small():
    def deepest(limit):
        return max(p.stages for p in tune.candidates("v4", 64, 4096, 4096, gemm.Form(4), 128, limit) if p.tokens == 64)

    assert (deepest(101376), deepest(70000)) == (6, 4)


@pytest.mark.parametrize(
    ("version", "m", "tiles"), [("v5", 1, (8, 16)), ("v5", 9, (8, 16)), ("v5", 999, (128, 256)), ("v4", 99, (32, 64))]
)
def test_token_tiles_hold_the_batch_or_are_one_step_away(version, m, tiles):
    assert tune.token_tiles(version, m) == tiles


def test_worker_counts():
    assert tune.worker_counts(10**6, 896, 132) == (132, 128)  # 7 tiles each
    assert tune.worker_counts(10**6, 32, 132) == (132,)  # whole tiles would leave 100 places empty
    assert tune.worker_counts(5, 1, 132) == (5,)


# -- the best -------------------------------------------------------------------------------------------------------------


def test_the_fastest_wins_and_a_wrong_result_drops_a_plan(monkeypatch, capsys):
    plans = [Plan("v4", tokens, stages=4) for tokens in (8, 16, 32, 64)]
    times = {8: 5.0, 16: 3.0, 32: measure.WrongResult("1 of 9 results are wrong before timing"), 64: RuntimeError("no")}

    def time(p, *_):
        if isinstance(times[p.tokens], Exception):
            raise times[p.tokens]
        return times[p.tokens]

    monkeypatch.setattr(tune.bench, "time_plan", time)
    assert tune.best_of(plans, gemm.Form(1), None, 1, 1.0) == (plans[1], 3.0, 5.0)
    assert capsys.readouterr().out.count("DROPPED") == 2
    assert tune.best_of(plans[2:], gemm.Form(1), None, 1, 1.0) is None


def test_what_is_shipped_is_what_the_package_reads(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    name = plan.key("NVIDIA H200", 16, 4096, 4096, 1)
    chosen = Plan("v5", 16, 2, 10, 2, 66)
    path.write_text(json.dumps({"other": {"version": "v4"}, name: {"version": "v4"}}), encoding="utf-8")
    tune.ship(path, {name: chosen})
    assert list(json.loads(path.read_text(encoding="utf-8"))) == sorted(["other", name])
    monkeypatch.setattr(plan, "SHIPPED", path)
    monkeypatch.setenv("QOQLAB_CACHE", str(tmp_path / "none"))
    monkeypatch.delenv(plan.OVERRIDE, raising=False)
    plan.tuned.cache_clear()
    try:
        assert plan.plan_for(13, 4096, 4096, gemm.Form(1), (9, 0), 132, "NVIDIA H200") == chosen
    finally:
        plan.tuned.cache_clear()


def test_a_shipped_table_that_exists_names_real_plans():
    if not plan.SHIPPED.is_file():
        pytest.skip("no table has been measured yet")
    for entry in json.loads(plan.SHIPPED.read_text(encoding="utf-8")).values():
        Plan(**entry)


# -- command line ---------------------------------------------------------------------------------------------------------


def test_the_command_line(tmp_path):
    options = tune.parse(["--m", "1,64", "--groups", "channel", "--budget", "30", "--ship", str(tmp_path / "t.json")])
    assert options == tune.Options(cases.LAYERS, (1, 64), ("channel",), 30.0, tmp_path / "t.json")
    assert tune.parse(["--ship"]).ship == plan.SHIPPED
    assert tune.parse([]).ship is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--m", "48"], "--m: 48 is not a power of two"),
        (["--m", "-1"], "--m"),
        (["--groups", "all"], "--groups: 'all' is not one of"),
        (["--budget", "nan"], "--budget: nan is not a positive number of seconds"),
    ],
)
def test_wrong_options_exit_with_2_and_say_why(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        tune.parse(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_plan_in_a_few_characters():
    assert tune.describe(Plan("v5", 16, 2, 10, 2, 66)) == "v5 t16 s10 c2 w66"
    assert tune.describe(Plan("v5", 16, 2, 10, 2, 66, overlap=False)).endswith("alone")


def test_kernels_are_compiled_ahead_in_other_processes_and_failures_named(tmp_path, monkeypatch):
    from qoqlab_kernels import ptx

    pytest.importorskip("cuda.core", reason="needs numba-cuda's offline compilers")
    if ptx.SIMULATED:
        pytest.skip("the simulator compiles nothing")
    monkeypatch.setenv("QOQLAB_CACHE", str(tmp_path))
    form, good, bad = gemm.Form(1), Plan("v4", 8, stages=2), Plan("v5", 8, 2, 2)  # an A100 has none of v5's instructions
    found = measure.compile_ahead([(good, form), (bad, form), (good, form)], (8, 0), 2)
    assert list(found) == [("v5", bad.constants(form))]
    assert all(found.values())
    assert len(list(tmp_path.glob("v4-*.cubin"))) == 1
