from __future__ import annotations

import math
from pathlib import Path

import pytest

from keeptune.chain import open_chain, read_chain
from keeptune.retention.ledger import confidence_left, record_opening

ONE, OTHER = "a" * 64, "b" * 64


def opened(path: Path, certify_sha256: str = ONE, *, key: str | None = None, **suites: str) -> int:
    """Open records for a question that was never asked before, unless `key` names one."""
    with open_chain(path, heads=(), say=lambda _: None) as ledger:
        return record_opening(
            ledger,
            certificate="certificate.json",
            key=key or f"question {len(ledger.lines)}",
            certify_sha256=certify_sha256,
            suites_sha256=suites,
            candidates=["full", "lora"],
            when="2024-06-01T12:00:00Z",
            command="run x",
        ).number


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


def test_a_question_that_was_interrupted_goes_on_and_one_asked_since_is_new(tmp_path: Path) -> None:
    path = tmp_path / "certify_openings.jsonl"
    assert [opened(path, key=key) for key in ("a", "a", "b", "b", "a")] == [1, 1, 2, 2, 3]
    assert [opened(path, content, key="a") for content in (ONE, OTHER)] == [3, 1]


def test_a_line_says_who_opened_what_for_which_certificate_and_when(tmp_path: Path) -> None:
    path = tmp_path / "certify_openings.jsonl"
    with open_chain(path, heads=(), say=lambda _: None) as ledger:
        record_opening(
            ledger,
            certificate="certificates/x.json",
            key="k",
            certify_sha256=ONE,
            suites_sha256={"self": OTHER},
            candidates=("lora",),
            when="now",
            command="keeptune run \udcff\n",
        )
    assert read_chain(path, heads=()) == [
        {
            "opening": 1,
            "opened": "now",
            "command": "keeptune run \udcff\n",
            "candidates": ["lora"],
            "certificate": "certificates/x.json",
            "key": "k",
            "certify_sha256": ONE,
            "suites_sha256": {"self": OTHER},
        }
    ]


def test_openings_together_spend_no_more_than_delta() -> None:
    spent = [confidence_left(0.05, opening=i) for i in range(1, 60)]
    assert spent[:3] == pytest.approx([0.04, 0.005, 0.0025])
    assert math.fsum(spent) <= 0.05
