from __future__ import annotations

import math
from pathlib import Path

import pytest

from keeptune.chain import open_chain, read_chain
from keeptune.retention.ledger import confidence_left, record_opening

ONE, OTHER = "a" * 64, "b" * 64


def opened(path: Path, certify_sha256: str = ONE, *, key: str | None = None, **suites: str) -> int:
    """Open records, each named by a letter, for a question that was never asked before, unless `key` names one."""
    with open_chain(path, heads=(), say=lambda _: None) as ledger:
        return record_opening(
            [ledger],
            key=key or f"question {len(ledger.lines)}",
            certify_sha256=certify_sha256,
            records={suite: [*letters] for suite, letters in suites.items()},
            facts={"command": "run x"},
        )


def test_an_opening_counts_after_all_that_had_one_of_its_records(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    assert opened(path, boolq="abc") == 1
    assert opened(path, boolq="abc") == 2
    assert opened(path, arc="def") == 1
    assert opened(path, boolq="cxyz") == 3
    assert opened(path, arc="z", wiki="uvw") == 4
    assert opened(path, squad="w") == 5


def test_fresh_records_of_a_suite_that_was_opened_have_a_fresh_delta(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    assert [opened(path, boolq="abc"), opened(path, boolq="def"), opened(path, boolq="fg")] == [1, 1, 2]


def test_records_that_were_opened_under_another_suite_are_not_fresh(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    assert [opened(path, boolq="abc"), opened(path, renamed="cde")] == [1, 2]


def test_a_question_that_is_asked_again_is_no_new_opening(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    assert [opened(path, key=key, suite="x") for key in ("a", "a", "b", "b", "a", "c")] == [1, 1, 2, 2, 1, 3]
    assert [opened(path, content, key="a", suite="x") for content in (ONE, OTHER)] == [1, 4]
    assert len(read_chain(path, heads=())) == 4


def test_an_opening_stands_in_each_ledger_and_counts_what_any_of_them_knows(tmp_path: Path) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    assert opened(first, suite="x") == 1
    with open_chain(first, heads=(), say=print) as one, open_chain(second, heads=(), say=print) as two:
        question = {"certify_sha256": ONE, "records": {"suite": ["y", "x"]}, "facts": {"opened": "now"}}
        assert record_opening([one, two], key="k", **question) == 2
        assert record_opening([one, two], key="k", **question) == 2
        assert record_opening([two], key="l", **question) == 3
    lines = read_chain(second, heads=())
    assert read_chain(first, heads=())[1:] == lines[:1]
    assert lines[0] == {
        "opening": 2,
        "opened": "now",
        "key": "k",
        "certify_sha256": ONE,
        "records": {"suite": ["x", "y"]},
    }


def test_openings_together_spend_no_more_than_delta() -> None:
    spent = [confidence_left(0.05, opening=i, num_suites=1) for i in range(1, 60)]
    assert spent[:3] == pytest.approx([0.04, 0.005, 0.0025])
    assert math.fsum(spent) <= 0.05


def test_a_later_opening_pays_for_what_the_last_one_showed_of_each_suite() -> None:
    assert confidence_left(0.05, opening=1, num_suites=4) == pytest.approx(0.04)
    assert confidence_left(0.05, opening=2, num_suites=4) == pytest.approx(0.00125)
