"""A search: a recipe with ranges or without arrives; the trials of each method, and the best settings, leave.

Data are prepared once. Each trial is a process that is given the parts of them that it may see, and never test.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keeptune.config import Recipe, is_fractional, make_recipe, read_sections
from keeptune.data.record import ALL_TASKS
from keeptune.errors import RecipeError
from keeptune.recipe_text import write_yaml
from keeptune.search.space import Plan, Range, plan_search, with_values
from keeptune.search.trials import Result, Trial
from keeptune.stages.certify import budgets_of
from keeptune.stages.data import Data, prepare
from keeptune.stages.run import Context, Run, naming_recipe, open_run, stage_key
from keeptune.stages.texts import Texts, keep_texts, write_texts
from keeptune.stages.training import check_methods, learning_rate
from keeptune.stages.trial import RESULT, VALIDATION
from keeptune.stages.trial_parts import Parts, write_parts
from keeptune.storage import read_json, remove_leftovers, storage_errors, write_atomic, write_json

if TYPE_CHECKING:
    from keeptune.search.ladder import Start
    from keeptune.search.rounds import Search
    from keeptune.search.study import Study
    from keeptune.search.winner import Winner

FOLDER, SUMMARY, BEST = "search", "search.json", "best.yaml"
# What a preset tries of replay; the base writes texts for it before the first trial.
_REPLAYED = 0.05
_LEAST_TRIALS_WITH_REPLAY = 4
# PEFT's own defaults, from which a preset raises the rank.
_RANK = {"r": 8, "lora_alpha": 8}

Launch = Callable[..., subprocess.Popen[bytes]]


@dataclass(frozen=True, slots=True)
class _Job:
    """A search under way: the recipe as it was written, its ranges, and what all trials share."""

    run: Run
    sections: Mapping[str, Any]
    plan: Plan
    parts: Parts
    methods: Mapping[str, tuple[Study, Search]]
    keys: Mapping[str, str]


def search(
    path: Path,
    *,
    overrides: Sequence[str],
    num_trials: int,
    num_jobs: int,
    halving: bool,
    context: Context,
    launch: Launch,
) -> Path:
    """Find settings for every method of the recipe in `path` by `num_trials` trials each; return `search.json`.

    `launch` starts the process of a trial, given its recipe, its `parts`, its `share` of the train records and a `log`
    for what it says. The same command goes on where an earlier one was stopped or killed.

    Raises:
        RecipeError: a range or a setting is wrong, or no trial of a method came to its end.
        FolderInUseError: the folder holds a search with other ranges, another recipe or other data.
        Interrupted: a stop was asked for.
    """
    from keeptune.search.driver import Work, run_trials

    sections = read_sections(path, overrides=overrides)
    if not sections.get("methods"):
        sections["methods"] = {"full": {}, "lora": {"peft_type": "LORA"}}
    plan = plan_search(sections, where=str(path), is_fractional=is_fractional)
    recipe = make_recipe(plan.recipe, path=path)
    with naming_recipe(path, recipe):
        for corner in plan.corners() if plan.ranges else ():
            check_methods(make_recipe(corner, path=path))
        check_methods(recipe)
        budgets_of(recipe)
        with open_run(recipe, context=context, beside=True) as opened:
            job = _begin(opened, sections, plan, num_trials=num_trials, num_jobs=num_jobs, halving=halving)
            work = Work(
                start=lambda study, trial, log: _start(job, study, trial, log=log, launch=launch),
                read=lambda study, trial: _read(study, trial),
                told=lambda study, result: _told(job, study, result),
                stop_requested=context.stop_requested,
            )
            run_trials(list(job.methods.values()), num_jobs=num_jobs, work=work)
            _refuse_nothing_finished(job)
            return _finish(job)


def _begin(run: Run, sections: Mapping[str, Any], plan: Plan, *, num_trials: int, num_jobs: int, halving: bool) -> _Job:
    """Prepare what all trials share, and open each method's study."""
    from keeptune.search import ladder
    from keeptune.search.rounds import Search
    from keeptune.search.study import open_study

    recipe = run.recipe
    data = prepare(run)
    inner = Run(
        _with_replay(recipe) if num_trials >= _LEAST_TRIALS_WITH_REPLAY else recipe, run.folder / FOLDER, run.context
    )
    remove_leftovers(inner.folder)
    texts = write_texts(inner, data)
    higher = _higher_is_better(recipe)
    methods: dict[str, tuple[Study, Search]] = {}
    keys: dict[str, str] = {}
    for name in recipe.methods:
        ranges, start = plan.of(name), None
        if not ranges:
            start = _start_of(recipe, name, can_replay=_can_replay(inner.recipe, data, texts))
            ranges = ladder.bounds(start)
        search = Search(ranges, start, num_trials, num_jobs, recipe.seed, higher, halving=halving)
        keys[name] = _study_key(recipe, data, texts, name=name, ranges=ranges)
        study = open_study(inner.folder / name, method=name, key=keys[name], ranges=ranges, higher_is_better=higher)
        methods[name] = (study, search)
    shares = [share for _, search in methods.values() for share in search.shares]
    parts = write_parts(inner, data, texts, shares=sorted(set(shares)))
    job = _Job(run, sections, plan, parts, methods, keys)
    for study, _ in methods.values():
        for result in study.results().values():
            _clear(study, result.trial)
    return job


