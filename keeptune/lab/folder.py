"""A folder's name arrives; the lab stands in it as ordinary files: models, tasks, and the recipes that use them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from keeptune.data.record import SplitName
from keeptune.lab.tasks import SPAN_SENTENCE, TASKS, write_task
from keeptune.lab.world import make_world
from keeptune.progress import Progress
from keeptune.stages.run import is_done, stage_key
from keeptune.storage import file_sha256, staged_folder, storage_errors, write_atomic

MODELS = Path(__file__).parent / "models"
RECIPES = ("lab-demo", "lab-multitask")
_RECIPES = Path(__file__).parents[1] / "recipes"
# Before the leak check takes train records away that overlap with test: fewest are left of the notes and the reviews.
_COUNTS: dict[SplitName, int] = {"train": 6_500, "validation": 100, "test": 300}
_MORE = {"sentiment": 12_000, "topic": 14_000}


def write_lab(folder: Path, *, progress: Progress) -> None:
    """Write `models/`, `tasks/` and the lab's recipes to `folder`, whole or not at all; what stands there stays.

    The recipes name the files by the path that `folder` has here. About 40 MB.

    Raises:
        StorageError: the disk refuses.
    """
    _write_models(folder / "models")
    _write_tasks(folder / "tasks", progress=progress)
    for name in RECIPES:
        text = (_RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
        write_atomic(folder / f"{name}.yaml", text.replace(" lab/", f" {folder}/"))


def _write_models(folder: Path) -> None:
    key = _key(path for path in MODELS.rglob("*") if path.is_file())
    if is_done(folder, key):
        return
    with staged_folder(folder, facts={"key": key}) as staging, storage_errors(folder):
        shutil.copytree(MODELS, staging, dirs_exist_ok=True)


def _write_tasks(folder: Path, *, progress: Progress) -> None:
    key = _key(Path(__file__).parent.glob("*.py"))
    if is_done(folder, key):
        return
    world, tasks = make_world(), (*TASKS, SPAN_SENTENCE)
    progress.start("Writing the lab", total=len(tasks), unit="tasks")
    with staged_folder(folder, facts={"key": key}) as staging:
        for task in tasks:
            counts: dict[SplitName, int] = {**_COUNTS, "train": _MORE.get(task.name, _COUNTS["train"])}
            write_task(task, world, staging / task.name, counts=counts)
            progress.advance()
    progress.finish()


def _key(paths: Iterable[Path]) -> str:
    return stage_key(files=[file_sha256(path) for path in sorted(paths)])
