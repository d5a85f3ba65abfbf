"""A sequence made on demand is like a list, and makes no entry that nobody asks for."""

from __future__ import annotations

import pytest

from keeptune.data.on_demand import OnDemand


class Squares(OnDemand[int]):
    def __init__(self) -> None:
        self.made: list[int] = []

    def __len__(self) -> int:
        return 5

    def _entry(self, index: int) -> int:
        self.made.append(index)
        return index * index


def test_entries_and_slices_are_those_of_a_list() -> None:
    squares, expected = Squares(), [0, 1, 4, 9, 16]
    assert list(squares) == expected and list(reversed(squares)) == expected[::-1]
    assert [squares[i] for i in range(-5, 5)] == [expected[i] for i in range(-5, 5)]
    for part in (slice(1, 3), slice(-2, None), slice(None, None, -2), slice(3, 1), slice(2, 99)):
        assert squares[part] == expected[part]
    for index in (5, -6):
        with pytest.raises(IndexError):
            squares[index]
    assert set(squares.made) == {0, 1, 2, 3, 4}


def test_no_entry_is_made_before_it_is_asked_for() -> None:
    squares = Squares()
    assert (squares[-2], squares[1:3], squares.made) == (9, [1, 4], [3, 1, 2])
