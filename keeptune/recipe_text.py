"""A recipe's text arrives; its sections as plain values leave, whatever they mean, and go back to text."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.error import MarkedYAMLError

from keeptune.data.lines import json_kind
from keeptune.errors import RecipeError

_MAX_RECIPE_BYTES = 1 << 18
# pydantic's kinds of problem, by the beginning of their names, in the words of a recipe.
_EXPECTED = {"int_": "a whole number", "float_": "a number", "bool_": "true or false", "string_type": "text"}
_EXPECTED |= {
    "tuple_type": "a list",
    "dict_type": "a section",
    "model_": "a section",
    "too_short": "at least one entry",
    "string_too_short": "text that is not empty",
}
# How alike two keys must be, from 0 to 1, for one to be proposed; those of the same section are preferred a little.
_LIKE_A_SIBLING, _LIKE_ANOTHER, _OWN_SECTION = 0.5, 0.75, 0.1
_YAML_FAULTS = (yaml.YAMLError, UnicodeDecodeError, RecursionError)
_YAML_WORDS = {"None": "null", "True": "true", "False": "false"}
_DATA_FILE = re.compile(r"\.(jsonl|ndjson|csv|parquet|gz)$", re.IGNORECASE)
_DATA_REMEDY = "Data are named in a recipe: `data: {tasks: [{path: ...}]}`."


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the sections that the file holds.

    Raises:
        RecipeError: it cannot be read, or is no YAML of `key: value` lines.
    """
    _refuse_what_is_no_recipe(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RecipeError(
            f"{path}: found no readable recipe ({error.strerror}); expected a YAML file. "
            "Check the path, or start from one of those in keeptune/recipes."
        ) from error
    if len(raw) > _MAX_RECIPE_BYTES:
        raise RecipeError(f"{path}: found {len(raw)} bytes; expected a recipe of at most 256 KiB. Name the right file.")
    try:
        value = yaml.load(raw.decode("utf-8-sig"), Loader=_RecipeLoader)
    except _YAML_FAULTS as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        detail = str(getattr(error, "problem", None) or error).replace(' in "<unicode string>",', " at")
        detail = " ".join(detail.split())[:300]
        raise RecipeError(f"{where}: found no valid YAML ({detail}); expected a recipe. Fix that place.") from error
    if not isinstance(value, dict):
        found = "an empty file" if value is None else json_kind(value)
        remedy = f" {_DATA_REMEDY}" if isinstance(value, list) else ""
        raise RecipeError(f"{path}: found {found}; expected `key: value` lines such as `model: ...`.{remedy}")
    return value


def _refuse_what_is_no_recipe(path: Path) -> None:
    """Refuse a folder, and a file whose name says that it holds data."""
    if path.is_dir():
        names = ", ".join(str(file) for file in sorted(path.glob("*.yaml")))
        remedy = f"Name one of those in it: {names}." if names else "No .yaml file is in it; check the path."
        raise RecipeError(f"{path}: found a folder; expected a recipe. {remedy}")
    if _DATA_FILE.search(path.name):
        raise RecipeError(f"{path}: found a file of data, by its name; expected a recipe (.yaml). {_DATA_REMEDY}")


def write_yaml(value: Mapping[str, Any]) -> str:
    """Return the sections as YAML, in their order."""
    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True, width=110)


