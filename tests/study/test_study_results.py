"""What a study's table, page and results.json show of the files of its runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from fasttrain.cli import cli
from fasttrain.errors import UserError
from fasttrain.study.page import write_page
from fasttrain.study.plots import plots
from fasttrain.study.results import collect, write_results
from fasttrain.study.scores import Scored, wilson
from fasttrain.study.spec import load_study
from fasttrain.study.table import cost_lines, findings, table_lines
from fasttrain.study.tasks import tasks_of


def _head_and_rows(lines: Iterable[str]) -> tuple[str, list[str]]:
    """What stands over a table's ruler, and the lines below it."""
    lines = list(lines)
    ruler = next(number for number, line in enumerate(lines) if set(line) == {"-", " "})
    return " ".join(lines[:ruler]), lines[ruler + 1 :]


def test_the_table_tells_scores_differences_and_what_is_missing(finished: Any) -> None:
    _, lines = _head_and_rows(table_lines(collect(finished)))
    assert re.search(
        r"^dpo +77 pairs +0\.750 \[0\.598, 0\.858\] +\d+ +\+ \+0\.500 \[\+0\.3.., \+0\.6..\]", lines[2]
    )
    assert [line.split()[0] for line in lines] == [
        "base", "base-big", "dpo", "sft", "dpo-10pairs", "dpo-flip50", "dpo-big",
    ]  # fmt: skip
    said = "\n".join(findings(collect(finished)))
    assert "DPO (dpo) is above base on held (share right): 0.250 to 0.750" in said
    assert "standard SFT (sft) is not clearly different from base" in said or "is above base" in said
    assert "DPO (dpo-big) is above base-big on held (share right): 0.500 to 0.900" in said
    (finished.output / "scores" / "sft" / "held" / "answers.jsonl").unlink()
    assert list(table_lines(collect(finished)))[-1] == "sft: no scores yet"


def _row(name: str, score: float | None, **more: Any) -> dict[str, Any]:
    return {"question_id": name, "score": score, "answer_chars": 10, "category": None} | more


def _pope(split: str, said: str) -> list[dict[str, Any]]:
    """Ten questions of which three are yes; what was said to them."""
    rows = []
    for number, (label, word) in enumerate(zip("yyynnnnnnn", said, strict=True)):
        words = {"label": label, "prediction": word}
        full = {key: "yes" if value == "y" else "no" for key, value in words.items()}
        rows.append(_row(f"{split}{number}", float(label == word), split=split, **full))
    return rows


