"""A search: a recipe with ranges or without arrives; the trials of each method, and the best settings, leave.

Data are prepared once. Each trial is a process that is given the parts of them that it may see, and never test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keeptune.config import Recipe, is_fractional, make_recipe, read_sections
from keeptune.errors import FolderInUseError, RecipeError, raise_collected
from keeptune.progress import noun
from keeptune.search.space import Plan, plan_search
from keeptune.search.trials import Result, Trial
from keeptune.stages.budgets import budgets_of
from keeptune.stages.certify_openings import note_searched
from keeptune.stages.data import Data, prepare
from keeptune.stages.methods import check_methods, learning_rate
from keeptune.stages.run import Context, Run, naming_recipe, open_run
from keeptune.stages.searched import FOLDER, Job, finish, write_summary
from keeptune.stages.texts import Texts, keep_texts, write_texts
from keeptune.stages.trial_parts import write_parts
from keeptune.stages.trials import (
    Launch,
    Maker,
    Told,
    clear_trial,
    note_study,
    read_trial,
    refuse_another_study,
    study_facts,
    study_key,
    study_settings,
)
from keeptune.stages.validation import higher_is_better
from keeptune.storage import remove_leftovers

if TYPE_CHECKING:
    from keeptune.search.ladder import Start
    from keeptune.search.rounds import Search
    from keeptune.search.study import Study

# What a preset tries of replay; the base writes texts for it before the first trial.
_REPLAYED = 0.05
# Of each other task under a budget, what trials may look at.
_PROBED = 0.2
# PEFT's own defaults, from which a preset raises the rank.
_RANK = {"r": 8, "lora_alpha": 8}


def search(
    path: Path,
    *,
    overrides: Sequence[str],
    num_trials: int,
    num_jobs: int,
    halving: bool,
    against_drift: bool,
    context: Context,
    launch: Launch,
) -> Path:
    """Find settings for every method of the recipe in `path` by `num_trials` trials each; return `search.json`.

    `launch` starts the process of a trial, given its recipe, its `parts`, its `subset` of the train records and a `log`
    for what it says. The same command goes on where an earlier one was stopped or killed.

    Raises:
        RecipeError: a range or a setting is wrong, Optuna is missing, or no trial came to its end.
        FolderInUseError: the folder holds a search with other ranges, another recipe, other data or another `halving`.
        Interrupted: a stop was asked for.
    """
    from keeptune.search.driver import Work, run_trials
    from keeptune.search.rounds import missing, num_expected
    from keeptune.search.sampler import optuna

    # Refused before anything is prepared, where it is not installed.
    optuna()
    sections = read_sections(path, overrides=overrides)
    if not sections.get("methods"):
        sections["methods"] = {"full": {}, "lora": {"peft_type": "LORA"}}
    plan = _with_probe(plan_search(sections, where=str(path), is_fractional=is_fractional))
    recipe = make_recipe(plan.recipe, path=path)
    with naming_recipe(path, recipe):
        if against_drift:
            _refuse_drift_without_effect(recipe, plan)
        for corner in plan.corners() if plan.ranges else ():
            check_methods(make_recipe(corner, path=path))
        check_methods(recipe)
        budgets_of(recipe)
        with open_run(recipe, context=context, beside=True) as opened:
            how = {"num_trials": num_trials, "num_jobs": num_jobs, "halving": halving, "against_drift": against_drift}
            job = _begin(opened, plan, how=how)
            pairs = list(job.methods.values())
            num_before = [len(study.results()) for study, _ in pairs]
            left = [max(0, num_expected(s) - n) for (_, s), n in zip(pairs, num_before, strict=True)]
            told = Told(context.progress, sum(left))
            work = Work(
                start=Maker(opened, plan.recipe, job.parts, launch).start,
                read=read_trial,
                told=lambda study, result: _told(job, told, study, result=result),
                again=told.again,
                stop_requested=context.stop_requested,
            )
            with told.counting(num_before=sum(num_before)):
                methods = [(study, partial(missing, search)) for study, search in pairs]
                run_trials(methods, num_jobs=num_jobs, work=work)
            _refuse_nothing_finished(job)
            return finish(job)


def _with_probe(plan: Plan) -> Plan:
    """Return the plan with records of other tasks under a budget that trials may look at; its best recipe has it too.

    Without it the records that settings were chosen by would be certified on.
    """
    retention = plan.recipe.get("retention", {})
    others = [task for task in plan.recipe.get("data", {}).get("tasks", ()) if task.get("train") is False]
    if not retention.get("budget") or not others:
        return plan
    return replace(plan, recipe={**plan.recipe, "retention": {"probe_fraction": _PROBED, **retention}})


def _refuse_drift_without_effect(recipe: Recipe, plan: Plan) -> None:
    """Refuse to look for little drift where none is measured, or where the preset chooses by value alone."""
    if not recipe.retention.self_texts:
        raise RecipeError(
            "retention.self_texts: found 0 with --against-drift; expected texts that the drift is measured on. "
            "Remove self_texts, or --against-drift."
        )
    if without := [name for name in recipe.methods if not plan.of(name)]:
        raise RecipeError(
            f"methods.{without[0]}: found no range with --against-drift; expected one, as the preset looks at the "
            "value alone. Write learning_rate: auto, or remove --against-drift."
        )


def _begin(run: Run, plan: Plan, *, how: Mapping[str, Any]) -> Job:
    """Prepare what all trials share, and open each method's study."""
    from keeptune.search import ladder
    from keeptune.search.rounds import Search
    from keeptune.search.study import open_study

    recipe = run.recipe
    settings = {
        name: study_settings(recipe, name=name, ranges=plan.of(name), with_texts=True) for name in recipe.methods
    }
    for name in recipe.methods:
        refuse_another_study(run.folder / FOLDER / name, settings[name])
    data = prepare(run)
    # However few the trials are: more of them go on from these.
    inner = Run(_with_replay(recipe), run.folder / FOLDER, run.context)
    remove_leftovers(inner.folder)
    texts = write_texts(inner, data, for_training=True)
    higher = higher_is_better(recipe)
    methods: dict[str, tuple[Study, Search]] = {}
    keys: dict[str, str] = {}
    for name in recipe.methods:
        remove_leftovers(inner.folder / name)
        ranges, start = plan.of(name), None
        if not ranges:
            start = _start_of(recipe, name, can_replay=_can_replay(inner.recipe, data, texts))
            ranges = ladder.bounds(start)
        search = Search(ranges, start, seed=recipe.seed, higher_is_better=higher, **how)
        keys[name] = study_key(recipe, data, texts, name=name, ranges=ranges)
        study = open_study(inner.folder / name, method=name, key=keys[name], ranges=ranges, higher_is_better=higher)
        note_study(study.folder, key=keys[name], settings=settings[name])
        _refuse_other_shares(study, search)
        methods[name] = (study, search)
    note_searched(run, data)
    shares = {share for _, search in methods.values() for share in search.shares}
    parts = write_parts(inner, data, texts, trials=[Trial(0, {}, share=share) for share in sorted(shares)])
    facts = study_facts(run, data)
    job = Job(run, plan, parts, methods, keys, facts, how["against_drift"])
    for study, _ in methods.values():
        for result in study.results().values():
            clear_trial(study, result.trial)
    return job


