"""What was lost on the tasks and in the metric that a certificate speaks of, and where it does not speak."""

from __future__ import annotations

from keeptune.evaluation.metrics import Answer
from keeptune.retention.budget import Budget
from keeptune.retention.chance import LeftOut
from keeptune.stages.budget_rows import left_out_elsewhere, under_budget

POINTS = Budget(0.1, "points", "exact_match")
HEADLINE = LeftOut("headline", "headline", "others", "exact_match", 0.0, 0.0)
TASKS = frozenset({"sums", "names", "headline"})


def answers(right: dict[str, int], *, rouge: float) -> list[Answer]:
    """Return ten answers to each task, of which so many are right; those to headline have this ROUGE-L."""
    return [
        Answer(
            id=f"{task}-{i}",
            task=task,
            cluster=f"{task}-{i}",
            prompt="?",
            prediction="",
            references=("yes",),
            ended=True,
            metrics={"exact_match": float(i < right[task]), "rougeL": rouge if task == "headline" else 0.5},
            num_target_tokens=1,
        )
        for task in ("sums", "names", "headline")
        for i in range(10)
    ]


BASE = answers({"sums": 10, "names": 8, "headline": 0}, rouge=0.827)
TUNED = answers({"sums": 7, "names": 8, "headline": 0}, rouge=0.615)


def test_the_mean_over_the_others_leaves_out_what_the_certificate_leaves_out() -> None:
    [row] = under_budget(BASE, TUNED, budgets={"others": POINTS}, left_out=[HEADLINE], tasks=TASKS)
    assert (row["suite"], row["metric"], row["without"]) == ("others", "exact_match", ["headline"])
    # 3 of 20 records, where headline's 10 would have made it 3 of 30.
    assert (row["num_records"], round(row["forgetting"], 6)) == (20, 0.15)
    assert row["low"] < 0.15 < row["high"]


def test_a_budget_in_another_metric_is_measured_in_that_metric() -> None:
    budget = Budget(0.1, "points", "rougeL")
    [row] = under_budget(BASE, TUNED, budgets={"headline": budget}, left_out=[], tasks=TASKS)
    assert (row["suite"], row["metric"], round(row["forgetting"], 6), row["without"]) == (
        "headline",
        "rougeL",
        0.212,
        [],
    )


def test_a_suite_that_is_left_out_whole_or_was_not_answered_has_no_row() -> None:
    whole = LeftOut("headline", "headline", "headline", "exact_match", 0.0, 0.0)
    budgets = {"headline": POINTS, "self": Budget(0.02, "nats", "loss")}
    assert [*under_budget(BASE, TUNED, budgets=budgets, left_out=[whole], tasks=TASKS)] == []


def test_where_nothing_is_certified_the_other_metrics_say_what_was_lost() -> None:
    [row] = left_out_elsewhere(BASE, TUNED, metrics=["exact_match", "rougeL"], left_out=[HEADLINE])
    assert (row["suite"], row["metric"], round(row["forgetting"], 6)) == ("headline", "rougeL", 0.212)
