"""The arithmetic of a run: examples and settings arrive, the steps at which something happens leave.

Steps count from 1 over the whole run; step s is the s-th update.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from keeptune.errors import DataError, stopped
from keeptune.progress import noun
from keeptune.text.batches import EpochPlan, plan_epoch
from keeptune.text.mixture import epoch_positions, first_epoch, shares_of
from keeptune.text.tokens import Examples
from keeptune.training.events import RunEvent
from keeptune.training.settings import TrainingSettings, Validation

_FEW_STEPS = 50
_NUM_DRIFTS = 10
# What the drift may take of the training's time. A token that is trained on costs at least as much as so many that are
# read: three where all weights get gradients, two where only an adapter does.
_DRIFT_FRACTION = 0.02
_FORWARD_PASSES_PER_TRAINED_TOKEN = 2
_MAX_LISTED = 10
_EPOCHS_BETWEEN_POLLS = 100


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Where the steps of a run lie; `epoch_ends[e]` is the last step of epoch e."""

    epoch_ends: tuple[int, ...]
    num_warmup_steps: int
    evaluation_steps: frozenset[int]
    save_steps: frozenset[int]

    @property
    def num_steps(self) -> int:
        return self.epoch_ends[-1]

    @property
    def drift_steps(self) -> frozenset[int]:
        """The steps after which the drift is measured: every tenth of the run, the last step among them."""
        return frozenset(math.ceil(self.num_steps * i / _NUM_DRIFTS) for i in range(1, _NUM_DRIFTS + 1))

    def epoch_start(self, epoch: int) -> int:
        """Return the number of steps before an epoch."""
        return self.epoch_ends[epoch - 1] if epoch else 0

    def epochs_done(self, step: int) -> float:
        """Return the passes over the train split that are done after a step, as a fraction."""
        epoch = next(i for i, end in enumerate(self.epoch_ends) if step <= end)
        start = self.epoch_start(epoch)
        return epoch + (step - start) / (self.epoch_ends[epoch] - start)


def plan_steps(table: Examples, *, settings: TrainingSettings, epoch: int) -> EpochPlan:
    """Return the steps of one epoch, always the same ones for the same table, settings and epoch."""
    return plan_epoch(
        table.lengths,
        table.num_targets,
        seed=settings.seed,
        epoch=epoch,
        tokens_per_step=settings.tokens_per_step,
        tokens_per_micro_batch=settings.tokens_per_micro_batch,
        layout=settings.layout,
        members=epoch_positions(table, epoch),
    )


def plan_validation(table: Examples, *, settings: TrainingSettings) -> list[tuple[int, ...]]:
    """Return micro-batches that hold every example once."""
    if not len(table):
        return []
    steps = plan_epoch(
        table.lengths,
        table.num_targets,
        seed=settings.seed,
        epoch=0,
        tokens_per_step=max(1, int(table.lengths.sum())),
        tokens_per_micro_batch=settings.tokens_per_micro_batch,
        layout=settings.layout,
    )
    return [micro_batch for step in steps for micro_batch in step.micro_batches]


def _never() -> bool:
    return False


def plan_run(
    table: Examples,
    *,
    settings: TrainingSettings,
    has_validation: bool,
    has_metric: bool,
    stop_requested: Callable[[], bool] = _never,
) -> RunPlan:
    """Return the steps of a run, and those after which it validates and saves.

    Validation comes `evals_per_epoch` times an epoch or every `eval_steps` steps, and at the end of the run;
    with a metric at each end of an epoch as well.

    Raises:
        DataError: an example has no target token, so that no loss could be taken from it.
        Interrupted: a stop was asked for.
    """
    _require_targets(table)
    ends: list[int] = []
    for epoch in range(settings.num_train_epochs):
        if epoch % _EPOCHS_BETWEEN_POLLS == _EPOCHS_BETWEEN_POLLS - 1 and stop_requested():
            raise stopped("steps of the training")
        ends.append((ends[-1] if ends else 0) + len(plan_steps(table, settings=settings, epoch=epoch)))
    epoch_ends = tuple(ends)
    num_steps = epoch_ends[-1]
    evaluation_steps = _evaluation_steps(epoch_ends, settings=settings) if has_validation else set()
    if has_metric:
        evaluation_steps |= set(epoch_ends)
    save_steps = range(settings.save_steps, num_steps, settings.save_steps) if settings.save_steps else epoch_ends
    return RunPlan(
        epoch_ends=epoch_ends,
        num_warmup_steps=math.ceil(settings.warmup_ratio * num_steps),
        evaluation_steps=frozenset(evaluation_steps),
        save_steps=frozenset({*save_steps, num_steps}),
    )


