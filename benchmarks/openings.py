"""How often some certificate is wrong where the same records are opened again and again.

    python benchmarks/openings.py [--repetitions 4000]

Every model loses exactly its budget in truth, so that each certificate is a wrong one. Ten run folders: tunings that
know nothing of each other certify on the same records, counted by one ledger or each by its own. A reader: the first
model loses records of many kinds and is refused; the second one loses those of one kind alone, which the reader chooses
by what the first opening shows: the answers to single records, what each suite lost, or the sum over all. It writes
results/openings.md and .json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from keeptune.retention.ledger import confidence_left
from keeptune.retention.pvalues import p_value
from tests.retention.simulated import exact_match, single

RESULTS = Path(__file__).with_name("results")
DELTA, BUDGET, NUM_RECORDS, NUM_FOLDERS = 0.05, 0.02, 640, 10


def folders(rng: np.random.Generator, *, one_ledger: bool) -> bool:
    """Tell whether any of ten run folders over the same records is certified."""
    kind = exact_match(churn=0.06, mean=BUDGET)
    return any(
        p_value(kind.draw(rng, NUM_RECORDS), budget=BUDGET).p
        <= confidence_left(DELTA, opening=number if one_ledger else 1, num_suites=1)
        for number in range(1, NUM_FOLDERS + 1)
    )


def reader(rng: np.random.Generator, *, num_kinds: int, chooses: bool, num_suites: int = 1) -> bool:
    """Tell whether the second model is certified: it loses the records of one kind, the luckiest or any."""
    lost = rng.random((num_kinds, NUM_RECORDS)) < BUDGET
    kind = int(lost.sum(axis=1).argmin()) if chooses else int(rng.integers(num_kinds))
    delta = confidence_left(DELTA, opening=2, num_suites=num_suites)
    return p_value(single(lost[kind].astype(float)), budget=BUDGET).p <= delta


CASES: dict[str, Callable[[np.random.Generator], bool]] = {
    "ten run folders, each with a ledger of its own": partial(folders, one_ledger=False),
    "ten run folders, one ledger": partial(folders, one_ledger=True),
    **{
        f"a reader who chooses of {number} kinds by {by}": partial(reader, num_kinds=number, chooses=chooses)
        for number in (12, 40)
        for chooses, by in ((True, "answers to single records"), (False, "the sum over all"))
    },
    **{
        f"a reader who chooses of 12 suites by what each lost, {how}": partial(
            reader, num_kinds=12, chooses=True, num_suites=num
        )
        for num, how in ((1, "unpaid"), (12, "paid for"))
    },
}


def main() -> None:
    """Measure all cases and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=4000)
    number = parser.parse_args().repetitions
    found = {}
    for i, (name, case) in enumerate(CASES.items()):
        rng = np.random.default_rng(i)
        found[name] = sum(case(rng) for _ in range(number)) / number
    lines = [
        f"Share of {number:,} draws with a wrong certificate; {NUM_RECORDS} records, a budget of {BUDGET:g} of exact "
        f"match, {100 * (1 - DELTA):g} % confidence over all openings.",
        "",
        "| openings of the same records | wrong | 95 % interval |",
        "|---|---|---|",
    ]
    for name, share in found.items():
        low, high = binomtest(round(share * number), number).proportion_ci(method="wilson")
        lines.append(f"| {name} | {100 * share:.1f} % | {100 * low:.1f} to {100 * high:.1f} % |")
    text = "\n".join(lines) + "\n"
    (RESULTS / "openings.md").write_text(text, encoding="utf-8")
    (RESULTS / "openings.json").write_text(json.dumps({"repetitions": number, "wrong": found}, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
