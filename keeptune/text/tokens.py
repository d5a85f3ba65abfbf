"""Records arrive, examples (token ids and a loss mask) leave: the one length policy and the token cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from keeptune.data.record import Record
from keeptune.errors import DataError, KeeptuneError, raise_collected
from keeptune.text.control import Encoder
from keeptune.text.template import Rendered, Template, TrainOn
from keeptune.text.tokenizer import Tokenizer

OverLength = Literal["error", "drop", "cut"]
# Part of every cache key: raise it when the same arguments give other tokens.
_CODE_VERSION = 2
# Enough for every core to have work; the encodings of a call weigh about 300 bytes a token.
RECORDS_PER_CALL = 128
_CHARACTERS_PER_CALL = 1 << 17


@dataclass(frozen=True, slots=True)
class Teacher:
    """What the base model expected at each of N targets: `ids` (N, k), its k likeliest tokens.

    `log_probs` (N, k + 1) are their log-probabilities in nats; the last column is that of all other tokens together,
    -inf where there is none.
    """

    ids: NDArray[np.int32]
    log_probs: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenised record. With an encoder: its ids first (not trained), then the decoder's (trained), in one array.

    Its targets are held against the `teacher`, a row a target, where there is one, and else against its own tokens.
    """

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    teacher: Teacher | None = None

    @property
    def prompt_ids(self) -> NDArray[np.int32]:
        """The ids before the last completion: what generation starts from."""
        return self.input_ids[: self.completion_start]

    @property
    def completion_ids(self) -> NDArray[np.int32]:
        """The ids of the last completion, end token included."""
        return self.input_ids[self.completion_start :]

    @property
    def completion_start(self) -> int:
        """The index of the first token of the last completion."""
        untrained = np.flatnonzero(~self.loss_mask)
        return int(untrained[-1]) + 1 if len(untrained) else 0


