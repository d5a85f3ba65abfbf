"""Files, a folder or a hub id arrive; raw rows leave, each with its origin and, where the source has one, its split."""

from __future__ import annotations

import csv
import difflib
import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keeptune.data.lines import (
    MAX_ROW_BYTES,
    Found,
    Problem,
    decoded,
    json_line_rows,
    json_rows,
    read_lines,
    reading,
    refuse_blown_up,
)
from keeptune.data.paths import expanded, local_path, shown_path
from keeptune.data.record import SPLIT_NAMES, SplitName
from keeptune.errors import DataError, RecipeError, import_extra, raise_collected, relative_start
from keeptune.storage import file_sha256

_ALIASES: dict[str, SplitName] = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
}
_SUFFIX = re.compile(r"\.(json|jsonl|ndjson|csv)(\.gz)?$|\.parquet$", re.IGNORECASE)
_SUFFIXES = ".json, .jsonl, .ndjson, .csv (each may end with .gz) or .parquet"
_OTHER_SUFFIX = re.compile(r"\.(txt|tsv|xlsx?|gz|zip|arrow|pkl)$", re.IGNORECASE)
_SPLIT_FILE = re.compile(rf"({'|'.join(_ALIASES)})(-\d+-of-\d+.*)?", re.IGNORECASE)
_PREFIXED_SPLIT_FILE = re.compile(rf"(?:.+[._-])?{_SPLIT_FILE.pattern}", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_PROBLEMS = 1000
_BATCH_ROWS = 64


@dataclass(frozen=True, slots=True)
class Row:
    """One raw row. `split` is None where keeptune splits; otherwise the row comes from an own file for that split.

    `origin` is `file:line` (JSON lines and CSV: the row's first line, from 1) or `file[index]` (from 0).
    """

    value: dict[str, Any]
    origin: str
    split: SplitName | None


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    shown: str
    split: SplitName | None


@dataclass(frozen=True, slots=True)
class _Hub:
    id: str
    commit: str


@dataclass(frozen=True, slots=True)
class _Source:
    files: list[_File]
    hub: _Hub | None


def read_rows(
    path: str | Sequence[str],
    *,
    revision: str | None,
    validation: str | None,
    test: str | None,
    base_folder: Path | None = None,
    skip: Callable[[Problem], None] | None = None,
) -> Iterator[Row]:
    """Yield the rows of a file, a list or pattern of files, a folder or a hub id, then those of the own other files.

    A path that exists is local; relative ones start from `base_folder` (default: the working folder). JSON lines, CSV
    and Parquet are streamed. Train rows carry the split "train" only if validation and test both have rows of their
    own; otherwise None, since the missing split is still to be carved from them. Of a hub data set the splits train,
    validation and test are read and no others, or its only split whatever its name. `skip` is given each row that
    cannot be read; without it, such rows are faults like those that spoil a whole file.

    Raises:
        RecipeError: a setting has no effect on this kind of path, or the extra `hub` is not installed.
        DataError: the path is missing or no data; or, after the last good row, all faults of single rows at once.
        StorageError: a file cannot be read.
    """
    source = _locate(path, revision=revision, validation=validation, test=test, base_folder=base_folder)
    return _rows(source, skip=skip)


def source_sha256(
    path: str | Sequence[str],
    *,
    revision: str | None,
    validation: str | None,
    test: str | None,
    base_folder: Path | None = None,
) -> str:
    """Return what identifies the bytes that `read_rows` reads: a SHA-256, or "id@commit" for a hub id alone.

    Raises:
        the same as `read_rows`, for the path alone.
    """
    source = _locate(path, revision=revision, validation=validation, test=test, base_folder=base_folder)
    name = f"{source.hub.id}@{source.hub.commit}" if source.hub else ""
    if source.hub and not source.files:
        return name
    digest = hashlib.sha256(name.encode())
    for file in source.files:
        digest.update(f"\n{file.split} {file.path.name} {file_sha256(file.path)}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _rows(source: _Source, *, skip: Callable[[Problem], None] | None) -> Iterator[Row]:
    problems: list[str] = []
    if source.hub:
        yield from _hub_rows(source.hub, own=[file.split for file in source.files if file.split])
    for file in source.files:
        for found in _found_in(file):
            if not isinstance(found, Problem):
                yield Row(found[1], found[0], file.split)
                continue
            if skip is not None and found.origin:
                skip(found)
                continue
            problems.append(found.message)
            if len(problems) == _MAX_PROBLEMS:
                raise_collected(DataError, problems)
    if problems:
        raise_collected(DataError, problems)


def _found_in(file: _File) -> Iterator[Found]:
    match = _SUFFIX.search(file.path.name)
    assert match is not None
    kind = (match[1] or "parquet").lower()
    readers = {"json": json_rows, "csv": _csv_rows, "parquet": _parquet_rows}
    empty = True
    for found in readers.get(kind, json_line_rows)(file.path, shown=file.shown):
        empty = False
        yield found
    if empty:
        yield Problem(f"{file.shown}: found no rows; expected at least one. Name a file that holds rows.")


def _csv_rows(path: Path, *, shown: str) -> Iterator[Found]:
    """Yield (origin, row) for each row of a comma-separated file with a header; a fault of the quoting ends it."""
    # The module's limit for one field is 128 KiB for the whole process; it is only ever raised here.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    faults: list[Problem] = []
    reader = csv.reader(_csv_lines(path, shown=shown, faults=faults), strict=True)
    header: list[str] = []
    while not faults:
        origin = f"{shown}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            fault = Problem(f"{origin}: found broken CSV ({error}); expected commas, quotes doubled. Mend the row.")
            faults = faults or [fault]
            break
        if cells is None:
            break
        if not cells or faults:
            continue
        if not header:
            header = cells
            if len(set(header)) != len(header) or "" in header:
                faults.append(
                    Problem(f"{origin}: found the header {header!r:.200}; expected different names. Mend the header.")
                )
        elif len(cells) != len(header):
            found = f"found {len(cells)} cells; expected {len(header)} as in the header. Mend the row."
            yield Problem(f"{origin}: {found}", origin)
        elif sum(map(len, cells)) > MAX_ROW_BYTES:
            yield Problem(f"{origin}: found a row of more than 1 MiB; expected at most that. Shorten the row.", origin)
        else:
            yield origin, dict(zip(header, cells, strict=True))
    yield from faults


def _csv_lines(path: Path, *, shown: str, faults: list[Problem]) -> Iterator[str]:
    """Yield the lines as text; the first that is none goes to `faults` and ends the file, for a quote may span it."""
    for line in read_lines(path, shown=shown):
        text = decoded(line, shown=shown)
        if isinstance(text, Problem):
            faults.append(text)
            return
        yield text


def _parquet_rows(path: Path, *, shown: str) -> Iterator[Found]:
    """Yield (origin, row) for each row of a Parquet file, read in small batches."""
    import pyarrow
    import pyarrow.parquet

    with reading(shown):
        raw = path.open("rb")
    file_bytes, num_bytes, num_rows = path.stat().st_size, 0, 0
    try:
        with raw, pyarrow.parquet.ParquetFile(raw) as table:
            groups = (table.metadata.row_group(i) for i in range(table.metadata.num_row_groups))
            refuse_blown_up(sum(group.total_byte_size for group in groups), file_bytes=file_bytes, shown=shown)
            for batch in table.iter_batches(batch_size=_BATCH_ROWS):
                num_bytes += batch.nbytes
                refuse_blown_up(num_bytes, file_bytes=file_bytes, shown=shown)
                yield from _batch_rows(batch, start=num_rows, shown=shown)
                num_rows += batch.num_rows
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(
            f"{shown}: found a broken Parquet file ({str(error)[:200]}); expected a whole one. Write or copy it again."
        ) from error


def _batch_rows(batch: Any, *, start: int, shown: str) -> Iterator[Found]:
    for i, value in enumerate(batch.to_pylist()):
        origin = f"{shown}[{start + i}]"
        if batch.nbytes > MAX_ROW_BYTES and batch.slice(i, 1).nbytes > MAX_ROW_BYTES:
            yield Problem(f"{origin}: found a row of more than 1 MiB; expected at most that. Shorten the row.", origin)
        else:
            yield origin, value


def _hub_rows(hub: _Hub, *, own: list[SplitName]) -> Iterator[Row]:
    datasets = import_extra("datasets", extra="hub")
    name = f"{hub.id}@{hub.commit}"
    try:
        by_name = datasets.load_dataset(hub.id, revision=hub.commit)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name}: found no data set that can be loaded ({str(error)[:300]}); expected one with data files. "
            "Check the id and the network, or download its files and name their folder."
        ) from error
    splits: dict[str, SplitName] = {key: _ALIASES[key] for key in by_name if key in _ALIASES}
    if len(by_name) == 1 and "train" not in splits.values():
        splits = {next(iter(by_name)): "train"}
    names = sorted([*splits.values(), *own])
    if "train" not in names or len(set(names)) != len(names):
        raise DataError(
            f"{name}: found the splits {', '.join(by_name)} with own files for {', '.join(own) or 'none'}; "
            "expected train, and validation and test once each at most. Download the files and name one of them."
        )
    whole = len(names) == len(SPLIT_NAMES)
    for key, split in splits.items():
        for index, value in enumerate(by_name[key]):
            yield Row(value, f"{name}/{key}[{index}]", split if split != "train" or whole else None)


