"""The certificate: trained methods arrive; a verdict on what they lost, and the model that keeps the budget, leave.

This is the only module that opens the certify records, once a candidate: each opening stands in a ledger and costs
confidence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keeptune.config import Recipe
from keeptune.data.record import OTHER_TASKS, SELF_TEXTS
from keeptune.errors import DataError
from keeptune.stages.data import Data, prepare
from keeptune.stages.instruct import deliver, withdraw
from keeptune.stages.retention import FORGETTING, answer, main_metric
from keeptune.stages.run import Run, is_done, stage_key
from keeptune.stages.texts import Texts, write_texts
from keeptune.stages.training import artifact_folder, method_of
from keeptune.stages.validation import best_prompt, certified_values, higher_is_better
from keeptune.stages.way import BASE, load_base, open_way, points
from keeptune.storage import MANIFEST, file_sha256, read_json, write_json

if TYPE_CHECKING:
    from keeptune.evaluation.evaluate import Split
    from keeptune.evaluation.metrics import Answer
    from keeptune.model.methods import Method
    from keeptune.retention.budget import Budget
    from keeptune.retention.drops import Drops
    from keeptune.retention.verdict import Verdict
    from keeptune.retention.walk import Choice, Walk

CERTIFICATE = "certificate.json"
LEDGER = "certify_openings.jsonl"
# What every certificate leaves open, in the words of the page and of the card.
LIMITS = (
    "It speaks of the mean over records like those of the certified suites, not of any single answer, and of nothing "
    "that no suite asks about.",
    "It names these weights. Merged into another file, quantised, given another chat template or another decoding, the "
    "model needs a new one.",
    "It holds for the draw of records; another training with another seed is another model.",
)


def budgets_of(recipe: Recipe) -> dict[str, Budget]:
    """Return the recipe's budgets, each in its metric's units.

    Raises:
        RecipeError: one of them cannot be read, or is in points where a suite of text has a loss alone.
    """
    from keeptune.errors import RecipeError
    from keeptune.retention.budget import parse_budget

    texts = {SELF_TEXTS, *(text.name for text in recipe.retention.texts)}
    budgets = {}
    for suite, text in recipe.retention.budget.items():
        budget = parse_budget(text, suite=suite, main_metric="loss" if suite in texts else main_metric(recipe))
        scored = (*recipe.evaluation.metrics, "loss")
        if suite in texts and budget.metric != "loss":
            raise RecipeError(
                f"retention.budget.{suite}: found {text!r} for a suite of texts, which have a loss and no score; "
                "expected nats. Write for example '0.02 nats'."
            )
        if budget.metric not in scored:
            raise RecipeError(
                f"retention.budget.{suite}: found {budget.metric}, which is not measured; expected one of "
                f"{', '.join(scored)}. Add it to evaluation.metrics."
            )
        budgets[suite] = budget
    return budgets


def check_budgets(recipe: Recipe, data: Data, texts: Texts | None) -> None:
    """Refuse suites with so few records that not even a model that lost nothing could be certified.

    Raises:
        DataError: which suites, how many records there are, and how many are needed.
    """
    from keeptune.errors import raise_collected
    from keeptune.retention.drops import metric_scale
    from keeptune.retention.ledger import confidence_left
    from keeptune.retention.pvalues import records_needed_for_any_verdict

    budgets = budgets_of(recipe)
    counts = _certify_counts(data, texts)
    delta = confidence_left(1.0 - recipe.retention.confidence, opening=1) / len(recipe.methods)
    problems = []
    for suite, budget in budgets.items():
        needed = records_needed_for_any_verdict(budget=budget.amount, delta=delta, scale=metric_scale(budget.metric))
        if counts.get(suite, 0) < needed:
            problems.append(
                f"retention.budget.{suite}: found {counts.get(suite, 0):,} records to certify on; expected at least "
                f"{needed:,}, or no model could keep {recipe.retention.budget[suite]} with this confidence. Give the "
                "suite more records, raise the budget, or train fewer methods."
            )
    if problems:
        raise_collected(DataError, problems)


def _certify_counts(data: Data, texts: Texts | None) -> dict[str, int]:
    parts = {task: counts.get("certify", 0) for task, counts in data.audit.get("parts", {}).items()}
    counts = {**parts, OTHER_TASKS: sum(parts.values())}
    for suite, facts in (texts.audit if texts is not None else {}).items():
        counts[suite] = facts["parts"].get("certify", 0)
    return counts


@dataclass(frozen=True, slots=True)
class _Session:
    """One opening of the certify records: what is measured, against what, and where the answers lie."""

    run: Run
    data: Data
    texts: Texts | None
    budgets: Mapping[str, Budget]
    left_out: Mapping[str, str]
    key: str

    @property
    def tasks(self) -> Split | None:
        """The certify records of instruction suites."""
        from keeptune.evaluation.evaluate import Split

        if not (self.data.folder / "certify.jsonl").is_file():
            return None
        records, table = self.data.records("certify"), self.data.table("certify")
        return Split("certify", records, table, untrained_tasks=self.data.untrained_tasks)

    def answers(self, folder: Path) -> list[Answer]:
        """Return what a model answered to all certify records."""
        from keeptune.evaluation.evaluate import read_answers

        found = [read_answers(place) for kind in ("tasks", "texts") if (place := folder / kind).is_dir()]
        return [answer for answers in found for answer in answers]


def certify(run: Run, *, data: Data | None = None) -> Path:
    """Walk every method's way from the base while the budgets hold; deliver the best certified model on validation.

    Returns the certificate's path. Where nothing is certified no model is delivered: the base is the answer. The same
    candidates and budgets are not asked again.

    Raises:
        DataError: there is no budget, a suite has too few records, or a method is not trained and measured yet.
    """
    from keeptune.retention.verdict import verdict
    from keeptune.retention.walk import choose

    if not run.recipe.retention.budget:
        raise DataError(
            "retention.budget: found none; expected what each suite may lose, such as {others: 2 points}. Add it."
        )
    data = data or prepare(run)
    texts = write_texts(run, data)
    check_budgets(run.recipe, data, texts)
    path = run.folder / CERTIFICATE
    methods = {name: method_of(run.recipe, name) for name in run.recipe.methods}
    asked = budgets_of(run.recipe)
    left_out = _at_chance(run, data, asked)
    budgets = {suite: budget for suite, budget in asked.items() if suite not in left_out}
    key = _key(run, data, texts=texts, methods=methods, budgets=budgets)
    if path.exists() and (before := read_json(path)).get("key") == key:
        run.context.progress.say(f"{path}: certified before and unchanged")
        if before["fallback"] is not None:
            # Other numbers of examples may be asked for now; the verdict stands.
            write_json(path, {**before, "fallback": best_prompt(run, data, before=before["fallback"])})
        return path
    if not budgets:
        raise DataError(
            f"retention.budget: found only suites that the base answers at chance ({', '.join(left_out)}); expected "
            "one or more with something to lose. Name other suites."
        )
    session = _Session(run, data, texts, budgets, left_out, key)
    opening = _opening(session, list(methods))
    walked = _walked(session, methods, opening=opening)
    values = certified_values(run, data, methods=methods, certified=walked.certified)
    choice = choose(
        walked.certified,
        validation=lambda name, alpha: values[name, alpha],
        higher_is_better=higher_is_better(run.recipe),
    )
    found = verdict(walked, choice=choice, left_out=tuple(left_out))
    _write_selection(run, choice, values)
    if choice is None:
        withdraw(run)
        artifact = None
    else:
        chosen = next(p for p in points(run, methods[choice.candidate]) if p.alpha == choice.alpha)
        artifact = deliver(run, data, chosen, limits=(found.sentence, *LIMITS))
    _write_certificate(session, walked, found, opening=opening, artifact=artifact, values=values)
    run.context.progress.say(found.sentence)
    return path


def _key(
    run: Run, data: Data, *, texts: Texts | None, methods: Mapping[str, Method], budgets: Mapping[str, Budget]
) -> str:
    artifacts = {
        name: file_sha256(artifact_folder(run.folder / name, method) / MANIFEST) for name, method in methods.items()
    }
    return stage_key(
        data=data.key,
        texts=texts.key if texts is not None else None,
        artifacts=artifacts,
        alphas={name: [point.alpha for point in points(run, method)] for name, method in methods.items()},
        budgets={suite: asdict(budget) for suite, budget in budgets.items()},
        confidence=run.recipe.retention.confidence,
        select_by=run.recipe.evaluation.select_by,
    )


def _at_chance(run: Run, data: Data, budgets: Mapping[str, Budget]) -> dict[str, str]:
    """Return the suites under a budget with nothing to lose, each with the base's score on its report part.

    "others" is among them where every other task is.
    """
    rows = [row for row in read_json(run.folder / FORGETTING)["rows"] if row["base_at_chance"] and row["alpha"] == 1.0]
    found = {row["suite"]: f"{row['base']:.3g}" for row in rows if row["metric"] != "loss"}
    named = {*budgets, *(data.untrained_tasks if OTHER_TASKS in budgets else ())} - {OTHER_TASKS}
    left_out = {suite: base for suite, base in found.items() if suite in named}
    if OTHER_TASKS in budgets and data.untrained_tasks <= found.keys():
        left_out[OTHER_TASKS] = found[OTHER_TASKS]
    return left_out


def _opening(session: _Session, candidates: Sequence[str]) -> int:
    """Return the number of this opening, which is written down before any certify record is read.

    A certification that was interrupted goes on: it asks the same candidates the same records.
    """
    from keeptune.retention.ledger import record_opening

    run = session.run
    note = run.folder / "certify.json"
    if note.exists() and read_json(note).get("key") == session.key:
        return read_json(note)["opening"]
    parts = [folder / "certify.jsonl" for folder in (session.data.folder, run.folder / "texts")]
    content = stage_key(files=[file_sha256(path) for path in parts if path.is_file()])
    opening = record_opening(
        run.folder / LEDGER,
        certify_sha256=content,
        candidates=candidates,
        when=run.context.now(),
        command=run.context.command,
    )
    write_json(note, {"key": session.key, "opening": opening, "certify_sha256": content})
    return opening


def _walked(session: _Session, methods: Mapping[str, Method], *, opening: int) -> Walk:
    from keeptune.retention.ledger import confidence_left
    from keeptune.retention.walk import Candidate, walk

    run = session.run
    base_folder = run.folder / BASE / "certify"
    _answer_all(session, load_base(run, session.data), name=BASE, folder=base_folder)
    base = session.answers(base_folder)
    # One model stands in memory at a time: a walk asks for one candidate's alphas before the next one's.
    ways: dict[str, Any] = {}

    def drops_at(name: str, alpha: float) -> Mapping[str, Drops]:
        folder = run.folder / name / "certify" / f"{alpha:g}"
        if name not in ways:
            ways.clear()
            ways[name] = open_way(run, session.data, methods[name])
        ways[name].set_(alpha)
        _answer_all(session, ways[name].model, name=f"{name} at alpha {alpha:g}", folder=folder)
        return _drops(session, base, session.answers(folder))

    candidates = [Candidate(name, tuple(p.alpha for p in points(run, method))) for name, method in methods.items()]
    delta = confidence_left(1.0 - run.recipe.retention.confidence, opening=opening)
    return walk(candidates, budgets=session.budgets, delta=delta, drops_at=drops_at)


def _answer_all(session: _Session, model: Any, *, name: str, folder: Path) -> None:
    """Let a model answer the certify records of instruction suites and weigh those of texts."""
    run = session.run
    suites = set(session.budgets)
    tasks = session.tasks if suites & {OTHER_TASKS, *session.data.untrained_tasks} else None
    texts = session.texts.split("certify") if session.texts is not None and session.texts.has("certify") else None
    for kind, split, metrics in (("tasks", tasks, run.recipe.evaluation.metrics), ("texts", texts, ())):
        key = stage_key(certify=session.key, kind=kind)
        if split is None or is_done(folder / kind, key):
            continue
        run.context.progress.say(f"{name}: {len(split.records):,} certify records of {kind}")
        answer(run, session.data, model, split=split, metrics=metrics, name=name, folder=folder / kind, key=key)


def _drops(session: _Session, base: Sequence[Answer], tuned: Sequence[Answer]) -> dict[str, Drops]:
    from keeptune.retention.drops import paired_drops

    found = {}
    for suite, budget in session.budgets.items():
        together = session.data.untrained_tasks - session.left_out.keys()
        members = [i for i, a in enumerate(base) if a.task == suite or (suite == OTHER_TASKS and a.task in together)]
        mine, theirs = [base[i] for i in members], [tuned[i] for i in members]
        found[suite] = paired_drops(mine, theirs, metric=budget.metric, suite=suite)
    return found


def _write_selection(run: Run, choice: Choice | None, values: Mapping[tuple[str, float], float]) -> None:
    best: dict[str, float] = {}
    higher = higher_is_better(run.recipe)
    for (name, _), value in values.items():
        best[name] = max(best.get(name, value), value) if higher else min(best.get(name, value), value)
    facts = {
        "selected": None if choice is None else choice.candidate,
        "alpha": None if choice is None else choice.alpha,
        "metric": run.recipe.evaluation.select_by,
        "split": "validation",
        "values": best,
        "certified": choice is not None,
    }
    write_json(run.folder / "selection.json", facts)


def _write_certificate(
    session: _Session,
    walked: Walk,
    found: Verdict,
    *,
    opening: int,
    artifact: Path | None,
    values: Mapping[tuple[str, float], float],
) -> None:
    run, retention = session.run, session.run.recipe.retention
    files = read_json(artifact / MANIFEST)["files"] if artifact is not None else {}
    weights = {name: facts["sha256"] for name, facts in files.items() if name.endswith(".safetensors")}
    value = {
        "key": session.key,
        "verdict": found.kind,
        "sentence": found.sentence,
        "choice": None if found.choice is None else asdict(found.choice),
        "fallback": best_prompt(run, session.data) if found.choice is None else None,
        "num_records_needed": found.num_records_needed,
        "confidence": retention.confidence,
        "opening": opening,
        "delta": walked.delta,
        "budgets": {
            suite: {"text": retention.budget[suite], **asdict(budget)} for suite, budget in session.budgets.items()
        },
        "left_out_at_chance": dict(session.left_out),
        "cells": [asdict(cell) for cell in walked.cells],
        "certified": [
            {**asdict(choice), "validation": values[choice.candidate, choice.alpha]} for choice in walked.certified
        ],
        "artifact": {"folder": artifact.name, "sha256": weights} if artifact is not None else None,
        "items": {cell.suite: cell.measured.num_records for cell in walked.cells},
        "certify_sha256": read_json(run.folder / "certify.json")["certify_sha256"],
        "limits": list(LIMITS),
        "created": run.context.now(),
    }
    write_json(run.folder / CERTIFICATE, value)
