"""What was forgotten: trained methods arrive; their answers along the way from the base, and what each lost, leave.

Nothing here chooses anything: the figures are those of the report parts, test among them.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keeptune.data.record import ALL_TASKS, OTHER_TASKS
from keeptune.stages.budget_rows import left_out_elsewhere, under_budget
from keeptune.stages.budgets import budgets_of, main_metric
from keeptune.stages.computing import policy_of
from keeptune.stages.data import Data, evaluation_split, max_new_tokens_on_test
from keeptune.stages.harness import Harness, ask_all, harness_answers, harness_rows
from keeptune.stages.left_out import at_chance
from keeptune.stages.methods import method_of
from keeptune.stages.openings import record_opening
from keeptune.stages.run import Run, is_done, stage_key
from keeptune.stages.texts import Texts
from keeptune.stages.training import make_bench
from keeptune.stages.way import BASE, ZERO_SHOT, load_base, open_way, points, trained_facts
from keeptune.storage import MANIFEST, read_record, write_record

if TYPE_CHECKING:
    from torch import nn

    from keeptune.evaluation.evaluate import Split
    from keeptune.evaluation.metrics import Answer
    from keeptune.model.methods import Method

FORGETTING = "forgetting.json"


def measure(run: Run, data: Data, texts: Texts | None, *, harness: Harness | None = None) -> Path:
    """Answer test along each method's way and weigh texts before and after; return the file that says what was lost.

    Documents of the harness are answered like test.

    What stands already is not measured again. Base and trained models have answered test before.
    """
    methods = [method_of(run.recipe, name) for name in run.recipe.methods]
    if texts is not None:
        _weigh_base(run, data, texts)
    if data.untrained_tasks or texts is not None:
        _repeat_base(run, data)
    for method in methods:
        _measure_method(run, data, method, texts=texts)
    if harness is not None:
        ask_all(run, data, methods, harness=harness)
    path = run.folder / FORGETTING
    write_record(path, _forgetting(run, data, methods, texts=texts, harness=harness))
    return path


def answer(
    run: Run,
    data: Data,
    model: nn.Module,
    *,
    split: Split,
    metrics: Sequence[str],
    name: str,
    folder: Path,
    key: str,
    base: nn.Module | None = None,
    tokens_per_batch: int | None = None,
) -> None:
    """Let a model answer a split into `folder`; no metrics: its losses alone, and with `base` its divergence."""
    from keeptune.evaluation.evaluate import evaluate_model

    run.poll()
    limit = max_new_tokens_on_test(run.recipe, data)
    evaluate_model(
        model,
        split=split,
        bench=make_bench(run, data, model, max_new_tokens=limit, tokens_per_batch=tokens_per_batch),
        metrics=metrics,
        name=name,
        shots=0,
        folder=folder,
        facts={"key": key, "created": run.context.now()},
        base=base,
    )


def _weigh_base(run: Run, data: Data, texts: Texts) -> None:
    folder = run.folder / BASE / "texts"
    key = stage_key(texts=texts.key, weights=data.base.facts.sha256, **policy_of(run.recipe).answers_key())
    if not is_done(folder, key):
        run.context.progress.say(f"{BASE}: computing the loss of the texts")
        model = load_base(run, data)
        answer(run, data, model, split=texts.split("test"), metrics=(), name=BASE, folder=folder, key=key)


def _repeat_base(run: Run, data: Data) -> None:
    """Let the base answer test once more in batches of half the size: what changes then is no forgetting."""
    first = run.folder / BASE / ZERO_SHOT
    if not first.exists():
        return
    folder = run.folder / BASE / "repeat"
    key = stage_key(repeat=read_record(first / MANIFEST)["key"])
    if is_done(folder, key):
        return
    run.context.progress.say(f"{BASE}: answering test again, in smaller batches")
    record_opening(run, data, keys={f"{BASE}, again": key})
    answer(
        run,
        data,
        load_base(run, data),
        split=evaluation_split(data, "test"),
        metrics=run.recipe.evaluation.metrics,
        name=BASE,
        folder=folder,
        key=key,
        tokens_per_batch=max(1, run.recipe.evaluation.tokens_per_batch // 2),
    )


def _measure_method(run: Run, data: Data, method: Method, *, texts: Texts | None) -> None:
    trained, answered = trained_facts(run, method)["key"], policy_of(run.recipe).answers_key()
    limit = max_new_tokens_on_test(run.recipe, data)
    metrics = list(run.recipe.evaluation.metrics)
    waiting = []
    for point in points(run, method):
        keys = {
            "test": stage_key(
                trained=trained, data=data.key, alpha=point.alpha, metrics=metrics, max_new_tokens=limit, **answered
            ),
            "texts": stage_key(trained=trained, texts=texts.key, alpha=point.alpha, **answered) if texts else None,
        }
        if point.alpha < 1.0 and not is_done(point.test, keys["test"] or ""):
            waiting.append((point, "test", keys["test"]))
        if texts is not None and not is_done(point.texts, keys["texts"] or ""):
            waiting.append((point, "texts", keys["texts"]))
    if not waiting:
        return
    on_test = {f"{method.name} at {point.alpha:g}": key or "" for point, kind, key in waiting if kind == "test"}
    if on_test:
        record_opening(run, data, keys=on_test)
    path = open_way(run, data, method)
    base = load_base(run, data) if texts is not None else None
    for point, kind, key in waiting:
        run.context.progress.say(f"{method.name} at alpha {point.alpha:g}: {kind}")
        path.set_(point.alpha)
        if kind == "test":
            split, asked = evaluation_split(data, "test"), metrics
        else:
            assert texts is not None
            split, asked = texts.split("test"), []
        answer(
            run,
            data,
            path.model,
            split=split,
            metrics=asked,
            name=method.name,
            folder=point.folder / kind,
            key=key or "",
            base=base if kind == "texts" else None,
        )
    del path, base
    gc.collect()


def _forgetting(
    run: Run, data: Data, methods: Sequence[Method], *, texts: Texts | None, harness: Harness | None
) -> dict[str, Any]:
    from keeptune.evaluation.canaries import canaries
    from keeptune.evaluation.evaluate import read_answers

    metric = main_metric(run.recipe)
    first = run.folder / BASE / ZERO_SHOT
    all_of_base = read_answers(first) if first.exists() else []
    base = _others(all_of_base, data)
    base_texts = read_answers(run.folder / BASE / "texts") if texts is not None else []
    asked = harness_answers(run, None)
    budgets = budgets_of(run.recipe, harness=harness)
    left_out = at_chance(run, data, [*all_of_base, *asked], budgets=budgets, harness=harness)
    rows: list[dict[str, Any]] = []
    budgeted: list[dict[str, Any]] = []
    elsewhere: list[dict[str, Any]] = []
    broken = [{"model": BASE, "alpha": None, **asdict(c)} for c in canaries(all_of_base).values()]
    for method in methods:
        for point in points(run, method):
            answers = read_answers(point.test)
            tuned = _others(answers, data) if base else []
            weighed = read_answers(point.texts) if base_texts else []
            of_harness = harness_answers(run, point)
            facts = {"model": method.name, "alpha": point.alpha}
            rows += [facts | row for row in lost_rows(base, tuned, metric=metric)]
            rows += [facts | row for row in lost_rows(base_texts, weighed, metric="loss")]
            rows += [facts | row for row in harness_rows(asked, of_harness, harness=harness)]
            before, after = (*base, *base_texts, *asked), (*tuned, *weighed, *of_harness)
            how = {"budgets": budgets, "left_out": left_out, "tasks": data.untrained_tasks}
            budgeted += [facts | row for row in under_budget(before, after, **how)]
            metrics = [*run.recipe.evaluation.metrics, "loss"]
            elsewhere += [facts | row for row in left_out_elsewhere(before, after, metrics=metrics, left_out=left_out)]
            broken += [facts | asdict(c) for c in canaries(answers).values()]
    return {
        "metric": metric,
        "suites": sorted({row["suite"] for row in rows}),
        "rows": rows,
        "under_budget": budgeted,
        "left_out": elsewhere,
        "canaries": broken,
        "noise": _noise(run, base, data, metric=metric),
        "texts": dict(texts.audit) if texts is not None else {},
        **({"harness": dict(harness.audit)} if harness is not None else {}),
    }


def _others(answers: Sequence[Answer], data: Data) -> list[Answer]:
    return [answer for answer in answers if answer.task in data.untrained_tasks]


def lost_rows(base: Sequence[Answer], tuned: Sequence[Answer], *, metric: str) -> Iterator[dict[str, Any]]:
    """Yield what each suite lost, and for several suites of instructions what their records lost together."""
    from keeptune.evaluation.metrics import DIVERGENCE
    from keeptune.evaluation.scores import score_answers
    from keeptune.retention.measures import measure_retention

    if not base:
        return
    found = measure_retention(base, tuned, metric=metric)
    divergence: dict[str, float] = {}
    weighed = DIVERGENCE in tuned[0].metrics
    if weighed:
        divergence = {score.task: score.mean for score in score_answers(tuned, metrics=[DIVERGENCE])}
    for suite in found.tasks if weighed else (*found.tasks, found.together):
        row = asdict(suite)
        task = row.pop("task")
        yield {"suite": OTHER_TASKS if task == ALL_TASKS else task, **row, DIVERGENCE: divergence.get(task)}


def _noise(run: Run, base: Sequence[Answer], data: Data, *, metric: str) -> dict[str, Any] | None:
    """Return how many of the base's own answers changed when it was asked again: the floor below any forgetting."""
    from keeptune.evaluation.evaluate import read_answers

    folder = run.folder / BASE / "repeat"
    if not base or not folder.exists():
        return None
    again = _others(read_answers(folder), data)
    pairs = list(zip(base, again, strict=True))
    return {
        "num_records": len(pairs),
        "num_answers_changed": sum(a.prediction != b.prediction for a, b in pairs),
        "num_scores_changed": sum(a.metrics[metric] != b.metrics[metric] for a, b in pairs),
        "largest_loss_change": max(abs(a.metrics["loss"] - b.metrics["loss"]) for a, b in pairs),
    }