def num_probe_examples(probe: Examples, *, table: Examples, num_epochs: int) -> int:
    """Return how many of the probe's first examples the drift may be measured on: 2 % of the training's time at most.

    A tenth of the run trains on a tenth of `num_epochs` · an epoch's tokens; reading one costs half of that at most.
    """
    tokens_per_drift = num_epochs * int(first_epoch(table).lengths.sum()) / _NUM_DRIFTS
    most_tokens = _DRIFT_FRACTION * _FORWARD_PASSES_PER_TRAINED_TOKEN * tokens_per_drift
    return int(np.searchsorted(np.cumsum(probe.lengths), most_tokens, side="right"))


def run_event(
    *, train_table: Examples, num_validation_examples: int, settings: TrainingSettings, plan: RunPlan
) -> RunEvent:
    """Return the arithmetic of the run as its log holds it."""
    epoch = first_epoch(train_table)
    return RunEvent(
        num_examples=len(epoch),
        num_validation_examples=num_validation_examples,
        num_tokens=int(epoch.lengths.sum()),
        num_targets=int(epoch.num_targets.sum()),
        num_epochs=settings.num_train_epochs,
        num_steps=plan.num_steps,
        num_warmup_steps=plan.num_warmup_steps,
        tokens_per_step=settings.tokens_per_step,
        tokens_per_micro_batch=settings.tokens_per_micro_batch,
        layout=settings.layout,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        mixture=shares_of(train_table),
    )


def describe_run(table: Examples, *, settings: TrainingSettings, plan: RunPlan) -> str:
    """Return the arithmetic of the run in words, and what to change where the steps are few."""
    epoch = first_epoch(table)
    text = (
        f"{len(epoch):,} {noun(len(epoch), 'examples')}, {int(epoch.lengths.sum()):,} tokens of which "
        f"{int(epoch.num_targets.sum()):,} are targets; {settings.num_train_epochs} "
        f"{noun(settings.num_train_epochs, 'epochs')} at {settings.tokens_per_step:,} tokens a step = "
        f"{plan.num_steps:,} {noun(plan.num_steps, 'steps')}, {plan.num_warmup_steps:,} of them warm-up."
    )
    if plan.num_steps < _FEW_STEPS:
        text += (
            f" That is fewer than {_FEW_STEPS} steps, which is little to learn in: lower training.tokens_per_step, "
            "or raise training.num_train_epochs."
        )
    return text


def describe_epoch(epoch: int, *, num_epochs: int, start: int, num_done: int) -> str:
    """Return an epoch's title; one that goes on after `num_done` of its steps says at which step of the run."""
    part = f", from step {start + num_done + 1:,}" if num_done else ""
    return f"Epoch {epoch + 1} of {num_epochs}{part}"


def describe_validation(validation: Validation, *, select_by: str) -> str:
    """Return what a validation found, in words."""
    metric = "" if validation.metric is None else f", validation {select_by} {validation.metric:.3f}"
    return f"After step {validation.step:,}: validation loss {validation.loss:.3f}{metric}"


def _evaluation_steps(epoch_ends: tuple[int, ...], *, settings: TrainingSettings) -> set[int]:
    if settings.eval_steps is not None:
        return {*range(settings.eval_steps, epoch_ends[-1], settings.eval_steps), epoch_ends[-1]}
    k = settings.evals_per_epoch
    starts = (0, *epoch_ends[:-1])
    return {
        start + max(1, round((end - start) * i / k))
        for start, end in zip(starts, epoch_ends, strict=True)
        for i in range(1, k + 1)
    }


def _require_targets(table: Examples) -> None:
    if not len(table):
        raise DataError("train: found no example; expected at least one to train on. Give more data.")
    without = np.flatnonzero(table.num_targets < 1)
    if len(without):
        more = f" and {len(without) - _MAX_LISTED} more" if len(without) > _MAX_LISTED else ""
        listed = ", ".join(table.record_ids[int(i)] for i in without[:_MAX_LISTED]) + more
        raise DataError(
            f"train: found no target token in {len(without)} examples ({listed}); expected at least one in each. "
            "Drop these records, or raise data.max_length."
        )
