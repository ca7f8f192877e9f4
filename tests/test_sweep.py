"""Studies over settings: what is computed, what is recorded, what a kill leaves."""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock, call

import pandas as pd
import pytest
import torch

import qoqlab
from qoqlab.sweeps import Backend, _as_done, canonical, points, sweep

GRID = {"x": [1, 2, 3], "y": [10, 20]}


def product(x, y):
    return {"product": x * y, "process": os.getpid()}


def counting(folder: Path):
    """A function that leaves one file per call, and the calls so far."""

    def function(x, y):
        (folder / f"{x}-{y}-{time.monotonic_ns()}").touch()
        if x == 2 and y == 20 and not (folder / "mended").exists():
            raise ArithmeticError("two by twenty\nand more")
        return x * y

    def calls() -> list[str]:
        return sorted(path.name.rpartition("-")[0] for path in folder.iterdir() if "-" in path.name)

    return function, calls


# --- what is computed -----------------------------------------------------------------------------------------------------


def test_the_public_name_is_the_function() -> None:
    import qoqlab.sweeps  # importing the module must not hide the function

    assert qoqlab.sweep is sweep


def test_a_grid_in_this_process() -> None:
    table = sweep(GRID, product, jobs=1, progress=False)
    assert table["product"].tolist() == [10, 20, 20, 40, 30, 60]
    assert table[["x", "y"]].to_numpy().tolist() == [[1, 10], [1, 20], [2, 10], [2, 20], [3, 10], [3, 20]]
    assert set(table.process) == {os.getpid()}
    assert list(table.columns) == ["x", "y", "product", "process", "seconds", "error", "traceback"]
    assert (table.seconds >= 0).all() and [*table.error, *table.traceback] == [None] * 12


def test_a_list_of_settings_with_different_names() -> None:
    table = sweep([{"x": 1}, {"y": 2.5}], lambda x=0, y=0: x + y, jobs=1, progress=False)
    assert table.result.tolist() == [1, 2.5]
    assert table.x.isna().tolist() == [False, True]


def test_processes_of_this_machine_give_the_same() -> None:
    here = os.getpid()

    def slow(x, y):
        time.sleep(0.05)
        return {"product": x * y, "process": os.getpid()}

    table = sweep(GRID, slow, jobs=2, progress=False)
    assert table["product"].tolist() == [10, 20, 20, 40, 30, 60]
    assert here not in set(table.process) and len(set(table.process)) == 2


def test_a_real_study() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))

    def error(group_size):
        rounded = qoqlab.progressive.quantize(weight, group_size=group_size).dequantize()
        return {"mse": (rounded - weight).square().mean()}

    table = sweep({"group_size": [32, 64, 128]}, error, jobs=1, progress=False)
    assert table.error.tolist() == [None] * 3 and table.mse.is_monotonic_increasing


def test_numpy_numbers_are_settings_and_results() -> None:
    import numpy as np

    table = sweep({"x": np.arange(3)}, lambda x: np.float32(x) / 2, jobs=1, progress=False)
    assert table.result.tolist() == [0, 0.5, 1] and list(points({"x": np.arange(1)})) == ['{"x":0}']


def test_nothing_to_do_is_an_empty_table() -> None:
    table = sweep({"x": []}, product, progress=False)
    assert len(table) == 0 and list(table.columns) == ["seconds", "error", "traceback"]


def test_the_bar_counts_points(capsys: pytest.CaptureFixture[str]) -> None:
    sweep(GRID, product, jobs=1)
    assert "6/6" in capsys.readouterr().err


# --- failures -------------------------------------------------------------------------------------------------------------


def test_a_failure_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    function, calls = counting(tmp_path)
    table = sweep(GRID, function, jobs=2, progress=False)
    failed = table[table.error.notna()]
    assert failed[["x", "y"]].to_numpy().tolist() == [[2, 20]]
    assert failed.error.item() == "ArithmeticError: two by twenty"
    # no source line: cloudpickle 3.1.3 and later ship a function without the name of its file
    assert "in function" in failed.traceback.item() and "ArithmeticError: two by twenty" in failed.traceback.item()
    assert table.result.dropna().tolist() == [10, 20, 20, 30, 60] and len(calls()) == 6


