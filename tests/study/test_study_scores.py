"""How a study's scores and intervals come about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fasttrain.errors import UserError
from fasttrain.study.scores import Scored, score_exactly, wilson
from fasttrain.study.spec import load_study


def test_intervals_are_wilsons_and_of_differences_a_bootstraps() -> None:
    # Newcombe 1998, table I: 81 of 263 by the score method
    right = Scored([str(n) for n in range(263)], np.arange(263) < 81, np.ones(263))
    assert right.interval() == pytest.approx((0.2553, 0.3662), abs=5e-5) == wilson(81, 263)
    values = np.random.default_rng(1).normal(3, 2, 900)
    graded = Scored([str(n) for n in range(900)], values, np.ones(900))
    half = 1.96 * values.std() / 30
    none = Scored(graded.questions, np.zeros(900), np.ones(900))
    assert graded.above(none)[1:] == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_differences_are_paired_by_question() -> None:
    """Two models that differ by 1 on every question differ surely, however much questions differ."""
    hard = np.arange(50.0) * 10
    names = [str(n) for n in range(50)]
    one, two = Scored(names, hard, hard), Scored(names[::-1], hard[::-1] + 1, hard)
    assert two.above(one) == pytest.approx((1, 1, 1))
    assert np.isnan(two.above(Scored(["other"], np.ones(1), np.ones(1)))[0])


def test_exact_scores_need_every_answer_and_every_truth(study_file: Any, tmp_path: Path) -> None:
    study_file()
    answers = tmp_path / "answers.jsonl"
    rows = [{"question_id": f"q{n}", "text": f" because {n if n % 4 else 'x'}\n"} for n in range(40)]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = score_exactly(tmp_path / "q.jsonl", answers)
    assert (scored.value, scored.count) == (0.75, 40)
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    with pytest.raises(UserError, match="wanted an answer to every question, got none to q39"):
        score_exactly(tmp_path / "q.jsonl", answers)
    (tmp_path / "open.jsonl").write_text('{"id": "a", "question": "Why?"}\n')
    with pytest.raises(UserError, match="line 1: answer: wanted the right answer as text"):
        score_exactly(tmp_path / "open.jsonl", answers)


def test_answers_of_questions_without_ids_are_found_by_their_place(study_file: Any, tmp_path: Path) -> None:
    """A file with blank lines, and one row with an id of its own: as `fasttrain answer` names them."""
    from fasttrain.answering.questions import read_questions

    study_file()
    rows = [{"question": f"Why {n}?", "answer": f"because {n}"} for n in range(4)]
    rows[2] |= {"id": None}
    rows[3] |= {"question_id": 77}
    path = tmp_path / "bare.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    load_study(study_file(evaluate={"held": {"questions": "bare.jsonl"}}))
    answers = tmp_path / "answers.jsonl"
    named = [
        {"question_id": q.id, "text": q.row["answer"] if q.id != 3 else "no"} for q in read_questions(path)
    ]
    answers.write_text("".join(json.dumps(row) + "\n" for row in named))
    scored = score_exactly(path, answers)
    assert scored.questions == ["1", "2", "3", "77"] and scored.scores.tolist() == [1, 1, 0, 1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"id": "b"},
            r"study\.yaml: evaluate\.held\.questions: .*bad\.jsonl line 2: answer: wanted the right answer",
        ),
        ({"id": "a", "answer": "x"}, "bad.jsonl line 2: question_id: wanted an id of its own, got 'a' again"),
        ({"id": "b", "answer": "x", "turns": ["one", "two"]}, "bad.jsonl line 2: turns: wanted one question"),
    ],
)
def test_questions_that_cannot_be_scored_are_named_before_anything_runs(
    row: dict[str, Any], message: str, study_file: Any, tmp_path: Path
) -> None:
    rows = [{"id": "a", "question": "Why?", "answer": "so"}, {"question": "Why?"} | row]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=message):
        load_study(study_file(evaluate={"held": {"questions": "bad.jsonl"}}))
