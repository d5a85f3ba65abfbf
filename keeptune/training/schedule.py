"""The learning rate at a step, as a pure function: a step arrives, a factor between 0 and 1 leaves."""

from __future__ import annotations

import math
from typing import Literal

ScheduleKind = Literal["linear", "cosine", "constant_with_cooldown"]


def learning_rate_factor(
    step: int, *, num_steps: int, num_warmup_steps: int, kind: ScheduleKind, cooldown_fraction: float
) -> float:
    """Return the share of the peak learning rate that step `step` of `num_steps` uses; steps count from 1.

    No step uses a rate of 0: with W steps of warm-up, step s of them uses s / (W + 1), and step W + 1 uses the peak.
    After that `linear` and `cosine` fall over the N - W steps that are left; `constant_with_cooldown` holds the peak
    and falls over its last C = round(cooldown_fraction * N) steps, the last of which uses 1 / (C + 1).

    Source: linear and cosine as in transformers.optimization, where the warm-up's first step uses 0.
    """
    assert 1 <= step <= num_steps
    if step <= num_warmup_steps:
        return step / (num_warmup_steps + 1)
    done_fraction = (step - 1 - num_warmup_steps) / (num_steps - num_warmup_steps)
    if kind == "linear":
        return 1.0 - done_fraction
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done_fraction))
    num_cooldown_steps = min(round(cooldown_fraction * num_steps), num_steps - num_warmup_steps)
    return min(1.0, (num_steps - step + 1) / (num_cooldown_steps + 1))
