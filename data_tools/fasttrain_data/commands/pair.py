"""`fasttrain-data pair`: annotations.jsonl -> pairs.jsonl, or the data of the paper's SFT arms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fasttrain_data.commands.options import EXISTING_FILE, Number, image_root_option, output_option
from fasttrain_data.errors import UserError


@click.command("pair", short_help="Make preference pairs from annotations.")
@click.argument("annotations", type=EXISTING_FILE)
@output_option
@click.option(
    "--for",
    "method",
    type=click.Choice(["dpo", "sft", "rejection", "steerlm"]),
    default="dpo",
    show_default=True,
    help="dpo: pairs. The others write answers to learn, from the same prompts: the source dataset's own (sft), the "
    "best-scored one (rejection), every one under a request for its scores (steerlm).",
)
@click.option(
    "--take",
    type=click.Choice(["gold", "best", "random", "all"]),
    help="Which answers an SFT arm learns. sft: gold, random or all; rejection: best; steerlm: all, best or random.",
)
@click.option(
    "--questions",
    type=EXISTING_FILE,
    help="questions.jsonl with the source dataset's answers, for --for sft.",
)
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
    help="How much lower a rejected answer scores, at least, on the scale of --score. The SFT arms use the same "
    "prompts; there 0 takes every annotated one.",
)
@click.option(
    "--rejected",
    type=click.Choice(["random", "lowest", "all"]),
    help="Which of the qualifying answers is rejected; all makes a pair of each.  [default: random]",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of random choices and of --held-out."
)
@click.option(
    "--answers", type=click.IntRange(2), help="Leave out prompts with fewer sampled answers than this."
)
@click.option(
    "--held-out",
    type=Number(0, 0.9),
    default=0.0,
    show_default=True,
    help="Share of the prompts whose rows go to a file of their own, those of pairs.jsonl to pairs.heldout.jsonl.",
)
@click.option(
    "--flip",
    type=Number(0, 1),
    help="Share of the pairs, drawn by seed, whose two labels are swapped: label noise, to study it. Held-out pairs stay.",
)
@image_root_option
def pair_command(annotations: Path, output: Path, method: str, **options: Any) -> None:
    """Make preference pairs from ANNOTATIONS by a rule, or the data of an SFT arm; no call is made.

    The best answer of a prompt (same images and same question) is chosen, one at least --margin lower is
    rejected. Prompts that give no pair are counted by reason and listed, those of pairs.jsonl in
    pairs.skipped.jsonl.

    Example: fasttrain-data pair annotations.jsonl -o pairs.jsonl --score hcc --margin 2

    Example: fasttrain-data pair annotations.jsonl -o steerlm.jsonl --for steerlm
    """
    _note_scale(options["score"], options["margin"])
    if method == "dpo":
        _pair(annotations, output, options)
    else:
        _demonstrate(annotations, output, method, options)


def _note_scale(score: str, margin: float) -> None:
    from fasttrain_data.pairs.scores import parse_score

    rule = parse_score(score)
    if any(weight % 1 for weight in rule.weights):
        low, high = rule.span()
        click.echo(
            f"note: {rule.name} spans {low:.2f} to {high:.2f}, hcc 0 to 12: is --margin {margin:g} meant?",
            err=True,
        )


def _pair(annotations: Path, output: Path, options: dict[str, Any]) -> None:
    from fasttrain_data.pairs.build import PairSettings, held_out_path, make_pairs

    _refuse(options, ("take", "questions"), "--for sft, rejection or steerlm")
    options["rejected"] = options["rejected"] or "random"
    options["flip"] = options["flip"] or 0.0
    counts = make_pairs(annotations, output, PairSettings(**options))
    for line in counts.account.lines():
        click.echo(line)
    chosen, rejected = counts.chosen_chars / counts.pairs, counts.rejected_chars / counts.pairs
    click.echo(
        f"mean margin {counts.margin_sum / counts.pairs:.2f}; mean length chosen {chosen:.0f}, "
        f"rejected {rejected:.0f} characters (chosen - rejected {chosen - rejected:+z.0f})"
    )
    if counts.held_out:
        click.echo(f"{held_out_path(output)}: {counts.held_out:,} pairs")
    click.echo(f"{output}: {counts.pairs - counts.held_out:,} pairs of {counts.prompts:,} prompts")


def _demonstrate(annotations: Path, output: Path, method: str, options: dict[str, Any]) -> None:
    from fasttrain_data.pairs.build import held_out_path
    from fasttrain_data.pairs.demonstrations import DemonstrationSettings, make_demonstrations

    _refuse(options, ("rejected", "flip"), "--for dpo")
    settings = DemonstrationSettings(method=method, **options)  # type: ignore[arg-type]
    counts = make_demonstrations(annotations, output, settings)
    for line in counts.account.lines():
        click.echo(line)
    mean = f"mean score {counts.score_sum / counts.scored:.2f}; " if counts.scored else ""
    click.echo(f"{mean}mean length {counts.chars / counts.rows:.0f} characters")
    if counts.held_out:
        click.echo(f"{held_out_path(output)}: {counts.held_out:,} answers")
    click.echo(f"{output}: {counts.rows - counts.held_out:,} answers of {counts.prompts:,} prompts")


def _refuse(options: dict[str, Any], names: tuple[str, ...], wanted: str) -> None:
    for name in names:
        value = options.pop(name)
        if value is not None:
            raise UserError(f"--{name}: wanted only with {wanted}, got {value}")
