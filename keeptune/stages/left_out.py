"""Suites under a budget arrive; those where the base has nothing to lose, which no certificate can speak of, leave."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from keeptune.data.record import OTHER_TASKS
from keeptune.errors import DataError
from keeptune.stages.data import Data
from keeptune.stages.harness import Harness, harness_answers
from keeptune.stages.run import Run
from keeptune.stages.way import BASE, ZERO_SHOT

if TYPE_CHECKING:
    from keeptune.evaluation.metrics import Answer
    from keeptune.retention.budget import Budget
    from keeptune.retention.chance import LeftOut


def judged_by_test(budgets: Iterable[str], data: Data) -> bool:
    """Tell whether a budget is of other tasks: whether they are left out is judged by the base's answers to test."""
    return bool({OTHER_TASKS, *data.untrained_tasks} & {*budgets})


def reported_answers(run: Run) -> list[Answer]:
    """Return the base's own answers to the report part of tasks and of harness suites; none where it was not asked."""
    from keeptune.evaluation.evaluate import read_answers

    first, asked = run.folder / BASE / ZERO_SHOT, run.folder / BASE / "harness"
    answers = read_answers(first) if first.is_dir() else []
    return [*answers, *(harness_answers(run, None) if asked.is_dir() else [])]


def at_chance(
    run: Run, data: Data, base: Sequence[Answer], *, budgets: Mapping[str, Budget], harness: Harness | None
) -> tuple[LeftOut, ...]:
    """Return the suites on which a base with these answers has nothing to lose, each in the metric of its own budget.

    The test that tells it from chance has the level of the certificate, one minus its confidence.

    Of "others" it is each of the other tasks in the metric of that budget, and "others" itself where all of them are
    at chance. A suite whose base scores no more than the budget is one too: no model could break it. A suite without
    scored answers stays, and so does any under a budget in nats: a loss has no chance level, and no end.
    """
    from keeptune.retention.chance import LeftOut, chance_of

    levels = {suite: facts["chance"] for suite, facts in (harness.audit if harness is not None else {}).items()}

    def judged(suites: Collection[str], *, named: str, of: str) -> tuple[LeftOut, bool] | None:
        metric = budgets[of].metric
        answers = [answer for answer in base if answer.task in suites]
        if not answers or any(metric not in answer.metrics for answer in answers):
            return None
        found = chance_of(
            answers, metric=metric, least=levels.get(named, 0.0), level=1.0 - run.recipe.retention.confidence
        )
        name = named if named == of or named not in budgets else f"{named} of {of}"
        return LeftOut(name, named, of, metric, found.base, found.level), found.above

    left_out: list[LeftOut] = []
    for name, budget in budgets.items():
        members = sorted(data.untrained_tasks) if name == OTHER_TASKS else [name]
        found = [judged([suite], named=suite, of=name) for suite in members]
        low = [one[0] for one in found if one is not None and not one[1]]
        left_out += low
        tested = set(members) - {one.suite for one in low}
        answers = [answer for answer in base if answer.task in tested and budget.metric in answer.metrics]
        if name == OTHER_TASKS and not tested and (all_ := judged(data.untrained_tasks, named=name, of=name)):
            left_out.append(all_[0])
        elif answers and budget.unit == "points":
            # The mean of the records' own scores, which the budget is of, as is no corpus score.
            score = sum(answer.metrics[budget.metric] for answer in answers) / len(answers)
            if score <= budget.amount:
                left_out.append(LeftOut(name, name, name, budget.metric, score, 0.0, "budget"))
    return tuple(left_out)


def tested_budgets(asked: Mapping[str, Budget], left_out: Sequence[LeftOut]) -> dict[str, Budget]:
    """Return the budgets that a certificate speaks of.

    Raises:
        DataError: there is none.
    """
    gone = {one.suite for one in left_out if one.suite == one.budget}
    tested = {suite: budget for suite, budget in asked.items() if suite not in gone}
    if not tested:
        listed = ", ".join(f"{one.name}: {one.metric} {one.base:.3g}, chance {one.chance:.3g}" for one in left_out)
        raise DataError(
            f"retention.budget: found only suites where the base has nothing to lose beyond the budget ({listed}); "
            "expected one or more where it has. Lower the budget, name other suites, or a metric that tells right "
            "answers from wrong ones there."
        )
    return tested
