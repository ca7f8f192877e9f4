"""Hand-out and grading: solutions stay out, submissions are judged by the course's own checks, nothing else in them runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from qoqlab import classroom
from qoqlab.classroom import Outcome

LESSON = classroom.COURSE / "02_progressive_weights.ipynb"
RIGHT = """
def my_group_scale(low, high):
    low, high = min(low, 0), max(high, 0)
    scale = max(1, round((high - low) / 15))
    return scale, round(-low / scale)
"""
WRONG = RIGHT.replace("/ 15", "/ 16")


def submit(folder: Path, *cells: str, name: str = "02_progressive_weights_ada.ipynb") -> Path:
    path = folder / name
    nbformat.write(v4.new_notebook(cells=[v4.new_code_cell(source) for source in cells]), path)
    return path


def outcomes(path: Path, seconds: float = 60.0) -> dict[str, classroom.Result]:
    return {result.check: result for result in classroom.grade(path, seconds=seconds)}


def test_checks_are_those_of_the_lesson():
    assert "check_group_scale" in [call.func.attr for call in classroom.checks(LESSON)]


@pytest.mark.parametrize("lesson", sorted(classroom.COURSE.glob("*.ipynb")), ids=lambda p: p.stem)
def test_every_exercise_can_be_graded(lesson):
    """What a check is called with is what the exercise's cell defines, so reading definitions is enough."""
    source = classroom.answers(lesson)
    for call in classroom.checks(lesson):
        assert classroom._names(call) and classroom._names(call) <= classroom._defined(source)


def test_outcomes(tmp_path):
    """One submission with an answer of each kind; the lesson itself as it is handed out tries nothing."""
    path = submit(
        tmp_path,
        "import torch\nfrom qoqlab import exercises",
        RIGHT + "\nexercises.check_group_scale(my_group_scale)",
        "def my_dequantize(*arguments):\n    raise NotImplementedError('your turn')",
    )
    found = outcomes(path)
    assert found["check_group_scale"].outcome is Outcome.PASSED
    others = [result for name, result in found.items() if name != "check_group_scale"]
    assert {r.outcome for r in others} <= {Outcome.MISSING, Outcome.NOT_TRIED, Outcome.ERROR} and others
    missing = [r for r in others if r.outcome is Outcome.MISSING]
    assert all("defines no my_" in r.words for r in missing)


def test_a_wrong_answer_comes_with_the_teaching_sentence(tmp_path):
    result = outcomes(submit(tmp_path, WRONG))["check_group_scale"]
    assert result.outcome is Outcome.WRONG and "not by 16" in result.words


def test_the_stub_is_not_a_mistake():
    call = next(c for c in classroom.checks(LESSON) if c.func.attr == "check_group_scale")
    assert classroom.run_check(classroom.answers(LESSON), call).outcome is Outcome.NOT_TRIED


def test_an_endless_loop_is_stopped(tmp_path):
    call = next(c for c in classroom.checks(LESSON) if c.func.attr == "check_group_scale")
    result = classroom.run_check("def my_group_scale(low, high):\n    while True: pass", call, seconds=5)
    assert result.outcome is Outcome.TOO_SLOW and "5 s" in result.words


@pytest.mark.parametrize(
    "attempt",
    [
        "exercises.check_group_scale = print",  # an assignment to something of ours is not a definition
        "def fake(answer):\n    pass\nclass exercises:\n    check_group_scale = fake",
        "import qoqlab\nfor name in ['check_group_scale']:\n    setattr(qoqlab.exercises, name, print)",
    ],
)
def test_a_submission_cannot_replace_the_check_by_accident(tmp_path, attempt):
    path = submit(tmp_path, "from qoqlab import exercises", attempt, WRONG)
    assert outcomes(path)["check_group_scale"].outcome is Outcome.WRONG


def test_only_definitions_run(tmp_path):
    trap = tmp_path / "ran"
    path = submit(
        tmp_path,
        f"open({str(trap)!r}, 'w').write('x')",
        "%matplotlib inline",
        "for i in range(3): print(i)",
        "def half(",
        "WIDTH = 15\n" + RIGHT.replace("15", "WIDTH") + f"\nopen({str(trap)!r}, 'w')",
    )
    assert outcomes(path)["check_group_scale"].outcome is Outcome.PASSED
    assert not trap.exists()


def test_a_dying_process_is_an_error():
    call = next(c for c in classroom.checks(LESSON) if c.func.attr == "check_group_scale")
    result = classroom.run_check("import os\ndef my_group_scale(low, high):\n    os._exit(3)", call)
    assert result.outcome is Outcome.ERROR and "ended with 3" in result.words


def test_table_and_json(tmp_path, capsys):
    path = submit(tmp_path, RIGHT)
    out = tmp_path / "marks.json"
    assert classroom.main(["grade", str(path), "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"check_group_scale\s+passed\s+\d+\.\d s", text) and re.search(r"1 of \d+ passed", text)
    rows = json.loads(out.read_text())
    assert {row["submission"] for row in rows} == {path.name}
    assert [row["outcome"] for row in rows if row["check"] == "check_group_scale"] == ["passed"]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: folder / "none.ipynb", "no such file"),
        (lambda folder: submit(folder, RIGHT, name="homework.ipynb"), "begins with none of the lessons"),
        (lambda folder: _text(folder / "02_progressive_weights.ipynb"), "not a notebook"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, capsys, make, sentence):
    assert classroom.main(["grade", str(make(tmp_path))]) == 2
    assert sentence in capsys.readouterr().err


def _text(path: Path) -> Path:
    path.write_text("hello")
    return path


def test_a_lesson_can_be_named(tmp_path):
    path = submit(tmp_path, RIGHT, name="homework.ipynb")
    results = {r.check: r.outcome for r in classroom.grade(path, lesson=LESSON)}
    assert results["check_group_scale"] is Outcome.PASSED


def test_the_hand_out_has_lessons_data_and_no_solutions(tmp_path):
    out = tmp_path / "handout"
    notebooks = classroom.student(out)
    names = {path.relative_to(out).as_posix() for path in notebooks}
    assert {f"notebooks/{path.name}" for path in classroom.COURSE.glob("*.ipynb")} <= names
    assert "notebooks/explorers/recipe_lab.ipynb" in names
    everything = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    assert not [name for name in everything if "solution" in name or "instructor" in name or name.endswith((".py", ".cfg"))]
    assert "data/paper/throughput.csv" in everything and "START.md" in everything
    for path in notebooks:
        for cell in nbformat.read(path, as_version=4).cells:
            if "exercise" in cell.metadata.get("tags", []):
                assert 'raise NotImplementedError("your turn")' in cell.source


def test_a_hand_out_replaces_a_hand_out_and_nothing_else(tmp_path):
    out = tmp_path / "handout"
    classroom.student(out)
    (out / "notebooks" / "old.ipynb").write_text("{}")
    classroom.student(out)
    assert not (out / "notebooks" / "old.ipynb").exists()
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.md").write_text("years of work")
    assert classroom.main(["student", "--out", str(other)]) == 2
    assert (other / "chapter.md").read_text() == "years of work"
