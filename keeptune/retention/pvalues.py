"""What records lost and a budget arrive; a p-value for "the mean forgetting is the budget or more" and bounds leave.

To reject is to certify. Inside, forgetting is in units of the drops' scale. Shape key: R records, G clusters.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtr, stdtrit

from keeptune.retention.drops import Drops

# From this many changed clusters on, the mean's distribution is near enough to Student's; betting holds for any number.
NUM_CHANGED_FOR_T = 20
POWER = 0.8
_SEED = 20_240_601
# The largest share of the capital that one cluster can lose.
_LARGEST_STAKE = 0.75
# exp(-3) = 0.05: a change that strikes a share 3/n of all records stays unseen among n with a chance of 5 %.
_UNSEEN_CHANGES = 3.0
_NUM_HALVINGS = 24


@dataclass(frozen=True, slots=True)
class PValue:
    """The one-sided p-value of "the mean forgetting is the budget or more" for one suite.

    `mean` and `standard_error` are those of forgetting over records, in the metric's units, clustered; the error is
    None where one cluster is all.
    """

    p: float
    test: Literal["clustered t", "betting"]
    mean: float
    standard_error: float | None
    num_records: int
    num_clusters: int
    num_changed: int


@dataclass(frozen=True, slots=True)
class _Clusters:
    """What each cluster lost in sum, in units of the scale, and its number of records, in the order of betting."""

    sums_G: NDArray[np.float64]
    sizes_G: NDArray[np.float64]
    changed_G: NDArray[np.bool_]

    @property
    def test(self) -> Literal["clustered t", "betting"]:
        """The test in force: changes of one cluster are one observation, however many its records are."""
        return "clustered t" if np.count_nonzero(self.changed_G) >= NUM_CHANGED_FOR_T else "betting"

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

    @property
    def least_error(self) -> float:
        """The error that changes not seen yet could hide, below which no observed one is believed.

        A change strikes a share q of the clusters; a struck one moves its n_g records by 1 at most, so the variance of
        the mean is at most q sum(n_g^2) / N^2. With q = 3/G, the share that G clusters can still hide, and clusters
        of one record, it is 3/n^2: a standard deviation of sqrt(3/n) a record.
        """
        share = _UNSEEN_CHANGES / len(self.sizes_G)
        return math.sqrt(share * float(np.square(self.sizes_G).sum())) / float(self.sizes_G.sum())

    def resized(self, num_clusters: int) -> _Clusters:
        """Return that many clusters, these ones over and over: what more draws would be like."""
        again_G = np.resize(np.arange(len(self.sums_G)), num_clusters)
        return _Clusters(self.sums_G[again_G], self.sizes_G[again_G], self.changed_G[again_G])


def p_value(drops: Drops, *, budget: float, delta: float) -> PValue:
    """Return the p-value of "the mean forgetting over records is `budget` or more", in the metric's units.

    With 20 changed clusters or more it is Student's; with fewer, that of betting, which tunes its stakes for a
    rejection at `delta`. Student's is an approximation: where the true mean equals the budget it errs in up to 6 to 7
    % of cases at a nominal 5 % if only a few dozen clusters changed.
    """
    clusters = _clusters(drops)
    return PValue(
        p=_p(clusters, budget=budget / drops.scale, delta=delta),
        test=clusters.test,
        mean=clusters.mean * drops.scale,
        standard_error=clusters.standard_error * drops.scale if len(clusters.sums_G) > 1 else None,
        num_records=drops.num_records,
        num_clusters=len(clusters.sums_G),
        num_changed=drops.num_changed,
    )


def upper_bound(drops: Drops, *, delta: float) -> float:
    """Return the smallest budget that the same test would certify at `delta`; infinity where it certifies none."""
    clusters = _clusters(drops)
    if clusters.test == "clustered t":
        quantile = float(stdtrit(len(clusters.sums_G) - 1, 1.0 - delta))
        return drops.scale * (clusters.mean + quantile * max(clusters.standard_error, clusters.least_error))
    low, high = -1.0, 1.0 - 2.0**-_NUM_HALVINGS
    if _p(clusters, budget=high, delta=delta) > delta:
        return math.inf
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        if _p(clusters, budget=middle, delta=delta) <= delta:
            high = middle
        else:
            low = middle
    return drops.scale * high


def betting_p(
    values_G: NDArray[np.float64], *, budget: float, delta: float, weights_G: NDArray[np.float64] | None = None
) -> float:
    """Return the p-value of "the weighted mean of independent values is `budget` or more"; values lie in [-1, 1].

    Each cluster in turn is bet on to lose less than the budget. Where the mean is the budget or more, every fair bet
    loses in expectation, so the capital exceeds 1/p with a chance of p at most. A stake may depend on earlier clusters
    only, and never exceeds 3/4 of what would ruin: capital stays positive because no value exceeds 1. Gains beyond -1
    are counted as -1, which can only raise the mean; a value above 1 refutes what the bet relies on, and p is 1.
    `weights_G` are cluster sizes over the largest: they make it a bet on the mean over records.

    Source: Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting" (arXiv 2010.09686),
    section 4; its use for Learn-then-Test: Angelopoulos et al. 2021 (arXiv 2110.01052).
    """
    assert budget < 1.0, "nothing is to be shown where all may be lost"
    if values_G.max() > 1.0:
        return 1.0
    num_clusters = len(values_G)
    x_G, threshold = (np.maximum(values_G, -1.0) + 1.0) / 2.0, (1.0 + budget) / 2.0
    seen_G = np.arange(1, num_clusters + 1)
    mean_G = (0.5 + np.cumsum(x_G)) / (seen_G + 1)
    variance_G = (0.25 + np.cumsum(np.square(x_G - mean_G))) / (seen_G + 1)
    before_G = np.concatenate([[0.25], variance_G[:-1]])
    stake_G = np.sqrt(2.0 * math.log(1.0 / delta) / (num_clusters * before_G))
    stake_G = np.minimum(stake_G, _LARGEST_STAKE / (1.0 - threshold))
    wins_G = stake_G * (threshold - x_G) * (1.0 if weights_G is None else weights_G)
    return min(1.0, math.exp(-float(np.cumsum(np.log1p(wins_G)).max())))


def records_needed(drops: Drops, *, budget: float, delta: float) -> int | None:
    """Return about how many records would certify the budget with a chance of 80 %, if they behave as those measured.

    None where no number would: the measured mean is the budget or more.
    """
    clusters, budget = _clusters(drops), budget / drops.scale
    if clusters.mean >= budget:
        return None
    # Student's test has that power where (budget - mean) / error = z_{1-delta} + z_{0.8}. The error falls with the
    # square root of the number of records, the least one (see above) with the number itself.
    z_values = float(ndtri(1.0 - delta) + ndtri(POWER)) / (budget - clusters.mean)
    factor = max((z_values * clusters.standard_error) ** 2, z_values * clusters.least_error)
    grown = clusters
    # Betting needs more, until enough clusters have changed for Student's test.
    while grown.test == "betting" and _p(grown, budget=budget, delta=delta) > delta:
        grown = clusters.resized(math.ceil(1.05 * len(grown.sums_G)))
    if clusters.test == "betting":
        factor = max(factor, len(grown.sums_G) / len(clusters.sums_G))
    return math.ceil(factor * drops.num_records)


def records_needed_for_any_verdict(*, budget: float, delta: float, scale: float = 1.0) -> int:
    """Return the least number of records with which even a model that changed nothing would be certified."""

    @functools.cache
    def certifies(num_records: int) -> bool:
        unchanged = Drops(np.zeros(num_records), np.arange(num_records), scale)
        return p_value(unchanged, budget=budget, delta=delta).p <= delta

    enough = 1
    while not certifies(enough):
        enough *= 2
    too_few = enough // 2
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if certifies(middle) else (middle, enough)
    return enough


def _clusters(drops: Drops) -> _Clusters:
    labels_R = np.unique(drops.clusters_R, return_inverse=True)[1]
    sizes_G = np.bincount(labels_R).astype(np.float64)
    # Betting stops at its luckiest moment: the order must not depend on what was lost.
    order_G = np.random.Generator(np.random.Philox(_SEED)).permutation(len(sizes_G))
    sums_G = np.zeros(len(sizes_G))
    np.add.at(sums_G, labels_R, drops.values_R / drops.scale)
    changed_G = np.bincount(labels_R[drops.values_R != 0], minlength=len(sizes_G)) > 0
    return _Clusters(sums_G[order_G], sizes_G[order_G], changed_G[order_G])


def _p(clusters: _Clusters, *, budget: float, delta: float) -> float:
    if clusters.test == "clustered t":
        error = max(clusters.standard_error, clusters.least_error)
        return float(stdtr(len(clusters.sums_G) - 1, (clusters.mean - budget) / error))
    return betting_p(
        clusters.sums_G / clusters.sizes_G,
        budget=budget,
        delta=delta,
        weights_G=clusters.sizes_G / clusters.sizes_G.max(),
    )
