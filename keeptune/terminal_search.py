"""What `keeptune search` or `keeptune curve` found arrives; tables, and what it comes to in words, leave."""

from __future__ import annotations

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
        header = ("trial", *method.varied, found.metric, *(("drift",) if drift else ()), "time", "")
        rows = []
        for trial in method.trials:
            drifts = (_number(trial.drift),) if drift else ()
            settings = [setting(trial.params.get(name)) for name in method.varied]
            time = "" if trial.seconds is None else f"{trial.seconds:,.0f} s"
            remark = trial.remark if len(trial.remark) <= _MOST_REASON else f"{trial.remark[:_MOST_REASON]}…"
            rows.append((trial.name.removeprefix("trial-"), *settings, _number(trial.value), *drifts, time, remark))
        show_table(console, f"{method.name}: trials on validation", header, rows=rows)
    for sentence in found.sentences:
        console.print(visible(sentence), highlight=False, soft_wrap=True)


def show_growth(console: Console, path: Path) -> None:
    """Print each method's score by number of train records, and what twice as many would bring."""
    found = read_growth(RunFolder(path.parent), name=path.name)
    assert found is not None
    rows = []
    for method in found.methods:
        rows += [
            (method.name, f"{row.num_records:,}", _number(row.mean), ", ".join(map(_number, row.values)))
            for row in method.sizes
        ]
        if method.doubling is not None:
            number, value, low, high = method.doubling
            foretold = f"foretold: {_number(low)} to {_number(high)}"
            rows.append((method.name, f"{number:,}", _number(value), foretold))
    header = ("method", "train records", found.metric, "each seed")
    show_table(console, "Scores on validation by number of train records", header, rows=rows)
    for method in found.methods:
        console.print(visible(method.sentence), highlight=False, soft_wrap=True)
        for failure in method.failed:
            console.print(visible(failure), highlight=False, soft_wrap=True)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
