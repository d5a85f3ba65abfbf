from __future__ import annotations

import fcntl
import json
import math
import os
import threading
from pathlib import Path

import pytest

from keeptune.errors import DataError, StorageError
from keeptune.retention.ledger import confidence_left, record_opening

ONE, OTHER = "a" * 64, "b" * 64


def opened(path: Path, certify_sha256: str = ONE, **suites: str) -> int:
    return record_opening(
        path,
        certify_sha256=certify_sha256,
        suites_sha256=suites,
        candidates=["full", "lora"],
        when="2024-06-01T12:00:00Z",
        command="run x",
    )


def test_openings_are_counted_by_the_content_of_what_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "certify_openings.jsonl"
    assert [opened(path), opened(path), opened(path, OTHER), opened(path), opened(path, OTHER)] == [1, 2, 1, 3, 2]


def test_a_suite_that_was_opened_is_not_unseen_beside_further_ones(tmp_path: Path) -> None:
    path = tmp_path / "certify_openings.jsonl"
    assert opened(path, "a", boolq="1") == 1
    assert opened(path, "b", boolq="1", wiki="2") == 2
    assert opened(path, "c", arc="3") == 1
    assert opened(path, "d", wiki="2", arc="3") == 3
    assert opened(path, "a", boolq="1") == 3
    assert opened(path, "e", squad="4") == 1


def test_a_suite_with_some_records_more_was_opened_before(tmp_path: Path) -> None:
    path = tmp_path / "certify_openings.jsonl"
    assert [opened(path, "a", boolq="1"), opened(path, "b", boolq="2"), opened(path, "c", squad="2")] == [1, 2, 3]


def test_a_ledger_of_before_suites_were_named_counts_on(tmp_path: Path) -> None:
    path = tmp_path / "certify_openings.jsonl"
    line = {"opening": 1, "opened": "", "command": "", "candidates": [], "certify_sha256": ONE}
    path.write_text(json.dumps(line) + "\n", encoding="utf-8")
    assert opened(path, wiki=OTHER) == 2


def test_a_run_waits_while_another_writes_its_opening(tmp_path: Path) -> None:
    path = tmp_path / "certify_openings.jsonl"
    assert opened(path) == 1
    numbers: list[int] = []
    waiting = threading.Thread(target=lambda: numbers.append(opened(path)))
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        waiting.start()
        waiting.join(timeout=0.1)
        assert numbers == []
        file.write(path.read_bytes().replace(b'"opening": 1', b'"opening": 2'))
    waiting.join()
    assert numbers == [3]


def test_a_line_says_who_opened_what_and_when(tmp_path: Path) -> None:
    path = tmp_path / "certify_openings.jsonl"
    record_opening(
        path,
        certify_sha256=ONE,
        suites_sha256={"self": OTHER},
        candidates=("lora",),
        when="now",
        command="keeptune run \udcff\n",
    )
    (line,) = path.read_text(encoding="utf-8", errors="surrogatepass").splitlines()
    assert json.loads(line) == {
        "opening": 1,
        "opened": "now",
        "command": "keeptune run \udcff\n",
        "candidates": ["lora"],
        "certify_sha256": ONE,
        "suites_sha256": {"self": OTHER},
    }


def test_an_opening_is_on_the_disk_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "certify_openings.jsonl"
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(path.read_bytes()))
    opened(path)
    assert synced == [path.read_bytes()]


def test_openings_together_spend_no_more_than_delta() -> None:
    spent = [confidence_left(0.05, opening=i) for i in range(1, 60)]
    assert spent[:3] == [0.025, 0.0125, 0.00625]
    assert math.fsum(spent) <= 0.05


@pytest.mark.parametrize(
    ("damage", "number"),
    [
        (lambda lines: [lines[0], lines[1][:-1]], 2),
        (lambda lines: [lines[0], lines[1][:20]], 2),
        (lambda lines: [b"\n", *lines], 1),
        (lambda lines: lines[1:], 1),
        (lambda lines: [lines[0], lines[0]], 2),
        (lambda lines: [b"[1]\n", *lines], 1),
        (lambda lines: [b"{}\n", *lines], 1),
        (lambda lines: [b"\xff\xfe\n", *lines], 1),
        (lambda lines: [lines[0], lines[1].replace(ONE.encode(), OTHER.encode())], 2),
        (lambda lines: [lines[0].replace(b'"' + ONE.encode() + b'"', b"[]")], 1),
        (lambda lines: [lines[0].replace(b'"suites_sha256": {}', b'"suites_sha256": 3')], 1),
    ],
)
def test_a_damaged_ledger_is_refused_and_never_counted_anew(damage, number: int, tmp_path: Path) -> None:
    path = tmp_path / "certify_openings.jsonl"
    assert [opened(path), opened(path)] == [1, 2]
    damaged = b"".join(damage(path.read_bytes().splitlines(keepends=True)))
    path.write_bytes(damaged)
    for certify_sha256 in (ONE, OTHER):
        with pytest.raises(DataError) as error:
            opened(path, certify_sha256)
        assert str(error.value).startswith(f"{path}:{number}: found no whole line about the next opening (")
        assert str(error.value).endswith(
            "; expected every opening of the certify records as it was written. Put the file back from a copy, or "
            "certify on new records."
        )
    assert path.read_bytes() == damaged


def test_a_ledger_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as error:
        opened(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: a folder stands where a file is expected; expected a place to read and write. Remedy: move that "
        "folder, or choose another output_dir."
    )
