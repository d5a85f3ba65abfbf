from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.stages import world


def recipe_with(folder: Path, *completions: str, metrics: list[str]) -> Path:
    """Write a recipe that trains on English words and holds out a task with these completions, in turn."""
    other = folder / "other.jsonl"
    lines = [{"prompt": f"colour {i}", "completion": completions[i % len(completions)]} for i in range(20)]
    other.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    trained = world.records(folder / "first-word.jsonl")
    path = world.recipe_file(folder, model=world.llama(folder / "base"), data=trained, evaluation={"metrics": metrics})
    value = json.loads(path.read_text())
    value["data"] |= {"tasks": [{"path": str(trained)}, {"path": str(other), "train": False}], "duplicates": "keep"}
    path.write_text(json.dumps(value))
    return path


def test_a_metric_that_cannot_read_a_suites_references_is_refused_before_training(
    tmp_path: Path, keeptune: world.Keeptune
) -> None:
    path = recipe_with(tmp_path, "红色", "蓝色", metrics=["rougeL", "exact_match"])
    for command in ("check", "prepare", "run"):
        result = keeptune(command, path)
        assert result.returncode == 2
        told = "evaluation.metrics: found rougeL, which sees only the letters a to z and digits, for other (20 of 20"
        assert told in result.stderr
        assert result.stderr.strip().endswith("Use rougeL_unicode, char_f1 or chrf.")
        assert "Ready" not in result.stdout
    assert not list(tmp_path.glob("run/*/checkpoints"))
    for metrics in ("[rougeL_unicode,exact_match]", "[chrf,char_f1,bleu_char]"):
        assert keeptune("check", path, "--set", f"evaluation.metrics={metrics}").returncode == 0


def test_the_metrics_of_a_recipe_that_names_none_read_every_script(tmp_path: Path, keeptune: world.Keeptune) -> None:
    path = recipe_with(tmp_path, "красный", "ภาษาไทย", metrics=["rougeL"])
    value = json.loads(path.read_text())
    del value["evaluation"]["metrics"]
    path.write_text(json.dumps(value))
    assert keeptune("check", path).returncode == 0


@pytest.mark.parametrize("command", ["check", "prepare"])
def test_metrics_that_say_less_than_they_seem_to_are_remarked_upon(
    tmp_path: Path, keeptune: world.Keeptune, command: str
) -> None:
    path = recipe_with(tmp_path, "un café pour vous", "du pain pour vous", metrics=["rougeL", "bleu"])
    result = keeptune(command, path)
    assert result.returncode == 0, result.stderr
    told = result.stdout if command == "check" else result.stderr
    assert "rougeL sees only the letters a to z and digits: 10 of 20 references of other have other words" in told
    assert "bleu: 80 of 80 references of first-word have fewer than 4 words." in told
