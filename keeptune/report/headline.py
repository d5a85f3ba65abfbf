"""A report's tables arrive; the one sentence that says what came of the run leaves, with its key numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keeptune.data.record import ALL_TASKS, OTHER_TASKS
from keeptune.progress import noun
from keeptune.report.broken import broken_base_sentence, broken_elsewhere_sentence, broken_sentence
from keeptune.report.cost import Cost
from keeptune.report.differences import Paired
from keeptune.report.scores import Score
from keeptune.report.shots import ShotRow, few_shot_left_out
from keeptune.report.tables import Report
from keeptune.report.wording import (
    NO_BREAK,
    count,
    decimal,
    decimals_for,
    interval,
    metric_label,
    num_bytes,
    parameters,
    percent,
    seconds,
)

_FOUND = {"unclear": "shows no clear change", "same": "changes no record’s score"}
_FOUND_ELSEWHERE = {"better": "gains", "worse": "loses", **_FOUND}
_FOUND_BESIDE_SHOTS = {
    "better": "beats that",
    "worse": "does worse",
    "unclear": "shows no clear difference from that",
    "same": "does the same on every record",
}
# Fewer prompts without an example are not worth a clause.
_LEAST_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Phrase:
    """A piece of a sentence; `strong` pieces carry the finding."""

    text: str
    strong: bool = False


@dataclass(frozen=True, slots=True)
class KeyNumber:
    """A number that a reader takes away, with what it is and what qualifies it."""

    label: str
    value: str
    note: str


def base_label(report: Report) -> str:
    """Return the base model's name without its folder, owner and revision."""
    name = (report.base_name or "").split("@")[0].rstrip("/")
    return name.split("/")[-1] or "the base model"


def series(names: Sequence[str], *, of: str = "tasks") -> str:
    """Return names as prose: "a", "a and b", "a, b and c"; more than three are counted as so many `of` them."""
    if len(names) > 3:
        return f"{len(names)} {of}"
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def shown(report: Report, unit: str) -> str:
    """Return the number of train records that a training shows, as so many `unit`, and of how many if not of all.

    A mixture may show a part of them only; without a number for lack of an audit.
    """
    number, left_out = report.audit.num_train, report.num_never_shown
    if number is None:
        return unit
    of_all = f"{count(number)} {noun(number, unit)}"
    return f"{count(number - left_out)} of {of_all}" if left_out else of_all


def telling_metric(report: Report, model: str, *, task: str = ALL_TASKS) -> str | None:
    """Return the metric that says what tuning changed: the main one, or the first that moved where that did not.

    It did not move where no record's score changed.
    """
    main = report.main_metric
    found = {name: report.difference(model, name, task=task) for name in (metric.name for metric in report.metrics)}
    verdicts = {n: p.verdict(higher_is_better=report.higher_is_better(n)) for n, p in found.items() if p is not None}
    if main is None or verdicts.get(main) != "same":
        return main
    moved = (name for name, verdict in verdicts.items() if verdict in ("better", "worse"))
    return next(moved, main)


def headline(report: Report) -> tuple[Phrase, ...]:
    """Return what was trained, on what, what it gained and at what cost, as far as the run folder tells.

    Broken answers come first: a score of them says little.
    """
    method = report.selection.selected
    if method is None:
        return (Phrase(_unfinished(report)),)
    phrases = [*_broken(report), Phrase(f"{_trained(report, method)} ")]
    delivered = report.forgotten.delivered
    if delivered is not None and delivered[1] < 1.0:
        return (*phrases, *_reached(report, *delivered), Phrase(_cost(report.cost(method))))
    score = report.score(method, report.main_metric) if report.main_metric else None
    if report.main_metric is None or score is None:
        return (*phrases, Phrase("is chosen; it has not been scored on the test split."))
    phrases += _gain(report, method)
    return (*phrases, Phrase(_cost(report.cost(method))))


def _broken(report: Report) -> list[Phrase]:
    first, colon, rest = broken_sentence(report).partition(":")
    return [Phrase(first, strong=True), Phrase(f"{colon}{rest} ")] if first else []


