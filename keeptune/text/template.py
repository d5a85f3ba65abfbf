"""Messages arrive, segments of text leave, each trained on or not: the one renderer of train, evaluate and chat.

A wording is rendered once per shape of conversation, with private-use placeholders for the contents; the spans of a
record are the places of its contents, never found by a search for them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from keeptune.data.record import Message
from keeptune.errors import DataError, RecipeError
from keeptune.text.chat import ChatWording
from keeptune.text.tokenizer import Tokenizer
from keeptune.text.wording import ALPACA, CHATML, CHATML_TOKENS, PLAIN, PLAIN_ENCODER, VERSION

TemplateName = Literal["auto", "chat", "chatml", "alpaca", "plain"]
_TurnName = Literal["chat", "chatml", "alpaca", "plain"]
TrainOn = Literal["all", "last"]
_PLACEHOLDER = re.compile("\ue000([0-9]+)\ue001")
# Content 2i and input 2i + 1 of message i stand between literal texts.
_Parts = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of rendered text.

    `special`: exactly one special token of the tokenizer, written by the template. `completion`: the content of an
    assistant message, which is tokenised on its own because generation writes it on its own.
    """

    text: str
    trained: bool = False
    special: bool = False
    completion: bool = False


class Template(Protocol):
    """How messages become text. `fingerprint` changes with the wording; `end_token` is what ends an answer."""

    name: str
    fingerprint: str
    end_token: str
    chat_template: str
    """The Jinja source that renders the same in transformers' apply_chat_template."""

    def render(self, messages: Sequence[Message], *, train_on: TrainOn) -> list[Segment]:
        """Return the whole conversation; trained segments are assistant contents and the end tokens after them."""
        ...

    def render_prompt(self, messages: Sequence[Message]) -> list[Segment]:
        """Return what generation starts from, given the messages without the completion."""
        ...


def make_template(name: TemplateName, *, tokenizer: Tokenizer, encoder_decoder: bool) -> Template:
    """Return the template of a run.

    `auto` is the tokenizer's chat template, else alpaca; plain for an encoder-decoder.

    Raises:
        RecipeError: `chat` is asked of a tokenizer without a chat template, `chatml` of one without ChatML's special
            tokens, or either for an encoder-decoder.
    """
    if encoder_decoder:
        if name in ("chat", "chatml"):
            raise RecipeError(
                f"data.template: found {name!r} for an encoder-decoder model; expected auto, plain or alpaca. "
                "Set data.template=auto."
            )
        return _PairTemplate("alpaca" if name == "alpaca" else "plain", tokenizer=tokenizer)
    if name == "auto":
        name = "chat" if tokenizer.chat_template is not None else "alpaca"
    if name == "chatml":
        _require_chatml_tokens(tokenizer)
    if name != "chat":
        source = {"chatml": CHATML, "alpaca": ALPACA, "plain": PLAIN}[name]
        return _TurnTemplate(name, source=source, tokenizer=tokenizer)
    if tokenizer.chat_template is None:
        raise RecipeError(
            "data.template: found 'chat', but the tokenizer has no chat template; expected auto, chatml, alpaca or "
            "plain. Set data.template=auto."
        )
    return _TurnTemplate("chat", source=tokenizer.chat_template, tokenizer=tokenizer)


