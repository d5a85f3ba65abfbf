"""The test: trained methods arrive; scores, paired differences and the selected instruct model leave.

This is the only module that opens the test split, and each opening is written down.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keeptune.data.record import ALL_TASKS, OTHER_TASKS, record_to_json
from keeptune.errors import DataError
from keeptune.report.reading import RunFolder, mapping
from keeptune.report.scores import read_scores
from keeptune.stages.data import Data, evaluation_split, max_new_tokens, max_new_tokens_on_test, prepare
from keeptune.stages.delivery import CARD
from keeptune.stages.run import Run, is_done, stage_key
from keeptune.stages.training import artifact_folder, computes_in_bf16, fit_model, make_bench, method_of, training_key
from keeptune.storage import MANIFEST, file_sha256, read_json, staged_folder, storage_errors, write_json

if TYPE_CHECKING:
    from torch import nn

    from keeptune.evaluation.evaluate import Split
    from keeptune.evaluation.metrics import Answer
    from keeptune.model.card import CardScore, ModelCard
    from keeptune.model.methods import Method

BASE = "base"
# Train records among which the card's example is chosen.
_CARD_RECORDS = 1000
# Of a model's key, in the log of openings.
_KEY_DIGITS = 16


@dataclass(frozen=True, slots=True)
class _Entrant:
    """A model that is tested: the base model where `method` is None."""

    name: str
    method: Method | None
    folder: Path
    key: str


def evaluate(run: Run, *, data: Data | None = None) -> Path:
    """Score base and methods on test, deliver the method that validation selected; return the instruct model's folder.

    `data` is what `prepare` returned for this run; without it, data are prepared here.

    Raises:
        DataError: a method is not trained yet.
    """
    from keeptune.model.card import card_to_json

    data = data or prepare(run)
    methods = [method_of(run.recipe, name) for name in run.recipe.methods]
    baselines = [None] if "zero-shot" in run.recipe.evaluation.baselines else []
    entrants = [_entrant(run, data, method) for method in (*baselines, *methods)]
    waiting = [entrant for entrant in entrants if not is_done(entrant.folder, entrant.key)]
    if waiting:
        _record_opening(run, data, entrants=waiting)
        split = evaluation_split(data, "test")
        for entrant in waiting:
            run.poll()
            run.context.progress.say(f"{entrant.name}: answering the {len(split.records):,} records of test")
            _evaluate_one(run, data, entrant, split=split)
    else:
        run.context.progress.say(f"{run.folder}: evaluated before and unchanged")
    _write_paired(run, data, entrants)
    for method in methods:
        write_json(run.folder / method.name / CARD, card_to_json(_card(run, data, method)))
    return _deliver(run, data, _select(run, methods))


def _entrant(run: Run, data: Data, method: Method | None) -> _Entrant:
    evaluation = run.recipe.evaluation
    trained = None
    if method is not None:
        trained = _trained_facts(run, method)["key"]
        if trained != training_key(run.recipe, data, method):
            raise DataError(
                f"{run.folder / method.name}: found a model trained on other data, settings or base weights; expected "
                "those of this recipe. Run `keeptune train` first, or choose another output_dir."
            )
    key = stage_key(
        data=data.key,
        weights=data.base.facts.sha256,
        trained=trained,
        metrics=list(evaluation.metrics),
        max_new_tokens=max_new_tokens_on_test(run.recipe, data),
    )
    if method is None:
        return _Entrant(BASE, None, run.folder / BASE / "zero-shot", key)
    return _Entrant(method.name, method, run.folder / method.name / "test", key)


def _trained_facts(run: Run, method: Method) -> Mapping[str, Any]:
    path = run.folder / method.name / "training.json"
    facts = read_json(path) if path.exists() else {}
    if not facts or not is_done(artifact_folder(path.parent, method), facts["key"]):
        raise DataError(
            f"{path.parent}: found no whole trained model; expected `keeptune train` to have finished. "
            "Run `keeptune train` with this recipe first, or `keeptune run`."
        )
    return facts


def _record_opening(run: Run, data: Data, *, entrants: list[_Entrant]) -> None:
    """Add a line to `test_openings.jsonl`, on the disk before the split is read.

    One that goes on with an interrupted look, at the same models under the same keys, says so: it is no second look.
    """
    keys = {entrant.name: entrant.key[:_KEY_DIGITS] for entrant in entrants}
    line = {
        "opened": run.context.now(),
        "command": run.context.command,
        "models": list(keys),
        "test_sha256": file_sha256(data.folder / "test.jsonl"),
        "keys": keys,
    }
    path = run.folder / "test_openings.jsonl"
    before = [mapping(opening.get("keys")) for opening in RunFolder(run.folder).lines(path.name, expected=False)]
    if any(keys.items() <= of_before.items() for of_before in before):
        line["resumes"] = True
    with storage_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _evaluate_one(run: Run, data: Data, entrant: _Entrant, *, split: Split) -> None:
    from keeptune.evaluation.evaluate import evaluate_model
    from keeptune.model.load import pick_device
    from keeptune.model.memory import memory_errors

    device = pick_device(run.recipe.device)
    with memory_errors(f"{entrant.name}: found too little memory; expected room for the model. Close programs."):
        model = _load(run, data, entrant)
    fit = fit_model(model, recipe=run.recipe, data=data, device=device)
    evaluate_model(
        model,
        split=split,
        bench=make_bench(run, data, model, fit=fit, max_new_tokens=max_new_tokens_on_test(run.recipe, data)),
        metrics=run.recipe.evaluation.metrics,
        name=entrant.name,
        shots=0,
        folder=entrant.folder,
        facts={"key": entrant.key, "created": run.context.now()},
    )
    del model
    gc.collect()


def _load(run: Run, data: Data, entrant: _Entrant) -> nn.Module:
    """Load what a user would load: the base model, or the artifact as it lies on the disk."""
    import torch

    from keeptune.model.artifact import load_artifact
    from keeptune.model.load import load_model, pick_device

    device = pick_device(run.recipe.device)
    dtype = torch.bfloat16 if device.type == "cuda" and computes_in_bf16(run.recipe, device) else torch.float32
    if entrant.method is None:
        return load_model(data.base.folder, device=device, dtype=dtype)
    folder = artifact_folder(run.folder / entrant.method.name, entrant.method)
    return load_artifact(folder, base=data.base.folder, device=device, dtype=dtype)


def _write_paired(run: Run, data: Data, entrants: list[_Entrant]) -> None:
    """Write every method against the base model, and the methods against each other, in every metric."""
    from keeptune.evaluation.evaluate import read_answers
    from keeptune.evaluation.metrics import with_loss
    from keeptune.evaluation.scores import paired_differences

    metrics = with_loss(run.recipe.evaluation.metrics)
    answers: dict[str, list[Answer]] = {entrant.name: read_answers(entrant.folder) for entrant in entrants}
    names = list(answers)
    paired = [
        asdict(difference)
        for i, model in enumerate(names)
        for against in names[:i]
        for difference in paired_differences(
            answers[model],
            answers[against],
            metrics=metrics,
            model=model,
            against=against,
            untrained_tasks=data.untrained_tasks,
        )
    ]
    write_json(run.folder / "paired.json", {"paired": paired})


def _select(run: Run, methods: list[Method]) -> Method:
    """Choose the method with the best value on validation, the first of equals, and write down why."""
    from keeptune.evaluation.metrics import METRICS

    metric = run.recipe.evaluation.select_by
    values = {method.name: _trained_facts(run, method)["best_value"] for method in methods}
    sign = 1.0 if metric != "loss" and METRICS[metric].higher_is_better else -1.0
    known = [method for method in methods if values[method.name] is not None]
    selected = max(known, key=lambda method: sign * values[method.name], default=methods[0])
    facts = {"selected": selected.name, "metric": metric, "split": "validation", "values": values}
    write_json(run.folder / "selection.json", facts)
    return selected


def _deliver(run: Run, data: Data, selected: Method) -> Path:
    """Copy the selected artifact to `instruct-model/` and write its card."""
    from keeptune.model.card import card_to_json, write_model_card

    source = artifact_folder(run.folder / selected.name, selected)
    target = run.folder / "instruct-model"
    scores = read_json(run.folder / selected.name / "test" / "scores.json")["scores"]
    made = read_json(source / MANIFEST)
    key = stage_key(artifact=made, scores=scores)
    if is_done(target, key):
        return target
    facts = {name: value for name, value in made.items() if name != "files"}
    with staged_folder(target, facts={**facts, "key": key}) as staging:
        with storage_errors(target):
            shutil.copytree(source, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
        card = _card(run, data, selected)
        write_model_card(staging, card=card)
        write_json(staging / CARD, card_to_json(card))
    return target


def _card(run: Run, data: Data, method: Method) -> ModelCard:
    from keeptune.model.card import ModelCard

    trained = _trained_facts(run, method)
    return ModelCard(
        name=f"{Path(data.base.name.partition('@')[0]).name}, tuned by {method.name}",
        base_name=data.base.name,
        peft_type=method.peft_type,
        encoder_decoder=data.base.facts.encoder_decoder,
        template=data.base.template.name,
        prompt=_card_prompt(data),
        max_new_tokens=max_new_tokens(run.recipe, data),
        trained_parameters=trained["trained_parameters"],
        total_parameters=trained["total_parameters"],
        scores=tuple(_card_scores(run, data, method)),
        recipe=run.recipe.to_yaml(),
        limits=(
            "Scores hold for records like those of the test split; nothing else was measured.",
            "What the base model lost on other tasks was not measured."
            if not data.untrained_tasks
            else "What the base model lost beyond the tasks above was not measured.",
        ),
        versions=read_json(run.folder / MANIFEST)["versions"],
    )


def _card_prompt(data: Data) -> tuple[Mapping[str, str], ...]:
    """Return the messages of the shortest train prompt: short enough for a card, and whole with its instruction."""
    records = data.records("train", at_most=_CARD_RECORDS)
    shortest = min(records, key=lambda record: (len(record.prompt), record.id))
    return tuple(record_to_json(shortest)["messages"][:-1])


def _card_scores(run: Run, data: Data, method: Method) -> Iterator[CardScore]:
    """Yield the method's test scores beside the base model's; those of a single task are not repeated as a mean.

    A single task is one of the trained ones or one of the others.
    """
    from keeptune.model.card import CardScore

    scores = read_scores(read_json(run.folder / method.name / "test" / "scores.json"))
    base_path = run.folder / BASE / "zero-shot" / "scores.json"
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
