"""Every family is served as docs/models.md says, or refused for the reason that stands there."""

from __future__ import annotations

import pytest

from tests.families import DECODERS, PAIRS
from tests.stages.sweep import ANSWERS, FAMILIES, LOSSES, PAGE, TABLE, label, row

# Very different ones: plain, experts with routers, recurrent, recurrent without a mask, encoder-decoder, bidirectional,
# and an encoder-decoder that does not say how it starts. The others are slow.
SAMPLE = {"llama", "qwen3_moe/router", "mamba2", "rwkv", "t5", "bert/bidirectional", "mbart/no-start"}


def page_rows() -> list[str]:
    found = TABLE.search(PAGE.read_text(encoding="utf-8"))
    assert found is not None
    return found[0].splitlines()[2:]


@pytest.mark.parametrize(
    "name", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_a_family_is_what_the_page_says(name: str) -> None:
    assert row(name) in page_rows()


def test_the_page_has_a_row_for_each_family_and_no_other() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page_rows()]
    assert [name for name, _, _ in rows] == [label(name) for name in FAMILIES]
    assert {losses for _, losses, _ in rows} <= {*LOSSES.values(), "refused"}
    served = [answers for _, losses, answers in rows if losses != "refused"]
    assert set(served) <= {*ANSWERS.values()}


def test_the_page_lists_many_families_of_both_kinds() -> None:
    assert len(DECODERS) >= 60
    assert len(PAIRS) >= 15
