"""How many examples: scores after trainings on more and more records arrive; a power law with its limit leaves.

Over numbers of train records n the score of a tuning follows a + b · n^(-c): what it tends to, and how fast. The law is
fitted by least squares, and its doubt comes from the spread of the measured scores about it.

Source: Hestness et al. 2017 (arXiv 1712.00409), section 3: learning curves in a power law region, with what cannot be
reduced; Efron and Tibshirani 1993, chapter 9: the bootstrap of a regression.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import f, t

# Exponents c that are tried. Below the first the law cannot be told from one in log n; above the last all but the
# smallest number of records give the same score.
_EXPONENTS = np.geomspace(0.05, 3.0, 60)
_NUM_DRAWS = 2000
_LEAST_ERROR = 1e-3
# Numbers of records: one more than the law has parameters that make the shape.
MIN_SIZES = 3


@dataclass(frozen=True, slots=True)
class Measured:
    """The score of one training: on how many records, from which seed."""

    num_records: int
    seed: int
    value: float


@dataclass(frozen=True, slots=True)
class Doubling:
    """What twice the largest number of records would bring; `gain` is positive where the score becomes better.

    `low` and `high` hold the mean score with 95 % confidence, `gain_low` and `gain_high` the gain.
    """

    num_records: int
    value: float
    low: float
    high: float
    gain: float
    gain_low: float
    gain_high: float


@dataclass(frozen=True, slots=True)
class Curve:
    """The law a + b · n^(-c): `limit` is a, `scale` b, `exponent` c; `line` holds (n, score, low, high) of it.

    `seed_spread` is the standard deviation of the score between trainings on equally many records. `fits` tells whether
    the mean scores lie about the law as trainings on equally many records do about their mean; where they do not, it
    foretells nothing. `tested`: there were more numbers of records than the law has free parameters, else it goes
    through all of them and cannot be seen to be wrong.
    """

    limit: float
    limit_low: float
    limit_high: float
    scale: float
    exponent: float
    seed_spread: float
    fits: bool
    tested: bool
    line: tuple[tuple[float, float, float, float], ...]
    doubling: Doubling


def fit_curve(measured: Sequence[Measured], *, higher_is_better: bool, bounds: tuple[float, float], seed: int) -> Curve:
    """Return the power law through scores on several numbers of records, and what the next doubling would bring.

    The law never becomes worse with more records, and tends to a score within `bounds`. `seed` decides the draws of
    the bootstrap: scores about the law as far apart as the measured ones are. In simulations of three or four numbers
    of records and three seeds its 95 % intervals of a score held the truth in 93 to 98 % (tests/search/test_curve.py),
    those of a loss that tends to 0, and of what it gains, in 85 to 94 %.

    Scores that are better the lower they are, losses, have errors in proportion to them, others have equal ones.

    It says nothing of the doubt that the validation records bring, which are the same in every training.
    """
    sizes = np.array([one.num_records for one in measured], dtype=float)
    values = np.array([one.value for one in measured])
    assert len(set(sizes.tolist())) >= MIN_SIZES, "a law of three parameters needs three numbers of records"
    # Better is higher from here on.
    sign = 1.0 if higher_is_better else -1.0
    best = bounds[1] if higher_is_better else -bounds[0]
    largest = float(sizes.max())
    shown = np.array([*np.geomspace(sizes.min(), 2.0 * largest, 40), largest, 2.0 * largest])
    spreads = np.ones(len(values)) if higher_is_better else _means(sizes, values)
    limit, scale, exponent = (found[0] for found in _fit(sizes, sign * values[None], spreads=spreads, best=best))
    fitted = limit + scale * sizes**-exponent
    # The law's three parameters take their share of the errors, and so few scores leave the error itself in doubt:
    # Student's factor is for that.
    freedom = max(1, len(values) - 3)
    squares = float((((sign * values - fitted) / spreads) ** 2).sum())
    # At the best score there is the limit is given, and a level law has one parameter.
    left = len(set(sizes.tolist())) - (1 if scale == 0.0 else 2 if limit == best else 3)
    stands = _stands(sizes, sign * values / spreads, fitted / spreads, left=left)
    error = math.sqrt(squares / freedom) * float(t.ppf(0.975, freedom)) / 1.96
    draws = spreads * np.random.default_rng(seed).normal(0.0, error, size=(_NUM_DRAWS, len(values)))
    limits, scales, exponents = _fit(sizes, fitted + draws, spreads=spreads, best=best)
    lines = limits[:, None] + scales[:, None] * shown ** -exponents[:, None]
    law = limit + scale * shown**-exponent
    low, high = np.quantile(lines, (0.025, 0.975), axis=0)
    gain_low, gain_high = np.quantile(lines[:, -1] - lines[:, -2], (0.025, 0.975))
    lows, highs = (sign * low, sign * high) if higher_is_better else (sign * high, sign * low)
    limit_ends = sorted(sign * float(end) for end in np.quantile(limits, (0.025, 0.975)))
    return Curve(
        limit=sign * float(limit),
        limit_low=limit_ends[0],
        limit_high=limit_ends[1],
        scale=sign * float(scale),
        exponent=float(exponent),
        seed_spread=_spread(measured),
        fits=stands is not False,
        tested=stands is not None,
        line=tuple((float(n), sign * float(law[i]), float(lows[i]), float(highs[i])) for i, n in enumerate(shown[:-2])),
        doubling=Doubling(
            num_records=int(2 * largest),
            value=sign * float(law[-1]),
            low=float(lows[-1]),
            high=float(highs[-1]),
            gain=float(law[-1] - law[-2]),
            gain_low=float(gain_low),
            gain_high=float(gain_high),
        ),
    )


def _fit(
    sizes: NDArray[np.float64], rows: NDArray[np.float64], *, spreads: NDArray[np.float64], best: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return limit, scale and exponent of each row of values (R, N), higher being better: scale ≤ 0, limit ≤ `best`.

    Errors are weighed by the values' `spreads` (N).

    For a given exponent the law is a straight line in x = n^(-c), so that each row has for each exponent a solution in
    closed form; the exponent with the smallest squared error is taken.
    """
    weights = spreads**-2.0 / (spreads**-2.0).sum()
    x_CN = sizes[None] ** -_EXPONENTS[:, None]
    x_mean_C, mean_R = x_CN @ weights, rows @ weights
    centred_CN = x_CN - x_mean_C[:, None]
    square_C = centred_CN**2 @ weights
    product_RC = ((rows - mean_R[:, None]) * weights) @ centred_CN.T
    slope_RC = product_RC / square_C
    limit_RC = mean_R[:, None] - slope_RC * x_mean_C
    # Above the best score there is, the line goes through that; one that becomes worse with more records is level.
    through_RC = ((rows - best) * weights) @ x_CN.T / (x_CN**2 @ weights)
    above = limit_RC > best
    slope_RC, limit_RC = np.where(above, through_RC, slope_RC), np.where(above, best, limit_RC)
    worse = slope_RC > 0.0
    slope_RC, limit_RC = np.where(worse, 0.0, slope_RC), np.where(worse, np.minimum(mean_R, best)[:, None], limit_RC)
    # The weighed Σ(y - limit - slope · x)², less the row's own Σ(y - ȳ)²: with x and y about their means, the line is
    # `offset` beside ȳ at x̄, and the products with it are 0.
    offset_RC = limit_RC + slope_RC * x_mean_C - mean_R[:, None]
    errors_RC = offset_RC**2 + slope_RC**2 * square_C - 2.0 * slope_RC * product_RC
    chosen = errors_RC.argmin(1)
    row = np.arange(len(rows))
    return limit_RC[row, chosen], slope_RC[row, chosen], _EXPONENTS[chosen]


