"""What was forgotten arrives; the page's sentences, matrix and frontier leave, worded, beside the figures of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from keeptune.data.record import ALL_TASKS, OTHER_TASKS
from keeptune.evaluation.metrics import metric_of
from keeptune.progress import noun
from keeptune.report.figures import NUM_COLOURS, Mark, drift_svg, frontier_svg
from keeptune.report.forgotten import Lost
from keeptune.report.headline import Phrase, target_score
from keeptune.report.lost_words import lost_in_words, suite_words
from keeptune.report.scores import Score
from keeptune.report.tables import Report
from keeptune.report.verdict import budget_words, left_out_words
from keeptune.report.wording import (
    MISSING,
    count,
    decimal,
    decimals_for,
    interval,
    likelihood,
    metric_label,
    suite_label,
    unit_label,
)

_SHAPES = (("o", "●"), ("D", "◆"), ("^", "▲"), ("v", "▼"), ("P", "✚"), ("X", "✖"))
_TINTS = (0.01, 0.05, 0.15)


@dataclass(frozen=True, slots=True)
class FrontierRow:
    """A point of the frontier, worded; `glyph` is its shape in the figure."""

    name: str
    colour: str
    glyph: str
    alpha: str
    score: str
    lost: str
    delivered: bool


@dataclass(frozen=True, slots=True)
class Frontier:
    """Score on the target over what was lost on one suite; `legend` holds (name, colour, shape) of the figure.

    `has_ways`: some method was measured at several alphas, which a dotted line joins.
    """

    figure: Markup
    rows: tuple[FrontierRow, ...]
    suite: str
    metric: str
    target: str
    budget: str
    legend: tuple[tuple[str, str, str], ...]
    has_ways: bool


@dataclass(frozen=True, slots=True)
class Cell:
    """What one model lost on one suite; `tint` is a class, `mark` says the same without colour."""

    mark: str
    lost: str
    interval: str
    detail: str
    tint: str


@dataclass(frozen=True, slots=True)
class MatrixRow:
    """One suite: what the base had, and what each model lost of it."""

    suite: str
    metric: str
    base: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    """Suites by models; `columns` holds (method, what marks it)."""

    columns: tuple[tuple[str, str], ...]
    rows: tuple[MatrixRow, ...]


def _columns(report: Report) -> list[tuple[str, float]]:
    delivered = report.forgotten.delivered
    wanted = [delivered] if delivered is not None and delivered[1] < 1.0 else []
    wanted += [(name, 1.0) for name in report.methods]
    return [place for place in wanted if any((r.model, r.alpha) == place for r in report.forgotten.rows)]


def forgetting_sentence(report: Report) -> tuple[Phrase, ...]:
    """Return what the delivered model lost most on; nothing where nothing was trained, or others tell it already."""
    forgotten = report.forgotten
    if report.selection.selected is None:
        return ()
    if forgotten.delivered is None or not forgotten.rows:
        return (
            () if report.other_tasks else (Phrase("What it may have forgotten elsewhere: nothing else was measured."),)
        )
    found = [row for s in forgotten.suites if s != OTHER_TASKS and (row := forgotten.lost(*forgotten.delivered, s))]
    of_tasks = [row for row in found if row.metric == forgotten.metric]
    of_texts = [row for row in found if row.metric == "loss"]
    of_harness = [row for row in found if row.metric not in (forgotten.metric, "loss")]
    parts = []
    if of_tasks:
        of = f"of {count(len(of_tasks))} tasks, " if len(of_tasks) > 1 else ""
        parts.append(f"{of}{_worst(of_tasks)}")
    parts += [_worst(rows) for rows in (of_harness, of_texts) if rows]
    if not parts:
        return ()
    title = "Forgotten at worst: " if any(row.forgetting > 0 for row in found) else "No loss was measured: "
    return Phrase(title, strong=True), Phrase(f"{'; '.join(parts)}.")


def _worst(rows: Sequence[Lost]) -> str:
    """Return the suite that lost most as a clause; of several, with the interval that holds for whichever it is."""
    worst = max(rows, key=lambda row: row.forgetting)
    if len(rows) == 1:
        return lost_in_words(worst)
    wide = replace(worst, low=worst.worst_low, high=worst.worst_high)
    return lost_in_words(wide, of=f" of the worst of {count(worst.num_suites)}:")


def frontier(report: Report) -> Frontier | None:
    """Return the frontier on the main suite, None where it was not measured or the target was not scored."""
    forgotten, metric = report.forgotten, report.main_metric
    points = [(row, s) for row, s in _points(report) if s.mean is not None]
    if metric is None or not points:
        return None
    of, budget = points[0][0], forgotten.main_budget
    marks = [*_of_base(report, metric)]
    names = {name: i for i, name in enumerate(report.methods)}
    rows = [FrontierRow(n, "c0", g, "", _reached(m.score, m.score_ends), decimal(0.0, 3), False) for n, g, m in marks]
    drawn = [mark for _, _, mark in marks]
    for row, score in points:
        number = names[row.model]
        shape, glyph = _SHAPES[number % len(_SHAPES)]
        is_delivered = forgotten.delivered == (row.model, row.alpha)
        ends, score_ends = _ends(row.low, row.high), _ends(score.low, score.high)
        colour = 1 + number % NUM_COLOURS
        drawn.append(Mark(row.forgetting, score.mean or 0.0, ends, score_ends, shape, colour, is_delivered))
        rows.append(
            FrontierRow(
                row.model,
                f"c{colour}",
                glyph,
                f"{row.alpha:g}",
                _reached(score.mean, score_ends),
                _reached(row.forgetting, ends, signed=True),
                is_delivered,
            )
        )
    kinds = dict.fromkeys((row.colour, row.glyph) for row in rows)
    alike = {kind: dict.fromkeys(row.name for row in rows if (row.colour, row.glyph) == kind) for kind in kinds}
    legend = tuple(("; ".join(found), *kind) for kind, found in alike.items())
    figure = Markup(frontier_svg(drawn, budget=budget.amount if budget else None, name="frontier"))
    words = budget_words(budget) if budget else ""
    names_of = (suite_words(of), unit_label(of.metric), metric_label(metric))
    has_ways = len(points) > len({row.model for row, _ in points})
    return Frontier(figure, tuple(rows), *names_of, words, legend, has_ways)


def _points(report: Report) -> Iterator[tuple[Lost, Score]]:
    forgotten, metric = report.forgotten, report.main_metric
    for name in report.methods:
        of_one = [row for row in forgotten.main_rows if row.model == name]
        for row in sorted(of_one, key=lambda row: row.alpha):
            score = target_score(report, name, row.alpha, metric=metric) if metric else None
            if score is not None:
                yield row, score


def _of_base(report: Report, metric: str) -> Iterator[tuple[str, str, Mark]]:
    for name in report.models:
        score = report.score(name, metric) if name not in report.methods else None
        if score is not None and score.mean is not None:
            yield name, "■", Mark(0.0, score.mean, None, _ends(score.low, score.high), "s", 0)
    for few in report.few_shot:
        if (few.metric, few.task) == (metric, ALL_TASKS):
            yield few.name, "▸", Mark(0.0, few.mean, None, _ends(few.low, few.high), ">", 0)


def _ends(low: float | None, high: float | None) -> tuple[float, float] | None:
    return (low, high) if low is not None and high is not None else None


def _reached(mean: float | None, ends: tuple[float, float] | None, *, signed: bool = False) -> str:
    """Return a number and, in brackets, the ends of its interval where it has some."""
    number = decimal(mean, 3, signed=signed)
    return f"{number} ({interval(*ends, 3, signed=signed)})" if ends and ends[0] < ends[1] else number


def matrix(report: Report) -> Matrix | None:
    """Return what each method lost on each suite, at alpha 1 and as delivered; None where nothing was measured."""
    columns, forgotten = _columns(report), report.forgotten
    if not columns:
        return None
    of_suites = [[forgotten.lost(*place, suite) for place in columns] for suite in forgotten.suites]
    rows = [row for lost in (*of_suites, *_elsewhere(report, columns)) if (row := _matrix_row(lost)) is not None]
    named = tuple((n, "" if a == 1.0 else f"delivered, alpha {a:g}") for n, a in columns)
    return Matrix(named, tuple(rows))


def _matrix_row(lost: Sequence[Lost | None]) -> MatrixRow | None:
    known = next((row for row in lost if row is not None), None)
    if known is None:
        return None
    base = decimal(known.base, decimals_for(known.base))
    return MatrixRow(suite_words(known), unit_label(known.metric), base, tuple(map(_cell, lost)))


def _elsewhere(report: Report, columns: Sequence[tuple[str, float]]) -> Iterator[list[Lost | None]]:
    """Yield what was lost on the tasks that a budget is certified on, and in other metrics where it is not."""
    forgotten = report.forgotten
    told = {(row.suite, row.metric, row.without) for row in forgotten.rows}
    further = (*forgotten.under_budget, *forgotten.left_out)
    found = {(row.model, row.alpha, row.suite, row.metric, row.without): row for row in further}
    for place in dict.fromkeys((row.suite, row.metric, row.without) for row in further):
        if place not in told:
            yield [found.get((*column, *place)) for column in columns]


def _cell(row: Lost | None) -> Cell:
    if row is None:
        return Cell("", MISSING, "", "", "")
    places = decimals_for(row.base if row.metric != "loss" else row.forgetting)
    number = decimal(row.forgetting, places, signed=True)
    ends = interval(row.low, row.high, places, signed=True) if row.low is not None else ""
    counts = f"{count(row.num_lost)} {noun(row.num_lost, 'records')} lost, {count(row.num_gained)} gained"
    picture = [likelihood(row.forgetting)] if row.metric == "loss" else []
    detail = "; ".join([*picture, counts, *([f"KL {decimal(row.kl, 3)} nats"] if row.kl is not None else [])])
    if row.base_at_chance and row.metric != "loss":
        return Cell("∅", number, ends, f"{detail}; {_nothing_to_lose(row)}", "")
    size = sum(abs(row.forgetting) >= tint * metric_of(row.metric).scale for tint in _TINTS)
    if row.low is None or row.high is None or row.low <= 0 <= row.high:
        return Cell("≈", number, ends, detail, "")
    if row.forgetting < 0:
        return Cell("▲", number, ends, detail, f"gain{size}")
    return Cell("▼" * max(1, size), number, ends, detail, f"loss{size}")


def _nothing_to_lose(row: Lost) -> str:
    label = metric_label(row.metric)
    return f"no {label} to lose" if row.base == 0 else f"base no better than chance ({decimal(row.chance)})"


def drift_panels(report: Report) -> dict[str, tuple[Markup, str]]:
    """Return for each method with a drift its figure and the sentence below it; all share a vertical axis."""
    drawn = {f"drift-{i}": curve for i, curve in enumerate(report.curves) if curve.drift}
    highest = max((kl for curve in drawn.values() for _, kl in curve.drift), default=0.0)
    found = {}
    for name, curve in drawn.items():
        step, last = curve.drift[-1]
        words = f"KL from the base, nats per token: {decimal(last, 3)} at step {count(step)}."
        found[curve.model] = (Markup(drift_svg(curve, highest=highest, name=name)), words)
    return found


def not_measured(report: Report) -> list[str]:
    """Return what no suite of this run speaks of, then what the certificate leaves open."""
    certificate = report.forgotten.certificate
    named = [suite_label(suite) for suite in report.forgotten.suites if suite != OTHER_TASKS]
    found = [f"Forgetting was measured on {', '.join(named)}, and on nothing else."] if named else []
    if certificate is None:
        return found
    asked = {*(budget.suite for budget in certificate.budgets), *(one.budget for one in certificate.left_out_at_chance)}
    asked |= report.untrained_tasks if OTHER_TASKS in asked else set()
    free = [suite for suite in report.forgotten.suites if suite not in asked and suite != OTHER_TASKS]
    if free:
        found.append(f"The certificate does not speak of {', '.join(map(suite_label, free))}: no budget names them.")
    if certificate.left_out_at_chance:
        found.append(left_out_words(certificate.left_out_at_chance))
    return [*found, *certificate.limits]
