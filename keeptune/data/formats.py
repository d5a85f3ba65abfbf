"""A raw row in any known format arrives; a valid `Record` leaves, or the reason why there is none."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from keeptune.data.lines import json_kind
from keeptune.data.record import Message, Record, Role, record_id
from keeptune.data.source import Row
from keeptune.errors import DataError

Reason = Literal["unreadable", "unknown_format", "empty_completion", "empty_prompt", "bad_roles", "not_text"]

# In order of precedence; the columns are those that the format cannot do without.
_FORMATS: tuple[tuple[str, ...], ...] = (
    ("messages",),
    ("conversations",),
    ("instruction", "output"),
    ("prompt", "completion"),
    ("inputs", "targets"),
)
_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
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
    ("prompt", "response"),
    ("instruction", "response"),
    ("input", "output"),
    ("source", "target"),
)
_REMEDY = "Mend the row, or drop such rows with data.drop_incomplete=true."


class RowProblem(DataError):
    """One row is no valid record; `reason` is the name under which the audit counts it."""

    def __init__(self, message: str, *, reason: Reason) -> None:
        super().__init__(message)
        self.reason: Reason = reason


def to_record(
    row: Row, *, task: str, columns: Mapping[str, str] | None, instruction: str | Sequence[str] | None
) -> Record:
    """Return the row as a conversation that ends with a non-blank assistant message; text is kept as it stands.

    `columns` names the columns of prompt and completion; without it the format is told by the row's own columns:
    messages, conversations, instruction + output, prompt + completion, or inputs + targets. A column whose value is
    null counts as absent. `instruction` stands before the prompt of the named columns, with a blank line between; of
    several wordings the one that the prompt's hash chooses, so that equal prompts stay equal.

    Raises:
        RowProblem: the format is unknown, or the row is no valid record in it.
    """
    if columns is None:
        messages = _detected_messages(row)
    else:
        prompt, completion = (_named_text(row, columns[part]) for part in ("prompt", "completion"))
        if not prompt.strip():
            raise _refusal(row, "empty_prompt", found=f"an empty prompt in {columns['prompt']}")
        wording = _wording(instruction, prompt)
        content = f"{wording}\n\n{prompt}" if wording else prompt
        messages = [Message("user", content), Message("assistant", completion)]
    _check_messages(messages, row=row)
    return Record(record_id(task, messages), task, row.origin, tuple(messages))


def _wording(instruction: str | Sequence[str] | None, prompt: str) -> str | None:
    if instruction is None or isinstance(instruction, str):
        return instruction
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()
    return instruction[int.from_bytes(digest[:8], "big") % len(instruction)]


def _detected_messages(row: Row) -> list[Message]:
    value = row.value
    present = {key for key in value if value[key] is not None}
    known = next((f for f in _FORMATS if present.issuperset(f)), None)
    # A prompt with a null completion is a prompt without completion, not an unknown format.
    known = known or next((f for f in _FORMATS if value.keys() >= set(f)), None)
    if known is None:
        raise RowProblem(_unknown_format(row), reason="unknown_format")
    if known[0] in ("messages", "conversations"):
        messages = _messages(value[known[0]], row=row, column=known[0])
    elif known[0] == "instruction":
        messages = _alpaca(row)
    else:
        messages = [
            *_one_side(value[known[0]], row=row, column=known[0], role="user"),
            *_one_side(value[known[1]], row=row, column=known[1], role="assistant"),
        ]
    system = _text(value.get("system"), row=row, where="system")
    if not system.strip():
        return messages
    if any(message.role == "system" for message in messages):
        raise _refusal(row, "bad_roles", found="a system message and a column system", expected="one of the two")
    return [Message("system", system), *messages]


def _alpaca(row: Row) -> list[Message]:
    value = row.value
    instruction, context, output = (
        _text(value.get(column), row=row, where=column) for column in ("instruction", "input", "output")
    )
    messages: list[Message] = []
    history = value.get("history") or []
    if not isinstance(history, list):
        raise _refusal(row, "not_text", found=f"{json_kind(history)} in history", expected="a list")
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2:
            raise _refusal(row, "not_text", found="no pair of texts in history", expected="[user text, assistant text]")
        messages.append(Message("user", _text(turn[0], row=row, where="history")))
        messages.append(Message("assistant", _text(turn[1], row=row, where="history")))
    # Some files leave the instruction empty and put the whole prompt into input.
    if instruction.strip():
        messages.append(Message("user", instruction, input=context if context.strip() else ""))
    else:
        messages.append(Message("user", context))
    return [*messages, Message("assistant", output)]


def _one_side(value: Any, *, row: Row, column: str, role: Role) -> list[Message]:
    """Return a prompt or completion, which is a text or a list of messages."""
    if isinstance(value, list):
        return _messages(value, row=row, column=column)
    return [Message(role, _text(value, row=row, where=column))]


def _messages(value: Any, *, row: Row, column: str) -> list[Message]:
    if not isinstance(value, list):
        raise _refusal(row, "not_text", found=f"{json_kind(value)} in {column}", expected="a list of messages")
    return [_message(turn, row=row, where=f"{column}[{i}]") for i, turn in enumerate(value)]


def _message(turn: Any, *, row: Row, where: str) -> Message:
    """Return one turn, written as role and content (OpenAI) or as from and value (sharegpt)."""
    if not isinstance(turn, dict):
        raise _refusal(row, "not_text", found=f"{json_kind(turn)} in {where}", expected="a message")
    said = turn.get("role", turn.get("from"))
    role = _ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        known = "system, user, assistant or tool (or human, gpt)"
        raise _refusal(row, "bad_roles", found=f"the role {said!r:.40} in {where}", expected=known)
    if turn.get("tool_calls") or turn.get("function_call"):
        raise _refusal(row, "not_text", found=f"tool calls in {where}")
    content = turn["content"] if turn.get("content") is not None else turn.get("value")
    if isinstance(content, list):
        content = "".join(_part_text(part, row=row, where=where) for part in content)
    return Message(role, _text(content, row=row, where=where))


def _part_text(part: Any, *, row: Row, where: str) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    found = f"a part of type {part.get('type')!r:.40}" if isinstance(part, dict) else json_kind(part)
    raise _refusal(row, "not_text", found=f"{found} in {where}", expected="parts of type 'text'")


def _named_text(row: Row, column: str) -> str:
    if column not in row.value:
        near = difflib.get_close_matches(column, row.value, n=1)
        raise RowProblem(
            f"{row.origin}: found no column {column!r} among {_listed(row)}; expected the columns that the recipe "
            f"names. {f'Did you mean {near[0]!r}?' if near else 'Mend `columns` of this task.'}",
            reason="unknown_format",
        )
    return _text(row.value[column], row=row, where=column)


def _text(value: Any, *, row: Row, where: str) -> str:
    """Return a text; null is the empty text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _refusal(row, "not_text", found=f"{json_kind(value)} in {where}")
    return value


