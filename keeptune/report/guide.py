"""A report's tables arrive; "How to read this page" leaves: the run in plain words, for who never tuned a model."""

from __future__ import annotations

from collections.abc import Iterator

from keeptune.progress import noun
from keeptune.report.cost import Cost
from keeptune.report.headline import base_label, series, shown
from keeptune.report.tables import Report
from keeptune.report.wording import count, metric_label, parameters, rate

_ROUGE = {
    "rouge1": "how many words agree with the expected answer’s, 0 to 1",
    "rouge2": "how many pairs of neighbouring words agree, 0 to 1",
    "rougeL": "how much of the wording agrees with the expected answer’s, in its order, 0 to 1",
    "rougeLsum": "how much of the wording agrees with the expected answer’s, line by line, 0 to 1",
}
_BLEU = "how many runs of words agree with the expected answers’, 0 to 100"
_MEANINGS = {
    **_ROUGE,
    **{f"{name}_unicode": meaning for name, meaning in _ROUGE.items()},
    "exact_match": "the share of answers that equal the expected one (case, white space and a final full stop aside), "
    "0 to 1",
    "exact_match_squad": "the share of answers that equal the expected one word for word (case, punctuation, signs and "
    "articles aside, as in SQuAD), 0 to 1",
    "raw_exact_match": "the share of answers that equal the expected one to the letter, 0 to 1",
    "token_f1": "how many words agree with the expected answer’s, whatever their order, 0 to 1",
    "char_f1": "how many characters agree with the expected answer’s, whatever their order, 0 to 1",
    **dict.fromkeys(("bleu", "bleu_zh", "bleu_ja_mecab", "bleu_ko_mecab"), _BLEU),
    **dict.fromkeys(("bleu_char", "bleu_flores200"), _BLEU.replace("words", "parts of words")),
    "chrf": "how many runs of letters agree with the expected answers’, 0 to 100",
    "loss": "how unlikely the model finds the expected answer, lower is better",
    "perplexity": "the loss on another scale, from 1 up, lower is better",
}


def guide(report: Report) -> tuple[str, ...]:
    """Return at most twelve sentences, from the run's own facts; fewer where facts are missing."""
    meanings = (*_what_is_shown(report), *_examples_in_the_prompt(report))
    return (*_what_was_done(report), *meanings, *_other_tasks(report), *_on_the_way(report), _first_look(report))


def _what_was_done(report: Report) -> Iterator[str]:
    tasks = report.tasks or report.audit.trained_tasks
    of = f" of {series(tasks)}" if tasks else ""
    yield (
        f"A model that already existed, {base_label(report)} (“base” on this page), was shown "
        f"{shown(report, 'examples')}{of}: prompts, each with the answer that is wanted; this is called fine-tuning."
    )
    whole = [cost for cost in report.costs if cost.peft_type is None]
    added = [cost for cost in report.costs if cost.peft_type is not None]
    if whole:
        all_of = f" ({parameters(whole[0].total_parameters)} numbers)" if whole[0].total_parameters else ""
        verb = "changes" if len(whole) == 1 else "change"
        yield f"Full fine-tuning ({_names(whole)}) {verb} all of the model’s weights{all_of}."
    if added:
        kinds = series(
            [f"{cost.model} (PEFT’s {cost.peft_type}{_learning_rate(cost)})" for cost in added], of="PEFT methods"
        )
        verbs = ("leaves", "trains") if len(added) == 1 else ("leave", "train")
        sizes = list(dict.fromkeys(parameters(cost.trained_parameters) for cost in added))
        known = [cost.trained_parameters for cost in added if cost.trained_parameters is not None]
        span = series(sizes) if len(sizes) <= 3 else f"{parameters(min(known))} to {parameters(max(known))}"
        yield (
            f"{kinds} {verbs[0]} the model’s weights as they are and {verbs[1]} a small addition to them, "
            f"of {span} parameters."
        )
    splits = report.audit.splits
    validation = sum(split.validation for split in splits)
    of_validation = f" ({count(validation)} {noun(validation, 'records')})" if splits else ""
    yield (
        f"Validation{of_validation} was kept out of training and chose when to stop and which method is best; "
        f"test{_test_records(report)} was used for neither; every score on this page is from it, except those under "
        "“Learning curves” and “How it was decided”."
    )


def _names(costs: list[Cost]) -> str:
    return series([f"{cost.model}{_learning_rate(cost)}" for cost in costs], of="methods")


def _learning_rate(cost: Cost) -> str:
    return f", learning rate {rate(cost.learning_rate)}" if cost.learning_rate is not None else ""


def _test_records(report: Report) -> str:
    """Return how many test records there are, and how many of them are of other tasks, in brackets after a space."""
    audit = report.audit
    aside = {part.task: part.probe + part.certify + part.replay for part in audit.parts}
    numbers = {split.task: split.test - aside.get(split.task, 0) for split in audit.splits}
    total, others = sum(numbers.values()), sum(n for task, n in numbers.items() if task in report.untrained_tasks)
    if not audit.splits:
        return ""
    kinds = f": {count(total - others)} of what was trained on, {count(others)} of other tasks" if others else ""
    return f" ({count(total)} {noun(total, 'records')}{kinds})"


def _what_is_shown(report: Report) -> Iterator[str]:
    meanings = [
        f"{metric_label(metric.name)}: {_MEANINGS[metric.name]}"
        for metric in report.metrics
        if metric.name in _MEANINGS
    ]
    if meanings:
        yield f"The scores compare an answer with the expected one. {'; '.join(meanings)}."
    yield (
        "A 95 % interval says how far a number may be off because the test records are a sample: about 95 of 100 such "
        "intervals contain the true value, and few records make it wide, even where all of them agree."
    )
    yield (
        "If the interval of a difference contains 0, the test is too small to tell better from worse, and the page "
        "says unclear; if no record’s score changed, it says that."
    )


def _examples_in_the_prompt(report: Report) -> Iterator[str]:
    if report.few_shot:
        yield (
            "Shots are solved examples that stand before the question in the base’s prompt; they can help without any "
            "training."
        )


def _other_tasks(report: Report) -> Iterator[str]:
    yield "A model tuned on one task can get worse at others, which is called catastrophic forgetting."
    if report.other_tasks:
        was = "was" if len(report.other_tasks) == 1 else "were"
        yield (
            f"To see it, {series(report.other_tasks)} {was} answered before and after tuning, and not trained on in "
            "this run."
        )
    elif report.forgotten.rows:
        yield "To see it, the loss on texts that were not trained on was taken before and after: “What was forgotten”."
    else:
        yield "This run did not measure that: it has no task with train: false."


def _on_the_way(report: Report) -> Iterator[str]:
    if report.forgotten.certificate is not None:
        yield (
            "A trained model can be scaled between the base (alpha 0) and itself (alpha 1): a smaller alpha learns and "
            "forgets less. A model is certified if it was shown, on records kept for this alone, to lose less than "
            "its budget."
        )


def _first_look(report: Report) -> str:
    others = " and below it" if report.other_tasks else ""
    return (
        f"Look first at the sentence on top{others}, then at the best and worst answers: they show what a score means."
    )
