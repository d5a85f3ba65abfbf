"""A raw row in any known format arrives; a valid `Record` leaves, or the reason why there is none."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from keeptune.data.advice import listed_columns, unknown_format
from keeptune.data.columns import Columns, Labels, is_media, label_key, unread_columns
from keeptune.data.lines import json_kind
from keeptune.data.messages import RowProblem, read_messages, read_tools, refusal, text_of, tools_column
from keeptune.data.record import Message, Record, Role, record_id
from keeptune.data.source import Row

# In order of precedence: the columns that a format cannot do without, and those that it reads beside them.
_FORMATS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("messages",): ("system", "tools", "functions"),
    ("conversations",): ("system", "tools", "functions"),
    ("instruction", "output"): ("input", "history", "system"),
    ("prompt", "completion"): ("system", "tools", "functions"),
    ("inputs", "targets"): ("system",),
}
_LABELS = "Class labels get their words in the task: `labels: [negative, positive]`, or `labels: {1: bad, 5: good}`."


def to_record(
    row: Row,
    *,
    task: str,
    columns: Columns | None,
    instruction: str | Sequence[str] | None,
    labels: Labels | None = None,
    ignore: Sequence[str] = (),
) -> Record:
    """Return the row as a conversation that ends with a non-blank assistant message; text is kept as it stands.

    `columns` names the columns of prompt and completion, or that of a list of messages; without it the format is told
    by the row's own columns: messages, conversations, instruction + output, prompt + completion, or inputs + targets. A
    column whose value is null counts as absent. A prompt of several columns has each behind its name, with blank lines
    between. `instruction` stands before the prompt of the named columns, with a blank line between; of several wordings
    the one that the prompt's hash chooses, so that equal prompts stay equal. A completion that is a whole number is
    written in digits, or as `labels` say. A row with pictures or sound is refused, unless the recipe says to `ignore`
    their column.

    Raises:
        RowProblem: the format is unknown, or the row is no valid record in it.
    """
    messages = _detected_messages(row, labels=labels) if columns is None else _named_messages(row, columns, labels)
    if columns is not None and instruction is not None:
        messages = [_instructed(messages[0], instruction), *messages[1:]]
    _check_messages(messages, row=row)
    for column in unread_columns(row.value, read=columns_read(row.value, columns), ignored=ignore):
        if is_media(column):
            raise refusal(
                row,
                "not_text",
                found=f"a column {column!r} that is not empty",
                expected="text alone, since the model would be asked about what it never sees",
                remedy=f"If the text makes sense without it, set `ignore: [{column}]` in the task.",
            )
    messages = _up_to_last_trained(messages, row=row)
    tools = read_tools(row.value) if tools_column(row.value) in columns_read(row.value, columns) else ""
    return Record(record_id(task, messages, tools=tools), task, row.origin, tuple(messages), tools)


def columns_read(value: Mapping[str, Any], columns: Columns | None) -> frozenset[str]:
    """Return the columns of a row that `to_record` looks at."""
    if columns is not None:
        named = {name for given in columns.values() for name in _names(given)}
        read = {*named, *_FORMATS["messages",]} if "messages" in columns else named
    else:
        known = _format_of(value)
        read = {*known, *_FORMATS[known]} if known else set[str]()
    # Columns of these names may hold something else than a list of functions.
    return frozenset(read - {"tools", "functions"} | {column for column in read if column == tools_column(value)})


def _up_to_last_trained(messages: Sequence[Message], *, row: Row) -> list[Message]:
    """Return the messages without those after the last answer that is trained on, on which no target depends."""
    answers = [i for i, message in enumerate(messages) if message.role == "assistant" and message.trained]
    if not answers:
        raise refusal(
            row,
            "empty_completion",
            found="no assistant message with a weight above 0",
            expected="one or more to train on",
            remedy="Remove the row, or set a weight to 1.",
        )
    return list(messages[: answers[-1] + 1])


def _names(given: str | Sequence[str]) -> Sequence[str]:
    return [given] if isinstance(given, str) else given


def _named_messages(row: Row, columns: Columns, labels: Labels | None) -> list[Message]:
    """Return the conversation of a row whose columns the recipe names."""
    if "messages" in columns:
        column = str(columns["messages"])
        return _with_system(read_messages(_named(row, column), row=row, column=column), row=row)
    prompt = _named_prompt(row, _names(columns["prompt"]))
    column = str(columns["completion"])
    answer = _completion(_named(row, column), row=row, column=column, labels=labels)
    # Preference data repeat the prompt in front of each answer.
    if answer[:1] and answer[0].role != "assistant":
        if [m.content.strip() for m in answer[: len(prompt)]] != [m.content.strip() for m in prompt]:
            raise refusal(
                row,
                "bad_roles",
                found=f"messages in {column} that begin with another prompt",
                expected="an answer to the prompt",
                remedy=f"To train on {column} alone, set `columns: {{messages: {column}}}` in the task.",
            )
        return answer
    return [*prompt, *answer]


def _named_prompt(row: Row, columns: Sequence[str]) -> list[Message]:
    values = {column: _named(row, column) for column in columns}
    if len(values) == 1:
        column, value = next(iter(values.items()))
        found = _one_side(value, row=row, column=column, role="user")
    else:
        digits = {column: str(v) if _is_whole(v) else v for column, v in values.items()}
        texts = {column: text_of(value, row=row, where=column) for column, value in digits.items()}
        parts = [f"{column}: {text}" for column, text in texts.items() if text.strip()]
        found = [Message("user", "\n\n".join(parts))]
    if not any(message.content.strip() for message in found):
        raise refusal(row, "empty_prompt", found=f"an empty prompt in {' and '.join(columns)}")
    return found


def _instructed(message: Message, instruction: str | Sequence[str]) -> Message:
    return replace(message, content=f"{_wording(instruction, message.content)}\n\n{message.content}")


def _wording(instruction: str | Sequence[str], prompt: str) -> str:
    if isinstance(instruction, str):
        return instruction
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()
    return instruction[int.from_bytes(digest[:8], "big") % len(instruction)]


def _format_of(value: Mapping[str, Any]) -> tuple[str, ...] | None:
    present = {key for key in value if value[key] is not None}
    known = next((f for f in _FORMATS if present.issuperset(f)), None)
    # A prompt with a null completion is a prompt without completion, not an unknown format.
    return known or next((f for f in _FORMATS if value.keys() >= set(f)), None)


def _detected_messages(row: Row, *, labels: Labels | None) -> list[Message]:
    value = row.value
    known = _format_of(value)
    if known is None:
        raise RowProblem(f"{row.origin}: {unknown_format(value, formats=_FORMATS)}", reason="unknown_format")
    if known[0] in ("messages", "conversations"):
        messages = read_messages(value[known[0]], row=row, column=known[0])
    elif known[0] == "instruction":
        messages = [*_alpaca(row), *_completion(value["output"], row=row, column="output", labels=labels)]
    else:
        _refuse_unwanted(row)
        messages = [
            *_one_side(value[known[0]], row=row, column=known[0], role="user"),
            *_completion(value[known[1]], row=row, column=known[1], labels=labels),
        ]
    return _with_system(messages, row=row)


def _with_system(messages: list[Message], *, row: Row) -> list[Message]:
    system = text_of(row.value.get("system"), row=row, where="system")
    if not system.strip():
        return messages
    if any(message.role == "system" for message in messages):
        raise refusal(row, "bad_roles", found="a system message and a column system", expected="one of the two")
    return [Message("system", system), *messages]


def _refuse_unwanted(row: Row) -> None:
    """Refuse an answer that is marked as a bad one, as data for KTO have them beside good ones."""
    if row.value.get("label") is False:
        raise refusal(
            row,
            "unwanted",
            found="label: false beside a prompt and a completion, the mark of an answer that is not wanted (KTO)",
            expected="answers to train on",
            remedy="Leave out such rows.",
        )


def _alpaca(row: Row) -> list[Message]:
    """Return what stands before the output."""
    value = row.value
    instruction, context = (text_of(value.get(column), row=row, where=column) for column in ("instruction", "input"))
    messages: list[Message] = []
    history = value.get("history") or []
    if not isinstance(history, list):
        raise refusal(row, "not_text", found=f"{json_kind(history)} in history", expected="a list")
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2:
            raise refusal(row, "not_text", found="no pair of texts in history", expected="[user text, assistant text]")
        messages.append(Message("user", text_of(turn[0], row=row, where="history")))
        messages.append(Message("assistant", text_of(turn[1], row=row, where="history")))
    # Some files leave the instruction empty and put the whole prompt into input.
    if instruction.strip():
        messages.append(Message("user", instruction, input=context if context.strip() else ""))
    else:
        messages.append(Message("user", context))
    return messages


def _one_side(value: Any, *, row: Row, column: str, role: Role) -> list[Message]:
    """Return a prompt or completion, which is a text or a list of messages."""
    if isinstance(value, list):
        return read_messages(value, row=row, column=column)
    return [Message(role, text_of(value, row=row, where=column))]


def _completion(value: Any, *, row: Row, column: str, labels: Labels | None) -> list[Message]:
    """Return a completion: a text, a list of messages, a whole number in digits, or what `labels` call a value."""
    if labels is not None and value is not None:
        key = label_key(value)
        if key is None or key not in labels:
            shown = f"{value!r:.40}" if isinstance(value, str | int | float) else json_kind(value)
            expected = f"one that `labels` of the task name: {', '.join(labels)[:200]}"
            raise refusal(row, "no_label", found=f"the label {shown} in {column}", expected=expected, remedy=_LABELS)
        value = labels[key]
    if isinstance(value, list):
        if value and all(isinstance(text, str) for text in value):
            raise refusal(
                row,
                "not_text",
                found=f"a list of {len(value)} texts in {column}",
                expected="one text, or a list of messages",
                remedy="Keep one of them, or write a row for each.",
            )
        return read_messages(value, row=row, column=column)
    if isinstance(value, bool | float):
        found, expected = (f"{json.dumps(value)} in {column}", "text or a whole number")
        raise refusal(row, "not_text", found=found, expected=expected, remedy=_LABELS)
    return [Message("assistant", str(value) if _is_whole(value) else text_of(value, row=row, where=column))]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _named(row: Row, column: str) -> Any:
    """Return what stands in a column that the recipe names."""
    if column not in row.value:
        near = difflib.get_close_matches(column, row.value, n=1)
        among = listed_columns(row.value)
        raise RowProblem(
            f"{row.origin}: found no column {column!r} among {among}; expected the columns that the "
            f"recipe names. {f'Did you mean {near[0]!r}?' if near else 'Fix `columns` of this task.'}",
            reason="unknown_format",
        )
    return row.value[column]


def _check_messages(messages: Sequence[Message], *, row: Row) -> None:
    """Hold a conversation against what a valid record is."""
    roles = [message.role for message in messages]
    if not roles or roles[-1] != "assistant":
        raise refusal(
            row,
            "bad_roles",
            found=f"{roles[-1]!r} as the role of the last message" if roles else "no messages",
            expected="'assistant' last, the only role trained on",
            remedy="Remove the messages after the last answer." if "assistant" in roles else "Fix the row.",
        )
    if "system" in roles[1:]:
        raise refusal(row, "bad_roles", found="a system message after the first message", expected="it first")
    if "user" not in roles:
        raise refusal(row, "bad_roles", found="no user message", expected="one before the completion")
    first = next(role for role in roles if role != "system")
    if first != "user":
        raise refusal(
            row,
            "bad_roles",
            found=f"{first!r} as the role of the first message",
            expected="the user's first, or a system message and then the user's",
            remedy="Remove what stands before the first message of the user.",
        )
    if not any(message.role == "user" and message.text.strip() for message in messages):
        raise refusal(row, "empty_prompt", found="an empty prompt")
    for i, message in enumerate(messages):
        if message.role == "assistant" and not (message.content.strip() or message.tool_calls):
            place = f" in message {i + 1} of {len(messages)}" if roles.count("assistant") > 1 else ""
            raise refusal(row, "empty_completion", found=f"an empty completion{place}")
