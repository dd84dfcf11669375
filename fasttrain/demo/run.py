"""The demo: chart pairs, DPO on a small spoiled LLaVA, and its answers to held-out charts before and after."""

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
from fasttrain.demo.answering import Score, answer_greedily, load_model, one_thread, score
from fasttrain.demo.chart_files import write_pairs, write_questions
from fasttrain.demo.charts import KINDS, Example, examples

MODEL = Path(__file__).parent / "assets" / "model"
RECIPE_MARK = "# Written by `fasttrain demo`."
INTRODUCTION = """\
A small LLaVA (1.1 million parameters) reads bar charts well but has learned bad habits: it says "yes",
it names the tallest bar whatever is asked, and it does not stop after the answer.
"""
PAIRS_SEED = 11
QUESTIONS_SEED = 12

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
  workers: 0                  # images this small are read faster than they are sent between processes
loss:
  beta: 0.5
train:
  output: {output}
  epochs: 1
  pairs_per_step: 64
  learning_rate: 1.0e-3
  warmup_ratio: 0.05
reference:
  cache: {cache}
track: []
"""


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo measured; `tokens` and `tokens_unshared` are sums over the run's metrics."""

    before: Score
    after: Score
    tokens: int
    tokens_unshared: int
    run: RunResult
    seconds: float


def run_demo(
    folder: Path,
    *,
    prompts: int = 640,
    questions: int = 400,
    overrides: Sequence[str] = (),
    echo: Callable[[str], Any] = click.echo,
) -> DemoResult:
    """Runs the whole demo in `folder`, telling `echo` about it line by line.

    `prompts` training prompts give about three pairs each; `questions` held-out questions are asked before and
    after; `overrides` are `key=value` changes of the recipe. An earlier demo in the folder is replaced; a folder
    that holds anything else is refused with `UserError`. Runs on one torch thread and restores the number after.
    """
    started = time.monotonic()
    _clear(folder)
    recipe = _write_recipe(folder)
    config = load_config(recipe, overrides)
    echo(INTRODUCTION)
    with one_thread():
        pairs = write_pairs(folder / "pairs", prompts, PAIRS_SEED)
        held_out = write_questions(folder / "held_out", questions, QUESTIONS_SEED)
        asked = list(itertools.islice(examples(QUESTIONS_SEED, "held_out"), questions))
        model, processor = load_model(MODEL)
        answers_before = answer_greedily(model, processor, asked)
        before = score(asked, answers_before)
        echo(f"Asked about charts kept out of all training ({held_out}):\n{_share(before)}.\n")
        echo(f"DPO on {_count_lines(pairs):,} pairs from {prompts:,} questions, with {recipe}:\n")
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
    for name in ("pairs", "held_out", "reference"):
        shutil.rmtree(folder / name, ignore_errors=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot make the folder: {error.strerror}") from None


def _write_recipe(folder: Path) -> Path:
    path = folder / "recipe.yaml"
    text = RECIPE.format(
        mark=RECIPE_MARK,
        recipe=shlex.quote(str(path)),
        again=shlex.quote(str(folder / "again")),
        # A JSON string is a YAML string, whatever the folder is called.
        model=json.dumps(str(MODEL)),
        pairs=json.dumps(str(folder / "pairs" / "pairs.jsonl")),
        output=json.dumps(str(folder / "run")),
        cache=json.dumps(str(folder / "reference")),
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
    lines += [
        "",
        f"The steps ran {result.tokens:,} tokens. With every answer in a sequence of its own and the reference model",
        f"run in every step it would have been {result.tokens_unshared:,}, {times:.1f} times as many. The cached",
        "reference log-probs took one pass over the same prompts and answers and serve later runs too.",
        f"Run folder: {run.folder} (the adapter is in {run.adapter.name}/, the figures are in metrics.jsonl).",
        f"Time: {result.seconds:.0f} s.",
    ]
    return lines


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


def _count_lines(path: Path) -> int:
    with path.open(encoding="utf-8") as file:
        return sum(1 for _ in file)


def _indent(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())
