"""What a mean step of a run is made of: seconds by part, and token passes by what the tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fasttrain.pages import Table, plot_png
from fasttrain.report.panels import COLOURS, shown
from fasttrain.report.runs import Run
from fasttrain.run_lines import is_number

TIMES = {
    "data_s": "waiting for data",
    "forward_s": "forward pass",
    "backward_s": "backward pass",
    "update_s": "update of the weights",
}
TOKENS = {"tokens_images": "images", "tokens_prompts": "text of prompts", "tokens_answers": "answers"}
REST = "rest (checks, bookkeeping)"
NOTE = (
    "Means over the logged steps of the first process. An image's tokens are part of its prompt; prompt and image run once for "
    "all answers to them. The forward pass also makes the output layer's gradient where that layer is frozen. On a GPU the "
    "times are the device's own: waiting for data is time in which it stood idle."
)


def composition(run: Run) -> tuple[dict[str, float], dict[str, float]]:
    """Mean seconds and mean tokens of a logged step, by part; empty where the run has not recorded them."""
    lines = [line for line in run.metrics if all(is_number(line.get(name)) for name in ("step_s", *TIMES))]
    times = {word: _mean(lines, name) for name, word in TIMES.items()} if lines else {}
    if times:
        times[REST] = max(0.0, _mean(lines, "step_s") - sum(times.values()))
    counted = [line for line in run.metrics if all(is_number(line.get(name)) for name in TOKENS)]
    tokens = {word: _mean(counted, name) for name, word in TOKENS.items()} if counted else {}
    return times, tokens


def anatomy_table(runs: Sequence[Run]) -> Table | None:
    """A column per run: seconds and tokens of a mean step with their shares; None where no run has recorded them."""
    parts = [composition(run) for run in runs]
    if not any(times or tokens for times, tokens in parts):
        return None
    rows = [
        _row(f"seconds: {word}", [times for times, _ in parts], word, ".4f")
        for word in (*TIMES.values(), REST)
    ]
    rows += [
        _row(f"tokens: {word}", [tokens for _, tokens in parts], word, ",.0f") for word in TOKENS.values()
    ]
    return Table(title="", head=("a mean step", *(run.name for run in runs)), rows=tuple(rows), note=NOTE)


def anatomy_png(runs: Sequence[Run]) -> bytes | None:
    """One bar per run for its time and one for its tokens; None where there is nothing to draw."""
    from matplotlib.figure import Figure

    parts = [(run.name, *composition(run)) for run in reversed(runs)]
    halves = [
        ("seconds of a mean step", [(name, times) for name, times, _ in parts if times], 0),
        ("token passes of a mean step", [(name, tokens) for name, _, tokens in parts if tokens], 3),
    ]
    halves = [half for half in halves if half[1]]
    if not halves:
        return None
    tall = 0.34 * len(runs) + 1.1
    figure = Figure(figsize=(9.5, tall * len(halves)), layout="constrained")
    for axis, (title, bars, first) in zip(figure.subplots(len(halves), squeeze=False)[:, 0], halves):
        _bars(axis, title, bars, first)
    return plot_png(figure, dpi=100)


def _bars(axis: Any, title: str, bars: list[tuple[str, dict[str, float]]], first: int) -> None:
    left = [0.0] * len(bars)
    for place, word in enumerate(bars[0][1]):
        widths = [values[word] for _, values in bars]
        colour = COLOURS[(first + place) % len(COLOURS)]
        axis.barh(range(len(bars)), widths, left=left, color=colour, label=word, height=0.6)
        left = [start + width for start, width in zip(left, widths)]
    axis.set_yticks(range(len(bars)), [shown(name) for name, _ in bars])
    axis.set_title(title, fontsize=10)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _mean(lines: list[dict[str, Any]], name: str) -> float:
    return sum(float(line[name]) for line in lines) / len(lines)


def _row(title: str, parts: list[dict[str, float]], word: str, form: str) -> tuple[str, ...]:
    cells = []
    for values in parts:
        total = sum(values.values())
        cells.append(f"{values[word]:{form}} ({values[word] / total:.0%})" if total else "-")
    return (title, *cells)
