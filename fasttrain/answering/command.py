"""`fasttrain answer`: questions.jsonl -> answers.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fasttrain.answering.options import AnswerOptions, answering_options, call_limit_options

EXIT_TYPED_FAILURES = 3


@click.command("answer")
@click.argument("questions", type=click.Path(path_type=Path))
@click.option("-o", "--out", "output", type=click.Path(path_type=Path), required=True, help="File to write.")
@click.option("-m", "--model", required=True, help="Hub id or folder, or the name a server knows it by.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=1024, show_default=True, help="Per turn.")
@click.option("--limit", type=click.IntRange(1), help="The first N questions only.")
@click.option(
    "--image-root",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder that image paths start from. Default: that of the question file.",
)
@answering_options
@call_limit_options
def answer_command(
    questions: Path,
    output: Path,
    max_new_tokens: int,
    limit: int | None,
    image_root: Path | None,
    **options: Any,
) -> int:
    """Answer every question of a file, in batches, greedily unless told otherwise.

    A question has `question_id` and `text` (LLaVA), `turns` (FastChat: asked one after the other), `question`, or `prompt`
    (a text or messages); `image` or `images` name files. Answers are written in LLaVA's format, for questions with turns
    in FastChat's, in the order of the questions. They are kept as they come, those of answers.jsonl in
    answers.journal.jsonl: after a stop of any kind the same command goes on where it was. Exit code 3 when some got no answer:
    a server failed, an image cannot be decoded, or a question is longer than the model's positions or refused by its template.

    \b
    Example:
      fasttrain answer -m llava-hf/llava-1.5-7b-hf -a runs/first questions.jsonl -o answers.jsonl
    """
    from fasttrain.answering.questions import read_questions
    from fasttrain.answering.records import answer_row, write_jsonl
    from fasttrain.answering.run import answer_questions, check_output
    from fasttrain_data.calls.journal import journal_path

    check_output(output, questions)
    shared = AnswerOptions(**options)
    asked = read_questions(questions, image_root, limit)
    answers, failures = answer_questions(
        asked, shared.answerer(), shared.decoding(max_new_tokens), journal_path(output)
    )
    write_jsonl(output, [answer_row(answer, shared.name()) for answer in answers])
    cut = sum("length" in answer.finish for answer in answers)
    tail = f", {cut:,} cut at {max_new_tokens:,} tokens" if cut else ""
    click.echo(f"{output}: {len(answers):,} answers to {len(asked):,} questions{tail}")
    for name, ids in failures.items():
        click.echo(
            f"no answer: {len(ids):,} {name}: {', '.join(ids[:5])}{' ...' if len(ids) > 5 else ''}", err=True
        )
    return EXIT_TYPED_FAILURES if failures else 0
