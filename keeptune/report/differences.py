"""Paired differences of `paired.json` arrive; they leave as rows, and those from several draws of examples as one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from keeptune.data.record import ALL_TASKS
from keeptune.evaluation.intervals import NO_INTERVAL, confidence_of_each, difference_bounds, mean_of_draws
from keeptune.evaluation.metrics import metric_of
from keeptune.report.reading import finite, number, rows, string, whole


@dataclass(frozen=True, slots=True)
class Paired:
    """`model` − `against`, paired by record, with its standard error and 95 % interval [low, high].

    `better` and `worse` count records; None where `against` is a mean over several draws of examples.
    """

    model: str
    against: str
    task: str
    metric: str
    difference: float | None
    low: float | None
    high: float | None
    better: int | None
    worse: int | None
    standard_error: float | None = None
    num_clusters: int | None = None

    def verdict(self, *, higher_is_better: bool) -> str:
        """Return "better" or "worse" where the interval excludes 0, "same" where no record differs, else "unclear"."""
        if self.better == 0 == self.worse:
            return "same"
        if self.low is None or self.high is None or not (self.low > 0 or self.high < 0):
            return "unclear"
        return "better" if (self.low > 0) == higher_is_better else "worse"


def read_paired(value: Mapping[str, Any], *, base: str) -> Iterator[Paired]:
    """Yield the differences that `paired.json` holds; those that name no other model are from `base`."""
    for row in rows(value.get("paired")):
        yield Paired(
            model=string(row.get("model")) or "?",
            against=string(row.get("against")) or base,
            task=string(row.get("task")) or ALL_TASKS,
            metric=string(row.get("metric")) or "?",
            difference=number(row.get("difference")),
            low=finite(row.get("low")),
            high=finite(row.get("high")),
            better=whole(row.get("better")),
            worse=whole(row.get("worse")),
            standard_error=finite(row.get("standard_error")),
            num_clusters=whole(row.get("num_clusters")),
        )


def mean_difference(pairs: Sequence[Paired], *, against: str, num_picked_from: int) -> Paired | None:
    """Return a model's difference from a mean over draws of examples, from that from each; None where one is unknown.

    `against` names the mean, which is the best of `num_picked_from`: the interval holds whichever is picked.
    """
    known = [pair.difference for pair in pairs if pair.difference is not None and math.isfinite(pair.difference)]
    if not pairs or len(known) < len(pairs):
        return None
    single, first = len(pairs) == 1, pairs[0]
    if all(pair.better == 0 == pair.worse for pair in pairs) or (single and num_picked_from == 1):
        return replace(first, against=against)
    ends = mean_of_draws(
        known,
        [pair.standard_error for pair in pairs],
        bounds=difference_bounds(metric_of(first.metric).bounds),
        num_clusters=first.num_clusters or 0,
        confidence=confidence_of_each(num_picked_from),
    )
    low, high = (first.low, first.high) if ends == NO_INTERVAL else ends
    counts = {} if single else {"better": None, "worse": None}
    return replace(first, against=against, difference=math.fsum(known) / len(known), low=low, high=high, **counts)
