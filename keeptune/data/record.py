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
    """One turn. `input` is the alpaca format's second field, kept apart because the Stanford wording needs it."""

    role: Role
    content: str
    input: str = ""

    @property
    def text(self) -> str:
        """The content and, on a line of its own, the input."""
        return f"{self.content}\n{self.input}" if self.input else self.content


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation that ends with an assistant message. `origin` is `file:line` or `file#row`."""

    id: str
    task: str
    origin: str
    messages: tuple[Message, ...]

    @property
    def prompt(self) -> str:
        """The text before the last message, turns joined by newlines."""
        return "\n".join(message.text for message in self.messages[:-1])

    @property
    def completion(self) -> str:
        """The text of the last message."""
        return self.messages[-1].content


def record_id(task: str, messages: Sequence[Message]) -> str:
    """Return 16 hexadecimal digits that depend on the task and the messages alone."""
    content = json.dumps([task, [[m.role, m.content, m.input] for m in messages]], ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def record_to_json(record: Record) -> dict[str, Any]:
    """Return the record as a line of `data/*.jsonl`; `input` stands only where it is not empty."""
    messages = [
        {"role": m.role, "content": m.content, **({"input": m.input} if m.input else {})} for m in record.messages
    ]
    return {"id": record.id, "task": record.task, "origin": record.origin, "messages": messages}


def record_from_json(value: Mapping[str, Any], *, where: str) -> Record:
    """Return the record that `record_to_json` wrote.

    Raises:
        DataError: a field is missing, which means that the file was edited after it was prepared.
    """
    try:
        messages = tuple(Message(m["role"], m["content"], m.get("input", "")) for m in value["messages"])
        return Record(value["id"], value["task"], value["origin"], messages)
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{where}: found a line without {error}; expected a record written by `keeptune prepare`. Prepare again."
        ) from error
