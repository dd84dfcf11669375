"""One self-contained HTML page of a study: findings, table, plots, transfer matrix, cost, commands."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator
from pathlib import Path

from fasttrain.files import write_atomic
from fasttrain.study.plots import plots
from fasttrain.study.results import Results
from fasttrain.study.table import (
    METHOD_NAMES,
    above_text,
    cost_lines,
    findings,
    number,
    score_text,
    trained_on,
)
from fasttrain.study.tasks import tasks_of

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>
body {{ font-family: system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; line-height: 1.45 }}
table {{ border-collapse: collapse; margin: 1rem 0; font-size: .92rem }}
th, td {{ padding: .35rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }}
th {{ border-bottom: 2px solid #888 }} th:first-child, td:first-child {{ text-align: left }}
.up {{ color: #17692b }} .down {{ color: #a5202f }} .none {{ color: #777 }} .note {{ color: #555; font-size: .9rem }}
.wide {{ overflow-x: auto }} img {{ max-width: 100% }} pre {{ background: #f4f4f4; padding: 1rem; overflow-x: auto; font-size: .8rem }}
</style></head><body>
{body}
</body></html>
"""


def write_page(results: Results, folder: Path) -> Path:
    """`index.html` and the plots beside it as PNG; opens from disk, reaches nothing outside."""
    drawn = plots(results)
    for name, (_, png) in drawn.items():
        write_atomic(folder / f"{name}.png", png)
    file = results.study.file.resolve()
    title = f"Study: {file.parent.name if file.stem == 'study' else file.stem}"
    page = folder / "index.html"
    write_atomic(page, _PAGE.format(title=html.escape(title), body="\n".join(_body(results, title, drawn))))
    return page


def _body(results: Results, title: str, drawn: dict[str, tuple[str, bytes]]) -> Iterator[str]:
    yield f"<h1>{html.escape(title)}</h1>"
    yield (
        f"<p>{len(results.rows)} models, untrained ones included, were asked the same questions about "
        f"{html.escape(', '.join(results.study.evaluations))}. Each run trained one of them on the same graded answers, by "
        "another method or on less or noisier data; the table says how right each became.</p>"
    )
    if results.missing:
        yield f'<p class="down">Not finished, not shown: {html.escape(", ".join(results.missing))}.</p>'
    yield "<h2>What came out</h2><ul>"
    yield from (f"<li>{html.escape(line)}</li>" for line in findings(results))
    yield "</ul><h2>All runs</h2>"
    yield from _table(results)
    for name, (caption, png) in drawn.items():
        data = base64.b64encode(png).decode()
        yield f"<h2>{html.escape(caption)}</h2>"
        yield f'<img alt="{html.escape(caption)} ({name}.png)" src="data:image/png;base64,{data}">'
    yield from _transfer(results)
    yield "<h2>Time, money, energy</h2><ul>"
    yield from (f"<li>{html.escape(line)}</li>" for line in cost_lines(results))
    yield "</ul><h2>How it was made</h2>"
    yield from _provenance(results)


def _table(results: Results) -> Iterator[str]:
    names = list(results.study.evaluations)
    heads = ["run", "method", "trained on", "labels swapped", "steps"]
    for name in names:
        heads += [name, "vs untrained", "mean characters"]
    yield '<div class="wide"><table><tr>' + "".join(
        f"<th>{html.escape(head)}</th>" for head in [*heads, "training"]
    )
    for row in results.rows:
        run = row.run
        cells = [
            html.escape(row.name),
            METHOD_NAMES[run.method] if run else "untrained",
            trained_on(row),
            f"{run.flip:.0%}" if run else "",
            f"{row.steps:,}" if row.steps else "",
        ]
        for name in names:
            cells += [
                score_text(row.scored[name]),
                _difference(results, row, name),
                f"{row.scored[name].mean_chars:,.0f}",
            ]
        cells.append(f"{row.train_s:,.0f} s" if run else "")
        yield "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells)
    yield "</table></div>"
    yield (
        '<p class="note">Scores are means over questions; brackets hold 95 % intervals (Wilson\'s for right-or-wrong scores, '
        "else a bootstrap over questions). “vs untrained” is the mean difference on the same questions with a paired "
        "bootstrap: green above, red below, grey where the interval holds zero. Read scores beside lengths: judges and readers "
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
        yield f"<h2>DPO across models, on {html.escape(name)}</h2>"
        yield '<p class="note">Rows: the model that was trained. Columns: whose graded answers it learned from.</p><table>'
        yield "<tr><th></th><th>untrained</th>" + "".join(
            f"<th>{html.escape(source)}</th>" for source in sources
        )
        for model in models:
            base = next((row for row in results.rows if row.run is None and row.model == model), None)
            cells = [number(base.scored[name].mean) if base else ""]
            for source in sources:
                found = [row for row in runs if row.model == model and row.run and row.run.answers == source]
                cells.append(score_text(found[0].scored[name]) if found else "not run")
            yield f"<tr><td>{html.escape(model)}</td>" + "".join(f"<td>{cell}</td>" for cell in cells)
        yield "</table>"


def _provenance(results: Results) -> Iterator[str]:
    study, facts = results.study, results.environment
    yield f"<p>From <code>{html.escape(str(study.file))}</code>"
    if facts:
        versions = {k: v for k, v in (facts.get("versions") or {}).items() if v}
        shown = ", ".join(
            f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if name in versions
        )
        device = facts.get("device") or facts.get("devices") or facts.get("cpu") or ""
        yield f", {html.escape(f'{shown}; {device}')}"
    yield ".</p><pre>"
    yield html.escape("\n".join(task.shown for task in tasks_of(study)))
    yield "</pre>"
