"""What a person reads while keeptune works: progress, tables and previews arrive, lines on a terminal leave.

On a terminal, long work shows one live line with rate and time left; elsewhere, and with `--quiet`, plain lines.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from keeptune.data.audit import unused_and_removed
from keeptune.data.record import ALL_TASKS, OTHER_TASKS
from keeptune.errors import printable
from keeptune.progress import noun
from keeptune.report import comparison
from keeptune.report.certificate import read_certificate
from keeptune.report.wording import decimal, decimals_for
from keeptune.storage import read_json

_PLAIN_SECONDS = 10.0
_LIVE_SECONDS = 0.1
_SPEED_SECONDS = 3600.0
_OVERLAPS = {
    "exact": "the same prompt",
    "near": "a near-duplicate prompt",
    "ngram_cover": "more than half of its words, in runs of 8",
    "ngram_13": "a short phrase only (13 words in a row)",
}
# The rows of means in the table of tasks.
_MEANS = {ALL_TASKS: "all together", OTHER_TASKS: "others together"}
_MACROS = {ALL_TASKS: "mean of the tasks", OTHER_TASKS: "mean of the others"}


class LiveProgress:
    """A `keeptune.progress.Progress` for a terminal: one live line for the work that is open."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def start(self, title: str, *, total: int, unit: str) -> None:
        self.finish()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + noun(total, unit)),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
            # A search's trials take minutes each.
            speed_estimate_period=_SPEED_SECONDS,
        )
        self._task = self._bar.add_task(title, total=total, note="", rate="")
        self._waiting, self._shown = 0, 0.0
        self._bar.start()

    def advance(self, count: int = 1, *, note: str = "") -> None:
        if self._bar is None or self._task is None:
            return
        self._waiting += count
        now = time.monotonic()
        if now - self._shown < _LIVE_SECONDS:
            return
        self._bar.advance(self._task, self._waiting)
        self._waiting, self._shown = 0, now
        task = self._bar.tasks[0]
        rate = _rate(task.speed or 0.0)
        self._bar.update(self._task, rate=rate, note=note or task.fields["note"])

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, text: str) -> None:
        self._console.print(visible(text), highlight=False, soft_wrap=True)


