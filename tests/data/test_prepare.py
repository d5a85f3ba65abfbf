"""Files in, records by split out: every row is accounted for, and no order of rows matters."""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keeptune.data.audit import SplitCounts
from keeptune.data.prepare import Prepared, TaskSource, prepare_records
from keeptune.data.record import SPLIT_NAMES, record_to_json
from keeptune.errors import DataError
from keeptune.progress import Silent

SHARED = Path(__file__).resolve().parents[3] / "shared"


class Listener(Silent):
    """Keeps what was said, and the totals and counts of work."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.totals: dict[str, int] = {}
        self.done: dict[str, int] = {}

    def start(self, title: str, *, total: int, unit: str) -> None:
        self.title = title
        self.totals[title], self.done[title] = total, 0

    def advance(self, count: int = 1, *, note: str = "") -> None:
        self.done[self.title] += count

    def say(self, text: str) -> None:
        self.said.append(text)


def story(i: int, num_words: int = 30) -> str:
    return " ".join(f"s{i}w{k}" for k in range(num_words))


def row(i: int, completion: str = "yes") -> dict[str, Any]:
    return {"prompt": story(i), "completion": completion}


def write(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("scratch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        yield


def prepared(*sources: TaskSource, **settings_: Any) -> Prepared:
    defaults = {
        "seed": 0,
        "validation_fraction": 0.2,
        "test_fraction": 0.2,
        "drop_incomplete": False,
        "duplicates": "drop",
        "leaks": "drop",
        "progress": Silent(),
        "scratch": Path(tempfile.mkdtemp()),
    }
    return prepare_records(sources, **(defaults | settings_))


def placed(result: Prepared) -> Mapping[tuple[str, str], str]:
    """Split by task and text; origins and order left out."""
    return {(r.task, f"{r.prompt} -> {r.completion}"): split for split in SPLIT_NAMES for r in result.records[split]}


def test_every_row_is_kept_or_dropped_with_its_reason(tmp_path: Path) -> None:
    rows = [*(row(i) for i in range(40)), row(3), row(4, "no"), {**row(5), "completion": " "}, {"x": "y"}]
    listener = Listener()
    result = prepared(TaskSource("a", write(tmp_path / "a.jsonl", rows)), drop_incomplete=True, progress=listener)
    audit = result.audit
    assert audit.rows_in == 44
    assert audit.dropped == {"empty_completion": 1, "unknown_format": 1, "exact_duplicate": 1}
    assert audit.exact_duplicates == 1
    assert [(Path(d.origin).name, d.reason) for d in audit.dropped_rows] == [
        ("a.jsonl:43", "empty_completion"),
        ("a.jsonl:44", "unknown_format"),
        ("a.jsonl:41", "exact_duplicate"),
    ]
    assert audit.kept == 41 == sum(len(records) for records in result.records.values())
    assert all(len(result.records[split]) > 2 for split in SPLIT_NAMES)
    assert listener.said == []
    pieces = {"Reading": 1, "Auditing for near-duplicates": 41, "Auditing for overlaps": 41}
    assert listener.totals == listener.done == pieces


def test_only_twenty_dropped_rows_of_a_reason_are_listed(tmp_path: Path) -> None:
    rows = [row(0), *({"x": str(i)} for i in range(25))]
    audit = prepared(TaskSource("a", write(tmp_path / "a.jsonl", rows)), drop_incomplete=True).audit
    assert audit.dropped == {"unknown_format": 25}
    assert len(audit.dropped_rows) == 20


def test_invalid_rows_stop_the_run_unless_they_may_be_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [row(0), *({**row(i), "completion": ""} for i in range(1, 13))])
    with pytest.raises(DataError) as caught:
        prepared(TaskSource("a", path))
    assert str(caught.value).splitlines() == [
        f"{path}:2: found an empty completion; expected text. Fix the row. The same 11 times more, the last at "
        f"{path}:13.",
        "To drop and count such rows, set data.drop_incomplete=true.",
    ]


@pytest.mark.parametrize(
    ("name", "text", "places"),
    [
        (
            "a.jsonl",
            '{"prompt": "p", "completion": "c"}\n{"prompt":\n[1]\n{"prompt": "q", "completion": "c"}\n',
            ":2 :3",
        ),
        ("a.json", '[{"prompt": "p", "completion": "c"}, [1], 2, {"prompt": "q", "completion": "c"}]', "[1] [2]"),
        ("a.csv", "prompt,completion\np,c\nx\ny\nq,c\n", ":3 :4"),
    ],
)
def test_rows_that_cannot_be_read_are_dropped_and_counted_where_they_may_be(
    tmp_path: Path, name: str, text: str, places: str
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    source = TaskSource("a", str(tmp_path / name))
    audit = prepared(source, drop_incomplete=True, validation_fraction=0.0, test_fraction=0.0).audit
    assert (audit.rows_in, audit.kept, audit.dropped) == (4, 2, {"unreadable": 2})
    origins = [f"{tmp_path / name}{place}" for place in places.split()]
    assert [row.origin for row in audit.dropped_rows] == origins
    with pytest.raises(DataError) as caught:
        prepared(source)
    message = str(caught.value)
    assert message.startswith(f"{origins[0]}: found ")
    assert origins[1] in message
    assert message.endswith("\nTo drop and count such rows, set data.drop_incomplete=true.")


def test_dropping_is_not_proposed_where_no_record_would_be_left(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('[{"prompt": "p", "completion": "c"}]\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"a name that ends with \.json\.$"):
        prepared(TaskSource("a", str(path)))


def test_a_file_that_breaks_off_is_never_dropped_as_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"prompt": "p", "completion": "c"}, {"prompt": "q"', encoding="utf-8")
    with pytest.raises(DataError, match=r"found broken JSON .* at column"):
        prepared(TaskSource("a", str(path)), drop_incomplete=True)


def test_a_column_that_all_rows_lack_is_one_problem(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"dialogue": "d", "summary": "s"} for _ in range(30)])
    columns = {"prompt": "dialog", "completion": "summary"}
    with pytest.raises(DataError) as caught:
        prepared(TaskSource("a", path, columns=columns))
    assert str(caught.value) == (
        f"{path}, all 30 rows (here the first): found no column 'dialog' among dialogue, summary; "
        "expected the columns that the recipe names. Did you mean 'dialogue'?"
    )
    other = write(tmp_path / "b.jsonl", [row(0), {**row(1), "completion": ""}])
    with pytest.raises(DataError) as caught:
        prepared(TaskSource("a", path), TaskSource("b", other))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{path}, all 30 rows (here the first): found the columns dialogue, summary; expected")
    assert lines[0].endswith("`columns: {prompt: dialogue, completion: summary}`.")
    assert lines[1].startswith(f"{other}:2: found an empty completion")
    assert lines[2:] == ["To drop and count such rows, set data.drop_incomplete=true."]


def test_several_files_are_split_as_one_task_and_records_keep_their_file(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.jsonl", [row(10 * i + j) for j in range(10)]) for i, name in enumerate("ab")]
    several = prepared(TaskSource("t", paths))
    single = prepared(TaskSource("t", write(tmp_path / "both.jsonl", [row(i) for i in range(20)])))
    for split in ("train", "validation", "test"):
        assert [r.id for r in several.records[split]] == [r.id for r in single.records[split]]
    origins = {record.origin for records in several.records.values() for record in records}
    assert origins == {f"{path}:{line}" for path in paths for line in range(1, 11)}
    with pytest.raises(DataError, match=r"a\.jsonl and 1 more, all 20 rows \(here the first\): found no column 'q'"):
        prepared(TaskSource("t", paths, columns={"prompt": "q", "completion": "a"}))


def test_nothing_but_invalid_rows_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"x": "1"}, {"x": "2"}])
    with pytest.raises(DataError) as caught:
        prepared(TaskSource("a", path), drop_incomplete=True)
    assert str(caught.value).startswith(f"{path}, all 2 rows (here the first): found the columns x; expected messages,")
    assert "drop_incomplete" not in str(caught.value)


def test_named_columns_and_instruction_reach_the_records(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"dialogue": "hello", "summary": "a greeting"}])
    columns = {"prompt": "dialogue", "completion": "summary"}
    source = TaskSource("a", path, columns=columns, instruction="Sum up.")
    (record,) = prepared(source, validation_fraction=0.0, test_fraction=0.0).records["train"]
    assert (record.prompt, record.completion) == ("Sum up.\n\nhello", "a greeting")


def test_copies_are_dropped_inside_a_task_and_kept_on_request(tmp_path: Path) -> None:
    rows = [row(1), {"prompt": story(1).upper(), "completion": "Yes"}, row(2)]
    sources = [TaskSource(name, write(tmp_path / f"{name}.jsonl", rows)) for name in "ab"]
    result = prepared(*sources)
    assert result.audit.dropped == {"exact_duplicate": 2}
    assert len(placed(result)) == 4
    # Which of the two copies stays does not depend on their order.
    write(tmp_path / "a.jsonl", rows[::-1])
    assert placed(prepared(*sources)) == placed(result)
    kept = prepared(*sources, duplicates="keep")
    assert kept.audit.dropped == {}
    assert (kept.audit.kept, kept.audit.exact_duplicates) == (6, 2)


def test_a_cap_keeps_the_same_records_whatever_their_order(tmp_path: Path) -> None:
    rows = [row(i) for i in range(3000)]
    path = write(tmp_path / "a.jsonl", rows)
    first = prepared(TaskSource("a", path, max_records=10))
    assert first.audit.dropped == {"max_records": 2990}
    random.Random(0).shuffle(rows)
    write(tmp_path / "a.jsonl", rows)
    assert placed(prepared(TaskSource("a", path, max_records=10))) == placed(first)
    # It is no head of the file, and a higher cap keeps what a lower one kept.
    larger = prepared(TaskSource("a", path, max_records=20))
    assert placed(first).items() <= placed(larger).items()
    assert max(int(r.prompt.split("w")[0][1:]) for s in SPLIT_NAMES for r in first.records[s]) > 100


def test_own_files_are_neither_capped_nor_deduplicated_and_their_copies_leave_train(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [*(row(i) for i in range(50)), row(100), row(101, "no")])
    test = write(tmp_path / "test.jsonl", [row(100), row(100), row(101), row(102)])
    source = TaskSource("a", train, test=test)
    result = prepared(source)
    assert [Path(r.origin).name for r in result.records["test"]] == [f"test.jsonl:{n}" for n in (1, 2, 3, 4)]
    assert result.audit.dropped == {"leak": 2}
    exact = result.audit.leaks["exact"]
    assert (exact.num_train_records, exact.num_removed) == (2, 2)
    assert [(Path(e.train).name, Path(e.held_out).name) for e in exact.examples] == [
        ("train.jsonl:51", "test.jsonl:1"),
        ("train.jsonl:52", "test.jsonl:3"),
    ]
    assert len(result.records["validation"]) > 2
    kept = prepared(source, leaks="keep")
    assert kept.audit.dropped == {}
    assert (kept.audit.leaks["exact"].num_train_records, kept.audit.leaks["exact"].num_removed) == (2, 0)
    capped = prepared(TaskSource("a", train, test=test, max_records=5))
    assert len(capped.records["test"]) == 4


def test_counts_stand_for_every_task_and_split(tmp_path: Path) -> None:
    a = TaskSource("a", write(tmp_path / "a.jsonl", [row(i) for i in range(30)]))
    b = TaskSource("b", write(tmp_path / "b.jsonl", [{"x": "y"}]))
    audit = prepared(a, b, drop_incomplete=True, validation_fraction=0.0, test_fraction=0.0).audit
    assert audit.tasks == {"a": SplitCounts(30, 0, 0), "b": SplitCounts(0, 0, 0)}


def test_near_duplicates_are_listed_with_their_origins_and_equal_prompts_are_not(tmp_path: Path) -> None:
    near = {"prompt": f"{story(1)} end", "completion": "yes"}
    audit = prepared(TaskSource("a", write(tmp_path / "a.jsonl", [row(1), near, row(2), row(2, "no")]))).audit
    (pair,) = audit.near_duplicates.examples
    assert audit.near_duplicates.num_pairs == 1
    assert (Path(pair.first).name, Path(pair.second).name) == ("a.jsonl:1", "a.jsonl:2")
    assert pair.jaccard == pytest.approx(28 / 29)
    assert (audit.groups.num_groups, audit.groups.num_joined, audit.groups.largest_group) == (2, 1, 2)


def test_train_records_that_cover_a_held_out_one_are_removed(tmp_path: Path) -> None:
    train = [{"prompt": f"{story(i, 40)} {story(900, 40)}", "completion": "yes"} for i in range(5)]
    test = write(tmp_path / "test.jsonl", [row(900), row(901)])
    source = TaskSource("a", write(tmp_path / "a.jsonl", [*train, row(7)]), test=test)
    audit = prepared(source, validation_fraction=0.0).audit
    assert audit.dropped == {"leak": 5}
    assert audit.leaks["ngram_cover"].num_removed == 5
    assert audit.leaks["ngram_13"].num_train_records == 0


def test_every_record_of_an_untrained_task_is_for_test(tmp_path: Path) -> None:
    a = TaskSource("a", write(tmp_path / "a.jsonl", [row(i) for i in range(40)]))
    b = TaskSource("b", write(tmp_path / "b.jsonl", [row(i) for i in range(100, 130)] + [row(100)]), trained=False)
    result = prepared(a, b)
    # Its copies stay, as in any own test file.
    assert result.audit.tasks["b"] == SplitCounts(0, 0, 31)
    assert result.audit.untrained_tasks == ("b",)
    assert (result.audit.rows_in, result.audit.kept, result.audit.dropped) == (71, 71, {})
    assert result.audit.trained_splits == result.audit.tasks["a"] == prepared(a).audit.tasks["a"]
    assert {r.task for split in ("train", "validation") for r in result.records[split]} == {"a"}


@pytest.mark.parametrize("as_folder", [False, True])
def test_an_untrained_task_with_a_test_file_keeps_that_alone(tmp_path: Path, as_folder: bool) -> None:
    a = TaskSource("a", write(tmp_path / "a.jsonl", [row(i) for i in range(40)]))
    folder = tmp_path / "b"
    folder.mkdir()
    train = write(folder / "train.jsonl", [row(i) for i in range(100, 120)])
    validation = write(folder / "validation.jsonl", [row(i) for i in range(200, 203)])
    test = write(folder / "test.jsonl", [row(i) for i in range(300, 305)])
    named = TaskSource("b", train, validation=validation, test=test, trained=False)
    b = TaskSource("b", str(folder), trained=False) if as_folder else named
    result = prepared(a, b)
    assert [Path(r.origin).name for r in result.records["test"] if r.task == "b"] == [
        f"test.jsonl:{n}" for n in (1, 2, 3, 4, 5)
    ]
    assert result.audit.dropped == {"not_trained": 23}
    assert result.audit.rows_in == 68 == result.audit.kept + 23
    without = TaskSource("b", train, validation=validation, trained=False)
    assert prepared(a, without).audit.tasks["b"] == SplitCounts(0, 0, 23)


def test_the_cap_of_an_untrained_task_keeps_the_same_test_records_whatever_their_order(tmp_path: Path) -> None:
    a = TaskSource("a", write(tmp_path / "a.jsonl", [row(i) for i in range(40)]))
    rows = [row(i) for i in range(100, 1700)]
    path = write(tmp_path / "b.jsonl", rows)
    first = prepared(a, TaskSource("b", path, trained=False, max_records=10))
    assert first.audit.tasks["b"] == SplitCounts(0, 0, 10)
    assert first.audit.dropped == {"max_records": 1590}
    write(tmp_path / "b.jsonl", rows[::-1])
    assert placed(prepared(a, TaskSource("b", path, trained=False, max_records=10))) == placed(first)
    own = TaskSource("b", write(tmp_path / "c.jsonl", rows[:5]), test=path, trained=False, max_records=10)
    audit = prepared(a, own).audit
    assert (audit.tasks["b"], audit.dropped) == (SplitCounts(0, 0, 10), {"max_records": 1590, "not_trained": 5})


def test_train_records_that_overlap_with_an_untrained_task_are_removed(tmp_path: Path) -> None:
    a = TaskSource("a", write(tmp_path / "a.jsonl", [row(i) for i in range(40)]))
    b = TaskSource("b", write(tmp_path / "b.jsonl", [row(i) for i in range(35, 60)]), trained=False)
    result = prepared(a, b)
    assert result.audit.dropped == {"leak": 5}
    assert result.audit.leaks["exact"].num_removed == 5
    assert result.audit.tasks["b"] == SplitCounts(0, 0, 25)
    learned = {r.prompt for split in ("train", "validation") for r in result.records[split]}
    assert not learned & {r.prompt for r in result.records["test"]}


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["yes", "no"])), min_size=1, max_size=25),
    st.lists(st.integers(100, 140), max_size=25),
    st.randoms(use_true_random=False),
)
def test_no_record_moves_when_rows_are_permuted_or_unrelated_ones_added(
    tmp_path_factory: pytest.TempPathFactory,
    given_rows: list[tuple[int, str]],
    others: list[int],
    shuffler: random.Random,
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    rows = [row(i, completion) for i, completion in given_rows]
    before = placed(prepared(TaskSource("a", write(folder / "a.jsonl", rows))))
    more = [*rows, *(row(i) for i in others)]
    shuffler.shuffle(more)
    after = placed(prepared(TaskSource("a", write(folder / "a.jsonl", more))))
    assert {key: after[key] for key in before} == before


def test_the_same_rows_give_the_same_records_splits_and_audit_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash stands for what came out when inputs began to form groups: another one means other splits."""
    monkeypatch.chdir(tmp_path)
    rows = [row(i, f"{story(i + 500, 4)}") for i in range(150)]
    for i in range(0, 150, 10):
        rows += [row(i, f"{story(i + 500, 4)}".upper()), {"prompt": f"{story(i)} end", "completion": "no"}]
        rows += [{"prompt": f"{story(900 + i, 20)} {story(i + 1)} {story(901 + i, 9)}", "completion": story(i, 25)}]
        rows += [{"prompt": f"{story(950 + i, 20)} {story(i + 2, 14)}", "completion": f"half {i}"}]
        rows += [{"prompt": f"short {i // 30}", "completion": f"c{i}"}, {"x": "y"}]
    random.Random(3).shuffle(rows)
    write(Path("a.jsonl"), rows[:160])
    write(Path("b.jsonl"), rows[120:])
    write(Path("test.jsonl"), [row(i) for i in (3, 3, 20, 41, 41)])
    sources = (
        TaskSource("a", "a.jsonl", test="test.jsonl"),
        TaskSource("b", "b.jsonl", max_records=90),
        TaskSource("c", "b.jsonl", trained=False, max_records=20),
    )
    result = prepared(*sources, drop_incomplete=True)
    records = {split: [record_to_json(record) for record in result.records[split]] for split in SPLIT_NAMES}
    audit = result.audit.to_json()
    assert (audit.pop("unread_columns"), len(audit.pop("remarks"))) == ({}, 1)
    for leak in audit["leaks"].values():
        for example in leak["examples"]:
            assert example.pop("shared")
    content = json.dumps([records, audit], sort_keys=True)
    assert result.audit.dropped.keys() == {"exact_duplicate", "leak", "max_records", "unknown_format"}
    assert [leak.num_train_records > 0 for leak in result.audit.leaks.values()] == [True] * 4
    assert hashlib.sha256(content.encode()).hexdigest() == (
        "4fca01f959efea19ddb2c18d6165528c4633fae2c942ff03b1c1e98854c61162"
    )