@pytest.mark.parametrize("value", [{"x": 1}, {"error": 1}, {"a": object()}, {"a": torch.zeros(2)}, {1, 2}])
def test_results_that_no_row_can_hold_are_failures(value: object) -> None:
    table = sweep({"x": [1]}, lambda x: value, jobs=1, progress=False)
    assert table.error.notna().all()


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_point_that_exits_is_a_failed_point(jobs: int, tmp_path: Path) -> None:
    """A script's own way to give up, such as argparse's, ends neither the study nor its processes."""

    def function(x):
        if x == 2:
            sys.exit("no such GPU")
        return os.getpid()

    out = tmp_path / "study.jsonl"
    table = sweep({"x": [1, 2, 3]}, function, out=out, jobs=jobs, progress=False)
    assert table.error.tolist() == [None, "SystemExit: no such GPU", None]
    assert "in function" in table.traceback[1] and table.result.notna().tolist() == [True, False, True]
    assert len(out.read_text().splitlines()) == 3


def test_an_interrupt_ends_the_study(tmp_path: Path) -> None:
    def function(x):
        if x == 2:
            raise KeyboardInterrupt
        return x

    with pytest.raises(KeyboardInterrupt):
        sweep({"x": [1, 2, 3]}, function, out=tmp_path / "study.jsonl", jobs=1, progress=False)
    assert len((tmp_path / "study.jsonl").read_text().splitlines()) == 1


def dying(folder: Path):
    """A function whose point 3 ends its process until mended, and the points called so far."""

    def function(x):
        (folder / f"{x}-{time.monotonic_ns()}").touch()
        if x == 3 and not (folder / "mended").exists():
            os._exit(3)
        time.sleep(0.2)  # neighbours are at work when the pool breaks
        return {"square": x * x, "process": os.getpid()}

    def calls() -> list[int]:
        return sorted(int(path.name.partition("-")[0]) for path in folder.iterdir() if "-" in path.name)

    return function, calls


def test_a_point_that_ends_its_process_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "calls").mkdir()
    function, calls = dying(tmp_path / "calls")
    out = tmp_path / "study.jsonl"
    table = sweep({"x": [1, 2, 3, 4, 5]}, function, out=out, jobs=2, progress=False)
    assert table.square.dropna().tolist() == [1, 4, 16, 25] and table.error.notna().tolist() == [x == 3 for x in table.x]
    assert table.error[2].startswith("RuntimeError: the worker process of this point died (EXIT(3)): it was killed")
    assert "TerminatedWorkerError" in table.traceback[2] and table.seconds[2] > 0
    assert sorted(json.loads(line)["settings"]["x"] for line in out.read_text().splitlines()) == [1, 2, 3, 4, 5]
    before = calls()
    # again, dying: not in this process, though one point is left
    assert sweep({"x": [1, 2, 3, 4, 5]}, function, out=out, jobs=2, progress=False).error.notna().sum() == 1
    assert calls() == sorted([*before, 3])
    (tmp_path / "calls" / "mended").touch()
    table = sweep({"x": [1, 2, 3, 4, 5]}, function, out=out, jobs=2, progress=False)
    assert table.square.tolist() == [1, 4, 9, 16, 25] and table.error.tolist() == [None] * 5
    assert calls() == sorted([*before, 3, 3])


def test_finished_points_are_not_repeated_when_a_worker_dies(tmp_path: Path) -> None:
    def function(x):
        (tmp_path / f"{x}-{time.monotonic_ns()}").touch()
        if x == 3:
            while not (list(tmp_path.glob("1-*")) and list(tmp_path.glob("2-*"))):
                time.sleep(0.05)
            time.sleep(1)  # until their results have arrived
            os.kill(os.getpid(), signal.SIGKILL)
        return x

    table = sweep({"x": [1, 2, 3]}, function, jobs=2, progress=False)
    assert table.result.dropna().tolist() == [1, 2] and "died (SIGKILL(-9))" in table.error[2]
    assert len(list(tmp_path.glob("1-*"))) == len(list(tmp_path.glob("2-*"))) == 1
    assert len(list(tmp_path.glob("3-*"))) == 2  # in the pool, and by itself


