"""The demo's recipe and `report.json` arrive; its first line and its last ones leave.

What it will teach and measure; what each method, and what is delivered, learned and lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from keeptune.config import Recipe
from keeptune.data.record import ALL_TASKS, OTHER_TASKS
from keeptune.terminal import visible


def first_line(recipe: Recipe) -> str:
    """Return in a line what a demo teaches to which model, what it measures, and about how long that takes."""
    taught = ", ".join(task.name for task in recipe.data.tasks if task.train)
    num_others = sum(not task.train for task in recipe.data.tasks)
    return (
        f"Teaching {Path(recipe.model).name} the task {taught} by {' and '.join(recipe.methods)}; measuring what that "
        f"brings there and costs on {num_others} other tasks. Three to four minutes on two cores, where all is still "
        "to be done."
    )


def show_change(console: Console, report: Path) -> None:
    """Print a line for each method, and for the delivered model, of the main score before and after."""
    value = json.loads(report.read_text(encoding="utf-8"))
    metric = value["main_metric"]
    means = {(s["model"], s["task"]): s["mean"] for s in value["scores"] if s["metric"] == metric and not s["shots"]}
    tasks = (ALL_TASKS, OTHER_TASKS)
    lines = [
        _line(method, {task: (means.get(("base", task)), means.get((method, task))) for task in tasks})
        for method in (cost["model"] for cost in value["cost"])
    ]
    delivered = value["delivered"]
    if delivered is not None and delivered["alpha"] < 1.0:
        lines.append(_delivered(value, delivered, metric=metric, base=means.get(("base", ALL_TASKS))))
    for line in lines:
        console.print(visible(f"{line} ({metric})"), highlight=False, soft_wrap=True)


def _delivered(value: Mapping[str, Any], delivered: Mapping[str, Any], *, metric: str, base: float | None) -> str:
    """Return the line of a model on the way, whose scores stand apart from those of the trained ones."""

    def is_it(row: Mapping[str, Any]) -> bool:
        return (row["model"], row["alpha"], row["metric"]) == (delivered["model"], delivered["alpha"], metric)

    learned = next((row["mean"] for row in value["on_the_way"] if is_it(row) and row["task"] == ALL_TASKS), None)
    of_others = (row for row in value["forgetting"] if is_it(row) and row["suite"] == OTHER_TASKS)
    lost = next(of_others, {"base": None, "tuned": None})
    name = f"Delivered, {delivered['model']} at alpha {delivered['alpha']:g}"
    return _line(name, {ALL_TASKS: (base, learned), OTHER_TASKS: (lost["base"], lost["tuned"])})


def _line(name: str, changes: Mapping[str, tuple[float | None, float | None]]) -> str:
    labels = {ALL_TASKS: "learned", OTHER_TASKS: "the other tasks"}
    parts = [
        f"{labels[task]} {before:.3f} → {after:.3f}"
        for task, (before, after) in changes.items()
        if before is not None and after is not None
    ]
    return f"{name}: {', '.join(parts)}"
