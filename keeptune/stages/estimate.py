"""A method's model and what it trains on arrive; the memory that its training takes leaves, before it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from keeptune.config import Recipe
from keeptune.stages.computing import policy_of
from keeptune.stages.data import Data, max_new_tokens

if TYPE_CHECKING:
    from torch import nn

    from keeptune.evaluation.generate import Decoding, SideBySide
    from keeptune.model.device import Policy
    from keeptune.stages.training import Fit
    from keeptune.text.tokens import Examples
    from keeptune.training.estimate import MemoryEstimate
    from keeptune.training.settings import TrainingSettings
    from keeptune.training.step import LossFunction, Work


@dataclass(frozen=True, slots=True)
class Intended:
    """A training that has not begun: the model with its method, how it is computed, and on what.

    `l2_base` pulls its trained weights to what they were at first; then a copy of them is kept.
    """

    model: nn.Module
    fit: Fit
    loss: LossFunction
    settings: TrainingSettings
    table: Examples
    l2_base: float

    def work(self) -> Work:
        """Return what each of its steps works with."""
        from keeptune.training.step import Work
        from keeptune.training.tensors import trained_parameters
        from keeptune.training.world import SINGLE

        fit, parameters = self.fit, trained_parameters(self.model)
        return Work(
            self.model, parameters, self.loss, fit.collate, SINGLE, fit.device, fit.autocast, stop_requested=_never
        )


def _never() -> bool:
    return False


def make_decoding(
    recipe: Recipe,
    data: Data,
    model: nn.Module,
    *,
    max_new_tokens: int,
    side_by_side: SideBySide,
    tokens_per_batch: int | None = None,
) -> Decoding:
    """Return how a model's answers are made; `tokens_per_batch` defaults to the recipe's."""
    from keeptune.evaluation.generate import Decoding
    from keeptune.model.artifact import stop_token_ids

    base = data.base
    return Decoding(
        max_new_tokens=max_new_tokens,
        stop_ids=stop_token_ids(model, tokenizer=base.tokenizer, template=base.template),
        pad_id=base.tokenizer.pad_id,
        tokens_per_batch=tokens_per_batch or recipe.evaluation.tokens_per_batch,
        encoder_decoder=base.facts.encoder_decoder,
        max_positions=base.facts.max_positions,
        side_by_side=side_by_side,
    )


def _first_answers(model: nn.Module, *, lengths: list[int], decoding: Decoding, policy: Policy) -> None:
    """Begin answers as a validation does, in its number format."""
    from keeptune.evaluation.generate import first_pass
    from keeptune.model.device import autocasting

    with autocasting(policy.device, policy.validating_autocast):
        first_pass(model, lengths=lengths, decoding=decoding)


def estimate(recipe: Recipe, data: Data, intended: Intended) -> MemoryEstimate | None:
    """Return the memory that a training takes, None where its model cannot run without data."""
    from keeptune.evaluation.evaluate import validation_positions
    from keeptune.training.estimate import estimate_memory, largest_micro_batch
    from keeptune.training.plan import plan_steps

    table, settings, answer = intended.table, intended.settings, None
    if settings.select_by != "loss":
        validation = data.table("validation")
        chosen = validation_positions(validation.record_ids, num_records=recipe.evaluation.num_validation_records)
        lengths = (validation.lengths - validation.num_targets)[chosen].tolist()
        limit = max_new_tokens(recipe, data)
        side_by_side = intended.fit.side_by_side
        decoding = make_decoding(recipe, data, intended.model, max_new_tokens=limit, side_by_side=side_by_side)
        answer = partial(_first_answers, lengths=lengths, decoding=decoding, policy=policy_of(recipe))
    # Each epoch packs its steps anew, and alike.
    steps = plan_steps(table, settings=settings, epoch=0)
    return estimate_memory(
        intended.work(),
        batch=intended.fit.collate([table[i] for i in largest_micro_batch(table, steps, settings=settings)]),
        accumulates=any(len(step.micro_batches) > 1 for step in steps),
        settings=settings,
        keeps_start=intended.l2_base > 0.0,
        answer=answer,
    )
