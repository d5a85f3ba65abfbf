"""One opening of the certify records: models arrive, what each lost against the base leaves.

Each opening stands in a ledger, written down before a model reads any record, and costs confidence.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from keeptune.data.record import OTHER_TASKS
from keeptune.stages.budgets import budgets_of, check_budgets
from keeptune.stages.certify_openings import Opening, certify_files, open_records
from keeptune.stages.computing import policy_of
from keeptune.stages.data import Data, max_new_tokens_on_test
from keeptune.stages.harness import Harness, answer_harness, write_harness
from keeptune.stages.left_out import tested_budgets
from keeptune.stages.retention import answer
from keeptune.stages.run import Run, is_done, stage_key
from keeptune.stages.texts import Texts, certify_texts, write_texts
from keeptune.stages.way import BASE, load_base
from keeptune.storage import storage_errors

if TYPE_CHECKING:
    from torch import nn

    from keeptune.evaluation.evaluate import Split
    from keeptune.evaluation.metrics import Answer
    from keeptune.retention.budget import Budget
    from keeptune.retention.chance import LeftOut
    from keeptune.retention.drops import Drops

_KINDS = ("tasks", "texts", "harness")
_CERTIFY = "certify"


@dataclass(frozen=True, slots=True)
class Session:
    """What is measured in one opening, and against what; `key` is that of the candidates and all that they are asked.

    `budgets` are those of the recipe; `left_out` are the suites with nothing to lose. `largest` is the most records of
    one input in each task's report part.
    """

    run: Run
    data: Data
    texts: Texts | None
    harness: Harness | None
    budgets: Mapping[str, Budget]
    left_out: Sequence[LeftOut]
    largest: Mapping[str, int]
    key: str

    @property
    def tested(self) -> dict[str, Budget]:
        """The budgets that are tested."""
        return tested_budgets(self.budgets, self.left_out)

    @property
    def watched(self) -> dict[str, Budget]:
        """The budgets of suites that are left out, by their names in the certificate."""
        return {one.name: self.budgets[one.budget] for one in self.left_out if one.suite != OTHER_TASKS}

    @property
    def asked(self) -> tuple[str, ...]:
        """The harness suites under a budget."""
        return tuple(suite for suite in self.budgets if self.harness is not None and suite in self.harness.metrics)

    @property
    def tasks(self) -> Split | None:
        """The certify records of instruction suites."""
        from keeptune.evaluation.evaluate import Split

        if not (self.data.folder / "certify.jsonl").is_file():
            return None
        records, table = self.data.records("certify"), self.data.table("certify")
        return Split("certify", records, table, untrained_tasks=self.data.untrained_tasks)


@dataclass(frozen=True, slots=True)
class Suites:
    """What may not be lost, each suite with as many records as can certify something."""

    texts: Texts | None
    harness: Harness | None
    budgets: Mapping[str, Budget]


def read_suites(run: Run, data: Data) -> Suites:
    """Write the texts and harness documents of a run, unless they stand there, and return them with the budgets.

    Raises:
        RecipeError: a suite has too few records; what is known before anything is written is said then.
    """
    check_budgets(run, data)
    texts, harness = write_texts(run, data), write_harness(run, data)
    check_budgets(run, data, certify_texts(texts), harness=harness)
    return Suites(texts, harness, budgets_of(run.recipe, harness=harness))


def open_session(session: Session, candidates: Sequence[str], *, certificate: Path) -> Opening:
    """Return the opening for a certificate, which is written down before a model reads any certify record.

    A certification that was interrupted goes on: it asks the same candidates the same records.
    """
    run = session.run
    opening = open_records(
        run,
        certify_files(run, session.data),
        key=session.key,
        facts={
            "opened": run.context.now(),
            "command": run.context.command,
            "candidates": list(candidates),
            "certificate": str(certificate.resolve()),
        },
    )
    for fault in opening.faults:
        run.context.progress.say(fault)
    if opening.number > 1:
        run.context.progress.say(f"opening {opening.number} of these certify records")
    return opening


def forget_answers(run: Run, *candidates: Path) -> None:
    """Remove what models answered to single certify records.

    A certificate's sums stay. Who chose the next model by the records that the last one lost would need far more
    confidence than is left.
    """
    for folder in (run.folder / BASE / _CERTIFY, *candidates):
        if folder.is_dir():
            with storage_errors(folder):
                shutil.rmtree(folder)


def base_answers(session: Session) -> list[Answer]:
    """Return what the base answers to the certify records; it is asked once for all candidates."""
    run, data = session.run, session.data
    folder = run.folder / BASE / _CERTIFY
    key = stage_key(
        weights=data.base.facts.sha256,
        data=data.key,
        texts=session.texts.key if session.texts is not None else None,
        harness=session.harness.key if session.harness is not None else None,
        metrics=list(run.recipe.evaluation.metrics),
        max_new_tokens=max_new_tokens_on_test(run.recipe, data),
        **policy_of(run.recipe).answers_key(),
    )
    return certify_answers(session, lambda: load_base(run, data), name=BASE, folder=folder, key=key)


def certify_answers(
    session: Session, model: Callable[[], nn.Module], *, name: str, folder: Path, key: str | None = None
) -> list[Answer]:
    """Return a model's answers to all certify records, which stand in `folder` or are made; `model` is loaded then.

    It answers the records of instruction suites and of harness suites, and weighs those of texts.
    """
    from keeptune.evaluation.evaluate import read_answers

    run, data = session.run, session.data
    suites = set(session.budgets)
    tasks = session.tasks if suites & {OTHER_TASKS, *data.untrained_tasks} else None
    texts = session.texts.split("certify") if session.texts is not None and session.texts.has("certify") else None
    for kind, split, metrics in (("tasks", tasks, run.recipe.evaluation.metrics), ("texts", texts, ())):
        made = stage_key(certify=key or session.key, kind=kind)
        if split is None or is_done(folder / kind, made):
            continue
        run.context.progress.say(f"{name}: {len(split.records):,} certify records of {kind}")
        answer(run, data, model(), split=split, metrics=metrics, name=name, folder=folder / kind, key=made)
    made = stage_key(certify=key or session.key, kind="harness", suites=session.asked)
    if session.harness is not None and session.asked and not is_done(folder / "harness", made):
        run.context.progress.say(f"{name}: certify records of {', '.join(session.asked)}")
        answer_harness(
            run,
            data,
            model(),
            harness=session.harness,
            part="certify",
            suites=session.asked,
            name=name,
            folder=folder / "harness",
            key=made,
        )
    found = [read_answers(place) for kind in _KINDS if (place := folder / kind).is_dir()]
    return [answer for answers in found for answer in answers]


def drops_of(session: Session, base: Sequence[Answer], tuned: Sequence[Answer]) -> dict[str, Drops]:
    """Return what each suite that is tested or watched lost, record by record."""
    from keeptune.retention.drops import paired_drops

    outside = {one.suite for one in session.left_out if one.budget == OTHER_TASKS}
    of = {suite: {suite} for suite in session.tested} | {one.name: {one.suite} for one in session.left_out}
    if OTHER_TASKS in session.tested:
        of[OTHER_TASKS] = set(session.data.untrained_tasks - outside)
    return {
        suite: paired_drops(
            [answer for answer in base if answer.task in of[suite]],
            [answer for answer in tuned if answer.task in of[suite]],
            metric=budget.metric,
            scale=budget.scale,
            suite=suite,
            largest=session.largest,
        )
        for suite, budget in {**session.tested, **session.watched}.items()
    }
