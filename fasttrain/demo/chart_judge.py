"""A judge that knows the charts: it grades answers by rule on the five attributes, 0 to 4, as the guide says."""

import hashlib
import io
from collections.abc import Iterable, Sequence
from typing import Any

from fasttrain.demo.charts import Example

Grades = dict[str, Any]


class ChartJudge:
    """Grades answers about the given charts; called as the Gemini double calls its judge.

    It finds the true answer by the image's bytes (as PNG) and the question. KeyError for another chart or question.
    """

    def __init__(self, shown: Iterable[Example]) -> None:
        self._truth = {(_digest(_png(e)), e.question.text): e.question.answer for e in shown}

    def __call__(self, question: str, images: Sequence[bytes], answers: Sequence[str]) -> list[Grades]:
        """One entry per answer, in order: the five scores by name, and the reason for them."""
        truth = self._truth[_digest(images[0]), question]
        return [grade(truth, answer) for answer in answers]


def grade(truth: str, answer: str) -> Grades:
    """Right and done is best, right but running on is less, wrong is worst however well it is put.

    Helpfulness + correctness + coherence is 12, 8 and 4, or less when a wrong answer also runs on or breaks off.
    """
    answer = answer.strip()
    first, _, rest = answer.partition(". ")
    right = (first + "." if rest else first) == truth
    runs_on, breaks_off = bool(rest), not answer.endswith(".")
    if right:
        help_and_facts = 3 if runs_on else 4
        said = "right, but runs on with what nobody asked" if runs_on else "right, and nothing more"
    else:
        help_and_facts = 0
        said = f"does not say what the chart shows: {truth}"
    return {
        "reason": said,
        "helpfulness": help_and_facts,
        "correctness": help_and_facts,
        "coherence": 1 if breaks_off else 2 if runs_on else 4,
        "complexity": 0,
        "verbosity": 4 if runs_on else 1,
    }


def _png(example: Example) -> bytes:
    buffer = io.BytesIO()
    example.chart.image().save(buffer, "PNG")
    return buffer.getvalue()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
