"""The mixture of tasks: a recipe and prepared data arrive; what training reads, and how often, leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from keeptune.config import Recipe
from keeptune.config_data import MixtureFields
from keeptune.data.record import REPLAY
from keeptune.stages.data import Data
from keeptune.stages.run import Run
from keeptune.storage import storage_errors

if TYPE_CHECKING:
    from torch import nn

    from keeptune.evaluation.evaluate import Bench, Split
    from keeptune.text.mixture import Share
    from keeptune.text.tokens import Examples

_SEVERAL = 2


def train_examples(recipe: Recipe, data: Data) -> Examples:
    """Return the train split as training reads it: every example once an epoch, or a mixture of its tasks."""
    from keeptune.text.mixture import Mixture, task_shares

    table, mixture = data.table("train"), recipe.data.mixture
    if mixture is None:
        return table
    names = tuple(task.name for task in recipe.data.tasks if task.train)
    tasks = _task_numbers(data.folder / "train.jsonl", names=names, key=data.key)
    counts = dict(zip(names, np.bincount(tasks, minlength=len(names)).tolist(), strict=True))
    return Mixture(table, tasks=tasks, shares=task_shares(counts, **_rule(mixture)), seed=recipe.seed)


def mixture_key(recipe: Recipe) -> dict[str, Any]:
    """Return what the mixture adds to the key of a training; nothing where the recipe has none."""
    mixture = recipe.data.mixture
    if mixture is None:
        return {}
    return {"mixture": mixture if mixture == "equal" else mixture.model_dump(mode="json")}


def tokens_per_step(recipe: Recipe, table: Examples) -> int:
    """Return the tokens of a step: the recipe's, or what the lengths of an epoch's examples ask for."""
    from keeptune.text.batches import auto_tokens_per_step
    from keeptune.text.mixture import first_epoch

    training = recipe.training
    if training.tokens_per_step != "auto":
        return training.tokens_per_step
    return auto_tokens_per_step(first_epoch(table).lengths, num_epochs=training.num_train_epochs)


def mixture_facts(run: Run, name: str, *, table: Examples) -> dict[str, Any]:
    """Return what `training.json` says of a method's mixture, nothing where it is none, and say it.

    Each source has its examples, those of an epoch, those among them that stand there again, and those never shown.
    """
    from keeptune.text.mixture import shares_of

    shares, num_epochs = shares_of(table), run.recipe.training.num_train_epochs
    if run.recipe.data.mixture is not None:
        listed = ", ".join(f"{share.source} {share.num_per_epoch:,} of {share.num_examples:,}" for share in shares)
        run.context.progress.say(f"{name}: examples of an epoch, of those that there are: {listed}")
        if idle := idle_temperature(run.recipe, shares):
            run.context.progress.say(idle)
    facts = [
        {
            "source": share.source,
            "num_examples": share.num_examples,
            "num_per_epoch": share.num_per_epoch,
            "num_repeats": share.num_repeats,
            "num_never_shown": share.num_never_shown(num_epochs=num_epochs),
        }
        for share in shares
    ]
    return {"mixture": facts} if facts else {}


def idle_temperature(recipe: Recipe, shares: Sequence[Share]) -> str:
    """Return the sentence that the mixture's temperature changes nothing, as every task reaches the cap; else empty."""
    mixture = recipe.data.mixture
    if not isinstance(mixture, MixtureFields) or mixture.temperature == 1.0 or mixture.cap is None:
        return ""
    counts = [share.num_examples for share in shares if share.source != REPLAY and share.num_examples]
    if min(counts, default=0) < mixture.cap:
        return ""
    return (
        f"data.mixture.temperature has no effect: every task has {mixture.cap:,} train records or more, the cap, so "
        "that all parts are equal"
    )


def task_scores(run: Run, name: str, *, model: nn.Module, split: Split, bench: Bench) -> dict[str, Any]:
    """Return what validation says of each trained task, and of their mean, of the value that selects.

    A loss is taken over all records of the split, a metric over those that selected; nothing where there is one task.
    """
    from keeptune.evaluation.evaluate import validation_scores
    from keeptune.evaluation.intervals import mean_of_tasks
    from keeptune.evaluation.metrics import metric_of

    evaluation = run.recipe.evaluation
    trained = [task.name for task in run.recipe.data.tasks if task.train]
    if len(trained) < _SEVERAL or not len(split.examples):
        return {}
    number = len(split.examples) if evaluation.select_by == "loss" else evaluation.num_validation_records
    scores = validation_scores(model, split=split, bench=bench, metric=evaluation.select_by, num_records=number)
    of_tasks = [score for task in trained for score in scores if score.task == task]
    means, ends = [score.mean for score in of_tasks], [(score.low, score.high) for score in of_tasks]
    errors, bounds = [score.standard_error for score in of_tasks], metric_of(evaluation.select_by).bounds
    mean, (low, high) = math.fsum(means) / len(means), mean_of_tasks(means, errors, ends, bounds=bounds)
    listed = ", ".join(f"{score.task} {score.mean:.3f}" for score in of_tasks)
    run.context.progress.say(f"{name}: validation {evaluation.select_by}: {listed}; mean of the tasks {mean:.3f}")
    return {
        "validation_scores": [asdict(score) for score in of_tasks],
        "validation_macro": {"metric": evaluation.select_by, "mean": mean, "low": low, "high": high},
    }


@lru_cache(maxsize=1)
def _task_numbers(path: Path, *, names: tuple[str, ...], key: str) -> NDArray[np.int32]:
    """Return which of `names` is the task of each record of a file, whose content the path and `key` tell.

    The table has the same records in the same order. A training asks several times.
    """
    numbers = {name: i for i, name in enumerate(names)}
    with storage_errors(path), path.open(encoding="utf-8", errors="surrogatepass") as file:
        return np.fromiter((numbers[json.loads(line)["task"]] for line in file), np.int32)


def _rule(mixture: MixtureFields | str) -> dict[str, Any]:
    if isinstance(mixture, str):
        return {"temperature": math.inf}
    return {"cap": mixture.cap, "temperature": mixture.temperature, "weights": mixture.weights}
