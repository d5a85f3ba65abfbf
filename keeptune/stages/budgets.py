"""Budgets of a recipe arrive; what they mean in each suite's metric, and whether enough records are there, leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from keeptune.config import Recipe
from keeptune.data.clean import prompt_key
from keeptune.data.record import OTHER_TASKS, SELF_TEXTS
from keeptune.errors import DataError, RecipeError, raise_collected
from keeptune.stages.certify_openings import expected_opening
from keeptune.stages.data import Data
from keeptune.stages.harness import Harness
from keeptune.stages.parts import part_shares
from keeptune.stages.run import Run

if TYPE_CHECKING:
    from keeptune.retention.budget import Budget


def main_metric(recipe: Recipe) -> str:
    """Return the metric that suites of instructions are judged by: the one that selects, else the first."""
    evaluation = recipe.evaluation
    return evaluation.metrics[0] if evaluation.select_by == "loss" else evaluation.select_by


def budget_texts(recipe: Recipe, harness: Harness | None) -> dict[str, str]:
    """Return the budgets in the recipe's words; that of a harness group is one of each suite that stands for it."""
    asked = recipe.retention.budget
    if harness is None:
        return dict(asked)
    return {suite: text for name, text in asked.items() for suite in harness.named(name) or [name]}


def budgets_of(recipe: Recipe, *, harness: Harness | None = None) -> dict[str, Budget]:
    """Return the recipe's budgets, each in its metric's units; those of harness suites only with `harness`.

    Raises:
        RecipeError: one of them cannot be read, is in points where a suite of text has a loss alone, or is of a metric
            that is no mean over documents.
    """
    from keeptune.evaluation.metrics import LABEL_METRICS
    from keeptune.retention.budget import parse_budget

    texts = {SELF_TEXTS, *(text.name for text in recipe.retention.texts)}
    own = {**dict.fromkeys(texts, "loss"), **(harness.metrics if harness is not None else {})}
    unread = recipe.retention.harness.tasks if harness is None else ()
    budgets = {}
    for suite, text in budget_texts(recipe, harness).items():
        if suite in unread:
            continue
        if own.get(suite) in LABEL_METRICS:
            raise RecipeError(
                f"retention.budget: found {text!r} for {suite}, which is judged by {own[suite]}; expected a suite with "
                "a metric that is a mean over documents, as no other can be certified. Leave it without a budget: of a "
                "group, name the other tasks one by one in retention.harness.tasks."
            )
        budget = parse_budget(
            text, suite=suite, main_metric=own.get(suite, main_metric(recipe)), loss_cap=recipe.retention.loss_cap
        )
        scored = (own[suite],) if suite in own and suite not in texts else (*recipe.evaluation.metrics, "loss")
        if suite in texts and budget.metric != "loss":
            raise RecipeError(
                f"retention.budget.{suite}: found {text!r} for a suite of texts, which have a loss and no score; "
                "expected nats. Write for example '0.02 nats'."
            )
        if budget.metric not in scored:
            raise RecipeError(
                f"retention.budget.{suite}: found {budget.metric}, which is not measured; expected one of "
                f"{', '.join(scored)}. Name one of these, or add it to evaluation.metrics."
            )
        budgets[suite] = budget
    return budgets


def require_budget(recipe: Recipe) -> None:
    """Refuse a recipe that says of no suite what it may lose.

    Raises:
        DataError: it has no budget.
    """
    if not recipe.retention.budget:
        raise DataError(
            "retention.budget: found none; expected what each suite may lose, such as {others: 2 points}. Add it."
        )


@dataclass(frozen=True, slots=True)
class CheckedBudget:
    """How many records of a suite under a budget there are to certify on, None where that is not known yet.

    `num_needed` is how many even a model that loses nothing would need, None where the metric is not known yet.
    `problem` says why no model could be certified, empty where one could.
    """

    suite: str
    budget: str
    num_records: int | None
    num_needed: int | None
    problem: str = ""


def check_budgets(
    run: Run, data: Data, texts: Mapping[str, int] | None = None, *, harness: Harness | None = None
) -> None:
    """Refuse suites with so few records that not even a model that lost nothing could be certified.

    `texts` are the numbers of texts to certify on, of suites of text where those are counted. Suites that are not
    counted yet pass: of tasks of the harness, all without `harness`; texts of the base itself are as many as the
    recipe asks for.

    Records that were opened before, in any run folder, have less confidence left.

    Raises:
        DataError: a search chose settings by some of the records.
        RecipeError: which suites, how many records there are, and how many are needed.
    """
    if run.recipe.retention.budget:
        opening = expected_opening(run, data)
        refuse_budgets(counted(run.recipe, data, texts, harness=harness, opening=opening))


