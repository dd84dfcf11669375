"""Comparison of models: scores and tests against independent truths, files against what they must hold."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fasttrain import cli
from fasttrain.errors import UserError
from fasttrain.evaluate.comparing import (
    compare,
    markdown,
    read_evaluations,
    terminal_lines,
    write_comparison,
)

Rows = list[dict[str, Any]]


@pytest.fixture
def write_eval(tmp_path: Path, write_rows: Callable[..., Path]) -> Callable[..., Path]:
    def write(name: str, bench: str, rows: Rows, **scores: Any) -> Path:
        folder = tmp_path / name
        write_rows(folder / "results.jsonl", rows)
        (folder / "scores.json").write_text(
            json.dumps({"benchmark": bench, "model": name.split("/")[0], **scores})
        )
        return folder

    return write


def row(question: Any, score: float | None, chars: int = 10, **extra: Any) -> dict[str, Any]:
    status = "ok" if score is not None else "parse_failed"
    return {
        "id": str(question), "question_id": question, "category": None, "score": score, "answer_chars": chars,
        "status": status, **extra,
    }  # fmt: skip


def pope_row(split: str, question: int, label: str, prediction: str) -> dict[str, Any]:
    right = float(label == prediction)
    return row(question, right, split=split, label=label, prediction=prediction)


def test_pope_is_the_mean_of_the_splits_f1(write_eval: Callable[..., Path]) -> None:
    def rows(hits: int, false_alarms: int, misses: int, right_noes: int, split: str) -> Rows:
        kinds = [("yes", "yes")] * hits + [("no", "yes")] * false_alarms + [("yes", "no")] * misses
        kinds += [("no", "no")] * right_noes
        return [pope_row(split, number, *kind) for number, kind in enumerate(kinds)]

    # LLaVA-1.5-13B on the older random split, PAPER.md section 8: F1 .8718
    folder = write_eval(
        "m/pope", "pope", rows(1183, 31, 317, 1379, "random") + rows(90, 10, 30, 70, "popular")
    )
    comparison = compare(read_evaluations([str(folder)]), resamples=2000)
    first, second = 2 * 1183 / (2 * 1183 + 31 + 317), 2 * 90 / (2 * 90 + 10 + 30)
    assert round(first, 4) == 0.8718
    assert comparison.scores[0].score == pytest.approx((first + second) / 2)
    low, high = comparison.scores[0].interval
    assert low < comparison.scores[0].score < high and 0.02 < high - low < 0.08
    assert comparison.scores[0].questions == 2910 + 200


def test_pope_tests_pair_questions_by_split(write_eval: Callable[..., Path], tmp_path: Path) -> None:
    truth = ["yes", "no"] * 50
    for name, wrong in (("base", range(40)), ("dpo", range(20))):
        rows = [
            pope_row(split, n, label, label if n not in wrong else ("no" if label == "yes" else "yes"))
            for split in ("random", "popular")
            for n, label in enumerate(truth)
        ]
        write_eval(f"{name}/pope", "pope", list(reversed(rows)) if name == "dpo" else rows)
    folders = [
        str(write_eval.__closure__ and write_eval.__closure__[0].cell_contents / n) for n in ("base", "dpo")
    ]
    comparison = compare(read_evaluations(folders), resamples=2000)
    (test,) = comparison.tests
    assert test.test.n == 200 and test.test.difference == pytest.approx(0.8 - 0.6)
    assert test.test.mcnemar == pytest.approx(2 / 2**40)
    assert test.test.p_value < 0.002 and test.test.interval[0] > 0.1


def test_a_question_that_several_splits_ask_counts_once(write_eval: Callable[..., Path]) -> None:
    """POPE's "yes" questions are the same in all three: twenty of them gained are twenty, not sixty."""
    splits, rng = ("random", "popular", "adversarial"), np.random.default_rng(5)
    noes = {split: ["yes" if rng.random() < 0.2 else "no" for _ in range(30)] for split in splits}

    def write(name: str, hits: int, column: bool) -> str:
        rows = []
        for split in splits:
            asked = [("yes", "yes" if n < hits else "no", f"shared {n}") for n in range(30)]
            asked += [("no", said, f"{split} {n}") for n, said in enumerate(noes[split])]
            for number, (label, said, question) in enumerate(asked):
                rows.append(pope_row(split, number, label, said) | ({"asked": question} if column else {}))
        return str(write_eval(f"{name}/pope", "pope", rows))

    told = compare(read_evaluations([write("base", 5, True), write("dpo", 25, True)]), resamples=4000)
    (test,) = told.tests
    assert test.test.n == 30 + 3 * 30 and [row.questions for row in told.scores] == [120, 120]
    assert test.test.mcnemar == pytest.approx(2 / 2**20) and not told.warnings
    old = compare(read_evaluations([write("base", 5, False), write("dpo", 25, False)]), resamples=4000)
    assert old.tests[0].test.mcnemar == pytest.approx(2 / 2**60) and old.tests[0].test.n == 180
    assert sum("does not say which questions its splits share" in line for line in old.warnings) == 2
    for new, before in zip(told.scores, old.scores, strict=True):
        assert new.score == before.score
        # the hits of three splits move as one: nearly sqrt(3) times as wide
        assert 1.3 < np.diff(new.interval)[0] / np.diff(before.interval)[0] < 1.9
    mixed = compare(read_evaluations([write("base", 5, True), write("dpo", 25, False)]), resamples=500)
    assert mixed.tests[0].test.n == 180 and len(mixed.warnings) == 1


