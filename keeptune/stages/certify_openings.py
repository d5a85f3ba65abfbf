"""Openings of certify records: counted by what the records hold, over all run folders of a user or a team.

Each stands in the run folder's ledger and in one beside it, which all run folders share.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keeptune.chain import Chain, open_chain, read_chain
from keeptune.errors import DataError, StorageError
from keeptune.stages.data import Data
from keeptune.stages.openings import LEDGER, heads_of, note_head, open_ledger, read_ledger
from keeptune.stages.run import Run, stage_key
from keeptune.storage import file_sha256, storage_errors

# Where a record stands, which is no part of what it holds.
_PLACE = {"id", "task", "suite", "origin", "index"}
_ID_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Opening:
    """An opening of certify records: its number, from 1, the hash of their content, and the ledger that counted it.

    `ledger` is the one beside the run folder's. `faults` say what it may not know: it could not be used, or lines of it
    were changed or removed.
    """

    number: int
    certify_sha256: str
    ledger: Path | None
    faults: tuple[str, ...]


def certify_files(run: Run, data: Data) -> list[Path]:
    """Return the files with certify records that a run has by now."""
    folders = (data.folder, run.folder / "texts", run.folder / "harness")
    return [path for folder in folders if (path := folder / "certify.jsonl").is_file()]


def open_records(run: Run, files: Sequence[Path], *, key: str, facts: Mapping[str, Any]) -> Opening:
    """Write an opening of the records in these files down, in the run folder and in the ledger beside it.

    `key` is the hash of the candidates and all that they are asked. What is wrong with the ledger beside it is no
    error: it stands in the line from then on.

    Raises:
        DataError: a search chose settings by some of the records.
        StorageError: lines of the run folder's ledger were changed or removed.
    """
    from keeptune.retention.ledger import record_opening, shared_faults

    content, records = stage_key(files=[file_sha256(path) for path in files]), _records_in(files)
    with _both_ledgers(run) as (ledgers, faults):
        known = [line for ledger in ledgers for line in ledger.lines]
        _refuse_searched(known, records)
        number = record_opening(
            ledgers, key=key, certify_sha256=content, records=records, facts={**facts, "faults": faults}
        )
    said = dict.fromkeys([*faults, *shared_faults(known, opened=_ids(records))])
    return Opening(number, content, _beside(run), tuple(said))


def note_searched(run: Run, data: Data) -> None:
    """Write down that a search looks at the probe records: no certificate may stand on them."""
    from keeptune.retention.ledger import record_search

    path = data.folder / "probe.jsonl"
    if path.is_file():
        facts = {"opened": run.context.now(), "command": run.context.command, "run": str(run.folder.resolve())}
        with _both_ledgers(run) as (ledgers, faults):
            record_search(
                ledgers, content=file_sha256(path), records=_records_in([path]), facts={**facts, "faults": faults}
            )


def expected_opening(run: Run, data: Data) -> int:
    """Return the number that an opening would have now; 1 where the run has one, which may be the same again.

    Raises:
        DataError: a search chose settings by some of the records.
    """
    from keeptune.retention.ledger import last_opening

    lines, records = read_ledger(run.folder, LEDGER), _records_in(certify_files(run, data))
    opened_here = any(line["opening"] for line in lines)
    if (path := _beside(run)) is not None:
        with suppress(StorageError):
            lines += read_chain(path, heads=())
    _refuse_searched(lines, records)
    return 1 if opened_here else 1 + last_opening(lines, opened=_ids(records))


@contextmanager
def _both_ledgers(run: Run) -> Iterator[tuple[list[Chain], list[str]]]:
    """Hold the ledger beside the run folder, where it can be used, and the run folder's; say what is wrong with it."""
    with ExitStack() as stack:
        beside, faults = _ledger_beside(run, stack)
        own = stack.enter_context(open_ledger(run, LEDGER))
        if beside is None:
            yield [own], faults
            return
        lost = [line for line in own.lines if line not in beside.lines]
        if lost:
            faults.append(f"{_beside(run)}: found {len(lost)} lines of {run.folder / LEDGER} missing")
        for line in lost:
            beside.add(line)
        yield [beside, own], faults
        note_head(run, str(_beside(run)), beside)


def _ledger_beside(run: Run, stack: ExitStack) -> tuple[Chain | None, list[str]]:
    """Hold the ledger beside the run folder's for as long as the stack; None where there is none that can be used."""
    path = _beside(run)
    if path is None:
        return None, ["No ledger beside the run folder's counted it: other run folders may have opened the same"]
    heads, say = list(heads_of(run.folder, str(path))), run.context.progress.say
    try:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        beside = stack.enter_context(open_chain(path, heads=heads, say=say, keep_faults=True))
    except StorageError as error:
        return None, [str(error)]
    return beside, [*beside.faults]


def _beside(run: Run) -> Path | None:
    named = run.recipe.retention.ledger
    return Path(named).expanduser().resolve() if named else run.context.ledger


def _records_in(files: Sequence[Path]) -> dict[str, list[str]]:
    """Return a hash of each record by its suite, which depends on what is asked and expected alone."""
    found: dict[str, list[str]] = {}
    for path in files:
        with storage_errors(path), path.open(encoding="utf-8", errors="surrogatepass") as file:
            for row in map(json.loads, file):
                content = {name: value for name, value in row.items() if name not in _PLACE}
                # A document of the harness names its task beside its suite.
                found.setdefault(row.get("suite") or row["task"], []).append(stage_key(**content)[:_ID_DIGITS])
    return found


def _ids(records: Mapping[str, Sequence[str]]) -> list[str]:
    return [one for ids in records.values() for one in ids]


def _refuse_searched(lines: Sequence[Mapping[str, Any]], records: Mapping[str, Sequence[str]]) -> None:
    from keeptune.retention.ledger import searched_by

    if (line := searched_by(lines, opened=_ids(records))) is not None:
        raise DataError(
            f"retention.budget: found certify records by which a search chose settings ({line['run']}, "
            f"{line['opened']}); expected records that chose nothing. Set retention.probe_fraction=0.2, as the recipe "
            "with the search's best settings has it."
        )
