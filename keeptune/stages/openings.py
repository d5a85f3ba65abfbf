"""The test split is about to be read; a line that says so, by whom and when, leaves."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from keeptune.stages.data import Data
from keeptune.stages.run import Run
from keeptune.storage import file_sha256, storage_errors


def record_opening(run: Run, data: Data, *, models: Sequence[str]) -> None:
    """Add a line to `test_openings.jsonl`, on the disk before the split is read."""
    line = {
        "opened": run.context.now(),
        "command": run.context.command,
        "models": list(models),
        "test_sha256": file_sha256(data.folder / "test.jsonl"),
    }
    path = run.folder / "test_openings.jsonl"
    with storage_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
