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


def summary(*, is_likely: bool = True, **facts: Any) -> dict[str, Any]:
    trials = [
        row(0, 1.5, rate=1e-3),
        row(1, 1.2, rate=3e-3, r=16),
        row(2, None, rate=9e-3, reason="Traceback\nkeeptune: <b>loss</b> is nan"),
        row(1, 1.3, rate=3e-3, r=16, repeat=1),
        row(3, 1.0, rate=4e-3, r=16, excess=0.5),
        row(4, 0.9, rate=4e-3, share=1 / 3),
    ]
    contenders = [
        {
            "name": "trial-0001",
            "params": trials[1]["params"],
            "values": [1.2, 1.3],
            "fresh": [1.3],
            "mean": 1.25,
            "feasible": True,
        },
        {
            "name": "trial-0000",
            "params": trials[0]["params"],
            "values": [1.5, 1.4],
            "fresh": [1.4],
            "mean": 1.45,
            "feasible": True,
        },
    ]
    doubt = {"gain": 0.1, "low": 0.02 if is_likely else -0.02, "high": 0.18, "is_likely": is_likely}
    winner = {"contenders": contenders, **doubt}
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


def sentence(folder: Path, value: Any) -> str:
    return read(folder, value).sentences[0]


def test_trials_stand_best_first_those_above_a_budget_and_failures_last(tmp_path: Path) -> None:
    (method,) = read(tmp_path, summary()).methods
    assert [(trial.name, trial.remark) for trial in method.trials] == [
        ("trial-0001", "best"),
        ("trial-0001-seed-1", ""),
        ("trial-0000", ""),
        ("trial-0004", "on 33% of train"),
        ("trial-0003", "above the budget"),
        ("trial-0002", "failed: keeptune: <b>loss</b> is nan"),
    ]
    assert method.settings == method.varied == ("learning_rate", "r")
    # A row for each setting, with the mean over its seeds; its seeds stand below it.
    assert [(row.label, row.value, row.remark, bool(row.params)) for row in method.table[:4]] == [
        ("0001", 1.25, "best, mean of 2 seeds", True),
        ("  seed", 1.2, "", False),
        ("  seed+1", 1.3, "", False),
        ("0000", 1.5, "", True),
    ]


def test_a_row_that_is_not_chosen_stands_below_the_two_that_were_repeated(tmp_path: Path) -> None:
    value = summary()
    # Less than the mean of the chosen one, from one seed alone.
    value["methods"]["lora"]["trials"].append(row(5, 1.22, rate=5e-3))
    (method,) = read(tmp_path, value).methods
    assert [row.label for row in method.table if row.params][:3] == ["0001", "0000", "0005"]


def test_trials_that_none_beats_in_value_and_drift_are_marked(tmp_path: Path) -> None:
    value = summary()
    value["methods"]["lora"]["front"] = ["trial-0000"]
    remarks = {trial.name: trial.remark for trial in read(tmp_path, value).methods[0].trials}
    assert remarks["trial-0000"] == "none is better in value and drift"


def test_the_words_say_whether_the_winner_is_likely_better_and_how_sure_that_is(tmp_path: Path) -> None:
    chosen = (
        "lora: of 5 trials, trial-0001 is chosen (learning_rate 0.003, r 16). With 1 further seed it has a mean loss "
        "of 1.300, trial-0000 of 1.400:"
    )
    assert sentence(tmp_path, summary()) == f"{chosen} likely better, by 0.100 (95 % interval +0.020 to +0.180)."
    assert sentence(tmp_path, summary(is_likely=False)) == (
        f"{chosen} 0.100 apart (95 % interval -0.020 to +0.180 for the first), as chance makes too: either will do."
    )


def test_what_cannot_be_told_of_the_winner_is_said(tmp_path: Path) -> None:
    value = summary()
    winner = value["methods"]["lora"]["winner"]
    winner |= {"gain": None, "low": None, "high": None}
    assert "Too few trainings with further seeds came to their end to tell it from trial-0000." in sentence(
        tmp_path, value
    )
    winner["contenders"][1]["feasible"] = False
    assert "The next, trial-0000, loses more than a budget allows." in sentence(tmp_path, value)
    winner["contenders"] = winner["contenders"][:1]
    said = "It was not tried again with further seeds, since no other came to its end on all records."
    assert said in sentence(tmp_path, value)
    # A search of an earlier version says nothing of its doubt.
    del winner["gain"]
    assert sentence(tmp_path, value) == "lora: of 5 trials, trial-0001 is chosen (learning_rate 0.003, r 16)."


