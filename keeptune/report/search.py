"""`search.json` arrives; the trials of each method, the best first, and what they come to in sentences, leave."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import fmean
from typing import Any

from keeptune.progress import noun
from keeptune.report.reading import RunFolder, finite, mapping, rows, string, strings, whole
from keeptune.report.wording import MISSING, metric_label

SEARCH = "search/search.json"
# Nearer to an end of its range than this, as a share of it, the best may lie beyond.
_NEAR_END = 0.05


@dataclass(frozen=True, slots=True)
class TrialRow:
    """One trial; `params` by the settings' own names. `excess`: the worst suite's over its budget, as a share of it.

    `num_seeds`: the values are means over so many trials. `label` is what a table calls it.
    """

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
    num_seeds: int = 1
    label: str = ""

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
        parts += [f"mean of {self.num_seeds} seeds"] if self.num_seeds > 1 else []
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class SearchedMethod:
    """A method's trials, the best first, each with its repeats behind it.

    `importance` holds (setting, share of the differences), the largest first; `ends` the ends of each setting's range,
    where it has some; `by_logarithm` the settings that have a logarithmic one.
    """

    name: str
    settings: tuple[str, ...]
    trials: tuple[TrialRow, ...]
    importance: tuple[tuple[str, float], ...]
    sentence: str
    ends: Mapping[str, tuple[float, float]]

    @property
    def table(self) -> tuple[TrialRow, ...]:
        """A row for each setting, the mean over its seeds where it was repeated, and then one for each seed."""
        groups = groupby(self.trials, key=lambda trial: (trial.number, trial.share))
        return tuple(row for _, group in groups for row in _group_rows(list(group)))

    @property
    def is_decided(self) -> bool:
        """Whether a trial is chosen."""
        return any(trial.chosen for trial in self.trials)

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
    context: Context
    was_repeated: bool
    headline: str


@dataclass(frozen=True, slots=True)
class Context:
    """Where trials come from: what a page of its own says of the model, the data and the commands."""

    model: str | None
    tasks: tuple[str, ...]
    num_train: int | None
    num_validation: int | None
    output_dir: str | None
    command: str | None


def read_context(value: Mapping[str, Any]) -> Context:
    """Return what `search.json` or `curve.json` says of it."""
    return Context(
        model=string(value.get("model")),
        tasks=strings(value.get("tasks")),
        num_train=whole(value.get("num_train_records")),
        num_validation=whole(value.get("num_validation_records")),
        output_dir=string(value.get("output_dir")),
        command=string(value.get("command")),
    )


def read_search(folder: RunFolder, *, name: str = SEARCH) -> Searched | None:
    """Return the search in a folder; None where there was none."""
    value = folder.object(name, expected=False)
    metric = string(value.get("metric"))
    if metric is None:
        return None
    higher = value.get("higher_is_better") is True
    drift = value.get("against_drift") is True
    methods = tuple(
        _method(name, mapping(found), metric=metric, higher=higher, drift=drift)
        for name, found in mapping(value.get("methods")).items()
    )
    repeated = any(trial.repeat for method in methods for trial in method.trials)
    sentences = tuple(_sentences(value, methods, metric=metric))
    headline = _headline(value, methods, metric=metric)
    return Searched(metric, higher, methods, sentences, read_context(value), repeated, headline)


def setting(value: Any) -> str:
    """Return a setting's value in few digits."""
    if value is None:
        return MISSING
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _method(name: str, value: Mapping[str, Any], *, metric: str, higher: bool, drift: bool) -> SearchedMethod:
    winner = mapping(value.get("winner"))
    contenders = rows(winner.get("contenders"))
    chosen = contenders[0].get("name") if contenders else None
    unbeaten = strings(value.get("front"))
    trials = [_trial(row, chosen=chosen, on_front=row.get("name") in unbeaten) for row in rows(value.get("trials"))]
    sign = -1.0 if higher else 1.0
    first = {(trial.number, trial.share): trial for trial in trials if not trial.repeat}
    best = [contender.get("name") for contender in contenders]

    def order(trial: TrialRow) -> tuple[Any, ...]:
        # A repeat stands behind the trial that it repeats; the two that were repeated before all, the chosen one first.
        of = first.get((trial.number, trial.share), trial)
        worth = math.inf if of.value is None else sign * of.value
        place = best.index(of.name) if of.name in best else len(best)
        return place, of.value is None, max(0.0, of.excess or 0.0), -of.share, worth, of.number, trial.repeat

    ranges = {_own(string(r.get("key")) or ""): r for r in rows(value.get("ranges")) if not r.get("choices")}
    found = {key: (finite(r.get("low")), finite(r.get("high"))) for key, r in ranges.items()}
    ends = {key: (low, high) for key, (low, high) in found.items() if low is not None and high is not None}
    chosen_params = mapping(contenders[0].get("params")) if contenders else {}
    parts = [
        _winner_sentence(name, winner, trials, metric=metric),
        *_end_sentences(chosen_params, ranges, ends),
        *_drift_sentence(trials, asked=drift),
    ]
    settings = tuple(dict.fromkeys(name for trial in trials for name in trial.params))
    importance = [(_own(k), v) for k, v in mapping(value.get("importance")).items() if finite(v) is not None]
    return SearchedMethod(
        name,
        settings,
        tuple(sorted(trials, key=order)),
        tuple(sorted(importance, key=lambda pair: -pair[1])),
        " ".join(parts),
        ends,
    )


