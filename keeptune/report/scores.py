"""A model's `scores.json` arrives; its scores leave, each with its 95 % interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keeptune.data.record import ALL_TASKS
from keeptune.progress import noun
from keeptune.report.reading import finite, number, rows, string, whole


@dataclass(frozen=True, slots=True)
class Score:
    """A score in `metric` over `num_records` records; `standard_error` is clustered by input.

    [`low`, `high`] is the 95 % interval (`keeptune.evaluation.intervals`), about most scores not symmetric.
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
    def in_clusters(self) -> str:
        """Where records share inputs, in how many clusters they are, with a space before it; else empty."""
        if self.num_clusters in (None, self.num_records):
            return ""
        return f" in {self.num_clusters:,} {noun(self.num_clusters, 'clusters')}"


def read_scores(value: Mapping[str, Any]) -> tuple[Score, ...]:
    """Return the scores that a `scores.json` holds."""
    return tuple(
        Score(
            model=string(row.get("model")) or string(value.get("model")) or "?",
            shots=whole(row.get("shots")) or 0,
            task=string(row.get("task")) or ALL_TASKS,
            metric=string(row.get("metric")) or "?",
            mean=number(row.get("mean")),
            standard_error=number(row.get("standard_error")),
            low=finite(row.get("low")),
            high=finite(row.get("high")),
            num_records=whole(row.get("num_records")),
            num_clusters=whole(row.get("num_clusters")),
        )
        for row in rows(value.get("scores"))
    )
