"""The token cache: what is written is what is read, counted, verified and not held in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keeptune.data.record import Message, Record
from keeptune.errors import StorageError
from keeptune.text.table import TokenCounts, TokenTable
from keeptune.text.template import make_template
from keeptune.text.tokenizer import Tokenizer
from keeptune.text.tokens import Example, Tokenized, tokenize

SHARED = Path(__file__).resolve().parents[3] / "shared"


def tokenized(name: str, ids: list[int], *, trained: int, dropped: bool = False, cut: bool = False) -> Tokenized:
    mask = np.arange(len(ids)) >= len(ids) - trained
    return Tokenized(
        Record(name, "task", f"{name}.jsonl:1", (Message("user", "q"), Message("assistant", "a"))),
        example=None if dropped else Example(np.array(ids, np.int32), loss_mask=mask),
        truncated=cut,
        completion_cut=cut,
        prompt_tokens=len(ids) - trained,
        completion_tokens=trained,
    )


ITEMS = [
    tokenized("first", [1, 2, 3], trained=2),
    tokenized("gone", [9, 9], trained=1, dropped=True),
    tokenized("last", [4, 70_000], trained=1, cut=True),
]


def test_a_table_holds_the_kept_examples_and_counts_the_others(tmp_path: Path) -> None:
    table = TokenTable.write(tmp_path / "tokens", iter(ITEMS))
    assert len(table) == 2 and list(table.record_ids) == ["first", "last"]
    assert (table.record_ids[1], table.record_ids[-2:], len(table.record_ids)) == ("last", ["first", "last"], 2)
    assert table.largest_id == 70_000
    assert table[0].input_ids.tolist() == [1, 2, 3] and table[0].loss_mask.tolist() == [False, True, True]
    assert table[1].input_ids.tolist() == [4, 70_000] and table[1].loss_mask.tolist() == [False, True]
    assert table.lengths.tolist() == [3, 2] and table.num_targets.tolist() == [2, 1]
    assert table.prompt_lengths.tolist() == [1, 1] and table.completion_lengths.tolist() == [2, 1]
    assert {array.dtype for array in (table.lengths, table.num_targets, table.prompt_lengths)} == {np.dtype(np.int64)}
    assert table.counts == TokenCounts(
        num_records=3,
        num_examples=2,
        num_dropped=1,
        num_truncated=1,
        num_completions_cut=1,
        num_tokens=5,
        num_targets=3,
        dropped_origins=("gone.jsonl:1",),
    )
    with pytest.raises(IndexError, match="example 2 of 2"):
        table[2]


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), max_size=30), repeat=st.sampled_from([1, 90]))
def test_what_is_written_is_what_is_read(
    lengths: list[int], repeat: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    items = [
        tokenized(str(number), list(range(number, number + length)), trained=length // 2)
        for number, length in enumerate(lengths * repeat)
    ]
    path = tmp_path_factory.mktemp("table") / "tokens"
    TokenTable.write(path, iter(items))
    table = TokenTable.open(path)
    assert len(table) == len(items)
    for index, item in enumerate(items):
        assert item.example is not None
        assert table[index].input_ids.tolist() == item.example.input_ids.tolist()
        assert table[index].loss_mask.tolist() == item.example.loss_mask.tolist()
    assert table.lengths.tolist() == lengths * repeat


def test_every_loss_mask_survives_the_table(tmp_path: Path) -> None:
    mask = np.array([False, True, False, False, True, True, False, True, True, False, True])
    item = tokenized("a", list(range(11)), trained=1)
    assert item.example is not None
    odd = Tokenized(item.record, Example(item.example.input_ids, loss_mask=mask), *(False, False, 10, 1))
    assert TokenTable.write(tmp_path / "tokens", iter([odd]))[0].loss_mask.tolist() == mask.tolist()


def test_examples_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    table = TokenTable.write(tmp_path / "tokens", iter(ITEMS))
    assert not table[0].input_ids.flags.writeable and not table[0].input_ids.flags.owndata


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[Tokenized]:
        yield ITEMS[0]
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        TokenTable.write(tmp_path / "tokens", failing())
    assert list(tmp_path.iterdir()) == []


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    TokenTable.write(tmp_path / "tokens", iter(ITEMS))
    content = bytearray((tmp_path / "tokens" / "examples.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "tokens" / "examples.arrow").write_bytes(bytes(content))
    with pytest.raises(StorageError, match="found tokens that differ from their manifest, or none; expected them as"):
        TokenTable.open(tmp_path / "tokens")
    with pytest.raises(StorageError, match="or none"):
        TokenTable.open(tmp_path / "missing")


@pytest.mark.real
def test_real_records_come_back_from_the_table(tmp_path: Path) -> None:
    folder = SHARED / "models" / "english-3m"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: the real tokenizer is needed")
    tokenizer = Tokenizer.load(folder)
    template = make_template("auto", tokenizer=tokenizer, encoder_decoder=False)
    assert template.name == "alpaca" and not tokenizer.adds_bos
    path = SHARED / "data" / "dialogsum.dev.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()[:200]
    records = [
        Record(str(i), "dialogsum", f"{path}:{i + 1}", (Message("user", line), Message("assistant", line[:80])))
        for i, line in enumerate(lines)
    ]
    items = tokenize(
        records,
        template=template,
        train_on="all",
        max_length=1024,
        over_length="cut",
        encoder_decoder=False,
    )
    table = TokenTable.write(tmp_path / "tokens", items)
    assert len(table) == len(records)
    for index, record in enumerate(records):
        assert tokenizer.decode(table[index].completion_ids.tolist()) == record.completion + "</s>"