def _group_rows(group: Sequence[TrialRow]) -> Iterator[TrialRow]:
    """Yield the row of a setting and, where it was repeated, one for each of its seeds."""
    first = group[0]
    label = first.name.removeprefix("trial-")
    finished = [trial for trial in group if trial.value is not None]
    if len(group) == 1 or not finished:
        yield replace(first, label=label)
        return
    means = {
        key: fmean(known) if (known := [v for t in finished if (v := getattr(t, key)) is not None]) else None
        for key in ("value", "drift", "excess", "seconds")
    }
    yield replace(first, label=label, num_seeds=len(finished), **means)
    for trial in group:
        seed = f"seed+{trial.repeat}" if trial.repeat else "seed"
        yield replace(trial, label=f"  {seed}", params={}, chosen=False, on_front=False)


def _end_sentences(
    params: Mapping[str, Any], ranges: Mapping[str, Mapping[str, Any]], ends: Mapping[str, tuple[float, float]]
) -> Iterator[str]:
    """Yield which of the chosen settings lie at an end of their range, so that the best may lie beyond it."""
    for key, value in params.items():
        low, high = ends.get(_own(key), (0.0, 0.0))
        number = finite(value)
        if number is None or high <= low:
            continue
        scale = math.log if ranges[_own(key)].get("log") is True and low > 0.0 else float
        place = (scale(number) - scale(low)) / (scale(high) - scale(low))
        # At 0 a fraction or a weight has nothing beyond it.
        end = "upper" if place >= 1.0 - _NEAR_END else "lower" if place <= _NEAR_END and low > 0.0 else None
        if end is not None:
            yield (
                f"Its {_own(key)} stands at the {end} end of its range ({setting(low)} to {setting(high)}): "
                "the best may lie beyond it."
            )


def _drift_sentence(trials: Sequence[TrialRow], *, asked: bool) -> Iterator[str]:
    halved = [trial for trial in trials if trial.share < 1.0]
    known = [trial for trial in (halved or trials) if trial.drift is not None]
    if (halved or asked) and not known and any(trial.value is not None for trial in trials):
        which, dropped = ("short training was", " what was dropped") if halved else ("training was", "")
        why = f"no {which} long enough for it, or no texts are set"
        yield f"No drift was measured ({why}): the value alone decided{dropped}."


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
    kept = ""
    if best.get("feasible") is False:
        kept = " No trial kept the budgets; it comes nearest."
        if any(trial.kept for trial in trials):
            kept = " In the mean over its seeds it loses more than a budget allows."
    said = f"{name}: of {tried}, {best.get('name')} is chosen ({_settings(best)})."
    if "gain" not in winner:
        # A search from before its doubt was told so.
        return said + kept
    if len(contenders) < 2:
        return f"{said} It was not tried again with further seeds, since no other came to its end on all records.{kept}"
    return f"{said} {_against(winner, str(contenders[1].get('name')), metric=metric)}{kept}"


