"""Records and their exemplars arrive; examples whose prompts show the exemplars leave, fitted to the positions.

A template with turns (chat, chatml) shows exemplars as earlier turns. Any other wording is made for one question with
its answer: each exemplar stands before the prompt as it does in training, a blank line between. An encoder reads them
as text, each answer on a line of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from keeptune.data.record import Record
from keeptune.errors import KeeptuneError
from keeptune.text.template import Template
from keeptune.text.tokenizer import Tokenizer
from keeptune.text.tokens import RECORDS_PER_CALL, Example, encode_prompts

_WITH_TURNS = ("chat", "chatml")
_BLANK_LINE = "\n\n"


@dataclass(frozen=True, slots=True)
class Shown:
    """An example behind the last `num_shown` of its exemplars; `refusal`: why the template could show none of them."""

    example: Example
    num_shown: int
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Room:
    """What prompts must leave: `max_new_tokens` of `max_positions`, of which None is without limit."""

    max_new_tokens: int
    max_positions: int | None
    encoder_decoder: bool

    def holds(self, prompt: NDArray[np.int32], *, completion: NDArray[np.int32]) -> bool:
        """Tell whether an answer has room beside the prompt, and the reference, of which the loss is taken."""
        answer = 0 if self.encoder_decoder else max(self.max_new_tokens, len(completion))
        return self.max_positions is None or len(prompt) + answer <= self.max_positions


def with_exemplars(
    records: Sequence[Record],
    examples: Sequence[Example],
    exemplars: Sequence[Sequence[Record]],
    *,
    tokenizer: Tokenizer,
    template: Template,
    room: Room,
) -> Iterator[Shown]:
    """Yield each record's example with as many of its exemplars before its prompt as there is room for.

    Whole exemplars are left out, the farthest first. What the length policy cut out of a record's own prompt stays cut
    out. `examples` are those without exemplars; the completion is theirs.
    """
    renderer = _Renderer(tokenizer, template, room.encoder_decoder)
    for start in range(0, len(records), RECORDS_PER_CALL):
        part = slice(start, start + RECORDS_PER_CALL)
        yield from _fitted(records[part], examples[part], exemplars[part], renderer=renderer, room=room)


def _fitted(
    records: Sequence[Record],
    examples: Sequence[Example],
    exemplars: Sequence[Sequence[Record]],
    *,
    renderer: _Renderer,
    room: Room,
) -> list[Shown]:
    shown = [Shown(example, 0) for example in examples]
    own = renderer.prompts({i: (record, ()) for i, record in enumerate(records)}, shown=shown)
    # The most exemplars that are known to fit, and the most that may; all of them are tried first.
    fits = dict.fromkeys((i for i, before in enumerate(exemplars) if before), 0)
    may = {i: len(exemplars[i]) for i in fits}
    tried = dict(may)
    while tried:
        asked = {i: (records[i], exemplars[i][-number:]) for i, number in tried.items()}
        prompts = renderer.prompts(asked, shown=shown)
        for i, number in tried.items():
            example = examples[i]
            prompt = _cut_alike(prompts[i], own=own[i], kept=example.prompt_ids) if i in prompts else None
            if prompt is not None and room.holds(prompt, completion=example.completion_ids):
                shown[i] = Shown(_joined(prompt, example.completion_ids), number)
                fits[i] = number
            else:
                may[i] = number - 1
        tried = {i: (fits[i] + may[i] + 1) // 2 for i in tried if fits[i] < may[i]}
    return shown


def _joined(prompt: NDArray[np.int32], completion: NDArray[np.int32]) -> Example:
    input_ids = np.concatenate([prompt, completion])
    return Example(input_ids, loss_mask=np.arange(len(input_ids)) >= len(prompt))


def _cut_alike(
    prompt: NDArray[np.int32], *, own: NDArray[np.int32], kept: NDArray[np.int32]
) -> NDArray[np.int32] | None:
    """Return the prompt, which ends like `own`, without what `kept` lacks of that end; None: it ends otherwise."""
    num_cut = len(own) - len(kept)
    if num_cut == 0:
        return prompt
    tail = _num_common(own, kept)
    if _num_common(prompt, own) < tail + num_cut:
        return None
    end = len(prompt) - tail
    return np.concatenate([prompt[: end - num_cut], prompt[end:]])


def _num_common(first: NDArray[np.int32], second: NDArray[np.int32]) -> int:
    """Return how many ids at their ends the two have in common."""
    longest = min(len(first), len(second))
    differ = np.flatnonzero(first[::-1][:longest] != second[::-1][:longest])
    return int(differ[0]) if len(differ) else longest


@dataclass(frozen=True, slots=True)
class _Renderer:
    """Records behind their exemplars become segments and ids."""

    tokenizer: Tokenizer
    template: Template
    encoder_decoder: bool

    def prompts(
        self, asked: dict[int, tuple[Record, Sequence[Record]]], *, shown: list[Shown]
    ) -> dict[int, NDArray[np.int32]]:
        """Return the ids of the prompts that the template renders; the others' refusals are put into `shown`."""
        rows: dict[int, str] = {}
        for i, (record, exemplars) in asked.items():
            try:
                rows[i] = self.text(record, exemplars)
            except KeeptuneError as error:
                if not shown[i].num_shown:
                    shown[i] = replace(shown[i], refusal=str(error))
        ids = encode_prompts(list(rows.values()), template=self.template)
        return dict(zip(rows, ids, strict=True))

    def text(self, record: Record, exemplars: Sequence[Record]) -> str:
        if self.template.name in _WITH_TURNS:
            return self._as_turns(record, exemplars)
        return self._as_text(record, exemplars) if self.encoder_decoder else self._in_a_row(record, exemplars)

    def _as_turns(self, record: Record, exemplars: Sequence[Record]) -> str:
        """Return a conversation with the record's system message alone, if it has one."""
        messages = record.messages[:-1]
        system = messages[:1] if messages[0].role == "system" else ()
        turns = [m for exemplar in exemplars for m in exemplar.messages if m.role != "system"]
        return self.template.render_prompt([*system, *turns, *messages[len(system) :]], tools=record.tools)

    def _in_a_row(self, record: Record, exemplars: Sequence[Record]) -> str:
        """Return what is trained on of each exemplar, then the record's own prompt; BOS stands at the start alone."""
        row = ""
        for exemplar in exemplars:
            block = self.template.render(exemplar.messages, train_on="last")
            row += self._continuing(block.prompt + block.completion, row)
        return row + self._continuing(self._prompt(record), row)

    def _continuing(self, block: str, row: str) -> str:
        return _BLANK_LINE + block.removeprefix(self.tokenizer.bos_token or "") if row else block

    def _as_text(self, record: Record, exemplars: Sequence[Record]) -> str:
        """Return the exemplars and the prompt as one text between the special tokens of the prompt."""
        blocks = [self._block(exemplar) for exemplar in exemplars]
        before, text, after = self._parted(self._prompt(record))
        return before + _BLANK_LINE.join([*blocks, text]) + after

    def _block(self, exemplar: Record) -> str:
        row = self.template.render(exemplar.messages, train_on="last")
        return f"{self._parted(row.prompt)[1]}\n{row.completion.removesuffix(self.template.end_token)}"

    def _prompt(self, record: Record) -> str:
        return self.template.render_prompt(record.messages[:-1], tools=record.tools)

    def _parted(self, prompt: str) -> tuple[str, str, str]:
        """Return what an encoder reads as its BOS token, if it has one, its text and its end token."""
        before = self.tokenizer.bos_token if self.tokenizer.adds_bos else None
        text = prompt.removeprefix(before or "").removesuffix(self.template.end_token)
        return before or "", text, self.template.end_token
