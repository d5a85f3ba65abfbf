"""Prompts as token ids arrive; greedy answers as token ids leave, decoded side by side in batches of like length.

Shape key: B prompts of a batch, T tokens of the longest of them, U tokens of an answer.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from keeptune.errors import DataError, OutOfMemoryError, stopped
from keeptune.model.attention import base_of, uses_virtual_tokens
from keeptune.model.load import FAILURES
from keeptune.model.memory import lacks_memory
from keeptune.model.modes import evaluating
from keeptune.model.neighbours import (
    depends_on_the_batch,
    differ_by,
    model_errors,
    probe_ids,
    probe_pad_id,
    tolerance_of,
)
from keeptune.progress import Progress
from keeptune.text.batches import Layout

SideBySide = Literal["padded", "equal", "single"]
_PROBE_LENGTHS = (9, 4, 6, 4)
_PROBE_ANSWER = 3


@dataclass(frozen=True, slots=True)
class Decoding:
    """How answers are made: greedily, until a stop id or `max_new_tokens`.

    `tokens_per_batch` bounds prompts, padding and answers together. `max_positions` is the longest sequence that the
    model takes (with an encoder: on each side); None: any length. `side_by_side` says which prompts may be decoded
    side by side: any, padded; those of one length; or none, as `prompts_side_by_side` finds it for a model.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int
    tokens_per_batch: int
    encoder_decoder: bool
    max_positions: int | None = None
    side_by_side: SideBySide = "padded"

    def new_tokens(self, num_prompt_tokens: int) -> int:
        """Return how many tokens an answer to such a prompt may have; 0 or less: the prompt itself is too long."""
        if self.max_positions is None:
            return self.max_new_tokens
        room = self.max_positions - num_prompt_tokens
        if self.encoder_decoder:
            room = self.max_positions if room >= 0 else room
        return min(self.max_new_tokens, room)


@dataclass(frozen=True, slots=True)
class Generated:
    """The ids of one answer, without its stop id; `ended` is False where the limit cut it."""

    ids: list[int]
    ended: bool


def auto_max_new_tokens(completion_lengths: NDArray[np.int64], *, at_least_p99: float = 0.0) -> int:
    """Return a limit that all but the longest hundredth of the train completions stay clearly under.

    It is the 99th percentile of their tokens, end token included, or `at_least_p99` where that is more, and a tenth
    more, and at least 8.
    """
    assert len(completion_lengths), "no completion to take the limit from"
    return max(8, math.ceil(1.1 * max(float(np.quantile(completion_lengths, 0.99)), at_least_p99)))


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    decoding: Decoding,
    progress: Progress,
    stop_requested: Callable[[], bool],
) -> list[Generated]:
    """Return the greedy answer to each prompt, in the order of the prompts.

    Neither the other prompts nor the batch size change an answer, up to rounding, where `decoding.side_by_side` is
    what `prompts_side_by_side` found for the model. The longest prompts come first, so
    that a lack of memory shows at once. What `generation_config.json` says about sampling or penalties has no effect.

    Raises:
        DataError: a prompt leaves no room for an answer.
        OutOfMemoryError: half a batch does not fit either.
        Interrupted: a stop was asked for.
    """
    decoding = beside_virtual_tokens(model, decoding)
    decoder = _Decoder(model, decoding, stop_requested)
    answers: dict[int, Generated] = {}
    progress.start("Answers", total=len(prompts), unit="records")
    lengths = [len(prompt) for prompt in prompts]
    try:
        with evaluating(model), plainly_greedy(model, decoding):
            for indices, num_new_tokens in _batches(lengths, decoding=decoding, side_by_side=_allowed(model, decoding)):
                rows = decoder.rows([list(prompts[i]) for i in indices], limit=num_new_tokens)
                answers.update(zip(indices, (_until_stop(row, decoding.stop_ids) for row in rows), strict=True))
                progress.advance(len(indices))
    finally:
        progress.finish()
    return [answers[i] for i in range(len(prompts))]


