"""The instruct model: a point on a method's way arrives; its artifact stands in `instruct-model/` with its card."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from keeptune.data.record import ALL_TASKS, OTHER_TASKS
from keeptune.report.scores import read_scores
from keeptune.stages.data import Data, max_new_tokens
from keeptune.stages.run import CARD, INSTRUCT_MODEL, Run, is_done, stage_key
from keeptune.stages.way import BASE, ZERO_SHOT, Point, artifact_at, trained_facts
from keeptune.storage import MANIFEST, read_json, read_record, staged_folder, storage_errors, write_record

if TYPE_CHECKING:
    from keeptune.model.card import CardScore, ModelCard

# Train records among which the card's example is chosen.
_CARD_RECORDS = 1000


def deliver(run: Run, data: Data, selected: Point, *, limits: Sequence[str] = ()) -> Path:
    """Copy a point's artifact to `instruct-model/` and write its card, with `limits` of what was found out about it."""
    from keeptune.model.card import card_to_json, write_model_card

    source = artifact_at(run, data, selected)
    target = run.folder / INSTRUCT_MODEL
    scores = read_json(selected.test / "scores.json")["scores"]
    made = read_record(source / MANIFEST)
    key = stage_key(artifact=made, scores=scores, **({"limits": list(limits)} if limits else {}))
    if is_done(target, key):
        return target
    facts = {name: value for name, value in made.items() if name != "files"}
    with staged_folder(target, facts={**facts, "key": key}) as staging:
        with storage_errors(target):
            shutil.copytree(source, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
        card = model_card(run, data, selected, limits=limits)
        write_model_card(staging, card=card)
        write_record(staging / CARD, card_to_json(card))
    return target


def withdraw(run: Run) -> None:
    """Remove an instruct model that nothing speaks for any more."""
    target = run.folder / INSTRUCT_MODEL
    if target.exists():
        with storage_errors(target):
            shutil.rmtree(target)


def model_card(run: Run, data: Data, point: Point, *, limits: Sequence[str] = ()) -> ModelCard:
    """Return the card of a point: how it was made, and its scores on test beside the base model's."""
    from keeptune.model.card import ModelCard

    method = point.method
    trained = trained_facts(run, method)
    at = "" if point.alpha == 1.0 else f" at alpha {point.alpha:g}"
    return ModelCard(
        name=f"{Path(data.base.name.partition('@')[0]).name}, tuned by {method.name}{at}",
        base_name=data.base.name,
        peft_type=method.peft_type,
        encoder_decoder=data.base.facts.encoder_decoder,
        template=data.base.template.name,
        prompt=_card_prompt(data),
        max_new_tokens=max_new_tokens(run.recipe, data),
        trained_parameters=trained["trained_parameters"],
        total_parameters=trained["total_parameters"],
        scores=tuple(_card_scores(run, data, point)),
        recipe=run.recipe.to_yaml(),
        limits=(
            *limits,
            "Scores hold for records like those of the test split; nothing else was measured.",
            "What the base model lost on other tasks was not measured."
            if not data.untrained_tasks
            else "What the base model lost beyond the tasks above was not measured.",
        ),
        versions=read_record(run.folder / MANIFEST)["versions"],
        quantization=data.base.facts.quantization,
    )


def _card_prompt(data: Data) -> tuple[Mapping[str, str], ...]:
    """Return the messages of the shortest train prompt: short enough for a card, and whole with its instruction."""
    records = data.records("train", at_most=_CARD_RECORDS)
    shortest = min(records, key=lambda record: (bool(record.tools), len(record.prompt), record.id))
    return tuple(data.base.template.as_dicts(shortest.messages[:-1]))


def _card_scores(run: Run, data: Data, point: Point) -> Iterator[CardScore]:
    """Yield the method's test scores beside the base model's; those of a single task are not repeated as a mean.

    A single task is one of the trained ones or one of the others.
    """
    from keeptune.model.card import CardScore

    scores = read_scores(read_json(point.test / "scores.json"))
    base_path = run.folder / BASE / ZERO_SHOT / "scores.json"
    base_scores = read_scores(read_json(base_path)) if base_path.exists() else ()
    base_values = {(score.task, score.metric): score.mean for score in base_scores}
    others = data.untrained_tasks
    tasks = {score.task for score in scores} - {ALL_TASKS, OTHER_TASKS}
    repeated = {mean for mean, of in ((ALL_TASKS, tasks - others), (OTHER_TASKS, tasks & others)) if len(of) == 1}
    for score in scores:
        if score.mean is None or score.num_records is None or score.task in repeated:
            continue
        yield CardScore(
            task=score.task,
            metric=score.metric,
            value=score.mean,
            low=score.low,
            high=score.high,
            num_records=score.num_records,
            base_value=base_values.get((score.task, score.metric)),
            trained=score.task not in {*others, OTHER_TASKS},
        )
