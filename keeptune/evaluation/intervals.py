"""Statistics and how far each cluster of records pulls them arrive; their 95 % intervals leave: the one place for both.

A cluster is what shares an input; alone, each record is one. No interval has zero width: where that would be said, one
with a width follows from the metric's bounds, and without bounds there is none. Shape key: G clusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

CONFIDENCE = 0.95
# exp of more is no finite float.
_LARGEST_EXPONENT = 700.0
# A pull that is this small a part of the scale is nothing but rounding.
_ROUNDING = 1e-9

Bounds = tuple[float, float]
Ends = tuple[float | None, float | None]
NO_INTERVAL: Ends = (None, None)


@dataclass(frozen=True, slots=True)
class Spread:
    """A statistic and how far each cluster pulls it; `sizes_G` are the clusters' numbers of records.

    `pulls_G` are the jackknife's pseudo-values less their mean: of a mean over singleton clusters, each value less the
    mean.
    """

    value: float
    pulls_G: NDArray[np.float64]
    sizes_G: NDArray[np.int64]

    @property
    def num_clusters(self) -> int:
        """The number of clusters."""
        return len(self.pulls_G)

    @property
    def num_records(self) -> int:
        """The number of records."""
        return int(self.sizes_G.sum())

    @property
    def standard_error(self) -> float | None:
        """The delete-one-cluster jackknife standard error; None where one cluster is all.

        Of a mean over singleton clusters it is the standard deviation over the square root of their number.
        """
        num = self.num_clusters
        return None if num < 2 else float(np.sqrt(np.square(self.pulls_G).sum() / (num * (num - 1))))

    @property
    def wide_error(self) -> float:
        """The standard error with two clusters more, one at each end, which pull as far as the farthest does.

        Few records show little of a heavy tail, and of rare changes nothing at all. Bonett and Price add the same two
        records to paired proportions.
        """
        farthest, num = np.abs(self.pulls_G).max(), self.num_clusters
        wide = float(np.sqrt((np.square(self.pulls_G).sum() + 2 * farthest**2) / ((num + 1) * (num + 2))))
        return max(wide, self.standard_error or 0.0)

    def leaning(self, quantile: float) -> tuple[float, float]:
        """Return half the width of an interval, and how far it lies towards the longer tail (Johnson 1978).

        Four clusters more pull as far as the farthest does, three of them its way: what a few records show of a long
        tail is less than what there is.
        """
        farthest = self.pulls_G[np.abs(self.pulls_G).argmax()]
        pulls = np.append(self.pulls_G, farthest * np.array([-1.0, 1.0, 1.0, 1.0]))
        num = len(pulls)
        error = float(np.sqrt(np.square(pulls).sum() / (num * (num - 1))))
        skewness = float((pulls**3).sum()) / (num * error) ** 2
        return quantile * error, skewness * (1 / 6 + quantile**2 / 3) / num

    def effective_number(self, variance: float) -> float:
        """Return how many independent records of this variance would tell as much; of singleton clusters, all.

        Few clusters that differ from the rest say little of how alike the records of a cluster are: one more counts
        beside them, in which all are alike.
        """
        largest_effect = float(np.square(self.sizes_G).sum()) / self.num_records
        if variance <= 0.0 or not self.standard_error:
            return self.num_records / largest_effect
        # Over n singleton clusters the squared error is variance / (n - 1), and the effect is 1.
        effect = max(1.0, self.num_records / (1.0 + variance / self.standard_error**2))
        telling = min(np.count_nonzero(self.pulls_G > 0), np.count_nonzero(self.pulls_G < 0))
        return self.num_records / float((telling * effect + max(effect, largest_effect)) / (telling + 1))

    def less(self, other: Spread) -> Spread:
        """Return the spread of the difference from another statistic of the same clusters."""
        return Spread(self.value - other.value, self.pulls_G - other.pulls_G, self.sizes_G)

    def is_alike(self, scale: float) -> bool:
        """Tell whether all clusters agree, so that their spread says nothing."""
        return bool(np.abs(self.pulls_G).max(initial=0.0) <= _ROUNDING * max(scale, abs(self.value)))


def spread_of(
    sums_GS: NDArray[np.float64],
    combine: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    *,
    sizes_G: NDArray[np.int64],
) -> Spread:
    """Return the spread of a statistic that `combine` makes of sums (..., S), from each cluster's sums."""
    total_S, num = sums_GS.sum(axis=0), len(sums_GS)
    # Of a single cluster nothing would be left.
    left_out_G = combine(total_S - sums_GS) if num > 1 else np.zeros(num)
    return Spread(float(combine(total_S)), (num - 1) * (left_out_G.mean() - left_out_G), sizes_G)


