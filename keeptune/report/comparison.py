"""The content of `comparison.json` arrives; worded tables and sentences leave, for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keeptune.data.record import ALL_TASKS, OTHER_TASKS
from keeptune.progress import noun
from keeptune.report.wording import (
    MISSING,
    count,
    decimal,
    decimals_for,
    key_label,
    metric_label,
    num_bytes,
    parameters,
    percent,
    seconds,
)

_CLEAR_BELOW = 0.05


@dataclass(frozen=True, slots=True)
class Table:
    """A table of worded cells; the first `num_left` columns hold text, the others numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_left: int = 1


def tables(value: Mapping[str, Any], *, wide: bool = False) -> list[Table]:
    """Return scores, the differences in the main metric, costs, and estimated memory if any.

    They fit a terminal of 80 columns where names are short, unless they are to be `wide` and hold McNemar's p too.
    """
    found = [_scores(value), *_over_seeds(value), _pairs(value, value["main_metric"], wide=wide)]
    if value["untrained_tasks"]:
        found.append(_pairs(value, value["main_metric"], task=OTHER_TASKS, wide=wide))
    found.append(_costs(value))
    return [*found, *_estimates(value)]


def sentences(value: Mapping[str, Any]) -> list[str]:
    """Return what the differences in the main metric come to, then what a reader must know of single models."""
    metric = next(metric for metric in value["metrics"] if metric["name"] == value["main_metric"])
    pairs = [pair for pair in value["pairs"] if (pair["metric"], pair["task"]) == (metric["name"], ALL_TASKS)]
    clear = [pair for pair in pairs if pair["holm_p_value"] is not None and pair["holm_p_value"] < _CLEAR_BELOW]
    beaten: dict[str, list[str]] = {}
    for pair in clear:
        better, worse = _ranked(pair, higher_is_better=metric["higher_is_better"])
        beaten.setdefault(better, []).append(worse)
    found_clear = "; ".join(f"{better} better than {_listed(worse)}" for better, worse in beaten.items())
    unclear = "; ".join(f"{pair['model']} and {pair['against']}" for pair in pairs if pair not in clear)
    label = metric_label(metric["name"])
    found = [f"Clear in {label} (Holm p below 0.05): {found_clear or 'nothing'}."]
    if unclear:
        found.append(f"No clear difference in {label}: {unclear}.")
    return [*found, *_seed_sentences(value), *value["notes"]]


def _seed_sentences(value: Mapping[str, Any]) -> Iterator[str]:
    """Yield which models are replicates."""
    for group in value["replicates"]:
        seeds = ", ".join(map(str, group["seeds"]))
        yield (
            f"{_listed(group['models'])} differ only by seed ({seeds}): they are one method trained "
            f"{len(group['seeds'])} times, so they are not compared with each other, and with others only at the same "
            "seed."
        )


def _over_seeds(value: Mapping[str, Any]) -> Iterator[Table]:
    """Yield the mean and the spread over seeds of every method that was trained with several, in every metric."""
    together = [ALL_TASKS, *([OTHER_TASKS] if value["untrained_tasks"] else [])]
    rows = []
    for metric in _main_first(value):
        for group in value["replicates"]:
            found = {score["task"]: score for score in group["scores"] if score["metric"] == metric}
            rows.append((metric_label(metric), group["name"], *(_spread(found.get(task)) for task in together)))
    if rows:
        header = ("metric", "method", *(["trained tasks", "other tasks"] if len(together) > 1 else ["score"]))
        title = "Over seeds: mean ± standard deviation; ( ) the lowest to the highest seed"
        yield Table(title, header, tuple(rows), num_left=2)


