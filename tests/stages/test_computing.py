"""A run's device and number formats: what the recipe asks of them, and what they are part of."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from keeptune import stages
from keeptune.errors import DataError
from keeptune.model.path import moves_own_weights
from keeptune.stages.computing import policy_of
from keeptune.stages.data import prepare
from keeptune.stages.methods import method_of
from keeptune.stages.training import training_key
from keeptune.terminal_check import show_check
from tests.stages import world

LORA = {"lora": {"peft_type": "LORA", "r": 4}}
FULL: dict[str, Any] = {"full": {}}
HEAD = {"lora": {"peft_type": "LORA", "r": 4, "modules_to_save": ["lm_head"]}}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("computing")
    base = world.llama(folder / "base")
    data = world.records(folder / "data.jsonl", number=20)
    return world.recipe_file(folder, model=base, data=data, device="auto")


@pytest.mark.parametrize(
    ("peft_type", "arguments", "expected"),
    [
        (None, {}, True),
        ("LN_TUNING", {}, True),
        ("TRAINABLE_TOKENS", {"token_indices": [1]}, True),
        ("LORA", {"bias": "all"}, True),
        ("LORA", {"trainable_token_indices": [1]}, True),
        ("LORA", {"bias": "none", "modules_to_save": None, "use_dora": True}, False),
        ("IA3", {}, False),
    ],
)
def test_methods_that_train_the_base_models_own_weights_are_known(
    peft_type: str | None, arguments: dict[str, Any], expected: bool
) -> None:
    assert moves_own_weights(peft_type, arguments) is expected


def with_gpu(monkeypatch: pytest.MonkeyPatch, *, name: str, has_bf16: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)


@pytest.mark.parametrize(
    ("methods", "retention", "answering"),
    [
        (FULL, {}, torch.bfloat16),
        (FULL, {"alphas": [1.0]}, torch.bfloat16),
        # Steps between two bf16 models are lost to rounding: at 1e-4 of a weight of 0.02, most of them.
        (FULL, {"alphas": [0.5]}, torch.float32),
        (FULL, {"self_texts": 8, "budget": {"self": "0.1 nats"}}, torch.float32),
        (HEAD, {"alphas": [0.5]}, torch.float32),
        (LORA, {"alphas": [0.5]}, torch.bfloat16),
        ({**LORA, "norms": {"peft_type": "LN_TUNING"}}, {"alphas": [0.5]}, torch.float32),
    ],
)
def test_models_between_base_and_tuned_weights_answer_in_fp32_on_a_gpu_too(
    methods: dict[str, Any],
    retention: dict[str, Any],
    answering: torch.dtype,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_gpu(monkeypatch, name="NVIDIA H200", has_bf16=True)
    policy = policy_of(world.recipe(path, methods=methods, retention={"self_texts": 0, **retention}))
    assert (policy.device.type, policy.compute, policy.answering) == ("cuda", torch.bfloat16, answering)


def test_a_training_begun_on_a_cpu_does_not_go_on_in_another_format_under_its_key(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = world.recipe(path)
    with stages.open_run(recipe, context=world.context()) as run:
        data = prepare(run)
    keys = [training_key(recipe, data, method_of(recipe, "full"))]
    assert keys[0] == training_key(recipe, data, method_of(recipe, "full"))
    for name, has_bf16 in (("NVIDIA H200", True), ("Tesla T4", False)):
        with_gpu(monkeypatch, name=name, has_bf16=has_bf16)
        keys.append(training_key(recipe, data, method_of(recipe, "full")))
    assert len(set(keys)) == 3


def test_a_model_that_was_trained_on_another_device_is_not_evaluated_here_and_the_message_says_so(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = world.recipe(path, methods=LORA, output_dir=str(path.parent / "moved"))
    with stages.open_run(recipe, context=world.context()) as run:
        stages.train(run)
        with_gpu(monkeypatch, name="NVIDIA H200", has_bf16=True)
        with pytest.raises(DataError, match="found a model trained on cpu in float32; expected cuda in bfloat16"):
            stages.evaluate(run)


def test_a_check_says_where_training_will_compute_and_why(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = world.recipe(path, methods=LORA)
    outcome = stages.check(recipe, context=world.context(), num_shown=1)
    assert outcome.computes_on == policy_of(recipe).why
    with_gpu(monkeypatch, name="Tesla T4", has_bf16=False)
    console = Console(record=True, width=200, file=io.StringIO())
    show_check(console, replace(outcome, computes_on=policy_of(recipe).why))
    expected = "Training will compute on cuda (Tesla T4), fp32, as this GPU has no units for bf16."
    assert expected in console.export_text()
