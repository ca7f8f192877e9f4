"""Solutions: one notebook a lesson that answers every exercise, in the lesson's order and under its names, and was run."""

from __future__ import annotations

import ast
import itertools

import nbformat
import pytest

from qoqlab import classroom, site

FOLDER = classroom.COURSE / "solutions"
LESSONS = sorted(classroom.COURSE.glob("*.ipynb"))

each_lesson = pytest.mark.parametrize("lesson", LESSONS, ids=lambda p: p.stem)


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_there_is_one_for_every_lesson():
    assert [p.name for p in sorted(FOLDER.glob("*.ipynb"))] == [p.name for p in LESSONS]


@each_lesson
def test_answers_what_the_lesson_asks(lesson):
    """The same calls in the same order: grading a solution means grading all exercises."""
    cells = code_cells(FOLDER / lesson.name)[1:]
    calls = [ast.unparse(ast.parse(cell.source).body[-1]) for cell in cells]
    assert calls == [ast.unparse(call) for call in classroom.checks(lesson)]
    defined = classroom._defined(classroom.answers(FOLDER / lesson.name))
    assert all(classroom._names(call) <= defined for call in classroom.checks(lesson))


@each_lesson
def test_was_run_and_passed(lesson):
    imports, *cells = code_cells(FOLDER / lesson.name)
    assert [cell.execution_count for cell in (imports, *cells)] == list(range(1, len(cells) + 2)), "run notebooks/refresh.py"
    assert not imports.outputs
    for cell in cells:
        check = ast.parse(cell.source).body[-1].value.func.attr
        assert [(o.output_type, o.text) for o in cell.outputs] == [("stream", f"{check}: passed\n")]


@each_lesson
def test_every_solution_is_explained(lesson):
    cells = nbformat.read(FOLDER / lesson.name, as_version=4).cells
    for before, cell in itertools.pairwise(cells):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown" and len(before.source.split()) > 20


def test_the_site_leaves_them_out():
    assert not [path for path in site.lessons(classroom.COURSE) if "solutions" in path.parts]


def test_one_solution_is_graded_like_a_submission():
    results = list(classroom.grade(FOLDER / "00_map.ipynb"))
    assert results and all(result.outcome is classroom.Outcome.PASSED for result in results)
