"""Files that lines are only added to: each line holds the hash of the line before it.

A line that was changed, or removed before the last one, breaks the chain. The number of lines and the last hash are
repeated in other files (a `Head`), so that lines removed from the end, or the whole file, are missed too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from keeptune.errors import StorageError
from keeptune.storage import storage_errors

_PREVIOUS = "previous_sha256"


@dataclass(frozen=True, slots=True)
class Head:
    """How many lines a chain had, and the SHA-256 of the last of them; `known_to` is the file that says so."""

    num_lines: int
    sha256: str
    known_to: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return what `head_from_json` reads."""
        return {"num_lines": self.num_lines, "sha256": self.sha256}


def head_from_json(value: Mapping[str, Any], *, known_to: Path) -> Head:
    """Return the head that a file repeats."""
    return Head(int(value["num_lines"]), str(value["sha256"]), str(known_to))


class Chain:
    """An open chain: its lines so far, and what adds one."""

    def __init__(
        self, file: BinaryIO, lines: list[dict[str, Any]], *, hashes: list[str], faults: Sequence[str] = ()
    ) -> None:
        self._file = file
        self.lines = lines
        self.faults = faults
        self._hashes = hashes

    @property
    def head(self) -> Head:
        """The number of lines and the hash of the last one."""
        return Head(len(self._hashes), self._hashes[-1] if self._hashes else "")

    def add(self, value: Mapping[str, Any]) -> None:
        """Add a line; it is on the disk when this returns."""
        line = _encoded({**value, _PREVIOUS: self.head.sha256})
        self._file.write(line + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.lines.append(dict(value))
        self._hashes.append(hashlib.sha256(line).hexdigest())


@contextlib.contextmanager
def open_chain(
    path: Path, *, heads: Iterable[Head], say: Callable[[str], None], keep_faults: bool = False
) -> Iterator[Chain]:
    """Hold a chain for this process and check it against `heads`, what other files know of it.

    A last line that a crash left half-written is cut off, and `say` is told. With `keep_faults` lines that were changed
    or removed are no error: the chain's `faults` name them, and the lines that can be read are its lines.

    Raises:
        StorageError: a line was changed or removed, or the disk refuses.
    """
    import fcntl

    with storage_errors(path), path.open("a+b") as file:
        # Two processes may add to it at once; the lock dies with its holder.
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        if torn := _torn(content):
            file.truncate(len(content) - len(torn))
            say(f"{path}: the last line was cut off while it was written; it is removed")
        elif content and not content.endswith(b"\n"):
            file.write(b"\n")
        lines, hashes, faults = _checked(content[: len(content) - len(torn)], path, heads=heads)
        if faults and not keep_faults:
            raise _broken(faults[0])
        yield Chain(file, lines, hashes=hashes, faults=faults)


def read_chain(path: Path, *, heads: Iterable[Head]) -> list[dict[str, Any]]:
    """Return the lines of a chain after checking them against `heads`; none where there is no file and none is known.

    Raises:
        StorageError: a line was changed or removed.
    """
    with storage_errors(path):
        content = path.read_bytes() if path.is_file() else b""
    lines, _, faults = _checked(content[: len(content) - len(_torn(content))], path, heads=heads)
    if faults:
        raise _broken(faults[0])
    return lines


def _torn(content: bytes) -> bytes:
    """Return the part behind the last end of a line where it is no whole line."""
    tail = content[content.rfind(b"\n") + 1 :]
    return tail if tail and _parsed(tail) is None else b""


def _checked(content: bytes, path: Path, *, heads: Iterable[Head]) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """Return the lines, the hash of each, and what shows that some were changed or removed."""
    lines: list[dict[str, Any]] = []
    hashes, faults = [""], []
    for number, text in enumerate(content.removesuffix(b"\n").split(b"\n") if content else (), 1):
        line = _parsed(text)
        if line is None or line.pop(_PREVIOUS, None) != hashes[-1]:
            faults.append(f"{path}:{number}: found a line that does not follow the one before it")
        if line is not None:
            lines.append(line)
        hashes.append(hashlib.sha256(text).hexdigest())
    for head in heads:
        if head.num_lines >= len(hashes):
            known = f"{len(hashes) - 1} of the {head.num_lines} lines that {head.known_to} knows of"
            faults.append(f"{path}: found {known}")
        elif hashes[head.num_lines] != head.sha256:
            faults.append(f"{path}:{head.num_lines}: found another line than {head.known_to} knows of")
    return lines, hashes[1:], faults


def _broken(fault: str) -> StorageError:
    return StorageError(
        f"{fault}; expected every line as keeptune wrote it. Put the file back from a copy, or choose another "
        "output_dir: what was opened before cannot be counted any more."
    )


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _encoded(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