def _refuse_other_shares(study: Study, search: Search) -> None:
    """Refuse to go on with halving where there was none, or the other way round: names would stand for other trials."""
    known = study.trials().values()
    before = any(trial.share < 1.0 for trial in known)
    if known and before is not search.halving:
        found, remedy = ("with", "Add") if before else ("without", "Leave out")
        raise FolderInUseError(
            f"{study.folder}: found a search {found} --halving; expected the same to go on. "
            f"{remedy} --halving, or choose another output_dir."
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


def _told(job: Job, told: Told, study: Study, *, result: Result) -> None:
    """Say what became of a trial, take its weights off the disk, and write the table anew."""
    settings = ", ".join(f"{key.rpartition('.')[2]} {_short(value)}" for key, value in result.trial.params.items())
    metric = job.run.recipe.evaluation.select_by
    became = (
        f"{metric} {result.value:.4g}" if result.value is not None else f"failed ({result.reason.splitlines()[-1]})"
    )
    clear_trial(study, result.trial)
    write_summary(job, winners={})
    told.ended(f"{study.method} {result.trial.name}: {became} with {settings}")


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _refuse_nothing_finished(job: Job) -> None:
    """Refuse to choose where no trial of any method has a value; one method that has none is named in the table."""
    results = {name: list(study.results().values()) for name, (study, _) in job.methods.items()}
    if any(result.value is not None for found in results.values() for result in found):
        return
    raise_collected(
        RecipeError,
        [
            f"methods.{name}: found {len(found)} {noun(len(found), 'trials')} and none that came to its end (the last: "
            f"{found[-1].reason}); expected one or more. Fix what it says, and remove {job.methods[name][0].folder}."
            for name, found in results.items()
        ],
    )
