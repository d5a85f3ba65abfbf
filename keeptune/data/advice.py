"""Advise on a row of no known format: name the setting or the change that makes records of such rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from keeptune.data.columns import is_id, is_label

# Well-known pairs, for the `columns:` line that a message proposes.
_KNOWN_PAIRS = (
    ("dialogue", "summary"),
    ("document", "summary"),
    ("article", "highlights"),
    ("text", "summary"),
    ("text", "label"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answers"),
    ("prompt", "response"),
    ("instruction", "response"),
    ("input", "output"),
    ("source", "target"),
)
# Lists of functions, and the worse one of two answers.
_NO_TEXT = re.compile(r"(tools|functions|(.*[_-])?(rejected|dispreferred|worse|loser)([_-].*)?)$", re.IGNORECASE)


def unknown_format(row: Mapping[str, Any], *, formats: Iterable[Sequence[str]]) -> str:
    """Return what a row of no known format is, what was expected of it, and what a user does about it."""
    found = f"found the columns {listed_columns(row)}"
    if row.keys() >= {"chosen", "rejected"}:
        return f"{found}: preference pairs, as DPO takes them; expected one answer to train on. {_chosen(row)}"
    texts = [key for key, value in row.items() if isinstance(value, str) and not (is_id(key) or _NO_TEXT.match(key))]
    expected = f"{found}; expected {', '.join(' + '.join(columns) for columns in formats)}."
    if pair := _pair(row, texts):
        columns = f"`columns: {{prompt: {pair[0]}, completion: {pair[1]}}}`"
        return f"{expected} Name yours in the recipe's task, for instance {columns}."
    lists = [key for key, value in row.items() if isinstance(value, list) and value and _is_turn(value[0])]
    if lists:
        return f"{expected} Name the one with the messages in the recipe's task: `columns: {{messages: {lists[0]}}}`."
    if texts:
        return (
            f"{expected} Write the prompt and its completion into a column each, since only the completion is trained "
            "on. General text can be a suite of `retention.texts`."
        )
    return f"{expected} Write a row for each prompt, with its completion."


def _pair(row: Mapping[str, Any], texts: Sequence[str]) -> tuple[str, str] | None:
    """Return the columns that most likely hold prompt and completion, as a recipe writes them."""
    known = next((pair for pair in _KNOWN_PAIRS if row.keys() >= set(pair)), None)
    if known:
        return known
    labels = [key for key in row if is_label(key)]
    prompts = [text for text in texts if text not in labels]
    if len(labels) == 1 and prompts:
        return (prompts[0] if len(prompts) == 1 else f"[{', '.join(prompts[:4])}]"), labels[0]
    return (texts[0], texts[-1]) if len(texts) > 1 else None


def _chosen(value: Mapping[str, Any]) -> str:
    """Return how a recipe trains on the chosen answers of preference pairs."""
    prompt = next((name for name in ("prompt", "question", "instruction", "input", "query") if name in value), None)
    chosen = value["chosen"]
    if isinstance(chosen, list) and (prompt is None or (chosen and _is_turn(chosen[0], "system", "user", "human"))):
        return "To train on the chosen answers, set `columns: {messages: chosen}` in the task."
    if prompt is not None:
        return f"To train on the chosen answers, set `columns: {{prompt: {prompt}, completion: chosen}}` in the task."
    return "Write each chosen conversation as a list of messages, and train on those."


def _is_turn(value: Any, *roles: str) -> bool:
    said = value.get("role", value.get("from")) if isinstance(value, dict) else None
    return isinstance(said, str) and (not roles or said.lower() in roles)


def listed_columns(row: Mapping[str, Any]) -> str:
    """Return the names of a row's columns, the first 12 of them."""
    names = [f"{name:.60}" for name in row]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "(none)"
