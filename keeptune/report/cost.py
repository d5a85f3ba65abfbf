"""Each method's `training.json` arrives; what it cost, and what was said of its memory beforehand, leave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from keeptune.report.reading import RunFolder, finite, mapping, string, whole


@dataclass(frozen=True, slots=True)
class MemoryByKind:
    """Bytes at the peak of a training as estimated before it; the measured peak is held against `total`."""

    weights: int | None
    gradients: int | None
    optimizer: int | None
    activations: int | None
    runtime: int | None
    total: int | None


@dataclass(frozen=True, slots=True)
class Cost:
    """What a method cost; bytes, seconds and counts as measured by the run.

    `estimated_memory_bytes` were said before the training; runs of older versions have none.
    """

    model: str
    peft_type: str | None
    learning_rate: float | None
    trained_parameters: int | None
    total_parameters: int | None
    peak_memory_bytes: int | None
    estimated_memory_bytes: MemoryByKind | None
    train_seconds: float | None
    tokens_per_second: float | None
    artifact_bytes: int | None
    num_steps: int | None
    best_step: int | None
    num_train_tokens: int | None
    num_target_tokens: int | None
    device: str | None
    dtype: str | None
    stopped_early: bool


def read_costs(folder: RunFolder, methods: Sequence[str]) -> Iterator[Cost]:
    """Yield the cost of each method that was trained to the end."""
    for name in methods:
        value = folder.object(f"{name}/training.json")
        if not value:
            continue
        yield Cost(
            model=name,
            peft_type=string(value.get("peft_type")),
            learning_rate=finite(value.get("learning_rate")),
            trained_parameters=whole(value.get("trained_parameters")),
            total_parameters=whole(value.get("total_parameters")),
            peak_memory_bytes=whole(value.get("peak_memory_bytes")),
            estimated_memory_bytes=_memory(value.get("estimated_memory_bytes")),
            train_seconds=finite(value.get("train_seconds")),
            tokens_per_second=finite(value.get("tokens_per_second")),
            artifact_bytes=whole(value.get("artifact_bytes")),
            num_steps=whole(value.get("num_steps")),
            best_step=whole(value.get("best_step")),
            num_train_tokens=whole(value.get("num_train_tokens")),
            num_target_tokens=whole(value.get("num_target_tokens")),
            device=string(value.get("device")),
            dtype=string(value.get("dtype")),
            stopped_early=value.get("stopped_early") is True,
        )


def _memory(value: Any) -> MemoryByKind | None:
    kinds = mapping(value)
    if not kinds:
        return None
    return MemoryByKind(**{field.name: whole(kinds.get(field.name)) for field in fields(MemoryByKind)})
