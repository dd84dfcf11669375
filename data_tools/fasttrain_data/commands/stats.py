"""`fasttrain-data stats`: what an annotation or pair file holds."""

from __future__ import annotations

from pathlib import Path

import click

from fasttrain_data.commands.options import ANY_PATH, UserPath


@click.command("stats", short_help="Describe annotations or pairs.")
@click.argument("file", type=UserPath(exists=True))
@click.option(
    "-o", "--out", "folder", type=ANY_PATH, help="Folder for plots, page and stats.json. Default: FILE.stats."
)
@click.option("--no-files", is_flag=True, help="Print the table only.")
def stats_command(file: Path, folder: Path | None, no_files: bool) -> None:
    """Describe FILE: annotations.jsonl, or pairs in any layout that import reads.

    Annotations: score distributions, correlations, agreement of votes and after reordering, position and length
    bias, pair yield by margin. Pairs: lengths and margins. A table, PNG plots, one self-contained HTML page.

    Example: fasttrain-data stats annotations.jsonl
    """
    from fasttrain_data.stats.report import make_report
    from fasttrain_data.stats.table import table_lines

    report = make_report(file)
    for line in table_lines(report):
        click.echo(line)
    if not no_files:
        from fasttrain_data.stats.page import write_report

        named = file if file.name.strip(".") else file.resolve()  # `.` has no name
        page = write_report(report, named.name, folder or named.with_name(f"{named.stem}.stats"))[0]
        click.echo(f"page: {page}")
