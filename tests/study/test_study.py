"""A study: its grid, its commands, what is done once, how scores and intervals come about, what the page shows."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from fasttrain.cli import cli
from fasttrain.errors import UserError
from fasttrain.study.command import check_recipes
from fasttrain.study.execute import execute
from fasttrain.study.page import write_page
from fasttrain.study.plots import plots
from fasttrain.study.results import collect, write_results
from fasttrain.study.scores import Scored, read_scored, score_exactly, wilson
from fasttrain.study.spec import load_study
from fasttrain.study.table import findings, table_lines
from fasttrain.study.tasks import Task, executable, printed, tasks_of

FILE: dict[str, Any] = {
    "output": "out",
    "recipe": "recipe.yaml",
    "models": {"small": "hub/small", "big": "hub/big"},
    "answers": {
        "big": {"annotations": "a.jsonl", "questions": "q.jsonl"},
        "small": {"annotations": "b.jsonl"},
    },
    "settings": {"all": {"train.epochs": 2}, "sft": {"train.learning_rate": 4e-4}},
    "runs": [
        {"method": ["dpo", "sft", "steerlm"]},
        {"method": "dpo", "pairs": [10, 20]},
        {"flip": [0, 0.25]},
        {"beta": 0.3, "model": ["small", "big"], "answers": ["big", "small"]},
    ],
    "evaluate": {"held": {"questions": "q.jsonl"}, "pope": {"benchmark": "pope", "data": "."}},
}


@pytest.fixture
def study_file(tmp_path: Path) -> Any:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"question": "Why?", "completions": [], "cost_usd": 0.5}\n' * 2)
    questions = [{"id": f"q{n}", "question": f"Why {n}?", "answer": f"because {n}"} for n in range(40)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (tmp_path / "recipe.yaml").write_text("train: {max_steps: 3}\n")

    def write(**changes: Any) -> Path:
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(FILE | changes, sort_keys=False))
        return path

    return write


def test_grids_are_every_combination_once(study_file: Any) -> None:
    names = [run.name for run in load_study(study_file()).runs]
    assert names == [
        "dpo", "sft", "steerlm", "dpo-10pairs", "dpo-20pairs", "dpo-flip25", "dpo-beta0.3", "dpo-from-small-beta0.3",
        "dpo-big-beta0.3", "dpo-big-from-small-beta0.3",
    ]  # fmt: skip


def test_runs_that_share_data_share_its_file(study_file: Any, tmp_path: Path) -> None:
    tasks = tasks_of(load_study(study_file()))
    data = [task.output.name for task in tasks if task.kind == "data"]
    assert sorted(data) == sorted(
        ["questions-held-steered.jsonl", "big-dpo.jsonl", "big-sft.jsonl", "big-steerlm.jsonl", "big-dpo-flip25.jsonl",
         "small-dpo.jsonl"]
    )  # fmt: skip
    made: set[Path] = set()
    for task in tasks:  # each command finds what it reads
        read = [Path(word) for word in task.command if word.startswith(str(tmp_path / "out"))]
        trained = {path for path in read if path.parent.name == "runs"}
        assert not {path / "final" for path in trained} - made
        made.add(task.output)


def test_every_printed_command_is_one_that_the_command_line_takes(study_file: Any) -> None:
    """Parsed by click itself, without running: a renamed option would fail here."""
    import click

    from fasttrain_data.cli import cli as data_cli

    study = load_study(study_file())
    lines = list(printed(tasks_of(study)))
    assert len(lines) == len(tasks_of(study)) == 6 + 10 + 2 * 12
    known = set(cli.commands)
    for line in lines:
        program, name, *rest = shlex.split(line)
        group: Any = cli if program == "fasttrain" else data_cli
        if program == "fasttrain" and name not in known:
            assert name == "eval"  # of another part of the project
            continue
        context = click.Context(group)
        command = group.get_command(context, name)
        rest = [word if not word.startswith("hub/") else "x" for word in rest]
        existing = [str(study.file) if Path(word).suffix in (".jsonl", ".yaml") else word for word in rest]
        command.make_context(name, existing, parent=context)


def test_a_run_gets_the_studys_the_methods_and_its_own_settings(study_file: Any, tmp_path: Path) -> None:
    from fasttrain.config import load_config
    from fasttrain.study.tasks import overrides_of

    study = load_study(study_file())
    configs = {run.name: load_config(study.recipe, overrides_of(study, run)) for run in study.runs}
    assert configs["sft"].train.learning_rate == 4e-4 != configs["dpo"].train.learning_rate
    assert {config.train.epochs for config in configs.values()} == {2}
    assert configs["dpo-10pairs"].data.limit_pairs == 10
    assert configs["dpo-big-from-small-beta0.3"].loss.beta == 0.3
    assert configs["dpo-big-from-small-beta0.3"].model.name == "hub/big"
    assert configs["dpo-big-from-small-beta0.3"].data.train == str(tmp_path / "out/data/small-dpo.jsonl")
    assert configs["dpo"].data.image_root == str(tmp_path)


def test_what_a_recipe_lets_run_in_training_its_answers_and_benchmarks_are_let_run_too(
    study_file: Any,
) -> None:
    def trusting(**settings: Any) -> set[str]:
        tasks = tasks_of(load_study(study_file(settings=settings)))
        assert not any("--trust-remote-code" in task.command for task in tasks if task.kind != "evaluate")
        found = {}
        for task in (task for task in tasks if task.kind == "evaluate"):
            found.setdefault(task.subject, set()).add("--trust-remote-code" in task.command)
        assert all(len(said) == 1 for said in found.values())  # answers and benchmarks alike
        return {subject for subject, said in found.items() if True in said}

    assert trusting() == set()
    assert trusting(sft={"model.trust_remote_code": True}) == {"base", "sft"}
    every = trusting(all={"model.trust_remote_code": True})
    assert len(every) == 12 and {"base", "base-big", "dpo-big-beta0.3"} < every
    (study_file().parent / "recipe.yaml").write_text("model: {trust_remote_code: true}\n")
    assert trusting() == every


def test_trainings_start_by_the_studys_launcher_and_nothing_else_does(study_file: Any) -> None:
    launcher = "torchrun --nproc_per_node=4 -m fasttrain"
    for task in tasks_of(load_study(study_file(launcher=launcher))):
        assert task.shown.startswith(f"{launcher} ") == (task.kind == "train")
        words = executable(task.command, "/bin/python")
        assert words[:3] == (
            list(task.command[:3]) if task.kind == "train" else ["/bin/python", "-m", words[2]]
        )


def test_a_launcher_that_is_not_there_is_named_before_anything_runs(study_file: Any) -> None:
    file = study_file(launcher="no-such-launcher -m fasttrain", settings={})
    done = CliRunner().invoke(cli, ["study", str(file)])
    assert isinstance(done.exception, UserError) and "got no-such-launcher" in str(done.exception)
    assert not (file.parent / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": []}, "runs: wanted a list of runs"),
        ({"runs": [{"methods": "dpo"}]}, "unknown key runs.0.methods; did you mean 'method'?"),
        ({"runs": [{"method": "dop"}]}, "runs.0.method: wanted dpo or sft .* got 'dop'; did you mean 'dpo'"),
        ({"runs": [{"pairs": 0}]}, "runs.0.pairs: wanted whole numbers"),
        ({"runs": [{"flip": 2}]}, "runs.0.flip: wanted shares from 0 to 1, got 2"),
        ({"runs": [{"method": "sft", "flip": 0.5}]}, "runs.0.flip: wanted only with method dpo"),
        ({"runs": [{"model": "huge"}]}, "runs.0.model: wanted small or big, got 'huge'"),
        ({"recipe": "no.yaml"}, "recipe: wanted an existing file"),
        ({"models": {}}, "models: wanted names and their values"),
        ({"models": {"a": 3}}, "models.a: wanted text, got 3"),
        ({"answers": {"a": {}}}, "answers.a.annotations: wanted a value, got nothing"),
        ({"evaluate": {"x": {}}}, "evaluate.x: wanted questions or benchmark, got neither"),
        ({"evaluate": {"x": {"benchmark": "pope"}}}, "evaluate.x.data: wanted the benchmark's folder"),
        (
            {"evaluate": {"x": {"benchmark": "mt-bench", "data": "."}}},
            r"study\.yaml: evaluate.x.options: wanted a judge for mt-bench, as \[--judge, MODEL\], got nothing",
        ),
        (
            {"evaluate": {"x": {"benchmark": "mm-vet", "data": ".", "options": ["--judge-url", "u"]}}},
            "wanted a judge for mm-vet, .* got --judge-url u",
        ),
        (
            {"evaluate": {"x": {"benchmark": "mtbench", "data": "."}}},
            "got 'mtbench'; did you mean 'mt-bench'",
        ),
        (
            {"evaluate": {"x": {"questions": "q.jsonl", "max_new_tokens": "5"}}},
            "max_new_tokens: wanted a whole number",
        ),
        ({"settings": {"all": {"train.lr": 1}}}, "unknown key train.lr"),
        ({"settings": {"dop": {}}}, "unknown key settings.dop; did you mean 'dpo'"),
        ({"launcher": "torchrun -m train"}, "launcher: wanted a command that ends in fasttrain, as torchrun"),
        ({"launcher": "a 'b"}, "launcher: wanted a command, got .* quotation"),
        ({"watts": "many"}, "watts: wanted a number"),
        ({"outptu": "x"}, "unknown key outptu; did you mean 'output'"),
    ],
)
def test_mistakes_in_the_file_are_named_before_anything_runs(
    study_file: Any, change: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_recipes(load_study(study_file(**change)))


def test_a_study_file_that_cannot_be_read_is_called_by_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: cannot read the study file: No such file"):
        load_study(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff")
    with pytest.raises(UserError, match="the study file is not UTF-8"):
        load_study(tmp_path / "bytes.yaml")


def _task(folder: Path, name: str, code: str, after: Path | None = None) -> Task:
    output = folder / name
    text = f"import pathlib, sys\npath = pathlib.Path({str(output)!r})\n{code}"
    return Task(
        kind="train", subject=name, command=("fasttrain", "-c", text), output=output, note=folder / f"{name}.json",
        after=after,
    )  # fmt: skip


@pytest.fixture
def python_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks that are Python snippets instead of commands of this project."""
    monkeypatch.setattr(
        "fasttrain.study.execute.executable", lambda command, python: [sys.executable, *command[1:]]
    )