def broken_sentences(report: Report) -> tuple[Phrase, ...]:
    """Return that the base's answers are broken, or the chosen model's to other tasks; nothing where neither are."""
    base, elsewhere = broken_base_sentence(report), broken_elsewhere_sentence(report)
    found = [Phrase("The base model’s answers are broken", strong=True), Phrase(f": {base} ")] if base else []
    if base:
        found.append(Phrase("A gain over its scores may mean no more than that answers end. "))
    if elsewhere:
        where = "On tasks that it was not trained on, the model’s answers are broken"
        found += [Phrase(where, strong=True), Phrase(f": {elsewhere}")]
    return tuple(found)


def target_score(report: Report, model: str, alpha: float, *, metric: str, task: str = ALL_TASKS) -> Score | None:
    """Return a method's score at `alpha`, None where it was not measured."""
    if alpha == 1.0:
        return report.score(model, metric, task=task)
    wanted = (alpha, model, metric, task)
    found = (s for a, s in report.forgotten.targets if (a, s.model, s.metric, s.task) == wanted)
    return next(found, None)


def _reached(report: Report, model: str, alpha: float) -> list[Phrase]:
    """Return what a model on the way reaches: its difference from the base is not paired, its score is known."""
    metric = telling_metric(report, model)
    score = target_score(report, model, alpha, metric=metric) if metric else None
    if metric is None or score is None:
        return [Phrase("has not been scored on the test split")]
    base = next((s for name in report.models if name not in report.methods and (s := report.score(name, metric))), None)
    places = decimals_for(score.mean, base.mean if base else None)
    before = f" (base {decimal(base.mean, places)})" if base else ""
    records = records_of(score) + _of_the_same_tasks(report)
    return [
        Phrase(f"reaches {metric_label(metric)} "),
        Phrase(decimal(score.mean, places), strong=True),
        Phrase(f" (95{NO_BREAK}% interval {interval(score.low, score.high, places)}) on {records}{before}"),
    ]


def _unfinished(report: Report) -> str:
    if not report.methods:
        return "No method has been trained in this run yet."
    if report.forgotten.certificate is not None:
        return "No tuned model is delivered by this run: the answer is the base model."
    done = [cost.model for cost in report.costs]
    begun = [name for name in report.methods if name not in done]
    parts = [f"{series(done)} trained to the end" if done else "", f"{series(begun)} unfinished" if begun else ""]
    return f"This run has chosen no method yet: {'; '.join(filter(None, parts))}."


def _trained(report: Report, method: str) -> str:
    tasks = report.tasks or report.audit.trained_tasks
    of = f" of {series(tasks)}" if tasks else ""
    data = f" on {shown(report, 'records')}{of}" if report.audit.num_train is not None or tasks else ""
    cost = report.cost(method)
    kind = f" ({cost.peft_type})" if cost and cost.peft_type and cost.peft_type.lower() != method.lower() else ""
    delivered = report.forgotten.delivered
    part = delivered[1] if delivered is not None else 1.0
    on_the_way = f" and scaled to {100 * part:g}{NO_BREAK}% of its change" if part < 1.0 else ""
    return f"{base_label(report)}, tuned with {method}{kind}{data}{on_the_way},"


def others_sentence(report: Report) -> tuple[Phrase, ...]:
    """Return what became of the tasks that were not trained on; nothing where there are none, or no choice."""
    method, metric, tasks = report.selection.selected, report.main_metric, report.other_tasks
    score = report.score(method, metric, task=OTHER_TASKS) if method and metric else None
    if not tasks or metric is None or score is None:
        return ()
    which = f"another task, {tasks[0]}" if len(tasks) == 1 else f"{count(len(tasks))} other tasks"
    phrases = [Phrase(f"On {which}, which it was not trained on, it ")]
    label, paired = metric_label(metric), report.difference(score.model, metric, task=OTHER_TASKS)
    base = report.score(paired.against, metric, task=OTHER_TASKS) if paired else None
    if paired is None or base is None or paired.difference is None:
        reached = decimal(score.mean, decimals_for(score.mean))
        return (*phrases, Phrase(f"reaches {label} {reached}; the base was not scored there."))
    places = decimals_for(score.mean, base.mean)
    verdict = paired.verdict(higher_is_better=report.higher_is_better(metric))
    found = _FOUND_ELSEWHERE[verdict]
    if base.mean == 0 == score.mean and report.higher_is_better(metric):
        found = "has no score to lose"
    change = f"difference {decimal(paired.difference, places, signed=True)}"
    doubt = f"95 % interval {interval(paired.low, paired.high, places, signed=True)}"
    span = f"{label} went from {decimal(base.mean, places)} to {decimal(score.mean, places)}"
    # Where 0 is the worst score, a base that has it makes "no clear change" say nothing.
    at_worst = base.mean == 0 and report.higher_is_better(metric)
    note = f" The base scored 0 there, and had no {label} to lose." if at_worst and score.mean != 0 else ""
    return (*phrases, Phrase(found, strong=True), Phrase(f": {span} ({change}, {doubt}).{note}"))