@pytest.mark.parametrize(
    ("name", "base", "trained", "shown", "measure"),
    [
        # F1 of 2 hits, 1 miss and of 1 hit, 2 misses: 4/5 and 2/4; shares right are 0.9 and 0.8, pooled 0.85
        ("pope", _pope("adversarial", "ynnnnnnnnn") + _pope("random", "ynnnnnnnnn"),
         _pope("adversarial", "yynnnnnnnn") + _pope("random", "ynnnnnnnnn"), ("0.500", "0.650", "+0.150"), "POPE, mean F1"),
        # 100 times the sum of marks over the reference's: not the mean mark, nor the mean of the ratios
        ("llava-bench", [_row("a", 4.0, reference_score=8.0), _row("b", 2.0, reference_score=2.0)],
         [_row("a", 8.0, reference_score=8.0), _row("b", 1.0, reference_score=2.0)], ("60.0", "90.0", "+30.0"), "LLaVA-Bench"),
        ("mm-vet", [_row("a", 0.5), _row("b", 0.0)], [_row("a", 0.5), _row("b", 0.4)], ("25.0", "45.0", "+20.0"), "MM-Vet"),
        # of all turns, one of which was not judged: not of the questions' means
        ("mt-bench", [_row("a", 2.0), _row("a", 2.0), _row("b", 2.0), _row("b", 2.0)],
         [_row("a", 9.0), _row("a", 5.0), _row("b", 1.0), _row("b", None)], ("2.00", "5.00", "+3.00"), "MT-Bench"),
    ],
)  # fmt: skip
def test_benchmarks_are_shown_by_their_own_figure_and_unit(
    name: str,
    base: Any,
    trained: Any,
    shown: tuple[str, str, str],
    measure: str,
    study_file: Any,
    make_up: Any,
) -> None:
    entry = {"benchmark": name, "data": ".", "options": ["--judge", "m"]}
    study = load_study(study_file(runs=[{"method": "dpo"}], evaluate={"bench": entry}))
    make_up(study)
    for subject, rows in (("base", base), ("dpo", trained)):
        folder = study.output / "scores" / subject / "bench"
        (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert subject in collect(study).missing  # scores.json is written last
        (folder / "scores.json").write_text(json.dumps({"benchmark": name, "model": "m"}))
    results = collect(study)
    before, after, difference = (re.escape(text) for text in shown)
    head, lines = _head_and_rows(table_lines(results))
    assert all(word in head for word in ("bench:", *measure.split()))
    assert re.match(rf"base .* {before} \[", lines[0]) and re.match(
        rf"dpo .* {after} \[.* {difference} \[", lines[1]
    )
    (said,) = findings(results)
    assert re.search(rf"on bench \({measure}.*\): {before} to {after}, difference {difference} \[", said)
    page = write_page(results, study.output).read_text()
    assert f"<th>bench: {measure}" in page and re.search(rf"<td>{after} \[", page)
    write_results(results, study.output / "results.json")
    found = json.loads((study.output / "results.json").read_text())["rows"][1]["scores"]["bench"]
    assert found["measure"].startswith(measure) and found["score"] == pytest.approx(float(shown[1]))
    assert found["above_base"] == pytest.approx(float(shown[2]))
    assert found["low"] <= found["score"] <= found["high"]


def test_the_page_stands_alone_and_shows_curves_and_the_transfer_matrix(finished: Any) -> None:
    results = collect(finished)
    page = write_page(results, finished.output).read_text()
    assert "<script" not in page and not re.search(r'(src|href)="(?!data:)', page)
    for caption in (
        "by pairs trained on",
        "by share of swapped labels",
        "DPO across models",
        "estimate: 100 W",
    ):
        assert caption in page, caption
    assert "by beta" not in page  # nothing varied it
    assert sorted(path.name for path in finished.output.glob("*.png")) == [
        "noise-held.png", "scores-held.png", "size-held.png",
    ]  # fmt: skip
    # two base answers, five trainings and answers of 90 s each: 1,080 s
    assert (
        "0.30 machine hours (1,080 s, measured)" in page and "about 1.08 USD" in page and "0.030 kWh" in page
    )
    write_results(results, finished.output / "results.json")
    rows = {row["name"]: row for row in json.loads((finished.output / "results.json").read_text())["rows"]}
    assert rows["dpo-flip50"]["scores"]["held"]["above_base"] == pytest.approx(-0.15)
    assert rows["dpo-flip50"]["flip"] == 0.5


def test_scores_of_other_settings_or_files_are_outdated_and_not_shown(
    finished: Any, study_file: Any, tmp_path: Path
) -> None:
    """An edited setting makes the runs it is of outdated; a changed annotation file all that learned from it."""

    def report(**settings: Any) -> tuple[int, list[str], Any]:
        raw = yaml.safe_load((tmp_path / "study.yaml").read_text())
        study_file(**raw | {"settings": settings})
        done = CliRunner().invoke(cli, ["study", str(tmp_path / "study.yaml"), "--report"])
        if isinstance(done.exception, UserError):
            raise done.exception
        return (
            done.exit_code,
            done.output.splitlines(),
            json.loads((tmp_path / "out/results.json").read_text()),
        )

    before = yaml.safe_load((tmp_path / "study.yaml").read_text())["settings"]
    for task in tasks_of(finished):  # what made it, from the files as they are
        task.note.write_text(json.dumps(json.loads(task.note.read_text()) | {"inputs": task.read()}))
    assert report(**before)[0] == 0
    code, lines, found = report(**before | {"sft": {"train.learning_rate": 1e-3}})
    assert code == 3 and found["outdated"] == ["sft"] and "sft" not in [row["name"] for row in found["rows"]]
    assert any(line.startswith("Outdated, not shown: sft.") for line in lines)
    assert "Outdated, not shown: sft." in (tmp_path / "out/index.html").read_text()
    assert report(**before)[0] == 0  # taken back
    (tmp_path / "a.jsonl").write_text((tmp_path / "b.jsonl").read_text() + "\n")
    assert report(**before)[2]["outdated"] == [run.name for run in finished.runs]
    (tmp_path / "q.jsonl").write_text((tmp_path / "q.jsonl").read_text() + "\n")
    with pytest.raises(UserError, match=r"wanted scores of the study as .*study\.yaml is now, got outdated"):
        report(**before)


def test_scores_without_notes_are_shown_as_not_verified(finished: Any) -> None:
    """As after a scheduler's run: what is shown may be of other settings."""
    results = collect(finished)
    assert results.unverified() == [] and "Not verified" not in "\n".join(table_lines(results))
    next(task for task in tasks_of(finished) if task.kind == "train" and task.subject == "sft").note.unlink()
    results = collect(finished)
    assert results.unverified() == ["sft"]
    assert "Not verified: sft." in "\n".join(table_lines(results))
    assert "Not verified: sft." in write_page(results, finished.output).read_text()


def test_what_a_scheduler_ran_has_no_time_that_is_known(finished: Any) -> None:
    for task in tasks_of(finished):
        if task.subject in ("dpo", "base"):
            task.note.unlink()
    results = collect(finished)
    row = next(line for line in table_lines(results) if line.startswith("dpo "))
    assert re.search(r"not known +not known$", row)
    page = write_page(results, finished.output).read_text()
    # a base answer, four trainings and their answers of 90 s each
    assert "(810 s, measured)" in page and "the time of models base, dpo whose" in page
    assert "<td>not known<td>not known" in page.replace("</td>", "")  # training, machine cost
    write_results(results, finished.output / "results.json")
    rows = json.loads((finished.output / "results.json").read_text())["rows"]
    assert [row["answer_s"] for row in rows[:3]] == [None, 90.0, None]
    for note in (finished.output / "done").iterdir():
        note.unlink()
    said = "\n".join(cost_lines(collect(finished)))
    assert "Not known" in said and not re.search("measured|Machine:|Energy:", said)


def test_all_right_and_none_right_are_exact_ends_and_are_drawn(finished: Any) -> None:
    for total in range(1, 400):
        assert wilson(total, total)[1] == 1 and wilson(0, total)[0] == 0
    results = collect(finished)
    for row, right in zip(results.rows, [0, 1, 1, 0, 1, 0, 1], strict=True):
        row.scored["held"] = Scored([str(n) for n in range(200)], np.full(200, float(right)), np.ones(200))
    assert set(plots(results)) == {"scores-held", "size-held", "noise-held"}
    rounded = SimpleNamespace(value=0.1, interval=lambda: (np.nextafter(0.1, 1), 0.2))  # ends are quantiles
    results.rows[2].scored["held"] = rounded
    plots(results)