def test_what_is_done_is_not_done_again_and_what_failed_is(tmp_path: Path, python_tasks: None) -> None:
    count = "path.write_text(path.read_text() + 'x' if path.exists() else 'x')"
    first = _task(tmp_path, "first", count)
    second = _task(
        tmp_path, "second", f"{count}\nraise SystemExit('no luck' if len(path.read_text()) < 2 else 0)"
    )
    third = _task(tmp_path, "third", count, after=first.note)
    with pytest.raises(UserError, match=r"train second: exit code 1: no luck \(all of it in .*second\.log\)"):
        execute([first, second, third], tmp_path / "logs", lambda text: None)
    for _ in range(2):
        execute([first, second, third], tmp_path / "logs", lambda text: None)
    assert [(tmp_path / name).read_text() for name in ("first", "second", "third")] == ["x", "xx", "x"]
    assert second.seconds > first.seconds / 10 > 0
    changed = _task(tmp_path, "first", count + "\n")  # another command for the same result
    execute([changed, third], tmp_path / "logs", lambda text: None)
    assert [(tmp_path / name).read_text() for name in ("first", "third")] == ["xx", "xx"]


def test_what_was_made_from_other_files_is_made_again(tmp_path: Path, python_tasks: None) -> None:
    pairs = tmp_path / "pairs"
    count = "path.write_text(path.read_text() + 'x' if path.exists() else 'x')"
    task = dataclasses.replace(_task(tmp_path, "one", count), inputs=(pairs, tmp_path / "recipe"))
    (tmp_path / "recipe").write_text("r")

    def runs(text: str) -> int:
        pairs.write_text(text)
        execute([task], tmp_path / "logs", lambda text: None)
        return len(task.output.read_text())

    assert [runs("a"), runs("a"), runs("b"), runs("b")] == [1, 1, 2, 2]
    pairs.unlink()
    assert not task.is_done()
    note = json.loads(task.note.read_text())
    del note["inputs"]  # as earlier versions wrote it
    task.note.write_text(json.dumps(note))
    assert task.is_done()