class PlainProgress:
    """A `keeptune.progress.Progress` for files and pipes: a line at the start, at the end and now and then between.

    `beat`, which a thread calls every now and then, says how long work has been going on that tells nothing by itself.
    """

    def __init__(self, console: Console, *, quiet: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._quiet = quiet
        self._clock = clock
        self._lock = threading.Lock()
        self._title = ""
        self._shown = self._last = clock()

    def start(self, title: str, *, total: int, unit: str) -> None:
        self.finish()
        with self._lock:
            self._title, self._unit, self._total = title, unit, total
            self._done, self._note = 0, ""
            self._begun = self._advanced = self._clock()

    def advance(self, count: int = 1, *, note: str = "") -> None:
        with self._lock:
            self._done += count
            self._advanced = self._clock() if count else self._advanced
            self._note = note or self._note
            # The last unit needs no line of its own: that of the end follows.
            if self._done < self._total:
                self._show()

    def beat(self) -> None:
        """Show how far the open work is, or that work without a count goes on, where nothing was said for a while."""
        with self._lock:
            self._show()

    def finish(self) -> None:
        with self._lock:
            if self._title and not self._quiet:
                # Work that was cut short says of how much.
                of = "" if self._done == self._total else f"/{self._total:,}"
                unit = noun(self._total, self._unit)
                self._print(f"{self._title}: {self._done:,}{of} {unit} in {self._clock() - self._begun:,.1f} s")
                self._shown = self._last = self._clock()
            self._title = ""

    def say(self, text: str) -> None:
        if not self._quiet:
            with self._lock:
                self._console.print(visible(text), highlight=False, soft_wrap=True)
                self._shown = self._last = self._clock()

    def _show(self) -> None:
        now = self._clock()
        if self._quiet or now - self._shown < _PLAIN_SECONDS:
            return
        self._shown = now
        if not self._title:
            line = f"Still at work, {now - self._last:,.0f} s after the line above"
            self._console.print(visible(line), highlight=False, soft_wrap=True)
            return
        seconds = now - self._begun
        if not self._done or not seconds:
            self._print(f"{self._title}: {self._total:,} {noun(self._total, self._unit)}, {seconds:,.0f} s so far")
            return
        # Of what is done, not of the batch that is being worked on: it may take minutes.
        rate = self._done / max(self._advanced - self._begun, _LIVE_SECONDS)
        left = max(0, self._total - self._done) / rate - (now - self._advanced)
        done = f"{self._title}: {self._done:,}/{self._total:,} {self._unit}"
        self._print(", ".join(filter(None, (done, _rate(rate), f"{left:,.0f} s left" if left > 0 else ""))))

    def _print(self, line: str) -> None:
        note = f", {self._note}" if self._note else ""
        self._console.print(visible(line + note), highlight=False, soft_wrap=True)


def _rate(units_per_second: float) -> str:
    return f"{units_per_second:,.1f}/s" if units_per_second >= 0.05 else ""


def visible(text: str) -> Text:
    """Return text in which control characters cannot steer the terminal."""
    return Text(printable(text))


def show_table(
    console: Console, title: str, header: Sequence[str], *, rows: Sequence[Sequence[str]], num_left: int = 1
) -> None:
    """Print a table; every column after the first `num_left` is right-aligned. A header without names is left out."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=any(header))
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < num_left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(visible(cell) for cell in row))
    console.print(table)


def show_audit(console: Console, audit: Mapping[str, Any]) -> None:
    """Print what `audit.json` says: rows, splits of each task, duplicates, overlap and lengths in tokens."""
    unused, removed = unused_and_removed(audit["dropped"])
    near, groups = audit["near_duplicates"], audit["groups"]
    rows = [
        ("rows read", f"{audit['rows_in']:,}"),
        ("records kept", f"{audit['kept']:,}"),
        *((f"not used: {reason}", f"{count:,}") for reason, count in unused.items()),
        *((f"removed: {reason}", f"{count:,}") for reason, count in removed.items()),
        ("exact duplicates", f"{audit['exact_duplicates']:,}"),
        ("near-duplicate pairs", f"{near['num_pairs']:,}"),
        ("groups that share an input", f"{groups['num_groups']:,}; the largest has {groups['largest_group']:,}"),
        ("shortened to the limit", f"{audit['truncated']:,} ({100 * audit['tokens']['truncated_fraction']:.1f} %)"),
        ("completions cut", f"{audit['tokens']['completion_cut']:,}"),
        ("target tokens, all splits", f"{audit['tokens']['supervised_tokens']:,}"),
    ]
    overlaps = {kind: leak for kind, leak in audit["leaks"].items() if leak["num_train_records"]}
    rows += [("train records that share with a held-out record", "")] if overlaps else []
    rows += [
        (f"  {_OVERLAPS[kind]}", f"{leak['num_train_records']:,}, {_fate(leak)}") for kind, leak in overlaps.items()
    ]
    show_table(console, "Audit", ("", ""), rows=rows)
    large = [(f"{group['num_records']:,}", group["task"], group["shared"]) for group in groups.get("largest", ())]
    if large:
        show_table(console, "Largest groups", ("records", "task", "shared text"), rows=large, num_left=3)
    tasks = {**audit["tasks"], **({ALL_TASKS: audit["splits"]} if len(audit["tasks"]) > 1 else {})}
    splits = ("train", "validation", "test")
    named = {task: f"{task} (not trained on)" if task in audit.get("untrained_tasks", ()) else task for task in tasks}
    table = [(named[task], *(f"{counts[split]:,}" for split in splits)) for task, counts in tasks.items()]
    show_table(console, "Records", ("task", *splits), rows=table)
    parts = ("prompt", "completion", "total")
    quantiles = {"p50": "median", "p90": "90 % have at most", "p99": "99 % have at most", "max": "longest"}
    lengths = [(part, *(f"{audit['tokens'][part][q]:,}" for q in quantiles)) for part in parts]
    title = "Tokens of a record" + (", before cutting" if audit["truncated"] else "")
    show_table(console, title, ("", *quantiles.values()), rows=lengths)
    for remark in audit.get("remarks", ()):
        console.print(visible(remark), highlight=False, soft_wrap=True, style="yellow")


def _fate(leak: Mapping[str, Any]) -> str:
    """Return what became of the records of an overlap."""
    removed = leak["num_removed"]
    return f"{removed:,} removed" if 0 < removed < leak["num_train_records"] else "removed" if removed else "kept"


def show_scores(console: Console, report: Path) -> None:
    """Print what `report.json` says: scores, differences from the base model, each task's change and the choice."""
    value = json.loads(report.read_text(encoding="utf-8"))
    gains = {(p["model"], p["metric"]): p for p in value["paired"] if p["task"] == ALL_TASKS and p["against"] == "base"}
    rows = []
    for score in (score for score in value["scores"] if score["task"] == ALL_TASKS):
        gain = gains.get((score["model"], score["metric"]))
        difference = ""
        if gain is not None:
            places = decimals_for(gain["difference"])
            interval = "" if gain["low"] is None else _ends(gain["low"], gain["high"], places=places)
            difference = f"{_signed(gain['difference'], places)}{interval}"
        rows.append((score["model"], score["metric"], _with_doubt(score), difference))
    place = {"task": ALL_TASKS, **(value["delivered"] or {"model": None})}
    for score in (score for score in value["on_the_way"] if place.items() <= score.items()):
        name = f"{score['model']} at alpha {score['alpha']:g} (delivered)"
        rows.append((name, score["metric"], _with_doubt(score), ""))
    title = "Test split; [ ] show the 95 % interval"
    show_table(console, title, ("model", "metric", "score", "difference from base"), rows=rows)
    _show_few_shot(console, value)
    _show_tasks(console, value)
    _show_lost(console, value)
    console.print(visible(_choice(value)), highlight=False, soft_wrap=True)
    if value["broken_answers"]:
        console.print(visible(f"Broken answers: {value['broken_answers']}"), highlight=False, soft_wrap=True)


def show_comparison(console: Console, path: Path) -> None:
    """Print what `comparison.json` says: scores, differences in the main metric, costs, and what they come to."""
    value = json.loads(path.read_text(encoding="utf-8"))
    for table in comparison.tables(value):
        # Between a number and its unit a page has a space that a terminal may not have.
        rows = [[cell.replace("\u00a0", " ") for cell in row] for row in table.rows]
        show_table(console, table.title, table.header, rows=rows, num_left=table.num_left)
    for sentence in comparison.sentences(value):
        console.print(visible(sentence), highlight=False, soft_wrap=True)


def _with_doubt(score: Mapping[str, Any]) -> str:
    mean, low, high = score["mean"], score["low"], score["high"]
    if mean is None or low is None or high is None:
        return "not finite" if mean is None else f"{mean:.3f}"
    places = decimals_for(mean)
    return f"{mean:.{places}f} [{low:.{places}f}, {high:.{places}f}]"


def _show_few_shot(console: Console, value: Mapping[str, Any]) -> None:
    """Print the base model's scores behind solved examples, a line for each number of them."""
    for left_out in value["few_shot_left_out"]:
        console.print(visible(f"No score of {left_out['name']}: {left_out['reason']}"), highlight=False, soft_wrap=True)
    cells: dict[str, dict[str, str]] = {}
    for score in (score for score in value["few_shot"] if score["task"] == ALL_TASKS):
        single, places = score["num_draws"] == 1, decimals_for(score["mean"])
        low, high = score["low"], score["high"]
        ends = "" if low is None or high is None else f" [{low:.{places}f}, {high:.{places}f}]"
        name = score["name"] if single else f"{score['name']}, {score['num_draws']} draws"
        cells.setdefault(name, {})[score["metric"]] = f"{score['mean']:.{places}f}{ends}"
    if cells:
        metrics = [metric["name"] for metric in value["metrics"]]
        rows = [(name, *(of.get(metric, "–") for metric in metrics)) for name, of in cells.items()]
        title = "Solved examples in the base's prompt; [ ] show the 95 % interval, of several draws over these too"
        show_table(console, title, ("prompt", *metrics), rows=rows)


def _show_tasks(console: Console, value: Mapping[str, Any]) -> None:
    """Print each task's main score before and after, by method, where there are several tasks."""
    metric = value["main_metric"]
    methods = list(dict.fromkeys(score["model"] for score in value["scores"] if score["model"] != "base"))
    scores = {(s["task"], s["model"]): s for s in value["scores"] if s["metric"] == metric}
    tasks = [task for task in dict.fromkeys(task for task, _ in scores) if task not in (ALL_TASKS, OTHER_TASKS)]
    if len(tasks) < 2:
        return
    macros = [macro for macro in value["macro_scores"] if macro["metric"] == metric]
    scores |= {(_MACROS[macro["tasks"]], macro["model"]): {**macro, "num_records": None} for macro in macros}
    others = [task for task in tasks if task in value["untrained_tasks"]]
    trained = [task for task in tasks if task not in others]
    rows = []
    for task in (*_with_mean(trained, ALL_TASKS), *_with_mean(others, OTHER_TASKS)):
        if others and task in (trained[:1] + others[:1]):
            rows.append(("not trained on" if task in others else "trained on", "", *("" for _ in methods)))
        base, cells = scores.get((task, "base")), []
        for score in (scores.get((task, method)) for method in methods):
            before = f"{base['mean']:.3f} → " if base and base["mean"] is not None else ""
            cells.append(f"{before}{_with_doubt(score)}" if score else "–")
        num_records = next(s["num_records"] for (of, _), s in scores.items() if of == task)
        label = _MEANS.get(task, task)
        rows.append((f"  {label}" if others else label, "" if num_records is None else f"{num_records:,}", *cells))
    title = f"Test split by task: {metric}, base → tuned [its 95 % interval]"
    show_table(console, title, ("task", "records", *methods), rows=rows)


def _show_lost(console: Console, value: Mapping[str, Any]) -> None:
    """Print what each suite lost by each trained model, and by the delivered one where that stands on the way.

    Several tasks that are not trained on stand there as their mean: the table of tasks has them one by one.
    """
    delivered = value["delivered"]
    points = list(dict.fromkeys((row["model"], 1.0) for row in value["forgetting"]))
    if delivered is not None and delivered["alpha"] < 1.0:
        points.append((delivered["model"], delivered["alpha"]))
    others = [row for row in value["forgetting"] if row["suite"] == OTHER_TASKS]
    single = {*value["untrained_tasks"]} if others else set()
    shown = [row for row in value["forgetting"] if row["suite"] not in single]
    # Where a budget speaks of other tasks or another metric, and where none is certified, in the other metrics.
    shown += [*value["forgetting_under_budget"], *value["forgetting_left_out"]]
    lost: dict[tuple[str, str], dict[tuple[str, float], Mapping[str, Any]]] = {}
    for row in shown:
        without = f" but {', '.join(row['without'])}" if row["without"] else ""
        unit = "nats per token" if row["metric"] == "loss" else row["metric"]
        place = (f"{_MEANS.get(row['suite'], row['suite'])}{without}", unit)
        lost.setdefault(place, {})[row["model"], row["alpha"]] = row
    rows = [(*place, *(_lost(of.get(point)) for point in points)) for place, of in lost.items()]
    names = [name if alpha == 1.0 else f"{name} at alpha {alpha:g} (delivered)" for name, alpha in points]
    if rows:
        title = "What was lost, [ ] the 95 % interval; below 0: gained"
        show_table(console, title, ("suite", "of", *names), rows=rows, num_left=2)


def _lost(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    places = decimals_for(row["forgetting"])
    ends = "" if row["low"] is None else _ends(row["low"], row["high"], places=places)
    return f"{_signed(row['forgetting'], places)}{ends}"


def _ends(low: float, high: float, *, places: int) -> str:
    return f" [{_signed(low, places)}, {_signed(high, places)}]"


def _signed(value: float, places: int) -> str:
    """Return a difference with its sign, and a zero without one."""
    return decimal(value, places, signed=True).replace("\u2212", "-")


def _with_mean(tasks: Sequence[str], mean: str) -> list[str]:
    """Return the tasks and, where there are several, the names of their means: over records, and over tasks."""
    return [*tasks, mean, _MACROS[mean]] if len(tasks) > 1 else [*tasks]


def _choice(value: Mapping[str, Any]) -> str:
    """Return which method validation selected, and what each method reached."""
    selection = value["selection"]
    if value["selected"] is None:
        return "No method is delivered: none was shown to keep the budgets."
    reached = ", ".join(
        f"{method} {'no finite value' if number is None else f'{number:.4f}'}"
        for method, number in selection["values"].items()
    )
    where = ", each at its best certified alpha" if value["certificate"] else ""
    return f"Selected on validation: {value['selected']} ({selection['metric']}{where}: {reached})"


def show_certificate(console: Console, path: Path) -> None:
    """Print the verdict on what may be lost, and what it stands on."""
    value = read_json(path)
    certificate = read_certificate(value)
    assert certificate is not None, "a certificate without a verdict"
    console.print(f"\n{certificate.heading}", style="bold", markup=False, highlight=False)
    if value["artifact"]:
        outcome = f"Instruct model: {path.parent / value['artifact']['folder']}"
    else:
        outcome = f"No tuned model is delivered. {value['fallback']['sentence']}"
    for line in (value["sentence"], outcome, f"Certificate: {path}"):
        console.print(line, markup=False, highlight=False)
