"""Intervals and paired tests by resampling: against exact counts, plain draws and their rates of error."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from fasttrain.evaluate.comparing.resampling import bootstrap_interval, holm, mcnemar_exact, paired_test


def mean(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def parts(values: list[float]) -> np.ndarray:
    return np.array([[value, 1.0] for value in values])


def test_the_bootstrap_equals_one_that_draws_questions_one_by_one() -> None:
    rng = np.random.default_rng(3)
    above, below = rng.integers(1, 9, 37).astype(float), rng.integers(5, 11, 37).astype(float)
    interval = bootstrap_interval(
        [np.stack([above, below], axis=1)], lambda sums: sums[..., 0] / sums[..., 1], resamples=40_000, seed=0
    )
    drawn = rng.integers(0, 37, (40_000, 37))
    plain = np.quantile(above[drawn].sum(1) / below[drawn].sum(1), [0.025, 0.975])
    assert interval == pytest.approx(plain, abs=0.003)


def test_the_interval_of_a_mean_covers_it_about_95_times_in_100() -> None:
    rng, inside = np.random.default_rng(5), 0
    for _ in range(400):
        low, high = bootstrap_interval([parts(list(rng.normal(size=60)))], mean, resamples=400, seed=1)
        inside += low <= 0 <= high
    assert 0.91 <= inside / 400 <= 0.98


def test_questions_are_drawn_within_their_stratum() -> None:
    """Two strata without spread inside: any resample has the same sums."""
    strata = [parts([1.0] * 5), parts([3.0] * 15)]
    assert bootstrap_interval(strata, mean, resamples=200, seed=0) == pytest.approx((2.5, 2.5))


def test_the_swap_test_equals_the_count_over_all_swaps() -> None:
    ours, theirs = [7.0, 5.0, 9.0, 4.0, 8.0, 6.0, 7.0], [6.0, 5.0, 6.0, 5.0, 5.0, 6.0, 3.0]
    gains = np.array(ours) - np.array(theirs)
    exact = np.mean(
        [
            abs(np.dot(signs, gains)) >= abs(gains.sum()) - 1e-9
            for signs in itertools.product((1, -1), repeat=7)
        ]
    )
    test = paired_test([parts(ours)], [parts(theirs)], mean, resamples=50_000, seed=0)
    assert test.difference == pytest.approx(gains.mean())
    assert test.p_value == pytest.approx(exact, abs=0.01)


def test_equal_models_differ_by_zero_with_p_one() -> None:
    same = [parts([1.0, 4.0, 2.0])]
    test = paired_test(same, same, mean, resamples=500, seed=0)
    assert (test.difference, test.interval, test.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_without_a_difference_the_swap_test_rejects_about_5_in_100() -> None:
    rng, rejected = np.random.default_rng(11), 0
    for _ in range(300):
        ours, theirs = rng.normal(size=(2, 30))
        rejected += (
            paired_test([parts(list(ours))], [parts(list(theirs))], mean, resamples=300, seed=0).p_value
            <= 0.05
        )
    assert 0.02 <= rejected / 300 <= 0.09


@pytest.mark.parametrize(
    ("only_ours", "only_theirs", "p_value"),
    [(0, 0, 1.0), (5, 0, 0.0625), (1, 9, 22 / 1024), (6, 6, 1.0), (10, 3, 2 * (1 + 13 + 78 + 286) / 8192)],
)
def test_mcnemar_is_twice_the_smaller_binomial_tail(only_ours: int, only_theirs: int, p_value: float) -> None:
    ours = np.array([True] * only_ours + [False] * only_theirs + [True, False] * 4)
    theirs = np.array([False] * only_ours + [True] * only_theirs + [True, False] * 4)
    assert mcnemar_exact(ours, theirs) == pytest.approx(p_value)


def test_mcnemar_stays_a_number_for_thousands_of_questions() -> None:
    ours = np.array([True] * 1600 + [False] * 1400)
    expected = math.erfc((100 - 0.5) / math.sqrt(3000 / 4) / math.sqrt(2))  # normal with continuity
    assert mcnemar_exact(ours, ~ours) == pytest.approx(expected, rel=0.02)


def test_holm_multiplies_by_what_is_left_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03, math.nan])[:3] == pytest.approx([0.04, 0.09, 0.09])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert math.isnan(holm([0.01, math.nan])[1])
