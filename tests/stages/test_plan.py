"""A plan: memory and time of each method beforehand, nothing written, and what would make it fit."""

from __future__ import annotations

import io
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from keeptune import stages, terminal_plan
from keeptune.storage import read_json
from keeptune.training import cost
from tests.stages import world

torch.set_num_threads(1)
FULL: dict[str, Any] = {"full": {"learning_rate": 1e-3}}
METHODS: dict[str, Any] = {
    **FULL,
    "lora": {"peft_type": "LORA", "r": 4},
    "prompt": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    base = world.llama(folder / "base")
    return world.recipe_file(folder, model=base, data=world.records(folder / "data.jsonl", number=40), methods=METHODS)


@pytest.fixture(autouse=True)
def _short_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("keeptune.stages.plan"), "_PROBE_SECONDS", 0.0)


def planned(path: Path, **overrides: Any) -> stages.PlanOutcome:
    return stages.plan(world.recipe(path, **overrides), context=world.context())


def test_a_plan_says_what_each_method_takes_and_writes_nothing(path: Path) -> None:
    outcome = planned(path)
    full, lora, prompt = outcome.methods
    assert not (path.parent / "run").exists()
    assert outcome.device == "cpu"
    assert full.memory is not None and lora.memory is not None and prompt.memory is not None
    assert (full.memory.gradients, prompt.memory.gradients) == (4 * full.trained_parameters, 4 * 4 * 32)
    assert lora.memory.optimizer > 8 * lora.trained_parameters > prompt.memory.optimizer
    assert full.num_tokens == lora.num_tokens == prompt.num_tokens > 0
    assert all(method.seconds is not None and method.seconds > 0 for method in outcome.methods)
    assert [method.remedy for method in outcome.methods] == [None, None, None]
    assert full.artifact_bytes > 4 * full.trained_parameters > lora.artifact_bytes


def test_a_training_states_its_plan_beside_what_it_measured(path: Path) -> None:
    recipe = world.recipe(path, output_dir=str(path.parent / "trained"), methods=FULL)
    notes = world.Notes()
    with stages.open_run(recipe, context=world.context(notes=notes)) as run:
        stages.train(run)
    value = read_json(run.folder / "full" / "training.json")
    # The data stand prepared now: the plan reads them there.
    (full,) = stages.plan(recipe, context=world.context(notes=notes)).methods
    assert full.memory is not None
    stated, found = value["estimated_memory_bytes"], full.memory.to_json()
    assert [stated[kind] for kind in ("weights", "gradients", "optimizer")] == [
        found[kind] for kind in ("weights", "gradients", "optimizer")
    ]
    assert stated["total"] == sum(stated[kind] for kind in stated if kind != "total")
    assert abs(stated["total"] / value["peak_memory_bytes"] - 1) < 0.15
    assert (value["num_steps"], value["num_train_tokens"]) == (full.num_steps, full.num_tokens)
    assert abs(full.artifact_bytes / value["artifact_bytes"] - 1) < 0.15
    assert sum("rows read" in line or "rows" in line.split() for line in notes.lines) <= 1
    assert any(line.endswith("GB of memory expected at the peak") for line in notes.lines)


def test_a_metric_that_selects_counts_what_its_answers_take(path: Path) -> None:
    by_loss = planned(path, methods=FULL).methods[0].memory
    chosen = {"select_by": "exact_match", "metrics": ["exact_match"], "max_new_tokens": 8}
    by_metric = planned(path, methods=FULL, evaluation=chosen).methods[0].memory
    assert by_loss is not None and by_metric is not None
    assert by_metric.activations >= by_loss.activations


def test_what_does_not_fit_is_told_with_the_setting_that_helps(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = {"methods": FULL, "training.tokens_per_step": 1024, "training.tokens_per_micro_batch": 512}
    small = {**large, "training.tokens_per_micro_batch": 128}
    wide, narrow = (planned(path, **settings).methods[0].memory for settings in (large, small))
    assert wide is not None and narrow is not None
    # The runtime differs a little from one look to the next.
    room = narrow.total + (wide.activations - narrow.activations) // 2
    monkeypatch.setattr(cost, "available_memory_bytes", lambda _: room)
    (full,) = planned(path, **large).methods
    assert full.seconds is None
    assert (full.remedy or "").startswith("full: does not fit; with training.")


def test_what_fits_under_no_setting_is_told_from_a_model_without_weights(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "available_memory_bytes", lambda _: 1_000)
    full, lora, prompt = planned(path).methods
    assert prompt.artifact_bytes > 4 * prompt.trained_parameters
    assert full.remedy == (
        "full: fits with no size of micro-batch. Choose a PEFT method, whose frozen weights have no gradients."
    )
    assert lora.remedy == "lora: fits with no size of micro-batch. Choose a smaller base model."
    assert full.memory is not None and full.memory.weights >= 4 * full.total_parameters
    assert full.seconds is None


def test_a_prefix_that_does_not_fit_is_not_told_to_recompute(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "available_memory_bytes", lambda _: 1_000)
    prefix = {"prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}}
    # The weights are there, as quantised ones always are: what cannot be computed would be an error.
    monkeypatch.setattr(import_module("keeptune.stages.plan"), "_ROOM_FACTOR", 0)
    (planned_prefix,) = planned(path, methods=prefix).methods
    assert planned_prefix.remedy == "prefix: fits with no size of micro-batch. Choose a smaller base model."


def test_the_table_shows_kinds_times_and_remedies(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "available_memory_bytes", lambda _: 1_000)
    console = Console(record=True, width=160, file=io.StringIO())
    outcome = planned(path, methods=FULL)
    terminal_plan.show_plan(console, outcome)
    text = console.export_text()
    for word in ("weights", "gradients", "optimizer", "activations", "runtime", "total", "time", "artifact"):
        assert word in text
    assert "Available: 1.00 kB." in text
    assert "full: fits with no size of micro-batch." in text
    assert "xa0" not in text
    assert terminal_plan.plan_lines(outcome)[0].endswith("; does not fit")


def test_the_command_prints_one_line_a_method_when_quiet(path: Path, keeptune: world.Keeptune) -> None:
    result = keeptune("plan", path, "--quiet", "--set", "methods={full: {learning_rate: 1.0e-3}}")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("full: ") and result.stdout.count("\n") == 1
    assert " of memory, " in result.stdout and " steps, about " in result.stdout
    assert not (path.parent / "run").exists()
