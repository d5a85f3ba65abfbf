"""What lies on the disk comes back as it was, in any order, and a file that is only read stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keeptune.data.disk import DiskArray, RecordFile, Records, Texts, chosen
from keeptune.data.record import Message, Record
from keeptune.errors import DataError, StorageError


def record(i: int) -> Record:
    text = f"{i} line\nnext \u2028 \x85 \ud800 {{}}" * (i % 3 + 1)
    return Record(f"{i:016x}", "task", f"a:{i}", (Message("user", text, "input"), Message("assistant", f"c{i}")))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 99), max_size=30),
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=10),
)
def test_ranges_of_a_file_are_those_of_the_array(
    tmp_path_factory: pytest.TempPathFactory, values: list[int], ranges: list[tuple[int, int]]
) -> None:
    array = np.array(values, np.uint32)
    stored = DiskArray(tmp_path_factory.mktemp("disk") / "numbers", np.uint32)
    stored.append(array[:10])
    stored.append(array[10:].tobytes())
    bounds = [(start, max(0, min(length, len(array) - start))) for start, length in ranges if start <= len(array)]
    starts, lengths = np.array(bounds, np.int64).reshape(-1, 2).T
    expected = np.concatenate([array[:0], *(array[start : start + length] for start, length in bounds)])
    assert stored.ranges(starts, lengths).tolist() == expected.tolist()
    assert stored.whole().tolist() == values and len(stored) == len(values)


def test_a_new_array_replaces_an_old_file_and_a_written_one_is_kept(tmp_path: Path) -> None:
    DiskArray(tmp_path / "numbers", np.int32).append(np.arange(5, dtype=np.int32))
    (tmp_path / "numbers").write_bytes(np.arange(3, dtype=np.int32).tobytes())
    assert DiskArray(tmp_path / "numbers", np.int32, written=True).whole().tolist() == [0, 1, 2]
    assert len(DiskArray(tmp_path / "numbers", np.int32)) == 0
    assert not (tmp_path / "numbers").exists()
    (tmp_path / "none.jsonl").touch()
    assert len(RecordFile(tmp_path / "none.jsonl", written=True)) == 0
    assert (tmp_path / "none.jsonl").exists()


def test_a_file_that_ends_early_or_is_missing_is_told_by_its_path(tmp_path: Path) -> None:
    stored = DiskArray(tmp_path / "numbers", np.int64)
    stored.append(np.arange(4))
    stored.whole()
    (tmp_path / "numbers").write_bytes(b"12345678")
    with pytest.raises(StorageError, match="numbers: the file ends early; expected a place to read and write"):
        stored.whole()
    with pytest.raises(StorageError, match=r"gone\.jsonl: no such file or folder"):
        RecordFile(tmp_path / "gone.jsonl", written=True)


def test_records_come_back_in_any_order(tmp_path: Path) -> None:
    originals = [record(i) for i in range(300)]
    file = RecordFile(tmp_path / "records.jsonl")
    assert [file.append(original) for original in originals] == list(range(300))
    records = Records(file, np.arange(300))
    assert list(records) == originals
    assert [records[i] for i in (299, 0, 128, 127)] == [originals[i] for i in (299, 0, 128, 127)]
    assert records[-1] == originals[-1] and records[5:8] == originals[5:8]
    odd = records.at(np.arange(1, 300, 2)).at(np.arange(150) < 3)
    assert list(odd) == [originals[i] for i in (1, 3, 5)] and len(odd) == 3
    assert chosen(records, np.array([7, 3])) == chosen(originals, np.array([7, 3])) == [originals[7], originals[3]]
    texts = Texts(records, lambda one: one.completion)
    assert (texts[4], texts[1:3], len(texts)) == ("c4", ["c1", "c2"], 300)
    with pytest.raises(IndexError):
        records[300]
    # The lines are those of data/*.jsonl, and a file of them can be opened again.
    (tmp_path / "copy.jsonl").write_bytes(b"".join(odd.lines()))
    copy = RecordFile(tmp_path / "copy.jsonl", written=True)
    assert list(Records(copy, np.arange(len(copy)))) == list(odd)


def test_a_line_that_is_no_record_is_told_by_its_place(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"id": "0"}\n', encoding="utf-8")
    file = RecordFile(tmp_path / "train.jsonl", written=True)
    with pytest.raises(DataError, match=r"train\.jsonl:1: found a line without 'messages'; expected a record written"):
        file.read(np.array([0]))
