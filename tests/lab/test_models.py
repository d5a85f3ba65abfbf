"""The lab's models are whole, small and really trained: they learn in seconds, and answer as was recorded."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks import lab as benchmark
from keeptune import cli, invocation, stages
from keeptune.errors import FolderInUseError, StorageError
from keeptune.lab.folder import CONTENT, MODELS, RECIPES, write_lab
from keeptune.lab.world import make_world
from keeptune.model.folder import check_model_folder
from keeptune.progress import Silent
from keeptune.storage import read_json, read_record, write_record
from keeptune.terminal_change import first_line
from keeptune.text.tokenizer import Tokenizer
from tests.stages import world

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "lab.json"
NAMES = sorted(path.name for path in MODELS.iterdir())


def run_recipe(folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """Run a recipe to its report and return that."""
    torch.set_num_threads(1)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, "output_dir": str(folder / "run")}), encoding="utf-8")
    with stages.open_run(world.recipe(path), context=world.context()) as run:
        stages.train(run)
        stages.evaluate(run)
        stages.report(run)
    return read_json(folder / "run" / "report.json")


def exact_match(report: dict[str, Any], model: str, task: str) -> float:
    rows = (s for s in report["scores"] if (s["model"], s["task"], s["metric"]) == (model, task, "exact_match"))
    return next(rows)["mean"]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_whole_and_small(name: str) -> None:
    facts = check_model_folder(MODELS / name)
    assert facts.encoder_decoder == (name == "lab-base-t5")
    assert (MODELS / name / "model.safetensors").stat().st_size < 4_000_000
    config = json.loads((MODELS / name / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "bfloat16"
    assert "# " in (MODELS / name / "README.md").read_text(encoding="utf-8")
    tokenizer = Tokenizer.load(MODELS / name)
    assert tokenizer.vocab_size <= 2_048
    assert (tokenizer.chat_template is None) == (name != "lab-instruct")


@pytest.mark.parametrize(
    ("name", "template", "task", "max_records", "training", "learning_rate", "least"),
    [
        ("lab-base", "chatml", "names", 150, {"num_train_epochs": 3, "tokens_per_step": 512}, 2e-3, 0.8),
        # Six topics: by chance one of them is right in a sixth of the notes.
        pytest.param(
            *("lab-base-t5", "plain", "topic", 600, {"num_train_epochs": 6, "tokens_per_step": 512}, 1e-3, 0.35),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_base_learns_a_task_in_seconds(
    name: str,
    template: str,
    task: str,
    max_records: int,
    training: dict[str, int],
    learning_rate: float,
    least: float,
    lab: Path,
    tmp_path: Path,
) -> None:
    recipe = {
        "model": str(lab / "models" / name),
        "data": {"template": template, "tasks": [{"path": str(lab / "tasks" / task), "max_records": max_records}]},
        "methods": {"full": {"learning_rate": learning_rate}},
        "training": {**training, "evals_per_epoch": 1},
        "evaluation": {"metrics": ["exact_match"], "baselines": ["zero-shot"]},
        "retention": {"self_texts": 0},
    }
    report = run_recipe(tmp_path, recipe)
    assert exact_match(report, "base", task) < 0.05
    assert exact_match(report, "full", task) > least


def test_the_base_knows_its_world_as_was_recorded(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    recorded = json.loads(RESULTS.read_text(encoding="utf-8"))["knows"]["all"]
    monkeypatch.setattr(benchmark, "WORLD", replace(make_world(), facts=make_world().facts[::14]))
    known = benchmark.knows(lab)["all"]
    assert known["num_facts"] == 100
    for measure in ("true_over_false", "true_is_likeliest", "answered"):
        assert known[measure]["mean"] == pytest.approx(recorded[measure]["mean"], abs=0.02)


def test_writing_the_lab_again_changes_nothing(lab: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in lab.rglob("*.jsonl")}
    write_lab(lab, progress=Silent())
    assert {path: path.stat().st_mtime_ns for path in lab.rglob("*.jsonl")} == before
    assert len(before) == 39


@pytest.mark.parametrize("name", ["lab", "a lab, mine: [1] #2 {x}"])
def test_the_recipes_name_files_of_the_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("keeptune.lab.folder._COUNTS", {"train": 5, "validation": 2, "test": 2})
    write_lab(Path(name), progress=Silent())
    for recipe_name in RECIPES:
        recipe = yaml.safe_load((Path(name) / f"{recipe_name}.yaml").read_text(encoding="utf-8"))
        paths = [recipe["model"], *(task["path"] for task in recipe["data"]["tasks"])]
        assert len(paths) >= 13 and all(path.startswith(name) and Path(path).is_dir() for path in paths)
        assert recipe["output_dir"].startswith(f"{name}/runs/")


@pytest.mark.parametrize("name", ["models", "tasks"])
def test_folders_of_somebody_elses_are_left_alone(name: str, tmp_path: Path) -> None:
    mine = tmp_path / name / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("precious")
    with pytest.raises(FolderInUseError, match=f"found {name} and no lab; .* as in `keeptune demo my-lab`"):
        write_lab(tmp_path, progress=Silent())
    assert mine.read_text() == "precious" and [path.name for path in tmp_path.iterdir()] == [name]
    (tmp_path / "lab-demo.yaml").touch()
    with pytest.raises(FolderInUseError, match="did not write; .* as in `keeptune demo my-lab`"):
        write_lab(tmp_path, progress=Silent())
    assert mine.read_text() == "precious"


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("precious")
    (tmp_path / "mine").mkdir()
    with pytest.raises(FolderInUseError) as caught:
        write_lab(tmp_path, progress=Silent())
    assert str(caught.value) == (
        f"{tmp_path}: found mine, notes.txt and no lab; expected an empty or a new folder, or a lab. Name another "
        "folder, as in `keeptune demo my-lab`."
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "notes.txt"]


def test_a_file_in_the_place_of_the_lab_is_told(tmp_path: Path) -> None:
    (tmp_path / "lab").touch()
    for folder in (tmp_path / "lab", tmp_path / "lab" / "inside"):
        with pytest.raises(StorageError, match=f"{folder}: found a file on this path; expected a folder for the lab"):
            write_lab(folder, progress=Silent())
    with pytest.raises(StorageError, match="found no way to make it .* as in `keeptune demo my-lab`"):
        write_lab(Path("/proc/lab"), progress=Silent())


def small_lab(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a lab of one task with few rows."""
    monkeypatch.setattr("keeptune.lab.folder.TASKS", ())
    monkeypatch.setattr("keeptune.lab.folder._COUNTS", {"train": 5, "validation": 2, "test": 2})
    assert write_lab(folder, progress=Silent()) == CONTENT
    assert write_lab(folder, progress=Silent()) == ()
    return folder


