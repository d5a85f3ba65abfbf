"""Text arrives, token ids leave, and back: a thin wrapper over the fast tokenizers library, without transformers."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import tokenizers
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from keeptune.errors import RecipeError
from keeptune.storage import storage_errors
from keeptune.text.normaliser import refuse_growth
from keeptune.text.plain_text import PlainText

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
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
    added_tokens: Mapping[str, int]
    """Every token that is found in a text as a whole, special or not."""
    special_tokens: Mapping[str, int]
    """The added tokens that are flagged as special, or that the settings name."""
    normalised_tokens: frozenset[str]
    """The added tokens that are found in the normalised text, which may spell them otherwise."""
    role_tokens: Mapping[str, str]
    """What chat templates may name: bos_token, eos_token and the like, where the tokenizer has them."""

    def __init__(self, files: Mapping[str, str], *, folder: Path) -> None:
        raw = _json_object(files["tokenizer.json"], path=folder / "tokenizer.json")
        if not isinstance(raw.get("model"), dict):
            raise RecipeError(
                f"{folder / 'tokenizer.json'}: found no 'model'; expected a file of the tokenizers library. "
                "Save the tokenizer again with AutoTokenizer.from_pretrained(…).save_pretrained(…)."
            )
        config = _settings(files, folder=folder)
        refuse_growth(raw.get("normalizer"), path=folder / "tokenizer.json")
        self._rendered, leading = _backend(files["tokenizer.json"], path=folder / "tokenizer.json")
        # It trims the places of tokens, and adds what no rendered text lacks.
        self._rendered.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
        self._add_tokens(raw, config=config)
        self._dummy_space = {part: raw.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")}
        self.chat_template = _chat_template(files, config=config, folder=folder)
        self._set_roles(config, folder=folder, leading=leading)
        self._texts: dict[frozenset[str], PlainText] = {}
        self._text = self.plain_text(frozenset())
        self.vocab_size = max(self._rendered.get_vocab_size(), *(index + 1 for index in self.added_tokens.values()))
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
        return self._text.encode(texts, first=first)

    def encode_rendered(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text as transformers gives them: every added token that it spells is read."""
        with self._reading_all() as backend:
            return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_rendered_places(self, text: str) -> list[tuple[int, tuple[int, int]]]:
        """Return the ids of a text as transformers gives them, each with the characters [start, end) that it covers."""
        with self._reading_all() as backend:
            encoding = backend.encode(text, add_special_tokens=False)
        return list(zip(encoding.ids, encoding.offsets, strict=True))

    def plain_text(self, words: frozenset[str]) -> PlainText:
        """Return what encodes text in which neither special tokens nor the added tokens `words` are read."""
        words = words.difference(self.special_tokens)
        if words not in self._texts:
            self._texts[words] = self._plain_text(words)
        return self._texts[words]

    def decode(self, ids: Sequence[int], *, first: bool = False, skip_special_tokens: bool = False) -> str:
        """Return the exact text of the ids; `first` must be that of `encode`, since it drops the dummy space."""
        return self.decode_batch([ids], first=first, skip_special_tokens=skip_special_tokens)[0]

    def decode_batch(
        self, rows: Sequence[Sequence[int]], *, first: bool = False, skip_special_tokens: bool = False
    ) -> list[str]:
        """Return the exact text of each row of ids, without any clean-up."""
        return self._text.decode_batch(rows, first=first, skip_special_tokens=skip_special_tokens)

    @property
    def spaces_after_special(self) -> bool:
        """Whether text that follows a special token gets a dummy space, as text at the start does."""
        return self._text.spaces_after_control

    def _plain_text(self, words: frozenset[str]) -> PlainText:
        chosen = {**self.special_tokens, **{token: self.added_tokens[token] for token in words}}
        backend, flags = self._rendered, self._rendered.get_added_tokens_decoder()
        if not all(flags[index].special for index in chosen.values()):
            backend = Backend.from_str(backend.to_str())
            backend.add_special_tokens(list(chosen))
        backend.encode_special_tokens = True
        return PlainText(backend, raw=self._dummy_space, controls=chosen, unknown=self.role_tokens.get("unk_token"))

    @contextlib.contextmanager
    def _reading_all(self) -> Iterator[Backend]:
        before = self._rendered.encode_special_tokens
        self._rendered.encode_special_tokens = False
        try:
            yield self._rendered
        finally:
            self._rendered.encode_special_tokens = before

    def _add_tokens(self, raw: Mapping[str, Any], *, config: Mapping[str, Any]) -> None:
        """Set the added tokens and their flags as transformers does; every one that the settings name is special."""
        listed = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        extra = listed.values() if isinstance(listed, dict) else listed
        named = {name for role in _ROLES if (name := _content(config.get(role))) is not None}
        chosen = named | {name for value in extra if (name := _content(value)) is not None}
        # Source: transformers 5.23, TokenizersBackend.__init__: the flags of tokenizer_config.json win.
        declared = config.get("added_tokens_decoder") or {}
        tokens = {int(index): token for index, token in declared.items()} if isinstance(declared, dict) else {}
        tokens = tokens or {token["id"]: token for token in raw.get("added_tokens") or []}
        for _, token in sorted(tokens.items()):
            flags = {flag: bool(token[flag]) for flag in _FLAGS if flag in token}
            special = bool(token.get("special")) or token["content"] in named
            if self._rendered.token_to_id(token["content"]) is not None:
                self._rendered.add_tokens([AddedToken(token["content"], **flags, special=special)])
        known = {token.content for token in self._rendered.get_added_tokens_decoder().values()}
        new = [name for name in sorted(chosen - known) if self._rendered.token_to_id(name) is not None]
        self._rendered.add_tokens([AddedToken(name, special=True, normalized=False) for name in new])
        added = self._rendered.get_added_tokens_decoder().items()
        self.added_tokens = {token.content: index for index, token in added}
        self.special_tokens = {t.content: index for index, t in added if t.special or t.content in chosen}
        self.normalised_tokens = frozenset(token.content for _, token in added if token.normalized)

    def _set_roles(self, config: Mapping[str, Any], *, folder: Path, leading: list[int]) -> None:
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
        self.adds_bos = self.bos_id is not None and bool(config.get("add_bos_token", leading == [self.bos_id]))
        self.role_tokens = {role: name for role in _ROLES if (name := _content(config.get(role))) is not None}


def _backend(description: str, *, path: Path) -> tuple[Backend, list[int]]:
    """Return the tokenizer without truncation and padding, and the id that it puts before a text, where it does."""
    try:
        backend = Backend.from_str(description)
        leading = backend.encode("", add_special_tokens=True).ids[:1]
    # The library raises nothing narrower, and where Rust panics not even an Exception.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise RecipeError(
            f"{path}: found a tokenizer that the tokenizers library {tokenizers.__version__} cannot read ({error}); "
            "expected one that it knows. Fetch the file again, or install a newer tokenizers."
        ) from error
    backend.no_truncation()
    backend.no_padding()
    return backend, leading


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
