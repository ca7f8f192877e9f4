"""For teaching: a hand-out without solutions, and checks of what comes back.

``make student`` copies the course; ``make grade NOTEBOOK=...`` reads functions out of a submission and calls the course's
own checks on them, each in a process of its own with a time limit. Functions, imports and the plain assignments of exercise
cells are taken from a submission; nothing else in it runs, and editing or deleting a check in it changes nothing.

A process with a time limit stops endless loops, not malice: grade strangers' code on a machine that you can spare.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COURSE = ROOT / "notebooks"
#: What a hand-out leaves out of the notebooks' folder: solutions, the instructor's pages, and what serves our tests.
NOT_FOR_STUDENTS = (
    "solutions",
    "instructors.md",
    "questions.md",
    "refresh.py",
    "conftest.py",
    "nbval_sanitize.cfg",
    ".*",
    "__*",
)
#: Data that notebooks read; the model travels with the package.
READ_BY_NOTEBOOKS = ("paper", "benchmarks", "prices.csv")
SECONDS = 60.0

_DRIVER = """
import json, sys
task = json.load(open(sys.argv[1], encoding="utf-8"))
result = {"outcome": "passed", "words": ""}
try:
    space = {"__name__": "submission"}
    exec(compile(task["source"], "submission", "exec"), space)
    from qoqlab import exercises
    space["exercises"] = exercises
    exec(compile(task["call"], "check", "exec"), space)
except NotImplementedError:
    result["outcome"] = "not tried"
except AssertionError as error:
    result = {"outcome": "wrong", "words": str(error)}
except BaseException as error:
    result = {"outcome": "error", "words": f"{type(error).__name__}: {error}"}
json.dump(result, open(sys.argv[2], "w", encoding="utf-8"))
"""


class Outcome(Enum):
    """What came of one check."""

    PASSED = "passed"
    WRONG = "wrong"
    NOT_TRIED = "not tried"
    MISSING = "missing"
    ERROR = "error"
    TOO_SLOW = "too slow"


@dataclass(frozen=True)
class Result:
    """One check of one submission: what came of it, in what words, in how many seconds."""

    check: str
    outcome: Outcome
    words: str = ""
    seconds: float = 0.0


def _cells(path: Path) -> list[Any]:
    """Code cells of a notebook. Raises ValueError, naming the file, for what is not a notebook."""
    import nbformat

    try:
        return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{path}: not a notebook ({type(error).__name__})") from None


def _parse(source: str) -> ast.Module | None:
    """Syntax tree of a cell; None for what is not Python, such as a magic command or an unfinished line."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):
        return None


def checks(lesson: Path) -> list[ast.Call]:
    """The calls of checks in a lesson, in order: ``exercises.check_pack_u4(my_pack_u4)``."""
    found = []
    for cell in _cells(lesson):
        if "exercise" not in cell.metadata.get("tags", []):
            continue
        for node in ast.walk(_parse(cell.source) or ast.Module([], [])):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("check_"):
                found.append(node)
    return found


def answers(submission: Path) -> str:
    """Source of what a submission defines: imports and functions of all cells, and assignments to names in cells that
    define a function. Calls, loops and prints are left out, so that nothing but definitions runs."""
    kept: list[ast.stmt] = []
    for cell in _cells(submission):
        body = (_parse(cell.source) or ast.Module([], [])).body
        answering = any(isinstance(node, ast.FunctionDef) and node.name.startswith("my_") for node in body)
        for node in body:
            if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef) or (
                answering
                and isinstance(node, ast.Assign | ast.AnnAssign)
                and all(isinstance(t, ast.Name) for t in (node.targets if isinstance(node, ast.Assign) else [node.target]))
            ):
                kept.append(node)
    return "\n".join(ast.unparse(node) for node in kept)


def _names(call: ast.Call) -> set[str]:
    """What of the student's a check is called with."""
    return {node.id for argument in call.args for node in ast.walk(argument) if isinstance(node, ast.Name)}


