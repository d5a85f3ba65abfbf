"""Text files, gzipped or not: bytes arrive, lines and JSON rows leave, each with the place that it stands at."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from json.decoder import JSONDecodeError
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from keeptune.errors import DataError, StorageError

MAX_ROW_BYTES = 1 << 20
MAX_RATIO = 200
RATIO_FLOOR_BYTES = 1 << 24
_MAX_DOCUMENT_BYTES = 1 << 30
_MAX_DEPTH = 64
_BLOCK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\n\r]*")
_ENCODING_REMEDY = "Save the file as UTF-8."
# UTF-32 begins with UTF-16's mark, so it stands before it.
_FOREIGN_STARTS = {
    b"\xff\xfe\x00\x00": ("UTF-32 text", _ENCODING_REMEDY),
    b"\x00\x00\xfe\xff": ("UTF-32 text", _ENCODING_REMEDY),
    b"\xff\xfe": ("UTF-16 text", _ENCODING_REMEDY),
    b"\xfe\xff": ("UTF-16 text", _ENCODING_REMEDY),
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


class _JsonFault(ValueError):
    """Why no JSON value could be read, and the character position where that showed."""

    def __init__(self, found: str, *, position: int) -> None:
        super().__init__(found)
        self.found = found
        self.position = position


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
    for block in _blocks(path, shown=shown):
        if offset == 0 and number == 1 and not carry and block.startswith(_BOM):
            offset, block = len(_BOM), block[len(_BOM) :]
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
            f"{line.offset + error.start} of the file); expected UTF-8. {_ENCODING_REMEDY}"
        )


def json_rows(path: Path, *, shown: str) -> Iterator[Found]:
    """Yield (origin, row) for each object of a .json file: a list, {"data": list}, or JSON lines despite the name."""
    if _holds_json_lines(path, shown=shown):
        yield from json_line_rows(path, shown=shown)
        return
    text = _whole_text(path, shown=shown)
    if not text.strip():
        return
    try:
        yield from _document(text, shown=shown)
    except _JsonFault as fault:
        line = text.count("\n", 0, fault.position) + 1
        column = fault.position - text.rfind("\n", 0, fault.position)
        yield Problem(f"{shown}:{line}: found {fault.found} at column {column}; expected a JSON list. Mend that place.")


def json_line_rows(path: Path, *, shown: str) -> Iterator[Found]:
    """Yield (origin, row) for each line that is not blank; memory holds one block and one row."""
    parser = _Parser()
    for line in read_lines(path, shown=shown):
        if line.content.isspace():
            continue
        text = decoded(line, shown=shown)
        origin = f"{shown}:{line.number}"
        if isinstance(text, Problem):
            yield Problem(text.message, origin)
        else:
            text = text.strip(" \t\r\n")
            value = _line_value(parser, text)
            if isinstance(value, dict):
                yield origin, value
            else:
                hint = " A file that holds one JSON list needs a name that ends with .json." if text[0] == "[" else ""
                message = (
                    f"{origin}: found {value}; expected one JSON object on the line. Mend or remove the line.{hint}"
                )
                yield Problem(message, origin)


def _line_value(parser: _Parser, text: str) -> dict[str, Any] | str:
    """Return the object on one line, or what was found in its place."""
    try:
        value, end, fault = parser.value(text, 0)
    except _JsonFault as error:
        return f"{error.found} at column {error.position + 1}"
    if end != len(text):
        return f"a second value or other text after the first, at column {end + 1}"
    if fault or isinstance(value, dict):
        return fault or value
    return json_kind(value)


class _Parser:
    """JSON as the standard has it: no NaN, no key twice, no half of a surrogate pair, at most 64 levels."""

    def __init__(self) -> None:
        self._faults: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)

    def value(self, text: str, start: int) -> tuple[Any, int, str]:
        """Return the value that begins at `start`, the position after it and its fault ("" for none)."""
        self._faults.clear()
        try:
            value, end = self._decoder.raw_decode(text, start)
        except JSONDecodeError as error:
            raise _JsonFault(f"broken JSON ({error.msg})", position=error.pos) from error
        except RecursionError as error:
            raise _JsonFault(f"values nested deeper than {_MAX_DEPTH} levels", position=start) from error
        except ValueError as error:  # int() refuses thousands of digits
            raise _JsonFault("a number with too many digits", position=start) from error
        if text.count("[", start, end) + text.count("{", start, end) > _MAX_DEPTH and _depth(value) > _MAX_DEPTH:
            self._faults.append(f"values nested deeper than {_MAX_DEPTH} levels")
        if text.find("\\u", start, end) >= 0 and _has_half_surrogate(value):
            self._faults.append("half of a surrogate pair (an escape such as \\ud83d alone)")
        return value, end, self._faults[0] if self._faults else ""

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            keys = [key for key, _ in pairs]
            self._faults.append(f"the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
        return value

    def _constant(self, name: str) -> None:
        self._faults.append(f"{name}, which is no JSON")


def _has_half_surrogate(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level:
        depth += 1
        children = (item for v in level for item in (v.values() if isinstance(v, dict) else v))
        level = [child for child in children if isinstance(child, dict | list)]
    return depth


def json_kind(value: Any) -> str:
    """Return the JSON name of a value's type, with its article."""
    names = {list: "a list", str: "text", bool: "true or false", dict: "an object", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"a value of type {type(value).__name__}")


