"""Answers of the base and of the tuned model to the same records arrive; what each task kept and lost leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from keeptune.data.record import ALL_TASKS
from keeptune.evaluation.intervals import confidence_of_each
from keeptune.evaluation.metrics import Answer, metric_of
from keeptune.evaluation.scores import Paired, Score, paired_differences, score_answers
from keeptune.retention.chance import Chance, chance_of
from keeptune.retention.drops import require_same_records


@dataclass(frozen=True, slots=True)
class TaskRetention:
    """What one task forgot in one metric: base - tuned, turned so that positive = lost, in the metric's units.

    `standard_error` is clustered by input and [`low`, `high`] is the 95 % interval; None where one cluster is all.
    [`worst_low`, `worst_high`] is wider: it holds for whichever of `num_suites` is picked. `num_lost` and `num_gained`
    count the records whose own value fell or rose. `retention` is (tuned - chance) / (base - chance), None where the
    base is not clearly above chance and of losses.
    """

    task: str
    metric: str
    num_records: int
    num_clusters: int
    base: float
    tuned: float
    forgetting: float
    standard_error: float | None
    low: float | None
    high: float | None
    worst_low: float | None
    worst_high: float | None
    num_suites: int
    num_lost: int
    num_gained: int
    chance: float
    base_at_chance: bool
    retention: float | None


@dataclass(frozen=True, slots=True)
class Retention:
    """Every task's retention, that of their records together under the name "all", and the task that forgot most.

    `mean_forgetting` is the mean over tasks, each counting alike.
    """

    tasks: tuple[TaskRetention, ...]
    together: TaskRetention
    mean_forgetting: float
    worst: TaskRetention


def measure_retention(
    base: Sequence[Answer],
    tuned: Sequence[Answer],
    *,
    metric: str,
    least_chance: float = 0.0,
    num_suites: int | None = None,
) -> Retention:
    """Return what each task lost in `metric` from `base` to `tuned`, in the order in which tasks come first.

    Chance is what `chance_of` says; `least_chance` is what guessing scores. The worst is picked from `num_suites`, all
    tasks where that is not given.

    Raises:
        DataError: there is no record, or the two do not answer the same records in the same order.
    """
    require_same_records(base, tuned, suite="retention")
    sign = 1.0 if metric_of(metric).higher_is_better else -1.0
    means = _by_task(score_answers(base, metrics=[metric]))
    tuned_means = _by_task(score_answers(tuned, metrics=[metric]))
    num_suites = num_suites or len(means) - 1
    how = {"metrics": [metric], "model": "tuned", "against": "base"}
    paired = _by_task(paired_differences(tuned, base, **how))
    picked = _by_task(paired_differences(tuned, base, **how, confidence=confidence_of_each(num_suites)))
    tasks = []
    for task, score in means.items():
        own = [answer for answer in base if task in (answer.task, ALL_TASKS)]
        chance = chance_of(own, metric=metric, least=least_chance)
        low, high = _forgetting_interval(paired[task], sign=sign)
        worst_low, worst_high = _forgetting_interval(picked[task], sign=sign)
        tasks.append(
            TaskRetention(
                task=task,
                metric=metric,
                num_records=score.num_records,
                num_clusters=score.num_clusters,
                base=score.mean,
                tuned=tuned_means[task].mean,
                forgetting=-sign * paired[task].difference + 0.0,
                standard_error=paired[task].standard_error,
                low=low,
                high=high,
                worst_low=worst_low,
                worst_high=worst_high,
                num_suites=num_suites,
                num_lost=paired[task].worse,
                num_gained=paired[task].better,
                chance=chance.level,
                base_at_chance=not chance.above,
                retention=_share_kept(tuned_means[task].mean, chance),
            )
        )
    *single, together = tasks
    worst = max(single, key=lambda task: task.forgetting)
    return Retention(tuple(single), together, sum(task.forgetting for task in single) / len(single), worst)


def _share_kept(tuned: float, chance: Chance) -> float | None:
    return (tuned - chance.level) / (chance.base - chance.level) if chance.clearly else None


_Row = TypeVar("_Row", Score, Paired)


def _by_task(rows: Sequence[_Row]) -> dict[str, _Row]:
    return {row.task: row for row in rows}


def _forgetting_interval(paired: Paired, *, sign: float) -> tuple[float | None, float | None]:
    """Return the 95 % interval of forgetting: tuned minus base, turned round where higher is better."""
    if paired.low is None or paired.high is None:
        return None, None
    low, high = sorted((-sign * paired.low + 0.0, -sign * paired.high + 0.0))
    return low, high
