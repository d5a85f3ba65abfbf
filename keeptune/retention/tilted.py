"""The chance that independent clusters lose as little as was measured, if they lost the budget or more in the mean.

The distribution with such a mean under which the observed values are likeliest (their empirical likelihood) weighs low
values down and high ones up, and may put weight on the worst value that a cluster can have, seen or not. How likely it
makes the observed sum or a lower one is found exactly, from characteristic functions. For n clusters of which none lost
anything it is (1 - b)^n, the smallest that any valid test can give for a budget b.

Sources: Owen 2001, "Empirical Likelihood", chapter 2; DiCiccio and Romano 1990, "Nonparametric confidence limits by
resampling methods and least favorable families"; Lloyd 2008, on p-values of which the nuisance is estimated under the
null. Shape key: V distinct values of a stratum, W those of all strata, K strata, N places of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, ndtr, ndtri, stdtr

_NUM_PLACES = 1 << 13
# The grid reaches so many standard deviations of the sum to each side, or so many times the largest single value.
_DEVIATIONS, _JUMPS = 12.0, 5.0
# A value is a jump if it lies above the mean of all lower ones by this many standard deviations of their sum.
_APART = 2.0
# Below it rounding in the transforms decides.
SMALLEST_P = 1e-12
_NUM_STEPS = 100
_SHARE_OF_EQUAL = 0.75
_ROUNDING = 1e-9
# Few degrees of freedom arise for budgets far above what was lost, where the exact tail is nearly 0 anyway.
_LEAST_FREEDOM = 10.0


@dataclass(frozen=True, slots=True)
class Stratum:
    """Independent clusters of one kind: their distinct values, how often each came, and the worst value there can be.

    A value is what a cluster lost beyond its budget. How many clusters of each kind there are is taken as fixed.
    """

    values_V: NDArray[np.float64]
    counts_V: NDArray[np.float64]
    worst: float

    @property
    def number(self) -> float:
        """The number of clusters."""
        return float(self.counts_V.sum())

    @property
    def total(self) -> float:
        """The sum of the values."""
        return float(self.counts_V @ self.values_V)

    def grown(self, factor: float) -> Stratum:
        """Return `factor` times as many clusters with the same shares of values."""
        return Stratum(self.values_V, self.counts_V * factor, self.worst)


@dataclass(frozen=True, slots=True)
class Tilted:
    """Each stratum's values, its worst one last, with their chances where the mean is 0."""

    strata: tuple[Stratum, ...]
    values: tuple[NDArray[np.float64], ...]
    chances: tuple[NDArray[np.float64], ...]

    @property
    def variance(self) -> float:
        """The variance of the sum of all clusters."""
        return self._central_moment(2)

    @property
    def freedom(self) -> float:
        """How well the observed values tell that variance, as the degrees of freedom of Student's t.

        Twice the squared variance over the variance of its estimate, less what the sum itself explains of that. Of one
        stratum with skewness g and kurtosis k: 2 n / (k - 1 - g^2), which is n for a normal distribution, and infinite
        for two values, of which the number of the one tells all.
        """
        squares = sum(
            stratum.number * float(chances @ np.square(values - chances @ values)) ** 2
            for stratum, values, chances in zip(self.strata, self.values, self.chances, strict=True)
        )
        explained = self._central_moment(3) ** 2 / self.variance
        unexplained = self._central_moment(4) - squares - explained
        if unexplained <= _ROUNDING * squares:
            return math.inf
        return max(_LEAST_FREEDOM, 2.0 * self.variance**2 / unexplained)

    def _central_moment(self, order: int) -> float:
        """Return the sum over all clusters of the central moment of this order."""
        return sum(
            stratum.number * float(chances @ (values - chances @ values) ** order)
            for stratum, values, chances in zip(self.strata, self.values, self.chances, strict=True)
        )

    @property
    def largest_jump(self) -> float:
        """The largest distance of a value that can come from the mean of its stratum."""
        return max(
            float(np.abs(values - chances @ values)[chances > 0.0].max())
            for values, chances in zip(self.values, self.chances, strict=True)
        )


