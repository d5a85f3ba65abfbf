"""The test split is about to be read; a line that says so, by whom and when, leaves."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from keeptune.report.reading import RunFolder, mapping
from keeptune.stages.data import Data
from keeptune.stages.run import Run
from keeptune.storage import file_sha256, storage_errors

# Of a model's key, in the log of openings.
_KEY_DIGITS = 16


def record_opening(run: Run, data: Data, *, keys: Mapping[str, str]) -> None:
    """Add a line to `test_openings.jsonl`, on the disk before the split is read; `keys` holds one a model.

    One that goes on with an interrupted look, at the same models under the same keys, says so: it is no second look.
    """
    short = {name: key[:_KEY_DIGITS] for name, key in keys.items()}
    line = {
        "opened": run.context.now(),
        "command": run.context.command,
        "models": list(short),
        "test_sha256": file_sha256(data.folder / "test.jsonl"),
        "keys": short,
    }
    path = run.folder / "test_openings.jsonl"
    before = [mapping(opening.get("keys")) for opening in RunFolder(run.folder).lines(path.name, expected=False)]
    if any(short.items() <= of_before.items() for of_before in before):
        line["resumes"] = True
    with storage_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
