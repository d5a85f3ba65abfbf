"""Tokenised records arrive and lie in memory, or on disk as one memory-mapped Arrow file; examples leave by index."""

from __future__ import annotations

import dataclasses
import hashlib
import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from keeptune.data.on_demand import OnDemand
from keeptune.errors import StorageError
from keeptune.storage import read_json, staged_folder, storage_errors, verify_folder, write_json
from keeptune.text.tokens import Example, Tokenized

_Part = TypeVar("_Part")
_EXAMPLES = "examples.arrow"
_COUNTS = "counts.json"
_ROWS_PER_CHUNK = 1000
_LISTED = 20
# The kernel maps 16 pages about each one that is touched: at most a few MiB stay mapped.
_READS_PER_GIVING_BACK = 64
_PARTS_PER_GIVING_BACK = 8
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.binary()),
        ("num_targets", pa.int32()),
        ("prompt_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
    ]
)


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """What became of the records of a split; `num_records = num_examples + num_dropped`.

    `num_tokens` and `num_targets` count what is kept. `dropped_origins` are the first twenty.
    """

    num_records: int
    num_examples: int
    num_dropped: int
    num_truncated: int
    num_completions_cut: int
    num_tokens: int
    num_targets: int
    dropped_origins: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """Examples in memory, as the training loop and evaluation read them; what is counted of them is counted once."""

    examples: Sequence[Example]
    record_ids: Sequence[str]
    lengths: NDArray[np.int64]
    num_targets: NDArray[np.int64]

    @classmethod
    def of(cls, examples: Sequence[Example], *, record_ids: Sequence[str]) -> Table:
        """Return the table of examples, each with its record's id."""
        lengths = np.array([len(example.input_ids) for example in examples], dtype=np.int64)
        num_targets = np.array([int(example.loss_mask.sum()) for example in examples], dtype=np.int64)
        return cls(examples, record_ids, lengths, num_targets)

    def sha256(self) -> str:
        """Return the hash of every token, and of which are targets."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(example.input_ids.tobytes() + example.loss_mask.tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int, /) -> Example:
        return self.examples[index]


class TokenTable:
    """The examples of a split, in a mapped file; pages that were looked at are given back now and then."""

    counts: TokenCounts
    record_ids: Sequence[str]

    def __init__(self, mapped: mmap.mmap, *, counts: TokenCounts) -> None:
        self.counts = counts
        self._mapped, self._num_reads = mapped, 0
        reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(mapped)))
        batches = self._giving_back(map(reader.get_batch, range(reader.num_record_batches)))
        self._table = pa.Table.from_batches(batches, _SCHEMA)
        self.record_ids = _Ids(self._table["id"])
        self._chunks = [_Chunk.of(batch) for batch in self._table.to_batches()]
        sizes = [len(chunk.offsets) - 1 for chunk in self._chunks]
        self._first_rows = np.cumsum([0, *sizes])
        self._lengths: NDArray[np.int64] | None = None
        self._num_targets: NDArray[np.int64] | None = None

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, of both sides together where there is an encoder."""
        if self._lengths is None:
            self._lengths = self._joined(np.diff(chunk.offsets) for chunk in self._chunks)
        return self._lengths

    @property
    def num_targets(self) -> NDArray[np.int64]:
        """Tokens of each example that carry loss."""
        if self._num_targets is None:
            self._num_targets = self._numbers("num_targets")
        return self._num_targets

    @property
    def prompt_lengths(self) -> NDArray[np.int64]:
        """Tokens of each prompt, before any cut."""
        return self._numbers("prompt_tokens")

    @property
    def completion_lengths(self) -> NDArray[np.int64]:
        """Tokens of each last completion, end token included, before any cut."""
        return self._numbers("completion_tokens")

    @classmethod
    def write(cls, path: Path, tokenized: Iterable[Tokenized]) -> TokenTable:
        """Write the folder `path`, whole or not at all, and return its table; dropped records are counted.

        Raises:
            StorageError: the disk refuses.
        """
        tally = _Tally()
        with staged_folder(path, facts={"kind": "tokens"}) as staging:
            with (
                storage_errors(staging),
                pa.OSFile(str(staging / _EXAMPLES), "wb") as sink,
                pa.ipc.new_file(sink, _SCHEMA) as writer,
            ):
                for rows in _chunked(map(_Row.of, tally.counted(tokenized))):
                    writer.write_batch(_record_batch(rows))
            write_json(staging / _COUNTS, dataclasses.asdict(tally.counts()))
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> TokenTable:
        """Return the table in the folder `path`, after checking every byte against its manifest.

        Raises:
            StorageError: the folder is missing, or its files are not those that were written.
        """
        if verify_folder(path) is None:
            raise StorageError(
                f"{path}: found tokens that differ from their manifest, or none; expected them as keeptune wrote them. "
                "Remove that folder and give the same command again."
            )
        counts = read_json(path / _COUNTS)
        with storage_errors(path), (path / _EXAMPLES).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return cls(mapped, counts=TokenCounts(**{**counts, "dropped_origins": tuple(counts["dropped_origins"])}))

    @property
    def largest_id(self) -> int:
        """The largest token id, -1 where there is none; reads the whole table."""
        largest = -1
        for chunk in self._chunks:
            largest = max(largest, int(chunk.input_ids.max(initial=-1)))
            self._give_back()
        return largest

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        self._num_reads += 1
        if self._num_reads % _READS_PER_GIVING_BACK == 0:
            self._give_back()
        number = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        return self._chunks[number].example(index - int(self._first_rows[number]))

    def _numbers(self, name: str) -> NDArray[np.int64]:
        return self._joined(chunk.to_numpy() for chunk in self._table[name].chunks)

    def _joined(self, parts: Iterable[NDArray[np.int32]]) -> NDArray[np.int64]:
        return np.concatenate([np.zeros(0, np.int64), *self._giving_back(part.astype(np.int64) for part in parts)])

    def _giving_back(self, parts: Iterable[_Part]) -> Iterator[_Part]:
        """Yield the parts as they are read, and let go of the file's pages now and then."""
        for number, part in enumerate(parts):
            yield part
            if number % _PARTS_PER_GIVING_BACK == 0:
                self._give_back()
        self._give_back()

    def _give_back(self) -> None:
        """Let go of the file's pages; those of examples in use are mapped again when they are looked at."""
        self._mapped.madvise(mmap.MADV_DONTNEED)


