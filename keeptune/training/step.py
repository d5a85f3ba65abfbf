"""The work inside one step: planned micro-batches arrive, gradients in the model and a loss leave."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from keeptune.model.device import autocasting, widest
from keeptune.model.modes import evaluating
from keeptune.model.ranks import AdaptiveRanks
from keeptune.text.batches import Batch, Step
from keeptune.text.tokens import Example, Examples
from keeptune.training.settings import TrainingSettings
from keeptune.training.world import World

LossFunction = Callable[[nn.Module, Batch], Tensor]


class Stopped(Exception):
    """A stop was asked for amid a step or a validation; what it had done counts for nothing."""


@dataclass(frozen=True, slots=True)
class Pull:
    """L2-SP: `strength` · ‖θ - θ0‖² is part of the objective, θ0 being the `start` weights of the trained parameters.

    Source: Li et al. 2018, arXiv 1802.01483, equation 2.
    """

    strength: float
    start: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Work:
    """What every step works with; `loss` returns the summed loss in nats over a batch's target tokens."""

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    loss: LossFunction
    collate: Callable[[Sequence[Example]], Batch]
    world: World
    device: torch.device
    autocast: torch.dtype | None
    stop_requested: Callable[[], bool]
    pull: Pull | None = None
    ranks: AdaptiveRanks | None = None


@dataclass(frozen=True, slots=True)
class Accumulated:
    """The loss of a step in nats per target token, and the examples that a non-finite loss may come from."""

    loss: float
    suspects: tuple[int, ...]


def make_optimizer(parameters: Mapping[str, nn.Parameter], *, settings: TrainingSettings) -> torch.optim.Optimizer:
    """Return AdamW over the trained parameters; weight decay leaves out biases and norms, as is usual."""
    # bf16 weights would lose most updates: they must be trained through fp32 masters.
    assert all(parameter.dtype == torch.float32 for parameter in parameters.values())
    matrices = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters.values() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        fused=True,
    )


def step_seed(seed: int, *, step: int, rank: int) -> int:
    """Return the seed of torch's generators for one step, so that nothing before the step can shift it."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])


def accumulate(work: Work, step: Step, *, table: Examples) -> Accumulated:
    """Add the gradient of the step's loss to the parameters: the sum over its target tokens ÷ their count.

    Raises:
        Stopped: a stop was asked for on some rank; the gradients are gone.
    """
    losses: list[Tensor] = []
    mine = step.micro_batches[work.world.rank :: work.world.size]
    stopped = False
    for micro_batch in mine:
        stopped = work.stop_requested()
        if stopped:
            break
        loss = _batch_loss(work, table, micro_batch=micro_batch)
        (loss / step.num_targets).backward()
        losses.append(loss.detach())
        # Its graph would stand in the heap, in many small parts, between the next micro-batch's tensors.
        del loss
    if work.world.any_rank(stopped, device=work.device):
        clear_gradients(work)
        raise Stopped
    _sum_gradients(work)
    suspects = tuple(i for micro_batch in step.micro_batches for i in micro_batch)
    wide = widest(work.device)
    values = torch.stack(losses).to(wide) if losses else torch.zeros(1, dtype=wide, device=work.device)
    loss_sum = float(work.world.sum_over_ranks(values.sum()))
    if not math.isfinite(loss_sum) and not bool(values.isfinite().all()):
        suspects = mine[int(values.isfinite().logical_not().nonzero()[0])]
    return Accumulated(loss_sum / step.num_targets, suspects)


def pull_to(parameters: Mapping[str, nn.Parameter], *, strength: float) -> Pull | None:
    """Return a pull to the parameters as they are now, None where the strength is 0; copies every one of them."""
    if strength == 0.0:
        return None
    return Pull(strength, {name: parameter.detach().clone() for name, parameter in parameters.items()})


@torch.no_grad()
def add_pull(work: Work) -> float | None:
    """Add the gradient of the pull to the parameters' and return what it adds to the objective; None without a pull.

    Every rank adds the whole of it, after the sum over ranks.
    """
    if work.pull is None:
        return None
    wide = widest(work.device)
    total = torch.zeros((), dtype=wide, device=work.device)
    for name, parameter in work.parameters.items():
        difference = parameter - work.pull.start[name]
        total += difference.square().sum(dtype=wide)
        difference *= 2 * work.pull.strength
        parameter.grad = difference if parameter.grad is None else parameter.grad.add_(difference)
    return work.pull.strength * float(total)


def validation_loss(work: Work, table: Examples, *, micro_batches: Sequence[Sequence[int]]) -> float:
    """Return the loss over every target token of the table in nats per target token; NaN where there is none.

    Raises:
        Stopped: a stop was asked for on some rank.
    """
    wide = widest(work.device)
    total = torch.zeros((), dtype=wide, device=work.device)
    stopped = False
    with evaluating(work.model):
        for micro_batch in micro_batches[work.world.rank :: work.world.size]:
            stopped = work.stop_requested()
            if stopped:
                break
            total += _batch_loss(work, table, micro_batch=micro_batch).to(wide)
    if work.world.any_rank(stopped, device=work.device):
        raise Stopped
    num_targets = int(table.num_targets.sum())
    return float(work.world.sum_over_ranks(total)) / num_targets if num_targets else math.nan


def clear_gradients(work: Work) -> None:
    """Drop every gradient and its memory."""
    for parameter in work.parameters.values():
        parameter.grad = None


def record_ids(table: Examples, step: Step) -> tuple[str, ...]:
    """Return the ids of the records in a step, in the order of its micro-batches."""
    ids = table.record_ids
    return tuple(ids[i] for micro_batch in step.micro_batches for i in micro_batch)


def ids_sha256(ids: Sequence[str]) -> str:
    """Return the SHA-256 of the ids, one a line."""
    return hashlib.sha256("\n".join(ids).encode("utf-8")).hexdigest()


def _batch_loss(work: Work, table: Examples, *, micro_batch: Sequence[int]) -> Tensor:
    batch = work.collate([table[i] for i in micro_batch])
    # The divisor was counted from the table before the first batch existed; both must mean the same.
    assert batch.num_targets == int(table.num_targets[list(micro_batch)].sum())
    return compute_loss(work, work.model, batch)


def compute_loss(work: Work, model: nn.Module, batch: Batch) -> Tensor:
    """Return `model`'s summed loss in nats over a batch, computed in the number format of the training."""
    with autocasting(work.device, work.autocast):
        return work.loss(model, batch)


def _sum_gradients(work: Work) -> None:
    if work.world.size == 1:
        return
    # Every rank sums every parameter: one that had no micro-batch adds zeros.
    for parameter in work.parameters.values():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = work.world.sum_over_ranks(gradient)