def lower_tail(strata: Sequence[Stratum], *, offset: float) -> float:
    """Return the p-value of "the sum over all clusters is 0 or more in expectation"; 1 where the observed sum is.

    Values plus `offset` lie on a lattice, if on any. The chance is corrected for what is estimated: the means of the
    strata, of which each beyond the first costs a degree of freedom, and the spread (`Tilted.freedom`), for which
    Student's t stands in place of the normal distribution. Of a sum that is exactly as low three quarters count: half
    would do if nothing were estimated (mid-p), and all of it errs less than the level says.
    """
    total = sum(stratum.total for stratum in strata)
    if total >= 0.0:
        return 1.0
    tilted = tilt(strata)
    p = max(_chance_of_sum(tilted, total, offset=offset), _chance_of_few_jumps(tilted))
    share_free = 1.0 - (len(strata) - 1) / sum(stratum.number for stratum in strata)
    z, freedom = float(ndtri(p)) * math.sqrt(share_free), tilted.freedom
    return float(stdtr(freedom, z) if freedom < math.inf else ndtr(z))


def tilt(strata: Sequence[Stratum]) -> Tilted:
    """Return the distribution with a mean of 0 under which the observed values, whose mean is below, are likeliest.

    A value's chance is its count over n_k (h_k - strength value): `strength`, one for all strata, makes the mean 0, and
    h_k each stratum's chances sum to 1, with what is left over on the worst value.
    """

    def tilted(strength: float) -> tuple[float, list[NDArray[np.float64]]]:
        chances = [_chances(stratum, strength) for stratum in strata]
        means = (_with_worst(s) @ c for s, c in zip(strata, chances, strict=True))
        return sum(s.number * float(mean) for s, mean in zip(strata, means, strict=True)), chances

    number = sum(stratum.number for stratum in strata)
    low, at_low = 0.0, sum(stratum.total for stratum in strata)
    high = 1.0 / max(stratum.worst for stratum in strata)
    at_high, chances = tilted(high)
    while at_high < 0.0 and high < math.inf and abs(at_high) > 1e-9 * number:
        low, at_low, high = high, at_high, 2.0 * high
        at_high, chances = tilted(high)
    found = at_high
    for step in range(_NUM_STEPS):
        if abs(found) <= 1e-9 * number:
            break
        # The secant, and now and then the middle, which it may never reach.
        middle = low - at_low * (high - low) / (at_high - at_low)
        if step % 3 == 2 or not low < middle < high:
            middle = (low + high) / 2.0
        found, chances = tilted(middle)
        if found < 0.0:
            low, at_low = middle, found
        else:
            high, at_high = middle, found
    return Tilted(tuple(strata), tuple(map(_with_worst, strata)), tuple(chances))


def _with_worst(stratum: Stratum) -> NDArray[np.float64]:
    return np.append(stratum.values_V, stratum.worst)


def _chances(stratum: Stratum, strength: float) -> NDArray[np.float64]:
    """Return the chances of a stratum's values, and of the worst one, at this strength of the tilt."""
    shares_V, raised_V = stratum.counts_V / stratum.number, strength * stratum.values_V
    highest = int(raised_V.argmax())
    level = strength * stratum.worst
    if level > raised_V[highest]:
        chances_V = shares_V / (level - raised_V)
        if (seen := float(chances_V.sum())) <= 1.0:
            return np.append(chances_V, 1.0 - seen)
    else:
        level = raised_V[highest] + shares_V[highest]
    # Newton's steps from below: the sum is convex in the level, and at least 1 there.
    for _ in range(_NUM_STEPS):
        chances_V = shares_V / (level - raised_V)
        excess = float(chances_V.sum()) - 1.0
        if excess <= 1e-12:
            break
        level += excess / float((chances_V / (level - raised_V)).sum())
    chances_V = shares_V / (level - raised_V)
    return np.append(chances_V / chances_V.sum(), 0.0)


