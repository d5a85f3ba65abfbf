"""The certificate: trained methods arrive; a verdict on what they lost, and the model that keeps the budget, leave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keeptune.errors import DataError
from keeptune.stages.budgets import budget_texts, require_budget
from keeptune.stages.certified import CERTIFICATE, artifact_sha256, names_what_stands
from keeptune.stages.certify_openings import Opening
from keeptune.stages.computing import policy_of
from keeptune.stages.data import Data, prepare
from keeptune.stages.instruct import deliver, withdraw
from keeptune.stages.left_out import at_chance, judged_by_test, reported_answers, tested_budgets
from keeptune.stages.methods import method_of
from keeptune.stages.openings import ledger_heads
from keeptune.stages.retention import FORGETTING
from keeptune.stages.run import SELECTION, Run, intact_record, stage_key
from keeptune.stages.session import (
    Session,
    base_answers,
    certify_answers,
    drops_of,
    forget_answers,
    open_session,
    read_suites,
)
from keeptune.stages.training import artifact_folder
from keeptune.stages.validation import best_prompt, certified_values, higher_is_better
from keeptune.stages.way import BASE, ZERO_SHOT, open_way, points, trained_facts
from keeptune.storage import MANIFEST, file_sha256, read_record, write_record

if TYPE_CHECKING:
    from keeptune.model.methods import Method
    from keeptune.retention.drops import Drops
    from keeptune.retention.verdict import Verdict
    from keeptune.retention.walk import Choice, Walk

# What every certificate leaves open, in the words of the page and of the card.
LIMITS = (
    "It is about the average over records like those of the certified suites: not about any single answer, and not "
    "about anything that no suite asks.",
    "It is about these weights with this chat template and this way of decoding. Once they are merged, quantised or "
    "changed otherwise, the model needs a new one.",
    "It takes no input to have more records than the largest one among those that were tested or reported on.",
    "Its confidence is over the draw of records. Training again with another seed makes another model.",
)


def certify(run: Run, *, data: Data | None = None) -> Path:
    """Walk every method's way from the base while the budgets hold; deliver the best certified model on validation.

    Returns the certificate's path. Where nothing is certified no model is delivered: the base is the answer. The same
    candidates and budgets are not asked again.

    Raises:
        DataError: there is no budget, a suite has too few records, or a method is not trained and measured yet.
    """
    from keeptune.retention.drops import largest_inputs
    from keeptune.retention.verdict import verdict
    from keeptune.retention.walk import choose

    require_budget(run.recipe)
    data = data or prepare(run)
    suites = read_suites(run, data)
    asked, harness = suites.budgets, suites.harness
    path = run.folder / CERTIFICATE
    methods = {name: method_of(run.recipe, name) for name in run.recipe.methods}
    answered = [run.folder / name / "certify" for name in methods]
    _require_measured(run, methods, base=judged_by_test(asked, data))
    reported = reported_answers(run)
    left_out = at_chance(run, data, reported, budgets=asked, harness=harness)
    tested_budgets(asked, left_out)
    session = Session(run, data, suites.texts, harness, asked, left_out, largest_inputs(reported), "")
    session = replace(session, key=question_key(session, methods))
    # A delivered model that someone changed or removed is delivered again.
    before = intact_record(path, say=run.context.progress.say)
    chosen = intact_record(run.folder / SELECTION, say=run.context.progress.say)
    if before and before["key"] == session.key and _agree(before, chosen) and names_what_stands(path):
        run.context.progress.say(f"{path}: certified before and unchanged")
        if before["fallback"] is not None:
            # Other numbers of examples may be asked for now; the verdict stands.
            write_record(path, {**before, "fallback": best_prompt(run, data, before=before["fallback"])})
        forget_answers(run, *answered)
        return path
    opening = open_session(session, list(methods), certificate=path)
    walked = _walked(session, methods, opening=opening)
    values, losses = certified_values(run, data, methods=methods, certified=walked.certified)
    choice = choose(
        walked.certified,
        validation=lambda name, alpha: values[name, alpha],
        loss=lambda name, alpha: losses[name, alpha],
        higher_is_better=higher_is_better(run.recipe),
    )
    found = verdict(walked, choice=choice, left_out=left_out)
    if choice is None:
        withdraw(run)
        artifact = None
    else:
        chosen = next(p for p in points(run, methods[choice.candidate]) if p.alpha == choice.alpha)
        artifact = deliver(run, data, chosen, certificate=(found.sentence, *limits(opening)))
    _write_certificate(session, walked, found, opening=opening, artifact=artifact, values=values)
    _write_selection(run, choice, values)
    forget_answers(run, *answered)
    run.context.progress.say(found.sentence)
    return path


def _agree(certificate: Mapping[str, Any], selection: Mapping[str, Any]) -> bool:
    """Tell whether a certificate and a selection speak of the same model: whoever stops between the two leaves one."""
    choice = certificate["choice"] or {"candidate": None, "alpha": None}
    chosen = (selection.get("selected"), selection.get("alpha"))
    return "certified" in selection and chosen == (choice["candidate"], choice["alpha"])


def _require_measured(run: Run, methods: Mapping[str, Method], *, base: bool) -> None:
    """Refuse a run in which a method is not trained and evaluated: `forgetting.json` has rows of each one that is.

    `base`: the base model's own answers to test are needed too.
    """
    answered = run.folder / BASE / ZERO_SHOT
    if base and not answered.is_dir():
        raise DataError(
            f"{answered}: found no answers of the base model to test; expected them, as they show where it has "
            "something to lose. Run `keeptune evaluate` with this recipe first, or `keeptune run`."
        )
    for method in methods.values():
        trained_facts(run, method)
    path = run.folder / FORGETTING
    rows = read_record(path)["rows"] if path.is_file() else []
    if missing := sorted(methods.keys() - {row["model"] for row in rows}):
        raise DataError(
            f"{path}: found nothing of {', '.join(missing)}; expected what each method forgot. "
            "Run `keeptune evaluate` with this recipe first, or `keeptune run`."
        )


def question_key(session: Session, methods: Mapping[str, Method]) -> str:
    """Return the key of the candidates, and of all that they are asked and held to."""
    run, texts, harness = session.run, session.texts, session.harness
    artifacts = {
        name: file_sha256(artifact_folder(run.folder / name, method) / MANIFEST) for name, method in methods.items()
    }
    return stage_key(
        data=session.data.key,
        texts=texts.key if texts is not None else None,
        **({"harness": harness.key} if harness is not None else {}),
        artifacts=artifacts,
        alphas={name: [point.alpha for point in points(run, method)] for name, method in methods.items()},
        budgets={suite: asdict(budget) for suite, budget in session.tested.items()},
        confidence=run.recipe.retention.confidence,
        select_by=run.recipe.evaluation.select_by,
        **policy_of(run.recipe).answers_key(),
        **({"left_out": sorted(one.name for one in session.left_out)} if session.left_out else {}),
        **({"max_new_tokens": limit} if (limit := run.recipe.evaluation.max_new_tokens) != "auto" else {}),
    )


def _walked(session: Session, methods: Mapping[str, Method], *, opening: Opening) -> Walk:
    from keeptune.retention.ledger import confidence_left
    from keeptune.retention.walk import Candidate, walk

    run = session.run
    base = base_answers(session)
    # One model stands in memory at a time: a walk asks for one candidate's alphas before the next one's.
    ways: dict[str, Any] = {}

    def drops_at(name: str, alpha: float) -> Mapping[str, Drops]:
        folder = run.folder / name / "certify" / f"{alpha:g}"
        if name not in ways:
            ways.clear()
            ways[name] = open_way(run, session.data, methods[name])
        ways[name].set_(alpha)
        tuned = certify_answers(session, lambda: ways[name].model, name=f"{name} at alpha {alpha:g}", folder=folder)
        return drops_of(session, base, tuned)

    candidates = [Candidate(name, tuple(p.alpha for p in points(run, method))) for name, method in methods.items()]
    left = 1.0 - run.recipe.retention.confidence
    delta = confidence_left(left, opening=opening.number, num_suites=len(session.budgets))
    return walk(candidates, budgets=session.tested, delta=delta, drops_at=drops_at, watched=session.watched)


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
    write_record(run.folder / SELECTION, facts)


def _write_certificate(
    session: Session,
    walked: Walk,
    found: Verdict,
    *,
    opening: Opening,
    artifact: Path | None,
    values: Mapping[tuple[str, float], float],
) -> None:
    run = session.run
    value = {
        **certificate_facts(session, walked, found, opening=opening),
        "fallback": best_prompt(run, session.data) if found.choice is None else None,
        "certified": [
            {**asdict(choice), "validation": values[choice.candidate, choice.alpha]} for choice in walked.certified
        ],
        "artifact": {"folder": artifact.name, "sha256": artifact_sha256(artifact)} if artifact is not None else None,
    }
    write_record(run.folder / CERTIFICATE, value)


def limits(opening: Opening) -> tuple[str, ...]:
    """Return what a certificate leaves open, with what may be missing from the count of openings."""
    return (
        *LIMITS,
        *(f"Earlier openings of these records may not be counted. {fault.rstrip('.')}." for fault in opening.faults),
    )


def certificate_facts(session: Session, walked: Walk, found: Verdict, *, opening: Opening) -> dict[str, Any]:
    """Return what every certificate says of a walk and its verdict."""
    retention = session.run.recipe.retention
    texts = budget_texts(session.run.recipe, session.harness)
    return {
        "key": session.key,
        "verdict": found.kind,
        "sentence": found.sentence,
        "choice": None if found.choice is None else asdict(found.choice),
        "num_records_needed": found.num_records_needed,
        "confidence": retention.confidence,
        "opening": opening.number,
        "delta": walked.delta,
        "budgets": {suite: {"text": texts[suite], **asdict(budget)} for suite, budget in session.tested.items()},
        "left_out_at_chance": {one.name: asdict(one) for one in session.left_out},
        "cells": [asdict(cell) for cell in walked.cells],
        "items": {cell.suite: cell.measured.num_records for cell in walked.cells if cell.suite in session.tested},
        "certify_sha256": opening.certify_sha256,
        "ledgers": ledger_heads(session.run.folder),
        "ledger": None if opening.ledger is None else str(opening.ledger),
        "limits": list(limits(opening)),
        "created": session.run.context.now(),
    }
