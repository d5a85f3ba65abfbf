"""Links between numbered things arrive; the groups that they make leave: a forest in which a root is its smallest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keeptune.data.ngrams import distinct, run_starts

Members = NDArray[np.int32]


def find(parents: Any, i: int) -> int:
    """Return the root of `i` in a forest of parents, and shorten the path to it."""
    while parents[i] != i:
        parents[i] = parents[parents[i]]
        i = parents[i]
    return i


def union(parents: Any, i: int, j: int) -> bool:
    """Join the trees of `i` and `j` under the smaller root, in place; return False where they were one."""
    low, high = sorted((find(parents, i), find(parents, j)))
    parents[high] = low
    return low != high


def roots(parents: Iterable[int] | Members) -> Members:
    """Return the root of every one."""
    found = np.array(parents, np.int32)
    while True:
        above = found[found]
        if np.array_equal(above, found):
            return found
        found = above


def stars(num: int, first: NDArray[np.integer], second: NDArray[np.integer], *, ranks: NDArray[np.integer]) -> Members:
    """Join things to those that they are linked to, never by way of a third; return of each the centre of its group.

    The thing of the lowest rank is the first centre. A centre takes all that is linked to it and not taken yet, so that
    the ends of a chain come to lie in different groups, unless one thing is linked to both.
    """
    codes = distinct(np.concatenate([first * np.int64(num) + second, second * np.int64(num) + first]))
    things, linked = codes // num, (codes % num).astype(np.int32)
    starts = run_starts(things)
    ends = np.append(starts[1:], len(codes))[: len(starts)]
    centres = np.arange(num, dtype=np.int32)
    is_taken = np.zeros(num, np.bool_)
    for k in np.argsort(ranks[things[starts]], kind="stable").tolist():
        i = things[starts[k]]
        if not is_taken[i]:
            others = linked[starts[k] : ends[k]]
            others = others[~is_taken[others]]
            centres[others] = i
            is_taken[others] = is_taken[i] = True
    return centres
