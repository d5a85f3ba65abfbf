"""General text in, documents by part out: nothing that train holds, nothing twice, nothing on both sides."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from keeptune.data.documents import place_documents, read_documents
from keeptune.data.record import Message, PartName, Record
from keeptune.data.split import part_name
from keeptune.errors import DataError

SHARES: dict[PartName, float] = {"probe": 0.2, "certify": 0.4}


def story(i: int, num_words: int = 30) -> str:
    return " ".join(f"s{i}w{k}" for k in range(num_words))


def source(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def train_record(prompt: str, completion: str = "yes") -> Record:
    return Record("t", "task", "train:1", (Message("user", prompt), Message("assistant", completion)))


def placed(documents: list[Record], train: list[Record]) -> dict[str, str]:
    found = place_documents(documents, train=train, seed=0, shares=SHARES, dropped=Counter(), num_read=len(documents))
    assert found.num_read == sum(map(len, found.parts.values())) + sum(found.dropped.values())
    return {record.completion: part for part, records in found.parts.items() for record in records}


def test_every_document_is_kept_or_dropped_with_its_reason(tmp_path: Path) -> None:
    path = source(tmp_path / "wiki.jsonl", [story(0), story(1), story(0), " \n", *(story(i) for i in range(2, 6))])
    kept, dropped, num_read = read_documents(path, suite="wiki", max_records=4)
    assert (len(kept), dropped, num_read) == (4, Counter(exact_duplicate=1, empty=1, max_records=2), 8)
    assert {record.task for record in kept} == {"wiki"} and all(record.prompt == "" for record in kept)


def test_which_documents_are_kept_does_not_depend_on_their_order(tmp_path: Path) -> None:
    texts = [story(i) for i in range(20)]
    one, _, _ = read_documents(source(tmp_path / "a.jsonl", texts), suite="wiki", max_records=5)
    two, _, _ = read_documents(source(tmp_path / "b.jsonl", texts[::-1]), suite="wiki", max_records=5)
    assert [record.id for record in one] == [record.id for record in two]


def test_documents_of_a_text_file_stand_apart_by_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("One.\nStill one.\n\n \nTwo.\r\n", encoding="utf-8")
    kept, _, num_read = read_documents(str(path), suite="book", max_records=9)
    assert num_read == 2
    assert {(record.completion, record.origin) for record in kept} == {
        ("One.\nStill one.", f"{path}:1"),
        ("Two.", f"{path}:5"),
    }


def test_a_row_without_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"body": "x"}\n{"text": 3}\n', encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_documents(str(path), suite="a", max_records=9)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path}:2: found the columns body; expected text in the column 'text'. Fix or rename it."
    assert lines[1].startswith(f"{path}:3: found a number; expected text in the column 'text'.")


def test_a_source_without_text_or_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"found no text in 1 documents; expected at least one\. Name another source\."):
        read_documents(source(tmp_path / "a.jsonl", ["  "]), suite="a", max_records=9)
    with pytest.raises(DataError, match=r"b\.txt: found no such file; expected a text file\. Check the path\."):
        read_documents(str(tmp_path / "b.txt"), suite="b", max_records=9)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match=r"a\.txt:1: found bytes that are not UTF-8"):
        read_documents(str(path), suite="a", max_records=9)


def test_documents_that_train_holds_are_removed_all_of_them(tmp_path: Path) -> None:
    texts = [story(i) for i in range(6)]
    documents, _, _ = read_documents(source(tmp_path / "a.jsonl", texts), suite="a", max_records=9)
    both = train_record(f"Read: {texts[0]} {texts[1]}")
    answer = train_record("Tell me.", completion=texts[2])
    found = place_documents(
        documents, train=[both, answer], seed=0, shares=SHARES, dropped=Counter(empty=1), num_read=7
    )
    assert found.dropped == {"empty": 1, "leak": 3}
    assert {r.completion for records in found.parts.values() for r in records} == set(texts[3:])


def test_near_duplicates_share_a_part_and_no_document_moves_when_others_come(tmp_path: Path) -> None:
    texts = [story(i) for i in range(60)]
    twins = [f"{text} and more" for text in texts]
    documents, _, _ = read_documents(source(tmp_path / "a.jsonl", texts), suite="a", max_records=999)
    more, _, _ = read_documents(source(tmp_path / "b.jsonl", [*texts, *twins]), suite="a", max_records=999)
    alone, together = placed(documents, []), placed(more, [])
    assert set(alone.values()) == {"probe", "certify", "test"}
    assert all(together[text] == together[twin] for text, twin in zip(texts, twins, strict=True))
    apart, _, _ = read_documents(
        source(tmp_path / "c.jsonl", [story(i) for i in range(100)]), suite="a", max_records=999
    )
    assert {text: part for text, part in placed(apart, []).items() if text in alone} == alone


def test_parts_hold_their_shares_of_the_groups() -> None:
    counts = Counter(part_name(f"g{i}", seed=3, shares=SHARES) for i in range(20_000))
    # Three standard deviations of a share of 20,000 draws are 0.011 at most.
    assert abs(counts["probe"] / 20_000 - 0.2) < 0.011
    assert abs(counts["certify"] / 20_000 - 0.4) < 0.011
    assert part_name("g", seed=0, shares={}) is None
