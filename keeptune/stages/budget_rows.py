"""Budgets and answers to the report part arrive; what was lost where a certificate speaks leaves, and where it doesn't.

A certificate leaves tasks out and may be in another metric than the main one. These rows are of the same tasks in the
same metric, so that its figure can stand beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from keeptune.data.record import OTHER_TASKS

if TYPE_CHECKING:
    from keeptune.evaluation.metrics import Answer
    from keeptune.retention.budget import Budget
    from keeptune.retention.chance import LeftOut


def under_budget(
    base: Sequence[Answer],
    tuned: Sequence[Answer],
    *,
    budgets: Mapping[str, Budget],
    left_out: Sequence[LeftOut],
    tasks: frozenset[str],
) -> Iterator[dict[str, Any]]:
    """Yield what each suite under a budget lost in the budget's metric; `without` names the tasks that are left out.

    `tasks` are those of "others". A suite that is left out as a whole has no row, nor has one without answers.
    """
    for suite, budget in budgets.items():
        without = sorted({one.suite for one in left_out if one.budget == suite})
        members = (tasks if suite == OTHER_TASKS else {suite}) - {*without}
        if suite not in without and (row := _row(base, tuned, suites=members, metric=budget.metric)):
            yield {**row, "suite": suite, "without": without}


def left_out_elsewhere(
    base: Sequence[Answer], tuned: Sequence[Answer], *, metrics: Sequence[str], left_out: Sequence[LeftOut]
) -> Iterator[dict[str, Any]]:
    """Yield what each suite that is left out lost in the other `metrics`: there the base may have had something."""
    for one in left_out:
        for metric in metrics:
            if metric != one.metric and (row := _row(base, tuned, suites={one.suite}, metric=metric)):
                yield {**row, "suite": one.suite, "without": []}


def _row(
    base: Sequence[Answer], tuned: Sequence[Answer], *, suites: frozenset[str] | set[str], metric: str
) -> dict[str, Any] | None:
    """Return what the records of all suites lost together, None where they were not scored in the metric."""
    from keeptune.retention.measures import measure_retention

    before, after = ([a for a in answers if a.task in suites] for answers in (base, tuned))
    if not before or any(metric not in answer.metrics for answer in before):
        return None
    row = asdict(measure_retention(before, after, metric=metric).together)
    del row["task"]
    return {**row, "kl": None}