def _check_messages(messages: Sequence[Message], *, row: Row) -> None:
    """Hold a conversation against what a valid record is."""
    roles = [message.role for message in messages]
    if not roles or roles[-1] != "assistant":
        raise _refusal(
            row,
            "bad_roles",
            found=f"{roles[-1]!r} as the role of the last message" if roles else "no messages",
            expected="'assistant' last, the only role trained on",
        )
    if "system" in roles[1:]:
        raise _refusal(row, "bad_roles", found="a system message after the first message", expected="it first")
    if "user" not in roles:
        raise _refusal(row, "bad_roles", found="no user message", expected="one before the completion")
    if not any(message.role == "user" and message.text.strip() for message in messages):
        raise _refusal(row, "empty_prompt", found="an empty prompt")
    if not all(message.content.strip() for message in messages if message.role == "assistant"):
        raise _refusal(row, "empty_completion", found="an empty completion")


def _refusal(row: Row, reason: Reason, *, found: str, expected: str = "text") -> RowProblem:
    return RowProblem(f"{row.origin}: found {found}; expected {expected}. {_REMEDY}", reason=reason)


def _unknown_format(row: Row) -> str:
    texts = [key for key, value in row.value.items() if isinstance(value, str)]
    pair = next((pair for pair in _KNOWN_PAIRS if row.value.keys() >= set(pair)), None)
    pair = pair or ((texts[0], texts[-1]) if len(texts) > 1 else ("dialogue", "summary"))
    formats = ", ".join(" + ".join(columns) for columns in _FORMATS)
    return (
        f"{row.origin}: found the columns {_listed(row)}; expected {formats}. Name yours in the recipe's task, for "
        f"instance `columns: {{prompt: {pair[0]}, completion: {pair[1]}}}`."
    )


def _listed(row: Row) -> str:
    names = [f"{name:.60}" for name in row.value]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "(none)"
