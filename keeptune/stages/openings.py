"""The ledgers of a run folder: a line for each time that its test split or its certify records were opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keeptune.chain import Chain, Head, head_from_json, open_chain, read_chain
from keeptune.errors import StorageError
from keeptune.stages.certified import CERTIFICATE, CERTIFICATES
from keeptune.stages.data import Data
from keeptune.stages.run import Run, note_facts
from keeptune.storage import MANIFEST, file_sha256, read_record

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
    with open_chain(path, heads=list(heads_of(run.folder, name)), say=run.context.progress.say) as ledger:
        yield ledger
        note_head(run, name, ledger)


def note_head(run: Run, name: str, ledger: Chain) -> None:
    """Let the run's manifest know how long a ledger is."""
    note_facts(run, {_HEADS: {**ledger_heads(run.folder), name: ledger.head.to_json()}})


def read_ledger(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the lines of a ledger of a run folder, checked as by `open_ledger`.

    Raises:
        StorageError: lines were changed or removed.
    """
    return read_chain(folder / name, heads=list(heads_of(folder, name)))


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


def heads_of(folder: Path, name: str) -> Iterator[Head]:
    """Yield what the manifest and the certificates of a run folder know of a ledger."""
    for path in (folder / MANIFEST, folder / CERTIFICATE, *sorted((folder / CERTIFICATES).glob("*.json"))):
        try:
            heads = read_record(path).get(_HEADS, {}) if path.is_file() else {}
        except StorageError:
            # A damaged certificate is derived again; open_run has refused a damaged manifest.
            continue
        if name in heads:
            yield head_from_json(heads[name], known_to=path)