def _require_chatml_tokens(tokenizer: Tokenizer) -> None:
    missing = [token for token in CHATML_TOKENS if token not in tokenizer.special_tokens]
    if missing:
        raise RecipeError(
            f"data.template: found 'chatml', but the tokenizer has no special token {' or '.join(missing)}; "
            f"expected both {' and '.join(CHATML_TOKENS)}. Set data.template=auto, or choose another model."
        )


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a wording writes around the contents of every conversation with the same roles."""

    prompt: _Parts
    whole: _Parts
    answers: frozenset[int]
    tail: str
    untrainable: int | None
    """The first earlier assistant message that does not stand after its own generation prompt."""


class _TurnTemplate:
    """The template of a model that reads one sequence: the tokenizer's own wording, ChatML, alpaca or plain."""

    def __init__(self, name: _TurnName, *, source: str, tokenizer: Tokenizer) -> None:
        self.name = name
        self._tokenizer = tokenizer
        longest_first = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)))
        if "enable_thinking" in source:
            # The completions hold answers, not thoughts; a caller of the saved template can still ask for them.
            default = "{% if enable_thinking is not defined %}{% set enable_thinking = false %}{% endif %}{{ '' }}"
            source = default + source
        self._shapes: dict[tuple[tuple[str, bool], ...], _Shape] = {}
        self._wording = ChatWording(source, role_tokens=tokenizer.role_tokens)
        question, answer = Message("user", "question"), Message("assistant", "answer")
        opening = self.render_prompt([question])[0]
        if tokenizer.adds_bos and (opening.text, opening.special) != (tokenizer.bos_token, True):
            source = "{{ bos_token }}" + source
            self._wording = ChatWording(source, role_tokens=tokenizer.role_tokens)
            self._shapes.clear()
        self.chat_template = source
        self.fingerprint = _fingerprint(name, source=source, tokenizer=tokenizer)
        last = [segment for segment in self.render([question, answer], train_on="last") if segment.trained]
        self.end_token = last[-1].text

    def render(self, messages: Sequence[Message], *, train_on: TrainOn) -> list[Segment]:
        """Return the whole conversation, which ends with an assistant message."""
        messages = self._prepared(messages)
        shape = self._shape(messages[:-1])
        if train_on == "all" and shape.untrainable is not None:
            raise RecipeError(
                f"data.train_on: found 'all', but the chat template writes message {shape.untrainable + 1} of a "
                "conversation in another way than it prompts for it; expected the same text. Set data.train_on=last."
            )
        values = self._prompt_values(messages[:-1], shape=shape)
        completion = self._completion(messages, values=values, shape=shape)
        segments = self._segments(shape, values=values, trained=train_on == "all")
        end = self._special.search(shape.tail)
        segments.append(Segment(completion, trained=True, completion=True))
        segments.append(Segment(end[0] if end else self._tokenizer.eos_token, trained=True, special=True))
        return [*segments, *self._split(shape.tail[end.end() :] if end else shape.tail)]

    def render_prompt(self, messages: Sequence[Message]) -> list[Segment]:
        """Return what generation starts from, given the messages without the completion."""
        messages = self._prepared(messages)
        shape = self._shape(messages)
        return self._segments(shape, values=self._prompt_values(messages, shape=shape), trained=False)

    def _prepared(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages with content and input joined, except for the wording that keeps them apart."""
        if self.name == "alpaca":
            return list(messages)
        return [Message(message.role, message.text) for message in messages]

    def _shape(self, prompt: Sequence[Message]) -> _Shape:
        key = tuple((message.role, bool(message.input)) for message in prompt)
        if key not in self._shapes:
            self._shapes[key] = self._make_shape(prompt)
        return self._shapes[key]

    def _make_shape(self, prompt: Sequence[Message]) -> _Shape:
        contents = [(f"\ue000{2 * i}\ue001", f"\ue000{2 * i + 1}\ue001") for i in range(len(prompt) + 1)]
        stand_ins = [
            Message(message.role, contents[i][0], contents[i][1] if message.input else "")
            for i, message in enumerate((*prompt, Message("assistant", "")))
        ]
        opened = self._direct(stand_ins[:-1], add_generation_prompt=True)
        whole = self._direct(stand_ins, add_generation_prompt=False)
        before, found, tail = whole.partition(contents[len(prompt)][0])
        if not found or not before.startswith(opened) or before[len(opened) :].strip() or _PLACEHOLDER.search(tail):
            raise RecipeError(
                f"chat template: found an answer after {before[-40:]!r}, but a generation prompt that ends with "
                f"{opened[-40:]!r}; expected the same text before an answer as before its generation. "
                "Set data.template=alpaca, or choose another model."
            )
        shown = set(_PLACEHOLDER.findall(opened))
        for i, message in enumerate(prompt):
            if str(2 * i) not in shown or (message.role == "assistant" and opened.count(contents[i][0]) != 1):
                raise RecipeError(
                    f"chat template: found the {message.role} message {i + 1} of a conversation left out or repeated; "
                    "expected every message once. Remove such messages, or set data.template=alpaca."
                )
        untrainable = None
        for i in [i for i, message in enumerate(prompt) if message.role == "assistant"]:
            if untrainable is None and opened.partition(contents[i][0])[0] != self._direct(
                stand_ins[:i], add_generation_prompt=True
            ):
                untrainable = i
        answers = frozenset(2 * i for i, message in enumerate(prompt) if message.role == "assistant")
        return _Shape(_parts(opened), whole=_parts(whole), answers=answers, tail=tail, untrainable=untrainable)

    def _direct(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        return self._wording.render(_as_dicts(messages), add_generation_prompt=add_generation_prompt)

    def _prompt_values(self, messages: Sequence[Message], *, shape: _Shape) -> dict[int, str]:
        """Return each content as the wording writes it: some trim it, none may change it otherwise."""
        values = {2 * i: message.content for i, message in enumerate(messages)}
        values |= {2 * i + 1: message.input for i, message in enumerate(messages)}
        if self.name != "chat":
            return values
        return self._written(shape.prompt, values=values, rendered=self._direct(messages, add_generation_prompt=True))

    def _completion(self, messages: Sequence[Message], *, values: Mapping[int, str], shape: _Shape) -> str:
        completion = messages[-1].content
        if self.name != "chat":
            return completion
        last = 2 * (len(messages) - 1)
        rendered = self._direct(messages, add_generation_prompt=False)
        return self._written(shape.whole, values={**values, last: completion}, rendered=rendered)[last]

    def _written(self, parts: _Parts, *, values: Mapping[int, str], rendered: str) -> dict[int, str]:
        """Return the contents as they stand in `rendered`, which must hold nothing else than the parts."""
        written: dict[int, str] = {}
        place = 0
        for part, after in zip(parts, (*parts[1:], ""), strict=True):
            text = part if isinstance(part, str) else written.get(part)
            if text is None:
                known, literal = values[int(part)], after if isinstance(after, str) else ""
                text = next((o for o in _trimmed(known) if rendered.startswith(o + literal, place)), known)
                written[int(part)] = text
            if not rendered.startswith(text, place):
                break
            place += len(text)
        else:
            if place == len(rendered):
                return {**values, **written}
        raise RecipeError(
            f"chat template: found {rendered[place : place + 60]!r} where it writes a message; expected the content, "
            "unchanged but for spaces around it. Change the record, or set data.template=alpaca."
        )

    def _segments(self, shape: _Shape, *, values: Mapping[int, str], trained: bool) -> list[Segment]:
        """Return the prompt as segments; what no assistant wrote is joined up to the next special token."""
        segments: list[Segment] = []
        for part in shape.prompt:
            if isinstance(part, str):
                pieces = self._split(part)
            else:
                answer = part in shape.answers
                pieces = iter([Segment(values[part], trained=trained and answer, completion=answer)])
            for piece in pieces:
                _append(segments, piece)
        return segments

    def _split(self, text: str) -> Iterator[Segment]:
        """Yield literal text of the wording, each special token in it a segment of its own."""
        place = 0
        for found in self._special.finditer(text):
            if found.start() > place:
                yield Segment(text[place : found.start()])
            yield Segment(found[0], special=True)
            place = found.end()
        if place < len(text):
            yield Segment(text[place:])


def _append(segments: list[Segment], piece: Segment) -> None:
    """Add a piece: text joins the text before it, an end token straight after a trained answer is trained too."""
    before = segments[-1] if segments else None
    if before is not None and before.completion and piece.special:
        piece = Segment(piece.text, trained=before.trained, special=True)
    elif before is not None and not (before.special or before.completion or piece.special or piece.completion):
        piece = Segment(segments.pop().text + piece.text)
    segments.append(piece)


def _trimmed(text: str) -> Iterator[str]:
    """Yield the text as it is, then without the newlines or the spaces at its start, its end or both."""
    core = text.strip()
    lead = text[: len(text) - len(text.lstrip())]
    trail = text[len(lead) + len(core) :]
    for before in dict.fromkeys((lead, lead.lstrip("\n"), "")):
        for after in dict.fromkeys((trail, trail.rstrip("\n"), "")):
            yield before + core + after


class _PairTemplate:
    """The template of an encoder-decoder: the prompt and its end token are read, the completion is written."""

    def __init__(self, name: Literal["alpaca", "plain"], *, tokenizer: Tokenizer) -> None:
        self.name = name
        source = {"alpaca": ALPACA.replace(" + eos_token", ""), "plain": PLAIN_ENCODER}[name]
        opening = "{{ bos_token }}" if tokenizer.adds_bos else ""
        self.chat_template = f"{opening}{source}{{{{ eos_token }}}}"
        self.end_token = tokenizer.eos_token
        self.fingerprint = _fingerprint(f"{name}-pair", source=self.chat_template, tokenizer=tokenizer)
        self._bos = tokenizer.bos_token if tokenizer.adds_bos else None
        self._wording = ChatWording(source, role_tokens={})

    def render(self, messages: Sequence[Message], *, train_on: TrainOn) -> list[Segment]:
        """Return the encoder's segments, then the decoder's, which are the trained ones."""
        if train_on == "all" and sum(message.role == "assistant" for message in messages) > 1:
            raise DataError(
                "data.train_on: found 'all' and a conversation of several answers; expected one, since an "
                "encoder-decoder writes one answer to what it reads. Set data.train_on=last."
            )
        completion = Segment(messages[-1].content, trained=True, completion=True)
        return [*self.render_prompt(messages[:-1]), completion, Segment(self.end_token, trained=True, special=True)]

    def render_prompt(self, messages: Sequence[Message]) -> list[Segment]:
        """Return what the encoder reads, given the messages without the completion."""
        if self.name == "plain":
            messages = [Message(message.role, message.text) for message in messages]
        text = self._wording.render(_as_dicts(messages), add_generation_prompt=True)
        opening = [Segment(self._bos, special=True)] if self._bos is not None else []
        return [*opening, Segment(text), Segment(self.end_token, special=True)]


def _parts(text: str) -> _Parts:
    """Return literal text and placeholder numbers in turn, without empty text."""
    pieces = _PLACEHOLDER.split(text)
    return tuple(int(piece) if i % 2 else piece for i, piece in enumerate(pieces) if piece)


def _as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content, **({"input": m.input} if m.input else {})} for m in messages]


def _fingerprint(name: str, *, source: str, tokenizer: Tokenizer) -> str:
    facts = [VERSION, name, source, sorted(tokenizer.role_tokens.items()), tokenizer.adds_bos]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
