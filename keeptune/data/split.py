"""Keys of prompts and links between them arrive; each record gets its split by the hash of its group.

A group is what near-duplicate links and equal prompts join, over all tasks; its key is the smallest prompt key in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keeptune.data.clean import first_of_equals
from keeptune.data.groups import Members, roots, stars, union
from keeptune.data.ngrams import Hashes, Indices, distinct, run_starts
from keeptune.data.record import SPLIT_NAMES, PartName, SplitName

# A split by its place in `SPLIT_NAMES`; -1 for a record that has none of its own.
SplitNumbers = NDArray[np.int8]
_JOINING_SHARE = 0.5
TRAIN, NO_SPLIT = np.int8(SPLIT_NAMES.index("train")), np.int8(-1)


@dataclass(frozen=True, slots=True)
class Assigned:
    """One split a record, and for each the record whose prompt key is that of its group.

    `num_joined` prompts follow another prompt's key because they are near-duplicates of it; `num_moved` records are in
    another split than their own prompt alone would be. `largest_group` counts records.
    """

    splits: SplitNumbers
    groups: Members
    num_groups: int
    num_joined: int
    num_moved: int
    largest_group: int


def split_name(group: str, *, seed: int, validation_fraction: float, test_fraction: float) -> SplitName:
    """Assign a group of near-duplicates to one split, whatever else is in the data."""
    place = _place(f"{seed} {group}")
    if place < test_fraction:
        return "test"
    return "validation" if place < test_fraction + validation_fraction else "train"


def part_name(group: str, *, seed: int, shares: Mapping[PartName, float]) -> PartName | None:
    """Assign a suite's group to a part, by expected share; None is the rest, which is reported on."""
    place = _place(f"{seed} part {group}")
    for part, share in shares.items():
        if place < share:
            return part
        place -= share
    return None


def _place(text: str) -> float:
    """Return a number in [0, 1) that is uniform over texts and the same for equal ones."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def key_text(key: Hashes) -> str:
    """Return a key of two numbers as 32 hexadecimal digits."""
    return f"{int(key[0]):016x}{int(key[1]):016x}"


def join_inputs(near: Members, links: Iterable[tuple[Members, Members]], *, keys: Hashes) -> Members:
    """Join groups of near-duplicates that share an input; return of each record the centre of its new group.

    Two groups share one where at least half of the records of either are linked to the other: a question of many
    stories joins none of them to another. Every group shares an input with the centre of its new one (see `stars`). The
    centre is the group with the most records, then with the most links, then with the smallest key, whatever the order.
    """
    num = len(near)
    codes = np.zeros(0, np.int64)
    for first, second in links:
        ends = np.concatenate([first, second]).astype(np.int64) * num + near[np.concatenate([second, first])]
        codes = distinct(np.concatenate([codes, ends]))
    sizes = np.bincount(near, minlength=num)
    linked = np.sort(near[codes // num] * np.int64(num) + codes % num)
    starts = run_starts(linked)
    pairs, counts = linked[starts], np.diff(starts, append=len(linked))
    pairs = pairs[counts >= _JOINING_SHARE * sizes[pairs // num]]
    links_of = np.bincount(distinct(np.concatenate([pairs, pairs % num * num + pairs // num])) // num, minlength=num)
    by_key = np.zeros(num, np.int64)
    # Of several records of one group, the one with the smallest key is written last.
    by_key[near[np.lexsort((keys[:, 1], keys[:, 0]))[::-1]]] = np.arange(num)[::-1]
    ranks = np.empty(num, np.int64)
    ranks[np.lexsort((by_key, -links_of, -sizes))] = np.arange(num)
    return stars(num, pairs // num, pairs % num, ranks=ranks)[near]


def assign_splits(
    keys: Hashes,
    *,
    tasks: NDArray[np.int32],
    near: Members,
    fixed: SplitNumbers,
    seed: int,
    validation_fraction: float,
    test_fraction: float,
) -> Assigned:
    """Assign every record to a split; no group straddles splits but where own files (`fixed`) make it so.

    `keys` (number of records, 2) are those of the prompts, `near` the groups of `join_inputs`. A record of an own
    file keeps that file's split. A group with such a record is not carved: its other records go to train, where
    `find_leaks` sees them. So does a group that is drawn for a split which a task of it brings along as a file of its
    own.
    """
    if not len(keys):
        return Assigned(np.zeros(0, np.int8), np.zeros(0, np.int32), 0, 0, 0, 0)
    first_of = first_of_equals(keys)
    distinct_keys = np.flatnonzero(first_of == np.arange(len(keys)))
    fractions = {"validation_fraction": validation_fraction, "test_fraction": test_fraction}
    names = (split_name(key_text(keys[i]), seed=seed, **fractions) for i in distinct_keys)
    drawn = np.empty(len(keys), np.int8)
    drawn[distinct_keys] = np.fromiter(map(SPLIT_NAMES.index, names), np.int8, len(distinct_keys))
    drawn = drawn[first_of]
    parents = near.copy()
    for i in np.flatnonzero(parents[first_of] != parents):
        union(parents, int(first_of[i]), int(i))
    root_of = roots(parents)
    groups = _smallest(keys, distinct_keys, root_of=root_of)[root_of]
    has_own = np.zeros((int(tasks.max()) + 1, len(SPLIT_NAMES)), np.bool_)
    has_own[tasks[fixed >= 0], fixed[fixed >= 0]] = True
    to_train = np.zeros(len(keys), np.bool_)
    to_train[groups[(fixed >= 0) | has_own[tasks, drawn[groups]]]] = True
    group_sizes = np.bincount(groups)
    num_groups = int(np.count_nonzero(group_sizes))
    return Assigned(
        splits=np.where(fixed >= 0, fixed, np.where(to_train[groups], TRAIN, drawn[groups])),
        groups=groups,
        num_groups=num_groups,
        num_joined=len(distinct_keys) - num_groups,
        num_moved=int(np.count_nonzero(drawn != drawn[groups])),
        largest_group=int(group_sizes.max()),
    )


def _smallest(keys: Hashes, rows: Indices, *, root_of: Members) -> Members:
    """Return for each root which of the rows of its group has the smallest key."""
    descending = rows[np.lexsort((keys[rows, 1], keys[rows, 0]))][::-1]
    found = np.full(len(keys), -1, np.int32)
    # Of several rows with one root, the last is written last.
    found[root_of[descending]] = descending
    return found
