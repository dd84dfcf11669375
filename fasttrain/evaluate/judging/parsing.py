"""What a judge's words mean, read exactly as each benchmark's own scorer reads them."""

from __future__ import annotations

import ast
import math
import re

_RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]")
_RATING_BACKUP = re.compile(r"\[(\d+\.?\d*)\]")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def rating_of(judgment: str) -> float | None:
    """MT-Bench: the first `[[8]]`, else the first `[8]`; None where FastChat gives -1."""
    match = _RATING.search(judgment) or _RATING_BACKUP.search(judgment)
    return float(match[1]) if match else None


def winner_of(judgment: str) -> str | None:
    """MT-Bench pairs: "A", "B" or "tie". FastChat asks for A before B before C, wherever they stand."""
    for mark, winner in (("[[A]]", "A"), ("[[B]]", "B"), ("[[C]]", "tie")):
        if mark in judgment:
            return winner
    return None


def score_pair_of(review: str) -> tuple[float, float] | None:
    """LLaVA-Bench: two numbers split by one blank or one comma and nothing else on the first line.

    None where LLaVA gives [-1, -1]; so are "8, 7" and a blank at the end of the line. Infinite and undefined
    numbers, which LLaVA lets into its mean, are None as well.
    """
    parts = review.split("\n")[0].replace(",", " ").split(" ")
    if len(parts) != 2:
        return None
    try:
        first, second = float(parts[0]), float(parts[1])
    except ValueError:
        return None
    return (first, second) if math.isfinite(first) and math.isfinite(second) else None


def score_pair_leniently(review: str) -> tuple[float, float] | None:
    """The only two numbers of the first line, whatever stands around them ("**8**, 7/10" has three)."""
    numbers = _NUMBER.findall(review.split("\n")[0])
    return (float(numbers[0]), float(numbers[1])) if len(numbers) == 2 else None


def correctness_of(reply: str) -> float | None:
    """MM-Vet: what stands before the first blank, as a number from 0 to 1; None asks for another try."""
    try:
        value = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return value if 0.0 <= value <= 1.0 else None


def preferred_of(completion: str) -> int | None:
    """AlpacaEval: 1 or 2, the model ranked first in `[{'model': 'model_1', 'rank': 1}, ...]`.

    The whole reply must be that list, as Python writes it; None where AlpacaEval gives nan. A Markdown fence around
    the list, which newer judges like to add, is taken off.
    """
    fenced = re.fullmatch(r"\s*```\w*\n(.*?)\n?```\s*", completion, re.DOTALL)
    try:
        ranking = ast.literal_eval(fenced[1] if fenced else completion)
        rank = next(row["rank"] for row in ranking if row["model"] == "model_1")
    except (ValueError, SyntaxError, TypeError, KeyError, StopIteration, MemoryError, RecursionError):
        return None
    return rank if type(rank) is int and rank in (1, 2) else None
