"""A certificate and what was forgotten arrive; the verdict leaves, in words for who never saw one."""

from __future__ import annotations

from collections.abc import Sequence

from keeptune.data.record import OTHER_TASKS
from keeptune.progress import noun
from keeptune.report.certificate import Budget, Certificate, LeftOut
from keeptune.report.forgotten import Lost
from keeptune.report.headline import Phrase, series
from keeptune.report.lost_words import but, changed_words, lost_in_words, suite_words
from keeptune.report.scores import Score
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

# More clauses than these are no sentence.
_MOST_ELSEWHERE = 3


def verdict_sentence(certificate: Certificate, *, others: frozenset[str], elsewhere: Sequence[Lost] = ()) -> str:
    """Return the verdict in words for who never saw one; `others` are the tasks that were not trained on.

    Its first sentences name the suites that nothing is certified for, and what the delivered model lost there in other
    metrics (`elsewhere`).
    """
    left_out = certificate.left_out_at_chance
    first = [left_out_words(left_out), _elsewhere(elsewhere)] if left_out else []
    return " ".join([*filter(None, first), _verdict(certificate, kept=_kept(certificate, others=others))])


def left_out_words(left_out: Sequence[LeftOut]) -> str:
    """Return the sentence that says for which suites nothing is certified, and why."""
    nothing: dict[str, list[str]] = {}
    low, kept = [], []
    for one in left_out:
        name, label, base = suite_label(one.name), metric_label(one.metric), decimal(one.base)
        if one.reason == "budget":
            kept.append(f"{name} ({label} {base})")
        elif one.base == 0 == one.chance:
            nothing.setdefault(label, []).append(name)
        else:
            low.append(f"{name} ({label} {base}, chance {decimal(one.chance)})")
    sentences = [f"{series(names)}: the base model has no {label} to lose there" for label, names in nothing.items()]
    sentences += [f"{series(low)}: the base model scores no better than chance there"] if low else []
    sentences += [f"{series(kept)}: the base model scores no more than the budget allows to lose there"] if kept else []
    return " ".join(f"Not certified for {sentence}." for sentence in sentences)


def _elsewhere(rows: Sequence[Lost]) -> str:
    """Return what was lost in other metrics where nothing is certified: in scores, and without any in loss."""
    scores = [row for row in rows if row.metric not in ("loss", "perplexity")]
    found = scores or [row for row in rows if row.metric == "loss"]
    if len(found) > _MOST_ELSEWHERE:
        return "What was lost there in other metrics stands under “What was forgotten”."
    return f"In another metric: {'; '.join(map(lost_in_words, found))}." if found else ""


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
        suite = f"{suite_label(budget.suite)}{but(outside) if budget.suite == OTHER_TASKS else ''}"
        parts.append(f"at most {budget_words(budget)} on {suite}")
    return "; ".join(parts)


def opening_sentence(certificate: Certificate) -> str:
    """Return which opening of the certify records this was, who counted it, and what confidence it left; else empty."""
    number, total, spent = certificate.opening, certificate.confidence, certificate.delta
    if number is None or total is None:
        return ""
    where = f"all openings that {certificate.ledger} knows" if certificate.ledger else "this run folder alone"
    known = "" if certificate.ledger else "; openings in other run folders are not known"
    at = f" at {100 * (1 - spent):.5g}{NO_BREAK}% confidence" if spent else ""
    asked = f"the recipe asks for {100 * total:.4g}{NO_BREAK}% over all openings of these records together"
    if number == 1:
        return (
            f"This was the first time that a model was tested on these records, counted over {where}{known}. It was "
            f"tested{at}, because {asked}, and the rest is kept for later ones."
        )
    return (
        f"This was opening {count(number)} of these records, counted over {where}{known}. Earlier models were tested "
        f"on them, which left less room for error: this time the budget had to be shown{at}, because {asked}. That "
        "takes more records than a first opening."
    )


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
    model = delivered[0]
    score = report.score(model, metric)
    whole, kept = (report.forgotten.main_lost(model, alpha) for alpha in (1.0, delivered[1]))
    reached = f"reaches {_reached(score)}" if score else "was not scored"
    phrases = [Phrase(f"The whole training (alpha 1) {reached}")]
    if whole is not None and kept is not None:
        of = "" if whole.metric == "loss" else "of "
        phrases += [
            Phrase(", and "),
            Phrase(changed_words(whole), strong=True),
            Phrase(f" {of}{unit_label(whole.metric)} on {suite_words(whole)}, where this model {changed_words(kept)}"),
        ]
    return (*phrases, Phrase(". Scores on this page without an alpha are those of the whole training."))


def _reached(score: Score) -> str:
    places = decimals_for(score.mean)
    ends = f" ({interval(score.low, score.high, places)})" if score.low is not None else ""
    return f"{decimal(score.mean, places)}{ends}"
