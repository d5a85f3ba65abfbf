"""Two models' answers to the same records arrive; what each record lost leaves, in the metric's own units.

Shape key: R records, G clusters.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from keeptune.errors import DataError
from keeptune.evaluation.metrics import Answer, metric_of

_ROUNDING = 1.0 + 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class Drops:
    """What each record of one suite lost, in the metric's units (nats for the loss); positive = lost.

    Records with the same number in `clusters_R` are not independent. `strata_R` numbers the kinds of records, such as
    tasks, whose mix is taken as fixed (None: all are of one kind); a cluster is of the kind of its first record. No
    record loses or gains more than `scale`. `largest_R` is the most records that a cluster of a record's kind is known
    to have, here or elsewhere (None: here).
    """

    values_R: NDArray[np.float64]
    clusters_R: NDArray[np.int64]
    scale: float = 1.0
    strata_R: NDArray[np.int64] | None = None
    largest_R: NDArray[np.int64] | None = None

    @property
    def num_records(self) -> int:
        """The number of records."""
        return len(self.values_R)

    @property
    def num_changed(self) -> int:
        """The number of records whose own value moved."""
        return int(np.count_nonzero(self.values_R))

    @property
    def num_lost(self) -> int:
        """The number of records that the tuned model is worse at."""
        return int(np.count_nonzero(self.values_R > 0))

    @property
    def num_gained(self) -> int:
        """The number of records that the tuned model is better at."""
        return int(np.count_nonzero(self.values_R < 0))


def paired_drops(
    base: Sequence[Answer],
    tuned: Sequence[Answer],
    *,
    metric: str,
    scale: float,
    suite: str,
    largest: Mapping[str, int] = MappingProxyType({}),
) -> Drops:
    """Return what `tuned` lost against `base` in each record's own value of `metric`.

    `largest` is the most records of one input that each task is known to have elsewhere. What a record lost or gained
    beyond `scale` counts as `scale`. Of the loss it is nats per token of that record, of BLEU and chrF the record's own
    score: their mean weighs every record alike, and is not the difference of the two corpus scores.

    Raises:
        DataError: there is no record, a record has no finite value or one that is larger than its metric's scale, or
            the two do not answer the same records in the same order.
    """
    require_same_records(base, tuned, suite=suite)
    sign = 1.0 if metric_of(metric).higher_is_better else -1.0
    before_R, after_R = (np.array([a.metrics.get(metric, math.nan) for a in side]) for side in (base, tuned))
    unknown_R = ~(np.isfinite(before_R) & np.isfinite(after_R))
    if unknown_R.any():
        first = base[int(np.argmax(unknown_R))]
        raise DataError(
            f"{suite}: found {np.count_nonzero(unknown_R):,} of {len(base):,} records without a finite {metric} of "
            f"base or tuned model, the first of them {first.id}; expected one of each. Evaluate both again."
        )
    # -0.0 would print as a loss of "-0".
    values_R = sign * (before_R - after_R) + 0.0
    if metric != "loss" and np.abs(values_R).max() > scale * _ROUNDING:
        raise DataError(
            f"{suite}: found {metric} that changes by {np.abs(values_R).max():.3g}; expected at most {scale:g}, as "
            "points are hundredths of a score between 0 and that. Name another suite, or another metric."
        )
    values_R = np.clip(values_R, -scale, scale)
    # Numbered in the order of their names, so that the order of records decides nothing.
    clusters_R = np.unique([answer.cluster for answer in base], return_inverse=True)[1]
    strata_R = np.unique([answer.task for answer in base], return_inverse=True)[1]
    largest_R = np.array([largest.get(answer.task, 1) for answer in base])
    return Drops(values_R, clusters_R.astype(np.int64), scale, strata_R.astype(np.int64), largest_R)


def largest_inputs(answers: Iterable[Answer]) -> dict[str, int]:
    """Return by task how many records the input with the most of them has."""
    found: dict[str, int] = {}
    for (task, _), number in Counter((answer.task, answer.cluster) for answer in answers).items():
        found[task] = max(found.get(task, 0), number)
    return found


def require_same_records(base: Sequence[Answer], tuned: Sequence[Answer], *, suite: str) -> None:
    """Return when both answer the same records in the same order.

    Raises:
        DataError: they do not, or there is none.
    """
    if not base:
        raise DataError(
            f"{suite}: found no record; expected some to measure forgetting on. Give the suite more records."
        )
    if [(b.task, b.id) for b in base] != [(t.task, t.id) for t in tuned]:
        raise DataError(
            f"{suite}: found answers of the base and of the tuned model to different records ({len(base)} and "
            f"{len(tuned)}); expected the same ones in the same order. Evaluate both again."
        )


def metric_scale(metric: str) -> float:
    """Return the largest value that a metric takes: 100 of BLEU and chrF, else 1; of a loss there is none, and 1."""
    return metric_of(metric).scale
