"""The comparison as a picture: one panel per benchmark, a dot and its interval per model, the answer length beside it."""

from __future__ import annotations

import math
from typing import Any

from fasttrain.evaluate.comparing.analysis import Comparison, ScoreRow
from fasttrain.evaluate.comparing.benchmarks import BENCHMARKS
from fasttrain.evaluate.comparing.tables import number
from fasttrain.pages import plot_png

# Wong (2011), told apart by colour-blind readers.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
_COLUMNS = 2


def comparison_png(comparison: Comparison) -> bytes:
    """PNG bytes; matplotlib without pyplot, so that nothing global is touched."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    names = comparison.benchmarks()
    columns = min(_COLUMNS, len(names))
    lines = math.ceil(len(names) / columns)
    height = 0.9 + 0.42 * len(comparison.models)
    figure = Figure(
        figsize=(6.2 * columns, height * lines), layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.1)
    )
    axes = figure.subplots(lines, columns, squeeze=False)
    for place, axis in enumerate(axes.flat):
        if place >= len(names):
            axis.set_axis_off()
            continue
        rows = {row.model: row for row in comparison.scores if row.benchmark == names[place]}
        _draw(axis, names[place], comparison.models, rows, first=place % columns == 0)
    return plot_png(figure, dpi=110)


def _draw(axis: Any, name: str, models: tuple[str, ...], rows: dict[str, ScoreRow], *, first: bool) -> None:
    for index, model in enumerate(models):
        row = rows.get(model)
        if row is None:
            continue
        low, high = row.interval
        colour = COLOURS[index % len(COLOURS)]
        if math.isfinite(low):
            axis.plot([low, high], [index, index], color=colour, linewidth=2, solid_capstyle="butt")
        axis.plot([row.score], [index], "o", color=colour)
        told = f"{number(row.score, name)}  ({row.mean_answer_chars:,.0f} characters)"
        axis.annotate(
            told, (row.score, index), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8
        )
    axis.set_yticks(range(len(models)), [_short(model) for model in models] if first else [""] * len(models))
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(models) - 0.4, -0.75)
    axis.margins(x=0.25)
    axis.set_title(BENCHMARKS[name].title, fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _short(model: str) -> str:
    shown = model if len(model) <= 28 else model[:13] + "…" + model[-14:]
    return shown.replace("$", r"\$")  # matplotlib reads a pair of them as mathematics
