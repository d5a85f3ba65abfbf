"""What trials may see: prepared data arrive; a folder with train, validation and probe, and without test, leaves.

Test is no part of that folder, and nothing in it says where test stands. A trial is given that folder alone.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from keeptune.config import Recipe
from keeptune.data.record import OTHER_TASKS, PartName, SplitName
from keeptune.search.trials import Trial
from keeptune.stages.budgets import budgets_of
from keeptune.stages.computing import policy_of
from keeptune.stages.data import TRIAL_FACTS, Data, max_new_tokens, read_base
from keeptune.stages.run import Run, is_done, stage_key
from keeptune.stages.texts import Texts
from keeptune.stages.training import make_bench
from keeptune.stages.way import BASE, load_base
from keeptune.storage import read_record, staged_folder, storage_errors, write_json, write_lines, write_record

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from keeptune.evaluation.evaluate import Split
    from keeptune.evaluation.metrics import Answer

# What a trial trains on, what chooses, what it may train on again, and what its losses are measured on.
_SHOWN: tuple[SplitName | PartName, ...] = ("train", "validation", "replay", "probe")
_KINDS = ("tasks", "texts")


@dataclass(frozen=True, slots=True)
class Limits:
    """Tokens of an answer at most, to validation and to the probe: those that all train records need.

    A trial on some of the records would take other limits from them, and not be comparable.
    """

    validation: int
    probe: int


@dataclass(frozen=True, slots=True)
class Parts:
    """The folder that trials are given."""

    folder: Path

    @property
    def key(self) -> str:
        """The hash of the data and texts that the parts were taken from."""
        return read_record(self.folder / TRIAL_FACTS)["key"]

    @property
    def limits(self) -> Limits:
        """How long answers may be."""
        return Limits(**read_record(self.folder / TRIAL_FACTS)["limits"])

    def data(self, recipe: Recipe, *, cache: Path, subset: str) -> Data:
        """Return the data with the train records of a subset."""
        key = read_record(self.folder / TRIAL_FACTS)["data"]
        return Data(read_base(recipe, cache=cache), self.folder / subset, stage_key(data=key, subset=subset))

    @property
    def texts(self) -> Texts | None:
        """The texts to replay and those of the probe; None where the recipe has none."""
        key = read_record(self.folder / TRIAL_FACTS)["texts"]
        return None if key is None else Texts(self.folder / "texts", key)


def write_parts(run: Run, data: Data, texts: Texts | None, *, trials: Sequence[Trial]) -> Parts:
    """Write the folder that these trials and others on the same train records are given, unless it stands there.

    Files are shared with `data/`, not copied.

    The base model answers the probe of suites under a budget here, once for all trials.
    """
    folder = run.folder / "parts"
    names, limits = sorted({trial.subset for trial in trials}), _limits(run.recipe, data)
    texts_key = texts.key if texts is not None else None
    answered = policy_of(run.recipe).answers_key()
    key = stage_key(data=data.key, texts=texts_key, subsets=names, limits=asdict(limits), **answered)
    if not is_done(folder, key):
        with staged_folder(folder, facts={"key": key}) as staging:
            for name, positions in subsets(data, trials, seed=run.recipe.seed).items():
                _write_subset(data, staging / name, positions=positions)
            if texts is not None:
                _link(texts.folder, staging / "texts")
            facts = {"key": key, "data": data.key, "texts": texts_key, "limits": asdict(limits)}
            write_record(staging / TRIAL_FACTS, facts)
    parts = Parts(folder)
    answer_probe(run, data, parts, model=lambda: load_base(run, data), folder=run.folder / BASE)
    return parts


def _limits(recipe: Recipe, data: Data) -> Limits:
    """Return how long answers may be: on the probe what its own completions need too, where there is no limit set."""
    import numpy as np

    from keeptune.evaluation.generate import auto_max_new_tokens

    limit = max_new_tokens(recipe, data)
    if recipe.evaluation.max_new_tokens != "auto" or not (data.folder / "probe.jsonl").is_file():
        return Limits(limit, limit)
    longest = float(np.quantile(data.table("probe").completion_lengths, 0.99))
    return Limits(limit, auto_max_new_tokens(data.table("train").completion_lengths, at_least_p99=longest))


def answer_probe(run: Run, data: Data, parts: Parts, *, model: Callable[[], nn.Module], folder: Path) -> None:
    """Let a model answer the probe records of suites under a budget into `folder`, unless its answers stand there."""
    from keeptune.evaluation.evaluate import evaluate_model

    probes, key = _probes(run.recipe, data, parts.texts), parts.key
    waiting = [(kind, split) for kind, split in probes if not is_done(folder / kind, key)]
    if not waiting:
        return
    asked = model()
    for kind, split in waiting:
        evaluate_model(
            asked,
            split=split,
            bench=make_bench(run, data, asked, max_new_tokens=parts.limits.probe),
            metrics=run.recipe.evaluation.metrics if kind == "tasks" else (),
            name="probe",
            shots=0,
            folder=folder / kind,
            facts={"key": key},
        )


def probe_drops(recipe: Recipe, base: Path, tuned: Path) -> tuple[dict[str, float], float | None]:
    """Return what each suite under a budget lost on its probe, and by how much of its budget the worst is above it.

    Suites without a probe record, and those of the harness, are left to the certificate; None where all are.
    """
    from keeptune.retention.drops import paired_drops

    before, after = _probe_answers(base), _probe_answers(tuned)
    untrained = {task.name for task in recipe.data.tasks if not task.train}
    drops: dict[str, float] = {}
    excess: list[float] = []
    for suite, budget in budgets_of(recipe).items():
        names = untrained if suite == OTHER_TASKS else {suite}
        mine, theirs = ([a for a in answers if a.task in names] for answers in (before, after))
        if mine:
            found = paired_drops(mine, theirs, metric=budget.metric, scale=budget.scale, suite=suite)
            drops[suite] = float(found.values_R.mean())
            excess.append((drops[suite] - budget.amount) / budget.amount)
    return drops, max(excess, default=None)


def _probes(recipe: Recipe, data: Data, texts: Texts | None) -> Iterator[tuple[str, Split]]:
    """Yield the probe records of instruction suites and of texts, where a budget asks for them."""
    from keeptune.evaluation.evaluate import Split

    suites = set(recipe.retention.budget)
    tasks = {task.name for task in recipe.data.tasks if not task.train}
    if suites & {OTHER_TASKS, *tasks} and (data.folder / "probe.jsonl").is_file():
        yield "tasks", Split("probe", data.records("probe"), data.table("probe"), untrained_tasks=frozenset(tasks))
    if suites - {OTHER_TASKS, *tasks} and texts is not None and texts.has("probe"):
        yield "texts", texts.split("probe")


def _probe_answers(folder: Path) -> list[Answer]:
    from keeptune.evaluation.evaluate import read_answers

    return [answer for kind in _KINDS if (folder / kind).is_dir() for answer in read_answers(folder / kind)]


def _link(source: Path, target: Path) -> None:
    """Give the parts of a folder that trials may see a second name in another."""
    with storage_errors(target):
        for part in (part for part in _SHOWN if (source / f"{part}.jsonl").is_file()):
            for path in (source / f"{part}.jsonl", *sorted((source / "tokens" / f"{part}.arrow").iterdir())):
                _link_file(path, target / path.relative_to(source))


def _link_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        # A file system without hard links.
        shutil.copy2(source, target)


def _write_audit(data: Data, folder: Path) -> None:
    """Write the one fact of the audit that a training asks for; the rest of it counts test records too."""
    write_json(folder / "audit.json", {"untrained_tasks": sorted(data.untrained_tasks)})


def _write_subset(data: Data, folder: Path, *, positions: NDArray[np.int64]) -> None:
    """Write the data with some of the train records alone: those at `positions` of their table, which rise."""
    from keeptune.text.table import TokenTable
    from keeptune.text.tokens import Tokenized

    _link(data.folder, folder)
    _write_audit(data, folder)
    table = data.table("train")
    if len(positions) == len(table):
        return
    with storage_errors(folder):
        (folder / "train.jsonl").unlink()
        shutil.rmtree(folder / "tokens" / "train.arrow")
    # The table has the same records in the same order; neither is read as a whole.
    chosen, prompts, completions = data.stored("train").at(positions), table.prompt_lengths, table.completion_lengths
    rows = (
        Tokenized(
            record,
            table[i],
            truncated=False,
            completion_cut=False,
            prompt_tokens=int(prompts[i]),
            completion_tokens=int(completions[i]),
        )
        for record, i in zip(chosen, positions.tolist(), strict=True)
    )
    TokenTable.write(folder / "tokens" / "train.arrow", rows)
    write_lines(folder / "train.jsonl", chosen.lines())


def subsets(data: Data, trials: Iterable[Trial], *, seed: int) -> dict[str, NDArray[np.int64]]:
    """Return the train records of each subset that trials ask for, as rising positions in their table, by its name.

    A share is of the records whose ids, which are hashes, come first; more records of the same seed hold the fewer.
    """
    import numpy as np

    ids = list(data.table("train").record_ids)
    found = {}
    for trial in trials:
        number = trial.num_records or max(1, math.ceil(trial.share * len(ids)))
        salt = "" if trial.num_records is None else f"{seed + trial.repeat}:"
        order = sorted(range(len(ids)), key=lambda i: _hash(salt + ids[i]) if salt else ids[i])
        found[trial.subset] = np.sort(np.array(order[:number], dtype=np.int64))
    return found


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
