"""A validated conversation: messages arrive, a `Record` with a content hash for its id leaves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from keeptune.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]
SplitName = Literal["train", "validation", "test"]
SPLIT_NAMES: tuple[SplitName, ...] = get_args(SplitName)
# What a suite that must not be forgotten is divided into beside its report part, which stands in `test`: text to train
# on again, records that a search may look at, and those that a certificate is made from.
PartName = Literal["replay", "probe", "certify"]
PART_NAMES: tuple[PartName, ...] = get_args(PartName)
# Scores over the tasks that are trained on, and over those that are not, stand under these names in place of a task's.
ALL_TASKS = "all"
OTHER_TASKS = "others"
# What is trained on again to keep it stands beside the tasks under this name, which no task can have.
REPLAY = "(replay)"
# The suite of texts that the base model writes itself.
SELF_TEXTS = "self"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `input` is the alpaca format's second field, kept apart because the Stanford wording needs it.

    `reasoning` holds the thoughts before an answer. `tool_calls` is a JSON list of functions with their arguments, ""
    where there are none; a message of the role tool answers the call `tool_call_id`. An answer that is not `trained` is
    only read.
    """

    role: Role
    content: str
    input: str = ""
    reasoning: str = ""
    tool_calls: str = ""
    tool_call_id: str = ""
    name: str = ""
    trained: bool = True

    @property
    def text(self) -> str:
        """The content and, on a line of its own, the input."""
        return f"{self.content}\n{self.input}" if self.input else self.content

    @property
    def whole_text(self) -> str:
        """The text and the tool calls, which say what a message is about where it has no content."""
        return "\n".join(filter(None, (self.text, self.tool_calls)))


_FIELDS = ("input", "reasoning", "tool_calls", "tool_call_id", "name")


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation that ends with an assistant message. `origin` is `file:line` or `file#row`.

    `tools` is a JSON list of the functions that the assistant may call, "" where there are none.
    """

    id: str
    task: str
    origin: str
    messages: tuple[Message, ...]
    tools: str = ""

    @property
    def prompt(self) -> str:
        """The text before the last message, turns joined by newlines."""
        return "\n".join(message.whole_text for message in self.messages[:-1])

    @property
    def completion(self) -> str:
        """The text of the last message."""
        return self.messages[-1].whole_text


def record_id(task: str, messages: Sequence[Message], *, tools: str = "") -> str:
    """Return 16 hexadecimal digits that depend on the task, the messages and the tools alone."""
    turns = [[m.role, m.content, m.input, *([_further(m)] if _further(m) else [])] for m in messages]
    content = json.dumps([task, turns, *([tools] if tools else [])], ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _further(message: Message) -> dict[str, Any]:
    """Return the fields that only some messages have, without `input`."""
    return {key: value for key, value in _stored(message).items() if key not in ("role", "content", "input")}


def _stored(message: Message) -> dict[str, Any]:
    fields = {key: value for key in _FIELDS if (value := getattr(message, key))}
    return {"role": message.role, "content": message.content, **fields} | (
        {} if message.trained else {"trained": False}
    )


def record_to_json(record: Record) -> dict[str, Any]:
    """Return the record as a line of `data/*.jsonl`; fields that only some messages have stand where they are set."""
    value = {"id": record.id, "task": record.task, "origin": record.origin}
    return {
        **value,
        "messages": [_stored(m) for m in record.messages],
        **({"tools": record.tools} if record.tools else {}),
    }


def record_from_json(value: Mapping[str, Any], *, where: str) -> Record:
    """Return the record that `record_to_json` wrote.

    Raises:
        DataError: a field is missing, which means that the file was edited after it was prepared.
    """
    try:
        messages = tuple(
            Message(m["role"], m["content"], **{key: m[key] for key in (*_FIELDS, "trained") if key in m})
            for m in value["messages"]
        )
        return Record(value["id"], value["task"], value["origin"], messages, value.get("tools", ""))
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{where}: found a line without {error}; expected a record written by `keeptune prepare`. Prepare again."
        ) from error
