"""`fasttrain-data questions`: sources of images with questions -> questions.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fasttrain_data.commands.options import EXISTING_FILE, Number, RowRange, image_root_option, output_option


@click.command("questions", short_help="Read image questions from data files.")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@output_option
@click.option(
    "--limit",
    type=click.IntRange(1),
    help="How many questions in all, a seeded sample; default: every usable one.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the sampling.")
@click.option(
    "--stratify",
    type=click.Choice(["source", "category", "none"]),
    default="source",
    show_default=True,
    help="What shares the limit evenly; what one stratum cannot give, the others do.",
)
@click.option(
    "--turns",
    type=click.Choice(["first", "last", "each"]),
    help="Which human turns of a conversation to ask, earlier ones kept as history. "
    "Default: first for SciGraphQA, last for LLaVA.",
)
@click.option(
    "--rows", type=RowRange(), help="Only these rows of each source, counted from 0 (the paper: 10000:13000)."
)
@click.option(
    "--near",
    type=Number(0.1, 1),
    default=0.8,
    show_default=True,
    help="Word-trigram similarity from which two questions about one image are the same; 1: only equal ones.",
)
@click.option(
    "--eval-file",
    "eval_files",
    type=EXISTING_FILE,
    multiple=True,
    help="Evaluation questions whose images must not be trained on. Repeatable.",
)
@click.option(
    "--on-overlap",
    type=click.Choice(["drop", "refuse"]),
    default="drop",
    show_default=True,
    help="What to do with a question that is in an evaluation file.",
)
@click.option(
    "--missing-images",
    type=click.Choice(["drop", "keep", "stop"]),
    default="drop",
    show_default=True,
    help="Dropped and kept ones are counted, dropped ones listed.",
)
@click.option(
    "--drop-coordinates", is_flag=True, help="Leave out questions that hold pixel coordinates (LRV)."
)
@image_root_option
def questions_command(sources: tuple[str, ...], output: Path, **options: Any) -> None:
    """Read image questions from SOURCE files and write questions.jsonl.

    SOURCE is a file or FORMAT:FILE, FORMAT being scigraphqa, lrv, llava, llava-questions or plain; without it
    the first row decides. What was kept, repaired and dropped is printed; dropped rows are listed, those
    of questions.jsonl in questions.skipped.jsonl.

    Example: fasttrain-data questions scigraphqa.jsonl lrv.json --image-root data -o questions.jsonl
    --limit 6000 --eval-file coco_pope_random.json
    """
    from fasttrain_data.questions.build import QuestionSettings, build_questions

    account = build_questions(sources, output, QuestionSettings(**options))
    for line in account.lines():
        click.echo(line)
    click.echo(f"{output}: {account.total_kept():,} questions")
