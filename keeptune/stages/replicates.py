"""Find models that differ by the seed of their training alone: replicates, not rivals."""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from keeptune.recipe_text import read_yaml
from keeptune.stages.entries import Entry


@dataclass(frozen=True, slots=True)
class Replicates:
    """One method trained with several seeds: `members` holds (model, seed), in the order of the comparison."""

    name: str
    members: tuple[tuple[str, int], ...]


def find_replicates(entries: Sequence[Entry]) -> list[Replicates]:
    """Return the methods that several runs trained alike but for the seed.

    Raises:
        RecipeError: the recipe in a run folder is damaged.
    """
    found: dict[str, list[tuple[Entry, int]]] = {}
    for entry in entries:
        alike, seed = _without_seed(entry)
        if seed is not None:
            found.setdefault(alike, []).append((entry, seed))
    groups = [of_one for of_one in found.values() if len({seed for _, seed in of_one}) == len(of_one) > 1]
    names = [of_one[0][0].folder.name for of_one in groups]
    return [
        Replicates(
            # Two recipes may have a method of one name: then the first run tells them apart.
            name=(of_one[0][0].name if names.count(name) > 1 else name) + f" over {len(of_one)} seeds",
            members=tuple((entry.name, seed) for entry, seed in of_one),
        )
        for name, of_one in zip(names, groups, strict=True)
    ]


def differ_by_seed(one: Entry, other: Entry) -> bool:
    """Return whether two models were trained alike but for the seed.

    Raises:
        RecipeError: the recipe in a run folder is damaged.
    """
    (alike, seed), (alike_other, seed_other) = _without_seed(one), _without_seed(other)
    return None not in (seed, seed_other) and alike == alike_other and seed != seed_other


def _without_seed(entry: Entry) -> tuple[str, int | None]:
    """Return all that a model was trained by but the seed, and the seed; None for it where a run trained no model."""
    # Neither the base nor the delivered model was trained by itself.
    if entry.run is None or not (entry.folder / "training.json").is_file():
        return "", None
    path = entry.run / "recipe.yaml"
    recipe = read_yaml(path) if path.is_file() else {}
    methods, seed = recipe.pop("methods", None), recipe.pop("seed", None)
    recipe.pop("output_dir", None)
    own = methods.get(entry.folder.name) if isinstance(methods, dict) else None
    alike = json.dumps([entry.folder.name, own, recipe], sort_keys=True, default=str)
    return alike, seed if isinstance(seed, int) else None


def pairs_apart(replicates: Sequence[Replicates]) -> set[frozenset[str]]:
    """Return the pairs of models that are not compared: replicates, and models of two groups with different seeds."""
    seeds = {model: seed for group in replicates for model, seed in group.members}
    group_of = {model: group.name for group in replicates for model, _ in group.members}
    return {
        frozenset((one, other))
        for one, other in combinations(seeds, 2)
        if group_of[one] == group_of[other] or seeds[one] != seeds[other]
    }


def replicates_to_json(replicates: Sequence[Replicates], scores: Collection[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return each group with the mean and the spread of its scores over the seeds, by task and metric."""
    means = {(s["model"], s["task"], s["metric"]): s["mean"] for s in scores}
    found = []
    for group in replicates:
        models = [model for model, _ in group.members]
        rows = []
        for task, metric in dict.fromkeys((s["task"], s["metric"]) for s in scores if s["model"] == models[0]):
            values = [means.get((model, task, metric)) for model in models]
            known = [value for value in values if value is not None]
            if len(known) == len(models):
                rows.append(
                    {
                        "task": task,
                        "metric": metric,
                        "mean": statistics.fmean(known),
                        "standard_deviation": statistics.stdev(known),
                        "lowest": min(known),
                        "highest": max(known),
                    }
                )
        found.append({"name": group.name, "models": models, "seeds": [s for _, s in group.members], "scores": rows})
    return found
