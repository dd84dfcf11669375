"""The demo's way from charts to preference pairs: every stage of fasttrain-data, file to file."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fasttrain.demo.answering import MAX_NEW_TOKENS
from fasttrain.demo.chart_files import write_questions
from fasttrain.demo.chart_judge import ChartJudge
from fasttrain.demo.charts import examples
from fasttrain_data import (
    AnnotateSettings,
    Endpoint,
    PairSettings,
    QuestionSettings,
    SampleSettings,
    UserError,
    annotate,
    build_questions,
    complete,
    load_sampler,
    make_pairs,
    open_judge,
)
from fasttrain_data.annotations.prompts import Prompts
from fasttrain_data.gemini_double import GeminiDouble
from fasttrain_data.jsonl import whole_rows
from fasttrain_data.pairs.build import PairCounts
from fasttrain_data.records import Annotation, Scored, tool_version

JUDGE_MODEL = "gemini-double"
JUDGE_VERSION = "chart-judge-1"
# The fastest of 8, 32 and 64, measured on one core.
QUESTIONS_AT_A_TIME = 32
Echo = Callable[[str], Any]


@dataclass(frozen=True, kw_only=True)
class PreferenceData:
    """The pair file and what each stage made. sdk: what asked the judge; None when it was asked directly."""

    pairs_file: Path
    questions: int
    samples: int
    completions: int
    annotated: int
    pairs: int
    paired_questions: int
    sdk: str | None


def make_preference_data(
    folder: Path, model: Path, held_out: Path, *, prompts: int, seed: int, echo: Echo
) -> PreferenceData:
    """Questions, completions, annotations and pairs about `prompts` training charts, each a file in `folder`.

    model: answers the questions, four times each at temperature 0.7. held_out: a question file whose charts must not
    come up. What each stage made goes to `echo`. fasttrain_data's UserError when not a single pair comes out.
    """
    charts = write_questions(folder / "charts", prompts, seed, "train")
    questions, completions, annotations, pairs = (
        folder / f"{name}.jsonl" for name in ("questions", "completions", "annotations", "pairs")
    )
    account = build_questions([str(charts)], questions, QuestionSettings(seed=seed, eval_files=(held_out,)))
    kept = account.total_kept()
    echo(f"questions  {prompts:,} about new charts, {kept:,} kept: none on a held-out chart, none twice")

    settings = SampleSettings(model=str(model), max_new_tokens=MAX_NEW_TOKENS, seed=seed)
    sampler = load_sampler(settings, dtype="float32", batch_size=QUESTIONS_AT_A_TIME)
    sampled = complete(questions, completions, settings, sampler)
    echo(
        f"complete   {sampled.drawn:,} answers, {settings.samples} to each question at temperature "
        f"{settings.temperature:g}: {sampled.completions:,} different"
    )

    judge = ChartJudge(itertools.islice(examples(seed, "train"), prompts))
    annotated, sdk = _annotate(completions, annotations, judge, seed, echo)

    counts = _pair(annotations, pairs, seed, echo)
    return PreferenceData(
        pairs_file=pairs,
        questions=kept,
        samples=sampled.drawn,
        completions=sampled.completions,
        annotated=annotated,
        pairs=counts.pairs,
        paired_questions=counts.account.total_kept(),
        sdk=sdk,
    )


def _annotate(
    completions: Path, output: Path, judge: ChartJudge, seed: int, echo: Echo
) -> tuple[int, str | None]:
    """Through the real SDK and the local double; without the SDK by the judge itself, and that is said."""
    with GeminiDouble(judge, model_version=JUDGE_VERSION, keep_calls=False) as double, _without_proxy():
        try:
            # Key and address are the double's own: nothing is taken from the user's environment.
            client = open_judge(
                "google-genai", Endpoint(api_key=double.api_key, base_url=double.url, timeout_s=30.0)
            )
        except UserError as missing:
            count = _annotate_directly(completions, output, judge)
            echo(f"annotate   {missing}")
            echo(f"           so the judge itself graded {count:,} questions' answers, without any call")
            return count, None
        settings = AnnotateSettings(model=JUDGE_MODEL, seed=seed)
        result = annotate(completions, output, settings, client)
    sdk = f"google-genai {version('google-genai')}"
    ok = result.statuses["ok"]
    echo(f"annotate   {result.totals.replies:,} calls by {sdk} to a stand-in for Gemini on 127.0.0.1,")
    echo("           whose judge is a rule that knows the charts:")
    echo(f"           answers to {ok:,} questions graded, {result.statuses.total() - ok:,} failed")
    return ok, sdk


def _pair(annotations: Path, output: Path, seed: int, echo: Echo) -> PairCounts:
    """By the paper's rule; questions without a pair are told by reason."""
    settings = PairSettings(seed=seed, rejected="all")  # several rejected answers behind one prompt
    counts = make_pairs(annotations, output, settings)
    paired = counts.account.total_kept()
    echo(f"pair       {counts.pairs:,} pairs, of {paired:,} questions ({paired / counts.prompts:.0%}):")
    echo(f"           the best answer and each at least {settings.margin:g} of 12 points lower")
    for reason, count in counts.account.dropped.get("prompts", {}).items():
        echo(f"           no pair from {count:,} questions: {reason}")
    return counts


@contextlib.contextmanager
def _without_proxy() -> Iterator[None]:
    """Lets the SDK reach 127.0.0.1 where the environment names a proxy for everything."""
    before = {name: os.environ.get(name) for name in ("NO_PROXY", "no_proxy")}
    os.environ.update(dict.fromkeys(before, "127.0.0.1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _annotate_directly(completions: Path, output: Path, judge: ChartJudge) -> int:
    """The file that annotation writes, from the judge's own mouth; returns the number of prompts."""
    with contextlib.closing(Prompts(completions)) as prompts, whole_rows(output) as write:
        for prompt in prompts:
            images = [(completions.parent / name).read_bytes() for name in prompt.images]
            grades = judge(prompt.question, images, [answer.text for answer in prompt.completions])
            scored = [
                Scored(id=answer.id, text=answer.text, count=answer.count, **grade)
                for answer, grade in zip(prompt.completions, grades, strict=True)
            ]
            record = Annotation(
                question_id=prompt.question_id,
                images=list(prompt.images),
                question=prompt.question,
                completions=scored,
                model=JUDGE_VERSION,
                tool=tool_version(),
            )
            write(record.row())
        return len(prompts)
