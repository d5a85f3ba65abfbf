"""Tasks of lm-evaluation-harness as retention suites: divided, asked, paired and certified like any other."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from keeptune import stages
from keeptune.config import Recipe, load_recipe
from keeptune.errors import DataError, RecipeError
from keeptune.stages.budgets import budgets_of
from tests.evaluation.harness_tasks import colours, task, writing
from tests.stages.world import Notes, context, llama, recipe_file, records, t5

LONG = "In which of the nine boxes that stand below the old stair of the house lies the green stone of the king?"
REASON = "lm-evaluation-harness is an extra (keeptune[harness])"
lm_eval = pytest.importorskip("lm_eval", reason=REASON)
pytest.importorskip("lm_eval.tasks", reason=REASON)


@dataclass(frozen=True)
class Made:
    """A finished run, its recipe's file and what it said."""

    recipe: Recipe
    folder: Path
    notes: list[str]

    def answers(self, place: str) -> list[dict[str, Any]]:
        """Return the answers in a folder of the run."""
        lines = (self.folder / place / "samples.jsonl").read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line]

    def documents(self, part: str) -> list[dict[str, Any]]:
        """Return the documents of a part."""
        lines = (self.folder / "harness" / f"{part}.jsonl").read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line]

    def object(self, name: str) -> Any:
        """Return a JSON file of the run."""
        return json.loads((self.folder / name).read_text(encoding="utf-8"))


