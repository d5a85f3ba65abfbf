"""Write the lab's measured tables into docs/lab.md.

    python benchmarks/lab_tables.py

Each table stands between `<!-- NAME -->` and `<!-- end -->`, and is made from `benchmarks/results/lab.json` alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from keeptune.lab.tasks import SPAN_SENTENCE, TASKS

RESULTS = Path(__file__).parent / "results" / "lab.json"
PAGE = Path(__file__).parents[1] / "docs" / "lab.md"
HELD_OUT = {task.name for task in TASKS if task.held_out}
METRIC = {task.name: task.metric for task in (*TASKS, SPAN_SENTENCE)}
LABELS = {"exact_match": "exact match", "rougeL": "ROUGE-L"}
NEW_TASK = SPAN_SENTENCE.name
Cell = str


def page_with_tables(page: str, results: Mapping[str, Any]) -> str:
    """Return the page with each table that was measured in its place."""
    for name, make in TABLES.items():
        if all(part in results for part in make[0]):
            table = make[1](*(results[part] for part in make[0]))
            page = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", rf"\g<1>{table}\g<2>", page, flags=re.DOTALL)
    return page


def knows(results: Mapping[str, Any]) -> str:
    """Return the table of likelihoods by kind of fact."""
    rows = [
        [
            relation,
            f"{facts['num_facts']:,}",
            *(doubt(facts[key]) for key in ("true_over_false", "true_is_likeliest", "answered")),
        ]
        for relation, facts in results.items()
    ]
    header = ["kind of fact", "facts", "true over false", "true is the likeliest of ten", "answered when asked"]
    return markdown(header, rows)


def prompted(results: Mapping[str, Any]) -> str:
    """Return the base's scores without and with examples in the prompt, by task."""
    shots = list(results)
    header = ["task", *(f"{metric}, {k} shots" for metric in ("exact match", "ROUGE-L") for k in shots)]
    rows = [
        [task, *(pair(results[k][task][metric]) for metric in ("exact_match", "rougeL") for k in shots)]
        for task in results[shots[0]]
    ]
    return markdown(header, rows)


def multitask(results: Mapping[str, Any]) -> str:
    """Return the scores of the base and of the model tuned on ten tasks."""
    scores = by_key(results["scores"])
    tasks = list(dict.fromkeys(row["task"] for row in results["scores"]))
    rows = [
        [
            f"{task} (held out)" if task in {*HELD_OUT, "others"} else task,
            *(score(scores[model, task, metric]) for metric in ("exact_match", "rougeL") for model in ("base", "full")),
        ]
        for task in tasks
    ]
    return markdown(["task", "exact match, base", "instruct", "ROUGE-L, base", "instruct"], rows)


def forgetting(results: Mapping[str, Any]) -> str:
    """Return each task's score by its own metric, before and how it changes with each tuning."""
    alone, mixed = results["alone"], results["mixed"]
    columns = [
        ("full 1e-3", alone, "full"),
        ("full 1e-4", alone, "full-lower"),
        ("LoRA 5e-3", alone, "lora"),
        ("LoRA 5e-4", alone, "lora-lower"),
    ]
    columns += [("full 1e-3, mixed", mixed, "full"), ("LoRA 5e-3, mixed", mixed, "lora")]
    scores = by_key(alone["scores"])
    tasks = [task for task in dict.fromkeys(row["task"] for row in alone["scores"]) if task not in ("all", "others")]
    rows = [
        [
            f"**{task}**" if task == NEW_TASK else task,
            LABELS[METRIC[task]],
            score(scores["base", task, METRIC[task]]),
            *(difference(run["paired"], model=model, task=task) for _, run, model in columns),
        ]
        for task in tasks
    ]
    rows.append(["mean of the others", "", *means(tasks, scores, columns)])
    return markdown(["task", "metric", "before", *(name for name, _, _ in columns)], rows)


def curve(results: Mapping[str, Any]) -> str:
    """Return exact match on the new wording by the number of examples."""
    rows = []
    for size, run in results.items():
        scores = by_key(run["scores"])
        rows.append(
            [f"{int(size):,}", *(score(scores[model, NEW_TASK, "exact_match"]) for model in ("base", "full", "lora"))]
        )
    return markdown(["examples", "before", "full 1e-3", "LoRA 5e-3"], rows)


def means(tasks: Sequence[str], scores: Mapping[Any, Any], columns: Sequence[tuple[str, Any, str]]) -> Iterator[Cell]:
    """Yield the mean over the other tasks of the score before, then of each change, with its 95 % interval.

    The tasks' records are apart, so the square of the mean's half-width is the sum of theirs over the number of tasks
    squared.
    """
    others = [task for task in tasks if task != NEW_TASK]
    yield f"{sum(scores['base', task, METRIC[task]]['mean'] for task in others) / len(others):.3f}"
    for _, run, model in columns:
        changes = [paired(run["paired"], model=model, task=task) for task in others]
        mean = sum(change["difference"] for change in changes) / len(changes)
        half = sum(((change["high"] - change["low"]) / 2) ** 2 for change in changes) ** 0.5 / len(changes)
        yield f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"


def by_key(scores: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], Mapping[str, Any]]:
    """Return scores by model, task and metric."""
    return {(row["model"], row["task"], row["metric"]): row for row in scores}


def paired(rows: Sequence[Mapping[str, Any]], *, model: str, task: str) -> Mapping[str, Any]:
    """Return a model's difference from the base on a task, by the task's own metric."""
    key = (model, "base", task, METRIC[task])
    return next(row for row in rows if (row["model"], row["against"], row["task"], row["metric"]) == key)


def difference(rows: Sequence[Mapping[str, Any]], *, model: str, task: str) -> Cell:
    """Return a difference with its 95 % interval."""
    row = paired(rows, model=model, task=task)
    return f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"


def score(row: Mapping[str, Any]) -> Cell:
    """Return a mean with half of its 95 % interval."""
    half = (row["high"] - row["low"]) / 2 if row["low"] is not None else 0.0
    return f"{row['mean']:.3f} ± {half:.3f}"


def doubt(value: Mapping[str, float]) -> Cell:
    """Return a mean with half of its 95 % interval."""
    return pair((value["mean"], value["half_width"]))


def pair(value: Sequence[float]) -> Cell:
    """Return a mean and half of its 95 % interval as text."""
    return f"{value[0]:.3f} ± {value[1]:.3f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Return a table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


TABLES: dict[str, tuple[Sequence[str], Callable[..., str]]] = {
    "knows": (["knows"], knows),
    "few-shot": (["few-shot"], prompted),
    "multitask": (["multitask"], multitask),
    "forgetting": (["forgetting"], forgetting),
    "curve": (["curve"], curve),
}


def main() -> None:
    """Bring the page up to date."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(page_with_tables(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
