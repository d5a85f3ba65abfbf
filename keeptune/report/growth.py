"""`curve.json` arrives; each method's scores by number of train records, and what more of them would bring, leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from keeptune.report.figures import INK, SERIES, draw_svg, dress
from keeptune.report.reading import RunFolder, finite, mapping, rows, string, whole
from keeptune.report.search import Context, read_context
from keeptune.report.search_figures import decade_ticks
from keeptune.report.wording import decimals_for, metric_label

GROWTH = "curve/curve.json"
_HELP, _CHANCE, _UNKNOWN = "help", "chance", "unknown"
_VERDICTS = {
    _HELP: "more records of this kind help {}",
    _CHANCE: "more records bring {} no gain that stands out from chance",
    _UNKNOWN: "nothing can be foretold of {}",
}


@dataclass(frozen=True, slots=True)
class SizeRow:
    """The scores of trainings on equally many records, one a seed."""

    num_records: int
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return math.fsum(self.values) / len(self.values)


@dataclass(frozen=True, slots=True)
class GrownMethod:
    """A method's scores, the smallest number of records first; `line` holds (n, score, low, high) of the law."""

    name: str
    sizes: tuple[SizeRow, ...]
    line: tuple[tuple[float, float, float, float], ...]
    doubling: tuple[int, float, float, float] | None
    sentence: str
    verdict: str
    failed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Growth:
    """What was learned from how many records."""

    metric: str
    higher_is_better: bool
    num_validation_records: int | None
    methods: tuple[GrownMethod, ...]
    context: Context

    @property
    def headline(self) -> str:
        """The sentence on the one method, or which methods more records help."""
        if len(self.methods) < 2:
            return next((method.sentence for method in self.methods), "No training yet.")
        names = {key: [m.name for m in self.methods if m.verdict == key] for key in _VERDICTS}
        said = "; ".join(_VERDICTS[key].format(" and ".join(found)) for key, found in names.items() if found)
        return f"{said[0].upper()}{said[1:]}."

    @property
    def is_logarithmic(self) -> bool:
        """Whether scores, all above 0, span a decade, as losses do: by their logarithm the small ones are seen too."""
        low, high = self.span
        return not self.higher_is_better and low > 0.0 and high >= 10.0 * low

    @property
    def span(self) -> tuple[float, float]:
        """The lowest and the highest score of all methods, foretold ones among them."""
        values = [value for m in self.methods for row in m.sizes for value in row.values]
        values += [value for m in self.methods for value in (m.doubling or ())[1:]]
        return min(values, default=0.0), max(values, default=1.0)


@dataclass(frozen=True, slots=True)
class GrowthPanel:
    """A method with its figure."""

    method: GrownMethod
    colour: str
    figure: Markup | None


def read_growth(folder: RunFolder, *, name: str = GROWTH) -> Growth | None:
    """Return the learning curve in a folder; None where there is none."""
    value = folder.object(name, expected=False)
    metric = string(value.get("metric"))
    if metric is None:
        return None
    higher = value.get("higher_is_better") is True
    methods = tuple(
        _method(name, mapping(found), metric=metric, higher=higher)
        for name, found in mapping(value.get("methods")).items()
    )
    return Growth(metric, higher, whole(value.get("num_validation_records")), methods, read_context(value))


def _method(name: str, value: Mapping[str, Any], *, metric: str, higher: bool) -> GrownMethod:
    by_size: dict[int, list[float]] = {}
    for row in rows(value.get("measured")):
        number, score = whole(row.get("num_records")), finite(row.get("value"))
        if number is not None and score is not None:
            by_size.setdefault(number, []).append(score)
    sizes = tuple(SizeRow(number, tuple(values)) for number, values in sorted(by_size.items()))
    law = mapping(value.get("law"))
    doubling = mapping(law.get("doubling"))
    ends = [finite(doubling.get(key)) for key in ("value", "low", "high")]
    number = whole(doubling.get("num_records"))
    known = number is not None and None not in ends and law.get("fits") is True
    failed = tuple(f"{row.get('name')}: {row.get('reason')}" for row in rows(value.get("failed")))
    sentence, verdict = _sentence(name, sizes, law, metric=metric, higher=higher)
    return GrownMethod(
        name,
        sizes,
        tuple(_line(law.get("line"))) if law.get("fits") is True else (),
        (number, *ends) if known else None,  # pyright: ignore[reportArgumentType]
        sentence,
        verdict,
        failed,
    )


def _line(value: Any) -> Iterator[tuple[float, float, float, float]]:
    for point in value if isinstance(value, list) else ():
        match [finite(part) for part in point] if isinstance(point, list) else []:
            case [float(n), float(score), float(low), float(high)]:
                yield n, score, low, high


