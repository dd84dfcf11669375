"""A comparison as files: comparison.json, .md, .png and one .html that needs nothing else."""

from __future__ import annotations

import base64
import html
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fasttrain.evaluate.comparing.analysis import Comparison
from fasttrain.evaluate.comparing.plot import comparison_png
from fasttrain.evaluate.comparing.tables import Table, markdown, tables
from fasttrain.files import write_atomic, write_json

_STYLE = """
body{font-family:system-ui,sans-serif;max-width:84rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
th{border-bottom:2px solid #888;font-weight:600}
th.word,td.word{text-align:left}
.scroll{overflow-x:auto}
img{max-width:100%}
.warning{background:#fff3cd;padding:.6rem 1rem;border-left:4px solid #e0a800}
.note{color:#555;font-size:.9rem;max-width:60rem}
"""


def write_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Write all four files; the page first in the list."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = comparison_png(comparison)
    files = {name: folder / f"comparison.{name}" for name in ("html", "md", "png", "json")}
    write_atomic(files["png"], picture)
    write_atomic(files["html"], page(comparison, picture))
    write_atomic(files["md"], markdown(comparison))
    write_json(files["json"], _without_nan(asdict(comparison)))
    return list(files.values())


def page(comparison: Comparison, picture: bytes) -> str:
    """The whole HTML page, picture included; names are shown inert."""
    warnings = "".join(f'<p class="warning">{html.escape(text)}</p>' for text in comparison.warnings)
    source = base64.b64encode(picture).decode()
    first, *others = [_table(table) for table in tables(comparison)]
    image = f'<img alt="Scores with 95 % intervals" src="data:image/png;base64,{source}">'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Comparison of models</title><style>{_STYLE}</style></head>\n<body><h1>Comparison of models</h1>\n"
        f"{warnings}{first}\n{image}\n{''.join(others)}</body></html>\n"
    )


def _table(table: Table) -> str:
    def cells(row: tuple[str, ...], tag: str) -> str:
        kinds = [' class="word"' if index < table.words else "" for index in range(len(row))]
        return "".join(
            f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>\n" for row in table.rows)
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return (
        f'<h2>{html.escape(table.title)}</h2><div class="scroll"><table>\n'
        f"<thead><tr>{cells(table.head, 'th')}</tr></thead>\n<tbody>{body}</tbody></table></div>{note}\n"
    )


def _without_nan(value: Any) -> Any:
    """JSON has no nan: null says that a number has no meaning here."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return json.loads(json.dumps(value))
