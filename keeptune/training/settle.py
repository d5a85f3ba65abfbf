"""What is due between two steps: a run and its state arrive; the state of what is measured and saved leaves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from keeptune.model.memory import memory_errors
from keeptune.model.modes import evaluating
from keeptune.progress import Progress
from keeptune.text.tokens import Examples
from keeptune.training.checkpoint import TrainingState, save_checkpoint
from keeptune.training.cost import peak_memory_bytes
from keeptune.training.events import DriftEvent, EventLog, ValidationEvent
from keeptune.training.plan import RunPlan, describe_validation, plan_validation
from keeptune.training.selection import Selection
from keeptune.training.settings import TrainingSettings, Validation
from keeptune.training.step import Work, validation_loss
from keeptune.training.tensors import optimizer_tensors


@dataclass(frozen=True, slots=True)
class Run:
    """One training: where it lies, what it works with, and what decides which step is best."""

    folder: Path
    key: str
    settings: TrainingSettings
    plan: RunPlan
    work: Work
    optimizer: torch.optim.Optimizer
    train_table: Examples
    validation_table: Examples
    validate: Callable[[nn.Module], float] | None
    drift: Callable[[nn.Module], float] | None
    selection: Selection
    log: EventLog
    progress: Progress

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    def note(self, event: str, *, record: Any) -> None:
        """Add an event to the log, once for all ranks."""
        if self.work.world.rank == 0:
            self.log.append(event, record)

    def memory_errors(self, step: int) -> AbstractContextManager[None]:
        """Name what to lower where a micro-batch does not fit inside the block."""
        return memory_errors(
            f"{self.folder}: step {step}: found too little memory for micro-batches of "
            f"{self.settings.tokens_per_micro_batch:,} tokens; expected room for one forward and backward pass. Lower "
            "training.tokens_per_micro_batch, or set training.gradient_checkpointing=true."
        )

    def peak_memory_bytes(self, state: TrainingState) -> int:
        """Return the most memory held so far, over every start."""
        return max(state.peak_memory_bytes, peak_memory_bytes(self.work.device))


def settled(run: Run, state: TrainingState, *, saved: TrainingState) -> tuple[TrainingState, TrainingState]:
    """Validate, measure and save where that is due after a step; return the state, and the state on the disk."""
    to_do = to_do_again(state)
    if state.step in run.plan.evaluation_steps and "validation" in to_do:
        state = replace(state, validations=(*state.validations, _validated(run, state.step)))
    ends = run.selection.out_of_patience(state.validations)
    if run.drift is not None and "drift" in to_do and (ends or state.step in run.plan.drift_steps):
        state = _drifted(run, state, drift=run.drift)
    best = run.selection.best(state.validations)
    due = ends or state.step in run.plan.save_steps or (best is not None and best.step == state.step)
    if not due or state == saved:
        return state, saved
    save(run, state)
    return state, state


def to_do_again(state: TrainingState) -> list[str]:
    """Return which kinds of measurement the state knows nothing of after its own step."""
    validated = any(validation.step == state.step for validation in state.validations)
    return [kind for kind, done in (("validation", validated), ("drift", state.drift_step == state.step)) if not done]


def _validated(run: Run, step: int) -> Validation:
    epoch_ends = step in run.plan.epoch_ends
    if epoch_ends:
        # `validate` may open a piece of progress of its own.
        run.progress.finish()
    metric = None
    with run.memory_errors(step):
        micro_batches = plan_validation(run.validation_table, settings=run.settings)
        loss = validation_loss(run.work, run.validation_table, micro_batches=micro_batches)
        if run.validate is not None and epoch_ends:
            with evaluating(run.work.model):
                metric = run.validate(run.work.model)
    validation = Validation(step=step, epoch=run.plan.epochs_done(step), loss=loss, metric=metric)
    name = None if metric is None else run.settings.select_by
    run.note("validation", record=ValidationEvent(step, validation.epoch, loss, name, metric))
    run.progress.say(describe_validation(validation, select_by=run.settings.select_by))
    return validation


def _drifted(run: Run, state: TrainingState, *, drift: Callable[[nn.Module], float]) -> TrainingState:
    with run.memory_errors(state.step), evaluating(run.work.model):
        kl = drift(run.work.model)
    run.note("drift", record=DriftEvent(state.step, run.plan.epochs_done(state.step), kl))
    run.progress.say(f"After step {state.step:,}: drift from base: KL {kl:.3f} nats per token")
    return replace(state, drift_step=state.step)


def save(run: Run, state: TrainingState) -> None:
    """Write the state's checkpoint; returns when it stands for every rank.

    Raises:
        StorageError: the disk refuses.
    """
    best = run.selection.best(state.validations)
    if run.work.world.rank == 0:
        # The log first: a checkpoint must never stand without the lines that lead to it.
        run.log.sync()
        save_checkpoint(
            run.checkpoints,
            weights=run.work.parameters,
            optimizer=optimizer_tensors(run.optimizer, parameters=run.work.parameters, ranks=run.work.ranks),
            state=replace(state, peak_memory_bytes=run.peak_memory_bytes(state)),
            best_step=None if best is None else best.step,
            run_key=run.key,
        )
    run.work.world.wait(device=run.work.device)
