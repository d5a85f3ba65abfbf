from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from keeptune.retention.budget import Budget
from keeptune.retention.chance import LeftOut
from keeptune.retention.drops import Drops
from keeptune.retention.verdict import Verdict, verdict
from keeptune.retention.walk import Candidate, Choice, Walk, walk
from tests.retention.simulated import single

TWO_POINTS = Budget(0.02, "points", "exact_match")
NATS = Budget(0.02, "nats", "loss")
SOME_LOST = np.array([1.0] * 25 + [-1.0] * 20 + [0.0] * 955)


def walked(budgets: Mapping[str, Budget], drops: Mapping[str, Mapping[str, Drops]], delta: float = 0.05) -> Walk:
    paths = [Candidate(name, (0.5, 1.0)) for name in drops]
    return walk(paths, budgets=budgets, delta=delta, drops_at=lambda name, _: drops[name])


def test_a_certificate_vouches_for_every_budget_at_once_and_tells_each_bound() -> None:
    rows = {"sst2": single(SOME_LOST), "text": single(np.zeros(600))}
    found = verdict(walked({"sst2": TWO_POINTS, "text": NATS}, {"lora": rows}), choice=Choice("lora", 1.0))
    assert (found.kind, found.choice, found.suite, found.num_records_needed) == (
        "CERTIFIED",
        Choice("lora", 1.0),
        None,
        None,
    )
    assert found.sentence == (
        "With 95 % confidence over the draw of records, lora at alpha 1 stays within every budget: sst2 loses at most "
        "0.02 of exact_match (measured 0.005, upper bound for this suite alone 0.0167); text loses at most 0.02 nats "
        "(measured 0, upper bound for this suite alone 0.00498). A record's change beyond 1 nat counts as that."
    )


def test_the_confidence_told_is_that_of_this_opening() -> None:
    one = walked({"text": NATS}, {"lora": {"text": single(np.zeros(600))}}, delta=0.0125)
    assert verdict(one, choice=Choice("lora", 0.5)).sentence.startswith("With 98.75 % confidence")


def test_too_few_records_are_told_how_many_would_do() -> None:
    rows = {"sst2": single(SOME_LOST[::2]), "text": single(np.zeros(600))}
    found = verdict(walked({"sst2": TWO_POINTS, "text": NATS}, {"lora": rows}), choice=None)
    assert found == Verdict(
        "NOT CERTIFIED",
        None,
        "sst2",
        found.num_records_needed,
        "Not certified: 500 records of sst2 are too few to show that lora at alpha 0.5 loses less than 0.02 of "
        "exact_match (measured 0.006, upper bound 0.0234). "
        f"About {found.num_records_needed:,} records would be needed.",
    )
    # (1.645 + 0.842)^2 * 0.046 / 0.014^2, and more as the likeliest null has more losses.
    assert found.num_records_needed is not None
    assert 1500 < found.num_records_needed < 1600


def test_the_suite_that_asks_most_speaks_for_a_candidate_and_the_candidate_that_asks_least_for_all() -> None:
    # Of 500 records: 18 moved and nothing was lost, or 40 did, or 80.
    little, some, much = (single([1.0, -1.0] * half + [0.0] * (500 - 2 * half)) for half in (9, 20, 40))
    over = single(np.ones(100))
    paths = {
        "full": {"a": over, "b": little},
        "lora": {"a": little, "b": some},
        "dora": {"a": much, "b": some},
    }
    found = verdict(walked({"a": TWO_POINTS, "b": TWO_POINTS}, paths, delta=0.03), choice=None)
    assert (found.kind, found.suite) == ("NOT CERTIFIED", "b")
    assert "500 records of b are too few to show that lora at alpha 0.5" in found.sentence
    reverse = dict(reversed(paths.items()))
    assert verdict(walked({"a": TWO_POINTS, "b": TWO_POINTS}, reverse, delta=0.03), choice=None) == found


def test_where_no_bound_exists_none_is_told() -> None:
    found = verdict(walked({"text": NATS}, {"lora": {"text": single([0.0] * 2)}}, delta=1e-15), choice=None)
    assert "(measured 0, upper bound none)" in found.sentence


def test_a_mean_over_the_budget_is_infeasible_for_any_number_of_records() -> None:
    rows = {"text": single(np.zeros(50)), "sst2": single([1.0, 0.0, 0.0, 0.0] * 50)}
    found = verdict(walked({"text": NATS, "sst2": TWO_POINTS}, {"lora": rows}), choice=None)
    assert found == Verdict(
        "INFEASIBLE",
        None,
        "sst2",
        None,
        "Infeasible: lora at alpha 0.5, the smallest tested, lost 0.25 of exact_match on sst2, and the budget is "
        "0.02 of exact_match. More records would not change that: test smaller retention.alphas, raise the budget, or "
        "train with a lower learning rate or more replay.",
    )


def test_where_there_is_one_model_no_alpha_is_named() -> None:
    too_few = walked({"sst2": TWO_POINTS}, {"tuned": {"sst2": single(SOME_LOST[::2])}})
    over = walked({"sst2": TWO_POINTS}, {"tuned": {"sst2": single(np.ones(600))}})
    certified = walked({"text": NATS}, {"tuned": {"text": single(np.zeros(600))}})
    for one, choice, words in (
        (certified, Choice("tuned", 1.0), "of records, tuned stays within every budget"),
        (too_few, None, "too few to show that tuned loses less than"),
        (over, None, "Infeasible: tuned lost 1 of exact_match on sst2, and the budget is"),
    ):
        assert words in verdict(one, choice=choice, one_model=True).sentence


def test_a_later_failure_takes_nothing_from_what_was_certified() -> None:
    path = walk(
        [Candidate("lora", (0.5, 1.0))],
        budgets={"sst2": TWO_POINTS},
        delta=0.05,
        drops_at=lambda _, alpha: {"sst2": single(np.full(1000, float(alpha == 1.0)))},
    )
    assert verdict(path, choice=Choice("lora", 0.5)).kind == "CERTIFIED"


def test_each_sentence_says_first_what_nothing_is_certified_for() -> None:
    certified = walked({"text": NATS}, {"lora": {"text": single(np.zeros(600))}})
    too_few = walked({"sst2": TWO_POINTS}, {"lora": {"sst2": single(SOME_LOST[::2])}})
    over = walked({"sst2": TWO_POINTS}, {"lora": {"sst2": single(np.ones(600))}})
    left_out = [
        LeftOut("headline", "headline", "headline", "rougeL", 0.021, 0.0),
        LeftOut("yes-no of others", "yes-no", "others", "exact_match", 0.51, 0.5),
    ]
    for one, choice, kind in (
        (certified, Choice("lora", 1.0), "CERTIFIED"),
        (too_few, None, "NOT CERTIFIED"),
        (over, None, "INFEASIBLE"),
    ):
        found = verdict(one, choice=choice, left_out=left_out)
        assert found.kind == kind
        assert found.sentence.startswith(
            "Not certified for headline (rougeL 0.021, chance 0), yes-no of others (exact_match 0.51, chance 0.5): the "
            "base model scores no better than chance there. "
        )
        alone = verdict(one, choice=choice).sentence
        assert found.sentence.endswith(alone.replace("within every budget", "within all other budgets"))
