"""The study's table as plain text, and the words and numbers that page and terminal share."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fasttrain import pages
from fasttrain.pages import Table
from fasttrain.study.results import Results, Row, energy_kwh
from fasttrain.study.scores import Score

METHOD_NAMES = {
    "dpo": "DPO",
    "sft": "standard SFT",
    "rejection": "rejection sampling",
    "steerlm": "SteerLM",
}


def table_lines(results: Results, width: int | None = None) -> Iterator[str]:
    """Run, what it learned from, each score with its interval, length, time; at most `width` wide."""
    head, *rows = _cells(results)
    yield from pages.table_lines(Table(title="", head=head, rows=tuple(rows)), width)
    yield from (f"{name}: no scores yet" for name in results.missing)
    yield from caveats(results)


def caveats(results: Results) -> Iterator[str]:
    """What is not shown, or shown without knowing what made it, because of the notes of its steps."""
    if results.outdated:
        yield (
            f"Outdated, not shown: {', '.join(results.outdated)}. Their scores were made by other commands, or from other "
            "files, than the study file names now; start the study to make them anew."
        )
    if unverified := results.unverified():
        yield (
            f"Not verified: {', '.join(unverified)}. The study did not run all of their commands itself: whether their "
            "scores are of what its file says now is not known."
        )


def _cells(results: Results) -> Iterator[tuple[str, ...]]:
    names = list(results.study.evaluations)
    yield (
        "run", "trained on", *(f"{results.measure(name)} (95 %)" for name in names), *(f"{name} chars" for name in names), "vs base",
        "train", "answer",
    )  # fmt: skip
    for row in results.rows:
        yield (
            row.name,
            trained_on(row),
            *(score_text(row.scored[name]) for name in names),
            *(f"{row.scored[name].mean_chars:,.0f}" for name in names),
            ", ".join(above_text(results, row, name) for name in names),
            seconds_text(row.train_s) if row.run else "",
            seconds_text(row.answer_s),
        )


def trained_on(row: Row) -> str:
    if row.run is None:
        return "nothing"
    unit = "pairs" if row.run.method == "dpo" else "answers"
    return f"{row.used:,} {unit}" if row.used is not None else unit


def seconds_text(seconds: float | None) -> str:
    return "not known" if seconds is None else f"{seconds:,.0f} s"


def score_text(scored: Score) -> str:
    return f"{value_text(scored)} {_interval(scored, *scored.interval())}"


def value_text(scored: Score) -> str:
    return _number(scored, scored.value)


def _interval(scored: Score, low: float, high: float, sign: str = "") -> str:
    return f"[{_number(scored, low, sign)}, {_number(scored, high, sign)}]"


def _number(scored: Score, value: float, sign: str = "") -> str:
    return "-" if math.isnan(value) else f"{value:{sign}.{scored.decimals}f}"


def above_text(results: Results, row: Row, name: str) -> str:
    """Difference to the untrained model; a + or - where its interval is clear of zero."""
    base = results.base(row)
    if row.run is None or base is None:
        return ""
    scored = row.scored[name]
    difference, low, high = scored.above(base.scored[name])
    sign = "+" if low > 0 else "-" if high < 0 else "~"
    return f"{sign} {_number(scored, difference, '+')} {_interval(scored, low, high, '+')}"


def findings(results: Results) -> Iterator[str]:
    """Sentences that follow from the numbers, one per plain run and evaluation."""
    for row in results.rows:
        base = results.base(row)
        if row.run is None or base is None or not row.run.is_plain:
            continue
        for name in results.study.evaluations:
            scored, before = row.scored[name], base.scored[name]
            difference, low, high = scored.above(before)
            relation = "above" if low > 0 else "below" if high < 0 else "not clearly different from"
            yield (
                f"{METHOD_NAMES[row.run.method]} ({row.name}) is {relation} {base.name} on {name} ({scored.measure}): "
                f"{value_text(before)} to {value_text(scored)}, difference {_number(scored, difference, '+')} "
                f"{_interval(scored, low, high, '+')}; answers {scored.mean_chars:.0f} characters long, "
                f"{before.mean_chars:.0f} before."
            )


def cost_lines(results: Results) -> Iterator[str]:
    """Time, money and energy: measured where measured, else with the formula of the estimate."""
    study, seconds, untimed = results.study, results.seconds(), results.untimed()
    timed = len(untimed) < len(results.rows)
    if timed:
        yield f"Training and answering took {seconds / 3600:.2f} machine hours ({seconds:,.0f} s, measured)."
    if untimed:
        names = f" {', '.join(untimed)}" if timed else ""
        yield f"Not known, and not counted: the time of models{names} whose commands the study did not run itself."
    for name, usd in results.annotation_usd.items():
        yield f"Judging the answers of {name} cost {usd:.2f} USD, by its annotations."
    if study.usd_per_hour is not None and timed:
        usd = study.usd_per_hour * seconds / 3600
        yield f"Machine: about {usd:.2f} USD (estimate: {study.usd_per_hour:g} USD an hour x the hours above)."
    if study.watts is not None and timed:
        yield (
            f"Energy: about {energy_kwh(study.watts, seconds):.3f} kWh (estimate: {study.watts:g} W x the hours above, "
            "nothing was metered)."
        )
