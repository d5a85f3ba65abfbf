"""The task's examples and a pool of replay texts arrive; one table of both leaves, the task's tokens what they were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from keeptune.errors import DataError
from keeptune.text.batches import epoch_order
from keeptune.text.tokens import Example, Examples, Teacher


class Chosen:
    """Examples of a table by their positions in it, an example as often as its position stands there."""

    lengths: NDArray[np.int64]
    num_targets: NDArray[np.int64]
    record_ids: list[str]

    def __init__(
        self, table: Examples, positions: NDArray[np.int64], *, teachers: Sequence[Teacher] | None = None
    ) -> None:
        """With `teachers`, the i-th example has teacher i modulo their number, as positions that start again do."""
        self._table, self._teachers = table, teachers
        self.positions = positions
        self.lengths = table.lengths[positions]
        self.num_targets = table.num_targets[positions]
        ids = table.record_ids
        self.record_ids = [ids[int(i)] for i in positions]

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


class Mixed:
    """The task's examples, then the replay examples; each keeps its record's id."""

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

    def __len__(self) -> int:
        return len(self.record_ids)

    def __getitem__(self, index: int, /) -> Example:
        return self._task[index] if index < len(self._task) else self.replay[index - len(self._task)]


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
