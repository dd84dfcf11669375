"""Judges' words are read as each benchmark's own scorer reads them."""

from __future__ import annotations

import pytest

from fasttrain.evaluate.judging.parsing import (
    correctness_of,
    preferred_of,
    rating_of,
    score_pair_leniently,
    score_pair_of,
    winner_of,
)


@pytest.mark.parametrize(
    ("judgment", "rating"),
    [
        ("The answer is clear and correct.\n\nRating: [[8]]", 8),
        ("Rating: [8.5]", 8.5),
        ("**Rating: [[7.5]]**", 7.5),
        ("Rating: [[7]]. On reflection, Rating: [[9]]", 7),
        ("As footnote [2] says it is good. Rating: [[9]]", 9),
        ("It cites [2] sources. Rating: [9]", 2),
        ("I would give it an 8.", None),
        ("Rating: 8/10", None),
        ("Rating: [[8/10]]", None),
        ("Rating: [[ 8 ]]", None),
        ("Rating: [[rating]]", None),
        ("Rating: [[10]]", 10),
        ("Rating: [[6.]]", 6),
        ("Rating: [[-1]]", None),
        ("", None),
        ("$ERROR$", None),
    ],
)
def test_the_first_double_bracket_counts_then_the_first_single_one(
    judgment: str, rating: float | None
) -> None:
    assert rating_of(judgment) == rating


@pytest.mark.parametrize(
    ("judgment", "winner"),
    [
        ("Assistant A is better. [[A]]", "A"),
        ("Both fail. Final verdict: [[C]]", "tie"),
        ("**[[B]]**", "B"),
        ("Not [[C]] but rather [[B]]", "B"),
        ("[[B]] because [[A]] is not meant", "A"),
        ("[A]", None),
        ("A", None),
    ],
)
def test_a_verdict_is_looked_for_in_the_order_a_b_c(judgment: str, winner: str | None) -> None:
    assert winner_of(judgment) == winner


@pytest.mark.parametrize(
    ("review", "pair"),
    [
        ("8 7\nAssistant 1 gave a fuller answer.", (8, 7)),
        ("8.5,7\nBecause", (8.5, 7)),
        ("10 9", (10, 9)),
        ("8, 7\nBecause", None),
        ("8 7 \nBecause", None),
        ("**8 7**\nBecause", None),
        ("Assistant 1: 8 Assistant 2: 7", None),
        ("The first answer is better.", None),
        ("\n8 7", None),
        ("8\n7", None),
        ("nan 7", None),
        ("inf 7", None),
        ("", None),
    ],
)
def test_the_first_line_must_be_two_numbers_and_nothing_else(
    review: str, pair: tuple[float, float] | None
) -> None:
    assert score_pair_of(review) == pair


def test_lenient_reading_takes_two_numbers_and_no_more() -> None:
    assert score_pair_leniently("8, 7 \nwhy") == (8, 7)
    assert score_pair_leniently("**8.5** **7**") == (8.5, 7)
    assert score_pair_leniently("Assistant 1: 8 Assistant 2: 7") is None
    assert score_pair_leniently("no numbers\n8 7") is None


@pytest.mark.parametrize(
    ("reply", "mark"),
    [
        ("0.5", 0.5),
        ("1.0", 1.0),
        ("1", 1.0),
        ("0.8 because", 0.8),
        ("0.8\n", 0.8),
        ("1.1", None),
        ("-0.1", None),
        ("0.8.", None),
        ("**0.8**", None),
        (" 0.8", None),
        ("nan", None),
        ("The", None),
        ("", None),
    ],
)
def test_a_mark_stands_before_the_first_blank(reply: str, mark: float | None) -> None:
    assert correctness_of(reply) == mark


@pytest.mark.parametrize(
    ("completion", "preferred"),
    [
        ("[{'model': 'model_1', 'rank': 1}, {'model': 'model_2', 'rank': 2}]", 1),
        ("[{'model': 'model_2', 'rank': 1}, {'model': 'model_1', 'rank': 2}]", 2),
        ('```json\n[{"model": "model_1", "rank": 2}, {"model": "model_2", "rank": 1}]\n```', 2),
        ("[{'model': 'model_1', 'rank': 3}]", None),
        ("[{'model': 'model_1', 'rank': True}]", None),
        ("[{'model': 'model_2', 'rank': 1}]", None),
        ("model_1 is better", None),
        ("[{'model': 'model_1', 'rank': 1}, {'mod", None),
        ("__import__('os').getcwd()", None),
        ("[" * 5000, None),
        ("", None),
    ],
)
def test_a_ranking_is_a_literal_list_and_is_never_run(completion: str, preferred: int | None) -> None:
    assert preferred_of(completion) == preferred
