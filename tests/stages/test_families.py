"""Every family is served as docs/models.md says, or refused for the reason that stands there."""

from __future__ import annotations

import pytest

from tests.families import DECODERS, PAIRS
from tests.stages.sweep import PAGE, TABLE, row, table

# Very different ones: plain, experts with routers, recurrent, recurrent without a mask, encoder-decoder, bidirectional,
# and an encoder-decoder that does not say how it starts.
SAMPLE = ["llama", "qwen3_moe/router", "mamba2", "rwkv", "t5", "bert/bidirectional", "mbart/no-start"]


def page_table() -> str:
    found = TABLE.search(PAGE.read_text(encoding="utf-8"))
    assert found is not None
    return found[0]


@pytest.mark.parametrize("name", SAMPLE)
def test_a_family_is_what_the_page_says(name: str) -> None:
    assert row(name) in page_table().splitlines()


@pytest.mark.slow
def test_every_family_is_what_the_page_says() -> None:
    assert table() == page_table()


def test_the_page_lists_many_families_of_both_kinds() -> None:
    assert len(DECODERS) >= 60
    assert len(PAIRS) >= 15
    assert len(page_table().splitlines()) == len(DECODERS) + len(PAIRS) + 2
