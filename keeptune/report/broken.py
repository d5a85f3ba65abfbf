"""Say in a sentence when a model's answers are broken: they never end, repeat themselves or are empty."""

from __future__ import annotations

from dataclasses import dataclass

from keeptune.progress import noun
from keeptune.report.forgotten import Canaries
from keeptune.report.tables import BASE, Report
from keeptune.report.wording import count

# Below this share of the answers, a score still describes how the model answers.
_LEAST_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Broken:
    """How many of a model's test answers to the trained tasks are cut at the limit, loop or are empty."""

    num_records: int
    num_unended: int
    num_looping: int
    num_empty: int


def broken_answers(report: Report, model: str, alpha: float | None) -> Broken | None:
    """Return the counts over the trained tasks, None where they were not taken; `alpha` is None for the base."""
    found = [
        row
        for row in report.forgotten.canaries
        if (row.model, row.alpha) == (model, alpha) and row.task in report.tasks
    ]
    if not found:
        return None
    return Broken(
        num_records=sum(row.num_records for row in found),
        num_unended=sum(row.num_unended or 0 for row in found),
        num_looping=sum(row.num_looping or 0 for row in found),
        num_empty=sum(row.num_empty or 0 for row in found),
    )


def broken_rows(report: Report) -> list[Canaries]:
    """Return the counts that the page shows: of the base, the trained models and the delivered one, where not all 0."""
    delivered = report.forgotten.delivered
    return [
        row
        for row in report.forgotten.canaries
        if any(row.counts) and (row.alpha in (None, 1.0) or (row.model, row.alpha) == delivered)
    ]


def broken_sentence(report: Report) -> str:
    """Return what is wrong with the chosen model's answers, empty where fewer than a tenth of them are broken."""
    chosen = report.forgotten.delivered or (report.selection.selected, 1.0)
    found = broken_answers(report, chosen[0], chosen[1]) if chosen[0] else None
    if found is None or max(found.num_unended, found.num_looping, found.num_empty) < _LEAST_SHARE * found.num_records:
        return ""
    base = broken_answers(report, BASE, None)
    parts = [*_unended(report, found, base), *_looping(found, base), *_empty(found, base)]
    return f"{'; '.join(parts)}."


def _unended(report: Report, found: Broken, base: Broken | None) -> list[str]:
    if found.num_unended < _LEAST_SHARE * found.num_records:
        return []
    limit = _limit(report)
    after = f"after {limit} tokens" if limit else "at the limit of new tokens"
    # An answer that loops would go on for ever; another one may have ended further on.
    in_loops = min(found.num_looping, found.num_unended)
    for_ever, one = 2 * in_loops >= found.num_unended, found.num_unended == 1
    verb = f"never {'ends' if one else 'end'}" if for_ever else f"{'does' if one else 'do'} not end"
    cut = f"{'it is' if one else 'they are'} cut off {after}"
    which = "all" if in_loops == found.num_unended > 1 else f"{count(in_loops)} of them"
    loops = f", {'' if one else f'{which} '}while repeating the same words" if in_loops else ""
    before = _before(base.num_unended, base) if base else ""
    return [f"{_of(found.num_unended, found)} {verb}: {cut}{loops}{before}"]


def _looping(found: Broken, base: Broken | None) -> list[str]:
    if found.num_looping - found.num_unended < _LEAST_SHARE * found.num_records:
        return []
    before = _before(base.num_looping, base) if base else ""
    return [
        f"{_of(found.num_looping, found)} {'repeats' if found.num_looping == 1 else 'repeat'} the same words{before}"
    ]


def _empty(found: Broken, base: Broken | None) -> list[str]:
    if found.num_empty < _LEAST_SHARE * found.num_records:
        return []
    before = _before(base.num_empty, base) if base else ""
    return [f"{_of(found.num_empty, found)} {'is' if found.num_empty == 1 else 'are'} empty{before}"]


def _of(number: int, found: Broken) -> str:
    return f"{count(number)} of {count(found.num_records)} test {noun(found.num_records, 'answers')}"


def _before(number: int, base: Broken) -> str:
    return f" (base: {count(number)} of {count(base.num_records)})"


def _limit(report: Report) -> str | None:
    of_methods = (decoding for decoding in report.decodings if decoding.model in report.methods)
    settings = next((dict(decoding.settings) for decoding in of_methods), {})
    return settings.get("max_new_tokens")
