"""What the documents show: every recipe in them can be read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{path.name}-{i}")
    for path in DOCUMENTS
    for i, block in enumerate(
        re.findall(r"^```yaml\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    )
]


@pytest.mark.parametrize("block", BLOCKS)
def test_every_yaml_block_of_the_documents_is_a_part_of_a_recipe(block: str) -> None:
    assert isinstance(yaml.safe_load(block), dict)


def test_the_documents_have_yaml_blocks() -> None:
    assert len(BLOCKS) >= 7
