"""`forgetting.json` and `certificate.json` arrive; what was forgotten, and what may be said of it, leaves as tables.

A run that measured nothing outside its tasks has neither file: then everything here is empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keeptune.data.record import OTHER_TASKS, SELF_TEXTS
from keeptune.report.answers import Answer, read_flips
from keeptune.report.certificate import Budget, Certificate, read_certificate
from keeptune.report.reading import RunFolder, finite, mapping, number, rows, string, strings, whole
from keeptune.report.scores import Score, read_scores


@dataclass(frozen=True, slots=True)
class Lost:
    """What a model at `alpha` lost on a suite: positive `forgetting` = lost, with its 95 % interval [low, high].

    [`worst_low`, `worst_high`] is wider: of the `num_suites` of a kind, it holds for the one that lost most.
    `num_lost` and `num_gained` count records; `kl` is the divergence from the base in nats per token, of texts alone.
    `without` names the tasks of "others" that this row leaves out.
    """

    model: str
    alpha: float
    suite: str
    metric: str
    num_records: int | None
    num_clusters: int | None
    base: float | None
    tuned: float | None
    forgetting: float
    low: float | None
    high: float | None
    worst_low: float | None
    worst_high: float | None
    num_suites: int | None
    num_lost: int | None
    num_gained: int | None
    chance: float | None
    base_at_chance: bool
    retention: float | None
    kl: float | None
    without: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Canaries:
    """How many answers show that generation itself broke; None where the task has no such form.

    Of a choice among labels, `top_answer` is the most frequent answer, given `num_top_answer` times and expected
    `num_top_expected` times; always giving the most frequent reference would be right `num_majority` times.
    """

    model: str
    alpha: float | None
    task: str
    num_records: int
    num_unended: int | None
    num_empty: int | None
    num_looping: int | None
    num_other_script: int | None
    num_broken_format: int | None
    top_answer: str | None = None
    num_top_answer: int | None = None
    num_top_expected: int | None = None
    num_majority: int | None = None

    @property
    def counts(self) -> tuple[int | None, ...]:
        """The counts in the order in which the page shows them."""
        return self.num_unended, self.num_looping, self.num_empty, self.num_other_script, self.num_broken_format


@dataclass(frozen=True, slots=True)
class Noise:
    """What changed when the base was asked the same again: the floor below any forgetting."""

    num_records: int
    num_answers_changed: int | None
    num_scores_changed: int | None
    largest_loss_change: float | None


@dataclass(frozen=True, slots=True)
class Forgotten:
    """All that the run tells of what was forgotten; `targets` holds (alpha, score) of points between base and trained.

    `delivered` is the (method, alpha) that the run chose. `under_budget` holds what was lost on the tasks and in the
    metric that a certificate speaks of; `left_out` what was lost in other metrics where it does not speak.
    """

    metric: str | None = None
    rows: tuple[Lost, ...] = ()
    under_budget: tuple[Lost, ...] = ()
    left_out: tuple[Lost, ...] = ()
    canaries: tuple[Canaries, ...] = ()
    noise: Noise | None = None
    certificate: Certificate | None = None
    delivered: tuple[str, float] | None = None
    targets: tuple[tuple[float, Score], ...] = ()
    flips: tuple[Answer, ...] = ()

    @property
    def suites(self) -> tuple[str, ...]:
        """The suites in their order, tasks before texts; "others", their mean, only behind several tasks."""
        tasks = dict.fromkeys(r.suite for r in self.rows if r.metric == self.metric and r.suite != OTHER_TASKS)
        texts = dict.fromkeys(r.suite for r in self.rows if r.metric != self.metric and r.suite not in tasks)
        return (*tasks, *([OTHER_TASKS] if len(tasks) > 1 else []), *texts)

    @property
    def main_suite(self) -> str | None:
        """The suite that one number stands for: all other tasks together, else texts of the base, else the first."""
        with_something_to_lose = [row.suite for row in self.rows if not row.base_at_chance]
        suites = with_something_to_lose or [row.suite for row in self.rows]
        return next((s for s in (OTHER_TASKS, SELF_TEXTS) if s in suites), next(iter(suites), None))

    @property
    def main_budget(self) -> Budget | None:
        """The budget that one figure stands for: that of all other tasks, else the first that was measured."""
        budgets = self.certificate.budgets if self.certificate else ()
        found = [budget for budget in budgets if any(self._speaks_of(budget, row) for row in self._all_rows)]
        return next((b for b in found if b.suite == OTHER_TASKS), next(iter(found), None))

    @property
    def main_rows(self) -> tuple[Lost, ...]:
        """What every model lost under the main budget, or without one on the main suite."""
        budget = self.main_budget
        if budget is None:
            return tuple(row for row in self.rows if row.suite == self.main_suite)
        found = {(row.model, row.alpha): row for row in self._all_rows if self._speaks_of(budget, row)}
        return tuple(found.values())

    def main_lost(self, model: str, alpha: float) -> Lost | None:
        """Return what a model lost under the main budget, or without one on the main suite."""
        return next((row for row in self.main_rows if (row.model, row.alpha) == (model, alpha)), None)

    def kept(self, budget: Budget, *, model: str, alpha: float) -> Lost | None:
        """Return what a model lost on the tasks and in the metric of a budget, None where it was not measured."""
        found = (row for row in self._all_rows if self._speaks_of(budget, row))
        return next((row for row in found if (row.model, row.alpha) == (model, alpha)), None)

    @property
    def _all_rows(self) -> tuple[Lost, ...]:
        return (*self.under_budget, *self.rows)

    def _speaks_of(self, budget: Budget, row: Lost) -> bool:
        left_out = self.certificate.left_out_at_chance if self.certificate else ()
        without = {one.suite for one in left_out if one.budget == budget.suite}
        return (row.suite, row.metric, {*row.without}) == (budget.suite, budget.metric, without)

    def lost(self, model: str, alpha: float, suite: str | None) -> Lost | None:
        """Return what a model lost on a suite, None where it was not measured."""
        return next((r for r in self.rows if (r.model, r.alpha, r.suite) == (model, alpha, suite)), None)


NOTHING_FORGOTTEN = Forgotten()


def read_forgotten(
    folder: RunFolder, *, methods: Sequence[str], shown: str | None, base: str | None, lower: frozenset[str]
) -> Forgotten:
    """Return what the run folder tells of forgetting; `shown` names the method whose answers are shown beside `base`'s.

    Metrics in `lower` are better where they are lower.

    Raises:
        StorageError: the disk refuses to read a file that exists.
    """
    value = folder.object("forgetting.json", expected=False)
    selection = folder.object("selection.json", expected=False)
    lost, under_budget, left_out = (
        tuple(row for row in read_lost(value, part=part) if row.model in methods)
        for part in ("rows", "under_budget", "left_out")
    )
    metric = string(value.get("metric"))
    certificate = read_certificate(folder.object("certificate.json", expected=False))
    selected, alpha = string(selection.get("selected")), number(selection.get("alpha"))
    delivered = (selected, 1.0 if alpha is None else alpha) if selected in methods and selected is not None else None
    places = dict.fromkeys((row.model, row.alpha) for row in lost if row.alpha < 1.0)
    targets = tuple(_targets(folder, list(places)))
    flips: tuple[Answer, ...] = ()
    if lost and metric is not None and shown is not None and base is not None:
        tasks = {row.suite for row in lost if row.metric == metric and not row.base_at_chance}
        tuned = _answers_of(shown, delivered[1] if delivered else 1.0)
        flips = read_flips(
            folder, tuned=tuned, base=base, metric=metric, higher_is_better=metric not in lower, tasks=tasks
        )
    return Forgotten(
        metric=metric,
        rows=lost,
        under_budget=under_budget,
        left_out=left_out,
        canaries=read_canaries(value),
        noise=_noise(mapping(value.get("noise"))),
        certificate=certificate,
        delivered=delivered,
        targets=targets,
        flips=flips,
    )


def read_lost(value: Mapping[str, Any], *, part: str = "rows") -> tuple[Lost, ...]:
    """Return what a part of `forgetting.json` says was lost, by every model on every suite."""
    return tuple(row for row in map(_lost, rows(value.get(part))) if row is not None)


def read_canaries(value: Mapping[str, Any]) -> tuple[Canaries, ...]:
    """Return the counts of broken answers that `forgetting.json` holds."""
    return tuple(row for row in map(_canaries, rows(value.get("canaries"))) if row is not None)


def _answers_of(method: str, alpha: float) -> str:
    return f"{method}/test/samples.jsonl" if alpha == 1.0 else f"{method}/path/{alpha:g}/test/samples.jsonl"


def _targets(folder: RunFolder, places: Sequence[tuple[str, float]]) -> Iterator[tuple[float, Score]]:
    for method, alpha in places:
        for score in read_scores(folder.object(f"{method}/path/{alpha:g}/test/scores.json", expected=False)):
            if score.model == method:
                yield alpha, score


def _lost(row: Mapping[str, Any]) -> Lost | None:
    model, suite, metric = (string(row.get(key)) for key in ("model", "suite", "metric"))
    alpha, forgetting = finite(row.get("alpha")), finite(row.get("forgetting"))
    if model is None or suite is None or metric is None or alpha is None or forgetting is None:
        return None
    return Lost(
        model=model,
        alpha=alpha,
        suite=suite,
        metric=metric,
        num_records=whole(row.get("num_records")),
        num_clusters=whole(row.get("num_clusters")),
        base=finite(row.get("base")),
        tuned=finite(row.get("tuned")),
        forgetting=forgetting,
        low=finite(row.get("low")),
        high=finite(row.get("high")),
        worst_low=finite(row.get("worst_low")),
        worst_high=finite(row.get("worst_high")),
        num_suites=whole(row.get("num_suites")),
        num_lost=whole(row.get("num_lost")),
        num_gained=whole(row.get("num_gained")),
        chance=finite(row.get("chance")),
        base_at_chance=row.get("base_at_chance") is True,
        retention=finite(row.get("retention")),
        kl=finite(row.get("kl")),
        without=strings(row.get("without")),
    )


def _canaries(row: Mapping[str, Any]) -> Canaries | None:
    model, task, num_records = string(row.get("model")), string(row.get("task")), whole(row.get("num_records"))
    if model is None or task is None or not num_records:
        return None
    counts = ("num_unended", "num_empty", "num_looping", "num_other_script", "num_broken_format")
    return Canaries(
        model,
        finite(row.get("alpha")),
        task,
        num_records,
        *(whole(row.get(key)) for key in counts),
        top_answer=string(row.get("top_answer")),
        **{key: whole(row.get(key)) for key in ("num_top_answer", "num_top_expected", "num_majority")},
    )


def _noise(value: Mapping[str, Any]) -> Noise | None:
    num_records = whole(value.get("num_records"))
    if not num_records:
        return None
    changed = (whole(value.get("num_answers_changed")), whole(value.get("num_scores_changed")))
    return Noise(num_records, *changed, finite(value.get("largest_loss_change")))
