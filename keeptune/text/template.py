"""Messages arrive, rendered text leaves, with what of it is trained on: the one renderer of train, evaluate and chat.

The text is that of transformers' apply_chat_template. What an answer is stands behind its generation prompt, up to the
template's own end token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from keeptune.data.record import Message
from keeptune.errors import DataError, RecipeError
from keeptune.text.chat import ChatWording
from keeptune.text.control import Controls
from keeptune.text.conversation import Conversations
from keeptune.text.tokenizer import Tokenizer
from keeptune.text.turns import Turns
from keeptune.text.wording import ALPACA, CHATML, CHATML_TOKENS, PLAIN, PLAIN_ENCODER, VERSION

TemplateName = Literal["auto", "chat", "chatml", "alpaca", "plain"]
TrainOn = Literal["all", "last"]
# Variables by which templates are told whether an answer begins with thoughts.
_SWITCHES = ("enable_thinking", "thinking")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text, in which the control tokens of contents are hidden.

    `completion` follows `prompt` and ends with the end token `end`; all of it is trained on. So are the `answers`,
    stretches [start, end) of the prompt.
    """

    prompt: str
    completion: str
    end: str
    answers: tuple[tuple[int, int], ...] = ()


class Template(Protocol):
    """How messages become text. `fingerprint` changes with the wording; `end_token` is what ends an answer."""

    name: str
    fingerprint: str
    end_token: str
    chat_template: str
    """The Jinja source that renders the same in transformers' apply_chat_template."""
    controls: Controls
    """The tokens that are hidden where contents spell them."""

    def render(self, messages: Sequence[Message], *, train_on: TrainOn, tools: str = "") -> Rendered:
        """Return the whole conversation, which ends with an assistant message.

        Raises:
            KeeptuneError: the template refuses the conversation, or leaves out or changes a part of it.
        """
        ...

    def render_prompt(self, messages: Sequence[Message], *, tools: str = "") -> str:
        """Return what generation starts from, given the messages without the completion."""
        ...

    def as_dicts(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Return messages as transformers' apply_chat_template takes them."""
        ...

    def answers(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the answers in what a model wrote after prompts, without thoughts and special tokens."""
        ...

    def reference(self, messages: Sequence[Message], *, tools: str = "") -> str:
        """Return the text that `answers` gives where a model writes the completion of a conversation."""
        ...

    def unread(self, messages: Sequence[Message], *, tools: str = "") -> set[str]:
        """Return what a record has beside contents and the template does not read, such as `tools`."""
        ...


def make_template(
    name: TemplateName, *, tokenizer: Tokenizer, encoder_decoder: bool, enable_thinking: bool = False
) -> Template:
    """Return the template of a run.

    `auto` is the tokenizer's chat template, else alpaca, or plain for an encoder-decoder. `enable_thinking` is what
    the template is told where it asks.

    Raises:
        RecipeError: `chat` is asked of a tokenizer without a chat template, `chatml` of one without ChatML's tokens or
            for an encoder-decoder, or a chat template cannot be used.
    """
    if name == "auto":
        without = "plain" if encoder_decoder else "alpaca"
        name = "chat" if tokenizer.chat_template is not None else without
    if name == "chat":
        if tokenizer.chat_template is None:
            raise RecipeError(
                "data.template: found 'chat', but the tokenizer has no chat template; expected auto, chatml, alpaca or "
                "plain. Set data.template=auto."
            )
        source = _with_switches(tokenizer.chat_template, enable_thinking=enable_thinking)
        return _TurnTemplate(name, source=source, tokenizer=tokenizer, pairs=encoder_decoder)
    if enable_thinking:
        raise RecipeError(
            f"data.enable_thinking: found true with the template {name!r}, which has no place for thoughts; expected "
            "false. Set data.enable_thinking=false, or choose a model with a chat template."
        )
    if encoder_decoder:
        if name == "chatml":
            raise RecipeError(
                "data.template: found 'chatml' for an encoder-decoder model; expected auto, chat, plain or alpaca. "
                "Set data.template=auto."
            )
        return _PairTemplate(name, tokenizer=tokenizer)
    if name == "chatml":
        _require_chatml_tokens(tokenizer)
    source = {"chatml": CHATML, "alpaca": ALPACA, "plain": PLAIN}[name]
    # Only the first message of these wordings could begin with a BOS token of its own.
    opening = "{{ bos_token }}" if tokenizer.adds_bos else ""
    return _TurnTemplate(name, source=opening + source, tokenizer=tokenizer, pairs=False)


def _with_switches(source: str, *, enable_thinking: bool) -> str:
    """Return a chat template that thinks or not, unless a caller of it says otherwise."""
    wording = ChatWording(source, role_tokens={})
    names = [name for name in _SWITCHES if wording.has_variable(name)]
    if enable_thinking and not names:
        raise RecipeError(
            "data.enable_thinking: found true, but the chat template has no such switch; expected false. Set "
            "data.enable_thinking=false: thoughts are trained on wherever the template writes them."
        )
    value = str(enable_thinking).lower()
    defaults = [
        f"{{% if {name} is not defined %}}{{% set {name} = {value} %}}{{% endif %}}{{{{ '' }}}}" for name in names
    ]
    return "".join(defaults) + source


def _require_chatml_tokens(tokenizer: Tokenizer) -> None:
    missing = [token for token in CHATML_TOKENS if token not in tokenizer.added_tokens]
    if missing:
        raise RecipeError(
            f"data.template: found 'chatml', but the tokenizer has no special token {' or '.join(missing)}; "
            f"expected both {' and '.join(CHATML_TOKENS)}. Set data.template=auto, or choose another model."
        )


class _TurnTemplate:
    """A template of turns: the tokenizer's own wording, ChatML, alpaca or plain."""

    def __init__(self, name: str, *, source: str, tokenizer: Tokenizer, pairs: bool) -> None:
        self.name = name
        self.chat_template = source
        self.fingerprint = _fingerprint(f"{name}-pair" if pairs else name, source=source, tokenizer=tokenizer)
        self._pairs = pairs
        self._tokenizer = tokenizer
        wording = ChatWording(source, role_tokens=tokenizer.role_tokens)
        self._texts = Conversations(wording, keeps_input=name == "alpaca", own=name == "chat", tokenizer=tokenizer)
        self._turns = Turns(self._texts, switches=_SWITCHES, end_token=tokenizer.eos_token)
        self.controls = self._texts.controls
        self.end_token = self._turns.end_token

    def render(self, messages: Sequence[Message], *, train_on: TrainOn, tools: str = "") -> Rendered:
        """Return the whole conversation, which ends with an assistant message."""
        prompt = self._texts.prompt(messages[:-1], tools=tools)
        body, end = self._turns.completion(messages, prompt=prompt, tools=tools)
        earlier = [i for i, m in enumerate(messages[:-1]) if m.role == "assistant" and m.trained]
        if train_on == "last" or not earlier:
            return Rendered(prompt, body + end, end)
        if self._pairs:
            raise _several_answers()
        answers = tuple(self._turns.answer(messages[: i + 1], prompt, tools) for i in earlier)
        return Rendered(prompt, body + end, end, answers)

    def render_prompt(self, messages: Sequence[Message], *, tools: str = "") -> str:
        """Return what generation starts from, given the messages without the completion."""
        return self._texts.prompt(messages, tools=tools)

    def as_dicts(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Return messages as transformers' apply_chat_template takes them."""
        return self._texts.as_dicts(messages)

    def answers(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the answers in what a model wrote after prompts, without thoughts and special tokens."""
        special = self._turns.mark == ""
        texts = self._tokenizer.decode_batch(rows, first=self._pairs, skip_special_tokens=special)
        return [self._turns.answer_in(text) for text in texts]

    def reference(self, messages: Sequence[Message], *, tools: str = "") -> str:
        """Return the text that `answers` gives where a model writes the completion of a conversation."""
        prompt = self._texts.prompt(messages[:-1], tools=tools)
        text, _ = self._turns.completion(messages, prompt=prompt, tools=tools)
        answer = self._turns.answer_in(text if self._turns.mark else self.controls.without_special(text))
        return self.controls.reveal(answer)

    def unread(self, messages: Sequence[Message], *, tools: str = "") -> set[str]:
        """Return what a record has beside contents and the template does not read, such as `tools`."""
        return self._texts.unread(messages, tools=tools)


class _PairTemplate:
    """The wording of an encoder-decoder: the prompt and its end token are read, the completion is written."""

    def __init__(self, name: Literal["alpaca", "plain"], *, tokenizer: Tokenizer) -> None:
        self.name = name
        source = {"alpaca": ALPACA.replace(" + eos_token", ""), "plain": PLAIN_ENCODER}[name]
        opening = "{{ bos_token }}" if tokenizer.adds_bos else ""
        self.chat_template = f"{opening}{source}{{{{ eos_token }}}}"
        self.end_token = tokenizer.eos_token
        self.fingerprint = _fingerprint(f"{name}-pair", source=self.chat_template, tokenizer=tokenizer)
        self._tokenizer = tokenizer
        wording = ChatWording(self.chat_template, role_tokens=tokenizer.role_tokens)
        self._texts = Conversations(wording, keeps_input=name == "alpaca", own=False, tokenizer=tokenizer)
        self.controls = self._texts.controls

    def render(self, messages: Sequence[Message], *, train_on: TrainOn, tools: str = "") -> Rendered:
        """Return what the encoder reads, and what the decoder writes."""
        if train_on == "all" and sum(message.role == "assistant" and message.trained for message in messages) > 1:
            raise _several_answers()
        self._texts.refuse_fields(messages)
        completion = self.controls.hide(messages[-1].content, answer=True) + self.end_token
        return Rendered(self.render_prompt(messages[:-1]), completion, self.end_token)

    def render_prompt(self, messages: Sequence[Message], *, tools: str = "") -> str:
        """Return what the encoder reads, given the messages without the completion."""
        return self._texts.prompt(messages, tools=tools)

    def as_dicts(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Return messages as transformers' apply_chat_template takes them."""
        return self._texts.as_dicts(messages)

    def answers(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return what a model wrote, without special tokens."""
        return self._tokenizer.decode_batch(rows, first=True, skip_special_tokens=True)

    def reference(self, messages: Sequence[Message], *, tools: str = "") -> str:
        """Return the content of the completion."""
        return messages[-1].content

    def unread(self, messages: Sequence[Message], *, tools: str = "") -> set[str]:
        """Return what a record has beside contents and the template does not read, such as `tools`."""
        return self._texts.unread(messages, tools=tools)


def _several_answers() -> DataError:
    return DataError(
        "data.train_on: found 'all' and a conversation of several answers; expected one, since an "
        "encoder-decoder writes one answer to what it reads. Set data.train_on=last."
    )


def _fingerprint(name: str, *, source: str, tokenizer: Tokenizer) -> str:
    facts = [VERSION, name, source, sorted(tokenizer.role_tokens.items()), tokenizer.adds_bos]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
