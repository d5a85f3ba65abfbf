"""The trials of a search arrive; figures leave: value over learning rate, parallel coordinates, and importance."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from keeptune.report.figures import FONT_PX, GRID, INK, SERIES, draw_svg, dress
from keeptune.report.search import Searched, SearchedMethod, TrialRow
from keeptune.report.wording import metric_label

_RATE = "learning_rate"
_MOST_AXES = 6
_BAR_WIDTH = 100.0


@dataclass(frozen=True, slots=True)
class ParallelAxis:
    """An upright axis: where each trial stands on it, from 0 to 1, the numbers at its ends, and what the page says."""

    places: tuple[float, ...]
    ends: tuple[str, str]
    legend: str


@dataclass(frozen=True, slots=True)
class SearchPanel:
    """What the page shows of a method's search; `importance` holds (setting, percent of the differences)."""

    method: SearchedMethod
    colour: str
    rates: Markup | None
    parallel: Markup | None
    axes: tuple[str, ...]
    importance: tuple[tuple[str, float], ...]

    @property
    def has_drift(self) -> bool:
        """Whether the drift of a trial was measured."""
        return any(trial.drift is not None for trial in self.method.trials)


def search_panels(found: Searched) -> list[SearchPanel]:
    """Return the figures of each method, where it has trials enough to draw."""
    return [_panel(found, method, number=i) for i, method in enumerate(found.methods, 1)]


def _panel(found: Searched, method: SearchedMethod, *, number: int) -> SearchPanel:
    trials = [t for t in method.trials if t.value is not None and t.share == 1.0]
    first = [t for t in trials if not t.repeat]
    colour = SERIES[(number - 1) % len(SERIES)]
    label = metric_label(found.metric)
    rates = [t for t in trials if isinstance(t.params.get(_RATE), int | float)]
    names = [s for s in method.varied if all(s in t.params for t in trials)][:_MOST_AXES]
    axes = [_axis(s, [t.params[s] for t in first], ends=method.ends.get(s)) for s in names]
    axes.append(_axis(label, [t.value for t in first], ends=None))
    return SearchPanel(
        method,
        f"c{1 + (number - 1) % len(SERIES)}",
        Markup(rates_svg(rates, method.ends.get(_RATE), label=label, colour=colour, name=f"rates-{number}"))
        if len(rates) > 1
        else None,
        Markup(parallel_svg(found, first, axes, colour=colour, name=f"parallel-{number}"))
        if len(axes) > 2 and len(first) > 1
        else None,
        tuple(axis.legend for axis in axes),
        tuple((name, round(_BAR_WIDTH * share, 1)) for name, share in method.importance),
    )


def rates_svg(
    trials: Sequence[TrialRow], ends: tuple[float, float] | None, *, label: str, colour: str, name: str
) -> str:
    """Return each trial's value over its learning rate, whose axis shows the whole range from end to end.

    A trial is a disc, hollow for repeats, or a cross above a budget; the chosen one has a ring.
    """

    def draw(axes: Any) -> None:
        for trial in trials:
            x, y = math.log10(trial.params[_RATE]), trial.value
            marker = {"marker": "x" if trial.kept is False else "o", "markersize": 7, "linestyle": "none"}
            face = "none" if trial.repeat else colour
            axes.plot([x], [y], color=colour, markerfacecolor=face, **marker)
            if trial.chosen:
                ring = {"marker": "o", "markersize": 15, "markerfacecolor": "none", "markeredgewidth": 1.6}
                axes.plot([x], [y], color=INK, linestyle="none", **ring)
        axes.margins(0.08)
        tried = [trial.params[_RATE] for trial in trials]
        shown = [*tried, *(ends if ends is not None and ends[0] > 0.0 else ())]
        low, high = math.log10(min(shown)), math.log10(max(shown))
        margin = 0.08 * ((high - low) or 1.0)
        axes.set_xlim(low - margin, high + margin)
        dress(axes, x_label="learning rate", y_label=label)
        ticks = decade_ticks(shown)
        axes.set_xticks([math.log10(tick) for tick in ticks], [f"{tick:g}" for tick in ticks])

    return draw_svg(draw, name=name, label=f"{label} over learning rate", left_px=62)


def parallel_svg(
    found: Searched, trials: Sequence[TrialRow], uprights: Sequence[ParallelAxis], *, colour: str, name: str
) -> str:
    """Return a line a trial over its settings and its value, an upright axis each.

    The better half of the trials is drawn strong, the other pale.
    """
    columns = [axis.places for axis in uprights]
    sign = -1.0 if found.higher_is_better else 1.0
    order = sorted(range(len(trials)), key=lambda i: sign * (trials[i].value or 0.0))
    better = set(order[: math.ceil(len(order) / 2)])

    def draw(axes: Any) -> None:
        # The chosen one last, so that none covers it.
        for i in sorted(reversed(order), key=lambda i: trials[i].chosen):
            line = [column[i] for column in columns]
            looks = {"color": colour, "linewidth": 1.8 if i in better else 1.0, "alpha": 1.0 if i in better else 0.3}
            axes.plot(range(len(line)), line, **looks)
            if trials[i].chosen:
                axes.plot(range(len(line)), line, color=INK, linewidth=2.6)
        for x, upright in enumerate(uprights):
            axes.axvline(x, color=GRID, linewidth=1.0)
            for place, text in zip((-0.04, 1.04), upright.ends, strict=True):
                looks = {"ha": "center", "va": "bottom" if place > 1.0 else "top", "color": INK, "fontsize": FONT_PX}
                axes.text(x, place, text, **looks)
        axes.set_ylim(-0.16, 1.16)
        axes.set_xlim(-0.3, len(columns) - 0.7)
        dress(axes, x_label="")
        axes.set_xticks(range(len(columns)), [str(i + 1) for i in range(len(columns))])
        axes.set_yticks([])

    return draw_svg(draw, name=name, label="Settings and value of each trial", left_px=14)


def decade_ticks(values: Sequence[float]) -> list[float]:
    """Return at most six round numbers, powers of ten first, in the span of positive values."""
    low, high = math.log10(min(values)), math.log10(max(values))
    powers = range(math.floor(low), math.ceil(high) + 1)
    for steps in ((1, 2, 3, 5), (1, 3), (1,)):
        ticks = [float(f"{step}e{power}") for power in powers for step in steps]
        shown = [tick for tick in ticks if low - 0.05 <= math.log10(tick) <= high + 0.05]
        if len(shown) <= _MOST_AXES:
            return shown
    return shown[:: math.ceil(len(shown) / _MOST_AXES)]


def _axis(name: str, values: Sequence[Any], *, ends: tuple[float, float] | None) -> ParallelAxis:
    """Return the axis of these values, `ends` being those of their range.

    Numbers stand by size, by logarithm where they span a decade and are positive, others by their order as text. Text
    of a recipe's stands in the legend alone.
    """
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        names = sorted({json.dumps(value, sort_keys=True) for value in values})
        ranks = [names.index(json.dumps(value, sort_keys=True)) for value in values]
        places = tuple(rank / max(1, len(names) - 1) for rank in ranks)
        return ParallelAxis(places, ("", ""), f"{name} (from below: {', '.join(names)})")
    numbers = [float(value) for value in values]
    low, high = min([*numbers, *(ends or ())], default=0.0), max([*numbers, *(ends or ())], default=0.0)
    scale = math.log if low > 0 and high >= 10 * low else float
    span = scale(high) - scale(low)
    places = tuple((scale(number) - scale(low)) / span if span else 0.5 for number in numbers)
    return ParallelAxis(places, (f"{low:.3g}", f"{high:.3g}"), name)
