"""Entries are made one at a time, by their number; what leaves is a sequence like any other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar, overload

_Entry = TypeVar("_Entry")


class OnDemand(Sequence[_Entry]):
    """A sequence whose entries are made when they are asked for; a slice of it is a list."""

    __slots__ = ()

    @abstractmethod
    def _entry(self, index: int) -> _Entry:
        """Return the entry at an index from 0 to the length."""

    @overload
    def __getitem__(self, index: int, /) -> _Entry: ...
    @overload
    def __getitem__(self, index: slice, /) -> list[_Entry]: ...
    def __getitem__(self, index: int | slice, /) -> _Entry | list[_Entry]:
        places = range(len(self))[index]
        return self._entry(places) if isinstance(places, int) else [self._entry(place) for place in places]
