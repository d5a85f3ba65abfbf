"""Groups are what links join, whatever the order of the links."""

from __future__ import annotations

from array import array

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from keeptune.data.groups import find, roots, union


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30))
def test_a_root_is_the_smallest_of_what_links_join(links: list[tuple[int, int]]) -> None:
    parents = array("i", range(20))
    group_of = list(range(20))
    for i, j in links:
        assert union(parents, i, j) == (group_of[i] != group_of[j])
        low, high = sorted((group_of[i], group_of[j]))
        group_of = [low if group == high else group for group in group_of]
    assert roots(np.frombuffer(parents, np.int32)).tolist() == group_of == [find(parents, i) for i in range(20)]
