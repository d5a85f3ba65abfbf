"""How many suites of a finished run would be certified: its records drawn anew, with and without strata by task.

    python benchmarks/power.py RUN [--metric exact_match] [--slack 0.05] [--repetitions 1000]

RUN is the folder of a run with a budget on `others`. What each record of the report part lost at a point of the way is
drawn again within its task, so many records as --num names; the budget is the loss that was measured and --slack more.
Size is the share certified where the budget is that loss itself. It writes results/power.md and .json.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from keeptune.data.record import OTHER_TASKS
from keeptune.evaluation.evaluate import read_answers
from keeptune.retention.drops import Drops, paired_drops
from keeptune.retention.pvalues import p_value
from keeptune.storage import read_record

RESULTS = Path(__file__).with_name("results")
LEVELS = (0.05, 0.04, 0.025)


@dataclass(frozen=True, slots=True)
class Cell:
    """The shares certified at each level, by the mix of tasks taken as fixed (strata) and as drawn (pooled)."""

    model: str
    alpha: float
    num_records: int
    lost: float
    slack: float
    strata: tuple[float, ...]
    pooled: tuple[float, ...]


def measured(run: Path, *, model: str, alpha: float, metric: str) -> Drops:
    """Return what each record of the certified tasks lost on the report part."""
    certificate = read_record(run / "certificate.json")
    tasks = {
        row["suite"]
        for row in read_record(run / "forgetting.json")["rows"]
        if row["metric"] == metric and row["suite"] != OTHER_TASKS
    } - {one["suite"] for one in certificate["left_out_at_chance"].values()}
    place = run / model / ("test" if alpha == 1.0 else f"path/{alpha:g}/test")
    base, tuned = (
        [answer for answer in read_answers(folder) if answer.task in tasks]
        for folder in (run / "base/zero-shot", place)
    )
    return paired_drops(base, tuned, metric=metric, scale=1.0, suite=OTHER_TASKS)


def cell(found: Drops, *, model: str, alpha: float, num: int, slack: float, repetitions: int) -> Cell:
    """Draw suites of `num` records and count what is certified."""
    rng = np.random.default_rng(0)
    assert found.strata_R is not None
    tasks = [np.flatnonzero(found.strata_R == task) for task in range(int(found.strata_R.max()) + 1)]
    numbers = [round(num * len(task) / found.num_records) for task in tasks]
    strata = np.repeat(np.arange(len(tasks)), numbers)
    # The mean of such draws: rounding moves it a little.
    means = [found.values_R[task].mean() for task in tasks]
    lost = float(np.average(means, weights=numbers))
    ps = []
    for _ in range(repetitions):
        places = np.concatenate([rng.choice(task, number) for task, number in zip(tasks, numbers, strict=True)])
        values, clusters = found.values_R[places], np.arange(len(places))
        by_task, pooled = Drops(values, clusters, 1.0, strata), Drops(values, clusters)
        ps.append([p_value(drops, budget=lost + slack).p for drops in (by_task, pooled)])
    by_task, pooled = (tuple(float(np.mean(p <= level)) for level in LEVELS) for p in np.array(ps).T)
    return Cell(model, alpha, len(strata), lost, slack, by_task, pooled)


def main() -> None:
    """Measure every point of a run's ways that lost something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--metric", default="exact_match")
    parser.add_argument("--num", type=int, nargs="+", default=[370, 555])
    parser.add_argument("--slack", type=float, nargs="+", default=[0.05, 0.0])
    parser.add_argument("--repetitions", type=int, default=1000)
    given = parser.parse_args()
    rows = read_record(given.run / "forgetting.json")["rows"]
    points = [(row["model"], row["alpha"]) for row in rows if row["suite"] == OTHER_TASKS]
    cells = []
    for model, alpha in points:
        found = measured(given.run, model=model, alpha=alpha, metric=given.metric)
        cells += [
            cell(found, model=model, alpha=alpha, num=num, slack=slack, repetitions=given.repetitions)
            for slack in given.slack
            for num in given.num
        ]
    columns = [f"{name} at {level:g}" for name in ("strata", "pooled") for level in LEVELS]
    lines = [f"| model | records | lost | slack | {' | '.join(columns)} |", "|---" * (4 + len(columns)) + "|"]
    for one in cells:
        shares = " | ".join(f"{share:.3f}" for share in (*one.strata, *one.pooled))
        lines.append(f"| {one.model}, {one.alpha:g} | {one.num_records} | {one.lost:.3f} | {one.slack:g} | {shares} |")
    words = f"Shares of {given.repetitions:,} draws that are certified; with a slack of 0 each of them is wrong."
    text = f"{words}\n\n" + "\n".join(lines) + "\n"
    (RESULTS / "power.md").write_text(text, encoding="utf-8")
    value = {"levels": LEVELS, "repetitions": given.repetitions, "cells": [asdict(one) for one in cells]}
    (RESULTS / "power.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
