"""What a training will take: a model with its method and planned steps arrive; bytes by kind and seconds leave.

Nothing is trained for the bytes: a copy of the model without data goes through one micro-batch, or, where a method
computes with the values of its weights, the model itself.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

from keeptune.model.device import finish
from keeptune.model.memory import lacks_memory
from keeptune.model.modes import evaluating, gradient_checkpointing, training
from keeptune.model.ranks import ranks_bytes
from keeptune.text.batches import Batch, Step
from keeptune.text.tokens import Examples
from keeptune.training.cost import runtime_memory_bytes
from keeptune.training.footprint import Footprint, without_data
from keeptune.training.settings import TrainingSettings
from keeptune.training.step import Work, accumulate, clear_gradients, compute_loss, make_optimizer

# A gradient and AdamW's two moments of a trained weight, all fp32; beside them AdamW counts each parameter's steps.
_GRADIENT_BYTES = 4
_MOMENTS_BYTES = 8
_STEP_BYTES = 4
# The first pass stands for the start of a training, the second for a step in its midst.
_NUM_PASSES = 2
# How torch and a model's own code say that it looks at values, which are not there.
_LOOKS_AT_VALUES = (RuntimeError, TypeError, AttributeError, ValueError)


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """The most that a training will hold, in bytes by kind.

    `weights` are all of the model's, the method's own included, and a copy of where they began if that is kept, or
    what AdaLoRA notes of each;
    `gradients` and `optimizer` are those of the trained ones; `activations` is what a micro-batch, or the answers of a
    validation, take beside all these; `runtime` what the process holds besides: the interpreter and its libraries, and
    nothing on a GPU.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    runtime: int

    @property
    def total(self) -> int:
        """The sum, which the measured peak is held against."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.runtime

    def to_json(self) -> dict[str, int]:
        """Return the bytes by kind, their sum last."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True, slots=True)
class Speed:
    """What a few micro-batches showed: tokens per second, and the seconds of an update of the weights."""

    tokens_per_second: float
    update_seconds: float

    def seconds(self, *, num_tokens: int, num_steps: int) -> float:
        """Return the time of so many steps over so many tokens in all."""
        return num_tokens / self.tokens_per_second + num_steps * self.update_seconds


def estimate_memory(
    work: Work,
    *,
    batch: Batch,
    accumulates: bool,
    settings: TrainingSettings,
    keeps_start: bool = False,
    answer: Callable[[nn.Module], object] | None = None,
) -> MemoryEstimate | None:
    """Return what training takes with `batch` as its largest micro-batch.

    None where the model is on the meta device and cannot run without data, or where it cannot run at all. `work.model`
    stays as it is.
    `accumulates`: a step has several micro-batches, so that gradients are there when the largest one comes.
    `keeps_start`: the trained weights are kept as they were at first. `answer` does with a model what a validation
    does to decode answers. The measured peak is higher by what is not torch's own: buffers that MKL and oneDNN keep
    (some megabytes, more with large matrices), and blocks of glibc that micro-batches of other sizes leave unused.
    """
    trained = work.parameters.values()
    num_trained = sum(parameter.numel() for parameter in trained)
    gradients = _GRADIENT_BYTES * num_trained
    optimizer = _MOMENTS_BYTES * num_trained + _STEP_BYTES * len(trained)

    def peaks(model: nn.Module) -> tuple[int, int]:
        answers = 0 if answer is None else _answers_bytes(model, answer, device=work.device)
        return _peak_bytes(work, model, batch=batch, accumulates=accumulates, settings=settings), answers

    try:
        with _unlogged("torch._subclasses.fake_tensor"):
            peak, answers = peaks(without_data(work.model, device=work.device))
    except _LOOKS_AT_VALUES:
        if any(parameter.is_meta for parameter in work.model.parameters()):
            return None
        try:
            peak, answers = peaks(work.model)
        except _LOOKS_AT_VALUES as error:
            # An estimate must not stop a training; a lack of memory would stop it anyway.
            clear_gradients(work)
            if lacks_memory(error):
                raise
            return None
    return MemoryEstimate(
        weights=weights_bytes(work.model)
        + (_GRADIENT_BYTES * num_trained if keeps_start else 0)
        + ranks_bytes(work.model),
        gradients=gradients,
        optimizer=optimizer,
        # A validation comes after a step, when its gradients are gone.
        activations=max(peak - gradients - optimizer, answers - gradients, 0),
        runtime=runtime_memory_bytes(work.model, device=work.device),
    )