def _locate(
    path: str | Sequence[str],
    *,
    revision: str | None,
    validation: str | None,
    test: str | None,
    base_folder: Path | None,
) -> _Source:
    named: list[tuple[str | None, SplitName]] = [(validation, "validation"), (test, "test")]
    own = [
        _file(local_path(given, base_folder=base_folder), shown=given, split=split) for given, split in named if given
    ]
    names = expanded(path, base_folder=base_folder)
    single = isinstance(path, str) and names == [path]
    local = local_path(names[0], base_folder=base_folder)
    with reading(names[0]):
        exists = local.exists()
    if single and not exists and _looks_like_hub_id(names[0]):
        return _Source(own, _hub(names[0], revision=revision))
    if revision is not None:
        raise RecipeError(
            f"{shown_path(path)}: found revision {revision!r} for a local path, where it has no effect; expected a hub "
            "id. Remove `revision` from this task."
        )
    if single and local.is_dir():
        files = _folder_files(local, shown=names[0])
    else:
        files = [_file(local_path(name, base_folder=base_folder), shown=name, split=None) for name in names]
    for file in own:
        if any(file.path.samefile(other.path) or file.split == other.split for other in files):
            raise DataError(
                f"{file.shown}: found a second use of this file or of the split {file.split}; expected one file for "
                f"each split. Remove `{file.split}` from this task, or name another file."
            )
        files.append(file)
    if {"validation", "test"} <= {file.split for file in files}:
        files = [_File(file.path, file.shown, file.split or "train") for file in files]
    return _Source(files, None)


