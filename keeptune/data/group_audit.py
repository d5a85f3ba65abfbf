"""Describe groups of records that stay in one split, for the audit: how many there are, and what the largest share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keeptune.data.disk import Records, chosen
from keeptune.data.leak_audit import shared_words
from keeptune.data.ngrams import Hashes
from keeptune.data.split import Assigned

_MAX_SHOWN = 5
_MAX_COMPARED = 8


@dataclass(frozen=True, slots=True)
class LargeGroup:
    """A group's size, the task of most of its records, one of them by its origin, and the beginning of what it shares.

    `shared` is the longest run of words that the record has in common with another of the group.
    """

    num_records: int
    task: str
    record: str
    shared: str


@dataclass(frozen=True, slots=True)
class GroupAudit:
    """Groups of records that share an input; `num_joined` prompts and `num_moved` records follow another's key.

    `largest` holds the largest groups that have more than one record.
    """

    num_groups: int
    num_joined: int
    num_moved: int
    largest_group: int
    largest: tuple[LargeGroup, ...] = ()


def group_audit(
    assigned: Assigned, records: Records, *, keys: Hashes, tasks: NDArray[np.int32], names: Sequence[str]
) -> GroupAudit:
    """Return the audit of the groups; `tasks` are places in `names`."""
    sizes = np.bincount(assigned.groups, minlength=len(keys))
    # Of groups of one size, the one with the smallest key comes first.
    largest = np.lexsort((keys[:, 1], keys[:, 0], -sizes))[:_MAX_SHOWN]
    groups: list[LargeGroup] = []
    for group in largest[sizes[largest] > 1]:
        members = np.flatnonzero(assigned.groups == group)
        spread = members[np.linspace(0, len(members) - 1, min(len(members), _MAX_COMPARED), dtype=np.int64)]
        first, *others = chosen(records, spread)
        shared = max((shared_words(first, other) for other in others), key=len)
        task = names[int(np.bincount(tasks[members]).argmax())]
        groups.append(LargeGroup(len(members), task, first.origin, shared))
    counts = (assigned.num_groups, assigned.num_joined, assigned.num_moved, assigned.largest_group)
    return GroupAudit(*counts, tuple(groups))
