"""What a run says of forgetting: verdict, frontier, matrix, drift, forgotten answers, and what was not measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from keeptune.report.answers import read_flips
from keeptune.report.figures import Mark, frontier_svg
from keeptune.report.layout import colours, score_groups, task_tables
from keeptune.report.losses import drift_panels, frontier, matrix, not_measured
from keeptune.report.lost_words import forgotten_numbers
from keeptune.report.page import write_report
from keeptune.report.reading import RunFolder
from keeptune.report.tables import read_report
from keeptune.report.tested import probability
from tests.report.run_folder import (
    lost_row,
    sample,
    write_forgetting,
    write_json,
    write_lines,
    write_run,
    write_shots,
)
from tests.report.test_page import assert_safe, page_of


def a_run(path: Path, *, verdict: str | None = None) -> Path:
    return write_forgetting(write_run(path, others=("boolq", "wiki"), num_steps=120), verdict=verdict)


def report_json(run: Path) -> dict[str, Any]:
    write_report(run)
    return json.loads((run / "report.json").read_text(encoding="utf-8"))


def test_what_the_base_weighs_and_answers_again_is_no_baseline(tmp_path: Path) -> None:
    report = read_report(a_run(tmp_path))
    assert (report.models, report.methods) == (("base", "full", "lora"), ("full", "lora"))
    assert report.missing == ()


def test_points_on_the_way_leave_the_scores_of_the_trained_models_alone(tmp_path: Path) -> None:
    report = read_report(a_run(tmp_path))
    score = report.score("lora", "rougeL")
    assert score is not None and score.mean == 0.431


@pytest.mark.parametrize(
    ("verdict", "heading", "words"),
    [
        (
            "CERTIFIED",
            "CERTIFIED, EXCEPT FOR wiki, arc_easy",
            "show, with 97.5 % confidence, that the delivered model (lora, 30 % of the way from the base model to the "
            "trained one) forgets at most 0.05 of ROUGE-L on all other tasks but wiki.",
        ),
        (
            "NOT CERTIFIED",
            "NOT CERTIFIED",
            "That does not prove that they forget too much. Use the base model with 4 solved examples in its",
        ),
        (
            "INFEASIBLE",
            "INFEASIBLE",
            "(at most 0.05 of ROUGE-L on all other tasks but wiki), so no",
        ),
    ],
)
def test_the_first_screen_has_the_verdict_in_plain_words(
    tmp_path: Path, verdict: str, heading: str, words: str
) -> None:
    run = a_run(tmp_path, verdict=verdict)
    page = page_of(run)
    assert_safe(page)
    first = (
        f"{heading} Not certified for wiki (ROUGE-L 0.020, chance 0.000) and arc_easy (Accuracy 0.250, chance 0.250): "
        "the base model scores no better than chance there. "
    )
    assert first in page.words.replace("\u00a0", " ")
    assert words in page.words.replace("\u00a0", " ")
    assert f"{heading}: Not certified for wiki" in report_json(run)["headline"]
    assert "It names these weights." in page.words


def test_suites_that_no_budget_names_are_said_to_be_outside_the_certificate(tmp_path: Path) -> None:
    run = a_run(tmp_path, verdict="CERTIFIED")
    value = json.loads((run / "forgetting.json").read_text(encoding="utf-8"))
    value["rows"] += [lost_row("lora", suite, 0.3, metric="acc") for suite in ("arc_easy", "piqa")]
    write_json(run / "forgetting.json", value)
    found = not_measured(read_report(run))
    # "boolq" is one of the others, "wiki" and "arc_easy" were left out.
    assert "The certificate does not speak of text that the base wrote, piqa: no budget names them." in found
    assert any(line.startswith("Not certified for wiki (ROUGE-L 0.020, chance 0.000) and arc_easy") for line in found)


def test_without_a_budget_the_worst_suites_are_said(tmp_path: Path) -> None:
    words = page_of(a_run(tmp_path)).words
    assert (
        "Forgotten at worst: of 2 tasks, ROUGE-L on boolq dropped by 0.200 (95 % interval of the worst of 2: 0.170 to "
        "0.230); on text that the base wrote, the tuned model’s loss is 0.100 nats per token higher (a token becomes "
        "1.1 times less likely; 95 % interval 0.080 to 0.120)." in words
    )


def test_a_harness_task_is_a_suite_in_its_own_metric_and_no_text(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    value = json.loads((run / "forgetting.json").read_text(encoding="utf-8"))
    value["rows"] += [lost_row(model, "arc_easy", 0.3, metric="acc") for model in ("full", "lora")]
    (run / "forgetting.json").write_text(json.dumps(value), encoding="utf-8")
    words = page_of(run).words
    assert "Accuracy on arc_easy dropped by 0.300 (95 % interval 0.280 to 0.320); on text that" in words
    assert "Forgetting was measured on boolq, wiki" in words and "arc_easy" in words.split("on nothing else")[0]


def test_a_run_that_measured_nothing_says_so_first(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=1)
    page = page_of(run)
    assert "What it may have forgotten elsewhere: nothing else was measured." in page.words
    assert "What was forgotten" not in page.words
    value = report_json(run)
    assert (value["forgetting"], value["canaries"], value["noise"], value["certificate"]) == ([], [], None, None)


def test_the_frontier_has_a_point_a_method_and_alpha_and_the_base_at_zero(tmp_path: Path) -> None:
    found = frontier(read_report(a_run(tmp_path, verdict="CERTIFIED")))
    assert found is not None
    assert [(row.name, row.alpha, row.lost[:6], row.delivered) for row in found.rows] == [
        ("base", "", "0.000", False),
        ("full", "0.3", "+0.060", False),
        ("full", "1", "+0.300", False),
        ("lora", "0.3", "+0.040", True),
        ("lora", "1", "+0.200", False),
    ]
    assert (found.suite, found.metric, found.budget) == ("all other tasks but wiki", "ROUGE-L", "0.05 of ROUGE-L")
    assert "lora" not in found.figure


def test_the_figure_of_the_frontier_is_the_same_each_time_and_bare_of_styles() -> None:
    marks = [
        Mark(0.0, 0.1, None, (0.05, 0.15), "s", 0),
        Mark(0.1, 0.4, (0.05, 0.15), None, "o", 1, delivered=True),
    ]
    svg = frontier_svg(marks, budget=0.05, name="f")
    assert svg == frontier_svg(marks, budget=0.05, name="f")
    assert not any("style" in element.attrib for element in ElementTree.fromstring(svg).iter())
    ring = [e for e in ElementTree.fromstring(svg).iter() if e.get("stroke-width") == "1.6"]
    assert [e.get("fill") for e in ring if e.tag == "use"] == ["none"]
    assert "stroke-s1" in svg and "#1010" not in svg
    assert svg.count("stroke-dasharray") > frontier_svg(marks, budget=None, name="f").count("stroke-dasharray")


def test_the_matrix_says_without_colour_how_much_was_lost(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    rows = [
        lost_row("lora", "boolq", 0.2),
        lost_row("lora", "wiki", 0.01),
        lost_row("lora", "gain", -0.06),
        lost_row("lora", "riddles", 0.3) | {"base_at_chance": True},
        lost_row("lora", "self", 0.1, metric="loss"),
    ]
    write_json(run / "forgetting.json", {"metric": "rougeL", "rows": rows, "noise": None})
    found = matrix(read_report(run))
    assert found is not None and found.columns == (("lora", ""),)
    cells = {row.suite: row.cells[0] for row in found.rows}
    assert (cells["boolq"].mark, cells["boolq"].tint) == ("▼▼▼", "loss3")
    assert (cells["wiki"].mark, cells["gain"].mark) == ("≈", "▲")
    assert cells["riddles"].mark == "∅" and cells["riddles"].detail.endswith("; base no better than chance (0.100)")
    assert cells["text that the base wrote"].detail == (
        "a token becomes 1.1 times less likely; 31 records lost, 4 gained; KL 0.134 nats"
    )


def test_the_delivered_alpha_has_a_column_and_a_tile_of_its_own(tmp_path: Path) -> None:
    report = read_report(a_run(tmp_path, verdict="CERTIFIED"))
    found = matrix(report)
    assert found is not None and found.columns == (("lora", "delivered, alpha 0.3"), ("full", ""), ("lora", ""))


def test_the_certified_figure_stands_beside_the_reported_one_of_the_same_tasks(tmp_path: Path) -> None:
    reported, certified = forgotten_numbers(read_report(a_run(tmp_path, verdict="CERTIFIED")))
    assert (reported.label, reported.value) == ("Forgotten, on test", "0.040")
    assert reported.note == "ROUGE-L lost on all other tasks but wiki; 95 %: 0.020 to 0.060; 100 records"
    assert (certified.label, certified.value) == ("Forgotten, certified", "0.012")
    assert certified.note.replace("\u00a0", " ") == (
        "on the same tasks; at most 0.038 with 98.75 % confidence; budget 0.050; 800 records set aside for this"
    )


def test_a_reported_figure_of_other_tasks_than_the_certified_ones_does_not_stand_beside_them(tmp_path: Path) -> None:
    run = a_run(tmp_path, verdict="CERTIFIED")
    value = json.loads((run / "forgetting.json").read_text(encoding="utf-8"))
    for row in value["under_budget"]:
        row["without"] = []
    write_json(run / "forgetting.json", value)
    (certified,) = forgotten_numbers(read_report(run))
    assert certified.note.startswith("on all other tasks; at most 0.038")


def test_the_delivered_model_stands_in_the_tables_of_models(tmp_path: Path) -> None:
    report = read_report(a_run(tmp_path, verdict="CERTIFIED"))
    rows = {row.model: (row.mean, row.selected) for row in score_groups(report)[0].rows}
    name = "lora at alpha 0.3 (delivered)"
    assert (rows[name], rows["lora"]) == (("0.345", False), ("0.431", False))
    (table, *_) = task_tables(report)
    assert table.columns == ("base", name, "full", "lora")
    assert colours(report)[name] == colours(report)["lora"]


def test_the_section_says_who_counted_the_openings_and_what_a_later_one_costs(tmp_path: Path) -> None:
    run = a_run(tmp_path, verdict="CERTIFIED")
    words = page_of(run).words.replace("\u00a0", " ")
    assert (
        "This was opening 2 of these records, counted over all openings that /home/ada/.keeptune/ledger.jsonl knows. "
        "Earlier models were tested on them, which left less room for error: this time the budget had to be shown at "
        "97.5 % confidence, because the recipe asks for 95 % over all openings of these records together. That takes "
        "more records than a first opening." in words
    )
    value = json.loads((run / "certificate.json").read_text(encoding="utf-8"))
    write_json(run / "certificate.json", value | {"opening": 1, "delta": 0.04, "ledger": None})
    words = page_of(run).words.replace("\u00a0", " ")
    assert (
        "This was the first time that a model was tested on these records, counted over this run folder alone; "
        "openings in other run folders are not known. It was tested at 96 % confidence, because" in words
    )


def test_broken_answers_of_the_base_and_on_other_tasks_are_said_on_the_first_screen(tmp_path: Path) -> None:
    run = a_run(tmp_path, verdict="CERTIFIED")
    value = json.loads((run / "forgetting.json").read_text(encoding="utf-8"))
    counts = {"num_records": 100, "num_unended": 60, "num_empty": 0, "num_looping": 60}
    none = dict.fromkeys(counts, 0) | {"num_records": 100}
    value["canaries"] = [
        {"model": "base", "alpha": None, "task": "ag_news", **counts},
        {"model": "base", "alpha": None, "task": "boolq", **none},
        {"model": "lora", "alpha": 0.3, "task": "ag_news", **none},
        {"model": "lora", "alpha": 0.3, "task": "boolq", **counts},
    ]
    write_json(run / "forgetting.json", value)
    first = page_of(run).words.partition("How to read this page")[0]
    assert "The base model’s answers are broken: 60 of 100 test answers never end: they are cut off after" in first
    assert "On tasks that it was not trained on, the model’s answers are broken: 60 of 100 test answers" in first
    assert "(base: 0 of 100)" in first


def test_a_gain_is_called_one(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    write_json(run / "selection.json", {"selected": "lora", "alpha": 1.0, "values": {"lora": 0.4}})
    rows = [lost_row("lora", "boolq", -0.16), lost_row("lora", "others", -0.16)]
    write_json(run / "forgetting.json", {"metric": "rougeL", "rows": rows, "noise": None})
    (tile,) = forgotten_numbers(read_report(run))
    assert (tile.label, tile.value) == ("Gained", "0.160")
    assert tile.note == "ROUGE-L gained on all other tasks; 95 %: 0.140 to 0.180; 100 records"


def test_what_was_lost_in_another_metric_is_said_where_nothing_is_certified(tmp_path: Path) -> None:
    run = a_run(tmp_path, verdict="CERTIFIED")
    said = "In another metric: Token F1 on wiki dropped by 0.080 (95 % interval 0.060 to 0.100)."
    assert said in page_of(run).words
    value = json.loads((run / "certificate.json").read_text(encoding="utf-8"))
    value["left_out_at_chance"] = {
        "wiki": {"suite": "wiki", "budget": "others", "metric": "rougeL", "base": 0.0, "chance": 0.0}
    }
    write_json(run / "certificate.json", value)
    assert f"Not certified for wiki: the base model has no ROUGE-L to lose there. {said}" in page_of(run).words
    found = matrix(read_report(run))
    assert found is not None
    assert [(row.suite, row.metric) for row in found.rows[-2:]] == [
        ("all other tasks but wiki", "ROUGE-L"),
        ("wiki", "Token F1"),
    ]


def budget_of(run: Path, suite: str, *, metric: str) -> Path:
    value = json.loads((run / "certificate.json").read_text(encoding="utf-8"))
    budget = {"text": f"5 points of {metric}", "amount": 0.05, "unit": "points", "metric": metric}
    write_json(run / "certificate.json", value | {"budgets": {suite: budget}, "left_out_at_chance": {}})
    return run


def test_a_budget_on_a_single_task_is_drawn_with_that_task(tmp_path: Path) -> None:
    found = frontier(read_report(budget_of(a_run(tmp_path, verdict="CERTIFIED"), "boolq", metric="rougeL")))
    assert found is not None
    assert (found.suite, found.metric, found.budget) == ("boolq", "ROUGE-L", "0.05 of ROUGE-L")
    assert ">budget<" in found.figure
    assert [row.lost for row in found.rows if row.delivered] == ["+0.040 (+0.020 to +0.060)"]


def test_a_budget_in_another_metric_is_drawn_in_that_metric_or_not_at_all(tmp_path: Path) -> None:
    run = budget_of(a_run(tmp_path, verdict="CERTIFIED"), "wiki", metric="token_f1")
    found = frontier(read_report(run))
    assert found is not None
    assert (found.suite, found.metric, found.budget) == ("all other tasks", "ROUGE-L", "")
    assert ">budget<" not in found.figure
    value = json.loads((run / "forgetting.json").read_text(encoding="utf-8"))
    value["under_budget"] = [lost_row("lora", "wiki", 0.03, alpha=0.3, metric="token_f1")]
    write_json(run / "forgetting.json", value)
    found = frontier(read_report(run))
    assert found is not None
    assert (found.suite, found.metric, found.budget) == ("wiki", "Token F1", "0.05 of Token F1")
    assert ">budget<" in found.figure


def test_the_drift_stands_beside_the_loss(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    assert drift_panels(read_report(run))["lora"][1] == "KL from the base, nats per token: 0.240 at step 120."
    assert report_json(run)["drift"]["lora"][0] == {"step": 12.0, "kl": 0.024}


def test_one_record_a_task_shows_what_was_forgotten(tmp_path: Path) -> None:
    base = [sample(task, i, value=1.0, prediction="right") for i, task in enumerate(("boolq", "boolq", "wiki", "new"))]
    values = (0.5, 0.0, 1.0, 0.0)
    tuned = [line | {"metrics": {"rougeL": v}, "prediction": "now"} for line, v in zip(base, values, strict=True)]
    write_lines(tmp_path / "b.jsonl", base)
    write_lines(tmp_path / "t.jsonl", tuned)
    found = read_flips(
        RunFolder(tmp_path), tuned="t.jsonl", base="b.jsonl", metric="rougeL", higher_is_better=True,
        tasks={"boolq", "wiki"},
    )  # fmt: skip
    assert [(a.task, a.id, a.base_prediction, a.prediction) for a in found] == [("boolq", f"{1:016x}", "right", "now")]


def test_only_broken_answers_are_in_the_table_of_broken_answers(tmp_path: Path) -> None:
    words = page_of(a_run(tmp_path)).words
    assert "lora wiki not trained on 100 7 3 0 – 5" in words
    assert "base boolq 100 0" not in words
    assert "Forgetting was measured on boolq, wiki, text that the base wrote, and on nothing else." in words


@pytest.mark.parametrize("name", ["forgetting.json", "certificate.json", "lora/path/0.3/test/scores.json"])
@pytest.mark.parametrize(
    "content", ["", "[]", '{"rows": [{}, 3], "noise": 4, "budgets": [], "verdict": [], "canaries": 1}']
)
def test_a_broken_part_leaves_a_page(tmp_path: Path, name: str, content: str) -> None:
    run = a_run(tmp_path, verdict="CERTIFIED")
    (run / name).write_text(content, encoding="utf-8")
    assert_safe(page_of(run))


def test_no_text_of_a_certificate_becomes_markup(tmp_path: Path) -> None:
    run = a_run(tmp_path, verdict="CERTIFIED")
    value = json.loads((run / "certificate.json").read_text(encoding="utf-8"))
    value |= {"sentence": "<script>x</script>", "limits": ["<img src=x onerror=alert(1)>"]}
    write_json(run / "certificate.json", value)
    page = page_of(run)
    assert_safe(page)
    assert "<script>x</script>" in page.words


def test_six_perfect_answers_are_not_called_the_worst(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=1)
    write_lines(
        run / "lora/test/samples.jsonl", [sample("ag_news", i, value=1.0, prediction="World") for i in range(20)]
    )
    assert "Worst No answer was wrong." in page_of(run).words


def test_nothing_to_lose_is_not_called_unclear(tmp_path: Path) -> None:
    run = write_run(tmp_path, tasks=("ag_news",), others=("boolq",), num_steps=1)
    for place in ("base/zero-shot", "lora/test"):
        value = json.loads((run / place / "scores.json").read_text(encoding="utf-8"))
        for row in value["scores"]:
            if row["task"] in ("boolq", "others") and row["metric"] == "rougeL":
                row["mean"] = 0.0
        write_json(run / place / "scores.json", value)
    words = page_of(run).words
    assert "it has no score to lose: ROUGE-L went from 0.000 to 0.000" in words


def test_the_fields_of_forgetting_are_documented(tmp_path: Path) -> None:
    value = report_json(a_run(tmp_path, verdict="CERTIFIED"))
    documented = (Path(__file__).resolve().parents[2] / "docs/report.md").read_text(encoding="utf-8")
    certificate = value["certificate"]
    for part in (value["forgetting"][0], value["canaries"][0], value["noise"], certificate, certificate["tests"][0]):
        for key in part:
            assert f"`{key}`" in documented, key
    assert value["certificate"]["budgets"][0]["amount"] == 0.05


def test_where_texts_alone_were_weighed_the_page_does_not_say_that_nothing_was(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=1)
    rows = [lost_row("lora", "self", 0.1, metric="loss")]
    write_json(run / "forgetting.json", {"metric": "rougeL", "rows": rows, "noise": None})
    words = page_of(run).words
    assert "the loss on texts that were not trained on was taken before and after" in words
    assert "Forgotten at worst: on text that the base wrote, the tuned model’s loss is 0.100 nats" in words
    assert "outside these tasks was not measured" not in words and "nothing else was measured" not in words


def test_a_run_that_delivers_nothing_says_why(tmp_path: Path) -> None:
    words = page_of(a_run(tmp_path, verdict="NOT CERTIFIED")).words
    assert "No tuned model is delivered by this run: the answer is the base model." in words
    assert "No method was shown to keep the budgets, so none is delivered." in words


def test_the_first_sentence_speaks_of_the_delivered_model_and_not_of_the_whole_training(tmp_path: Path) -> None:
    words = page_of(a_run(tmp_path, verdict="CERTIFIED")).words.replace("\u00a0", " ")
    # 0.8 of the whole training's 0.431, which the run folder holds at alpha 0.3.
    assert "and scaled to 30 % of its change, reaches ROUGE-L 0.345 (95 % interval" in words
    assert (
        "reaches 0.431 (0.363 to 0.499), and loses 0.200 (0.180 to 0.220) of ROUGE-L on all other tasks but wiki,"
        in words
    )
    assert "where this model loses 0.040 (0.020 to 0.060). Scores on this page without an alpha are those of" in words
    assert "; base 0.118; 100 test records of ag_news Forgotten, on test 0.040 " in words
    assert "ROUGE-L of the whole training 0.431 95 %: 0.363 to 0.499; not delivered; 100 test records" in words


def test_the_frontier_stands_on_the_first_screen(tmp_path: Path) -> None:
    html = write_report(a_run(tmp_path, verdict="CERTIFIED")).read_text(encoding="utf-8")
    assert html.count('aria-label="Score over what was lost"') == 1
    assert html.index('aria-label="Score over what was lost"') < html.index("How to read this page")


def test_the_frontiers_legend_explains_what_is_drawn_alone(tmp_path: Path) -> None:
    run = a_run(tmp_path, verdict="CERTIFIED")
    ring, dotted = "Ring: the delivered model.", "Dotted: each method, scaled from near the base"
    words = page_of(run).words
    assert ring in words and dotted in words
    value = json.loads((run / "forgetting.json").read_text(encoding="utf-8"))
    write_json(run / "forgetting.json", value | {"rows": [row for row in value["rows"] if row["alpha"] == 1.0]})
    words = page_of(run).words
    assert "Bars: 95 % intervals." in words and ring not in words and dotted not in words


def test_every_point_of_the_frontier_has_its_interval(tmp_path: Path) -> None:
    run = write_shots(a_run(tmp_path, verdict="CERTIFIED"))
    found = frontier(read_report(run))
    assert found is not None
    scores = {(row.name, row.alpha): row.score for row in found.rows}
    # The mean of three draws with an interval over these too; of the single nearest choice its own.
    assert scores["base, 1 shot", ""] == "0.180 (0.143 to 0.223)"
    assert scores["base", ""] == "0.118 (0.099 to 0.137)"
    assert scores["base, 4 nearest shots", ""].startswith("0.280 (0.2")
    assert all("(" in score for score in scores.values())
    # What the figure draws alike has one entry.
    names = [name for name, *_ in found.legend]
    assert names[0] == "base" and names[1].startswith("base, 1 shot; base, ") and names[2:] == ["full", "lora"]


def test_each_test_of_the_certificate_is_in_the_page_and_in_the_numbers(tmp_path: Path) -> None:
    run = a_run(tmp_path, verdict="CERTIFIED")
    words = page_of(run).words
    assert "lora 0.3 all other tasks but wiki ROUGE-L +0.012 +0.038 0.050 0.0021 64 of 800 ▲ kept" in words
    assert "full 0.3 all other tasks but wiki ROUGE-L +0.012 +0.071 0.050 0.3100 64 of 800 ▼ not shown" in words
    tests = report_json(run)["certificate"]["tests"]
    assert tests[0] == {
        "model": "lora", "alpha": 0.3, "suite": "others", "metric": "rougeL", "lost": 0.012, "bound": 0.038,
        "p_value": 0.0021, "delta": 0.0125, "num_records": 800, "num_changed": 64,
        "certified": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "words"), [(0.00004, "below 0.0001"), (0.0312, "0.0312"), (None, "–"), (0.0, "below 0.0001")]
)
def test_a_p_value_has_the_digits_that_matter(value: float | None, words: str) -> None:
    assert probability(value) == words


def test_what_is_delivered_and_what_the_way_reaches_are_in_the_numbers(tmp_path: Path) -> None:
    value = report_json(a_run(tmp_path, verdict="CERTIFIED"))
    assert value["delivered"] == {"model": "lora", "alpha": 0.3}
    of_all = [row for row in value["on_the_way"] if (row["metric"], row["task"]) == ("rougeL", "all")]
    reached = {(row["model"], row["alpha"]): row["mean"] for row in of_all}
    assert reached == {("full", 0.3): pytest.approx(0.3216), ("lora", 0.3): pytest.approx(0.3448)}


def test_answers_of_the_delivered_model_are_not_called_those_of_the_whole_training(tmp_path: Path) -> None:
    words = page_of(a_run(tmp_path, verdict="CERTIFIED")).words
    assert "lora at alpha 0.3 0.0" in words.partition("Forgotten answers")[2].partition("What was not measured")[0]
    assert "lora, trained to the end (alpha 1), to what was trained on, ranked by" in words


def test_what_validation_measured_of_the_prompts_stands_in_the_numbers(tmp_path: Path) -> None:
    certificate = report_json(a_run(tmp_path, verdict="INFEASIBLE"))["certificate"]
    assert (certificate["fallback_shots"], certificate["fallback"][:35]) == (4, "Use the base model with 4 solved ex")


def test_a_look_that_went_on_after_an_interruption_is_no_further_look(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    opening = {"opened": "2026-11-23T21:02:11Z", "models": ["base"], "test_sha256": "ab12"}
    write_lines(run / "test_openings.jsonl", [opening, opening | {"resumes": True}, opening])
    value = report_json(run)
    assert (value["test_looks"], len(value["test_openings"])) == (2, 3)
    assert "Lines with “resumes” continued a look that was interrupted." in page_of(run).words
