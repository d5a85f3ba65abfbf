"""A run folder arrives; frozen tables leave: scores, paired differences, costs, curves, choice and facts of the run.

Whatever is absent or broken stays None or empty, and is noted in `Report.missing`.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keeptune.data.record import ALL_TASKS, OTHER_TASKS, REPLAY
from keeptune.report.answers import Answers, read_answers
from keeptune.report.audit import Audit, read_audit
from keeptune.report.cost import Cost, read_costs
from keeptune.report.curves import Curve, read_curve
from keeptune.report.differences import Paired, mean_difference, read_paired
from keeptune.report.forgotten import NOTHING_FORGOTTEN, Forgotten, read_forgotten
from keeptune.report.growth import Growth, read_growth
from keeptune.report.macro import (
    MacroScore,
    MixtureRow,
    ValidationScore,
    macro_scores,
    read_mixture,
    read_validation,
)
from keeptune.report.reading import RunFolder, finite, flat, mapping, number, rows, string, strings, whole
from keeptune.report.scores import Score, read_scores
from keeptune.report.search import Searched, read_search
from keeptune.report.shots import (
    FewShot,
    Prompting,
    ShotRow,
    few_shot_left_out,
    few_shot_scores,
    num_shots,
    prompting_costs,
    read_shot_row,
)

BASE = "base"
_LOWER_IS_BETTER = frozenset({"loss", "perplexity"})
_NO_METHOD = frozenset({BASE, "curve", "data", "instruct-model", "search", "texts", "tokenizer"})


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric as it was computed; `signature` names the implementation, its version and its options."""

    name: str
    higher_is_better: bool
    signature: str | None


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a model's test answers were made; `cut_fraction` of them met the limit of new tokens."""

    model: str
    split: str | None
    num_left_out: int | None
    cut_fraction: float | None
    prompt_sha256: str | None
    settings: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """Which method was chosen, by which metric on which split; `values` holds (method, value).

    `note` says that the validation loss chose among methods with the same value.
    """

    selected: str | None
    metric: str | None
    split: str | None
    values: tuple[tuple[str, float | None], ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """All that the page shows; `models` are the base's names, then the methods', in the order of the recipe.

    Answers of the base behind examples stand apart, each choice of examples in `shot_rows`, means in `few_shot`.

    The tasks in `untrained_tasks` are scored only: scores of "all" leave them out, those of "others" are theirs.
    `command` makes the run again from the recipe in its folder; `commands` are those that were given, with their time.
    """

    name: str
    models: tuple[str, ...]
    methods: tuple[str, ...]
    metrics: tuple[Metric, ...]
    main_metric: str | None
    scores: tuple[Score, ...]
    paired: tuple[Paired, ...]
    costs: tuple[Cost, ...]
    curves: tuple[Curve, ...]
    decodings: tuple[Decoding, ...]
    selection: Selection
    answers: Answers | None
    audit: Audit
    openings: tuple[tuple[tuple[str, str], ...], ...]
    facts: tuple[tuple[str, str], ...]
    command: str | None
    commands: tuple[tuple[str, str], ...]
    base_name: str | None
    recipe: str
    missing: tuple[str, ...]
    untrained_tasks: frozenset[str] = frozenset()
    shot_rows: tuple[ShotRow, ...] = ()
    few_shot: tuple[FewShot, ...] = ()
    forgotten: Forgotten = NOTHING_FORGOTTEN
    macro: tuple[MacroScore, ...] = ()
    validation: tuple[ValidationScore, ...] = ()
    mixture: tuple[MixtureRow, ...] = ()
    searched: Searched | None = None
    growth: Growth | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """The single tasks that were trained on and that scores exist for, in their order; "all" is not one."""
        return tuple(task for task in self._scored if task not in self.untrained_tasks)

    @property
    def other_tasks(self) -> tuple[str, ...]:
        """The single tasks that were not trained on and that scores exist for, in their order."""
        return tuple(task for task in self._scored if task in self.untrained_tasks)

    @property
    def num_never_shown(self) -> int:
        """The number of train records that a mixture leaves out of all epochs."""
        of_first = [row for row in self.mixture if row.model == self.mixture[0].model]
        return sum(row.num_never_shown for row in of_first if row.source != REPLAY)

    @property
    def prompting(self) -> tuple[Prompting, ...]:
        """What examples in the prompt cost, beside what each trained method did."""
        trained = [(cost.model, cost.num_train_tokens, cost.peft_type is None) for cost in self.costs]
        return tuple(prompting_costs(self.shot_rows, trained=trained))

    @property
    def _scored(self) -> Iterator[str]:
        yield from dict.fromkeys(s.task for s in self.scores if s.task not in (ALL_TASKS, OTHER_TASKS))

    def score(self, model: str, metric: str, *, task: str = ALL_TASKS) -> Score | None:
        """Return one score, None where it was not measured."""
        found = (s for s in self.scores if (s.model, s.metric, s.task) == (model, metric, task))
        return next(found, None)

    def macro_score(self, model: str, metric: str, *, tasks: str) -> MacroScore | None:
        """Return the mean over tasks of a model's scores, None where there are fewer than two."""
        return next((m for m in self.macro if (m.model, m.metric, m.tasks) == (model, metric, tasks)), None)

    def difference(self, model: str, metric: str, *, task: str = ALL_TASKS) -> Paired | None:
        """Return a model's paired difference from the base without examples, None where it was not measured."""
        wanted = (model, metric, task)
        others = {*self.methods, *(row.name for row in self.shot_rows)}
        against_base = (p for p in self.paired if p.against not in others)
        return next((p for p in against_base if (p.model, p.metric, p.task) == wanted), None)

    def best_few_shot(self, metric: str, *, task: str = ALL_TASKS) -> FewShot | None:
        """Return the best few-shot score, of equals the one of fewer examples; None where there is none."""
        sign = 1 if self.higher_is_better(metric) else -1
        found = [f for f in self.few_shot if (f.metric, f.task) == (metric, task)]
        return max(found, key=lambda f: sign * f.mean, default=None)

    def difference_from_shots(self, model: str, metric: str) -> Paired | None:
        """Return a model's paired difference from the best few-shot score, None where not measured."""
        best = self.best_few_shot(metric)
        if best is None:
            return None
        wanted = {(model, row, metric, ALL_TASKS) for row in best.rows}
        pairs = [p for p in self.paired if (p.model, p.against, p.metric, p.task) in wanted]
        num_picked_from = sum((f.metric, f.task) == (metric, ALL_TASKS) for f in self.few_shot)
        if len(pairs) < len(best.rows):
            return None
        return mean_difference(pairs, against=best.name, num_picked_from=num_picked_from)

    def cost(self, model: str | None) -> Cost | None:
        """Return a method's cost, None where it was not trained to the end."""
        return next((c for c in self.costs if c.model == model), None)

    def higher_is_better(self, metric: str) -> bool:
        """Tell in which direction a metric is good."""
        return next((m.higher_is_better for m in self.metrics if m.name == metric), metric not in _LOWER_IS_BETTER)


def read_report(run: Path) -> Report:
    """Return the tables of a run folder, whatever part of it exists.

    Raises:
        StorageError: the disk refuses to read a file that exists.
    """
    folder = RunFolder(run)
    manifest = folder.object("manifest.json")
    selection = _selection(folder.object("selection.json"))
    methods = _methods(run, selection, named=manifest.get("methods"))
    # The base also weighs texts, answers again and is certified against: of those, none is a baseline.
    asked = [path.name for path in _folders(run / BASE) if "-shot" in path.name]
    of_base = {f"base/{name}": folder.object(f"base/{name}/scores.json") for name in asked}
    shot_rows = tuple(read_shot_row(value) for value in of_base.values() if num_shots(value))
    baselines = [place for place, value in of_base.items() if not num_shots(value)]
    if not of_base:
        folder.notes.append("base/: not there")
    folder.notes.extend(_left_out_draws(shot_rows))
    values = [of_base[place] for place in baselines]
    values += [folder.object(f"{name}/test/scores.json") for name in methods]
    scores = tuple(score for value in values for score in read_scores(value))
    audit = read_audit(folder)
    untrained_tasks = frozenset(audit.untrained_tasks).union(*(strings(v.get("untrained_tasks")) for v in values))
    metrics = _metrics(values, scores)
    main_metric = _main_metric(metrics, selection)
    # Only a name that a folder of this run has is opened: what selection.json says is not trusted as a path.
    answered = [name for name in methods if (run / name / "test/samples.jsonl").is_file()]
    shown = selection.selected if selection.selected in methods else next(iter(answered), None)
    base_answers = f"{baselines[0]}/samples.jsonl" if baselines else None
    judged = next((m for m in metrics if m.name == main_metric), None)
    answers = _answers(folder, shown, judged, base=base_answers, untrained_tasks=untrained_tasks)
    forgotten = read_forgotten(folder, methods=methods, shown=shown, base=base_answers, lower=_LOWER_IS_BETTER)
    base_names = dict.fromkeys(s.model for s in scores if s.model not in methods)
    return Report(
        name=run.resolve().name,
        models=(*base_names, *methods),
        methods=methods,
        metrics=metrics,
        main_metric=main_metric,
        scores=scores,
        paired=tuple(read_paired(folder.object("paired.json"), base=BASE)),
        costs=tuple(read_costs(folder, methods)),
        curves=tuple(curve for name in methods if (curve := read_curve(folder, name)) is not None),
        decodings=tuple(_decodings([*values, *(value for value in of_base.values() if num_shots(value))])),
        selection=selection,
        answers=answers,
        audit=audit,
        openings=tuple(_openings(folder)),
        facts=_facts(folder, manifest, methods),
        command=_command(run),
        commands=tuple(_commands(manifest)),
        base_name=string(manifest.get("model")) or string(mapping(manifest.get("base")).get("name")),
        recipe=folder.text("recipe.yaml"),
        missing=tuple(dict.fromkeys(folder.notes)),
        untrained_tasks=untrained_tasks,
        forgotten=forgotten,
        macro=tuple(macro_scores(scores, untrained_tasks=untrained_tasks)),
        validation=tuple(read_validation(folder, methods)),
        mixture=tuple(read_mixture(folder, methods)),
        searched=read_search(folder),
        growth=read_growth(folder),
        shot_rows=shot_rows,
        few_shot=tuple(few_shot_scores(shot_rows)),
    )


def _left_out_draws(shot_rows: Sequence[ShotRow]) -> Iterator[str]:
    """Yield why single draws have no score; where none of a number has one, the page says so in the score's place."""
    said = tuple(name for name, _ in few_shot_left_out(shot_rows))
    for row in shot_rows:
        if row.left_out is not None and not row.name.startswith(said):
            yield row.left_out


def _answers(
    folder: RunFolder, shown: str | None, metric: Metric | None, *, base: str | None, untrained_tasks: frozenset[str]
) -> Answers | None:
    if shown is None or metric is None:
        return None
    how = {"metric": metric.name, "higher_is_better": metric.higher_is_better, "untrained_tasks": untrained_tasks}
    return read_answers(folder, model=shown, base=base, **how)


def _folders(path: Path) -> list[Path]:
    """Return the finished folders in `path`, by name; hidden and half-written ones are none."""
    if not path.is_dir():
        return []
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".") and ".tmp-" not in p.name)


