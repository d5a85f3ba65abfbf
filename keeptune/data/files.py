"""Find a task's files: one file, a folder with a file for each split, or a folder of files that are split later."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from keeptune.data.lines import reading
from keeptune.data.record import SPLIT_NAMES, SplitName
from keeptune.errors import DataError, relative_start

ALIASES: dict[str, SplitName] = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
}
SUFFIX = re.compile(r"\.(json|jsonl|ndjson|csv|tsv)(\.gz)?$|\.(parquet|arrow)$", re.IGNORECASE)
_SUFFIXES = ".json, .jsonl, .ndjson, .csv, .tsv (each may end with .gz), .parquet or .arrow"
_SPLIT_FILE = re.compile(rf"({'|'.join(ALIASES)})(-\d+-of-\d+.*)?", re.IGNORECASE)
_PREFIXED_SPLIT_FILE = re.compile(rf"(?:.+[._-])?{_SPLIT_FILE.pattern}", re.IGNORECASE)
# What `save_to_disk` of datasets writes beside the folders of several splits, and other files of it without rows.
_SAVED_SPLITS = "dataset_dict.json"
_NO_ROWS = frozenset({_SAVED_SPLITS, "dataset_info.json", "dataset_infos.json", "state.json"})


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of rows, its name as the recipe has it, and its split; None where keeptune splits."""

    path: Path
    shown: str
    split: SplitName | None


def data_file(path: Path, *, shown: str, split: SplitName | None) -> DataFile:
    """Return a file of rows; refuse one that is not there, or whose name says that it holds other things."""
    if not path.is_file():
        found = "something that is no regular file" if path.exists() else "no such file or folder"
        raise DataError(f"{shown}: found {found}; expected a data file. {_near(path)}")
    if not SUFFIX.search(path.name):
        raise DataError(
            f"{shown}: found the name ending {path.suffix!r}; expected {_SUFFIXES}. Convert or rename the file."
        )
    return DataFile(path, shown, split)


def _near(path: Path) -> str:
    """Return the remedy for a missing path: the nearest names in the folder where it should be."""
    folder = path.parent
    if not folder.is_dir():
        return f"There is no folder {folder} either; check the path.{relative_start(path)}"
    with reading(str(folder)):
        names = sorted(p.name for p in folder.iterdir())
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if near:
        return f"Did you mean {' or '.join(near)}?"
    return f"Nothing in {folder} has a similar name; check the path.{relative_start(path)}"


def folder_files(folder: Path, *, shown: str) -> list[DataFile]:
    """Return a folder's train, validation and test files, or all of its data files as unsplit ones."""
    if (folder / _SAVED_SPLITS).is_file():
        return _saved_splits(folder, shown=shown)
    with reading(shown):
        names = _data_names(folder)
        inner = [] if names else [p.name for p in sorted(folder.iterdir()) if p.is_dir() and _data_names(p)]
    if not names:
        remedy = f"Name the folder {shown.rstrip('/')}/{inner[0]}, which has some." if inner else "Check it."
        raise DataError(f"{shown}: found a folder without data files; expected files named {_SUFFIXES}. {remedy}")
    matches = {name: _SPLIT_FILE.fullmatch(SUFFIX.sub("", name)) for name in names}
    if not any(matches.values()):
        # As in dialogsum.train.jsonl beside dialogsum.dev.jsonl; a train file alone, or a test file, may be any name.
        prefixed = {name: _PREFIXED_SPLIT_FILE.fullmatch(SUFFIX.sub("", name)) for name in names}
        known = {ALIASES[match[1].lower()] for match in prefixed.values() if match}
        matches = prefixed if "train" in known and len(known) > 1 else matches
    if not any(matches.values()):
        return [data_file(folder / name, shown=f"{shown.rstrip('/')}/{name}", split=None) for name in names]
    others = [name for name, match in matches.items() if not match]
    splits: dict[str, SplitName] = {name: ALIASES[match[1].lower()] for name, match in matches.items() if match}
    if others or "train" not in splits.values():
        raise DataError(
            f"{shown}: found {', '.join(splits)} beside {', '.join(others[:5]) or 'no train file'}; expected train "
            "and perhaps validation and test files alone, or none of these names. Name one file, or move the others."
        )
    kinds: defaultdict[SplitName, set[str]] = defaultdict(set)
    for name, match in matches.items():
        assert match is not None
        # Shards of one split share their name up to the number.
        shard = "-0" if match[2] else ""
        kinds[splits[name]].add(f"{name[: match.start(1)]}{match[1]}{shard}{name[match.end() :]}")
    twice = [split for split, kind in kinds.items() if len(kind) > 1]
    if twice:
        raise DataError(
            f"{shown}: found {', '.join(name for name in names if splits[name] == twice[0])} for one split; "
            f"expected one file for {twice[0]}. Move the others."
        )
    return [
        data_file(folder / name, shown=f"{shown.rstrip('/')}/{name}", split=None if split == "train" else split)
        for name, split in sorted(splits.items(), key=lambda item: SPLIT_NAMES.index(item[1]))
    ]


def _data_names(folder: Path) -> list[str]:
    """Return the names of the data files right inside a folder."""
    files = (p.name for p in folder.iterdir() if p.is_file() and SUFFIX.search(p.name))
    return sorted(name for name in files if name[0] != "." and name not in _NO_ROWS)


def _saved_splits(folder: Path, *, shown: str) -> list[DataFile]:
    """Return the Arrow files of a `DatasetDict` that was saved to disk, those of train as unsplit ones."""
    found: dict[SplitName, list[DataFile]] = {}
    with reading(shown):
        inner = [p for p in sorted(folder.iterdir()) if p.is_dir() and ALIASES.get(p.name)]
        for part in inner:
            split = ALIASES[part.name]
            own = None if split == "train" else split
            found[split] = [
                data_file(part / name, shown=f"{shown.rstrip('/')}/{part.name}/{name}", split=own)
                for name in _data_names(part)
            ]
    if len(found) < len(inner) or not found.get("train"):
        listed = ", ".join(p.name for p in inner) or "none"
        raise DataError(
            f"{shown}: found a saved data set with the splits {listed}; expected train, and validation and test once "
            "each at most. Name the folder of one split."
        )
    return [file for split in SPLIT_NAMES for file in found.get(split, [])]
