"""Runs with two trained methods whose certify answers are written down, so that every loss is known."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from keeptune import stages
from keeptune.config import Recipe, load_recipe
from keeptune.evaluation.metrics import Answer, answer_to_json
from keeptune.stages.openings import LEDGER
from keeptune.stages.retention import FORGETTING
from keeptune.storage import staged_folder, write_json, write_jsonl, write_record
from tests.stages.world import Notes, context, llama, recipe_file, records

TASKS = ("left", "right", "riddles")
BOTH = ["zero-shot", "few-shot"]


@dataclass
class Scripted:
    """A trained run with two methods; `wrong` holds how many of the certify records of a task a model answers wrong.

    The base answers all of them. Of the records that are reported on it answers none of "riddles".
    """

    recipe: Recipe
    folder: Path
    wrong: dict[tuple[str, str], int] = field(default_factory=dict)
    answered: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def certified(self, *, ledger: Path | None = None, named: Path | None = None, **retention: Any) -> dict[str, Any]:
        """Certify with the user's ledger, and the one that the recipe names."""
        retention |= {"ledger": None if named is None else str(named)}
        changed = self.recipe.retention.model_copy(update=retention)
        recipe = self.recipe.model_copy(update={"retention": changed})
        notes = Notes()
        with stages.open_run(recipe, context=context(notes=notes, ledger=ledger)) as run:
            path = stages.certify(run)
        self.notes = notes.lines
        return json.loads(path.read_text(encoding="utf-8"))

    def answer(
        self, run: Any, data: Any, model: Any, *, split: Any, name: str, folder: Path, key: str, **_: Any
    ) -> None:
        """Stand in for a model that answers."""
        self.answered.append(name)
        seen: dict[str, int] = {}
        answers = []
        for record in split.records:
            number = seen[record.task] = seen.get(record.task, 0) + 1
            right = number > self.wrong.get((name, record.task), 0)
            values = {"exact_match": float(right), "rouge2": float(right), "loss": 0.1 if right else 2.0}
            answers.append(Answer(record.id, record.task, record.id, "?", "!", ("!",), True, values, 3))
        with staged_folder(folder, facts={"key": key}) as staging:
            write_jsonl(staging / "samples.jsonl", map(answer_to_json, answers))


def write_recipe(folder: Path, *, model: Path) -> Recipe:
    path = recipe_file(
        folder,
        model=model,
        data=records(folder / "a.jsonl"),
        retention={"self_texts": 0, "alphas": [0.5, 1.0], "budget": {"others": "20 points of exact_match"}},
        evaluation={"metrics": ["exact_match"], "max_new_tokens": 8, "baselines": BOTH, "num_shots": [1, 2]},
    )
    value = json.loads(path.read_text(encoding="utf-8"))
    for i, name in enumerate(TASKS):
        source = records(folder / f"{name}.jsonl", number=200, seed=7 + i)
        value["data"]["tasks"].append({"path": str(source), "name": name, "train": False})
    path.write_text(json.dumps(value), encoding="utf-8")
    return load_recipe(path)


def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Scripted:
    """Train two methods, and write down what a run that was evaluated has."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder, model=llama(tmp_path_factory.mktemp("base")))
    with stages.open_run(recipe, context=context()) as run:
        stages.train(run, data=stages.prepare(run))
        for method in recipe.methods:
            for place in ("test", "path/0.5/test"):
                scores = run.folder / method / place / "scores.json"
                scores.parent.mkdir(parents=True, exist_ok=True)
                write_json(scores, {"scores": [], "metrics": {}})
        write_record(run.folder / FORGETTING, {"rows": [{"model": method} for method in recipe.methods]})
    report_base(run.folder, knows_nothing_of={"riddles"})
    return Scripted(recipe, run.folder)


def copy_of(trained: Scripted, folder: Path, *, patch: pytest.MonkeyPatch) -> Scripted:
    """Return a copy of a run in a folder, whose models answer as it says from now on."""
    shutil.copytree(trained.folder, folder)
    found = Scripted(trained.recipe.model_copy(update={"output_dir": str(folder)}), folder)
    # The package has a function of the module's name.
    patch.setattr(importlib.import_module("keeptune.stages.session"), "answer", found.answer)
    return found


def report_base(folder: Path, *, knows_nothing_of: set[str], metric: str = "exact_match", right: float = 1.0) -> None:
    """Write what the base answered to the records that are reported on, right or wrong by task, or `right` in part."""
    rows = [json.loads(line) for line in (folder / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    answers = []
    for row in rows:
        values = {"exact_match": right, "rouge2": 0.0, "loss": 0.1}
        values |= {metric: 0.0} if row["task"] in knows_nothing_of else {}
        answers.append(Answer(row["id"], row["task"], row["id"], "?", "!", ("!",), True, values, 3))
    (folder / "base" / "zero-shot").mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "base" / "zero-shot" / "samples.jsonl", map(answer_to_json, answers))


def every(run: Scripted, wrong: Mapping[str, int]) -> None:
    """Let each method answer so many records wrong, by task, from alpha 0.5 on."""
    run.wrong = {
        (f"{method} at alpha {alpha}", task): number
        for method in run.recipe.methods
        for alpha in ("0.5", "1")
        for task, number in wrong.items()
    }


def openings(run: Scripted) -> list[int]:
    lines = (run.folder / LEDGER).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["opening"] for line in lines]
