"""POPE: the official rule on answers worked by hand, on the real question file, and the paper's golden counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fasttrain.evaluate.pope_score import figures_of_counts, pope_figures, says_yes


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("yes", True),
        ("No", False),
        ("no", False),
        ("No, there is no snowboard in the image.", False),
        ("Yes, there is a dog. There is no cat.", True),  # only up to the first period
        ("The image does not show a car.", False),
        ("There is not", False),
        ("There isn't a person.", True),  # the rule knows no contractions
        ("NO", True),  # case counts
        ("No!", True),  # nothing but commas is removed
        ("no,", False),
        ("\nNo", True),  # words are what spaces separate
        ("Nothing is known", True),
        (".no", True),
        ("", True),
        ("Yes , no doubt", False),
    ],
)
def test_an_answer_is_no_only_if_a_word_before_the_first_period_says_so(text: str, yes: bool) -> None:
    assert says_yes(text) is yes


def test_the_papers_counts_give_the_papers_figures() -> None:
    figures = figures_of_counts(tp=1183, fp=31, tn=1379, fn=317)
    assert [round(figures[name], 4) for name in ("accuracy", "precision", "recall", "f1")] == [
        0.8804,
        0.9745,
        0.7887,
        0.8718,
    ]
    assert round((figures["f1"] + 0.8629 + 0.8450) / 3, 3) == 0.860
    assert figures["n"] == 2910 and figures["yes_ratio"] == (1183 + 31) / 2910


def test_figures_without_cases_are_zero_and_counts_are_those_of_a_loop() -> None:
    assert pope_figures([False, False], [False, False])["f1"] == 0.0
    labels, said = [True, True, False, True, False], [True, False, True, True, False]
    figures = pope_figures(labels, said)
    assert [figures[name] for name in ("tp", "fp", "tn", "fn")] == [2, 1, 1, 1]
    assert figures["f1"] == 2 * 2 / (2 * 2 + 1 + 1)


ANSWERS = {  # by label: texts that are right and wrong under the official rule, verbose and negated ones among them
    "yes": (
        ["Yes", "yes, a large one. No doubt.", "The image shows one", "Indeed!"],
        ["No", "I do not see one."],
    ),
    "no": (
        ["no", "No, there is none.", "It is not there, as far as I can see"],
        ["Yes", "There isn't any", "NO."],
    ),
}


def real_answers(
    shared_data: Path, tmp_path: Path, wrong_every: int
) -> tuple[Path, list[dict[str, Any]], list[bool]]:
    """An answer to each of the 3,000 real questions, every n-th wrong; the rows and who is right, by construction."""
    text = (shared_data / "pope" / "coco_pope_adversarial.json").read_text()
    questions = [json.loads(line) for line in text.splitlines()]
    rows, rights = [], []
    for number, question in enumerate(questions):
        right = number % wrong_every != 0
        texts = ANSWERS[question["label"]][not right]
        rows.append(
            {"question_id": question["question_id"], "text": texts[number % len(texts)], "model_id": "m"}
        )
        rights.append(right)
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, questions, rights


def test_the_real_question_file_is_scored_exactly(
    shared_data: Path, tmp_path: Path, fasttrain: Callable[..., Any], tiny_models: ModuleType
) -> None:
    path, questions, rights = real_answers(shared_data, tmp_path, wrong_every=7)
    code, out, err = fasttrain(
        "eval", "pope", "--data", shared_data / "pope", "--answers", path, "-o", tmp_path / "e"
    )
    assert (code, err) == (0, "")
    scores = json.loads((tmp_path / "e" / "scores.json").read_text())
    split = scores["adversarial"]
    labels = [question["label"] == "yes" for question in questions]
    tp = sum(label and right for label, right in zip(labels, rights))
    fp = sum(not label and not right for label, right in zip(labels, rights))
    assert split["n"] == 3000 and split["accuracy"] == sum(rights) / 3000
    assert split["precision"] == tp / (tp + fp) and split["recall"] == tp / sum(labels)
    assert split["yes_ratio"] == (tp + fp) / 3000
    assert split["f1"] == pytest.approx(
        2 * split["precision"] * split["recall"] / (split["precision"] + split["recall"])
    )
    assert scores["mean_f1"] == split["f1"] and f"{split['f1']:.4f}" in out
    results = tiny_models.read_rows(tmp_path / "e" / "results.jsonl")
    assert [row["score"] for row in results] == [float(right) for right in rights]


def test_the_mean_is_over_splits_and_arrays_are_read_as_lines_are(
    tmp_path: Path, fasttrain: Callable[..., Any], tiny_models: ModuleType
) -> None:
    def questions(labels: str) -> list[dict[str, Any]]:
        names = {"y": "yes", "n": "no"}
        return [
            {"question_id": n, "image": "x.jpg", "text": f"q{n}?", "label": names[c]}
            for n, c in enumerate(labels)
        ]

    tiny_models.write_rows(tmp_path / "coco_pope_random.json", questions("yyn"))
    (tmp_path / "coco_pope_popular.json").write_text(json.dumps(questions("ynnn"), indent=1))
    given = [{"question_id": n, "text": text} for n, text in enumerate(["Yes", "no", "No"])]
    (tmp_path / "r.json").write_text(json.dumps(given))
    own = [
        {"question": f"q{n}?", "answer": text} for n, text in enumerate(["yes", "Yes.", "no", "not at all"])
    ]
    tiny_models.write_rows(tmp_path / "p.jsonl", own)  # POPE's own answer format: in order, without ids
    words = (
        "eval",
        "pope",
        "--data",
        tmp_path,
        "--answers",
        f"random={tmp_path / 'r.json'}",
        "-o",
        tmp_path / "e",
    )
    assert fasttrain(*words, "--answers", f"popular={tmp_path / 'p.jsonl'}")[0] == 0
    scores = json.loads((tmp_path / "e" / "scores.json").read_text())
    assert scores["random"]["f1"] == pytest.approx(2 / 3) and scores["popular"]["f1"] == pytest.approx(2 / 3)
    assert scores["random"]["accuracy"] == pytest.approx(2 / 3) and scores["popular"]["accuracy"] == 0.75
    assert scores["mean_f1"] == pytest.approx(2 / 3)
    assert fasttrain(*words)[0] == 0
    assert "popular" not in json.loads((tmp_path / "e" / "scores.json").read_text())
    code, _, err = fasttrain(
        "eval", "pope", "--data", tmp_path, "--answers", tmp_path / "r.json", "-o", tmp_path / "e"
    )
    assert code == 2 and "wanted random=FILE, popular=FILE" in err
    tiny_models.write_rows(tmp_path / "p.jsonl", own[::-1])
    code, _, err = fasttrain(*words, "--answers", f"popular={tmp_path / 'p.jsonl'}")
    assert code == 2 and "wanted the order of" in err


def test_missing_repeated_and_foreign_answers_are_told_loudly(
    shared_data: Path, tmp_path: Path, fasttrain: Callable[..., Any], tiny_models: ModuleType
) -> None:
    path, _, rights = real_answers(shared_data, tmp_path, wrong_every=5)
    rows = tiny_models.read_rows(path)
    changed = [*rows[2:], rows[10], {**rows[11], "text": "Yes" if rows[11]["text"] == "no" else "no"}]
    tiny_models.write_rows(path, [*changed, {"question_id": 99_999, "text": "no"}])
    code, _, err = fasttrain(
        "eval", "pope", "--data", shared_data / "pope", "--answers", path, "-o", tmp_path / "e"
    )
    assert code == 3 and err.count("warning:") == 3
    assert "2 questions have no answer and are not in the score, first 1" in err
    assert "1 answers belong to no question, first 99999" in err
    assert "2 answers are repeats, 1 of them with another text; the last one of a question counts" in err
    split = json.loads((tmp_path / "e" / "scores.json").read_text())["adversarial"]
    assert (split["n"], split["missing"], split["duplicates"], split["unknown"]) == (2998, 2, 2, 1)
    del rights


@pytest.mark.parametrize("ids", [True, False])
def test_a_limit_leaves_answers_to_later_questions_known(
    ids: bool, tmp_path: Path, fasttrain: Callable[..., Any], tiny_models: ModuleType
) -> None:
    asked = [{"question_id": n, "image": "x.jpg", "text": f"q{n}?", "label": "yes"} for n in range(7)]
    tiny_models.write_rows(tmp_path / "coco_pope_random.json", asked)
    rows = [({"question_id": n} if ids else {"question": f"q{n}?"}) | {"answer": "Yes"} for n in range(7)]
    answers = tiny_models.write_rows(tmp_path / "a.jsonl", rows)
    words = ("eval", "pope", "--data", tmp_path, "-o", tmp_path / "e", "--limit", 3, "--answers")
    code, _, err = fasttrain(*words, answers)
    assert (code, err) == (0, "")
    split = json.loads((tmp_path / "e" / "scores.json").read_text())["random"]
    assert split["n"] == 3 and "unknown" not in split
    tiny_models.write_rows(answers, [*rows[3:], {"question_id": 99, "answer": "No"}] if ids else rows[:3])
    code, _, err = fasttrain(*words, answers)
    if ids:
        assert code == 2 and "got none of its first 3 question ids" in err
    else:
        assert code == 0


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        (
            None,
            "wanted POPE's question files coco_pope_<split>.json, got none; they are in github.com/AoiDragon/POPE",
        ),
        (
            [{"question_id": 1, "image": "x", "text": "q", "label": "Yes"}],
            "line 1: label: wanted yes or no, got Yes",
        ),
        ([{"question_id": 1, "image": "x", "label": "yes"}], "line 1: text: wanted a string"),
        (
            [{"question_id": 1, "image": "x", "text": "q", "label": "yes"}] * 2,
            "line 2: question_id: wanted an id of its",
        ),
        ([{"question_id": 5, "image": "x", "text": "q", "label": "yes"}], "got none of its 1 question ids"),
        ([], "wanted at least one question"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    questions: Any, message: str, tmp_path: Path, fasttrain: Callable[..., Any], tiny_models: ModuleType
) -> None:
    if questions is not None:
        tiny_models.write_rows(tmp_path / "coco_pope_random.json", questions)
    answers = tiny_models.write_rows(tmp_path / "a.jsonl", [{"question_id": 1, "text": "yes"}])
    code, _, err = fasttrain("eval", "pope", "--data", tmp_path, "--answers", answers, "-o", tmp_path / "e")
    assert code == 2 and message in err and err.count("\n") == 1


def test_absent_images_and_folders_say_what_to_download_and_where_to_put_it(
    shared_data: Path, tmp_path: Path, tiny_llava: Path, fasttrain: Callable[..., Any]
) -> None:
    words = ("eval", "pope", "-m", tiny_llava, "-o", tmp_path / "e", "--data")
    code, _, err = fasttrain(*words, shared_data / "pope")
    assert code == 2 and "pope/val2014" in err and "val2014.zip" in err
    code, _, err = fasttrain(*words, tmp_path / "nowhere")
    assert code == 2 and "nowhere" in err and "github.com/AoiDragon/POPE" in err


def test_a_model_answers_once_what_two_splits_ask_and_every_split_gets_its_official_file(
    tmp_path: Path, tiny_llava: Path, fasttrain: Callable[..., Any], tiny_models: ModuleType
) -> None:
    data = tmp_path / "data"
    for number in range(3):
        tiny_models.draw_image(data / "val2014" / f"{number}.png", seed=number)
    shared = [
        {"question_id": n, "image": f"{n % 3}.png", "text": f"Is there a {c} bar?", "label": "yes"}
        for n, c in enumerate(["red", "blue", "left"])
    ]
    for split, colours in (("random", ["green", "right"]), ("popular", ["highest", "lowest"])):
        own = [
            {"question_id": 3 + n, "image": f"{n}.png", "text": f"Is there a {c} bar?", "label": "no"}
            for n, c in enumerate(colours)
        ]
        tiny_models.write_rows(data / f"coco_pope_{split}.json", [*shared, *own])
    out = tmp_path / "e"
    words = (
        "eval",
        "pope",
        "-m",
        tiny_llava,
        "--data",
        data,
        "-o",
        out,
        "--max-new-tokens",
        6,
        "--model-id",
        "tiny",
    )
    code, text, err = fasttrain(*words)
    assert code == 0 and "7 questions answered" in err, err
    scores = json.loads((out / "scores.json").read_text())
    assert scores["random"]["n"] == scores["popular"]["n"] == 5 and scores["model"] == "tiny"
    assert "mean F1 of 2 splits" in text
    rows = tiny_models.read_rows(out / "coco_pope_random_answers.jsonl")
    assert [row["question_id"] for row in rows] == list(range(5))
    assert rows[0]["prompt"] == "Is there a red bar?\nAnswer the question using a single word or phrase."
    assert all(row["answer"] == row["text"] and row["question"].endswith("bar?") for row in rows)
    before = {path.name: path.read_bytes() for path in out.glob("*")}
    assert fasttrain(*words)[0] == 0  # from the journal
    assert {path.name: path.read_bytes() for path in out.glob("*")} == before
    files = [f"{split}={out / f'coco_pope_{split}_answers.jsonl'}" for split in ("random", "popular")]
    assert (
        fasttrain(
            "eval", "pope", "--data", data, "--answers", files[0], "--answers", files[1], "-o", tmp_path / "f"
        )[0]
        == 0
    )
    assert json.loads((tmp_path / "f" / "scores.json").read_text()) == scores
    assert fasttrain(*words, "--limit", 4, "--prompt-suffix", "")[0] == 0
    assert json.loads((out / "scores.json").read_text())["random"]["n"] == 4
    code, _, err = fasttrain("eval", "mmbench", *words[2:])
    assert code == 2 and "holds an evaluation on pope" in err


def test_a_file_that_cannot_be_scored_leaves_no_scores_of_another(
    tmp_path: Path, write_rows: Callable[..., Path], fasttrain: Callable[..., Any]
) -> None:
    asked = [{"question_id": n, "image": "1.jpg", "text": f"Is it {n}?", "label": "yes"} for n in range(4)]
    write_rows(tmp_path / "data" / "coco_pope_random.json", asked)
    for name, first in (("good", 0), ("foreign", 90)):
        answers = [{"question_id": first + n, "text": "Yes"} for n in range(4)]
        write_rows(tmp_path / f"{name}.jsonl", answers)
    out = tmp_path / "out"
    words = ("eval", "pope", "--data", tmp_path / "data", "-o", out, "--answers")
    assert fasttrain(*words, tmp_path / "good.jsonl")[0] == 0 and (out / "results.jsonl").is_file()
    assert fasttrain(*words, tmp_path / "foreign.jsonl")[0] == 2
    assert not list(out.glob("scores.json*")) and not list(out.glob("results.jsonl*"))
