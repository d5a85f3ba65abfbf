"""Law "Counts": rows_in = kept + dropped, before and after tokens are counted."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keeptune.data.audit import (
    Audit,
    DroppedRow,
    Lengths,
    NearAudit,
    NearPair,
    Quantiles,
    SplitCounts,
    TokenAudit,
    quantiles,
    split_counts,
    token_audit,
)
from keeptune.data.group_audit import GroupAudit
from keeptune.data.leak_audit import LeakExample, leak_audits
from keeptune.data.leaks import LeakKind
from keeptune.data.record import SplitName

AUDIT = Audit(
    rows_in=12,
    kept=9,
    dropped={"empty_completion": 1, "exact_duplicate": 2},
    dropped_rows=(DroppedRow("a.jsonl:3", "empty_completion"),),
    exact_duplicates=2,
    near_duplicates=NearAudit(1, (NearPair("a.jsonl:1", "a.jsonl:9", 0.9),)),
    groups=GroupAudit(num_groups=8, num_joined=1, num_moved=1, largest_group=2),
    tasks={"a": SplitCounts(5, 1, 1), "b": SplitCounts(2, 0, 0)},
    leaks=leak_audits(
        {"exact": 1}, [("exact", LeakExample("a.jsonl:1", "b.jsonl:1", "test", 1.0))], removed={"exact": 1}
    ),
)


def tokens(*, truncated: int = 0, completion_cut: int = 0, too_long: int = 0) -> TokenAudit:
    lengths = Lengths()
    for prompt_tokens, completion_tokens in ((10, 1), (20, 2), (30, 3)):
        lengths.add(prompt_tokens, completion_tokens, trained=prompt_tokens < 30)
    return token_audit(
        lengths, truncated=truncated, completion_cut=completion_cut, too_long=too_long, supervised_tokens=6
    )


@pytest.mark.parametrize(
    "wrong", [{"rows_in": 13}, {"kept": 8}, {"dropped": {}}, {"tasks": {"a": SplitCounts(9, 9, 9)}}]
)
def test_counts_that_do_not_add_up_are_no_audit(wrong: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        replace(AUDIT, **wrong)


def test_the_token_part_moves_records_that_are_too_long_from_kept_to_dropped() -> None:
    audit = AUDIT.with_tokens(tokens(too_long=3), too_long={("a", "train"): 2, ("b", "train"): 1})
    assert (audit.rows_in, audit.kept) == (12, 6)
    assert audit.dropped == {"empty_completion": 1, "exact_duplicate": 2, "too_long": 3}
    assert audit.tasks == {"a": SplitCounts(3, 1, 1), "b": SplitCounts(1, 0, 0)}
    assert audit.splits == SplitCounts(4, 1, 1)
    assert AUDIT.tokens is None


def test_a_token_part_that_counts_other_drops_is_refused() -> None:
    with pytest.raises(AssertionError, match="too_long is counted once"):
        AUDIT.with_tokens(tokens(too_long=2), too_long={("a", "train"): 1})


def test_rows_are_whole_truncated_or_dropped_in_json() -> None:
    audit = AUDIT.with_tokens(tokens(truncated=2, completion_cut=1, too_long=1), too_long={("a", "test"): 1})
    value = json.loads(json.dumps(audit.to_json(), allow_nan=False))
    assert value["rows_in"] == value["kept_whole"] + value["truncated"] + sum(value["dropped"].values()) == 12
    assert value["truncated"] == 2
    assert value["tokens"]["truncated_fraction"] == 2 / 8
    assert value["tokens"]["prompt"] == {"p50": 20, "p90": 30, "p99": 30, "max": 30, "mean": 20.0}
    assert value["tokens"]["total"]["max"] == 33
    assert value["tokens"]["untrained_completion"] == {"p50": 3, "p90": 3, "p99": 3, "max": 3, "mean": 3.0}
    assert value["splits"] == {"train": 7, "validation": 1, "test": 0}
    assert value["tasks"]["a"] == {"train": 5, "validation": 1, "test": 0}
    assert value["near_duplicates"]["examples"] == [{"first": "a.jsonl:1", "second": "a.jsonl:9", "jaccard": 0.9}]
    assert value["leaks"]["exact"]["num_removed"] == 1


def test_json_stands_before_tokens_are_counted() -> None:
    value = json.loads(json.dumps(AUDIT.to_json(), allow_nan=False))
    assert value["tokens"] is None
    assert "kept_whole" not in value


def test_the_counts_of_a_manifest_are_those_of_the_audit() -> None:
    audit = AUDIT.with_tokens(tokens(truncated=2), too_long={})
    counts = audit.counts()
    assert counts["rows_in"] == counts["kept_whole"] + counts["truncated"] + sum(counts["dropped"].values())


def test_the_summary_is_the_sum() -> None:
    assert AUDIT.summary() == "12 rows = 9 kept + 3 removed (1 empty completion, 2 exact copies)"
    audit = AUDIT.with_tokens(tokens(truncated=2, completion_cut=1, too_long=1), too_long={("a", "test"): 1})
    # As in the audit's table, what is truncated is kept.
    assert audit.summary().startswith(f"12 rows = {audit.kept} kept (2 of them truncated) + 4 removed (")
    assert replace(AUDIT, dropped={"leak": 1, "max_records": 1, "not_trained": 1}).summary() == (
        "12 rows = 9 kept + 2 not used (1 above max_records, 1 non-test rows of tasks not trained on) "
        "+ 1 removed (1 overlaps of train with validation or test)"
    )
    assert replace(AUDIT, rows_in=9, dropped={}).summary() == "9 rows = 9 kept"


def test_quantiles_are_lengths_that_occur() -> None:
    assert quantiles(Counter(range(1, 101))) == Quantiles(50, 90, 99, 100, 50.5)
    assert quantiles({7: 1}) == Quantiles(7, 7, 7, 7, 7.0)
    assert quantiles({}) == Quantiles(0, 0, 0, 0, 0.0)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=300))
def test_quantiles_of_counts_are_those_of_the_values(values: list[int]) -> None:
    expected = np.quantile(values, [0.5, 0.9, 0.99, 1.0], method="inverted_cdf").tolist()
    assert quantiles(Counter(values)) == Quantiles(*expected, mean=float(np.mean(values)))


def test_leaks_that_are_kept_are_counted_and_only_twenty_are_listed() -> None:
    example = LeakExample("a:1", "b:1", "test", 0.6)
    found: list[tuple[LeakKind, LeakExample]] = [("ngram_cover", example)] * 25
    counts: dict[LeakKind, int] = {"ngram_cover": 25, "ngram_13": 1}
    audits = leak_audits(counts, [*found, ("ngram_13", example)], removed={"ngram_cover": 25})
    assert [(kind, a.num_train_records, a.num_removed, len(a.examples)) for kind, a in audits.items()] == [
        ("exact", 0, 0, 0),
        ("near", 0, 0, 0),
        ("ngram_cover", 25, 25, 20),
        ("ngram_13", 1, 0, 1),
    ]


placed_records = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["train", "validation", "test"])))


@given(placed_records)
def test_split_counts_add_up(placed: list[tuple[str, SplitName]]) -> None:
    counts = split_counts(placed, tasks=["a", "b", "empty"])
    assert sum(c.total for c in counts.values()) == len(placed)
    assert counts["empty"] == SplitCounts(0, 0, 0)
