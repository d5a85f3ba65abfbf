"""A recipe with ranges arrives as plain sections; the ranges of each method, and plain recipes, leave.

A range is `{low, high}` with `log: true` or a `step`, `{choices: [...]}`, or `auto` where a method's setting has a
sensible range of its own.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keeptune.errors import RecipeError, raise_collected

_KEYS = ("low", "high", "log", "step", "choices")
_OPEN_SECTIONS = ("methods", "training")
_LOW_RANK = ("LORA", "ADALORA", "LOHA", "LOKR", "OFT", "BOFT", "OSF")
# Peak learning rates: full fine-tuning, low-rank methods at ten times it, and prompt tuning, which wants 0.3 in its
# paper and more in the lab (docs/methods.md). All others train few numbers, at high rates.
_RATES = {"FULL": (1e-5, 1e-3), **dict.fromkeys(_LOW_RANK, (1e-4, 1e-2)), "PROMPT_TUNING": (1e-3, 1.0)}
_RATES_OF_FEW = (1e-4, 1e-1)
_AUTO: dict[str, tuple[Any, ...]] = {
    "r": (8, 16, 32, 64),
    "replay_fraction": (0.0, 0.01, 0.05, 0.1, 0.25),
    "replay_kl": (0.0, 0.03, 0.1, 0.3),
    "num_virtual_tokens": (8, 20, 50),
    "num_train_epochs": (1, 2, 3),
}
_AUTO_OF_TRAINING = frozenset({"num_train_epochs"})


@dataclass(frozen=True, slots=True)
class Range:
    """What one setting may be: numbers in [low, high], whole ones where both ends are, or one of `choices`.

    `key` is the setting's dotted place in the recipe. Choices are JSON texts, since a choice may be a list.
    """

    key: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The setting's own name."""
        return self.key.rpartition(".")[2]

    def ends(self) -> tuple[Any, Any]:
        """Return the smallest and the largest value; of choices that are no numbers the first and the last."""
        if not self.choices:
            return self.low, self.high
        values = [json.loads(choice) for choice in self.choices]
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        return (min(values), max(values)) if numbers else (values[0], values[-1])


@dataclass(frozen=True, slots=True)
class Plan:
    """A recipe with its ranges apart: `recipe` holds the largest value in place of each."""

    recipe: Mapping[str, Any]
    ranges: tuple[Range, ...]

    def of(self, method: str) -> tuple[Range, ...]:
        """Return the ranges that a method's trials choose from: its own, and those of the training."""
        return tuple(r for r in self.ranges if _parts(r.key)[:-1] in (["training"], ["methods", method]))

    def corners(self) -> Iterator[dict[str, Any]]:
        """Yield plain recipes that hold every end and every choice of the ranges at least once."""
        for end in (0, 1):
            yield with_values(self.recipe, {r.key: r.ends()[end] for r in self.ranges})
        for i in range(max((len(r.choices) for r in self.ranges), default=0)):
            chosen = {r.key: json.loads(r.choices[i % len(r.choices)]) for r in self.ranges if r.choices}
            yield with_values(self.recipe, chosen)


