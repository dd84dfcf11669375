"""`fasttrain-data steer`: questions as a SteerLM model is asked them."""

from __future__ import annotations

from pathlib import Path

import click

from fasttrain_data.commands.options import EXISTING_FILE, image_root_option, output_option
from fasttrain_data.errors import UserError


@click.command("steer", short_help="Append SteerLM's request for attribute values to questions.")
@click.argument("questions", type=EXISTING_FILE)
@output_option
@click.option(
    "--scores",
    default="4,4,4,4,4",
    show_default=True,
    help="Helpfulness, correctness, coherence, complexity and verbosity to ask for, 0 to 4 each.",
)
@image_root_option
def steer_command(questions: Path, output: Path, scores: str, image_root: Path | None) -> None:
    """Append the request that `pair --for steerlm` trains on to every question of QUESTIONS.

    Reads any question file with `text`, `question` or `prompt`; everything else in a row stays as it is.

    Example: fasttrain-data steer questions.jsonl -o steered.jsonl --scores 4,4,4,2,2
    """
    from fasttrain_data.pairs.steering import steering_text, write_steered

    try:
        text = steering_text([int(score) for score in scores.split(",")])
    except ValueError:
        raise UserError(f"--scores: wanted five whole numbers from 0 to 4, got {scores!r}") from None
    count, note = write_steered(questions, output, text, image_root)
    if note:
        click.echo(note)
    click.echo(f"{output}: {count:,} {'question' if count == 1 else 'questions'}")
