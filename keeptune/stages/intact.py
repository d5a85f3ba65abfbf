"""Whether the files of a run folder that others are made from are as keeptune wrote them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from keeptune.errors import StorageError, raise_collected
from keeptune.stages.certified import CERTIFICATE, CERTIFICATES, refuse_changed
from keeptune.stages.openings import LEDGER, TEST_LEDGER, read_ledger
from keeptune.stages.run import CARD, EVENTS, INSTRUCT_MODEL, RECIPE, SELECTION, TRAINING
from keeptune.storage import MANIFEST, changed_file, file_sha256, read_record, read_sealed_text, require_unchanged

_RECORDS = (MANIFEST, SELECTION, CERTIFICATE, "paired.json", "forgetting.json", f"*/{TRAINING}", f"*/{CARD}")
# They are checked where they are used, as all weights are: they take long to read.
_UNREAD = {"checkpoints", "search", "curve", "comparisons", CERTIFICATES}


def refuse_changed_files(folder: Path) -> None:
    """Refuse a run folder in which a file that a page shows has changed since it was written.

    A file that is missing is no fault: a run may be under way.

    Raises:
        StorageError: each file that has changed.
        DataError: the instruct model is no longer the one that the certificate names.
    """
    problems = list(_problems(folder))
    if problems:
        raise_collected(StorageError, problems)
    refuse_changed(folder / INSTRUCT_MODEL, runs=[folder])
    require_unchanged(folder / INSTRUCT_MODEL)


def _problems(folder: Path) -> Iterator[str]:
    for path in sorted(found for pattern in _RECORDS for found in folder.glob(pattern)):
        try:
            value = read_record(path)
        except StorageError as error:
            yield str(error)
            continue
        events = path.with_name(EVENTS)
        if path.name == TRAINING and events.is_file() and file_sha256(events) != value["events_sha256"]:
            yield (
                f"{events}: found content that differs from its hash in {path}; expected the log of the training. Put "
                f"it back from a copy, or remove {path.parent} to train from the start."
            )
    for path in sorted((folder / CERTIFICATES).glob("*.json")):
        try:
            read_record(path, again="`keeptune certify --artifact`")
        except StorageError as error:
            yield str(error)
    for check in (
        lambda: read_sealed_text(folder / RECIPE) if (folder / RECIPE).is_file() else None,
        lambda: read_ledger(folder, TEST_LEDGER),
        lambda: read_ledger(folder, LEDGER),
    ):
        try:
            check()
        except StorageError as error:
            yield str(error)
    for path in sorted(folder.rglob(f"*/{MANIFEST}")):
        inner = path.parent.relative_to(folder)
        unread = _UNREAD & {*inner.parts} or any(path.parent.glob("*.safetensors"))
        changed = None if unread else changed_file(path.parent)
        if changed is not None:
            yield (
                f"{changed}: found content that differs from its hash; expected the file as keeptune wrote it. Put it "
                "back from a copy, or give `keeptune run` again, which writes it anew."
            )
