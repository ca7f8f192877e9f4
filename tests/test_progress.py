"""A student's progress is read from saved outputs; nothing is written."""

from __future__ import annotations

import json

import pytest

from qoqlab import exercises, progress


def notebook(path, outputs):
    cell = {
        "cell_type": "code",
        "metadata": {"tags": ["exercise"]},
        "source": ["exercises.check_made_up(mine)"],
        "outputs": outputs,
    }
    path.write_text(json.dumps({"cells": [cell]}), encoding="utf-8")


@pytest.mark.parametrize(
    ("outputs", "state", "words"),
    [
        ([{"output_type": "stream", "text": ["check_made_up: passed\n"]}], "passed", ""),
        ([{"output_type": "error", "ename": "NotImplementedError", "evalue": "your turn"}], "not tried", ""),
        ([{"output_type": "error", "ename": "AssertionError", "evalue": "two <scales>"}], "wrong", "two <scales>"),
        ([], "not tried", ""),
    ],
)
def test_state_of_an_exercise(tmp_path, outputs, state, words):
    notebook(tmp_path / "03_x.ipynb", outputs)
    found = exercises.progress(tmp_path)
    assert [(e.lesson, e.check, e.state, e.words) for e in found.exercises] == [("03_x", "check_made_up", state, words)]
    assert repr(found) == "progress of the course"
    shown = found._repr_html_()
    assert f"{int(state == 'passed')} of 1" in shown and "<scales>" not in shown


def test_a_check_passed_in_this_kernel_counts_before_saving(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_PASSED_HERE", set())
    notebook(tmp_path / "03_x.ipynb", [])
    progress.passed("check_made_up")
    assert capsys.readouterr().out == "check_made_up: passed\n"
    assert exercises.progress(tmp_path).exercises[0].state == "passed"


def test_a_folder_without_exercises_is_refused(tmp_path):
    with pytest.raises(ValueError, match="folder: no notebook with exercises"):
        exercises.progress(tmp_path)
