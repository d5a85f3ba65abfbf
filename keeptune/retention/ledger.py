"""Openings of certify records arrive; a line each in a ledger leaves, and what confidence an opening may spend.

Records that chose a model once cannot vouch for the next one as if they had never been seen: what is tested again
shares one delta with all that was tested before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keeptune.errors import DataError
from keeptune.storage import storage_errors


def record_opening(
    path: Path,
    *,
    certify_sha256: str,
    suites_sha256: Mapping[str, str],
    candidates: Sequence[str],
    when: str,
    command: str,
) -> int:
    """Add a line to the ledger, on the disk before this returns, and return the opening's number, from 1.

    Openings of records with the same content, `certify_sha256`, count together, whoever opened them; so do those that
    share a suite, by its name or by its records' hash in `suites_sha256`: neither one suite more nor some records more
    makes a suite unseen. Call this before a model
    reads the records: an opening counts even when what follows fails.

    Raises:
        DataError: a line of the ledger is not as it was written, or one is missing.
        StorageError: the disk refuses.
    """
    import fcntl

    with storage_errors(path), path.open("a+b") as file:
        # Two runs may open the same records at once; the lock dies with its holder.
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        line: dict[str, Any] = {
            "opened": when,
            "command": command,
            "candidates": list(candidates),
            "certify_sha256": certify_sha256,
            "suites_sha256": dict(suites_sha256),
        }
        opening = _next(line, _openings(file.read(), path))
        line = {"opening": opening, **line}
        file.write((json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))
        file.flush()
        os.fsync(file.fileno())
    return opening


def confidence_left(delta: float, *, opening: int) -> float:
    """Return the delta of the opening with this number: half of what those before it left, so all sum to `delta`."""
    assert opening >= 1, "openings are counted from 1"
    return delta / 2**opening


def _openings(content: bytes, path: Path) -> dict[str, int]:
    """Return the number of the last opening of each content, and of each suite of it."""
    numbers: dict[str, int] = {}
    for number, text in enumerate(content.splitlines(keepends=True), 1):
        try:
            line = json.loads(text)
            opening = line["opening"]
            if not text.endswith(b"\n") or opening != _next(line, numbers):
                raise ValueError("an opening is missing or cut off")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{path}:{number}: found no whole line about the next opening ({error}); expected every opening of the "
                "certify records as it was written. Put the file back from a copy, or certify on new records."
            ) from error
        for content_sha256 in _opened(line):
            numbers[content_sha256] = opening
    return numbers


def _next(line: Mapping[str, Any], numbers: Mapping[str, int]) -> int:
    return 1 + max(numbers.get(content, 0) for content in _opened(line))


def _opened(line: Mapping[str, Any]) -> list[str]:
    """Return what a line says was opened; older ones name the content as a whole.

    A suite's name stands for it too: with some records more or fewer it was still opened.
    """
    suites = line.get("suites_sha256", {})
    return [line["certify_sha256"], *suites.values(), *(f"suite {name}" for name in suites)]
