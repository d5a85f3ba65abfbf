"""Read Parquet and Arrow tables row by row; class labels stored as numbers are given their names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from keeptune.data.lines import MAX_ROW_BYTES, Found, Problem, reading, refuse_blown_up
from keeptune.errors import DataError

_BATCH_ROWS = 64
_INFO = "dataset_info.json"
_MAX_INFO_BYTES = 1 << 24
# Names of the classes of a column, by the column.
ClassNames = Mapping[str, Sequence[str]]


def parquet_rows(path: Path, *, shown: str) -> Iterator[Found]:
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
            names = _names_in_schema(table.schema_arrow)
            for batch in table.iter_batches(batch_size=_BATCH_ROWS):
                num_bytes += batch.nbytes
                refuse_blown_up(num_bytes, file_bytes=file_bytes, shown=shown)
                yield from _batch_rows(batch, names, start=num_rows, shown=shown)
                num_rows += batch.num_rows
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(
            f"{shown}: found a broken Parquet file ({str(error)[:200]}); expected a whole one. Write or copy it again."
        ) from error


def arrow_rows(path: Path, *, shown: str) -> Iterator[Found]:
    """Yield (origin, row) for each row of an Arrow file, as `datasets` writes it with `save_to_disk`."""
    import pyarrow
    import pyarrow.ipc

    with reading(shown):
        raw = path.open("rb")
    num_rows = 0
    try:
        with raw, pyarrow.ipc.open_stream(raw) as batches:
            names = _names_in_schema(batches.schema)
            for part in _small(batches):
                yield from _batch_rows(part, names, start=num_rows, shown=shown)
                num_rows += part.num_rows
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(
            f"{shown}: found no whole Arrow stream ({str(error)[:200]}); expected a file that `save_to_disk` of "
            "datasets wrote. Write it again, or as Parquet."
        ) from error


def _small(batches: Any) -> Iterator[Any]:
    """Yield the batches in pieces of few rows."""
    for batch in batches:
        yield from (batch.slice(start, _BATCH_ROWS) for start in range(0, batch.num_rows, _BATCH_ROWS))


def _batch_rows(batch: Any, names: ClassNames, *, start: int, shown: str) -> Iterator[Found]:
    for i, value in enumerate(batch.to_pylist()):
        origin = f"{shown}[{start + i}]"
        if batch.nbytes > MAX_ROW_BYTES and batch.slice(i, 1).nbytes > MAX_ROW_BYTES:
            yield Problem(f"{origin}: found a row of more than 1 MiB; expected at most that. Shorten the row.", origin)
        else:
            yield origin, with_class_names(value, names)


def with_class_names(row: dict[str, Any], names: ClassNames) -> dict[str, Any]:
    """Return the row with the name of its class in the place of each number; -1, no class, becomes null."""
    found = {column: _name(row[column], names[column]) for column in names if column in row}
    return {**row, **found} if found else row


def _name(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None if value == -1 else value


def names_beside(path: Path) -> ClassNames:
    """Return the class names that a `dataset_info.json` beside a file tells; none where there is no such file."""
    info = path.with_name(_INFO)
    try:
        if info.stat().st_size > _MAX_INFO_BYTES:
            return {}
        content = json.loads(info.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return _names_in(content.get("features")) if isinstance(content, dict) else {}


def names_of(features: Any) -> ClassNames:
    """Return the class names of a hub data set's features."""
    found = {column: getattr(feature, "names", None) for column, feature in dict(features or {}).items()}
    return {column: names for column, names in found.items() if isinstance(names, list | tuple)}


def _names_in_schema(schema: Any) -> ClassNames:
    """Return the class names that `datasets` writes into the metadata of a schema."""
    try:
        content = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return _names_in(content["info"]["features"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def _names_in(features: Any) -> ClassNames:
    if not isinstance(features, dict):
        return {}
    found = {c: f.get("names") for c, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"}
    return {
        c: names for c, names in found.items() if isinstance(names, list) and all(isinstance(n, str) for n in names)
    }
