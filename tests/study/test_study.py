"""A study: its grid, its commands, mistakes in its file, what the page shows."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from fasttrain.cli import cli
from fasttrain.errors import UserError
from fasttrain.study.command import check_recipes
from fasttrain.study.spec import load_study
from fasttrain.study.tasks import executable, printed, tasks_of


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


def test_a_study_is_the_same_from_every_working_directory(
    study_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commands, by which steps count as done and runs go on, and the last line of the script."""
    study_file(models={"near": "near", "hub": "hub/big"}, runs=[{"model": ["near", "hub"]}], settings={})
    (tmp_path / "near").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    said = []
    for folder, name in ((tmp_path, "study.yaml"), (tmp_path.parent, f"{tmp_path.name}/link/study.yaml")):
        monkeypatch.chdir(folder)
        script = CliRunner().invoke(cli, ["study", name, "--print-commands"]).output
        said.append([script, *((task.inputs, task.note) for task in tasks_of(load_study(Path(name))))])
    assert said[0] == said[1] and said[0][0].endswith(f"study {tmp_path}/study.yaml --report\n")


def test_every_printed_command_is_one_that_the_command_line_takes(study_file: Any) -> None:
    """Parsed by click itself, without running: a renamed option would fail here."""
    import click

    from fasttrain_data.commands.group import cli as data_cli

    study = load_study(study_file())
    lines = list(printed(tasks_of(study)))
    assert len(lines) == len(tasks_of(study)) == 6 + 10 + 2 * 12
    known = set(cli.commands)
    for line in lines:
        program, name, *rest = shlex.split(line.removesuffix(" || [ $? -eq 3 ]"))
        group: Any = cli if program == "fasttrain" else data_cli
        if program == "fasttrain" and name not in known:
            assert name == "eval"  # of another part of the project
            continue
        context = click.Context(group)
        command = group.get_command(context, name)
        rest = [word if not word.startswith("hub/") else "x" for word in rest]
        existing = [str(study.file) if Path(word).suffix in (".jsonl", ".yaml") else word for word in rest]
        command.make_context(name, existing, parent=context)


@pytest.mark.parametrize(("refused", "code"), [("none", 0), ("eval", 1), ("answer", 3)])
def test_the_script_goes_on_when_a_benchmark_lacks_judgements_and_ends_at_what_fails(
    study_file: Any, tmp_path: Path, refused: str, code: int
) -> None:
    """As the study itself: only a benchmark may end with exit code 3. The programs here write down how they were called."""
    file = study_file(runs=[{"method": "dpo"}], settings={})
    script = CliRunner().invoke(cli, ["study", str(file), "--print-commands"]).output
    ends = f"case $1 in {refused}) exit {code or 3};; eval) exit 3;; esac"
    for program in ("fasttrain", "fasttrain-data"):
        (tmp_path / program).write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/called\n{ends}\n')
        (tmp_path / program).chmod(0o755)
    done = subprocess.run(["sh", "-c", script], env={"PATH": f"{tmp_path}:/bin:/usr/bin"}, check=False)
    called = (tmp_path / "called").read_text().split()
    assert (done.returncode == 0, called[-1]) == (
        refused == "none",
        "study" if refused == "none" else refused,
    )


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


def test_a_benchmark_is_asked_with_the_images_and_the_length_that_stand_beside_it(
    study_file: Any, tmp_path: Path
) -> None:
    pope = {
        "benchmark": "pope",
        "data": ".",
        "image_root": ".",
        "max_new_tokens": 9,
        "options": ["--limit", 2],
    }
    words = next(task.command for task in tasks_of(load_study(study_file(evaluate={"pope": pope}))))
    assert words[-6:] == ("--images", str(tmp_path), "--max-new-tokens", "9", "--limit", "2")


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
        ({"evaluate": {"x": {"questions": "q.jsonl", "data": "."}}}, "x.data: wanted only beside benchmark"),
        ({"settings": {"all": {"train.lr": 1}}}, "unknown key train.lr"),
        ({"settings": {"dop": {}}}, "unknown key settings.dop; did you mean 'dpo'"),
        ({"launcher": "torchrun -m train"}, "launcher: wanted a command that ends in fasttrain, as torchrun"),
        ({"launcher": "a 'b"}, "launcher: wanted a command, got .* quotation"),
        ({"watts": "many"}, "watts: wanted a number"),
        (
            {"seed": 1},
            "unknown key seed; wanted one of output, recipe, models, answers, runs, evaluate, pair",
        ),
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


@pytest.mark.slow
def test_a_small_study_on_charts_runs_from_one_command_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: charts, graded answers, three runs' commands, table, page; the second time nothing is run."""
    from fasttrain.study.demo import write_demo_study

    monkeypatch.chdir(tmp_path)
    file = write_demo_study(Path("a study"), prompts=40, questions=12, echo=lambda text: None)
    monkeypatch.chdir(tmp_path.parent)
    file = tmp_path / file
    assert f'cache: "{tmp_path / "a study" / "reference"}"' in (file.parent / "recipe.yaml").read_text()
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
    before = annotations.read_text()
    annotations.write_text("".join(before.splitlines(keepends=True)[:-9]))
    changed = CliRunner().invoke(cli, ["study", str(file)])
    assert isinstance(changed.exception, UserError)
    assert re.search(r"train dpo: exit code 2: .*changed since .*data\.train", str(changed.exception))
    reported = CliRunner().invoke(cli, ["study", str(file), "--report"])
    assert reported.exit_code == 3 and "Outdated, not shown: dpo, steerlm." in reported.output
    annotations.write_text(before)
    back = CliRunner().invoke(cli, ["study", str(file)], catch_exceptions=False)
    assert back.exit_code == 0 and set(re.findall(r"^\[\d/8\] (\w+)", back.output, re.MULTILINE)) == {"data"}
    assert re.search(r"^steerlm +\d+ answers", back.output, re.MULTILINE)
