"""Answers arrive; scores with their doubt and paired differences with their intervals leave.

Records with the same input form a cluster: their values are not independent, so clusters, not records, are left out
(jackknife) and drawn (bootstrap). Shape key: R records, G clusters, S sums of a metric, C columns of several, K draws.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keeptune.data.record import ALL_TASKS, OTHER_TASKS
from keeptune.errors import DataError
from keeptune.evaluation.metrics import Answer, Metric, metric_of

NUM_DRAWS = 10_000
_SEED = 20_240_601
_COVERAGE = 0.95
_DRAWN_AT_ONCE = 2_000_000


@dataclass(frozen=True, slots=True)
class Score:
    """A metric over `num_records` records. `standard_error` is clustered by input; None where one cluster is all."""

    task: str
    metric: str
    mean: float
    standard_error: float | None
    num_records: int
    num_clusters: int


@dataclass(frozen=True, slots=True)
class Paired:
    """`model` minus `against` in one metric over the same records.

    `low` and `high` bound the difference with 95 % (percentile bootstrap over clusters), and `standard_error` is the
    difference's own (jackknife over clusters); None where one cluster is all. `better` and `worse` count the records
    whose own value moved, the metric's direction considered.
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
        clusters_R, num_clusters = _clusters([answers[i] for i in members])
        for name in metrics:
            metric = metric_of(name)
            sums_GS = _cluster_sums(_statistics([answers[i] for i in members], metric), clusters_R, num_clusters)
            scores.append(
                Score(
                    task=task,
                    metric=name,
                    mean=float(metric.combine(sums_GS.sum(axis=0))),
                    standard_error=_standard_error(_left_out(sums_GS, metric)),
                    num_records=len(members),
                    num_clusters=num_clusters,
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
    judged = metric_of(metric)
    clusters_R, num_clusters = _clusters(mine)
    here_GS, there_GS = (_cluster_sums(_statistics(side, judged), clusters_R, num_clusters) for side in (mine, theirs))
    return Difference(
        float(judged.combine(here_GS.sum(axis=0)) - judged.combine(there_GS.sum(axis=0))),
        _standard_error(_left_out(here_GS, judged) - _left_out(there_GS, judged)),
        num_clusters,
    )


def macro_mean(scores: Sequence[tuple[float, float | None]]) -> tuple[float, float | None]:
    """Return the mean over tasks of (mean, standard error), each task counting the same, with its standard error.

    Tasks are taken as independent of each other; the error is None where that of a task is not known.
    """
    errors = [error for _, error in scores if error is not None]
    mean = float(np.mean([mean for mean, _ in scores]))
    return mean, float(np.sqrt(np.sum(np.square(errors)))) / len(scores) if len(errors) == len(scores) else None


def paired_differences(
    answers: Sequence[Answer],
    against_answers: Sequence[Answer],
    *,
    metrics: Sequence[str],
    model: str,
    against: str,
    untrained_tasks: Collection[str] = (),
) -> list[Paired]:
    """Return `answers` minus `against_answers` for each task, then for all together, in each metric.

    "all" and "others" are as in `score_answers`.

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
        differences += _task_differences(mine, theirs, metrics=metrics, names=(model, against, task))
    return differences


def _task_differences(
    mine: Sequence[Answer], theirs: Sequence[Answer], *, metrics: Sequence[str], names: tuple[str, str, str]
) -> list[Paired]:
    """Draw clusters once for every metric and both models: the draw is what pairs them."""
    clusters_R, num_clusters = _clusters(mine)
    columns = [_statistics(side, metric_of(name)) for name in metrics for side in (mine, theirs)]
    sums_GC = _cluster_sums(np.concatenate(columns, axis=1), clusters_R, num_clusters)
    drawn_KC = _bootstrap(sums_GC) if num_clusters > 1 else None
    total_C = sums_GC.sum(axis=0)
    differences, start = [], 0
    for name, width in zip(metrics, [column.shape[1] for column in columns[::2]], strict=True):
        metric = metric_of(name)
        here, there, start = slice(start, start + width), slice(start + width, start + 2 * width), start + 2 * width
        left_out_G = _left_out(sums_GC[:, here], metric) - _left_out(sums_GC[:, there], metric)
        low = high = None
        if drawn_KC is not None:
            drawn_K = metric.combine(drawn_KC[:, here]) - metric.combine(drawn_KC[:, there])
            low, high = (float(q) for q in np.quantile(drawn_K, [(1 - _COVERAGE) / 2, (1 + _COVERAGE) / 2]))
        sign = 1.0 if metric.higher_is_better else -1.0
        moved_R = sign * np.array([a.metrics[name] - b.metrics[name] for a, b in zip(mine, theirs, strict=True)])
        differences.append(
            Paired(
                *names,
                metric=name,
                difference=float(metric.combine(total_C[here]) - metric.combine(total_C[there])),
                low=low,
                high=high,
                better=int(np.count_nonzero(moved_R > 0)),
                worse=int(np.count_nonzero(moved_R < 0)),
                standard_error=_standard_error(left_out_G),
                num_records=len(mine),
                num_clusters=num_clusters,
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


def _clusters(answers: Sequence[Answer]) -> tuple[NDArray[np.int64], int]:
    numbers: dict[str, int] = {}
    clusters_R = np.array([numbers.setdefault(answer.cluster, len(numbers)) for answer in answers], dtype=np.int64)
    return clusters_R, len(numbers)


def _statistics(answers: Sequence[Answer], metric: Metric) -> NDArray[np.float64]:
    return np.array([metric.statistics(answer) for answer in answers], dtype=np.float64)


def _cluster_sums(
    statistics_RS: NDArray[np.float64], clusters_R: NDArray[np.int64], num_clusters: int
) -> NDArray[np.float64]:
    sums_GS = np.zeros((num_clusters, statistics_RS.shape[1]))
    np.add.at(sums_GS, clusters_R, statistics_RS)
    return sums_GS


def _left_out(sums_GS: NDArray[np.float64], metric: Metric) -> NDArray[np.float64]:
    """Return the metric (G,) over all clusters but one, for each one; of a single cluster, that of no record."""
    if len(sums_GS) < 2:
        return np.zeros(len(sums_GS))
    return metric.combine(sums_GS.sum(axis=0) - sums_GS)


def _standard_error(left_out_G: NDArray[np.float64]) -> float | None:
    """Return the delete-one-cluster jackknife standard error.

    For a mean over singleton clusters it is the sample standard deviation over the square root of their number:
    leaving x_i out of n moves the mean by (mean - x_i) / (n - 1), and (n - 1) / n times the sum of those squares is
    the sum of (x_i - mean)^2 over n (n - 1).
    """
    num_clusters = len(left_out_G)
    if num_clusters < 2:
        return None
    squares = np.square(left_out_G - left_out_G.mean()).sum()
    return float(np.sqrt((num_clusters - 1) / num_clusters * squares))


def _bootstrap(sums_GC: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sums (K, C) of `NUM_DRAWS` draws of G clusters with replacement; the seed is fixed."""
    generator = np.random.Generator(np.random.Philox(_SEED))
    num_clusters = len(sums_GC)
    drawn_KC = np.empty((NUM_DRAWS, sums_GC.shape[1]))
    at_once = max(1, _DRAWN_AT_ONCE // num_clusters)
    for start in range(0, NUM_DRAWS, at_once):
        num_draws = min(at_once, NUM_DRAWS - start)
        chosen = generator.integers(num_clusters, size=(num_draws, num_clusters))
        chosen += np.arange(num_draws)[:, None] * num_clusters
        times = np.bincount(chosen.ravel(), minlength=num_draws * num_clusters).reshape(num_draws, num_clusters)
        drawn_KC[start : start + num_draws] = times.astype(np.float64) @ sums_GC
    return drawn_KC
