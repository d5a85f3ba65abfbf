"""`certificate.json` arrives; the verdict on the budgets, and each test that it stands on, leave as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keeptune.report.reading import finite, mapping, rows, string, strings, whole

VERDICTS = ("CERTIFIED", "NOT CERTIFIED", "INFEASIBLE")


@dataclass(frozen=True, slots=True)
class Budget:
    """What a suite may lose, in the recipe's words and as `amount` in units of `metric`."""

    suite: str
    text: str
    amount: float | None
    unit: str | None
    metric: str | None


@dataclass(frozen=True, slots=True)
class Tested:
    """One test on the certify records: what `model` at `alpha` lost on a suite, in units of the budget's metric.

    `bound` is the smallest budget that the test would have certified at `delta`, None where there is none;
    `num_changed` counts the records whose own value moved.
    """

    model: str
    alpha: float
    suite: str
    metric: str | None
    lost: float | None
    bound: float | None
    p_value: float | None
    delta: float | None
    num_records: int | None
    num_changed: int | None
    certified: bool


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A suite that the certificate does not speak of: `base` is no better than `chance` in the metric of its budget.

    `reason` "budget": it is no more than the budget. `budget` is the suite's own name, or "others" where it is one of
    them. `name` tells the two apart.
    """

    name: str
    suite: str
    budget: str
    metric: str
    base: float | None
    chance: float | None
    reason: str = "chance"


@dataclass(frozen=True, slots=True)
class Certificate:
    """A verdict on the budgets; `model` at `alpha` is delivered, else the base behind `fallback_shots` examples.

    `fallback` says in words what validation measured of that, empty where a model is delivered. `opening` is the number
    of this opening of the certify records, as the file `ledger` counted it; None: as the run folder's own did.
    """

    verdict: str
    sentence: str
    model: str | None
    alpha: float | None
    fallback_shots: int
    fallback: str
    budgets: tuple[Budget, ...]
    limits: tuple[str, ...]
    opening: int | None
    delta: float | None
    confidence: float | None
    items: tuple[tuple[str, int], ...]
    left_out_at_chance: tuple[LeftOut, ...]
    sha256: tuple[tuple[str, str], ...]
    tests: tuple[Tested, ...]
    ledger: str | None = None

    @property
    def heading(self) -> str:
        """The verdict in capitals, with the suites that it does not speak of."""
        but = ", ".join(one.name for one in self.left_out_at_chance) if self.verdict == "CERTIFIED" else ""
        return f"{self.verdict}, EXCEPT FOR {but}" if but else self.verdict

    def test(self, budget: Budget) -> Tested | None:
        """Return the test of a budget that the delivered model passed, None where there is none."""
        place = (self.model, self.alpha, budget.suite)
        return next((test for test in self.tests if (test.model, test.alpha, test.suite) == place), None)


def read_certificate(value: Mapping[str, Any]) -> Certificate | None:
    """Return the certificate that `certificate.json` holds, None where it holds none."""
    verdict = string(value.get("verdict")) or ""
    if verdict not in VERDICTS:
        return None
    choice, artifact, fallback = (mapping(value.get(key)) for key in ("choice", "artifact", "fallback"))
    budgets = mapping(value.get("budgets")).items()
    return Certificate(
        verdict=verdict,
        sentence=string(value.get("sentence")) or "",
        model=string(choice.get("candidate")),
        alpha=finite(choice.get("alpha")),
        fallback_shots=whole(fallback.get("shots")) or 0,
        fallback=string(fallback.get("sentence")) or "",
        budgets=tuple(_budget(suite, mapping(budget)) for suite, budget in budgets),
        limits=strings(value.get("limits")),
        opening=whole(value.get("opening")),
        delta=finite(value.get("delta")),
        confidence=finite(value.get("confidence")),
        items=tuple((suite, n) for suite, v in mapping(value.get("items")).items() if (n := whole(v)) is not None),
        left_out_at_chance=tuple(
            _left_out(name, mapping(v)) for name, v in mapping(value.get("left_out_at_chance")).items()
        ),
        sha256=tuple((k, v) for k, v in mapping(artifact.get("sha256")).items() if isinstance(v, str)),
        tests=tuple(tested for tested in map(_tested, rows(value.get("cells"))) if tested is not None),
        ledger=string(value.get("ledger")),
    )


def _left_out(name: str, found: Any) -> LeftOut:
    value = mapping(found)
    suite, budget = (string(value.get(key)) or name for key in ("suite", "budget"))
    base, chance = (finite(value.get(key)) for key in ("base", "chance"))
    metric, reason = string(value.get("metric")) or "?", string(value.get("reason")) or "chance"
    return LeftOut(name, suite, budget, metric, base, chance, reason)


def _budget(suite: str, value: Mapping[str, Any]) -> Budget:
    words = (string(value.get(key)) for key in ("unit", "metric"))
    return Budget(suite, string(value.get("text")) or "?", finite(value.get("amount")), *words)


def _tested(cell: Mapping[str, Any]) -> Tested | None:
    choice, measured = mapping(cell.get("choice")), mapping(cell.get("measured"))
    model, alpha, suite = string(choice.get("candidate")), finite(choice.get("alpha")), string(cell.get("suite"))
    if model is None or alpha is None or suite is None:
        return None
    return Tested(
        model=model,
        alpha=alpha,
        suite=suite,
        metric=string(mapping(cell.get("budget")).get("metric")),
        lost=finite(measured.get("mean")),
        bound=finite(cell.get("upper_bound")),
        p_value=finite(measured.get("p")),
        delta=finite(cell.get("delta")),
        num_records=whole(measured.get("num_records")),
        num_changed=whole(measured.get("num_changed")),
        certified=cell.get("certified") is True,
    )
