"""How often the certificate's test errs where the true loss is the very budget, and certifies where less is lost.

    python benchmarks/certificate_null.py [--repetitions 4000] [--jobs 2] [--kinds TEXT ...]

Each cell draws suites of one kind (tests/retention/simulated.py) and one size, and counts the p-values at or below each
level. It writes results/certificate_null.json and .md; a cell fails where its share is more than two standard errors
above the level. The power table holds what is certified of suites that lose less than the budget. With `--kinds` only
kinds with one of these texts in their names are drawn anew; the other cells stay.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from keeptune.retention.pvalues import p_value, records_needed_for_any_verdict
from tests.retention.simulated import KINDS, Kind, exact_match, tasks

LEVELS = (0.05, 0.025, 0.0125)
SIZES = (20, 50, 100, 200, 400, 1000, 5000)
RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True, slots=True)
class Cell:
    """One kind of suite, its number of clusters, and the share of draws that are certified at each level."""

    kind: str
    num_clusters: int
    budget: float
    certified: tuple[float, ...]
    num_repetitions: int

    @property
    def failed(self) -> tuple[bool, ...]:
        """Whether each share is more than two standard errors above its level."""
        return tuple(
            share > level + 2.0 * math.sqrt(level * (1.0 - level) / self.num_repetitions)
            for share, level in zip(self.certified, LEVELS, strict=True)
        )


def measure(name: str, kind: Kind, num: int, *, budget: float, repetitions: int) -> Cell:
    """Draw suites of a kind and count what is certified; the name seeds the draws."""
    rng = np.random.default_rng(zlib.crc32(f"{name}/{num}".encode()))
    found = np.array([p_value(kind.draw(rng, num), budget=budget).p for _ in range(repetitions)])
    return Cell(name, num, budget, tuple(float(np.mean(found <= level)) for level in LEVELS), repetitions)


def null_cell(place: tuple[str, int], *, repetitions: int) -> Cell:
    """Return the cell of a kind and a size at its true mean."""
    name, num = place
    return measure(name, KINDS[name], num, budget=KINDS[name].mean, repetitions=repetitions)


POWER: dict[str, tuple[Kind, int, float]] = {
    "640 records, .005 lost, .02 changed, budget .02": (exact_match(churn=0.02, mean=0.005), 640, 0.02),
    "1,000 records, nothing lost, .05 changed, budget .02": (exact_match(churn=0.05, mean=0.0), 1000, 0.02),
    "2,000 records, nothing lost, .05 changed, budget .01": (exact_match(churn=0.05, mean=0.0), 2000, 0.01),
    "370 records of 10 tasks, .05 lost, budget .1": (tasks(num=10, spread=0.3, churn=0.1, mean=0.05), 370, 0.1),
}


def power_cell(name: str, *, repetitions: int) -> Cell:
    """Return a cell whose suites lose less than the budget."""
    kind, num, budget = POWER[name]
    return measure(name, kind, num, budget=budget, repetitions=repetitions)


def table(cells: Sequence[Cell], *, null: bool = True) -> str:
    """Return the cells as a Markdown table; shares of `null` cells that fail are bold."""
    lines = ["| suite | clusters | " + " | ".join(f"at {level:g}" for level in LEVELS) + " |", "|---|---|---|---|---|"]
    for cell in cells:
        shares = [
            f"**{share:.4f}**" if failed and null else f"{share:.4f}"
            for share, failed in zip(cell.certified, cell.failed, strict=True)
        ]
        lines.append(f"| {cell.kind} | {cell.num_clusters:,} | {' | '.join(shares)} |")
    return "\n".join(lines)


def worst_table(cells: Sequence[Cell]) -> str:
    """Return the largest share of each kind over all sizes, as a Markdown table."""
    lines = [
        "| suite, 20 to 5,000 clusters | " + " | ".join(f"at {level:g}" for level in LEVELS) + " |",
        "|---|---|---|---|",
    ]
    for kind in dict.fromkeys(cell.kind for cell in cells):
        own = [cell.certified for cell in cells if cell.kind == kind]
        lines.append(f"| {kind} | {' | '.join(f'{max(shares):.4f}' for shares in zip(*own, strict=True))} |")
    return "\n".join(lines)


def main() -> None:
    """Measure all cells and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=4000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", default=[""])
    given = parser.parse_args()
    path = RESULTS / "certificate_null.json"
    kept = json.loads(path.read_text(encoding="utf-8"))["null"] if given.kinds != [""] else []
    by_place = {
        (one["kind"], one["num_clusters"]): Cell(**{**one, "certified": tuple(one["certified"])}) for one in kept
    }
    drawn = [(name, num) for name in KINDS if any(text in name for text in given.kinds) for num in SIZES]
    with ProcessPoolExecutor(given.jobs) as pool:
        # The dearest first, so that none of them ends alone.
        dearest = sorted(drawn, key=lambda place: -place[1])
        found = pool.map(partial(null_cell, repetitions=given.repetitions), dearest)
        by_place |= dict(zip(dearest, found, strict=True))
        power = list(pool.map(partial(power_cell, repetitions=given.repetitions), POWER))
    null = [by_place[name, num] for name in KINDS for num in SIZES]
    num_failed = sum(any(cell.failed) for cell in null)
    unchanged = records_needed_for_any_verdict(budget=0.02, delta=0.025)
    words = (
        f"{len(null)} cells of {given.repetitions:,} draws at the very budget, {num_failed} of them with a share more "
        f"than two standard errors above its level (bold). A model that changed nothing is certified at .02 and a "
        f"level of .025 from {unchanged} records on; no valid test does with fewer."
    )
    certified = f"Share certified where less than the budget is lost:\n\n{table(power, null=False)}"
    of_null = f"The largest share of each kind:\n\n{worst_table(null)}\n\nEvery cell:\n\n{table(null)}"
    text = f"{words}\n\n{of_null}\n\n{certified}\n"
    (RESULTS / "certificate_null.md").write_text(text, encoding="utf-8")
    value = {
        "repetitions": given.repetitions,
        "levels": LEVELS,
        "num_failed": num_failed,
        "null": [asdict(cell) for cell in null],
        "power": [asdict(cell) for cell in power],
    }
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