class Examples(Protocol):
    """Tokenised records by position, with what planning needs to know of each."""

    @property
    def lengths(self) -> NDArray[np.int64]: ...
    @property
    def num_targets(self) -> NDArray[np.int64]: ...
    @property
    def record_ids(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Example: ...


@dataclass(frozen=True, slots=True)
class Tokenized:
    """What became of a record. `example` is None where the record was dropped for its length.

    `prompt_tokens` and `completion_tokens` count before any cut, the end token included. `truncated`: tokens were
    cut; `completion_cut`: some that would have been trained on, of the completion or of an earlier answer.
    """

    record: Record
    example: Example | None
    truncated: bool
    completion_cut: bool
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class PreviewToken:
    """One token as a reader sees it."""

    text: str
    id: int
    trained: bool


def tokenize(
    records: Sequence[Record],
    *,
    tokenizer: Tokenizer,
    template: Template,
    train_on: TrainOn,
    max_length: int,
    over_length: OverLength,
    encoder_decoder: bool,
    max_positions: int | None = None,
) -> Iterator[Tokenized]:
    """Yield each record as an example, in order.

    A record over `max_length` tokens (of each side, with an encoder) stops the run, is dropped, or is cut: its prompt
    loses tokens from its middle, so that head, tail and completion stay. Only a completion that does not fit beside
    one token of prompt loses its own end; a quarter of `max_length` is then kept for the prompt. An earlier answer of
    which the cut takes a part is not trained on. `max_positions` is what the model has room for, so that no message
    proposes a `max_length` beyond it.

    Raises:
        DataError: the template refuses records, some are too long under "error", or none is left to train on.
    """
    problems: list[str] = []
    num_targets = 0
    for chunk in _chunks(records):
        rendered: list[tuple[Record, Rendered]] = []
        for record in chunk:
            try:
                rendered.append((record, _render(record, template=template, train_on=train_on)))
            except DataError as error:
                problems.append(str(error))
        examples = _encode([row for _, row in rendered], tokenizer=tokenizer, encoder_decoder=encoder_decoder)
        for (record, _), example in zip(rendered, examples, strict=True):
            item = _fit(record, example, max_length=max_length, cut=over_length == "cut", pairs=encoder_decoder)
            if item.example is None and over_length == "error":
                limits = {"max_length": max_length, "max_positions": max_positions, "pairs": encoder_decoder}
                problems.append(_length_problem(item, **limits))
                continue
            num_targets += int(item.example.loss_mask.sum()) if item.example is not None else 0
            yield item
    if problems:
        raise_collected(DataError, problems)
    if records and num_targets == 0:
        raises = max_positions is None or max_length < max_positions
        raise DataError(
            f"{records[0].origin} and {len(records) - 1} more: found no token to train on within {max_length} tokens; "
            f"expected at least one. {'Raise data.max_length, or set' if raises else 'Set'} data.over_length=cut."
        )


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Yield the records of one call after the other: fewer where they are long."""
    chunk: list[Record] = []
    num_characters = 0
    for record in records:
        length = sum(len(message.whole_text) + len(message.reasoning) for message in record.messages)
        if chunk and (len(chunk) == RECORDS_PER_CALL or num_characters + length > _CHARACTERS_PER_CALL):
            yield chunk
            chunk, num_characters = [], 0
        chunk.append(record)
        num_characters += length
    if chunk:
        yield chunk


def preview(
    record: Record, *, tokenizer: Tokenizer, template: Template, train_on: TrainOn, encoder_decoder: bool
) -> list[PreviewToken]:
    """Return the tokens of a record, uncut, each with its text and whether it is trained on.

    A character that several tokens make up stands whole at the last of them.
    """
    rows = [_render(record, template=template, train_on=train_on)]
    (example,) = _encode(rows, tokenizer=tokenizer, encoder_decoder=encoder_decoder)
    ids, mask = example.input_ids.tolist(), example.loss_mask.tolist()
    tokens, pending = list[PreviewToken](), list[int]()
    for index, trained, next_trained in zip(ids, mask, [*mask[1:], None], strict=True):
        pending.append(index)
        text = tokenizer.decode(pending)
        is_part = text.endswith("\ufffd") and next_trained == trained
        tokens.append(PreviewToken("" if is_part else text, id=index, trained=trained))
        if not is_part:
            pending.clear()
    return tokens


def token_cache_key(
    *,
    data_sha256: str,
    tokenizer: Tokenizer,
    template: Template,
    train_on: TrainOn,
    max_length: int,
    over_length: OverLength,
    encoder_decoder: bool,
) -> str:
    """Return 16 hexadecimal digits that change with anything that changes the tokens."""
    facts = [
        _CODE_VERSION,
        data_sha256,
        tokenizer.fingerprint,
        template.fingerprint,
        train_on,
        max_length,
        over_length,
        encoder_decoder,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def encode_prompts(prompts: Sequence[str], *, tokenizer: Tokenizer, encoder_decoder: bool) -> list[NDArray[np.int32]]:
    """Return the ids of rendered prompts."""
    rows = [Rendered(prompt, "", "") for prompt in prompts]
    return [example.input_ids for example in _encode(rows, tokenizer=tokenizer, encoder_decoder=encoder_decoder)]


def _render(record: Record, *, template: Template, train_on: TrainOn) -> Rendered:
    """Return a record as text.

    Raises:
        DataError: the template refuses the record.
    """
    try:
        return template.render(record.messages, train_on=train_on, tools=record.tools)
    except KeeptuneError as error:
        raise DataError(f"{record.origin}: {error}") from error


def _encode(rows: Sequence[Rendered], *, tokenizer: Tokenizer, encoder_decoder: bool) -> Iterator[Example]:
    """Yield the ids and the loss mask of each row; all texts are encoded in two parallel calls."""
    encoder = Encoder(tokenizer)
    prompts = encoder.encode([row.prompt for row in rows])
    wholes = encoder.encode(["" if encoder_decoder else row.prompt + row.completion for row in rows if row.completion])
    remaining = iter(wholes)
    for row, prompt in zip(rows, prompts, strict=True):
        whole = next(remaining) if row.completion else prompt
        if prompt and whole[: len(prompt)] == prompt and (not row.end or whole[-1] == tokenizer.added_tokens[row.end]):
            completion = whole[len(prompt) :]
        else:
            # A decoder's text is one of its own. Else the ids of prompt and completion would merge where they meet,
            # or no end token be found after the last word: a model writes token by token.
            completion = encoder.encode_answer(row.completion, first=encoder_decoder)
        loss_mask = np.arange(len(prompt) + len(completion)) >= len(prompt)
        if row.answers:
            starts = np.array(encoder.encode_places(row.prompt).starts)
            for start, end in row.answers:
                loss_mask[: len(prompt)] |= (starts >= start) & (starts < end)
        if not encoder_decoder:
            loss_mask[:1] = False
        yield Example(np.array([*prompt, *completion], dtype=np.int32), loss_mask)


def _fit(record: Record, example: Example, *, max_length: int, cut: bool, pairs: bool) -> Tokenized:
    num_tokens = len(example.input_ids)
    prompt = example.completion_start
    completion = num_tokens - prompt
    whole = Tokenized(
        record,
        example=example,
        truncated=False,
        completion_cut=False,
        prompt_tokens=prompt,
        completion_tokens=completion,
    )
    if (max(prompt, completion) if pairs else num_tokens) <= max_length:
        return whole
    if not cut:
        return replace(whole, example=None)
    if pairs:
        prompt_kept, completion_kept = min(prompt, max_length), min(completion, max_length)
    elif completion < max_length:
        prompt_kept, completion_kept = max_length - completion, completion
    else:
        prompt_kept = min(prompt, max(1, max_length // 4))
        completion_kept = max_length - prompt_kept
    kept = _kept_indices(prompt, prompt_kept=prompt_kept, completion_kept=completion_kept)
    loss_mask = example.loss_mask if pairs else _without_cut_answers(example.loss_mask, kept=kept, end=prompt)
    shorter = Example(example.input_ids[kept], loss_mask=loss_mask[kept])
    if not pairs:
        shorter.loss_mask[:1] = False
    lost = int(shorter.loss_mask.sum()) < int(example.loss_mask.sum())
    return replace(whole, example=shorter, truncated=True, completion_cut=lost)


def _without_cut_answers(loss_mask: NDArray[np.bool_], *, kept: NDArray[np.int64], end: int) -> NDArray[np.bool_]:
    """Return the mask without the answers before `end` that are not kept whole: half an answer teaches nothing."""
    is_kept = np.zeros(len(loss_mask), dtype=np.bool_)
    is_kept[kept] = True
    mask = loss_mask.copy()
    bounds = np.flatnonzero(np.diff(loss_mask[:end].astype(np.int8), prepend=0, append=0))
    for start, stop in bounds.reshape(-1, 2):
        mask[start:stop] = bool(is_kept[start:stop].all())
    return mask


def _kept_indices(prompt: int, *, prompt_kept: int, completion_kept: int) -> NDArray[np.int64]:
    """Return the indices of the prompt's head and tail (halves, the tail the larger) and of the completion's head."""
    head = prompt_kept // 2
    return np.concatenate([np.arange(head), np.arange(prompt - (prompt_kept - head), prompt + completion_kept)])


def _length_problem(item: Tokenized, *, max_length: int, max_positions: int | None, pairs: bool) -> str:
    sides = (item.prompt_tokens, item.completion_tokens)
    fits = max_positions is None or (max(sides) if pairs else sum(sides)) <= max_positions
    expected = f"at most {max_length}" if fits else f"at most {max_length}, the model having room for {max_positions}"
    return (
        f"{item.record.origin}: found {sum(sides)} tokens ({sides[0]} of prompt, {sides[1]} of completion); "
        f"expected {expected}. {'Raise data.max_length, or set' if fits else 'Set'} data.over_length=cut or drop."
    )
