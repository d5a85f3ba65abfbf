"""Suites that must not be forgotten: a recipe arrives; which share of each is set aside for what leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from keeptune.config import Recipe
from keeptune.data.record import OTHER_TASKS, SPLIT_NAMES, PartName, Record, SplitName
from keeptune.data.split import part_name

if TYPE_CHECKING:
    from keeptune.data.prepare import Prepared

# Of a suite that a certificate is made from; the rest is reported on.
_PROBE_SHARE, _CERTIFY_SHARE = 0.2, 0.4
# Of a suite that is trained on again.
_REPLAY_SHARE = 0.3


def divided(recipe: Recipe, prepared: Prepared) -> dict[SplitName | PartName, Sequence[Record]]:
    """Return the records of each split, those of suites under a budget or of replay divided into parts by group."""
    by_split: dict[SplitName | PartName, list[Record]] = {split: [] for split in SPLIT_NAMES}
    by_split["train"], by_split["validation"] = list(prepared.records["train"]), list(prepared.records["validation"])
    for record in prepared.records["test"]:
        group = prepared.groups.get(record.id)
        shares = part_shares(recipe, record.task) if group is not None else {}
        part = part_name(group, seed=recipe.seed, shares=shares) if group is not None else None
        by_split.setdefault(part or "test", []).append(record)
    return dict(by_split)


def part_shares(recipe: Recipe, suite: str) -> dict[PartName, float]:
    """Return the expected share of each part of a suite; what is left, all without a budget, is reported on."""
    retention = recipe.retention
    other = OTHER_TASKS if any(task.name == suite for task in recipe.data.tasks) else suite
    shares: dict[PartName, float] = {"replay": _REPLAY_SHARE} if retention.replay in (suite, other) else {}
    if retention.budget.keys() & {suite, other}:
        rest = 1.0 - sum(shares.values())
        shares |= {"probe": _PROBE_SHARE * rest, "certify": _CERTIFY_SHARE * rest}
    return shares
