"""The search on the page: trials in order, what they come to in words, and figures that hold nothing foreign."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from keeptune.report.page import write_report, write_search_report
from keeptune.report.reading import RunFolder
from keeptune.report.search import Searched, read_search
from keeptune.report.search_figures import search_panels
from keeptune.terminal_search import show_search

RATE = "methods.lora.learning_rate"


def row(number: int, value: float | None, *, rate: float, r: int = 8, **facts: Any) -> dict[str, Any]:
    repeat, share = facts.get("repeat", 0), facts.get("share", 1.0)
    return {
        "name": f"trial-{number:04d}" + (f"-seed-{repeat}" if repeat else ""),
        "number": number,
        "params": {RATE: rate, "methods.lora.r": r},
        "state": "finished" if value is not None else "failed",
        "value": value,
        "drift": 0.1 * number,
        "excess": None,
        "seconds": 12.0,
        "reason": "",
        "repeat": repeat,
        "share": share,
        **facts,
    }


def summary(*, is_real: bool = True, **facts: Any) -> dict[str, Any]:
    trials = [
        row(0, 1.5, rate=1e-3),
        row(1, 1.2, rate=3e-3, r=16),
        row(2, None, rate=9e-3, reason="Traceback\nkeeptune: <b>loss</b> is nan"),
        row(1, 1.3, rate=3e-3, r=16, repeat=1),
        row(3, 1.0, rate=4e-3, r=16, excess=0.5),
        row(4, 0.9, rate=4e-3, share=1 / 3),
    ]
    contenders = [
        {"name": "trial-0001", "params": trials[1]["params"], "values": [1.2, 1.3], "mean": 1.25, "feasible": True},
        {"name": "trial-0000", "params": trials[0]["params"], "values": [1.5, 1.4], "mean": 1.45, "feasible": True},
    ]
    winner = {"contenders": contenders, "difference": -0.2, "threshold": 0.1 if is_real else 0.3, "is_real": is_real}
    method = {"trials": trials, "importance": {RATE: 0.75, "methods.lora.r": 0.25}, "winner": winner}
    value = {"metric": "loss", "higher_is_better": False, "best": "lora", "together": ["lora"]}
    return {**value, "methods": {"lora": method}, **facts}


def written(folder: Path, value: Any) -> Path:
    (folder / "search").mkdir(exist_ok=True)
    (folder / "search" / "search.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def read(folder: Path, value: Any) -> Searched:
    found = read_search(RunFolder(written(folder, value)))
    assert found is not None
    return found


def test_trials_stand_best_first_those_above_a_budget_and_failures_last(tmp_path: Path) -> None:
    (method,) = read(tmp_path, summary()).methods
    assert [(trial.name, trial.remark) for trial in method.trials] == [
        ("trial-0001", "best"),
        ("trial-0001-seed-1", "again with seed + 1"),
        ("trial-0000", ""),
        ("trial-0004", "on 33% of train"),
        ("trial-0003", "above the budget"),
        ("trial-0002", "failed: keeptune: <b>loss</b> is nan"),
    ]
    assert method.settings == method.varied == ("learning_rate", "r")


def test_trials_that_none_beats_in_value_and_drift_are_marked(tmp_path: Path) -> None:
    value = summary()
    value["methods"]["lora"]["front"] = ["trial-0000"]
    remarks = {trial.name: trial.remark for trial in read(tmp_path, value).methods[0].trials}
    assert remarks["trial-0000"] == "none is better in value and drift"


def test_the_words_say_whether_the_winner_is_real(tmp_path: Path) -> None:
    chosen = "lora: of 5 trials, trial-0001 is chosen (learning_rate 0.003, r 16). Over 2 seeds it and trial-0000"
    assert read(tmp_path, summary()).sentences == (
        f"{chosen} have a mean loss of 1.25 and 1.45: the difference of 0.2 is real, above the 0.1 of chance.",
    )
    assert read(tmp_path, summary(is_real=False)).sentences == (
        f"{chosen} have a mean loss of 1.25 and 1.45: 0.2 apart, no more than records or seeds make by chance (0.3): "
        "either will do.",
    )


def test_methods_that_need_another_training_are_named(tmp_path: Path) -> None:
    value = summary()
    only = {"name": "trial-0000", "params": {RATE: 1e-3}, "values": [2.0], "mean": 2.0, "feasible": True}
    value["methods"]["full"] = {"trials": [row(0, 2.0, rate=1e-3)], "winner": {"contenders": [only]}}
    assert read(tmp_path, value).sentences[1:] == (
        "full: of 1 trial, trial-0000 is chosen (learning_rate 0.001).",
        "The best method by loss on validation is lora.",
        "best.yaml holds lora; full did best with other settings of the training, which a recipe has one of: see "
        "search/full/best.yaml.",
    )
    assert read(tmp_path, value).headline == "The best method by loss on validation is lora."
    assert read(tmp_path, summary()).headline.startswith("lora: of 5 trials")
    assert read(tmp_path, {"metric": "loss"}).headline == "No trial yet."


def test_a_method_of_which_no_trial_came_to_its_end_is_said_to_have_none(tmp_path: Path) -> None:
    value = summary()
    value["methods"]["full"] = {"trials": [row(0, None, rate=1e-3), row(1, None, rate=3e-3)], "winner": None}
    assert read(tmp_path, value).sentences[1:] == (
        "full: 2 trials and none that came to its end.",
        "The best method by loss on validation is lora.",
    )
    value["methods"]["full"] = {"trials": [row(0, None, rate=1e-3), row(1, 2.0, rate=3e-3)], "winner": None}
    assert read(tmp_path, value).sentences[1] == "full: 2 trials so far."


def test_where_no_trial_keeps_the_budgets_the_words_say_so(tmp_path: Path) -> None:
    value = summary()
    value["methods"]["lora"]["winner"]["contenders"][0]["feasible"] = False
    assert read(tmp_path, value).sentences[0].endswith(" No trial kept the budgets; it comes nearest.")
    for trial, excess in zip(value["methods"]["lora"]["trials"], (0.1, 0.2, None, 0.3, 0.5, 0.4), strict=True):
        trial["excess"] = excess
    # The nearest to the budgets first, whatever its value; a failure last.
    assert [trial.excess for trial in read(tmp_path, value).methods[0].trials] == [0.1, 0.2, 0.3, 0.4, 0.5, None]
    value["methods"]["lora"]["trials"][1]["excess"] = -0.1
    assert (
        read(tmp_path, value).sentences[0].endswith(" In the mean over its seeds it loses more than a budget allows.")
    )


def test_the_figures_hold_rates_settings_and_importance(tmp_path: Path) -> None:
    (panel,) = search_panels(read(tmp_path, summary()))
    assert panel.rates is not None and panel.parallel is not None
    assert panel.axes == ("learning_rate", "r", "Loss")
    assert panel.importance == (("learning_rate", 75.0), ("r", 25.0))
    for figure in (panel.rates, panel.parallel):
        assert "style=" not in figure and "<style" not in figure and "lora" not in figure
    assert "0.003" in panel.rates
    again = search_panels(read(tmp_path, summary()))
    assert again[0].rates == panel.rates


def test_one_trial_alone_and_settings_that_never_change_are_not_drawn(tmp_path: Path) -> None:
    value = summary()
    value["methods"]["lora"]["trials"] = [row(0, 1.0, rate=1e-3)]
    (panel,) = search_panels(read(tmp_path, value))
    assert (panel.rates, panel.parallel) == (None, None)


def test_choices_that_are_lists_have_places_on_an_axis(tmp_path: Path) -> None:
    value = summary()
    for i, trial in enumerate(value["methods"]["lora"]["trials"]):
        trial["params"]["methods.lora.target_modules"] = ["q_proj", "v_proj"] if i % 2 else "all-linear"
    (panel,) = search_panels(read(tmp_path, value))
    assert panel.parallel is not None and "target_modules" in panel.axes


def test_the_page_of_the_search_and_that_of_the_run_show_it_escaped(tmp_path: Path) -> None:
    page = write_search_report(written(tmp_path, summary()))
    assert page is not None and page == tmp_path / "search" / "report.html"
    for path in (page, write_report(tmp_path)):
        text = path.read_text(encoding="utf-8")
        assert "How the settings were found" in text
        assert "<b>loss</b>" not in text and "&lt;b&gt;loss&lt;/b&gt; is nan" in text
        assert "is real, above the 0.1 of chance" in text
    assert write_search_report(tmp_path / "none") is None


@pytest.mark.parametrize("broken", ["", "[]", "{", '{"metric": 3}', '{"metric": "loss", "methods": {"lora": 3}}'])
def test_a_broken_summary_stops_no_report(tmp_path: Path, broken: str) -> None:
    written(tmp_path, broken)
    assert write_report(tmp_path).is_file()


def test_a_run_without_a_search_has_no_word_of_it(tmp_path: Path) -> None:
    assert "How the settings were found" not in write_report(tmp_path).read_text(encoding="utf-8")
    assert json.loads((tmp_path / "report.json").read_text())["search"] is None


def test_the_terminal_shows_what_varied(tmp_path: Path) -> None:
    out = io.StringIO()
    show_search(Console(file=out, width=100), written(tmp_path, summary()) / "search" / "search.json")
    lines = out.getvalue().splitlines()
    assert any("0001 " in line and "0.003" in line and "best" in line for line in lines)
    assert "lora: trials on validation" in lines[0]
    assert any(line.startswith("lora: of 5 trials") for line in lines)
