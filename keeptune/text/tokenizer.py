"""Text arrives, token ids leave, and back: a thin wrapper over the fast tokenizers library, without transformers."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import tokenizers
from tokenizers import Tokenizer as Backend

from keeptune.errors import DataError, RecipeError
from keeptune.storage import storage_errors

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """A tokenizer folder in Hugging Face layout. Content never becomes a control token, whatever it spells."""

    eos_token: str
    eos_id: int
    bos_token: str | None
    bos_id: int | None
    adds_bos: bool
    """Whether the tokenizer itself puts its BOS token before a text."""
    pad_id: int
    """The id of the pad token; that of the end token where there is none."""
    vocab_size: int
    chat_template: str | None
    fingerprint: str
    """SHA-256 of the files that decide what a text's ids are."""
    special_tokens: Mapping[str, int]
    role_tokens: Mapping[str, str]
    """What chat templates may name: bos_token, eos_token and the like, where the tokenizer has them."""
    spaces_after_special: bool
    """Whether text that follows a special token gets a dummy space, as text at the start does."""

    def __init__(self, files: Mapping[str, str], *, folder: Path) -> None:
        raw = _json_object(files["tokenizer.json"], path=folder / "tokenizer.json")
        if not isinstance(raw.get("model"), dict):
            raise RecipeError(
                f"{folder / 'tokenizer.json'}: found no 'model'; expected a file of the tokenizers library. "
                "Save the tokenizer again with AutoTokenizer.from_pretrained(…).save_pretrained(…)."
            )
        config = _settings(files, folder=folder)
        self._start = _backend(files["tokenizer.json"], path=folder / "tokenizer.json")
        self._add_special(config)
        continuing = _continuing(raw)
        self.spaces_after_special = continuing != raw and not _only_first(raw)
        self._continue = self._start
        if continuing != raw:
            self._continue = _backend(json.dumps(continuing), path=folder / "tokenizer.json")
            self._continue.add_special_tokens(list(self.special_tokens))
        self.chat_template = _chat_template(files, config=config, folder=folder)
        self._set_roles(config, folder=folder)
        self.vocab_size = max(self._start.get_vocab_size(), *(index + 1 for index in self.special_tokens.values()))
        self.fingerprint = hashlib.sha256(json.dumps(dict(files), sort_keys=True).encode()).hexdigest()

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read the tokenizer in `folder`.

        Raises:
            RecipeError: there is no tokenizer.json, no end token, or a file is not what its name says.
        """
        if not (folder / "tokenizer.json").is_file():
            raise RecipeError(
                f"{folder}: found no tokenizer.json; expected a fast tokenizer. "
                "Convert it once with AutoTokenizer.from_pretrained(…).save_pretrained(…), or choose another model."
            )
        with storage_errors(folder):
            present = [name for name in _FILES if (folder / name).is_file()]
            contents = {name: (folder / name).read_bytes() for name in present}
        files = {}
        for name, content in contents.items():
            try:
                files[name] = content.decode("utf-8")
            except UnicodeDecodeError as error:
                raise RecipeError(
                    f"{folder / name}: found bytes that are not UTF-8 at offset {error.start}; expected UTF-8 text. "
                    "Download the model again."
                ) from error
        return cls(files, folder=folder)

    def encode(self, texts: Sequence[str], *, first: bool) -> list[list[int]]:
        """Return the ids of each text, in one parallel call and without added BOS or end tokens.

        A special token's string inside a text stays text. `first=False` is for text that continues a sequence: it
        gets no dummy space, so that the ids of the parts decode to the parts joined.
        """
        backend = self._start if first else self._continue
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        rows = [encoding.ids for encoding in encodings]
        for index, ids in enumerate(rows):
            if not self._control_ids.isdisjoint(ids) or (self._unknown and self._unknown in texts[index]):
                rows[index] = self._encode_apart(texts[index], first=first)
        return rows

    def decode(self, ids: Sequence[int], *, first: bool = False, skip_special_tokens: bool = False) -> str:
        """Return the exact text of the ids; `first` must be that of `encode`, since it drops the dummy space."""
        return self.decode_batch([ids], first=first, skip_special_tokens=skip_special_tokens)[0]

    def decode_batch(
        self, rows: Sequence[Sequence[int]], *, first: bool = False, skip_special_tokens: bool = False
    ) -> list[str]:
        """Return the exact text of each row of ids, without any clean-up."""
        backend = self._start if first else self._continue
        return backend.decode_batch([[int(i) for i in ids] for ids in rows], skip_special_tokens=skip_special_tokens)

    def _encode_apart(self, text: str, *, first: bool) -> list[int]:
        """Encode a text in which the model itself (Unigram) reads a special token, cutting each such string in two."""
        parts = [text]
        for token in sorted(self.special_tokens, key=len, reverse=True):
            if len(token) > 1:
                parts = [piece for part in parts for piece in _cut_inside(part, token=token)]
        ids = self._encode_part(parts[0], first=first)
        for part in parts[1:]:
            ids += self._encode_part(part, first=False)
        if not self._control_ids.isdisjoint(ids):
            found = next(token for token, index in self.special_tokens.items() if index in ids)
            raise DataError(
                f"content: found the special token {found!r}, which this tokenizer cannot read as text; expected plain "
                "text. Remove it from the record, or choose another model."
            )
        return ids

    def _encode_part(self, text: str, *, first: bool) -> list[int]:
        backend = self._start if first else self._continue
        return backend.encode(text, add_special_tokens=False).ids

    def _add_special(self, config: Mapping[str, Any]) -> None:
        """Make every token that the settings name a special one, so that it is never read from content."""
        listed = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        values = [*(config.get(role) for role in _ROLES), *(listed.values() if isinstance(listed, dict) else listed)]
        named = [name for value in values if (name := _content(value)) is not None]
        self._start.add_special_tokens([name for name in named if self._start.token_to_id(name) is not None])
        added = self._start.get_added_tokens_decoder().items()
        self.special_tokens = {token.content: index for index, token in added if token.special}

    def _set_roles(self, config: Mapping[str, Any], *, folder: Path) -> None:
        eos, pad = _content(config.get("eos_token")), _content(config.get("pad_token"))
        if eos is None or eos not in self.special_tokens:
            found = "no eos_token" if eos is None else f"eos_token {eos!r}, which its vocabulary lacks"
            raise RecipeError(
                f"{folder}: found {found}; expected an end token, without which no answer ends. "
                "Set eos_token in tokenizer_config.json to the token that ends an answer, or choose another model."
            )
        self.eos_token, self.eos_id = eos, self.special_tokens[eos]
        bos = _content(config.get("bos_token"))
        self.bos_token = bos if bos in self.special_tokens else None
        self.bos_id = self.special_tokens[self.bos_token] if self.bos_token is not None else None
        self.pad_id = self.special_tokens.get(pad or "", self.eos_id)
        # An explicit setting wins over the post-processor, as it does in transformers.
        leading = self._start.encode("", add_special_tokens=True).ids[:1]
        self.adds_bos = self.bos_id is not None and bool(config.get("add_bos_token", leading == [self.bos_id]))
        self.role_tokens = {role: name for role in _ROLES if (name := _content(config.get(role))) is not None}
        self._unknown = self.role_tokens.get("unk_token")
        self._control_ids = frozenset(i for token, i in self.special_tokens.items() if token != self._unknown)


def _backend(description: str, *, path: Path) -> Backend:
    try:
        backend = Backend.from_str(description)
    # The library raises nothing narrower.
    except Exception as error:
        raise RecipeError(
            f"{path}: found a tokenizer that the tokenizers library {tokenizers.__version__} cannot read ({error}); "
            "expected one that it knows. Fetch the file again, or install a newer tokenizers."
        ) from error
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def _settings(files: Mapping[str, str], *, folder: Path) -> dict[str, Any]:
    """Return the settings of the tokenizer; tokenizer_config.json wins over special_tokens_map.json."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        values = _json_object(files.get(name, "{}"), path=folder / name)
        settings |= {key: value for key, value in values.items() if value is not None}
    return settings