def _sentence(
    name: str, sizes: tuple[SizeRow, ...], law: Mapping[str, Any], *, metric: str, higher: bool
) -> tuple[str, str]:
    """Return what the next doubling would bring and whether that is worth it, in words, and the verdict alone.

    Both ends of the gain are those of the law.
    """
    doubling, fits = mapping(law.get("doubling")), law.get("fits") is True
    numbers = [finite(doubling.get(key)) for key in ("num_records", "value", "gain", "gain_low", "gain_high")]
    if not sizes or None in numbers:
        return f"{name}: too few trainings came to their end to say what more records would bring.", _UNKNOWN
    number, value, gain, low, high = (float(found or 0.0) for found in numbers)
    mean = sizes[-1].mean
    so_far = f"{name}: {metric_label(metric)} {mean:.{decimals_for(mean)}f} after {sizes[-1].num_records:,} records"
    if not fits:
        said = "the scores follow no power law, so that nothing is foretold. Try more numbers of records."
        return f"{so_far}; {said}", _UNKNOWN
    places = decimals_for(gain) if gain else 3
    before = value - gain if higher else value + gain
    brings = f"{gain:+.{places}f} (95 % interval {low:+.{places}f} to {high:+.{places}f})"
    said = f"{so_far}; by the law {before:.{places}f}, and {value:.{places}f} after {int(number):,}, better by {brings}"
    # Of a curve from before this was told it is not known.
    untested = law.get("tested") is False
    doubt = " Three numbers of records cannot show that the law is wrong: try a fourth." if untested else ""
    if low > 0.0:
        return f"{said}: more records of this kind help.{doubt}", _HELP
    worth = "no gain that stands out from chance, so more records of this kind are not worth much."
    return f"{said}: {worth}{doubt}", _CHANCE


def growth_panels(found: Growth) -> list[GrowthPanel]:
    """Return each method's figure: scores, the law with its interval, and the next doubling."""
    panels = []
    for number, method in enumerate(found.methods):
        colour = SERIES[number % len(SERIES)]
        figure = growth_svg(found, method, colour=colour, name=f"growth-{number}") if method.sizes else None
        panels.append(GrowthPanel(method, f"c{1 + number % len(SERIES)}", Markup(figure) if figure else None))
    return panels


def growth_svg(found: Growth, method: GrownMethod, *, colour: str, name: str) -> str:
    """Return a method's score over the number of train records, whose axis doubles from tick to tick.

    All methods have the same axis of scores.
    """
    ends, height, label = found.span, _height(found), metric_label(found.metric)
    margin = 0.08 * (height(ends[1]) - height(ends[0]))

    def draw(axes: Any) -> None:
        for row in method.sizes:
            x = [math.log2(row.num_records)] * len(row.values)
            axes.plot(
                x, [height(value) for value in row.values], color=colour, marker="o", markersize=6, linestyle="none"
            )
        if method.line:
            x = [math.log2(point[0]) for point in method.line]
            axes.plot(x, [height(point[1]) for point in method.line], color=colour, linewidth=1.6)
            for end in (2, 3):
                axes.plot(
                    x, [height(point[end]) for point in method.line], color=colour, linewidth=1.0, linestyle=(0, (1, 2))
                )
        if method.doubling is not None:
            number, value, low, high = method.doubling
            x = math.log2(number)
            axes.plot([x, x], [height(low), height(high)], color=INK, linewidth=2.0, marker="_", markersize=9)
            axes.plot(
                [x], [height(value)], color=INK, marker="o", markersize=7, markerfacecolor="none", linestyle="none"
            )
        axes.margins(0.08)
        axes.set_ylim(height(ends[0]) - margin, height(ends[1]) + margin)
        dress(axes, x_label="train records", y_label=label)
        if found.is_logarithmic:
            heights = decade_ticks(ends)
            axes.set_yticks([height(tick) for tick in heights], [f"{tick:g}" for tick in heights])
        ticks = [row.num_records for row in method.sizes] + ([method.doubling[0]] if method.doubling else [])
        axes.set_xticks([math.log2(tick) for tick in ticks], [f"{tick:,}" for tick in ticks])

    return draw_svg(draw, name=name, label=f"{label} over train records", left_px=62)


def _height(found: Growth) -> Callable[[float], float]:
    """Return where a score stands on its axis."""
    least = found.span[0] / 10.0
    return (lambda value: math.log10(max(value, least))) if found.is_logarithmic else (lambda value: value)
