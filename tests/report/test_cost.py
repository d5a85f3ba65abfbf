"""What a method cost, and what was said of its memory before: side by side, and absent in runs of older versions."""

from __future__ import annotations

import json
import re
from pathlib import Path

from keeptune.report.cost import MemoryByKind, read_costs
from keeptune.report.page import write_report
from keeptune.report.reading import RunFolder
from keeptune.storage import read_json
from tests.report.run_folder import write_json, write_run

KINDS = {
    "weights": 15_000_000, "gradients": 2_360_000, "optimizer": 4_720_000, "activations": 321_000_000,
    "runtime": 480_000_000, "total": 823_080_000,
}  # fmt: skip


def with_estimate(folder: Path) -> Path:
    """Write a run of which LoRA's training states its estimate, and full fine-tuning's, an older one, does not."""
    run = write_run(folder, num_steps=6)
    write_json(run / "lora/training.json", {**read_json(run / "lora/training.json"), "estimated_memory_bytes": KINDS})
    return run


def test_an_estimate_is_read_by_kind_and_older_runs_have_none(tmp_path: Path) -> None:
    full, lora = read_costs(RunFolder(with_estimate(tmp_path)), ["full", "lora"])
    assert full.estimated_memory_bytes is None
    assert lora.estimated_memory_bytes == MemoryByKind(**KINDS)


def test_what_is_no_number_counts_as_missing(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=1)
    write_json(run / "full/training.json", {"estimated_memory_bytes": {"weights": "many", "total": 5}})
    write_json(run / "lora/training.json", {"estimated_memory_bytes": [1]})
    full, lora = read_costs(RunFolder(run), ["full", "lora"])
    assert full.estimated_memory_bytes == MemoryByKind(None, None, None, None, None, 5)
    assert lora.estimated_memory_bytes is None


def test_the_page_sets_the_estimate_beside_the_measured_peak(tmp_path: Path) -> None:
    page = write_report(with_estimate(tmp_path)).read_text(encoding="utf-8")
    table = page[page.index("estimated before training") :].split("</table>")[0].replace("\u00a0", " ")
    cells = re.findall(r'<td class="num[^"]*">([^<]*)</td>', table)
    # 823 of 911 MB: 90.3 %.
    assert cells == ["15.0 MB", "2.36 MB", "4.72 MB", "321 MB", "480 MB", "823 MB", "911 MB", "90.3 %"]
    assert table.count("<tr>") == 2


def test_a_run_without_any_estimate_has_no_such_table(tmp_path: Path) -> None:
    assert "estimated before training" not in write_report(write_run(tmp_path, num_steps=1)).read_text(encoding="utf-8")


def test_the_json_holds_the_estimate_or_null(tmp_path: Path) -> None:
    run = with_estimate(tmp_path)
    write_report(run)
    full, lora = json.loads((run / "report.json").read_text(encoding="utf-8"))["cost"]
    assert full["estimated_memory_bytes"] is None
    assert lora["estimated_memory_bytes"] == KINDS
