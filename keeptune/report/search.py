"""`search.json` arrives; the trials of each method, the best first, and what they come to in sentences, leave."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keeptune.progress import noun
from keeptune.report.reading import RunFolder, finite, mapping, rows, string, strings, whole
from keeptune.report.wording import MISSING

SEARCH = "search/search.json"


@dataclass(frozen=True, slots=True)
class TrialRow:
    """One trial; `params` by the settings' own names. `excess`: the worst suite's over its budget, as a share of it."""

    name: str
    number: int
    params: Mapping[str, Any]
    repeat: int
    share: float
    value: float | None
    drift: float | None
    excess: float | None
    seconds: float | None
    reason: str
    chosen: bool
    on_front: bool = False

    @property
    def kept(self) -> bool | None:
        """Whether every budget was, on the probe; None without a budget."""
        return None if self.excess is None else self.excess <= 0.0

    @property
    def remark(self) -> str:
        """What is special about the trial, in words."""
        if self.reason:
            return f"failed: {self.reason.splitlines()[-1]}"
        parts = ["best"] if self.chosen else []
        parts += ["none is better in value and drift"] if self.on_front else []
        parts += ["above the budget"] if self.kept is False else []
        parts += [f"on {self.share:.0%} of train"] if self.share < 1.0 else []
        parts += [f"again with seed + {self.repeat}"] if self.repeat else []
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class SearchedMethod:
    """A method's trials, the best first; `importance` holds (setting, share of the differences), the largest first."""

    name: str
    settings: tuple[str, ...]
    trials: tuple[TrialRow, ...]
    importance: tuple[tuple[str, float], ...]
    sentence: str

    @property
    def varied(self) -> tuple[str, ...]:
        """The settings that are not the same in all trials."""
        return tuple(s for s in self.settings if len({str(t.params.get(s)) for t in self.trials}) > 1)


@dataclass(frozen=True, slots=True)
class Searched:
    """A search: what was chosen by, and each method's trials."""

    metric: str
    higher_is_better: bool
    methods: tuple[SearchedMethod, ...]
    sentences: tuple[str, ...]

    @property
    def headline(self) -> str:
        """The sentence on all methods, or that on the one."""
        return next(iter(self.sentences[len(self.methods) :] or self.sentences), "No trial yet.")


def read_search(folder: RunFolder, *, name: str = SEARCH) -> Searched | None:
    """Return the search in a folder; None where there was none."""
    value = folder.object(name, expected=False)
    metric = string(value.get("metric"))
    if metric is None:
        return None
    higher = value.get("higher_is_better") is True
    methods = tuple(
        _method(name, mapping(found), metric=metric, higher=higher)
        for name, found in mapping(value.get("methods")).items()
    )
    return Searched(metric, higher, methods, tuple(_sentences(value, methods, metric=metric)))


def setting(value: Any) -> str:
    """Return a setting's value in few digits."""
    if value is None:
        return MISSING
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _method(name: str, value: Mapping[str, Any], *, metric: str, higher: bool) -> SearchedMethod:
    winner = mapping(value.get("winner"))
    contenders = rows(winner.get("contenders"))
    chosen = contenders[0].get("name") if contenders else None
    unbeaten = strings(value.get("front"))
    trials = [_trial(row, chosen=chosen, on_front=row.get("name") in unbeaten) for row in rows(value.get("trials"))]
    sign = -1.0 if higher else 1.0

    def order(trial: TrialRow) -> tuple[bool, float, float, float]:
        worth = math.inf if trial.value is None else sign * trial.value
        return trial.value is None, max(0.0, trial.excess or 0.0), -trial.share, worth

    settings = tuple(dict.fromkeys(name for trial in trials for name in trial.params))
    importance = [(_own(k), v) for k, v in mapping(value.get("importance")).items() if finite(v) is not None]
    return SearchedMethod(
        name,
        settings,
        tuple(sorted(trials, key=order)),
        tuple(sorted(importance, key=lambda pair: -pair[1])),
        _winner_sentence(name, winner, trials, metric=metric),
    )


def _trial(row: Mapping[str, Any], *, chosen: Any, on_front: bool) -> TrialRow:
    return TrialRow(
        name=string(row.get("name")) or MISSING,
        number=whole(row.get("number")) or 0,
        params={_own(key): value for key, value in mapping(row.get("params")).items()},
        repeat=whole(row.get("repeat")) or 0,
        share=finite(row.get("share")) or 1.0,
        value=finite(row.get("value")),
        drift=finite(row.get("drift")),
        excess=finite(row.get("excess")),
        seconds=finite(row.get("seconds")),
        reason=string(row.get("reason")) or "",
        chosen=row.get("name") == chosen,
        on_front=on_front,
    )


def _own(key: str) -> str:
    """Return a setting's own name, from its dotted key."""
    return key.rpartition(".")[2]


def _winner_sentence(name: str, winner: Mapping[str, Any], trials: Sequence[TrialRow], *, metric: str) -> str:
    """Return which trial is chosen, and whether it is better than the next by more than chance and seeds make."""
    contenders, num_trials = rows(winner.get("contenders")), len({trial.number for trial in trials})
    tried = f"{num_trials} {noun(num_trials, 'trials')}"
    if trials and all(trial.value is None for trial in trials):
        return f"{name}: {tried} and none that came to its end."
    if not contenders:
        return f"{name}: {tried} so far."
    best = contenders[0]
    settings = ", ".join(f"{_own(k)} {setting(v)}" for k, v in mapping(best.get("params")).items())
    kept = ""
    if best.get("feasible") is False:
        kept = " No trial kept the budgets; it comes nearest."
        if any(trial.kept for trial in trials):
            kept = " In the mean over its seeds it loses more than a budget allows."
    said = f"{name}: of {tried}, {best.get('name')} is chosen ({settings})."
    difference, threshold = finite(winner.get("difference")), finite(winner.get("threshold"))
    if len(contenders) < 2 or difference is None or threshold is None:
        return said + kept
    other = contenders[1]
    means = " and ".join(f"{finite(c.get('mean')) or 0.0:.4g}" for c in (best, other))
    seeds = min(len(c.get("values", ())) for c in (best, other))
    held = f" Over {seeds} {noun(seeds, 'seeds')} it and {other.get('name')} have a mean {metric} of {means}:"
    if winner.get("is_real"):
        return (
            f"{said}{held} the difference of {abs(difference):.3g} is real, above the {threshold:.3g} of chance.{kept}"
        )
    return (
        f"{said}{held} {abs(difference):.3g} apart, no more than records or seeds make by chance ({threshold:.3g}): "
        f"either will do.{kept}"
    )


def _sentences(value: Mapping[str, Any], methods: Sequence[SearchedMethod], *, metric: str) -> list[str]:
    found = [method.sentence for method in methods]
    best, together = string(value.get("best")), strings(value.get("together"))
    if best is not None and len(methods) > 1:
        found.append(f"The best method by {metric} on validation is {best}.")
    chosen = [method.name for method in methods if any(trial.chosen for trial in method.trials)]
    if left := [name for name in chosen if together and name not in together]:
        found.append(
            f"best.yaml holds {' and '.join(together)}; {' and '.join(left)} did best with other settings of the "
            f"training, which a recipe has one of: see {', '.join(f'search/{name}/best.yaml' for name in left)}."
        )
    return found
