"""`fasttrain study`: a declared set of runs, done or printed, ending in one table and one page."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

import click

from fasttrain.errors import UserError


@click.command("study")
@click.argument("file", required=False, type=click.Path(path_type=Path), metavar="[STUDY.yaml]")
@click.option(
    "--print-commands", is_flag=True, help="Print what is left to do as a shell script; run nothing."
)
@click.option("--report", is_flag=True, help="Only make table and page of what is done.")
@click.option(
    "--demo",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Make a small study on charts and run it.",
)
def study_command(file: Path | None, print_commands: bool, report: bool, demo: Path | None) -> None:
    """Train and score a declared set of runs: methods, data sizes, label noise, beta, models and whose answers they learn.

    Every run is a command of this project. What is done is not done again: start the same command after a stop, or print
    the commands for a scheduler and make the page with --report. docs/study.md shows the file.

    \b
    Examples:
      fasttrain study study.yaml
      fasttrain study --demo runs/study-demo
    """
    from fasttrain.study.execute import execute
    from fasttrain.study.spec import load_study
    from fasttrain.study.tasks import printed, tasks_of

    if (file is None) == (demo is None):
        raise UserError(
            f"STUDY.yaml: wanted a study file or --demo FOLDER, got {'both' if file else 'neither'}"
        )
    if demo is not None:
        from fasttrain.study.demo import write_demo_study

        file = write_demo_study(demo, echo=lambda text: click.echo(text, err=True))
    assert file is not None
    study = load_study(file)
    tasks = tasks_of(study)
    check_recipes(study)
    if print_commands:
        click.echo("set -e")
        for line in printed(tasks):
            click.echo(line)
        click.echo(shlex.join(["fasttrain", "study", str(study.file), "--report"]))
        return
    if not report:
        if study.launcher[0] != "fasttrain" and shutil.which(study.launcher[0]) is None:
            raise UserError(f"launcher: wanted a program on the PATH, got {study.launcher[0]}")
        execute(tasks, study.output / "logs", lambda text: click.echo(text, err=True))
    _tell(study)


def check_recipes(study) -> None:  # type: ignore[no-untyped-def]
    """UserError for a setting that any run's training would refuse, before the first one starts."""
    from fasttrain.config import load_config
    from fasttrain.study.tasks import overrides_of

    for run in study.runs:
        load_config(study.recipe, overrides_of(study, run))


def _tell(study) -> None:  # type: ignore[no-untyped-def]
    from fasttrain.answering.command import EXIT_TYPED_FAILURES
    from fasttrain.pages import terminal_width
    from fasttrain.study.execute import incomplete
    from fasttrain.study.page import write_page
    from fasttrain.study.results import collect, write_results
    from fasttrain.study.table import cost_lines, findings, table_lines
    from fasttrain.study.tasks import tasks_of

    results = collect(study)
    if not results.rows and results.outdated:
        raise UserError(
            f"{study.output}: wanted scores of the study as {study.file} is now, got outdated ones "
            f"({', '.join(results.outdated)}); start the study without --report"
        )
    if not results.rows:
        raise UserError(f"{study.output}: wanted at least one run with scores, got none")
    for line in table_lines(results, terminal_width()):
        click.echo(line)
    click.echo()
    for line in [*findings(results), *cost_lines(results)]:
        click.echo(line)
    write_results(results, study.output / "results.json")
    click.echo(f"page: {write_page(results, study.output)}")
    for task in tasks_of(study):
        if task.is_incomplete:
            click.echo(f"{task.kind} {task.subject}{incomplete(task)}", err=True)
    if results.missing or results.outdated:
        told = ((results.missing, "not finished"), (results.outdated, "outdated"))
        click.echo("; ".join(f"runs {what}: {len(names)}" for names, what in told if names), err=True)
        sys.exit(EXIT_TYPED_FAILURES)
