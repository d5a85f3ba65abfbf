"""Read JSON rows: lines of objects, a list, or a list under "data", each row with the place that it stands at."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Generator, Iterator
from json.decoder import JSONDecodeError
from pathlib import Path
from typing import Any

from keeptune.data.files import ALIASES
from keeptune.data.lines import (
    BOM,
    ENCODING_REMEDY,
    MAX_ROW_BYTES,
    Found,
    Problem,
    decoded,
    json_kind,
    read_lines,
    text_blocks,
)
from keeptune.errors import DataError

_MAX_DOCUMENT_BYTES = 1 << 30
_MAX_DEPTH = 64
_SPACE = re.compile(r"[ \t\n\r]*")
_SPLITS_REMEDY = "Write each split to a file of its own (train.json, test.json) and name their folder."
_NO_NUMBER = re.compile(r"\b(NaN|Infinity)\b")
_PANDAS = "with pandas: `df.to_json(name, orient='records', lines=True)`"


class _JsonFault(ValueError):
    """Why no JSON value could be read, and the character position where that showed."""

    def __init__(self, found: str, *, position: int) -> None:
        super().__init__(found)
        self.found = found
        self.position = position


def json_rows(path: Path, *, shown: str) -> Iterator[Found]:
    """Yield (origin, row) for each object of a .json file: a list, {"data": list}, or JSON lines despite the name."""
    if _holds_json_lines(path, shown=shown):
        yield from _without_other_shapes(json_line_rows(path, shown=shown), shown=shown)
        return
    text = _whole_text(path, shown=shown)
    if not text.strip():
        return
    try:
        yield from _document(text, shown=shown)
    except _JsonFault as fault:
        line = text.count("\n", 0, fault.position) + 1
        column = fault.position - text.rfind("\n", 0, fault.position)
        yield Problem(f"{shown}:{line}: found {fault.found} at column {column}; expected a JSON list. Fix that place.")


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
                yield Problem(f"{origin}: found {value}; expected one JSON object on the line. {_remedy(text)}", origin)


def _remedy(line: str) -> str:
    """Return what to do about a line that is no object."""
    if re.match(r"\[\s*($|\{)", line):
        return "If the file holds one JSON list, give it a name that ends with .json."
    if line[0] == "[":
        return 'Name what stands in the list: {"prompt": ..., "completion": ...}.'
    if _NO_NUMBER.search(line):
        return f"Write null in its place ({_PANDAS})."
    return "Fix or remove the line."


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
            message = f"{origin}: found {found}; expected a JSON object of at most 1 MiB. Fix or remove the row."
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
            f"{'Put the rows in a list.' if not _are_splits(keys) else _SPLITS_REMEDY}"
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


def _without_other_shapes(rows: Iterator[Found], *, shown: str) -> Iterator[Found]:
    """Yield the rows; one that is a whole table or a whole set of splits is a fault of the file."""
    for number, found in enumerate(rows):
        shape = "" if number or isinstance(found, Problem) else _other_shape(found[1])
        yield Problem(f"{shown}: {shape}") if shape else found


def _other_shape(value: dict[str, Any]) -> str:
    """Return what is wrong with an object that holds many rows: columns, or splits; "" where it may be one row."""
    if value and all(isinstance(rows, list) and rows and isinstance(rows[0], dict) for rows in value.values()):
        if _are_splits(value):
            return f"found one object with the splits {', '.join(value)}; expected a list of rows. {_SPLITS_REMEDY}"
        return ""
    sizes = {len(column) if isinstance(column, list | dict) else -1 for column in value.values()}
    is_table = len(value) > 1 and len(sizes) == 1 and sizes.pop() > 1
    cells = (
        [cell for column in value.values() for cell in (column.values() if isinstance(column, dict) else column)]
        if is_table
        else []
    )
    if is_table and not any(isinstance(cell, dict | list) for cell in cells):
        return (
            f"found one object that holds whole columns ({', '.join(value)[:100]}); expected a list of rows. Write it "
            f"row by row, {_PANDAS}."
        )
    return ""


def _are_splits(keys: Collection[str]) -> bool:
    return all(key in ALIASES for key in keys)


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
    for block in text_blocks(path, shown=shown):
        content += block
        if len(content) > _MAX_DOCUMENT_BYTES:
            raise DataError(
                f"{shown}: found a JSON list of more than 1 GiB; expected less, since a list is read whole. "
                "Convert it to JSON lines (`jq -c '.[]'`) in a file whose name ends with .jsonl."
            )
    num_mark_bytes = len(BOM) if content.startswith(BOM) else 0
    try:
        return content[num_mark_bytes:].decode("utf-8")
    except UnicodeDecodeError as error:
        start = num_mark_bytes + error.start
        raise DataError(
            f"{shown}:{content.count(10, 0, start) + 1}: found bytes that are not UTF-8 ({content[start]:#04x} at byte "
            f"offset {start} of the file); expected UTF-8. {ENCODING_REMEDY}"
        ) from error