def test_every_step_knows_the_files_it_reads(study_file: Any, tmp_path: Path) -> None:
    """All that its command names and that is no folder; a changed recipe leaves data and answers as they are."""
    tasks = tasks_of(load_study(study_file()))
    for task in tasks:
        named = {tmp_path / word for word in task.command if Path(word).suffix in (".jsonl", ".yaml")}
        named |= {
            Path(json.loads(word.partition("=")[2]))
            for word in task.command
            if word.startswith("data.train=")
        }
        assert named - {task.output} == set(task.inputs)
    assert {task.kind for task in tasks if tmp_path / "recipe.yaml" in task.inputs} == {"train"}


def test_a_command_that_stopped_early_is_no_success(tmp_path: Path, python_tasks: None) -> None:
    """Training ends with code 0 after SIGTERM, without its adapter."""
    with pytest.raises(SystemExit) as stopped:
        execute([_task(tmp_path, "one", "pass")], tmp_path / "logs", lambda text: None)
    assert stopped.value.code == 143


def test_a_benchmark_whose_judge_left_some_out_is_done_and_told(tmp_path: Path, python_tasks: None) -> None:
    """`fasttrain eval` ends with exit code 3 then, its results written; answers that are missing are no results."""
    told: list[str] = []

    def task(name: str, code: str, kind: str = "evaluate") -> Task:
        return dataclasses.replace(_task(tmp_path, name, code), kind=kind)

    ends = "path.write_text('x')\nraise SystemExit(3)"
    done = task("results.jsonl", ends)
    for _ in range(2):
        execute([done], tmp_path / "logs", told.append)
    assert [line.partition(" s;")[2] for line in told if "done in" in line] == [
        f" some answers or judgements are missing, see its log; delete {done.note} to try again"
    ]
    assert told[-1] == "1 of 1 steps are done"
    done.note.unlink()
    for other in (task("results.jsonl", ends, "train"), task("answers.jsonl", ends)):
        with pytest.raises(UserError, match="exit code 3"):
            execute([other], tmp_path / "logs", told.append)
    with pytest.raises(UserError, match="exit code 3"):
        (tmp_path / "results.jsonl").unlink()
        execute([task("results.jsonl", "raise SystemExit(3)")], tmp_path / "logs", told.append)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent is gone")
