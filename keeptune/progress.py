"""What long work reports while it runs: titles, counts and notes arrive; the command line decides how they look."""

from __future__ import annotations

from typing import Protocol


def noun(number: float | None, plural: str) -> str:
    """Return a plural's singular beside a count of one: "task" for 1 and "tasks", else "tasks"."""
    return plural.removesuffix("s") if number == 1 else plural


class Progress(Protocol):
    """A listener for long work; one piece of work is open at a time."""

    def start(self, title: str, *, total: int, unit: str) -> None:
        """Open a piece of work of `total` units (for instance "records", "tokens", "steps")."""

    def advance(self, count: int = 1, *, note: str = "") -> None:
        """Count `count` units as done; `note` is a short state such as "loss 2.31"."""

    def finish(self) -> None:
        """Close the open piece of work."""

    def say(self, text: str) -> None:
        """Pass on one line of plain text."""


class Silent:
    """A `Progress` that says nothing."""

    def start(self, title: str, *, total: int, unit: str) -> None: ...

    def advance(self, count: int = 1, *, note: str = "") -> None: ...

    def finish(self) -> None: ...

    def say(self, text: str) -> None: ...
