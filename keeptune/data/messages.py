"""A list of messages as a row holds it arrives; `Message`s leave, with thoughts, tool calls and what is trained on."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, Literal

from keeptune.data.columns import is_media, unread_columns
from keeptune.data.lines import json_kind
from keeptune.data.record import Message, Role
from keeptune.data.source import Row
from keeptune.errors import DataError

Reason = Literal[
    "unreadable", "unknown_format", "empty_completion", "empty_prompt", "bad_roles", "not_text", "unwanted", "no_label"
]

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
    "function_call": "assistant",
    "tool": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
# What ecosystems call the same thing: the thoughts before an answer, and whether it is trained on.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_TRAINED = ("weight", "train", "training", "trainable", "train_on_turn", "loss", "loss_weight", "loss_mask")
_READ = frozenset(
    ("role", "from", "content", "value", "tool_calls", "function_call", "tool_call_id", "name", *_REASONING, *_TRAINED)
)
_REMEDY = "Fix the row."


class RowProblem(DataError):
    """One row is no valid record; `reason` is the name under which the audit counts it."""

    def __init__(self, message: str, *, reason: Reason) -> None:
        super().__init__(message)
        self.reason: Reason = reason


def refusal(row: Row, reason: Reason, *, found: str, expected: str = "text", remedy: str = _REMEDY) -> RowProblem:
    """Return what to raise for a row."""
    return RowProblem(f"{row.origin}: found {found}; expected {expected}. {remedy}", reason=reason)


def text_of(value: Any, *, row: Row, where: str) -> str:
    """Return a text; null is the empty text.

    Raises:
        RowProblem: it is no text.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise refusal(row, "not_text", found=f"{json_kind(value)} in {where}")
    return value


def read_messages(value: Any, *, row: Row, column: str) -> list[Message]:
    """Return the messages of a list, or of one in JSON as the cells of tables hold it.

    Raises:
        RowProblem: there is no list, or a message is none.
    """
    if isinstance(value, str):
        value = _parsed(value)
    if not isinstance(value, list):
        raise refusal(row, "not_text", found=f"{json_kind(value)} in {column}", expected="a list of messages")
    return [_message(turn, row=row, where=f"{column}[{i}]") for i, turn in enumerate(value)]


def tools_column(value: Mapping[str, Any]) -> str | None:
    """Return the column of a row that lists the functions which the assistant may call, None where there is none."""
    for column in ("tools", "functions"):
        tools = _parsed(value.get(column))
        if isinstance(tools, list) and tools and all(isinstance(tool, dict) for tool in tools):
            return column
    return None


def read_tools(value: Mapping[str, Any]) -> str:
    """Return the functions that a row lists as a JSON list, "" where there are none."""
    column = tools_column(value)
    tools = _parsed(value[column]) if column is not None else []
    return _json([_function(tool) if "name" in tool else tool for tool in tools]) if tools else ""


def unread_fields(value: Mapping[str, Any], *, columns: Collection[str]) -> set[str]:
    """Return the fields of a row's messages that carry something and are not read, as `column[].field`."""
    lists = {column: value.get(column) for column in columns}
    return {
        f"{column}[].{field}"
        for column, turns in lists.items()
        if isinstance(turns, list) and column != tools_column(value)
        for turn in turns
        if isinstance(turn, dict)
        for field in unread_columns(turn, read=_READ)
    }


def _message(turn: Any, *, row: Row, where: str) -> Message:
    """Return one turn, written as role and content (OpenAI) or as from and value (sharegpt)."""
    if not isinstance(turn, dict):
        raise refusal(row, "not_text", found=f"{json_kind(turn)} in {where}", expected="a message")
    said = turn.get("role", turn.get("from"))
    role = _ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        known = "system, user, assistant or tool (or human, gpt)"
        raise refusal(row, "bad_roles", found=f"the role {said!r:.40} in {where}", expected=known)
    for field in unread_columns(turn, read=_READ):
        if is_media(field):
            raise refusal(row, "not_text", found=f"a field {field!r} in {where}", expected="text alone")
    content = turn["content"] if turn.get("content") is not None else turn.get("value")
    if isinstance(content, list):
        content = "".join(_part_text(part, row=row, where=where) for part in content)
    content = text_of(content, row=row, where=where)
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    if said == "function_call":
        calls, content = [_parsed(content)], ""
    thoughts = next((turn[key] for key in _REASONING if turn.get(key)), "")
    reasoning = text_of(thoughts, row=row, where=f"{where}.reasoning_content")
    trained = _is_trained(turn, role=role, row=row, where=where)
    if role != "assistant" and (calls or reasoning):
        what = "tool calls" if calls else "thoughts"
        raise refusal(row, "bad_roles", found=f"{what} of the role {role} in {where}", expected="the role assistant")
    return Message(
        role,
        content,
        reasoning=reasoning,
        tool_calls=_tool_calls(calls, row=row, where=where),
        tool_call_id=text_of(turn.get("tool_call_id"), row=row, where=f"{where}.tool_call_id"),
        name=text_of(turn.get("name"), row=row, where=f"{where}.name"),
        trained=trained,
    )


def _part_text(part: Any, *, row: Row, where: str) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    found = f"a part of type {part.get('type')!r:.40}" if isinstance(part, dict) else json_kind(part)
    raise refusal(row, "not_text", found=f"{found} in {where}", expected="parts of type 'text'")


def _is_trained(turn: Mapping[str, Any], *, role: Role, row: Row, where: str) -> bool:
    """Return whether a turn is trained on, as its weight says: answers are unless it is 0, and nothing else is."""
    trained = True
    for key in _TRAINED:
        value = turn.get(key)
        if value is None:
            continue
        if value not in (0, 1):
            raise refusal(
                row,
                "not_text",
                found=f"{key}: {value!r:.40} in {where}",
                expected="0 or 1 (or false, true)",
                remedy="A turn is trained on whole or not at all.",
            )
        if value and role != "assistant":
            raise refusal(
                row,
                "bad_roles",
                found=f"{key}: {value!r:.40} for the role {role} in {where}",
                expected="it only on assistant messages, the only ones trained on",
                remedy=f"Remove {key} there, or set it to 0.",
            )
        trained = trained and bool(value)
    return trained or role != "assistant"


def _tool_calls(calls: Any, *, row: Row, where: str) -> str:
    """Return tool calls as a JSON list of functions whose arguments are objects, "" where there are none."""
    calls = _parsed(calls) if isinstance(calls, str) else calls
    if not calls:
        return ""
    read = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        arguments = _parsed(function.get("arguments") or {}) if isinstance(function, dict) else None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise refusal(
                row,
                "not_text",
                found=f"tool calls in {where} without a name or with arguments that are no JSON object",
                expected="functions, each with a name and arguments",
            )
        further = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        read.append({**further, **_function({"name": name, "arguments": arguments})})
    return _json(read)


def _function(function: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": dict(function)}


def _json(value: Any) -> str:
    # A table may hold dates and decimals, which JSON has no form for.
    return json.dumps(value, ensure_ascii=False, default=str)


def _parsed(value: Any) -> Any:
    """Return what a text is in JSON, if that is a list or an object; else the value itself."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