def test_the_bootstrap_of_shared_questions_equals_one_that_draws_them_one_by_one(
    write_eval: Callable[..., Path],
) -> None:
    rng = np.random.default_rng(2)
    shared = rng.random(40) < 0.7
    false_alarms = {split: rng.random(40) < 0.3 for split in ("popular", "random")}
    rows = []
    for split, alarms in false_alarms.items():
        rows += [
            pope_row(split, n, "yes", "yes" if hit else "no") | {"asked": f"y{n}"}
            for n, hit in enumerate(shared)
        ]
        rows += [
            pope_row(split, 40 + n, "no", "yes" if alarm else "no") | {"asked": f"{split}{n}"}
            for n, alarm in enumerate(alarms)
        ]
    comparison = compare(read_evaluations([str(write_eval("m/pope", "pope", rows))]), resamples=20000)
    drawn = []
    for _ in range(20000):
        hits = shared[rng.integers(0, 40, 40)].sum()
        wrong = [alarms[rng.integers(0, 40, 40)].sum() for alarms in false_alarms.values()]
        drawn.append(np.mean([2 * hits / (2 * hits + false + 40 - hits) for false in wrong]))
    assert comparison.scores[0].interval == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.01)


def test_turns_of_a_question_stay_together_and_excluded_ones_do_not_count(
    write_eval: Callable[..., Path],
) -> None:
    rows = [row(n // 2, float(n // 2 % 10), chars=100) for n in range(160)]
    rows[5] = row(2, None, chars=9999)
    folder = write_eval("m", "mt-bench", rows)
    (score,) = compare(read_evaluations([str(folder)]), resamples=4000).scores
    assert (score.n, score.questions, score.excluded) == (159, 80, {"parse_failed": 1})
    assert score.mean_answer_chars == 100
    # question 2 has one turn left
    assert score.score == pytest.approx((2 * sum(n % 10 for n in range(80)) - 2) / 159)
    # both turns of a question have one value: the spread is that of 80 draws, not of 160
    spread = np.std([n % 10 for n in range(80)]) / math.sqrt(80)
    assert score.interval[1] - score.interval[0] == pytest.approx(2 * 1.96 * spread, rel=0.05)


def test_llava_bench_is_the_ratio_of_sums_and_its_categories_too(write_eval: Callable[..., Path]) -> None:
    marks = [(8, 6), (10, 7), (9, 9), (10, 5)]
    rows = [
        {**row(n, b, reference_score=a), "category": "conv" if n < 2 else "detail"}
        for n, (a, b) in enumerate(marks)
    ]
    (score,) = compare(read_evaluations([str(write_eval("m", "llava-bench", rows))]), resamples=500).scores
    assert score.score == pytest.approx(100 * 27 / 37)
    assert score.categories == pytest.approx({"conv": 100 * 13 / 18, "detail": 100 * 14 / 19})


def test_folders_of_several_benchmarks_are_named_by_their_folder_or_as_told(
    write_eval: Callable[..., Path], tmp_path: Path
) -> None:
    for name in ("base", "dpo"):
        write_eval(f"{name}/mmbench", "mmbench", [row(n, float(n % 2)) for n in range(8)], model="same")
        write_eval(f"{name}/mm-vet", "mm-vet", [row(f"v1_{n}", 0.5) for n in range(4)], model="same")
    comparison = compare(read_evaluations([str(tmp_path / "base"), f"DPO={tmp_path / 'dpo'}"]), resamples=200)
    assert comparison.models == ("base", "DPO") and comparison.baseline == "base"
    assert [(r.benchmark, r.model) for r in comparison.scores] == [
        ("mm-vet", "base"), ("mm-vet", "DPO"), ("mmbench", "base"), ("mmbench", "DPO")
    ]  # fmt: skip
    assert [test.test.p_value for test in comparison.tests] == [1.0, 1.0]


def test_questions_of_only_one_model_are_left_out_of_the_test_and_told(
    write_eval: Callable[..., Path],
) -> None:
    base = write_eval("base", "mmbench", [row(n, 1.0) for n in range(10)])
    dpo = write_eval("dpo", "mmbench", [row(n, 1.0 if n > 3 else None) for n in range(12)])
    comparison = compare(read_evaluations([str(base), str(dpo)]), resamples=200)
    assert comparison.tests[0].test.n == 6
    assert (
        "MMBench, % right: 6 questions or turns of them were scored for only one of dpo and base"
        in comparison.warnings[0]
    )


def test_a_turn_that_only_one_model_was_scored_on_is_in_no_test(write_eval: Callable[..., Path]) -> None:
    """A second turn is harder: a question whose second turn could not be read looks better than it is."""

    def turns(first: float, second: float | None) -> Rows:
        return [
            row(n, score, turn=turn) | {"id": f"{n}/{turn}"}
            for n in range(20)
            for turn, score in ((1, first), (2, second))
        ]

    folders = [
        write_eval("base", "mt-bench", turns(8.0, 4.0)),
        write_eval("dpo", "mt-bench", turns(7.0, None)),
    ]
    comparison = compare(read_evaluations([str(folder) for folder in folders]), resamples=500)
    [test] = comparison.tests
    assert test.test.difference == pytest.approx(-1.0)
    assert [found.score for found in comparison.scores] == [6.0, 7.0]
    assert "20 questions or turns of them were scored for only one of dpo and base" in comparison.warnings[0]


def test_different_judges_are_warned_of(write_eval: Callable[..., Path]) -> None:
    rows = [row(n, 5.0) for n in range(5)]
    one = write_eval("a", "mt-bench", rows, judge={"model": "g", "versions": {"g-001": 1}})
    two = write_eval("b", "mt-bench", rows, judge={"model": "g", "versions": {"g-002": 1}})
    comparison = compare(read_evaluations([str(one), str(two)]), resamples=200)
    assert "the judges differ (a: g-001; b: g-002)" in comparison.warnings[0]


@pytest.mark.parametrize(
    ("bench", "one", "two", "told"),
    [
        ("mmbench", {"rotations": 4}, {"rotations": 1}, "(a: rotated; b: not rotated)"),
        ("mmbench", {"rotations": 4}, {"rotations": 3}, None),  # --limit left a question of three options
        (
            "alpaca-eval",
            {"reference": "davinci"},
            {"reference": "gpt-4"},
            "(a: against davinci, ",
        ),
        (
            "mt-bench",
            {"mode": "pairwise", "baseline": "sft"},
            {"mode": "pairwise", "baseline": "base"},
            "(a: against sft, ",
        ),
        ("alpaca-eval", {"judge_prompt": "f0"}, {"judge_prompt": "f1"}, "the judge's prompt has hash f1"),
        ("mm-vet", {"judge_prompt": "f0"}, {"judge_prompt": "f1"}, "the judge's prompt has hash f0; b: "),
        ("mm-vet", {"judge_prompt": "f0"}, {"judge_prompt": "f0"}, None),
        (
            "mt-bench",
            {"judge_prompt": "f0"},
            {"judge_prompt": "f1"},
            "the judge's prompt has hash f0; b: ",
        ),
        ("mt-bench", {"mode": "pairwise"}, {"mode": "pairwise", "judge_prompt": "f1"}, "has hash f1)"),
        ("llava-bench", {"judge_prompt": "f0"}, {"judge_prompt": "f1"}, "has hash f1)"),
        (
            "mt-bench",
            {"judge_temperature": 0.0},
            {"judge_temperature": 1.0},
            "(a: the judge's temperature 0.0, the judge's prompt has hash what the file does not say; b: the judge's temperature 1.0,",
        ),
        ("llava-bench", {"judge_system": "Be precise."}, {}, "(a: the judge told Be precise., "),
        ("llava-bench", {}, {}, None),
    ],
)
def test_scores_made_in_different_settings_are_warned_of(
    bench: str, one: Any, two: Any, told: str | None, write_eval: Callable[..., Path]
) -> None:
    rows = [row(n, float(n % 2), reference_score=8) for n in range(6)]
    folders = [write_eval("a", bench, rows, **one), write_eval("b", bench, rows, **two)]
    warnings = compare(read_evaluations([str(folder) for folder in folders]), resamples=200).warnings
    assert len(warnings) == (told is not None)
    assert told is None or (told in warnings[0] and "do not compare" in warnings[0])


def test_the_page_stands_alone_and_shows_names_inert(write_eval: Callable[..., Path], tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>|`x`$a$"
    rows = [row(n, float(n % 3 > 0), chars=1234) for n in range(30)]
    base = write_eval("base", "mmbench", rows)
    other = write_eval("other", "mmbench", [row(n, 1.0, chars=2000) for n in range(30)], model=evil)
    comparison = compare(read_evaluations([str(base), str(other)]), resamples=500)
    html, md, png, numbers = write_comparison(comparison, tmp_path / "out")
    page = html.read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert not re.search(r"""(src|href)=["'](?!data:image/png;base64,)""", page)
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "1,234" in page and "2,000" in page and "66.7" in page and "100.0" in page
    assert "\\<script\\>alert(1)\\</script\\>\\|\\`x\\`" in md.read_text()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in md.read_text().splitlines() if "MMBench, % right |" in line} == {
        8, 11
    }  # fmt: skip
    told = json.loads(numbers.read_text())
    assert told["scores"][0]["score"] == pytest.approx(200 / 3) and told["tests"][0]["test"]["n"] == 30


def test_the_same_seed_gives_the_same_numbers(write_eval: Callable[..., Path]) -> None:
    rng = np.random.default_rng(0)
    folders = [
        str(write_eval(name, "mt-bench", [row(n, float(rng.integers(1, 11))) for n in range(40)]))
        for name in "ab"
    ]
    first, second = (compare(read_evaluations(folders), resamples=500, seed=4) for _ in range(2))
    assert first == second != compare(read_evaluations(folders), resamples=500, seed=5)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda f: (f / "scores.json").unlink(),
            "wanted scores.json in it or in the folders in it, got none",
        ),
        (lambda f: (f / "scores.json").write_text("{"), "scores.json line 1: wanted a JSON object"),
        (lambda f: (f / "scores.json").write_text("{}"), "scores.json: benchmark: wanted one of mt-bench"),
        (lambda f: (f / "results.jsonl").unlink(), "wanted results.jsonl beside scores.json"),
        (lambda f: (f / "results.jsonl").write_text(""), "wanted scored answers, got 0 rows"),
        (
            lambda f: (f / "results.jsonl").write_text('{"score": "x"}\n'),
            "results.jsonl line 1: score: wanted a number",
        ),
        (
            lambda f: (f / "results.jsonl").write_text('{"score": 1, "answer_chars": 1, "question_id": 1}\n'),
            "results.jsonl line 1: split: wanted the columns of this benchmark",
        ),
    ],
)
def test_a_broken_folder_is_named_in_one_line(
    break_it: Callable[[Path], Any], message: str, write_eval: Callable[..., Path]
) -> None:
    folder = write_eval("m", "pope", [pope_row("random", 1, "yes", "yes")])
    break_it(folder)
    with pytest.raises(UserError) as error:
        read_evaluations([str(folder)])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_two_evaluations_of_one_name_are_refused(write_eval: Callable[..., Path]) -> None:
    one = write_eval("one", "mmbench", [row(1, 1.0)], model="llava")
    two = write_eval("two", "mmbench", [row(1, 1.0)], model="llava")
    with pytest.raises(UserError, match=r"both say 'llava' on mmbench: name them, NAME=FOLDER"):
        read_evaluations([str(one), str(two)])


