"""A folder's name arrives; the lab stands in it as ordinary files: models, tasks, and the recipes that use them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from keeptune.data.record import SplitName
from keeptune.errors import FolderInUseError
from keeptune.lab.tasks import SPAN_SENTENCE, TASKS, write_task
from keeptune.lab.world import make_world
from keeptune.progress import Progress
from keeptune.stages.run import is_done, stage_key
from keeptune.storage import MANIFEST, file_sha256, read_json, staged_folder, storage_errors, write_atomic

MODELS = Path(__file__).parent / "models"
RECIPES = ("lab-demo", "lab-multitask")
_MADE_BY = "keeptune lab"
# A path in a recipe, as it stands where the lab is in `lab/`.
_PATH = re.compile(r" lab/([\w./-]+)")
_RECIPES = Path(__file__).parents[1] / "recipes"
# Before the leak check takes train records away that overlap with test: fewest are left of the notes and the reviews.
_COUNTS: dict[SplitName, int] = {"train": 6_500, "validation": 100, "test": 300}
_MORE = {"sentiment": 12_000, "topic": 14_000}


def write_lab(folder: Path, *, progress: Progress) -> None:
    """Write `models/`, `tasks/` and the lab's recipes to `folder`; a recipe that stands there stays as it is.

    The recipes name the files by the path that `folder` has here. About 40 MB.

    Raises:
        FolderInUseError: `models/` or `tasks/` are there and no lab's.
        StorageError: the disk refuses.
    """
    for name in ("models", "tasks"):
        _refuse_a_foreign_folder(folder / name)
    _write_models(folder / "models")
    _write_tasks(folder / "tasks", progress=progress)
    for name in RECIPES:
        if not (folder / f"{name}.yaml").exists():
            text = (_RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
            write_atomic(folder / f"{name}.yaml", _PATH.sub(lambda path: f" {_quoted(folder / path[1])}", text))


def _quoted(path: Path) -> str:
    """Return a path as YAML takes it whatever is in it."""
    return json.dumps(str(path), ensure_ascii=False)


def _refuse_a_foreign_folder(folder: Path) -> None:
    with storage_errors(folder):
        ours = (folder / MANIFEST).is_file() and read_json(folder / MANIFEST).get("made_by") == _MADE_BY
        if folder.exists() and not ours:
            raise FolderInUseError(
                f"{folder}: found a folder that `keeptune lab` did not write; expected none, or a lab. "
                "Choose another folder for the lab."
            )


def _write_models(folder: Path) -> None:
    key = _key(path for path in MODELS.rglob("*") if path.is_file())
    if is_done(folder, key):
        return
    with staged_folder(folder, facts=_facts(key)) as staging, storage_errors(folder):
        shutil.copytree(MODELS, staging, dirs_exist_ok=True)


def _write_tasks(folder: Path, *, progress: Progress) -> None:
    key = _key(Path(__file__).parent.glob("*.py"))
    if is_done(folder, key):
        return
    world, tasks = make_world(), (*TASKS, SPAN_SENTENCE)
    progress.start("Writing the lab", total=len(tasks), unit="tasks")
    with staged_folder(folder, facts=_facts(key)) as staging:
        for task in tasks:
            counts: dict[SplitName, int] = {**_COUNTS, "train": _MORE.get(task.name, _COUNTS["train"])}
            write_task(task, world, staging / task.name, counts=counts)
            progress.advance()
    progress.finish()


def _facts(key: str) -> dict[str, str]:
    return {"made_by": _MADE_BY, "key": key}


def _key(paths: Iterable[Path]) -> str:
    return stage_key(files=[file_sha256(path) for path in sorted(paths)])