def test_files_that_were_changed_or_added_are_never_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = small_lab(tmp_path / "lab", monkeypatch) / "tasks"
    rows = tasks / "span_sentence" / "train.jsonl"
    written = rows.read_text()
    (tasks / "mine.jsonl").write_text("precious")
    # Nothing is in the way of a lab that need not be written anew.
    assert write_lab(tasks.parent, progress=Silent()) == ()
    rows.write_text(written + '{"messages": []}\n')
    with pytest.raises(FolderInUseError) as caught:
        write_lab(tasks.parent, progress=Silent())
    own, changed = str(caught.value).splitlines()
    assert own.startswith(f"{tasks / 'mine.jsonl'}: found a file of your own; expected the lab's files alone")
    assert changed == (
        f"{rows}: found it changed since keeptune wrote it; expected the lab's files alone, as they are written anew. "
        f"Move it, or remove {tasks} to have that anew."
    )
    assert (tasks / "mine.jsonl").exists() and rows.read_text() != written
    (tasks / "mine.jsonl").unlink()
    rows.unlink()
    assert write_lab(tasks.parent, progress=Silent()) == ("tasks",)
    assert rows.read_text() == written


def test_a_lab_of_older_code_is_replaced_unless_it_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = small_lab(tmp_path / "lab", monkeypatch) / "models"
    manifest = read_record(models / "manifest.json")
    write_record(models / "manifest.json", manifest | {"key": "older"})
    assert write_lab(models.parent, progress=Silent()) == ("models",)
    assert read_record(models / "manifest.json") == manifest
    card = models / "lab-base" / "README.md"
    card.write_text("mine")
    write_record(models / "manifest.json", manifest | {"key": "older"})
    with pytest.raises(FolderInUseError, match=f"{card}: found it changed"):
        write_lab(models.parent, progress=Silent())
    assert card.read_text() == "mine"


