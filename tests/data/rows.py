"""What the tests of the readers share: write a file, read its rows or the message of the refusal."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from keeptune.data.source import Row, read_rows
from keeptune.errors import DataError

TWO = [{"prompt": "a", "completion": "b"}, {"prompt": "é\u2028😀", "completion": "d"}]
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
tables = st.lists(st.fixed_dictionaries({"prompt": text, "completion": text}), min_size=1, max_size=4)


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
