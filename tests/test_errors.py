"""Faults are collected, and a missing library names its extra."""

from __future__ import annotations

from pathlib import Path

import pytest

from keeptune.errors import (
    DataError,
    KeeptuneError,
    RecipeError,
    import_extra,
    printable,
    raise_collected,
    relative_start,
    stopped,
)


def test_the_first_ten_problems_are_listed_and_the_rest_counted() -> None:
    with pytest.raises(DataError) as caught:
        raise_collected(DataError, [f"row {i}" for i in range(13)])
    lines = str(caught.value).splitlines()
    assert lines == [*(f"row {i}" for i in range(10)), "and 3 more."]


def test_every_kind_has_its_exit_code() -> None:
    codes = {kind.__name__: kind.exit_code for kind in KeeptuneError.__subclasses__()}
    assert codes == {
        "RecipeError": 2,
        "DataError": 3,
        "StorageError": 4,
        "OutOfMemoryError": 5,
        "NonFiniteError": 6,
        "FolderInUseError": 7,
        "CheckpointError": 8,
        "Interrupted": 143,
    }


def test_a_relative_path_is_said_to_start_from_the_folder_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert relative_start(Path("lab/models")) == (
        f" Relative paths start from {tmp_path}, where the command was given, not from the recipe's folder."
    )
    assert relative_start(tmp_path) == ""


def test_a_missing_library_names_the_extra_to_install() -> None:
    assert import_extra("json", extra="hub").dumps([]) == "[]"
    with pytest.raises(RecipeError, match=r"no_such_library: not installed.*pip install 'keeptune\[hub\]'"):
        import_extra("no_such_library", extra="hub")


def test_a_stop_inside_work_that_is_kept_whole_says_what_is_lost_and_what_stands() -> None:
    error = stopped("answers")
    assert error.exit_code == 143
    assert str(error) == (
        "answers: stopped on request; those in progress are lost, everything finished before them stands. "
        "Give the same command again to go on."
    )


def test_problems_about_rows_that_say_the_same_are_counted() -> None:
    def message(problems: list[str]) -> list[str]:
        with pytest.raises(DataError) as caught:
            raise_collected(DataError, problems)
        return str(caught.value).splitlines()

    cells = [f"a.csv:{i}: found {i} cells; expected 1. Fix the row." for i in range(2, 1190)]
    assert message([*cells, "a.csv: found no rows; expected one."]) == [
        "a.csv:2: found 2 cells; expected 1. Fix the row. The same 1,187 times more, the last at a.csv:1189.",
        "a.csv: found no rows; expected one.",
    ]
    assert message(["a[1]: found b. C.", "a[7]: found b. C."]) == ["a[1]: found b. C. The same at a[7]."]
    said = [f"a.jsonl:{i}: chat template: found thoughts. Remove them." for i in (3, 8)]
    assert message(said) == ["a.jsonl:3: chat template: found thoughts. Remove them. The same at a.jsonl:8."]
    # Keys of a recipe are no rows: each is named.
    keys = [f"r.yaml: data.tasks.{i}: found an unknown key" for i in range(3)]
    assert message(keys) == keys


def test_control_characters_become_visible() -> None:
    assert printable("a\x1b[31m\tb\n\u202e\udcffé") == "a\\x1b[31m\tb\n\\u202e\\udcffé"
