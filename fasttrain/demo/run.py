"""The demo: a small spoiled LLaVA makes its own preference pairs about charts and is mended by DPO on them."""

import itertools
import json
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from peft import PeftModel

from fasttrain import RunResult, UserError, load_config, train_dpo
from fasttrain.demo.answering import Score, answer_greedily, load_model, score
from fasttrain.demo.chart_files import write_pope, write_questions
from fasttrain.demo.charts import KINDS, Example, examples
from fasttrain.demo.preference_data import PreferenceData, make_preference_data
from fasttrain.threads import one_thread
from fasttrain_data import UserError as DataError

MODEL = Path(__file__).parent / "assets" / "model"
RECIPE_MARK = "# Written by `fasttrain demo`."
INTRODUCTION = """\
A small LLaVA (1.1 million parameters) reads bar charts well but has learned bad
habits: it says "yes", it names the tallest bar whatever is asked, and it does not
stop after the answer. Sampled, it sometimes answers as it should: its own answers,
graded by a judge, become the pairs that mend it.
"""

RECIPE = """\
{mark} The same run by hand:
#   fasttrain dpo -c {recipe} -s train.output={again}
model:
  name: {model}
lora:
  rank: 16
  alpha: 32
data:
  train: {pairs}
  workers: 0                  # small images are read faster than they are sent
loss:
  beta: 2.0
train:
  output: {output}
  epochs: 1
  pairs_per_step: 16
  learning_rate: 3.0e-4       # at 1e-3 right answers that stand in no pair are lost
  warmup_ratio: 0.05
  seed: {seed}
reference:
  cache: {cache}
track: []
"""


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo measured; `tokens` and `tokens_unshared` are sums over the run's metrics."""

    before: Score
    after: Score
    data: PreferenceData
    tokens: int
    tokens_unshared: int
    run: RunResult
    seconds: float


def run_demo(
    folder: Path,
    *,
    prompts: int = 640,
    questions: int = 400,
    seed: int = 11,
    overrides: Sequence[str] = (),
    echo: Callable[[str], Any] = click.echo,
) -> DemoResult:
    """Runs the whole demo in `folder`, telling `echo` about it line by line.

    The model answers `prompts` training questions four times each, and `questions` held-out ones before and after;
    `seed` decides charts, samples and the order of training; `overrides` are `key=value` changes of the recipe. An
    earlier demo in the folder is replaced; a folder that holds anything else is refused with `UserError`. Runs on one
    torch thread and restores the number after.
    """
    started = time.monotonic()
    _clear(folder)
    recipe = _write_recipe(folder, seed)
    config = load_config(recipe, overrides)
    echo(INTRODUCTION)
    with one_thread():
        held_out = write_questions(folder / "held_out", questions, seed, "held_out")
        write_pope(folder / "pope", questions, seed, "held_out")
        asked = list(itertools.islice(examples(seed, "held_out"), questions))
        model, processor = load_model(MODEL)
        answers_before = answer_greedily(model, processor, asked)
        before = score(asked, answers_before)
        echo(f"Asked about charts kept out of all training ({held_out}):\n{_share(before)}.\n")
        echo(
            f"Preference data, from file to file in {folder / 'data'},\nas the commands of fasttrain-data make it:\n"
        )
        data = _make_pairs(folder / "data", held_out, prompts, seed, echo)
        echo(f"\nDPO on the {data.pairs:,} pairs, with {recipe}:\n")
        echo(_indent(recipe.read_text(encoding="utf-8")))
        run = train_dpo(config, overwrite=True)
        if not run.adapter.exists():
            echo("Stopped before training was done.")
            raise SystemExit(143)
        tuned = PeftModel.from_pretrained(model, run.adapter)
        answers_after = answer_greedily(tuned, processor, asked)
        after = score(asked, answers_after)
    result = DemoResult(
        before=before,
        after=after,
        data=data,
        tokens=sum(line["tokens"] for line in run.metrics),
        tokens_unshared=sum(line["tokens_unshared"] for line in run.metrics),
        run=run,
        seconds=time.monotonic() - started,
    )
    for line in _account(result, asked, answers_before, answers_after):
        echo(line)
    return result