def test_tables_fit_the_terminal_and_tell_all_that_a_file_of_them_does(
    write_eval: Callable[..., Path],
) -> None:
    base = write_eval("base", "mmbench", [row(n, float(n % 2)) for n in range(20)], model="llava-1.5-7b-base")
    dpo = write_eval("dpo", "mmbench", [row(n, 1.0) for n in range(20)], model="llava-1.5-7b-dpo")
    comparison = compare(read_evaluations([str(base), str(dpo)]), resamples=500)
    wide, narrow = ("\n".join(terminal_lines(comparison, width)) for width in (None, 80))
    assert max(map(len, wide.splitlines())) > 80 >= max(map(len, narrow.splitlines()))
    assert set(wide.split()) == set(narrow.split())
    assert narrow.count("MMBench, % right  llava-1.5-7b-dpo") == 4  # each table in two parts


def test_the_command_prints_the_tables_and_writes_the_page(
    write_eval: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = write_eval("base_1", "mmbench", [row(n, float(n % 2)) for n in range(20)])
    dpo = write_eval("dpo", "mmbench", [row(n, 1.0) for n in range(20)])
    out = tmp_path / "page"
    words = ["fasttrain", "compare", str(base), f"DPO={dpo}", "-o", str(out), "--resamples", "500"]
    monkeypatch.setattr(sys, "argv", words)
    cli.main()
    printed = capsys.readouterr().out
    assert (
        "MMBench, % right  DPO         +50.0  " in printed
        and " base_1 " in printed
        and f"page: {out / 'comparison.html'}" in printed
    )
    assert (
        markdown(compare(read_evaluations([str(base), f"DPO={dpo}"]), resamples=500))
        == (out / "comparison.md").read_text()
    )
    monkeypatch.setattr(sys, "argv", [*words, "--baseline", "DP0"])
    with pytest.raises(SystemExit) as leave:
        cli.main()
    assert leave.value.code == 2
    assert "--baseline: wanted one of base_1, DPO, got 'DP0'; did you mean 'DPO'?" in capsys.readouterr().err