def _study_key(recipe: Recipe, data: Data, texts: Texts | None, *, name: str, ranges: Sequence[Range]) -> str:
    """Return the hash of all that a trial's value depends on beside its own settings."""
    evaluation = recipe.evaluation
    return stage_key(
        data=data.key,
        weights=data.base.facts.sha256,
        texts=texts.key if texts is not None else None,
        method=recipe.methods[name].model_dump(mode="json"),
        training=recipe.training.model_dump(mode="json", exclude={"save_steps"}),
        chooses=[evaluation.select_by, evaluation.num_validation_records, evaluation.max_new_tokens],
        metrics=list(evaluation.metrics) if recipe.retention.budget else [],
        budget=recipe.retention.budget,
        seed=recipe.seed,
        ranges=[asdict(range_) for range_ in ranges],
    )


def _start_of(recipe: Recipe, name: str, *, can_replay: bool) -> Start:
    """Return where the preset begins for a method: at the recipe's own settings."""
    from keeptune.search.ladder import Start

    fields = recipe.methods[name]
    own: dict[str, Any] = {"learning_rate": learning_rate(fields)}
    if can_replay:
        own |= {"replay_fraction": fields.replay_fraction, "replay_kl": fields.replay_kl}
    if fields.peft_type == "LORA":
        given = fields.model_extra or {}
        own |= {key: given.get(key, default) for key, default in _RANK.items()}
    settings = {f"methods.{name}.{key}": value for key, value in own.items()}
    return Start({**settings, "training.num_train_epochs": recipe.training.num_train_epochs}, can_replay)


def _with_replay(recipe: Recipe) -> Recipe:
    """Return the recipe with as much replay as a preset may try, where something must not be lost."""
    if not recipe.retention.budget:
        return recipe
    methods = {
        name: fields.model_copy(update={"replay_fraction": max(fields.replay_fraction, _REPLAYED)})
        for name, fields in recipe.methods.items()
    }
    return recipe.model_copy(update={"methods": methods})


def _can_replay(recipe: Recipe, data: Data, texts: Texts | None) -> bool:
    if not recipe.retention.budget:
        return False
    kept = keep_texts(recipe, data, texts)
    return kept is not None and kept.replay is not None


def _higher_is_better(recipe: Recipe) -> bool:
    from keeptune.evaluation.metrics import METRICS

    chosen = recipe.evaluation.select_by
    return chosen != "loss" and METRICS[chosen].higher_is_better