def shots_sentence(report: Report) -> tuple[Phrase, ...]:
    """Return whether the chosen method beats the base with solved examples in its prompt; nothing where none has been.

    The best number of examples stands for all, and the mean over its random choices for that.
    """
    method = report.selection.selected
    left_out = few_shot_left_out(report.shot_rows)
    if left_out and not report.few_shot:
        return Phrase("There is no few-shot score", strong=True), Phrase(f": {left_out[0][1]}")
    metric = telling_metric(report, method) if method else None
    best = report.best_few_shot(metric) if metric else None
    paired = report.difference_from_shots(method, metric) if method and metric else None
    if method is None or metric is None or best is None or paired is None or paired.difference is None:
        return ()
    rows = [row for row in report.shot_rows if row.name in best.rows]
    tuned = report.score(method, metric)
    places = decimals_for(best.mean, tuned.mean if tuned else None)
    number = f"{count(best.shots)} solved {noun(best.shots, 'examples')}"
    which = f"the {number} most like the question" if best.is_nearest else number
    over = f" (the mean of {count(best.num_draws)} random draws)" if best.num_draws > 1 else ""
    without, num_prompts = (sum(n or 0 for n in of) for of in zip(*map(_prompts, rows), strict=True))
    crowded = without >= _LEAST_SHARE * num_prompts
    room = f" ({count(without)} of {count(num_prompts)} prompts had room for none)" if without and crowded else ""
    verdict = paired.verdict(higher_is_better=report.higher_is_better(metric))
    found = _FOUND_BESIDE_SHOTS[verdict]
    delivered = report.forgotten.delivered
    whole = ", trained to the end," if delivered is not None and delivered[1] < 1.0 else ""
    doubt = f"95 % interval {interval(paired.low, paired.high, places, signed=True)}"
    return (
        Phrase(
            f"With {which} in its prompt{room} and no training, the base has {metric_label(metric)} "
            f"{decimal(best.mean, places)}{over}; {method}{whole} "
        ),
        Phrase(found, strong=True),
        Phrase(f" (difference {decimal(paired.difference, places, signed=True)}, {doubt})."),
    )


def _prompts(row: ShotRow) -> tuple[int | None, int | None]:
    return row.num_without_exemplars, row.num_records


def _gain(report: Report, method: str) -> list[Phrase]:
    main, metric = report.main_metric, telling_metric(report, method)
    score = report.score(method, metric) if metric else None
    assert main is not None and metric is not None and score is not None, "only what was scored has gained"
    label, records = metric_label(metric), records_of(score) + _of_the_same_tasks(report)
    paired = report.difference(method, metric)
    base = report.score(paired.against, metric) if paired else None
    if paired is None or base is None or paired.difference is None:
        places = decimals_for(score.mean)
        return [
            Phrase(f"reaches {label} "),
            Phrase(decimal(score.mean, places), strong=True),
            Phrase(f" on {records}; the base was not scored on them"),
        ]
    places = decimals_for(score.mean, base.mean)
    verdict = paired.verdict(higher_is_better=report.higher_is_better(metric))
    before, after = decimal(base.mean, places), decimal(score.mean, places)
    if verdict == "same":
        if base.mean == 0:
            return [Phrase(f"leaves {label} at 0", strong=True), Phrase(f" on all {records}")]
        return [Phrase(f"changes no record’s {label}", strong=True), Phrase(f" on {records}: it stays {before}")]
    doubt = f" (95 % interval {interval(paired.low, paired.high, places, signed=True)})"
    change = decimal(paired.difference, places, signed=True)
    if verdict == "unclear":
        found = [
            Phrase("shows no clear change", strong=True),
            Phrase(f" in {label} on {records}: {before} to {after}, "),
        ]
    else:
        verb = "raises" if paired.difference > 0 else "lowers"
        span = Phrase(f"{before} to {after}", strong=True)
        found = [Phrase(f"{verb} {label} on {records} from "), span, Phrase(", a difference of ")]
    still = [] if metric == main else [Phrase(f"; {_stayed(report, method, metric=main)}", strong=True)]
    return [*found, Phrase(change, strong=True), Phrase(doubt), *still]


