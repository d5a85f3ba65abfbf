"""What a reader asks about the methods: a metric that never moved, an unfinished training, memory, forgetting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from keeptune.report.curves import Curve
from keeptune.report.explained import (
    forgot_more_sentence,
    memory_sentence,
    still_improving,
    tied_sentence,
    unfinished_sentence,
)
from keeptune.report.tables import read_report
from keeptune.storage import read_json
from tests.report.run_folder import training, write_forgetting, write_json, write_lines, write_run
from tests.report.test_page import page_of


def curve(*losses: float) -> Curve:
    points = tuple((float(step), loss) for step, loss in enumerate(losses))
    return Curve("lora", (), points, (), None, len(losses), 1, 0, 0, None, None)


@pytest.mark.parametrize(
    ("losses", "improving"),
    [
        ((3.0, 2.0, 1.5), True),
        ((3.0, 2.0, 1.995), False),
        ((3.0, 2.0, 2.1), False),
        ((3.0, 1.0, 1.5), False),
        ((0.02, 0.012), False),
        ((2.0,), False),
        ((), False),
    ],
)
def test_a_training_was_still_improving_where_its_last_loss_is_the_lowest_by_a_clear_step(
    losses: tuple[float, ...], improving: bool
) -> None:
    assert still_improving(curve(*losses)) is improving


def validation(step: int, loss: float, value: float | None = None) -> dict[str, Any]:
    return {"event": "validation", "step": step, "loss": loss, "metric": "rougeL", "value": value}


def test_the_page_says_which_method_was_still_improving_when_its_training_ended(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=1)
    write_lines(run / "full/events.jsonl", [validation(1, 2.0), validation(2, 1.9), validation(3, 1.95)])
    write_lines(run / "lora/events.jsonl", [validation(1, 2.0), validation(2, 1.5), validation(3, 1.2)])
    words = page_of(run).words
    assert "lora was still improving when training ended: the validation loss was still falling." in words
    # One that patience ended had its chance.
    write_json(run / "lora/training.json", {**training("lora", 3), "stopped_early": True})
    assert unfinished_sentence(read_report(run)) == ()


def test_a_selecting_metric_that_never_moved_is_named_with_those_that_did(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=1)
    for method in ("full", "lora"):
        lines = [validation(1, 2.5, 0.0), validation(2, 1.5, 0.0), validation(3, 1.6, 0.0)]
        write_lines(run / method / "events.jsonl", lines)
    same = {"model": "lora", "against": "base", "task": "all", "difference": 0.0, "low": 0.0, "high": 0.0}
    moved = {**same, "metric": "exact_match", "difference": 0.25, "low": 0.2, "high": 0.3, "better": 25, "worse": 0}
    pairs = [{**same, "metric": "rougeL", "better": 0, "worse": 0}, moved]
    write_json(run / "paired.json", {"paired": pairs})
    sentence = "".join(phrase.text for phrase in tied_sentence(read_report(run)))
    assert sentence == (
        "ROUGE-L could not choose the weights: on validation it was 0.000 at all 3 checks of full and lora. Choose by "
        "a metric that moves: evaluation.select_by: exact_match (0.012 to 0.262 on test) or evaluation.select_by: loss "
        "(2.500 to 1.600 on validation)."
    )
    assert sentence in page_of(run).words
    for method in ("full", "lora"):
        facts = {**training(method, 3), "metric_moved": False}
        write_json(run / method / "training.json", facts)
    assert ". The lowest validation loss decided which weights are kept. Choose by" in page_of(run).words


def test_a_metric_that_moved_or_was_taken_once_chose(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=1)
    write_lines(run / "full/events.jsonl", [validation(1, 2.5, 0.1), validation(2, 1.5, 0.0)])
    write_lines(run / "lora/events.jsonl", [validation(1, 2.5, 0.0)])
    assert tied_sentence(read_report(run)) == ()


def test_why_a_peft_method_took_as_much_memory_is_explained(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=1)
    assert memory_sentence(read_report(run)) == ""
    estimate = {
        "weights": 1,
        "gradients": 7_000_000,
        "optimizer": 14_000_000,
        "activations": 1,
        "runtime": 1,
        "total": 9,
    }
    write_json(run / "full/training.json", {**training("full", 1), "estimated_memory_bytes": estimate})
    write_json(run / "lora/training.json", {**training("lora", 1), "peak_memory_bytes": 1_300_000_000})
    words = page_of(run).words
    assert "lora (1.30 GB) took no less memory than full (1.21 GB). PEFT saves the memory of gradients" in words
    assert "optimizer state (for full an estimated 21.0 MB); activations" in words


def test_a_peft_method_that_forgot_more_points_to_the_learning_rates(tmp_path: Path) -> None:
    run = write_forgetting(write_run(tmp_path, others=("boolq", "wiki")))
    assert forgot_more_sentence(read_report(run)) == ""
    value = read_json(run / "forgetting.json")
    for row in value["rows"]:
        row["forgetting"] *= 3 if row["model"] == "lora" else 1
    write_json(run / "forgetting.json", value)
    words = page_of(run).words
    assert "lora forgot more than full on all other tasks (0.420 against 0.210 ROUGE-L)." in words
    assert "its learning rate does (0.0002 against 2e-05)." in words
