"""Regular expressions that name a model's modules, in a recipe or an adapter's config: none may run without end."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from keeptune.errors import RecipeError
from keeptune.model import matching

# Of the processor's time. Python starts in a tenth of it; ordinary patterns take a hundredth for a thousand names.
_MOST_SECONDS = 1
_LONGEST = 10_000
# A dot stands for any character, which costs nothing.
_NAME = re.compile(r"[\w.-]*")
# PEFT matches a text as a whole, and the entries of a list as names.
_WHOLE = ("target_modules", "exclude_modules", "feedforward_modules")


@dataclass(frozen=True, slots=True)
class _Pattern:
    """A pattern as it is written under a key, and as PEFT matches it: with a whole name, or with its beginning."""

    key: str
    written: str
    matched: str
    whole: bool = False


def refuse_endless_patterns(arguments: Mapping[str, Any], model: nn.Module, *, prefix: str) -> None:
    """Accept arguments of a PEFT method whose patterns can be matched with the names of the model's modules.

    Costs the start of a process where there is a pattern, and nothing where there are names alone. `prefix` stands in
    messages before the argument's name.

    Raises:
        RecipeError: a pattern is none, or takes longer than a second.
    """
    asked = [pattern for pattern in _patterns(arguments) if not _NAME.fullmatch(pattern.written)]
    if not asked:
        return
    long = next((pattern for pattern in asked if len(pattern.written) > _LONGEST), None)
    if long is not None:
        raise RecipeError(
            f"{prefix}{long.key}: found a pattern of {len(long.written):,} characters; expected at most {_LONGEST:,}. "
            "Write the names of the modules as a list."
        )
    names = [name for name, _ in model.named_modules()]
    number, problem = _problem([(pattern.matched, pattern.whole) for pattern in asked], names)
    if problem:
        raise RecipeError(
            f"{prefix}{asked[number].key}: found the pattern {asked[number].written[:200]!r}, {problem}; expected one "
            "that is matched at once. Write the names of the modules as a list, or a simpler pattern."
        )


def _patterns(arguments: Mapping[str, Any]) -> Iterator[_Pattern]:
    """Yield what PEFT takes for a regular expression, as it builds it in."""
    for key, value in arguments.items():
        if key in _WHOLE and isinstance(value, str):
            yield _Pattern(key, value, value, whole=True)
        elif key == "layers_pattern":
            for written in _texts(value):
                yield _Pattern(key, written, rf"(?:^|.*?\.){written}\.(?P<idx>\d+)\.")
        elif key == "modules_to_save":
            for written in _texts(value):
                yield _Pattern(key, written, rf"(^|.*\.){written}($|\..*)")
        elif key.endswith("_pattern"):
            # The ranks, alphas or sizes of modules by pattern.
            for written in _texts(value):
                yield _Pattern(key, written, rf"(.*\.)?({written})$")


def _texts(value: object) -> list[str]:
    """Return a text, or those in a list or among the keys of a mapping."""
    if isinstance(value, str):
        return [value]
    return [text for text in value if isinstance(text, str)] if isinstance(value, Mapping | Sequence | set) else []


def _problem(patterns: Sequence[tuple[str, bool]], names: Sequence[str]) -> tuple[int, str]:
    """Return the number of the first pattern that cannot be matched with all names and why, "" if each can."""
    command = [sys.executable, "-I", str(matching.__file__)]
    asked = json.dumps({"patterns": patterns, "names": names, "seconds": _MOST_SECONDS})
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGXCPU:
        return _last(done.stdout), "which takes longer than a second on the names of this model's modules"
    if done.returncode == 0:
        return 0, ""
    reason = (done.stderr.strip().splitlines() or ["it cannot be read"])[-1]
    return _last(done.stdout), f"which is no regular expression ({reason})"


def _last(numbers: str) -> int:
    lines = numbers.split()
    return int(lines[-1]) if lines else 0
