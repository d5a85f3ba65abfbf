"""A recipe of several tasks: what an epoch shows of each, what is said of it, and what stays as it was without."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from keeptune import stages
from keeptune.data.record import REPLAY
from keeptune.errors import FolderInUseError, StorageError
from keeptune.recipe_text import read_yaml, write_yaml
from keeptune.stages.data import _data_key, source_hashes  # pyright: ignore[reportPrivateUsage]
from keeptune.stages.mixture import idle_temperature, train_examples
from keeptune.stages.training import method_of, training_key
from keeptune.storage import read_json, write_sealed_text
from keeptune.text.mixture import Share, epoch_positions, first_epoch
from tests.stages import world
from tests.training.tiny import read_events

torch.set_num_threads(1)
FULL: dict[str, Any] = {"full": {"learning_rate": 1e-3}}


def write(folder: Path, *, mixture: object, base: Path, **sections: Any) -> Path:
    """Write a recipe of a large task, a small one in two files, and one that is not trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    large = world.records(folder / "large.jsonl", number=60, seed=1)
    for i in (1, 2):
        world.records(folder / f"small_{i}.jsonl", number=8, seed=1 + i)
    other = world.records(folder / "other.jsonl", number=8, seed=4)
    tasks = [
        {"path": str(large)},
        {"path": str(folder / "small_*.jsonl")},
        {"path": str(other), "train": False},
    ]
    data = {"tasks": tasks, "validation_fraction": 0.2, "test_fraction": 0.2, "leaks": "keep", "mixture": mixture}
    path = world.recipe_file(folder, model=base, data=large, **{"methods": FULL, **sections})
    path.write_text(json.dumps({**json.loads(path.read_text()), "data": data}))
    return path


def trained(path: Path, **overrides: Any) -> tuple[Path, world.Notes]:
    notes = world.Notes()
    with stages.open_run(world.recipe(path, **overrides), context=world.context(notes=notes)) as run:
        stages.train(run)
    return run.folder, notes


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.llama(tmp_path_factory.mktemp("mixture") / "base")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[Path, Path, world.Notes]:
    path = write(tmp_path_factory.mktemp("mixture"), mixture={"weights": {"large": 1, "small": 3}}, base=base)
    return path, *trained(path)


def test_an_epoch_shows_each_task_by_its_weight_and_every_place_says_so(
    done: tuple[Path, Path, world.Notes],
) -> None:
    _, run, notes = done
    counts = read_json(run / "data" / "audit.json")["tasks"]
    large, small = counts["large"]["train"], counts["small"]["train"]
    assert large > 30 and 4 < small < 16 and counts["other"]["train"] == 0
    of_large, of_small = round((large + small) / 4), round(3 * (large + small) / 4)
    facts = read_json(run / "full" / "training.json")
    expected = [
        {"source": "large", "num_examples": large, "num_per_epoch": of_large, "num_repeats": 0},
        {"source": "small", "num_examples": small, "num_per_epoch": of_small, "num_repeats": of_small - small},
    ]
    never_shown = [max(0, large - 2 * of_large), 0]
    assert facts["mixture"] == [
        {**row, "num_never_shown": number} for row, number in zip(expected, never_shown, strict=True)
    ]
    (event,) = [event for event in read_events(run / "full") if event["event"] == "run"]
    assert [(s["source"], s["num_per_epoch"]) for s in event["mixture"]] == [("large", of_large), ("small", of_small)]
    assert event["num_examples"] == of_large + of_small
    line = f"full: examples of an epoch, of those that there are: large {of_large} of {large}, small {of_small} of"
    assert any(said.startswith(line) for said in notes.lines)


def test_what_is_trained_on_is_what_the_epochs_show(done: tuple[Path, Path, world.Notes]) -> None:
    path, run, _ = done
    facts = read_json(run / "full" / "training.json")
    with stages.open_run(world.recipe(path), context=world.context()) as opened:
        data = stages.prepare(opened)
        table = train_examples(opened.recipe, data)
        records = {record.id: record for record in data.records("train")}
    epochs = [epoch_positions(table, epoch) for epoch in (0, 1)]
    assert facts["num_train_tokens"] == sum(int(table.lengths[positions].sum()) for positions in epochs)
    for positions in epochs:
        tasks = [records[table.record_ids[int(i)]].task for i in positions]
        assert [tasks.count(row["source"]) for row in facts["mixture"]] == [
            row["num_per_epoch"] for row in facts["mixture"]
        ]
    origins = {Path(record.origin).name.split(":")[0] for record in records.values()}
    assert origins == {"large.jsonl", "small_1.jsonl", "small_2.jsonl"}