def _defined(source: str) -> set[str]:
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def run_check(source: str, call: ast.Call, seconds: float = SECONDS) -> Result:
    """Run one check on the definitions in ``source``, in a process of its own that ends after ``seconds``."""
    assert isinstance(call.func, ast.Attribute)
    name, started = call.func.attr, time.perf_counter()
    lacking = sorted(_names(call) - _defined(source))
    if lacking:
        return Result(name, Outcome.MISSING, f"the submission defines no {', '.join(lacking)}")
    with tempfile.TemporaryDirectory() as folder:
        task, answer = Path(folder) / "task.json", Path(folder) / "answer.json"
        task.write_text(json.dumps({"source": source, "call": ast.unparse(call)}), encoding="utf-8")
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        process = subprocess.Popen(
            [sys.executable, "-c", _DRIVER, str(task), str(answer)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return Result(name, Outcome.TOO_SLOW, f"stopped after {seconds:g} s", seconds)
        finally:
            _end(process)
        taken = time.perf_counter() - started
        try:
            said = json.loads(answer.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return Result(name, Outcome.ERROR, f"the process ended with {process.returncode} and no answer", taken)
    return Result(name, Outcome(said["outcome"]), said["words"], taken)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a process with everything that it started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def grade(submission: Path, lesson: Path | None = None, seconds: float = SECONDS) -> Iterator[Result]:
    """All checks of a lesson on a submission, one after the other.

    ``lesson`` is the course's own notebook, by default the one whose name the submission's begins with, so that
    ``02_progressive_weights_ada.ipynb`` is recognised. ``seconds`` limits each check.

    Raises FileNotFoundError for a file that is not there, ValueError for one that is no notebook or of no lesson.
    """
    if not submission.is_file():
        raise FileNotFoundError(f"{submission}: no such file")
    lesson = lesson or _lesson_of(submission)
    source = answers(submission)
    for call in checks(lesson):
        yield run_check(source, call, seconds)


def _lesson_of(submission: Path) -> Path:
    known = sorted(COURSE.glob("*.ipynb"), key=lambda path: len(path.stem), reverse=True)
    for lesson in known:
        if submission.stem.startswith(lesson.stem):
            return lesson
    names = ", ".join(sorted(path.stem for path in known))
    raise ValueError(f"{submission.name}: its name begins with none of the lessons ({names}); pass --lesson")


def student(out: Path) -> list[Path]:
    """Write the hand-out to ``out``: lessons and explorers, the data that they read, and a page that says how to start.

    An existing hand-out is replaced; any other folder that is not empty is refused with FileExistsError. Returns the
    notebooks.
    """
    marker = out / "START.md"
    if out.exists() and any(out.iterdir()) and not marker.is_file():
        raise FileExistsError(f"{out} holds something else than a hand-out; choose another folder")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(COURSE, out / "notebooks", ignore=shutil.ignore_patterns(*NOT_FOR_STUDENTS))
    for name in READ_BY_NOTEBOOKS:
        source, target = ROOT / "data" / name, out / "data" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.py"))
        else:
            shutil.copy(source, target)
    notebooks = sorted((out / "notebooks").rglob("*.ipynb"))
    marker.write_text(_START.format(count=len(notebooks)), encoding="utf-8")
    return notebooks


_START = """# qoqlab: hand-out

{count} notebooks in `notebooks`: read `00_map.ipynb` first. Install qoqlab with the extra `lab`, as its README says; then:

    jupyter lab notebooks

Exercises are cells that say `raise NotImplementedError("your turn")`. Replace that line; the check below it tells you what
is missing. Keep the name of the function, save, and hand in the notebook under its own name, with yours behind it
(`02_progressive_weights_ada.ipynb`). Other cells do not use your answers, so you may leave exercises for later.
"""


def table(results: list[Result]) -> str:
    """Results as plain text, one line each, with a line of sums."""
    width = max((len(r.check) for r in results), default=5)
    lines = [f"{r.check:{width}}  {r.outcome.value:9}  {r.seconds:5.1f} s  {r.words}".rstrip() for r in results]
    passed = sum(r.outcome is Outcome.PASSED for r in results)
    return "\n".join([*lines, f"{passed} of {len(results)} passed"])


def main(arguments: list[str] | None = None) -> int:
    """Command line of ``make student`` and ``make grade``; 0 unless something could not be read."""
    parser = argparse.ArgumentParser(prog="python -m qoqlab.classroom", description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    handout = commands.add_parser("student", help="write a hand-out without solutions")
    handout.add_argument("--out", type=Path, default=Path("build/student"))
    grading = commands.add_parser("grade", help="run the course's checks on submissions")
    grading.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK")
    grading.add_argument("--lesson", type=Path, help="the course's notebook (default: by the submission's name)")
    grading.add_argument("--seconds", type=float, default=SECONDS, help="limit of each check (default: %(default)s)")
    grading.add_argument("--json", type=Path, help="also write all results to this file, for a gradebook")
    given = parser.parse_args(arguments)
    try:
        if given.command == "student":
            print(f"{len(student(given.out))} notebooks in {given.out}")
            return 0
        rows = []
        for submission in given.notebooks:
            results = list(grade(submission, given.lesson, given.seconds))
            print(f"{submission.name}\n{table(results)}\n")
            for r in results:
                rows.append({"submission": submission.name, **vars(r), "outcome": r.outcome.value})
        if given.json:
            given.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