def _document(text: str, *, shown: str) -> Iterator[Found]:
    position = _after_space(text, 0)
    if text[position] == "[":
        position = yield from _elements(text, position, shown=shown)
    elif text[position] == "{":
        position = yield from _data_list(text, position, shown=shown)
    else:
        raise _JsonFault("text that begins no list", position=position)
    position = _after_space(text, position)
    if position != len(text):
        raise _JsonFault("other text after the list", position=position)


def _elements(text: str, start: int, *, shown: str) -> Generator[Found, None, int]:
    """Yield the elements of the list that begins at `start`; return the position after it."""
    parser = _Parser()
    position, index = _after_space(text, start + 1), 0
    if text[position : position + 1] == "]":
        return position + 1
    while True:
        origin = f"{shown}[{index}]"
        value, end, fault = parser.value(text, position)
        # A character is at least one byte, so that the exact count is needed for few rows.
        too_long = (end - position) * 4 > MAX_ROW_BYTES and len(text[position:end].encode()) > MAX_ROW_BYTES
        if too_long or fault or not isinstance(value, dict):
            found = f"a row of more than {MAX_ROW_BYTES:,} bytes" if too_long else fault or json_kind(value)
            message = f"{origin}: found {found}; expected a JSON object of at most 1 MiB. Mend or remove the row."
            yield Problem(message, origin)
        else:
            yield origin, value
        position, closed = _next_item(text, end, closing="]")
        if closed:
            return position
        index += 1


def _data_list(text: str, start: int, *, shown: str) -> Generator[Found, None, int]:
    """Yield the elements of the list under "data" of the object at `start`; return the position after the object."""
    parser, keys = _Parser(), []
    position, closed = _after_space(text, start + 1), False
    while not closed:
        key, end, _ = parser.value(text, position)
        if not isinstance(key, str) or key in keys:
            raise _JsonFault(f"{key!r:.40}" + " as a new key", position=position)
        keys.append(key)
        colon = _after_space(text, end)
        if text[colon : colon + 1] != ":":
            raise _JsonFault("no ':' after a key", position=colon)
        position = _after_space(text, colon + 1)
        if key == "data" and text[position : position + 1] == "[":
            end = yield from _elements(text, position, shown=shown)
        else:
            _, end, _ = parser.value(text, position)
            if key == "data":
                raise _JsonFault('no list under "data"', position=position)
        position, closed = _next_item(text, end, closing="}")
    if "data" not in keys:
        names = ", ".join(keys[:10])
        yield Problem(
            f"{shown}: found one object with the keys {names}; expected a list of rows, or one under the key data. "
            "Put the rows in a list."
        )
    return position


def _next_item(text: str, end: int, *, closing: str) -> tuple[int, bool]:
    """Return the position of what stands after the comma, or the one after `closing` and True."""
    position = _after_space(text, end)
    mark = text[position : position + 1]
    if mark == closing:
        return position + 1, True
    if mark != ",":
        raise _JsonFault(f"no ',' and no '{closing}'", position=position)
    return _after_space(text, position + 1), False


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _holds_json_lines(path: Path, *, shown: str) -> bool:
    """Tell whether the first line that is not blank is one whole object, and the next begins one or is missing."""
    lines = (line for line in read_lines(path, shown=shown) if line.content.strip())
    first, second = next(lines, None), next(lines, None)
    text = decoded(first, shown=shown) if first else ""
    value = _line_value(_Parser(), text.strip(" \t\r\n")) if isinstance(text, str) and text else ""
    if not isinstance(value, dict):
        return False
    return second.content.lstrip().startswith(b"{") if second else "data" not in value


def _whole_text(path: Path, *, shown: str) -> str:
    content = bytearray()
    for block in _blocks(path, shown=shown):
        content += block
        if len(content) > _MAX_DOCUMENT_BYTES:
            raise DataError(
                f"{shown}: found a JSON list of more than 1 GiB; expected less, since a list is read whole. "
                "Convert it to JSON lines (`jq -c '.[]'`) in a file whose name ends with .jsonl."
            )
    num_mark_bytes = len(_BOM) if content.startswith(_BOM) else 0
    try:
        return content[num_mark_bytes:].decode("utf-8")
    except UnicodeDecodeError as error:
        start = num_mark_bytes + error.start
        raise DataError(
            f"{shown}:{content.count(10, 0, start) + 1}: found bytes that are not UTF-8 ({content[start]:#04x} at byte "
            f"offset {start} of the file); expected UTF-8. {_ENCODING_REMEDY}"
        ) from error


def _blocks(path: Path, *, shown: str) -> Iterator[bytes]:
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
        _raise_foreign(shown, "UTF-16 text without a byte order mark", _ENCODING_REMEDY)


def _raise_foreign(shown: str, found: str, remedy: str) -> NoReturn:
    raise DataError(f"{shown}: found {found}; expected UTF-8 text. {remedy}")
