"""A report's tables arrive; the page's rows leave: worded cells beside the figures that belong to them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from markupsafe import Markup

from keeptune.data.record import ALL_TASKS, OTHER_TASKS
from keeptune.evaluation.metrics import metric_of
from keeptune.report.differences import Paired
from keeptune.report.figures import Axis, axis_for, axis_svg, interval_svg
from keeptune.report.headline import target_score
from keeptune.report.macro import MacroScore, macro_scores
from keeptune.report.scores import Score
from keeptune.report.shots import FewShot, few_shot_left_out
from keeptune.report.tables import Metric, Report
from keeptune.report.wording import count, decimal, decimals_for, interval, metric_label

_NUM_COLOURS = 6
_VERDICTS = {
    "better": "▲ better",
    "worse": "▼ worse",
    "unclear": "≈ unclear",
    "same": "= no score changed",
    "nothing": "∅ no score to lose",
}
_MARKS = {verdict: words[0] for verdict, words in _VERDICTS.items()}


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """A model's mean with its interval; `hint` says over how many draws of examples.

    `left_out` says in place of both why there is no score.
    """

    model: str
    colour: str
    selected: bool
    figure: Markup
    mean: str
    interval: str
    hint: str
    num_records: str
    left_out: str = ""


@dataclass(frozen=True, slots=True)
class ScoreGroup:
    """One metric, every model."""

    label: str
    better: str
    rows: tuple[ScoreRow, ...]
    axis: Markup


@dataclass(frozen=True, slots=True)
class PairedRow:
    """A model's paired difference from another."""

    model: str
    against: str
    colour: str
    figure: Markup
    difference: str
    interval: str
    verdict: str
    verdict_text: str
    better: str
    worse: str


@dataclass(frozen=True, slots=True)
class PairedGroup:
    """One metric, every paired difference."""

    label: str
    better: str
    rows: tuple[PairedRow, ...]
    axis: Markup


@dataclass(frozen=True, slots=True)
class TaskCell:
    """A model's score on a task with its doubt; `mark` and `difference` say how it stands to the base, by record."""

    mean: str
    doubt: str
    mark: str
    verdict: str
    difference: str


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One task, every model; `together`: the mean over the group's records, or over its tasks."""

    task: str
    together: bool
    num_records: str
    cells: tuple[TaskCell, ...]


@dataclass(frozen=True, slots=True)
class TaskGroup:
    """Tasks that were trained on, or those that were not; `label` is empty where there is one kind only."""

    label: str
    rows: tuple[TaskRow, ...]


@dataclass(frozen=True, slots=True)
class TaskTable:
    """One metric, every task; `columns` name the models."""

    label: str
    better: str
    columns: tuple[str, ...]
    groups: tuple[TaskGroup, ...]


def colours(report: Report) -> dict[str, str]:
    """Return each model's colour class: grey for what was not tuned, then one after the other."""
    found = dict.fromkeys([*report.models, *(f.name for f in report.few_shot)], "c0")
    found |= {name: f"c{1 + i % _NUM_COLOURS}" for i, name in enumerate(report.methods)}
    name, delivered = delivered_name(report), report.forgotten.delivered
    return found | ({name: found[delivered[0]]} if name and delivered else {})


def delivered_name(report: Report) -> str:
    """Return the name that tables give a delivered model between the base and the trained one; empty for any other."""
    delivered = report.forgotten.delivered
    return f"{delivered[0]} at alpha {delivered[1]:g} (delivered)" if delivered and delivered[1] < 1.0 else ""


def _better(metric: Metric) -> str:
    unit = ", nats per token" if metric.name == "loss" else ""
    return f"{'higher' if metric.higher_is_better else 'lower'} is better{unit}"


def _places(axis: Axis) -> int:
    return 3 if axis.high - axis.low < 0.1 else 2 if axis.high - axis.low < 10 else 0


def score_groups(report: Report) -> list[ScoreGroup]:
    """Return the score table over all tasks; metrics that no model was scored by are absent."""
    found = []
    for metric in report.metrics:
        names = _columns(report, few_shot=True)
        scores = [s for name in names if (s := _shown(report, name, metric.name, task=ALL_TASKS)) is not None]
        if not scores:
            continue
        values = [v for s in scores for v in (s.mean, s.low, s.high) if v is not None]
        axis = axis_for(values, bounds=metric_of(metric.name).bounds)
        places = decimals_for(*(s.mean for s in scores))
        rows = [_score_row(report, s, axis=axis, places=places) for s in scores]
        rows[1:1] = _left_out_rows(report) if not found else []
        figure = Markup(axis_svg(axis, places=_places(axis)))
        found.append(ScoreGroup(metric_label(metric.name), _better(metric), tuple(rows), figure))
    return found


def _left_out_rows(report: Report) -> list[ScoreRow]:
    """Return a row, with the reason, for each few-shot score that could not be had."""
    return [
        ScoreRow(name, "c0", False, Markup(""), "", "", "", "", left_out=reason)
        for name, reason in few_shot_left_out(report.shot_rows)
    ]


