"""`fasttrain-data review`: blind human comparison of pairs on a web page."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import click

from fasttrain_data.commands.options import ANY_PATH, EXISTING_FILE, image_root_option


@click.command("review", short_help="Compare pairs by eye, blind, on a local page.")
@click.argument("pairs", type=EXISTING_FILE)
@click.option(
    "--limit", type=click.IntRange(1), default=200, show_default=True, help="How many pairs, a seeded sample."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sample and of the sides.")
@click.option(
    "--rater", default="", help="Name under which judgements are kept. Default: the page asks for it."
)
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Default: any free port.")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Another address lets other machines in, under a token in $FASTTRAIN_REVIEW_TOKEN only.",
)
@click.option(
    "--report", is_flag=True, help="Print the agreement so far and write PAIRS.agreement.json; no page."
)
@click.option(
    "--to-argilla",
    type=ANY_PATH,
    metavar="FILE",
    help="Write pairs and judgements as Argilla records; no page.",
)
@click.option(
    "--from-argilla", type=EXISTING_FILE, help="Take over judgements from Argilla records; no page."
)
@image_root_option
def review_command(
    pairs: Path, limit: int, seed: int, rater: str, port: int, host: str, report: bool, to_argilla: Path | None,
    from_argilla: Path | None, image_root: Path | None,
) -> None:  # fmt: skip
    """Compare PAIRS by eye on a page of this machine, without seeing which answer is chosen.

    Several people may review the same pairs, each under their own name. Every judgement is on disk in
    PAIRS.reviews.jsonl before the page goes on; start again to go on. When stopped (Ctrl-C), agreement of reviewers
    with the annotator and with each other is printed.

    Example: fasttrain-data review pairs.jsonl
    """
    from fasttrain_data.review.judgements import reviews_path
    from fasttrain_data.review.session import Review, check_name

    root = image_root or pairs.parent
    if to_argilla or from_argilla:
        from fasttrain_data.review.argilla import export_argilla, import_argilla

        review = Review(pairs, limit, seed)
        if from_argilla:
            taken, same = import_argilla(review, from_argilla)
            click.echo(f"{taken:,} judgements taken over, {same:,} stood already")
        if to_argilla:
            click.echo(f"{to_argilla}: {export_argilla(review, root, to_argilla):,} records")
        return
    if not report:
        _serve(Review(pairs, limit, seed), root, port, host, check_name(rater) if rater else "")
        if not reviews_path(pairs).exists():
            return
    _report(pairs)


def _serve(review, root: Path, port: int, host: str, rater: str) -> None:  # type: ignore[no-untyped-def]
    from fasttrain_data.review.server import ReviewServer

    token = os.environ.get("FASTTRAIN_REVIEW_TOKEN") or None
    with ReviewServer(review, root, port, rater=rater, host=host, token=token) as server:
        click.echo(f"{len(review.items):,} pairs to review on {server.url} (Ctrl-C to stop)")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def _report(pairs: Path) -> None:
    from fasttrain_data.jsonl import write_text
    from fasttrain_data.review.agreement import agreement, agreement_lines
    from fasttrain_data.review.judgements import Judgements, reviews_path

    for line in agreement_lines(pairs):
        click.echo(line)
    output = pairs.with_name(f"{pairs.stem}.agreement.json")
    found = agreement(Judgements(reviews_path(pairs)).standing())
    write_text(output, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    click.echo(f"{output}")