def known_to(base: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return questions whose right answer is what the base model says."""
    from keeptune.model.load import load_model, load_tokenizer

    model, tokenizer = load_model(base, device=torch.device("cpu"), dtype=torch.float32), load_tokenizer(base)
    for row in rows:
        prompt, values = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"], []
        for choice in row["choices"]:
            ids = torch.tensor([[*prompt, *tokenizer(f" {choice}")["input_ids"]]])
            logs = model(ids).logits[0, :-1].log_softmax(-1).detach()
            values.append(sum(logs[i - 1, ids[0, i]].item() for i in range(len(prompt), ids.shape[1])))
        row["label"] = values.index(max(values))
    return rows


def written_recipe(folder: Path, *, model: Path, tasks: list[str], **retention: Any) -> Recipe:
    harness = {"tasks": tasks, "include_path": str(folder / "tasks")}
    path = recipe_file(
        folder,
        model=model,
        data=records(folder / "a.jsonl", number=40),
        methods={"full": {"learning_rate": 1e-3}},
        retention={"self_texts": 0, "harness": harness, "alphas": [0.5, 1.0], **retention},
        evaluation={"metrics": ["exact_match"], "max_new_tokens": 8, "baselines": ["zero-shot"]},
    )
    return load_recipe(path)


def train_on(recipe: Recipe, text: str) -> None:
    """Add records that hold the text, each in other company, so that some are for training."""
    generator, path = random.Random(1), recipe.data.tasks[0].path
    assert isinstance(path, str)
    with Path(path).open("a", encoding="utf-8") as file:
        for _ in range(6):
            company = " ".join(f"w{generator.randrange(10**6)}" for _ in range(30))
            file.write(json.dumps({"prompt": f"{text} {company}", "completion": "red"}) + "\n")


def finished(recipe: Recipe) -> Made:
    notes = Notes()
    with stages.open_run(recipe, context=context(notes=notes)) as run:
        data = stages.prepare(run)
        harness = stages.write_harness(run, data)
        stages.check_budgets(run, data, None, harness=harness)
        stages.train(run, data=data)
        if stages.evaluate(run, data=data, harness=harness) is None:
            stages.certify(run, data=data)
        stages.report(run)
    return Made(recipe, run.folder, notes.lines)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Made:
    folder = tmp_path_factory.mktemp("harness")
    (folder / "tasks").mkdir()
    rows: Any = colours(90)
    # Each of the first ten questions stands there again with other choices.
    again = [{**row, "choices": row["choices"][::-1]} for row in rows[:10]]
    task(folder / "tasks", "colours", rows=known_to(model, [*rows, *again]))
    writing(folder / "tasks", "words", rows=colours(10, seed=5))
    budget = {"colours": "90 points"}
    return finished(written_recipe(folder, model=model, tasks=["colours", "words"], budget=budget, confidence=0.8))


@pytest.fixture
def copied(made: Made, tmp_path: Path) -> Iterator[Made]:
    folder = tmp_path / "run"
    shutil.copytree(made.folder, folder)
    yield Made(made.recipe.model_copy(update={"output_dir": str(folder)}), folder, made.notes)


def test_every_document_is_accounted_for_and_stands_in_one_part(made: Made) -> None:
    for facts in made.object("harness/audit.json").values():
        assert facts["num_read"] == sum(facts["parts"].values()) + sum(facts["dropped"].values())
    ids = {part: {row["id"] for row in made.documents(part)} for part in ("certify", "test")}
    assert all(ids.values())
    assert sum(map(len, ids.values())) == len(set.union(*ids.values())) == 110
    assert {row["suite"] for row in made.documents("certify")} == {"colours"}


def test_documents_of_one_input_stand_in_one_part_and_one_cluster(made: Made) -> None:
    parts: dict[str, set[str]] = {}
    for part in ("certify", "test"):
        for row in made.documents(part):
            parts.setdefault(row["prompt"], set()).add(part)
    assert all(len(found) == 1 for found in parts.values())
    answers = made.answers("base/harness")
    clusters = {answer["cluster"] for answer in answers if answer["task"] == "colours"}
    assert len(clusters) < len([answer for answer in answers if answer["task"] == "colours"])


def test_a_document_keeps_its_part_when_rows_move_and_unrelated_ones_come(made: Made, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    path = Path(made.recipe.retention.harness.include_path or "") / "colours.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    random.Random(3).shuffle(rows)
    task(tmp_path / "tasks", "colours", rows=[*colours(7, seed=99), *rows])
    budget = {"colours": "90 points"}
    other = written_recipe(tmp_path, model=Path(made.recipe.model), tasks=["colours"], budget=budget, confidence=0.8)
    with stages.open_run(other, context=context()) as run:
        stages.write_harness(run, stages.prepare(run))
    for part in ("certify", "test"):
        lines = (Path(other.output_dir) / "harness" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        now = {json.loads(line)["id"] for line in lines}
        assert {row["id"] for row in made.documents(part) if row["suite"] == "colours"} <= now


def test_what_was_lost_is_the_paired_difference_of_the_answers(made: Made) -> None:
    before, after = (
        {a["id"]: a["metrics"]["acc"] for a in made.answers(place) if a["task"] == "colours"}
        for place in ("base/harness", "full/harness")
    )
    assert before.keys() == after.keys()
    rows = made.object("forgetting.json")["rows"]
    row = next(r for r in rows if (r["suite"], r["alpha"]) == ("colours", 1.0))
    assert row["metric"] == "acc" and row["base"] == 1.0
    assert row["forgetting"] == pytest.approx(sum(before[i] - after[i] for i in before) / len(before))
    assert row["num_lost"] == sum(before[i] > after[i] for i in before) > 0
    assert row["num_gained"] == 0


def test_base_and_tuned_read_the_same_prompts(made: Made) -> None:
    hashes = {
        made.object(f"{place}/scores.json")["prompt_sha256"]
        for place in ("base/harness", "full/harness", "full/path/0.5/harness")
    }
    assert len(hashes) == 1


def test_chance_is_one_in_as_many_as_there_are_choices(made: Made) -> None:
    audit = made.object("harness/audit.json")
    assert audit["colours"]["chance"] == 0.25 and audit["words"]["chance"] == 0.0
    row = next(r for r in made.object("forgetting.json")["rows"] if r["suite"] == "colours")
    assert row["chance"] >= 0.25


def test_no_harness_suite_stands_among_the_others(made: Made) -> None:
    assert {row["suite"] for row in made.object("forgetting.json")["rows"]} == {"colours", "words"}


def test_a_budget_by_the_suite_s_name_is_certified_and_opened_once(made: Made) -> None:
    found = made.object("certificate.json")
    assert found["verdict"] == "CERTIFIED"
    assert {(cell["suite"], cell["budget"]["metric"]) for cell in found["cells"]} == {("colours", "acc")}
    assert found["items"] == {"colours": len(made.documents("certify"))}
    certified = {row["id"] for row in made.documents("certify")}
    assert {answer["id"] for answer in made.answers("base/harness")}.isdisjoint(certified)
    assert len((made.folder / "certify_openings.jsonl").read_text(encoding="utf-8").splitlines()) == 1


def test_the_report_shows_the_suite(made: Made) -> None:
    page = (made.folder / "report.html").read_text(encoding="utf-8")
    assert "colours" in page and "Accuracy" in page


def test_a_run_that_is_given_again_asks_nothing(copied: Made) -> None:
    before = {path: path.stat().st_mtime_ns for path in copied.folder.rglob("samples.jsonl")}
    with stages.open_run(copied.recipe, context=context()) as run:
        stages.evaluate(run)
        stages.certify(run)
    assert {path: path.stat().st_mtime_ns for path in copied.folder.rglob("samples.jsonl")} == before


def test_other_documents_under_the_same_task_are_refused(copied: Made, tmp_path: Path) -> None:
    shutil.rmtree(copied.folder / "base" / "harness")
    original = Path(copied.recipe.retention.harness.include_path or "")
    kept = (original / "colours.jsonl").read_bytes()
    try:
        (original / "colours.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in colours(100, seed=8)), encoding="utf-8"
        )
        with (
            stages.open_run(copied.recipe, context=context()) as run,
            pytest.raises(DataError, match="documents that the harness no longer has.*of 'colours'; expected those"),
        ):
            stages.evaluate(run)
    finally:
        (original / "colours.jsonl").write_bytes(kept)


def test_documents_that_overlap_with_train_are_left_out_and_counted(tmp_path: Path, model: Path) -> None:
    (tmp_path / "tasks").mkdir()
    rows = colours(12)
    rows[0]["question"] = LONG
    task(tmp_path / "tasks", "colours", rows=[*rows, rows[3]])
    recipe = written_recipe(tmp_path, model=model, tasks=["colours"])
    train_on(recipe, LONG)
    with stages.open_run(recipe, context=context()) as run:
        harness = stages.write_harness(run, stages.prepare(run))
    assert harness is not None
    audit = harness.audit["colours"]
    assert audit["dropped"] == {"leak": 1, "exact_duplicate": 1} and audit["parts"] == {"test": 11}


def test_a_task_of_which_all_documents_overlap_with_train_is_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "tasks").mkdir()
    task(tmp_path / "tasks", "colours", rows=[{**colours(1)[0], "question": LONG}])
    recipe = written_recipe(tmp_path, model=model, tasks=["colours"])
    train_on(recipe, LONG)
    with (
        stages.open_run(recipe, context=context()) as run,
        pytest.raises(DataError, match=r"found no document of 'colours' to report on \(1 read; dropped: 1 leak\)"),
    ):
        stages.write_harness(run, stages.prepare(run))


def test_at_most_max_records_are_kept(tmp_path: Path, model: Path) -> None:
    (tmp_path / "tasks").mkdir()
    task(tmp_path / "tasks", "colours", rows=colours(20))
    recipe = written_recipe(tmp_path, model=model, tasks=["colours"])
    fields = recipe.retention.harness.model_copy(update={"max_records": 8})
    retention = recipe.retention.model_copy(update={"harness": fields})
    with stages.open_run(recipe.model_copy(update={"retention": retention}), context=context()) as run:
        harness = stages.write_harness(run, stages.prepare(run))
    assert harness is not None and harness.audit["colours"]["parts"] == {"test": 8}
    assert harness.audit["colours"]["dropped"] == {"max_records": 12}


def test_too_few_documents_are_refused_before_training_with_the_number_that_would_do(
    tmp_path: Path, model: Path
) -> None:
    (tmp_path / "tasks").mkdir()
    task(tmp_path / "tasks", "colours", rows=colours(20))
    recipe = written_recipe(tmp_path, model=model, tasks=["colours"], budget={"colours": "2 points"})
    with stages.open_run(recipe, context=context()) as run:
        data = stages.prepare(run)
        harness = stages.write_harness(run, data)
        with pytest.raises(RecipeError, match=r"budget\.colours: found \d+ records to certify on; expected at least"):
            stages.check_budgets(run, data, None, harness=harness)


def test_a_budget_in_another_metric_or_in_nats_is_refused(made: Made) -> None:
    with stages.open_run(made.recipe, context=context()) as run:
        harness = stages.write_harness(run, stages.prepare(run))
    for text, found in (
        ("2 points of exact_match", "found exact_match, which is not measured; expected one of acc"),
        ("0.02 nats", "found loss, which is not measured; expected one of acc"),
    ):
        retention = made.recipe.retention.model_copy(update={"budget": {"colours": text}})
        with pytest.raises(RecipeError, match=found):
            budgets_of(made.recipe.model_copy(update={"retention": retention}), harness=harness)


def test_a_chat_template_for_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    task(tmp_path / "tasks", "colours")
    recipe = written_recipe(tmp_path, model=t5(tmp_path / "t5"), tasks=["colours"])
    fields = recipe.retention.harness.model_copy(update={"apply_chat_template": True})
    retention = recipe.retention.model_copy(update={"harness": fields})
    with (
        stages.open_run(recipe.model_copy(update={"retention": retention}), context=context()) as run,
        pytest.raises(RecipeError, match="found true with an encoder-decoder, which reads prompts without turns"),
    ):
        stages.write_harness(run, stages.prepare(run))