def _methods(run: Path, selection: Selection, *, named: Any) -> tuple[str, ...]:
    """Return the names of the folders that hold a method: those of the selection in its order, then the others'.

    Where `named` lists the methods of the last recipe, what an earlier one left is not among them.
    """
    signs = ("training.json", "events.jsonl", "test", "checkpoints")
    found = [p.name for p in _folders(run) if p.name not in _NO_METHOD and any((p / s).exists() for s in signs)]
    if isinstance(named, list):
        found = [name for name in found if name in named]
    ordered = [name for name, _ in selection.values if name in found]
    return tuple(dict.fromkeys([*ordered, *found]))


def _selection(value: Mapping[str, Any]) -> Selection:
    return Selection(
        selected=string(value.get("selected")),
        metric=string(value.get("metric")),
        split=string(value.get("split")),
        values=tuple((name, number(v)) for name, v in mapping(value.get("values")).items()),
        note=string(value.get("note")) or "",
    )


def _metrics(values: Sequence[Mapping[str, Any]], scores: Sequence[Score]) -> tuple[Metric, ...]:
    """Return every metric that was declared or scored; answer metrics first, loss and perplexity last."""
    found: dict[str, Metric] = {}
    for value in values:
        for name, facts in mapping(value.get("metrics")).items():
            declared = mapping(facts).get("higher_is_better")
            higher = declared if isinstance(declared, bool) else name not in _LOWER_IS_BETTER
            found.setdefault(name, Metric(name, higher, string(mapping(facts).get("signature"))))
    for score in scores:
        found.setdefault(score.metric, Metric(score.metric, score.metric not in _LOWER_IS_BETTER, None))
    return tuple(sorted(found.values(), key=lambda metric: metric.name in _LOWER_IS_BETTER))


