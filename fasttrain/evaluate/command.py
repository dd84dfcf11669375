"""`fasttrain eval`: a benchmark's questions -> official answer files -> scores."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fasttrain.answering.command import EXIT_TYPED_FAILURES
from fasttrain.answering.options import AnswerOptions, answering_options
from fasttrain.errors import UserError
from fasttrain_data.errors import visible

if TYPE_CHECKING:
    from fasttrain.evaluate.benchmarks import AnswerFile, Benchmark, ReadOptions

NAMES = ("mt-bench", "mm-vet", "llava-bench", "pope", "mmbench", "alpaca-eval")
# by parameter: the benchmarks that have a use for the option
_ONLY_FOR = {
    "judge_model": ("mt-bench", "mm-vet", "llava-bench", "alpaca-eval"),
    "judge_prompt": ("mm-vet", "alpaca-eval"),
    "baseline": ("mt-bench", "alpaca-eval"),
    "category_temperatures": ("mt-bench",),
}
_LIMITS = {"in_flight", "rpm", "attempts"}  # of calls, to a server that answers or one that judges
_TO_ANSWER = {field.name for field in dataclasses.fields(AnswerOptions)} - _LIMITS
_TO_ANSWER |= {"prompt_suffix", "max_new_tokens", "category_temperatures"}
_TO_JUDGE = {
    "judge_dry_run",
    "judge_prompt",
    "judge_temperature",
    "judge_tokens",
    "judge_seed",
    "baseline",
    "max_cost",
}


def _judge_options(command: Any) -> Any:
    from fasttrain.evaluate.judging.options import judge_options

    return judge_options(command)


@click.command("eval")
@click.argument("bench", type=click.Choice(NAMES), metavar="BENCH")
@click.option("-m", "--model", help="Hub id or folder, or the name a server knows it by. Not with --answers.")
@click.option(
    "--data", type=click.Path(path_type=Path), required=True, help="Folder with the benchmark's own files."
)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for answers and scores."
)
@click.option(
    "--answers",
    multiple=True,
    metavar="[PART=]FILE",
    help="Score this answer file; no model is run. POPE: one per split, random=FILE.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="Folder of the benchmark's images. Default: its usual place in --data.",
)
@click.option("--limit", type=click.IntRange(1), help="The first N questions (of each split) only.")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), help="Default: 128 for POPE, 2048 for AlpacaEval, else 1024."
)
@click.option(
    "--prompt-suffix",
    metavar="TEXT",
    help="Line put under each question. Default: LLaVA-1.5's for POPE and MMBench, else none; '' for none.",
)
@click.option(
    "--circular/--no-circular",
    default=True,
    show_default=True,
    help="MMBench: ask every rotation of the options.",
)
@click.option(
    "--category-temperatures",
    is_flag=True,
    help="MT-Bench: FastChat's temperatures by category instead of greedy.",
)
@answering_options
@_judge_options
def eval_command(bench: str, **given: Any) -> int:  # fmt: skip
    """Ask a benchmark's questions, write its official answer files, and score them.

    BENCH is mt-bench, mm-vet, llava-bench, pope, mmbench or alpaca-eval. --data is a folder with the files as the
    benchmark publishes them; what is missing is named with where to get it. POPE and MMBench are scored here, exactly;
    the others by a judge, when --judge names one, else their answers are written for it. Answering goes on where it was
    when the same command is started again. Writes scores.json and, for `fasttrain compare`, results.jsonl. Exit code 3
    when answers are missing or the judge left some out.

    \b
    Examples:
      fasttrain eval pope -m llava-hf/llava-1.5-7b-hf -a runs/first --data data/pope -o eval/first/pope
      fasttrain eval pope --data data/pope --answers adversarial=answers.jsonl -o eval/theirs
      fasttrain eval mt-bench -m runs/merged --data data/mt_bench -o eval/merged --judge gemini-3.8-flash
    """
    from fasttrain.evaluate.benchmarks import NoRightAnswers, ReadOptions, find_benchmark
    from fasttrain.evaluate.judging.options import take_judge_options

    _check_use(bench, given)
    own = {name: given.pop(name) for name in ("data", "out", "answers")}
    limits = {name: given[name] for name in _LIMITS}
    judge, dry_run = take_judge_options(given)
    reading = ReadOptions(
        images=given.pop("images"),
        suffix=given.pop("prompt_suffix"),
        limit=given.pop("limit"),
        circular=given.pop("circular"),
        category_temperatures=given.pop("category_temperatures"),
    )
    max_new_tokens = given.pop("max_new_tokens")
    benchmark = find_benchmark(bench)
    _check_folder(own["out"], bench)
    if own["answers"]:
        files, failed = _given_answers(benchmark, own["data"], own["answers"]), False
    else:
        if given["model"] is None:
            raise UserError("-m: wanted a model (or --answers FILE), got none")
        shared = AnswerOptions(**limits, **given)
        tokens = max_new_tokens or benchmark.max_new_tokens
        files, failed = _answer(benchmark, own["data"], own["out"], reading, shared, tokens)
    if benchmark.score is not None:
        try:
            code = _score(benchmark, own["data"], own["out"], files, reading.limit)
        except NoRightAnswers as why:
            if own["answers"]:
                raise
            click.echo(f"not scored: {why}")
            code = 0
        return code or (EXIT_TYPED_FAILURES if failed else 0)
    (answers,) = files.values()
    if judge is None:
        _tell_unjudged(benchmark, answers, own["data"], own["out"])
        return EXIT_TYPED_FAILURES if failed else 0
    if reading.limit is not None:
        judge = dataclasses.replace(judge, partial=True, limit=reading.limit)
    return _judge(bench, own["data"], answers, own["out"], judge, dry_run) or (
        EXIT_TYPED_FAILURES if failed else 0
    )


def _check_use(bench: str, given: dict[str, Any]) -> None:
    """UserError for an option that would be passed over: by this benchmark, by answers that are there, or for want of a judge."""
    for name, benches in _ONLY_FOR.items():
        if given[name] and bench not in benches:
            option = f"--{name.removesuffix('_model').replace('_', '-')}"
            raise UserError(f"{option}: wanted with {' or '.join(benches)}, got it with {bench}")
    context = click.get_current_context()
    for parameter in context.command.params:
        if context.get_parameter_source(parameter.name or "") is not click.core.ParameterSource.COMMANDLINE:
            continue
        if given["answers"] and parameter.name in _TO_ANSWER:
            raise UserError(f"--answers and {parameter.opts[0]}: wanted one of them, got both")
        if given["judge_model"] is None and parameter.name in _TO_JUDGE:
            raise UserError(f"{parameter.opts[0]}: wanted with --judge, got it alone")


def _check_folder(out: Path, bench: str) -> None:
    """UserError if the folder holds the scores of another benchmark."""
    import json

    path = out / "eval.json"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: wanted a folder, got the file {out}")
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8")).get("benchmark")
        except (ValueError, AttributeError):
            before = None
        if before not in (None, bench):
            raise UserError(
                f"--out: {out} holds an evaluation on {before}; wanted a folder of its own for {bench}"
            )


def _answer(
    benchmark: Benchmark,
    data: Path,
    out: Path,
    reading: ReadOptions,
    shared: AnswerOptions,
    max_new_tokens: int,
) -> tuple[dict[str, Path], bool]:
    """Ask everything, write the official files; those by part, and whether questions stayed without answer."""
    from fasttrain import __version__
    from fasttrain.answering.run import answer_questions
    from fasttrain.evaluate.earlier import bring_back, hash_answers, set_aside
    from fasttrain.files import write_json
    from fasttrain_data.calls.chat_server import without_credentials

    parts = benchmark.read(data, reading)
    questions = [question for part in parts.values() for question in part]
    answerer = shared.answerer()
    decoding = shared.decoding(max_new_tokens)
    out.mkdir(parents=True, exist_ok=True)
    answers, failures = answer_questions(questions, answerer, decoding, out / "answers.journal.jsonl")
    by_question = {id(answer.question): answer for answer in answers}
    by_part = {
        name: [by_question[id(question)] for question in part if id(question) in by_question]
        for name, part in parts.items()
    }
    set_aside(out)
    files = benchmark.write(out, by_part, shared.name(), data)
    written = dict(zip(parts, files))
    bring_back(out, hash_answers(written.values()))
    for path in files:
        click.echo(f"answers: {path}")
    for name, ids in failures.items():
        click.echo(f"no answer: {len(ids):,} {name}: {visible(', '.join(ids[:5]))}", err=True)
    if cut := sum("length" in answer.finish for answer in answers):
        click.echo(f"{cut:,} answers were cut at {max_new_tokens:,} tokens")
    about = {
        "benchmark": benchmark.name,
        "model": shared.model,
        "adapter": str(shared.adapter) if shared.adapter else None,
        "server": without_credentials(shared.server) if shared.server else None,
        "model_id": shared.name(),
        "version": answerer.version,
        "decoding": dataclasses.asdict(decoding),
        "reading": {
            name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(reading).items()
        },
        "data": str(data),
        "questions": len(questions),
        "answers": len(answers),
        "cut_at_max_new_tokens": cut,
        "fasttrain": __version__,
    }
    write_json(out / "eval.json", about)
    return written, bool(failures)


def _given_answers(benchmark: Benchmark, data: Path, answers: tuple[str, ...]) -> dict[str, Path]:
    """Answer files by part, as `FILE` or `PART=FILE` name them."""
    parts = list(benchmark.parts(data))
    found: dict[str, Path] = {}
    for text in answers:
        name, sign, rest = text.partition("=")
        if not sign or Path(text).exists():
            name, rest = "", text
        if name == "" and len(parts) == 1:
            name = parts[0]
        if name not in parts:
            wanted = ", ".join(f"{part}=FILE" for part in parts) if parts != [""] else "FILE"
            raise UserError(f"--answers: wanted {wanted}, got {text}")
        if name in found:
            raise UserError(
                f"--answers: wanted one file{f' for {name}' if name else ''}, got {found[name]} and {rest}"
            )
        if not Path(rest).is_file():
            raise UserError(
                f"--answers: wanted a file, got {'a folder' if Path(rest).is_dir() else 'nothing'} at {rest}"
            )
        found[name] = Path(rest)
    return {part: found[part] for part in parts if part in found}


def _score(benchmark: Benchmark, data: Path, out: Path, files: dict[str, Path], limit: int | None) -> int:
    from fasttrain.evaluate.earlier import bring_back, hash_answers, set_aside
    from fasttrain.evaluate.results import write_results
    from fasttrain.files import write_json

    assert benchmark.score is not None
    answers_hash = hash_answers(files.values())
    set_aside(out)
    bring_back(out, answers_hash)
    given = {part: benchmark.read_answers(path) for part, path in files.items()}
    scored = benchmark.score(data, given, limit)
    out.mkdir(parents=True, exist_ok=True)
    write_results(out, scored.results)
    write_json(out / "scores.json", scored.scores | {"answers_hash": answers_hash})
    for line in scored.warnings:
        click.echo(f"fasttrain: warning: {line}", err=True)
    for line in scored.lines:
        click.echo(line)
    click.echo(f"scores: {out / 'scores.json'}")
    return EXIT_TYPED_FAILURES if scored.missing else 0


def _tell_unjudged(benchmark: Benchmark, answers: Path, data: Path, out: Path) -> None:
    given: AnswerFile = benchmark.read_answers(answers)
    chars = [len(text) for text in given.texts.values()]
    if not chars:
        raise UserError(f"{answers}: wanted at least one answer, got none")
    click.echo(
        f"{len(chars):,} answers of {given.model}, mean length {sum(chars) / len(chars):,.0f} characters"
    )
    click.echo(
        f"to score them: fasttrain eval {benchmark.name} --data {data} --answers {answers} -o {out} --judge MODEL"
    )


def _judge(bench: str, data: Path, answers: Path, out: Path, judge: Any, dry_run: bool) -> int:
    from fasttrain.evaluate.earlier import bring_back, hash_answers, set_aside
    from fasttrain.evaluate.judging import forecast_judging, judge_benchmark
    from fasttrain.evaluate.judging.told import score_lines
    from fasttrain.files import write_json

    if dry_run:
        forecast = forecast_judging(bench, data, answers, out, judge)
        money = "at an unknown price" if forecast.usd is None else f"about {forecast.usd:.2f} USD"
        click.echo(
            f"judge: {forecast.calls:,} calls ({forecast.calls_in_journal:,} more are in the journal), about "
            f"{forecast.prompt_tokens:,} tokens in and {forecast.output_tokens:,} out, {money}"
        )
        return 0
    answers_hash = hash_answers([answers])
    set_aside(out)
    bring_back(out, answers_hash)
    scores = judge_benchmark(bench, data, answers, out, judge)
    write_json(out / "scores.json", scores | {"answers_hash": answers_hash})
    for line in score_lines(scores):
        click.echo(line)
    click.echo(f"scores: {out / 'scores.json'}")
    return EXIT_TYPED_FAILURES if scores["excluded"] or scores["missing"] else 0
