"""Links between numbered things arrive; the groups that they make leave: a forest in which a root is its smallest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
