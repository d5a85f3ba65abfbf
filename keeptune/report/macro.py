"""Each task's scores arrive; means over tasks leave, in which a small task counts as much as a large one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from keeptune.data.record import ALL_TASKS, OTHER_TASKS
from keeptune.evaluation.intervals import mean_of_tasks
from keeptune.evaluation.metrics import metric_of
from keeptune.report.reading import RunFolder, mapping, number, rows, string, whole
from keeptune.report.scores import Score


@dataclass(frozen=True, slots=True)
class MacroScore:
    """The mean of `num_tasks` tasks' scores; `tasks` says which: "all" that were trained on, or "others".

    [`low`, `high`] is its 95 % interval, from those of the tasks, which are taken as independent.
    """

    model: str
    tasks: str
    metric: str
    mean: float
    low: float | None
    high: float | None
    num_tasks: int


@dataclass(frozen=True, slots=True)
class ValidationScore:
    """What a method's kept weights reach on a task's validation records, in the value that selected."""

    model: str
    task: str
    metric: str
    mean: float | None
    num_records: int | None


@dataclass(frozen=True, slots=True)
class MixtureRow:
    """What an epoch of a method's training shows of a source: `num_per_epoch` of its `num_examples`.

    `num_repeats` of these stand there again; `num_never_shown` of the source's are in none of the planned epochs.
    """

    model: str
    source: str
    num_examples: int
    num_per_epoch: int
    num_repeats: int
    num_never_shown: int


def macro_scores(scores: Sequence[Score], *, untrained_tasks: frozenset[str]) -> Iterator[MacroScore]:
    """Yield the mean over the trained tasks, then over the others, of every model and metric; of two tasks or more.

    Perplexity has none: it is the exponential of a mean, and a mean of these says nothing that loss does not.
    """
    found: dict[tuple[str, str, str], list[Score]] = {}
    for score in scores:
        if score.task not in (ALL_TASKS, OTHER_TASKS) and score.metric != "perplexity":
            tasks = OTHER_TASKS if score.task in untrained_tasks else ALL_TASKS
            found.setdefault((score.model, tasks, score.metric), []).append(score)
    for (model, tasks, metric), of_tasks in found.items():
        means = [score.mean for score in of_tasks if score.mean is not None]
        if len(means) == len(of_tasks) > 1:
            errors, ends = [score.standard_error for score in of_tasks], [(score.low, score.high) for score in of_tasks]
            low, high = mean_of_tasks(means, errors, ends, bounds=metric_of(metric).bounds)
            yield MacroScore(model, tasks, metric, math.fsum(means) / len(means), low, high, len(means))


def read_validation(folder: RunFolder, methods: Sequence[str]) -> Iterator[ValidationScore]:
    """Yield each method's validation scores by task, then their mean; nothing where there is one task."""
    for name in methods:
        value = folder.object(f"{name}/training.json", expected=False)
        for row in rows(value.get("validation_scores")):
            yield _validation(name, row, task=string(row.get("task")) or "?")
        if of_tasks := mapping(value.get("validation_macro")):
            yield _validation(name, of_tasks, task=ALL_TASKS)


def _validation(model: str, row: Mapping[str, object], *, task: str) -> ValidationScore:
    metric = string(row.get("metric")) or "?"
    return ValidationScore(model, task, metric, number(row.get("mean")), whole(row.get("num_records")))


def read_mixture(folder: RunFolder, methods: Sequence[str]) -> Iterator[MixtureRow]:
    """Yield what an epoch shows of each source; the tasks' are alike in all methods."""
    for name in methods:
        for row in rows(folder.object(f"{name}/training.json", expected=False).get("mixture")):
            counts = ("num_examples", "num_per_epoch", "num_repeats", "num_never_shown")
            yield MixtureRow(name, string(row.get("source")) or "?", *(whole(row.get(key)) or 0 for key in counts))
