"""Searches whose trials are not trained: a process that writes a number into a file, as fast as it starts."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from keeptune.errors import Interrupted
from keeptune.search.driver import Work, run_trials
from keeptune.search.rounds import Search, missing
from keeptune.search.space import Range
from keeptune.search.study import Study, open_study
from keeptune.search.trials import Result, Trial

RANGES = (
    Range("methods.full.learning_rate", 1e-5, 1e-2, log=True),
    Range("methods.full.l2_base", choices=("0", "0.1", "0.5")),
)


def value_of(trial: Trial) -> float:
    """Return what a trial comes to."""
    rate, pull = trial.params["methods.full.learning_rate"], trial.params["methods.full.l2_base"]
    return abs(rate - 1e-3) + 1e-3 * pull + 1e-5 * trial.repeat + 1e-4 * (1 - trial.share)


@dataclass
class Machine:
    """What makes trials in `folder`; `codes` says how processes of a trial end, one after the other, else 0."""

    folder: Path
    codes: Mapping[str, list[int]] = field(default_factory=dict)
    said: str = ""
    stop_after: int | None = None
    started: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    again: list[str] = field(default_factory=list)
    drift: Callable[[Trial], float] | None = None

    def study(self, *, key: str = "k" * 64) -> Study:
        return open_study(self.folder, method="full", key=key, ranges=RANGES, higher_is_better=False)

    def run(self, search: Search) -> dict[str, Any]:
        """Make the trials; return (settings, value) by name, the value None of those that failed."""
        study = self.study()
        work = Work(
            self._start,
            self._read,
            told=lambda _, result: self.told.append(result.trial.name),
            again=lambda _, trial: self.again.append(trial.name),
            stop_requested=self._stop,
        )
        run_trials([(study, partial(missing, search))], num_jobs=search.num_jobs, work=work)
        return finished(study)

    def run_until_stopped(self, search: Search, *, after: int) -> None:
        """Make trials until `after` of them are started, then stop."""
        self.stop_after = len(self.started) + after
        try:
            self.run(search)
        except Interrupted:
            return
        finally:
            self.stop_after = None

    def _start(self, study: Study, trial: Trial, log: Path) -> subprocess.Popen[bytes]:
        self.started.append(trial.name)
        codes = self.codes.get(trial.name, [])
        code = codes.pop(0) if codes else 0
        if code == 0 and (self.stop_after is None or len(self.started) < self.stop_after):
            drift = None if self.drift is None else self.drift(trial)
            (study.folder / f"{trial.name}.json").write_text(json.dumps({"value": value_of(trial), "drift": drift}))
        log.write_text(self.said)
        return cast("subprocess.Popen[bytes]", _Ended(code, stuck=self._stop()))

    def _stop(self) -> bool:
        return self.stop_after is not None and len(self.started) >= self.stop_after

    def _read(self, study: Study, trial: Trial) -> Result | None:
        path = study.folder / f"{trial.name}.json"
        return Result(trial, "finished", **json.loads(path.read_text())) if path.is_file() else None


@dataclass
class _Ended:
    """A process that came to its end at once, or one that waits to be stopped."""

    returncode: int
    stuck: bool = False
    stdin: None = None

    def poll(self) -> int | None:
        return None if self.stuck else self.returncode

    def terminate(self) -> None: ...

    def kill(self) -> None: ...

    def wait(self, timeout: float | None = None) -> int:
        return self.returncode


def finished(study: Study) -> dict[str, Any]:
    """Return (settings, value) of every trial that is at its end, by name."""
    found = study.results().items()
    return {name: (dict(result.trial.params), result.value) for name, result in sorted(found)}


def search(*, num_trials: int = 6, num_jobs: int = 2, halving: bool = False, seed: int = 0) -> Search:
    """Return a search by ranges."""
    return Search(RANGES, None, num_trials, num_jobs, seed, False, halving=halving)
