"""The driver's side of trials: a trial arrives; its process, and later its result, leave."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keeptune.config import Recipe
from keeptune.errors import FolderInUseError
from keeptune.progress import Progress, noun
from keeptune.recipe_text import write_yaml
from keeptune.search.space import Range, with_values
from keeptune.search.trials import Result, Trial
from keeptune.stages.computing import policy_of
from keeptune.stages.data import Data
from keeptune.stages.mixture import mixture_key
from keeptune.stages.run import Run, differences, leaves, stage_key
from keeptune.stages.texts import Texts
from keeptune.stages.trial import RESULT
from keeptune.stages.trial_parts import Parts
from keeptune.storage import read_record, storage_errors, write_atomic, write_record

if TYPE_CHECKING:
    from keeptune.search.study import Study

Launch = Callable[..., subprocess.Popen[bytes]]
_SETTINGS = "study.json"


@dataclass(slots=True)
class Told:
    """What becomes of trials, in lines and as a count of the `num_left` that are to come."""

    progress: Progress
    num_left: int

    @contextmanager
    def counting(self, *, num_before: int) -> Iterator[None]:
        """Count trials as they come to their end inside the block."""
        if num_before and self.num_left:
            self.progress.say(f"{num_before} {noun(num_before, 'trials')} stood before, {self.num_left} to come")
        if self.num_left:
            self.progress.start("Trials", total=self.num_left, unit="trials")
        try:
            yield
        finally:
            self.progress.finish()

    def ended(self, line: str) -> None:
        """Say what a trial came to. More of them than were expected are not counted."""
        self.progress.say(line)
        if self.num_left:
            self.num_left -= 1
            self.progress.advance()

    def again(self, study: Study, trial: Trial) -> None:
        """Say that a trial's process was killed and is started again."""
        self.progress.say(f"{study.method} {trial.name}: its process was killed; it goes on from its last checkpoint")


@dataclass(frozen=True, slots=True)
class Maker:
    """What starts a trial: the run, the plain recipe in `sections`, and the parts that trials may see."""

    run: Run
    sections: Mapping[str, Any]
    parts: Parts
    launch: Launch

    def start(self, study: Study, trial: Trial, log: Path) -> subprocess.Popen[bytes]:
        """Write a trial's own recipe, which has the trial's settings, and start its process."""
        path = study.folder / f"{trial.name}.yaml"
        write_atomic(path, write_yaml(self._recipe(study, trial)))
        with storage_errors(log):
            return self.launch(path, parts=self.parts.folder, subset=trial.subset, log=log)

    def _recipe(self, study: Study, trial: Trial) -> dict[str, Any]:
        """Return the plain recipe of a trial: its method and settings, and no place where data stand."""
        name, whole = study.method, self.run.recipe
        recipe = with_values(self.sections, trial.params)
        # Its data are the parts that it is given; of tasks and texts it has the names.
        tasks = [{"path": task.name, "name": task.name, "train": task.train} for task in whole.data.tasks]
        texts = [{"path": text.name, "name": text.name} for text in whole.retention.texts]
        retention = {**(recipe.get("retention") or {}), "texts": texts}
        return {
            **recipe,
            "output_dir": str(study.folder / trial.name),
            "data": {**recipe["data"], "tasks": tasks},
            "methods": {name: recipe["methods"][name] or {}},
            "retention": retention,
            "seed": (whole.seed + trial.repeat) % 2**32,
        }


def study_key(recipe: Recipe, data: Data, texts: Texts | None, *, name: str, ranges: Sequence[Range]) -> str:
    """Return the hash of all that a trial's value depends on beside its own settings."""
    evaluation = recipe.evaluation
    return stage_key(
        data=data.key,
        **mixture_key(recipe),
        weights=data.base.facts.sha256,
        texts=texts.key if texts is not None else None,
        method=recipe.methods[name].model_dump(mode="json"),
        training=recipe.training.model_dump(mode="json", exclude={"save_steps"}),
        chooses=[evaluation.select_by, evaluation.num_validation_records, evaluation.max_new_tokens],
        metrics=list(evaluation.metrics) if recipe.retention.budget else [],
        budget=recipe.retention.budget,
        seed=recipe.seed,
        ranges=[asdict(range_) for range_ in ranges],
        **policy_of(recipe).training_key(),
        **({"quantization": recipe.quantization} if recipe.quantization else {}),
    )


def study_settings(recipe: Recipe, *, name: str, ranges: Sequence[Range], with_texts: bool) -> dict[str, Any]:
    """Return the settings, by dotted key, that a study's trials depend on; its own `ranges` in place of values."""
    evaluation, retention = recipe.evaluation, recipe.retention
    chooses = ["select_by", "num_validation_records", "max_new_tokens", *(["metrics"] if retention.budget else [])]
    sections = {
        "data": recipe.data.model_dump(mode="json"),
        f"methods.{name}": recipe.methods[name].model_dump(mode="json"),
        "training": recipe.training.model_dump(mode="json", exclude={"save_steps"}),
        "evaluation": evaluation.model_dump(mode="json", include=set(chooses)),
        "retention.budget": retention.budget,
        "retention": retention.model_dump(mode="json", include={"self_texts", "texts"}) if with_texts else {},
        "quantization": recipe.quantization,
        "seed": recipe.seed,
    }
    found = {key: value for section, part in sections.items() for key, value in leaves(part, section)}
    return found | {r.key: {k: v for k, v in asdict(r).items() if k != "key" and v} for r in ranges}


def refuse_another_study(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to go on with a study of other settings, before anything is written; `note_study` wrote down its own.

    Raises:
        FolderInUseError: they differ.
    """
    path = folder / _SETTINGS
    if not path.is_file():
        return
    known = read_record(path, again="the same command")
    # As JSON has them: a tuple is a list there.
    if changed := differences(known["settings"], json.loads(json.dumps(settings))):
        raise FolderInUseError(
            f"{folder}: found a study of another recipe (hash {known['key'][:16]}): "
            f"{changed}; expected the same to go on. Choose another output_dir, or remove that folder."
        )


def note_study(folder: Path, *, key: str, settings: Mapping[str, Any]) -> None:
    """Write down the settings of a study, so that a message can name those that differ."""
    write_record(folder / _SETTINGS, {"key": key, "settings": settings})


def study_facts(run: Run, data: Data) -> dict[str, Any]:
    """Return what a page says of where its trials come from: the model, the records and the command."""
    return {
        "model": run.recipe.model,
        "tasks": [task.name for task in run.recipe.data.tasks if task.train],
        "num_train_records": len(data.table("train")),
        "num_validation_records": len(data.table("validation")),
        "output_dir": run.recipe.output_dir,
        "command": run.context.command,
    }


def read_trial(study: Study, trial: Trial) -> Result | None:
    """Return the result that a trial left, None where it is not at its end."""
    path = study.folder / trial.name / RESULT
    return Result(trial, "finished", **read_record(path, again="the same command")) if path.is_file() else None


def clear_trial(study: Study, trial: Trial) -> None:
    """Remove the weights of a trial that is at its end."""
    folder = study.folder / trial.name / study.method
    for name in ("checkpoints", "model", "adapter"):
        shutil.rmtree(folder / name, ignore_errors=True)
