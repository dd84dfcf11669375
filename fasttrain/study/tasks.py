"""A study as commands: data, training, answers and benchmarks, in an order in which each finds what it needs.

Every task is one command line of this project.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fasttrain.answering.command import EXIT_TYPED_FAILURES
from fasttrain.config import load_config
from fasttrain.evaluate.results import RESULTS
from fasttrain.study.notes import Task
from fasttrain.study.run import Run
from fasttrain.study.spec import AnswerSource, Evaluation, Study

BASE = "base"


def tasks_of(study: Study) -> list[Task]:
    """All tasks, each once, in order; UserError for a recipe that a run's training would refuse."""
    tasks: dict[Path, Task] = {}
    trusting = {run for run in study.runs if _trusts_code(study, run)}
    for name, evaluation in study.evaluations.items():
        if evaluation.questions and any(run.method == "steerlm" for run in study.runs):
            _put(tasks, _steered(study, name, evaluation))
    for model in dict.fromkeys(run.model for run in study.runs):
        trusted = any(run.model == model for run in trusting)
        for task in _evaluations(study, base_name(study, model), model, None, trusted):
            _put(tasks, task)
    for run in study.runs:
        _put(tasks, _data(study, run))
        _put(tasks, _training(study, run))
        for task in _evaluations(study, run.name, run.model, run, run in trusting):
            _put(tasks, task)
    return list(tasks.values())


def base_name(study: Study, model: str) -> str:
    """The untrained model's row."""
    return BASE if model == next(iter(study.models)) else f"{BASE}-{model}"


def run_folder(study: Study, run: Run) -> Path:
    return study.output / "runs" / run.name


def evaluation_folder(study: Study, subject: str, evaluation: str) -> Path:
    return study.output / "scores" / subject / evaluation


def asked_questions(study: Study, name: str, run: Run | None) -> Path:
    """The questions as this run is asked them: SteerLM models with the request they were trained under."""
    evaluation = study.evaluations[name]
    assert evaluation.questions is not None
    if run is not None and run.method == "steerlm":
        return study.output / "data" / f"questions-{name}-steered.jsonl"
    return evaluation.questions


def _put(tasks: dict[Path, Task], task: Task) -> None:
    tasks.setdefault(task.output, task)


def _task(
    study: Study, kind: str, subject: str, command: list[Any], output: Path, inputs: list[Path],
    after: Path | None = None,
) -> Task:  # fmt: skip
    words = tuple(str(word) for word in command)
    note = _note(study, output)
    return Task(
        kind=kind, subject=subject, command=words, output=output, note=note, after=after, inputs=tuple(inputs),
        folder=study.file.parent,
    )  # fmt: skip


def _note(study: Study, output: Path) -> Path:
    parts = output.relative_to(study.output).parts
    return study.output / "done" / f"{'-'.join(parts).removesuffix('.jsonl')}.json"


def _data(study: Study, run: Run) -> Task:
    source = study.answers[run.answers]
    output = data_file(study, run)
    command: list[Any] = ["fasttrain-data", "pair", source.annotations, "-o", output, "--for", run.method]
    for name, value in study.pair.items():
        if (name == "rejected" and run.method != "dpo") or (name == "take" and run.method == "dpo"):
            continue
        command += [f"--{name.replace('_', '-')}", value]
    inputs = [source.annotations]
    if run.method == "sft" and study.pair.get("take", "gold") == "gold" and source.questions:
        command += ["--questions", source.questions]
        inputs.append(source.questions)
    if run.flip:
        command += ["--flip", f"{run.flip:g}"]
    return _task(study, "data", output.stem, [*command, "--image-root", image_root(source)], output, inputs)


def data_file(study: Study, run: Run) -> Path:
    flipped = f"-flip{100 * run.flip:g}" if run.flip else ""
    return study.output / "data" / f"{run.answers}-{run.method}{flipped}.jsonl"


def image_root(source: AnswerSource) -> Path:
    return source.image_root or source.annotations.parent