# --- the file -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["study.jsonl", "study.parquet"])
def test_finished_points_are_not_computed_again(name: str, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / "calls").mkdir()
    function, calls = counting(tmp_path / "calls")
    out = tmp_path / name
    sweep({"x": [1, 2], "y": [10, 20]}, function, out=out, jobs=1, progress=False)
    assert calls() == ["1-10", "1-20", "2-10", "2-20"]
    (tmp_path / "calls" / "mended").touch()
    table = sweep(GRID, function, out=out, jobs=1, progress=False)
    # the failed point again, and the new ones
    assert calls() == ["1-10", "1-20", "2-10", "2-20", "2-20", "3-10", "3-20"]
    assert table.result.tolist() == [10, 20, 20, 40, 30, 60] and table.error.tolist() == [None] * 6
    again = sweep(GRID, function, out=out, jobs=2, progress=False)
    pd.testing.assert_frame_equal(again, table)
    assert len(calls()) == 7


def test_a_line_cut_in_half_is_dropped_with_a_note(tmp_path: Path) -> None:
    out = tmp_path / "study.jsonl"
    complete = sweep(GRID, product, out=out, jobs=1, progress=False)
    whole = out.read_bytes()
    for cut in (1, 30):
        out.write_bytes(whole[:-cut])
        with pytest.warns(UserWarning, match=r"study\.jsonl: the last line was cut off"):
            table = sweep(GRID, product, out=out, jobs=1, progress=False)
        assert table["product"].tolist() == complete["product"].tolist()
        assert [json.loads(line)["settings"]["x"] for line in out.read_text().splitlines()] == [1, 1, 2, 2, 3, 3]
    out.write_bytes(whole[:20])  # not even one whole line
    with pytest.warns(UserWarning, match="cut off"):
        sweep(GRID, product, out=out, jobs=1, progress=False)
    assert len(out.read_text().splitlines()) == 6


def test_infinite_and_missing_numbers_survive_the_file(tmp_path: Path) -> None:
    values = {1: float("inf"), 2: float("nan"), 3: None}
    for _ in range(2):
        table = sweep({"x": [1, 2, 3]}, lambda x: {"a": values[x]}, out=tmp_path / "s.jsonl", jobs=1, progress=False)
        assert table.a.tolist()[0] == float("inf") and table.a.isna().tolist() == [False, True, True]


@pytest.mark.parametrize("name", ["s.jsonl", "s.parquet"])
def test_a_study_that_continues_gives_the_table_of_one_that_does_not(name: str, tmp_path: Path) -> None:
    """JSON has no tuples: settings come back as they were passed, results are lists with a file or without."""
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    grid = {"shape": [(2, 3), (4, (5, 6))], "x": [1, 2.5]}

    def function(shape, x):
        assert isinstance(shape, tuple)
        return {"pair": (x, shape), "count": {1: x}}

    tables = [sweep(grid, function, out=out, jobs=1, progress=False) for out in (None, tmp_path / name, tmp_path / name)]
    for table in tables:
        assert table["shape"].tolist() == [(2, 3), (2, 3), (4, (5, 6)), (4, (5, 6))]
        assert table["pair"].tolist()[:2] == [[1, [2, 3]], [2.5, [2, 3]]] and table["count"].tolist()[0] == {"1": 1}
    pd.testing.assert_frame_equal(tables[1], tables[2])
    assert sweep({"shape": [[2, 3]], "x": [1]}, function, out=tmp_path / name, jobs=1, progress=False).error.item() is None


class Adder:
    def __init__(self, more):
        self.more = more

    def __call__(self, x, y):
        return x + y + self.more


