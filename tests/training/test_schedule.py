from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from keeptune.training.schedule import ScheduleKind, learning_rate_factor

factor = partial(learning_rate_factor, cooldown_fraction=0.25)


def test_linear_rises_and_falls_without_a_step_at_zero() -> None:
    values = [factor(step, num_steps=6, num_warmup_steps=2, kind="linear") for step in range(1, 7)]
    assert values == pytest.approx([1 / 3, 2 / 3, 1.0, 3 / 4, 2 / 4, 1 / 4])


def test_cosine_is_at_half_in_the_middle() -> None:
    values = [factor(step, num_steps=4, num_warmup_steps=0, kind="cosine") for step in range(1, 5)]
    assert values == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466])


def test_constant_holds_the_peak_until_the_cooldown() -> None:
    values = [factor(step, num_steps=8, num_warmup_steps=1, kind="constant_with_cooldown") for step in range(1, 9)]
    assert values == pytest.approx([0.5, 1, 1, 1, 1, 1, 2 / 3, 1 / 3])


def test_a_cooldown_of_everything_starts_after_the_warmup() -> None:
    values = [
        learning_rate_factor(s, num_steps=4, num_warmup_steps=2, kind="constant_with_cooldown", cooldown_fraction=1.0)
        for s in range(1, 5)
    ]
    assert values == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("kind", "reference"),
    [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)],
)
def test_after_the_warmup_the_factors_are_those_of_transformers(kind: ScheduleKind, reference: Any) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = reference(optimizer, num_warmup_steps=3, num_training_steps=10)
    theirs = []
    for _ in range(10):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    ours = [factor(step, num_steps=10, num_warmup_steps=3, kind=kind) for step in range(1, 11)]
    assert ours[3:] == pytest.approx(theirs[3:])


@settings(max_examples=60, deadline=None)
@given(
    num_steps=st.integers(1, 300),
    warmup_fraction=st.floats(0, 1),
    cooldown_fraction=st.floats(0.01, 1),
    kind=st.sampled_from(["linear", "cosine", "constant_with_cooldown"]),
)
def test_every_step_has_a_positive_factor_of_at_most_one(
    num_steps: int, warmup_fraction: float, cooldown_fraction: float, kind: ScheduleKind
) -> None:
    for step in range(1, num_steps + 1):
        value = learning_rate_factor(
            step,
            num_steps=num_steps,
            num_warmup_steps=int(warmup_fraction * num_steps),
            kind=kind,
            cooldown_fraction=cooldown_fraction,
        )
        assert 0.0 < value <= 1.0
