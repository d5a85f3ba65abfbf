"""Examples of several tasks and of replay arrive; one table of them leaves, and which of it each epoch shows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from keeptune.data.on_demand import OnDemand
from keeptune.data.record import REPLAY
from keeptune.errors import DataError
from keeptune.text.batches import epoch_order
from keeptune.text.tokens import Example, Examples, Teacher


@dataclass(frozen=True, slots=True)
class Share:
    """How many examples of a source an epoch shows, of the `num_examples` that it has.

    `is_fixed`: every epoch shows the same ones, as of replay; else each record as often as any other, or once more.
    """

    source: str
    num_examples: int
    num_per_epoch: int
    is_fixed: bool = False

    @property
    def num_repeats(self) -> int:
        """How many of an epoch's examples stand there again, because the source has too few."""
        return max(0, self.num_per_epoch - self.num_examples)

    def num_never_shown(self, *, num_epochs: int) -> int:
        """Return how many of the source's examples no epoch shows."""
        return max(0, self.num_examples - self.num_per_epoch * (1 if self.is_fixed else num_epochs))


def task_shares(
    counts: Mapping[str, int],
    *,
    cap: int | None = None,
    temperature: float = 1.0,
    weights: Mapping[str, float] | None = None,
) -> tuple[Share, ...]:
    """Return the share of each task, given its number of examples e.

    An epoch has N = Σ min(e, cap) examples. A task's part of them is proportional to min(e, cap)^(1 / temperature), or
    to its weight, rounded, and one at least; a temperature without end makes all parts equal.
    Source: Raffel et al. 2020, arXiv 1910.10683, section 3.5.2.
    """
    capped = {task: min(number, cap or number) for task, number in counts.items() if number}
    rates = {task: weights[task] if weights else number ** (1.0 / temperature) for task, number in capped.items()}
    of_rate = sum(capped.values()) / sum(rates.values())
    return tuple(
        Share(task, number, max(1, round(of_rate * rates[task])) if number else 0) for task, number in counts.items()
    )


class Mixture:
    """A table of several tasks, of which an epoch shows each task's share."""

    lengths: NDArray[np.int64]
    num_targets: NDArray[np.int64]
    record_ids: Sequence[str]

    def __init__(self, table: Examples, *, tasks: NDArray[np.integer], shares: Sequence[Share], seed: int) -> None:
        """`tasks` says of each example which of `shares` is that of its task."""
        self._table, self._tasks, self._seed = table, tasks, seed
        self.shares = tuple(shares)
        self.lengths, self.num_targets, self.record_ids = table.lengths, table.num_targets, table.record_ids

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """Return the positions that an epoch shows; they depend on nothing but the table, the shares and the seed."""
        shown = []
        for number, share in enumerate(self.shares):
            # The name in place of the number: a further task leaves the others' draws as they are.
            name = int.from_bytes(hashlib.blake2b(share.source.encode(), digest_size=8).digest(), "big")
            generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((self._seed, name))))
            draws = _draws(share, generator=generator)
            shown.append(np.flatnonzero(self._tasks == number)[next(islice(draws, epoch, None))])
        return np.concatenate(shown)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int, /) -> Example:
        return self._table[index]