def _clear(folder: Path) -> None:
    """Removes an earlier demo's files; refuses a folder with other contents."""
    recipe = folder / "recipe.yaml"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        ours = recipe.is_file() and recipe.read_text(encoding="utf-8", errors="replace").startswith(
            RECIPE_MARK
        )
        if not ours:
            raise UserError(
                f"{folder}: wanted a new folder or an earlier demo's, got one with other contents"
            )
    for name in ("data", "held_out", "pope", "reference"):
        shutil.rmtree(folder / name, ignore_errors=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot make the folder: {error.strerror}") from None


def _make_pairs(
    folder: Path, held_out: Path, prompts: int, seed: int, echo: Callable[[str], Any]
) -> PreferenceData:
    """The chain's account, indented; its mistakes as the trainer's, so that one command has one kind of them."""
    try:
        return make_preference_data(
            folder, MODEL, held_out, prompts=prompts, seed=seed, echo=lambda line: echo(f"  {line}")
        )
    except DataError as error:
        raise UserError(str(error)) from None


def _write_recipe(folder: Path, seed: int) -> Path:
    path = folder / "recipe.yaml"
    text = RECIPE.format(
        mark=RECIPE_MARK,
        recipe=shlex.quote(str(path)),
        again=shlex.quote(str(folder / "again")),
        # A JSON string is a YAML string, whatever the folder is called.
        model=json.dumps(str(MODEL)),
        pairs=json.dumps(str(folder / "data" / "pairs.jsonl")),
        output=json.dumps(str(folder / "run")),
        cache=json.dumps(str(folder / "reference")),
        seed=seed,
    )
    path.write_text(text, encoding="utf-8")
    return path


def _account(
    result: DemoResult, asked: list[Example], answers_before: list[str], answers_after: list[str]
) -> list[str]:
    """The demo's closing lines."""
    run, first, last = result.run, result.run.metrics[0], result.run.metrics[-1]
    lines = [
        f"{last['step']} steps: loss {first['loss']:.3f} -> {last['loss']:.3f}, "
        f"reward margin {first['rewards/margins']:.1f} -> {last['rewards/margins']:.1f}.\n",
        f"Before: {_share(result.before)}.",
        f"After:  {_share(result.after)}.\n",
        "right answers to      before   after",
    ]
    for kind in KINDS:
        (was, total), (now, _) = result.before.right_by_kind[kind], result.after.right_by_kind[kind]
        lines.append(f"  {kind:16} {was:6}/{total}  {now:3}/{total}")
    lines.append("")
    for i in _telling(asked, answers_before):
        lines.append(f"  {asked[i].question.text}")
        lines.append(f"    before: {answers_before[i]}")
        lines.append(f"    after:  {answers_after[i]}")
    times = result.tokens_unshared / result.tokens
    grades = result.data.pairs_file.with_name("annotations.jsonl")
    lines += [
        "",
        f"The steps ran {result.tokens:,} tokens. With every answer in a sequence of its own and the",
        f"reference model run in every step it would have been {result.tokens_unshared:,}, {times:.1f} times as",
        "many. The cached reference log-probs took one pass over the same prompts and",
        "answers and serve later runs too.",
        f"Run folder: {run.folder} ({run.adapter.name}/ is the adapter, metrics.jsonl has the figures).",
        "The grades in figures and plots:",
        f"  fasttrain-data stats {shlex.quote(str(grades))}",
        "The habit of saying yes, in POPE's form, after; without -a, before:",
        f"  {_pope_command(run)}",
        f"Time: {result.seconds:.0f} s.",
    ]
    return lines


def _pope_command(run: RunResult) -> str:
    """The command that scores the tuned model on the demo's yes-or-no questions."""
    places = {"--data": run.folder.parent / "pope", "-o": run.folder.parent / "eval"}
    words = ["fasttrain", "eval", "pope", "-m", str(MODEL), "-a", str(run.folder), "--prompt-suffix", ""]
    words += [str(word) for pair in places.items() for word in pair]
    return shlex.join(words)


def _telling(asked: list[Example], answers: list[str]) -> list[int]:
    """Numbers of three wrong answers, one for each habit."""
    first: dict[str, int] = {}
    for i, (example, answer) in enumerate(zip(asked, answers, strict=True)):
        if answer != example.question.answer:
            first.setdefault(example.question.kind, i)
    return [first[kind] for kind in ("present", "shortest", "count") if kind in first]


def _share(result: Score) -> str:
    low, high = result.interval
    return f"{result.accuracy:.1%} of {result.total} answers right (95 % interval {low:.1%} to {high:.1%})"


def _indent(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())
