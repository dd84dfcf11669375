"""`fasttrain-data export` and `fasttrain-data import`: preference files of other projects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fasttrain_data.commands.options import UserPath, image_root_option, output_option

_ANY = UserPath(exists=True)
_FORMATS = "trl, llama-factory, ms-swift, mllm-dpo, rlaif-v, vlfeedback, llava-next, alpaca, helpsteer, helpsteer3, ultrafeedback"
_format_option = click.option(
    "--format", "form", help=f"Layout of the file; default: by its first row. One of {_FORMATS}."
)


@click.command("export", short_help="Write pairs for another trainer.")
@click.argument("pairs", type=_ANY)
@click.option(
    "--to", "target", type=click.Choice(["trl", "llama-factory", "ms-swift", "mllm-dpo"]), required=True
)
@output_option
@_format_option
@image_root_option
def export_command(pairs: Path, output: Path, target: str, **options: Any) -> None:
    """Write PAIRS for another trainer.

    trl: JSON lines, or Parquet with the images in it for an OUT ending in .parquet. llama-factory: a JSON array
    and its entry in dataset_info.json beside it. ms-swift: JSON lines. mllm-dpo: a JSON array.

    Example: fasttrain-data export pairs.jsonl --to llama-factory -o data/pairs.json
    """
    from fasttrain_data.formats.write import export_pairs

    account = export_pairs(pairs, output, target, **options)
    for line in account.lines():
        click.echo(line)
    click.echo(f"{output}: {account.total_kept():,} pairs")


@click.command("import", short_help="Read another project's preference file.")
@click.argument("source", type=_ANY)
@output_option
@_format_option
@click.option(
    "--into",
    type=click.Choice(["pairs", "annotations"]),
    default="pairs",
    show_default=True,
    help="annotations keeps every scored answer, to be paired by any rule (HelpSteer, mllm-dpo).",
)
@click.option(
    "--split", help="Which of a folder's splits to read, by the names of its files: train, test, train_prefs."
)
@image_root_option
def import_command(source: Path, output: Path, **options: Any) -> None:
    """Read SOURCE (a file, or a folder of Parquet shards or of datasets) in another project's layout.

    Embedded images are written to OUT_images/. Log-probs that come with the data are kept as data under
    foreign_logps and never used as reference.

    Example: fasttrain-data import RLAIF-V.parquet -o pairs.jsonl

    Example: fasttrain-data import ultrafeedback_binarized --split train_prefs -o pairs.jsonl
    """
    from fasttrain_data.formats.bring_in import import_pairs

    account = import_pairs(source, output, **options)
    for line in account.lines():
        click.echo(line)
    click.echo(f"{output}: {account.total_kept():,} rows")
