"""Curves and intervals arrive; SVG to stand inside the page leaves. The only importer of matplotlib.

The SVG carries no style attribute, no style element and no outside reference, so that the page's content security
policy can forbid all three; colours come from the page's classes, which know a light, a dark and a printed scheme.
Text from a run never enters a figure: names and legends stand in the page around it.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from keeptune.report.curves import Curve, Point

_WIDTH_PX, _HEIGHT_PX = 440, 250
_POINTS_PER_INCH = 72
_FONT_PX = 11
# Colours that only mark what is drawn; each becomes a class of the page.
_INK, _GRID, _TRAIN, _VALIDATION = "#010101", "#020202", "#030303", "#040404"
NUM_COLOURS = 6
_SERIES = tuple(f"#1010{i:02d}" for i in range(1, NUM_COLOURS + 1))
# The looks of figures that are drawn by other modules of the report.
INK, GRID, SERIES, FONT_PX = _INK, _GRID, _SERIES, _FONT_PX
_CLASSES = {_INK: "ink", _GRID: "grid", _TRAIN: "train", _VALIDATION: "valid"}
_CLASSES |= {colour: f"s{i}" for i, colour in enumerate(_SERIES, 1)}
_STROKES = ("width", "dasharray", "dashoffset", "linejoin", "linecap")
_ATTRIBUTES = frozenset({*(f"stroke-{end}" for end in _STROKES), "fill-rule", "text-anchor"})
_NAMESPACE = re.compile(r"^\{[^}]*\}")
_SMOOTH_FROM = 40


@dataclass(frozen=True, slots=True)
class Axis:
    """A horizontal axis from `low` to `high` with its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """Return where a value stands, in percent of the width, never outside."""
        share = (value - self.low) / (self.high - self.low)
        return round(100 * min(1.0, max(0.0, share)), 2)


def axis_for(
    values: Sequence[float],
    *,
    with_zero: bool = False,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    num_ticks: int = 5,
) -> Axis:
    """Return an axis that holds every finite value with some room, its ticks at 1, 2 or 5 times a power of ten.

    No tick lies beyond the `bounds` of what the values can be. Values that are all equal get the whole span of finite
    bounds.
    """
    shown = [v for v in values if math.isfinite(v) and abs(v) < 1e12] or [0.0]
    low, high = min(shown), max(shown)
    if low == high and math.isfinite(bounds[1] - bounds[0]):
        low, high = bounds
    if with_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    low, high = low - room, high + room
    rough = (high - low) / num_ticks
    power = 10.0 ** math.floor(math.log10(rough))
    tick = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first, last = math.ceil(max(low, bounds[0]) / tick), math.floor(min(high, bounds[1]) / tick)
    return Axis(low, high, tuple(round(i * tick, 12) for i in range(first, last + 1)))


def interval_svg(axis: Axis, *, low: float | None, middle: float | None, high: float | None, mark_zero: bool) -> str:
    """Return a row of an interval figure: a dot at `middle` and a line over [low, high], as wide as its cell."""
    parts = [_line(axis.place(t), axis.place(t), "grid") for t in axis.ticks]
    if mark_zero:
        parts.append(_line(axis.place(0.0), axis.place(0.0), "zero"))
    if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
        parts.append(_line(axis.place(low), axis.place(high), "span", top="50%", bottom="50%"))
    if middle is not None and math.isfinite(middle):
        parts.append(f'<circle class="dot" cx="{axis.place(middle)}%" cy="50%" r="5"/>')
    return f'<svg class="interval" height="32" aria-hidden="true" focusable="false">{"".join(parts)}</svg>'


def axis_svg(axis: Axis, *, places: int) -> str:
    """Return the tick labels below an interval figure."""
    parts = []
    for tick in axis.ticks:
        text = f"{tick:.{places}f}" if places else f"{tick:,.0f}"
        text = re.sub(r"(\.\d*?)0+$", r"\1", text).rstrip(".").replace("-", "−")
        parts.append(f'<text x="{axis.place(tick)}%" y="13" text-anchor="middle">{text}</text>')
    return f'<svg class="axis" height="18" aria-hidden="true" focusable="false">{"".join(parts)}</svg>'


def _line(x1: float, x2: float, class_: str, *, top: str = "0", bottom: str = "100%") -> str:
    return f'<line class="{class_}" x1="{x1}%" x2="{x2}%" y1="{top}" y2="{bottom}"/>'


@dataclass(frozen=True, slots=True)
class Mark:
    """A point of the frontier: what was lost and what was reached, each with the ends of its interval.

    `colour` counts from 1, 0 for what was not tuned; marks of one `colour` and `shape` are joined in their order.
    """

    lost: float
    score: float
    lost_ends: tuple[float, float] | None
    score_ends: tuple[float, float] | None
    shape: str
    colour: int
    delivered: bool = False