class _RecipeLoader(yaml.SafeLoader):
    """YAML without aliases and duplicate keys, and with `1e-5` a number as in YAML 1.2."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, OverflowError) as error:
            # A date such as 2026-13-45, 0x_, thousands of digits.
            problem = f"{node.value!s:.40} is no valid {node.tag.rpartition(':')[2]}"
            raise MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise MarkedYAMLError(problem="aliases (*name) are not accepted", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise MarkedYAMLError(problem="a key that is no plain value", problem_mark=key_node.start_mark)
            if key in keys:
                raise MarkedYAMLError(problem=f"the key {key!r} stands twice", problem_mark=key_node.start_mark)
            keys.add(key)
        return super().construct_mapping(node, deep=deep)


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def apply_override(recipe: dict[str, Any], override: str) -> None:
    """Set one dotted key of `recipe`, a list's elements by their number; the value is read as YAML.

    Raises:
        RecipeError: the override is no `key=value`, or names a place that a recipe cannot have.
    """
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(
            f"--set {override!r}: found no `key=value`; expected for instance --set training.num_train_epochs=1."
        )
    try:
        value = yaml.load(text, Loader=_RecipeLoader)
    except _YAML_FAULTS as error:
        raise RecipeError(f"--set {override!r}: found no valid YAML after `=`; expected a value. Quote it.") from error
    place: Any = recipe
    for part in parts[:-1]:
        place = _step_into(place, part, override=override)
    if isinstance(place, list):
        place[_list_index(place, parts[-1], override=override)] = value
    else:
        place[parts[-1]] = value


def _step_into(place: Any, part: str, *, override: str) -> Any:
    if isinstance(place, list):
        return place[_list_index(place, part, override=override)]
    if place.get(part) is None:
        place[part] = {}
    if not isinstance(place[part], dict | list):
        raise RecipeError(f"--set {override!r}: found a plain value at {part!r}; expected a section that holds keys.")
    return place[part]


def _list_index(place: list[Any], part: str, *, override: str) -> int:
    if not part.isdecimal() or int(part) >= len(place):
        raise RecipeError(f"--set {override!r}: found {part!r}; expected a number from 0 to {len(place) - 1}.")
    return int(part)


def describe_problem(
    path: Path, problems: Sequence[Mapping[str, Any]], *, value: Any, keys: Mapping[str, Sequence[str]]
) -> str:
    """Return pydantic's problems with one place of a recipe in the form `where: found; expected. remedy.`

    `keys` are those of each section, which is written as `methods.*`, "" being the whole recipe.
    """
    problem = problems[0]
    key = existing_key(problem["loc"], value)
    where = f"{path}: {key}" if key else f"{path}"
    if problem["type"] == "extra_forbidden":
        *place, last = problem["loc"]
        section = _section(place, keys)
        near = _nearest(str(last), section=section, keys=keys)
        hint = f"Did you mean {near!r}?" if near else f"Known keys here: {', '.join(keys[section])}."
        return f"{where}: found an unknown key; expected one that keeptune knows. {hint}"
    if problem["type"] == "missing":
        missing = ".".join(map(str, problem["loc"]))
        return f"{path}: {missing}: found nothing; expected a value. Add this key."
    if problem["type"] == "value_error":
        message = problem["msg"].removeprefix("Value error, ")
        return f"{where}: {message}{'' if message.endswith(('?', '.')) else '.'}"
    given = problem["input"]
    found = json_kind(given) if isinstance(given, dict) else _YAML_WORDS.get(str(given), f"{given!r:.80}")
    words = [next((w for k, w in _EXPECTED.items() if p["type"].startswith(k)), p["msg"]) for p in problems]
    expected = " or ".join(dict.fromkeys(word.removeprefix("Input should be ") for word in words))
    return f"{where}: found {found}; expected {expected}. Fix this value."


def _section(place: Sequence[Any], keys: Mapping[str, Sequence[str]]) -> str:
    """Return the section that pydantic's place of a problem lies in."""
    names = {section.removesuffix(".*").rpartition(".")[2]: section for section in keys}
    return next((names[part] for part in reversed(place) if part in names), "")


def _nearest(key: str, *, section: str, keys: Mapping[str, Sequence[str]]) -> str | None:
    """Return the known key that is most like an unknown one: one of its own section, or by its full name another's."""
    alike: list[tuple[float, str]] = []
    for name, known in keys.items():
        for other in known:
            likeness = difflib.SequenceMatcher(None, key.lower(), other).ratio()
            if likeness >= (_LIKE_A_SIBLING if name == section else _LIKE_ANOTHER):
                is_own = name == section
                alike.append((likeness + (_OWN_SECTION if is_own else 0.0), other if is_own else f"{name}.{other}"))
    return max(alike, default=(0.0, None))[1]


def existing_key(location: Sequence[Any], value: Any) -> str:
    """Return the dotted part of `location` that the recipe holds; pydantic puts names of union members into it."""
    kept: list[str] = []
    for part in location:
        in_list = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if not in_list and not (isinstance(value, dict) and part in value):
            if isinstance(value, dict | list):
                continue
            break
        value = value[part]
        kept.append(str(part))
    return ".".join(kept)