def _columns(report: Report, *, few_shot: bool) -> tuple[str, ...]:
    """Return the base's names, those of its few-shot scores where asked for, then the methods'."""
    of_base = [name for name in report.models if name not in report.methods]
    shots, delivered = [f.name for f in report.few_shot if few_shot], delivered_name(report)
    return tuple(dict.fromkeys([*of_base, *shots, *([delivered] if delivered else []), *report.methods]))


def _shown(report: Report, name: str, metric: str, *, task: str) -> Score | FewShot | None:
    delivered = report.forgotten.delivered
    if delivered is not None and name == delivered_name(report):
        score = target_score(report, *delivered, metric=metric, task=task)
        return replace(score, model=name) if score else None
    few_shot = (f for f in report.few_shot if (f.name, f.metric, f.task) == (name, metric, task))
    return next(few_shot, None) or report.score(name, metric, task=task)


def _draws(score: FewShot) -> str:
    if score.is_nearest:
        return ""
    return f"over {count(score.num_draws)} draws" if score.num_draws > 1 else "one draw, which is not in the interval"


def _places_of(value: float | None, *, metric: str, places: int) -> int:
    """Return a perplexity's own decimals: beside one of thousands, a small one would lose its digits."""
    return max(places, decimals_for(value)) if metric == "perplexity" else places


def _score_row(report: Report, score: Score | FewShot, *, axis: Axis, places: int) -> ScoreRow:
    figure = Markup(interval_svg(axis, low=score.low, middle=score.mean, high=score.high, mark_zero=False))
    places = _places_of(score.mean, metric=score.metric, places=places)
    mean, ends = decimal(score.mean, places), interval(score.low, score.high, places)
    if isinstance(score, FewShot):
        return ScoreRow(score.name, "c0", False, figure, mean, ends, _draws(score), count(score.num_records))
    return ScoreRow(
        model=score.model,
        colour=colours(report).get(score.model, "c0"),
        selected=score.model == report.selection.selected and not delivered_name(report),
        figure=figure,
        mean=mean,
        interval=ends,
        hint="",
        num_records=f"{count(score.num_records)}{score.in_clusters}",
    )


def paired_groups(report: Report) -> list[PairedGroup]:
    """Return the paired differences over all tasks, by metric; of the few-shot rows, those from the best one."""
    found, draws = [], {row.name for row in report.shot_rows}
    for metric in report.metrics:
        of_metric = [p for p in report.paired if p.metric == metric.name and p.task == ALL_TASKS]
        pairs = [p for p in of_metric if p.against not in draws]
        pairs += filter(None, (report.difference_from_shots(name, metric.name) for name in report.methods))
        if not pairs:
            continue
        values = [v for p in pairs for v in (p.low, p.difference, p.high) if v is not None]
        # Where nothing differs, there is nothing to draw.
        axis = axis_for(values, with_zero=True) if any(values) else None
        places = decimals_for(*values)
        rows = tuple(_paired_row(report, p, metric=metric, axis=axis, places=places) for p in pairs)
        figure = Markup(axis_svg(axis, places=_places(axis))) if axis else Markup("")
        found.append(PairedGroup(metric_label(metric.name), _better(metric), rows, figure))
    return found


def _verdict(report: Report, pair: Paired, *, metric: Metric) -> str:
    """Return the pair's verdict, "nothing" where both scored 0 and could not have scored less."""
    shown = [_shown(report, name, pair.metric, task=pair.task) for name in (pair.model, pair.against)]
    means = [score.mean for score in shown if score is not None]
    if metric.higher_is_better and len(means) == 2 and not any(means):
        return "nothing"
    return pair.verdict(higher_is_better=metric.higher_is_better)


def _paired_row(report: Report, pair: Paired, *, metric: Metric, axis: Axis | None, places: int) -> PairedRow:
    verdict = _verdict(report, pair, metric=metric)
    places = _places_of(pair.difference, metric=pair.metric, places=places)
    return PairedRow(
        model=pair.model,
        against=pair.against,
        colour=colours(report).get(pair.model, "c0"),
        figure=Markup(interval_svg(axis, low=pair.low, middle=pair.difference, high=pair.high, mark_zero=True))
        if axis
        else Markup(""),
        difference=decimal(pair.difference, places, signed=True),
        interval=interval(pair.low, pair.high, places, signed=True),
        verdict=verdict,
        verdict_text=_VERDICTS[verdict],
        better=count(pair.better),
        worse=count(pair.worse),
    )


def task_tables(report: Report) -> list[TaskTable]:
    """Return one table a metric with every task's scores; none where the run has a single task."""
    if len(report.tasks) + len(report.other_tasks) < 2:
        return []
    found = []
    for metric in report.metrics:
        scores = [s for s in report.scores if s.metric == metric.name]
        places = decimals_for(*(s.mean for s in scores))
        groups = [_task_group(report, tasks, metric=metric, places=places) for tasks in _kinds(report)]
        if scores:
            found.append(TaskTable(metric_label(metric.name), _better(metric), _task_columns(report), tuple(groups)))
    return found


