"""The page's first sentence: broken answers before any gain, and the metric that moved before one that did not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keeptune.report.broken import broken_sentence, label_sentences
from keeptune.report.headline import headline, key_numbers, shots_sentence
from keeptune.report.tables import read_report
from tests.report.run_folder import MEANS, shot_name, write_forgetting, write_json, write_run, write_shots
from tests.report.test_page import assert_safe, page_of

# Of a difference from a single draw.
ERROR = {"standard_error": 0.01, "num_clusters": 97}


def first_sentences(run: Path) -> str:
    return "".join(phrase.text for phrase in headline(read_report(run))).replace("\u00a0", " ")


def write_canaries(run: Path, *rows: dict[str, Any], base: dict[str, Any] | None = None) -> Path:
    """Write counts of broken answers among 20 of lora's to each task, and of the base's."""
    counts = {"alpha": 1.0, "num_records": 20, "num_unended": 0, "num_empty": 0, "num_looping": 0}
    found = [{"model": "lora", "task": "ag_news", **counts, **row} for row in rows]
    found += [{"model": "base", "task": "ag_news", **counts, **base, "alpha": None}] if base is not None else []
    write_json(run / "forgetting.json", {"metric": "rougeL", "rows": [], "canaries": found})
    return run


def test_answers_that_never_end_are_said_before_any_gain(tmp_path: Path) -> None:
    run = write_canaries(write_run(tmp_path, num_steps=1), {"num_unended": 18, "num_looping": 18}, base={})
    assert first_sentences(run).startswith(
        "18 of 20 test answers never end: they are cut off after 64 tokens, all while repeating the same words "
        "(base: 0 of 20). english-3m, tuned with lora on 812 records of ag_news, raises ROUGE-L"
    )


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        (
            {"num_unended": 18, "num_looping": 2},
            "18 of 20 test answers do not end: they are cut off after 64 tokens, 2 of them while repeating the same "
            "words.",
        ),
        ({"num_unended": 5}, "5 of 20 test answers do not end: they are cut off after 64 tokens."),
        ({"num_empty": 2}, "2 of 20 test answers are empty."),
        ({"num_looping": 4}, "4 of 20 test answers repeat the same words."),
        (
            {"num_unended": 3, "num_looping": 3, "num_empty": 17},
            "3 of 20 test answers never end: they are cut off after 64 tokens, all while repeating the same words; 17 "
            "of 20 test answers are empty.",
        ),
        ({"num_unended": 1, "num_looping": 1, "num_empty": 1}, ""),
        ({}, ""),
    ],
)
def test_what_is_broken_is_said_from_a_tenth_of_the_answers_on(
    tmp_path: Path, counts: dict[str, Any], sentence: str
) -> None:
    assert broken_sentence(read_report(write_canaries(write_run(tmp_path, num_steps=1), counts))) == sentence


def test_broken_answers_to_tasks_that_were_not_trained_on_are_no_part_of_the_first_sentence(tmp_path: Path) -> None:
    run = write_run(tmp_path, others=("boolq",), num_steps=1)
    write_canaries(run, {}, {"task": "boolq", "num_unended": 20})
    assert broken_sentence(read_report(run)) == ""


def test_the_broken_answers_are_those_of_the_model_that_is_delivered(tmp_path: Path) -> None:
    run = write_forgetting(write_run(tmp_path, others=("boolq", "wiki")), verdict="CERTIFIED")
    value = json.loads((run / "forgetting.json").read_text(encoding="utf-8"))
    counts = {"model": "lora", "task": "ag_news", "num_records": 20, "num_unended": 0, "num_empty": 0}
    value["canaries"] = [{**counts, "alpha": 1.0, "num_looping": 20}, {**counts, "alpha": 0.3, "num_looping": 0}]
    write_json(run / "forgetting.json", value)
    assert broken_sentence(read_report(run)) == ""
    value["canaries"][1]["num_looping"] = 6
    write_json(run / "forgetting.json", value)
    assert broken_sentence(read_report(run)) == "6 of 20 test answers repeat the same words."


def pair(metric: str, difference: float, *, better: int = 90, against: str = "base") -> dict[str, Any]:
    low, high = (difference - 0.01 * better, difference + 0.01 * better)
    names = {"model": "lora", "against": against, "task": "all", "metric": metric}
    return {**names, "difference": difference, "low": low, "high": high, "better": better, "worse": 0}


def write_unmoved(run: Path, *, moved: bool = True) -> Path:
    """Write a run whose main metric stayed 0 on every record, and whose exact match rose if `moved`."""
    for place in ("base/zero-shot", "full/test", "lora/test"):
        path = run / place / "scores.json"
        value = json.loads(path.read_text(encoding="utf-8"))
        for row in value["scores"]:
            row["mean"] = 0.0 if row["metric"] == "rougeL" or not moved else row["mean"]
        write_json(path, value)
    pairs = [pair("rougeL", 0.0, better=0), pair("exact_match", 0.25 if moved else 0.0, better=20 if moved else 0)]
    write_json(run / "paired.json", {"paired": pairs})
    return run


def test_the_first_metric_that_moved_leads_where_the_main_one_did_not(tmp_path: Path) -> None:
    run = write_unmoved(write_run(tmp_path, num_steps=1))
    assert (
        "raises Exact match on 100 test records from 0.012 to 0.262, a difference of +0.250 (95 % interval +0.050 to "
        "+0.450); ROUGE-L stayed 0 on all of them"
    ) in first_sentences(run)
    assert [(number.label, number.value) for number in key_numbers(read_report(run))[:2]] == [
        ("Exact match", "0.262"),
        ("Difference from the base", "+0.250"),
    ]


def test_a_main_metric_that_stayed_at_zero_leads_where_nothing_else_moved(tmp_path: Path) -> None:
    run = write_unmoved(write_run(tmp_path, num_steps=1), moved=False)
    assert "lora on 812 records of ag_news, leaves ROUGE-L at 0 on all 100 test records, at" in first_sentences(run)


def test_the_few_shot_sentence_speaks_of_the_metric_that_moved(tmp_path: Path) -> None:
    run = write_shots(write_unmoved(write_run(tmp_path, num_steps=1)))
    rows = [pair("rougeL", 0.0, better=0), pair("exact_match", 0.25, better=20)]
    # Of 4 shots the mean of three draws is 0.125; the nearest have 0.14 and are the best row.
    beside = MEANS["lora"]["exact_match"] - 0.14
    rows += [pair("exact_match", beside, better=5, against=shot_name(4, "nearest")) | ERROR]
    write_json(run / "paired.json", {"paired": rows})
    sentence = "".join(phrase.text for phrase in shots_sentence(read_report(run)))
    assert "the base has Exact match 0.140; lora beats that (difference +0.122" in sentence


def test_prompts_without_room_for_an_example_are_counted_beside_the_few_shot_score(tmp_path: Path) -> None:
    run = write_shots(write_run(tmp_path, num_steps=1))
    path = run / "base/4-shot-nearest/scores.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**value, "num_fitted": 100, "num_without_exemplars": 88})
    sentence = "".join(phrase.text for phrase in shots_sentence(read_report(run)))
    assert sentence.startswith(
        "With the 4 solved examples most like the question in its prompt (88 of 100 prompts had room for none) and no "
    )


def test_a_choice_among_labels_shows_the_majority_and_the_most_frequent_answer(tmp_path: Path) -> None:
    labels = {"top_answer": "<b>billing", "num_top_answer": 13, "num_top_expected": 5, "num_majority": 7}
    run = write_canaries(write_run(tmp_path, num_steps=1), {**labels}, base={"num_unended": 1, **labels})
    expected = (
        "ag_news: always giving the most frequent label would be right for 7 of 20 records. The most frequent answer "
        "of lora, “<b>billing”, is given 13 times and expected 5 times."
    )
    assert label_sentences(read_report(run)) == [expected]
    page = page_of(run)
    assert_safe(page)
    assert expected in page.words
    write_canaries(run, {})
    assert label_sentences(read_report(run)) == []
