"""A certificate and what was forgotten arrive; the verdict leaves, in words for who never saw one."""

from __future__ import annotations

from collections.abc import Sequence

from keeptune.data.record import OTHER_TASKS
from keeptune.progress import noun
from keeptune.report.certificate import Budget, Certificate, LeftOut
from keeptune.report.forgotten import Lost
from keeptune.report.headline import Phrase, series
from keeptune.report.tables import Report
from keeptune.report.wording import (
    NO_BREAK,
    count,
    decimal,
    decimals_for,
    interval,
    metric_label,
    suite_label,
    unit_label,
)


def verdict_sentence(certificate: Certificate, *, others: frozenset[str]) -> str:
    """Return the verdict in words for who never saw one; `others` are the tasks that were not trained on.

    Its first sentence names the suites that nothing is certified for.
    """
    left_out = certificate.left_out_at_chance
    first = f"{left_out_words(left_out)} " if left_out else ""
    return first + _verdict(certificate, kept=_kept(certificate, others=others))


def left_out_words(left_out: Sequence[LeftOut]) -> str:
    """Return the sentence that says for which suites nothing is certified, and why."""
    low = [
        f"{suite_label(one.name)} ({metric_label(one.metric)} {decimal(one.base)}, chance {decimal(one.chance)})"
        for one in left_out
        if one.reason != "budget"
    ]
    kept = [
        f"{suite_label(one.name)} ({metric_label(one.metric)} {decimal(one.base)})"
        for one in left_out
        if one.reason == "budget"
    ]
    reasons = (
        (low, "the base model scores no better than chance there"),
        (kept, "the base model scores no more than the budget allows to lose there"),
    )
    return " ".join(f"Not certified for {series(parts)}: {reason}." for parts, reason in reasons if parts)


def _verdict(certificate: Certificate, *, kept: str) -> str:
    if certificate.verdict == "CERTIFIED":
        part = 100 * (certificate.alpha or 0.0)
        share = "" if part == 100 else f", {part:g}{NO_BREAK}% of the way from the base model to the trained one"
        sure = f", with {100 * (1 - certificate.delta):.4g}{NO_BREAK}% confidence," if certificate.delta else ""
        return (
            f"Records set aside for this test alone show{sure} that the delivered model "
            f"({certificate.model or '?'}{share}) forgets {kept}."
        )
    shots = certificate.fallback_shots
    behind = f"with {count(shots)} solved {noun(shots, 'examples')} in its prompt" if shots else "as it is"
    fallback = certificate.fallback or f"Use the base model {behind}."
    if certificate.verdict == "NOT CERTIFIED":
        return (
            f"No tuned model could be shown to stay within its budget ({kept}), so none is delivered. That does not "
            f"prove that they forget too much. {fallback}"
        )
    return (
        f"Even the smallest tested step away from the base model forgot more than the budget allows ({kept}), so no "
        f"tuned model is delivered. {fallback}"
    )


def _kept(certificate: Certificate, *, others: frozenset[str]) -> str:
    """Return what each suite may lose, in words."""
    outside = [one.suite for one in certificate.left_out_at_chance if one.budget == OTHER_TASKS and one.suite in others]
    parts = []
    for budget in certificate.budgets:
        but = f" but {series(outside)}" if outside and budget.suite == OTHER_TASKS else ""
        parts.append(f"at most {budget_words(budget)} on {suite_label(budget.suite)}{but}")
    return "; ".join(parts)


def budget_words(budget: Budget) -> str:
    """Return a budget as the page says it: points in units of the score, in which all losses stand."""
    if budget.unit != "points" or budget.amount is None or budget.metric is None:
        return budget.text
    return f"{budget.amount:.3g} of {metric_label(budget.metric)}"


def alpha_sentence(report: Report) -> tuple[Phrase, ...]:
    """Return what the whole training would have given and cost, where the delivered model is on the way to it."""
    delivered, metric = report.forgotten.delivered, report.main_metric
    if delivered is None or delivered[1] == 1.0 or metric is None:
        return ()
    model, suite = delivered[0], report.forgotten.main_suite
    score = report.score(model, metric)
    lost = [report.forgotten.lost(model, alpha, suite) for alpha in (1.0, delivered[1])]
    reached = f"reaches {decimal(score.mean, decimals_for(score.mean))}" if score else "was not scored"
    phrases = [Phrase(f"The whole training (alpha 1) {reached}")]
    if lost[0] is not None and lost[1] is not None:
        whole, kept = (lost_words(row) for row in lost if row is not None)
        of = "" if lost[0].metric == "loss" else "of "
        phrases += [
            Phrase(", and "),
            Phrase(f"loses {whole}", strong=True),
            Phrase(f" {of}{unit_label(lost[0].metric)} on {suite_label(lost[0].suite)}, where this model loses {kept}"),
        ]
    return (*phrases, Phrase(". Scores on this page without an alpha are those of the whole training."))


def lost_words(row: Lost) -> str:
    """Return what was lost with its interval, as in "0.503 (0.451 to 0.557)"."""
    places = decimals_for(row.forgetting, row.low, row.high)
    ends = f" ({interval(row.low, row.high, places)})" if row.low is not None else ""
    return f"{decimal(row.forgetting, places)}{ends}"
