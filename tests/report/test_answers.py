"""The best and the worst answers: how they are ranked, and what they stand beside."""

from __future__ import annotations

from pathlib import Path

from keeptune.report.answers import Answers, read_answers
from keeptune.report.reading import RunFolder
from tests.report.run_folder import sample, write_lines


def answers_of(
    run: Path, values: list[float], base: list[float] | None = None, *, higher: bool = True
) -> Answers | None:
    write_lines(
        run / "lora/test/samples.jsonl", [sample("t", i, value=v, prediction=f"p{i}") for i, v in enumerate(values)]
    )
    if base is not None:
        lines = [sample("t", i, value=v, prediction=f"b{i}") for i, v in enumerate(base)]
        write_lines(run / "base/zero-shot/samples.jsonl", lines)
    base_name = "base/zero-shot/samples.jsonl" if base is not None else None
    return read_answers(RunFolder(run), model="lora", base=base_name, metric="rougeL", higher_is_better=higher)


def predictions(answers: Answers | None) -> tuple[list[str], list[str]]:
    assert answers is not None
    return [a.prediction for a in answers.best], [a.prediction for a in answers.worst]


def test_the_six_best_and_six_worst_are_shown_best_and_worst_first(tmp_path: Path) -> None:
    best, worst = predictions(answers_of(tmp_path, [i / 20 for i in range(20)]))
    assert best == ["p19", "p18", "p17", "p16", "p15", "p14"]
    assert worst == ["p0", "p1", "p2", "p3", "p4", "p5"]


def test_where_lower_is_better_the_least_value_is_best(tmp_path: Path) -> None:
    best, worst = predictions(answers_of(tmp_path, [i / 20 for i in range(20)], higher=False))
    assert best[0] == "p0"
    assert worst[0] == "p19"


def test_equal_values_are_ranked_by_the_gain_over_the_base(tmp_path: Path) -> None:
    best, worst = predictions(answers_of(tmp_path, [1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]))
    assert best == ["p1", "p0"]
    assert worst == ["p2", "p3"]


def test_no_answer_is_both_best_and_worst(tmp_path: Path) -> None:
    best, worst = predictions(answers_of(tmp_path, [0.5] * 7))
    assert (len(best), len(worst)) == (4, 3)
    assert not set(best) & set(worst)


def test_one_answer_is_a_best_one(tmp_path: Path) -> None:
    assert predictions(answers_of(tmp_path, [0.3])) == (["p0"], [])


def test_the_base_answer_of_the_same_record_stands_beside(tmp_path: Path) -> None:
    answers = answers_of(tmp_path, [0.9, 0.1], [0.2, 0.3])
    assert answers is not None
    assert (answers.best[0].base_prediction, answers.best[0].base_value) == ("b0", 0.2)
    assert (answers.worst[0].base_prediction, answers.worst[0].base_value) == ("b1", 0.3)
    assert answers.best[0].references == ("Sci/Tech",)


def test_answers_without_a_finite_value_are_counted(tmp_path: Path) -> None:
    answers = answers_of(tmp_path, [0.5, float("nan"), 0.4])
    assert answers is not None
    assert (answers.num_records, answers.num_without_value) == (2, 1)


def test_a_run_without_answers_has_none(tmp_path: Path) -> None:
    assert read_answers(RunFolder(tmp_path), model="x", base=None, metric="rougeL", higher_is_better=True) is None
