"""How far reviewers agree with the annotator and with each other: shares, Cohen's kappa, Krippendorff's alpha.

Kappa compares what a reviewer preferred (left, right, no difference) with where the annotator's better answer stood, so chance
agreement is what two people who look at sides alone would reach. By attribute the annotator prefers the answer with the higher
score on that attribute, or neither.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain_data.errors import UserError
from fasttrain_data.jsonl import Row
from fasttrain_data.records import ATTRIBUTES
from fasttrain_data.review.judgements import Judgements, reviews_path
from fasttrain_data.stats.agreement import Coincidences, cohen_kappa

_PLACES = {"left": 0, "tie": 1, "right": 2}


def agreement(rows: Sequence[Row]) -> dict[str, Any]:
    """Everything that is reported of standing judgements, as JSON-able numbers; null where a number has no meaning."""
    raters = sorted({str(row["rater"]) for row in rows})
    margins = sorted({float(row["margin"]) for row in rows if row.get("margin") is not None})
    shown = dict.fromkeys(f"{margin:g}" for margin in margins)
    sided = [row for row in rows if row["verdict"] in ("left", "right")]
    return {
        "judgements": len(rows),
        "all": with_annotator(rows),
        "by_rater": {
            rater: with_annotator([r for r in rows if str(r["rater"]) == rater]) for rater in raters
        },
        "by_margin": {
            name: with_annotator(
                [r for r in rows if r.get("margin") is not None and f"{r['margin']:g}" == name]
            )
            for name in shown
        },
        "by_attribute": {name: _by_attribute(rows, name) for name in ATTRIBUTES if _has(rows, name)},
        "between_raters": _between(rows, raters),
        "left_share": sum(row["verdict"] == "left" for row in sided) / len(sided) if sided else None,
    }


def with_annotator(rows: Sequence[Row]) -> dict[str, Any]:
    """Share of preferences for the chosen answer with Wilson's 95 % interval, ties and skips, and kappa."""
    decided = [row for row in rows if row["verdict"] in ("left", "right")]
    agree = sum(row["verdict"] == row["chosen_side"] for row in decided)
    low, high = wilson(agree, len(decided)) if decided else (None, None)
    return {
        "decided": len(decided),
        "agree": agree,
        "share": agree / len(decided) if decided else None,
        "low": low,
        "high": high,
        "ties": sum(row["verdict"] == "tie" for row in rows),
        "skips": sum(row["verdict"] == "skip" for row in rows),
        "kappa": _kappa((_PLACES[str(row["chosen_side"])], _PLACES[row["verdict"]]) for row in _seen(rows)),
    }


def _by_attribute(rows: Sequence[Row], name: str) -> dict[str, Any]:
    table = []
    for row in _seen(rows):
        difference = (row.get("differences") or {}).get(name)
        if difference is not None:
            chosen = _PLACES[str(row["chosen_side"])]
            higher = chosen if difference > 0 else 2 - chosen if difference < 0 else _PLACES["tie"]
            table.append((higher, _PLACES[row["verdict"]]))
    agree = sum(one == other for one, other in table)
    return {
        "n": len(table),
        "agree": agree,
        "share": agree / len(table) if table else None,
        "kappa": _kappa(table),
    }


def _between(rows: Sequence[Row], raters: Sequence[str]) -> dict[str, Any]:
    """On pairs that several reviewers saw, by which answer they preferred, wherever it stood."""
    preferred: dict[str, dict[str, int]] = {rater: {} for rater in raters}
    for row in _seen(rows):
        place = _PLACES[row["verdict"]]
        preferred[str(row["rater"])][str(row["id"])] = place if row["chosen_side"] == "left" else 2 - place
    pairs = {}
    for one, other in itertools.combinations(raters, 2):
        both = preferred[one].keys() & preferred[other].keys()
        table = [(preferred[one][item], preferred[other][item]) for item in sorted(both)]
        same = sum(left == right for left, right in table)
        pairs[f"{one} and {other}"] = {
            "n": len(table), "same": same, "share": same / len(table) if table else None, "kappa": _kappa(table),
        }  # fmt: skip
    coincidences = Coincidences(3)
    for item in sorted({item for seen in preferred.values() for item in seen}):
        coincidences.add([seen[item] for seen in preferred.values() if item in seen])
    return {"pairs": pairs, "alpha": _number(coincidences.alpha("nominal"))}


def _seen(rows: Iterable[Row]) -> Iterator[Row]:
    return (row for row in rows if row["verdict"] in _PLACES)


def _has(rows: Sequence[Row], name: str) -> bool:
    return any(name in (row.get("differences") or {}) for row in rows)


def _kappa(places: Iterable[tuple[int, int]]) -> float | None:
    table = np.zeros((3, 3))
    for one, other in places:
        table[one, other] += 1
    return _number(cohen_kappa(table))


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Score interval of a share (Wilson, JASA 1927)."""
    share = right / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2) / (1 + z * z / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def agreement_lines(pairs: Path) -> Iterator[str]:
    """The report of a pair file's reviews as text; UserError if there are none."""
    path = reviews_path(pairs)
    rows = Judgements(path).standing()
    if not rows:
        raise UserError(f"{path}: wanted reviews, got none; run the review first")
    report = agreement(rows)
    yield f"{len(rows):,} judgements in {path}"
    yield f"all: {_line(report['all'])}"
    yield from (f"  reviewer {name}: {_line(entry)}" for name, entry in report["by_rater"].items())
    yield from (f"  margin {name}: {_line(entry)}" for name, entry in report["by_margin"].items())
    for name, entry in report["by_attribute"].items():
        yield f"  {name}: {entry['agree']} of {entry['n']} as this attribute's scores say, kappa {_shown(entry['kappa'])}"
    for name, entry in report["between_raters"]["pairs"].items():
        yield f"  {name}: the same on {entry['same']} of {entry['n']}, kappa {_shown(entry['kappa'])}"
    if len(report["by_rater"]) > 1:
        yield f"  all reviewers: Krippendorff's alpha {_shown(report['between_raters']['alpha'])} (nominal)"
    if report["left_share"] is not None:
        yield f"the left side was preferred in {report['left_share']:.1%}: far from half means a careless review"


def _line(entry: dict[str, Any]) -> str:
    rest = f"{entry['ties']} ties, {entry['skips']} skipped, kappa {_shown(entry['kappa'])}"
    if not entry["decided"]:
        return f"no preference, {rest}"
    return (
        f"{entry['agree']} of {entry['decided']} agree with the annotator ({entry['share']:.1%}, 95 % {entry['low']:.1%} to "
        f"{entry['high']:.1%}), {rest}"
    )


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"
