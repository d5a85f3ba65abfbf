"""Rows of what was forgotten arrive; clauses, and the tiles of the first screen, leave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from keeptune.progress import noun
from keeptune.report.certificate import Budget, Tested
from keeptune.report.forgotten import Lost
from keeptune.report.headline import KeyNumber, series
from keeptune.report.tables import Report
from keeptune.report.wording import (
    NO_BREAK,
    count,
    decimal,
    decimals_for,
    interval,
    likelihood,
    metric_label,
    suite_label,
)

# Budgets beyond these stand in the section on forgetting alone.
_MOST_BUDGETS = 2


def suite_words(row: Lost) -> str:
    """Return the suite of a row with the tasks that it leaves out: "all other tasks but headline"."""
    return f"{suite_label(row.suite)}{but(row.without)}"


def but(without: Sequence[str]) -> str:
    """Return the tasks that a suite leaves out, " but headline", with a space before it; empty without any."""
    return f" but {series(without, of='of them')}" if without else ""


def lost_in_words(row: Lost, *, of: str = "") -> str:
    """Return what a model lost on a suite as a clause: "ROUGE-L on boolq dropped by 0.200 (95 % interval …)".

    `of` says what the interval is of, where that is more than this suite.
    """
    places = decimals_for(row.forgetting, row.high, row.low)
    ends = f"95 % interval{of} {interval(row.low, row.high, places)}" if row.low is not None else ""
    number = decimal(abs(row.forgetting), places)
    if row.metric == "loss":
        way = "higher" if row.forgetting >= 0 else "lower"
        picture = "; ".join(filter(None, [likelihood(row.forgetting), ends]))
        return f"on {suite_words(row)}, the tuned model’s loss is {number} nats per token {way} ({picture})"
    score = f"{metric_label(row.metric)} on {suite_words(row)}"
    if row.forgetting == 0:
        return f"{score} stayed the same" + (f" ({ends})" if ends else "")
    if row.forgetting > 0 or row.low is None or row.high is None:
        return f"{score} {'dropped' if row.forgetting > 0 else 'rose'} by {number}" + (f" ({ends})" if ends else "")
    # Of a rise, as the sentence speaks of one.
    return f"{score} rose by {number} (95 % interval{of} {interval(-row.high, -row.low, places)})"


def changed_words(row: Lost) -> str:
    """Return what was lost or gained with its interval, as in "loses 0.503 (0.451 to 0.557)"."""
    places, sign = decimals_for(row.forgetting, row.low, row.high), _sign(row.forgetting)
    ends = f" ({interval(*_turned(row.low, row.high, sign=sign), places)})" if row.low is not None else ""
    return f"{'gains' if sign < 0 else 'loses'} {decimal(abs(row.forgetting), places)}{ends}"


def forgotten_numbers(report: Report) -> list[KeyNumber]:
    """Return the tiles of what the delivered model forgot: on test, and on the same tasks as it was certified."""
    forgotten = report.forgotten
    if forgotten.delivered is None:
        return []
    main = forgotten.main_budget
    certified = forgotten.certificate.budgets if forgotten.certificate else ()
    budgets = sorted(certified, key=lambda budget: budget != main)[:_MOST_BUDGETS]
    found = [tile for budget in budgets for tile in _of_budget(report, budget, delivered=forgotten.delivered)]
    row = forgotten.main_lost(*forgotten.delivered)
    return found or ([_on_test(row, label="{}")] if row else [])


def _of_budget(report: Report, budget: Budget, *, delivered: tuple[str, float]) -> Iterator[KeyNumber]:
    certificate = report.forgotten.certificate
    test = certificate.test(budget) if certificate else None
    row = report.forgotten.kept(budget, model=delivered[0], alpha=delivered[1])
    if row is not None:
        yield _on_test(row, label="{}, on test" if test else "{}")
    if test is not None and test.lost is not None:
        yield _certified(test, budget, same=row is not None)


def _on_test(row: Lost, *, label: str) -> KeyNumber:
    sign, places = _sign(row.forgetting), decimals_for(row.base if row.metric != "loss" else row.forgetting)
    of = f"{metric_label(row.metric)} {'gained' if sign < 0 else 'lost'} on {suite_words(row)}"
    if row.metric == "loss":
        of = f"nats per token {'less' if sign < 0 else 'more'} loss on {suite_words(row)}"
    ends = f"95 %: {interval(*_turned(row.low, row.high, sign=sign), places)}" if row.low is not None else ""
    records = f"{count(row.num_records)} {noun(row.num_records, 'records')}" if row.num_records else ""
    picture = likelihood(row.forgetting) if row.metric == "loss" else ""
    note = "; ".join(filter(None, [of, ends, records, picture]))
    return KeyNumber(label.format(_word(sign)), decimal(abs(row.forgetting), places), note)


def _certified(test: Tested, budget: Budget, *, same: bool) -> KeyNumber:
    lost = test.lost or 0.0
    sure = f" with {100 * (1 - test.delta):.4g}{NO_BREAK}% confidence" if test.delta else ""
    most = "no upper bound" if test.bound is None else f"at most {decimal(test.bound)}{sure}"
    which = "the same tasks" if same else suite_label(budget.suite)
    note = f"on {which}; {most}; budget {decimal(budget.amount)}; {count(test.num_records)} records set aside for this"
    return KeyNumber(f"{_word(_sign(lost))}, certified", decimal(abs(lost)), note)


def _sign(forgetting: float) -> int:
    return -1 if forgetting < 0 else 1


def _word(sign: int) -> str:
    return "Gained" if sign < 0 else "Forgotten"


def _turned(low: float | None, high: float | None, *, sign: int) -> tuple[float | None, float | None]:
    """Return the ends of an interval, of a gain where `sign` is -1."""
    return (low, high) if sign > 0 or low is None or high is None else (-high, -low)
