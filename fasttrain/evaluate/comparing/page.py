"""A comparison as files: comparison.json, .md, .png and one .html that needs nothing else."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fasttrain.evaluate.comparing.analysis import Comparison
from fasttrain.evaluate.comparing.plot import comparison_png
from fasttrain.evaluate.comparing.tables import markdown, tables
from fasttrain.files import write_atomic, write_json
from fasttrain.pages import page, paragraph, picture, table_html


def write_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Write all four files; the page first in the list."""
    folder.mkdir(parents=True, exist_ok=True)
    image = comparison_png(comparison)
    files = {name: folder / f"comparison.{name}" for name in ("html", "md", "png", "json")}
    write_atomic(files["png"], image)
    write_atomic(files["html"], comparison_page(comparison, image))
    write_atomic(files["md"], markdown(comparison))
    write_json(files["json"], _without_nan(asdict(comparison)))
    return list(files.values())


def comparison_page(comparison: Comparison, image: bytes) -> str:
    """The whole HTML page, picture included; names are shown inert."""
    first, *others = [table_html(table) for table in tables(comparison)]
    warnings = [paragraph(text, "warning") for text in comparison.warnings]
    return page(
        "Comparison of models", [*warnings, first, picture(image, "Scores with 95 % intervals"), *others]
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
