"""SteerLM's conditioning: the text that tells the model which attribute values its answer should have."""

from __future__ import annotations

from collections.abc import Sequence

from fasttrain_data.records import ATTRIBUTES

# arXiv 2402.10884's own wording, appended to the human turn in training and when the model is asked.
_REQUEST = "\nPlease answer the question such that your response is in the following attributes in 5-point Likert scale:\n"
BEST = (4, 4, 4, 4, 4)


def steering_text(scores: Sequence[int] = BEST) -> str:
    """What is appended to a question; `scores` are 0 to 4, in the order of ATTRIBUTES. ValueError for others.

    The paper asks its trained model for fours throughout; a variant of it sets complexity and verbosity to 2.
    """
    if len(scores) != len(ATTRIBUTES) or any(score not in range(5) for score in scores):
        raise ValueError(f"scores: wanted {len(ATTRIBUTES)} whole numbers from 0 to 4, got {tuple(scores)}")
    values = ",".join(f"{name.capitalize()}:{score}" for name, score in zip(ATTRIBUTES, scores, strict=True))
    return _REQUEST + values
