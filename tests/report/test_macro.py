"""Means over tasks, validation task by task, and the mixture, on the page and in report.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keeptune.report.macro import macro_scores
from keeptune.report.page import write_report
from keeptune.report.scores import Score
from tests.report.run_folder import write_json, write_run
from tests.report.test_page import assert_safe, page_of


def score(task: str, mean: float | None, error: float | None, *, metric: str = "rougeL") -> Score:
    ends = (None, None) if mean is None or error is None else (mean - 2 * error, mean + 2 * error)
    return Score("lora", 0, task, metric, mean, error, *ends, 100, 90)


def test_means_over_tasks_leave_out_what_is_together_and_tell_the_kinds_apart() -> None:
    scores = [score("a", 0.1, 0.03), score("b", 0.5, 0.04), score("c", 0.9, 0.01), score("d", 0.7, 0.0)]
    scores += [score("all", 0.2, 0.01), score("others", 0.8, 0.01), score("a", 9.0, None, metric="perplexity")]
    trained, others = macro_scores(scores, untrained_tasks=frozenset({"c", "d"}))
    assert (trained.tasks, trained.num_tasks, others.tasks, others.num_tasks) == ("all", 2, "others", 2)
    # (0.06² + 0.08²)^(1/2) / 2 to each side.
    assert trained.mean == pytest.approx(0.3)
    assert (trained.low, trained.high) == pytest.approx((0.25, 0.35))
    assert others.mean == pytest.approx(0.8)
    # Of one task alone, and of a score that is not finite, there is no mean.
    (only,) = macro_scores(scores[:3], untrained_tasks=frozenset({"c"}))
    assert only.tasks == "all"
    assert not list(macro_scores([score("a", 0.1, 0.03), score("b", None, None)], untrained_tasks=frozenset()))


def mixed_run(folder: Path) -> Path:
    run = write_run(folder, tasks=("news", "qa"), others=("boolq", "wiki"), num_steps=1)
    for i, method in enumerate(("full", "lora")):
        path = run / method / "training.json"
        counts = {"num_examples": 700, "num_per_epoch": 900, "num_repeats": 200, "num_never_shown": 0}
        replay = {"num_examples": 80, "num_per_epoch": 30, "num_repeats": 0, "num_never_shown": 50}
        mixture = [{"source": "news", **counts}, {"source": "qa", **counts}]
        mixture += [{"source": "(replay)", **replay}] if method == "lora" else []
        validation = [
            {"task": task, "metric": "loss", "mean": 1.5 + i + j, "standard_error": 0.1, "num_records": 9}
            for j, task in enumerate(("news", "qa"))
        ]
        macro = {"metric": "loss", "mean": 2.0 + i, "standard_error": 0.1}
        more = {"mixture": mixture, "validation_scores": validation, "validation_macro": macro}
        write_json(path, json.loads(path.read_text()) | more)
    return run


def test_the_page_shows_means_over_tasks_validation_and_the_mixture(tmp_path: Path) -> None:
    page = page_of(mixed_run(tmp_path))
    assert_safe(page)
    for words in (
        # The tasks' means are 0.071 and 0.090, and 0.6 and 0.76 of the tuned ones'.
        "+0.313 mean of the tasks 0.080 (0.071 to 0.089) 0.273 (0.243 to 0.304) +0.193 0.293",
        "mean of the tasks 0.106 (0.094 to 0.118) 0.042 (0.037 to 0.046) −0.064 0.042",
        "On validation Loss of the weights that are kept",
        "news 1.500 2.500 qa 2.500 3.500 mean of the tasks 2.000 3.000",
        "Mixture examples of an epoch",
        "news 700 900 200 0 qa 700 900 200 0 (replay) lora 80 30 0 50",
        "tuned with lora on 1,624 records of news and qa,",
        "was shown 1,624 examples of news and qa:",
    ):
        assert words in page.words, words


def test_records_that_a_mixture_never_shows_are_not_said_to_be_trained_on(tmp_path: Path) -> None:
    run = mixed_run(tmp_path)
    for method in ("full", "lora"):
        path = run / method / "training.json"
        value = json.loads(path.read_text())
        value["mixture"][0] |= {"num_per_epoch": 212, "num_repeats": 0, "num_never_shown": 488}
        write_json(path, value)
    words = page_of(run).words
    assert "tuned with lora on 1,136 of 1,624 records of news and qa," in words
    assert "was shown 1,136 of 1,624 examples of news and qa:" in words


def test_a_run_without_a_mixture_shows_none(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=1)
    page = page_of(run)
    for words in ("Mixture", "On validation", "mean of the tasks"):
        assert words not in page.words
    value = json.loads((run / "report.json").read_text())
    assert (value["macro_scores"], value["validation_scores"], value["mixture"]) == ([], [], [])


def test_report_json_documents_their_fields(tmp_path: Path) -> None:
    run = mixed_run(tmp_path)
    write_report(run)
    value = json.loads((run / "report.json").read_text(encoding="utf-8"))
    documented = (Path(__file__).resolve().parents[2] / "docs/report.md").read_text(encoding="utf-8")
    for name in ("macro_scores", "validation_scores", "mixture"):
        section = documented.split(f"### {name}[]")[1].split("\n### ")[0]
        assert all(f"`{key}`" in section for key in value[name][0]), name
    assert [(row["model"], row["source"]) for row in value["mixture"]] == [
        ("full", "news"), ("full", "qa"), ("lora", "news"), ("lora", "qa"), ("lora", "(replay)"),
    ]  # fmt: skip
    assert value["validation_scores"][2] == {
        "model": "full", "task": "all", "metric": "loss", "mean": 2.0, "num_records": None,
    }  # fmt: skip
