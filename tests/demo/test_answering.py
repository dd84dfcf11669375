"""Scores and their intervals."""

import itertools

import pytest
import torch

from fasttrain.demo.answering import score, wilson_interval
from fasttrain.demo.charts import KINDS, examples
from fasttrain.threads import one_thread


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_published_values(right: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(right, total) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("right", "total"), [(0, 0), (3, 2), (-1, 5)])
def test_an_impossible_share_has_no_interval(right: int, total: int) -> None:
    with pytest.raises(ValueError, match="right must lie in"):
        wilson_interval(right, total)


def test_only_the_whole_true_answer_counts_as_right() -> None:
    asked = list(itertools.islice(examples(1, "held_out"), 2 * len(KINDS)))
    answers = [example.question.answer for example in asked]
    assert score(asked, answers).accuracy == 1.0
    answers[0] += " It is a very nice chart"
    answers[1] = answers[1].removesuffix(".")
    result = score(asked, answers)
    assert (result.right, result.total) == (2 * len(KINDS) - 2, 2 * len(KINDS))
    assert result.right_by_kind[KINDS[0]] == result.right_by_kind[KINDS[1]] == (1, 2)
    assert result.interval[0] < result.accuracy < result.interval[1]


def test_one_thread_is_undone_even_after_an_error() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