def _start(job: _Job, study: Study, trial: Trial, *, log: Path, launch: Launch) -> subprocess.Popen[bytes]:
    """Write a trial's own recipe, and start its process."""
    recipe = _trial_recipe(job, study, trial)
    path = study.folder / f"{trial.name}.yaml"
    write_atomic(path, write_yaml(recipe))
    with storage_errors(log):
        return launch(path, parts=job.parts.folder, share=trial.share, log=log)


def _trial_recipe(job: _Job, study: Study, trial: Trial) -> dict[str, Any]:
    """Return the plain recipe of a trial: its method and settings, and no place where data stand."""
    name = study.method
    recipe = with_values(job.plan.recipe, trial.params)
    # Its data are the parts that it is given; of tasks and texts it has the names.
    tasks = [{"path": task.name, "name": task.name, "train": task.train} for task in job.run.recipe.data.tasks]
    texts = [{"path": text.name, "name": text.name} for text in job.run.recipe.retention.texts]
    retention = {**(recipe.get("retention") or {}), "texts": texts}
    return {
        **recipe,
        "output_dir": str(study.folder / trial.name),
        "data": {**recipe["data"], "tasks": tasks},
        "methods": {name: recipe["methods"][name] or {}},
        "retention": retention,
        "seed": (job.run.recipe.seed + trial.repeat) % 2**32,
    }


def _read(study: Study, trial: Trial) -> Result | None:
    path = study.folder / trial.name / RESULT
    return Result(trial, "finished", **read_json(path)) if path.is_file() else None


