"""The instruct model: a point on a method's way arrives; its artifact stands in `instruct-model/` with its card."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keeptune.data.record import ALL_TASKS, OTHER_TASKS
from keeptune.report.broken import count_broken, describe
from keeptune.report.forgotten import read_canaries, read_lost
from keeptune.report.lost_words import lost_in_words
from keeptune.report.reading import RunFolder, mapping
from keeptune.report.scores import read_scores
from keeptune.report.shots import FewShot, few_shot_scores, read_shot_row
from keeptune.stages.data import Data, max_new_tokens
from keeptune.stages.run import CARD, INSTRUCT_MODEL, Run, is_done, stage_key
from keeptune.stages.way import BASE, ZERO_SHOT, Point, artifact_at, trained_facts
from keeptune.storage import MANIFEST, read_json, read_record, staged_folder, storage_errors, write_record

if TYPE_CHECKING:
    from keeptune.model.card import CardScore, ModelCard

# Train records among which the card's example is chosen, and the characters that it has at most.
_CARD_RECORDS = 1000
_CARD_CHARACTERS = 400


def deliver(run: Run, data: Data, selected: Point, *, certificate: Sequence[str] = ()) -> Path:
    """Copy a point's artifact to `instruct-model/` and write its card, with what its `certificate` says."""
    from keeptune.model.card import card_to_json, write_model_card

    source = artifact_at(run, data, selected)
    target = run.folder / INSTRUCT_MODEL
    made, card = read_record(source / MANIFEST), model_card(run, data, selected, certificate=certificate)
    key = stage_key(artifact=made, card=card_to_json(card))
    if is_done(target, key):
        return target
    facts = {name: value for name, value in made.items() if name != "files"}
    with staged_folder(target, facts={**facts, "key": key}) as staging:
        with storage_errors(target):
            shutil.copytree(source, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
        write_model_card(staging, card=card)
        write_record(staging / CARD, card_to_json(card))
    return target


def withdraw(run: Run) -> None:
    """Remove an instruct model that nothing speaks for any more."""
    target = run.folder / INSTRUCT_MODEL
    if target.exists():
        with storage_errors(target):
            shutil.rmtree(target)


def model_card(run: Run, data: Data, point: Point, *, certificate: Sequence[str] = ()) -> ModelCard:
    """Return the card of a point: how it was made, and its scores on test beside the base model's."""
    from keeptune.model.card import ModelCard

    method = point.method
    trained = trained_facts(run, method)
    at = "" if point.alpha == 1.0 else f" at alpha {point.alpha:g}"
    forgetting = RunFolder(run.folder).object("forgetting.json", expected=False)
    found = {"model": method.name, "alpha": point.alpha}
    rows = [row for part in ("rows", "under_budget", "left_out") for row in read_lost(forgetting, part=part)]
    lost = {
        (row.suite, row.metric, row.without): row for row in rows if {"model": row.model, "alpha": row.alpha} == found
    }
    beyond = "the suites above" if lost else "the tasks above"
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
        forgotten=tuple(_capitalised(f"{lost_in_words(row)}.") for row in lost.values()),
        limits=(
            *_broken(forgetting, point, data=data),
            "Scores hold for records like those of the test split.",
            f"What the base model lost beyond {beyond} was not measured.",
        ),
        versions=read_record(run.folder / MANIFEST)["versions"],
        quantization=data.base.facts.quantization,
        certificate=tuple(certificate),
    )


def _card_prompt(data: Data) -> tuple[Mapping[str, str], ...]:
    """Return the messages of a typical train prompt that a card has room for: whole, and of no empty record.

    It is the longest of those up to the median length and up to `_CARD_CHARACTERS`; the shortest where all are longer.
    """
    records = sorted(data.records("train", at_most=_CARD_RECORDS), key=lambda record: (len(record.prompt), record.id))
    typical = records[: len(records) // 2 + 1]
    short = [record for record in typical if len(record.prompt) <= _CARD_CHARACTERS]
    return tuple(data.base.template.as_dicts((short or records[:1])[-1].messages[:-1]))


def _broken(forgetting: Mapping[str, Any], point: Point, *, data: Data) -> list[str]:
    """Return a sentence on answers to the trained tasks that never end, loop or are empty, if they are many."""
    canaries = read_canaries(forgetting)
    tasks = {row.task for row in canaries} - data.untrained_tasks
    found = count_broken(canaries, model=point.method.name, alpha=point.alpha, tasks=tasks)
    base = count_broken(canaries, model=BASE, alpha=None, tasks=tasks)
    limit = mapping(read_json(point.test / "scores.json").get("decoding")).get("max_new_tokens")
    sentence = describe(found, base=base, limit=None if limit is None else f"{limit}")
    return [sentence] if sentence else []


def _capitalised(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _card_scores(run: Run, data: Data, point: Point) -> Iterator[CardScore]:
    """Yield the method's test scores beside the base model's; those of a single task are not repeated as a mean.

    A single task is one of the trained ones or one of the others.
    """
    from keeptune.model.card import CardScore

    scores = read_scores(read_json(point.test / "scores.json"))
    base_path = run.folder / BASE / ZERO_SHOT / "scores.json"
    base_scores = read_scores(read_json(base_path)) if base_path.exists() else ()
    base_values = {(score.task, score.metric): score.mean for score in base_scores}
    few_shot = _few_shot(run, higher_is_better=_directions(read_json(point.test / "scores.json")))
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
            few_shot=few_shot.get((score.task, score.metric), ""),
        )


def _directions(value: Mapping[str, Any]) -> dict[str, bool]:
    return {name: facts["higher_is_better"] for name, facts in value.get("metrics", {}).items()}


def _few_shot(run: Run, *, higher_is_better: Mapping[str, bool]) -> dict[tuple[str, str], str]:
    """Return the best few-shot score of each task and metric, with its number of examples: "0.2400 (4 shots)".

    Where it was picked from several, the words say so.
    """
    values = (read_json(path) for path in sorted((run.folder / BASE).glob("*-shot-*/scores.json")))
    best: dict[tuple[str, str], FewShot] = {}
    num_tried: Counter[tuple[str, str]] = Counter()
    for found in few_shot_scores([read_shot_row(value) for value in values]):
        place, sign = (found.task, found.metric), 1 if higher_is_better.get(found.metric, True) else -1
        num_tried[place] += 1
        if place not in best or sign * found.mean > sign * best[place].mean:
            best[place] = found
    picked = {place: f", the best of {tried}" if tried > 1 else "" for place, tried in num_tried.items()}
    return {
        place: f"{found.mean:.4f} ({found.name.removeprefix('base, ')}{picked[place]})" for place, found in best.items()
    }
