"""P-values and bounds of what records lost: is the mean forgetting the budget or more?

To reject is to certify. Inside, forgetting is in units of the drops' scale. Shape key: R records, G clusters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtri

from keeptune.retention.drops import Drops
from keeptune.retention.tilted import SMALLEST_P, Stratum, lower_tail, tilt

POWER = 0.8
# A stratum of fewer clusters knows too little of its own spread.
_LEAST_STRATUM = 20
# Of bounds, as shares of the scale.
_PRECISION = 1e-7
_ALMOST_ONE = 1.0 - 1e-9
# Differences of values below this are those of rounding.
_DIGITS = 12


@dataclass(frozen=True, slots=True)
class PValue:
    """The one-sided p-value of "the mean forgetting is the budget or more" for one suite.

    `mean` and `standard_error` are those of forgetting over records, in the metric's units, clustered; the error is
    None where one cluster is all.
    """

    p: float
    mean: float
    standard_error: float | None
    num_records: int
    num_clusters: int
    num_changed: int


@dataclass(frozen=True, slots=True)
class _Clusters:
    """What each cluster lost in sum, in units of the scale, its number of records, and the stratum that it is of.

    `largest_G` is the most records that a cluster of its kind is known to have.
    """

    sums_G: NDArray[np.float64]
    sizes_G: NDArray[np.float64]
    strata_G: NDArray[np.int64]
    largest_G: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """The mean over records: a ratio of sums over clusters."""
        return float(self.sums_G.sum() / self.sizes_G.sum())

    @property
    def standard_error(self) -> float:
        """The cluster-robust error of that ratio; 0 of a single cluster.

        The ratio's first-order change by cluster g is (S_g - mean n_g) / N, and these sum to 0: the variance is G / (G
        - 1) times the sum of their squares. For clusters of one record that is the sample variance over n.
        """
        num_clusters = len(self.sums_G)
        residuals_G = (self.sums_G - self.mean * self.sizes_G) / self.sizes_G.sum()
        return math.sqrt(num_clusters / max(1, num_clusters - 1) * float(np.square(residuals_G).sum()))

    def beyond(self, budget: float) -> list[Stratum]:
        """Return what the clusters of each stratum lost beyond the budget: S_g - budget n_g.

        The mean over records is the budget where these are 0 in expectation. At worst a cluster as large as the largest
        known of its stratum loses all.
        """
        return [*self._strata(budget)]

    def _strata(self, budget: float) -> Iterator[Stratum]:
        for stratum in range(int(self.strata_G.max()) + 1):
            own_G = self.strata_G == stratum
            lost_G = np.round(self.sums_G[own_G] - budget * self.sizes_G[own_G], _DIGITS)
            values_V, counts_V = np.unique(lost_G, return_counts=True)
            yield Stratum(values_V, counts_V.astype(np.float64), (1.0 - budget) * float(self.largest_G[own_G].max()))


def p_value(drops: Drops, *, budget: float) -> PValue:
    """Return the p-value of "the mean forgetting over records is `budget` or more", in the metric's units.

    It serves values up to the scale, of any skew, with few changes and with many: in simulation
    (`benchmarks/certificate_null.py`) its error is near the level or below it, and no theorem bounds it. It takes the
    mix of strata as fixed, and no cluster to be larger than the largest one that is known of its stratum.
    """
    clusters = _clusters(drops)
    return PValue(
        p=_p(clusters, budget=budget / drops.scale),
        mean=clusters.mean * drops.scale,
        standard_error=clusters.standard_error * drops.scale if len(clusters.sums_G) > 1 else None,
        num_records=drops.num_records,
        num_clusters=len(clusters.sums_G),
        num_changed=drops.num_changed,
    )


def upper_bound(drops: Drops, *, delta: float) -> float:
    """Return the smallest budget that the same test would certify at `delta`; infinity where it certifies none."""
    clusters, wanted = _clusters(drops), float(ndtri(delta))

    def missing(budget: float) -> float:
        # Nearly a straight line in the budget.
        return float(ndtri(min(_p(clusters, budget=budget), _ALMOST_ONE))) - wanted

    low, high = clusters.mean, 1.0 - _PRECISION
    if missing(high) > 0.0:
        return math.inf
    return drops.scale * (brentq(missing, low, high, xtol=_PRECISION) + _PRECISION)  # pyright: ignore


def records_needed(drops: Drops, *, budget: float, delta: float) -> int | None:
    """Return about how many records would certify the budget with a chance of 80 %, if they behave as those measured.

    None where no number would: the measured mean is the budget or more.
    """
    clusters, budget = _clusters(drops), budget / drops.scale
    strata = clusters.beyond(budget)
    if sum(stratum.total for stratum in strata) > -_PRECISION * len(clusters.sums_G):
        return None
    # The sum of n records is as far below 0 as is needed where n (budget - mean) is z_{1-delta} of its standard
    # deviations if nothing more than the budget is lost, and z_{0.8} of those that were measured.
    num_records = float(clusters.sizes_G.sum())
    needed = float(ndtri(1.0 - delta)) * math.sqrt(tilt(strata).variance)
    needed += float(ndtri(POWER)) * clusters.standard_error * num_records
    factor = (needed / (num_records * (budget - clusters.mean))) ** 2
    while lower_tail([stratum.grown(factor) for stratum in strata], offset=budget) > max(delta, 2.0 * SMALLEST_P):
        factor *= 1.02
    return math.ceil(factor * num_records)


def records_needed_for_any_verdict(*, budget: float, delta: float, scale: float = 1.0) -> int:
    """Return the least number of records with which even a model that changed nothing would be certified.

    No valid test does with fewer: of a model that loses all in a share `budget` of records, n records show nothing with
    a chance of (1 - budget)^n.
    """
    return math.ceil(math.log(delta) / math.log1p(-budget / scale))


def _p(clusters: _Clusters, *, budget: float) -> float:
    return lower_tail(clusters.beyond(budget), offset=budget)


def _clusters(drops: Drops) -> _Clusters:
    values_R = drops.values_R / drops.scale
    assert np.abs(values_R).max() <= 1.0 + 1e-9, "a record counts its scale at most"
    _, first_G, labels_R = np.unique(drops.clusters_R, return_index=True, return_inverse=True)
    sizes_G = np.bincount(labels_R).astype(np.float64)
    sums_G = np.zeros(len(sizes_G))
    np.add.at(sums_G, labels_R, values_R)
    strata_G = np.zeros_like(first_G) if drops.strata_R is None else drops.strata_R[first_G]
    largest_G = sizes_G if drops.largest_R is None else np.maximum(sizes_G, drops.largest_R[first_G])
    return _Clusters(sums_G, sizes_G, _large_enough(strata_G), largest_G)


def _large_enough(strata_G: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return strata numbered from 0, small ones put together until each has enough clusters, if all together have."""
    names, labels_G, numbers = np.unique(strata_G, return_inverse=True, return_counts=True)
    number_of = np.zeros(len(names), dtype=np.int64)
    order = np.argsort(numbers, kind="stable")
    stratum, filled, left = 0, 0, int(numbers.sum())
    for name in order:
        # What would be left over as a small stratum stays in this one.
        if filled >= _LEAST_STRATUM and left >= _LEAST_STRATUM:
            stratum, filled = stratum + 1, 0
        number_of[name] = stratum
        filled, left = filled + int(numbers[name]), left - int(numbers[name])
    return number_of[labels_G]