def _told(job: _Job, study: Study, result: Result) -> None:
    """Say what became of a trial, take its weights off the disk, and write the table anew."""
    settings = ", ".join(f"{key.rpartition('.')[2]} {_short(value)}" for key, value in result.trial.params.items())
    metric = job.run.recipe.evaluation.select_by
    became = (
        f"{metric} {result.value:.4g}" if result.value is not None else f"failed ({result.reason.splitlines()[-1]})"
    )
    job.run.context.progress.say(f"{study.method} {result.trial.name}: {became} with {settings}")
    _clear(study, result.trial)
    _write_summary(job, winners={})


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _clear(study: Study, trial: Trial) -> None:
    """Remove the weights of a trial that is at its end: the best settings are trained again by `keeptune run`."""
    folder = study.folder / trial.name / study.method
    for name in ("checkpoints", "model", "adapter"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _refuse_nothing_finished(job: _Job) -> None:
    for name, (study, _) in job.methods.items():
        results = list(study.results().values())
        if not any(result.value is not None for result in results):
            raise RecipeError(
                f"methods.{name}: found {len(results)} trials and none that came to its end (the last: "
                f"{results[-1].reason}); expected one or more. Mend what it says, and remove {study.folder}."
            )


def _finish(job: _Job) -> Path:
    """Write the best settings of each method, the best recipe, the table with the winners, and the page."""
    from keeptune.report.page import write_search_report

    winners = {name: _winner(job, study) for name, (study, _) in job.methods.items()}
    for name, (study, _) in job.methods.items():
        write_atomic(study.folder / BEST, write_yaml(_best_recipe(job, winners, [name], first=name)))
    _write_summary(job, winners=winners)
    first = _best_method(job, winners)
    write_atomic(
        job.run.folder / FOLDER / BEST, write_yaml(_best_recipe(job, winners, _together(job, winners), first=first))
    )
    write_search_report(job.run.folder)
    return job.run.folder / FOLDER / SUMMARY


def _winner(job: _Job, study: Study) -> Winner:
    from keeptune.search.winner import decide, repeated

    higher = _higher_is_better(job.run.recipe)
    pair = repeated(study.results(), higher_is_better=higher)
    error = _paired_error(job, study, [contender.name for contender in pair]) if len(pair) > 1 else None
    return decide(pair, higher_is_better=higher, standard_error=error)


def _paired_error(job: _Job, study: Study, names: Sequence[str]) -> float | None:
    """Return the standard error of the difference between two trials over the validation records, paired.

    The mean over the seeds that both have: the same records are asked each time, so that more seeds make it no smaller.
    """
    from keeptune.evaluation.evaluate import read_answers
    from keeptune.evaluation.scores import paired_differences
    from keeptune.search.rounds import REPEATS

    metric = job.run.recipe.evaluation.select_by
    errors = []
    for suffix in ("", *(f"-seed-{repeat}" for repeat in REPEATS)):
        folders = [study.folder / f"{name}{suffix}" / VALIDATION for name in names]
        if all(folder.is_dir() for folder in folders):
            mine, theirs = (read_answers(folder) for folder in folders)
            found = paired_differences(mine, theirs, metrics=(metric,), model=names[0], against=names[1])
            errors += [d.standard_error for d in found if d.task == ALL_TASKS and d.standard_error is not None]
    return sum(errors) / len(errors) if errors else None


def _best_method(job: _Job, winners: Mapping[str, Winner]) -> str:
    """Return the method whose best trial is best; one that keeps the budgets goes before one that does not."""
    sign = 1.0 if _higher_is_better(job.run.recipe) else -1.0
    return max(winners, key=lambda name: (winners[name].chosen.feasible, sign * winners[name].chosen.mean))


def _together(job: _Job, winners: Mapping[str, Winner]) -> list[str]:
    """Return the methods whose best settings of the training, which a recipe has one of, are those of the best one."""

    def shared(name: str) -> dict[str, Any]:
        return {k: v for k, v in winners[name].chosen.params.items() if k.startswith("training.")}

    first = shared(_best_method(job, winners))
    return [name for name in winners if shared(name) == first]


def _best_recipe(job: _Job, winners: Mapping[str, Winner], names: Iterable[str], *, first: str) -> dict[str, Any]:
    values = {key: value for key, value in winners[first].chosen.params.items() if key.startswith("training.")}
    chosen = list(names)
    for name in chosen:
        values |= {k: v for k, v in winners[name].chosen.params.items() if k.startswith("methods.")}
    recipe = with_values(job.plan.recipe, values)
    return {**recipe, "methods": {name: recipe["methods"][name] for name in chosen}}


def _write_summary(job: _Job, *, winners: Mapping[str, Winner]) -> None:
    """Write `search.json`: every trial of every method, and how they compare once all are at their end."""
    from keeptune.search.sampler import importances

    recipe, higher = job.run.recipe, _higher_is_better(job.run.recipe)
    methods = {}
    for name, (study, search) in job.methods.items():
        results = sorted(study.results().values(), key=lambda r: r.trial.name)
        first = [r for r in results if not r.trial.repeat and r.trial.share == search.shares[0]]
        methods[name] = {
            "key": job.keys[name],
            "by": "preset" if search.start is not None else "ranges",
            "trials": [_row(result) for result in results],
            "importance": importances(search.ranges, first, higher_is_better=higher) if winners else {},
            "winner": _said(winners[name]) if name in winners else None,
        }
    value = {
        "metric": recipe.evaluation.select_by,
        "higher_is_better": higher,
        "split": "validation",
        "budget": dict(recipe.retention.budget),
        "best": _best_method(job, winners) if winners else None,
        "together": _together(job, winners) if winners else [],
        "methods": methods,
    }
    write_json(job.run.folder / FOLDER / SUMMARY, value)


def _row(result: Result) -> dict[str, Any]:
    row = asdict(result)
    trial = row.pop("trial")
    return {"name": result.trial.name, **trial, **row}


def _said(winner: Winner) -> dict[str, Any]:
    contenders = [c for c in (winner.chosen, winner.second) if c is not None]
    return {
        "contenders": [{**asdict(contender), "mean": contender.mean} for contender in contenders],
        "difference": winner.difference,
        "threshold": winner.threshold,
        "is_real": winner.is_real,
    }
