"""Read delimited text: rows as a spreadsheet writes them, with a header, separated by commas, semicolons or tabs."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from keeptune.data.lines import MAX_ROW_BYTES, Found, Problem, decoded, read_lines

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}


@dataclass(frozen=True, slots=True)
class _Form:
    """How a file is written: its delimiter, whether a space follows each, and the lines before the header."""

    delimiter: str
    spaced: bool
    num_skipped: int


def csv_rows(path: Path, *, shown: str) -> Iterator[Found]:
    """Yield (origin, row) for each row of a delimited file with a header; a fault of the quoting ends it.

    The delimiter is the one of comma, semicolon, tab and vertical bar that cuts the header into most names, or the one
    that a first line `sep=;` names, as Excel writes it.
    """
    # The module's limit for one field is 128 KiB for the whole process; it is only ever raised here.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    form = _form(path, shown=shown)
    faults: list[Problem] = []
    lines = _lines(path, shown=shown, num_skipped=form.num_skipped, faults=faults)
    reader = csv.reader(lines, strict=True, delimiter=form.delimiter, skipinitialspace=form.spaced)
    header: list[str] = []
    while not faults:
        origin = f"{shown}:{form.num_skipped + reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            expected = f"cells separated by {_DELIMITERS[form.delimiter]}, each quote in a quoted cell doubled"
            fault = Problem(f"{origin}: found broken CSV ({error}); expected {expected}. Fix the row.")
            faults = faults or [fault]
            break
        if cells is None:
            break
        if not cells or faults:
            continue
        if not header:
            header = cells
            if len(set(header)) != len(header) or "" in header:
                faults.append(
                    Problem(f"{origin}: found the header {header!r:.200}; expected different names. Fix the header.")
                )
        elif len(cells) != len(header):
            yield Problem(f"{origin}: {_wrong_number(cells, header, delimiter=form.delimiter)}", origin)
        elif sum(map(len, cells)) > MAX_ROW_BYTES:
            yield Problem(f"{origin}: found a row of more than 1 MiB; expected at most that. Shorten the row.", origin)
        else:
            yield origin, dict(zip(header, cells, strict=True))
    yield from faults


def _form(path: Path, *, shown: str) -> _Form:
    """Return how a file is written, as its first line with content shows it."""
    num_skipped = 0
    for line in read_lines(path, shown=shown):
        text = decoded(line, shown=shown)
        if isinstance(text, Problem):
            break
        first = text.strip("\r\n")
        if line.number == 1 and len(first) == 5 and first.lower().startswith("sep=") and first[4] in _DELIMITERS:
            return _Form(first[4], spaced=False, num_skipped=1)
        if not first.strip():
            continue
        delimiter = max(_DELIMITERS, key=lambda mark: len(_cells(first, mark)))
        others = _cells(first, delimiter)[1:]
        return _Form(delimiter, spaced=bool(others) and all(cell[:1] == " " for cell in others), num_skipped=0)
    return _Form(",", spaced=False, num_skipped=num_skipped)


def _cells(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter), [])


def _wrong_number(cells: list[str], header: list[str], *, delimiter: str) -> str:
    found = f"found {len(cells)} {'cell' if len(cells) == 1 else 'cells'}; expected {len(header)} as in the header."
    if len(cells) < len(header):
        return f"{found} Fix the row."
    return f'{found} Put cells that hold {_DELIMITERS[delimiter]} into quotes (").'


def _lines(path: Path, *, shown: str, num_skipped: int, faults: list[Problem]) -> Iterator[str]:
    """Yield the lines as text; the first that is none goes to `faults` and ends the file, for a quote may span it."""
    for line in read_lines(path, shown=shown):
        if line.number <= num_skipped:
            continue
        text = decoded(line, shown=shown)
        if isinstance(text, Problem):
            faults.append(text)
            return
        yield text
