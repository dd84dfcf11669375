"""A comparison as tables of text, and these as Markdown."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence

from fasttrain.evaluate.comparing.analysis import Comparison, ScoreRow, TestRow, is_clear
from fasttrain.evaluate.comparing.benchmarks import BENCHMARKS
from fasttrain.pages import Table, inert, table_lines, table_markdown


def tables(comparison: Comparison) -> list[Table]:
    """Scores, tests, and a category table for every benchmark that has categories."""
    result = [_scores(comparison)]
    if comparison.tests:
        result.append(_tests(comparison))
    for name in comparison.benchmarks():
        rows = [row for row in comparison.scores if row.benchmark == name and row.categories]
        if rows:
            result.append(_categories(name, rows))
    return result


def _scores(comparison: Comparison) -> Table:
    rows = [
        (
            BENCHMARKS[row.benchmark].title,
            row.model,
            number(row.score, row.benchmark),
            f"{number(row.interval[0], row.benchmark)} to {number(row.interval[1], row.benchmark)}",
            _count(row.mean_answer_chars),
            f"{row.n:,}",
            ", ".join(f"{count} {status}" for status, count in row.excluded.items()) or "0",
        )
        for row in comparison.scores
    ]
    return Table(
        title="Scores",
        head=(
            "benchmark",
            "model",
            "score",
            "95 % interval",
            "mean answer, characters",
            "scored",
            "left out",
        ),
        rows=tuple(rows),
        words=2,
        note=f"Intervals: percentile bootstrap over questions, {comparison.resamples:,} resamples, seed {comparison.seed}. "
        "A judge's score often grows with the length of an answer: read both columns.",
    )


def _tests(comparison: Comparison) -> Table:
    return Table(
        title=f"Against {comparison.baseline}",
        head=(
            "benchmark", "model", "difference", "95 % interval", "p", "p, Holm", "p, McNemar", "questions",
            "longer by, characters", "clear of zero",
        ),
        rows=tuple(_test(row) for row in comparison.tests),
        words=2,
        note="Paired on the questions that both answered: bootstrap interval; p by swapping the two models' answers at "
        f"random ({comparison.resamples:,} swaps), corrected for the table's rows by Holm; McNemar's test, exact, where a "
        "question is right or wrong.",
    )  # fmt: skip


def _test(row: TestRow) -> tuple[str, ...]:
    test = row.test
    low, high = (number(value, row.benchmark, sign=True) for value in test.interval)
    return (
        BENCHMARKS[row.benchmark].title,
        row.model,
        number(test.difference, row.benchmark, sign=True),
        f"{low} to {high}",
        chance(test.p_value),
        chance(row.p_holm),
        "" if test.mcnemar is None else chance(test.mcnemar),
        f"{test.n:,}",
        "" if math.isnan(row.chars_difference) else f"{row.chars_difference:+,.0f}",
        "yes" if is_clear(test) else "no",
    )


def _categories(name: str, rows: Sequence[ScoreRow]) -> Table:
    categories = dict.fromkeys(category for row in rows for category in row.categories)
    cells = [
        (category, *(number(row.categories.get(category, math.nan), name) for row in rows))
        for category in categories
    ]
    return Table(
        title=f"{BENCHMARKS[name].title} by category",
        head=("category", *(row.model for row in rows)),
        rows=tuple(cells),
    )


def number(value: float, benchmark: str, *, sign: bool = False) -> str:
    if math.isnan(value):
        return "-"
    decimals = BENCHMARKS[benchmark].decimals
    return f"{value:+.{decimals}f}" if sign else f"{value:.{decimals}f}"


def chance(value: float) -> str:
    """A p-value: three decimals, small ones as a bound."""
    if math.isnan(value):
        return "-"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _count(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:,.0f}"


def markdown(comparison: Comparison) -> str:
    parts = ["# Comparison of models", *(f"> {inert(warning)}" for warning in comparison.warnings)]
    parts += [table_markdown(table) for table in tables(comparison)]
    return "\n\n".join([*parts, "![Scores with 95 % intervals](comparison.png)\n"])


def terminal_lines(comparison: Comparison, width: int | None = None) -> Iterator[str]:
    """Warnings and tables, these at most `width` wide."""
    yield from (f"warning: {text}" for text in comparison.warnings)
    for table in tables(comparison):
        yield f"{table.title}:\n"
        yield from table_lines(table, width)
        yield f"\n{textwrap.fill(table.note, 79)}\n" if table.note else ""
