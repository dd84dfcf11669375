"""`fasttrain-data pair`: annotations.jsonl -> pairs.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fasttrain_data.commands.options import EXISTING_FILE, image_root_option, output_option


@click.command("pair", short_help="Make preference pairs from annotations.")
@click.argument("annotations", type=EXISTING_FILE)
@output_option
@click.option(
    "--score",
    default="hcc",
    show_default=True,
    help="hcc (helpfulness + correctness + coherence), all5, nemotron, or weights h=..,c=..,co=..,cx=..,v=..",
)
@click.option(
    "--margin",
    type=float,
    default=2.0,
    show_default=True,
    help="How much lower a rejected answer scores, at least, on the scale of --score.",
)
@click.option(
    "--rejected",
    type=click.Choice(["random", "lowest", "all"]),
    default="random",
    show_default=True,
    help="Which of the qualifying answers is rejected; all makes a pair of each.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of --rejected random and --held-out."
)
@click.option(
    "--answers", type=click.IntRange(2), help="Leave out prompts with fewer sampled answers than this."
)
@click.option(
    "--held-out",
    type=click.FloatRange(0, 0.9),
    default=0.0,
    show_default=True,
    help="Share of the prompts whose pairs go to OUT.heldout.jsonl.",
)
@image_root_option
def pair_command(annotations: Path, output: Path, **options: Any) -> None:
    """Make preference pairs from ANNOTATIONS by a rule; no call is made.

    The best answer of a prompt (same images and same question) is chosen, one at least --margin lower is
    rejected. Prompts that give no pair are counted by reason and listed in OUT.skipped.jsonl.

    Example: fasttrain-data pair annotations.jsonl -o pairs.jsonl --score hcc --margin 2
    """
    from fasttrain_data.pairs.build import PairSettings, held_out_path, make_pairs
    from fasttrain_data.pairs.scores import parse_score

    rule = parse_score(options["score"])
    if any(weight % 1 for weight in rule.weights):
        low, high = rule.span()
        click.echo(
            f"note: {rule.name} spans {low:.2f} to {high:.2f}, hcc 0 to 12: is --margin {options['margin']:g} meant?",
            err=True,
        )
    counts = make_pairs(annotations, output, PairSettings(**options))
    for line in counts.account.lines():
        click.echo(line)
    chosen, rejected = counts.chosen_chars / counts.pairs, counts.rejected_chars / counts.pairs
    click.echo(
        f"mean margin {counts.margin_sum / counts.pairs:.2f}; mean length chosen {chosen:.0f}, "
        f"rejected {rejected:.0f} characters (chosen - rejected {chosen - rejected:+.0f})"
    )
    if counts.held_out:
        click.echo(f"{held_out_path(output)}: {counts.held_out:,} pairs")
    click.echo(f"{output}: {counts.pairs - counts.held_out:,} pairs of {counts.prompts:,} prompts")
