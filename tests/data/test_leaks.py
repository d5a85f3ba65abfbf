"""Overlaps of train with held-out records: what many records share is no leak, copies are, and the user is told."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from keeptune.data.prepare import Prepared, TaskSource, prepare_records
from keeptune.data.record import SPLIT_NAMES
from keeptune.progress import Silent
from tests.data.tickets import body, tickets, wrapped


def written(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prepared(*sources: TaskSource, leaks: Any = "auto", folder: Path, held_out: float = 0.1) -> Prepared:
    return prepare_records(
        sources,
        seed=0,
        validation_fraction=held_out,
        test_fraction=held_out,
        drop_incomplete=False,
        duplicates="drop",
        leaks=leaks,
        progress=Silent(),
        scratch=folder,
    )


def stories(number: int, *, first: int = 0) -> list[dict[str, str]]:
    """Return rows that share nothing."""
    return [
        {"prompt": " ".join(f"s{i}w{k}" for k in range(20)), "completion": "yes"} for i in range(first, first + number)
    ]


def splits(result: Prepared) -> dict[int, str]:
    """Return the split of each record by the line that it stands in."""
    return {int(r.origin.rpartition(":")[2]): split for split in SPLIT_NAMES for r in result.records[split]}


@pytest.mark.parametrize("number", [100, 400])
def test_greetings_signatures_and_disclaimers_are_no_leaks(number: int, tmp_path: Path) -> None:
    audit = prepared(TaskSource("t", written(tmp_path / "t.jsonl", tickets(number))), folder=tmp_path).audit
    assert audit.dropped == {}
    assert audit.groups.num_groups == number


def test_the_same_subject_between_other_wordings_is_a_leak(tmp_path: Path) -> None:
    """Beside 300 tickets stand 60 more about the subjects of the first 60, each in other wording."""
    r = random.Random(0)
    subjects = [body(r) for _ in range(300)]
    rows = [{"prompt": wrapped(subject, r), "completion": "Bug"} for subject in [*subjects, *subjects[:60]]]
    found = splits(prepared(TaskSource("t", written(tmp_path / "t.jsonl", rows)), folder=tmp_path))
    ends = [{found.get(i), found.get(300 + i)} for i in range(1, 61)]
    assert {"train", "test"} not in ends and {"train", "validation"} not in ends
    assert sum(None in pair for pair in ends) > 10


@pytest.mark.parametrize("num_templates", [6, 18])
def test_one_input_under_many_templates_is_a_leak_though_many_records_share_it(
    num_templates: int, tmp_path: Path
) -> None:
    """Each input of ten words stands under all templates, as in P3: as common as a signature, and all that differs."""
    inputs = [" ".join(f"input{i}x{k}" for k in range(10)) for i in range(40)]
    heads, tails = ([" ".join(f"{part}{t}x{k}" for k in range(n)) for t in range(num_templates)]
                    for part, n in (("head", 12), ("tail", 6)))  # fmt: skip
    rows = [{"prompt": f"{h} {x} {t}", "completion": "y"} for x in inputs for h, t in zip(heads, tails, strict=True)]
    found = splits(prepared(TaskSource("t", written(tmp_path / "t.jsonl", rows)), folder=tmp_path))
    for i in range(40):
        where = {found.get(i * num_templates + k + 1) for k in range(num_templates)}
        assert "train" not in where or not where & {"validation", "test"}


@pytest.mark.parametrize("num_copies", [1, 2, 5])
def test_a_held_out_record_that_stands_whole_in_train_is_found_however_often(num_copies: int, tmp_path: Path) -> None:
    text = " ".join(f"word{i}" for i in range(40))
    others = [{"prompt": " ".join(f"other{i}x{k}" for k in range(40)), "completion": "a"} for i in range(30)]
    copies = [
        {"prompt": f"{' '.join(f'own{i}x{k}' for k in range(30))} {text}", "completion": "b"} for i in range(num_copies)
    ]
    path = written(tmp_path / "t.jsonl", [*others, *copies])
    test = written(tmp_path / "test.jsonl", [{"prompt": text, "completion": "c"}])
    audit = prepared(TaskSource("t", path, test=test), leaks="drop", folder=tmp_path, held_out=0.0).audit
    assert audit.leaks["ngram_cover"].num_removed == num_copies


def test_train_files_with_own_test_files_are_not_thinned_and_the_user_is_told(tmp_path: Path) -> None:
    rows = stories(40)
    path, test = written(tmp_path / "t.jsonl", rows), written(tmp_path / "test.jsonl", rows[:10])
    validation = written(tmp_path / "validation.jsonl", stories(5, first=900))
    source = TaskSource("t", path, validation=validation, test=test)
    audit = prepared(source, folder=tmp_path).audit
    assert (audit.splits.train, audit.leaks["exact"].num_removed, audit.dropped) == (40, 0, {})
    (remark,) = audit.remarks
    assert remark.startswith("10 of 40 train records share more than half of a record of the validation or test file")
    assert f"For example {path}:1 and {test}:1 (test), which share" in remark
    assert remark.endswith("To remove them, set data.leaks=drop.")
    thinned = prepared(source, leaks="drop", folder=tmp_path).audit
    assert (thinned.splits.train, thinned.leaks["exact"].num_removed) == (30, 10)


def test_other_tasks_lose_what_overlaps_with_a_file_that_they_did_not_bring(tmp_path: Path) -> None:
    rows = stories(30)
    own = TaskSource(
        "own", written(tmp_path / "a.jsonl", stories(20, first=900)), test=written(tmp_path / "b.jsonl", rows[:9])
    )
    other = TaskSource("other", written(tmp_path / "c.jsonl", rows))
    audit = prepared(own, other, folder=tmp_path, held_out=0.0).audit
    assert (audit.tasks["own"].train, audit.tasks["other"].train) == (20, 21)


def test_more_than_a_twentieth_removed_is_said_with_an_example_and_the_setting(tmp_path: Path) -> None:
    rows = stories(100)
    copied = written(tmp_path / "copies.jsonl", rows[:10])
    source = TaskSource("t", written(tmp_path / "t.jsonl", rows))
    suite = TaskSource("suite", copied, trained=False)
    (remark,) = prepared(source, suite, folder=tmp_path, held_out=0.0).audit.remarks
    assert remark.startswith("10 of 100 train records (10%) were removed because they share more than half of")
    assert f"For example {tmp_path / 't.jsonl'}:1 and {copied}:1 (test), which share" in remark
    assert remark.endswith("To keep them, set data.leaks=keep.")
    few = TaskSource("suite", written(tmp_path / "few.jsonl", rows[:5]), trained=False)
    assert prepared(source, few, folder=tmp_path, held_out=0.0).audit.remarks == ()