def test_the_tasks_of_the_same_data_are_read_once(done: tuple[Path, Path, world.Notes]) -> None:
    path, run, _ = done
    train, aside = run / "data" / "train.jsonl", run / "train.jsonl"
    with stages.open_run(world.recipe(path), context=world.context()) as opened:
        data = stages.prepare(opened)
        expected = [epoch_positions(train_examples(opened.recipe, data), epoch).tolist() for epoch in (0, 1)]
        train.rename(aside)
        again = train_examples(opened.recipe, data)
        with pytest.raises(StorageError, match=r"train\.jsonl: no such file"):
            train_examples(opened.recipe, replace(data, key="other"))
        aside.rename(train)
    assert [epoch_positions(again, epoch).tolist() for epoch in (0, 1)] == expected


def test_check_and_plan_know_the_steps_of_a_mixture(
    done: tuple[Path, Path, world.Notes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run, _ = done
    monkeypatch.setattr(import_module("keeptune.stages.plan"), "_PROBE_SECONDS", 0.0)
    facts = read_json(run / "full" / "training.json")
    (planned,) = stages.plan(world.recipe(path), context=world.context()).methods
    assert planned.num_steps == facts["num_steps"]
    first = read_events(run / "full")[0]["num_tokens"]
    assert planned.num_tokens == 2 * first
    outcome = stages.check(world.recipe(path), context=world.context(), num_shown=0)
    shown = [{"source": share.source, "num_per_epoch": share.num_per_epoch} for share in outcome.mixture]
    assert shown == [{key: row[key] for key in ("source", "num_per_epoch")} for row in facts["mixture"]]
    (checked,) = outcome.methods
    assert abs(checked.num_steps - facts["num_steps"]) <= 1
    # Of a cap of two records a task, an epoch has four.
    small = {"data.mixture": {"cap": 2}}
    (checked,) = stages.check(world.recipe(path, **small), context=world.context(), num_shown=0).methods
    (planned,) = stages.plan(world.recipe(path, **small), context=world.context()).methods
    assert (checked.num_steps, planned.num_steps) == (2, 2) and planned.num_tokens < facts["num_train_tokens"] / 5


def test_a_temperature_without_effect_is_said(done: tuple[Path, Path, world.Notes]) -> None:
    recipe = world.recipe(done[0], **{"data.mixture": {"cap": 5, "temperature": 2}})
    said = "data.mixture.temperature has no effect: every task has 5 train records or more, the cap, so that all parts "
    assert idle_temperature(recipe, [Share("a", 5, 5), Share("b", 900, 5), Share(REPLAY, 3, 3)]) == f"{said}are equal"
    assert idle_temperature(recipe, [Share("a", 4, 4), Share("b", 900, 5)]) == ""
    for mixture in (None, "equal", {"cap": 5}, {"temperature": 2}):
        other = world.recipe(done[0], **{"data.mixture": mixture})
        assert idle_temperature(other, [Share("a", 5, 5), Share("b", 900, 5)]) == ""


def test_validation_is_scored_task_by_task(done: tuple[Path, Path, world.Notes]) -> None:
    _, run, notes = done
    facts = read_json(run / "full" / "training.json")
    counts = read_json(run / "data" / "audit.json")["tasks"]
    scores = {score["task"]: score for score in facts["validation_scores"]}
    assert {task: score["num_records"] for task, score in scores.items()} == {
        task: counts[task]["validation"] for task in ("large", "small")
    }
    mean = sum(score["mean"] for score in scores.values()) / 2
    assert facts["validation_macro"]["mean"] == pytest.approx(mean)
    # Every completion is one word: the loss over all is between the tasks'.
    assert min(s["mean"] for s in scores.values()) <= facts["best_value"] <= max(s["mean"] for s in scores.values())
    assert any(said.endswith(f"mean of the tasks {mean:.3f}") for said in notes.lines)


def test_a_mixture_decides_weights_and_no_splits(done: tuple[Path, Path, world.Notes]) -> None:
    path, run, _ = done
    before = {file: file.read_bytes() for file in (run / "data").rglob("*") if file.is_file()}
    with pytest.raises(
        FolderInUseError, match=r"\(data\.mixture was \{'temperature': 1\.0, 'weights'.*, now 'equal'\)"
    ):
        trained(path, **{"data.mixture": "equal"})
    keys = set()
    with stages.open_run(world.recipe(path), context=world.context()) as opened:
        data = stages.prepare(opened)
        for mixture in ("equal", {"cap": 5}, {"cap": 5, "temperature": 2}, None):
            recipe = world.recipe(path, **{"data.mixture": mixture})
            keys.add(training_key(recipe, data, method_of(recipe, "full")))
            assert _data_key(recipe, data.base, sources=source_hashes(recipe)) == data.key
    assert len(keys) == 4
    assert before == {file: file.read_bytes() for file in (run / "data").rglob("*") if file.is_file()}


def test_a_recipe_without_a_mixture_goes_on_in_a_folder_from_before_there_was_one(tmp_path: Path, base: Path) -> None:
    path = write(tmp_path, mixture=None, base=base)
    run, _ = trained(path)
    facts = read_json(run / "full" / "training.json")
    assert "mixture" not in facts and "mixture" not in read_events(run / "full")[0]
    train = read_json(run / "data" / "audit.json")["splits"]["train"]
    assert read_events(run / "full")[0]["num_examples"] == train
    old = read_yaml(run / "recipe.yaml")
    del old["data"]["mixture"]
    write_sealed_text(run / "recipe.yaml", write_yaml(old))
    _, notes = trained(path)
    assert any("trained before and unchanged" in line for line in notes.lines)


def test_replay_beside_a_mixture_keeps_its_share_of_tokens(tmp_path: Path, base: Path) -> None:
    from tests.stages.test_keep import texts

    methods = {"lora": {"peft_type": "LORA", "r": 4, "learning_rate": 1e-2, "replay_fraction": 0.3}}
    path = write(tmp_path, mixture={"cap": 10, "temperature": 3}, base=base, methods=methods)
    with stages.open_run(world.recipe(path), context=world.context()) as run:
        stages.train(run, texts=texts())
        table = train_examples(run.recipe, stages.prepare(run))
    facts = read_json(run.folder / "lora" / "training.json")
    task_tokens = int(first_epoch(table).lengths.sum())
    # Within one text of nine tokens.
    assert 0 <= facts["replay_tokens"] - 0.3 / 0.7 * task_tokens < 9
    replay = facts["mixture"][-1]
    assert (replay["source"], replay["num_examples"]) == ("(replay)", 5)
    assert replay["num_per_epoch"] * 9 == facts["replay_tokens"]


def test_a_whole_run_of_a_mixture_reports_it(tmp_path: Path, base: Path) -> None:
    path = write(tmp_path, mixture="equal", base=base, training={"num_train_epochs": 1, "tokens_per_step": 256})
    with stages.open_run(world.recipe(path), context=world.context()) as run:
        data = stages.prepare(run)
        stages.train(run, data=data)
        stages.evaluate(run, data=data)
        stages.report(run)
    value = json.loads((run.folder / "report.json").read_text(encoding="utf-8"))
    of_task = {(s["model"], s["task"]): s["mean"] for s in value["scores"] if s["metric"] == "rougeL"}
    macro = {(m["model"], m["tasks"]): m for m in value["macro_scores"] if m["metric"] == "rougeL"}
    assert set(macro) == {("base", "all"), ("full", "all")}
    for model in ("base", "full"):
        mean = (of_task[model, "large"] + of_task[model, "small"]) / 2
        assert macro[model, "all"]["mean"] == pytest.approx(mean)
    large, small = value["mixture"]
    half = round((large["num_examples"] + small["num_examples"]) / 2)
    assert large["num_per_epoch"] == small["num_per_epoch"] == half
