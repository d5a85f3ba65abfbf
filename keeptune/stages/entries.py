"""The arguments of a comparison arrive; the models that they name leave, those of runs with their answers to test."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keeptune.errors import DataError, RecipeError, raise_collected
from keeptune.stages.certified import refuse_changed
from keeptune.stages.run import INSTRUCT_MODEL, SELECTION, is_run
from keeptune.stages.way import BASE, TEST, ZERO_SHOT
from keeptune.storage import read_json, read_manifest, read_record, verify_folder

if TYPE_CHECKING:
    from keeptune.evaluation.metrics import Answer


@dataclass(frozen=True, slots=True)
class Entry:
    """A model to compare: one of `run`, in its folder there, or a model folder, adapter folder or hub id of no run.

    The delivered model is one of the run's where it stands on a method's way, and no trained method is the same.
    """

    name: str
    argument: str
    run: Path | None
    folder: Path


@dataclass(frozen=True, slots=True)
class Answered:
    """A model's answers to test; `header` is what `scores.json` says of how they were made.

    `own_tokenizer`: the model read the records in other tokens than the run's models.
    """

    entry: Entry
    answers: Sequence[Answer]
    header: Mapping[str, Any]
    own_tokenizer: bool = False

    @property
    def records(self) -> list[tuple[str, str]]:
        """The records answered, in order: (task, id), an id being a hash of the record's content."""
        return [(answer.task, answer.id) for answer in self.answers]

    @property
    def limit(self) -> int:
        """The tokens of an answer at most."""
        return int(self.header["decoding"]["max_new_tokens"])


def find_entries(arguments: Sequence[str]) -> tuple[list[Entry], list[str]]:
    """Return the models that the arguments name, in their order, and a note on each that stands for several.

    Raises:
        RecipeError: fewer than two models, one of them twice, none of a run, or what is no model.
        DataError: a run without a trained method.
    """
    places: list[tuple[str, Path | None, Path]] = []
    for argument in arguments:
        path = Path(argument).expanduser()
        folders = _folders_of_run(path.resolve(), argument=argument)
        if not folders:
            _refuse_no_model(path, argument=argument)
        places += [(argument, folder.parent, folder) for folder in folders]
        places += [] if folders else [(argument, None, path.resolve() if path.exists() else path)]
    _refuse_twice(places)
    if all(run is None for _, run, _ in places):
        raise RecipeError(
            f"compare: found no run among {', '.join(arguments)}; expected one or more, because its test set is what "
            "models are compared on. Name a run folder too."
        )
    names = _short_names(run or folder for _, run, folder in places)
    entries, notes = _without_repeated_bases(
        Entry(f"{names[run]}/{folder.name}" if run else names[folder], argument, run, folder)
        for argument, run, folder in places
    )
    if len(entries) < 2:
        raise RecipeError(
            f"compare: found the one model {entries[0].name}; expected two or more. Name another run, a method's "
            "folder or a model folder."
        )
    return entries, notes


def _folders_of_run(path: Path, *, argument: str) -> list[Path]:
    """Return the folders of a run's models that a path names: all of a run's, a single one, or none."""
    if is_run(path):
        found = {place.parent.name for place in path.glob("*/training.json")}
        # What an earlier recipe left there is no method of the run now.
        methods = [name for name in read_manifest(path).get("methods", sorted(found)) if name in found]
        if not methods:
            raise DataError(
                f"{argument}: found a run without a trained method; expected one or more. Give `keeptune run` with its "
                "recipe first."
            )
        base = [BASE] if (path / BASE / ZERO_SHOT).is_dir() else []
        delivered = [INSTRUCT_MODEL] if _on_the_way(path) else []
        return [path / name for name in (*base, *methods, *delivered)]
    single = is_run(path.parent) and (path.name == BASE or (path / "training.json").is_file())
    own = single or (path.name == INSTRUCT_MODEL and is_run(path.parent) and _on_the_way(path.parent) is not None)
    return [path] if own else []


