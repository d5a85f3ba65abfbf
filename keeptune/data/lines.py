"""Read text files, gzipped or not, line by line, each with its place; refuse what is no UTF-8 text."""

from __future__ import annotations

import contextlib
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from keeptune.errors import DataError, StorageError

MAX_ROW_BYTES = 1 << 20
MAX_RATIO = 200
RATIO_FLOOR_BYTES = 1 << 24
_BLOCK_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"
ENCODING_REMEDY = "Save the file as UTF-8."
# UTF-32 begins with UTF-16's mark, so it stands before it.
_FOREIGN_STARTS = {
    b"\xff\xfe\x00\x00": ("UTF-32 text", ENCODING_REMEDY),
    b"\x00\x00\xfe\xff": ("UTF-32 text", ENCODING_REMEDY),
    b"\xff\xfe": ("UTF-16 text", ENCODING_REMEDY),
    b"\xfe\xff": ("UTF-16 text", ENCODING_REMEDY),
    b"\x1f\x8b": ("gzipped bytes", "Give the file a name that ends with .gz."),
    b"PK\x03\x04": ("a zip archive", "Unpack it."),
    b"PAR1": ("a Parquet file", "Give the file a name that ends with .parquet."),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """A fault of the data; `origin` is that of the row that it spoils, "" where it spoils more than one row."""

    message: str
    origin: str = ""


class Line(NamedTuple):
    """`content` with its line end; `number` counts from 1, `offset` is that of its first byte after decompression."""

    number: int
    offset: int
    content: bytes


Found = tuple[str, dict[str, Any]] | Problem


@contextlib.contextmanager
def reading(shown: str) -> Iterator[None]:
    """Turn what the operating system and zlib raise inside the block into an error about the file `shown`."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{shown}: found broken gzip data ({error}); expected a whole .gz file. Copy or download the file again."
        ) from error
    except OSError as error:
        raise StorageError(
            f"{shown}: found no readable file ({error.strerror or error}); expected one that this user may read. "
            "Check its permissions and the disk."
        ) from error


def read_lines(path: Path, *, shown: str) -> Iterator[Line]:
    r"""Yield the lines of a file, which end with \n, \r\n or \r, without a leading UTF-8 byte order mark.

    A line longer than `MAX_ROW_BYTES` comes cut, yet longer than that; memory stays bounded.

    Raises:
        DataError: the file is no text (UTF-16, Parquet, ...), or its gzip data are broken or blown up.
    """
    number, offset, num_cut, carry = 1, 0, 0, b""
    for block in text_blocks(path, shown=shown):
        if offset == 0 and number == 1 and not carry and block.startswith(BOM):
            offset, block = len(BOM), block[len(BOM) :]
        # The last piece waits: it may be half a line, or end between \r and \n.
        *pieces, carry = (carry + block).splitlines(keepends=True) or [b""]
        for piece in pieces:
            yield Line(number, offset, piece)
            number, offset, num_cut = number + 1, offset + len(piece) + num_cut, 0
        if len(carry) > MAX_ROW_BYTES + 1 and not carry.endswith((b"\n", b"\r")):
            num_cut += len(carry) - (MAX_ROW_BYTES + 1)
            carry = carry[: MAX_ROW_BYTES + 1]
    if carry:
        yield Line(number, offset, carry)


def decoded(line: Line, *, shown: str) -> str | Problem:
    """Return the line as text, or why it is none."""
    if len(line.content) > MAX_ROW_BYTES:
        return Problem(
            f"{shown}:{line.number}: found a line of more than {MAX_ROW_BYTES:,} bytes; expected a row of at most "
            "1 MiB. Split or shorten the row."
        )
    nul = line.content.find(b"\0")
    if nul >= 0:
        return Problem(
            f"{shown}:{line.number}: found a NUL byte at byte offset {line.offset + nul} of the file; expected text. "
            "Remove it, or copy the file again."
        )
    try:
        return line.content.decode("utf-8")
    except UnicodeDecodeError as error:
        return Problem(
            f"{shown}:{line.number}: found bytes that are not UTF-8 ({error.object[error.start]:#04x} at byte offset "
            f"{line.offset + error.start} of the file); expected UTF-8. {ENCODING_REMEDY}"
        )


def json_kind(value: Any) -> str:
    """Return the JSON name of a value's type, with its article."""
    names = {list: "a list", str: "text", bool: "true or false", dict: "an object", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"a value of type {type(value).__name__}")


def text_blocks(path: Path, *, shown: str) -> Iterator[bytes]:
    """Yield a text file's bytes, decompressed where its name ends with .gz, in blocks of at most 1 MiB."""
    gzipped = path.name.lower().endswith(".gz")
    num_bytes = 0
    with reading(shown), path.open("rb") as raw:
        stream = gzip.GzipFile(fileobj=raw) if gzipped else raw
        while block := stream.read(_BLOCK_BYTES):
            if num_bytes == 0:
                _refuse_foreign_start(block, shown=shown)
            num_bytes += len(block)
            if gzipped:
                refuse_blown_up(num_bytes, file_bytes=raw.tell(), shown=shown)
            yield block


def refuse_blown_up(num_bytes: int, *, file_bytes: int, shown: str) -> None:
    """Refuse a small compressed file that holds more than `MAX_RATIO` times its bytes.

    Raises:
        DataError: the ratio is passed; files of less than 16 MiB after decompression always pass.
    """
    if num_bytes > RATIO_FLOOR_BYTES and num_bytes > MAX_RATIO * file_bytes:
        raise DataError(
            f"{shown}: found {num_bytes:,} bytes or more packed into {file_bytes:,}; expected at most {MAX_RATIO} "
            "times as many, as text has. Unpack the file by hand if you trust it."
        )


def _refuse_foreign_start(block: bytes, *, shown: str) -> None:
    for start, (found, remedy) in _FOREIGN_STARTS.items():
        if block.startswith(start):
            _raise_foreign(shown, found, remedy)
    # ASCII in UTF-16 without a byte order mark: every other byte is NUL.
    if len(block) > 1 and (block[0] == 0) != (block[1] == 0):
        _raise_foreign(shown, "UTF-16 text without a byte order mark", ENCODING_REMEDY)


def _raise_foreign(shown: str, found: str, remedy: str) -> NoReturn:
    raise DataError(f"{shown}: found {found}; expected UTF-8 text. {remedy}")
