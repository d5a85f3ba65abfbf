"""`events.jsonl`, what happened in a training: one record at a time arrives, one line of JSON each leaves."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keeptune.errors import CheckpointError
from keeptune.storage import storage_errors, write_atomic
from keeptune.text.mixture import Share


@dataclass(frozen=True, slots=True)
class RunEvent:
    """The arithmetic of the run; examples and tokens are those of one epoch, of a mixture the first.

    `mixture` is what an epoch shows of each source, where that is not every example once.
    """

    num_examples: int
    num_validation_examples: int
    num_tokens: int
    num_targets: int
    num_epochs: int
    num_steps: int
    num_warmup_steps: int
    tokens_per_step: int
    tokens_per_micro_batch: int
    layout: str
    learning_rate: float
    seed: int
    mixture: tuple[Share, ...] = ()


@dataclass(frozen=True, slots=True)
class StepEvent:
    """One update; `loss` is in nats per target token, `grad_norm` that before clipping.

    `l2_penalty` is l2_base · ‖θ - θ0‖² before the update, where that is part of the objective; no part of `loss`.
    Nor is `orthogonality`, the term that AdaLoRA adds to the objective.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    num_targets: int
    record_ids_sha256: str
    elapsed_seconds: float
    l2_penalty: float | None = None
    orthogonality: float | None = None


@dataclass(frozen=True, slots=True)
class ValidationEvent:
    """A validation; `metric` names what `value` is, both null where only the loss was taken."""

    step: int
    epoch: float
    loss: float
    metric: str | None
    value: float | None


@dataclass(frozen=True, slots=True)
class DriftEvent:
    """How far the model is from the base model: KL(base‖model) on the probe, in nats per target token."""

    step: int
    epoch: float
    kl: float


@dataclass(frozen=True, slots=True)
class ResumedEvent:
    """The run went on from this step; `quarantined` names the checkpoints that could not be used."""

    step: int
    quarantined: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NonFiniteEvent:
    """The step that was not taken, and every record in it that may be the cause."""

    step: int
    record_ids: tuple[str, ...]


class EventLog:
    """An append-only file of JSON lines; each is whole and readable by others as soon as it is appended."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, event: str, record: Any, /) -> None:
        """Add one line: the event's name, then the fields of a dataclass. A float that is not finite becomes null.

        A field that has a default, and holds it, is left out.

        Raises:
            StorageError: the disk refuses.
        """
        values = dataclasses.asdict(record)
        said = [field.name for field in dataclasses.fields(record) if values[field.name] != field.default]
        fields = {"event": event, **_without_non_finite({name: values[name] for name in said})}
        line = json.dumps(fields, ensure_ascii=False, allow_nan=False) + "\n"
        with storage_errors(self._path), self._path.open("ab") as file:
            file.write(line.encode("utf-8", "surrogatepass"))

    def sync(self) -> None:
        """Return when every line is on the disk itself, so that a checkpoint never knows more than the log."""
        with storage_errors(self._path), self._path.open("ab") as file:
            os.fsync(file.fileno())

    def clear(self) -> None:
        """Make the file new and empty."""
        write_atomic(self._path, "")

    def truncate_after(self, step: int, *, without: Collection[str] = ()) -> None:
        """Take back every line about a later step, the run's end, and a line that was cut while it was written.

        Lines of the kinds in `without` about `step` itself are taken back too: what they tell will be done again.

        Raises:
            CheckpointError: the steps up to `step` are not all there.
            StorageError: the disk refuses.
        """
        kept: list[bytes] = []
        steps: list[int] = []
        with storage_errors(self._path):
            lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
        for line in lines:
            event = _parsed(line)
            if event is None:
                break
            later = event.get("step", 0) > step or (event.get("step") == step and event["event"] in without)
            if event["event"] == "finished" or later:
                continue
            kept.append(line)
            if event["event"] == "step":
                steps.append(event["step"])
        if steps != list(range(1, step + 1)):
            raise CheckpointError(
                f"{self._path}: found {len(steps)} of {step} steps; expected the log of every step up to the last "
                f"checkpoint. Put the file back, or remove {self._path.parent} to train from the start."
            )
        write_atomic(self._path, b"".join(kept))


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return the event on a line, or None where a crash left something else."""
    if not line.endswith(b"\n"):
        return None
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_event = isinstance(event, dict) and "event" in event and isinstance(event.get("step", 0), int)
    return event if is_event else None


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_non_finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_non_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