def _stayed(report: Report, method: str, *, metric: str) -> str:
    score = report.score(method, metric)
    mean = score.mean if score else None
    return f"{metric_label(metric)} stayed {'0' if mean == 0 else decimal(mean, decimals_for(mean))} on all of them"


def _of_the_same_tasks(report: Report) -> str:
    return f" of the same {noun(len(report.tasks), 'tasks')}" if report.other_tasks and report.tasks else ""


def _of_tasks(report: Report) -> str:
    return f" of {series(report.tasks)}" if report.tasks else ""


def records_of(score: Score) -> str:
    """Return how many test records a score is over, in words."""
    return f"{count(score.num_records)} test {noun(score.num_records, 'records')}"


def _cost(cost: Cost | None) -> str:
    if cost is None:
        return "."
    parts = []
    if cost.trained_parameters is not None:
        share = percent(cost.trained_parameters, cost.total_parameters)
        parts.append(f"{parameters(cost.trained_parameters)} trained parameters ({share} of all)")
    if cost.train_seconds is not None:
        parts.append(f"{seconds(cost.train_seconds)} of training")
    return f", at the cost of {' and '.join(parts)}." if parts else "."


def key_numbers(report: Report) -> list[KeyNumber]:
    """Return up to five numbers below the headline; none of them where nothing was chosen."""
    method = report.selection.selected
    if method is None:
        return []
    metric = telling_metric(report, method)
    found = _score_numbers(report, method, metric) if metric else []
    cost = report.cost(method)
    if cost is not None and cost.train_seconds is not None:
        rate = f"{count(cost.tokens_per_second)} tokens/s, peak {num_bytes(cost.peak_memory_bytes)}"
        found.append(KeyNumber("Time of training", seconds(cost.train_seconds), rate))
    if cost is not None and cost.trained_parameters is not None:
        share = f"{percent(cost.trained_parameters, cost.total_parameters)} of {parameters(cost.total_parameters)}"
        found.append(KeyNumber("Trained parameters", parameters(cost.trained_parameters), share))
    return found


def _score_numbers(report: Report, method: str, metric: str) -> list[KeyNumber]:
    score, paired = report.score(method, metric), report.difference(method, metric)
    if score is None:
        return []
    base = report.score(paired.against, metric) if paired else None
    places = decimals_for(score.mean, base.mean if base else None)
    before = f"base {decimal(base.mean, places)}" if base else "base not scored"
    note = f"{_doubt(score, places)}{before}; {records_of(score)}{_of_tasks(report)}"
    delivered = report.forgotten.delivered
    if delivered is not None and delivered[1] < 1.0:
        return _on_the_way(report, *delivered, metric=metric, before=before)
    found = [KeyNumber(metric_label(metric), decimal(score.mean, places), note)]
    if paired is not None:
        found.append(_difference_number(paired, "Difference from the base", places=places))
    behind_examples = report.difference_from_shots(method, metric)
    if behind_examples is not None:
        found.append(_difference_number(behind_examples, "Difference from few-shot", places=places))
    return found


def _on_the_way(report: Report, model: str, alpha: float, *, metric: str, before: str) -> list[KeyNumber]:
    """Return the delivered model's score, and that of the whole training, which is not delivered."""
    found, whole = [], f"{metric_label(metric)} of the whole training"
    for label, at, note in ((metric_label(metric), alpha, before), (whole, 1.0, "not delivered")):
        score = target_score(report, model, at, metric=metric)
        if score is not None:
            places = decimals_for(score.mean)
            note = f"{_doubt(score, places)}{note}; {records_of(score)}{_of_tasks(report)}"
            found.append(KeyNumber(label, decimal(score.mean, places), note))
    return found


def _doubt(score: Score, places: int) -> str:
    return f"95 %: {interval(score.low, score.high, places)}; " if score.low is not None else ""


def _difference_number(paired: Paired, label: str, *, places: int) -> KeyNumber:
    return KeyNumber(
        label,
        decimal(paired.difference, places, signed=True),
        f"95 %: {interval(paired.low, paired.high, places, signed=True)}",
    )
