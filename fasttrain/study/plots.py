"""Plots of a study as PNG bytes: scores of all runs, score by data size, by label noise and by beta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fasttrain.pages import plot_png
from fasttrain.study.results import Results, Row
from fasttrain.study.run import Run
from fasttrain.study.scores import Score
from fasttrain.study.table import METHOD_NAMES

_COLOURS = {"dpo": "#4477aa", "sft": "#ee6677", "rejection": "#228833", "steerlm": "#aa3377", None: "#777777"}

CAPTIONS = {
    "scores": "A point per run; the bars hold the true score with 95 % confidence. Bars that do not overlap differ.",
    "size": "How much more data helps: a curve that is still rising at its right end asks for more.",
    "noise": "At 0.5 the labels say nothing; what is left there the model had, or has from the answers' form.",
    "beta": "A larger beta holds the model nearer to the one it started from.",
}


def plots(results: Results) -> dict[str, tuple[str, bytes]]:
    """file name -> (caption, PNG); only what the study's runs can show."""
    drawn: dict[str, tuple[str, bytes]] = {}
    for name in results.study.evaluations:
        drawn[f"scores-{name}"] = (
            f"Score on {name}, with 95 % intervals",
            _png(_bars, results.rows, name, results.measure(name)),
        )
        curves: list[tuple[str, str, Callable[[Row], float | None], Callable[[Run], bool]]] = [
            ("size", "pairs trained on", lambda row: row.used, lambda run: not run.flip and run.beta is None),
            ("noise", "share of swapped labels", lambda row: row.run.flip if row.run else None,
             lambda run: run.pairs is None and run.beta is None),
            ("beta", "beta", lambda row: row.run.beta if row.run else None, lambda run: run.pairs is None and not run.flip),
        ]  # fmt: skip
        for key, label, place, belongs in curves:
            lines = _lines(results.rows, place, belongs)
            if lines:
                caption = f"Score on {name} by {label}"
                base = next((row for row in results.rows if row.run is None), None)
                drawn[f"{key}-{name}"] = (
                    caption,
                    _png(_curve, lines, name, results.measure(name), label, base),
                )
    return drawn


def _lines(
    rows: list[Row], place: Callable[[Row], Any], belongs: Callable[[Run], bool]
) -> dict[str, list[tuple[float, Row]]]:
    """Series with at least two different places, by method, model and answers."""
    found: dict[str, list[tuple[float, Row]]] = {}
    sources = {(row.run.model, row.run.answers) for row in rows if row.run}
    for row in rows:
        if row.run is None or not belongs(row.run) or place(row) is None:
            continue
        source = METHOD_NAMES[row.run.method]
        if len(sources) > 1:
            source += f", {row.run.model} on answers of {row.run.answers}"
        found.setdefault(source, []).append((float(place(row)), row))
    return {
        name: sorted(points, key=lambda point: point[0])
        for name, points in found.items()
        if len({point for point, _ in points}) > 1
    }


def _png(draw: Callable[..., None], *arguments: Any) -> bytes:
    from matplotlib.figure import Figure

    rows = len(arguments[0]) if isinstance(arguments[0], list) else 10
    figure = Figure(figsize=(7.5, max(2.4, 0.34 * rows + 0.9)), layout="constrained")
    draw(figure, *arguments)
    return plot_png(figure, dpi=110)


def _bars(figure: Any, rows: list[Row], name: str, measure: str) -> None:
    axis = figure.subplots()
    for place, row in enumerate(reversed(rows)):
        scored = row.scored[name]
        below, over = _reach(scored)
        colour = _COLOURS[row.run.method if row.run else None]
        axis.errorbar(
            scored.value,
            place,
            xerr=[[below], [over]],
            fmt="o",
            color=colour,
            capsize=3,
        )
    axis.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
    axis.set_xlabel(measure)
    axis.grid(axis="x", alpha=0.3)


def _reach(scored: Score) -> tuple[float, float]:
    """How far the interval reaches below and above the score; never below zero, which rounding can make of nothing."""
    low, high = scored.interval()
    return max(0.0, scored.value - low), max(0.0, high - scored.value)


def _curve(
    figure: Any,
    lines: dict[str, list[tuple[float, Row]]],
    name: str,
    measure: str,
    label: str,
    base: Row | None,
) -> None:
    axis = figure.subplots()
    for series, points in lines.items():
        places = [place for place, _ in points]
        values = [row.scored[name].value for _, row in points]
        below, over = zip(*(_reach(row.scored[name]) for _, row in points), strict=True)
        axis.errorbar(places, values, yerr=[below, over], marker="o", capsize=3, label=series)
    if base is not None:
        axis.axhline(base.scored[name].value, color="#777777", linestyle="--", label=base.name)
    axis.set(xlabel=label, ylabel=measure)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
