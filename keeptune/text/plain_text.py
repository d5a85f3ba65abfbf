"""Text arrives, token ids leave, and back; a control token's string inside a text stays text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer as Backend

from keeptune.errors import DataError


class PlainText:
    """Encodes text in which none of the control tokens is read, whatever the text spells.

    `backend` ignores the special tokens of a text; all control tokens must be special ones of it.
    """

    spaces_after_control: bool
    """Whether text that follows a control token gets a dummy space, as text at the start does."""

    def __init__(
        self, backend: Backend, *, raw: Mapping[str, Any], controls: Mapping[str, int], unknown: str | None
    ) -> None:
        self._controls = controls
        self._unknown = unknown
        self._start = self._continue = backend
        changes = _continuing(raw)
        self.spaces_after_control = bool(changes) and not _only_first(raw)
        if changes:
            self._continue = Backend.from_str(json.dumps({**json.loads(backend.to_str()), **changes}))
            self._continue.encode_special_tokens = True
        self.control_ids = frozenset(index for token, index in controls.items() if token != unknown)

    def encode(self, texts: Sequence[str], *, first: bool) -> list[list[int]]:
        """Return the ids of each text, in one parallel call; `first=False` is for text that continues a sequence."""
        backend = self._start if first else self._continue
        rows = [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        for index, ids in enumerate(rows):
            if self._reads_control(texts[index], ids):
                rows[index] = [token for token, _ in self._apart(texts[index], first=first)]
        return rows

    def encode_places(self, text: str, *, first: bool) -> list[tuple[int, int]]:
        """Return the ids of a text, each with the index of its first character."""
        backend = self._start if first else self._continue
        encoding = backend.encode(text, add_special_tokens=False)
        if self._reads_control(text, encoding.ids):
            return self._apart(text, first=first)
        return [(token, start) for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)]

    def decode_batch(self, rows: Sequence[Sequence[int]], *, first: bool, skip_special_tokens: bool) -> list[str]:
        """Return the exact text of each row of ids, without any clean-up."""
        backend = self._start if first else self._continue
        return backend.decode_batch([[int(i) for i in ids] for ids in rows], skip_special_tokens=skip_special_tokens)

    def _reads_control(self, text: str, ids: Sequence[int]) -> bool:
        return not self.control_ids.isdisjoint(ids) or bool(self._unknown and self._unknown in text)

    def _apart(self, text: str, *, first: bool) -> list[tuple[int, int]]:
        """Encode a text in which the model itself (Unigram) reads a control token, cutting each such string in two."""
        parts = [text]
        for token in sorted(self._controls, key=len, reverse=True):
            if len(token) > 1:
                parts = [piece for part in parts for piece in _cut_inside(part, token=token)]
        ids: list[tuple[int, int]] = []
        place = 0
        for i, part in enumerate(parts):
            backend = self._start if first and i == 0 else self._continue
            encoding = backend.encode(part, add_special_tokens=False)
            starts = (place + start for start, _ in encoding.offsets)
            ids += zip(encoding.ids, starts, strict=True)
            place += len(part)
        read = self.control_ids.intersection(token for token, _ in ids)
        if read:
            found = next(token for token, index in self._controls.items() if index in read)
            raise unreadable(found)
        return ids


def unreadable(token: str) -> DataError:
    """Return what to raise for a content in which a tokenizer reads a control token all the same."""
    return DataError(
        f"content: found the special token {token!r}, which this tokenizer cannot read as text; expected plain "
        "text. Remove it from the record, or choose another model."
    )


def _cut_inside(text: str, *, token: str) -> list[str]:
    """Return the text cut after the first character of each occurrence of `token`."""
    pieces = text.split(token)
    return [
        (token[1:] if index else "") + piece + (token[0] if index < len(pieces) - 1 else "")
        for index, piece in enumerate(pieces)
    ]


def _continuing(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a tokenizer's description that put a dummy space before a text, without it."""
    edited = {
        "normalizer": _edit(raw.get("normalizer"), key="normalizers", drop={"Prepend"}),
        "pre_tokenizer": _edit(raw.get("pre_tokenizer"), key="pretokenizers", drop=set()),
        # Strip in a decoder removes the dummy space of a whole text.
        "decoder": _edit(raw.get("decoder"), key="decoders", drop={"Strip"}),
    }
    return edited if any(part != raw.get(name) for name, part in edited.items()) else {}


def _edit(part: dict[str, Any] | None, *, key: str, drop: set[str]) -> dict[str, Any] | None:
    if part is None or part["type"] in drop:
        return None
    if part["type"] == "Sequence":
        kept = [_edit(inner, key=key, drop=drop) for inner in part[key]]
        return {**part, key: [inner for inner in kept if inner is not None]}
    if part["type"] == "Metaspace":
        rest = {name: value for name, value in part.items() if name != "add_prefix_space"}
        return {**rest, "prepend_scheme": "never"}
    if part["type"] == "ByteLevel" and key == "pretokenizers":
        return {**part, "add_prefix_space": False}
    return part


def _only_first(raw: Mapping[str, Any]) -> bool:
    """Return whether the dummy space stands only at the very start of a text, not after each control token."""
    part = raw.get("pre_tokenizer") or {}
    inner = part.get("pretokenizers", [part])
    schemes = {item.get("prepend_scheme") for item in inner if item.get("type") == "Metaspace"}
    return schemes == {"first"}