def _stands(
    sizes: NDArray[np.float64], values: NDArray[np.float64], fitted: NDArray[np.float64], *, left: int
) -> bool | None:
    """Tell whether a lack-of-fit F test leaves the law standing (level 0.01); values are in units of their spread.

    `left` are the numbers of records that the law's free parameters leave. None where nothing can be tested.
    """
    groups = [sizes == size for size in np.unique(sizes)]
    freedom = len(values) - len(groups)
    if not freedom or left < 1:
        return None
    within = sum(float(((values[group] - values[group].mean()) ** 2).sum()) for group in groups) / freedom
    beside = sum(int(group.sum()) * float(values[group].mean() - fitted[group].mean()) ** 2 for group in groups)
    # Seeds that agree to a thousandth of the score make no law wrong.
    ratio = beside / left / max(within, _LEAST_ERROR**2)
    return ratio <= float(f.ppf(0.99, left, freedom))


def _means(sizes: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return for each value the mean of those on as many records, at least a millionth of the largest."""
    means = np.array([np.abs(values[sizes == size]).mean() for size in sizes])
    return np.maximum(means, 1e-6 * means.max())


def _spread(measured: Sequence[Measured]) -> float:
    """Return the standard deviation within numbers of records, pooled; 0 where each has one training."""
    groups = [[m.value for m in measured if m.num_records == n] for n in {m.num_records for m in measured}]
    squares = sum(len(group) * float(np.var(group)) for group in groups)
    freedom = sum(len(group) - 1 for group in groups)
    return math.sqrt(squares / freedom) if freedom else 0.0
