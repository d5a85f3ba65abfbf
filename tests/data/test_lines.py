"""Text in every newline style and encoding becomes lines and JSON rows; each fault is named by line and offset."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keeptune.data.lines import MAX_ROW_BYTES, read_lines
from keeptune.data.source import Row, read_rows
from keeptune.errors import DataError, KeeptuneError
from tests.data.rows import TWO, lines, quick, refusal, rows, tables, values, written

# Newlines, encodings (J2)


@quick
@given(tables, st.sampled_from(["\n", "\r\n", "\r"]), st.sampled_from(["", "\ufeff"]), st.booleans(), st.booleans())
def test_reading_gives_what_was_written_in_json_lines(
    tmp_path: Path, table: list[dict[str, str]], newline: str, mark: str, last: bool, ascii_only: bool
) -> None:
    content = newline.join(json.dumps(row, ensure_ascii=ascii_only) for row in table) + (newline if last else "")
    for name in ("a.jsonl", "b.jsonl.gz", "c.json"):
        assert values(written(tmp_path / name, mark + content)) == table


@quick
@given(tables, st.sampled_from(["", "\ufeff"]), st.sampled_from([None, 2]))
def test_reading_gives_what_was_written_in_json_lists(
    tmp_path: Path, table: list[dict[str, str]], mark: str, indent: int | None
) -> None:
    content = json.dumps(table, ensure_ascii=False, indent=indent)
    assert values(written(tmp_path / "a.json", mark + content)) == table


@pytest.mark.parametrize("width", range(3, 14))
def test_lines_are_the_same_wherever_the_blocks_end(
    tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keeptune.data.lines._BLOCK_BYTES", width)
    path = written(tmp_path / "a.jsonl", '\ufeff{"a": "é"}\r\n\r{"a": "x"}\r\r\n{"a": 1}')
    assert [(row.origin.rpartition(":")[2], row.value["a"]) for row in rows(path)] == [("1", "é"), ("3", "x"), ("5", 1)]


def test_a_long_line_is_cut_and_the_offsets_after_it_stay_true(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", "x" * (5 << 20) + "\r\n" + "y")
    long, short = read_lines(path, shown="a.jsonl")
    assert MAX_ROW_BYTES < len(long.content) <= 2 * MAX_ROW_BYTES + 2
    assert (short.number, short.offset, short.content) == (2, (5 << 20) + 2, b"y")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize(
    ("content", "found"),
    [
        ('{"a": 1}'.encode("utf-16"), "found UTF-16 text; expected UTF-8 text. Save the file as UTF-8."),
        ('{"a": 1}'.encode("utf-32"), "found UTF-32 text; expected UTF-8 text. Save the file as UTF-8."),
        ('{"a": 1}'.encode("utf-16-be"), "found UTF-16 text without a byte order mark; expected UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "found UTF-16 text without a byte order mark; expected UTF-8"),
        (
            gzip.compress(b"{}", mtime=0),
            "found gzipped bytes; expected UTF-8 text. Give the file a name that ends with .gz.",
        ),
        (b"PAR1\x00", "found a Parquet file; expected UTF-8 text. Give the file a name that ends with .parquet."),
        (b"PK\x03\x04", "found a zip archive; expected UTF-8 text. Unpack it."),
    ],
)
def test_files_that_are_no_utf8_text_are_named(tmp_path: Path, name: str, content: bytes, found: str) -> None:
    assert f"{name}: {found}" in refusal(written(tmp_path / name, content))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'{"a": 1}\n{"a": "caf\xe9"}\n', "a.jsonl:2: found bytes that are not UTF-8 (0xe9 at byte offset 19 of the"),
        (b'\xef\xbb\xbf{"a": "\xc0\xaf"}\n', "a.jsonl:1: found bytes that are not UTF-8 (0xc0 at byte offset 10 of"),
        (b'{"a": "\xed\xa0\x80"}\n', "a.jsonl:1: found bytes that are not UTF-8 (0xed at byte offset 7 of the file"),
        (b'{"a": 1}\r\n{"a": "\x00"}\r\n', "a.jsonl:2: found a NUL byte at byte offset 17 of the file; expected text."),
    ],
)
def test_wrong_bytes_are_named_by_line_and_offset(tmp_path: Path, content: bytes, found: str) -> None:
    assert found in refusal(written(tmp_path / "a.jsonl", content))


def test_wrong_bytes_are_named_in_lists_and_csv_too(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", b'\xef\xbb\xbf[\n{"a": "\xff"}]')
    assert "a.json:2: found bytes that are not UTF-8 (0xff at byte offset 12 of the file" in refusal(path)
    assert "a.csv:2: found bytes that are not UTF-8 (0xff at byte offset 3 " in refusal(
        written(tmp_path / "a.csv", b"a\nb\xff\n")
    )


# Broken rows (J1)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"a": 1', "found broken JSON (Expecting ',' delimiter) at column 8; expected one JSON object on the line."),
        ('{"a": 1,}', "found broken JSON ("),
        ('{"a": 1} {"a": 2}', "found a second value or other text after the first, at column 9; expected one JSON"),
        ('[{"a": 1}]', "found a list; expected one JSON object on the line. If the file holds one JSON list, g"),
        ('"text"', "found text; expected one JSON object on the line."),
        ("null", "found null; expected"),
        ("3.5", "found a number; expected"),
        ("true", "found true or false; expected"),
        ('{"a": NaN}', "found NaN, which is no JSON; expected"),
        ('{"a": [-Infinity]}', "found -Infinity, which is no JSON; expected"),
        ('{"a": {"b": 1, "b": 2}}', "found the key 'b' twice; expected"),
        ('{"a": "\\ud83d"}', "found half of a surrogate pair (an escape such as \\ud83d alone); expected"),
        ('{"a": ' + "[" * 64 + "]" * 64 + "}", "found values nested deeper than 64 levels; expected"),
        ("[" * 100_000, "found values nested deeper than 64 levels at column 1; expected"),
        ('{"a": ' + "9" * 5000 + "}", "found a number with too many digits at column 1; expected"),
        ('{"a": "' + "x" * (1 << 20) + '"}', "found a line of more than 1,048,576 bytes; expected a row of at most 1"),
    ],
    ids=lambda text: text[:12],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, found: str) -> None:
    if line.startswith('{"a": 9') and not hasattr(sys, "get_int_max_str_digits"):
        pytest.skip("this Python reads integers of any number of digits")
    message = refusal(written(tmp_path / "a.jsonl", f'{{"a": 0}}\n{line}\n{{"a": 2}}\n'))
    assert message.startswith(f"a.jsonl:2: {found}")
    assert "\n" not in message


def test_a_file_of_json_lines_under_the_name_json_is_checked_like_one(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", '{"a": 1}\n{"a": 2, "a": 3}\n')
    assert refusal(path).startswith("a.json:2: found the key 'a' twice; expected one JSON object on the line.")


def test_whole_pairs_and_64_levels_are_accepted(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"a": "\\ud83d\\ude00", "b": ' + "[" * 63 + "]" * 63 + "}")
    assert values(path)[0]["a"] == "😀"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (
            '[{"a": 1},\n {"a": 2},]',
            "a.json:2: found broken JSON (Expecting value) at column 11; expected a JSON list.",
        ),
        ('[{"a": 1}\n {"a": 2}]', "a.json:2: found no ',' and no ']' at column 2; expected a JSON list. Fix that pl"),
        ('[{"a": 1}', "a.json:1: found no ',' and no ']' at column 10; expected"),
        ('[{"a": 1}] 2', "a.json:1: found other text after the list at column 12; expected"),
        ('[{"a": 1}, [2]]', "a.json[1]: found a list; expected a JSON object of at most 1 MiB. Fix or remove"),
        ('[{"a": 1, "a": 2}]', "a.json[0]: found the key 'a' twice; expected"),
        ('[{"a": NaN}]', "a.json[0]: found NaN, which is no JSON; expected"),
        ('[{"a": "' + "x" * (1 << 20) + '"}]', "a.json[0]: found a row of more than 1,048,576 bytes; expected"),
        (
            '{"rows": [],\n "n": 1}',
            "a.json: found one object with the keys rows, n; expected a list of rows, or one und",
        ),
        ('{"data": 3}', 'a.json:1: found no list under "data" at column 10; expected'),
        ('{"data": [], "data": []}', "a.json:1: found 'data' as a new key at column 14; expected"),
        ('{"a" 3}', "a.json:1: found no ':' after a key at column 6; expected"),
        ("3", "a.json:1: found text that begins no list at column 1; expected"),
    ],
    ids=lambda text: text[:16],
)
def test_a_broken_list_is_named(tmp_path: Path, content: str, found: str) -> None:
    assert refusal(written(tmp_path / "a.json", content)).startswith(found)


# Bombs


@pytest.mark.parametrize("fill", [b" ", b"\0", b"\n", b"[", b'{"a": 1}\n'])
def test_a_gzip_bomb_is_refused(tmp_path: Path, fill: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keeptune.data.lines.RATIO_FLOOR_BYTES", 1 << 20)
    path = written(tmp_path / "a.jsonl.gz", fill * ((1 << 22) // len(fill)))
    assert "expected at most 200 times as many, as text has." in refusal(path)
    assert "expected at most 200 times as many" in refusal(path.rename(tmp_path / "a.json.gz"))


def test_a_cut_gzip_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines(TWO).encode())[:-12])
    assert "a.jsonl.gz: found broken gzip data (" in refusal(path)
    path.write_bytes(b"no gzip")
    assert "a.jsonl.gz: found broken gzip data (Not a gzipped file" in refusal(path)


def test_a_list_over_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keeptune.data.json_text._MAX_DOCUMENT_BYTES", 10)
    assert "a.json: found a JSON list of more than 1 GiB; expected less, since a list is read whole." in refusal(
        written(tmp_path / "a.json", json.dumps(TWO))
    )


# Faults together, empty files, arbitrary bytes


def test_problems_are_collected_and_raised_once_after_the_good_rows(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"a": 1}\nx\n' * 12)
    found: list[Row] = []
    with pytest.raises(DataError) as caught:
        found.extend(read_rows(str(path), revision=None, validation=None, test=None))
    assert len(found) == 12
    assert str(caught.value) == (
        f"{path}:2: found broken JSON (Expecting value) at column 1; expected one JSON object on the line. Fix or "
        f"remove the line. The same 11 times more, the last at {path}:24."
    )


def test_reading_stops_at_the_thousandth_problem(tmp_path: Path) -> None:
    assert refusal(written(tmp_path / "a.jsonl", "x\n" * 5000)).endswith(
        "The same 999 times more, the last at a.jsonl:1000."
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv"])
@pytest.mark.parametrize("content", ["", "\ufeff", "\n \r\n\t\n"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str, content: str) -> None:
    if name == "a.csv" and "\t" in content:
        content = "\n\n"
    assert refusal(written(tmp_path / name, content)) == (
        f"{name}: found no rows; expected at least one. Name a file that holds rows."
    )


def test_an_empty_list_is_refused(tmp_path: Path) -> None:
    assert "found no rows" in refusal(written(tmp_path / "a.json", '{"data": [ ]}'))


json_like = st.lists(
    st.sampled_from(
        [b"{", b"}", b"[", b"]", b'"data"', b":", b",", b'"', b"1", b"NaN", b"\n", b"\r", b" ", b"\\ud800"]
    ),
    max_size=30,
).map(b"".join)


@quick
@given(
    st.one_of(st.binary(max_size=200), json_like),
    st.sampled_from(["jsonl", "json", "csv", "parquet", "jsonl.gz", "csv.gz"]),
    st.booleans(),
)
def test_arbitrary_bytes_give_rows_or_a_keeptune_error(tmp_path: Path, content: bytes, kind: str, packed: bool) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_bytes(gzip.compress(content) if packed and kind.endswith("gz") else content)
    try:
        assert values(path)
    except KeeptuneError as error:
        assert str(error).startswith(str(path))
