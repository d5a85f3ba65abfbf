"""What a search came to: its studies arrive; each method's winner, the best recipes, the table and the page leave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keeptune.data.record import ALL_TASKS
from keeptune.recipe_text import write_yaml
from keeptune.search.space import Plan, with_values
from keeptune.search.trials import Result, front
from keeptune.stages.run import Run
from keeptune.stages.trial import VALIDATION
from keeptune.stages.trial_parts import Parts
from keeptune.stages.validation import higher_is_better
from keeptune.storage import write_atomic, write_record

if TYPE_CHECKING:
    from keeptune.search.rounds import Search
    from keeptune.search.study import Study
    from keeptune.search.winner import Winner

FOLDER, SUMMARY, BEST = "search", "search.json", "best.yaml"


@dataclass(frozen=True, slots=True)
class Job:
    """A search under way: the run with the largest value of each range, the ranges, and what all trials share."""

    run: Run
    plan: Plan
    parts: Parts
    methods: Mapping[str, tuple[Study, Search]]
    keys: Mapping[str, str]
    facts: Mapping[str, Any]
    against_drift: bool


def finish(job: Job) -> Path:
    """Write the best settings of each method, the best recipe, the table with the winners, and the page.

    A method of which no trial came to its end has none.
    """
    from keeptune.report.page import write_search_report

    found = {name: _winner(job, study) for name, (study, _) in job.methods.items()}
    winners = {name: winner for name, winner in found.items() if winner is not None}
    for name in winners:
        write_atomic(job.methods[name][0].folder / BEST, write_yaml(_best_recipe(job, winners, [name], first=name)))
    write_summary(job, winners=winners)
    first = _best_method(job, winners)
    write_atomic(
        job.run.folder / FOLDER / BEST, write_yaml(_best_recipe(job, winners, _together(job, winners), first=first))
    )
    write_search_report(job.run.folder)
    return job.run.folder / FOLDER / SUMMARY


def _winner(job: Job, study: Study) -> Winner | None:
    from keeptune.search.winner import decide, repeated

    higher = higher_is_better(job.run.recipe)
    pair = repeated(study.results(), higher_is_better=higher)
    if not pair:
        return None
    error = _paired_error(job, [study.folder / contender.name for contender in pair]) if len(pair) > 1 else None
    return decide(pair, higher_is_better=higher, standard_error=error)


def _paired_error(job: Job, trials: Sequence[Path]) -> float | None:
    """Return the standard error of the difference between two trials over the validation records, paired.

    The mean over the further seeds that both have: the same records are asked each time, so that more seeds make it no
    smaller.
    """
    from keeptune.evaluation.evaluate import read_answers
    from keeptune.evaluation.scores import paired_differences
    from keeptune.search.rounds import REPEATS

    metric = job.run.recipe.evaluation.select_by
    errors = []
    for repeat in REPEATS:
        folders = [trial.with_name(f"{trial.name}-seed-{repeat}") / VALIDATION for trial in trials]
        if all(folder.is_dir() for folder in folders):
            mine, theirs = (read_answers(folder) for folder in folders)
            found = paired_differences(mine, theirs, metrics=(metric,), model="mine", against="theirs")
            errors += [d.standard_error for d in found if d.task == ALL_TASKS and d.standard_error is not None]
    return sum(errors) / len(errors) if errors else None


def _best_method(job: Job, winners: Mapping[str, Winner]) -> str:
    """Return the method whose chosen trial is best, or the nearest to the budgets where none keeps them."""
    return _methods_in_order(job, winners)[0]


def _methods_in_order(job: Job, winners: Mapping[str, Winner]) -> list[str]:
    from keeptune.search.winner import best_first

    chosen = [winner.chosen for winner in winners.values()]
    order = best_first(chosen, higher_is_better=higher_is_better(job.run.recipe))
    return [next(name for name, winner in winners.items() if winner.chosen is one) for one in order]


def _between(job: Job, winners: Mapping[str, Winner]) -> dict[str, Any] | None:
    """Return how the best method's chosen trial stands to that of the next; None where there is one method."""
    from keeptune.search.winner import decide

    if len(winners) < 2:
        return None
    names = _methods_in_order(job, winners)[:2]
    error = _paired_error(job, [job.methods[name][0].folder / winners[name].chosen.name for name in names])
    pair = [winners[name].chosen for name in names]
    return {
        "methods": names,
        **_said(decide(pair, higher_is_better=higher_is_better(job.run.recipe), standard_error=error)),
    }


def _together(job: Job, winners: Mapping[str, Winner]) -> list[str]:
    """Return the methods whose best settings of the training, which a recipe has one of, are those of the best one."""

    def shared(name: str) -> dict[str, Any]:
        return {k: v for k, v in winners[name].chosen.params.items() if k.startswith("training.")}

    first = shared(_best_method(job, winners))
    return [name for name in winners if shared(name) == first]


def _best_recipe(job: Job, winners: Mapping[str, Winner], names: Iterable[str], *, first: str) -> dict[str, Any]:
    values = {key: value for key, value in winners[first].chosen.params.items() if key.startswith("training.")}
    chosen = list(names)
    for name in chosen:
        values |= {k: v for k, v in winners[name].chosen.params.items() if k.startswith("methods.")}
    recipe = with_values(job.plan.recipe, values)
    return {**recipe, "methods": {name: recipe["methods"][name] for name in chosen}}


def write_summary(job: Job, *, winners: Mapping[str, Winner]) -> None:
    """Write `search.json`: every trial of every method, and how they compare once all are at their end."""
    from keeptune.search.sampler import importances

    recipe, higher = job.run.recipe, higher_is_better(job.run.recipe)
    methods = {}
    for name, (study, search) in job.methods.items():
        results = sorted(study.results().values(), key=lambda r: r.trial.name)
        first = [r for r in results if not r.trial.repeat and r.trial.share == search.shares[0]]
        full = [r for r in results if not r.trial.repeat and r.trial.share == 1.0 and r.drift is not None]
        methods[name] = {
            "key": job.keys[name],
            "front": [r.trial.name for r in front(full, higher_is_better=higher)] if search.against_drift else [],
            "by": "preset" if search.start is not None else "ranges",
            "ranges": [asdict(range_) for range_ in search.ranges] if search.start is None else [],
            "trials": [_row(result) for result in results],
            "importance": importances(search.ranges, first, higher_is_better=higher) if winners else {},
            "winner": _said(winners[name]) if name in winners else None,
        }
    value = {
        **job.facts,
        "metric": recipe.evaluation.select_by,
        "higher_is_better": higher,
        "split": "validation",
        "budget": dict(recipe.retention.budget),
        "best": _best_method(job, winners) if winners else None,
        "together": _together(job, winners) if winners else [],
        "between": _between(job, winners),
        "against_drift": job.against_drift,
        "methods": methods,
    }
    write_record(job.run.folder / FOLDER / SUMMARY, value)


def _row(result: Result) -> dict[str, Any]:
    row = asdict(result)
    trial = row.pop("trial")
    return {"name": result.trial.name, **trial, **row}


def _said(winner: Winner) -> dict[str, Any]:
    contenders = [c for c in (winner.chosen, winner.second) if c is not None]
    return {
        "contenders": [{**asdict(c), "mean": c.mean, "feasible": c.feasible} for c in contenders],
        "gain": winner.gain,
        "low": winner.low,
        "high": winner.high,
        "is_likely": winner.is_likely,
    }
