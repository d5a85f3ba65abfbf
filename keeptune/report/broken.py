"""Say in a sentence when a model's answers are broken: they never end, repeat themselves or are empty."""

from __future__ import annotations

from collections.abc import Collection, Iterable
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


def count_broken(
    canaries: Iterable[Canaries], *, model: str, alpha: float | None, tasks: Collection[str]
) -> Broken | None:
    """Return a model's counts over `tasks`, None where they were not taken; `alpha` is None for the base."""
    found = [row for row in canaries if (row.model, row.alpha) == (model, alpha) and row.task in tasks]
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
    """Return what is wrong with the chosen model's answers to the trained tasks, as `describe` says it."""
    return _chosen_on(report, report.tasks)


def broken_base_sentence(report: Report) -> str:
    """Return what is wrong with the base's answers to the trained tasks, where nothing is wrong with the chosen one's.

    What tuning gains over such a base may be an end to its answers and no more.
    """
    base = count_broken(report.forgotten.canaries, model=BASE, alpha=None, tasks=report.tasks)
    found = describe(base, base=None, limit=_limit(report))
    return "" if broken_sentence(report) else found


def broken_elsewhere_sentence(report: Report) -> str:
    """Return what is wrong with the chosen model's answers to tasks that were not trained on."""
    return _chosen_on(report, report.other_tasks)


def _chosen_on(report: Report, tasks: Collection[str]) -> str:
    model, alpha = report.forgotten.delivered or (report.selection.selected, 1.0)
    if model is None:
        return ""
    found = count_broken(report.forgotten.canaries, model=model, alpha=alpha, tasks=tasks)
    base = count_broken(report.forgotten.canaries, model=BASE, alpha=None, tasks=tasks)
    return describe(found, base=base, limit=_limit(report))


def _limit(report: Report) -> str | None:
    of_methods = (dict(decoding.settings) for decoding in report.decodings if decoding.model in report.methods)
    return next(of_methods, {}).get("max_new_tokens")


def label_sentences(report: Report) -> list[str]:
    """Return, for each task that is a choice among labels, the majority's share and the chosen model's main answer."""
    chosen = report.forgotten.delivered or (report.selection.selected, 1.0)
    sentences = []
    for row in report.forgotten.canaries:
        if (row.model, row.alpha) != chosen or row.top_answer is None or row.num_majority is None:
            continue
        sentences.append(
            f"{row.task}: always giving the most frequent label would be right for {count(row.num_majority)} of "
            f"{count(row.num_records)} records. The most frequent answer of {row.model}, “{row.top_answer}”, is given "
            f"{count(row.num_top_answer)} {noun(row.num_top_answer or 0, 'times')} and expected "
            f"{count(row.num_top_expected)} {noun(row.num_top_expected or 0, 'times')}."
        )
    return sentences


def describe(found: Broken | None, *, base: Broken | None, limit: str | None) -> str:
    """Return which answers are broken, and after how many tokens they were cut; empty below a tenth of the answers."""
    if found is None:
        return ""
    parts = [*_unended(found, base, limit=limit), *_looping(found, base), *_empty(found, base)]
    return f"{'; '.join(parts)}." if parts else ""


def _unended(found: Broken, base: Broken | None, *, limit: str | None) -> list[str]:
    if found.num_unended < _LEAST_SHARE * found.num_records:
        return []
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
