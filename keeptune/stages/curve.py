"""A learning curve: a recipe arrives; each method, trained on more and more of its train records, leaves `curve/`.

The records of a seed are nested: what a smaller number holds, a larger one does. Scores are those on validation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keeptune.config import Recipe, load_recipe, read_sections
from keeptune.errors import RecipeError
from keeptune.search.trials import Result, Trial
from keeptune.stages.data import Data, prepare
from keeptune.stages.methods import check_methods
from keeptune.stages.run import Context, Run, naming_recipe, open_run
from keeptune.stages.texts import Texts, write_texts
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
from keeptune.storage import remove_leftovers, write_record

if TYPE_CHECKING:
    from keeptune.search.study import Study

FOLDER, SUMMARY = "curve", "curve.json"
_NUM_SEEDS = 3
_PARTS = (8, 4, 2, 1)


def curve(
    path: Path, *, overrides: Sequence[str], sizes: str | None, num_jobs: int, context: Context, launch: Launch
) -> Path:
    """Train every method on each of `sizes` (`"100,250,500"`) train records, with three seeds; return `curve.json`.

    Without `sizes` that is an eighth, a quarter, a half and all of them.

    A seed decides which records are taken, and the training. The same command goes on where an earlier one was stopped
    or killed, and further sizes add to it.

    Raises:
        RecipeError: sizes that are no numbers, too few of them, or more than there are train records.
        FolderInUseError: the folder holds trainings of another recipe or other data.
        Interrupted: a stop was asked for.
    """
    from keeptune.search.driver import Work, run_trials
    from keeptune.search.sampler import optuna

    # Refused before anything is prepared, where it is not installed.
    optuna()
    recipe, sections = load_recipe(path, overrides=overrides), read_sections(path, overrides=overrides)
    # What must not be lost decides nothing here.
    sections = {**sections, "retention": {**(sections.get("retention") or {}), "budget": {}}}
    sections["methods"] = sections.get("methods") or {"full": {}, "lora": {"peft_type": "LORA"}}
    asked = _numbers(sizes) if sizes is not None else None
    with naming_recipe(path, recipe):
        check_methods(recipe)
        with open_run(recipe, context=context, beside=True) as opened:
            for name in recipe.methods:
                refuse_another_study(opened.folder / FOLDER / name, _settings(recipe, name))
            data = prepare(opened)
            trials = [
                Trial(i, {}, repeat=seed, num_records=number)
                for i, number in enumerate(_sizes(asked, data))
                for seed in range(_NUM_SEEDS)
            ]
            inner = Run(_without_budget(recipe), opened.folder / FOLDER, context)
            remove_leftovers(inner.folder)
            texts = write_texts(inner, data, for_training=True) if _replays(recipe) else None
            studies = [_study(inner, data, texts, name=name) for name in recipe.methods]
            parts = write_parts(inner, data, texts, trials=trials)

            def missing(known: Mapping[str, Trial], results: Mapping[str, Result]) -> list[Trial]:
                return [trial for trial in trials if trial.name not in results]

            done = [set(study.results()) for study in studies]
            counted = Told(context.progress, sum(trial.name not in names for trial in trials for names in done))

            def told(study: Study, result: Result) -> None:
                came = f"{result.value:.4g}" if result.value is not None else f"failed ({result.reason})"
                clear_trial(study, result.trial)
                counted.ended(f"{study.method} {result.trial.name}: {recipe.evaluation.select_by} {came}")

            work = Work(
                start=Maker(opened, sections, parts, launch).start,
                read=read_trial,
                told=told,
                again=counted.again,
                stop_requested=context.stop_requested,
            )
            with counted.counting(num_before=sum(map(len, done))):
                run_trials([(study, missing) for study in studies], num_jobs=num_jobs, work=work)
            return _write(opened, data, studies)


def _numbers(sizes: str) -> list[int]:
    from keeptune.search.curve import MIN_SIZES

    parts = [part.strip() for part in sizes.split(",") if part.strip()]
    wrong = [part for part in parts if not part.isdecimal() or int(part) < 1]
    numbers = sorted({int(part) for part in parts if part not in wrong})
    if wrong or len(numbers) < MIN_SIZES:
        found = f"{wrong[0]!r}" if wrong else f"{len(numbers)} different numbers in {sizes!r}"
        raise RecipeError(
            f"--sizes: found {found}; expected {MIN_SIZES} or more numbers of train records. "
            "Write for example --sizes 100,250,500,1000."
        )
    return numbers


def _sizes(asked: Sequence[int] | None, data: Data) -> Sequence[int]:
    num_train = len(data.table("train"))
    if asked is None:
        return sorted({max(1, round(num_train / part)) for part in _PARTS})
    if asked[-1] > num_train:
        raise RecipeError(
            f"--sizes: found {asked[-1]:,}; expected at most {num_train:,}, the number of train records. "
            f"Write {num_train} in its place, or give more data."
        )
    return asked


def _without_budget(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"retention": recipe.retention.model_copy(update={"budget": {}})})


def _study(run: Run, data: Data, texts: Texts | None, *, name: str) -> Study:
    from keeptune.search.study import open_study

    key = study_key(run.recipe, data, texts, name=name, ranges=())
    higher = higher_is_better(run.recipe)
    study = open_study(run.folder / name, method=name, key=key, ranges=(), higher_is_better=higher)
    note_study(study.folder, key=key, settings=_settings(run.recipe, name))
    return study


def _settings(recipe: Recipe, name: str) -> dict[str, Any]:
    return study_settings(_without_budget(recipe), name=name, ranges=(), with_texts=_replays(recipe))


def _replays(recipe: Recipe) -> bool:
    return any(method.replay_fraction for method in recipe.methods.values())


def _write(run: Run, data: Data, studies: list[Study]) -> Path:
    """Fit each method's law, and write `curve.json` and the page."""
    from keeptune.report.page import write_growth_report

    value = {
        **study_facts(run, data),
        "metric": run.recipe.evaluation.select_by,
        "higher_is_better": higher_is_better(run.recipe),
        "split": "validation",
        "methods": {study.method: _facts(run.recipe, study) for study in studies},
    }
    path = run.folder / FOLDER / SUMMARY
    write_record(path, value)
    write_growth_report(run.folder)
    return path


def _facts(recipe: Recipe, study: Study) -> dict[str, Any]:
    from keeptune.retention.drops import metric_scale
    from keeptune.search.curve import MIN_SIZES, Measured, fit_curve

    results = sorted(study.results().values(), key=lambda r: (r.trial.num_records or 0, r.trial.repeat))
    measured = [
        Measured(r.trial.num_records, r.trial.repeat, r.value)
        for r in results
        if r.trial.num_records is not None and r.value is not None and math.isfinite(r.value)
    ]
    metric, higher = recipe.evaluation.select_by, higher_is_better(recipe)
    bounds = (0.0, metric_scale(metric) if higher else math.inf)
    enough = len({one.num_records for one in measured}) >= MIN_SIZES
    fitted = fit_curve(measured, higher_is_better=higher, bounds=bounds, seed=recipe.seed) if enough else None
    return {
        "measured": [asdict(one) for one in measured],
        "failed": [{"name": r.trial.name, "reason": r.reason} for r in results if r.value is None],
        "law": asdict(fitted) if fitted is not None else None,
    }