def confidence_of_each(num_intervals: int) -> float:
    """Return the confidence of each of several intervals that all hold with 95 %, so that any may be picked.

    Source: Bonferroni's inequality, which holds however the intervals depend on each other.
    """
    return 1.0 - (1.0 - CONFIDENCE) / max(1, num_intervals)


def difference_bounds(bounds: Bounds) -> Bounds:
    """Return the least and the greatest that the difference of two scores within `bounds` can be."""
    width = bounds[1] - bounds[0]
    return -width, width


def score_interval(spread: Spread, *, bounds: Bounds, binary: bool, confidence: float = CONFIDENCE) -> Ends:
    """Return the interval of a score; `binary`: it is a mean of zeros and ones.

    Between two bounds it is Wilson's with the effective number of records and Student's quantile in place of the normal
    one; of zeros and ones over singleton clusters it is Wilson's. Without an upper bound it is Student's on the log
    scale.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference", JASA 22; Korn and
    Graubard 1998, "Confidence intervals for proportions with small expected number of positive counts estimated from
    survey data", Survey Methodology 24(2), for the effective number and the quantile.
    """
    if spread.num_clusters < 2:
        return NO_INTERVAL
    quantile = _quantile(spread, binary=binary, confidence=confidence)
    if binary:
        number = spread.effective_number(spread.value * (1.0 - spread.value))
        return _wilson(spread.value, number, quantile=quantile)
    if spread.is_alike(_scale(bounds)):
        return _of_alike(spread, bounds=bounds, confidence=confidence)
    return _on_scale(spread.value, spread.wide_error, bounds=bounds, quantile=quantile)


def difference_interval(spread: Spread, *, bounds: Bounds, confidence: float = CONFIDENCE) -> Ends:
    """Return the interval of a paired difference, `bounds` being those of the difference.

    It is Student's, widened and moved towards the longer tail. Where all clusters differ alike there is none without
    bounds.

    Source: Johnson 1978, "Modified t tests and confidence intervals for asymmetrical populations", JASA 73(363).
    """
    if spread.num_clusters < 2:
        return NO_INTERVAL
    if spread.is_alike(_scale(bounds)):
        return _of_alike(spread, bounds=bounds, confidence=confidence)
    half, shift = spread.leaning(_quantile(spread, binary=False, confidence=confidence))
    middle = spread.value + shift
    return max(middle - half, bounds[0]), min(middle + half, bounds[1])


def binary_difference_interval(spread: Spread, *, changed: float, confidence: float = CONFIDENCE) -> Ends:
    """Return the interval of a paired difference of zeros and ones, of which the share `changed` differ.

    Over singleton clusters it is Bonett and Price's: one record more that was gained, and one more that was lost. Else
    the effective number of records stands for their number.

    Source: Bonett and Price 2012, "Adjusted Wald confidence interval for a difference of binomial proportions based on
    paired data", Journal of Educational and Behavioral Statistics 37(4).
    """
    if spread.num_clusters < 2:
        return NO_INTERVAL
    number = spread.effective_number(changed - spread.value**2)
    middle = number * spread.value / (number + 2)
    spread_of_one = (number * changed + 2) / (number + 2) - middle**2
    half = _quantile(spread, binary=True, confidence=confidence) * math.sqrt(spread_of_one / (number + 2))
    return max(middle - half, -1.0), min(middle + half, 1.0)


