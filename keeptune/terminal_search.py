"""What `keeptune search` or `keeptune curve` found arrives; tables, and what it comes to in words, leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console

from keeptune.report.growth import read_growth
from keeptune.report.reading import RunFolder
from keeptune.report.search import read_search, setting
from keeptune.terminal import show_table, visible

_MOST_REASON = 60


def show_search(console: Console, path: Path) -> None:
    """Print the trials of each method, the best first, and what they come to."""
    found = read_search(RunFolder(path.parent), name=path.name)
    assert found is not None
    for method in found.methods:
        drift = any(trial.drift is not None for trial in method.trials)
        header = ("trial", *method.varied, found.metric, *(("drift",) if drift else ()), "time", "remark")
        value, drifted = _column(t.value for t in method.trials), _column(t.drift for t in method.trials)
        rows = []
        for trial in method.table:
            drifts = (drifted(trial.drift),) if drift else ()
            settings = [setting(trial.params[name]) if name in trial.params else "" for name in method.varied]
            time = "" if trial.seconds is None else f"{trial.seconds:,.0f} s"
            remark = trial.remark if len(trial.remark) <= _MOST_REASON else f"{trial.remark[:_MOST_REASON]}…"
            rows.append((trial.label, *settings, value(trial.value), *drifts, time, remark))
        show_table(console, f"{method.name}: trials on validation", header, rows=rows)
    for sentence in found.sentences:
        console.print(visible(sentence), highlight=False, soft_wrap=True)


def show_growth(console: Console, path: Path) -> None:
    """Print each method's score by number of train records, and what twice as many would bring."""
    found = read_growth(RunFolder(path.parent), name=path.name)
    assert found is not None
    rows = []
    for method in found.methods:
        number = _column(value for row in method.sizes for value in (row.mean, *row.values))
        rows += [
            (method.name, f"{row.num_records:,}", number(row.mean), ", ".join(map(number, row.values)))
            for row in method.sizes
        ]
        if method.doubling is not None:
            num_records, value, low, high = method.doubling
            foretold = f"foretold: {number(low)} to {number(high)}"
            rows.append((method.name, f"{num_records:,}", number(value), foretold))
    header = ("method", "train records", found.metric, "each seed")
    show_table(console, "Scores on validation by number of train records", header, rows=rows)
    for method in found.methods:
        console.print(visible(method.sentence), highlight=False, soft_wrap=True)
        for failure in method.failed:
            console.print(visible(failure), highlight=False, soft_wrap=True)


def _column(values: Iterable[float | None]) -> Callable[[float | None], str]:
    """Return what writes a column's numbers with as many decimals, three digits of the smallest, three to six."""
    sizes = [abs(value) for value in values if value]
    places = min(6, max(3, 2 - math.floor(math.log10(min(sizes))))) if sizes else 3
    return lambda value: "" if value is None else f"{value:.{places}f}"
