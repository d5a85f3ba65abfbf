"""Lines that are only added: what was changed or removed is noticed, and what a crash left half-written is not."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from keeptune.chain import Head, open_chain, read_chain
from keeptune.errors import StorageError


def added(path: Path, *names: str, heads: tuple[Head, ...] = (), said: list[str] | None = None) -> Head:
    with open_chain(path, heads=heads, say=(said if said is not None else []).append) as chain:
        for name in names:
            chain.add({"name": name})
        return chain.head


def names(path: Path, *heads: Head) -> list[str]:
    return [line["name"] for line in read_chain(path, heads=heads)]


def test_lines_come_back_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert names(path) == []
    first = added(path, "one", "two")
    second = added(path, "drei \u2028 \udcff", heads=(first,))
    assert names(path, first, second) == ["one", "two", "drei \u2028 \udcff"]
    assert (first.num_lines, second.num_lines) == (2, 3)


def test_a_line_is_on_the_disk_before_add_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda _descriptor: synced.append(path.read_bytes()))
    added(path, "one")
    assert synced == [path.read_bytes()]


def flipped(content: bytes) -> bytes:
    place = content.index(b"two")
    return content[:place] + b"t7o" + content[place + 3 :]


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda content: b"", "0 of the 3 lines that manifest.json knows of"),
        (lambda content: content[: content.index(b'{"name": "three')], "2 of the 3 lines that manifest.json knows of"),
        (lambda content: content[:-20], "2 of the 3 lines that manifest.json knows of"),
        (lambda content: content[content.index(b"\n") + 1 :], "a line that does not follow the one before it"),
        (lambda content: content.replace(b"three", b"seven"), "another line than manifest.json knows of"),
        (flipped, "a line that does not follow the one before it"),
        (lambda content: b"\n" + content, "a line that does not follow the one before it"),
        (lambda content: b"[1]\n" + content, "a line that does not follow the one before it"),
        (lambda content: b"\xff\xfe\n" + content, "a line that does not follow the one before it"),
        (lambda content: b"[" * 100_000 + b"\n" + content, "a line that does not follow the one before it"),
    ],
)
def test_changed_and_removed_lines_are_refused(tmp_path: Path, damage: Callable[[bytes], bytes], found: str) -> None:
    path = tmp_path / "a.jsonl"
    head = added(path, "one", "two", "three")
    known = Head(head.num_lines, head.sha256, "manifest.json")
    path.write_bytes(damage(path.read_bytes()))
    for look in (lambda: added(path, "four", heads=(known,)), lambda: read_chain(path, heads=(known,))):
        with pytest.raises(StorageError) as error:
            look()
        assert str(error.value).endswith(
            f": found {found}; expected every line as keeptune wrote it. Put the file back from a copy, or choose "
            "another output_dir: what was opened before cannot be counted any more."
        )


def test_a_file_that_is_gone_is_refused_where_lines_of_it_are_known(tmp_path: Path) -> None:
    head = added(tmp_path / "a.jsonl", "one")
    with pytest.raises(StorageError, match="found 0 of the 1 lines"):
        read_chain(tmp_path / "b.jsonl", heads=(head,))


@pytest.mark.parametrize("torn", [b'{"name": "fo', b"\0" * 40, b'{"name": "f\xc3'])
def test_a_line_that_a_crash_tore_is_removed_and_said(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "a.jsonl"
    head = added(path, "one", "two")
    with path.open("ab") as file:
        file.write(torn)
    assert names(path, head) == ["one", "two"]
    said: list[str] = []
    added(path, "three", heads=(head,), said=said)
    assert said == [f"{path}: the last line was cut off while it was written; it is removed"]
    assert names(path, head) == ["one", "two", "three"]


def test_a_whole_line_that_lacks_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    head = added(path, "one", "two")
    path.write_bytes(path.read_bytes()[:-1])
    added(path, "three", heads=(head,))
    assert names(path, head) == ["one", "two", "three"]


def test_a_process_waits_while_another_adds_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    added(path, "one")
    waiting = threading.Thread(target=lambda: added(path, "two"))
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        waiting.start()
        waiting.join(timeout=0.1)
        assert names(path) == ["one"]
    waiting.join()
    assert names(path) == ["one", "two"]


def test_each_line_names_the_hash_of_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    head = added(path, "one")
    added(path, "two")
    first, second = map(json.loads, path.read_text().splitlines())
    assert first["previous_sha256"] == ""
    assert second["previous_sha256"] == head.sha256


def test_a_chain_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="a folder stands where a file is expected"):
        added(tmp_path, "one")
