"""A method's `events.jsonl` arrives; a loss curve of bounded length leaves, with what befell the training."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from keeptune.report.reading import RunFolder, number, string, whole

MAX_POINTS = 320
# A loss in nats per token beyond this says only that the training diverged; it would flatten all the rest.
MAX_SHOWN_LOSS = 1e4
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Curve:
    """Loss in nats per target token by step. Of a long run, each train point is the mean over `steps_per_point`.

    `values` are those of `value_metric`, which selects, on validation; `tied`: the lowest loss decided among equals.
    `drift` is KL(base‖tuned) on general text in nats per token, empty where it was not measured.
    """

    model: str
    train: tuple[Point, ...]
    validation: tuple[Point, ...]
    values: tuple[Point, ...]
    value_metric: str | None
    num_steps: int
    steps_per_point: int
    num_left_out: int
    num_resumed: int
    stopped_at: int | None
    best_step: int | None
    drift: tuple[Point, ...] = ()
    tied: bool = False

    @property
    def is_empty(self) -> bool:
        """Tell whether there is nothing to draw."""
        return not self.train and not self.validation


def read_curve(folder: RunFolder, model: str) -> Curve | None:
    """Return a method's curve, None where it never began; losses that are not finite are counted and left out.

    Raises:
        StorageError: the disk refuses to read a file that exists.
    """
    if not (folder.path / model / "events.jsonl").is_file():
        folder.notes.append(f"{model}/events.jsonl: not there")
        return None
    log = _Log()
    for event in folder.lines(f"{model}/events.jsonl"):
        log.take(event)
    width = max(1, math.ceil(len(log.steps) / MAX_POINTS))
    training = folder.object(f"{model}/training.json", expected=False)
    return Curve(
        model=model,
        train=_bucketed(log.steps, log.losses, width=width),
        validation=_thinned(log.validation),
        values=_thinned(log.values),
        value_metric=log.value_metric,
        num_steps=round(max(log.steps, default=0)),
        steps_per_point=width,
        num_left_out=log.num_left_out,
        num_resumed=log.num_resumed,
        stopped_at=log.stopped_at,
        best_step=whole(training.get("best_step")),
        drift=_thinned(log.drift),
        tied=training.get("metric_moved") is False,
    )


@dataclass(slots=True)
class _Log:
    """What has been read of an `events.jsonl` so far."""

    steps: array[float] = field(default_factory=lambda: array("d"))
    losses: array[float] = field(default_factory=lambda: array("d"))
    validation: list[Point] = field(default_factory=list)
    values: list[Point] = field(default_factory=list)
    drift: list[Point] = field(default_factory=list)
    value_metric: str | None = None
    num_left_out: int = 0
    num_resumed: int = 0
    stopped_at: int | None = None

    def take(self, event: Mapping[str, Any]) -> None:
        """Add one event; kinds without a loss, and steps that are no number, add nothing to the curves."""
        kind, step = event.get("event"), number(event.get("step"))
        if kind == "resumed":
            self.num_resumed += 1
            self.stopped_at = None
        elif kind == "non_finite":
            self.stopped_at = whole(step)
        elif kind in {"step", "validation"} and step is not None and math.isfinite(step):
            self._take_loss(event, step, validation=kind == "validation")
        elif kind == "drift" and step is not None and (kl := _shown(event.get("kl"))) is not None:
            self.drift.append((step, kl))

    def _take_loss(self, event: Mapping[str, Any], step: float, *, validation: bool) -> None:
        loss, value = _shown(event.get("loss")), _shown(event.get("value"))
        if validation and value is not None:
            self.values.append((step, value))
            self.value_metric = string(event.get("metric"))
        if loss is None:
            self.num_left_out += 1
        elif validation:
            self.validation.append((step, loss))
        else:
            self.steps.append(step)
            self.losses.append(loss)


def _shown(value: object) -> float | None:
    found = number(value)
    return found if found is not None and abs(found) <= MAX_SHOWN_LOSS else None


def _bucketed(steps: array[float], losses: array[float], *, width: int) -> tuple[Point, ...]:
    """Return the mean step and the mean loss of each `width` points in a row."""
    starts = range(0, len(steps), width)
    return tuple((_mean(steps[i : i + width]), _mean(losses[i : i + width])) for i in starts)


def _mean(values: array[float]) -> float:
    return math.fsum(values) / len(values)


def _thinned(points: list[Point]) -> tuple[Point, ...]:
    """Return at most `MAX_POINTS` of the points, evenly, the last one kept."""
    width = max(1, math.ceil(len(points) / MAX_POINTS))
    return tuple(points[::-1][::width][::-1])
