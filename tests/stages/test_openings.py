"""Openings of certify records, counted over run folders, and what stays of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keeptune import stages
from keeptune.config import Recipe
from keeptune.errors import DataError, Interrupted, RecipeError, StorageError
from keeptune.stages.certify_openings import expected_opening, note_searched
from keeptune.stages.openings import LEDGER
from tests.stages.scripted import Scripted, copy_of, openings, trained_run
from tests.stages.world import context

Another = Callable[[str], Scripted]
ASKED = ["base", "full at alpha 0.5", "full at alpha 1", "lora at alpha 0.5", "lora at alpha 1"]
OTHER_BUDGET: dict[str, Any] = {"budget": {"others": "19 points of exact_match"}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Scripted:
    return trained_run(tmp_path_factory)


@pytest.fixture
def another(trained: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Another:
    """Return what makes a run folder of that name over the same records."""
    return lambda name: copy_of(trained, tmp_path / name, patch=monkeypatch)


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return tmp_path / "home" / "keeptune" / LEDGER


def uncounted(certificate: dict[str, Any]) -> list[str]:
    """Return what a certificate says of openings that may be missing from its count."""
    return [one for one in certificate["limits"] if "may not be counted" in one]


def test_the_same_records_in_another_run_folder_are_the_next_opening(another: Another, ledger: Path) -> None:
    found = [another(f"run-{i}").certified(ledger=ledger, confidence=0.9 + 0.01 * i) for i in range(3)]
    assert [one["opening"] for one in found] == [1, 2, 3]
    assert [one["delta"] for one in found] == pytest.approx([0.08, 0.009, 0.004])
    assert {one["ledger"] for one in found} == {str(ledger)}
    assert not any(map(uncounted, found))
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert [Path(line["certificate"]).parent.name for line in lines] == ["run-0", "run-1", "run-2"]


def test_the_same_question_in_a_copy_of_the_run_is_the_same_opening(another: Another, ledger: Path) -> None:
    assert another("one").certified(ledger=ledger)["opening"] == 1
    copy = another("two")
    assert copy.certified(ledger=ledger)["opening"] == 1
    assert openings(copy) == [1] and len(ledger.read_text().splitlines()) == 1


def test_a_ledger_that_the_recipe_names_counts_in_place_of_the_users(another: Another, tmp_path: Path) -> None:
    team = tmp_path / "team.jsonl"
    assert another("one").certified(ledger=tmp_path / "mine.jsonl", named=team)["ledger"] == str(team)
    found = another("two").certified(ledger=tmp_path / "yours.jsonl", named=team, **OTHER_BUDGET)
    assert found["opening"] == 2
    assert {path.name for path in tmp_path.glob("*.jsonl")} == {"team.jsonl"}


def test_without_a_ledger_beside_the_run_folder_the_certificate_says_so(another: Another) -> None:
    found = another("one").certified()
    assert found["opening"] == 1 and found["ledger"] is None
    assert uncounted(found) == [
        "Earlier openings of these records may not be counted. No ledger beside the run folder's counted it: other run "
        "folders may have opened the same."
    ]


def cut(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def edit(path: Path) -> None:
    path.write_text(path.read_text().replace('"opening": 1', '"opening": 0', 1))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "found 0 of the 2 lines that"),
    "older": (cut, "found 1 of the 2 lines that"),
    "edited": (edit, "found a line that does not follow the one before it"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_ledger_that_is_missing_older_or_edited_is_named_on_the_certificate(
    damage: str, another: Another, ledger: Path
) -> None:
    another("one").certified(ledger=ledger)
    run = another("two")
    assert run.certified(ledger=ledger, **OTHER_BUDGET)["opening"] == 2
    change, said = DAMAGES[damage]
    change(ledger)
    for points in (18, 17):
        found = run.certified(ledger=ledger, budget={"others": f"{points} points of exact_match"})
        assert found["verdict"] == "CERTIFIED"
        assert any(str(ledger) in one and said in one for one in uncounted(found))
        # What the run folder knows counts on.
        assert found["opening"] == 21 - points
    # Who opens the same records next is told too.
    assert uncounted(another("three").certified(ledger=ledger, confidence=0.9))


def test_a_ledger_that_cannot_be_written_is_named_and_stops_nothing(another: Another, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    found = another("one").certified(ledger=tmp_path / "home" / LEDGER)
    assert found["verdict"] == "CERTIFIED"
    assert str(tmp_path / "home") in uncounted(found)[0]


def test_lines_missing_from_the_run_folders_own_ledger_are_an_error(another: Another, ledger: Path) -> None:
    run = another("one")
    run.certified(ledger=ledger)
    (run.folder / LEDGER).unlink()
    with pytest.raises(StorageError, match="what was opened before cannot be counted any more"):
        run.certified(ledger=ledger, **OTHER_BUDGET)


def answers_to_certify(run: Scripted) -> list[Path]:
    return [path for path in run.folder.rglob("samples.jsonl") if "certify" in path.parts]


def test_no_answer_to_a_single_certify_record_stays(another: Another, ledger: Path) -> None:
    run = another("one")
    run.certified(ledger=ledger)
    assert run.answered == [
        "base",
        *(f"{method} at alpha {alpha}" for method in ("full", "lora") for alpha in (0.5, 1)),
    ]
    assert answers_to_certify(run) == []


def test_an_interrupted_certification_goes_on_from_its_answers_in_the_same_opening(
    another: Another, ledger: Path
) -> None:
    run = another("one")
    answer, run.answered = run.answer, []

    def stopped(*arguments: Any, name: str, **rest: Any) -> None:
        if name.startswith("lora"):
            raise Interrupted("stopped")
        answer(*arguments, name=name, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("keeptune.stages.session.answer", stopped)
        with pytest.raises(Interrupted):
            run.certified(ledger=ledger)
    assert len(answers_to_certify(run)) == 3
    assert run.certified(ledger=ledger)["opening"] == 1
    assert run.answered == ASKED
    assert answers_to_certify(run) == []


def prepared(recipe: Recipe, folder: Path, *, ledger: Path, **retention: Any) -> tuple[stages.Run, stages.Data]:
    """Prepare the data of a recipe in a folder of its own, and return the run and them."""
    changed = recipe.retention.model_copy(update=retention)
    own = recipe.model_copy(update={"retention": changed, "output_dir": str(folder)})
    with stages.open_run(own, context=context(ledger=ledger)) as run:
        return run, stages.prepare(run)


def test_records_by_which_a_search_chose_settings_are_refused(
    trained: Scripted, another: Another, tmp_path: Path, ledger: Path
) -> None:
    run, data = prepared(trained.recipe, tmp_path / "search", ledger=ledger, probe_fraction=0.2)
    note_searched(run, data)
    note_searched(run, data)
    assert len(ledger.read_text().splitlines()) == 1
    with pytest.raises(DataError) as error:
        another("one").certified(ledger=ledger)
    assert "retention.budget: found certify records by which a search chose settings" in str(error.value)
    assert "Set retention.probe_fraction=0.2" in str(error.value)
    stages.check_budgets(run, data)
    assert expected_opening(run, data) == 1


def test_a_budget_that_the_confidence_left_cannot_certify_is_refused_before_training(
    trained: Scripted, another: Another, tmp_path: Path, ledger: Path
) -> None:
    budget = {"others": "2 points of exact_match"}
    run, data = prepared(trained.recipe, tmp_path / "new", ledger=ledger, budget=budget)
    stages.check_budgets(run, data)
    first = another("one")
    for i in range(4):
        first.certified(ledger=ledger, confidence=0.9 + i / 100)
    with pytest.raises(RecipeError, match="as some were opened before and this would be opening 5, or no model"):
        stages.check_budgets(run, data)
