"""The ledgers of openings: a line for each time that a run's test split, or certify records, were opened.

Both lie in the run folder. Openings of certify records stand in a second ledger too, one for all run folders of a user
or a team: the same records may be opened by many.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keeptune.chain import Chain, Head, head_from_json, open_chain, read_chain
from keeptune.errors import StorageError
from keeptune.stages.certified import CERTIFICATE, CERTIFICATES
from keeptune.stages.data import Data
from keeptune.stages.run import Run, note_facts
from keeptune.storage import MANIFEST, file_sha256, read_record, storage_errors

LEDGER, TEST_LEDGER = "certify_openings.jsonl", "test_openings.jsonl"
# Of the manifest and of every certificate: {ledger: its head when they were written}.
_HEADS = "ledgers"
# Of a model's key, in the log of openings.
_KEY_DIGITS = 16


@contextmanager
def open_ledger(run: Run, name: str) -> Iterator[Chain]:
    """Hold a ledger of the run, checked against what the manifest and the certificates know of it.

    Raises:
        StorageError: lines were changed or removed.
    """
    path = run.folder / name
    with open_chain(path, heads=list(_heads(run.folder, name)), say=run.context.progress.say) as ledger:
        yield ledger
        _note_head(run, name, ledger)


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


def open_records(
    run: Run, *, key: str, certify_sha256: str, records: Mapping[str, Sequence[str]], facts: Mapping[str, Any]
) -> Opening:
    """Write an opening of certify records down, in the run folder and in the ledger beside it, and return it.

    What is wrong with the ledger beside it is no error: it is told, and stands in the lines of both from then on.

    Raises:
        StorageError: lines of the run folder's ledger were changed or removed.
    """
    from keeptune.retention.ledger import record_opening, shared_faults

    path, faults = _beside(run), []
    with ExitStack() as stack:
        ledgers: list[Chain] = []
        if path is None:
            faults.append("No ledger beside the run folder's counted it: other run folders may have opened the same")
        else:
            try:
                ledgers.append(stack.enter_context(_open_beside(run, path)))
            except StorageError as error:
                faults.append(str(error))
        own = stack.enter_context(open_ledger(run, LEDGER))
        if ledgers and (lost := [line for line in own.lines if line not in ledgers[0].lines]):
            faults.append(
                f"{path}: found {len(lost)} of the {len(own.lines)} openings in {run.folder / LEDGER} missing"
            )
            for line in lost:
                ledgers[0].add(line)
        faults += [fault for ledger in ledgers for fault in ledger.faults]
        ledgers.append(own)
        number = record_opening(
            ledgers, key=key, certify_sha256=certify_sha256, records=records, facts={**facts, "faults": faults}
        )
        known = [line for ledger in ledgers for line in ledger.lines]
        for ledger in ledgers[:-1]:
            _note_head(run, str(path), ledger)
    ids = [one for suite in records.values() for one in suite]
    return Opening(number, certify_sha256, path, tuple(dict.fromkeys([*faults, *shared_faults(known, opened=ids)])))


@contextmanager
def _open_beside(run: Run, path: Path) -> Iterator[Chain]:
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    heads = list(_heads(run.folder, str(path)))
    with open_chain(path, heads=heads, say=run.context.progress.say, keep_faults=True) as ledger:
        yield ledger


def num_openings(run: Run, *, opened: Iterable[str]) -> int:
    """Return the number of the last opening that had one of these records; 0 where no ledger knows of one."""
    from keeptune.retention.ledger import last_opening

    lines = read_ledger(run.folder, LEDGER)
    if (path := _beside(run)) is not None:
        with suppress(StorageError):
            lines += read_chain(path, heads=())
    return last_opening(lines, opened=opened)


def _beside(run: Run) -> Path | None:
    named = run.recipe.retention.ledger
    return Path(named).expanduser().resolve() if named else run.context.ledger


def _note_head(run: Run, name: str, ledger: Chain) -> None:
    note_facts(run, {_HEADS: {**ledger_heads(run.folder), name: ledger.head.to_json()}})


def read_ledger(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the lines of a ledger of a run folder, checked as by `open_ledger`.

    Raises:
        StorageError: lines were changed or removed.
    """
    return read_chain(folder / name, heads=list(_heads(folder, name)))


def ledger_heads(folder: Path) -> dict[str, Any]:
    """Return what the manifest of a run folder knows of its ledgers, for a certificate to repeat."""
    return read_record(folder / MANIFEST).get(_HEADS, {})


def record_opening(run: Run, data: Data, *, keys: Mapping[str, str]) -> None:
    """Add a line to `test_openings.jsonl`, on the disk before the split is read; `keys` holds one a model.

    One that goes on with an interrupted look, at the same models under the same keys, says so: it is no second look.
    """
    short = {name: key[:_KEY_DIGITS] for name, key in keys.items()}
    line = {
        "opened": run.context.now(),
        "command": run.context.command,
        "models": list(short),
        "test_sha256": file_sha256(data.folder / "test.jsonl"),
        "keys": short,
    }
    with open_ledger(run, TEST_LEDGER) as ledger:
        if any(short.items() <= before["keys"].items() for before in ledger.lines):
            line["resumes"] = True
        ledger.add(line)


def _heads(folder: Path, name: str) -> Iterator[Head]:
    for path in (folder / MANIFEST, folder / CERTIFICATE, *sorted((folder / CERTIFICATES).glob("*.json"))):
        try:
            heads = read_record(path).get(_HEADS, {}) if path.is_file() else {}
        except StorageError:
            # A damaged certificate is derived again; open_run has refused a damaged manifest.
            continue
        if name in heads:
            yield head_from_json(heads[name], known_to=path)
