"""The preset for a recipe without ranges: the results of a method's trials arrive, the next settings leave.

The order is that of what matters: the learning rate until its best is bracketed, then the number of epochs, replay of
what must not be forgotten, the adapter's rank, and the learning rate again around the best of these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keeptune.search.space import Range, few_digits
from keeptune.search.trials import Result, ranked

_RUNG = 3.0
# Of the first learning rate; the order is that of the trials.
_FIRST = (1.0, 1.0 / _RUNG, _RUNG)
_FINE = math.sqrt(_RUNG)
# Steps between learning rates that are told apart by a training of another seed no more.
_MOST_HALVINGS = 5
_REPLAY_FRACTION, _REPLAY_KL, _RANK_FACTOR = 0.05, 0.1, 4
_MOST_OUTWARD = 4
# Wide enough for whatever a ladder reaches.
_BOUNDS: dict[str, Range] = {
    "learning_rate": Range("", 1e-12, 1e3, log=True),
    "num_train_epochs": Range("", 1, 1_000_000),
    "replay_fraction": Range("", 0.0, 1.0),
    "replay_kl": Range("", 0.0, 1e6),
    "r": Range("", 1, 1_000_000),
    "lora_alpha": Range("", 1e-6, 1e9),
}


@dataclass(frozen=True, slots=True)
class Start:
    """Where a ladder begins: the settings of the recipe, by dotted key, and whether there are texts to replay."""

    settings: Mapping[str, Any]
    can_replay: bool

    def key(self, name: str) -> str | None:
        """Return the dotted key of a setting that the ladder changes; None where the method has none of this name."""
        return next((key for key in self.settings if key.endswith(f".{name}")), None)


def bounds(start: Start) -> tuple[Range, ...]:
    """Return a range, wide enough for whatever the ladder reaches, for each of its settings."""
    found = []
    for key in start.settings:
        wide = _BOUNDS[key.rpartition(".")[2]]
        found.append(Range(key, wide.low, wide.high, log=wide.log))
    return tuple(found)


def next_settings(
    start: Start, results: Sequence[Result], *, num_left: int, higher_is_better: bool
) -> list[dict[str, Any]]:
    """Return the settings of the next trials, `num_left` at most, none where there is nothing more to try.

    The same results give the same settings.
    """
    tried = [dict(result.trial.params) for result in results]
    for group in _groups(start, results, num_left=num_left, higher_is_better=higher_is_better):
        new = [settings for settings in group if settings not in tried]
        if new:
            return new[:num_left]
    return []


def _groups(
    start: Start, results: Sequence[Result], *, num_left: int, higher_is_better: bool
) -> Iterator[list[dict[str, Any]]]:
    """Yield what to try next, the most important first; what was tried stands among it."""
    first = dict(start.settings)
    rate = start.key("learning_rate")
    assert rate is not None
    yield [first | {rate: few_digits(first[rate] * factor)} for factor in _FIRST]
    order = ranked(results, higher_is_better=higher_is_better)
    if not order:
        # A learning rate that is too high makes losses that are not finite.
        yield [first | {rate: few_digits(first[rate] * _RUNG**-i)} for i in (2, 3)]
        return
    # Of a ladder only what differs in the learning rate alone can be compared along it.
    along = [r for r in order if _without(r.trial.params, rate) == _without(first, rate)]
    # With four trials in all the last one says what replay costs, once the best rate stands between two others.
    if num_left == 1 and start.can_replay and len(results) == len(_FIRST) and order[0].trial.number == 0:
        yield [_with_replay(start, dict(order[0].trial.params))]
    failed = [r for r in results if r.value is None]
    yield from _along_the_rate(along, failed, rate=rate)
    best = dict(order[0].trial.params)
    yield from _other_settings(start, best)
    for halvings in range(1, _MOST_HALVINGS + 1):
        factor = _RUNG**0.5**halvings
        yield [best | {rate: few_digits(best[rate] * f)} for f in (factor, 1.0 / factor)]


def _along_the_rate(along: Sequence[Result], failed: Sequence[Result], *, rate: str) -> Iterator[list[dict[str, Any]]]:
    """Yield learning rates: outward while the best is at an end, then halfway to its neighbours."""
    if not along:
        return
    best = dict(along[0].trial.params)
    rates = sorted(r.trial.params[rate] for r in along)
    if len({r.value for r in along}) == 1:
        # Nothing was learned at any of them, as where no answer is right yet: more is needed.
        best[rate] = rates[-1]
    too_high = min((r.trial.params[rate] for r in failed), default=math.inf)
    outward = 0
    if best[rate] == rates[-1] and best[rate] * _RUNG < too_high:
        outward = 1
    elif best[rate] == rates[0]:
        outward = -1
    if outward and len(along) <= len(_FIRST) + _MOST_OUTWARD:
        yield [best | {rate: few_digits(best[rate] * _RUNG ** (outward * i))} for i in (1, 2)]
    yield [best | {rate: few_digits(best[rate] * factor)} for factor in (_FINE, 1.0 / _FINE)]


def _other_settings(start: Start, best: Mapping[str, Any]) -> Iterator[list[dict[str, Any]]]:
    epochs, rank, alpha = start.key("num_train_epochs"), start.key("r"), start.key("lora_alpha")
    if epochs is not None:
        first = start.settings[epochs]
        yield [{**best, epochs: number} for number in (2 * first, max(1, first // 2))]
    if start.can_replay:
        yield [_with_replay(start, dict(best))]
    if rank is not None and alpha is not None:
        higher = _RANK_FACTOR * start.settings[rank]
        yield [{**best, rank: higher, alpha: _RANK_FACTOR * start.settings[alpha]}]
    if start.can_replay:
        yield [_with_replay(start, dict(best), kl=_REPLAY_KL)]


def _with_replay(start: Start, settings: dict[str, Any], *, kl: float = 0.0) -> dict[str, Any]:
    fraction, weight = start.key("replay_fraction"), start.key("replay_kl")
    assert fraction is not None and weight is not None
    return settings | {fraction: start.settings[fraction] or _REPLAY_FRACTION, weight: kl}


def _without(settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != key}
