"""Files, folders and hub ids become rows with origins; everything else becomes one error that says where."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keeptune.data.source import Row, read_rows, source_sha256
from keeptune.errors import DataError, KeeptuneError, RecipeError, StorageError
from tests.data.rows import TWO, lines, quick, refusal, rows, tables, values, written

SHARED = Path(__file__).resolve().parents[3] / "shared"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


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


def test_split_files_may_share_a_prefix(tmp_path: Path) -> None:
    for name in ("news.train.jsonl", "news.dev.jsonl", "news.test.jsonl"):
        written(tmp_path / name, lines([{"prompt": name, "completion": "x"}]))
    found = read_rows(str(tmp_path), revision=None, validation=None, test=None)
    splits = {row.value["prompt"]: row.split for row in found}
    assert splits == {"news.train.jsonl": "train", "news.dev.jsonl": "validation", "news.test.jsonl": "test"}


@pytest.mark.parametrize("other", ["old.train.jsonl", "notes.jsonl"])
def test_what_stands_beside_prefixed_split_files_is_refused(tmp_path: Path, other: str) -> None:
    for name in ("news.train.jsonl", "news.test.jsonl", other):
        written(tmp_path / name, lines(TWO))
    assert other in refusal(tmp_path)


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


# Any content


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


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (
            "a,b\n1,2\n1,2,3\n4\n",
            "a.csv:3: found 3 cells; expected 2 as in the header. Put cells that hold",
        ),
        (
            'a,b\n1,2\n"open,2\n3,4\n',
            "a.csv:3: found broken CSV (unexpected end of data); expected cells separated by commas, each quote",
        ),
        ('a,b\n"x"y,2\n', "a.csv:2: found broken CSV ("),
        ("a,a\n1,2\n", "a.csv:1: found the header ['a', 'a']; expected different names. Fix the header."),
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


def test_a_parquet_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keeptune.data.lines.RATIO_FLOOR_BYTES", 1 << 22)
    table = pyarrow.table({"a": ["x" * 1000] * 100_000})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", use_dictionary=True)
    assert "a.parquet: found 4," in refusal(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", use_dictionary=False, compression="zstd")
    assert "b.parquet: found 1" in refusal(tmp_path / "b.parquet")


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


@pytest.mark.parametrize("path", ["lab/tasks/sums.jsonl", "zzz.jsonl"])
def test_a_relative_path_that_is_missing_says_where_it_starts(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"check the path\. Relative paths start from {tmp_path}, where"):
        list(read_rows(path, revision=None, validation=None, test=None))


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
        "a.txt: found the name ending '.txt'; expected .json, .jsonl, .ndjson, .csv, .tsv (each may end with .gz)"
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


def three_files(folder: Path) -> None:
    for name in ("news_b", "news_a", "other"):
        (folder / f"{name}.jsonl").write_text(f'{{"prompt": "{name}", "completion": "x"}}\n', encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("news_*.jsonl", ["news_a.jsonl:1", "news_b.jsonl:1"]),
        (["other.jsonl", "news_a.jsonl"], ["other.jsonl:1", "news_a.jsonl:1"]),
        (["other.jsonl", "news_*.jsonl"], ["other.jsonl:1", "news_a.jsonl:1", "news_b.jsonl:1"]),
        (["other.jsonl"], ["other.jsonl:1"]),
        ("./news**.jsonl", ["news_a.jsonl:1", "news_b.jsonl:1"]),
        ("**/news_*.jsonl", ["news_a.jsonl:1", "news_b.jsonl:1"]),
        ("sub/../other.js*", ["sub/../other.jsonl:1"]),
    ],
)
def test_a_list_or_pattern_of_files_is_one_source(path: str | list[str], expected: list[str], tmp_path: Path) -> None:
    three_files(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / ".news_c.jsonl").write_text("hidden", encoding="utf-8")
    rows = list(read_rows(path, revision=None, validation=None, test=None, base_folder=tmp_path))
    assert [row.origin for row in rows] == expected
    assert [row.value["prompt"] for row in rows] == [Path(origin).name.split(".")[0] for origin in expected]
    assert all(row.split is None for row in rows)


def test_a_list_beside_own_files_is_the_train_split(tmp_path: Path) -> None:
    three_files(tmp_path)
    own = ("news_a.jsonl", "news_b.jsonl")
    rows = read_rows(["other.jsonl"], revision=None, validation=own[0], test=own[1], base_folder=tmp_path)
    assert [row.split for row in rows] == ["train", "validation", "test"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    three_files(tmp_path)
    (tmp_path / "news_[a].jsonl").write_text('{"prompt": "itself", "completion": "x"}\n', encoding="utf-8")
    rows = read_rows("news_[a].jsonl", revision=None, validation=None, test=None, base_folder=tmp_path)
    assert [row.value["prompt"] for row in rows] == ["itself"]


def test_a_revision_of_a_list_is_refused(tmp_path: Path) -> None:
    three_files(tmp_path)
    with pytest.raises(RecipeError, match=r"^other\.jsonl and 1 more: found revision 'main' for a local path"):
        read_rows(["other.jsonl", "news_*.jsonl"], revision="main", validation=None, test=None, base_folder=tmp_path)


def test_the_hash_of_a_pattern_is_that_of_its_files(tmp_path: Path) -> None:
    three_files(tmp_path)
    both = [str(tmp_path / "news_a.jsonl"), str(tmp_path / "news_b.jsonl")]
    none: dict[str, None] = {"revision": None, "validation": None, "test": None}
    of_pattern = source_sha256(str(tmp_path / "news_*.jsonl"), **none)
    assert of_pattern == source_sha256(both, **none) != source_sha256(both[:1], **none)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "poems_*.jsonl",
            r"^poems_\*\.jsonl: found no file of such a name; expected one or more\. Check the pattern\.",
        ),
        (
            ["news_a.jsonl", "news_*.jsonl"],
            r"^news_a\.jsonl: found this file twice in one task; expected it once\. Remove one from `path`\.$",
        ),
        (["news_a.jsonl", "missing.jsonl"], r"^missing\.jsonl: found no such file or folder; expected a data file\."),
        (["news_a.jsonl", "owner/name"], r"^owner/name: found no such file or folder; expected a data file\."),
    ],
)
def test_a_list_or_pattern_that_names_no_files_is_refused(path: str | list[str], message: str, tmp_path: Path) -> None:
    three_files(tmp_path)
    with pytest.raises(DataError, match=message):
        list(read_rows(path, revision=None, validation=None, test=None, base_folder=tmp_path))
