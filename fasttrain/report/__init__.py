"""One page about a run, or about several side by side: report.html and the plots beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fasttrain.files import write_atomic
from fasttrain.pages import figure, folded, heading, page, paragraph, preformatted, table_html
from fasttrain.report.anatomy import anatomy_png, anatomy_table
from fasttrain.report.changes import change_parts
from fasttrain.report.examples import example_parts
from fasttrain.report.panels import is_panel, panel_png, panels_of
from fasttrain.report.runs import Run, read_run, read_runs
from fasttrain.report.story import story
from fasttrain.report.tables import data_account, differences, environments, summary

__all__ = ["Run", "read_run", "read_runs", "write_report"]


def write_report(runs: Sequence[Run], folder: Path, *, examples: int = 6) -> Path:
    """Write report.html and plots/*.png into `folder`; the page opens from disk and loads nothing."""
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    drawn, panels, anatomy = [], panels_of(runs), anatomy_png(runs)
    made = {panel.name for panel in panels} | ({"anatomy"} if anatomy else set())
    for old in plots.glob("*.png"):  # of an earlier report; whatever else lies there stays
        if old.stem not in made and (old.stem == "anatomy" or is_panel(old.stem)):
            old.unlink()
    for panel in panels:
        content = panel_png(panel, runs)
        write_atomic(plots / f"{panel.name}.png", content)
        drawn.append(figure(content, panel.title, panel.caption_for(runs)))
    if anatomy is not None:
        write_atomic(plots / "anatomy.png", anatomy)
    title = runs[0].name if len(runs) == 1 else " / ".join(run.name for run in runs)
    path = folder / "report.html"
    text = page(title, _parts(runs, drawn, anatomy, examples))
    write_atomic(path, text.encode(errors="replace"))  # a folder's name need not be text
    return path


def _parts(runs: Sequence[Run], drawn: list[str], anatomy: bytes | None, examples: int) -> list[str]:
    parts = [paragraph(story(run)) for run in runs]
    parts += [paragraph(f"{run.name}: {note}", "warning") for run in runs for note in run.notes]
    parts.append(table_html(summary(runs)))
    different = differences(runs)
    if different.rows:
        parts.append(table_html(different))
    parts += [heading("Over the steps"), '<div class="plots">' + "\n".join(drawn) + "</div>"]
    table = anatomy_table(runs)
    if table is not None:
        parts.append(heading("What a step is made of"))
        parts += [figure(anatomy, "seconds and tokens of a mean step by part")] if anatomy else []
        parts.append(table_html(table))
    for run in runs:
        parts += change_parts(run, examples)
    if examples:
        unit = runs[0].unit
        parts += [
            heading(f"Some of {runs[0].name}'s {unit}, drawn at random"),
            *example_parts(runs[0], examples),
        ]
    parts += [table_html(data_account(runs)), table_html(environments(runs))]
    parts += [folded(f"Recipe of {run.name}", preformatted(run.recipe)) for run in runs if run.recipe]
    return parts
