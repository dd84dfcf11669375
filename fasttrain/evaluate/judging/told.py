"""A judged benchmark's scores in lines for a person: a length beside every score, and what the official tool would say."""

from __future__ import annotations

from typing import Any

_GROUPS = ("categories", "capabilities", "combinations")


def score_lines(scores: dict[str, Any]) -> list[str]:
    """The headline, its parts, what was left out, and the score with failures included where the official tool errs."""
    judge = scores["judge"]
    versions = ", ".join(judge["versions"]) or judge["model"]
    lines = [f"{scores['benchmark']} of {scores['model']}, judged by {versions}"]
    lines.append(_line("score", scores["score"], scores["n"], scores["mean_answer_chars"]))
    lines += [f"  {name.replace('_', ' ')}: {_number(scores[name])}" for name in _PARTS if name in scores]
    for group in _GROUPS:
        for name, part in scores.get(group, {}).items():
            lines.append("  " + _line(name, part["score"], part["n"], part["mean_answer_chars"]))
    lines += [f"left out: {count:,} {status}" for status, count in scores["excluded"].items()]
    if scores["excluded"].get("parse_failed"):
        lines += [f"{told}: {_number(scores[name])}" for name, told in _OTHERWISE.items() if name in scores]
    lines += [f"{told}: {scores[name]:,}" for name, told in _COUNTS.items() if scores.get(name)]
    lines += [f"note: {note}" for note in judge["notes"]]
    if judge["stopped"]:
        lines.append(f"stopped early, the score is of a part: {judge['stopped']}")
    if judge["spent_usd"] is not None:
        lines.append(f"spent on this folder's judging so far: {judge['spent_usd']:,.4f} USD")
    return lines


_PARTS = (
    "turn_1", "turn_2", "win_rate", "loss_rate", "standard_error", "win_rate_when_shown_first",
    "win_rate_when_shown_second", "reference_mean", "model_mean", "reference_mean_answer_chars",
)  # fmt: skip
_OTHERWISE = {
    "if_failures_were_kept_as_-1": "with unreadable ratings kept as -1, as some scripts do",
    "if_parse_failures_were_kept_as_-1": "with unreadable reviews kept as -1, as LLaVA's summary does",
    "if_those_were_read": "with the two numbers of unreadable first lines read all the same",
}
_COUNTS = {
    "missing": "questions without an answer, not in the score",
    "unknown": "answers that belong to no question",
    "asked_again": "asked again after a reply that is no mark",
    "zero_after_bad_replies": "given 0 after five such replies, as the original does",
    "outside_1_to_10": "ratings outside 1 to 10, counted as they are",
    "inconsistent": "verdicts that changed with the order, counted as ties",
    "duplicate_answers": "repeated answers in the file, the last one of a question counted",
}


def _line(name: str, score: float | None, n: int, chars: float | None) -> str:
    length = "" if chars is None else f", mean answer {chars:,.0f} characters"
    return f"{name}: {_number(score)} (n {n:,}{length})"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:,.4g}"
