"""The heap is trimmed when nothing of what a function held is left in it."""

from __future__ import annotations

import weakref

import pytest

from keeptune.data import heap


class Held:
    pass


def test_what_a_function_held_is_let_go_before_the_heap_is_trimmed(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[weakref.ref[Held]] = []
    gone: list[bool] = []
    monkeypatch.setattr(heap, "give_back_freed", lambda: gone.append(places[0]() is None))

    @heap.gives_back_freed
    def work(number: int) -> int:
        held = Held()
        places.append(weakref.ref(held))
        return number + 1

    assert work(2) == 3 and gone == [True]


def test_giving_back_works_on_every_system() -> None:
    heap.give_back_freed()
