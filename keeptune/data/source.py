"""Files, a folder or a hub id arrive; raw rows leave, each with its origin and, where the source has one, its split."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keeptune.data.cells import csv_rows
from keeptune.data.files import ALIASES, SUFFIX, DataFile, data_file, folder_files
from keeptune.data.json_text import json_line_rows, json_rows
from keeptune.data.lines import Found, Problem, reading
from keeptune.data.paths import expanded, local_path, of_runs, shown_path
from keeptune.data.record import SPLIT_NAMES, SplitName
from keeptune.data.tables import arrow_rows, names_beside, names_of, parquet_rows, with_class_names
from keeptune.errors import DataError, RecipeError, import_extra, raise_collected
from keeptune.storage import file_sha256

_OTHER_SUFFIX = re.compile(r"\.(txt|xlsx?|gz|zip|pkl)$", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_PROBLEMS = 1000
# Of a hub data set that is capped, rows are read until this many times the cap, and this many, have come.
_ROWS_PER_RECORD, _LEAST_ROWS = 20, 10_000


@dataclass(frozen=True, slots=True)
class Row:
    """One raw row. `split` is None where keeptune splits; otherwise the row comes from an own file for that split.

    `origin` is `file:line` (JSON lines and CSV: the row's first line, from 1) or `file[index]` (from 0).
    """

    value: dict[str, Any]
    origin: str
    split: SplitName | None


@dataclass(frozen=True, slots=True)
class _Hub:
    """A hub data set at a commit; `config` and `split` are None where the recipe names none."""

    id: str
    commit: str
    config: str | None
    split: str | None

    @property
    def name(self) -> str:
        return "/".join(filter(None, (f"{self.id}@{self.commit}", self.config)))


@dataclass(frozen=True, slots=True)
class _Source:
    files: list[DataFile]
    hub: _Hub | None


def read_rows(
    path: str | Sequence[str],
    *,
    revision: str | None,
    validation: str | None,
    test: str | None,
    config: str | None = None,
    split: str | None = None,
    max_records: int | None = None,
    base_folder: Path | None = None,
    skip: Callable[[Problem], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[Row]:
    """Yield the rows of a file, a list or pattern of files, a folder or a hub id, then those of the own other files.

    A path that exists is local; relative ones start from `base_folder` (default: the working folder). JSON lines, CSV
    and Parquet are streamed. Train rows carry the split "train" only if validation and test both have rows of their
    own; otherwise None, since the missing split is still to be carved from them. Class labels that a file stores as
    numbers with names arrive as their names.

    Of a hub data set the splits train, validation and test are read and no others, or its only split whatever its
    name, or the one called `split`. Where `max_records` is given, a hub data set is streamed, and of its train split no
    more is read than 20 rows for each of these records, and 10,000 at least; `say` is told if that leaves some unread.
    `skip` is given each row that cannot be read; without it, such rows are faults like those that spoil a whole file.

    Raises:
        RecipeError: a setting has no effect on this kind of path, or the extra `hub` is not installed.
        DataError: the path is missing or no data; or, after the last good row, all faults of single rows at once.
        StorageError: a file cannot be read.
    """
    named = {"revision": revision, "config": config, "split": split}
    source = _locate(path, named=named, validation=validation, test=test, base_folder=base_folder)
    if names := of_runs(path, base_folder=base_folder):
        say(f"{shown_path(path)}: left out {len(names):,} matches that stand in run folders, such as {names[0]}.")
    return _rows(source, max_records=max_records, skip=skip, say=say)


def source_sha256(
    path: str | Sequence[str],
    *,
    revision: str | None,
    validation: str | None,
    test: str | None,
    config: str | None = None,
    split: str | None = None,
    base_folder: Path | None = None,
) -> str:
    """Return what identifies the bytes that `read_rows` reads: a SHA-256, or "id@commit" for a hub id alone.

    Raises:
        the same as `read_rows`, for the path alone.
    """
    named = {"revision": revision, "config": config, "split": split}
    source = _locate(path, named=named, validation=validation, test=test, base_folder=base_folder)
    name = f"{source.hub.id}@{source.hub.commit}" if source.hub else ""
    if source.hub and not source.files:
        return name
    digest = hashlib.sha256(name.encode())
    for file in source.files:
        digest.update(f"\n{file.split} {file.path.name} {file_sha256(file.path)}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def check_source(
    path: str | Sequence[str], *, validation: str | None, test: str | None, base_folder: Path | None = None
) -> None:
    """Refuse a local path or own file that is not there or has no known suffix; what may be a hub id is not looked up.

    Raises:
        the same as `read_rows`, for local paths alone.
    """
    _local(path, validation=validation, test=test, base_folder=base_folder)


def _rows(
    source: _Source,
    *,
    max_records: int | None,
    skip: Callable[[Problem], None] | None,
    say: Callable[[str], None],
) -> Iterator[Row]:
    problems: list[str] = []
    if source.hub:
        own: list[SplitName] = [file.split for file in source.files if file.split]
        yield from _hub_rows(source.hub, own=own, max_records=max_records, say=say)
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


def _found_in(file: DataFile) -> Iterator[Found]:
    match = SUFFIX.search(file.path.name)
    assert match is not None
    kind = (match[1] or match[3]).lower()
    readers = {"json": json_rows, "csv": csv_rows, "tsv": csv_rows, "parquet": parquet_rows, "arrow": arrow_rows}
    names, empty = names_beside(file.path), True
    for found in readers.get(kind, json_line_rows)(file.path, shown=file.shown):
        empty = False
        yield found if isinstance(found, Problem) else (found[0], with_class_names(found[1], names))
    if empty:
        yield Problem(f"{file.shown}: found no rows; expected at least one. Name a file that holds rows.")


def _hub_rows(
    hub: _Hub, *, own: Sequence[SplitName], max_records: int | None, say: Callable[[str], None]
) -> Iterator[Row]:
    by_name = _loaded(hub, streaming=max_records is not None)
    splits: dict[str, SplitName] = {key: ALIASES[key] for key in by_name if key in ALIASES}
    if len(by_name) == 1 and "train" not in splits.values():
        splits = {next(iter(by_name)): "train"}
    names = sorted([*splits.values(), *own])
    if "train" not in names or len(set(names)) != len(names):
        raise DataError(
            f"{hub.name}: found the splits {', '.join(by_name)} with own files for {', '.join(own) or 'none'}; "
            "expected train, and validation and test once each at most. Name the one to read with `split` in the task."
        )
    whole = len(names) == len(SPLIT_NAMES)
    for key, split in splits.items():
        rows, at_most = by_name[key], None
        class_names = names_of(getattr(rows, "features", None))
        if max_records is not None and split == "train":
            at_most = max(_LEAST_ROWS, _ROWS_PER_RECORD * max_records)
            # Rows often lie sorted by their label. The shards are shuffled, and the rows among those at hand.
            rows = rows.shuffle(seed=int(hub.commit[:8], 16), buffer_size=_LEAST_ROWS)
        for index, value in enumerate(rows):
            if index == at_most:
                say(
                    f"{hub.name}/{key}: read {index:,} rows, as max_records is {max_records:,}, and left the others "
                    "on the hub; without max_records all are read."
                )
                break
            fixed = split if split != "train" or whole else None
            yield Row(with_class_names(value, class_names), f"{hub.name}/{key}[{index}]", fixed)


def _loaded(hub: _Hub, *, streaming: bool) -> Mapping[str, Any]:
    """Return the rows of a hub data set by the names of its splits, all of them or the one that the recipe names."""
    datasets = import_extra("datasets", extra="hub")
    with _hub_errors(hub, datasets=datasets):
        found = datasets.load_dataset(
            hub.id, name=hub.config, revision=hub.commit, split=hub.split, streaming=streaming
        )
    return found if hub.split is None else {hub.split: found}


@contextlib.contextmanager
def _hub_errors(hub: _Hub, *, datasets: Any) -> Iterator[None]:
    """Turn what `datasets` raises inside the block into an error about the data set."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if "scripts are no longer supported" in str(error):
            raise DataError(
                f"{hub.name}: found a data set that is a Python script, which `datasets` runs no longer; expected data "
                "files. Set `revision: refs/convert/parquet` in this task to read the copy that the hub has made of "
                "most such sets, or download its files and name their folder."
            ) from error
        raise DataError(
            f"{hub.name}: found no data set that can be loaded ({str(error)[:300]}); expected one with data files. "
            "Check the id and the network, or download its files and name their folder."
        ) from error


def _local(
    path: str | Sequence[str], *, validation: str | None, test: str | None, base_folder: Path | None
) -> tuple[list[DataFile], list[DataFile] | None]:
    """Return the own files of validation and test, and those of the path; None for what looks like a hub id."""
    named: list[tuple[str | None, SplitName]] = [(validation, "validation"), (test, "test")]
    own = [
        data_file(local_path(given, base_folder=base_folder), shown=given, split=split)
        for given, split in named
        if given
    ]
    names = expanded(path, base_folder=base_folder)
    single = isinstance(path, str) and names == [path]
    local = local_path(names[0], base_folder=base_folder)
    with reading(names[0]):
        exists = local.exists()
    if single and not exists and _looks_like_hub_id(names[0]):
        return own, None
    if single and local.is_dir():
        files = folder_files(local, shown=names[0])
    else:
        files = [data_file(local_path(name, base_folder=base_folder), shown=name, split=None) for name in names]
    for file in own:
        if any(file.path.samefile(other.path) or file.split == other.split for other in files):
            raise DataError(
                f"{file.shown}: found a second use of this file or of the split {file.split}; expected one file for "
                f"each split. Remove `{file.split}` from this task, or name another file."
            )
        files.append(file)
    return own, files


def _locate(
    path: str | Sequence[str],
    *,
    named: Mapping[str, str | None],
    validation: str | None,
    test: str | None,
    base_folder: Path | None,
) -> _Source:
    """Return the files and the hub data set that a task names; `named` are the settings that are for the hub alone."""
    own, files = _local(path, validation=validation, test=test, base_folder=base_folder)
    if files is None:
        assert isinstance(path, str)
        return _Source(own, _hub(path, **named))
    for key, value in named.items():
        if value is not None:
            raise RecipeError(
                f"{shown_path(path)}: found {key} {value!r} for a local path, where it has no effect; expected a hub "
                f"id. Remove `{key}` from this task."
            )
    if {"validation", "test"} <= {file.split for file in files}:
        files = [DataFile(file.path, file.shown, file.split or "train") for file in files]
    return _Source(files, None)


def _looks_like_hub_id(path: str) -> bool:
    has_data_suffix = SUFFIX.search(path) or _OTHER_SUFFIX.search(path)
    return bool(_HUB_ID.fullmatch(path.partition("@")[0])) and not has_data_suffix and path[0] not in ".~"


def _hub(path: str, *, revision: str | None, config: str | None, split: str | None) -> _Hub:
    """Return the hub id with the commit that its revision (default: the newest) stands for.

    Raises:
        DataError: there is no such data set, configuration or split, or it has several configurations and none is
            named.
    """
    id_, _, pinned = path.partition("@")
    if pinned and revision not in (None, pinned):
        raise RecipeError(f"{path}: found revision {revision!r} as well; expected one of the two. Remove the other.")
    wanted = pinned or revision
    if wanted and _COMMIT.fullmatch(wanted):
        found = _Hub(id_, wanted, config, split)
    else:
        hub = import_extra("huggingface_hub", extra="hub")
        try:
            found = _Hub(id_, hub.HfApi().dataset_info(id_, revision=wanted).sha, config, split)
        except (OSError, ValueError, hub.errors.HTTPError) as error:
            raise DataError(
                f"{path}: found no local path, and no data set on the hub ({str(error)[:300]}); expected either. "
                "Check the spelling and the network; a full commit (id@40 digits) needs no look-up."
            ) from error
    _check_hub_names(found)
    return found


def _check_hub_names(hub: _Hub) -> None:
    """Refuse a configuration or split that the data set does not have, and a missing one that it needs."""
    datasets = import_extra("datasets", extra="hub")
    with _hub_errors(hub, datasets=datasets):
        configs = datasets.get_dataset_config_names(hub.id, revision=hub.commit)
    if hub.config is None and len(configs) > 1 and "default" not in configs:
        raise DataError(
            f"{hub.name}: found several configurations, {_some(configs)}; expected the name of one. Add it to this "
            f"task, for instance `config: {_quoted(configs[0])}`."
        )
    if hub.config is not None and hub.config not in configs:
        raise DataError(f"{hub.name}: {_unknown('configuration', 'config', hub.config, known=configs)}")
    if hub.split is None:
        return
    with _hub_errors(hub, datasets=datasets):
        splits = datasets.get_dataset_split_names(hub.id, config_name=hub.config, revision=hub.commit)
    if hub.split not in splits:
        raise DataError(f"{hub.name}: {_unknown('split', 'split', hub.split, known=splits)}")


def _unknown(noun: str, key: str, given: str, *, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    remedy = f"Did you mean `{key}: {_quoted(near[0])}`?" if near else f"Name one of these as `{key}` of this task."
    return f"found no {noun} {given!r}; expected one of {_some(known)}. {remedy}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _quoted(name: str) -> str:
    """Return a name as YAML has it, which would read `3.0.0` as text and `2.0` as a number."""
    return name if re.fullmatch(r"[A-Za-z_][\w.-]*", name) else f'"{name}"'