def _draws(share: Share, *, generator: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Yield which of a task's examples each epoch shows, one epoch after the other, without end.

    Whole passes first; the rest goes on through a permutation where the epoch before left it. A pass that ends in an
    epoch is followed by a new permutation, of which this epoch takes those that it has not shown yet.
    """
    num_passes, rest = divmod(share.num_per_epoch, max(1, share.num_examples))
    whole = np.tile(np.arange(share.num_examples, dtype=np.int64), num_passes)
    left = np.zeros(0, dtype=np.int64)
    while True:
        shown, left = left[:rest], left[rest:]
        if len(shown) < rest:
            order = generator.permutation(share.num_examples).astype(np.int64)
            more = order[~np.isin(order, shown)][: rest - len(shown)]
            shown, left = np.concatenate([shown, more]), order[~np.isin(order, more)]
        yield np.concatenate([whole, shown])


class Chosen:
    """Examples of a table by their positions in it, an example as often as its position stands there."""

    lengths: NDArray[np.int64]
    num_targets: NDArray[np.int64]
    record_ids: Sequence[str]

    def __init__(
        self, table: Examples, positions: NDArray[np.int64], *, teachers: Sequence[Teacher] | None = None
    ) -> None:
        """With `teachers`, the i-th example has teacher i modulo their number, as positions that start again do."""
        self._table, self._teachers = table, teachers
        self.positions = positions
        self.lengths = table.lengths[positions]
        self.num_targets = table.num_targets[positions]
        self.record_ids = _IdsAt(table.record_ids, positions)

    @property
    def share(self) -> Share:
        """What an epoch shows of the table, as replay."""
        return Share(REPLAY, len(self._table), len(self.positions), is_fixed=True)

    @property
    def num_distinct(self) -> int:
        """The number of different examples."""
        return len(np.unique(self.positions))

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int, /) -> Example:
        example = self._table[int(self.positions[index])]
        if self._teachers is None:
            return example
        return replace(example, teacher=self._teachers[index % len(self._teachers)])

    def first(self, number: int) -> Chosen:
        """Return the first `number` of them, without teachers."""
        return Chosen(self._table, self.positions[:number])

    def taught(self, teachers: Sequence[Teacher]) -> Chosen:
        """Return the same examples with `teachers`, one for each of the different ones, in their order."""
        assert len(teachers) == self.num_distinct
        return Chosen(self._table, self.positions, teachers=teachers)


class _IdsAt(OnDemand[str]):
    """The ids at some positions, looked up as they are asked for."""

    def __init__(self, ids: Sequence[str], positions: NDArray[np.int64]) -> None:
        self._ids, self._positions = ids, positions

    def __len__(self) -> int:
        return len(self._positions)

    def _entry(self, index: int) -> str:
        return self._ids[int(self._positions[index])]


class Mixed:
    """The tasks' examples, then the replay examples; each keeps its record's id."""

    lengths: NDArray[np.int64]
    num_targets: NDArray[np.int64]
    record_ids: list[str]

    def __init__(self, task: Examples, replay: Chosen) -> None:
        self._task, self.replay = task, replay
        self.lengths = np.concatenate([task.lengths, replay.lengths])
        self.num_targets = np.concatenate([task.num_targets, replay.num_targets])
        self.record_ids = [*task.record_ids, *replay.record_ids]

    @property
    def num_replay_tokens(self) -> int:
        """The tokens of replay in an epoch."""
        return int(self.replay.lengths.sum())

    @property
    def num_repeats(self) -> int:
        """How many of an epoch's replay examples stand there again, because the pool has too few."""
        return len(self.replay) - self.replay.num_distinct

    @property
    def shares(self) -> tuple[Share, ...]:
        """What an epoch shows of the tasks, where that is not each example once, and of the replay."""
        return (*shares_of(self._task), self.replay.share)

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """Return the positions that an epoch shows: the tasks' for that epoch, and all of the replay."""
        return np.concatenate([epoch_positions(self._task, epoch), len(self._task) + np.arange(len(self.replay))])

    def __len__(self) -> int:
        return len(self.record_ids)

    def __getitem__(self, index: int, /) -> Example:
        return self._task[index] if index < len(self._task) else self.replay[index - len(self._task)]


def epoch_positions(table: Examples, epoch: int) -> NDArray[np.int64]:
    """Return the positions of the examples that an epoch shows: each once, unless the table is a mixture."""
    return table.epoch(epoch) if isinstance(table, Mixture | Mixed) else np.arange(len(table), dtype=np.int64)


def first_epoch(table: Examples) -> Examples:
    """Return the examples that the first epoch shows; those of another differ, and are as many."""
    return Chosen(table, epoch_positions(table, 0)) if isinstance(table, Mixture | Mixed) else table


def shares_of(table: Examples) -> tuple[Share, ...]:
    """Return what an epoch shows of each source of a mixture; nothing for a table that is none."""
    return table.shares if isinstance(table, Mixture | Mixed) else ()


def choose_replay(task: Examples, pool: Examples, *, fraction: float, seed: int) -> Chosen:
    """Return the replay examples of an epoch: as many of the pool as make `fraction` of its tokens, at least one.

    The task's tokens T stay, so that R = fraction / (1 - fraction) · T are added: the fewest examples that reach R, in
    an order that the seed decides. A smaller pool starts again from the first of them.

    Raises:
        DataError: the pool is empty.
    """
    if not len(pool):
        raise DataError(
            "replay: found no text; expected at least one to repeat beside the task. "
            "Give texts, or set replay_fraction=0."
        )
    order = epoch_order(len(pool), seed=seed, epoch=0)
    sums = np.cumsum(pool.lengths[order])
    wanted = fraction / (1.0 - fraction) * float(task.lengths.sum())
    num_passes, rest = divmod(wanted, float(sums[-1]))
    number = int(num_passes) * len(pool) + (int(np.searchsorted(sums, rest)) + 1 if rest > 0 else 0)
    return Chosen(pool, np.resize(order, number))
