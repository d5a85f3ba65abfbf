"""What `keeptune plan` found arrives; tables and lines for a terminal leave."""

from __future__ import annotations

from rich.console import Console

from keeptune.progress import noun
from keeptune.report.wording import num_bytes, parameters, seconds
from keeptune.stages.plan import PlanOutcome
from keeptune.terminal import show_table, visible

_KINDS = ("weights", "gradients", "optimizer", "activations", "runtime", "total")


def show_plan(console: Console, outcome: PlanOutcome) -> None:
    """Print the memory of each method by kind, then its steps, time and artifact, then what would make it fit."""
    sizes, times = [], []
    for m in outcome.methods:
        known = m.memory.to_json() if m.memory else {}
        trained = f"{_plain(parameters(m.trained_parameters))} of {_plain(parameters(m.total_parameters))}"
        sizes.append((m.name, *(_plain(num_bytes(known.get(kind))) for kind in _KINDS)))
        costs = (_plain(seconds(m.seconds)), _plain(num_bytes(m.artifact_bytes)))
        times.append((m.name, trained, f"{m.num_steps:,}", f"{m.num_tokens:,}", *costs))
    show_table(console, f"Memory at its peak on {outcome.device}", ("method", *_KINDS), rows=sizes)
    show_table(console, "Training", ("method", "trains", "steps", "tokens", "time", "artifact"), rows=times)
    lines = [
        f"Computes on {outcome.why}.",
        f"Available: {_plain(num_bytes(outcome.available_bytes))}. Runtime is the program with its libraries. "
        "Time is a guess from a few micro-batches on this machine, as busy as it is now; validation, checkpoints and "
        "the test come on top.",
        *(m.remedy for m in outcome.methods if m.remedy),
    ]
    for line in lines:
        console.print(visible(line), highlight=False, soft_wrap=True)


def plan_lines(outcome: PlanOutcome) -> list[str]:
    """Return one line a method: memory, steps and time."""
    return [
        f"{m.name}: {_plain(num_bytes(m.memory.total if m.memory else None))} of memory, "
        f"{m.num_steps:,} {noun(m.num_steps, 'steps')}, about {_plain(seconds(m.seconds))}"
        f"{'; does not fit' if m.remedy else ''}"
        for m in outcome.methods
    ]


def _plain(text: str) -> str:
    """Return a worded number with ordinary spaces: `visible` would spell the page's unbreakable ones out."""
    return text.replace("\u00a0", " ")