@pytest.mark.parametrize("name", ["s.jsonl", "s.parquet"])
def test_a_file_belongs_to_one_function(name: str, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    out = tmp_path / name
    run = functools.partial(sweep, GRID, out=out, jobs=1, progress=False)
    run(product)
    before = out.read_bytes()
    for other in (counting, lambda x, y: 0, Adder(3), functools.partial(counting)):
        with pytest.raises(
            ValueError, match=rf"out: .*{name} holds points of the function .*:product, not of .*; choose an"
        ):
            run(other)
    assert out.read_bytes() == before
    assert run(functools.partial(functools.partial(product)))["product"].tolist() == [10, 20, 20, 40, 30, 60]
    out.unlink()
    assert run(Adder(1)).result.tolist() == run(Adder(1)).result.tolist() == [12, 22, 13, 23, 14, 24]


def test_a_file_follows_its_script_and_files_without_a_function_still_load(tmp_path: Path) -> None:
    out = tmp_path / "s.jsonl"
    sweep(GRID, product, out=out, jobs=1, progress=False)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["function"] for row in rows} == {f"{__name__}:product"}
    for change in ({"function": "__main__:product"}, {}):  # run as a script; written before functions were noted
        kept = [{key: value for key, value in row.items() if key != "function"} | change for row in rows]
        out.write_text("".join(json.dumps(row) + "\n" for row in kept))
        table = sweep(GRID, product, out=out, jobs=1, progress=False)
        assert table["product"].tolist() == [10, 20, 20, 40, 30, 60] and len(out.read_text().splitlines()) == 6
    out.write_text("".join(json.dumps(row | {"function": "elsewhere:product"}) + "\n" for row in rows))
    with pytest.raises(ValueError, match="holds points of the function elsewhere:product"):
        sweep(GRID, product, out=out, jobs=1, progress=False)


