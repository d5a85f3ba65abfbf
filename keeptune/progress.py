"""What long work reports while it runs: titles, counts and notes arrive; the command line decides how they look."""

from __future__ import annotations

from typing import Protocol

# What is said of a stage whose results stood there ends so: `where: verb before and unchanged`.
UNCHANGED = "before and unchanged"


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


class Joined:
    """A `Progress` that passes all on, lines on stages that stood there unchanged as one line."""

    def __init__(self, listener: Progress) -> None:
        self._listener = listener
        self._unchanged: list[str] = []

    def start(self, title: str, *, total: int, unit: str) -> None:
        self._tell()
        self._listener.start(title, total=total, unit=unit)

    def advance(self, count: int = 1, *, note: str = "") -> None:
        self._listener.advance(count, note=note)

    def finish(self) -> None:
        self._tell()
        self._listener.finish()

    def say(self, text: str) -> None:
        if text.endswith(f" {UNCHANGED}"):
            self._unchanged.append(text.removesuffix(f" {UNCHANGED}"))
            return
        self._tell()
        self._listener.say(text)

    def _tell(self) -> None:
        if self._unchanged:
            self._listener.say(f"{', '.join(self._unchanged)} {UNCHANGED}")
        self._unchanged = []
