"""Control tokens: contents arrive and are hidden, rendered text arrives and its ids leave.

A template writes control tokens, and a content may spell the same words. So that no content becomes a control token,
each such word in a content is replaced by one private-use character, its stand-in, before the template is rendered. The
rendered text is encoded as transformers encodes it, with the flags of every added token; then each stretch between two
control tokens that holds a stand-in is encoded anew, as plain text with the words put back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from keeptune.text.plain_text import unreadable
from keeptune.text.tokenizer import Tokenizer

# Plane 16 is for private use. A text's own characters of that plane are written behind the last of them.
_FIRST, _QUOTE = 0x100000, "\U0010fffd"
_PLANE = f"[{chr(_FIRST)}-{_QUOTE}]"
_STAND_IN = re.compile(f"{_QUOTE}({_PLANE})|({_PLANE})")


@dataclass(frozen=True, slots=True)
class Encoded:
    """The ids of a rendered text, each with the index of its first character there."""

    ids: list[int]
    starts: list[int]


class StandIns:
    """The character that stands for each added token of a tokenizer where a content spells it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokens = sorted(tokenizer.added_tokens)
        assert len(tokens) < ord(_QUOTE) - _FIRST, "more added tokens than stand-ins"
        self._characters = {token: chr(_FIRST + i) for i, token in enumerate(tokens)}
        self._words = {character: token for token, character in self._characters.items()}

    def hide(self, text: str, pattern: re.Pattern[str]) -> str:
        """Return a text with the tokens that `pattern` finds replaced."""
        return pattern.sub(lambda found: self._characters.get(found[0], _QUOTE + found[0]), text)

    def reveal(self, text: str) -> str:
        """Return a text with the words that `hide` replaced."""
        return _STAND_IN.sub(lambda found: self.word(found), text)

    def word(self, found: re.Match[str]) -> str:
        """Return what a stand-in that `_STAND_IN` found stands for."""
        return found[1] or self._words.get(found[2], "")


class Controls:
    """The special tokens of a tokenizer, and `written`, the other added tokens that a template writes."""

    def __init__(self, tokenizer: Tokenizer, *, written: Iterable[str] = ()) -> None:
        self.written = frozenset(written) - tokenizer.special_tokens.keys()
        self._tokens = {*tokenizer.special_tokens, *self.written}
        self._stand_ins = StandIns(tokenizer)
        self._found = _any_of(self._tokens)
        self._hidden = self._hidden_in_answers = re.compile(f"{self._found.pattern}|{_PLANE}")

    def close_turns(self, turns: Iterable[str]) -> None:
        """Hide of the written tokens only `turns` in answers, which begin or end a turn.

        The others, such as `</think>`, are what a model writes in an answer.
        """
        kept = self._tokens - self.written.difference(turns)
        self._hidden_in_answers = re.compile(f"{_any_of(kept).pattern}|{_PLANE}")

    def hide(self, text: str, *, answer: bool = False) -> str:
        """Return a content with its control tokens replaced; `answer`: it is the content of an assistant message."""
        return self._stand_ins.hide(text, self._hidden_in_answers if answer else self._hidden)

    def reveal(self, text: str) -> str:
        """Return a text with the words that `hide` replaced."""
        return self._stand_ins.reveal(text)

    def find(self, text: str) -> Iterator[re.Match[str]]:
        """Yield the control tokens in a rendered text, all of them the template's."""
        return self._found.finditer(text)

    def without_special(self, text: str) -> str:
        """Return a text without the special tokens in it."""
        return self._found.sub(lambda found: found[0] if found[0] in self.written else "", text)


class Encoder:
    """Encodes rendered text with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stand_ins = StandIns(tokenizer)
        unknown = tokenizer.role_tokens.get("unk_token")
        self._added = {index: token for token, index in tokenizer.added_tokens.items() if token != unknown}
        self._may_change = tokenizer.normalised_tokens & tokenizer.special_tokens.keys() - {unknown}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of rendered texts.

        Raises:
            DataError: the tokenizer reads a control token in a content all the same.
        """
        plain = [i for i, text in enumerate(texts) if not (self._may_change or _STAND_IN.search(text))]
        encoded = zip(plain, self._tokenizer.encode_rendered([texts[i] for i in plain]), strict=True)
        rows = dict(encoded)
        return [rows[i] if i in rows else self.encode_places(text).ids for i, text in enumerate(texts)]

    def encode_places(self, text: str) -> Encoded:
        """Return the ids of a rendered text with their places in it.

        Raises:
            DataError: the tokenizer reads a control token in a content all the same.
        """
        tokens = self._tokenizer.encode_rendered_places(text)
        for index, (start, end) in tokens:
            token = self._added.get(index, "")
            if token in self._may_change and text[start:end].strip() != token:
                raise unreadable(token)
        found = Encoded([], [])
        end = after = 0
        for i in [*(i for i, (token, _) in enumerate(tokens) if token in self._added), len(tokens)]:
            start = tokens[i][1][0] if i < len(tokens) else len(text)
            if _STAND_IN.search(text, end, start):
                self._add_stretch(found, text[end:start], place=end, first=after == 0)
            else:
                found.ids.extend(token for token, _ in tokens[after:i])
                found.starts.extend(start for _, (start, _) in tokens[after:i])
            if i < len(tokens):
                found.ids.append(tokens[i][0])
                found.starts.append(start)
                end, after = tokens[i][1][1], i + 1
        return found

    def encode_answer(self, text: str, *, first: bool) -> list[int]:
        """Return the ids of an answer that stands alone, as a text of its own (`first`) or as one that goes on."""
        if first:
            return self.encode_places(text).ids
        pieces = _any_of(self._tokenizer.added_tokens)
        ids: list[int] = []
        place = 0
        for start, end in [*(found.span() for found in pieces.finditer(text)), (len(text), len(text))]:
            ids += self._as_text(text[place:start], first=bool(ids) and self._tokenizer.spaces_after_special)
            ids += [self._tokenizer.added_tokens[text[start:end]]] if end > start else []
            place = end
        return ids

    def _as_text(self, stretch: str, *, first: bool) -> list[int]:
        found = Encoded([], [])
        self._add_stretch(found, stretch, place=0, first=first)
        return found.ids

    def _add_stretch(self, found: Encoded, stretch: str, *, place: int, first: bool) -> None:
        """Add a text without control tokens, with the words put back that the stand-ins in it stand for."""
        words: set[str] = set()
        revealed: list[str] = []
        places: list[int] = []
        before = 0
        for match in _STAND_IN.finditer(stretch):
            word = self._stand_ins.word(match)
            words |= {word} & self._tokenizer.added_tokens.keys()
            revealed += [stretch[before : match.start()], word]
            places += [*range(before, match.start()), *[match.start()] * len(word)]
            before = match.end()
        revealed.append(stretch[before:])
        places += [*range(before, len(stretch)), len(stretch)]
        first = first or (place > 0 and self._tokenizer.spaces_after_special)
        text = self._tokenizer.plain_text(frozenset(words))
        for token, start in text.encode_places("".join(revealed), first=first):
            found.ids.append(token)
            found.starts.append(place + places[start])


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
