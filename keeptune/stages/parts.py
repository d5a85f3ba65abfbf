"""Suites that must not be forgotten: a recipe arrives; which share of each is set aside for what leaves."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import numpy as np

from keeptune.config import Recipe
from keeptune.data.record import OTHER_TASKS, PartName, SplitName
from keeptune.data.split import key_text, part_name

if TYPE_CHECKING:
    from keeptune.data.disk import Records
    from keeptune.data.prepare import Prepared

# What is not reported on of a suite under a budget: a search looks at the probe, a certificate at the rest.
_UNREPORTED_SHARE = 0.6
# Of texts, on which a training measures its drift.
_TEXT_PROBE_SHARE = 0.2
# Of a suite that is trained on again.
_REPLAY_SHARE = 0.3


def divided(recipe: Recipe, prepared: Prepared) -> dict[SplitName | PartName, Records]:
    """Return the records of each split, those of suites under a budget or of replay divided into parts by group."""
    by_split: dict[SplitName | PartName, Records] = {**prepared.records}
    shares = {task: part_shares(recipe, task) for task in prepared.audit.untrained_tasks}
    if not any(shares.values()):
        return by_split
    test = prepared.records["test"]
    places: dict[SplitName | PartName, array[int]] = {"test": array("q")}
    for i, record in enumerate(test):
        part = None
        if shares.get(record.task):
            part = part_name(key_text(prepared.test_groups[i]), seed=recipe.seed, shares=shares[record.task])
        places.setdefault(part or "test", array("q")).append(i)
    by_split.update({part: test.at(np.array(rows, np.int64)) for part, rows in places.items()})
    return by_split


def part_shares(recipe: Recipe, suite: str) -> dict[PartName, float]:
    """Return the expected share of each part of a suite; what is left, all without a budget, is reported on."""
    retention = recipe.retention
    is_task = any(task.name == suite for task in recipe.data.tasks)
    is_text = any(text.name == suite for text in retention.texts)
    probe = retention.probe_fraction if is_task else _TEXT_PROBE_SHARE if is_text else 0.0
    other = OTHER_TASKS if is_task else suite
    shares: dict[PartName, float] = {"replay": _REPLAY_SHARE} if retention.replay in (suite, other) else {}
    if retention.budget.keys() & {suite, other}:
        rest = 1.0 - sum(shares.values())
        shares |= {"probe": probe * rest} if probe else {}
        shares |= {"certify": (_UNREPORTED_SHARE - probe) * rest}
    return shares
