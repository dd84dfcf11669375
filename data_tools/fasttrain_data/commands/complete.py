"""`fasttrain-data complete`: questions.jsonl -> completions.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fasttrain_data.commands.options import (
    EXISTING_FILE,
    SECONDS,
    Number,
    UserPath,
    image_root_option,
    output_option,
)
from fasttrain_data.errors import EXIT_TYPED_FAILURES


@click.command("complete", short_help="Sample completions of every question.")
@click.argument("questions", type=EXISTING_FILE)
@output_option
@click.option(
    "-m",
    "--model",
    required=True,
    help="Hub id or folder of a local model, or the name a server knows it by.",
)
@click.option(
    "-a",
    "--adapter",
    type=UserPath(exists=True, file_okay=False),
    help="LoRA adapter of a local model.",
)
@click.option("--revision", help="Hub revision of a local model.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float32"]),
    default="auto",
    show_default=True,
    help="Of a local model.",
)
@click.option(
    "--bos",
    type=click.Choice(["template", "tokenizer"]),
    help="As model.bos in a recipe, for a local model. Default: as the adapter's run did, else template.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Questions at a time in a local model.",
)
@click.option(
    "--server", help="URL of an OpenAI-compatible server; its key, if it wants one, in $OPENAI_API_KEY."
)
@click.option(
    "--samples", type=click.IntRange(1), default=4, show_default=True, help="Completions per question."
)
@click.option("--temperature", type=Number(0), default=0.7, show_default=True)
@click.option("--top-p", type=Number(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--max-new-tokens", type=click.IntRange(1), default=1024, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--in-flight",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Requests to the server at the same time.",
)
@click.option("--rpm", type=Number(0, min_open=True), help="Requests to the server per minute.")
@click.option(
    "--timeout",
    "timeout_s",
    type=SECONDS,
    default=300.0,
    show_default=True,
    help="Seconds.",
)
@click.option("--attempts", type=click.IntRange(1), default=5, show_default=True, help="Per request and run.")
@click.option(
    "--backoff",
    "backoff_s",
    type=Number(0),
    default=1.0,
    show_default=True,
    help="First wait in seconds, doubled.",
)
@image_root_option
def complete_command(questions: Path, output: Path, **options: Any) -> int:
    """Sample completions of every question, from a local model or a server.

    Every sample has a recorded seed. Samples are kept as they come, those of completions.jsonl in
    completions.journal.jsonl: start the same command again after a stop, and only missing ones are drawn. Equal
    completions of a question are kept once, with a count. Exit code 3 when some samples failed.

    Example: fasttrain-data complete questions.jsonl -o completions.jsonl --model llava-hf/llava-1.5-7b-hf
    """
    from fasttrain_data.completions.build import complete
    from fasttrain_data.completions.samples import Sampler, SampleSettings

    names = ("model", "samples", "temperature", "top_p", "max_new_tokens", "seed", "image_root")
    chosen = {name: options[name] for name in names}
    sampler: Sampler
    if options["server"]:
        from fasttrain_data.calls.dispatch import CallLimits
        from fasttrain_data.completions.server import ServerSampler

        for name in ("adapter", "bos"):
            if options[name]:
                raise click.UsageError(f"--{name}: wanted with a local model only, got it with --server")
        settings = SampleSettings(**chosen)
        limits = CallLimits(**{name: options[name] for name in ("in_flight", "rpm", "attempts", "backoff_s")})
        sampler = ServerSampler(options["server"], settings, limits, options["timeout_s"])
    else:
        from fasttrain_data.completions.local import bos_of_adapter, load_sampler

        settings = SampleSettings(**chosen, bos=options["bos"] or bos_of_adapter(options["adapter"]))
        loading = ("adapter", "revision", "dtype", "batch_size")
        sampler = load_sampler(settings, **{name: options[name] for name in loading})
        if note := sampler.note():
            click.echo(note, err=True)
    result = complete(questions, output, settings, sampler)
    for line in result.account.lines():
        click.echo(line)
    click.echo(
        f"{output}: {result.completions:,} completions of {result.questions:,} questions, {result.drawn:,} drawn now"
    )
    return EXIT_TYPED_FAILURES if result.failed else 0