def _chance_of_sum(tilted: Tilted, total: float, *, offset: float) -> float:
    """Return the chance of a lower sum than `total`, and a part of the chance of `total` itself."""
    reach = max(_DEVIATIONS * math.sqrt(tilted.variance), _JUMPS * tilted.largest_jump)
    step = 2.0 * reach / _NUM_PLACES
    # A whole number of steps is 1, so that whole values stay what they are.
    step = 1.0 / max(1, math.floor(1.0 / step)) if step < 1.0 else float(math.ceil(step))
    number = sum(stratum.number for stratum in tilted.strata)
    spectrum: NDArray[np.complex128] = np.ones(_NUM_PLACES // 2 + 1, dtype=np.complex128)
    for stratum, values, chances in zip(tilted.strata, tilted.values, tilted.chances, strict=True):
        spectrum *= np.fft.rfft(_on_grid((values + offset) / step, chances)) ** round(stratum.number)
    chances_N = np.fft.irfft(spectrum, _NUM_PLACES)
    moved = offset * number / step
    last = math.ceil(total / step + moved - 1e-6)
    first = math.floor(moved) - _NUM_PLACES // 2
    places = np.arange(max(first, last - _NUM_PLACES + 1), last + 1)
    lower = chances_N[places % _NUM_PLACES]
    return float(np.clip(lower[:-1].sum() + _SHARE_OF_EQUAL * lower[-1:].sum(), SMALLEST_P, 1.0))


def _on_grid(places: NDArray[np.float64], chances: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return chances on the grid, taken as a circle; what lies between two places is divided, which keeps the mean."""
    below = np.floor(places + 1e-9)
    above = np.clip(places - below, 0.0, 1.0)
    grid_N = np.zeros(_NUM_PLACES)
    np.add.at(grid_N, below.astype(np.int64) % _NUM_PLACES, chances * (1.0 - above))
    np.add.at(grid_N, (below.astype(np.int64) + 1) % _NUM_PLACES, chances * above)
    return grid_N


def _chance_of_few_jumps(tilted: Tilted) -> float:
    """Return the chance of no more jumps, losses that stand apart from all else, than came; 0 where there are none.

    Where rare large losses decide, the rank of a sum among sums with as many of them is noise, whose mean the null
    takes from the data: it is no evidence, and the number of losses alone counts.
    """
    values_W = np.concatenate(tilted.values)
    expected_W = np.concatenate([s.number * c for s, c in zip(tilted.strata, tilted.chances, strict=True)])
    came_W = np.concatenate([np.append(s.counts_V, 0.0) for s in tilted.strata])
    possible_W = expected_W > 0.0
    # Strata share values.
    values_W, places_W = np.unique(values_W[possible_W], return_inverse=True)
    expected_W, came_W = (np.bincount(places_W, weights=each[possible_W]) for each in (expected_W, came_W))
    # Of the values up to each: their number, mean, and the standard deviation of their sum.
    number_W = np.cumsum(expected_W)
    mean_W = np.cumsum(expected_W * values_W) / number_W
    spread_W = np.sqrt(np.maximum(0.0, np.cumsum(expected_W * np.square(values_W)) - number_W * np.square(mean_W)))
    # What lost no more than the budget is no jump, however far from all else it lies.
    is_near_W = (values_W[1:] <= 0.0) | (values_W[1:] - mean_W[:-1] < _APART * spread_W[:-1])
    near = np.flatnonzero(is_near_W)
    first = int(near[-1]) + 2 if len(near) else 1
    if first >= len(values_W):
        return 0.0
    num_clusters = sum(stratum.number for stratum in tilted.strata)
    apart_W = values_W >= values_W[first]
    # Strata with chances of their own make few jumps rarer than one with their mean (Hoeffding 1956).
    chance = min(1.0, float(expected_W[apart_W].sum()) / num_clusters)
    return float(bdtr(math.floor(came_W[apart_W].sum() + 1e-9), round(num_clusters), chance))
