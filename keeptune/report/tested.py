"""A certificate arrives; the rows of its tests leave, worded."""

from __future__ import annotations

from dataclasses import dataclass

from keeptune.report.certificate import Certificate, Tested
from keeptune.report.lost_words import but
from keeptune.report.wording import decimal, suite_label, unit_label


@dataclass(frozen=True, slots=True)
class TestedRow:
    """A test of the certificate, worded."""

    test: Tested
    alpha: str
    suite: str
    metric: str
    lost: str
    bound: str
    budget: str
    p_value: str


def tested_rows(certificate: Certificate) -> list[TestedRow]:
    """Return a row for each test, in the order in which they were made."""
    budgets = {budget.suite: budget.amount for budget in certificate.budgets}
    left_out = certificate.left_out_at_chance
    without = {
        suite: [one.suite for one in left_out if one.budget == suite and one.suite != suite] for suite in budgets
    }
    return [
        TestedRow(
            test=test,
            alpha=f"{test.alpha:g}",
            suite=f"{suite_label(test.suite)}{but(without.get(test.suite, ()))}",
            metric=unit_label(test.metric or "?"),
            lost=decimal(test.lost, signed=True),
            bound="none" if test.bound is None else decimal(test.bound, signed=True),
            budget=decimal(budgets.get(test.suite)),
            p_value=probability(test.p_value),
        )
        for test in certificate.tests
    ]


def probability(value: float | None) -> str:
    """Return a p-value with as many digits as matter, as in "0.031" and "below 0.0001"."""
    return "below 0.0001" if value is not None and 0 <= value < 0.0001 else decimal(value, 4)
