"""A recipe whose methods keep what was there: from texts to the run folder, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from keeptune import stages
from keeptune.errors import DataError, FolderInUseError, RecipeError
from keeptune.recipe_text import read_yaml, write_yaml
from keeptune.stages.methods import method_of
from keeptune.stages.run import stage_key
from keeptune.stages.training import training_key
from keeptune.storage import read_json, write_sealed_text
from keeptune.text.tokens import Example
from tests.stages import world
from tests.training.tiny import Table, read_events

torch.set_num_threads(1)
# PEFT itself asks transformers for a deprecated property.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

METHODS: dict[str, Any] = {
    "frozen": {"learning_rate": 1e-3, "frozen_layers": 1, "l2_base": 0.01},
    "kl": {"learning_rate": 1e-3, "replay_fraction": 0.2, "replay_kl": 0.5},
    "lora": {"peft_type": "LORA", "r": 4, "learning_rate": 1e-2, "replay_fraction": 0.3, "replay_kl": 0.1},
    "text": {"peft_type": "LORA", "r": 4, "learning_rate": 1e-2, "replay_fraction": 0.2},
    # Padded: its virtual tokens cannot be packed, while the base model that it learns from can.
    "prompts": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "replay_fraction": 0.2, "replay_kl": 0.1},
}


def general_text(number: int, *, seed: int, length: int = 9) -> Table:
    generator = np.random.default_rng(seed)
    examples = [
        Example(generator.integers(3, 90, length).astype(np.int32), loss_mask=np.arange(length) >= 2)
        for _ in range(number)
    ]
    return Table(tuple(examples), tuple(f"general-{seed}-{i}" for i in range(number)))


def texts(**changed: Any) -> stages.KeepTexts:
    given = stages.KeepTexts(replay=general_text(5, seed=0), probe=general_text(30, seed=1), replay_sha256="ab12")
    return replace(given, **changed)


def write(folder: Path, *, model: Path, methods: dict[str, Any]) -> Path:
    return world.recipe_file(folder, model=model, data=world.records(folder / "data.jsonl", number=40), methods=methods)


def trained(path: Path, given: stages.KeepTexts | None, **overrides: Any) -> tuple[Path, world.Notes]:
    notes = world.Notes()
    with stages.open_run(world.recipe(path, **overrides), context=world.context(notes=notes)) as run:
        stages.train(run, texts=given)
    return run.folder, notes


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, world.Notes]:
    folder = tmp_path_factory.mktemp("keep")
    path = write(folder, model=world.llama(folder / "base"), methods=METHODS)
    run, notes = trained(path, texts())
    return path, run, notes


def test_every_method_says_what_it_kept_and_what_that_cost(done: tuple[Path, Path, world.Notes]) -> None:
    _, run, notes = done
    facts = {name: read_json(run / name / "training.json") for name in METHODS}
    frozen = facts["frozen"]
    assert frozen["trained_parameters"] < frozen["total_parameters"]
    assert (frozen["frozen_layers"], frozen["l2_base"]) == (1, 0.01)
    assert frozen["start_weight_bytes"] == 4 * frozen["trained_parameters"]
    assert any(f"beside it, {frozen['start_weight_bytes']:,} bytes" in line for line in notes.lines)
    train = stages.Data(None, run / "data", "").table("train")  # pyright: ignore[reportArgumentType]
    task_tokens = int(train.lengths.sum())
    for name, fraction in (("kl", 0.2), ("lora", 0.3), ("text", 0.2), ("prompts", 0.2)):
        replay_tokens = facts[name]["replay_tokens"]
        # Within one example of nine tokens.
        assert 0 <= replay_tokens - fraction / (1 - fraction) * task_tokens < 9
        assert facts[name]["replay_repeats"] == replay_tokens // 9 - 5 > 0
        assert facts[name]["num_train_tokens"] == 2 * (task_tokens + replay_tokens)
        (run_event,) = [event for event in read_events(run / name) if event["event"] == "run"]
        assert run_event["num_tokens"] == task_tokens + replay_tokens
        assert any(line.startswith(f"{name}: {replay_tokens:,} tokens of replay in an epoch") for line in notes.lines)
    assert "replay_fraction" not in frozen and "l2_base" not in facts["kl"]
    assert [facts[name].get("replay_kl") for name in METHODS] == [None, 0.5, 0.1, None, 0.1]
    assert facts["prompts"]["layout"] == "padded" and facts["kl"]["layout"] == "packed"


def test_every_method_logs_its_drift_and_the_pull_its_penalty(done: tuple[Path, Path, world.Notes]) -> None:
    _, run, _ = done
    for name in METHODS:
        events, facts = read_events(run / name), read_json(run / name / "training.json")
        drifts = [event for event in events if event["event"] == "drift"]
        assert drifts[-1]["step"] == facts["num_steps"] and len(drifts) == min(10, facts["num_steps"])
        assert all(event["kl"] > 0 for event in drifts[1:])
        assert 0 < facts["drift_probe_tokens"] <= 0.006 * facts["num_train_tokens"]
        assert facts["drift_probe_tokens"] % 9 == 0
        steps = [event for event in events if event["event"] == "step"]
        assert all(("l2_penalty" in event) == (name == "frozen") for event in steps)


def test_frozen_weights_reach_the_artifact_bit_for_bit(done: tuple[Path, Path, world.Notes]) -> None:
    path, run, _ = done
    base = load_file(Path(world.recipe(path).model) / "model.safetensors")
    tuned = load_file(run / "frozen" / "model" / "model.safetensors")
    same = {name for name in base if torch.equal(base[name], tuned[name])}
    assert same == {name for name in base if ".embed_tokens." in name or ".layers.0." in name}


def test_the_same_command_again_trains_nothing_and_other_texts_are_told(
    done: tuple[Path, Path, world.Notes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run, _ = done
    _, notes = trained(path, texts())
    assert [line.rsplit("/", 1)[-1] for line in notes.lines if "trained before and unchanged" in line] == [
        f"{name}: trained before and unchanged" for name in METHODS
    ]
    with stages.open_run(world.recipe(path), context=world.context()) as opened:
        data = stages.prepare(opened)
        keys = {name: read_json(run / name / "training.json")["key"] for name in METHODS}
        for given, same in ((texts(), set(METHODS)), (texts(replay_sha256="cd"), {"frozen"}), (None, {"frozen"})):
            found = {
                name: training_key(opened.recipe, data, method_of(opened.recipe, name), texts=given) for name in METHODS
            }
            assert {name for name in METHODS if found[name] == keys[name]} == same
        monkeypatch.setattr("keeptune.stages.evaluation.keep_texts", lambda *_: texts(replay_sha256="cd"))
        with pytest.raises(DataError, match="found a model trained on other data, settings or base weights"):
            stages.evaluate(opened, data=data)
        monkeypatch.setattr("keeptune.stages.evaluation.keep_texts", lambda *_: texts())
        stages.evaluate(opened, data=data)
    with pytest.raises(FolderInUseError, match=r"methods\.kl\.replay_kl was 0\.5, now 0\.25"):
        trained(path, texts(), **{"methods.kl.replay_kl": 0.25})


def test_a_recipe_without_these_fields_has_the_key_and_the_files_from_before_they_were_there(tmp_path: Path) -> None:
    methods = {"full": {"learning_rate": 1e-3}, "lora": {"peft_type": "LORA", "r": 4, "learning_rate": 1e-2}}
    path = write(tmp_path, model=world.llama(tmp_path / "base"), methods=methods)
    run, _ = trained(path, None)
    facts = read_json(run / "full" / "training.json")
    assert not {"frozen_layers", "l2_base", "replay_fraction", "replay_kl", "start_weight_bytes"} & set(facts)
    assert {event["event"] for event in read_events(run / "full")} == {"run", "step", "validation", "finished"}
    # A recipe as it was written then, in the run folder of that time.
    old = read_yaml(run / "recipe.yaml")
    for fields in old["methods"].values():
        for name in ("frozen_layers", "l2_base", "replay_fraction", "replay_kl"):
            del fields[name]
    write_sealed_text(run / "recipe.yaml", write_yaml(old))
    _, notes = trained(path, texts(), **{"methods.lora.replay_fraction": 0.0})
    assert sum("trained before and unchanged" in line for line in notes.lines) == 2
    with stages.open_run(world.recipe(path), context=world.context()) as opened:
        data = stages.prepare(opened)
        key = training_key(opened.recipe, data, method_of(opened.recipe, "full"))
        method = {"name": "full", "peft_type": None, "learning_rate": 1e-3, "arguments": {}}
        evaluation = opened.recipe.evaluation
        assert key == stage_key(
            data=data.key,
            weights=data.base.facts.sha256,
            method=method,
            training=opened.recipe.training.model_dump(mode="json", exclude={"save_steps"}),
            chooses={"select_by": evaluation.select_by},
            seed=0,
            device="cpu",
        )


def test_replay_without_texts_is_refused_for_every_method_before_any_data_are_prepared(tmp_path: Path) -> None:
    methods = {"kl": METHODS["kl"], "lora": METHODS["lora"], "full": {}}
    path = write(tmp_path, model=world.llama(tmp_path / "base"), methods=methods)
    for given in (None, texts(replay=None)):
        with pytest.raises(RecipeError) as caught:
            trained(path, given)
        assert str(caught.value).splitlines() == [
            f"methods.{name}.replay_fraction: found {fraction} and no text to replay; expected texts. "
            f"Set methods.{name}.replay_fraction=0."
            for name, fraction in (("kl", 0.2), ("lora", 0.3))
        ]
    assert not (tmp_path / "run" / "data").exists()


def test_too_many_frozen_layers_are_refused_before_any_data_are_prepared(tmp_path: Path) -> None:
    path = write(tmp_path, model=world.llama(tmp_path / "base"), methods={"full": {"frozen_layers": 3}})
    with pytest.raises(RecipeError, match=r"methods\.full\.frozen_layers: found 3; expected at most 2, the number of"):
        stages.check_methods(world.recipe(path))


def test_a_training_too_short_for_a_probe_says_so(tmp_path: Path) -> None:
    path = write(tmp_path, model=world.llama(tmp_path / "base"), methods={"full": {"learning_rate": 1e-3}})
    long = general_text(2, seed=1, length=400)
    run, notes = trained(path, texts(probe=long, replay=None))
    assert "full: too short a training to measure its drift beside it" in notes.lines
    assert "drift" not in {event["event"] for event in read_events(run / "full")}


def test_an_encoder_decoder_learns_from_its_base_too(tmp_path: Path) -> None:
    methods = {
        "kl": {"learning_rate": 1e-3, "replay_fraction": 0.2, "replay_kl": 0.5, "frozen_layers": 1, "l2_base": 0.01},
        "lora": METHODS["lora"],
    }
    path = write(tmp_path, model=world.t5(tmp_path / "base"), methods=methods)
    run, _ = trained(path, texts())
    for name in methods:
        kls = [event["kl"] for event in read_events(run / name) if event["event"] == "drift"]
        assert kls and all(0 <= kl < 1 for kl in kls) and kls[-1] > 0


def test_the_check_counts_the_steps_of_replay(tmp_path: Path) -> None:
    methods = {"full": {}, "lora": {**METHODS["lora"], "replay_fraction": 0.5}}
    path = write(tmp_path, model=world.llama(tmp_path / "base"), methods=methods)
    outcome = stages.check(world.recipe(path), context=world.context(), num_shown=0)
    assert outcome.methods[1].num_steps == 2 * outcome.methods[0].num_steps
