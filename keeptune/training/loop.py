"""The one training loop: a model and token tables arrive, the model leaves with the best weights of its run.

What it writes: `events.jsonl` and `checkpoints/` in the folder handed to it. The same call again goes on from there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

from keeptune.errors import Interrupted, NonFiniteError
from keeptune.model.modes import gradient_checkpointing, training
from keeptune.model.ranks import adaptive_ranks
from keeptune.progress import Progress
from keeptune.storage import require_space, storage_errors
from keeptune.text.batches import Batch, Step
from keeptune.text.tokens import Example, Examples
from keeptune.training.checkpoint import (
    OPTIMIZER,
    WEIGHTS,
    TrainingState,
    load_latest,
    restore_weights,
)
from keeptune.training.cost import reset_peak_memory
from keeptune.training.events import EventLog, NonFiniteEvent, ResumedEvent, StepEvent
from keeptune.training.plan import (
    describe_epoch,
    describe_run,
    plan_run,
    plan_steps,
    run_event,
)
from keeptune.training.schedule import learning_rate_factor
from keeptune.training.selection import Selection, describe_ties
from keeptune.training.settings import TrainingResult, TrainingSettings, Validation
from keeptune.training.settle import Run, save, settled, to_do_again
from keeptune.training.step import (
    Accumulated,
    LossFunction,
    Stopped,
    Work,
    accumulate,
    add_pull,
    clear_gradients,
    ids_sha256,
    make_optimizer,
    pull_to,
    record_ids,
    step_seed,
)
from keeptune.training.tensors import restore_optimizer, restore_parameters, trained_parameters
from keeptune.training.world import World

__all__ = ["Examples", "TrainingResult", "TrainingSettings", "Validation", "train"]

# Weights and AdamW's two moments of each, in as many checkpoints as rotation and the next save can hold at once.
_TENSORS_PER_PARAMETER = 3
# What AdaLoRA notes of each weight is saved too.
_MORE_TENSORS_WITH_RANKS = 2
_MOST_CHECKPOINTS = 4
_SPACE_MARGIN = 1.1
_MAX_LISTED = 10


def train(
    *,
    model: nn.Module,
    train_table: Examples,
    validation_table: Examples,
    loss: LossFunction,
    collate: Callable[[Sequence[Example]], Batch],
    settings: TrainingSettings,
    folder: Path,
    validate: Callable[[nn.Module], float] | None,
    higher_is_better: bool,
    world: World,
    device: torch.device,
    autocast: torch.dtype | None,
    progress: Progress,
    stop_requested: Callable[[], bool],
    run_key: str,
    l2_base: float = 0.0,
    drift: Callable[[nn.Module], float] | None = None,
) -> TrainingResult:
    """Train the parameters of `model` that require gradients, and leave those of the best step in it.

    `loss` returns the summed loss in nats over a batch's target tokens; a step's gradient is that of the sum over all
    its micro-batches and ranks ÷ their target tokens, and of `l2_base` · ‖θ - θ0‖², θ0 being the weights that `model`
    is given with: they are kept beside it. `validate` returns the metric that selects, and is given if and only if
    `settings.select_by` is not "loss". `drift` returns the divergence from the base model, in nats per target token,
    and is asked ten times a run and at its end. Both may raise `Interrupted`. The same arguments and `run_key` mean the
    same run: on CPU, stopping anywhere and calling again changes no bit of weights, optimizer and log (durations,
    memory and the log's `resumed` lines apart). Seeds torch's global generators at each step.

    Raises:
        CheckpointError: checkpoints exist and none is whole.
        DataError: an example has no target token.
        FolderInUseError: the checkpoints are those of another `run_key`.
        Interrupted: `stop_requested` said so; everything up to the last whole step is saved.
        NonFiniteError: a loss or a gradient is; the weights are those before the step.
        OutOfMemoryError: a micro-batch does not fit.
        StorageError: the disk refuses; what was saved before stands untouched.
    """
    assert (validate is None) == (settings.select_by == "loss")
    parameters = trained_parameters(model)
    plan = plan_run(
        train_table,
        settings=settings,
        has_validation=len(validation_table) > 0,
        has_metric=validate is not None,
        # One rank that stopped here would leave the others waiting.
        stop_requested=stop_requested if world.size == 1 else lambda: False,
    )
    run = Run(
        folder=folder,
        key=run_key,
        settings=settings,
        plan=plan,
        work=Work(
            model,
            parameters,
            loss,
            collate,
            world,
            device,
            autocast,
            stop_requested,
            # Before a checkpoint is read: the start is the base model's weights, wherever the run goes on.
            pull=pull_to(parameters, strength=l2_base),
            ranks=adaptive_ranks(model, num_steps=plan.num_steps),
        ),
        optimizer=make_optimizer(parameters, settings=settings),
        train_table=train_table,
        validation_table=validation_table,
        validate=validate,
        drift=drift,
        selection=Selection(settings.select_by, validate is not None and higher_is_better, settings.patience),
        log=EventLog(folder / "events.jsonl"),
        progress=progress,
    )
    progress.say(describe_run(train_table, settings=settings, plan=run.plan))
    reset_peak_memory(device)
    with gradient_checkpointing(model, enabled=settings.gradient_checkpointing):
        state = _steps_taken(run, _started(run))
    return _finished(run, state)


@dataclass(frozen=True, slots=True)
class _EpochLoss:
    """The loss over the target tokens of an epoch so far, from the step on at which this process began."""

    nats: float = 0.0
    num_targets: int = 0
    epoch: int = 0

    @property
    def mean(self) -> float:
        """In nats per target token."""
        return self.nats / self.num_targets

    def after(self, loss: float, *, step: Step, epoch: int) -> _EpochLoss:
        """Return it after a step of `epoch` with the mean `loss`."""
        nats, num_targets = loss * step.num_targets, step.num_targets
        if epoch != self.epoch:
            return _EpochLoss(nats, num_targets, epoch)
        return _EpochLoss(self.nats + nats, self.num_targets + num_targets, epoch)


def _steps_taken(run: Run, state: TrainingState) -> TrainingState:
    """Take the steps that are left; the loop itself.

    Raises:
        Interrupted: a stop was asked for; the state after the last whole step is saved.
    """
    saved, shown = state, _EpochLoss()
    try:
        # A stop amid the validation after a step left that validation to this start.
        state, saved = settled(run, state, saved=saved)
        for step in _steps_after(run, state.step):
            if run.selection.out_of_patience(state.validations):
                break
            state, loss = _taken(run, state, step=step)
            shown = shown.after(loss, step=step, epoch=int(run.plan.epochs_done(state.step - 1)))
            note = f"step {state.step}, mean train loss {shown.mean:.3f}"
            run.progress.advance(step.num_tokens, note=note)
            state, saved = settled(run, state, saved=saved)
    except (Stopped, Interrupted) as error:
        if state != saved:
            save(run, state)
        raise Interrupted(
            f"{run.folder}: stopped on request at step {state.step} of {run.plan.num_steps}; everything up to "
            "this step is saved. Give the same command again to go on."
        ) from error
    finally:
        run.progress.finish()
    return state


def _started(run: Run) -> TrainingState:
    """Return the state to go on from; weights, optimizer and log are set to it."""
    world, device, parameters = run.work.world, run.work.device, run.work.parameters
    with storage_errors(run.checkpoints):
        run.checkpoints.mkdir(parents=True, exist_ok=True)
    checkpoint = None
    for rank in range(world.size):
        # One rank after the other: the first sets bad checkpoints aside, the others find only good ones.
        if rank == world.rank:
            checkpoint = load_latest(run.checkpoints, run_key=run.key)
        world.wait(device=device)
    _require_space(run)
    if checkpoint is None:
        if world.rank == 0:
            run.log.clear()
        event = run_event(
            train_table=run.train_table,
            num_validation_examples=len(run.validation_table),
            settings=run.settings,
            plan=run.plan,
        )
        run.note("run", record=event)
        return TrainingState()
    step = checkpoint.state.step
    restore_parameters(checkpoint.folder / WEIGHTS, parameters=parameters)
    restore_optimizer(
        checkpoint.folder / OPTIMIZER, optimizer=run.optimizer, parameters=parameters, ranks=run.work.ranks
    )
    if world.rank == 0:
        run.log.truncate_after(step, without=to_do_again(checkpoint.state))
    run.note("resumed", record=ResumedEvent(step, checkpoint.quarantined))
    for name in checkpoint.quarantined:
        run.progress.say(f"{run.checkpoints / name}: set aside, because it or its best step is damaged.")
    run.progress.say(f"Going on after step {step} of {run.plan.num_steps}.")
    return checkpoint.state


def _steps_after(run: Run, step: int) -> Iterator[Step]:
    """Yield what is left to do after `step`, one progress line an epoch."""
    for epoch, end in enumerate(run.plan.epoch_ends):
        if end <= step:
            continue
        start = run.plan.epoch_start(epoch)
        num_done = max(0, step - start)
        steps = plan_steps(run.train_table, settings=run.settings, epoch=epoch).after(num_done)
        title = describe_epoch(epoch, num_epochs=run.settings.num_train_epochs, start=start, num_done=num_done)
        run.progress.start(title, total=steps.num_tokens, unit="tokens")
        yield from steps


def _taken(run: Run, state: TrainingState, *, step: Step) -> tuple[TrainingState, float]:
    """Return the state after one update of the trained parameters, and the step's loss before it."""
    started = time.perf_counter()
    work, settings, number = run.work, run.settings, state.step + 1
    torch.manual_seed(step_seed(settings.seed, step=number, rank=work.world.rank))
    learning_rate = _set_learning_rate(run, number)
    with run.memory_errors(number), training(work.model):
        accumulated = accumulate(work, step, table=run.train_table)
        l2_penalty = add_pull(work)
        orthogonality = None if work.ranks is None else work.ranks.add_orthogonality_()
        grad_norm = nn.utils.clip_grad_norm_(work.parameters.values(), settings.max_grad_norm).item()
        if not math.isfinite(accumulated.loss) or not math.isfinite(grad_norm):
            clear_gradients(work)
            _raise_non_finite(run, number, accumulated=accumulated, grad_norm=grad_norm)
        run.optimizer.step()
        if work.ranks is not None:
            work.ranks.allocate_(number)
        clear_gradients(work)
    state = replace(
        state,
        step=number,
        train_seconds=state.train_seconds + time.perf_counter() - started,
        num_train_tokens=state.num_train_tokens + step.num_tokens,
        num_target_tokens=state.num_target_tokens + step.num_targets,
    )
    event = StepEvent(
        step=number,
        epoch=run.plan.epochs_done(number),
        loss=accumulated.loss,
        learning_rate=learning_rate,
        grad_norm=grad_norm,
        num_tokens=step.num_tokens,
        num_targets=step.num_targets,
        record_ids_sha256=ids_sha256(record_ids(run.train_table, step)),
        elapsed_seconds=state.train_seconds,
        l2_penalty=l2_penalty,
        orthogonality=orthogonality,
    )
    run.note("step", record=event)
    return state, accumulated.loss


def _finished(run: Run, state: TrainingState) -> TrainingResult:
    """Load the best weights and return what the run did."""
    best = run.selection.best(state.validations)
    if best is None:
        run.progress.say("No validation gave a finite value: the weights of the last step are kept as the best.")
    elif told := describe_ties(run.selection, state.validations):
        run.progress.say(told)
    if best is not None and best.step != state.step:
        restore_weights(run.checkpoints, step=best.step, parameters=run.work.parameters)
    result = TrainingResult(
        num_steps=state.step,
        best_step=state.step if best is None else best.step,
        best_value=None if best is None else run.selection.value(best),
        select_by=run.settings.select_by,
        num_epochs_done=run.plan.epochs_done(state.step),
        stopped_early=state.step < run.plan.num_steps,
        train_seconds=state.train_seconds,
        num_train_tokens=state.num_train_tokens,
        num_target_tokens=state.num_target_tokens,
        tokens_per_second=state.num_train_tokens / state.train_seconds,
        peak_memory_bytes=run.peak_memory_bytes(state),
        validation=state.validations,
        best_loss=None if best is None else best.loss,
        metric_moved=run.selection.moved(state.validations),
    )
    run.note("finished", record=result)
    return result


def _set_learning_rate(run: Run, number: int) -> float:
    settings = run.settings
    learning_rate = settings.learning_rate * learning_rate_factor(
        number,
        num_steps=run.plan.num_steps,
        num_warmup_steps=run.plan.num_warmup_steps,
        kind=settings.lr_scheduler_type,
        cooldown_fraction=settings.cooldown_fraction,
    )
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    return learning_rate


def _raise_non_finite(run: Run, number: int, *, accumulated: Accumulated, grad_norm: float) -> NoReturn:
    ids = [run.train_table.record_ids[i] for i in accumulated.suspects]
    run.note("non_finite", record=NonFiniteEvent(number, tuple(ids)))
    more = f" and {len(ids) - _MAX_LISTED} more" if len(ids) > _MAX_LISTED else ""
    raise NonFiniteError(
        f"{run.folder}: step {number}: found a loss of {accumulated.loss} and a gradient norm of {grad_norm} with the "
        f"records {', '.join(ids[:_MAX_LISTED])}{more}; expected finite numbers. The weights are those before this "
        "step. Look at these records, or lower the method's learning_rate."
    )


def _require_space(run: Run) -> None:
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in run.work.parameters.values())
    num_present = sum(1 for path in run.checkpoints.iterdir() if path.is_dir())
    num_to_come = max(1, _MOST_CHECKPOINTS - num_present)
    num_tensors = _TENSORS_PER_PARAMETER + (_MORE_TENSORS_WITH_RANKS if run.work.ranks is not None else 0)
    require_space(run.checkpoints, needed_bytes=int(num_to_come * num_tensors * _SPACE_MARGIN * num_bytes))
