"""Numbers and records arrive piece by piece and lie in files of a scratch folder; what is asked for comes back.

Files are read, not mapped, so that what was looked at once takes no memory.
"""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from keeptune.data.ngrams import Indices
from keeptune.data.on_demand import OnDemand
from keeptune.data.record import Record, record_from_json, record_to_json
from keeptune.storage import storage_errors

_Number = TypeVar("_Number", bound=np.generic)
_PENDING_BYTES = 1 << 20
_ROWS_PER_BLOCK = 128


class DiskArray(Generic[_Number]):
    """Numbers of one type in a file, written from front to back.

    A file that stands there is replaced, unless it is `written` already and to be read.
    """

    def __init__(self, path: Path, dtype: type[_Number], *, written: bool = False) -> None:
        self._path = path
        self._dtype = np.dtype(dtype)
        self._pending = bytearray()
        self._written_bytes = 0
        if not written:
            self.remove()
            return
        with storage_errors(path):
            self._written_bytes = path.stat().st_size

    def append(self, values: NDArray[_Number] | bytes) -> None:
        """Put values behind those that stand there, given as an array or as its bytes."""
        self._pending += values if isinstance(values, bytes) else values.tobytes()
        if len(self._pending) >= _PENDING_BYTES:
            self._flush()

    def __len__(self) -> int:
        return (self._written_bytes + len(self._pending)) // self._dtype.itemsize

    def whole(self) -> NDArray[_Number]:
        """Read all values."""
        return self.ranges(np.zeros(1, np.int64), np.full(1, len(self), np.int64))

    def ranges(self, starts: Indices, lengths: Indices) -> NDArray[_Number]:
        """Read `lengths[i]` values from `starts[i]` on, range after range, into one array."""
        self._flush()
        values = np.empty(int(lengths.sum()), self._dtype)
        if not len(values):
            return values
        # Ranges that follow one another in the file are one read.
        first = np.flatnonzero(np.append(True, starts[1:] != starts[:-1] + lengths[:-1]))
        sizes = np.add.reduceat(lengths, first) * self._dtype.itemsize
        view, place = values.view(np.uint8).data, 0
        with storage_errors(self._path), self._path.open("rb", buffering=0) as file:
            for offset, size in zip((starts[first] * self._dtype.itemsize).tolist(), sizes.tolist(), strict=True):
                file.seek(offset)
                _read_into(file, view[place : place + size])
                place += size
        return values

    def remove(self) -> None:
        """Remove the file."""
        self._pending.clear()
        with storage_errors(self._path):
            self._path.unlink(missing_ok=True)

    def _flush(self) -> None:
        if self._pending:
            with storage_errors(self._path), self._path.open("ab") as file:
                file.write(self._pending)
            self._written_bytes += len(self._pending)
            self._pending.clear()


def _read_into(file: Any, view: memoryview) -> None:
    while len(view):
        count = file.readinto(view)
        if not count:
            raise OSError("the file ends early")
        view = view[count:]


class Records(OnDemand[Record]):
    """Records on the disk by number; one block of them stays in memory."""

    def __init__(self, file: RecordFile, rows: NDArray[np.integer]) -> None:
        self._file, self._rows = file, rows.astype(np.int32)
        self._number, self._block = -1, list[Record]()

    def __len__(self) -> int:
        return len(self._rows)

    def _entry(self, index: int) -> Record:
        number, place = divmod(index, _ROWS_PER_BLOCK)
        if number != self._number:
            start = number * _ROWS_PER_BLOCK
            self._block = self._file.read(self._rows[start : start + _ROWS_PER_BLOCK])
            self._number = number
        return self._block[place]

    def at(self, numbers: NDArray[np.integer] | NDArray[np.bool_]) -> Records:
        """Return the records of these numbers, or those marked as true."""
        return Records(self._file, self._rows[numbers])

    def lines(self) -> Iterator[bytes]:
        """Yield each record as its line of JSON."""
        for start in range(0, len(self), _ROWS_PER_BLOCK):
            yield from self._file.lines(self._rows[start : start + _ROWS_PER_BLOCK])


class RecordFile:
    """Records as lines of JSON, as `data/*.jsonl` holds them; with `written`, those of a file that stands there."""

    def __init__(self, path: Path, *, written: bool = False) -> None:
        self._path = path
        self._bytes = DiskArray(path, np.uint8, written=written)
        self._starts = array("q", [0])
        if written:
            with storage_errors(path), path.open("rb") as lines:
                self._starts.extend(itertools.accumulate(map(len, lines)))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def append(self, record: Record) -> int:
        """Write a record; return its row."""
        line = json.dumps(record_to_json(record), ensure_ascii=False) + "\n"
        self._bytes.append(line.encode("utf-8", "surrogatepass"))
        self._starts.append(len(self._bytes))
        return len(self) - 1

    def lines(self, rows: NDArray[np.integer]) -> list[bytes]:
        """Read the lines of the given rows."""
        starts = np.frombuffer(self._starts, np.int64)
        joined = self._bytes.ranges(starts[rows], starts[rows + 1] - starts[rows]).tobytes()
        return joined.splitlines(keepends=True)

    def read(self, rows: NDArray[np.integer]) -> list[Record]:
        """Read the records of the given rows."""
        texts = (line.decode("utf-8", "surrogatepass") for line in self.lines(rows))
        numbered = zip(texts, rows.tolist(), strict=True)
        return [record_from_json(json.loads(text), where=f"{self._path}:{row + 1}") for text, row in numbered]


class Texts(OnDemand[str]):
    """One text of each of some records, as they are read."""

    def __init__(self, records: Sequence[Record], part: Callable[[Record], str]) -> None:
        self._records, self._part = records, part

    def __len__(self) -> int:
        return len(self._records)

    def _entry(self, index: int) -> str:
        return self._part(self._records[index])


def chosen(records: Sequence[Record], numbers: NDArray[np.integer]) -> list[Record]:
    """Return the records of these numbers, read together where they lie on the disk."""
    rows = records.at(numbers) if isinstance(records, Records) else (records[int(i)] for i in numbers)
    return list(rows)