def _on_the_way(run: Path) -> Path | None:
    """Return where the answers to test of the delivered model stand, if it is none of the trained ones."""
    path = run / SELECTION
    chosen = read_record(path) if path.is_file() and (run / INSTRUCT_MODEL).is_dir() else {}
    alpha = chosen.get("alpha")
    return run / chosen["selected"] / f"path/{alpha:g}" / TEST if alpha is not None and alpha < 1.0 else None


def _tested_folder(folder: Path) -> Path:
    if folder.name == INSTRUCT_MODEL and (tested := _on_the_way(folder.parent)) is not None:
        return tested
    return folder / (ZERO_SHOT if folder.name == BASE else TEST)


def _refuse_no_model(path: Path, *, argument: str) -> None:
    """Refuse what exists and is no model; what does not exist may be a hub id."""
    if path.exists() and not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise RecipeError(
            f"{argument}: found no run, no trained method of one and no model; expected one of these. Name a run "
            "folder, a method's folder in it, or a folder that holds config.json or adapter_config.json."
        )


def _refuse_twice(places: Sequence[tuple[str, Path | None, Path]]) -> None:
    """Refuse a model that stands there twice; an artifact in a method's folder is that method."""
    seen: set[Path] = set()
    for argument, run, folder in places:
        artifacts = [folder / "adapter", folder / "model"] if run else []
        if seen & {folder, *artifacts}:
            raise RecipeError(
                f"{argument}: found the same model twice ({folder}); expected each once, a run folder standing for "
                "all of its models. Leave one of the two out."
            )
        seen |= {folder, *artifacts}


def _short_names(paths: Iterable[Path]) -> dict[Path, str]:
    """Return the last part of each path, or as many as it takes to tell all of them apart."""
    distinct = list(dict.fromkeys(paths))
    number = 1
    while len({path.parts[-number:] for path in distinct}) < len(distinct):
        number += 1
    return {path: "/".join(path.parts[-number:]) for path in distinct}


def _without_repeated_bases(entries: Iterable[Entry]) -> tuple[list[Entry], list[str]]:
    """Return the entries without a base model whose weights an earlier run's has, and a note on each left out."""
    kept: list[Entry] = []
    notes: list[str] = []
    names: dict[str, str] = {}
    for entry in entries:
        is_base = entry.run is not None and entry.folder.name == BASE
        sha256 = read_manifest(entry.folder.parent).get("base", {}).get("sha256") if is_base else None
        if sha256 in names:
            notes.append(f"{entry.name} has the weights of {names[sha256]}, which stands for both.")
            continue
        kept.append(entry)
        if sha256 is not None:
            names[sha256] = entry.name
    return kept, notes


def read_tested(entries: Sequence[Entry]) -> list[Answered]:
    """Return the answers to test that `evaluate` left of models of runs.

    Raises:
        DataError: there are none, or not those that it wrote, or the delivered model is no longer the certified one.
    """
    for entry in entries:
        if entry.run is not None and entry.folder.name == INSTRUCT_MODEL:
            refuse_changed(entry.folder, runs=[entry.run])
    folders = [_tested_folder(entry.folder) for entry in entries]
    missing = [folder for folder in folders if verify_folder(folder) is None]
    if missing:
        problem = "found no whole answers to test; expected those of `keeptune evaluate`. Evaluate first"
        raise_collected(DataError, [f"{folder}: {problem}." for folder in missing])
    return [read_answered(entry, folder) for entry, folder in zip(entries, folders, strict=True)]


def read_answered(entry: Entry, folder: Path, *, own_tokenizer: bool = False) -> Answered:
    """Return the answers in a folder that `evaluate` or `compare` wrote.

    Raises:
        StorageError: there are none.
        DataError: a line was edited.
    """
    from keeptune.evaluation.evaluate import SCORES, read_answers

    return Answered(entry, read_answers(folder), read_json(folder / SCORES), own_tokenizer)