def range_keys(recipe: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys, in the sections where a search may choose, at which a range stands."""
    return [key for key, value in _settings(recipe) if _is_range(value) or _is_auto(key, value)]


def with_values(recipe: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the recipe with settings by dotted key; `replay_kl` goes where there is no replay for it."""
    filled = copy.deepcopy(dict(recipe))
    for key, value in values.items():
        *sections, name = _parts(key)
        place = filled
        for section in sections:
            place[section] = place.get(section) or {}
            place = place[section]
        place[name] = value
    methods = filled.get("methods")
    for method in methods.values() if isinstance(methods, dict) else ():
        if isinstance(method, dict) and not method.get("replay_fraction"):
            method.pop("replay_kl", None)
    return filled


def plan_search(recipe: Mapping[str, Any], *, where: str, is_fractional: Callable[[str], bool]) -> Plan:
    """Return the recipe with its ranges apart; `is_fractional` tells which settings may lie between whole numbers.

    Raises:
        RecipeError: ranges that are empty or mistyped, and ranges where nothing can be searched; all of them at once.
    """
    problems: list[str] = []
    found: list[Range] = []
    for key, value in _settings(recipe):
        if _is_range(value):
            faults = _faults(value)
            problems += [f"{where}: {key}: {fault}" for fault in faults]
            found += [] if faults else [_range(key, value, fractional=is_fractional(key))]
        elif value == "auto" and key.startswith("methods."):
            auto = _auto_range(key, recipe)
            problems += [] if auto else [f"{where}: {key}: {_no_auto()}"]
            found += [auto] if auto else []
        elif _is_auto(key, value):
            found.append(Range(key, choices=_json(_AUTO[key.rpartition(".")[2]])))
    problems += [f"{where}: {key}: {_fixed()}" for key in _ranges_elsewhere(recipe)]
    if problems:
        raise_collected(RecipeError, problems)
    return Plan(with_values(recipe, {r.key: r.ends()[1] for r in found}), tuple(found))


def few_digits(value: float) -> float:
    """Return a number rounded to three digits: more tell nothing of a training, and are hard to read."""
    return float(f"{value:.3g}")


def _settings(recipe: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what stands in the sections where a search may choose, by dotted key."""
    methods, training = recipe.get("methods"), recipe.get("training")
    for name, method in methods.items() if isinstance(methods, dict) else ():
        for key, value in method.items() if isinstance(method, dict) else ():
            yield f"methods.{name}.{key}", value
    for key, value in training.items() if isinstance(training, dict) else ():
        yield f"training.{key}", value


def _parts(key: str) -> list[str]:
    """Return the sections of a dotted key; a method's name may hold dots of its own."""
    section, _, rest = key.partition(".")
    if section != "methods":
        return key.split(".")
    method, _, name = rest.rpartition(".")
    return [section, method, name]


def _is_range(value: Any) -> bool:
    return isinstance(value, dict) and bool({"low", "high", "choices"} & value.keys())


def _is_auto(key: str, value: Any) -> bool:
    name = key.rpartition(".")[2]
    known = _AUTO_OF_TRAINING if key.startswith("training.") else {"learning_rate", *_AUTO} - _AUTO_OF_TRAINING
    return value == "auto" and name in known


def _ranges_elsewhere(value: Any, key: str = "") -> Iterator[str]:
    """Yield the keys outside of methods and training at which a range stands."""
    if _is_range(value):
        yield key
        return
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in inner:
        if key or name not in _OPEN_SECTIONS:
            yield from _ranges_elsewhere(part, f"{key}.{name}" if key else str(name))


def _faults(value: Mapping[str, Any]) -> list[str]:
    unknown = [key for key in value if key not in _KEYS]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), _KEYS, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "Remove it."
        return [f"found {unknown[0]!r} in a range; expected low and high with log or step, or choices. {hint}"]
    if "choices" in value:
        return _faults_of_choices(value)
    missing = [key for key in ("low", "high") if key not in value]
    if missing:
        return [f"found a range without {missing[0]}; expected low and high, or choices. Add it."]
    ends = value["low"], value["high"]
    if not all(_is_number(end) for end in ends):
        return [f"found a range from {ends[0]!r} to {ends[1]!r}; expected numbers. Fix them, or use choices."]
    if ends[0] >= ends[1]:
        return [f"found a range from {ends[0]} to {ends[1]}, which is empty; expected low < high. Fix the range."]
    return _faults_of_scale(value)


def _faults_of_choices(value: Mapping[str, Any]) -> list[str]:
    choices = value["choices"]
    if len(value) > 1:
        other = next(key for key in value if key != "choices")
        return [f"found choices and {other} in one range; expected choices alone. Remove one of them."]
    if not isinstance(choices, list) or not choices:
        return [f"found choices: {json.dumps(choices)}; expected a list with entries. List what may be chosen."]
    texts = _json(choices)
    twice = next((text for i, text in enumerate(texts) if text in texts[:i]), None)
    return [] if twice is None else [f"found the choice {twice} twice; expected each once. Remove one of them."]


def _faults_of_scale(value: Mapping[str, Any]) -> list[str]:
    log, step = value.get("log", False), value.get("step")
    if not isinstance(log, bool):
        return [f"found log: {log!r}; expected true or false. Fix it."]
    if log and value["low"] <= 0:
        return [f"found log: true with low: {value['low']}; expected low > 0, which has a logarithm. Raise low."]
    if step is None:
        return []
    if log:
        return ["found log and step in one range; expected one of them. Remove the other."]
    if not _is_number(step) or not 0 < step <= value["high"] - value["low"]:
        return [f"found step: {step!r}; expected a number above 0 that fits between low and high. Fix it."]
    return []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _range(key: str, value: Mapping[str, Any], *, fractional: bool) -> Range:
    if "choices" in value:
        return Range(key, choices=_json(value["choices"]))
    low, high, step = value["low"], value["high"], value.get("step")
    if fractional or not all(isinstance(number, int) for number in (low, high, step or 1)):
        low, high, step = float(low), float(high), None if step is None else float(step)
    if step is not None:
        # The last step inside the range.
        high = low + math.floor((high - low) / step + 1e-9) * step
    return Range(key, low, high, log=value.get("log", False), step=step)


def _auto_range(key: str, recipe: Mapping[str, Any]) -> Range | None:
    _, method, name = _parts(key)
    if name == "learning_rate":
        peft_type = str(recipe["methods"][method].get("peft_type") or "full").upper()
        return Range(key, *_RATES.get(peft_type, _RATES_OF_FEW), log=True)
    return Range(key, choices=_json(_AUTO[name])) if _is_auto(key, "auto") else None


def _json(values: Sequence[Any]) -> tuple[str, ...]:
    return tuple(json.dumps(value, sort_keys=True) for value in values)


def _no_auto() -> str:
    known = ", ".join(("learning_rate", *sorted(_AUTO.keys() - _AUTO_OF_TRAINING)))
    return f"found auto; expected it for {known} alone. Write a range, such as {{choices: [...]}}."


def _fixed() -> str:
    return (
        "found a range; expected a value, since the data, the splits and what is measured are the same in every "
        "trial. Ranges are for methods and training."
    )
