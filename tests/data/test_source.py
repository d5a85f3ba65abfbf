"""Files, folders and hub ids become rows with origins; everything else becomes one error that says where."""

from __future__ import annotations

import gzip
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keeptune.data.lines import MAX_ROW_BYTES, read_lines
from keeptune.data.source import Row, read_rows, source_sha256
from keeptune.errors import DataError, KeeptuneError, RecipeError, StorageError

SHARED = Path(__file__).resolve().parents[3] / "shared"
TWO = [{"prompt": "a", "completion": "b"}, {"prompt": "é\u2028😀", "completion": "d"}]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rows(
    path: Path | str, *, revision: str | None = None, validation: str | None = None, test: str | None = None
) -> list[Row]:
    return list(read_rows(str(path), revision=revision, validation=validation, test=test))


def values(path: Path | str) -> list[dict[str, Any]]:
    return [row.value for row in rows(path)]


def refusal(path: Path | str, **own: str) -> str:
    with pytest.raises(DataError) as caught:
        rows(path, **own)  # type: ignore[arg-type]
    return str(caught.value).replace(f"{Path(path).parent}/", "")


def written(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def lines(values: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


# Tables: each kind of file


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.JSONL", "a.jsonl.gz", "a.json", "a.json.gz"])
def test_json_lines_carry_file_and_line(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, "\n" + lines(TWO))
    assert rows(path) == [Row(TWO[0], f"{path}:2", None), Row(TWO[1], f"{path}:3", None)]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(TWO),
        json.dumps(TWO, indent=2),
        "\ufeff" + json.dumps(TWO),
        json.dumps({"version": 1, "data": TWO, "more": [1]}, indent=1),
    ],
)
def test_json_lists_carry_file_and_index(tmp_path: Path, content: str) -> None:
    path = written(tmp_path / "a.json", content)
    assert rows(path) == [Row(TWO[0], f"{path}[0]", None), Row(TWO[1], f"{path}[1]", None)]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv_rows_carry_the_line_that_they_begin_on(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, '\ufeffprompt,completion\r\n"two\nlines",b\r\n\r\n"say ""x""","c,d"\r\n')
    assert rows(path) == [
        Row({"prompt": "two\nlines", "completion": "b"}, f"{path}:2", None),
        Row({"prompt": 'say "x"', "completion": "c,d"}, f"{path}:5", None),
    ]


