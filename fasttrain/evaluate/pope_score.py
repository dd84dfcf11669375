"""POPE's rule and figures, as its own scorer and LLaVA's compute them: pure functions of labels and texts."""

from __future__ import annotations

from collections.abc import Sequence


def says_yes(text: str) -> bool:
    """The official reading of an answer: "no" if a word of it, up to the first period, is `No`, `not` or `no`.

    Commas are dropped and words are what spaces separate, so case counts and `No!` is a yes; so is an empty answer.
    """
    words = text.split(".", 1)[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def pope_figures(labels: Sequence[bool], said: Sequence[bool]) -> dict[str, float | int]:
    """Accuracy, precision, recall and F1 of "yes", the share of "yes" said, n, and the four counts they come from."""
    pairs = list(zip(labels, said, strict=True))
    tp, fp = pairs.count((True, True)), pairs.count((False, True))
    tn, fn = pairs.count((False, False)), pairs.count((True, False))
    return figures_of_counts(tp, fp, tn, fn)


def figures_of_counts(tp: int, fp: int, tn: int, fn: int) -> dict[str, float | int]:
    """The figures of true and false positives and negatives; a ratio without cases is 0."""
    n = tp + fp + tn + fn
    return {
        "accuracy": _ratio(tp + tn, n),
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "yes_ratio": _ratio(tp + fp, n),
        "n": n,
        "tp": tp,
        "fp": fp,
        "tn": tn,
        "fn": fn,
    }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
