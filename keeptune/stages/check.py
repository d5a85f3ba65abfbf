"""A check: a recipe arrives; what would be trained on, and how, leaves; nothing is kept."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keeptune.config import Recipe
from keeptune.data.record import Record
from keeptune.progress import noun
from keeptune.stages.budgets import CheckedBudget, budgets_of, counted
from keeptune.stages.computing import policy_of
from keeptune.stages.data import Data, check_metrics, read_base, rendering, say_ignored_code, source_hashes
from keeptune.stages.methods import learning_rate, method_of
from keeptune.stages.mixture import idle_temperature, tokens_per_step, train_examples
from keeptune.stages.rehearsal import is_small, rehearse
from keeptune.stages.run import Context, Run
from keeptune.stages.splits import write_data
from keeptune.stages.texts import certify_texts, read_general
from keeptune.stages.training import TOO_LITTLE_MEMORY

if TYPE_CHECKING:
    from keeptune.text.mixture import Share
    from keeptune.text.tokens import PreviewToken


@dataclass(frozen=True, slots=True)
class CheckedMethod:
    """How a method would train; `num_steps` is an estimate, because each epoch packs its steps anew."""

    name: str
    peft_type: str | None
    learning_rate: float
    num_steps: int
    tokens_per_step: int


@dataclass(frozen=True, slots=True)
class CheckOutcome:
    """What `keeptune check` shows: the audit, train records with their tokens, and the methods.

    `others` are the trained tasks of which no record is among the previews, with the number of their train records.
    `budgets` are what suites may lose, and whether the records at hand could certify that of any model. `mixture` says
    what an epoch shows of each task, where that is not each record once, and `idle` what has no effect in it.
    `computes_on` is the device with its number format and the reason. `remarks` are on metrics that say less of a task
    than they seem to.
    """

    audit: Mapping[str, Any]
    template: str
    previews: Sequence[tuple[str, Sequence[PreviewToken]]]
    others: Mapping[str, int]
    methods: Sequence[CheckedMethod]
    budgets: Sequence[CheckedBudget]
    mixture: Sequence[Share] = ()
    idle: str = ""
    computes_on: str = ""
    remarks: Sequence[str] = ()


def check(recipe: Recipe, *, context: Context, num_shown: int) -> CheckOutcome:
    """Read, audit, render and tokenise as `prepare` does, and keep nothing.

    The `num_shown` previews are one record of each task in turn, then further ones.

    Raises:
        NonFiniteError: the loss of a record is NaN or infinite before any training.
        RecipeError: a budget cannot be read, a method is none, a metric cannot read a task's references, or a step of
            the run fails on a record.
    """
    from keeptune.text.mixture import shares_of
    from keeptune.text.tokens import preview

    budgets_of(recipe)
    with tempfile.TemporaryDirectory(prefix="keeptune-") as scratch:
        folder = Path(scratch)
        base = read_base(recipe, cache=folder)
        # A wrong path is told by its key before any row is read.
        source_hashes(recipe)
        write_data(recipe, base, folder, progress=context.progress)
        data = Data(base, folder, "")
        remarks = check_metrics(recipe, data)
        shown = _in_turn(data.records("train"))[:num_shown]
        previews = [(f"{r.task} · {r.origin}", preview(r, **rendering(recipe, base))) for r in shown]
        tasks = {task: counts["train"] for task, counts in data.audit["tasks"].items()}
        not_missing = {record.task for record in shown} | data.untrained_tasks
        others = {task: number for task, number in tasks.items() if task not in not_missing}
        mixture = shares_of(train_examples(recipe, data))
        say_ignored_code(base, progress=context.progress)
        budgets = counted(recipe, data, certify_texts(read_general(recipe, data)[1]))
        if not any(budget.problem for budget in budgets):
            _dry_run(Run(recipe, folder, context), data)
        return CheckOutcome(
            data.audit,
            base.template.name,
            previews,
            others,
            list(_methods(recipe, data)),
            budgets,
            mixture,
            idle_temperature(recipe, mixture),
            policy_of(recipe).why,
            remarks,
        )


def _dry_run(run: Run, data: Data) -> None:
    """Take one record through what each method's run does with it, where that takes seconds."""
    from keeptune.model.memory import memory_errors

    if not is_small(data):
        run.progress.say("Dry run: left to `keeptune run`, as the model has more than 300 MB of weights")
        return
    for name in run.recipe.methods:
        with memory_errors(f"methods.{name}: {TOO_LITTLE_MEMORY}"):
            rehearse(run, data, method_of(run.recipe, name))
    number = len(run.recipe.methods)
    run.progress.say(f"Dry run: one record went through every step of {number} {noun(number, 'methods')}")


def _in_turn(records: Sequence[Record]) -> list[Record]:
    """Return the records ordered such that each task has had its n-th one before any has its next."""
    seen: dict[str, int] = {}
    turns = []
    for record in records:
        seen[record.task] = seen.get(record.task, 0) + 1
        turns.append(seen[record.task])
    return [record for _, record in sorted(zip(turns, records, strict=True), key=lambda pair: pair[0])]


def _methods(recipe: Recipe, data: Data) -> Iterator[CheckedMethod]:
    from keeptune.text.batches import plan_epoch
    from keeptune.text.mixture import epoch_positions

    table, training = train_examples(recipe, data), recipe.training
    budget = tokens_per_step(recipe, table)
    steps = plan_epoch(
        table.lengths,
        table.num_targets,
        seed=recipe.seed,
        epoch=0,
        tokens_per_step=budget,
        tokens_per_micro_batch=training.tokens_per_micro_batch,
        layout="packed",
        members=epoch_positions(table, 0),
    )
    for name, fields in recipe.methods.items():
        num_steps = round(len(steps) * training.num_train_epochs / (1.0 - fields.replay_fraction))
        yield CheckedMethod(name, fields.peft_type, learning_rate(fields), num_steps, budget)