def test_a_study_that_is_killed_leaves_no_training_behind(tmp_path: Path) -> None:
    """SIGKILL to the study: the command that it runs is told to stop, and is gone before long."""
    code = f"""
import sys
from pathlib import Path
import fasttrain.study.execute as execute
from fasttrain.study.tasks import Task
execute.executable = lambda command, python: [sys.executable, "-c", command[1]]
folder = Path({str(tmp_path)!r})
wait = f"import os, time; open({{str(folder / 'pid')!r}}, 'w').write(str(os.getpid())); time.sleep(600)"
task = Task(kind="train", subject="a", command=("fasttrain", wait), output=folder / "out", note=folder / "a.json")
execute.execute([task], folder / "logs", print)
"""
    study = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)

    def until(done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not done():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    pid = tmp_path / "pid"
    until(lambda: pid.exists() and pid.read_text() != "")
    assert Path(f"/proc/{pid.read_text()}").exists()
    study.kill()
    study.wait()

    def is_gone() -> bool:
        stat = Path(f"/proc/{pid.read_text()}/stat")
        return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"

    until(is_gone)


def test_intervals_are_wilsons_and_a_bootstraps() -> None:
    # Newcombe 1998, table I: 81 of 263 by the score method
    right = Scored([str(n) for n in range(263)], np.arange(263) < 81, np.ones(263))
    assert right.interval() == pytest.approx((0.2553, 0.3662), abs=5e-5) == wilson(81, 263)
    values = np.random.default_rng(1).normal(3, 2, 900)
    graded = Scored([str(n) for n in range(900)], values, np.ones(900))
    half = 1.96 * values.std() / 30
    assert graded.interval() == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


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
    assert (scored.mean, len(scored.questions)) == (0.75, 40)
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


def test_results_of_benchmarks_are_means_per_question_without_excluded_rows(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    rows = [("a", 1.0, 10), ("a", 0.0, 30), ("b", 8.0, 5), ("c", None, 7)]
    path.write_text(
        "".join(json.dumps({"question_id": q, "score": s, "answer_chars": c}) + "\n" for q, s, c in rows)
    )
    scored = read_scored(path)
    assert (scored.questions, scored.scores.tolist(), scored.chars.tolist()) == (
        ["a", "b"],
        [0.5, 8.0],
        [20.0, 5.0],
    )


@pytest.fixture
def finished(study_file: Any, tmp_path: Path) -> Any:
    """A study whose commands have run, by their files: `right` questions right of 40, by run."""
    runs = [{"method": ["dpo", "sft"]}, {"pairs": [10]}, {"flip": 0.5}, {"model": "big"}]
    study = load_study(
        study_file(runs=runs, evaluate={"held": {"questions": "q.jsonl"}}, usd_per_hour=3.6, watts=100)
    )
    right = {
        "base": 10,
        "dpo": 30,
        "sft": 12,
        "dpo-10pairs": 20,
        "dpo-flip50": 4,
        "base-big": 20,
        "dpo-big": 36,
    }
    for task in tasks_of(study):
        task.note.parent.mkdir(parents=True, exist_ok=True)
        task.note.write_text(json.dumps({"command": task.shown, "seconds": 90.0}))
        if task.kind == "train":
            task.output.mkdir(parents=True)
            used = 10 if "10pairs" in task.subject else 77
            facts = json.dumps({"pairs": used, "versions": {"torch": "2"}})
            (task.output.parent / "environment.json").write_text(facts)
            (task.output.parent / "metrics.jsonl").write_text('{"step": 9, "loss": 0.5}\n')
        elif task.kind == "evaluate":
            task.output.parent.mkdir(parents=True)
            rows = [
                (f"q{n}", f"because {n}" if n < right[task.subject] else "<script>no</script>")
                for n in range(40)
            ]
            task.output.write_text("".join(json.dumps({"question_id": q, "text": t}) + "\n" for q, t in rows))
    return study


def test_the_table_tells_scores_differences_and_what_is_missing(finished: Any) -> None:
    lines = list(table_lines(collect(finished)))
    assert re.search(
        r"^dpo +77 pairs +0\.750 \[0\.598, 0\.858\] +\d+ +\+ \+0\.500 \[\+0\.3.., \+0\.6..\]", lines[4]
    )
    assert [line.split()[0] for line in lines[2:]] == [
        "base", "base-big", "dpo", "sft", "dpo-10pairs", "dpo-flip50", "dpo-big",
    ]  # fmt: skip
    said = "\n".join(findings(collect(finished)))
    assert "DPO (dpo) is above base on held: 0.250 to 0.750" in said
    assert "standard SFT (sft) is not clearly different from base" in said or "is above base" in said
    assert "DPO (dpo-big) is above base-big on held: 0.500 to 0.900" in said
    (finished.output / "scores" / "sft" / "held" / "answers.jsonl").unlink()
    assert list(table_lines(collect(finished)))[-1] == "sft: no scores yet"


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


def test_all_right_and_none_right_are_exact_ends_and_are_drawn(finished: Any) -> None:
    for total in range(1, 400):
        assert wilson(total, total)[1] == 1 and wilson(0, total)[0] == 0
    results = collect(finished)
    for row, right in zip(results.rows, [0, 1, 1, 0, 1, 0, 1], strict=True):
        row.scored["held"] = Scored([str(n) for n in range(200)], np.full(200, float(right)), np.ones(200))
    assert set(plots(results)) == {"scores-held", "size-held", "noise-held"}
    tenths = Scored([str(n) for n in range(3)], np.full(3, 0.1), np.ones(3))  # their mean is not 0.1 exactly
    results.rows[2].scored["held"] = tenths
    plots(results)


@pytest.mark.slow
def test_a_small_study_on_charts_runs_from_one_command_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: charts, graded answers, three runs' commands, table, page; the second time nothing is run."""
    from fasttrain.study.demo import write_demo_study

    file = write_demo_study(tmp_path / "a study", prompts=40, questions=12, echo=lambda text: None)
    raw = yaml.safe_load(file.read_text())
    raw["runs"] = [{"method": ["dpo", "steerlm"]}]
    file.write_text(yaml.safe_dump(raw, sort_keys=False))
    first = CliRunner().invoke(cli, ["study", str(file)], catch_exceptions=False)
    assert first.exit_code == 0, first.output
    assert "[1/8]" in first.output and re.search(r"^steerlm +\d+ answers", first.output, re.MULTILINE)
    steered = (tmp_path / "a study/results/data/questions-charts-steered.jsonl").read_text().splitlines()
    assert "Complexity:0,Verbosity:1" in json.loads(steered[0])["question"]
    again = CliRunner().invoke(cli, ["study", str(file)], catch_exceptions=False)
    assert "8 of 8 steps are done" in again.output and "[1/" not in again.output
    printed_again = CliRunner().invoke(cli, ["study", str(file), "--print-commands"]).output.splitlines()
    assert printed_again == ["set -e", f"fasttrain study '{file}' --report"]
    annotations = tmp_path / "a study/data/annotations.jsonl"
    annotations.write_text("".join(annotations.read_text().splitlines(keepends=True)[:-9]))
    changed = CliRunner().invoke(cli, ["study", str(file)])
    assert isinstance(changed.exception, UserError)
    assert re.search(r"train dpo: exit code 2: .*changed since .*data\.train", str(changed.exception))
