"""A student's progress: what a folder's notebooks say about their exercises. Reads saved files, sends nothing anywhere."""

from __future__ import annotations

import html
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Checks that passed in this process, so that a notebook counts before it is saved.
_PASSED_HERE: set[str] = set()
_MARKS = {"passed": "●", "wrong": "◐", "not tried": "○"}


def passed(check: str) -> None:
    """What every check says at its end."""
    _PASSED_HERE.add(check)
    print(f"{check}: passed")


@dataclass(frozen=True)
class Exercise:
    """One exercise: ``state`` is "passed", "wrong" or "not tried", ``words`` what the check said last."""

    lesson: str
    check: str
    state: str
    words: str = ""


class Progress:
    """The exercises of a folder of notebooks, shown as a table; ``exercises`` is the list behind it."""

    def __init__(self, exercises: list[Exercise]) -> None:
        self.exercises = exercises

    def __repr__(self) -> str:
        return "progress of the course"  # the same for everybody, since it is stored in the notebook

    def _repr_html_(self) -> str:
        rows = []
        for lesson in dict.fromkeys(e.lesson for e in self.exercises):
            mine = [e for e in self.exercises if e.lesson == lesson]
            marks = " ".join(f'<span title="{html.escape(f"{e.check}: {e.state}")}">{_MARKS[e.state]}</span>' for e in mine)
            done = sum(e.state == "passed" for e in mine)
            # the last complaint helps more than all of them
            words = next((f"{e.check}: {e.words}" for e in reversed(mine) if e.state == "wrong"), "")
            cells = (html.escape(lesson), marks, f"{done} of {len(mine)}", html.escape(words))
            rows.append("<tr>" + "".join(f'<td style="text-align:left">{cell}</td>' for cell in cells) + "</tr>")
        head = "".join(f'<th style="text-align:left">{t}</th>' for t in ("lesson", "exercises", "passed", "last complaint"))
        total = sum(e.state == "passed" for e in self.exercises)
        note = (
            f"{total} of {len(self.exercises)} exercises passed (● passed, ◐ tried, ○ not yet). Save a notebook to count it."
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table><p>{note}</p>"


def progress(folder: str | os.PathLike[str] = ".") -> Progress:
    """How far the exercises in a folder's notebooks are, from their saved outputs and from checks passed in this kernel.

    Raises ValueError where ``folder`` has no notebook with exercises.
    """
    found = [e for path in sorted(Path(folder).glob("*.ipynb")) for e in _exercises(path)]
    if not found:
        raise ValueError(f"folder: no notebook with exercises in {os.fspath(folder)!r}; start from the course's folder")
    return Progress(found)


def _exercises(path: Path) -> list[Exercise]:
    """Exercises of one notebook, in order."""
    cells = json.loads(path.read_text(encoding="utf-8")).get("cells", [])
    found = []
    for cell in cells:
        if cell["cell_type"] != "code" or "exercise" not in cell["metadata"].get("tags", []):
            continue
        for check in re.findall(r"exercises\.(check_\w+)\(", "".join(cell["source"])):
            found.append(Exercise(path.stem, check, *_state(check, cell.get("outputs", []))))
    return found


def _state(check: str, outputs: list[dict[str, Any]]) -> tuple[str, str]:
    """State and last words of one check."""
    text = "".join("".join(o.get("text", "")) for o in outputs)
    if f"{check}: passed" in text or check in _PASSED_HERE:
        return "passed", ""
    errors = [o for o in outputs if o["output_type"] == "error" and o["ename"] != "NotImplementedError"]
    if errors:
        return "wrong", str(errors[-1]["evalue"]) or errors[-1]["ename"]
    return "not tried", ""
