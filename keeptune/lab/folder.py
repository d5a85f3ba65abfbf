"""A folder's name arrives; the lab stands in it as ordinary files: models, tasks, and the recipes that use them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from keeptune.data.record import SplitName
from keeptune.errors import FolderInUseError, StorageError, raise_collected
from keeptune.lab.tasks import SPAN_SENTENCE, TASKS, write_task
from keeptune.lab.world import make_world
from keeptune.progress import Progress
from keeptune.stages.run import is_done, stage_key
from keeptune.storage import (
    MANIFEST,
    file_sha256,
    read_manifest,
    read_record,
    staged_folder,
    storage_errors,
    write_atomic,
)

MODELS = Path(__file__).parent / "models"
RECIPES = ("lab-demo", "lab-multitask")
_PARTS = ("models", "tasks")
CONTENT = (*_PARTS, *(f"{name}.yaml" for name in RECIPES))
"""What `write_lab` writes or keeps, by name."""
_MADE_BY = "keeptune lab"
_ELSEWHERE = "Name another folder, as in `keeptune demo my-lab`."
# A path in a recipe, as it stands where the lab is in `lab/`.
_PATH = re.compile(r" lab/([\w./-]+)")
_RECIPES = Path(__file__).parents[1] / "recipes"
# Before the leak check takes train records away that overlap with test: fewest are left of the notes and the reviews.
_COUNTS: dict[SplitName, int] = {"train": 6_500, "validation": 100, "test": 300}
_MORE = {"sentiment": 12_000, "topic": 14_000}


def write_lab(folder: Path, *, progress: Progress) -> tuple[str, ...]:
    """Write `models/`, `tasks/` and the lab's recipes to `folder`; return the names of what was not there as it is now.

    A recipe that stands there stays as it is. The recipes name the files by the path that `folder` has here. About
    40 MB.

    Raises:
        FolderInUseError: other things than a lab are in the folder, or files of `models/` or `tasks/` were changed.
        StorageError: the disk refuses.
    """
    _make_folder(folder)
    _refuse_another_content(folder)
    keys = {
        "models": _key(path for path in MODELS.rglob("*") if path.is_file()),
        "tasks": _key(Path(__file__).parent.glob("*.py")),
    }
    waiting = [name for name, key in keys.items() if not is_done(folder / name, key)]
    changes = [change for name in waiting for change in _changes(folder / name)]
    if changes:
        raise_collected(FolderInUseError, changes)
    if "models" in waiting:
        _write_models(folder / "models", key=keys["models"])
    if "tasks" in waiting:
        _write_tasks(folder / "tasks", key=keys["tasks"], progress=progress)
    recipes = [name for name in RECIPES if not (folder / f"{name}.yaml").exists()]
    for name in recipes:
        text = (_RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
        write_atomic(folder / f"{name}.yaml", _PATH.sub(lambda path: f" {_quoted(folder / path[1])}", text))
    return (*waiting, *(f"{name}.yaml" for name in recipes))


def _quoted(path: Path) -> str:
    """Return a path as YAML takes it whatever is in it."""
    return json.dumps(str(path), ensure_ascii=False)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        is_file = isinstance(error, FileExistsError | NotADirectoryError)
        found = "found a file on this path" if is_file else f"found no way to make it ({error.strerror})"
        raise StorageError(f"{folder}: {found}; expected a folder for the lab. {_ELSEWHERE}") from error


def _refuse_another_content(folder: Path) -> None:
    """Leave a folder alone that holds anything and no lab, and one whose `models/` or `tasks/` are no lab's."""
    with storage_errors(folder):
        names = sorted(path.name for path in folder.iterdir() if path.name[0] != "." and ".tmp-" not in path.name)
    ours = [name for name in _PARTS if _is_ours(folder / name)]
    if names and not ours and not set(names) & set(CONTENT[len(_PARTS) :]):
        raise FolderInUseError(
            f"{folder}: found {', '.join(names[:5])} and no lab; expected an empty or a new folder, or a lab. "
            f"{_ELSEWHERE}"
        )
    for name in _PARTS:
        if name in names and name not in ours:
            raise FolderInUseError(
                f"{folder / name}: found a folder that `keeptune lab` did not write; expected none, or a lab's. "
                f"{_ELSEWHERE}"
            )


def _is_ours(folder: Path) -> bool:
    return read_manifest(folder).get("made_by") == _MADE_BY


def _changes(folder: Path) -> Iterator[str]:
    """Yield what would be lost if the folder were written anew: files that its manifest does not know as they are."""
    with storage_errors(folder):
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    written = read_record(folder / MANIFEST, again="`keeptune lab`")["files"] if paths else {}
    for path in paths:
        facts = written.get(path.relative_to(folder).as_posix())
        if facts is None or file_sha256(path) != facts["sha256"]:
            found = "a file of your own" if facts is None else "it changed since keeptune wrote it"
            yield (
                f"{path}: found {found}; expected the lab's files alone, as they are written anew. "
                f"Move it, or remove {folder} to have that anew."
            )


def _write_models(folder: Path, *, key: str) -> None:
    with staged_folder(folder, facts=_facts(key)) as staging, storage_errors(folder):
        shutil.copytree(MODELS, staging, dirs_exist_ok=True)


def _write_tasks(folder: Path, *, key: str, progress: Progress) -> None:
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
