"""Answer what a reader asks about the methods: how each was tuned, whether it was done, why it took or forgot more."""

from __future__ import annotations

from keeptune.report.cost import Cost
from keeptune.report.curves import Curve
from keeptune.report.headline import Phrase, series, telling_metric
from keeptune.report.lost_words import suite_words
from keeptune.report.tables import Report
from keeptune.report.wording import count, decimal, decimals_for, metric_label, num_bytes, unit_label

# A smaller fall of the validation loss from one check to the next is no sign of an unfinished training.
_LEAST_FALL_NATS = 0.01
_LEAST_FALL_SHARE = 0.01


def still_improving(curve: Curve) -> bool:
    """Return whether the last check of the validation loss is the lowest, and clearly below the one before it."""
    losses = [loss for _, loss in curve.validation]
    if len(losses) < 2 or losses[-1] > min(losses):
        return False
    fall = losses[-2] - losses[-1]
    return fall >= max(_LEAST_FALL_NATS, _LEAST_FALL_SHARE * losses[-2])


def unfinished_sentence(report: Report) -> tuple[Phrase, ...]:
    """Return which methods were still improving at their last step; nothing where none was."""
    stopped = [cost.model for cost in report.costs if cost.stopped_early]
    names = [curve.model for curve in report.curves if still_improving(curve) and curve.model not in stopped]
    if not names:
        return ()
    were = "was" if len(names) == 1 else "were"
    return (
        Phrase(f"{series(names, of='methods')} {were} still improving when training ended", strong=True),
        Phrase(": the validation loss was still falling. More epochs or a higher learning rate may help."),
    )


def never_moved(curve: Curve) -> bool:
    """Return whether the selecting metric had one value at all checks, of which there were several."""
    return len(curve.values) > 1 and len({value for _, value in curve.values}) == 1


def tied_sentence(report: Report) -> tuple[Phrase, ...]:
    """Return that the selecting metric never moved on validation, and which metric did; nothing where it moved."""
    tied = [curve for curve in report.curves if never_moved(curve)]
    if not tied or tied[0].value_metric is None:
        return ()
    metric, value = tied[0].value_metric, tied[0].values[0][1]
    names = series([curve.model for curve in tied], of="methods")
    checks = count(max(len(curve.values) for curve in tied))
    how = " The lowest validation loss decided which weights are kept." if all(curve.tied for curve in tied) else ""
    return (
        Phrase(f"{metric_label(metric)} could not choose the weights", strong=True),
        Phrase(
            f": on validation it was {decimal(value, decimals_for(value))} at all {checks} checks of {names}.{how} "
            f"Choose by a metric that moves: {_moving(report, tied[0], besides=metric)}."
        ),
    )


def _moving(report: Report, curve: Curve, *, besides: str) -> str:
    """Return settings of the recipe that would have chosen, each with how far its metric moved."""
    method = report.selection.selected or curve.model
    telling = telling_metric(report, method)
    found = []
    if telling not in (None, besides, "loss", "perplexity"):
        base = next((s for n in report.models if n not in report.methods and (s := report.score(n, telling))), None)
        tuned = report.score(method, telling)
        if base is not None and tuned is not None:
            places = decimals_for(base.mean, tuned.mean)
            span = f"{decimal(base.mean, places)} to {decimal(tuned.mean, places)}"
            found.append(f"evaluation.select_by: {telling} ({span} on test)")
    if curve.validation:
        first, last = (decimal(curve.validation[i][1], decimals_for(curve.validation[0][1])) for i in (0, -1))
        found.append(f"evaluation.select_by: loss ({first} to {last} on validation)")
    return " or ".join(found) or "evaluation.select_by: loss"


def memory_sentence(report: Report) -> str:
    """Return why a PEFT method took no less memory than full fine-tuning; empty where it took less."""
    full = next((cost for cost in report.costs if cost.peft_type is None and cost.peak_memory_bytes), None)
    if full is None:
        return ""
    more = [cost for cost in report.costs if cost.peft_type and _at_least(cost, full)]
    if not more:
        return ""
    taken = series([f"{cost.model} ({num_bytes(cost.peak_memory_bytes)})" for cost in more], of="PEFT methods")
    return (
        f"{taken} took no less memory than {full.model} ({num_bytes(full.peak_memory_bytes)}). PEFT saves the memory "
        f"of gradients and optimizer state{_saved(full)}; activations take as much or a little more, because the "
        "adapter’s own are added. With a small model, or long records, these dominate and nothing is saved."
    )


def _at_least(cost: Cost, full: Cost) -> bool:
    return (cost.peak_memory_bytes or 0) >= (full.peak_memory_bytes or 0)


def _saved(full: Cost) -> str:
    memory = full.estimated_memory_bytes
    if memory is None or memory.gradients is None or memory.optimizer is None:
        return ""
    return f" (for {full.model} an estimated {num_bytes(memory.gradients + memory.optimizer)})"


def forgot_more_sentence(report: Report) -> str:
    """Return that a PEFT method forgot more than full fine-tuning, and what to check; empty where none did.

    Source: Biderman et al. 2024, "LoRA Learns Less and Forgets Less" (arXiv 2405.09673).
    """
    rows = {cost.model: report.forgotten.main_lost(cost.model, 1.0) for cost in report.costs}
    full = next((cost for cost in report.costs if cost.peft_type is None and rows[cost.model] is not None), None)
    of_full = rows[full.model] if full is not None else None
    if full is None or of_full is None:
        return ""
    more = [(c, row) for c in report.costs if c.peft_type and (row := rows[c.model]) and row.low is not None]
    more = [(cost, row) for cost, row in more if row.forgetting > max(0.0, of_full.forgetting)]
    if not more:
        return ""
    cost, row = max(more, key=lambda found: found[1].forgetting)
    places = decimals_for(row.forgetting, of_full.forgetting)
    lost = " against ".join(decimal(r.forgetting, places) for r in (row, of_full))
    rates = _rates(cost, full)
    return (
        f"{cost.model} forgot more than {full.model} on {suite_words(row)} ({lost} {unit_label(row.metric)} lost). "
        f"Few trained parameters do not by themselves keep a model near its base; the learning rate{rates} and the "
        "number of steps decide how far it moves. Compare methods at learning rates that learn the task equally well."
    )


def _rates(cost: Cost, full: Cost) -> str:
    if cost.learning_rate is None or full.learning_rate is None:
        return ""
    return f" ({cost.learning_rate:g} against {full.learning_rate:g})"