def first_pass(model: nn.Module, lengths: Sequence[int], *, decoding: Decoding) -> None:
    """Run a model over the largest batch of prompts of these lengths as `generate` begins it, whatever their tokens."""
    decoding = beside_virtual_tokens(model, decoding)
    batches = _batches(lengths, decoding=decoding, side_by_side=_allowed(model, decoding))
    indices, _ = max(batches, key=lambda batch: len(batch[0]) * lengths[batch[0][0]])
    input_ids_BT, attention_mask_BT = _padded([[decoding.pad_id] * lengths[i] for i in indices], decoding=decoding)
    base: Any = base_of(model)
    arguments: dict[str, Any] = {}
    if decoding.encoder_decoder:
        arguments["decoder_input_ids"] = input_ids_BT[:, :1].to(base.device)
    elif base._supports_logits_to_keep():
        arguments["logits_to_keep"] = 1
    model(
        input_ids=input_ids_BT.to(base.device),
        attention_mask=attention_mask_BT.to(base.device),
        use_cache=True,
        **arguments,
    )


def forbids_padding(model: nn.Module) -> bool:
    """Tell whether padding on the left would change answers.

    PEFT puts virtual tokens before the padding, so that their distance to the prompt would depend on the batch.
    """
    return uses_virtual_tokens(model) and not base_of(model).config.is_encoder_decoder


def beside_virtual_tokens(model: Any, decoding: Decoding) -> Decoding:
    """Return the decoding with the positions that PEFT's virtual tokens leave to prompts and answers."""
    if decoding.max_positions is None or not uses_virtual_tokens(model):
        return decoding
    return replace(decoding, max_positions=decoding.max_positions - model.active_peft_config.num_virtual_tokens)


def _allowed(model: nn.Module, decoding: Decoding) -> SideBySide:
    return "equal" if decoding.side_by_side == "padded" and forbids_padding(model) else decoding.side_by_side


def prompts_side_by_side(model: nn.Module, *, layout: Layout, longest: int) -> SideBySide:
    """Return which prompts a model may answer side by side such that every answer is the one that it gives alone.

    `layout` is what `layout_of` returned for the model. Random prompts are answered alone, padded to the longest, and
    beside one of their own length, a few tokens each; the logits are compared. `longest` is the number of tokens of the
    longest prompt and its answer.

    Raises:
        RecipeError: the model cannot answer a prompt that stands alone.
    """
    if layout == "packed":
        # Such a model keeps to the positions and the mask that it is given, behind padding too.
        return "padded"
    if depends_on_the_batch(model, longest=longest):
        return "single"
    prompts = [probe_ids(model, length, seed=i) for i, length in enumerate(_PROBE_LENGTHS)]
    pairs = bool(base_of(model).config.is_encoder_decoder)
    free = Decoding(_PROBE_ANSWER, (), pad_id=probe_pad_id(model), tokens_per_batch=1, encoder_decoder=pairs)
    with evaluating(model), plainly_greedy(model, free):
        with model_errors(model):
            alone = [_probe_logits(model, [prompt], decoding=free) for prompt in prompts]
        if not forbids_padding(model) and _answer_alike(model, prompts, alone=torch.cat(alone), decoding=free):
            return "padded"
        equal = [1, 3]
        if _answer_alike(model, [prompts[i] for i in equal], alone=torch.cat([alone[i] for i in equal]), decoding=free):
            return "equal"
    return "single"


def _answer_alike(model: nn.Module, prompts: list[list[int]], *, alone: Tensor, decoding: Decoding) -> bool:
    try:
        together = _probe_logits(model, prompts, decoding=decoding)
    except FAILURES as error:
        if lacks_memory(error):
            raise
        return False
    return differ_by(together, alone) <= tolerance_of(model)


