"""The twelve questions: each has an answer that points into a lesson, and the numbers in the answers are right."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from qoqlab import affine, grids, progressive, transforms

PAGE = (Path(__file__).resolve().parents[1] / "notebooks" / "questions.md").read_text(encoding="utf-8")
QUESTIONS, ANSWERS = (
    dict(re.findall(r"^\*\*(\d+)\.\*\* (.*?)(?=^\*\*\d+\.\*\* |^---|\Z)", part, re.MULTILINE | re.DOTALL))
    for part in PAGE.split("# Answers")
)
#: Question -> what its answer has to say, computed.
NUMBERS = {
    "1": [f"{2 * 32 * 8 * 128 * bits // 8:,}" for bits in (16, 4)],
    "3": [f"M = {800e12 / (2 * 3.2e12):.0f}"],
    "11": [f"{transforms.attention_scale(torch.tensor([9.0, 4.0]), 0.5)[1].item():g}, for both"],
}


def test_there_are_twelve_and_all_are_answered():
    assert list(QUESTIONS) == list(ANSWERS) == [str(n) for n in range(1, 13)]
    assert all("?" in text or text.startswith("Quantise") or "Derive" in text for text in QUESTIONS.values())


def test_every_answer_points_into_the_first_four_lessons():
    for answer in ANSWERS.values():
        lessons = re.findall(r"\]\((\d\d)_\w+\.ipynb#", answer)
        assert lessons and set(lessons) <= {"00", "01", "02", "03"}


def test_numbers_are_right():
    for question, wanted in NUMBERS.items():
        assert all(words in ANSWERS[question].replace("**", "") for words in wanted)


def test_the_token_of_question_5():
    token = torch.tensor([[0.2, -0.1, 14.0, 0.9]])
    survivors = {g.name: affine.quantize_per_token_s8(token, g).codes[0].ne(0).tolist() for g in (grids.INT4, grids.INT8)}
    assert survivors == {"INT4": [False, False, True, False], "INT8": [True] * 4}


def test_the_group_of_question_8():
    row = torch.tensor([[-30.0, 0.0, 12.0, 45.0, 119.0, -119.0, 0.0, 0.0]])  # the second group makes the row's scale 1
    w = progressive.quantize(row, group_size=4)
    assert (w.group_scales[0, 0], w.group_zeros[0, 0]) == (5, 6) and w.codes[0, :4].tolist() == [0, 6, 8, 15]
    assert w.int8()[0, :4].tolist() == [-30, 0, 10, 45]
    assert "**0, 6, 8, 15**" in ANSWERS["8"] and "**−30, 0, 10, 45**" in ANSWERS["8"]
