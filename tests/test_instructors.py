"""The instructor's page lists every lesson with its exercises, and its example is what grading prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qoqlab import classroom

COURSE = Path(__file__).resolve().parents[1] / "notebooks"
PAGE = (COURSE / "instructors.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("lesson", sorted(COURSE.glob("*.ipynb")), ids=lambda p: p.stem)
def test_every_lesson_has_a_row_with_its_exercises(lesson):
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| [{lesson.stem}]({lesson.name})"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == 6 and re.fullmatch(r"\d+ min", cells[2]) and re.fullmatch(r"\d+ s", cells[3])
    assert int(cells[5]) == len(classroom.checks(lesson))


def test_every_explorer_is_mentioned():
    for path in (COURSE / "explorers").glob("*.ipynb"):
        assert f"(explorers/{path.name})" in PAGE
