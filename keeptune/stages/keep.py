"""What keeps the base model's abilities: a method and general texts arrive; the loop's table, probe and meter leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from keeptune.errors import RecipeError, raise_collected
from keeptune.stages.data import Data
from keeptune.stages.mixture import train_examples
from keeptune.stages.run import Run

if TYPE_CHECKING:
    from torch import nn

    from keeptune.model.methods import Method, ParameterCounts
    from keeptune.stages.training import Fit
    from keeptune.text.mixture import Chosen
    from keeptune.text.tokens import Examples, Teacher
    from keeptune.training.settings import TrainingSettings

_BYTES_PER_WEIGHT = 4


@dataclass(frozen=True, slots=True)
class KeepTexts:
    """General texts in the base model's tokens.

    `replay` is mixed into the training of methods that ask for it, and `replay_sha256` is its content's; on `probe` the
    drift of every method is measured.
    """

    replay: Examples | None
    probe: Examples | None
    replay_sha256: str


@dataclass(frozen=True, slots=True)
class Kept:
    """What a method trains on, what its drift is measured on, and what `training.json` says of both."""

    train_table: Examples
    probe: Examples | None
    facts: Mapping[str, Any]


def require_texts(run: Run, methods: Sequence[str], *, texts: KeepTexts | None) -> None:
    """Refuse methods that replay texts where there are none.

    Raises:
        RecipeError: a method has a replay_fraction.
    """
    fractions = {name: run.recipe.methods[name].replay_fraction for name in methods}
    problems = [
        f"methods.{name}.replay_fraction: found {fraction} and no text to replay; expected texts. "
        f"Set methods.{name}.replay_fraction=0."
        for name, fraction in fractions.items()
        if fraction and (texts is None or texts.replay is None)
    ]
    if problems:
        raise_collected(RecipeError, problems)


def keep(
    run: Run, data: Data, method: Method, *, texts: KeepTexts, base: nn.Module, fit: Fit, settings: TrainingSettings
) -> Kept:
    """Mix the replay into the train split and ask the base model, before it is wrapped or trained, what it expects."""
    import numpy as np

    from keeptune.text.mixture import Chosen, Mixed, choose_replay, first_epoch
    from keeptune.training.plan import num_probe_examples

    ask = partial(_teachers, run, base=base, fit=fit, settings=settings)
    table, facts = train_examples(run.recipe, data), {}
    if method.replay_fraction:
        assert texts.replay is not None
        replay = choose_replay(first_epoch(table), texts.replay, fraction=method.replay_fraction, seed=run.recipe.seed)
        if method.replay_kl:
            replay = replay.taught(ask(replay.first(replay.num_distinct)))
        table = Mixed(table, replay)
        facts |= {"replay_tokens": table.num_replay_tokens, "replay_repeats": table.num_repeats}
        run.context.progress.say(
            f"{method.name}: {table.num_replay_tokens:,} tokens of replay in an epoch, in {len(replay):,} examples of "
            f"which {table.num_repeats:,} stand there again"
        )
    if texts.probe is None:
        return Kept(table, None, facts)
    number = num_probe_examples(texts.probe, table=table, num_epochs=settings.num_train_epochs)
    if not number:
        run.context.progress.say(f"{method.name}: too short a training to measure its drift beside it")
        return Kept(table, None, facts)
    probe = Chosen(texts.probe, np.arange(number))
    facts |= {"drift_probe_tokens": int(probe.lengths.sum())}
    return Kept(table, probe.taught(ask(probe)), facts)


def make_drift_meter(
    run: Run, probe: Examples | None, *, fit: Fit, settings: TrainingSettings
) -> Callable[[nn.Module], float] | None:
    """Return what measures the drift of a method on the probe, None where there is none."""
    from keeptune.model.divergence import target_divergences
    from keeptune.training.drift import drift_meter
    from keeptune.training.plan import plan_validation

    if probe is None:
        return None
    return drift_meter(
        probe,
        micro_batches=plan_validation(probe, settings=settings),
        collate=fit.collate,
        divergences=partial(target_divergences, through_logits=fit.through_logits),
        device=fit.device,
        autocast=fit.autocast,
        stop_requested=run.context.stop_requested,
    )


def own_facts(method: Method, counts: ParameterCounts) -> dict[str, Any]:
    """Return what `training.json` says of the keeping that the method asks for, with its cost; nothing where none."""
    fields = ("frozen_layers", "l2_base", "replay_fraction", "replay_kl")
    facts = {name: getattr(method, name) for name in fields if getattr(method, name)}
    return facts | ({"start_weight_bytes": counts.trained * _BYTES_PER_WEIGHT} if method.l2_base else {})


def _teachers(run: Run, examples: Chosen, *, base: nn.Module, fit: Fit, settings: TrainingSettings) -> list[Teacher]:
    from keeptune.model.teacher import base_top_k
    from keeptune.training.plan import plan_validation

    return base_top_k(
        base,
        examples,
        micro_batches=plan_validation(examples, settings=settings),
        collate=fit.collate,
        through_logits=fit.through_logits,
        autocast=fit.autocast,
        progress=run.progress,
    )