def _main_metric(metrics: Sequence[Metric], selection: Selection) -> str | None:
    """Return the metric of the headline: the one that selected if it judges answers, else the recipe's first."""
    names = [metric.name for metric in metrics]
    if selection.metric in names and selection.metric not in _LOWER_IS_BETTER:
        return selection.metric
    return names[0] if names else None


def _decodings(values: Sequence[Mapping[str, Any]]) -> Iterator[Decoding]:
    for value in values:
        if value and "left_out" not in value:
            yield Decoding(
                model=string(value.get("row")) or string(value.get("model")) or "?",
                split=string(value.get("split")),
                num_left_out=whole(value.get("num_left_out")),
                cut_fraction=finite(value.get("cut_fraction")),
                prompt_sha256=string(value.get("prompt_sha256")),
                settings=tuple(flat(mapping(value.get("decoding")))),
            )


def _openings(folder: RunFolder) -> Iterator[tuple[tuple[str, str], ...]]:
    for line in folder.lines("test_openings.jsonl", expected=False):
        yield tuple((name, text) for name, text in flat(line) if name != "previous_sha256")


def _command(run: Path) -> str | None:
    """Return the command that the run's resolved recipe answers to, None without a recipe."""
    recipe = run / "recipe.yaml"
    return shlex.join(["keeptune", "run", str(recipe)]) if recipe.is_file() else None


def _commands(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for given in rows(manifest.get("commands")):
        yield string(given.get("time")) or "?", string(given.get("command")) or "?"


def _facts(folder: RunFolder, manifest: Mapping[str, Any], methods: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Return what the run's manifests state, and the SHA-256 of the weights that each method left."""
    shown_apart = ("files", "command", "commands")
    facts = list(flat({key: value for key, value in manifest.items() if key not in shown_apart}))
    data = folder.object("data/manifest.json", expected=False)
    # The audit holds the counts.
    facts += flat({key: value for key, value in data.items() if key not in ("files", "counts")}, prefix="data.")
    for name in (*methods, "instruct-model"):
        for place in (f"{name}/adapter", f"{name}/model", name):
            files = mapping(folder.object(f"{place}/manifest.json", expected=False).get("files"))
            weights = {k: mapping(v).get("sha256") for k, v in files.items() if k.endswith(".safetensors")}
            facts += [(f"{place}/{file} SHA-256", v) for file, v in weights.items() if isinstance(v, str)]
    return tuple(facts)
