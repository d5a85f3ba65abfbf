"""Messages arrive, the text that a chat template makes of them leaves, as transformers' apply_chat_template renders it.

Only the control tokens that contents spell are hidden in it. A template that reads such words itself is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from keeptune.data.record import Message
from keeptune.errors import DataError, RecipeError
from keeptune.text.chat import ChatWording, UnboundedTemplateError
from keeptune.text.control import Controls
from keeptune.text.tokenizer import Tokenizer

# What stands for a content where a template is tried; no text holds it.
QUESTION, ANSWER, THOUGHT, CALLED, TOLD = (f"\ue000{name}\ue001" for name in "qatcr")
# Fields of messages that hold thoughts, by the templates that read them.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_CALL_ID = "call00001"


class Conversations:
    """Renders conversations with one wording.

    `keeps_input`: it reads the input of a message beside its content. `own`: it is a tokenizer's own template, which
    may read further fields.
    """

    def __init__(self, wording: ChatWording, *, keeps_input: bool, own: bool, tokenizer: Tokenizer) -> None:
        self.wording = wording
        self._keeps_input = keeps_input
        self._accepts_thoughts = False
        # Until it is known what the template writes, its special tokens alone are hidden.
        self.controls = Controls(tokenizer)
        self.reasoning = self._reasoning_key() if own else None
        self._call_style = self._find_call_style() if own and wording.reads("tool_calls") else None
        written = self._written(tokenizer)
        if written:
            self.controls = Controls(tokenizer, written=written)

    def prompt(self, messages: Sequence[Message], *, tools: str) -> str:
        """Return what generation starts from.

        Raises:
            KeeptuneError: the template refuses the messages, or leaves one out.
        """
        self.refuse_fields(messages)
        text = self.text(messages, add_generation_prompt=True, tools=tools)
        revealed = self.controls.reveal(text)
        for i, message in enumerate(messages):
            if message.content.strip() not in revealed:
                self._require_read(messages, i, text=text, tools=tools)
        return text

    def text(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: str = "",
        switches: Mapping[str, bool] | None = None,
    ) -> str:
        """Return the rendered text, in which the control tokens of contents are hidden.

        Raises:
            KeeptuneError: the template refuses the messages, or reads control tokens in them.
        """
        functions = json.loads(tools) if tools and self.wording.has_variable("tools") else None
        how: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, "switches": switches}
        real = self.as_dicts(messages)
        hidden = [self._as_dict(message, hidden=True) for message in messages]
        hidden_functions = self._hide_all(functions)
        text = self.wording.render(hidden, tools=hidden_functions, **how)
        if (hidden, hidden_functions) == (real, functions):
            return text
        rendered = self.wording.render(real, tools=functions, **how)
        if self.controls.reveal(text) == rendered:
            return text
        words = sorted({found[0] for value in _strings([real, functions]) for found in self.controls.find(value)})
        raise DataError(
            f"chat template: found a content with {' and '.join(words)}, words that the template treats in a way of "
            "its own; expected them to be text. Remove them from the record, or set data.template=alpaca."
        )

    def as_dicts(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Return messages as a template reads them."""
        return [self._as_dict(message, hidden=False) for message in messages]

    def unread(self, messages: Sequence[Message], *, tools: str) -> set[str]:
        """Return which of `tools` and the fields of messages are there and not read by the template."""
        fields = {key for m in messages for key in ("name", "tool_call_id") if getattr(m, key)}
        unread = {f"messages[].{key}" for key in fields if not self.wording.reads(key)}
        return unread | ({"tools"} if tools and not self.wording.has_variable("tools") else set())

    def accept_thoughts(self) -> None:
        """Let messages have thoughts, though the template reads no field of them: its generation prompt opens them."""
        self._accepts_thoughts = True

    def refuse_fields(self, messages: Sequence[Message]) -> None:
        """Refuse thoughts and tool calls that the wording has no place for.

        Raises:
            DataError: there are some.
        """
        for message in messages:
            if message.reasoning and self.reasoning is None and not self._accepts_thoughts:
                raise DataError(
                    "chat template: found thoughts (reasoning_content) in a message; expected none, since the template "
                    "does not write them. Remove the field, put the thoughts into the content, or choose a model whose "
                    "chat template writes them."
                )
            if message.tool_calls and self._call_style is None:
                raise DataError(
                    "chat template: found tool calls in a message; expected none, since the template does not write "
                    "them. Remove such rows, or choose a model whose chat template writes tool calls."
                )

    def _require_read(self, messages: Sequence[Message], i: int, *, text: str, tools: str) -> None:
        """Refuse a message on which nothing in the text depends."""
        other = [*messages[:i], replace(messages[i], content=messages[i].content + "x"), *messages[i + 1 :]]
        if self.text(other, add_generation_prompt=True, tools=tools) == text:
            raise RecipeError(
                f"chat template: found the {messages[i].role} message {i + 1} of a conversation left out; "
                "expected every message. Remove such messages, or set data.template=alpaca."
            )

    def _as_dict(self, message: Message, *, hidden: bool) -> dict[str, Any]:
        answer = message.role == "assistant"
        parts = (message.content, message.input) if self._keeps_input else (message.text, "")
        content, context = (self.controls.hide(part, answer=answer) if hidden else part for part in parts)
        value: dict[str, Any] = {"role": message.role, "content": content}
        if context:
            value["input"] = context
        further: dict[str, Any] = {}
        if message.reasoning and self.reasoning is not None:
            further[self.reasoning] = message.reasoning
        if message.tool_calls and self._call_style is not None:
            as_text, with_content = self._call_style
            further["tool_calls"] = _calls(message.tool_calls, as_text=as_text)
            if not with_content and not message.content:
                del value["content"]
        further |= {key: text for key in ("tool_call_id", "name") if (text := getattr(message, key))}
        return value | (self._hide_all(further) if hidden else further)

    def _hide_all(self, value: Any) -> Any:
        """Return JSON whose texts and keys are hidden."""
        if isinstance(value, str):
            return self.controls.hide(value)
        if isinstance(value, dict):
            return {self.controls.hide(key): self._hide_all(inner) for key, inner in value.items()}
        return [self._hide_all(inner) for inner in value] if isinstance(value, list) else value

    def _reasoning_key(self) -> str | None:
        """Return the field of a message in which the template reads thoughts, None where it reads none."""
        for key in (key for key in _REASONING if self.wording.reads(key)):
            answer = {"role": "assistant", "content": ANSWER, key: THOUGHT}
            messages = [{"role": "user", "content": QUESTION}, answer]
            if any(THOUGHT in text for text in self._tried(messages, tools=None)):
                return key
        return None

    def _find_call_style(self) -> tuple[bool, bool] | None:
        """Return how the template reads tool calls: arguments as a text, a content beside them; None: not at all."""
        call = json.dumps(
            [{"id": _CALL_ID, "type": "function", "function": {"name": CALLED, "arguments": {"a": TOLD}}}]
        )
        for self._call_style in product((False, True), (True, False)):
            messages = [
                self._as_dict(Message("user", QUESTION), hidden=False),
                self._as_dict(Message("assistant", "", tool_calls=call), hidden=False),
            ]
            if any(CALLED in text and TOLD in text for text in self._tried(messages, tools=None)):
                return self._call_style
        return None

    def _tried(self, messages: Sequence[Mapping[str, Any]], *, tools: list[Any] | None) -> Iterator[str]:
        """Yield the renderings with and without a generation prompt that the template does not refuse."""
        for add_generation_prompt in (False, True):
            try:
                yield self.wording.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)
            except UnboundedTemplateError:
                raise
            except RecipeError:
                continue

    def _written(self, tokenizer: Tokenizer) -> set[str]:
        """Return the added tokens without the flag of special ones that the template writes."""
        texts = list(self.wording.literals)
        user, answer = Message("user", QUESTION), Message("assistant", ANSWER)
        call = Message("assistant", "", tool_calls='[{"type": "function", "function": {"name": "f", "arguments": {}}}]')
        for messages in (
            [user],
            [Message("system", TOLD), user],
            [user, answer, user, answer],
            [user, call, Message("tool", TOLD), answer],
        ):
            texts += self._tried([self._as_dict(message, hidden=False) for message in messages], tools=None)
        joined = "\0".join(texts)
        others = tokenizer.added_tokens.keys() - tokenizer.special_tokens.keys()
        return {token for token in others if _looks_like_control(token) and token in joined}


def _looks_like_control(token: str) -> bool:
    """Return whether a token has letters and marks, as `<think>` has; words and runs of spaces are ordinary text."""
    return any(map(str.isalnum, token)) and not all(c.isalnum() or c.isspace() or c == "▁" for c in token)


def _calls(tool_calls: str, *, as_text: bool) -> list[dict[str, Any]]:
    calls = json.loads(tool_calls)
    if as_text:
        for call in calls:
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return calls


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