def _probe_logits(model: Any, prompts: list[list[int]], *, decoding: Decoding) -> Tensor:
    """Return the logits of the first answer tokens to each prompt, (B, tokens, V).

    Every prompt is followed by the same tokens, so that a difference of the first logits leads to no other question.
    """
    input_ids_BT, attention_mask_BT = _padded(prompts, decoding=decoding)
    device = base_of(model).device
    output = model.generate(
        input_ids=input_ids_BT.to(device),
        attention_mask=attention_mask_BT.to(device),
        max_new_tokens=decoding.max_new_tokens,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(output.logits, 1).float()


def _batches(
    lengths: Sequence[int], *, decoding: Decoding, side_by_side: SideBySide = "padded"
) -> Iterator[tuple[list[int], int]]:
    """Yield indices, longest prompt first, with the limit of their answers.

    A batch has one limit. Prompts so long that the model's positions shorten the limit stand with those of their own
    length, so that no answer depends on its neighbours.
    """
    batch: list[int] = []
    longest = limit = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        own_limit = decoding.new_tokens(lengths[index])
        if own_limit < 1:
            raise DataError(
                f"prompt {index}: found {lengths[index]} tokens; expected fewer than the model's "
                f"{decoding.max_positions} positions. Lower data.max_length."
            )
        full = (len(batch) + 1) * (longest + limit) > decoding.tokens_per_batch
        apart = side_by_side == "single" or (side_by_side == "equal" and lengths[index] != longest)
        if batch and (full or apart or own_limit != limit):
            yield batch, limit
            batch = []
        if not batch:
            longest, limit = lengths[index], own_limit
        batch.append(index)
    if batch:
        yield batch, limit


@contextlib.contextmanager
def plainly_greedy(model: nn.Module, decoding: Decoding) -> Iterator[None]:
    """Replace the model's generation settings by plain greedy ones inside the block."""
    inner: Any = base_of(model)
    saved = inner.generation_config
    start_id = getattr(inner.config, "decoder_start_token_id", None)
    inner.generation_config = type(saved)(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=list(decoding.stop_ids) or None,
        pad_token_id=decoding.pad_id,
        bos_token_id=saved.bos_token_id,
        decoder_start_token_id=saved.decoder_start_token_id if start_id is None else start_id,
    )
    try:
        with warnings.catch_warnings():
            # PEFT numbers the positions behind virtual tokens itself; without padding they are the same.
            warnings.filterwarnings("ignore", message="Position ids are not supported for parameter efficient tuning")
            yield
    finally:
        inner.generation_config = saved


@dataclass(frozen=True, slots=True)
class _Decoder:
    """A model set to decode greedily; its methods return each prompt's new ids, stop and padding ids included."""

    model: Any
    decoding: Decoding
    stop_requested: Callable[[], bool]

    def rows(self, prompts: Sequence[list[int]], *, limit: int) -> list[list[int]]:
        """Decode the prompts side by side; a batch that does not fit into memory is halved, once."""
        try:
            return self._rows(prompts, limit=limit)
        except (RuntimeError, MemoryError) as error:
            if not lacks_memory(error):
                raise
            if len(prompts) == 1:
                raise self._too_large(1, limit) from error
        # Outside of the handler: while it runs, the exception keeps the tensors of the failed batch alive.
        half = (len(prompts) + 1) // 2
        try:
            return self._rows(prompts[:half], limit=limit) + self._rows(prompts[half:], limit=limit)
        except (RuntimeError, MemoryError) as error:
            if not lacks_memory(error):
                raise
            raise self._too_large(half, limit) from error

    def _rows(self, prompts: Sequence[list[int]], *, limit: int) -> list[list[int]]:
        input_ids_BT, attention_mask_BT = _padded(prompts, decoding=self.decoding)
        sequences = self.model.generate(
            input_ids=input_ids_BT.to(self.model.device),
            attention_mask=attention_mask_BT.to(self.model.device),
            max_new_tokens=limit,
            stopping_criteria=[self._stop],
        )
        if self.stop_requested():
            raise stopped("answers")
        # Decoder-only: the prompt comes back in front; with an encoder: its one start id does.
        first = 1 if self.decoding.encoder_decoder else input_ids_BT.shape[1]
        return sequences[:, first:].tolist()

    def _stop(self, sequences_BT: Tensor, _scores: Any, **_: Any) -> Tensor:
        """Tell `generate` after each token whether to end every row."""
        return torch.full((len(sequences_BT),), self.stop_requested(), dtype=torch.bool, device=sequences_BT.device)

    def _too_large(self, num_prompts: int, limit: int) -> OutOfMemoryError:
        return OutOfMemoryError(
            f"evaluation.tokens_per_batch: found no memory for {num_prompts} answers of up to {limit} tokens side by "
            f"side; expected {self.decoding.tokens_per_batch} tokens, or one answer, to fit. "
            "Lower evaluation.tokens_per_batch or evaluation.max_new_tokens."
        )


def _padded(prompts: Sequence[list[int]], *, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask (B, T); decoder-only rows are padded on the left, encoder rows on the right."""
    longest = max(map(len, prompts))
    input_ids_BT = torch.full((len(prompts), longest), decoding.pad_id, dtype=torch.long)
    attention_mask_BT = torch.zeros_like(input_ids_BT)
    for row, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if decoding.encoder_decoder else slice(longest - len(prompt), longest)
        input_ids_BT[row, place] = torch.tensor(prompt, dtype=torch.long)
        attention_mask_BT[row, place] = 1
    return input_ids_BT, attention_mask_BT


def _until_stop(ids: list[int], stop_ids: Sequence[int]) -> Generated:
    end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
    return Generated(ids[:end], ended=end is not None)
