"""One trial of a search, in a process of its own: its recipe and the parts that it may see arrive; its result leaves.

Nothing here is told where test stands.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keeptune.errors import NonFiniteError
from keeptune.stages.data import Data, max_new_tokens
from keeptune.stages.run import EVENTS, TRAINING, Run, is_done
from keeptune.stages.texts import keep_texts
from keeptune.stages.training import artifact_folder, make_bench, method_of, train
from keeptune.stages.trial_parts import Parts, answer_probe, probe_drops
from keeptune.stages.way import BASE, load_at
from keeptune.storage import read_record, storage_errors, write_record

if TYPE_CHECKING:
    from torch import nn

RESULT = "result.json"
# The trained model's answers to validation, and to the probe.
VALIDATION, PROBE = "validation", "probe"


def run_trial(run: Run, parts: Path, *, subset: str) -> None:
    """Train the one method of the trial's recipe on a subset of the train records, and write down what it is worth.

    Raises:
        NonFiniteError: no validation gave a finite value.
    """
    if (run.folder / RESULT).is_file():
        return
    (name,) = run.recipe.methods
    shown = Parts(parts)
    run = _with_limit(run, shown.limits.validation)
    data = shown.data(run.recipe, cache=run.folder, subset=subset)
    texts = shown.texts
    train(run, data=data, texts=keep_texts(run.recipe, data, texts))
    method = method_of(run.recipe, name)
    facts = read_record(run.folder / name / TRAINING)
    if facts["best_value"] is None:
        raise NonFiniteError(
            f"methods.{name}: found no finite {run.recipe.evaluation.select_by} on validation; expected one or more. "
            "Lower its learning_rate."
        )
    model = load_at(run, data, artifact_folder(run.folder / name, method), name=name)
    _answer_validation(run, data, model, name=name)
    answer_probe(run, data, shown, model=lambda: model, folder=run.folder / PROBE)
    drops, excess = probe_drops(run.recipe, parts.parent / BASE, run.folder / PROBE)
    result: Mapping[str, Any] = {
        "value": facts["best_value"],
        "loss": facts["best_loss"],
        "drift": _drift(run.folder / name / EVENTS),
        "drops": drops,
        "excess": excess,
        "seconds": facts["train_seconds"],
    }
    write_record(run.folder / RESULT, result)


def _with_limit(run: Run, limit: int) -> Run:
    evaluation = run.recipe.evaluation.model_copy(update={"max_new_tokens": limit})
    return replace(run, recipe=run.recipe.model_copy(update={"evaluation": evaluation}))


def _answer_validation(run: Run, data: Data, model: nn.Module, *, name: str) -> None:
    """Answer the validation records that choose, so that two trials can be compared record by record."""
    import numpy as np

    from keeptune.evaluation.evaluate import Split, evaluate_model, validation_positions
    from keeptune.text.mixture import Chosen

    evaluation = run.recipe.evaluation
    folder = run.folder / VALIDATION
    if is_done(folder, name):
        return
    table = data.table("validation")
    generates = evaluation.select_by != "loss"
    number = evaluation.num_validation_records if generates else len(table)
    positions = validation_positions(table.record_ids, num_records=number)
    split = Split("validation", data.records("validation"), Chosen(table, np.array(positions, dtype=np.int64)))
    evaluate_model(
        model,
        split=split,
        bench=make_bench(run, data, model, max_new_tokens=max_new_tokens(run.recipe, data)),
        metrics=(evaluation.select_by,) if generates else (),
        name=name,
        shots=0,
        folder=folder,
        facts={"key": name},
    )


def _drift(events: Path) -> float | None:
    """Return the last divergence from the base that the training measured."""
    with storage_errors(events):
        lines = [json.loads(line) for line in events.read_text(encoding="utf-8").splitlines()]
    return next((line["kl"] for line in reversed(lines) if line["event"] == "drift"), None)
