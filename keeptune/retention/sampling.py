"""A base model arrives; texts that it writes itself leave, as token ids, for measuring how far tuning moves it.

Under ancestral sampling (temperature 1, nothing cut off) the mean over such texts of log p_base - log p_tuned is the
KL divergence of the tuned model from the base. Source: Kullback and Leibler 1951; cf. Kalajdzievski 2024.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from keeptune.errors import stopped
from keeptune.evaluation.canaries import loops
from keeptune.model.modes import evaluating
from keeptune.progress import Progress
from keeptune.text.tokenizer import Tokenizer

_TEXTS_PER_BATCH = 64
# A model that writes hardly anything but loops is not waited for.
_MOST_TRIES = 3
# By so many tokens of the first batch it is told how long all of them will take.
_TIMED_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Written:
    """Texts behind their prompts, each with its stop id where the model ended it, and how many loops were left out."""

    prompts: list[list[int]]
    rows: list[list[int]]
    num_loops: int


def write_texts(
    model: nn.Module,
    *,
    prompts: Sequence[Sequence[int]],
    num_texts: int,
    num_tokens: int,
    tokenizer: Tokenizer,
    stop_ids: Sequence[int],
    seed: Sequence[int],
    progress: Progress,
    stop_requested: Callable[[], bool],
    clock: Callable[[], float] = time.perf_counter,
) -> Written:
    """Let `model` write `num_texts` texts of at most `num_tokens` tokens behind the prompts in turn, at temperature 1.

    The seed decides every token, together with torch's version and the device; the global random state stays as it
    was. Texts that repeat themselves at their end are left out, whatever any tuned model does. How long it will take,
    by the `clock` in seconds, is said once some tokens are written.

    Raises:
        Interrupted: a stop was asked for.
    """
    written = Written([], [], 0)
    num_loops = 0
    work = _Work(progress, clock, num_texts=num_texts, num_tokens=num_tokens)
    work.start()
    try:
        for batch in range(-(-num_texts * _MOST_TRIES // _TEXTS_PER_BATCH)):
            if stop_requested():
                raise stopped("texts")
            wanted = min(_TEXTS_PER_BATCH, num_texts - len(written.rows))
            first = batch * _TEXTS_PER_BATCH
            # Always whole batches: a text must not depend on how many are still wanted.
            behind = [list(prompts[(first + i) % len(prompts)]) for i in range(_TEXTS_PER_BATCH)]
            rows = _sampled(
                model,
                behind,
                limit=num_tokens,
                stop_ids=stop_ids,
                tokenizer=tokenizer,
                seed=[*seed, batch],
                after_token=work.after_token,
            )
            sound = [not loops(text) for text in tokenizer.decode_batch(rows, skip_special_tokens=True)]
            kept = [i for i in range(_TEXTS_PER_BATCH) if sound[i]][:wanted]
            num_loops += sound[: kept[-1] + 1 if len(kept) == wanted else None].count(False)
            written.prompts.extend(behind[i] for i in kept)
            written.rows.extend(rows[i] for i in kept)
            work.after_batch(len(written.rows))
            if len(written.rows) == num_texts:
                break
    finally:
        progress.finish()
    return Written(written.prompts, written.rows, num_loops)


class _Work:
    """What is told of the sampling: how long it will take, once some tokens were timed, and texts as they grow."""

    def __init__(self, progress: Progress, clock: Callable[[], float], *, num_texts: int, num_tokens: int) -> None:
        self._progress, self._clock = progress, clock
        self._num_texts, self._num_tokens = num_texts, num_tokens
        self._times: list[float] = []
        self._tokens = self._texts = self._told = 0

    def start(self) -> None:
        self._progress.start("Texts of the base model", total=self._num_texts, unit="texts")

    def after_token(self) -> None:
        """Count a token of each text of the batch: a share of texts that grow side by side."""
        self._tokens += 1
        growing = min(_TEXTS_PER_BATCH, self._num_texts - self._texts)
        self._tell(self._texts + growing * self._tokens // (self._num_tokens + 1))
        if len(self._times) <= _TIMED_TOKENS:
            self._times.append(self._clock())
            if len(self._times) == _TIMED_TOKENS + 1:
                self._announce()

    def after_batch(self, num_texts: int) -> None:
        """Count the texts that were kept."""
        self._tokens, self._texts = 0, num_texts
        self._tell(num_texts)

    def _tell(self, number: int) -> None:
        # Loops that were left out take a little of what was told back; the count then waits.
        self._progress.advance(max(0, number - self._told))
        self._told = max(self._told, number)

    def _announce(self) -> None:
        # The first token's time holds the prompts too: it is not among those that are timed.
        a_token = (self._times[-1] - self._times[0]) / _TIMED_TOKENS
        seconds = a_token * self._num_tokens * -(-self._num_texts // _TEXTS_PER_BATCH)
        self._progress.say(
            f"The base model writes {self._num_texts:,} texts of up to {self._num_tokens:,} tokens; at most about "
            f"{seconds:,.0f} s"
        )


def _sampled(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    limit: int,
    stop_ids: Sequence[int],
    tokenizer: Tokenizer,
    seed: Sequence[int],
    after_token: Callable[[], None],
) -> list[list[int]]:
    """Return what the model writes behind each prompt, up to its stop id."""
    longest = max(map(len, prompts))
    pairs = model.config.is_encoder_decoder
    fill = [[tokenizer.pad_id] * (longest - len(prompt)) for prompt in prompts]
    padded = [[*p, *f] if pairs else [*f, *p] for p, f in zip(prompts, fill, strict=True)]
    ones = [[[1] * len(p), [0] * len(f)] for p, f in zip(prompts, fill, strict=True)]
    mask = [[*one, *zero] if pairs else [*zero, *one] for one, zero in ones]

    def going_on(sequences_BT: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        after_token()
        return torch.zeros(len(sequences_BT), dtype=torch.bool, device=sequences_BT.device)

    devices = [model.device] if model.device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(devices=devices), _ancestral(model, tokenizer, stop_ids=stop_ids):
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))
        sequences = model.generate(
            input_ids=torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=limit,
            stopping_criteria=[going_on],
        )
    new = sequences[:, 1 if pairs else longest :].tolist()
    return [_up_to_stop(row, stop_ids=stop_ids) for row in new]


def _up_to_stop(row: Sequence[int], *, stop_ids: Sequence[int]) -> list[int]:
    end = next((i + 1 for i, token in enumerate(row) if token in stop_ids), len(row))
    return list(row[:end])


@contextlib.contextmanager
def _ancestral(model: Any, tokenizer: Tokenizer, *, stop_ids: Sequence[int]) -> Iterator[None]:
    """Replace the model's generation settings by plain sampling from its own distribution inside the block."""
    saved = model.generation_config
    start = saved.decoder_start_token_id
    model.generation_config = type(saved)(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_beams=1,
        use_cache=True,
        eos_token_id=list(stop_ids),
        pad_token_id=tokenizer.pad_id,
        bos_token_id=saved.bos_token_id,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None) if start is None else start,
    )
    try:
        yield
    finally:
        model.generation_config = saved