def overrides_of(study: Study, run: Run) -> list[str]:
    """The recipe's settings of a run, as `-s` takes them: the study's, the method's, then the run's own."""
    source = study.answers[run.answers]
    settings: dict[str, Any] = {
        **study.settings.get("all", {}),
        **study.settings.get(run.method, {}),
        "model.name": study.models[run.model],
        "data.train": str(data_file(study, run)),
        "data.image_root": str(image_root(source)),
        "train.output": str(run_folder(study, run)),
    }
    if run.pairs is not None:
        settings["data.limit_pairs"] = run.pairs
    if run.beta is not None:
        settings["loss.beta"] = run.beta
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def _trusts_code(study: Study, run: Run) -> bool:
    """Whether the run's recipe lets Python code run that comes with the model; answering it then needs the same."""
    return load_config(study.recipe, overrides_of(study, run)).model.trust_remote_code


def _training(study: Study, run: Run) -> Task:
    command: list[Any] = [*study.launcher, run.command, "-c", study.recipe]
    for override in overrides_of(study, run):
        command += ["-s", override]
    inputs = [study.recipe, data_file(study, run)]
    return _task(study, "train", run.name, [*command, "--resume"], trained(study, run), inputs)


def trained(study: Study, run: Run) -> Path:
    return run_folder(study, run) / "final"


def _steered(study: Study, name: str, evaluation: Evaluation) -> Task:
    assert evaluation.questions is not None
    output = study.output / "data" / f"questions-{name}-steered.jsonl"
    command: list[Any] = ["fasttrain-data", "steer", evaluation.questions, "-o", output]
    if evaluation.steer:
        command += ["--scores", evaluation.steer]
    words = [*command, "--image-root", _root(evaluation)]
    return _task(study, "data", output.stem, words, output, [evaluation.questions])


def _root(evaluation: Evaluation) -> Path:
    assert evaluation.questions is not None
    return evaluation.image_root or evaluation.questions.parent


def _evaluations(
    study: Study, subject: str, model: str, run: Run | None, trust_remote_code: bool
) -> Iterator[Task]:
    answerer: list[Any] = ["-m", study.models[model]]
    if run is not None:
        answerer += ["-a", run_folder(study, run)]
    if trust_remote_code:
        answerer.append("--trust-remote-code")
    after = None if run is None else _note(study, trained(study, run))
    for name, evaluation in study.evaluations.items():
        folder = evaluation_folder(study, subject, name)
        inputs: list[Path] = []
        if evaluation.questions is not None:
            output = folder / "answers.jsonl"
            inputs.append(asked_questions(study, name, run))
            command: list[Any] = ["fasttrain", "answer", *inputs, "-o", output]
            command += [*answerer, "--image-root", _root(evaluation)]
        else:
            output = folder / RESULTS
            command = ["fasttrain", "eval", evaluation.benchmark, *answerer]
            command += ["--data", evaluation.data, "-o", folder]
            if evaluation.image_root:
                command += ["--images", evaluation.image_root]
        if evaluation.max_new_tokens:
            command += ["--max-new-tokens", evaluation.max_new_tokens]
        yield _task(study, "evaluate", subject, [*command, *evaluation.options], output, inputs, after)


def printed(tasks: list[Task]) -> Iterator[str]:
    """Lines of a shell script under `set -e`; what is done is left out."""
    for task in tasks:
        if not task.is_done():
            yield (
                f"{task.shown} || [ $? -eq {EXIT_TYPED_FAILURES} ]" if task.may_be_incomplete else task.shown
            )


def executable(command: tuple[str, ...], python: str) -> list[str]:
    """The command as this very installation runs it, whatever is on the PATH; a study's own launcher as it is given."""
    module = {"fasttrain": "fasttrain", "fasttrain-data": "fasttrain_data"}.get(command[0])
    return [python, "-m", module, *command[1:]] if module else list(command)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1"}
