"""`fasttrain-data review`: blind human comparison of pairs on a local web page."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from fasttrain_data.commands.options import EXISTING_FILE, image_root_option


@click.command("review", short_help="Compare pairs by eye, blind, on a local page.")
@click.argument("pairs", type=EXISTING_FILE)
@click.option(
    "--limit", type=click.IntRange(1), default=200, show_default=True, help="How many pairs, a seeded sample."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sample and of the sides.")
@click.option("--rater", default="reviewer", show_default=True, help="Name under which judgements are kept.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Default: any free port.")
@click.option("--report", is_flag=True, help="Only print the agreement of the judgements so far.")
@image_root_option
def review_command(
    pairs: Path, limit: int, seed: int, rater: str, port: int, report: bool, image_root: Path | None
) -> None:
    """Compare PAIRS by eye on a page of this machine, without seeing which answer is chosen.

    Judgements are appended to PAIRS.reviews.jsonl; start again to go on. When stopped (Ctrl-C), the agreement
    with the annotator is printed.

    Example: fasttrain-data review pairs.jsonl --rater anna
    """
    from fasttrain_data.review.server import ReviewServer
    from fasttrain_data.review.session import Session, agreement_lines, reviews_path

    if not report:
        session = Session(pairs, limit, seed, rater)
        with ReviewServer(session, image_root or pairs.parent, port) as server:
            click.echo(
                f"{len(session.open)} of {len(session.items)} pairs to judge on {server.url} (Ctrl-C to stop)"
            )
            with contextlib.suppress(KeyboardInterrupt):
                server.serve_forever()
        if not reviews_path(pairs).exists():
            return
    for line in agreement_lines(pairs):
        click.echo(line)