def test_a_best_setting_at_the_end_of_its_range_is_said_to_lie_there(tmp_path: Path) -> None:
    value = summary()
    of = value["methods"]["lora"]
    of["ranges"] = [{"key": RATE, "low": 1e-5, "high": 3.1e-3, "log": True, "choices": []}]
    end = " Its learning_rate stands at the upper end of its range (1e-05 to 0.0031): the best may lie beyond it."
    assert end in sentence(tmp_path, value)
    of["ranges"][0]["high"] = 1e-2
    assert "end of its range" not in sentence(tmp_path, value)
    of["ranges"][0] |= {"low": 2.9e-3, "high": 1.0}
    assert "Its learning_rate stands at the lower end of its range (0.0029 to 1): " in sentence(tmp_path, value)
    # The axis of the figure shows all of the range.
    (panel,) = search_panels(read(tmp_path, value))
    assert panel.rates is not None and ">1<" in panel.rates


def test_where_no_drift_was_measured_the_words_say_that_the_value_decided_alone(tmp_path: Path) -> None:
    value = summary(against_drift=True)
    trials = value["methods"]["lora"]["trials"]
    trials[-1]["drift"] = None
    assert sentence(tmp_path, value).endswith(
        " (no short training was long enough for it, or no texts are set): the value alone decided what was dropped."
    )
    trials.pop()
    assert "No drift was measured" not in sentence(tmp_path, value)
    for trial in trials:
        trial["drift"] = None
    assert sentence(tmp_path, value).endswith(
        " No drift was measured (no training was long enough for it, or no texts are set): the value alone decided."
    )
    assert "No drift was measured" not in sentence(tmp_path, {**value, "against_drift": False})


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
    assert read(tmp_path, value).headline == "The best method by Loss on validation is lora."
    value["between"] = {"methods": ["lora", "full"], "contenders": [], "is_likely": True}
    assert read(tmp_path, value).headline == "lora is likely better than full by Loss on validation."
    value["between"]["is_likely"] = False
    assert read(tmp_path, value).headline == (
        "lora comes first by Loss on validation; full is within what chance makes."
    )
    assert read(tmp_path, summary()).headline == "lora is best with learning_rate 0.003, r 16."
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
    assert (
        read(tmp_path, value)
        .sentences[0]
        .endswith(
            " trial-0000 of 1.400: the first is nearer to the budgets. No trial kept the budgets; it comes nearest."
        )
    )
    for trial, excess in zip(value["methods"]["lora"]["trials"], (0.1, 0.2, None, 0.3, 0.5, 0.4), strict=True):
        trial["excess"] = excess
    # The two that were repeated, then the nearest to the budgets, whatever its value; a failure last.
    assert [trial.excess for trial in read(tmp_path, value).methods[0].trials] == [0.2, 0.3, 0.1, 0.4, 0.5, None]
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
    assert (
        panel.parallel is not None
        and panel.axes[2] == 'target_modules (from below: "all-linear", ["q_proj", "v_proj"])'
    )


def test_the_page_of_the_search_and_that_of_the_run_show_it_escaped(tmp_path: Path) -> None:
    facts = {"model": "english-3m", "tasks": ["alpaca"], "num_train_records": 116, "num_validation_records": 37}
    value = summary(**facts, output_dir="runs/a", command="keeptune search a.yaml")
    page = write_search_report(written(tmp_path, value))
    assert page is not None and page == tmp_path / "search" / "report.html"
    for path in (page, write_report(tmp_path)):
        text = path.read_text(encoding="utf-8")
        assert "How the settings were found" in text
        assert "<b>loss</b>" not in text and "&lt;b&gt;loss&lt;/b&gt; is nan" in text
        assert text.count("likely better, by 0.100") == 1
    assert "english-3m on alpaca: 116 train and 37 validation records." in page.read_text(encoding="utf-8")
    assert "<code>keeptune run runs/a/search/best.yaml</code>" in page.read_text(encoding="utf-8")
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
    assert any("0001 " in line and "0.003" in line and "1.250" in line and "best" in line for line in lines)
    assert "remark" in lines[2] and any("│   seed+1 " in line for line in lines)
    assert "lora: trials on validation" in lines[0]
    assert any(line.startswith("lora: of 5 trials") for line in lines)
