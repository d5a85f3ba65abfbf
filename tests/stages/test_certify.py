"""Verdicts through the stage: trained methods whose certify answers are written down, so that every loss is known."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from keeptune import stages
from keeptune.config import Recipe
from keeptune.errors import DataError, RecipeError
from keeptune.stages.openings import LEDGER
from keeptune.stages.retention import FORGETTING
from keeptune.stages.run import stage_key
from keeptune.storage import read_record, write_jsonl, write_record
from keeptune.terminal import show_certificate
from tests.stages.scripted import TASKS, Scripted, copy_of, every, openings, report_base, trained_run, write_recipe
from tests.stages.world import context


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Scripted:
    return trained_run(tmp_path_factory)


@pytest.fixture
def run(trained: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    return copy_of(trained, tmp_path / "run", patch=monkeypatch)


def left_out(name: str, budget: str = "others", *, metric: str = "exact_match") -> dict[str, Any]:
    suite = name.removesuffix(" of others")
    return {
        "name": name,
        "suite": suite,
        "budget": budget,
        "metric": metric,
        "base": 0.0,
        "chance": 0.0,
        "reason": "chance",
    }


def test_what_changes_nothing_is_certified_to_the_end_of_each_way(run: Scripted) -> None:
    found = run.certified()
    assert found["verdict"] == "CERTIFIED"
    assert [(c["candidate"], c["alpha"]) for c in found["certified"]] == [
        ("full", 0.5), ("full", 1.0), ("lora", 0.5), ("lora", 1.0)
    ]  # fmt: skip
    assert found["fallback"] is None
    assert (run.folder / "instruct-model").is_dir()


def test_a_way_is_walked_up_to_its_first_failure(run: Scripted) -> None:
    run.wrong = {("full at alpha 1", "left"): 60, ("lora at alpha 0.5", "left"): 60}
    found = run.certified()
    assert run.answered == ["base", "full at alpha 0.5", "full at alpha 1", "lora at alpha 0.5"]
    assert found["choice"] == {"candidate": "full", "alpha": 0.5}
    assert json.loads((run.folder / "selection.json").read_text(encoding="utf-8"))["alpha"] == 0.5


def test_a_loss_beyond_the_budget_is_infeasible_and_an_older_model_is_withdrawn(run: Scripted) -> None:
    assert run.certified()["verdict"] == "CERTIFIED"
    every(run, {"left": 70, "right": 70})
    found = run.certified(budget={"others": "19 points of exact_match"})
    assert found["verdict"] == "INFEASIBLE"
    assert "More records would not change that" in found["sentence"]
    assert (found["choice"], found["artifact"], found["num_records_needed"]) == (None, None, None)
    assert not (run.folder / "instruct-model").exists()
    selection = json.loads((run.folder / "selection.json").read_text(encoding="utf-8"))
    assert (selection["selected"], selection["certified"]) == (None, False)


def test_a_loss_too_near_the_budget_is_not_certified_and_the_records_that_would_do_are_named(run: Scripted) -> None:
    assert run.certified()["verdict"] == "CERTIFIED"
    every(run, {"left": 18, "right": 18})
    found = run.certified(budget={"others": "19 points of exact_match"})
    [cell] = [c for c in found["cells"] if c["choice"]["candidate"] == "full"]
    assert found["verdict"] == "NOT CERTIFIED"
    assert cell["measured"]["mean"] < 0.19 < cell["upper_bound"]
    assert found["num_records_needed"] > cell["measured"]["num_records"]
    assert f"About {found['num_records_needed']:,} records would be needed." in found["sentence"]
    assert not (run.folder / "instruct-model").exists()


def test_each_new_question_is_an_opening_that_spends_some_of_what_is_left(run: Scripted) -> None:
    found = [run.certified(budget={"others": f"{points} points of exact_match"}) for points in (20, 19, 18, 20)]
    assert openings(run) == [1, 2, 3]
    assert [f["opening"] for f in found] == [1, 2, 3, 1]
    assert [f["delta"] for f in found] == pytest.approx([0.04, 0.005, 0.0025, 0.04])


def test_a_selection_that_an_interruption_left_behind_is_mended_without_another_opening(run: Scripted) -> None:
    run.certified()
    path = run.folder / "selection.json"
    right = read_record(path)
    write_record(path, {**right, "alpha": 0.123})
    run.certified()
    assert read_record(path) == right
    assert openings(run) == [1]


def test_an_opening_names_the_records_of_each_suite(run: Scripted) -> None:
    run.certified()
    [line] = [json.loads(line) for line in (run.folder / LEDGER).read_text(encoding="utf-8").splitlines()]
    asked = [row["messages"] for row in certify_lines(run) if row["task"] == "left"]
    assert set(line["records"]) == set(TASKS)
    assert line["records"]["left"] == sorted(stage_key(messages=messages)[:16] for messages in asked)


def test_a_verdict_gives_way_to_the_next_one(run: Scripted) -> None:
    every(run, {"left": 70, "right": 70})
    assert run.certified()["verdict"] == "INFEASIBLE"
    run.wrong = {}
    found = run.certified(budget={"others": "25 points of exact_match"})
    assert found["verdict"] == "CERTIFIED" and found["fallback"] is None
    assert (run.folder / "instruct-model").is_dir()


def test_others_leaves_out_tasks_at_chance_and_says_so(run: Scripted) -> None:
    every(run, {"riddles": 8})
    found = run.certified()
    assert found["verdict"] == "CERTIFIED"
    assert {cell["measured"]["mean"] for cell in found["cells"]} == {0.0}
    assert found["left_out_at_chance"] == {"riddles": left_out("riddles")}
    first = "Not certified for riddles: the base model has no exact_match to lose there. "
    assert found["sentence"].startswith(first)
    num_left = sum(1 for line in certify_lines(run) if line["task"] != "riddles")
    assert found["items"] == {"others": num_left}
    card = (run.folder / "instruct-model" / "README.md").read_text(encoding="utf-8")
    assert "Not certified for riddles" in card


def certify_lines(run: Scripted) -> list[dict[str, Any]]:
    lines = (run.folder / "data" / "certify.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def test_where_every_other_task_is_at_chance_there_is_nothing_to_certify(run: Scripted) -> None:
    report_base(run.folder, knows_nothing_of={*TASKS})
    with pytest.raises(DataError, match=r"retention\.budget: found only suites where the base has nothing to lose"):
        run.certified()


def test_tasks_at_chance_that_hide_the_others_leave_the_others_to_certify(run: Scripted) -> None:
    """A mean of all tasks may be at chance where one of them is not."""
    report_base(run.folder, knows_nothing_of={"left", "riddles"})
    found = run.certified()
    assert found["items"] == {"others": sum(line["task"] == "right" for line in certify_lines(run))}


def test_a_budget_in_nats_leaves_out_nothing_since_a_loss_has_no_chance_level(run: Scripted) -> None:
    report_base(run.folder, knows_nothing_of={*TASKS})
    found = run.certified(budget={"others": "0.5 nats of loss"})
    assert (found["verdict"], found["left_out_at_chance"]) == ("CERTIFIED", {})
    assert found["items"] == {"others": len(certify_lines(run))}
    report_base(run.folder, knows_nothing_of={"riddles"})
    found = run.certified(budget={"others": "0.5 nats of loss", "riddles": "20 points of exact_match"})
    assert found["left_out_at_chance"] == {"riddles": left_out("riddles", "riddles")}
    assert found["items"] == {"others": len(certify_lines(run))}


def test_where_each_task_is_at_chance_the_others_have_nothing_to_lose_whatever_their_mean_says(run: Scripted) -> None:
    report_base(run.folder, knows_nothing_of={*TASKS})
    with pytest.raises(DataError, match=r"beyond the budget \(left: .*others: exact_match 0, chance 0\)"):
        run.certified()


def test_what_is_not_evaluated_yet_is_refused_before_anything_is_opened(run: Scripted) -> None:
    path = run.folder / FORGETTING
    write_record(path, {"rows": [{"model": "full"}]})
    with pytest.raises(DataError) as error:
        run.certified()
    assert str(error.value) == (
        f"{path}: found nothing of lora; expected what each method forgot. Run `keeptune evaluate` with this recipe "
        "first, or `keeptune run`."
    )
    path.unlink()
    with pytest.raises(DataError, match="found nothing of full, lora; expected"):
        run.certified()
    (run.folder / "lora" / "training.json").unlink()
    with pytest.raises(DataError, match="lora: found no whole trained model; expected `keeptune train` to have finish"):
        run.certified()
    assert not (run.folder / LEDGER).exists()


def test_other_tasks_left_out_of_the_others_are_another_question(run: Scripted) -> None:
    assert run.certified()["items"] == {"others": sum(line["task"] != "riddles" for line in certify_lines(run))}
    report_base(run.folder, knows_nothing_of={"left", "riddles"})
    assert run.certified()["items"] == {"others": sum(line["task"] == "right" for line in certify_lines(run))}
    assert openings(run) == [1, 2]


def test_longer_answers_are_another_question(run: Scripted) -> None:
    assert run.certified()["opening"] == 1
    evaluation = run.recipe.evaluation.model_copy(update={"max_new_tokens": 9})
    run.recipe = run.recipe.model_copy(update={"evaluation": evaluation})
    assert run.certified()["opening"] == 2


def test_a_delivered_model_that_is_gone_is_delivered_again_without_another_opening(run: Scripted) -> None:
    first = run.certified()
    shutil.rmtree(run.folder / "instruct-model")
    assert run.certified()["artifact"] == first["artifact"]
    assert (run.folder / "instruct-model").is_dir() and openings(run) == [1]


def test_a_task_and_the_others_may_have_a_budget_at_once_and_both_must_hold(run: Scripted) -> None:
    both = {"others": "45 points of exact_match", "left": "25 points of exact_match"}
    run.wrong = {("full at alpha 0.5", "left"): 35, ("lora at alpha 1", "left"): 35}
    found = run.certified(budget=both)
    cells = {(c["choice"]["candidate"], c["choice"]["alpha"], c["suite"]): c for c in found["cells"]}
    assert {suite for _, _, suite in cells} == {"others", "left"}
    # What a task lost counts for it and, with the records of all others, for them.
    alone, together = cells["full", 0.5, "left"], cells["full", 0.5, "others"]
    lost = {c["suite"]: c["measured"]["mean"] * c["measured"]["num_records"] for c in (alone, together)}
    assert lost == pytest.approx({"left": 35, "others": 35})
    assert together["certified"] and not alone["certified"]
    assert [(c["candidate"], c["alpha"]) for c in found["certified"]] == [("lora", 0.5)]


def test_a_task_at_chance_with_a_budget_of_its_own_is_left_out_and_the_rest_is_certified(run: Scripted) -> None:
    found = run.certified(budget={"riddles": "25 points of exact_match", "others": "20 points of exact_match"})
    assert found["left_out_at_chance"] == {
        "riddles": left_out("riddles", "riddles"), "riddles of others": left_out("riddles of others")
    }  # fmt: skip
    assert set(found["budgets"]) == set(found["items"]) == {"others"}


def test_each_suite_is_judged_in_the_metric_of_its_own_budget(run: Scripted) -> None:
    """The recipe's first metric may say nothing of a suite's answers, such as pairs of words of single ones."""
    evaluation = run.recipe.evaluation.model_copy(update={"metrics": ("rouge2", "exact_match")})
    run.recipe = run.recipe.model_copy(update={"evaluation": evaluation})
    report_base(run.folder, knows_nothing_of=set())
    every(run, {"left": 80})
    found = run.certified(budget={"left": "20 points of exact_match", "others": "0.9 nats"})
    assert (found["verdict"], found["left_out_at_chance"]) == ("INFEASIBLE", {})
    assert "on left, and the budget is 0.2 of exact_match" in found["sentence"]
    assert not (run.folder / "instruct-model").exists()


def test_a_task_is_judged_in_the_metric_of_the_others_for_them_and_in_its_own_for_itself(run: Scripted) -> None:
    evaluation = run.recipe.evaluation.model_copy(update={"metrics": ("rouge2", "exact_match")})
    run.recipe = run.recipe.model_copy(update={"evaluation": evaluation})
    report_base(run.folder, knows_nothing_of={"left", "riddles"}, metric="rouge2")
    rows = (run.folder / "base" / "zero-shot" / "samples.jsonl").read_text(encoding="utf-8")
    write_jsonl(
        run.folder / "base" / "zero-shot" / "samples.jsonl",
        [
            {**row, "metrics": {**row["metrics"], "rouge2": float(row["task"] == "right")}}
            for row in map(json.loads, rows.splitlines())
        ],
    )
    every(run, {"left": 80})
    found = run.certified(budget={"others": "20 points of rouge2", "left": "20 points of exact_match"})
    assert found["left_out_at_chance"].keys() == {"left of others", "riddles"}
    assert found["verdict"] == "INFEASIBLE" and "on left, and the budget is 0.2 of exact_match" in found["sentence"]


def test_a_suite_whose_base_scores_no_more_than_the_budget_is_left_out_as_no_model_could_break_it(
    run: Scripted,
) -> None:
    report_base(run.folder, knows_nothing_of={"riddles"}, right=0.1)
    found = run.certified(budget={"others": "20 points of exact_match", "left": "6 points of exact_match"})
    assert found["left_out_at_chance"].keys() == {"others", "riddles"}
    assert found["left_out_at_chance"]["others"]["reason"] == "budget"
    assert found["budgets"].keys() == {"left"}
    assert "Not certified for others (exact_match 0.1): the base model scores no more than" in found["sentence"]


def test_a_suite_at_chance_that_loses_more_than_its_budget_all_the_same_is_no_part_of_a_certificate(
    run: Scripted,
) -> None:
    """Whoever always named one label of two and answers nothing now has lost something."""
    every(run, {"riddles": sum(line["task"] == "riddles" for line in certify_lines(run))})
    found = run.certified()
    assert found["verdict"] == "INFEASIBLE"
    assert "lost 1 of exact_match on riddles, and the budget is 0.2 of exact_match" in found["sentence"]
    assert set(found["budgets"]) == set(found["items"]) == {"others"}
    assert {cell["suite"] for cell in found["cells"]} == {"others", "riddles"}


def test_without_the_bases_own_answers_nothing_is_opened(run: Scripted) -> None:
    shutil.rmtree(run.folder / "base" / "zero-shot")
    with pytest.raises(DataError, match="zero-shot: found no answers of the base model to test"):
        run.certified()
    assert not (run.folder / "certify_openings.jsonl").exists()


def test_the_terminal_names_what_is_not_certified_first(run: Scripted) -> None:
    run.certified()
    console = Console(file=io.StringIO(), width=200)
    show_certificate(console, run.folder / "certificate.json")
    lines = console.file.getvalue().strip().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
    assert lines[0] == "CERTIFIED, EXCEPT FOR riddles"
    assert lines[1].startswith("Not certified for riddles: the base model has no exact_match to lose there.")


def test_where_nothing_is_certified_the_prompt_that_is_best_on_validation_is_named(
    run: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    # The most examples are not the best ones here.
    values = iter([3.5, 1.25, 2.5])
    from keeptune.evaluation import evaluate

    def value(model: Any, *, split: Any, **_: Any) -> float:
        asked.append(split.name)
        return next(values)

    monkeypatch.setattr(evaluate, "validation_value", value)
    every(run, {"left": 70, "right": 70})
    fallback = run.certified()["fallback"]
    assert asked == ["validation", "validation", "validation"]
    assert (fallback["shots"], fallback["draw"]) == (1, 1)
    assert fallback["values"] == [
        {"shots": 0, "draw": None, "value": 3.5},
        {"shots": 1, "draw": 1, "value": 1.25},
        {"shots": 2, "draw": 1, "value": 2.5},
    ]
    assert fallback["sentence"] == (
        "Use the base model with 1 solved example in its prompt: of the prompts tried on validation it has the best "
        "loss, 1.250 (without examples in its prompt: 3.500, with 2 solved examples in its prompt: 2.500)."
    )


def test_the_prompts_are_measured_as_validation_answers_them_and_other_numbers_ask_anew(run: Scripted) -> None:
    every(run, {"left": 70, "right": 70})
    first = run.certified()
    assert [one["shots"] for one in first["fallback"]["values"]] == [0, 1, 2]
    assert len({one["value"] for one in first["fallback"]["values"]}) == 3
    assert run.certified()["fallback"] == first["fallback"]
    evaluation = run.recipe.evaluation.model_copy(update={"num_shots": (3,)})
    run.recipe = run.recipe.model_copy(update={"evaluation": evaluation})
    found = run.certified()
    assert [one["shots"] for one in found["fallback"]["values"]] == [0, 3]
    assert found["fallback"]["values"][0] == first["fallback"]["values"][0]
    changed = {"fallback": None, "content_sha256": ""}
    assert {**found, **changed} == {**first, **changed}
    assert openings(run) == [1]


def test_without_examples_in_the_recipe_the_base_is_named_as_it_is(run: Scripted) -> None:
    evaluation = run.recipe.evaluation.model_copy(update={"baselines": ("zero-shot",)})
    run.recipe = run.recipe.model_copy(update={"evaluation": evaluation})
    every(run, {"left": 70, "right": 70})
    fallback = run.certified()["fallback"]
    assert fallback["shots"] == 0
    assert fallback["sentence"] == "Use the base model without examples in its prompt: no other prompt was tried."


@pytest.mark.parametrize("text", ["25 %", "25 points of acc", 25])
def test_a_budget_that_cannot_be_read_is_refused_by_check_before_any_row_is_read(tmp_path: Path, text: object) -> None:
    recipe = write_recipe(tmp_path, model=tmp_path / "none")
    changed = recipe.model_dump(mode="json") | {"retention": {"budget": {"others": text}}}
    with pytest.raises(RecipeError, match=r"retention\.budget\.others: found "):
        stages.check(Recipe.model_validate(changed), context=context(), num_shown=0)
