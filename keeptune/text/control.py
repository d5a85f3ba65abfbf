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


class Controls:
    """The special tokens of a tokenizer, and `written`, the other added tokens that a template writes."""

    def __init__(self, tokenizer: Tokenizer, *, written: Iterable[str] = ()) -> None:
        self._tokenizer = tokenizer
        self.written = frozenset(written) - tokenizer.special_tokens.keys()
        self._text = tokenizer.plain_text(sorted(self.written))
        tokens = sorted({*tokenizer.special_tokens, *self.written})
        assert len(tokens) < ord(_QUOTE) - _FIRST, "more control tokens than stand-ins"
        self._stand_ins = {token: chr(_FIRST + i) for i, token in enumerate(tokens)}
        self._words = {stand_in: token for token, stand_in in self._stand_ins.items()}
        self._found = _any_of(tokens)
        self._hidden = re.compile(f"{self._found.pattern}|{_PLANE}")
        self._hidden_in_answers = self._hidden
        self._may_normalise = bool(tokenizer.normalised_tokens.intersection(tokens))

    def close_turns(self, turns: Iterable[str]) -> None:
        """Hide of the written tokens only `turns` in answers, which begin or end a turn.

        The others, such as `</think>`, are what a model writes in an answer.
        """
        kept = self._stand_ins.keys() - self.written.difference(turns)
        self._hidden_in_answers = re.compile(f"{_any_of(sorted(kept)).pattern}|{_PLANE}")

    def hide(self, text: str, *, answer: bool = False) -> str:
        """Return a content with its control tokens replaced; `answer`: it is the content of an assistant message."""
        pattern = self._hidden_in_answers if answer else self._hidden
        return pattern.sub(lambda found: self._stand_ins.get(found[0], _QUOTE + found[0]), text)

    def reveal(self, text: str) -> str:
        """Return a text with the words that `hide` replaced."""
        return _STAND_IN.sub(lambda found: found[1] or self._words.get(found[2], ""), text)

    def find(self, text: str) -> Iterator[re.Match[str]]:
        """Yield the control tokens in a rendered text, all of them the template's."""
        return self._found.finditer(text)

    def without_special(self, text: str) -> str:
        """Return a text without the special tokens in it."""
        return self._found.sub(lambda found: found[0] if found[0] in self.written else "", text)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of rendered texts.

        Raises:
            DataError: the tokenizer reads a control token in a content all the same.
        """
        plain = [i for i, text in enumerate(texts) if not (self._may_normalise or _STAND_IN.search(text))]
        rows: list[list[int]] = [[] for _ in texts]
        for i, ids in zip(plain, self._tokenizer.encode_rendered([texts[i] for i in plain]), strict=True):
            rows[i] = ids
        for i in set(range(len(texts))).difference(plain):
            rows[i] = self.encode_places(texts[i]).ids
        return rows

    def encode_places(self, text: str) -> Encoded:
        """Return the ids of a rendered text with their places in it.

        Raises:
            DataError: the tokenizer reads a control token in a content all the same.
        """
        tokens = self._tokenizer.encode_rendered_places(text)
        controls = [i for i, (token, _) in enumerate(tokens) if token in self._text.control_ids]
        if self._may_normalise and len(controls) > sum(1 for _ in self.find(text)):
            raise unreadable("one that its normaliser makes")
        found = Encoded([], [])
        end = after = 0
        for index in [*controls, len(tokens)]:
            start = tokens[index][1][0] if index < len(tokens) else len(text)
            if _STAND_IN.search(text, end, start):
                self._add_stretch(found, text[end:start], place=end, first=after == 0)
            else:
                found.ids.extend(token for token, _ in tokens[after:index])
                found.starts.extend(start for _, (start, _) in tokens[after:index])
            if index < len(tokens):
                found.ids.append(tokens[index][0])
                found.starts.append(start)
                end, after = tokens[index][1][1], index + 1
        return found

    def encode_answer(self, text: str, *, first: bool) -> list[int]:
        """Return the ids of an answer that the template wrote: of a text of its own, or of one that goes on."""
        ids: list[int] = []
        place = 0
        matches = [(m.start(), m.end()) for m in self.find(text)]
        for start, end in [*matches, (len(text), len(text))]:
            stretch = self.reveal(text[place:start])
            (part,) = self._text.encode([stretch], first=first if place == 0 else self._text.spaces_after_control)
            ids += part
            if end > start:
                ids.append(self._tokenizer.added_tokens[text[start:end]])
            place = end
        return ids

    def _add_stretch(self, found: Encoded, stretch: str, *, place: int, first: bool) -> None:
        revealed: list[str] = []
        places: list[int] = []
        before = 0
        for match in _STAND_IN.finditer(stretch):
            word = match[1] or self._words.get(match[2], "")
            revealed += [stretch[before : match.start()], word]
            places += [*range(before, match.start()), *[match.start()] * len(word)]
            before = match.end()
        revealed.append(stretch[before:])
        places += [*range(before, len(stretch)), len(stretch)]
        first = first or self._text.spaces_after_control
        for token, start in self._text.encode_places("".join(revealed), first=first):
            found.ids.append(token)
            found.starts.append(place + places[start])


def _any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