def test_the_command_says_what_it_wrote_and_what_it_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(invocation.shutil, "which", lambda name: f"/usr/bin/{name}")
    small_lab(Path("lab"), monkeypatch)
    cli.lab(Path("lab"), quiet=True)
    shutil.rmtree(tmp_path / "lab" / "tasks")
    cli.lab(Path("lab"), quiet=True)
    assert capsys.readouterr().out.splitlines() == [
        "Lab: lab (kept models, tasks, lab-demo.yaml, lab-multitask.yaml)",
        "  keeptune run lab/lab-demo.yaml",
        "  keeptune run lab/lab-multitask.yaml",
        "Lab: lab (wrote tasks; kept models, lab-demo.yaml, lab-multitask.yaml)",
        "  keeptune run lab/lab-demo.yaml",
        "  keeptune run lab/lab-multitask.yaml",
    ]


def test_the_demo_says_what_it_will_do(lab: Path) -> None:
    assert first_line(world.recipe(lab / "lab-demo.yaml")) == (
        "Teaching lab-instruct the task span_sentence by full and lora; measuring what that brings there and costs on "
        "12 other tasks. Three to four minutes on two cores, where all is still to be done."
    )


def test_a_recipe_that_was_changed_stays_as_it_is(lab: Path, tmp_path: Path) -> None:
    for name in ("models", "tasks"):
        (tmp_path / name).symlink_to(lab / name)
    (tmp_path / "lab-demo.yaml").write_text("mine")
    write_lab(tmp_path, progress=Silent())
    assert (tmp_path / "lab-demo.yaml").read_text() == "mine"


@pytest.mark.slow
def test_the_instruct_model_answers_as_was_recorded_and_learns_a_new_wording(lab: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((lab / "lab-demo.yaml").read_text(encoding="utf-8"))
    scored = ("sentiment", "letter_writer")
    recipe["data"]["tasks"] = [task for task in recipe["data"]["tasks"] if Path(task["path"]).name in scored]
    for task in recipe["data"]["tasks"]:
        del task["max_records"]
    recipe["data"]["tasks"].append({"path": str(lab / "tasks/span_sentence"), "max_records": 200})
    recipe["methods"] = {"lora": {"peft_type": "LORA", "r": 16, "learning_rate": 5e-3}}
    recipe["evaluation"] = {"metrics": ["exact_match"], "baselines": ["zero-shot"]}
    # With a budget the answers to three fifths of the records would be kept for the certificate.
    recipe["retention"] = {"self_texts": 0}
    report = run_recipe(tmp_path, recipe)
    recorded = json.loads(RESULTS.read_text(encoding="utf-8"))["forgetting"]["alone"]
    for task in scored:
        assert exact_match(report, "base", task) == pytest.approx(exact_match(recorded, "base", task), abs=0.02)
    assert exact_match(report, "base", "span_sentence") < 0.05
    assert exact_match(report, "lora", "span_sentence") > 0.5
    assert sorted(report["untrained_tasks"]) == sorted(scored)


@pytest.mark.slow
def test_the_demo_ends_in_its_report_and_goes_on_from_what_is_done(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "keeptune.cli", "demo", "lab"]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    *_, full, lora, delivered, took, last = first.stdout.strip().splitlines()
    assert re.fullmatch(
        r"Delivered, (full|lora) at alpha 0\.\d+: learned 0\.000 → 0\.\d+, the other tasks 0\.\d+ → 0\.\d+ "
        r"\(exact_match\)",
        delivered,
    )
    assert re.search(r"\nCERTIFIED, EXCEPT FOR \w+\n", first.stdout)
    assert re.fullmatch(r"full: learned 0\.000 → [01]\.\d+, the other tasks 0\.\d+ → 0\.\d+ \(exact_match\)", full)
    assert lora.startswith("lora: learned 0.000 → ") and took.startswith("The demo took ")
    page = last.removeprefix("Open it in a browser: file://")
    assert "How to read this page" in Path(page).read_text(encoding="utf-8")
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert second.stderr == (
        "lab/runs/demo/data: prepared, lab/runs/demo/texts: written, lab/runs/demo/full: trained, lab/runs/demo/lora: "
        "trained, lab/runs/demo: evaluated, lab/runs/demo/texts: written, lab/runs/demo/certificate.json: certified "
        "before and unchanged\n"
    )
    assert "Records" in first.stdout and "Records" not in second.stdout
