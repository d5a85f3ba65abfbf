"""The one driver: studies of methods arrive; a pool of processes makes their trials; each one's end is written down.

The driver alone asks and tells. A trial is a process of its own in a folder of its own: a crash is a result.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from keeptune.errors import FolderInUseError, Interrupted, StorageError
from keeptune.search.study import Begun, Study
from keeptune.search.trials import Result, Trial

_POLL_SECONDS, _STOP_SECONDS = 0.05, 60.0
# The trial's process could not write; it was stopped and saved; another process held its folder.
_STORAGE, _STOPPED, _HELD = StorageError.exit_code, Interrupted.exit_code, FolderInUseError.exit_code
_KILLED_FROM = 128
# A process that is killed is started again from its checkpoints, so often: what needs too much memory is killed always.
_MOST_KILLS = 3
_LAST_LINES, _MOST_REASON = 4, 600


# What is to be made next, of the trials that were ever queued and the results so far, both by name; asked when each of
# the former has one of the latter.
Missing = Callable[[Mapping[str, Trial], Mapping[str, Result]], list[Trial]]


@dataclass(frozen=True, slots=True)
class Work:
    """How trials are made: `start` begins a process that writes what it says of faults to a log; `read` returns a
    trial's result once its folder holds one; `told` is called at each one's end, `again` where it was killed before."""

    start: Callable[[Study, Trial, Path], subprocess.Popen[bytes]]
    read: Callable[[Study, Trial], Result | None]
    told: Callable[[Study, Result], None]
    again: Callable[[Study, Trial], None]
    stop_requested: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class _Running:
    study: Study
    begun: Begun
    process: subprocess.Popen[bytes]
    log: Path


def run_trials(methods: Sequence[tuple[Study, Missing]], *, num_jobs: int, work: Work) -> None:
    """Make the trials of every method's study until none is missing, `num_jobs` at once.

    Raises:
        Interrupted: a stop was asked for; what is finished stands, and the rest goes on at the next start.
        StorageError: the disk refuses; what is finished stands.
    """
    running: list[_Running] = []
    kills: Counter[tuple[str, str]] = Counter()
    try:
        while True:
            _fill(methods, running, num_jobs=num_jobs, work=work)
            if not running:
                return
            ended = _wait(running, work=work)
            running.remove(ended)
            _let_go(ended.process)
            _end(ended, kills=kills, work=work)
    finally:
        _stop(running)


def _fill(methods: Sequence[tuple[Study, Missing]], running: list[_Running], *, num_jobs: int, work: Work) -> None:
    """Start as many trials as there is room for."""
    for study, missing in methods:
        while len(running) < num_jobs and (begun := _next(study, missing, running)):
            # Its driver may have died after the trial's end, before that was told.
            if (result := work.read(study, begun.trial)) is not None:
                _tell(study, begun, result, work=work)
                continue
            log = study.folder / f"{begun.trial.name}.log"
            running.append(_Running(study, begun, work.start(study, begun.trial, log), log))


def _next(study: Study, missing: Missing, running: Sequence[_Running]) -> Begun | None:
    """Begin a trial of this method; None where none is missing, or where the round has to end first."""
    begun = study.begin()
    if begun is not None or any(one.study is study for one in running):
        return begun
    study.queue(missing(study.trials(), study.results()))
    return study.begin()


def _wait(running: Sequence[_Running], *, work: Work) -> _Running:
    """Return the first process that is at its end."""
    while True:
        for one in running:
            if one.process.poll() is not None:
                return one
        if work.stop_requested():
            raise Interrupted(
                f"{running[0].study.folder.parent}: stopped on request; every finished trial stands. "
                "Give the same command again to go on, half-done trials included."
            )
        time.sleep(_POLL_SECONDS)


def _end(ended: _Running, *, kills: Counter[tuple[str, str]], work: Work) -> None:
    """Tell the result of a process, or queue its trial again where it was killed."""
    study, trial, code = ended.study, ended.begun.trial, ended.process.returncode
    result = work.read(study, trial) if code == 0 else None
    reason = "" if result is not None else _reason(ended.log, code)
    if code == _STORAGE:
        raise StorageError(reason.rpartition("keeptune: ")[2])
    if result is None and (code < 0 or code in (_HELD, _STOPPED) or code > _KILLED_FROM):
        kills[study.method, trial.name] += 1
        if kills[study.method, trial.name] < _MOST_KILLS:
            study.queue_again(ended.begun)
            work.again(study, trial)
            return
        reason = f"killed {_MOST_KILLS} times, as where there is too little memory. {reason}".strip()
    _tell(study, ended.begun, result or Result(trial, "failed", reason=reason), work=work)


def _tell(study: Study, begun: Begun, result: Result, *, work: Work) -> None:
    study.tell(begun, result)
    work.told(study, result)


def _reason(log: Path, code: int) -> str:
    """Return the last lines that a process said, or how it ended."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    said = "\n".join(lines[-_LAST_LINES:])[-_MOST_REASON:]
    return said or (f"ended by signal {-code}" if code < 0 else f"ended with exit code {code} and said nothing")


def _stop(running: Sequence[_Running]) -> None:
    """Let every process save and end; what does not is killed."""
    for one in running:
        one.process.terminate()
    for one in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            one.process.wait(timeout=_STOP_SECONDS)
        one.process.kill()
        _let_go(one.process)


def _let_go(process: subprocess.Popen[bytes]) -> None:
    """Close this end of the pipe by which a process knew that its driver lives."""
    process.wait()
    if process.stdin is not None:
        process.stdin.close()
