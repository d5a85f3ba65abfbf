"""Documents and texts that a model wrote arrive; examples of which every token but the first is a target leave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from keeptune.data.record import Record
from keeptune.text.tokenizer import Tokenizer
from keeptune.text.tokens import Example, Tokenized


def start_id(tokenizer: Tokenizer) -> int:
    """Return the id that a text of its own begins with: BOS, or the end token that stands before it in a stream."""
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


def document_examples(
    documents: Sequence[Record], *, tokenizer: Tokenizer, num_tokens: int, encoder_decoder: bool
) -> Iterator[Tokenized]:
    """Yield each document's first `num_tokens` tokens as an example; a document without a second token is dropped.

    An encoder reads the first half, and the decoder writes the second. No chat template and no end token is added: a
    document is what the model was pre-trained on, not an answer.
    """
    rows = tokenizer.encode([document.completion for document in documents], first=True)
    for document, ids in zip(documents, rows, strict=True):
        kept = ids[:num_tokens]
        if encoder_decoder:
            middle = len(kept) // 2
            example = written_example([*kept[:middle], tokenizer.eos_id], kept[middle:]) if middle else None
        else:
            example = written_example([start_id(tokenizer)], kept) if kept else None
        yield _tokenized(document, example, truncated=len(kept) < len(ids), num_tokens=len(ids))


def written_texts(
    records: Sequence[Record], *, prompts: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]
) -> Iterator[Tokenized]:
    """Yield texts that a model wrote behind `prompts`, with the very ids that it wrote, end token included."""
    for record, prompt, ids in zip(records, prompts, rows, strict=True):
        yield _tokenized(record, written_example(prompt, ids), truncated=False, num_tokens=len(ids))


def written_example(prompt: Sequence[int], ids: Sequence[int]) -> Example:
    """Return `prompt`, which carries no loss, and `ids`, of which each token does."""
    loss_mask = np.arange(len(prompt) + len(ids)) >= len(prompt)
    return Example(np.array([*prompt, *ids], dtype=np.int32), loss_mask)


def _tokenized(record: Record, example: Example | None, *, truncated: bool, num_tokens: int) -> Tokenized:
    prompt_tokens = 0 if example is None else len(example.prompt_ids)
    return Tokenized(
        record,
        example=example,
        truncated=truncated and example is not None,
        completion_cut=truncated and example is not None,
        prompt_tokens=prompt_tokens,
        completion_tokens=num_tokens,
    )
