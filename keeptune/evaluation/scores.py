"""Answers arrive; scores and paired differences leave, each with its standard error and its 95 % interval.

Records with the same input form a cluster: their values are not independent, so clusters, not records, are left out
(jackknife). Shape key: R records, G clusters, S sums of a metric.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keeptune.data.record import ALL_TASKS, OTHER_TASKS
from keeptune.errors import DataError
from keeptune.evaluation import intervals
from keeptune.evaluation.intervals import Ends, Spread, spread_of
from keeptune.evaluation.metrics import LOSS_METRICS, METRICS, Answer, Metric, metric_of

_LOSS, _PERPLEXITY = METRICS[LOSS_METRICS[0]], LOSS_METRICS[1]


@dataclass(frozen=True, slots=True)
class Score:
    """A metric over `num_records` records, with its standard error, clustered by input, and 95 % interval [low, high].

    None where one cluster is all; of a loss there is no interval either where all clusters agree.
    """

    task: str
    metric: str
    mean: float
    standard_error: float | None
    low: float | None
    high: float | None
    num_records: int
    num_clusters: int


@dataclass(frozen=True, slots=True)
class Paired:
    """`model` minus `against` in one metric over the same records.

    `low` and `high` bound the difference with 95 %, and `standard_error` is the difference's own (jackknife over
    clusters); None where one cluster is all. Of a loss there is no interval either where all clusters move alike.
    `better` and `worse` count the records whose own value moved, the metric's direction considered.
    """

    model: str
    against: str
    task: str
    metric: str
    difference: float
    low: float | None
    high: float | None
    better: int
    worse: int
    standard_error: float | None
    num_records: int
    num_clusters: int


def score_answers(
    answers: Sequence[Answer], *, metrics: Sequence[str], untrained_tasks: Collection[str] = ()
) -> list[Score]:
    """Return each metric's score for each task, in the order in which tasks come first, then for all together.

    All together, under the name "all", are the tasks that were trained on; "others" are `untrained_tasks` together.
    """
    scores = []
    for task, members in _tasks(answers, untrained_tasks=untrained_tasks):
        own = [answers[i] for i in members]
        clusters = _clusters(own)
        for name in metrics:
            metric = metric_of(name)
            spread = _spread(own, metric, clusters)
            low, high = _score_interval(own, spread, metric=metric, clusters=clusters)
            scores.append(
                Score(
                    task=task,
                    metric=name,
                    mean=spread.value,
                    standard_error=spread.standard_error,
                    low=low,
                    high=high,
                    num_records=len(own),
                    num_clusters=spread.num_clusters,
                )
            )
    return scores


def score_of(answers: Sequence[Answer], *, metric: str) -> float:
    """Return the metric over all these answers together."""
    judged = metric_of(metric)
    return float(judged.combine(_statistics(answers, judged).sum(axis=0)))


@dataclass(frozen=True, slots=True)
class Difference:
    """One score minus another over the same records; `standard_error` is clustered, None where one cluster is all."""

    difference: float
    standard_error: float | None
    num_clusters: int


def difference(mine: Sequence[Answer], theirs: Sequence[Answer], *, metric: str) -> Difference:
    """Return the score of `mine` minus that of `theirs`, which answer the same records in the same order."""
    judged, clusters = metric_of(metric), _clusters(mine)
    apart = _spread(mine, judged, clusters).less(_spread(theirs, judged, clusters))
    return Difference(apart.value, apart.standard_error, apart.num_clusters)


def is_binary(answers: Sequence[Answer], metric: Metric) -> bool:
    """Tell whether the metric is a mean over records of which each is either right or wrong; a loss never is."""
    if not metric.is_mean or not metric.higher_is_better:
        return False
    return bool(np.isin([answer.metrics[metric.name] for answer in answers], (0.0, 1.0)).all())


def paired_differences(
    answers: Sequence[Answer],
    against_answers: Sequence[Answer],
    *,
    metrics: Sequence[str],
    model: str,
    against: str,
    untrained_tasks: Collection[str] = (),
    confidence: float = intervals.CONFIDENCE,
) -> list[Paired]:
    """Return `answers` minus `against_answers` for each task, then for all together, in each metric.

    "all" and "others" are as in `score_answers`; `confidence` is that of the intervals.

    Raises:
        DataError: the two do not answer the same records in the same order.
    """
    if [(a.task, a.id) for a in answers] != [(b.task, b.id) for b in against_answers]:
        raise DataError(
            f"{model} and {against}: found answers to different records ({len(answers)} and {len(against_answers)}); "
            "expected the same ones in the same order. Evaluate both again."
        )
    differences = []
    for task, members in _tasks(answers, untrained_tasks=untrained_tasks):
        mine, theirs = [answers[i] for i in members], [against_answers[i] for i in members]
        clusters = _clusters(mine)
        for name in metrics:
            metric = metric_of(name)
            moved_R = np.array([a.metrics[name] - b.metrics[name] for a, b in zip(mine, theirs, strict=True)])
            upward, downward = int(np.count_nonzero(moved_R > 0)), int(np.count_nonzero(moved_R < 0))
            apart = _spread(mine, metric, clusters).less(_spread(theirs, metric, clusters))
            low, high = _difference_interval((mine, theirs), apart, metric=metric, at=confidence)
            differences.append(
                Paired(
                    model=model,
                    against=against,
                    task=task,
                    metric=name,
                    difference=apart.value,
                    low=low,
                    high=high,
                    better=upward if metric.higher_is_better else downward,
                    worse=downward if metric.higher_is_better else upward,
                    standard_error=apart.standard_error,
                    num_records=len(mine),
                    num_clusters=apart.num_clusters,
                )
            )
    return differences


def _tasks(answers: Sequence[Answer], *, untrained_tasks: Collection[str]) -> Iterator[tuple[str, list[int]]]:
    """Yield each task with the indices of its answers, then those of all trained tasks, then of the others."""
    members: dict[str, list[int]] = {}
    for index, answer in enumerate(answers):
        members.setdefault(answer.task, []).append(index)
    yield from members.items()
    for name, untrained in ((ALL_TASKS, False), (OTHER_TASKS, True)):
        together = [i for i, answer in enumerate(answers) if (answer.task in untrained_tasks) == untrained]
        if together:
            yield name, together


@dataclass(frozen=True, slots=True)
class _Clusters:
    """Which cluster each record belongs to, and how many records each has."""

    of_record_R: NDArray[np.int64]
    sizes_G: NDArray[np.int64]


def _clusters(answers: Sequence[Answer]) -> _Clusters:
    numbers: dict[str, int] = {}
    of_record_R = np.array([numbers.setdefault(answer.cluster, len(numbers)) for answer in answers], dtype=np.int64)
    return _Clusters(of_record_R, np.bincount(of_record_R, minlength=len(numbers)))


def _statistics(answers: Sequence[Answer], metric: Metric) -> NDArray[np.float64]:
    return np.array([metric.statistics(answer) for answer in answers], dtype=np.float64)


def _spread(answers: Sequence[Answer], metric: Metric, clusters: _Clusters) -> Spread:
    """Return the metric over all clusters, and how far each pulls it from what it is without that one."""
    statistics_RS = _statistics(answers, metric)
    sums_GS = np.zeros((len(clusters.sizes_G), statistics_RS.shape[1]))
    np.add.at(sums_GS, clusters.of_record_R, statistics_RS)
    return spread_of(sums_GS, metric.combine, sizes_G=clusters.sizes_G)


def _score_interval(answers: Sequence[Answer], spread: Spread, *, metric: Metric, clusters: _Clusters) -> Ends:
    if metric.name == _PERPLEXITY:
        of_loss = intervals.score_interval(_spread(answers, _LOSS, clusters), bounds=_LOSS.bounds, binary=False)
        return intervals.exponential(of_loss)
    return intervals.score_interval(spread, bounds=metric.bounds, binary=is_binary(answers, metric))


def _difference_interval(
    sides: tuple[Sequence[Answer], Sequence[Answer]],
    apart: Spread,
    *,
    metric: Metric,
    at: float,
) -> Ends:
    if all(is_binary(side, metric) for side in sides):
        mine_R, theirs_R = ([answer.metrics[metric.name] for answer in side] for side in sides)
        changed = float(np.mean(np.not_equal(mine_R, theirs_R)))
        return intervals.binary_difference_interval(apart, changed=changed, confidence=at)
    return intervals.difference_interval(apart, bounds=intervals.difference_bounds(metric.bounds), confidence=at)
