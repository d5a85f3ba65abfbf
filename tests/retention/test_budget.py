from __future__ import annotations

import pytest

from keeptune.errors import RecipeError
from keeptune.retention.budget import Budget, parse_budget


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 point of exact_match", Budget(0.01, "points", "exact_match")),
        ("2 points", Budget(0.02, "points", "rougeL")),
        ("  0.5points  of  token_f1 ", Budget(0.005, "points", "token_f1")),
        ("1e-1 Points of rougeL", Budget(0.001, "points", "rougeL")),
        ("1.5 points of bleu", Budget(1.5, "points", "bleu", 100.0)),
        ("1 point of chrf", Budget(1.0, "points", "chrf", 100.0)),
        ("0.02 nats", Budget(0.02, "nats", "loss")),
        (".5 nat of loss", Budget(0.5, "nats", "loss")),
    ],
)
def test_a_budget_is_in_the_metrics_own_units(text: str, expected: Budget) -> None:
    found = parse_budget(text, suite="sst2", main_metric="rougeL", loss_cap=1.0)
    assert (found.unit, found.metric) == (expected.unit, expected.metric)
    assert found.amount == pytest.approx(expected.amount)


def test_a_loss_is_worded_in_its_units() -> None:
    assert Budget(0.02, "points", "exact_match").worded(0.0123456) == "0.0123 of exact_match"
    assert Budget(0.02, "nats", "loss").worded(-0.5) == "-0.5 nats"


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        (
            "1 %",
            "found '1 %'; expected points or nats, because 1 % may be one of the base model's score or of the whole "
            "scale. Write for example '1 point of exact_match'.",
        ),
        (
            "2 percent of exact_match",
            "found '2 percent of exact_match'; expected points or nats, because 1 % may be one of the base model's "
            "score or of the whole scale. Write for example '1 point of exact_match'.",
        ),
        (
            "0.02",
            "found '0.02'; expected a number with its unit, points or nats. Write for example "
            "'1 point of exact_match'.",
        ),
        (
            "one point",
            "found 'one point'; expected a number with its unit, points or nats. Write for example "
            "'1 point of exact_match'.",
        ),
        (
            "1 bit",
            "found '1 bit'; expected a number with its unit, points or nats. Write for example "
            "'1 point of exact_match'.",
        ),
        (
            "",
            "found ''; expected a number with its unit, points or nats. Write for example '1 point of exact_match'.",
        ),
        (
            "-1 point",
            "found '-1 point'; expected more than 0 and less than 100 points. Write for example "
            "'1 point of exact_match'.",
        ),
        (
            "0 points of bleu",
            "found '0 points of bleu'; expected more than 0 and less than 100 points. Write for example "
            "'1 point of bleu'.",
        ),
        (
            "100 points of chrf",
            "found '100 points of chrf'; expected more than 0 and less than 100 points. Write for example "
            "'1 point of chrf'.",
        ),
        (
            "1 nat",
            "found '1 nat'; expected more than 0 and less than 1 nat (retention.loss_cap). Write for example "
            "'0.02 nats'.",
        ),
        (
            "1 point of loss",
            "found '1 point of loss'; expected nats of the loss, or points of a metric other than it and perplexity. "
            "Write for example '0.02 nats'.",
        ),
        (
            "1 point of perplexity",
            "found '1 point of perplexity'; expected nats of the loss, or points of a metric other than it and "
            "perplexity. Write for example '0.02 nats'.",
        ),
        (
            "0.1 nats of exact_match",
            "found '0.1 nats of exact_match'; expected nats of the loss, or points of a metric other than it and "
            "perplexity. Write for example '1 point of exact_match'.",
        ),
        (
            "1 point of exact-match",
            "found '1 point of exact-match'; expected a number with its unit, points or nats. Write for example "
            "'1 point of exact_match'.",
        ),
    ],
)
def test_what_is_no_budget_is_refused_with_one_that_is(text: str, refusal: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse_budget(text, suite="sst2", main_metric="exact_match", loss_cap=1.0)
    assert str(error.value) == f"retention.budget.sst2: {refusal}"


def test_points_of_a_suite_scored_by_loss_are_refused() -> None:
    with pytest.raises(RecipeError) as error:
        parse_budget("1 point", suite="text", main_metric="loss", loss_cap=1.0)
    assert str(error.value) == (
        "retention.budget.text: found '1 point'; expected nats of the loss, or points of a metric other than it and "
        "perplexity. Write for example '0.02 nats'."
    )


def test_an_unknown_metric_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError) as error:
        parse_budget("1 point of exact_matches", suite="sst2", main_metric="rougeL", loss_cap=1.0)
    message = str(error.value)
    assert message.startswith("retention.budget.sst2: found 'exact_matches'; expected one of rouge1, rouge2, ")
    assert message.endswith("Did you mean exact_match?")


def test_points_of_a_harness_task_are_of_its_own_metric() -> None:
    assert parse_budget("2 points", suite="arc", main_metric="acc", loss_cap=1.0) == Budget(0.02, "points", "acc")
    assert parse_budget("2 points of acc", suite="arc", main_metric="acc", loss_cap=1.0) == Budget(
        0.02, "points", "acc"
    )
    with pytest.raises(RecipeError, match="found 'acc'; expected one of"):
        parse_budget("2 points of acc", suite="sst2", main_metric="rougeL", loss_cap=1.0)
