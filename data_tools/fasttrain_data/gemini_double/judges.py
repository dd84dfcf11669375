"""Judges for the double: a function from question, images and answers to scores."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

# per answer, in the order given: helpfulness, correctness, coherence, complexity, verbosity; or a dict by name
Scores = Sequence[Sequence[int] | dict[str, Any]]
JudgeFunction = Callable[[str, list[bytes], list[str]], Scores]


def hash_judge(question: str, images: list[bytes], answers: list[str]) -> Scores:
    """Scores that depend on question, images and the answer's own text alone: the same wherever it stands."""
    context = hashlib.sha256(question.encode("utf-8", "surrogatepass"))
    for image in images:
        context.update(image)
    scores = []
    for answer in answers:
        digest = context.copy()
        digest.update(answer.encode("utf-8", "surrogatepass"))
        scores.append(tuple(byte % 5 for byte in digest.digest()[:5]))
    return scores
