"""A report as files: stats.json, PNG plots, and one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html
import json
import math
from pathlib import Path
from typing import Any

from fasttrain_data.jsonl import whole_file, write_text
from fasttrain_data.stats.plots import plots
from fasttrain_data.stats.table import table_lines

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{title}</title>
<style>:root{{color-scheme:light dark;--text:#222;--back:#fff;--card:#f4f4f4}}
@media (prefers-color-scheme:dark){{:root{{--text:#e4e6e9;--back:#16181b;--card:#22262b}}}}
body{{font-family:system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:var(--text);background:var(--back)}}
h1{{overflow-wrap:anywhere}}pre{{background:var(--card);padding:1rem;overflow-x:auto}}img{{max-width:100%;background:#fff;border-radius:6px}}
@media print{{pre{{white-space:pre-wrap;overflow:visible;font-size:.7rem}}}}
</style></head>
<body><h1>{title}</h1><pre>{table}</pre>{images}</body></html>
"""


def write_report(report: dict[str, Any], title: str, folder: Path) -> list[Path]:
    """Write the report into `folder`; returns the files, the page first."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = plots(report)
    images = "".join(
        f'<p><img alt="{name}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></p>'
        for name, png in drawn.items()
    )
    table = html.escape("\n".join(table_lines(report)))
    page = folder / "index.html"
    write_text(page, _PAGE.format(title=html.escape(title), table=table, images=images))
    numbers = folder / "stats.json"
    write_text(numbers, json.dumps(_without_nan(report), indent=1, allow_nan=False) + "\n")
    files = [page, numbers]
    for name, png in drawn.items():
        path = folder / f"{name}.png"
        with whole_file(path) as file:
            file.write(png)
        files.append(path)
    return files


def _without_nan(value: Any) -> Any:
    """JSON has no nan: null says that a number has no meaning here."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return value