def _json_object(text: str, *, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(
            f"{path}: found broken JSON ({error}); expected one JSON object. Download the model again."
        ) from error
    if not isinstance(value, dict):
        raise RecipeError(
            f"{path}: found a JSON {type(value).__name__}; expected one JSON object. Download the model again."
        )
    return value


def _content(token: object) -> str | None:
    """Return a token's string; settings hold it bare or as an object with `content`."""
    if isinstance(token, dict):
        token = cast(dict[str, object], token).get("content")
    return token if isinstance(token, str) and token else None


def _chat_template(files: Mapping[str, str], *, config: Mapping[str, Any], folder: Path) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"]
    found = config.get("chat_template")
    if "chat_template.json" in files:
        path = folder / "chat_template.json"
        found = _json_object(files["chat_template.json"], path=path).get("chat_template", found)
    if isinstance(found, list):
        named = [item for item in found if isinstance(item, dict)]
        found = next((item.get("template") for item in named if item.get("name") == "default"), None)
    return found if isinstance(found, str) and found else None


def _cut_inside(text: str, *, token: str) -> list[str]:
    """Return the text cut after the first character of each occurrence of `token`."""
    pieces = text.split(token)
    return [
        (token[1:] if index else "") + piece + (token[0] if index < len(pieces) - 1 else "")
        for index, piece in enumerate(pieces)
    ]


def _continuing(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the tokenizer's description without the dummy space before a text, in both directions."""
    edited = copy.copy(raw)
    edited["normalizer"] = _edit(raw.get("normalizer"), key="normalizers", drop={"Prepend"})
    edited["pre_tokenizer"] = _edit(raw.get("pre_tokenizer"), key="pretokenizers", drop=set())
    # Strip in a decoder removes the dummy space of a whole text.
    edited["decoder"] = _edit(raw.get("decoder"), key="decoders", drop={"Strip"})
    return edited


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
    """Return whether the dummy space stands only at the very start of a text, not after each special token."""
    part = raw.get("pre_tokenizer") or {}
    inner = part.get("pretokenizers", [part])
    schemes = {item.get("prepend_scheme") for item in inner if item.get("type") == "Metaspace"}
    return schemes == {"first"}
