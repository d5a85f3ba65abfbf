"""What a run forgot, and the certificate: from texts of the base to a verdict and the model that keeps the budget."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keeptune import stages
from keeptune.config import Recipe, load_recipe
from keeptune.errors import DataError, RecipeError
from keeptune.stages.budgets import budgets_of
from keeptune.stages.certify import CERTIFICATE
from keeptune.stages.openings import LEDGER
from keeptune.storage import MANIFEST, file_sha256
from tests.stages.world import Notes, context, llama, recipe_file, records

WORDS = ["river", "stone", "walks", "under", "old", "tall", "green", "house", "sings", "far", "near", "bird"]


@dataclass(frozen=True)
class Made:
    """A finished run and what it said."""

    recipe: Recipe
    folder: Path
    certificate: dict[str, Any]
    notes: list[str]


def general_text(path: Path, *, number: int) -> Path:
    generator = random.Random(1)
    texts = [" ".join(generator.choices(WORDS, k=25)) for _ in range(number)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def written_recipe(folder: Path, *, model: Path, **retention: Any) -> Recipe:
    others = records(folder / "others.jsonl", number=60, seed=7)
    path = recipe_file(
        folder,
        model=model,
        data=records(folder / "a.jsonl"),
        methods={"full": {"learning_rate": 1e-3}},
        retention={"self_texts": 60, "text_tokens": 24, "alphas": [0.5, 1.0], **retention},
        evaluation={"metrics": ["exact_match"], "max_new_tokens": 8, "baselines": ["zero-shot"]},
    )
    value = json.loads(path.read_text(encoding="utf-8"))
    value["data"]["tasks"].append({"path": str(others), "name": "others-task", "train": False})
    path.write_text(json.dumps(value), encoding="utf-8")
    return load_recipe(path)


def finished(recipe: Recipe) -> Made:
    notes = Notes()
    with stages.open_run(recipe, context=context(notes=notes)) as run:
        data = stages.prepare(run)
        texts = stages.write_texts(run, data)
        stages.train(run, data=data)
        delivered = stages.evaluate(run, data=data, texts=texts)
        certificate = stages.certify(run, data=data) if delivered is None else None
        stages.report(run)
    value = json.loads(certificate.read_text(encoding="utf-8")) if certificate else {}
    return Made(recipe, run.folder, value, notes.lines)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Made:
    folder = tmp_path_factory.mktemp("certified")
    wiki = general_text(folder / "wiki.jsonl", number=80)
    texts = [{"path": str(wiki), "name": "wiki"}]
    return finished(written_recipe(folder, model=model, texts=texts, budget={"self": "0.9 nats", "wiki": "0.95 nats"}))


@pytest.fixture
def copied(made: Made, tmp_path: Path) -> Iterator[Made]:
    folder = tmp_path / "run"
    shutil.copytree(made.folder, folder)
    yield Made(made.recipe.model_copy(update={"output_dir": str(folder)}), folder, made.certificate, made.notes)


def rows(made: Made) -> list[dict[str, Any]]:
    return json.loads((made.folder / "forgetting.json").read_text(encoding="utf-8"))["rows"]


def texts_of(made: Made, part: str) -> list[dict[str, Any]]:
    lines = (made.folder / "texts" / f"{part}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def test_every_text_is_accounted_for_and_stands_in_one_part(made: Made) -> None:
    audit = json.loads((made.folder / "texts" / "audit.json").read_text(encoding="utf-8"))
    for suite in audit.values():
        assert suite["num_read"] == sum(suite["parts"].values()) + sum(suite["dropped"].values())
    ids = {part: {line["id"] for line in texts_of(made, part)} for part in ("probe", "certify", "test")}
    assert sum(map(len, ids.values())) == len(set.union(*ids.values()))
    assert audit["self"]["parts"] == {"probe": 64, "test": 60, "certify": 60}


def test_what_was_lost_is_the_paired_difference_of_the_answers(made: Made) -> None:
    def losses(folder: str) -> dict[str, tuple[float, int]]:
        # A text may hold line separators that are no ends of lines in JSON lines.
        lines = (made.folder / folder / "samples.jsonl").read_text(encoding="utf-8").split("\n")
        values = [json.loads(line) for line in lines if line]
        return {v["id"]: (v["metrics"]["loss"], v["num_target_tokens"]) for v in values if v["task"] == "self"}

    before, after = losses("base/texts"), losses("full/texts")
    tokens = np.array([n for _, n in before.values()])
    change = np.array([after[id_][0] - loss for id_, (loss, _) in before.items()])
    row = next(r for r in rows(made) if (r["suite"], r["alpha"]) == ("self", 1.0))
    assert row["forgetting"] == pytest.approx(float((change * tokens).sum() / tokens.sum()), abs=1e-9)
    assert row["num_records"] == row["num_clusters"] == 60


def test_the_rise_of_the_loss_on_own_texts_estimates_the_divergence_from_the_base(made: Made) -> None:
    row = next(r for r in rows(made) if (r["suite"], r["alpha"]) == ("self", 1.0))
    assert row["kl"] > 0
    assert row["low"] - 0.02 < row["kl"] < row["high"] + 0.02


def test_less_of_the_way_loses_less(made: Made) -> None:
    found = {r["alpha"]: r["kl"] for r in rows(made) if r["suite"] == "self"}
    assert 0 < found[0.5] < found[1.0]


def test_the_base_answers_itself_again_without_a_change(made: Made) -> None:
    noise = json.loads((made.folder / "forgetting.json").read_text(encoding="utf-8"))["noise"]
    assert noise["num_records"] == 60
    assert noise["num_scores_changed"] == 0 and noise["largest_loss_change"] < 1e-5


def test_a_budget_that_holds_is_certified_and_its_model_delivered(made: Made) -> None:
    found = made.certificate
    assert found["verdict"] == "CERTIFIED"
    assert found["choice"] in ({"candidate": "full", "alpha": 0.5}, {"candidate": "full", "alpha": 1.0})
    assert {cell["suite"] for cell in found["cells"]} == {"self", "wiki"}
    assert found["opening"] == 1 and found["delta"] == pytest.approx(0.04)
    model_folder = made.folder / "instruct-model"
    names = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(found["artifact"]["sha256"]) == {*names, "chat_template.jinja"}
    for name, sha256 in found["artifact"]["sha256"].items():
        assert sha256 == file_sha256(model_folder / name)
    card = (model_folder / "README.md").read_text(encoding="utf-8")
    assert found["sentence"] in card


def test_the_best_certified_model_on_validation_is_chosen(made: Made) -> None:
    certified = made.certificate["certified"]
    best = min(certified, key=lambda choice: choice["validation"])
    assert made.certificate["choice"] == {"candidate": best["candidate"], "alpha": best["alpha"]}


def test_the_same_question_is_not_asked_twice(copied: Made) -> None:
    ledger = (copied.folder / LEDGER).read_text(encoding="utf-8")
    with stages.open_run(copied.recipe, context=context()) as run:
        stages.certify(run)
    assert (copied.folder / LEDGER).read_text(encoding="utf-8") == ledger
    assert len(ledger.splitlines()) == 1


def test_an_interrupted_certification_goes_on_without_another_opening(copied: Made) -> None:
    (copied.folder / CERTIFICATE).unlink()
    with stages.open_run(copied.recipe, context=context()) as run:
        path = stages.certify(run)
    value = json.loads(path.read_text(encoding="utf-8"))
    assert value["opening"] == 1
    assert value["cells"] == copied.certificate["cells"]


def test_another_budget_opens_the_records_again_and_spends_some_of_what_is_left(copied: Made) -> None:
    retention = copied.recipe.retention.model_copy(update={"budget": {"self": "0.8 nats", "wiki": "0.95 nats"}})
    with stages.open_run(copied.recipe.model_copy(update={"retention": retention}), context=context()) as run:
        value = json.loads(stages.certify(run).read_text(encoding="utf-8"))
    assert value["opening"] == 2 and value["delta"] == pytest.approx(0.0025)
    assert len((copied.folder / LEDGER).read_text(encoding="utf-8").splitlines()) == 2


def test_records_of_a_suite_that_stand_beside_new_ones_were_opened_before(copied: Made) -> None:
    retention = copied.recipe.retention.model_copy(update={"self_texts": 62})
    with stages.open_run(copied.recipe.model_copy(update={"retention": retention}), context=context()) as run:
        value = json.loads(stages.certify(run).read_text(encoding="utf-8"))
    assert value["items"]["self"] == 62 and value["opening"] == 2
    lines = [json.loads(line) for line in (copied.folder / LEDGER).read_text(encoding="utf-8").splitlines()]
    assert [line["opening"] for line in lines] == [1, 2]
    assert len({line["certify_sha256"] for line in lines}) == 2
    first, second = (line["records"] for line in lines)
    assert first["wiki"] == second["wiki"] and set(first["self"]) < set(second["self"])


def test_a_budget_too_small_for_the_records_is_refused_by_certify_too(copied: Made) -> None:
    retention = copied.recipe.retention.model_copy(update={"budget": {"self": "0.0001 nats"}, "self_texts": 60})
    recipe = copied.recipe.model_copy(update={"retention": retention})
    with stages.open_run(recipe, context=context()) as run:
        data = stages.prepare(run)
        with pytest.raises(
            RecipeError, match=r"retention\.budget\.self: found 60 records to certify on; expected at least"
        ):
            stages.certify(run, data=data)


def test_too_few_records_are_refused_before_training_with_the_number_that_would_do(tmp_path: Path, model: Path) -> None:
    recipe = written_recipe(tmp_path, model=model, budget={"self": "0.02 nats"})
    with stages.open_run(recipe, context=context()) as run:
        data = stages.prepare(run)
        for refused in (lambda: stages.check_budgets(run, data), lambda: stages.write_texts(run, data)):
            with pytest.raises(RecipeError) as caught:
                refused()
            assert "found 60 records to certify on; expected at least" in str(caught.value)
    assert not (run.folder / "full").exists() and not (run.folder / "texts").exists()


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"wiki": "1 point"}, r"retention\.budget\.wiki: .*expected nats"),
        ({"self": "1 point of exact_match"}, r"retention\.budget\.self: found '1 point of exact_match' for a suite of"),
        ({"others-task": "1 point of bleu"}, r"retention\.budget\.others-task: found bleu, which is not measured"),
    ],
)
def test_a_budget_that_does_not_fit_its_suite_is_refused(
    tmp_path: Path, model: Path, budget: dict[str, str], message: str
) -> None:
    wiki = general_text(tmp_path / "wiki.jsonl", number=20)
    recipe = written_recipe(tmp_path, model=model, texts=[{"path": str(wiki), "name": "wiki"}], budget=budget)
    with pytest.raises(RecipeError, match=message):
        budgets_of(recipe)


def test_a_budget_for_a_suite_that_is_not_there_is_refused_with_the_nearest(tmp_path: Path, model: Path) -> None:
    with pytest.raises(RecipeError, match=r"found 'other-task' in retention\.budget.*Did you mean 'others-task'\?"):
        written_recipe(tmp_path, model=model, budget={"other-task": "1 point"})


def test_certify_without_a_budget_is_refused(copied: Made) -> None:
    retention = copied.recipe.retention.model_copy(update={"budget": {}})
    recipe = copied.recipe.model_copy(update={"retention": retention})
    refused = pytest.raises(DataError, match=r"retention\.budget: found none; expected what each suite may lose")
    with stages.open_run(recipe, context=context()) as run, refused:
        stages.certify(run)


def test_suites_of_chance_are_left_out_and_said(tmp_path: Path, model: Path) -> None:
    budget = {"self": "0.9 nats", "others": "30 points of exact_match"}
    made = finished(written_recipe(tmp_path, model=model, budget=budget))
    assert made.certificate["left_out_at_chance"].keys() == {"others-task", "others"}
    assert made.certificate["budgets"].keys() == {"self"}


def test_the_texts_of_a_suite_stay_when_records_are_added_to_train(made: Made) -> None:
    manifest = json.loads((made.folder / "texts" / MANIFEST).read_text(encoding="utf-8"))
    assert manifest["seed"] == 0


def test_broken_answers_are_counted_for_the_base_and_each_point_on_every_task(made: Made) -> None:
    rows = json.loads((made.folder / "forgetting.json").read_text(encoding="utf-8"))["canaries"]
    places = [("base", None), ("full", 0.5), ("full", 1.0)]
    assert [(row["model"], row["alpha"], row["task"]) for row in rows] == [
        (*place, task) for place in places for task in ("first-word", "others-task")
    ]
