"""Openings of certify records arrive; a line each in a ledger leaves, and what confidence an opening may spend.

Records that chose a model once cannot vouch for the next one as if they had never been seen: what is tested again
shares one delta with all that was tested before. Records count by what they hold, whatever run or suite they stand in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from keeptune.chain import Chain

_FIRST_SHARE = 0.8


def record_opening(
    ledgers: Sequence[Chain],
    *,
    key: str,
    certify_sha256: str,
    records: Mapping[str, Sequence[str]],
    facts: Mapping[str, Any],
) -> int:
    """Write an opening down in every ledger and return its number, from 1; the earlier one of the same question.

    `key` is the hash of the candidates and all that they are asked, `certify_sha256` that of the records' content: a
    certification that was interrupted goes on, and one that is repeated has the same answer. `records` are the hashes
    of each suite's records; an opening counts after all those, in any of the ledgers, that had one of its records.
    `facts` stand in the line. Call this before a model reads the records: an opening counts even when what follows
    fails.

    Raises:
        StorageError: the disk refuses.
    """
    known = [line for ledger in ledgers for line in ledger.lines]
    line = next((one for one in known if (one.get("key"), one["certify_sha256"]) == (key, certify_sha256)), None)
    if line is None:
        number = 1 + last_opening(known, opened=(one for ids in records.values() for one in ids))
        line = {
            "opening": number,
            **facts,
            "key": key,
            "certify_sha256": certify_sha256,
            "records": _sorted(records),
        }
    for ledger in ledgers:
        if line not in ledger.lines:
            ledger.add(line)
    return int(line["opening"])


def last_opening(lines: Iterable[Mapping[str, Any]], *, opened: Iterable[str]) -> int:
    """Return the largest number of an opening that had one of these records; 0 where none had."""
    asked = set(opened)
    return max((line["opening"] for line in lines if not asked.isdisjoint(_records(line))), default=0)


def searched_by(lines: Iterable[Mapping[str, Any]], *, opened: Iterable[str]) -> Mapping[str, Any] | None:
    """Return the line of a search that chose settings by one of these records; None where there is none."""
    asked = set(opened)
    return next((line for line in lines if line.get("searched") and not asked.isdisjoint(_records(line))), None)


def shared_faults(lines: Iterable[Mapping[str, Any]], *, opened: Iterable[str]) -> list[str]:
    """Return what was wrong with a ledger when these records were opened, at any time."""
    asked = set(opened)
    return [fault for line in lines if not asked.isdisjoint(_records(line)) for fault in line.get("faults", ())]


def record_search(
    ledgers: Sequence[Chain], *, content: str, records: Mapping[str, Sequence[str]], facts: Mapping[str, Any]
) -> None:
    """Write down that a search looks at these records; once for records of the same `content`."""
    line = {"opening": 0, "searched": True, **facts, "certify_sha256": content, "records": _sorted(records)}
    for ledger in ledgers:
        if not any(one.get("searched") and one["certify_sha256"] == content for one in ledger.lines):
            ledger.add(line)


def confidence_left(delta: float, *, opening: int, num_suites: int) -> float:
    """Return the delta of the opening with this number; those of all openings sum to `delta` at most.

    The first gets four fifths, as most records are opened once; each later one half of what those before it left,
    divided by the number of suites: whoever saw what each of them lost may aim at the luckiest one.
    """
    assert opening >= 1, "openings are counted from 1"
    if opening == 1:
        return _FIRST_SHARE * delta
    return (1.0 - _FIRST_SHARE) * delta / 2 ** (opening - 1) / num_suites


def _sorted(records: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {suite: sorted(ids) for suite, ids in sorted(records.items())}


def _records(line: Mapping[str, Any]) -> set[str]:
    return {one for ids in line["records"].values() for one in ids}
