"""Budgets that no model could be shown to keep with the records at hand, and texts that come when they are needed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from keeptune import stages
from keeptune.config import Recipe
from keeptune.errors import RecipeError
from keeptune.retention.budget import Budget
from keeptune.stages.budgets import budget_texts, budgets_of
from keeptune.stages.harness import Harness
from keeptune.storage import write_json
from tests.stages.test_retention import WORDS, general_text, written_recipe
from tests.stages.world import Keeptune, context, llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("command", ["check", "prepare", "run"])
def test_every_budget_without_enough_records_is_refused_before_the_base_is_loaded(
    tmp_path: Path, model: Path, keeptune: Keeptune, command: str
) -> None:
    written_recipe(tmp_path, model=model, budget={"self": "0.02 nats", "others": "2 points of exact_match"})
    for weights in tmp_path.glob("*.safetensors"):
        weights.unlink()
    found = keeptune(command, tmp_path / "recipe.yaml")
    assert found.returncode == 2
    assert "Ready" not in found.stdout
    where = f"{tmp_path / 'recipe.yaml'}: retention.budget."
    self_, others = (line.removeprefix("keeptune: ") for line in found.stderr.splitlines()[-2:])
    assert self_.startswith(f"{where}self: found 60 records to certify on; expected at least 160")
    assert "Set retention.self_texts=160" in self_
    assert others.startswith(f"{where}others: found 28") and "Give the suite more records (60 %" in others
    assert not (tmp_path / "run" / "texts").exists() and not (tmp_path / "run" / "full").exists()


def test_documents_are_counted_before_the_base_writes_its_own_texts(
    tmp_path: Path, model: Path, keeptune: Keeptune
) -> None:
    wiki = general_text(tmp_path / "wiki.jsonl", number=80)
    texts = [{"path": str(wiki), "name": "wiki"}]
    written_recipe(tmp_path, model=model, texts=texts, budget={"wiki": "0.02 nats"})
    for command in ("check", "run"):
        found = keeptune(command, tmp_path / "recipe.yaml")
        assert found.returncode == 2
        assert "retention.budget.wiki: found " in found.stderr and "records to certify on; expected" in found.stderr
        assert "Texts of the base model" not in found.stderr
    assert not (tmp_path / "run" / "texts").exists()


def test_records_of_one_input_count_once(tmp_path: Path, model: Path) -> None:
    recipe = written_recipe(tmp_path, model=model, budget={"others": "20 points of exact_match"})
    generator = random.Random(0)
    prompts = [" ".join(generator.choices(WORDS, k=12)) for _ in range(20)]
    rows = [{"prompt": prompts[i % 20], "completion": f"word {i}"} for i in range(300)]
    (tmp_path / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = recipe.data.model_copy(update={"duplicates": "keep", "leaks": "keep"})
    changed = recipe.model_copy(update={"data": data})
    with stages.open_run(changed, context=context()) as run, pytest.raises(RecipeError) as error:
        stages.check_budgets(run, stages.prepare(run))
    assert "different inputs; expected at least" in str(error.value)
    assert "found 1" in str(error.value) or "found 5" in str(error.value)


def test_a_budget_that_can_be_certified_passes_and_is_ready(tmp_path: Path, model: Path, keeptune: Keeptune) -> None:
    written_recipe(tmp_path, model=model, budget={"self": "0.9 nats", "others": "90 points of exact_match"})
    found = keeptune("check", tmp_path / "recipe.yaml")
    assert found.returncode == 0, found.stderr
    assert "Ready. Next:" in found.stdout.splitlines()[-1]


def contents(recipe: Recipe) -> dict[str, bytes]:
    folder = Path(recipe.output_dir) / "texts"
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


def test_what_training_does_not_read_is_written_later_and_is_the_same(tmp_path: Path, model: Path) -> None:
    made = []
    texts = [{"path": str(general_text(tmp_path / "wiki.jsonl", number=80)), "name": "wiki"}]
    one = written_recipe(tmp_path, model=model, texts=texts, budget={"self": "0.9 nats", "wiki": "0.95 nats"})
    for name in ("at-once", "by-and-by"):
        recipe = one.model_copy(update={"output_dir": str(tmp_path / name)})
        with stages.open_run(recipe, context=context()) as run:
            data = stages.prepare(run)
            if name == "by-and-by":
                early = stages.write_texts(run, data, for_training=True)
                assert early is not None and early.has("probe")
                assert not early.has("test") and not early.has("certify")
                assert early.audit["self"]["parts"] == {"probe": 64}
                before = contents(recipe)
                again = stages.write_texts(run, data, for_training=True)
                assert again == early and contents(recipe) == before
            found = stages.write_texts(run, data)
            assert found is not None and found.audit["self"]["parts"] == {"probe": 64, "test": 60, "certify": 60}
            made.append((found.key, contents(recipe)))
    assert made[0] == made[1]


def test_a_budget_that_is_added_later_changes_no_text_that_is_trained_on(tmp_path: Path, model: Path) -> None:
    hashes, parts = set(), []
    for name, budget in (("without", {}), ("with", {"self": "0.9 nats"})):
        (tmp_path / name).mkdir()
        recipe = written_recipe(tmp_path / name, model=model, replay="self", budget=budget)
        full = recipe.methods["full"].model_copy(update={"replay_fraction": 0.1})
        recipe = recipe.model_copy(update={"methods": {"full": full}})
        with stages.open_run(recipe, context=context()) as run:
            data = stages.prepare(run)
            texts = stages.write_texts(run, data)
            assert texts is not None
            kept = stages.keep_texts(recipe, data, texts)
            assert kept is not None
            parts.append([*texts.audit["self"]["parts"]])
            hashes.add(kept.replay_sha256)
    assert parts == [["probe", "test", "replay"], ["probe", "test", "replay", "certify"]]
    assert len(hashes) == 1


def test_an_evaluation_writes_the_texts_that_a_training_left_out(tmp_path: Path, model: Path) -> None:
    recipe = written_recipe(tmp_path, model=model)
    with stages.open_run(recipe, context=context()) as run:
        data = stages.prepare(run)
        texts = stages.write_texts(run, data, for_training=True)
        stages.train(run, data=data, texts=stages.keep_texts(recipe, data, texts))
        assert not (run.folder / "texts" / "test.jsonl").exists()
        stages.evaluate(run, data=data)
        assert (run.folder / "texts" / "test.jsonl").is_file()
        rows = json.loads((run.folder / "forgetting.json").read_text(encoding="utf-8"))["rows"]
        assert "self" in {row["suite"] for row in rows}


@pytest.mark.parametrize("cola", [False, True])
def test_a_budget_on_a_group_of_the_harness_is_one_on_each_of_its_tasks(tmp_path: Path, cola: bool) -> None:
    harness = {"tasks": ["some-glue"]}
    recipe = written_recipe(tmp_path, model=tmp_path, harness=harness, budget={"some-glue": "2 points"})
    metrics = {"boolq": "acc", "record": "f1"} | ({"cola": "mcc"} if cola else {})
    audit = {suite: {"metric": metric, "group": "some-glue", "parts": {}} for suite, metric in metrics.items()}
    write_json(tmp_path / "audit.json", audit)
    found = Harness(tmp_path, "", ("some-glue",), None)
    if cola:
        with pytest.raises(
            RecipeError, match="found '2 points' for cola, which is judged by mcc; expected a suite with"
        ):
            budgets_of(recipe, harness=found)
        return
    assert budgets_of(recipe, harness=found) == {
        "boolq": Budget(0.02, "points", "acc"), "record": Budget(0.02, "points", "f1")
    }  # fmt: skip
    assert budget_texts(recipe, found) == {"boolq": "2 points", "record": "2 points"}