def _settings(contender: Mapping[str, Any]) -> str:
    return ", ".join(f"{_own(key)} {setting(value)}" for key, value in mapping(contender.get("params")).items())


def _headline(value: Mapping[str, Any], methods: Sequence[SearchedMethod], *, metric: str) -> str:
    """Return the best method and how sure that is, or what is chosen of the one method there is."""
    best, between = string(value.get("best")), mapping(value.get("between"))
    if best is None or len(methods) < 2:
        of = next(iter(mapping(value.get("methods")).values()), None)
        chosen = rows(mapping(mapping(of).get("winner")).get("contenders"))[:1]
        found = f"{methods[0].name} is best with {_settings(chosen[0])}." if chosen else None
        return found or next((method.sentence for method in methods), "No trial yet.")
    other = next((name for name in strings(between.get("methods")) if name != best), None)
    label = metric_label(metric)
    if other is not None and between.get("is_likely") is True:
        return f"{best} is likely better than {other} by {label} on validation."
    if other is not None and between.get("is_likely") is False:
        return f"{best} comes first by {label} on validation; {other} is within what chance makes."
    return f"The best method by {label} on validation is {best}."


def _against(winner: Mapping[str, Any], other: str, *, metric: str) -> str:
    """Return whether the first contender is better than the second, called `other`, by their further seeds alone."""
    pair = rows(winner.get("contenders"))[:2]
    if len(pair) < 2:
        return ""
    best, second = pair
    gain, low, high = (finite(winner.get(key)) for key in ("gain", "low", "high"))
    if best.get("feasible") is not False and second.get("feasible") is False:
        return f"The next, {other}, loses more than a budget allows."
    if gain is None or low is None or high is None:
        return f"Too few trainings with further seeds came to their end to tell it from {other}."
    places = _places(high - low)
    means = [fmean(known) if (known := _numbers(c.get("fresh"))) else math.nan for c in (best, second)]
    numbers = max(len(_numbers(c.get("fresh"))) for c in (best, second))
    interval = f"95 % interval {low:+.{places}f} to {high:+.{places}f}"
    said = (
        f"With {numbers} further {noun(numbers, 'seeds')} it has a mean {metric} of {means[0]:.{places}f}, {other} of "
        f"{means[1]:.{places}f}:"
    )
    if best.get("feasible") is False:
        return f"{said} the first is nearer to the budgets."
    if winner.get("is_likely"):
        return f"{said} likely better, by {gain:.{places}f} ({interval})."
    return f"{said} {abs(gain):.{places}f} apart ({interval} for the first), as chance makes too: either will do."


def _numbers(value: Any) -> list[float]:
    return [number for part in value if (number := finite(part)) is not None] if isinstance(value, list) else []


def _places(width: float) -> int:
    """Return decimals for two digits of an interval's half width."""
    return min(6, max(3, 1 - math.floor(math.log10(width / 2.0)))) if width > 0.0 else 3


def _sentences(value: Mapping[str, Any], methods: Sequence[SearchedMethod], *, metric: str) -> list[str]:
    found = [method.sentence for method in methods]
    best, together = string(value.get("best")), strings(value.get("together"))
    if best is not None and len(methods) > 1:
        between = mapping(value.get("between"))
        other = next((name for name in strings(between.get("methods")) if name != best), None)
        against = _against(between, other, metric=metric) if other else ""
        found.append(f"The best method by {metric} on validation is {best}. {against}".strip())
    chosen = [method.name for method in methods if any(trial.chosen for trial in method.trials)]
    if left := [name for name in chosen if together and name not in together]:
        found.append(
            f"best.yaml holds {' and '.join(together)}; {' and '.join(left)} did best with other settings of the "
            f"training, which a recipe has one of: see {', '.join(f'search/{name}/best.yaml' for name in left)}."
        )
    return found