def refuse_budgets(suites: Sequence[CheckedBudget]) -> None:
    """Refuse suites whose records could not certify any model.

    Raises:
        RecipeError: which, how many records there are, and how many are needed.
    """
    if problems := [suite.problem for suite in suites if suite.problem]:
        raise_collected(RecipeError, problems)


def counted(
    recipe: Recipe,
    data: Data,
    texts: Mapping[str, int] | None = None,
    *,
    harness: Harness | None = None,
    opening: int = 1,
) -> list[CheckedBudget]:
    """Return for each suite under a budget what there is to certify on, and what is needed in such an opening."""
    asked = budget_texts(recipe, harness)
    if not asked:
        return []
    budgets = budgets_of(recipe, harness=harness)
    inputs: dict[str, Counter[tuple[str, str]]] = {
        **_of_tasks(data, asked),
        **_of_texts(recipe, texts),
        **_of_harness(harness),
    }
    return [
        _counted(
            recipe,
            suite,
            text,
            budget=budgets.get(suite),
            inputs=inputs.get(suite),
            opening=opening,
            num_suites=len(asked),
        )
        for suite, text in asked.items()
    ]


def _counted(
    recipe: Recipe,
    suite: str,
    text: str,
    *,
    budget: Budget | None,
    inputs: Counter[tuple[str, str]] | None,
    opening: int,
    num_suites: int,
) -> CheckedBudget:
    from keeptune.retention.drops import Drops
    from keeptune.retention.ledger import confidence_left
    from keeptune.retention.pvalues import p_value, records_needed_for_any_verdict

    if budget is None:
        return CheckedBudget(suite, text, None, None)
    delta = confidence_left(1.0 - recipe.retention.confidence, opening=opening, num_suites=num_suites)
    delta /= len(recipe.methods)
    needed = records_needed_for_any_verdict(budget=budget.amount, delta=delta, scale=budget.scale)
    if inputs is None:
        return CheckedBudget(suite, text, None, needed)
    number = inputs.total()
    if number:
        sizes = list(inputs.values())
        strata = np.unique([task for task, _ in inputs], return_inverse=True)[1]
        clusters_R, strata_R = np.repeat(np.arange(len(inputs)), sizes), np.repeat(strata, sizes)
        unchanged = Drops(np.zeros(number), clusters_R, budget.scale, strata_R)
        if p_value(unchanged, budget=budget.amount).p <= delta:
            return CheckedBudget(suite, text, number, needed)
    of = f" with {len(inputs):,} different inputs" if number >= needed else ""
    more = (
        f"Set retention.self_texts={needed}"
        if suite == SELF_TEXTS and not of
        else f"Give the suite more records ({_share(recipe, suite)} of them are certified on)"
    )
    before = f", as some were opened before and this would be opening {opening}" if opening > 1 else ""
    problem = (
        f"retention.budget.{suite}: found {number:,} records to certify on{of}; expected at least {needed:,}{before}, "
        f"or no model could keep {text} with this confidence. {more}, raise the budget, or train fewer methods."
    )
    return CheckedBudget(suite, text, number, needed, problem)


def _share(recipe: Recipe, suite: str) -> str:
    """Return the share of a suite's records that are certified on, as in "60 %"."""
    names = [task.name for task in recipe.data.tasks if not task.train] if suite == OTHER_TASKS else [suite]
    return f"{100.0 * part_shares(recipe, names[0]).get('certify', 0.0):.0f} %"


def _of_tasks(data: Data, asked: Mapping[str, str]) -> dict[str, Counter[tuple[str, str]]]:
    """Return the inputs of the records to certify on, with their tasks, of each other task and of all of them."""
    found: dict[str, Counter[tuple[str, str]]] = {OTHER_TASKS: Counter()} | {
        task: Counter() for task in data.untrained_tasks
    }
    if not asked.keys() & found.keys() or not (data.folder / "certify.jsonl").is_file():
        return found
    for record in data.records("certify"):
        for suite in (record.task, OTHER_TASKS):
            found[suite][record.task, prompt_key(record)] += 1
    return found


def _of_texts(recipe: Recipe, texts: Mapping[str, int] | None) -> dict[str, Counter[tuple[str, str]]]:
    """Return the texts to certify on of each suite that is counted; each is an input of its own."""
    counts = {SELF_TEXTS: recipe.retention.self_texts, **(texts or {})}
    return {suite: Counter((suite, str(i)) for i in range(number)) for suite, number in counts.items()}


def _of_harness(harness: Harness | None) -> dict[str, Counter[tuple[str, str]]]:
    """Return the inputs of the documents to certify on of each suite of the harness, with their numbers."""
    if harness is None:
        return {}
    found: dict[str, Counter[tuple[str, str]]] = {suite: Counter() for suite in harness.metrics}
    for document in harness.stored("certify"):
        if document.suite in found:
            found[document.suite][document.suite, document.cluster] += 1
    return found
