"""A method's study on the disk: trials are queued, begun and told; after a crash the same trials stand there.

Optuna's journal holds them, a file of JSON lines. One process alone writes it, the driver, which holds the run folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from keeptune.errors import FolderInUseError, StorageError, import_extra
from keeptune.search.sampler import distribution, drawn, optuna
from keeptune.search.space import Range
from keeptune.search.trials import Result, Trial
from keeptune.storage import read_record, storage_errors, write_record

JOURNAL = "journal.log"
# Beside it: its length and hash after the last write.
DIGEST = "journal.json"
_KEY, _TRIAL, _RESULT = "key", "trial", "result"


@dataclass(frozen=True, slots=True)
class Begun:
    """A trial that is running, and Optuna's own view of it."""

    trial: Trial
    asked: Any


@dataclass(frozen=True, slots=True)
class Study:
    """A method's trials in the journal in `folder`."""

    method: str
    folder: Path
    ranges: tuple[Range, ...]
    _study: Any

    def results(self) -> dict[str, Result]:
        """Return what is known of the trials that are at their end, by name."""
        found = {}
        for frozen in self._trials():
            if (told := frozen.user_attrs.get(_RESULT)) is not None:
                trial = _trial(frozen)
                found[trial.name] = Result(**{**told, "trial": trial})
        return found

    def trials(self) -> dict[str, Trial]:
        """Return every trial that was queued, by name."""
        return {(trial := _trial(frozen)).name: trial for frozen in self._trials()}

    def queue(self, trials: Sequence[Trial]) -> None:
        """Write down trials that are to be made, in their order."""
        with self._writing():
            for trial in trials:
                self._study.enqueue_trial(drawn(trial.params, self.ranges), user_attrs={_TRIAL: asdict(trial)})

    def begin(self) -> Begun | None:
        """Return the next trial that is queued, as running; None where there is none."""
        if not self._trials("WAITING"):
            return None
        with self._writing():
            asked = self._study.ask({r.key: distribution(r) for r in self.ranges})
        return Begun(_trial(asked), asked)

    def tell(self, begun: Begun, result: Result) -> None:
        """Write down what became of a trial."""
        told = asdict(result)
        del told["trial"]
        with self._writing():
            begun.asked.set_user_attr(_RESULT, told)
            self._end(begun.asked.number, value=result.value)

    def queue_again(self, begun: Begun) -> None:
        """Fail a trial whose process ended before its end, and queue the same settings again."""
        with self._writing():
            self._end(begun.asked.number, value=None)
        self.queue([begun.trial])

    def settle(self) -> None:
        """End what a driver that died left running: what was told stands, the rest failed and has no result.

        A trial without a result is missing from its round, and is queued again with the settings that the journal has.
        """
        with self._writing():
            for frozen in self._trials("RUNNING"):
                told = frozen.user_attrs.get(_RESULT)
                self._end(frozen.number, value=None if told is None else told["value"])

    def _end(self, number: int, *, value: float | None) -> None:
        state = optuna().trial.TrialState
        self._study.tell(number, value, state=state.FAIL if value is None else state.COMPLETE)

    def _trials(self, state: str | None = None) -> list[Any]:
        trials = self._study.get_trials(deepcopy=False)
        return [trial for trial in trials if state is None or trial.state.name == state]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with storage_errors(self.folder / JOURNAL):
            yield
        _note_digest(self.folder)


def open_study(folder: Path, *, method: str, key: str, ranges: Sequence[Range], higher_is_better: bool) -> Study:
    """Open or begin the study in `folder`. `key` is the hash of all that its trials' values depend on.

    Raises:
        FolderInUseError: the study there has another key.
        StorageError: the disk refuses, or the journal was changed by hand.
        RecipeError: Optuna is not installed.
    """
    library = optuna()
    journal = import_extra("optuna.storages.journal", extra="search")
    path = folder / JOURNAL
    with storage_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        _mend(path)
        storage = library.storages.JournalStorage(journal.JournalFileBackend(str(path)))
        direction = "maximize" if higher_is_better else "minimize"
        found = library.create_study(storage=storage, study_name=method, direction=direction, load_if_exists=True)
        before = found.user_attrs.get(_KEY)
        if before is None:
            found.set_user_attr(_KEY, key)
        elif before != key:
            raise FolderInUseError(
                f"{folder}: found a study of another recipe, other ranges or other data (hash {before[:16]}, now "
                f"{key[:16]}); expected the same to go on. Choose another output_dir, or remove that folder."
            )
    _note_digest(folder)
    study = Study(method, folder, tuple(ranges), found)
    study.settle()
    return study


def _trial(frozen: Any) -> Trial:
    return Trial(**frozen.user_attrs[_TRIAL])


def _mend(path: Path) -> None:
    """Cut off the line that a full disk or a killed driver left half-written, and free the lock of a dead one.

    The run folder is held, so no other driver lives.
    """
    for lock in path.parent.glob(f"{JOURNAL}.lock*"):
        lock.unlink()
    if not path.exists():
        _note_digest(path.parent)
        return
    content = path.read_bytes()
    _refuse_changed(path, content)
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            json.loads(line)
        except ValueError as error:
            raise _changed(f"{path}:{number}", "broken JSON") from error


def _refuse_changed(path: Path, content: bytes) -> None:
    """Refuse a journal that does not begin as it was when it was last written; what a crash left may stand behind."""
    digest = read_record(path.with_name(DIGEST), again="the same command")
    if hashlib.sha256(content[: digest["num_bytes"]]).hexdigest() != digest["sha256"]:
        raise _changed(str(path), f"content that differs from its hash in {DIGEST}")


def _changed(where: str, found: str) -> StorageError:
    return StorageError(
        f"{where}: found {found}; expected the journal as keeptune wrote it. Put it back from a copy, or remove it and "
        "give the same command again: it takes the results of finished trials from their folders."
    )


def _note_digest(folder: Path) -> None:
    path = folder / JOURNAL
    with storage_errors(path):
        content = path.read_bytes() if path.exists() else b""
    write_record(folder / DIGEST, {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
