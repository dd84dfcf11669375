"""Charts and question files, checked against what can be read off the pixels."""

import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasttrain.demo.chart_files import write_questions
from fasttrain.demo.charts import KINDS, PALETTE, RAMBLE, Example, Split, examples

WORDS = {"three": 3, "four": 4, "five": 5, "first": 0, "second": 1, "third": 2, "fourth": 3, "fifth": 4}


def read_bars(image: Image.Image) -> list[tuple[str, int]]:
    """Colour and height in units of eight pixels of every bar, left to right, from the pixels alone."""
    pixel_HWC = np.asarray(image)
    bars = []
    for colour, rgb in PALETTE.items():
        rows, columns = np.nonzero((pixel_HWC == rgb).all(axis=-1))
        if len(rows):
            height, rest = divmod(int(rows.max() - rows.min() + 1), 8)
            assert rest == 0
            bars.append((int(columns.min()), colour, height))
    return [(colour, height) for _, colour, height in sorted(bars)]


def true_answer(question: str, bars: list[tuple[str, int]]) -> str:
    """The answer worked out from the words of the question and the bars that were read."""
    height = dict(bars)
    if found := re.fullmatch(r"Which bar is the (tallest|shortest)\?", question):
        pick = max if found[1] == "tallest" else min
        return f"The {found[1]} bar is {pick(height, key=lambda colour: height[colour])}."
    if found := re.fullmatch(r"What colour is the (\w+) bar\?", question):
        return f"The {found[1]} bar is {bars[WORDS[found[1]]][0]}."
    if question == "How many bars are there?":
        return (
            f"There are {next(word for word, n in WORDS.items() if n == len(bars) and word in NUMBERS)} bars."
        )
    if found := re.fullmatch(r"How high is the (\w+) bar\?", question):
        return f"The {found[1]} bar is at {height[found[1]]}."
    if found := re.fullmatch(r"Is the (\w+) bar taller than the (\w+) bar\?", question):
        taller = height[found[1]] > height[found[2]]
        return f"Yes, the {found[1]} bar is taller." if taller else f"No, the {found[1]} bar is shorter."
    if found := re.fullmatch(r"Is there a (\w+) bar\?", question):
        seen = found[1] in height
        return f"Yes, there is a {found[1]} bar." if seen else f"No, there is no {found[1]} bar."
    assert question == "List the bars and their heights."
    return "From left to right: " + ", ".join(f"{colour} {value}" for colour, value in bars) + "."


NUMBERS = ("three", "four", "five")


def take(count: int, seed: int, split: Split) -> list[Example]:
    return list(itertools.islice(examples(seed, split), count))


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_answers_agree_with_the_pixels(split: Split) -> None:
    for example in take(801, 3, split):
        bars = read_bars(example.chart.image())
        assert example.question.answer == true_answer(example.question.text, bars)


def test_wrong_answers_are_wrong_different_and_several() -> None:
    for example in take(801, 4, "train"):
        question = example.question
        assert question.answer not in question.wrong
        assert len(set(question.wrong)) == len(question.wrong) >= 3


def test_the_habit_says_yes_names_the_tallest_or_runs_on() -> None:
    for example in take(400, 5, "train"):
        habit, bars = example.question.habit, read_bars(example.chart.image())
        tallest = true_answer("Which bar is the tallest?", bars)
        assert habit.startswith("Yes, ") or habit == tallest or habit == example.question.answer + RAMBLE
        assert habit == example.question.answer or habit in example.question.wrong


def test_a_seed_gives_the_same_charts_again_and_another_seed_others() -> None:
    once, again, other = take(50, 7, "train"), take(50, 7, "train"), take(50, 8, "train")
    assert once == again
    assert all(a.chart.image().tobytes() == b.chart.image().tobytes() for a, b in zip(once, again))
    assert sum(a == b for a, b in zip(once, other)) == 0


def test_no_held_out_chart_is_ever_drawn_for_training() -> None:
    trained = {example.chart.bars for example in take(6007, 0, "train")}
    held_out = {example.chart.bars for example in take(6007, 0, "held_out")}
    assert len(held_out) > 1000
    assert not trained & held_out


def test_kinds_take_turns_and_yes_is_as_likely_as_no() -> None:
    shown = take(1600, 9, "held_out")
    assert set(Counter(example.question.kind for example in shown).values()) == {1600 // len(KINDS)}
    closed = [e.question.answer for e in shown if e.question.kind in ("compare", "present")]
    assert 0.45 < sum(answer.startswith("Yes") for answer in closed) / len(closed) < 0.55


def test_questions_carry_image_question_and_answer(tmp_path: Path) -> None:
    path = write_questions(tmp_path, 17, 3, "held_out")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 17
    for row in rows:
        with Image.open(tmp_path / row["image"]) as image:
            assert row["answer"] == true_answer(row["question"], read_bars(image))


def test_drawing_charts_does_not_import_torch() -> None:
    code = "import sys, fasttrain.demo.chart_files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
