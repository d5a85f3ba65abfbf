"""The learning curve: a law that is known is found again, and its doubt holds the truth as often as it says."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import curve_fit

from keeptune.search.curve import Measured, fit_curve

SIZES, SEEDS = (100, 250, 500, 1000), (0, 1, 2)


def measured(law: tuple[float, float, float], *, noise: float = 0.0, draw: int = 0) -> list[Measured]:
    """Return scores about a + b · n^(-c)."""
    a, b, c = law
    errors = np.random.default_rng(draw).normal(0.0, noise, (len(SIZES), len(SEEDS))) if noise else np.zeros((4, 3))
    return [Measured(n, seed, float(a + b * n**-c + errors[i, seed])) for i, n in enumerate(SIZES) for seed in SEEDS]


def test_a_law_without_noise_is_found_again() -> None:
    found = fit_curve(measured((0.9, -3.0, 0.5)), higher_is_better=True, bounds=(0.0, 1.0), seed=0)
    assert found.limit == pytest.approx(0.9, abs=0.005)
    assert found.exponent == pytest.approx(0.5, rel=0.04)
    truth = 0.9 - 3.0 * 2000**-0.5
    assert found.doubling.num_records == 2000
    assert found.doubling.value == pytest.approx(truth, abs=1e-3)
    assert found.doubling.gain == pytest.approx(truth - (0.9 - 3.0 * 1000**-0.5), abs=1e-3)
    assert found.doubling.gain_low > 0.0 and found.seed_spread == pytest.approx(0.0, abs=1e-12)


def test_a_loss_falls_to_its_limit_and_its_gain_is_positive() -> None:
    found = fit_curve(measured((1.2, 9.0, 0.6), noise=0.005), higher_is_better=False, bounds=(0.0, np.inf), seed=0)
    assert 0.9 < found.limit < 1.4 and found.limit_low <= found.limit <= found.limit_high
    assert found.scale > 0.0
    assert found.doubling.value < 1.2 + 9.0 * 1000**-0.6
    assert found.doubling.gain_low > 0.0 and found.doubling.low < found.doubling.value < found.doubling.high


def test_the_fit_is_that_of_scipy() -> None:
    points = measured((0.8, -4.0, 0.7), noise=0.004, draw=3)
    found = fit_curve(points, higher_is_better=True, bounds=(0.0, 1.0), seed=0)
    x, y = np.array([p.num_records for p in points], float), np.array([p.value for p in points])
    reference, _ = curve_fit(lambda n, a, b, c: a + b * n**-c, x, y, p0=(0.8, -4.0, 0.7), maxfev=20_000)
    error = ((y - (found.limit + found.scale * x**-found.exponent)) ** 2).sum()
    least = ((y - (reference[0] + reference[1] * x ** -reference[2])) ** 2).sum()
    assert error == pytest.approx(least, rel=0.01)


def test_at_the_best_score_there_is_the_fit_is_the_best_of_those_that_stay_below() -> None:
    points = measured((1.02, -2.0, 0.8))
    found = fit_curve(points, higher_is_better=True, bounds=(0.0, 1.0), seed=0)
    x, y = np.array([p.num_records for p in points], float), np.array([p.value for p in points])
    assert found.limit == 1.0
    error = ((y - (found.limit + found.scale * x**-found.exponent)) ** 2).sum()
    # Through 1, the slope that fits best for each exponent.
    fits = [np.linalg.lstsq((x**-c)[:, None], y - 1.0, rcond=None) for c in np.geomspace(0.05, 3.0, 400)]
    assert error == pytest.approx(min(float(squares[0]) for _, squares, *_ in fits), rel=0.01)


def test_a_loss_that_falls_by_orders_is_fitted_where_it_is_small() -> None:
    truth = {n: 300.0 * n**-1.2 for n in (*SIZES, 2000)}
    rng = np.random.default_rng(5)
    points = [Measured(n, s, truth[n] * float(np.exp(rng.normal(0.0, 0.1)))) for n in SIZES for s in SEEDS]
    found = fit_curve(points, higher_is_better=False, bounds=(0.0, np.inf), seed=0)
    assert found.fits and found.doubling.low < truth[2000] < found.doubling.high
    assert found.doubling.value == pytest.approx(truth[2000], rel=0.35)


def test_scores_that_follow_no_such_law_are_told() -> None:
    # A step: nothing is learned up to 500 records, and all of it at 1,000.
    points = [Measured(n, s, 5.0 + 0.01 * s if n < 1000 else 0.1 + 0.001 * s) for n in SIZES for s in SEEDS]
    assert not fit_curve(points, higher_is_better=False, bounds=(0.0, np.inf), seed=0).fits


def three_sizes(*rows: tuple[float, float, float]) -> list[Measured]:
    return [Measured(n, s, row[s]) for n, row in zip((20, 60, 180), rows, strict=True) for s in SEEDS]


def test_three_sizes_at_the_limit_test_the_law() -> None:
    # What lora came to in the lab: a law with the limit 0 gives half of what was measured at 60 records.
    points = three_sizes((2.93, 3.16, 3.16), (0.987, 1.141, 1.318), (0.083, 0.120, 0.086))
    found = fit_curve(points, higher_is_better=False, bounds=(0.0, np.inf), seed=0)
    assert (found.limit, found.fits, found.tested) == (0.0, False, True)
    # And full: a fall that the law explains as well as the seeds do.
    points = three_sizes((1.183, 1.534, 1.252), (0.409, 0.312, 0.349), (0.0587, 0.0723, 0.0616))
    found = fit_curve(points, higher_is_better=False, bounds=(0.0, np.inf), seed=0)
    assert (found.limit, found.fits, found.tested) == (0.0, True, True)


def test_a_law_through_all_of_three_sizes_is_untested_and_one_without_repeats_too() -> None:
    points = three_sizes((0.50, 0.51, 0.52), (0.60, 0.61, 0.62), (0.65, 0.66, 0.67))
    found = fit_curve(points, higher_is_better=True, bounds=(0.0, 1.0), seed=0)
    assert found.limit < 1.0 and (found.fits, found.tested) == (True, False)
    single = [one for one in measured((0.9, -3.0, 0.5), noise=0.01) if one.seed == 0]
    assert not fit_curve(single, higher_is_better=True, bounds=(0.0, 1.0), seed=0).tested
    assert fit_curve(measured((0.9, -3.0, 0.5)), higher_is_better=True, bounds=(0.0, 1.0), seed=0).tested


def test_no_score_is_foretold_beyond_the_best_there_is() -> None:
    found = fit_curve(measured((1.4, -3.0, 0.3), noise=0.01), higher_is_better=True, bounds=(0.0, 1.0), seed=0)
    assert found.limit_high <= 1.0 and found.doubling.high <= 1.0


def test_scores_that_fall_with_more_records_give_a_level_law() -> None:
    points = [Measured(n, s, 0.9 - n / 5000) for n in SIZES for s in SEEDS]
    found = fit_curve(points, higher_is_better=True, bounds=(0.0, 1.0), seed=0)
    assert found.scale == found.doubling.gain == found.doubling.gain_low == 0.0


def test_the_spread_between_seeds_is_pooled_over_the_sizes() -> None:
    points = [Measured(n, s, 0.5 + 0.1 * s) for n in SIZES for s in SEEDS]
    found = fit_curve(points, higher_is_better=True, bounds=(0.0, 1.0), seed=0)
    assert found.seed_spread == pytest.approx(0.1)


def test_the_same_seed_gives_the_same_curve() -> None:
    points = measured((0.9, -3.0, 0.5), noise=0.02)
    first, again = (fit_curve(points, higher_is_better=True, bounds=(0.0, 1.0), seed=7) for _ in range(2))
    assert first == again


@pytest.mark.parametrize("law", [(0.9, -3.0, 0.5), (0.7, -30.0, 1.0), (0.95, -1.5, 0.2)])
def test_the_interval_of_the_doubling_holds_the_truth_about_as_often_as_it_says(
    law: tuple[float, float, float],
) -> None:
    truth = law[0] + law[1] * 2000 ** -law[2]
    held = 0
    for draw in range(100):
        found = fit_curve(measured(law, noise=0.01, draw=draw), higher_is_better=True, bounds=(0.0, 1.0), seed=draw)
        held += found.doubling.low <= truth <= found.doubling.high
    # Of 100 draws 95 are meant; fewer than 89 have a chance of 1 in 100 then.
    assert held >= 89