def _task_columns(report: Report) -> tuple[str, ...]:
    """Return the models of a task table: few-shot scores where tasks are told apart that have some."""
    return _columns(report, few_shot=len(report.tasks) > 1)


def _kinds(report: Report) -> list[tuple[str, str, tuple[str, ...]]]:
    """Return (label, name of their mean, names) of the tasks that were trained on, then of the others."""
    kinds = [("Trained on", ALL_TASKS, report.tasks), ("Not trained on", OTHER_TASKS, report.other_tasks)]
    if not report.other_tasks:
        return [("", ALL_TASKS, report.tasks)]
    return [kind for kind in kinds if kind[2]]


def _task_group(report: Report, kind: tuple[str, str, tuple[str, ...]], *, metric: Metric, places: int) -> TaskGroup:
    """Return a row for each task and, where there are several, one for their mean."""
    label, together, tasks = kind
    shown = (*tasks, together) if len(tasks) > 1 else tasks
    rows = [_task_row(report, task, metric=metric, places=places) for task in shown]
    rows += _macro_rows(report, together, metric=metric, places=places)
    return TaskGroup(label, tuple(rows))


def _macro_rows(report: Report, tasks: str, *, metric: Metric, places: int) -> list[TaskRow]:
    """Return the row of the mean over tasks, each counting the same, or none where no model has one."""
    of_base = [macro for macro in report.macro if macro.model not in report.methods]
    base = next((m for m in of_base if (m.metric, m.tasks) == (metric.name, tasks)), None)
    cells, found = [], False
    for name in _task_columns(report):
        macro = _macro(report, name, metric=metric.name, tasks=tasks)
        if macro is None:
            cells.append(TaskCell(decimal(None), "", "", "", ""))
            continue
        found = True
        doubt = _doubt(macro, places=places)
        change = decimal(macro.mean - base.mean, places, signed=True) if base and name != base.model else ""
        cells.append(TaskCell(decimal(macro.mean, places), doubt, "", "", change))
    return [TaskRow("mean of the tasks", True, "", tuple(cells))] if found else []


def _macro(report: Report, name: str, *, metric: str, tasks: str) -> MacroScore | None:
    """Return the mean over tasks of a model's scores, of a delivered one between the base and the trained one too."""
    if name != delivered_name(report):
        return report.macro_score(name, metric, tasks=tasks)
    scores = [score for alpha, score in report.forgotten.targets if (score.model, alpha) == report.forgotten.delivered]
    found = macro_scores(scores, untrained_tasks=report.untrained_tasks)
    return next((macro for macro in found if (macro.metric, macro.tasks) == (metric, tasks)), None)


def _task_row(report: Report, task: str, *, metric: Metric, places: int) -> TaskRow:
    names = _task_columns(report)
    scores = [_shown(report, name, metric.name, task=task) for name in names]
    counts = dict.fromkeys(count(s.num_records) for s in scores if s is not None)
    cells = tuple(
        _task_cell(report, score, _difference(report, name, metric=metric, task=task), metric=metric, places=places)
        for name, score in zip(names, scores, strict=True)
    )
    return TaskRow(task, task in (ALL_TASKS, OTHER_TASKS), " / ".join(counts), cells)


def _difference(report: Report, name: str, *, metric: Metric, task: str) -> Paired | None:
    """Return a model's paired difference from the base; a delivered one's is what it lost, turned round."""
    delivered = report.forgotten.delivered
    if delivered is None or name != delivered_name(report):
        return report.difference(name, metric.name, task=task)
    row = report.forgotten.lost(*delivered, task)
    if row is None or row.metric != metric.name or row.low is None or row.high is None:
        return None
    sign = -1.0 if metric.higher_is_better else 1.0
    low, high = sorted((sign * row.low, sign * row.high))
    base = next((n for n in report.models if n not in report.methods), "base")
    return Paired(name, base, task, metric.name, sign * row.forgetting, low, high, row.num_gained, row.num_lost)


def _task_cell(
    report: Report, score: Score | FewShot | None, pair: Paired | None, *, metric: Metric, places: int
) -> TaskCell:
    if score is None:
        return TaskCell(decimal(None), "", "", "", "")
    change = ""
    if pair is not None and pair.difference is not None:
        change = decimal(pair.difference, _places_of(pair.difference, metric=pair.metric, places=places), signed=True)
    places = _places_of(score.mean, metric=score.metric, places=places)
    verdict = _verdict(report, pair, metric=metric) if pair else ""
    doubt = _doubt(score, places=places)
    return TaskCell(decimal(score.mean, places), doubt, _MARKS.get(verdict, ""), verdict, change)


def _doubt(score: Score | FewShot | MacroScore, *, places: int) -> str:
    return "" if score.low is None else f"({interval(score.low, score.high, places)})"