def test_a_csv_cell_may_be_longer_than_the_default_of_pythons_csv_module(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", f"prompt,completion\n{'x' * 500_000},b\n")
    assert len(values(path)[0]["prompt"]) == 500_000


def test_parquet_rows_carry_file_and_index(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    many = [{"messages": [{"role": "user", "content": f"q{i}"}], "n": i} for i in range(150)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(many), path, row_group_size=40)
    assert rows(path) == [Row(value, f"{path}[{i}]", None) for i, value in enumerate(many)]


def test_one_row_without_a_final_newline_is_read(tmp_path: Path) -> None:
    assert values(written(tmp_path / "a.jsonl", '{"prompt": "a"}')) == [{"prompt": "a"}]


def test_relative_paths_start_from_the_base_folder_and_origins_keep_the_name_as_given(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", lines(TWO))
    written(tmp_path / "t.jsonl", lines(TWO))
    found = list(read_rows("a.jsonl", revision=None, validation=None, test="./t.jsonl", base_folder=tmp_path))
    assert [row.origin for row in found] == ["a.jsonl:1", "a.jsonl:2", "./t.jsonl:1", "./t.jsonl:2"]


def test_json_lines_are_streamed(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", lines(TWO * 50_000) + "broken\n")
    found = read_rows(str(path), revision=None, validation=None, test=None)
    assert [next(found).value for _ in range(2)] == TWO


# Splits


@pytest.mark.parametrize("alias", ["validation", "val", "valid", "dev", "eval", "Dev"])
def test_a_folders_split_files_are_known_by_their_aliases(tmp_path: Path, alias: str) -> None:
    written(tmp_path / "train.jsonl", lines(TWO[:1]))
    written(tmp_path / f"{alias}.json", json.dumps(TWO[1:]))
    written(tmp_path / "README.md", "# about\n")
    assert [(row.value, row.split) for row in rows(tmp_path)] == [(TWO[0], None), (TWO[1], "validation")]


def test_train_rows_are_fixed_only_when_no_split_is_left_to_carve(tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        written(tmp_path / f"{name}.csv", f"prompt\n{name}\n")
    assert [(row.value["prompt"], row.split) for row in rows(tmp_path)] == [
        ("train", "train"),
        ("val", "validation"),
        ("test", "test"),
    ]


def test_shards_of_a_split_are_read_in_order(tmp_path: Path) -> None:
    for i in (1, 0):
        written(tmp_path / f"train-0000{i}-of-00002.jsonl", lines([{"n": i}]))
    assert values(tmp_path) == [{"n": 0}, {"n": 1}]


def test_a_folder_without_split_names_is_read_whole_and_unsplit(tmp_path: Path) -> None:
    written(tmp_path / "b.jsonl.gz", lines(TWO[1:]))
    written(tmp_path / "a.csv", "prompt\nx\n")
    assert [(row.origin, row.split) for row in rows(tmp_path)] == [
        (f"{tmp_path}/a.csv:2", None),
        (f"{tmp_path}/b.jsonl.gz:1", None),
    ]


def test_own_files_fix_their_split(tmp_path: Path) -> None:
    train, own = written(tmp_path / "a.jsonl", lines(TWO[:1])), written(tmp_path / "b.jsonl", lines(TWO[1:]))
    assert [row.split for row in rows(train, test=str(own))] == [None, "test"]


def test_ambiguous_folders_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "train.jsonl", lines(TWO))
    written(tmp_path / "dev.jsonl", lines(TWO))
    written(tmp_path / "val.jsonl", lines(TWO))
    assert "found dev.jsonl, val.jsonl for one split; expected one file for validation." in refusal(tmp_path)
    (tmp_path / "val.jsonl").rename(tmp_path / "more.jsonl")
    assert "found dev.jsonl, train.jsonl beside more.jsonl; expected train and perhaps" in refusal(tmp_path)
    (tmp_path / "more.jsonl").unlink()
    (tmp_path / "train.jsonl").unlink()
    assert "found dev.jsonl beside no train file; expected train" in refusal(tmp_path)
    (tmp_path / "dev.jsonl").unlink()
    assert "found a folder without data files; expected files named .json, .jsonl" in refusal(tmp_path)


def test_a_file_or_a_split_given_twice_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "train.jsonl", lines(TWO))
    assert "found a second use of this file" in refusal(path, test=str(tmp_path / "." / "train.jsonl"))
    written(tmp_path / "test.jsonl", lines(TWO))
    other = written(tmp_path.parent / f"{tmp_path.name}-other.jsonl", lines(TWO))
    assert "or of the split test; expected one file for each split. Remove `test`" in refusal(tmp_path, test=str(other))


# Newlines, encodings (J2)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
tables = st.lists(st.fixed_dictionaries({"prompt": text, "completion": text}), min_size=1, max_size=4)


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


@quick
@given(tables, st.sampled_from(["\n", "\r\n", "\r"]), st.sampled_from(["", "\ufeff"]))
def test_reading_gives_what_was_written_in_csv(
    tmp_path: Path, table: list[dict[str, str]], newline: str, mark: str
) -> None:
    quoted = [[row[key].replace("\0", " ").replace('"', '""') for key in ("prompt", "completion")] for row in table]
    content = newline.join(['"prompt","completion"', *(f'"{a}","{b}"' for a, b in quoted)])
    assert values(written(tmp_path / "a.csv", mark + content)) == [
        {key: value.replace("\0", " ") for key, value in row.items()} for row in table
    ]


@quick
@given(tables)
def test_reading_gives_what_was_written_in_parquet(tmp_path: Path, table: list[dict[str, str]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == table


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
        (gzip.compress(b"{}"), "found gzipped bytes; expected UTF-8 text. Give the file a name that ends with .gz."),
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
        ('[{"a": 1}]', "found a list; expected one JSON object on the line. Mend or remove the line. A file that hol"),
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
        ('[{"a": 1}\n {"a": 2}]', "a.json:2: found no ',' and no ']' at column 2; expected a JSON list. Mend that pl"),
        ('[{"a": 1}', "a.json:1: found no ',' and no ']' at column 10; expected"),
        ('[{"a": 1}] 2', "a.json:1: found other text after the list at column 12; expected"),
        ('[{"a": 1}, [2]]', "a.json[1]: found a list; expected a JSON object of at most 1 MiB. Mend or remove"),
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


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (
            "a,b\n1,2\n1,2,3\n4\n",
            "a.csv:3: found 3 cells; expected 2 as in the header. Mend the row.\na.csv:4: found 1",
        ),
        ('a,b\n1,2\n"open,2\n3,4\n', "a.csv:3: found broken CSV (unexpected end of data); expected commas, quotes dou"),
        ('a,b\n"x"y,2\n', "a.csv:2: found broken CSV ("),
        ("a,a\n1,2\n", "a.csv:1: found the header ['a', 'a']; expected different names. Mend the header."),
        ("a,\n1,2\n", "a.csv:1: found the header ['a', '']; expected different names."),
        ("a,b\n", "a.csv: found no rows; expected at least one."),
        ('a\n"open\nx\0"\n', "a.csv:3: found a NUL byte at byte offset 9 of the file"),
        ("a,b\n" + "x" * 600_000 + "," + "y" * 600_000, "a.csv:2: found a line of more than 1,048,576 bytes"),
        ('a\n"' + ("x" * 600_000 + "\n") * 2 + '"', "a.csv:2: found broken CSV (field larger than field limit"),
        ('a,b\n"' + ("x" * 600_000 + '\n","') * 2 + '"', "a.csv:2: found"),
    ],
    ids=lambda text: text[:12],
)
def test_a_broken_csv_row_is_named(tmp_path: Path, content: str, found: str) -> None:
    message = refusal(written(tmp_path / "a.csv", content))
    assert message.startswith(found)


def test_a_csv_row_over_several_lines_keeps_the_limit_of_a_row(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", f'a,b\n"{"x" * 600_000}\n","{"y" * 600_000}"\n')
    assert refusal(path).startswith("a.csv:2: found a row of more than 1 MiB; expected at most that. Shorten the row.")


def test_a_long_parquet_row_is_named(tmp_path: Path) -> None:
    table = pyarrow.table({"a": ["x", "y" * (1 << 20), "z"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert refusal(tmp_path / "a.parquet") == (
        "a.parquet[1]: found a row of more than 1 MiB; expected at most that. Shorten the row."
    )


def test_problems_are_collected_and_raised_once_after_the_good_rows(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"a": 1}\nx\n' * 12)
    found: list[Row] = []
    with pytest.raises(DataError) as caught:
        found.extend(read_rows(str(path), revision=None, validation=None, test=None))
    message = str(caught.value).splitlines()
    assert (len(message), message[-1]) == (11, "and 2 more.")
    assert message[9].startswith(f"{path}:20: ")


def test_reading_stops_at_the_thousandth_problem(tmp_path: Path) -> None:
    assert refusal(written(tmp_path / "a.jsonl", "x\n" * 5000)).endswith("and 990 more.")


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


# Bombs


@pytest.mark.parametrize("fill", [b" ", b"\0", b"\n", b"[", b'{"a": 1}\n'])
def test_a_gzip_bomb_is_refused(tmp_path: Path, fill: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keeptune.data.lines.RATIO_FLOOR_BYTES", 1 << 20)
    path = written(tmp_path / "a.jsonl.gz", fill * ((1 << 22) // len(fill)))
    assert "expected at most 200 times as many, as text has." in refusal(path)
    assert "expected at most 200 times as many" in refusal(path.rename(tmp_path / "a.json.gz"))


def test_a_parquet_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keeptune.data.lines.RATIO_FLOOR_BYTES", 1 << 22)
    table = pyarrow.table({"a": ["x" * 1000] * 100_000})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", use_dictionary=True)
    assert "a.parquet: found 4," in refusal(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", use_dictionary=False, compression="zstd")
    assert "b.parquet: found 1" in refusal(tmp_path / "b.parquet")


def test_a_cut_gzip_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines(TWO).encode())[:-12])
    assert "a.jsonl.gz: found broken gzip data (" in refusal(path)
    path.write_bytes(b"no gzip")
    assert "a.jsonl.gz: found broken gzip data (Not a gzipped file" in refusal(path)


def test_a_list_over_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keeptune.data.lines._MAX_DOCUMENT_BYTES", 10)
    assert "a.json: found a JSON list of more than 1 GiB; expected less, since a list is read whole." in refusal(
        written(tmp_path / "a.json", json.dumps(TWO))
    )


# Arbitrary bytes


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


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_parquet_and_gzip_give_rows_or_a_keeptune_error(tmp_path: Path, data: st.DataObject) -> None:
    table = [{"prompt": "p" * 40, "n": i, "turns": ["x", "y"]} for i in range(30)]
    kind = data.draw(st.sampled_from(["parquet", "jsonl.gz"]))
    path = tmp_path / f"a.{kind}"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path) if kind == "parquet" else written(
        path, lines(table)
    )
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        assert values(path)
    except KeeptuneError as error:
        assert str(error).startswith(str(path))


# Paths


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    written(tmp_path / "train_data.jsonl", lines(TWO))
    assert refusal(tmp_path / "train_dat.jsonl") == (
        "train_dat.jsonl: found no such file or folder; expected a data file. Did you mean train_data.jsonl?"
    )
    assert "has a similar name; check the path." in refusal(tmp_path / "zzz.csv")
    assert f"There is no folder {tmp_path / 'none'} either; check the path." in refusal(tmp_path / "none" / "a.csv")


@pytest.mark.parametrize(
    "path", ["./alpaca", "../no/such", "owner/data.jsonl", "owner/table.txt", "~/no-such-x", "x", ""]
)
def test_paths_that_look_local_are_not_looked_up_on_the_hub(path: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected a data file|without data files"):
        list(read_rows(path, revision=None, validation=None, test=None, base_folder=tmp_path))


def test_an_unknown_home_folder_is_refused() -> None:
    assert "found no such home folder; expected a path." in refusal("~no-such-user-x/a.jsonl")


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    assert refusal(written(tmp_path / "a.txt", "x")).startswith(
        "a.txt: found the name ending '.txt'; expected .json, .jsonl, .ndjson, .csv (each may end with .gz) or .parq"
    )


def test_what_is_no_regular_file_is_refused() -> None:
    assert "found something that is no regular file; expected a data file." in refusal("/dev/zero")


def test_a_file_that_cannot_be_read_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.jsonl", lines(TWO))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(StorageError, match=r"a.jsonl: found no readable file \(Permission denied\); expected one that"):
        rows(path)


def test_a_revision_of_a_local_path_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", lines(TWO))
    with pytest.raises(RecipeError, match="found revision 'main' for a local path, where it has no effect"):
        rows(path, revision="main")


# Identity of the bytes


def sha(path: Path | str, **own: str | None) -> str:
    return source_sha256(str(path), **{"revision": None, "validation": None, "test": None, **own})  # type: ignore[arg-type]


def test_the_hash_changes_with_any_byte_and_with_the_split(tmp_path: Path) -> None:
    path, other = written(tmp_path / "a.jsonl", lines(TWO)), written(tmp_path / "b.jsonl", "x")
    before = {sha(path), sha(path, test=str(other)), sha(path, validation=str(other)), sha(tmp_path)}
    assert len(before) == 4
    assert sha(path) in before
    written(path, lines(TWO) + "\n")
    assert not before & {sha(path), sha(path, test=str(other)), sha(tmp_path)}


# The hub, with a stand-in for its libraries


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    splits: dict[str, Any] = {"train": TWO[:1], "test": TWO[1:]}

    class DatasetsError(Exception): ...

    def load_dataset(name: str, *, revision: str) -> dict[str, Any]:
        assert (name, revision) == ("owner/name", COMMIT)
        if "error" in splits:
            raise DatasetsError(splits["error"])
        return splits

    class HfApi:
        def dataset_info(self, name: str, *, revision: str | None) -> Any:
            if revision == "gone":
                raise ConnectionError("no route")
            return types.SimpleNamespace(sha=COMMIT)

    datasets = types.SimpleNamespace(
        load_dataset=load_dataset, exceptions=types.SimpleNamespace(DatasetsError=DatasetsError)
    )
    library = types.SimpleNamespace(HfApi=HfApi, errors=types.SimpleNamespace(HTTPError=ConnectionError))
    monkeypatch.setitem(sys.modules, "datasets", datasets)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)  # type: ignore[arg-type]
    yield splits


def test_hub_rows_carry_id_commit_split_and_index(hub: dict[str, Any], tmp_path: Path) -> None:
    hub["unsupervised"] = [{}]
    for path, revision in (
        ("owner/name", None),
        ("owner/name@v1", None),
        ("owner/name", "v1"),
        (f"owner/name@{COMMIT}", None),
    ):
        assert rows(path, revision=revision) == [
            Row(TWO[0], f"owner/name@{COMMIT}/train[0]", None),
            Row(TWO[1], f"owner/name@{COMMIT}/test[0]", "test"),
        ]
    assert source_sha256("owner/name", revision="v1", validation=None, test=None) == f"owner/name@{COMMIT}"
    own = written(tmp_path / "own.jsonl", lines(TWO[:1]))
    assert [row.split for row in rows("owner/name", validation=str(own))] == ["train", "test", "validation"]
    assert len(sha("owner/name", validation=str(own))) == 64


def test_the_only_split_of_a_hub_data_set_is_unsplit(hub: dict[str, Any]) -> None:
    hub.clear()
    hub["all"] = TWO
    assert [row.split for row in rows("owner/name")] == [None, None]


def test_hub_refusals(hub: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        "owner/name@gone: found no local path, and no data set on the hub (no route)"
        in f"owner/{refusal('owner/name@gone')}"
    )
    with pytest.raises(RecipeError, match="found revision 'b' as well; expected one of the two"):
        rows("owner/name@a", revision="b")
    own = written(tmp_path / "own.jsonl", lines(TWO))
    assert "found the splits train, test with own files for test; expected train" in refusal(
        "owner/name", test=str(own)
    )
    hub["error"] = "a script"
    assert "found no data set that can be loaded (a script)" in refusal("owner/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RecipeError, match=r"pip install 'keeptune\[hub\]'"):
        rows("owner/name")


def test_a_local_folder_wins_over_the_hub(tmp_path: Path) -> None:
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    written(folder / "a.jsonl", lines(TWO))
    found = read_rows("owner/name", revision=None, validation=None, test=None, base_folder=tmp_path)
    assert [row.origin for row in found] == ["owner/name/a.jsonl:1", "owner/name/a.jsonl:2"]


# The real data


@pytest.mark.real
@pytest.mark.skipif(not SHARED.is_dir(), reason="no real data beside the checkout (../shared)")
def test_the_real_data_are_read_whole() -> None:
    assert len(rows(SHARED / "data" / "alpaca_en_demo.json")) == 999
    assert len(rows(SHARED / "data" / "dialogsum.dev.jsonl")) == 500
    assert sum(1 for _ in rows(SHARED / "data" / "p3_sample")) == 44_289
    one = SHARED / "data" / "p3_sample" / "ag_news_classify.jsonl.gz"
    assert rows(one)[-1].origin == f"{one}:{len(rows(one))}"