def test_parquet_has_a_column_per_setting_and_result(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    out = tmp_path / "study.parquet"
    sweep({"x": [1, "a"]}, lambda x: {"r": 2.5, "l": [1, 2]}, out=out, jobs=1, progress=False)
    table = pd.read_parquet(out)
    assert table.x.tolist() == ["1", '"a"'] and table.r.tolist() == [2.5, 2.5] and table.l.tolist() == ["[1, 2]"] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["study.parquet"]


@pytest.mark.parametrize("content", ["{}\n", "[1]\n", '{"settings": 3}\n', "x\n", "\n"])
def test_other_files_are_refused_and_left_alone(content: str, tmp_path: Path) -> None:
    out = tmp_path / "other.jsonl"
    out.write_text(content)
    with pytest.raises(ValueError, match=r"out: .*other\.jsonl: line 1 is not a record that sweep wrote"):
        sweep(GRID, product, out=out, progress=False)
    assert out.read_text() == content


def test_a_parquet_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    out = tmp_path / "other.parquet"
    pd.DataFrame({"a": [1]}).to_parquet(out)
    with pytest.raises(ValueError, match=r"out: .*other\.parquet is not a file that sweep wrote"):
        sweep(GRID, product, out=out, progress=False)


STUDY = """
import sys, time
from pathlib import Path
from qoqlab import sweep

def slow(x):
    (Path(sys.argv[1]) / f"call-{x}-{time.monotonic_ns()}").touch()
    time.sleep(0.2)
    return x * x

if __name__ == "__main__":
    table = sweep({"x": list(range(8))}, slow, out=sys.argv[1] + "/study.jsonl", jobs=1, progress=False)
    print(table.result.tolist())
"""


def test_a_study_that_is_killed_continues(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STUDY, str(tmp_path)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    out, deadline = tmp_path / "study.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and not (out.exists() and len(out.read_bytes().splitlines()) >= 3):
        time.sleep(0.02)
    first.kill()
    first.wait()
    finished = [
        json.loads(line)["settings"]["x"] for line in out.read_bytes().splitlines(keepends=True) if line[-1:] == b"\n"
    ]
    assert 3 <= len(finished) < 8
    second = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert second.stdout.strip() == str([x * x for x in range(8)])
    calls = [path.name.split("-")[1] for path in tmp_path.glob("call-*")]
    assert all(calls.count(str(x)) == 1 for x in finished) and len(calls) <= 9  # at most the point in work twice


# --- clusters -------------------------------------------------------------------------------------------------------------


def test_dask_with_two_workers(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed", reason="Dask is not installed")

    def study(x, y):
        time.sleep(0.1)
        if (x, y) == (2, 20):
            raise ArithmeticError("on a worker")
        return {"product": x * y, "process": os.getpid()}

    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster:
        out = tmp_path / "study.jsonl"
        table = sweep(GRID, study, "dask", cluster.scheduler_address, out=out, progress=False)
        assert table["product"].dropna().tolist() == [10, 20, 20, 30, 60]
        workers = set(table.process.dropna())
        assert len(workers) == 2 and os.getpid() not in workers
        assert table.error.dropna().tolist() == ["ArithmeticError: on a worker"]
        assert len(out.read_text().splitlines()) == 6
        with distributed.Client(cluster.scheduler_address):  # the active client is found without an address
            again = sweep(GRID, product, Backend.DASK, progress=False)
        assert again["product"].tolist() == [10, 20, 20, 40, 30, 60] and set(again.process) == workers


@pytest.mark.parametrize("workers", [1, 2])  # with one, the others always wait beside the point that kills it
def test_dask_with_a_point_that_ends_its_workers(workers: int, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed", reason="Dask is not installed")
    (tmp_path / "calls").mkdir()
    function, calls = dying(tmp_path / "calls")
    options = {"n_workers": workers, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    # 15 s after a worker's death a LocalCluster looks whether there is another, and gives it up if that has just died, too
    patient = pytest.importorskip("dask").config.set({"distributed.deploy.lost-worker-timeout": "1 hour"})
    with patient, distributed.LocalCluster(**options, silence_logs=logging.CRITICAL) as cluster:
        study = functools.partial(
            sweep, {"x": [2, 3, 4]}, function, "dask", cluster.scheduler_address, tmp_path / "study.jsonl", progress=False
        )
        table = study()
        assert table.square.dropna().tolist() == [4, 16] and table.error.notna().tolist() == [False, True, False]
        assert "KilledWorker: Attempted to run task" in table.error[1] and "KilledWorker" in table.traceback[1]
        before = calls()
        (tmp_path / "calls" / "mended").touch()
        assert study().square.tolist() == [4, 9, 16] and calls() == sorted([*before, 3])


def test_dask_whose_workers_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that says so, after a while, and no wait for ever; what was done is kept."""
    distributed = pytest.importorskip("distributed", reason="Dask is not installed")
    monkeypatch.setattr("qoqlab.sweeps.WORKERLESS_S", 2.0)
    options = {"n_workers": 1, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with distributed.LocalCluster(**options, silence_logs=logging.CRITICAL) as cluster:

        def gone() -> None:
            cluster.scale(0)

        def slow(x: int) -> int:
            time.sleep(60 * (x - 1))
            return x

        timer = threading.Timer(2.0, gone)
        timer.start()
        with pytest.raises(RuntimeError, match="has had no worker for 2 s, and 2 points are left"):
            sweep({"x": [1, 2, 3]}, slow, "dask", cluster.scheduler_address, tmp_path / "study.jsonl", progress=False)
        timer.join()
    rows = [json.loads(line) for line in (tmp_path / "study.jsonl").read_text().splitlines()]
    assert [row["settings"] for row in rows if "settings" in row] == [{"x": 1}], rows


def test_dask_whose_last_worker_took_a_result_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """Done, says the scheduler; but the result is gone with its worker, and waiting for it must end as well."""
    distributed = pytest.importorskip("distributed", reason="Dask is not installed")
    monkeypatch.setattr("qoqlab.sweeps.WORKERLESS_S", 0.02)
    kept, gone = Mock(**{"result.return_value": "outcome"}), Mock(**{"result.side_effect": TimeoutError})
    monkeypatch.setattr(distributed, "as_completed", lambda futures, timeout: sorted(futures, key=lambda f: f is gone))
    client = Mock(**{"scheduler_info.return_value": {"workers": {}}, "scheduler.address": "tcp://there"})
    results = _as_done(client, [gone, kept])
    assert next(results) == (kept, "outcome")
    with pytest.raises(RuntimeError, match=r"tcp://there has had no worker for 0\.02 s, and 1 points are left"):
        next(results)
    assert gone.result.call_args_list == [call(timeout=0.01)] * 2


def test_dask_without_a_scheduler() -> None:
    pytest.importorskip("distributed", reason="Dask is not installed")
    with pytest.raises(ValueError, match=r"address: None needs an active dask\.distributed Client"):
        sweep(GRID, product, "dask", progress=False)


def test_ray(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed")

    def study(x, y):
        if (x, y) == (2, 20):
            raise ArithmeticError("on a worker")
        if (x, y) == (3, 20) and not (tmp_path / "mended").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return {"product": x * y, "process": os.getpid()}

    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    try:
        out = tmp_path / "study.jsonl"
        table = sweep(GRID, study, "ray", out=out, progress=False)
        assert table["product"].dropna().tolist() == [10, 20, 20, 30]
        assert os.getpid() not in set(table.process.dropna())
        assert table.error[3] == "ArithmeticError: on a worker" and "in study" in table.traceback[3]
        assert "WorkerCrashedError" in table.error[5]  # the point whose worker died, and no other
        (tmp_path / "mended").touch()
        assert sweep(GRID, study, "ray", out=out, progress=False)["product"].dropna().tolist() == [10, 20, 20, 30, 60]
        assert ray.is_initialized()  # what the caller started stays
    finally:
        ray.shutdown()


@pytest.mark.parametrize(("backend", "module", "extra"), [("dask", "distributed", "cluster"), ("ray", "ray", "ray")])
def test_a_missing_extra_is_named(backend: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'pip install "qoqlab\[{extra}\]"'):
        sweep(GRID, product, backend, progress=False)


def test_missing_parquet_support_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'out: Parquet needs pyarrow; pip install "qoqlab\[cluster\]"'):
        sweep(GRID, product, out=tmp_path / "study.parquet", progress=False)


# --- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"parameters": 3}, TypeError, "parameters: expected a grid"),
        ({"parameters": [1]}, TypeError, "parameters: expected a grid"),
        ({"parameters": {"x": 3}}, TypeError, "parameters: 'x' needs a list of values, got 3"),
        ({"parameters": {"x": "ab"}}, TypeError, "parameters: 'x' needs a list of values, got 'ab'"),
        ({"parameters": {"error": [1]}}, ValueError, "parameters: 'error' cannot name a setting"),
        ({"parameters": {1: [1]}}, ValueError, "parameters: 1 cannot name a setting"),
        ({"parameters": {"x": [1, 1]}}, ValueError, "is given twice; to repeat a point, add a seed"),
        ({"parameters": {"x": [Backend.RAY]}}, TypeError, "cannot be written as JSON"),
        ({"parameters": {"x": [float("nan")]}}, TypeError, "cannot be written as JSON"),
        ({"function": 3}, TypeError, "function: expected a callable, got int"),
        ({"backend": "spark"}, ValueError, "backend: expected one of local, dask, ray or None, got 'spark'"),
        ({"jobs": 0}, ValueError, "jobs: expected a positive integer or -1, got 0"),
        ({"jobs": 1.5}, ValueError, "jobs: expected a positive integer or -1, got 1.5"),
        ({"address": "tcp://a:1"}, ValueError, "address: 'tcp://a:1' is of no use to local processes"),
        ({"out": "study.csv"}, ValueError, r"out: expected a name that ends in \.jsonl or \.parquet, got 'study\.csv'"),
        ({"out": "no/such/study.jsonl"}, FileNotFoundError, "out: there is no folder"),
    ],
)
def test_bad_arguments_are_named(change: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        sweep(**({"parameters": GRID, "function": product, "progress": False} | change))


def test_keys_do_not_depend_on_the_order_of_names() -> None:
    assert canonical({"b": 1, "a": [1, "x"]}) == canonical({"a": [1, "x"], "b": 1}) == '{"a":[1,"x"],"b":1}'