def _spread(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return MISSING
    places = decimals_for(score["mean"])
    mean, deviation, low, high = (
        decimal(score[name], places) for name in ("mean", "standard_deviation", "lowest", "highest")
    )
    return f"{mean} ± {deviation} ({low} to {high})"


def markdown(value: Mapping[str, Any]) -> str:
    """Return the whole comparison as Markdown: what a terminal shows, then every other metric and every task."""
    test = value["test"]
    records = f"{count(test['num_records'])} {noun(test['num_records'], 'records')}"
    inputs = f"{count(test['num_clusters'])} distinct {noun(test['num_clusters'], 'inputs')}"
    parts = [
        f"# {len(value['models'])} models on the test set of {test['run']}",
        f"{records}, {inputs}; answers are greedy and at most {count(test['max_new_tokens'])} tokens long. [ ] "
        "show the 95 % interval. Differences are paired by record. p is two-sided and clustered by input; Holm's is "
        f"corrected for all pairs in {metric_label(value['main_metric'])}, any other for nothing.",
        "\n".join(f"- {sentence}" for sentence in sentences(value)),
        *map(_markdown, tables(value, wide=True)),
    ]
    more = [_pairs(value, metric, wide=True) for metric in _main_first(value)[1:]]
    more += _tasks(value)
    return "\n\n".join([*parts, *(_markdown(table) for table in more if table.rows)]) + "\n"


def _markdown(table: Table) -> str:
    """Return a table with its title above it; a bar or a line break in a cell breaks no column."""
    marks = ["---" if i < table.num_left else "---:" for i in range(len(table.header))]
    lines = [table.header, marks, *table.rows]
    cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return "\n".join([f"**{table.title}**", "", *(f"| {' | '.join(line)} |" for line in cells)])


def _ranked(pair: Mapping[str, Any], *, higher_is_better: bool) -> tuple[str, str]:
    """Return the better model of a pair, then the other."""
    wins = (pair["difference"] > 0) == higher_is_better
    return (pair["model"], pair["against"]) if wins else (pair["against"], pair["model"])


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _scores(value: Mapping[str, Any]) -> Table:
    """Return every metric of every model over all trained tasks and, where there are some, over the others."""
    names, together = _names(value), [ALL_TASKS, *([OTHER_TASKS] if value["untrained_tasks"] else [])]
    by_place = {(score["metric"], score["model"], score["task"]): score for score in value["scores"]}
    rows = tuple(
        (metric_label(metric), name, *(_score(by_place.get((metric, name, task))) for task in together))
        for metric in _main_first(value)
        for name in names
    )
    num_records = {score["task"]: count(score["num_records"]) for score in value["scores"]}
    scored = [f"trained tasks ({num_records[ALL_TASKS]})", f"other tasks ({num_records.get(OTHER_TASKS, '')})"]
    header = ("metric", "model", *(scored if len(together) > 1 else ["score"]))
    records = f"{count(value['test']['num_records'])} {noun(value['test']['num_records'], 'records')}"
    title = f"Test set of {value['test']['run']}: {records}; [ ] show the 95 % interval"
    return Table(title, header, rows, num_left=2)


def _score(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return MISSING
    mean, low, high = score["mean"], score["low"], score["high"]
    places = decimals_for(mean)
    if low is None or high is None:
        return decimal(mean, places)
    return f"{decimal(mean, places)} [{decimal(low, places)}, {decimal(high, places)}]"


def _pairs(value: Mapping[str, Any], metric: str, *, task: str = ALL_TASKS, wide: bool) -> Table:
    """Return every pair's difference in a metric; p is Holm's in the declared family."""
    pairs = [pair for pair in value["pairs"] if (pair["metric"], pair["task"]) == (metric, task)]
    family = (metric, task) == (value["main_metric"], ALL_TASKS)
    mcnemar = wide and any(pair["mcnemar_p_value"] is not None for pair in pairs)
    rows = tuple(
        (
            pair["model"],
            pair["against"],
            _difference(pair),
            _p_value(pair["holm_p_value"] if family else pair["p_value"]),
            *([_p_value(pair["mcnemar_p_value"])] if mcnemar else []),
            f"{count(pair['better'])} : {count(pair['worse'])}",
        )
        for pair in pairs
    )
    where = ", tasks not trained on" if task == OTHER_TASKS else ""
    p_values = ("Holm p" if family else "p", *(["McNemar p"] if mcnemar else []))
    header = ("model", "against", "difference", *p_values, "better:worse")
    return Table(f"Model − against in {metric_label(metric)}{where}", header, rows, num_left=2)


def _difference(pair: Mapping[str, Any]) -> str:
    places = decimals_for(pair["difference"])
    middle, low, high = (decimal(pair[name], places, signed=True) for name in ("difference", "low", "high"))
    return middle if pair["low"] is None else f"{middle} [{low}, {high}]"


def _p_value(value: float | None) -> str:
    if value is None:
        return MISSING
    return "< 0.001" if value < 0.001 else decimal(value)


def _costs(value: Mapping[str, Any]) -> Table:
    """Return what each model's training cost, where that is known, and how many of its answers were cut."""
    rows = tuple(
        (
            model["name"],
            parameters(model["trained_parameters"]),
            num_bytes(model["peak_memory_bytes"]),
            seconds(model["train_seconds"]),
            count(model["tokens_per_second"]),
            num_bytes(model["artifact_bytes"]),
            percent(model["cut_fraction"]),
        )
        for model in value["models"]
    )
    header = ("model", "trained", "memory", "time", "tokens/s", "saved", "cut")
    return Table("Training as measured (memory: its peak), and answers cut at the limit", header, rows)


def _estimates(value: Mapping[str, Any]) -> Iterator[Table]:
    """Yield the estimated memory of training by its kind, where a model's training wrote one down."""
    estimates = {model["name"]: model["estimated_memory_bytes"] or {} for model in value["models"]}
    kinds = list(dict.fromkeys(kind for estimate in estimates.values() for kind in estimate))
    rows = tuple(
        (name, *(num_bytes(estimate.get(kind)) for kind in kinds)) for name, estimate in estimates.items() if estimate
    )
    if rows:
        yield Table("Memory of training, as estimated", ("model", *map(key_label, kinds)), rows)


def _tasks(value: Mapping[str, Any]) -> Iterator[Table]:
    """Yield each task's scores in the main metric, where there are several tasks."""
    metric, names = value["main_metric"], _names(value)
    scores = {(s["task"], s["model"]): s for s in value["scores"] if s["metric"] == metric}
    tasks = [task for task in dict.fromkeys(task for task, _ in scores) if task not in (ALL_TASKS, OTHER_TASKS)]
    if len(tasks) < 2:
        return
    rows = []
    for task in tasks:
        found = [scores.get((task, name)) for name in names]
        num_records = next(score["num_records"] for score in found if score is not None)
        label = f"{task} (not trained on)" if task in value["untrained_tasks"] else task
        rows.append((label, count(num_records), *map(_score, found)))
    yield Table(f"{metric_label(metric)} by task", ("task", "records", *names), tuple(rows))


def _names(value: Mapping[str, Any]) -> list[str]:
    return [model["name"] for model in value["models"]]


def _main_first(value: Mapping[str, Any]) -> Sequence[str]:
    """Return the metrics' names, the main one first and loss and perplexity last."""
    names = [metric["name"] for metric in value["metrics"]]
    return sorted(names, key=lambda name: (name in ("loss", "perplexity"), name != value["main_metric"]))
