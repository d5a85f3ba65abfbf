"""What would fail after hours fails before training: one record goes through every step of a run first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from keeptune import stages
from keeptune.errors import NonFiniteError, RecipeError
from tests.families import make_family
from tests.stages import world
from tests.tiny import chatml_tokenizer


def family(name: str, folder: Path) -> Path:
    chatml_tokenizer(folder)
    make_family(name).save_pretrained(folder)
    return folder


def written(folder: Path, model: Path, **sections: Any) -> Path:
    sections.setdefault("training", {"num_train_epochs": 1, "tokens_per_step": 256, "tokens_per_micro_batch": 128})
    return world.recipe_file(folder, model=model, data=world.records(folder / "rows.jsonl", number=30), **sections)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_fails_in_saving_fails_before_training(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("these weights share memory")

    path = written(tmp_path, world.llama(tmp_path / "base"))
    broken = "transformers.LlamaForCausalLM.save_pretrained" if method == "full" else "peft.LoraConfig.save_pretrained"
    monkeypatch.setattr(broken, refuse)
    with stages.open_run(world.recipe(path), context=world.context()) as run, pytest.raises(RecipeError) as caught:
        stages.train(run, methods=[method])
    assert str(caught.value).startswith(
        f"methods.{method}: found that saving the model and loading it again fails in a trial with one record "
        "(RuntimeError: these weights share memory); expected it to work."
    )
    assert not (tmp_path / "run" / method / "events.jsonl").exists()


@pytest.mark.parametrize("small", [True, False], ids=["read-anew", "in-place"])
def test_the_dry_run_changes_no_weight(small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keeptune.stages.rehearsal.is_small", lambda _: small)
    path = written(tmp_path, world.llama(tmp_path / "base", dropout=0.3))
    weights = []
    for dry_run in (True, False):
        recipe = world.recipe(path, output_dir=str(tmp_path / f"run-{dry_run}"))
        with stages.open_run(recipe, context=world.context()) as run:
            (folder,) = stages.train(run, methods=["lora"], dry_run=dry_run)
        weights.append((folder / "adapter" / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_the_dry_run_leaves_the_random_state_as_it_was(tmp_path: Path) -> None:
    path = written(tmp_path, world.llama(tmp_path / "base", dropout=0.3))
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    stages.check(world.recipe(path), context=world.context(), num_shown=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_broken_weights_stop_the_check(tmp_path: Path) -> None:
    base = world.llama(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match="found a loss that is not finite"):
        stages.check(world.recipe(written(tmp_path, base)), context=world.context(), num_shown=1)


def test_check_says_that_a_record_went_through_every_step(tmp_path: Path) -> None:
    notes = world.Notes()
    path = written(tmp_path, family("qwen3_moe/router", tmp_path / "base"))
    stages.check(world.recipe(path), context=world.context(notes=notes), num_shown=1)
    assert "Dry run: one record went through every step of 2 methods" in notes.lines


def test_a_bidirectional_model_is_refused_by_check(tmp_path: Path, keeptune: world.Keeptune) -> None:
    path = written(tmp_path, family("bert/bidirectional", tmp_path / "base"))
    found = keeptune("check", path)
    assert found.returncode == 2
    assert "found a BertLMHeadModel that sees the tokens that it is to predict" in found.stderr
    assert "Ready" not in found.stdout


def test_answers_one_by_one_are_said_in_the_log(tmp_path: Path) -> None:
    notes = world.Notes()
    path = written(tmp_path, family("rwkv", tmp_path / "base"), methods={"full": {"learning_rate": 1e-3}})
    with stages.open_run(world.recipe(path), context=world.context(notes=notes)) as run:
        stages.train(run)
    assert any(line.startswith("full: prompts are answered one at a time, because") for line in notes.lines)


def test_code_that_is_not_needed_is_named_and_not_run(tmp_path: Path) -> None:
    base = world.llama(tmp_path / "base")
    LlamaForCausalLM.from_pretrained(base).config.save_pretrained(base)
    config = (base / "config.json").read_text(encoding="utf-8")
    own = '{"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}, '
    (base / "config.json").write_text(own + config.lstrip()[1:], encoding="utf-8")
    (base / "modeling_own.py").write_text("raise SystemExit('run')", encoding="utf-8")
    notes = world.Notes()
    path = written(tmp_path, base, methods={"full": {"learning_rate": 1e-3}})
    with stages.open_run(world.recipe(path), context=world.context(notes=notes)) as run:
        (folder,) = stages.train(run)
    assert any("brings Python code of its own, which is not run" in line for line in notes.lines)
    assert "auto_map" not in (folder / "model" / "config.json").read_text(encoding="utf-8")