def frontier_svg(marks: Sequence[Mark], *, budget: float | None, name: str) -> str:
    """Return score over loss: a point with error bars a mark, the budget as a vertical line, a ring for the delivered.

    The same marks give the same bytes.
    """

    def draw(axes: Any) -> None:
        axes.axvline(0.0, color=_GRID, linewidth=1.0)
        if budget is not None:
            axes.axvline(budget, color=_INK, linewidth=1.5, linestyle=(0, (5, 3)))
            axes.annotate(
                "budget", (budget, 0.02), xycoords=("data", "axes fraction"), xytext=(4, 0),
                textcoords="offset points", color=_INK, fontsize=_FONT_PX,
            )  # fmt: skip
        for shape, colour in dict.fromkeys((mark.shape, mark.colour) for mark in marks):
            of_one = [mark for mark in marks if (mark.shape, mark.colour) == (shape, colour)]
            _draw_series(axes, of_one, colour=_SERIES[(colour - 1) % NUM_COLOURS] if colour else _INK)
        axes.margins(0.08)
        dress(axes, x_label="lost (further right: more)", y_label="score on the target")

    return draw_svg(draw, name=name, label="Score over what was lost", height_px=330, left_px=62)


def _draw_series(axes: Any, marks: Sequence[Mark], *, colour: str) -> None:
    if marks[0].colour:
        axes.plot([m.lost for m in marks], [m.score for m in marks], color=colour, linewidth=1.0, linestyle=(0, (1, 2)))
    for mark in marks:
        if mark.lost_ends is not None:
            axes.plot(mark.lost_ends, (mark.score, mark.score), color=colour, linewidth=1.2)
        if mark.score_ends is not None:
            axes.plot((mark.lost, mark.lost), mark.score_ends, color=colour, linewidth=1.2)
        axes.plot([mark.lost], [mark.score], color=colour, marker=mark.shape, markersize=7, linestyle="none")
        if mark.delivered:
            ring = {"marker": "o", "markersize": 15, "markerfacecolor": "none", "markeredgewidth": 1.6}
            axes.plot([mark.lost], [mark.score], color=_INK, linestyle="none", **ring)


def loss_limits(curves: Sequence[Curve]) -> tuple[float, float]:
    """Return the least and the greatest loss that every curve's axis shows, so that the figures compare.

    A train loss far above all others, as at the start of a training, is not given room at the others' cost.
    """
    seen = [y for curve in curves for _, y in curve.validation]
    for curve in filter(lambda c: c.train, curves):
        train = sorted(y for _, y in curve.train)
        usual = train[math.floor(0.98 * (len(train) - 1))]
        seen += [train[0], train[-1] if train[-1] <= 3 * usual else usual]
    low, high = (min(seen), max(seen)) if seen else (0.0, 1.0)
    room = (high - low) * 0.06 or max(abs(high) * 0.1, 0.1)
    return low - room, high + room


def loss_svg(curve: Curve, *, limits: tuple[float, float], name: str) -> str:
    """Return a method's loss over steps; `name` keeps the ids of several figures on a page apart.

    The same curve gives the same bytes.
    """
    return draw_svg(lambda axes: _draw(axes, curve, limits=limits), name=name, label="Loss by step")


def drift_svg(curve: Curve, *, highest: float, name: str) -> str:
    """Return a method's divergence from the base over steps, its axis from 0 to `highest` nats per token."""

    def draw(axes: Any) -> None:
        marker = "o" if len(curve.drift) <= 40 else None
        axes.plot(*zip(*curve.drift, strict=True), color=_TRAIN, linewidth=1.8, marker=marker, markersize=5)
        axes.set_ylim(0, highest * 1.06 or 1.0)
        axes.set_xlim(0, max(curve.num_steps, *(x for x, _ in curve.drift), 1) * 1.02)
        dress(axes, x_label="step", whole_steps=True)

    return draw_svg(draw, name=name, label="Divergence from the base by step", height_px=150)


