"""Figures: the same input gives the same bytes, and nothing in them needs a style or the outside."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keeptune.report.curves import Curve
from keeptune.report.figures import Axis, axis_for, axis_svg, interval_svg, loss_limits, loss_svg


def curve(num_steps: int = 60, *, name: str = "lora", level: float = 2.0) -> Curve:
    train = tuple((float(i), level + 1 / i) for i in range(1, num_steps + 1))
    return Curve(name, train, ((num_steps, level),), (), None, num_steps, 1, 0, 0, None, num_steps)


def test_the_same_curve_gives_the_same_bytes() -> None:
    limits = loss_limits([curve()])
    assert loss_svg(curve(), limits=limits, name="curve-0") == loss_svg(curve(), limits=limits, name="curve-0")


def test_a_figure_has_no_style_and_no_reference_outside_itself() -> None:
    svg = loss_svg(curve(), limits=(0.0, 4.0), name="curve-0")
    root = ElementTree.fromstring(svg)
    ids = {element.get("id") for element in root.iter()} - {None}
    assert not [e.tag for e in root.iter() if e.tag in {"style", "script", "image", "metadata", "foreignObject"}]
    for element in root.iter():
        assert "style" not in element.attrib
        for key, value in element.attrib.items():
            assert "http" not in value
            assert all(target in ids for target in re.findall(r"url\(#([^)]+)\)", value)), value
            assert key != "href" or value.removeprefix("#") in ids
    assert "xmlns" not in svg


def test_ids_of_two_figures_differ() -> None:
    first, second = (set(re.findall(r'id="([^"]+)"', loss_svg(curve(), limits=(0, 4), name=n))) for n in ("a", "b"))
    assert first and not first & second


def test_every_colour_comes_from_the_page() -> None:
    svg = loss_svg(curve(), limits=(0.0, 4.0), name="c")
    assert not re.search(r"#[0-9a-f]{6}", svg)
    assert {"stroke-train", "stroke-valid", "stroke-grid", "fill-ink"} <= set(re.findall(r"[a-z]+-[a-z]+", svg))


@pytest.mark.parametrize("num_steps", [0, 1, 2, 39, 40])
def test_a_curve_of_any_length_is_drawn(num_steps: int) -> None:
    drawn = curve(num_steps)
    assert loss_svg(drawn, limits=loss_limits([drawn]), name="c").startswith("<svg ")


def test_all_curves_share_limits_that_a_high_start_does_not_stretch() -> None:
    start = Curve(
        "x", ((1.0, 900.0), *((float(i), 2.0) for i in range(2, 102))), (), (), None, 101, 1, 0, 0, None, None
    )
    low, high = loss_limits([start, curve()])
    assert low < 2.0 < 3.0 <= high < 10


def test_no_curve_still_has_limits() -> None:
    assert loss_limits([]) == (-0.06, 1.06)


def test_an_interval_is_drawn_at_its_percent_of_the_axis() -> None:
    axis = Axis(0.0, 2.0, (1.0,))
    svg = interval_svg(axis, low=0.5, middle=1.0, high=1.5, mark_zero=False)
    assert '<line class="span" x1="25.0%" x2="75.0%" y1="50%" y2="50%"/>' in svg
    assert '<circle class="dot" cx="50.0%" cy="50%" r="5"/>' in svg
    assert "span" not in interval_svg(axis, low=None, middle=float("nan"), high=1.0, mark_zero=True)


def test_ticks_are_round_numbers() -> None:
    assert axis_for([0.109, 0.465]).ticks == (0.1, 0.2, 0.3, 0.4)
    assert axis_svg(Axis(-1.0, 1.0, (-0.5, 0.0)), places=2).count("−0.5") == 1


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=6), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_values_have_an_axis_that_holds_them(values: list[float], with_zero: bool) -> None:
    axis = axis_for(values, with_zero=with_zero)
    assert axis.low < axis.high
    assert len(axis.ticks) <= 12
    assert all(0 <= axis.place(v) <= 100 for v in values if v == v)


def test_scores_that_are_all_zero_have_the_axis_of_their_metric() -> None:
    axis = axis_for([0.0, 0.0], bounds=(0.0, 1.0))
    assert axis.ticks == (0.0, 0.5, 1.0)
    assert axis.place(0.0) < 10 and axis.place(1.0) > 90
    assert axis_for([0.02, 0.0], bounds=(0.0, 1.0)).ticks[0] == 0.0
    assert axis_for([100.0, 99.0], bounds=(0.0, 100.0)).ticks[-1] == 100.0
    assert axis_for([0.3, 0.3]).ticks[0] > 0.25
