"""One self-contained HTML page of a study: findings, table, plots, transfer matrix, cost, commands."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path

from fasttrain.files import write_atomic
from fasttrain.pages import figure, folded, heading, page, paragraph, preformatted
from fasttrain.study.plots import CAPTIONS, plots
from fasttrain.study.results import Results
from fasttrain.study.table import (
    METHOD_NAMES,
    above_text,
    caveats,
    cost_lines,
    findings,
    score_text,
    seconds_text,
    trained_on,
    value_text,
)
from fasttrain.study.tasks import tasks_of


def write_page(results: Results, folder: Path) -> Path:
    """`index.html` and the plots beside it as PNG; opens from disk, reaches nothing outside."""
    drawn = plots(results)
    for name, (_, png) in drawn.items():
        write_atomic(folder / f"{name}.png", png)
    file = results.study.file
    title = f"Study: {file.parent.name if file.stem == 'study' else file.stem}"
    path = folder / "index.html"
    write_atomic(path, page(title, list(_body(results, drawn))))
    return path


_MEANINGS = {
    "dpo": "DPO learned to find the better of two answers more likely than the worse one.",
    "sft": "Standard SFT learned to write the data's own answers.",
    "rejection": "Rejection sampling learned to write the best-graded of the model's own answers.",
    "steerlm": "SteerLM learned to write every answer behind a request for its grades, and is asked for good ones.",
}


def _body(results: Results, drawn: dict[str, tuple[str, bytes]]) -> Iterator[str]:
    names = ", ".join(results.study.evaluations)
    yield paragraph(
        f"{len(results.rows)} models, untrained ones included, were asked the same questions ({names}). Each run trained one of "
        "them on the same graded answers, by another method or on less or noisier data; the table says how each came out."
    )
    methods = dict.fromkeys(row.run.method for row in results.rows if row.run)
    yield paragraph(" ".join(_MEANINGS[method] for method in methods))
    if results.missing:
        yield paragraph(f"Not finished, not shown: {', '.join(results.missing)}.", "warning")
    for caveat in caveats(results):
        yield paragraph(caveat, "warning")
    said = list(findings(results))
    if said:
        yield heading("What came out")
        yield "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in said) + "</ul>"
    yield heading("All runs")
    yield from _table(results)
    for name, (caption, png) in drawn.items():
        yield heading(caption)
        yield figure(png, f"{caption} ({name}.png)", CAPTIONS[name.partition("-")[0]])
    yield from _transfer(results)
    yield heading("Time, money, energy")
    yield "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in cost_lines(results)) + "</ul>"
    yield heading("How it was made")
    yield from _provenance(results)


_WORD = ' class="word"'


def _table(results: Results) -> Iterator[str]:
    names = list(results.study.evaluations)
    heads = ["run", "method", "trained on", "labels swapped", "steps"]
    for name in names:
        heads += [results.measure(name), "vs untrained", "characters"]
    heads += ["training", *(["machine cost"] if results.study.usd_per_hour is not None else [])]
    yield '<div class="scroll"><table><tr>' + "".join(
        f"<th{_WORD if column == 0 else ''}>{html.escape(head)}</th>" for column, head in enumerate(heads)
    )
    for row in results.rows:
        run = row.run
        cells = [
            html.escape(row.name),
            METHOD_NAMES[run.method] if run else "untrained",
            trained_on(row),
            f"{run.flip:.0%}" if run and run.method == "dpo" else "",
            f"{row.steps:,}" if row.steps else "",
        ]
        for name in names:
            cells += [
                score_text(row.scored[name]),
                _difference(results, row, name),
                f"{row.scored[name].mean_chars:,.0f}",
            ]
        cells.append(seconds_text(row.train_s) if run else "")
        if (price := results.study.usd_per_hour) is not None:
            cells.append("not known" if row.seconds is None else f"{price * row.seconds / 3600:,.2f} USD")
        yield "<tr>" + "".join(
            f"<td{_WORD if column == 0 else ''}>{cell}</td>" for column, cell in enumerate(cells)
        )
    yield "</table></div>"
    yield (
        '<p class="note">A score is the share of questions answered rightly or, of a benchmark, its own figure; brackets hold 95 % '
        "intervals (Wilson's for shares, else a bootstrap over questions). characters: mean length of an answer. “vs untrained” is "
        "the difference on the same questions with a paired bootstrap: green above, red below, grey where the interval holds zero. Read scores beside lengths: judges and readers "
        "favour longer answers.</p>"
    )


def _difference(results: Results, row, name: str) -> str:  # type: ignore[no-untyped-def]
    text = above_text(results, row, name)
    if not text:
        return ""
    kind = {"+": "up", "-": "down", "~": "none"}[text[0]]
    return f'<span class="{kind}">{html.escape(text[2:])}</span>'


def _transfer(results: Results) -> Iterator[str]:
    """DPO of each model on the graded answers of each: rows are models, columns whose answers."""
    runs = [row for row in results.rows if row.run and row.run.method == "dpo" and row.run.is_plain]
    sources = list(dict.fromkeys(row.run.answers for row in runs if row.run))
    models = list(dict.fromkeys(row.model for row in runs))
    if len(sources) * len(models) < 2:
        return
    for name in results.study.evaluations:
        yield heading(f"DPO across models, on {results.measure(name)}")
        yield paragraph(
            "Rows: the model that was trained. Columns: whose graded answers it learned from.", "note"
        )
        yield '<div class="scroll"><table><tr><th class="word"></th><th>untrained</th>' + "".join(
            f"<th>{html.escape(source)}</th>" for source in sources
        )
        for model in models:
            base = next((row for row in results.rows if row.run is None and row.model == model), None)
            cells = [value_text(base.scored[name]) if base else ""]
            for source in sources:
                found = [row for row in runs if row.model == model and row.run and row.run.answers == source]
                cells.append(score_text(found[0].scored[name]) if found else "not run")
            yield f"<tr><td{_WORD}>{html.escape(model)}</td>" + "".join(f"<td>{cell}</td>" for cell in cells)
        yield "</table></div>"


def _provenance(results: Results) -> Iterator[str]:
    study, facts = results.study, results.environment
    text = f"From {study.file}"
    if facts:
        versions = {k: v for k, v in (facts.get("versions") or {}).items() if v}
        shown = [f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if name in versions]
        device = ", ".join(facts.get("gpus") or []) or facts.get("cpu") or ""
        text += f"; {', '.join(shown)}; {device}"
    yield paragraph(text + ".")
    commands = "\n\n".join(task.shown for task in tasks_of(study))
    yield folded("Every command of the study, in order", preformatted(commands))
