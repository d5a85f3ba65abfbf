"""A plan: a recipe arrives; the memory and the time that each of its methods would take leave; nothing is kept."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from keeptune.config import Recipe
from keeptune.errors import RecipeError
from keeptune.stages.computing import policy_of
from keeptune.stages.data import Data, borrowed_data
from keeptune.stages.estimate import Intended, estimate
from keeptune.stages.methods import method_of
from keeptune.stages.mixture import train_examples
from keeptune.stages.run import Context
from keeptune.stages.training import TOO_LITTLE_MEMORY, fit_model, intend, weight_type

if TYPE_CHECKING:
    from torch import nn

    from keeptune.model.device import Policy
    from keeptune.model.methods import Method
    from keeptune.training.estimate import MemoryEstimate

_PROBE_SECONDS = 4.0
# A model is loaded, to be timed, where its weights leave as much room again.
_ROOM_FACTOR = 2
_SMALLEST_MICRO_BATCH = 128


@dataclass(frozen=True, slots=True)
class PlannedMethod:
    """What a method would take; `memory` is None where only training can tell.

    `seconds` is a guess from a few micro-batches, None where the model was too large to try. `remedy` says which
    settings would make it fit where it does not.
    """

    name: str
    trained_parameters: int
    total_parameters: int
    memory: MemoryEstimate | None
    num_steps: int
    num_tokens: int
    seconds: float | None
    artifact_bytes: int
    remedy: str | None


@dataclass(frozen=True, slots=True)
class PlanOutcome:
    """What `keeptune plan` shows; `available_bytes` is all that a training may hold, None where none can tell.

    `why` says in which number formats the device computes, and why.
    """

    device: str
    why: str
    available_bytes: int | None
    methods: Sequence[PlannedMethod]


@dataclass(frozen=True, slots=True)
class _Machine:
    policy: Policy
    available_bytes: int | None

    def holds(self, num_bytes: int) -> bool:
        return self.available_bytes is None or num_bytes <= self.available_bytes


def plan(recipe: Recipe, *, context: Context) -> PlanOutcome:
    """Say what memory and time each method would take, before any is trained; nothing is written.

    Prepared data of the run are used where they stand unchanged. A model that fits is loaded and tried for about 5 s.

    Raises:
        OutOfMemoryError: a model does not fit into memory, though it looked as if it would.
        RecipeError: a budget cannot be read.
    """
    from keeptune.model.memory import memory_errors
    from keeptune.stages.budgets import budgets_of
    from keeptune.training.cost import available_memory_bytes

    budgets_of(recipe)
    policy = policy_of(recipe)
    machine = _Machine(policy, available_memory_bytes(policy.device))
    planned = []
    with borrowed_data(recipe, progress=context.progress) as data:
        for name in recipe.methods:
            with memory_errors(f"methods.{name}: {TOO_LITTLE_MEMORY}"):
                planned.append(_planned(recipe, data, method_of(recipe, name), machine=machine))
            gc.collect()
    return PlanOutcome(policy.device.type, policy.why, machine.available_bytes, planned)


def _planned(recipe: Recipe, data: Data, method: Method, *, machine: _Machine) -> PlannedMethod:
    from keeptune.model.artifact import artifact_bytes
    from keeptune.model.methods import count_parameters
    from keeptune.text.mixture import first_epoch
    from keeptune.training.plan import plan_run

    intended = _intended(recipe, data, method, machine=machine)
    table, settings, counts = intended.table, intended.settings, count_parameters(intended.model)
    memory = estimate(recipe, data, intended)
    too_large = memory is not None and not machine.holds(memory.total)
    # The texts that a method replays are not read for a plan: their tokens come on top of the train split's.
    longer = 1.0 / (1.0 - method.replay_fraction)
    num_steps = plan_run(table, settings=settings, has_validation=False, has_metric=False).num_steps
    planned = PlannedMethod(
        name=method.name,
        trained_parameters=counts.trained,
        total_parameters=counts.total,
        memory=memory,
        num_steps=round(longer * num_steps),
        num_tokens=round(longer * settings.num_train_epochs * int(first_epoch(table).lengths.sum())),
        seconds=None,
        artifact_bytes=artifact_bytes(intended.model, tokenizer_folder=data.base.tokenizer_folder),
        remedy=_remedy(recipe, data, intended, method=method, machine=machine) if too_large else None,
    )
    if too_large or _on_meta(intended.model):
        return planned
    return replace(planned, seconds=_seconds(intended, num_tokens=planned.num_tokens, num_steps=planned.num_steps))


def _intended(recipe: Recipe, data: Data, method: Method, *, machine: _Machine) -> Intended:
    """Return a method's training, its model on the meta device where the weights would hardly fit."""
    import torch

    from keeptune.model.load import empty_model, load_model
    from keeptune.model.methods import apply_method
    from keeptune.training.estimate import weights_bytes

    folder, policy = data.base.folder, machine.policy
    dtype = weight_type(policy, method)
    model: nn.Module | None = None
    empty = empty_model(folder)
    for parameter in empty.parameters():
        parameter.data = parameter.data.to(dtype)
    quantization = data.base.facts.quantization
    # Only weights that are there can be quantised; they take a fraction of what these would.
    if quantization is None and not machine.holds(_ROOM_FACTOR * weights_bytes(empty)):
        # BOFT, FROD and UNILORA compute with the weights' values, and need them.
        with contextlib.suppress(RecipeError), torch.device("meta"):
            model = apply_method(empty, method, seed=recipe.seed)
    has_weights = model is None
    if model is None:
        base = load_model(folder, device=policy.device, dtype=dtype, quantization=quantization)
        model = apply_method(base, method, seed=recipe.seed)
    fit = fit_model(model, data=data, device=policy.device, autocast=policy.compute, has_weights=has_weights)
    table = train_examples(recipe, data)
    return intend(recipe, data, replace(method, replay_kl=0.0), model=model, fit=fit, table=table)