def mean_of_tasks(
    values: Sequence[float], errors: Sequence[float | None], ends: Sequence[Ends], *, bounds: Bounds
) -> Ends:
    """Return the interval of the mean of independent scores from their errors and intervals; None where one has none.

    A score's error is at least what half of its interval stands for: a task that is all right has an error of 0, and
    still leaves doubt.
    """
    normal, squares = float(ndtri((1 + CONFIDENCE) / 2)), []
    for error, (low, high) in zip(errors, ends, strict=True):
        if error is None or low is None or high is None:
            return NO_INTERVAL
        squares.append(max(error, (high - low) / 2 / normal) ** 2)
    mean, half = float(np.mean(values)), normal * math.sqrt(math.fsum(squares)) / len(values)
    return max(mean - half, bounds[0]), min(mean + half, bounds[1])


def mean_of_draws(
    values: Sequence[float],
    errors: Sequence[float | None],
    *,
    bounds: Bounds,
    num_clusters: int,
    confidence: float = CONFIDENCE,
) -> Ends:
    """Return the interval of a mean over draws of examples, each of which answers the same records.

    Its variance is that between draws over their number, and a single draw's over the records. Degrees of freedom are
    Satterthwaite's. A single draw says nothing of the others: the interval is then over the records alone.

    Source: Satterthwaite 1946, "An approximate distribution of estimates of variance components", Biometrics
    Bulletin 2(6).
    """
    num, known = len(values), [error for error in errors if error is not None]
    if len(known) < num or num_clusters < 2:
        return NO_INTERVAL
    between = float(np.var(values, ddof=1)) / num if num > 1 else 0.0
    within = float(np.mean(np.square(known)))
    if between + within == 0.0:
        return NO_INTERVAL
    freedom = (between + within) ** 2 / (between**2 / max(1, num - 1) + within**2 / (num_clusters - 1))
    quantile = float(stdtrit(freedom, (1 + confidence) / 2))
    return _on_scale(float(np.mean(values)), math.sqrt(between + within), bounds=bounds, quantile=quantile)


def exponential(ends: Ends) -> Ends:
    """Return an interval's ends, exponentiated: of a loss, perplexity's."""
    low, high = ends
    return NO_INTERVAL if low is None or high is None else (_exp(low), _exp(high))


def _quantile(spread: Spread, *, binary: bool, confidence: float) -> float:
    """Return Student's quantile with a cluster less than there are; of zeros and ones the normal one, as much wider.

    The spread of zeros and ones follows from their mean: only that of clusters has to be estimated.
    """
    level, num = (1 + confidence) / 2, spread.num_clusters
    student = float(stdtrit(num - 1, level))
    return float(ndtri(level)) * student / float(stdtrit(spread.num_records - 1, level)) if binary else student


def _on_scale(value: float, error: float, *, bounds: Bounds, quantile: float) -> tuple[float, float]:
    """Return the ends about a value within bounds: Wilson's between two, above 0 Student's on the log scale."""
    lowest, highest = bounds
    if math.isfinite(highest):
        width = highest - lowest
        share = min(max((value - lowest) / width, 0.0), 1.0)
        low, high = _wilson(share, 1.0 + share * (1.0 - share) / (error / width) ** 2, quantile=quantile)
        return lowest + width * low, lowest + width * high
    if lowest < 0.0 or value <= 0.0:
        return max(value - quantile * error, lowest), value + quantile * error
    factor = _exp(quantile * error / value)
    return max(value / factor, lowest), value * factor


def _wilson(share: float, number: float, *, quantile: float) -> tuple[float, float]:
    excess = quantile**2 / number
    middle = (share + excess / 2) / (1 + excess)
    half = math.sqrt(excess * (share * (1 - share) + excess / 4)) / (1 + excess)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _of_alike(spread: Spread, *, bounds: Bounds, confidence: float) -> Ends:
    """Return the interval where all clusters agree; none without an upper bound.

    No record differs, so Wilson's upper end for none bounds the share that may, and these may lie at either bound. Of
    records that are all right, or all wrong, this is Wilson's interval.
    """
    if not math.isfinite(bounds[1]):
        return NO_INTERVAL
    quantile = _quantile(spread, binary=True, confidence=confidence)
    (_, share), value = _wilson(0.0, spread.effective_number(0.0), quantile=quantile), spread.value
    return value - (value - bounds[0]) * share, value + (bounds[1] - value) * share


def _scale(bounds: Bounds) -> float:
    return bounds[1] - bounds[0] if math.isfinite(bounds[1]) else 1.0


def _exp(value: float) -> float:
    return math.exp(min(value, _LARGEST_EXPONENT))
