"""Where answers stand in the text of a conversation: after their generation prompt, up to the template's end token."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from keeptune.data.record import Message
from keeptune.errors import DataError, RecipeError
from keeptune.text.chat import UnboundedTemplateError
from keeptune.text.conversation import ANSWER, QUESTION, THOUGHT, Conversations

_THINK = re.compile(r"\s*<(\w+)>\s*")


class Turns:
    """What a template writes around answers, told by what it writes around a made one.

    `end_token` becomes the template's own, and stays the one that is given where the template writes none.
    """

    mark: str
    """What the template writes between thoughts and an answer, "" where it writes no thoughts."""

    def __init__(self, texts: Conversations, *, switches: Sequence[str], end_token: str) -> None:
        self._texts = texts
        user, answer = Message("user", QUESTION), Message("assistant", ANSWER)
        opened = texts.text([user], add_generation_prompt=True)
        before, found, self._tail = texts.text([user, answer], add_generation_prompt=False).partition(ANSWER)
        common = _common_start([opened, before])
        # Some templates open thoughts in the generation prompt, and write them into no conversation.
        opens = _THINK.fullmatch(opened[len(common) :]) if common == before else None
        self._closing = f"\n</{opens[1]}>\n\n" if opens else ""
        self._opening = opens[0].strip() if opens else ""
        if opens:
            texts.accept_thoughts()
        self._lead = before[len(opened) :]
        self._header = opened.partition(QUESTION)[2]
        # Before an answer some write a space, or a mark that no thoughts come; a header belongs to the prompt.
        prompted = before.startswith(opened) and (not self._lead.strip() or texts.reasoning is not None)
        if not found or ANSWER in self._tail or not (opens or prompted):
            raise _unlike(before, opened)
        ends = [m for m in texts.controls.find(self._tail) if not m[0].isspace()]
        self._end = ends[0][0] if ends else None
        self.end_token = self._end or end_token
        self._before_end = self._tail[: ends[0].start()] if ends else ""
        self._earlier_end = self._end_of_earlier(user, answer)
        self.mark = self._closing.strip() or self._mark(user, answer)
        self._switches = names = [name for name in switches if texts.wording.has_variable(name)]
        openings = [
            texts.text([user], add_generation_prompt=True, switches=dict(zip(names, values, strict=True)))
            for values in product((False, True), repeat=len(names))
        ]
        around = _common_start([opened, before, *openings]) + "\0" + self._tail
        texts.controls.close_turns(token for token in texts.controls.written if token in around)

    def completion(self, messages: Sequence[Message], *, prompt: str, tools: str) -> tuple[str, str]:
        """Return what an answer to `prompt` is to be, and its end token.

        Raises:
            KeeptuneError: the template writes an answer otherwise than it prompts for it, or changes its content.
        """
        message = messages[-1]
        self._texts.refuse_fields([message])
        if self._opening:
            return self._after_thoughts(message) + self._before_end, self.end_token
        whole = self._texts.text(messages, add_generation_prompt=False, tools=tools)
        written = whole[len(prompt) :]
        if not whole.startswith(prompt):
            written = self._after_system(messages, whole, tools=tools)
        if not written:
            raise self._misplaced(message)
        end = self._end_of_answer(written)
        body, token = written[: end[0]], written[end[0] : end[1]]
        if not token:
            body, token = written.removesuffix(self._tail), self.end_token
        self._require_whole(body, message)
        return body, token

    def _misplaced(self, message: Message) -> DataError:
        """Return what to raise for an answer that does not stand after its generation prompt."""
        if self._switches and (message.reasoning or "</" in message.content):
            return DataError(
                f"chat template: found thoughts in an answer whose prompt ends with {self._header!r}, which says that "
                "there are none; expected no thoughts. Set data.enable_thinking=true to train on them."
            )
        return DataError(
            f"chat template: found an answer that does not stand after its generation prompt, which ends with "
            f"{self._header!r}; expected it there. Change the record, or set data.template=alpaca."
        )

    def _after_system(self, messages: Sequence[Message], whole: str, *, tools: str) -> str:
        """Return what follows the prompt of a conversation without its system message, "" where that ends otherwise.

        Some templates write the system message into the last message of a user, and forget it where an answer follows.
        """
        others = [message for message in messages if message.role != "system"]
        prompt = self._texts.prompt(others[:-1], tools=tools)
        text = self._texts.text(others, add_generation_prompt=False, tools=tools)
        written = text[len(prompt) :]
        return written if text.startswith(prompt) and whole.endswith(written) else ""

    def answer(self, messages: Sequence[Message], prompt: str, tools: str) -> tuple[int, int]:
        """Return where in the prompt of a longer conversation the last of these messages stands, with its end token.

        Raises:
            RecipeError: it does not stand there after its own generation prompt.
        """
        opened = self._texts.text(messages[:-1], add_generation_prompt=True, tools=tools)
        whole = self._texts.text(messages, add_generation_prompt=False, tools=tools)
        start = len(opened)
        if prompt.startswith(opened):
            if prompt.startswith(whole) and whole.startswith(opened):
                written = whole[start:]
                place, end = self._end_of_answer(written)
                return start, start + (end if end > place else len(written.rstrip()))
            end = prompt.find(self._earlier_end or self.end_token, start)
            if end >= 0:
                return start, end + len(self._earlier_end or self.end_token)
        raise RecipeError(
            f"data.train_on: found 'all', but the chat template writes message {len(messages)} of a "
            "conversation in another way than it prompts for it; expected the same text. Set data.train_on=last."
        )

    def answer_in(self, text: str) -> str:
        """Return the answer in what a model wrote, without the thoughts before it."""
        if self.mark:
            return self._texts.controls.without_special(text.rpartition(self.mark)[2]).lstrip("\n")
        return text.removeprefix(self._lead)

    def _end_of_answer(self, written: str) -> tuple[int, int]:
        """Return where the end token of an answer stands, after which there are but control tokens and spaces."""
        place, last = len(written), []
        for token in reversed(list(self._texts.controls.find(written))):
            if written[token.end() : place].strip():
                break
            last.append(token)
            place = token.start()
        if not last:
            return len(written), len(written)
        own = [token for token in reversed(last) if token[0] in (self._end, self._earlier_end)]
        end = own[0] if own else last[-1]
        return end.start(), end.end()

    def _end_of_earlier(self, user: Message, answer: Message) -> str | None:
        """Return the first control token after an answer that another message follows."""
        try:
            text = self._texts.text([user, answer, replace(user, content=THOUGHT)], add_generation_prompt=True)
        except UnboundedTemplateError:
            raise
        except RecipeError:
            return self._end
        between = text.partition(ANSWER)[2].partition(THOUGHT)[0]
        return next((token[0] for token in self._texts.controls.find(between)), self._end)

    def _mark(self, user: Message, answer: Message) -> str:
        if self._texts.reasoning is None:
            return ""
        text = self._texts.text([user, replace(answer, reasoning=THOUGHT)], add_generation_prompt=False)
        between = text.partition(THOUGHT)[2].partition(ANSWER)[0]
        common = _common_start([between[::-1], self._lead[::-1]])[::-1]
        return (common or between).strip()

    def _after_thoughts(self, message: Message) -> str:
        """Return the thoughts of a message, closed, and its answer, for a prompt that has opened the thoughts."""
        content = self._texts.controls.hide(message.content, answer=True)
        if message.reasoning:
            return self._texts.controls.hide(message.reasoning) + self._closing + content
        closing = self._closing.strip()
        if closing in content:
            return content.lstrip().removeprefix(self._opening).lstrip("\n")
        return self._closing + content

    def _require_whole(self, body: str, message: Message) -> None:
        """Refuse an answer of which the template leaves out or changes anything but spaces."""
        found = _squeezed(self._texts.controls.reveal(body))
        whole = (self._lead + message.content + self._before_end, message.content + self._before_end)
        if message.reasoning or message.tool_calls:
            names = [call["function"]["name"] for call in json.loads(message.tool_calls or "[]")]
            complete = all(_squeezed(part) in found for part in (message.reasoning, message.content, *names))
        else:
            complete = found in map(_squeezed, whole)
        if not complete:
            shown = self._texts.controls.reveal(body)
            raise DataError(
                f"chat template: found {shown[:60]!r} where it writes a message; expected the content, "
                "unchanged but for spaces around it. Change the record, or set data.template=alpaca."
            )


def _unlike(before: str, opened: str) -> RecipeError:
    """Return what to raise where a template writes every answer otherwise than it prompts for it."""
    return RecipeError(
        f"chat template: found an answer after {before[-40:]!r}, but a generation prompt that ends with "
        f"{opened[-40:]!r}; expected the same text before an answer as before its generation. "
        "Set data.template=alpaca, or choose another model."
    )


def _common_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def _squeezed(text: str) -> str:
    return "".join(text.split())