@contextlib.contextmanager
def _unlogged(name: str) -> Iterator[None]:
    """Keep what torch logs of an operation that has no shapes without data off the terminal: the error is handled."""
    logger = logging.getLogger(name)
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = False


def weights_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights and buffers, wherever they are; tied ones count once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def largest_micro_batch(table: Examples, steps: Sequence[Step], *, settings: TrainingSettings) -> tuple[int, ...]:
    """Return the micro-batch of the steps with the most tokens, padding counted, and of those with the most targets."""
    targets = table.num_targets
    decoder = targets if settings.layout == "pairs" else 0 * targets
    encoder = table.lengths - decoder

    def size(micro_batch: tuple[int, ...]) -> tuple[int, int]:
        members = list(micro_batch)
        tokens = int(table.lengths[members].sum())
        if settings.layout != "packed":
            tokens = len(members) * int(encoder[members].max() + decoder[members].max())
        return tokens, int(targets[members].sum())

    return max((micro_batch for step in steps for micro_batch in step.micro_batches), key=size)


def measure_speed(
    work: Work, table: Examples, *, steps: Sequence[Step], settings: TrainingSettings, at_most_seconds: float
) -> Speed:
    """Return the speed of the first micro-batches and of one update, which changes the model's weights.

    The first micro-batch warms up. No other begins after `at_most_seconds` but the one that is needed.
    """
    lengths, targets = table.lengths, table.num_targets
    members = [list(micro_batch) for step in steps for micro_batch in step.micro_batches]
    begun = time.perf_counter()
    num_tokens, seconds = 0, 0.0
    with training(work.model), gradient_checkpointing(work.model, enabled=settings.gradient_checkpointing):
        for i, indices in enumerate([*members[:1], *members]):
            if num_tokens and time.perf_counter() - begun > at_most_seconds:
                break
            part = Step((tuple(indices),), int(lengths[indices].sum()), int(targets[indices].sum()))
            started = time.perf_counter()
            accumulate(work, part, table=table)
            finish(work.device)
            if i:
                seconds += time.perf_counter() - started
                num_tokens += part.num_tokens
        started = time.perf_counter()
        nn.utils.clip_grad_norm_(work.parameters.values(), settings.max_grad_norm).item()
        make_optimizer(work.parameters, settings=settings).step()
        finish(work.device)
        update_seconds = time.perf_counter() - started
    clear_gradients(work)
    return Speed(num_tokens / seconds, update_seconds)


def _peak_bytes(work: Work, model: nn.Module, *, batch: Batch, accumulates: bool, settings: TrainingSettings) -> int:
    """Return the most that gradients, optimizer and activations take together."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    checkpointing = gradient_checkpointing(model, enabled=settings.gradient_checkpointing)
    with Footprint(model) as footprint, training(model), checkpointing:
        moments = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in (*trained, *trained)]
        for _ in range(_NUM_PASSES):
            loss = compute_loss(work, model, batch)
            (loss / batch.num_targets).backward()
            del loss
            if not accumulates:
                model.zero_grad(set_to_none=True)
        del moments
        model.zero_grad(set_to_none=True)
    return _process_bytes(footprint, device=work.device)


def _answers_bytes(model: nn.Module, answer: Callable[[nn.Module], object], *, device: torch.device) -> int:
    with Footprint(model) as footprint, evaluating(model):
        answer(model)
    return _process_bytes(footprint, device=device)


def _process_bytes(footprint: Footprint, *, device: torch.device) -> int:
    return footprint.peak_bytes if device.type == "cuda" else footprint.heap_bytes()