def draw_svg(
    draw: Callable[[Any], None],
    *,
    name: str,
    label: str,
    height_px: int = _HEIGHT_PX,
    left_px: int = 46,
) -> str:
    """Return what `draw` draws on matplotlib's axes; `name` keeps its ids apart, `label` says what it is."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure = Figure(figsize=(_WIDTH_PX / _POINTS_PER_INCH, height_px / _POINTS_PER_INCH), dpi=_POINTS_PER_INCH)
        FigureCanvasSVG(figure)
        left, low = left_px / _WIDTH_PX, 41 / height_px
        axes = figure.add_axes((left, low, 0.98 - left, 1 - 7 / height_px - low))
        draw(axes)
        buffer = io.StringIO()
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", metadata=metadata)
    return _inline(buffer.getvalue(), name=name, label=label)


def _draw(axes: Any, curve: Curve, *, limits: tuple[float, float]) -> None:
    smooth = _running_mean(curve.train) if len(curve.train) >= _SMOOTH_FROM else curve.train
    if smooth is not curve.train:
        axes.plot(*zip(*curve.train, strict=True), color=_TRAIN, linewidth=1.0, alpha=0.3)
    if smooth:
        marker = "o" if len(smooth) == 1 else None
        axes.plot(*zip(*smooth, strict=True), color=_TRAIN, linewidth=1.8, marker=marker, markersize=5)
    if curve.validation:
        marker = "D" if len(curve.validation) <= 40 else None
        line = {"linewidth": 1.8, "linestyle": (0, (5, 2))}
        axes.plot(*zip(*curve.validation, strict=True), color=_VALIDATION, marker=marker, markersize=5, **line)
    if curve.best_step is not None:
        axes.axvline(curve.best_step, color=_INK, linewidth=1.0, linestyle=(0, (1, 2)))
    axes.set_ylim(*limits)
    axes.set_xlim(0, max(curve.num_steps, *(x for x, _ in curve.validation), curve.best_step or 0, 1) * 1.02)
    dress(axes, x_label="step", whole_steps=True)


def dress(axes: Any, *, x_label: str, y_label: str = "", whole_steps: bool = False) -> None:
    """Give axes the looks that every figure of the page has."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=whole_steps))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_xlabel(x_label, color=_INK, fontsize=_FONT_PX, labelpad=3)
    axes.set_ylabel(y_label, color=_INK, fontsize=_FONT_PX, labelpad=4)
    axes.tick_params(length=0, labelsize=_FONT_PX, labelcolor=_INK, pad=5)
    axes.grid(True, axis="y", color=_GRID, linewidth=1.0)
    axes.set_facecolor("none")
    axes.figure.set_facecolor("none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_INK)
    axes.spines["bottom"].set_linewidth(1.0)


def _running_mean(points: Sequence[Point]) -> list[Point]:
    """Return the mean of each point's neighbours, a twentieth of the curve wide; the ends use what there is."""
    half = max(1, len(points) // 40)
    found = []
    for i, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, i - half) : i + half + 1]]
        found.append((x, math.fsum(near) / len(near)))
    return found


def _inline(svg: str, *, name: str, label: str) -> str:
    """Return matplotlib's SVG as an HTML fragment whose looks are attributes and classes, not styles."""
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        parent.tag = _NAMESPACE.sub("", parent.tag)
        for child in list(parent):
            if _NAMESPACE.sub("", child.tag) in {"metadata", "style"}:
                parent.remove(child)
    referenced = {i for e in root.iter() for v in e.attrib.values() for i in re.findall(r"#([\w.-]+)", v)}
    for element in root.iter():
        element.attrib = _plain_attributes(element.attrib, referenced=referenced, name=name)
        element.text = element.text.strip() if element.text else None
        element.tail = None
        if element.tag == "path":
            element.set("d", " ".join(element.get("d", "").split()))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib.update({"class": "curve", "role": "img", "aria-label": label, "focusable": "false"})
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _plain_attributes(attributes: dict[str, str], *, referenced: set[str], name: str) -> dict[str, str]:
    found: dict[str, str] = {}
    classes: list[str] = []
    for key, value in attributes.items():
        key = _NAMESPACE.sub("", key)
        if key == "style":
            for declaration in filter(None, (d.strip() for d in value.split(";"))):
                prop, _, setting = (part.strip() for part in declaration.partition(":"))
                classes += _paint(prop, setting, found)
        elif key != "id":
            found[key] = re.sub(r"#([\w.-]+)", rf"#{name}-\1", value)
        elif value in referenced:
            found["id"] = f"{name}-{value}"
    if classes:
        found["class"] = " ".join(classes)
    return found


def _paint(prop: str, setting: str, attributes: dict[str, str]) -> list[str]:
    """Turn one style declaration into an attribute, or return the class that stands for its colour."""
    if prop in {"fill", "stroke"} and setting in _CLASSES:
        return [f"{prop}-{_CLASSES[setting]}"]
    if prop == "fill-opacity" and float(setting) == 0:
        attributes["fill"] = "none"
        return []
    if prop in {"stroke-opacity", "fill-opacity", "opacity"}:
        return ["pale"]
    if prop in _ATTRIBUTES or (prop in {"fill", "stroke"} and setting == "none"):
        attributes[prop] = setting
    if prop == "font-size":
        attributes[prop] = setting.removesuffix("px")
    return []