def _on_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _seconds(intended: Intended, *, num_tokens: int, num_steps: int) -> float | None:
    """Return the time of the whole training as a few micro-batches let one guess, None where memory is short."""
    from keeptune.model.memory import lacks_memory
    from keeptune.training.estimate import measure_speed
    from keeptune.training.plan import plan_steps

    table, settings = intended.table, intended.settings
    steps = plan_steps(table, settings=settings, epoch=0)
    try:
        speed = measure_speed(intended.work(), table, steps=steps, settings=settings, at_most_seconds=_PROBE_SECONDS)
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        return None
    return speed.seconds(num_tokens=num_tokens, num_steps=num_steps)


def _remedy(recipe: Recipe, data: Data, intended: Intended, *, method: Method, machine: _Machine) -> str:
    """Return the first settings under which the method fits, else that the model is too large for it."""
    for changed in _smaller(recipe, method):
        smaller = replace(intended, settings=replace(intended.settings, **changed))
        memory = estimate(recipe, data, smaller)
        if memory is not None and machine.holds(memory.total):
            listed = " and ".join(f"training.{key}={str(value).lower()}" for key, value in changed.items())
            return f"{method.name}: does not fit; with {listed} it takes {memory.total / 1e9:.2f} GB, which does."
    advice = "a smaller base model" if method.peft_type else "a PEFT method, whose frozen weights have no gradients"
    return f"{method.name}: fits with no size of micro-batch. Choose {advice}."


def _smaller(recipe: Recipe, method: Method) -> Iterator[dict[str, int | bool]]:
    """Yield training settings that take less memory, those that cost least time first."""
    from keeptune.model.modes import NOT_RECOMPUTED

    sizes, tokens = [], recipe.training.tokens_per_micro_batch
    while (tokens := tokens // 2) >= _SMALLEST_MICRO_BATCH:
        sizes.append(tokens)
    yield from ({"tokens_per_micro_batch": size} for size in sizes)
    if not recipe.training.gradient_checkpointing and method.peft_type not in NOT_RECOMPUTED:
        yield {"gradient_checkpointing": True}
        yield from ({"gradient_checkpointing": True, "tokens_per_micro_batch": size} for size in sizes[-1:])
