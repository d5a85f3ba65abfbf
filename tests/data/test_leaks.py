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


def test_the_same_subject_between_other_wordings_stays_in_one_split(tmp_path: Path) -> None:
    """Beside 300 tickets stand 60 more about the subjects of the first 60, each in other wording."""
    r = random.Random(0)
    subjects = [body(r) for _ in range(300)]
    rows = [{"prompt": wrapped(subject, r), "completion": "Bug"} for subject in [*subjects, *subjects[:60]]]
    found = splits(prepared(TaskSource("t", written(tmp_path / "t.jsonl", rows)), folder=tmp_path))
    ends = [{found.get(i), found.get(300 + i)} for i in range(1, 61)]
    assert sum(len(pair) > 1 for pair in ends) == 0
    assert {"train"} in ends and {"test"} in ends and {None} not in ends


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


def templated(num_inputs: int, num_templates: int, *, first: int = 0, num_words: int = 9) -> list[dict[str, str]]:
    """Return each of some inputs under all templates, as P3 has them."""
    inputs = [" ".join(f"input{i}x{k}" for k in range(num_words)) for i in range(first, first + num_inputs)]
    frames = [[" ".join(f"{end}{t}x{k}" for k in range(12)) for end in ("head", "tail")] for t in range(num_templates)]
    return [{"prompt": f"{head} {x} {tail}", "completion": "y"} for x in inputs for head, tail in frames]


def test_all_templates_of_an_input_are_one_group_and_no_record_is_lost(tmp_path: Path) -> None:
    result = prepared(TaskSource("t", written(tmp_path / "t.jsonl", templated(60, 7))), folder=tmp_path)
    assert (result.audit.dropped, result.audit.groups.num_groups, result.audit.groups.largest_group) == ({}, 60, 7)
    large = result.audit.groups.largest
    assert [(group.num_records, group.task) for group in large] == [(7, "t")] * 5
    for group in large:
        number = (int(group.record.rpartition(":")[2]) - 1) // 7
        assert group.shared == " ".join(f"input{number}x{k}" for k in range(9))
    # Fractions hold for inputs: 12 of 60 are expected beside train.
    assert result.audit.splits.train % 7 == 0 and 40 * 7 <= result.audit.splits.train <= 55 * 7


def test_many_inputs_of_one_template_are_as_many_groups(tmp_path: Path) -> None:
    """Inputs of one to three words, as labels are asked for, beside a template of 24."""
    rows = [row for n in (1, 2, 3) for row in templated(100, 1, first=1000 * n, num_words=n)]
    audit = prepared(TaskSource("t", written(tmp_path / "t.jsonl", rows)), folder=tmp_path).audit
    assert (audit.dropped, audit.groups.num_groups) == ({}, 300)


def test_short_inputs_among_long_ones_of_one_template_are_no_near_duplicates(tmp_path: Path) -> None:
    """A prompt under 20 words is compared by its characters, of which the template's are most."""
    reviews = [f"good{i}" for i in range(40)] + [" ".join(f"r{i}w{k}" for k in range(30)) for i in range(160)]
    rows = [
        {"prompt": f"How many stars has this review of an app that I use, please: {x}", "completion": "5"}
        for x in reviews
    ]
    audit = prepared(TaskSource("t", written(tmp_path / "t.jsonl", rows)), folder=tmp_path).audit
    assert (audit.dropped, audit.groups.num_groups) == ({}, 200)


def test_rows_in_another_order_and_unrelated_ones_move_no_group(tmp_path: Path) -> None:
    def split_of(rows: list[dict[str, str]]) -> dict[str, str]:
        result = prepared(TaskSource("t", written(tmp_path / "t.jsonl", rows)), folder=tmp_path)
        return {record.prompt: split for split in SPLIT_NAMES for record in result.records[split]}

    rows = templated(40, 5)
    before = split_of(rows)
    assert len(before) == 200 and set(before.values()) == set(SPLIT_NAMES)
    more = [*rows, *stories(150)]
    random.Random(1).shuffle(more)
    after = split_of(more)
    assert {prompt: after[prompt] for prompt in before} == before


@pytest.mark.parametrize("i", range(0, 24, 2))
def test_a_row_that_joins_two_inputs_moves_them_into_one_split_and_is_counted(i: int, tmp_path: Path) -> None:
    rows = stories(24)
    alone = splits(prepared(TaskSource("t", written(tmp_path / "t.jsonl", rows)), folder=tmp_path, held_out=0.3))
    joining = {"prompt": f"{rows[i]['prompt']} {rows[i + 1]['prompt']}", "completion": "both"}
    path = written(tmp_path / "t.jsonl", [*rows, joining])
    result = prepared(TaskSource("t", path), folder=tmp_path, held_out=0.3)
    found, groups = splits(result), result.audit.groups
    assert len({found[i + 1], found[i + 2], found[25]}) == 1
    assert (groups.num_groups, groups.num_joined, groups.largest_group) == (23, 2, 3)
    moved = sum(alone[k] != found[k] for k in range(1, 25))
    # The joining row may have moved too.
    assert groups.num_moved - moved in (0, 1)


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
