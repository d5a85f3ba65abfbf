"""A model's `scores.json` arrives; its scores leave, each with its 95 % interval: the one place that makes one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keeptune.data.record import ALL_TASKS
from keeptune.evaluation.metrics import METRICS
from keeptune.progress import noun
from keeptune.report.reading import number, rows, string, whole

# 97.5 % point of the normal distribution: mean ± 1.96 standard errors covers 95 %.
_NORMAL_975 = 1.959964
# The least and the greatest that a metric can be; no interval reaches beyond.
BOUNDS = {
    **{name: (0.0, metric.scale) for name, metric in METRICS.items() if metric.higher_is_better},
    "loss": (0.0, math.inf),
}
# exp of more is no finite float.
_LARGEST_EXPONENT = 700.0


@dataclass(frozen=True, slots=True)
class Score:
    """A mean of `metric` over `num_records` records; `standard_error` is that of the mean, clustered by input.

    [`low`, `high`] is the 95 % interval: the mean ± 1.96 standard errors, cut where the metric cannot reach.
    Perplexity's is the loss's, exponentiated: it is not symmetric, and never below 1.
    """

    model: str
    shots: int
    task: str
    metric: str
    mean: float | None
    standard_error: float | None
    low: float | None
    high: float | None
    num_records: int | None
    num_clusters: int | None

    @property
    def half_width(self) -> float | None:
        """Half the width of the 95 % interval, None without one and where it is not symmetric."""
        if self.metric == "perplexity" or self.standard_error is None or self.mean is None:
            return None
        half = _NORMAL_975 * self.standard_error
        return half if (self.low, self.high) == (self.mean - half, self.mean + half) else None

    @property
    def agreement(self) -> str:
        """What can be said where all records have one value, and the interval has no width; else empty.

        Source: the rule of three; Hanley & Lippman-Hand 1983, JAMA 249(13), "If nothing goes wrong, is everything all
        right?".
        """
        number, bounds = self.num_clusters or self.num_records, BOUNDS.get(self.metric)
        if self.low is None or self.low != self.high or not number or bounds is None:
            return ""
        all_agree = f"all {self.num_records or number:,}{self.in_clusters} agree"
        share = min(1.0, 3 / number) * bounds[1]
        if self.mean == bounds[1]:
            return f"{all_agree}; true mean above {bounds[1] - share:.3g}"
        if self.mean == bounds[0] and math.isfinite(share):
            return f"{all_agree}; true mean below {share:.3g}"
        return all_agree

    @property
    def in_clusters(self) -> str:
        """Where records share inputs, in how many clusters they are, with a space before it; else empty."""
        if self.num_clusters in (None, self.num_records):
            return ""
        return f" in {self.num_clusters:,} {noun(self.num_clusters, 'clusters')}"


def read_scores(value: Mapping[str, Any]) -> tuple[Score, ...]:
    """Return the scores that a `scores.json` holds."""
    found = rows(value.get("scores"))
    losses = {_key(row): _interval(row) for row in found if row.get("metric") == "loss"}
    scores = []
    for row in found:
        low, high = _interval(row)
        if row.get("metric") == "perplexity":
            low, high = (_exponential(end) for end in losses.get(_key(row), (None, None)))
        scores.append(
            Score(
                model=string(row.get("model")) or string(value.get("model")) or "?",
                shots=whole(row.get("shots")) or 0,
                task=string(row.get("task")) or ALL_TASKS,
                metric=string(row.get("metric")) or "?",
                mean=number(row.get("mean")),
                standard_error=number(row.get("standard_error")),
                low=low,
                high=high,
                num_records=whole(row.get("num_records")),
                num_clusters=whole(row.get("num_clusters")),
            )
        )
    return tuple(scores)


def _key(row: Mapping[str, Any]) -> tuple[str | None, int | None, str | None]:
    return string(row.get("model")), whole(row.get("shots")), string(row.get("task"))


def _interval(row: Mapping[str, Any]) -> tuple[float | None, float | None]:
    mean, error = number(row.get("mean")), number(row.get("standard_error"))
    return interval_of(mean, error, metric=string(row.get("metric")) or "")


def interval_of(mean: float | None, error: float | None, *, metric: str) -> tuple[float | None, float | None]:
    """Return the ends of a mean's 95 % interval, from its standard error; None without one."""
    if mean is None or error is None:
        return None, None
    least, greatest = BOUNDS.get(metric, (-math.inf, math.inf))
    return max(mean - _NORMAL_975 * error, least), min(mean + _NORMAL_975 * error, greatest)


def _exponential(value: float | None) -> float | None:
    return None if value is None else math.exp(min(value, _LARGEST_EXPONENT))