class _Ids(OnDemand[str]):
    """The column of ids, read as they are asked for."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def _entry(self, index: int) -> str:
        return self._column[index].as_py()

    def __iter__(self) -> Iterator[str]:
        for chunk in self._column.chunks:
            yield from chunk.to_pylist()


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One record batch as views of the mapped file."""

    offsets: NDArray[np.int32]
    input_ids: NDArray[np.int32]
    loss_masks: pa.BinaryArray

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> _Chunk:
        ids: Any = batch.column("input_ids")
        masks: Any = batch.column("loss_mask")
        return cls(ids.offsets.to_numpy(), input_ids=ids.values.to_numpy(), loss_masks=masks)

    def example(self, row: int) -> Example:
        start, end = int(self.offsets[row]), int(self.offsets[row + 1])
        bits = np.frombuffer(self.loss_masks[row].as_buffer(), dtype=np.uint8)
        return Example(self.input_ids[start:end], loss_mask=np.unpackbits(bits, count=end - start).astype(np.bool_))


@dataclass(frozen=True, slots=True)
class _Row:
    """What the file holds of an example; its record's text is let go."""

    id: str
    input_ids: NDArray[np.int32]
    loss_mask: bytes
    num_targets: int
    prompt_tokens: int
    completion_tokens: int

    @classmethod
    def of(cls, item: Tokenized) -> _Row:
        example = item.example
        assert example is not None
        mask, num_targets = np.packbits(example.loss_mask).tobytes(), int(example.loss_mask.sum())
        return cls(item.record.id, example.input_ids, mask, num_targets, item.prompt_tokens, item.completion_tokens)


class _Tally:
    """Counts what passes."""

    def __init__(self) -> None:
        self._num_records = self._num_truncated = self._num_completions_cut = 0
        self._num_tokens = self._num_targets = self._num_dropped = 0
        self._dropped: list[str] = []

    def counted(self, tokenized: Iterable[Tokenized]) -> Iterator[Tokenized]:
        for item in tokenized:
            self._num_records += 1
            self._num_truncated += item.truncated
            self._num_completions_cut += item.completion_cut
            if item.example is None:
                self._num_dropped += 1
                self._dropped += [item.record.origin] if len(self._dropped) < _LISTED else []
                continue
            self._num_tokens += len(item.example.input_ids)
            self._num_targets += int(item.example.loss_mask.sum())
            yield item

    def counts(self) -> TokenCounts:
        return TokenCounts(
            num_records=self._num_records,
            num_examples=self._num_records - self._num_dropped,
            num_dropped=self._num_dropped,
            num_truncated=self._num_truncated,
            num_completions_cut=self._num_completions_cut,
            num_tokens=self._num_tokens,
            num_targets=self._num_targets,
            dropped_origins=tuple(self._dropped),
        )


def _chunked(items: Iterator[_Row]) -> Iterator[list[_Row]]:
    while chunk := list(islice(items, _ROWS_PER_CHUNK)):
        yield chunk


def _record_batch(rows: Sequence[_Row]) -> pa.RecordBatch:
    offsets = np.cumsum([0, *(len(row.input_ids) for row in rows)], dtype=np.int32)
    values = np.concatenate([row.input_ids for row in rows])
    columns = [
        pa.array([row.id for row in rows], pa.string()),
        pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, pa.int32())),
        pa.array([row.loss_mask for row in rows], pa.binary()),
        pa.array([row.num_targets for row in rows], pa.int32()),
        pa.array([row.prompt_tokens for row in rows], pa.int32()),
        pa.array([row.completion_tokens for row in rows], pa.int32()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)
