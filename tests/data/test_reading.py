"""What the audit tells of the rows: columns that no record is made of, labels spelled twice, files left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keeptune.data.audit import Audit
from keeptune.data.prepare import TaskSource, prepare_records
from keeptune.errors import DataError
from keeptune.progress import Silent


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def audit(*sources: TaskSource, folder: Path) -> Audit:
    return prepare_records(
        sources,
        seed=0,
        validation_fraction=0.0,
        test_fraction=0.0,
        drop_incomplete=False,
        duplicates="keep",
        leaks="auto",
        progress=Silent(),
        scratch=folder,
    ).audit


def rows(number: int, **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"question {i}", "completion": f"a longer answer {i}", **more} for i in range(number)]


def test_columns_that_no_record_is_made_of_are_counted_and_named(tmp_path: Path) -> None:
    more = {"context": "c", "score": 0, "id": 7, "source": "web", "url": "u", "nothing": None, "empty": [], "doc_id": 3}
    path = written(tmp_path / "a.jsonl", [*rows(3, **more), *rows(2, context="d")])
    found = audit(TaskSource("a", path), folder=tmp_path)
    assert found.unread_columns == {"a": {"context": 5, "score": 3}}
    assert found.remarks == ("a: columns that keeptune does not read: 'context' (5 rows), 'score' (3 rows).",)
    ignoring = audit(TaskSource("a", path, ignore=["context", "score"]), folder=tmp_path)
    assert (ignoring.unread_columns, ignoring.remarks) == ({}, ())


def test_the_columns_of_each_format_are_read(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    values = [
        {"messages": messages, "system": "s", "prompt": "p"},
        {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]], "system": "s"},
        {"prompt": "a", "completion": "b", "system": "s"},
    ]
    found = audit(TaskSource("a", written(tmp_path / "a.jsonl", values)), folder=tmp_path)
    assert found.unread_columns == {"a": {"prompt": 1}}
    columns = {"prompt": ["p", "q"], "completion": "r"}
    named = written(tmp_path / "b.jsonl", [{"p": "a", "q": "b", "r": "c", "prompt": "d"}])
    assert audit(TaskSource("b", named, columns=columns), folder=tmp_path).unread_columns == {"b": {"prompt": 1}}


def test_names_of_columns_without_end_are_not_kept(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [{**row, f"own{i}": 1} for i, row in enumerate(rows(300))])
    found = audit(TaskSource("a", path), folder=tmp_path)
    assert len(found.unread_columns["a"]) == 100
    assert found.remarks[0].endswith("and 95 more.")


def test_labels_that_differ_in_case_or_spaces_are_named(tmp_path: Path) -> None:
    labels = ["Bug"] * 5 + [" BUG"] * 2 + ["Login"] * 4 + [" Login "]
    path = written(tmp_path / "a.jsonl", [{"prompt": f"q{i}", "completion": c} for i, c in enumerate(labels)])
    assert audit(TaskSource("a", path), folder=tmp_path).remarks == (
        'a: completions that differ in case or spaces alone: "Bug" (5), " BUG" (2); "Login" (4), " Login " (1). If '
        "they mean the same, spell them alike, or give each its name with `labels` in the task.",
    )
    mended = audit(TaskSource("a", path, labels={"Bug": "Bug", "BUG": "Bug", "Login": "Login"}), folder=tmp_path)
    assert mended.remarks == ()


def test_answers_are_no_labels_where_most_differ(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [{"prompt": f"q{i}", "completion": f"a{i // 2}"} for i in range(40)])
    written(tmp_path / "b.jsonl", [{"prompt": f"q{i}", "completion": "yes" * 40 * (i % 2 + 1)} for i in range(40)])
    assert audit(TaskSource("a", path), folder=tmp_path).remarks == ()


def test_labels_that_are_numbers_get_the_setting_that_names_them(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [{"text": f"q{i}", "label": i % 3} for i in range(30)])
    columns = {"prompt": "text", "completion": "label"}
    (remark,) = audit(TaskSource("a", path, columns=columns), folder=tmp_path).remarks
    assert remark.startswith(
        "a: the completions are the numbers 0 to 2, from the column 'label'. If they are classes, "
    )
    labels = {"0": "bad", "1": "fair", "2": "good"}
    assert audit(TaskSource("a", path, columns=columns, labels=labels), folder=tmp_path).remarks == ()


def test_files_that_keeptune_wrote_into_a_run_folder_are_no_data(tmp_path: Path) -> None:
    written(tmp_path / "dd/a.jsonl", rows(3))
    written(tmp_path / "dd/run/data/train.jsonl", rows(2))
    (tmp_path / "dd/run/.lock").touch()
    (tmp_path / "dd/run/recipe.yaml").touch()
    found = audit(TaskSource("a", f"{tmp_path}/dd/**/*.jsonl"), folder=tmp_path)
    assert found.rows_in == 3
    assert found.remarks == (
        f"{tmp_path}/dd/**/*.jsonl: left out 1 matches that stand in run folders, such as "
        f"{tmp_path}/dd/run/data/train.jsonl.",
    )
    with pytest.raises(
        DataError, match=r"found no file of such a name outside of run folders, and 1 in them; expected"
    ):
        audit(TaskSource("a", f"{tmp_path}/dd/run/**/*.jsonl"), folder=tmp_path)


def test_a_remedy_that_would_drop_every_row_is_not_given(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [{"prompt": f"q{i}", "completion": ""} for i in range(40)])
    with pytest.raises(DataError) as caught:
        audit(TaskSource("a", path), folder=tmp_path)
    assert str(caught.value) == (
        f"{path}, all 40 rows (here the first): found an empty completion; expected text. Fix the row."
    )
