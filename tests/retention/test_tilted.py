"""The likeliest distribution with a mean of 0, and the exact chance of a sum as low as the observed one under it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from keeptune.retention.tilted import Stratum, lower_tail, tilt

BUDGET = 0.05


def stratum(values: list[float], *, worst: float = 1.0, budget: float = BUDGET) -> Stratum:
    """Return a stratum of losses from which the budget is taken away."""
    found, counts = np.unique(np.round(np.array(values) - budget, 12), return_counts=True)
    return Stratum(found, counts.astype(np.float64), worst - budget)


def log_likelihood(tilted_strata: tuple[Stratum, ...], chances: list[np.ndarray]) -> float:
    return sum(float(s.counts_V @ np.log(c[:-1])) for s, c in zip(tilted_strata, chances, strict=True))


values = st.lists(st.sampled_from([-1.0, -0.4, -0.1, 0.0, 0.0, 0.0, 0.2, 1.0]), min_size=3, max_size=30)


@given(st.lists(values, min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_the_tilted_chances_sum_to_one_and_have_a_mean_of_zero(drawn: list[list[float]]) -> None:
    strata = [stratum(one) for one in drawn]
    if sum(one.total for one in strata) >= 0.0:
        assert lower_tail(strata, offset=BUDGET) == 1.0
        return
    tilted = tilt(strata)
    assert all(chances.sum() == pytest.approx(1.0) and (chances >= 0.0).all() for chances in tilted.chances)
    mean = sum(s.number * (v @ c) for s, v, c in zip(tilted.strata, tilted.values, tilted.chances, strict=True))
    assert mean == pytest.approx(0.0, abs=1e-6 * sum(one.number for one in strata))


def test_no_other_distribution_with_a_mean_of_zero_makes_the_values_likelier() -> None:
    strata = (stratum([0.0] * 20 + [1.0] + [-0.3] * 4), stratum([0.0] * 8 + [0.2] * 2))
    tilted = tilt(strata)
    sizes = [len(found) for found in tilted.values]
    flat_values = np.concatenate([s.number * v for s, v in zip(strata, tilted.values, strict=True)])

    def split(flat: np.ndarray) -> list[np.ndarray]:
        return np.split(flat, np.cumsum(sizes)[:-1])

    best = optimize.minimize(
        lambda flat: -log_likelihood(strata, split(np.maximum(flat, 1e-12))),
        np.concatenate([np.full(size, 1.0 / size) for size in sizes]),
        bounds=[(0.0, 1.0)] * sum(sizes),
        constraints=[
            {"type": "ineq", "fun": lambda flat: flat @ flat_values},
            *({"type": "eq", "fun": lambda flat, i=i: split(flat)[i].sum() - 1.0} for i in range(len(sizes))),
        ],
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-10},
    )
    assert best.success
    assert log_likelihood(strata, list(tilted.chances)) == pytest.approx(-best.fun, abs=1e-3)
    assert log_likelihood(strata, list(tilted.chances)) >= -best.fun - 1e-3


@pytest.mark.parametrize("number", [1, 20, 183, 1000])
def test_where_nothing_changed_it_is_the_smallest_that_any_valid_test_can_give(number: int) -> None:
    assert lower_tail([stratum([0.0] * number)], offset=BUDGET) == pytest.approx((1.0 - BUDGET) ** number, rel=1e-6)


@pytest.mark.parametrize(("lost", "gained", "number"), [(1, 0, 150), (3, 2, 300), (10, 8, 400), (0, 5, 100)])
def test_for_values_of_minus_one_zero_and_one_it_is_the_exact_tail_of_the_trinomial(
    lost: int, gained: int, number: int
) -> None:
    # The gains' share of greatest likelihood where losses have that share plus the budget, as in Tango's test (1998).
    def slope(gains: float) -> float:
        unchanged = number - lost - gained
        return lost / (gains + BUDGET) + gained / gains - 2.0 * unchanged / (1.0 - 2.0 * gains - BUDGET)

    low, high = 1e-12, (1.0 - BUDGET) / 2.0 - 1e-12
    gains: float = optimize.brentq(slope, low, high) if gained else 0.0  # pyright: ignore[reportAssignmentType]
    losses = gains + BUDGET
    tail = equal = 0.0
    for num_lost in range(number + 1):
        rest = gains / (1.0 - losses)
        # As many gains at least as make the sum no larger than it was.
        least = num_lost - (lost - gained)
        tail += stats.binom.pmf(num_lost, number, losses) * stats.binom.sf(least - 1, number - num_lost, rest)
        equal += stats.binom.pmf(num_lost, number, losses) * stats.binom.pmf(least, number - num_lost, rest)
    found = lower_tail([stratum([1.0] * lost + [-1.0] * gained + [0.0] * (number - lost - gained))], offset=BUDGET)
    chances = np.array([gains, 1.0 - gains - losses, losses])
    deviations = np.array([-1.0, 0.0, 1.0]) - BUDGET
    variance, third, fourth = (float(chances @ deviations**order) for order in (2, 3, 4))
    unexplained = max(1e-9, fourth / variance**2 - 1.0 - third**2 / variance**3)
    corrected = stats.t.cdf(stats.norm.ppf(tail - equal / 4.0), max(10.0, 2.0 * number / unexplained))
    # Where no record gained, the number of losses alone is exact.
    assert found == pytest.approx(corrected if gained else tail, rel=1e-3)


def test_for_many_changes_it_is_that_of_students_test() -> None:
    drawn = np.random.default_rng(0).normal(0.0, 0.3, 2000).clip(-1.0, 1.0)
    found = lower_tail([stratum(list(drawn), budget=0.01)], offset=0.01)
    assert found == pytest.approx(stats.ttest_1samp(drawn, 0.01, alternative="less")[1], rel=0.03)


def test_the_rank_among_sums_with_as_many_rare_losses_is_no_evidence() -> None:
    rng = np.random.default_rng(1)
    noise = list(rng.normal(0.0, 1e-4, 397))
    found = lower_tail([stratum([1.0] * 3 + noise, budget=0.02)], offset=0.02)
    without = lower_tail([stratum([1.0] * 3 + [0.0] * 397, budget=0.02)], offset=0.02)
    assert found == pytest.approx(without, rel=0.05)


def test_strata_that_differ_in_their_means_tell_more_than_one_of_all() -> None:
    parts = [[1.0] * lost + [-1.0] * (60 - lost) + [0.0] * 60 for lost in (55, 5)]
    apart = lower_tail([stratum(part, budget=0.1) for part in parts], offset=0.1)
    assert 0.0 < apart < 0.5 * lower_tail([stratum(parts[0] + parts[1], budget=0.1)], offset=0.1)


@pytest.mark.parametrize("num_lost", [0, 1, 5])
@pytest.mark.parametrize("num_strata", [2, 3, 4])
def test_strata_that_are_alike_tell_what_one_of_all_tells(num_strata: int, num_lost: int) -> None:
    values = [1.0] * num_lost + [0.0] * (1200 - num_lost)
    alone = lower_tail([stratum(values, budget=0.02)], offset=0.02)
    apart = [stratum(values[i::num_strata], budget=0.02) for i in range(num_strata)]
    assert lower_tail(apart, offset=0.02) == pytest.approx(alone, rel=0.15)


@pytest.mark.parametrize("lost", [0, 1, 5])
def test_a_single_gain_is_no_evidence_of_a_loss(lost: int) -> None:
    values = [1.0] * lost + [0.0] * (640 - lost)
    without = lower_tail([stratum(values, budget=0.02)], offset=0.02)
    for gain in (0.01, 0.1):
        assert lower_tail([stratum([*values[:-1], -gain], budget=0.02)], offset=0.02) <= 1.05 * without


def test_clusters_of_two_sizes_that_lost_nothing_are_no_jumps() -> None:
    budget, number = 0.02, 640
    sizes = np.array([1.0] * 500 + [2.0] * 70)
    values, counts = np.unique(np.round(-budget * sizes, 12), return_counts=True)
    found = lower_tail([Stratum(values, counts.astype(float), (1.0 - budget) * 2.0)], offset=budget)
    assert (1.0 - budget) ** number < found < 0.002


def test_more_clusters_with_the_same_shares_are_more_evidence() -> None:
    one = stratum([0.0] * 95 + [1.0] * 3 + [-0.5] * 2)
    assert lower_tail([one.grown(3.0)], offset=BUDGET) < lower_tail([one.grown(1.5)], offset=BUDGET)
