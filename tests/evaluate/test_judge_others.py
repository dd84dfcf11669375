"""MM-Vet and AlpacaEval through a judge: what is asked, what counts, and the official files."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasttrain.errors import UserError
from fasttrain.evaluate.judging import JudgeOptions, judge_benchmark

MM_VET = {
    "v1_0": {
        "imagename": "0.jpg",
        "question": "What is x?",
        "answer": "-1<AND>-5",
        "capability": ["ocr", "math"],
    },
    "v1_1": {
        "imagename": "1.jpg",
        "question": "Which {animal}?",
        "answer": "dog<OR>puppy",
        "capability": ["rec"],
    },
    "v1_2": {"imagename": "2.jpg", "question": "Read it.", "answer": "STOP", "capability": ["math", "ocr"]},
    "v1_3": {"imagename": "3.jpg", "question": "Colour?", "answer": "red", "capability": ["rec"]},
}


@pytest.fixture
def mm_vet(tmp_path: Path) -> Path:
    folder = tmp_path / "mm-vet"
    folder.mkdir()
    (folder / "mm-vet.json").write_text(json.dumps(MM_VET))
    (tmp_path / "model-x.json").write_text(
        json.dumps({"v1_0": "x = -1", "v1_1": "{answer} a puppy", "v1_2": "STOP", "v1_3": "blue"})
    )
    return folder


def test_mm_vet_asks_again_warmer_after_a_bad_reply_and_gives_zero_after_five(
    mm_vet: Path,
    tmp_path: Path,
    judge_double: Any,
    options: Callable[..., JudgeOptions],
    rows_of: Callable[[Path], list[dict[str, Any]]],
) -> None:
    seen: Counter[str] = Counter()

    def say(body: dict[str, Any]) -> str:
        case = body["messages"][-1]["content"]
        if "| x = -1 |" in case:
            seen["x"] += 1
            return "0.5"
        if "a puppy" in case:  # good at the third try
            seen["puppy"] += 1
            return ["The", "", "1.0"][seen["puppy"] - 1]
        if "blue" in case:
            seen["blue"] += 1
            return "" if seen["blue"] == 5 else "**1.0**"
        return "1.0"

    judge_double.say = say
    out = tmp_path / "out"
    scores = judge_benchmark("mm-vet", mm_vet, tmp_path / "model-x.json", out, options(judge_double))
    assert seen == {"x": 1, "puppy": 3, "blue": 5}
    warm = [body["temperature"] for body in judge_double.bodies if "blue" in body["messages"][-1]["content"]]
    assert warm == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert {body["max_tokens"] for body in judge_double.bodies} == {3}
    assert scores["score"] == pytest.approx(100 * (0.5 + 1 + 1 + 0) / 4)
    assert scores["zero_after_bad_replies"] == 1 and scores["asked_again"] == 2 and scores["excluded"] == {}
    assert scores["capabilities"]["ocr"] == {"score": 75.0, "n": 2, "mean_answer_chars": 5.0}
    assert scores["capabilities"]["rec"]["score"] == 50.0
    assert scores["combinations"]["math_ocr"]["score"] == 75.0
    first = next(prompt for prompt in judge_double.prompts if "puppy" in prompt)
    assert first.endswith("Which {animal}? | dog <OR> puppy | {answer} a puppy |")

    grades = json.loads((out / "model-x_judge-1-grade-1runs.json").read_text())
    assert grades["v1_1"] == {"model": ["judge-2026-01"], "content": ["1.0"], "score": [1.0]}
    with (out / "model-x_judge-1-cap-score-1runs.csv").open() as file:
        head, row = list(csv.reader(file))
    assert head == ["", "ocr", "math", "rec", "total", "std", "runs"] or head[-3:] == ["total", "std", "runs"]
    assert row[0] == "model-x" and row[head.index("total")] == "62.5" and row[head.index("rec")] == "50.0"
    assert rows_of(out / "results.jsonl")[3] == {
        "id": "v1_3", "question_id": "v1_3", "category": "rec", "score": 0.0, "answer_chars": 4, "status": "ok",
        "capabilities": ["rec"], "tries": 5,
    }  # fmt: skip


def test_mm_vet_leaves_out_what_the_judge_never_answered(
    mm_vet: Path, tmp_path: Path, judge_double: Any, options: Callable[..., JudgeOptions]
) -> None:
    judge_double.say = lambda body: "1.0"
    judge_double.fault = lambda body, attempt: (
        "blocked" if "blue" in body["messages"][-1]["content"] else None
    )
    out = tmp_path / "out"
    scores = judge_benchmark("mm-vet", mm_vet, tmp_path / "model-x.json", out, options(judge_double))
    assert scores["score"] == 100 and scores["n"] == 3 and scores["excluded"] == {"blocked_answer": 1}
    assert "v1_3" not in json.loads((out / "model-x_judge-1-grade-1runs.json").read_text())


def test_mm_vet_takes_the_benchmarks_own_prompt_from_the_data_folder(
    mm_vet: Path, tmp_path: Path, judge_double: Any, options: Callable[..., JudgeOptions]
) -> None:
    (mm_vet / "mm-vet-prompt.txt").write_text("Own few-shot text with {braces}.\n")
    judge_double.say = lambda body: "1.0"
    judge_benchmark("mm-vet", mm_vet, tmp_path / "model-x.json", tmp_path / "out", options(judge_double))
    assert "Own few-shot text with {braces}.\nRead it. | STOP | STOP | " in judge_double.prompts


INSTRUCTIONS = [f"instruction {n} {{instruction}}" for n in range(40)]


@pytest.fixture
def alpaca(tmp_path: Path) -> Path:
    folder = tmp_path / "alpaca"
    folder.mkdir()
    reference = [
        {"instruction": text, "output": f"davinci {n}", "generator": "text_davinci_003", "dataset": "koala"}
        for n, text in enumerate(INSTRUCTIONS)
    ]
    (folder / "alpaca_eval.json").write_text(json.dumps(reference))
    ours = [
        {"instruction": text, "output": "davinci 0" if n == 0 else f"ours {n}", "generator": "dpo"}
        for n, text in enumerate(INSTRUCTIONS)
    ]
    (tmp_path / "outputs.json").write_text(json.dumps(ours))
    return folder


def ranking(first: str) -> str:
    other = "model_2" if first == "model_1" else "model_1"
    return f"[{{'model': '{first}', 'rank': 1}}, {{'model': '{other}', 'rank': 2}}]"


def test_alpaca_eval_win_rate_undoes_the_shuffled_order(
    alpaca: Path, tmp_path: Path, judge_double: Any, options: Callable[..., JudgeOptions]
) -> None:
    places: Counter[bool] = Counter()

    def say(body: dict[str, Any]) -> str:
        prompt = body["messages"][1]["content"]
        number = int(re.findall(r"instruction (\d+)", prompt)[0])
        first = prompt.index("ours") < prompt.index("davinci")
        places[first] += 1
        if number == 1:
            return "Both are fine."
        ours_wins = number % 4 != 0  # 2 .. 39: 9 losses of 38
        return ranking("model_1" if ours_wins == first else "model_2")

    judge_double.say = say
    out = tmp_path / "out"
    scores = judge_benchmark("alpaca-eval", alpaca, tmp_path / "outputs.json", out, options(judge_double))
    assert len(judge_double.bodies) == 39, "equal outputs are a draw and cost nothing"
    assert min(places.values()) >= 10, "the model's answer stands in either place"
    assert (scores["wins"], scores["losses"], scores["ties"]) == (29, 9, 1)
    assert scores["score"] == scores["win_rate"] == pytest.approx(100 * 29.5 / 39)
    assert scores["excluded"] == {"parse_failed": 1}
    values = [1.0] * 29 + [0.0] * 9 + [0.5]
    middle = sum(values) / 39
    spread = (sum((value - middle) ** 2 for value in values) / 38) ** 0.5
    assert scores["standard_error"] == pytest.approx(100 * spread / 39**0.5)
    assert {(body["temperature"], body["max_tokens"]) for body in judge_double.bodies} == {(0.0, 100)}
    annotations = json.loads((out / "annotations.json").read_text())
    assert [row["preference"] for row in annotations[:6]] == [1.5, None, 2.0, 2.0, 1.0, 2.0]
    assert annotations[2]["output_1"] == "davinci 2" and annotations[2]["generator_2"] == "dpo"
    with (out / "leaderboard.csv").open() as file:
        row = next(csv.DictReader(file))
    assert (
        row[""] == "dpo"
        and float(row["win_rate"]) == pytest.approx(scores["score"])
        and row["n_total"] == "39"
    )


def test_alpaca_eval_shows_a_judge_that_looks_at_places(
    alpaca: Path, tmp_path: Path, judge_double: Any, options: Callable[..., JudgeOptions]
) -> None:
    judge_double.say = lambda body: ranking("model_1")
    out = tmp_path / "out"
    scores = judge_benchmark("alpaca-eval", alpaca, tmp_path / "outputs.json", out, options(judge_double))
    assert scores["win_rate_when_shown_first"] == 100 and scores["win_rate_when_shown_second"] == 0


def test_alpaca_eval_pairs_instructions_whatever_is_missing_and_in_whatever_order(
    alpaca: Path,
    tmp_path: Path,
    judge_double: Any,
    options: Callable[..., JudgeOptions],
    rows_of: Callable[[Path], list[dict[str, Any]]],
) -> None:
    """A model that lacks the first answer, against a reference file turned round: its results keep their names."""
    judge_double.say = lambda body: ranking("model_1")
    reference = json.loads((alpaca / "alpaca_eval.json").read_text())
    (tmp_path / "turned.json").write_text(json.dumps(reference[::-1]))
    ours = json.loads((tmp_path / "outputs.json").read_text())
    (tmp_path / "fewer.json").write_text(json.dumps(ours[1:]))
    judged = {}
    for name, file, more in (
        ("base", "outputs.json", {}),
        ("dpo", "fewer.json", {"partial": True}),
        ("turned", "outputs.json", {"baseline": tmp_path / "turned.json"}),
    ):
        out = tmp_path / name
        judge_benchmark("alpaca-eval", alpaca, tmp_path / file, out, options(judge_double, **more))
        texts = [row["instruction"] for row in json.loads((out / "annotations.json").read_text())]
        names = [row["question_id"] for row in rows_of(out / "results.jsonl")]
        assert len(set(names)) == len(names)
        judged[name] = dict(zip(names, texts, strict=True))
    assert len(judged["base"]) == 40 and len(judged["dpo"]) == 39
    assert judged["dpo"].items() < judged["base"].items()
    assert judged["turned"] == judged["base"]


def test_alpaca_eval_takes_a_chat_prompt_from_the_data_folder(
    alpaca: Path, tmp_path: Path, judge_double: Any, options: Callable[..., JudgeOptions]
) -> None:
    (alpaca / "alpaca_eval.txt").write_text(
        "<|im_start|>system\nRank.\n<|im_end|>\n<|im_start|>user\n"
        '{ "i": "{instruction}", "a": "{output_1}", "b": "{output_2}" }\n<|im_end|>\n'
    )
    judge_double.say = lambda body: ranking("model_1")
    judge_benchmark("alpaca-eval", alpaca, tmp_path / "outputs.json", tmp_path / "out", options(judge_double))
    assert {body["messages"][0]["content"] for body in judge_double.bodies} == {"Rank."}
    assert any(
        '{ "i": "instruction 7 {instruction}", "a": "ours 7", "b": "davinci 7" }' in p
        or '{ "i": "instruction 7 {instruction}", "a": "davinci 7", "b": "ours 7" }' in p
        for p in judge_double.prompts
    )


@pytest.mark.parametrize(
    ("bench", "answers", "prompt", "reply"),
    [
        ("mm-vet", "model-x.json", "Mark it.", "1.0"),
        ("alpaca-eval", "outputs.json", "Rank {instruction}: {output_1} or {output_2}?", ranking("model_1")),
    ],
)
def test_scores_tell_judge_prompts_apart(
    bench: str, answers: str, prompt: str, reply: str, mm_vet: Path, alpaca: Path, tmp_path: Path,
    judge_double: Any, options: Callable[..., JudgeOptions],
) -> None:  # fmt: skip
    judge_double.say = lambda body: reply
    data = {"mm-vet": mm_vet, "alpaca-eval": alpaca}[bench]

    def hash_under(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        judge = options(judge_double, prompt=tmp_path / name)
        return str(judge_benchmark(bench, data, tmp_path / answers, tmp_path / "out", judge)["judge_prompt"])

    assert (
        hash_under("a.txt", prompt) == hash_under("b.txt", prompt) != hash_under("c.txt", f"Well. {prompt}")
    )


def test_scores_tell_the_judges_temperature(
    mm_vet: Path, alpaca: Path, tmp_path: Path, judge_double: Any, options: Callable[..., JudgeOptions]
) -> None:
    for bench, data, answers, reply in (
        ("mm-vet", mm_vet, "model-x.json", "1.0"),
        ("alpaca-eval", alpaca, "outputs.json", ranking("model_1")),
    ):
        judge_double.say = lambda body, reply=reply: reply
        for given, asked in ((None, 0.0), (0.0, 0.0), (0.7, 0.7)):
            judge = options(judge_double, temperature=given)
            scores = judge_benchmark(bench, data, tmp_path / answers, tmp_path / f"{bench}{given}", judge)
            assert scores["judge_temperature"] == asked == judge_double.bodies[-1]["temperature"]


@pytest.mark.parametrize(
    ("bench", "break_it", "message"),
    [
        ("mm-vet", lambda t: (t / "mm-vet" / "mm-vet.json").unlink(), "wanted the questions as mm-vet.json"),
        (
            "mm-vet",
            lambda t: (t / "model-x.json").write_text("[1]"),
            "model-x.json: wanted a JSON object, got a list",
        ),
        (
            "mm-vet",
            lambda t: (t / "model-x.json").write_text('{"v1_0": '),
            "model-x.json line 1: wanted a JSON object",
        ),
        ("mm-vet", lambda t: (t / "model-x.json").write_text('{"v9": "x"}'), "got none of its 4 ids"),
    ],
)
def test_broken_mm_vet_files_are_named(
    bench: str,
    break_it: Callable[[Path], Any],
    message: str,
    mm_vet: Path,
    tmp_path: Path,
    judge_double: Any,
    options: Callable[..., JudgeOptions],
) -> None:
    break_it(tmp_path)
    with pytest.raises(UserError) as error:
        judge_benchmark(bench, mm_vet, tmp_path / "model-x.json", tmp_path / "out", options(judge_double))
    assert message in str(error.value) and "\n" not in str(error.value)
