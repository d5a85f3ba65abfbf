"""Loss curves arrive; figures leave, each with the sentences that go with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from keeptune.progress import noun
from keeptune.report.figures import loss_limits, loss_svg
from keeptune.report.layout import colours
from keeptune.report.tables import Report
from keeptune.report.wording import count, decimal, decimals_for, metric_label


@dataclass(frozen=True, slots=True)
class CurvePanel:
    """A method's loss curve with the sentence that goes with it."""

    model: str
    colour: str
    figure: Markup
    caption: str


def curve_panels(report: Report) -> list[CurvePanel]:
    """Return a loss figure for every method that logged a loss, all with the same vertical axis."""
    drawn = [curve for curve in report.curves if not curve.is_empty]
    limits = loss_limits(drawn)
    return [
        CurvePanel(
            model=curve.model,
            colour=colours(report)[curve.model],
            figure=Markup(loss_svg(curve, limits=limits, name=f"curve-{i}")),
            caption=" ".join(_curve_sentences(report, i)),
        )
        for i, curve in enumerate(report.curves)
        if not curve.is_empty
    ]


def _curve_sentences(report: Report, index: int) -> Sequence[str]:
    curve = report.curves[index]
    found = [f"{count(curve.num_steps)} {noun(curve.num_steps, 'steps')}."]
    if curve.best_step is not None:
        found.append(f"The weights of step {count(curve.best_step)} (dotted) are kept.")
    if curve.values and curve.value_metric:
        places = decimals_for(curve.values[-1][1])
        first, last = (decimal(curve.values[i][1], places) for i in (0, -1))
        found.append(f"{metric_label(curve.value_metric)} on validation: {first} at first, {last} at last.")
    if curve.steps_per_point > 1:
        found.append(f"Each point is the mean of {count(curve.steps_per_point)} steps.")
    if curve.num_left_out:
        values = noun(curve.num_left_out, "values")
        found.append(f"{count(curve.num_left_out)} {values} left out: not finite, or beyond the axis.")
    if curve.num_resumed:
        found.append(f"Resumed {count(curve.num_resumed)} {noun(curve.num_resumed, 'times')}.")
    if curve.stopped_at is not None:
        found.append(f"Stopped before step {count(curve.stopped_at)}: loss or gradient not finite.")
    if report.cost(curve.model) is None:
        found.append("This training has not finished.")
    return found
