"""A model's `scores.json` arrives; its scores leave, each with its 95 % interval: the one place that makes one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keeptune.data.record import ALL_TASKS
from keeptune.report.reading import number, rows, string, whole

# 97.5 % point of the normal distribution: mean ± 1.96 standard errors covers 95 %.
_NORMAL_975 = 1.959964
# exp of more is no finite float.
_LARGEST_EXPONENT = 700.0


@dataclass(frozen=True, slots=True)
class Score:
    """A mean of `metric` over `num_records` records; `standard_error` is that of the mean, clustered by input.

    [`low`, `high`] is the 95 % interval: the mean ± 1.96 standard errors. Perplexity's is the loss's, exponentiated:
    it is not symmetric, and never below 1.
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
        if self.metric == "perplexity" or self.standard_error is None:
            return None
        return _NORMAL_975 * self.standard_error


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
    if mean is None or error is None:
        return None, None
    return mean - _NORMAL_975 * error, mean + _NORMAL_975 * error


def _exponential(value: float | None) -> float | None:
    return None if value is None else math.exp(min(value, _LARGEST_EXPONENT))