def _looks_like_hub_id(path: str) -> bool:
    has_data_suffix = _SUFFIX.search(path) or _OTHER_SUFFIX.search(path)
    return bool(_HUB_ID.fullmatch(path.partition("@")[0])) and not has_data_suffix and path[0] not in ".~"


def _hub(path: str, *, revision: str | None) -> _Hub:
    """Return the hub id with the commit that its revision (default: the newest) stands for."""
    id_, _, pinned = path.partition("@")
    if pinned and revision not in (None, pinned):
        raise RecipeError(f"{path}: found revision {revision!r} as well; expected one of the two. Remove the other.")
    wanted = pinned or revision
    if wanted and _COMMIT.fullmatch(wanted):
        return _Hub(id_, wanted)
    hub = import_extra("huggingface_hub", extra="hub")
    try:
        return _Hub(id_, hub.HfApi().dataset_info(id_, revision=wanted).sha)
    except (OSError, ValueError, hub.errors.HTTPError) as error:
        raise DataError(
            f"{path}: found no local path, and no data set on the hub ({str(error)[:300]}); expected either. "
            "Check the spelling and the network; a full commit (id@40 digits) needs no look-up."
        ) from error


def _file(path: Path, *, shown: str, split: SplitName | None) -> _File:
    if not path.is_file():
        found = "something that is no regular file" if path.exists() else "no such file or folder"
        raise DataError(f"{shown}: found {found}; expected a data file. {_near(path)}")
    if not _SUFFIX.search(path.name):
        raise DataError(
            f"{shown}: found the name ending {path.suffix!r}; expected {_SUFFIXES}. Convert or rename the file."
        )
    return _File(path, shown, split)


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


def _folder_files(folder: Path, *, shown: str) -> list[_File]:
    """Return a folder's train, validation and test files, or all of its data files as unsplit ones."""
    with reading(shown):
        names = sorted(p.name for p in folder.iterdir() if p.is_file() and _SUFFIX.search(p.name) and p.name[0] != ".")
    if not names:
        raise DataError(f"{shown}: found a folder without data files; expected files named {_SUFFIXES}. Check it.")
    matches = {name: _SPLIT_FILE.fullmatch(_SUFFIX.sub("", name)) for name in names}
    if not any(matches.values()):
        # As in dialogsum.train.jsonl beside dialogsum.dev.jsonl; a train file alone, or a test file, may be any name.
        prefixed = {name: _PREFIXED_SPLIT_FILE.fullmatch(_SUFFIX.sub("", name)) for name in names}
        known = {_ALIASES[match[1].lower()] for match in prefixed.values() if match}
        matches = prefixed if "train" in known and len(known) > 1 else matches
    if not any(matches.values()):
        return [_file(folder / name, shown=f"{shown.rstrip('/')}/{name}", split=None) for name in names]
    others = [name for name, match in matches.items() if not match]
    splits: dict[str, SplitName] = {name: _ALIASES[match[1].lower()] for name, match in matches.items() if match}
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
        _file(folder / name, shown=f"{shown.rstrip('/')}/{name}", split=None if split == "train" else split)
        for name, split in sorted(splits.items(), key=lambda item: SPLIT_NAMES.index(item[1]))
    ]
