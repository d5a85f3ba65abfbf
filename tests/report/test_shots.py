"""Few-shot answers on the page: means over draws, what they cost, and whether tuning beats them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keeptune.report.guide import guide
from keeptune.report.layout import paired_groups, score_groups
from keeptune.report.page import write_report
from keeptune.report.scores import Score
from keeptune.report.shots import ShotRow, few_shot_scores, prompting_costs, queries_until_cheaper
from keeptune.report.tables import read_report
from tests.report.run_folder import SHOT_MEANS, shot_name, write_json, write_run, write_shots
from tests.report.test_page import assert_safe, page_of, write_poisoned_run


def row(mean: float, *, draw: int | None, shots: int = 2, metric: str = "m", tokens: float = 300.0) -> ShotRow:
    score = Score("base", shots, "all", metric, mean, 0.1, mean - 0.2, mean + 0.2, 50, 50)
    name = f"base, {shots} nearest shots" if draw is None else f"base, {shots} shots, draw {draw}"
    return ShotRow(name, shots, draw, (score,), tokens, 100.0, 50, 4, 1, 1.9, None)


def only(rows: list[ShotRow]) -> Any:
    (found,) = few_shot_scores(rows)
    return found


def test_draws_give_their_mean_with_an_interval_over_draws_and_records() -> None:
    found = only([row(0.4, draw=2), row(0.1, draw=1), row(0.2, draw=3)])
    assert (found.name, found.num_draws, found.mean) == ("base, 2 shots", 3, pytest.approx(0.7 / 3))
    assert (found.lowest, found.highest) == (0.1, 0.4)
    assert found.rows == tuple(f"base, 2 shots, draw {draw}" for draw in (1, 2, 3))
    of_records = only([row(0.7 / 3, draw=draw) for draw in (1, 2, 3)])
    assert 0.0 < found.low < of_records.low < found.mean < of_records.high < found.high < 1.0


def test_a_single_draw_and_the_nearest_keep_their_interval() -> None:
    for draw, name in ((1, "base, 2 shots"), (None, "base, 2 nearest shots")):
        found = only([row(0.4, draw=draw)])
        assert (found.name, found.is_nearest, found.num_draws) == (name, draw is None, 1)
        assert (found.low, found.high, found.lowest) == (pytest.approx(0.2), pytest.approx(0.6), None)


def test_numbers_of_shots_stand_in_their_order_and_the_nearest_last() -> None:
    rows = [row(0.1, draw=None, shots=8), row(0.1, draw=1, shots=16), row(0.1, draw=1, shots=4)]
    names = [found.name for found in few_shot_scores(rows)]
    assert names == ["base, 4 shots", "base, 16 shots", "base, 8 nearest shots"]


def test_a_training_pays_after_three_times_its_tokens_over_the_examples_and_with_peft_after_two() -> None:
    # 12,460 records of about 250 tokens, three times over, against five examples of 216 tokens.
    assert queries_until_cheaper(9_345_000, extra_tokens=1_080, full=True) == pytest.approx(25_958, rel=1e-4)
    assert queries_until_cheaper(9_345_000, extra_tokens=1_080, full=False) == pytest.approx(17_306, rel=1e-4)
    for tokens, extra in ((None, 10.0), (100, None), (100, 0.0)):
        assert queries_until_cheaper(tokens, extra_tokens=extra, full=True) is None


def test_what_prompting_costs_is_counted_over_all_draws() -> None:
    rows = [row(0.4, draw=1, tokens=300), row(0.4, draw=2, tokens=500)]
    (found,) = prompting_costs(rows, trained=[("full", 6_000, True), ("lora", 6_000, False)])
    assert (found.name, found.prompt_tokens_mean, found.extra_tokens_mean) == ("base, 2 shots", 400, 300)
    assert (found.num_prompts, found.num_fitted, found.num_without_exemplars) == (100, 8, 2)
    assert found.queries == (("full", 60.0), ("lora", 40.0))


def test_the_best_row_is_that_of_the_best_mean_over_draws_by_the_metrics_direction(tmp_path: Path) -> None:
    report = read_report(write_shots(write_run(tmp_path, num_steps=1)))
    means = {f.name: f.mean for f in report.few_shot if (f.task, f.metric) == ("all", "rougeL")}
    assert means == {
        "base, 1 shot": pytest.approx(0.18),
        "base, 4 shots": pytest.approx(0.25),
        "base, 4 nearest shots": pytest.approx(0.28),
    }
    best = [report.best_few_shot(metric) for metric in ("rougeL", "loss")]
    assert [f.name if f else "" for f in best] == ["base, 4 nearest shots"] * 2
    assert [f.rows for f in report.few_shot if (f.shots, f.task) == (4, "all") and not f.is_nearest] == [
        ("base, 4 shots, draw 1", "base, 4 shots, draw 2", "base, 4 shots, draw 3")
    ] * 3
    base = report.difference("lora", "rougeL")
    assert base is not None and base.against == "base"


def without_nearest(run: Path) -> Path:
    (run / "base/4-shot-nearest/scores.json").unlink()
    (run / "base/4-shot-nearest").rmdir()
    return run


def test_the_page_says_in_one_sentence_whether_tuning_beats_examples_in_the_prompt(tmp_path: Path) -> None:
    run = without_nearest(write_shots(write_run(tmp_path, num_steps=1)))
    page = page_of(run)
    assert_safe(page)
    # 0.431 - 0.25, the mean of 0.21, 0.24 and 0.30.
    for words in (
        "With 4 solved examples in its prompt and no training, the base has ROUGE-L 0.250 (the mean of 3 "
        "random draws); lora beats that (difference +0.181, 95 % interval +0.076 to +0.282).",
        "Difference from few-shot +0.181 95 %: +0.076 to +0.282",
        "base, 1 shot 0.180 0.143 to 0.223 over 3 draws 100",
        "base, 4 shots 0.250 0.175 to 0.344 over 3 draws 100",
        "lora − base, 4 shots +0.181 +0.076 to +0.282 – – ▲ better",
        "With shots, the base’s prompt contains as many solved examples from the train split",
        "answers of base, 4 shots, draw 1 2.00 % cut at the limit",
    ):
        assert words in page.words, words
    assert "draw 2 +" not in page.words
    value = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert "; lora beats that (difference +0.181" in value["headline"]
    assert {score["model"] for score in value["scores"]} == {"base", "full", "lora"}


@pytest.mark.parametrize(
    ("difference", "error", "words"),
    [
        (0.03, 0.01, "lora beats that (difference +0.030, 95 % interval +0.006 to +0.054)."),
        (0.03, 0.02, "lora shows no clear difference from that (difference +0.030,"),
        (-0.03, 0.01, "lora does worse (difference −0.030,"),
    ],
)
def test_what_the_sentence_says_is_said_by_the_interval(
    tmp_path: Path, difference: float, error: float, words: str
) -> None:
    run = write_shots(write_run(tmp_path, num_steps=1))
    pair = {"model": "lora", "against": shot_name(4, "nearest"), "task": "all", "metric": "rougeL", "better": 9}
    # The best of three few-shot scores is picked: the interval is at 98.33 %, 2.44 standard errors to each side.
    pair |= {"difference": difference, "standard_error": error, "num_clusters": 97}
    write_json(run / "paired.json", {"paired": [pair]})
    prompt = "the 4 solved examples most like the question in its prompt and no training"
    assert f"{prompt}, the base has ROUGE-L 0.280; {words}" in page_of(run).words


def test_a_table_says_what_prompting_costs(tmp_path: Path) -> None:
    run = without_nearest(write_shots(write_run(tmp_path, num_steps=1)))
    words = page_of(run).words
    # 3 x 812,345 tokens over 75, and twice that over 300 with PEFT.
    assert "base, 1 shot 145 75 1.00 0 of 300 32,000 22,000" in words
    assert "base, 4 shots 370 300 3.95 9 of 300 3 with none 8,100 5,400" in words
    assert "Queries until full was cheaper Queries until lora was cheaper" in words
    assert "What prompting costs" not in page_of(write_run(tmp_path / "without", num_steps=1)).words


def test_few_shot_scores_stand_in_the_task_table_where_several_tasks_are_trained_on(tmp_path: Path) -> None:
    tasks = ("news", "qa")
    run = without_nearest(
        write_shots(write_run(tmp_path / "a", tasks=tasks, others=("wiki",), num_steps=1), tasks=tasks)
    )
    page = page_of(run)
    assert_safe(page)
    assert "Task Records base base, 1 shot base, 4 shots full lora chosen" in page.words
    # A base's score, then the means of the draws.
    assert "news 100 0.071 (0.060 to 0.082) 0.180 (0.143 to 0.223) 0.250 (0.175 to 0.344)" in page.words
    assert "wiki 100 0.106 (0.090 to 0.123) – – " in page.words
    one = write_shots(write_run(tmp_path / "b", others=("wiki",), num_steps=1))
    assert "Task Records base full lora chosen" in page_of(one).words


def test_a_row_that_was_left_out_is_named(tmp_path: Path) -> None:
    run = write_shots(write_run(tmp_path, num_steps=1))
    reason = "base, 4 shots, draw 1: found no room for one solved example before any of 9 test prompts; expected one."
    path = run / "base/4-shot-draw-1/scores.json"
    header = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("num_records", "cut_fraction")}
    write_json(path, header | {"scores": [], "left_out": reason})
    page = page_of(run)
    assert f"Missing: {reason}" in page.words
    assert "base, 4 shots 0.270 0.156 to 0.426 over 2 draws" in page.words
    assert "answers of base, 4 shots, draw 1" not in page.words


def test_few_shot_that_was_impossible_stands_where_its_row_would_be(tmp_path: Path) -> None:
    run = write_shots(write_run(tmp_path, num_steps=1))
    reason = "no solved example fits before any of the 9 test prompts. Lower evaluation.max_new_tokens."
    for path in (run / "base").glob("*-shot-*/scores.json"):
        header = json.loads(path.read_text(encoding="utf-8"))
        left_out = {"scores": [], "left_out": f"{header['row']}: {reason}"}
        write_json(path, {**header, **left_out})
    report = read_report(run)
    assert [(row.model, row.left_out) for row in score_groups(report)[0].rows] == [
        ("base", ""),
        ("base, 1 shot", reason),
        ("base, 4 shots", reason),
        ("base, 4 nearest shots", reason),
        ("full", ""),
        ("lora", ""),
    ]
    assert [row.left_out for row in score_groups(report)[1].rows] == ["", "", ""]
    page = page_of(run)
    assert f"base, 4 shots no score: {reason}" in page.words and "Missing" not in page.words
    assert f"There is no few-shot score: {reason}" in page.words
    value = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert value["few_shot_left_out"][0] == {"name": "base, 1 shot", "reason": reason}


def test_the_guide_says_what_shots_are(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=1)
    assert "Shots are" not in " ".join(guide(read_report(run)))
    sentences = guide(read_report(write_shots(run)))
    assert "Shots are solved examples that stand before the question in the base’s prompt" in " ".join(sentences)
    assert " ".join(sentences).count(". ") < 12


def test_the_fields_of_few_shot_rows_are_documented(tmp_path: Path) -> None:
    run = write_shots(write_run(tmp_path, num_steps=1))
    write_report(run)
    value = json.loads((run / "report.json").read_text(encoding="utf-8"))
    documented = (Path(__file__).resolve().parents[2] / "docs/report.md").read_text(encoding="utf-8")
    for part in ("few_shot", "prompting"):
        for key in value[part][0]:
            assert f"`{key}`" in documented, key
    assert value["prompting"][0]["queries"] == {"full": pytest.approx(32_493.8), "lora": pytest.approx(21_662.533)}
    assert len(value["few_shot"]) == 3 * 2 * 3


def test_no_text_of_a_few_shot_row_becomes_markup(tmp_path: Path) -> None:
    run = write_poisoned_run(tmp_path, "<img src=x onerror=alert(1)>")
    for shots, draw in SHOT_MEANS:
        name = f"base<script>{shots}"
        scores = [{"model": name, "shots": shots, "task": "all", "metric": "<b>m", "mean": 0.1 * shots}]
        header = {"model": name, "row": f"{name}, draw {draw}<i>", "shots": shots, "scores": scores, "num_fitted": "x"}
        write_json(
            run / f"base/{shots}-shot-{draw}/scores.json", header | {"exemplars": [draw], "prompt_tokens_mean": "<u>"}
        )
    page = page_of(run)
    assert_safe(page)
    assert "base<script>4" in page.words


def test_a_method_at_zero_beside_few_shot_at_zero_had_no_score_to_lose(tmp_path: Path) -> None:
    run = write_shots(write_run(tmp_path, num_steps=1))
    for path in [*(run / "base").glob("*-shot-*/scores.json"), run / "lora/test/scores.json"]:
        value = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, {**value, "scores": [{**row, "mean": 0.0} for row in value["scores"]]})
    same = {"model": "lora", "task": "all", "metric": "rougeL", "difference": 0.0, "low": 0.0, "high": 0.0}
    pairs = [{**same, "against": shot_name(*of), "better": 0, "worse": 0} for of in SHOT_MEANS]
    write_json(run / "paired.json", {"paired": pairs})
    (group,) = paired_groups(read_report(run))
    assert [row.verdict for row in group.rows] == ["nothing"]
