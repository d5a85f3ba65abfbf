"""Examples arrive, batches leave: their members, order and number are a pure function of the plan's arguments.

Shape key: B examples of the micro-batch, T tokens (of the flat pack, or padded), S encoder tokens, U decoder tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from keeptune.data.ngrams import batches
from keeptune.data.on_demand import OnDemand
from keeptune.text.tokens import Example, Teacher

# "single": every micro-batch holds one example.
Layout = Literal["packed", "padded", "pairs", "single"]
NOT_TRAINED = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch. `labels` are unshifted and `NOT_TRAINED` where no loss counts.

    Packed: `input_ids` and `labels` are (T,), the examples lie end to end, `lengths` (B,) are the segments.
    Padded on the right: (B, T), `lengths` are the real tokens of each row.
    Pairs: `input_ids` (B, S) feed the encoder, `labels` (B, U) the decoder, whose real tokens are `label_lengths` (B,).
    Targets count row by row, from left to right; `teacher_rows` are the numbers of those that `teacher` speaks of.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    lengths: NDArray[np.int64]
    packed: bool
    label_lengths: NDArray[np.int64] | None = None
    teacher: Teacher | None = None
    teacher_rows: NDArray[np.int64] | None = None

    @property
    def num_targets(self) -> int:
        """The number of labels that carry loss; without an encoder the first token of an example never does."""
        return int(np.count_nonzero(self.labels != NOT_TRAINED))


@dataclass(frozen=True, slots=True)
class Step:
    """The examples of one optimizer update, as indices, in their micro-batches."""

    micro_batches: tuple[tuple[int, ...], ...]
    num_tokens: int
    num_targets: int


@dataclass(frozen=True, slots=True, eq=False)
class EpochPlan(OnDemand[Step]):
    """The steps of an epoch, each made when it is asked for; memory holds four bytes an example.

    Step i takes the examples of `order` between entries i and i + 1 of `bounds`.
    """

    order: NDArray[np.int32]
    bounds: NDArray[np.int64]
    lengths: NDArray[np.int64]
    num_targets: NDArray[np.int64]
    layout: Layout
    tokens_per_micro_batch: int

    @property
    def num_tokens(self) -> int:
        """The tokens of all steps."""
        return int(self.lengths[self.order[self.bounds[0] : self.bounds[-1]]].sum())

    def after(self, num_done: int) -> EpochPlan:
        """Return the plan without its first steps."""
        return replace(self, bounds=self.bounds[num_done:])

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def _entry(self, index: int) -> Step:
        step = self.order[self.bounds[index] : self.bounds[index + 1]]
        sizes, targets = self.lengths[step].tolist(), self.num_targets[step].tolist()
        decoder = targets if self.layout == "pairs" else [0] * len(sizes)
        sides = {i: (size - part, part) for i, size, part in zip(step.tolist(), sizes, decoder, strict=True)}
        inner = step.tolist()
        if self.layout != "packed":
            inner.sort(key=lambda i: (*sides[i], i), reverse=True)
        budget = 0 if self.layout == "single" else self.tokens_per_micro_batch
        groups = _groups(inner, sides=sides, padded=self.layout != "packed", budget=budget)
        return Step(tuple(tuple(group) for group in groups), num_tokens=sum(sizes), num_targets=sum(targets))


def epoch_order(num_examples: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the permutation of `num_examples` indices for one epoch; it depends on nothing but the arguments."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch))))
    return generator.permutation(num_examples).astype(np.int64)


def plan_epoch(
    lengths: NDArray[np.int64],
    num_targets: NDArray[np.int64],
    *,
    seed: int,
    epoch: int,
    tokens_per_step: int,
    tokens_per_micro_batch: int,
    layout: Layout,
    members: NDArray[np.int64] | None = None,
) -> EpochPlan:
    """Return the steps of one epoch; each of the `members` (default: every example once) stands in one of them.

    A step takes consecutive examples of `epoch_order` while their tokens fit `tokens_per_step`; one that is longer
    stands alone. A last step under half the budget joins the one before it, which may then hold up to one and a half
    budgets. Micro-batches hold at most `tokens_per_micro_batch` tokens, padding counted, or a single example; in the
    layout "single" always that.
    """
    members = np.arange(len(lengths), dtype=np.int64) if members is None else members
    order = members[epoch_order(len(members), seed=seed, epoch=epoch)].astype(np.int32)
    sizes = lengths[order]
    ends = [part.stop for part in batches(sizes, at_most=tokens_per_step)]
    if len(ends) > 1 and 2 * int(sizes[ends[-2] :].sum()) < tokens_per_step:
        del ends[-2]
    return EpochPlan(order, np.array([0, *ends], np.int64), lengths, num_targets, layout, tokens_per_micro_batch)


def _groups(
    order: Sequence[int], *, sides: Mapping[int, tuple[int, int]], padded: bool, budget: int
) -> Iterator[list[int]]:
    """Yield consecutive runs of `order` whose tokens (of both sides, padding counted on request) fit the budget."""
    group: list[int] = []
    total = longest = longest_second = 0
    for index in order:
        first, second = sides[index]
        wider = (max(longest, first), max(longest_second, second))
        cost = (len(group) + 1) * sum(wider) if padded else total + first + second
        if group and cost > budget:
            yield group
            group, total, wider = [], 0, (first, second)
        group.append(index)
        total += first + second
        longest, longest_second = wider
    if group:
        yield group


def pack(examples: Sequence[Example]) -> Batch:
    """Return the examples end to end, without padding."""
    lengths = np.array([len(example.input_ids) for example in examples], dtype=np.int64)
    input_ids = np.concatenate([example.input_ids for example in examples]).astype(np.int64)
    loss_mask = np.concatenate([example.loss_mask for example in examples])
    loss_mask[np.cumsum(lengths) - lengths] = False
    batch = Batch(input_ids, labels=np.where(loss_mask, input_ids, NOT_TRAINED), lengths=lengths, packed=True)
    return _with_teachers(batch, examples)


def pad(examples: Sequence[Example], *, pad_id: int) -> Batch:
    """Return the examples as rows, padded on the right."""
    input_ids, lengths = _rows([example.input_ids for example in examples], filler=pad_id)
    loss_mask, _ = _rows([example.loss_mask for example in examples], filler=0)
    loss_mask[:, 0] = 0
    batch = Batch(input_ids, labels=np.where(loss_mask > 0, input_ids, NOT_TRAINED), lengths=lengths, packed=False)
    return _with_teachers(batch, examples)


def pad_pairs(examples: Sequence[Example], *, pad_id: int) -> Batch:
    """Return prompts as encoder rows and completions as label rows, both padded on the right."""
    input_ids, lengths = _rows([example.prompt_ids for example in examples], filler=pad_id)
    labels, label_lengths = _rows([example.completion_ids for example in examples], filler=NOT_TRAINED)
    batch = Batch(input_ids, labels=labels, lengths=lengths, packed=False, label_lengths=label_lengths)
    return _with_teachers(batch, examples)


def _with_teachers(batch: Batch, examples: Sequence[Example]) -> Batch:
    """Return the batch with the teachers of those examples that have one."""
    teachers = [example.teacher for example in examples]
    present = [teacher for teacher in teachers if teacher is not None]
    if not present:
        return batch
    trained = batch.labels != NOT_TRAINED
    starts = np.cumsum(batch.lengths) - batch.lengths
    counts = np.add.reduceat(trained, starts, dtype=np.int64) if batch.packed else trained.sum(axis=1)
    taught = np.array([teacher is not None for teacher in teachers])
    assert [len(teacher.ids) for teacher in present] == counts[taught].tolist(), "a teacher has a row for each target"
    joined = Teacher(
        np.concatenate([teacher.ids for teacher in present]),
        log_probs=np.concatenate([teacher.log_probs for teacher in present]),
    )
    return replace(batch, teacher=joined, teacher_rows=np.flatnonzero(np.repeat(taught, counts)))


def _rows(
    rows: Sequence[NDArray[np.int32] | NDArray[np.bool_]], *, filler: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    padded = np.full((len(rows), int(lengths.max())), filler, dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded, lengths


def auto_tokens_per_step(
    lengths: NDArray[np.int64], *, num_epochs: float, target_steps: int = 100, at_most: int = 8192
) -> int:
    """Return the tokens of a step: as many as leave `target_steps` steps in the run, up to `at_most`.

    Data that fill `target_steps` steps of `at_most` tokens get `at_most`; smaller data get smaller steps, down to
    twice the mean length, because a thousand short examples in a dozen large steps teach almost nothing.
    """
    if len(lengths) == 0:
        return at_most
    run_tokens = float(lengths.sum()) * num_epochs
    return min(at_most, max(math.ceil(2 * float(lengths.mean())), int(run_tokens / target_steps)))
