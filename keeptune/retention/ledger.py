"""Openings of certify records arrive; a line each in a ledger leaves, and what confidence an opening may spend.

Records that chose a model once cannot vouch for the next one as if they had never been seen: what is tested again
shares one delta with all that was tested before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keeptune.chain import Chain

_FIRST_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Opening:
    """An opening of certify records: its number, from 1, and the hash of their content."""

    number: int
    certify_sha256: str


def record_opening(
    ledger: Chain,
    *,
    certificate: str,
    key: str,
    certify_sha256: str,
    suites_sha256: Mapping[str, str],
    candidates: Sequence[str],
    when: str,
    command: str,
) -> Opening:
    """Write down an opening for a certificate and return it; the certificate's last one again where its key is `key`.

    `key` is the hash of the candidates and all that they are asked: a certification that was interrupted goes on.

    Openings of records with the same content, `certify_sha256`, count together, whoever opened them; so do those that
    share a suite, by its name or by its records' hash in `suites_sha256`: neither one suite more nor some records more
    makes a suite unseen. Call this before a model reads the records: an opening counts even when what follows fails.

    Raises:
        StorageError: the disk refuses.
    """
    last = next((line for line in reversed(ledger.lines) if line["certificate"] == certificate), None)
    if last is not None and (last["key"], last["certify_sha256"]) == (key, certify_sha256):
        return Opening(last["opening"], certify_sha256)
    line: dict[str, Any] = {
        "opened": when,
        "command": command,
        "candidates": list(candidates),
        "certificate": certificate,
        "key": key,
        "certify_sha256": certify_sha256,
        "suites_sha256": dict(suites_sha256),
    }
    opened = set(_opened(line))
    number = 1 + max((before["opening"] for before in ledger.lines if opened & {*_opened(before)}), default=0)
    ledger.add({"opening": number, **line})
    return Opening(number, certify_sha256)


def confidence_left(delta: float, *, opening: int) -> float:
    """Return the delta of the opening with this number; those of all openings sum to `delta`.

    The first gets four fifths, as most records are opened once; each later one half of what those before it left.
    """
    assert opening >= 1, "openings are counted from 1"
    return _FIRST_SHARE * delta if opening == 1 else (1.0 - _FIRST_SHARE) * delta / 2 ** (opening - 1)


def _opened(line: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a line says was opened.

    A suite's name stands for it too: with some records more or fewer it was still opened.
    """
    yield line["certify_sha256"]
    for name, sha256 in line["suites_sha256"].items():
        yield from (sha256, f"suite {name}")