@pytest.mark.real
def test_dialogsum_is_split_with_its_near_duplicates_together() -> None:
    path = SHARED / "data/dialogsum.dev.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    source = TaskSource("dialogsum", str(path), columns={"prompt": "dialogue", "completion": "summary"})
    result = prepared(source)
    lines = [[int(o.split(":")[1]) for o in (p.first, p.second)] for p in result.audit.near_duplicates.examples]
    assert lines == [[114, 435], [263, 408]]
    # Five more pairs share most of a dialogue.
    assert result.audit.groups.num_groups == 491
    split_of = {int(r.origin.split(":")[1]): split for split in SPLIT_NAMES for r in result.records[split]}
    for first, second in ([44, 117], [165, 192], [34, 298], *lines):
        assert split_of[first] == split_of[second]
    assert result.audit.leaks["exact"].num_train_records == result.audit.leaks["near"].num_train_records == 0


@pytest.mark.real
def test_templates_of_one_data_set_do_not_leak_their_inputs() -> None:
    folder = SHARED / "data/p3_sample"
    if not folder.exists():
        pytest.skip(f"{folder} is not there")
    paths = sorted(folder.glob("ag_news_*.jsonl.gz"))
    result = prepared(*(TaskSource(p.name.split(".")[0], str(p)) for p in paths), drop_incomplete=True)
    # The seven templates wrap about the same articles: most groups hold a record of each.
    assert result.audit.groups.num_groups < result.audit.kept / 4
    assert all(counts.test > 5 for counts in result.audit.tasks.values())
    again = [(r.id, split) for split in SPLIT_NAMES for r in result.records[split]]
    reversed_ = prepared(*(TaskSource(p.name.split(".")[0], str(p)) for p in paths[::-1]), drop_incomplete=True)
    assert sorted(again) == sorted((r.id, split) for split in SPLIT_NAMES for r in reversed_.records[split])
