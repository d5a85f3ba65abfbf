"""Intervals against published and hand-computed values; never of zero width; clusters of one record change nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from keeptune.evaluation import intervals
from keeptune.evaluation.intervals import Ends, Spread, spread_of
from keeptune.evaluation.metrics import METRICS

SHARE, DIFFERENCE, LOSS = (0.0, 1.0), (-1.0, 1.0), (0.0, math.inf)


def spread(values: list[float], clusters: list[int] | None = None) -> Spread:
    numbers = np.array(clusters if clusters else range(len(values)))
    sums = np.zeros((numbers.max() + 1, 2))
    np.add.at(sums, numbers, np.stack([np.array(values, dtype=float), np.ones(len(values))], axis=1))
    return spread_of(sums, METRICS["loss"].combine, sizes_G=np.bincount(numbers))


def exact(right: int, number: int) -> Ends:
    return intervals.score_interval(spread([1.0] * right + [0.0] * (number - right)), bounds=SHARE, binary=True)


def paired(lost: int, gained: int, number: int) -> Ends:
    of = spread([-1.0] * lost + [1.0] * gained + [0.0] * (number - lost - gained))
    return intervals.binary_difference_interval(of, changed=(lost + gained) / number)


@pytest.mark.parametrize(
    ("right", "number", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_exact_match_has_the_interval_of_wilson(right: int, number: int, low: float, high: float) -> None:
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 17, table I.
    assert exact(right, number) == pytest.approx((low, high), abs=5e-5)
    assert exact(number - right, number) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(
    ("lost", "gained", "number", "low", "high"),
    [
        # The 21 pairs (1, 1, 7, 12) of Fagerland, Lydersen and Laake 2014, Statistics in Medicine 33: (1 - 7) / 23 is
        # -.26087, and 1.95996 x sqrt((10 / 23 - .26087^2) / 23) is .24749.
        (7, 1, 21, -0.5084, -0.0134),
        # Nothing changed: 1.95996 x sqrt(2) / 12.
        (0, 0, 10, -0.2310, 0.2310),
        # (1 - 11) / 12 = -.8333, and 1.95996 x sqrt((12 / 12 - .8333^2) / 12) = .31277; no share is below -1.
        (10, 0, 10, -1.0, -0.5206),
    ],
)
def test_paired_exact_match_has_the_interval_of_bonett_and_price(
    lost: int, gained: int, number: int, low: float, high: float
) -> None:
    assert paired(lost, gained, number) == pytest.approx((low, high), abs=5e-5)


def test_a_mean_between_bounds_is_wilsons_with_the_number_of_records_that_its_error_stands_for() -> None:
    values = [0.2, 0.5, 0.9, 0.4, 0.6, 0.1]
    low, high = intervals.score_interval(spread(values), bounds=SHARE, binary=False)
    far = max(abs(v - 0.45) for v in values)
    error = math.sqrt((sum((v - 0.45) ** 2 for v in values) + 2 * far**2) / (7 * 8))
    number, t = 1 + 0.45 * 0.55 / error**2, stats.t.ppf(0.975, 5)
    middle, half = 0.45 + t**2 / number / 2, t * math.sqrt(0.45 * 0.55 / number + t**2 / number**2 / 4)
    assert (low, high) == pytest.approx(((middle - half) / (1 + t**2 / number), (middle + half) / (1 + t**2 / number)))
    assert low is not None and high is not None
    hundredfold = spread([100 * value for value in values])
    of_bleu = intervals.score_interval(hundredfold, bounds=(0.0, 100.0), binary=False)
    assert of_bleu == pytest.approx((100 * low, 100 * high))


def test_a_loss_has_students_interval_on_the_log_scale_and_a_perplexity_its_exponential() -> None:
    of = spread([1.0, 2.0, 4.0, 1.5])
    factor = math.exp(stats.t.ppf(0.975, 3) * of.wide_error / 2.125)
    ends = intervals.score_interval(of, bounds=LOSS, binary=False)
    assert ends == pytest.approx((2.125 / factor, 2.125 * factor))
    assert intervals.exponential(ends) == pytest.approx(tuple(map(math.exp, (2.125 / factor, 2.125 * factor))))


def test_the_wide_error_is_that_of_two_records_more_as_far_out_as_the_farthest() -> None:
    values = np.array([0.0, 0.1, 0.1, 0.1, 0.1, 0.8])
    more = np.array([*(values - 0.2), 0.6, -0.6])
    assert spread(values.tolist()).wide_error == pytest.approx(math.sqrt(np.square(more).sum() / 7 / 8))
    # Where all pull alike, it is the standard error, which is then more.
    assert spread([0.0, 1.0]).wide_error == spread([0.0, 1.0]).standard_error == pytest.approx(0.5)


def test_a_paired_difference_is_students_about_a_middle_towards_the_longer_tail() -> None:
    of = spread([-0.9, 0.0, 0.1, 0.05, 0.0, 0.15, 0.1, 0.0])
    low, high = intervals.difference_interval(of, bounds=DIFFERENCE)
    assert low is not None and high is not None
    t = stats.t.ppf(0.975, 7)
    # Four more as far from the mean as the farthest, three of them on its side.
    farthest = -0.9 - of.value
    more = np.append(of.pulls_G, [farthest, farthest, farthest, -farthest])
    error = math.sqrt(np.square(more).sum() / 12 / 11)
    assert high - low == pytest.approx(2 * t * error)
    third = float((more**3).mean()) / (error**2 * 12)
    assert (low + high) / 2 - of.value == pytest.approx(third * (1 / 6 + t**2 / 3) / 12)
    assert (low + high) / 2 < of.value


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=40))
@settings(max_examples=80, deadline=None)
def test_no_interval_of_right_and_wrong_has_zero_width_or_leaves_its_bounds(values: list[float]) -> None:
    low, high = intervals.score_interval(spread(values), bounds=SHARE, binary=True)
    assert low is not None and high is not None and 0.0 <= low < high <= 1.0
    moves = [value - 1.0 for value in values]
    low, high = intervals.binary_difference_interval(spread(moves), changed=float(np.mean(np.abs(moves))))
    assert low is not None and high is not None and -1.0 <= low < high <= 1.0


@given(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=2, max_size=20))
@settings(max_examples=80, deadline=None)
def test_no_interval_between_bounds_has_zero_width_or_leaves_them(values: list[float]) -> None:
    low, high = intervals.score_interval(spread(values), bounds=SHARE, binary=False)
    assert low is not None and high is not None and 0.0 <= low < high <= 1.0
    low, high = intervals.difference_interval(spread([v - 0.5 for v in values]), bounds=DIFFERENCE)
    assert low is not None and high is not None and -1.0 <= low < high <= 1.0


def test_where_all_values_are_alike_the_share_that_may_differ_says_how_far_the_mean_may_be_off() -> None:
    # Wilson's upper end for none of 20 is .1611.
    alike = intervals.score_interval(spread([0.4] * 20), bounds=SHARE, binary=False)
    assert alike == pytest.approx((0.4 - 0.4 * 0.16113, 0.4 + 0.6 * 0.16113), abs=1e-5)
    all_right = intervals.score_interval(spread([1.0] * 20), bounds=SHARE, binary=False)
    assert all_right == pytest.approx(exact(20, 20))
    unmoved = intervals.difference_interval(spread([0.0] * 20), bounds=DIFFERENCE)
    assert unmoved == pytest.approx((-0.16113, 0.16113), abs=1e-5)
    # Nothing bounds a loss.
    assert intervals.score_interval(spread([2.0] * 20), bounds=LOSS, binary=False) == (None, None)
    assert intervals.difference_interval(spread([0.1] * 20), bounds=intervals.difference_bounds(LOSS)) == (None, None)


def test_one_cluster_has_no_interval() -> None:
    one = spread([1.0, 0.0], [0, 0])
    assert intervals.score_interval(one, bounds=SHARE, binary=True) == (None, None)
    assert intervals.difference_interval(one, bounds=DIFFERENCE) == (None, None)
    assert intervals.binary_difference_interval(one, changed=0.5) == (None, None)


def test_records_that_repeat_each_other_count_as_fewer() -> None:
    # Each of 40 inputs asked five times, always with the same result, tells what 40 records do, and a little less for
    # the quantile of 39 degrees of freedom.
    values, clusters = [float(i // 5 % 4 == 0) for i in range(200)], [i // 5 for i in range(200)]
    of_clusters = intervals.score_interval(spread(values, clusters), bounds=SHARE, binary=True)
    assert of_clusters == pytest.approx(exact(10, 40), abs=0.01)
    assert (exact(50, 200)[0] or 0.0) > (of_clusters[0] or 0.0)
    # All right in 10 clusters of two is as much as 10 records say.
    all_right = intervals.score_interval(spread([1.0] * 20, [i // 2 for i in range(20)]), bounds=SHARE, binary=True)
    assert all_right[0] == pytest.approx(exact(10, 10)[0], abs=0.04)
    moves = [0.0 - value for value in values]
    grouped = intervals.binary_difference_interval(spread(moves, clusters), changed=0.25)
    assert grouped == pytest.approx(paired(10, 0, 40), abs=0.01)


def test_one_input_whose_records_are_all_alike_counts_beside_the_few_that_differ() -> None:
    # One of 20 records is wrong, in 10 clusters of two. The error is that of 20 independent ones, and the design effect
    # 1, but a single cluster says so: beside it counts one of effect 2.
    of = spread([0.0] + [1.0] * 19, [i // 2 for i in range(20)])
    assert of.standard_error == pytest.approx(math.sqrt(0.95 * 0.05 / 19))
    assert of.effective_number(0.95 * 0.05) == pytest.approx(20 / 1.5)
    # Alone, each record counts.
    assert spread([0.0] + [1.0] * 19).effective_number(0.95 * 0.05) == pytest.approx(20)


def test_a_picked_maximum_has_the_confidence_of_bonferroni() -> None:
    assert intervals.confidence_of_each(1) == pytest.approx(0.95)
    assert intervals.confidence_of_each(10) == pytest.approx(0.995)
    of = spread([1.0] * 3 + [0.0] * 27)
    wide = intervals.score_interval(of, bounds=SHARE, binary=True, confidence=0.995)
    # Wilson's at z = 2.807.
    assert wide == pytest.approx((0.0232, 0.3432), abs=5e-4)


def test_the_mean_of_tasks_has_the_doubt_of_each_and_that_of_a_task_that_is_all_right() -> None:
    free, normal = (-math.inf, math.inf), 1.959964
    # An error of .1 is more than half of .3 over 1.96, one of .05 less than half of .4.
    half = math.hypot(normal * 0.1, 0.2) / 2
    ends = [(0.1, 0.4), (0.5, 0.9)]
    assert intervals.mean_of_tasks([0.2, 0.6], [0.1, 0.05], ends, bounds=free) == pytest.approx(
        (0.4 - half, 0.4 + half)
    )
    assert intervals.mean_of_tasks([0.2, 0.6], [0.1, 0.1], [(0.1, 0.4), (None, None)], bounds=free) == (None, None)
    low, high = intervals.mean_of_tasks([1.0, 1.0], [0.0, 0.0], [exact(20, 20), exact(20, 20)], bounds=SHARE)
    assert low is not None and high == 1.0 and 0.8 < low < 1.0


def test_the_mean_of_draws_is_as_wide_as_the_draws_and_the_records_make_it() -> None:
    values, errors = [0.40, 0.50, 0.60], [0.03, 0.03, 0.03]
    between, within = 0.01 / 3, 0.0009
    freedom = (between + within) ** 2 / (between**2 / 2 + within**2 / 99)
    low, high = intervals.mean_of_draws(values, errors, bounds=(-math.inf, math.inf), num_clusters=100)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(between + within)
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half))
    # Draws that agree leave the records' doubt, a single draw too.
    for alike in ([0.5, 0.5], [0.5]):
        one = intervals.mean_of_draws(alike, [0.03] * len(alike), bounds=(-math.inf, math.inf), num_clusters=100)
        half = stats.t.ppf(0.975, 99) * 0.03
        assert one == pytest.approx((0.5 - half, 0.5 + half))
    assert intervals.mean_of_draws([0.5, 0.5], [0.1, None], bounds=SHARE, num_clusters=9) == (None, None)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_exact_match_of_fifty_records_is_held_as_often_as_it_says(share: float) -> None:
    held = sum(
        float(stats.binom.pmf(right, 50, share))
        for right in range(51)
        if (ends := exact(right, 50))[0] is not None and ends[0] <= share <= (ends[1] or 0.0)
    )
    assert held > 0.92
