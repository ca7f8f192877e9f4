"""Parameter studies: a function over a grid or list of settings, on this machine or on a cluster.

Points finish in any order. Each one is written to a file the moment it is done, so a study that is killed continues where it
was: a point is known by its settings, written as canonical JSON, and a file by the name of its function. A point that fails
is recorded with its traceback while the others go on, also when it calls ``sys.exit`` or takes its worker process with it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

Settings = dict[str, Any]
Function = Callable[..., Any]
#: ``(key, outcome)`` of points, as they finish.
Outcomes = Generator[tuple[str, dict[str, Any]], None, None]
#: Columns that every table has besides settings and results. ``error`` and ``traceback`` are None where all went well.
OUTCOME = ("seconds", "error", "traceback")
#: Column of a plain number that a function returns.
RESULT = "result"
#: Seconds after which a Dask cluster without a worker is given up.
WORKERLESS_S = 60.0


class Backend(Enum):
    """Where points are computed.

    LOCAL  processes of this machine (joblib's loky).
    DASK   workers of a Dask cluster, as Dask futures (joblib's backend never returns once a point kills its workers); extra
           ``cluster``.
    RAY    workers of a Ray cluster, as Ray tasks (its joblib backend cannot hand results over as they come); extra ``ray``.
    """

    LOCAL = "local"
    DASK = "dask"
    RAY = "ray"


# --- the study ------------------------------------------------------------------------------------------------------------


def sweep(
    parameters: Mapping[str, Iterable[Any]] | Sequence[Settings],
    function: Function,
    backend: Backend | str | None = None,
    address: str | None = None,
    out: str | os.PathLike[str] | None = None,
    jobs: int = -1,
    progress: bool = True,
) -> pd.DataFrame:
    """Call ``function(**settings)`` for every point and return one row per point, in the order of ``parameters``.

    ``parameters``: a grid ``{name: values}``, of which every combination is a point, or a list of settings. Values are what
    JSON can hold (numbers, strings, booleans, None, lists and dicts of them; a tuple is the same setting as a list).
    ``function`` returns a dict of such values or a single one, which becomes column ``result``; tuples become lists.

    ``backend``: None or "local" for processes of this machine; "dask" with the scheduler's ``address`` (None: the client
    that is active); "ray" with the head's ``address`` (None: the running Ray, or a new one of this machine). Workers need
    the same qoqlab. ``jobs``: local processes, -1 for one per core and 1 for this very process. ``progress`` shows a bar.

    A point whose worker process dies (out of memory, a crash) is a failed point. Locally the pool dies with it: the points
    that are left then run one at a time, each in a fresh process, which names the culprit. Dask gives a point up after
    several workers (setting ``distributed.scheduler.allowed-failures``) and it is tried once more by itself, so its workers
    need a nanny, the default, that restarts them. With ``jobs=1`` there is no process to lose but this one; where -1 finds
    a single core or one point is left, points also get a fresh process each.

    ``out``: a ``.jsonl`` or ``.parquet`` file. Points that it holds without an error are not computed again, failed ones
    are; other points in it stay. It belongs to one function, by its qualified name; that its code, or what a closure holds,
    has changed is not noticed: take another file then. A line that a kill cut in half is dropped with a warning. Parquet
    needs pyarrow and is rewritten with every point; for many thousands of quick points take JSONL.

    The DataFrame has the settings' columns, the results' columns, ``seconds``, ``error`` (None, or one line) and
    ``traceback``.

    Raises TypeError or ValueError for parameters that are no grid or list, settings that JSON cannot hold, points given
    twice, an unknown backend, a file of another kind or of another function; ImportError naming the extra that is missing;
    RuntimeError where a Dask cluster has had no worker for a minute.
    """
    chosen = _backend(backend)
    if not callable(function):
        raise TypeError(f"function: expected a callable, got {type(function).__name__}")
    if not isinstance(jobs, int) or isinstance(jobs, bool) or (jobs < 1 and jobs != -1):
        raise ValueError(f"jobs: expected a positive integer or -1, got {jobs!r}")
    if address is not None and chosen is Backend.LOCAL:
        raise ValueError(f"address: {address!r} is of no use to local processes; pass backend='dask' or 'ray'")
    settings = points(parameters)
    record = None if out is None else _record(Path(out))
    name, rows = _name(function), {}
    if record is not None:
        found = record.read()
        _require_same_function(name, found.values(), record.path)
        # settings as they were passed, tuples too; JSON gives back lists
        done = [key for key in settings if key in found and found[key]["error"] is None]
        rows = {key: found[key] | {"settings": settings[key]} for key in done}
    left = [(key, point) for key, point in settings.items() if key not in rows]
    bar = tqdm(total=len(settings), initial=len(settings) - len(left), unit="point", disable=not progress)
    with bar, contextlib.closing(_outcomes(chosen, function, left, address, jobs)) as outcomes:
        for key, outcome in outcomes:
            rows[key] = {"function": name, "settings": settings[key], **outcome}
            if record is not None:
                record.append(key, rows[key])
            bar.update()
    return _table([rows[key] for key in settings])


def points(parameters: Mapping[str, Iterable[Any]] | Sequence[Settings]) -> dict[str, Settings]:
    """Every point of a grid or list by its key, in order.

    >>> list(points({"bits": [4, 8], "group": [128]}))
    ['{"bits":4,"group":128}', '{"bits":8,"group":128}']
    """
    if isinstance(parameters, Mapping):
        for name, values in parameters.items():
            if isinstance(values, str | bytes) or not isinstance(values, Iterable):
                raise TypeError(f"parameters: {name!r} needs a list of values, got {values!r}")
        listed = [dict(zip(parameters, chosen, strict=True)) for chosen in itertools.product(*parameters.values())]
    elif isinstance(parameters, Sequence) and all(isinstance(point, Mapping) for point in parameters):
        listed = [dict(point) for point in parameters]
    else:
        raise TypeError(f"parameters: expected a grid {{name: values}} or a list of settings, got {parameters!r}")
    found: dict[str, Settings] = {}
    for point in listed:
        clash = [name for name in point if not isinstance(name, str) or name in OUTCOME]
        if clash:
            raise ValueError(f"parameters: {clash[0]!r} cannot name a setting; columns {', '.join(OUTCOME)} are taken")
        point = {name: _plain(value) for name, value in point.items()}
        key = canonical(point)
        if key in found:
            raise ValueError(f"parameters: {key} is given twice; to repeat a point, add a seed to its settings")
        found[key] = point
    return found


def canonical(settings: Settings) -> str:
    """Settings as JSON with sorted names and no blanks: equal settings give equal text.

    >>> canonical({"group": 128, "alpha": 0.5}) == canonical({"alpha": 0.5, "group": 128})
    True
    """
    try:
        return json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"parameters: {settings!r} cannot be written as JSON ({error})") from None


def _name(function: Function) -> str:
    """``module:qualified_name`` of a function, of what a partial calls, or of an object's class."""
    while isinstance(function, functools.partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def _require_same_function(name: str, rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Refuse a file of another function; older files do not say whose they are."""
    module, _, function = name.partition(":")
    for other in dict.fromkeys(str(row["function"]) for row in rows if "function" in row):
        its_module, _, its_function = other.partition(":")
        # "__main__" may be any module, run as a script
        if its_function != function or (its_module != module and "__main__" not in (its_module, module)):
            raise ValueError(f"out: {path} holds points of the function {other}, not of {name}; choose another file")


def _table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    flat = [{**row["settings"], **row["results"], **{name: row[name] for name in OUTCOME}} for row in rows]
    columns = dict.fromkeys(name for row in flat for name in row if name not in OUTCOME)
    table = pd.DataFrame(flat, columns=[*columns, *OUTCOME])
    for name in ("error", "traceback"):  # missing text stays None, whatever pandas makes of a column of Nones
        table[name] = pd.Series([row[name] for row in flat], dtype=object, index=table.index)
    return table


# --- computing ------------------------------------------------------------------------------------------------------------


def _attempt(function: Function, key: str, settings: Settings) -> tuple[str, dict[str, Any]]:
    """One point's key and outcome: results and seconds, or the error. Runs in a worker."""
    start = time.perf_counter()
    try:
        found = function(**settings)
        results = dict(found) if isinstance(found, Mapping) else {RESULT: found}
        results = {name: _plain(value) for name, value in results.items()}
        clash = [name for name in results if name in settings or name in OUTCOME]
        if clash:
            raise ValueError(f"function: returned {clash[0]!r}, which is a setting or a column of every table")
        results = json.loads(json.dumps(results))  # what a file gives back, with a file or without
    except (Exception, SystemExit) as error:  # the study goes on, whatever a point does; Ctrl-C does end it
        return key, _failure(error, time.perf_counter() - start)
    return key, {"results": results, "seconds": time.perf_counter() - start, "error": None, "traceback": None}


def _failure(error: BaseException, seconds: float) -> dict[str, Any]:
    text = "".join(traceback.format_exception(error))
    line = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
    return {"results": {}, "seconds": seconds, "error": line, "traceback": text}


def _plain(value: Any) -> Any:
    """A NumPy number, or an array or tensor of one element, as a Python number."""
    return value.item() if hasattr(value, "item") else value


def _backend(backend: Backend | str | None) -> Backend:
    try:
        return Backend.LOCAL if backend is None else Backend(backend)
    except ValueError:
        raise ValueError(
            f"backend: expected one of {', '.join(b.value for b in Backend)} or None, got {backend!r}"
        ) from None


def _outcomes(
    backend: Backend, function: Function, left: list[tuple[str, Settings]], address: str | None, jobs: int
) -> Outcomes:
    """``(key, outcome)`` of every point that is left, as they finish."""
    if not left:
        return
    if backend is Backend.RAY:
        yield from _on_ray(function, left, address)
    elif backend is Backend.DASK:
        yield from _on_dask(function, left, address)
    else:
        yield from _on_this_machine(function, left, jobs)


def _on_this_machine(function: Function, left: list[tuple[str, Settings]], jobs: int) -> Outcomes:
    from joblib import Parallel, cpu_count, delayed, parallel_config
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    if jobs == 1:  # nothing to share: no processes, so a debugger works
        yield from (_attempt(function, *point) for point in left)
        return
    processes = min(cpu_count() if jobs == -1 else jobs, len(left))
    unfinished = dict(left)
    if processes > 1:
        try:
            with parallel_config("loky", n_jobs=processes, inner_max_num_threads=max(1, cpu_count() // processes)):
                pool = Parallel(return_as="generator_unordered")
                for key, outcome in pool(delayed(_attempt)(function, *point) for point in left):
                    del unfinished[key]
                    yield key, outcome
        except TerminatedWorkerError:
            pass  # the pool cannot tell which point it was, so those that are left run apart
    for point in unfinished.items():
        yield _alone(function, *point)


def _alone(function: Function, key: str, settings: Settings) -> tuple[str, dict[str, Any]]:
    """One point's key and outcome from a process of its own. Should that die, the point has failed."""
    from joblib.externals.loky import ProcessPoolExecutor
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    start = time.perf_counter()
    try:
        with ProcessPoolExecutor(max_workers=1) as process:
            return process.submit(_attempt, function, key, settings).result()
    except TerminatedWorkerError as error:
        codes = re.search(r"\{(.*)\}", str(error))
        died = RuntimeError(
            f"the worker process of this point died ({codes[1] if codes else 'no exit code'}): it was killed, perhaps out "
            "of memory, crashed, or ended itself"
        )
        died.__cause__ = error  # for the traceback
        return key, _failure(died, time.perf_counter() - start)


def _on_dask(function: Function, left: list[tuple[str, Settings]], address: str | None) -> Outcomes:
    try:
        from distributed import Client
    except ImportError:
        raise ImportError('backend: "dask" needs Dask; pip install "qoqlab[cluster]"') from None

    own: contextlib.AbstractContextManager[Client]
    if address is not None:
        own = Client(address, timeout="10s")
    else:
        try:
            own = contextlib.nullcontext(Client.current())
        except ValueError:
            raise ValueError("address: None needs an active dask.distributed Client; pass the scheduler's") from None
    with own as client:
        rounds = [left]
        for batch in rounds:
            waiting = {client.submit(_attempt, function, *point, pure=False): point for point in batch}
            try:
                for future, outcome in _as_done(client, waiting):
                    if not isinstance(outcome, BaseException):
                        yield outcome
                    elif len(batch) > 1:  # the scheduler also blames points that only waited on the workers that died
                        rounds.append([waiting[future]])
                    else:
                        yield waiting[future][0], _failure(outcome, float("nan"))
            finally:  # a study that is interrupted leaves no work on the cluster
                client.cancel(list(waiting))


def _as_done(client: Any, futures: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Futures of Dask with their outcomes as they are done, or with the KilledWorker of those that the scheduler gave up.
    Raises RuntimeError where the cluster has had no worker for `WORKERLESS_S`: none may ever come, and Dask would wait for
    it, be it for a point or for a result that was lost with its worker."""
    from distributed import KilledWorker, as_completed

    left, without = set(futures), 0
    while left:
        try:
            for future in as_completed(list(left), timeout=WORKERLESS_S / 2):
                try:
                    outcome = future.result(timeout=WORKERLESS_S / 2)
                except KilledWorker as error:
                    outcome = error
                left.discard(future)
                without = 0
                yield future, outcome
        except TimeoutError:
            without = 0 if client.scheduler_info()["workers"] else without + 1
            if without == 2:
                raise RuntimeError(
                    f"address: {client.scheduler.address} has had no worker for {WORKERLESS_S:g} s, and {len(left)} points "
                    "are left; those that are done are kept"
                ) from None


def _on_ray(function: Function, left: list[tuple[str, Settings]], address: str | None) -> Outcomes:
    try:
        import ray
    except ImportError:
        raise ImportError('backend: "ray" needs Ray; pip install "qoqlab[ray]"') from None

    running = ray.is_initialized()
    if not running:
        ray.init(address=address, log_to_driver=False, include_dashboard=False if address is None else None)
    try:
        task = ray.remote(_attempt)
        shared = ray.put(function)
        waiting = {task.remote(shared, *point): point[0] for point in left}
        while waiting:
            (done,), _ = ray.wait(list(waiting))
            key = waiting.pop(done)
            try:
                yield ray.get(done)
            except ray.exceptions.RayError as error:  # a worker that died takes its own point with it, and no other
                yield key, _failure(error, float("nan"))
    finally:
        if not running:
            ray.shutdown()


# --- the file -------------------------------------------------------------------------------------------------------------


@dataclass
class _JsonLines:
    """One line of JSON per point; the last one of a key counts."""

    path: Path

    def read(self) -> dict[str, dict[str, Any]]:
        """Rows by key. Cuts a last line that a kill left unfinished."""
        if not self.path.exists():
            return {}
        whole, newline, rest = self.path.read_bytes().rpartition(b"\n")
        if rest:
            warnings.warn(f"{self.path}: the last line was cut off in mid-write and is dropped", stacklevel=3)
            os.truncate(self.path, len(whole) + len(newline))
        rows: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(whole.split(b"\n") if newline else [], 1):
            rows.update([_parse(line, f"{self.path}: line {number}")])
        return rows

    def append(self, key: str, row: dict[str, Any]) -> None:
        """Write one line, to the disk."""
        with open(self.path, "ab") as file:
            file.write(_serialize(row) + b"\n")
            file.flush()
            os.fsync(file.fileno())


@dataclass
class _Parquet:
    """Columns for readers, and the whole row as JSON in column ``record``; replaced as a whole, so never half-written."""

    path: Path
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def read(self) -> dict[str, dict[str, Any]]:
        """Rows by key."""
        if self.path.exists():
            try:
                records = pd.read_parquet(self.path, columns=["record"])["record"]
            except Exception as error:  # pyarrow's own classes of errors
                raise ValueError(f"out: {self.path} is not a file that sweep wrote ({error})") from error
            self.rows = dict(_parse(text.encode(), f"{self.path}: row {i}") for i, text in enumerate(records))
        return dict(self.rows)

    def append(self, key: str, row: dict[str, Any]) -> None:
        """Write everything beside the file, then rename over it."""
        self.rows[key] = row
        table = _table(list(self.rows.values()))
        for name in table.columns:
            kinds = {type(value) for value in table[name] if value is not None}
            if len(kinds) > 1 or kinds & {list, dict, tuple}:  # a column of Parquet has one type
                table[name] = [json.dumps(value) for value in table[name]]
        table["record"] = [_serialize(row).decode() for row in self.rows.values()]
        beside = self.path.with_name(f".{self.path.name}.partial")
        table.to_parquet(beside, index=False)
        os.replace(beside, self.path)


def _record(path: Path) -> _JsonLines | _Parquet:
    """Open the file of a study by its ending, before any work starts."""
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"out: expected a name that ends in .jsonl or .parquet, got {path.name!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"out: there is no folder {path.parent}")
    if path.suffix == ".jsonl":
        return _JsonLines(path)
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise ImportError('out: Parquet needs pyarrow; pip install "qoqlab[cluster]", or take a .jsonl file') from None
    return _Parquet(path)


def _serialize(row: dict[str, Any]) -> bytes:
    return json.dumps(row, separators=(",", ":")).encode()


def _parse(line: bytes, where: str) -> tuple[str, dict[str, Any]]:
    try:
        row = json.loads(line)
        if {"settings", "results", *OUTCOME} <= row.keys():
            return canonical(row["settings"]), row
    except (AttributeError, TypeError, ValueError):
        pass
    raise ValueError(f"out: {where} is not a record that sweep wrote")
