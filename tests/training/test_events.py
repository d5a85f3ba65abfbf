from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from keeptune.errors import CheckpointError, StorageError
from keeptune.training.events import DriftEvent, EventLog, ResumedEvent, StepEvent, ValidationEvent


def step_event(step: int, *, loss: float = 1.5) -> StepEvent:
    return StepEvent(step, step / 4, loss, 0.1, 0.5, 10, 5, "ab", 0.25)


def filled(path: Path) -> EventLog:
    log = EventLog(path)
    for step in (1, 2, 3):
        log.append("step", step_event(step))
    log.append("validation", ValidationEvent(3, 0.75, 1.25, "rougeL", 0.5))
    return log


def test_each_event_is_one_line_of_json(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.append("step", step_event(1))
    log.append("resumed", ResumedEvent(1, ("step-2.corrupt-ab",)))
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "event": "step",
            "step": 1,
            "epoch": 0.25,
            "loss": 1.5,
            "learning_rate": 0.1,
            "grad_norm": 0.5,
            "num_tokens": 10,
            "num_targets": 5,
            "record_ids_sha256": "ab",
            "elapsed_seconds": 0.25,
        },
        {"event": "resumed", "step": 1, "quarantined": ["step-2.corrupt-ab"]},
    ]


def test_a_number_that_is_not_finite_is_written_as_null(tmp_path: Path) -> None:
    EventLog(tmp_path / "events.jsonl").append("validation", ValidationEvent(1, 1.0, float("nan"), "f1", float("inf")))
    event = json.loads((tmp_path / "events.jsonl").read_text())
    assert event == {"event": "validation", "step": 1, "epoch": 1.0, "loss": None, "metric": "f1", "value": None}


def test_a_field_at_its_default_is_left_out(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.append("step", replace(step_event(1), l2_penalty=0.0))
    log.append("step", step_event(2))
    first, second = (json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines())
    assert first["l2_penalty"] == 0.0 and "l2_penalty" not in second


def test_truncation_takes_back_what_will_be_done_again(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = filled(path)
    log.append("drift", DriftEvent(2, 0.5, 0.1))
    log.append("drift", DriftEvent(3, 0.75, 0.2))
    before = path.read_bytes().splitlines()
    log.truncate_after(3, without=["drift"])
    assert path.read_bytes().splitlines() == before[:5]
    log.truncate_after(3, without=["drift", "validation"])
    assert path.read_bytes().splitlines() == [*before[:3], before[4]]


def test_truncation_keeps_the_lines_up_to_a_step(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = filled(path)
    before = path.read_bytes().splitlines()
    log.truncate_after(2)
    assert path.read_bytes().splitlines() == before[:2]


def test_truncation_takes_back_a_line_cut_by_a_crash_and_the_end_of_the_run(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = filled(path)
    before = path.read_bytes()
    path.write_bytes(before + b'{"event": "finished", "num_steps": 3}\n{"event": "st')
    log.truncate_after(3)
    assert path.read_bytes() == before


@pytest.mark.parametrize("junk", [b"\xff\xfe\n", b"[1]\n", b"{}\n", b"not json\n"])
def test_nothing_after_a_broken_line_is_trusted(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "events.jsonl"
    log = filled(path)
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + junk + b"".join(rest))
    log.truncate_after(1)
    assert path.read_bytes() == first


def test_a_log_without_the_steps_of_the_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = filled(path)
    with pytest.raises(CheckpointError, match=r"found 3 of 4 steps; expected the log of every step.*Put the file back"):
        log.truncate_after(4)
    path.unlink()
    with pytest.raises(CheckpointError, match="found 0 of 1 steps"):
        log.truncate_after(1)


def test_a_missing_folder_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such file or folder"):
        EventLog(tmp_path / "gone" / "events.jsonl").append("step", step_event(1))


def test_a_full_disk_is_a_storage_error() -> None:
    with pytest.raises(StorageError, match="no space left"):
        EventLog(Path("/dev/full")).append("step", step_event(1))
