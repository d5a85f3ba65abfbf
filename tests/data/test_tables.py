"""Delimited text, Parquet and Arrow: how spreadsheets and `datasets` write tables, and classes by their names."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from tests.data.rows import lines, refusal, rows, values, written

FEATURES = {
    "text": {"dtype": "string", "_type": "Value"},
    "label": {"names": ["World", "Sports"], "_type": "ClassLabel"},
}
STORED = pyarrow.table({"text": ["a", "b", "c"], "label": pyarrow.array([1, 0, -1], pyarrow.int64())})
NAMED = [{"text": "a", "label": "Sports"}, {"text": "b", "label": "World"}, {"text": "c", "label": None}]


def with_features() -> pyarrow.Table:
    content = json.dumps({"info": {"features": FEATURES}}).encode()
    return STORED.replace_schema_metadata({b"huggingface": content})


def arrow(path: Path, table: pyarrow.Table) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.ipc.new_stream(path, table.schema) as sink:
        sink.write_table(table)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "prompt;completion\na, b;c\n"),
        ("a.csv", "\ufeffprompt;completion\na, b;c\n"),
        ("a.csv", 'sep=;\nprompt;completion\n"a, b";c\n'),
        ("a.csv", "prompt\tcompletion\na, b\tc\n"),
        ("a.tsv", "prompt\tcompletion\na, b\tc\n"),
        ("a.csv", "prompt|completion\na, b|c\n"),
        ("a.csv", 'prompt,completion\n"a, b",c\n'),
        ("a.csv", '\n\nprompt, completion\n"a, b", "c"\n'),
        ("a.csv.gz", "prompt;completion\r\na, b;c\r\n"),
    ],
)
def test_the_delimiter_is_told_by_the_header(name: str, content: str, tmp_path: Path) -> None:
    assert values(written(tmp_path / name, content)) == [{"prompt": "a, b", "completion": "c"}]


def test_a_line_number_counts_the_line_that_names_the_delimiter(tmp_path: Path) -> None:
    (row,) = rows(written(tmp_path / "a.csv", "sep=;\na;b\n1;2\n"))
    assert row.origin.endswith("a.csv:3")


def test_wrong_numbers_of_cells_are_one_complaint(tmp_path: Path) -> None:
    assert refusal(written(tmp_path / "a.csv", "a;b\n" + "1;2;3\n" * 50)).splitlines() == [
        'a.csv:2: found 3 cells; expected 2 as in the header. Put cells that hold semicolons into quotes ("). The same '
        "49 times more, the last at a.csv:51."
    ]


def test_class_labels_of_parquet_and_arrow_arrive_as_their_names(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(with_features(), path)
    assert values(path) == NAMED
    assert values(arrow(tmp_path / "a.arrow", with_features())) == NAMED
    # Without names they stay numbers; so does one that has none.
    assert values(arrow(tmp_path / "b.arrow", STORED))[0] == {"text": "a", "label": 1}


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_class_names_are_found_beside_the_file(suffix: str, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"features": FEATURES}), encoding="utf-8")
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(STORED, path)
    else:
        content = lines(STORED.to_pylist()) if suffix == "jsonl" else "text,label\na,1\nb,0\nc,-1\n"
        written(path, content)
    assert values(path)[:2] == NAMED[:2]


@pytest.mark.parametrize("content", ["{", "[]", '{"features": {"label": {"names": [1], "_type": "ClassLabel"}}}'])
def test_class_names_that_cannot_be_read_change_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(content, encoding="utf-8")
    assert values(written(tmp_path / "a.jsonl", lines([{"label": 1}]))) == [{"label": 1}]


def test_a_data_set_that_was_saved_to_disk_is_read_with_its_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        arrow(tmp_path / split / "data-00000-of-00001.arrow", with_features())
        written(tmp_path / split / "state.json", "{}")
    written(tmp_path / "dataset_dict.json", json.dumps({"splits": ["train", "test"]}))
    found = rows(tmp_path)
    assert [row.split for row in found] == [None] * 3 + ["test"] * 3
    assert found[0].value == NAMED[0]
    assert values(tmp_path / "test") == NAMED
    (tmp_path / "test").rename(tmp_path / "train2")
    assert [row.split for row in rows(tmp_path)] == [None] * 3


def test_a_damaged_arrow_file_is_refused(tmp_path: Path) -> None:
    content = arrow(tmp_path / "a.arrow", STORED).read_bytes()
    assert "found no whole Arrow stream" in refusal(written(tmp_path / "b.arrow", content[: len(content) // 2]))
    assert "found no whole Arrow stream" in refusal(written(tmp_path / "c.arrow", b"x" * 100))


def test_a_folder_whose_data_lie_deeper_names_the_inner_one(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    written(tmp_path / "data" / "train.jsonl", lines([{"a": 1}]))
    assert f"Name the folder {tmp_path.name}/data, which has some." in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (
            '{"prompt": ["a", "b"], "completion": ["c", "d"]}',
            "found one object that holds whole columns (prompt, compl",
        ),
        (
            '{"prompt": {"0": "a", "1": "b"}, "completion": {"0": "c", "1": "d"}}',
            "found one object that holds whole co",
        ),
        (
            '{"train": [{"a": 1}], "test": [{"a": 2}]}',
            "found one object with the splits train, test; expected a list of",
        ),
        (
            '{\n"train": [{"a": 1}],\n"test": [{"a": 2}]\n}',
            "found one object with the keys train, test; expected a list",
        ),
    ],
)
def test_whole_tables_and_splits_in_one_object_are_told(content: str, found: str, tmp_path: Path) -> None:
    assert refusal(written(tmp_path / "a.json", content)).startswith(f"a.json: {found}")


def test_one_conversation_alone_in_a_json_file_is_a_row(tmp_path: Path) -> None:
    value = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    assert values(written(tmp_path / "a.json", json.dumps(value))) == [value]


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ('["a", "b"]', 'Name what stands in the list: {"prompt": ..., "completion": ...}.'),
        ('[{"a": 1}]', "If the file holds one JSON list, give it a name that ends with .json."),
        ('{"a": NaN}', "Write null in its place (with pandas: `df.to_json(name, orient='records', lines=True)`)."),
        ('{"a": 1', "Fix or remove the line."),
    ],
)
def test_a_line_that_is_no_object_gets_its_own_remedy(line: str, remedy: str, tmp_path: Path) -> None:
    assert refusal(written(tmp_path / "a.jsonl", line)).endswith(remedy)
