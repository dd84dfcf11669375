"""One page about a run, or about several side by side: report.html and the plots beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fasttrain.files import write_atomic
from fasttrain.pages import folded, heading, page, paragraph, picture, preformatted, table_html
from fasttrain.report.examples import example_parts
from fasttrain.report.panels import panel_png, panels_of
from fasttrain.report.runs import Run, read_run, read_runs
from fasttrain.report.tables import data_account, differences, environments, summary

__all__ = ["Run", "read_run", "read_runs", "write_report"]


def write_report(runs: Sequence[Run], folder: Path, *, examples: int = 6) -> Path:
    """Write report.html and plots/*.png into `folder`; the page opens from disk and loads nothing."""
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    drawn = []
    for panel in panels_of(runs):
        content = panel_png(panel, runs)
        write_atomic(plots / f"{panel.name}.png", content)
        drawn.append(picture(content, panel.title))
    title = runs[0].name if len(runs) == 1 else " / ".join(run.name for run in runs)
    path = folder / "report.html"
    write_atomic(path, page(title, _parts(runs, drawn, examples)))
    return path


def _parts(runs: Sequence[Run], drawn: list[str], examples: int) -> list[str]:
    parts = [paragraph(f"{run.name}: {note}", "warning") for run in runs for note in run.notes]
    parts.append(table_html(summary(runs)))
    different = differences(runs)
    if different.rows:
        parts.append(table_html(different))
    parts += [
        heading("Over the steps"),
        "<div>" + "\n".join(drawn) + "</div>",
        table_html(data_account(runs)),
    ]
    if examples:
        for run in runs if len(runs) == 1 else runs[:1]:
            parts += [heading(f"Examples of {run.name}'s {run.unit}"), *example_parts(run, examples)]
    parts.append(table_html(environments(runs)))
    parts += [folded(f"Recipe of {run.name}", preformatted(run.recipe)) for run in runs if run.recipe]
    return parts
