"""How often a certified model loses more than its budget in truth, beside a model chosen from the same figures naively.

    python benchmarks/certificate.py [--out FOLDER] [--runs 40] [--first 0]
    python benchmarks/certificate.py --tables

Each run draws one of the lab's tasks that its model does not know, 200 of its records, a method, a learning rate and
retention records, and goes through the stages of `keeptune run` with a budget of 2 points. The truth is what the model
lost on 20,000 fresh records of the same tasks. The naive choice is the point with the lowest test loss on the target
among those whose measured loss is within the budget. Runs that stand in `--out` or in the results are not made again;
two processes may make different ones at once. Results: `benchmarks/results/certificate.json`; docs/certificate.md shows
them.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import yaml
from scipy.stats import beta
from torch import nn

from keeptune import stages
from keeptune.config import load_recipe
from keeptune.data.record import OTHER_TASKS, SplitName
from keeptune.evaluation.evaluate import Split, read_answers
from keeptune.lab.folder import write_lab
from keeptune.lab.tasks import SPAN_SENTENCE, TASKS, LabTask, examples, write_task
from keeptune.lab.world import make_world
from keeptune.model.loss import target_logits
from keeptune.model.modes import evaluating
from keeptune.progress import Silent
from keeptune.stages.data import Data, evaluation_split
from keeptune.stages.methods import method_of
from keeptune.stages.retention import answer
from keeptune.stages.way import BASE, TEST, ZERO_SHOT, load_base, open_way
from keeptune.storage import read_json, write_json, write_jsonl
from keeptune.text.batches import NOT_TRAINED, pad
from keeptune.text.table import Table
from keeptune.text.tokens import Example

RESULTS = Path(__file__).parent / "results" / "certificate.json"
WORLD = make_world()
BUDGET = 0.02
ALPHAS = (0.25, 0.5, 0.75, 1.0)
NUM_TRAIN = 200
# Two fifths of the retained records are the certify part and two fifths the report part: about 640 each.
NUM_RETAINED = 400
NUM_FRESH, FRESH_SEED = 20_000, 1_000_000
RETAINED = ("translation", "sums", "tense", "sorting")
TARGETS = (SPAN_SENTENCE, *(task for task in TASKS if task.held_out))
# Each method with the range over which its learning rate is drawn, evenly in its logarithm.
METHODS: tuple[tuple[dict[str, Any], tuple[float, float]], ...] = (
    ({}, (1e-4, 2e-3)),
    ({"peft_type": "LORA", "r": 16, "lora_alpha": 32}, (5e-4, 1e-2)),
    ({"peft_type": "LORA", "r": 4, "lora_alpha": 8}, (5e-4, 1e-2)),
    ({"peft_type": "IA3"}, (3e-3, 5e-2)),
)
CONTEXT = stages.Context(progress=Silent(), stop_requested=lambda: False, command="benchmark", now=lambda: "")


def write_rows(task: LabTask, path: Path, *, count: int, seed: int) -> None:
    """Write rows of a task that no lab model was trained on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, islice(examples(task, WORLD, split="test", seed=seed), count))


def recipe(lab: Path, folder: Path, *, seed: int) -> dict[str, Any]:
    """Write a run's data and return its recipe; everything that varies is drawn from `seed`."""
    rng = Random(seed)
    target, (arguments, rates) = rng.choice(TARGETS), rng.choice(METHODS)
    counts: dict[SplitName, int] = {"train": NUM_TRAIN, "validation": 100, "test": 100}
    write_task(target, WORLD, folder / target.name, counts=counts, seed=seed + 1)
    for task in TASKS:
        if task.name in RETAINED:
            write_rows(task, folder / f"{task.name}.jsonl", count=NUM_RETAINED, seed=seed + 1)
    retained = [{"path": str(folder / f"{name}.jsonl"), "name": name, "train": False} for name in RETAINED]
    return {
        "model": str(lab / "models" / "lab-instruct"),
        "output_dir": str(folder / "run"),
        "data": {"tasks": [{"path": str(folder / target.name), "name": target.name}, *retained]},
        "methods": {"tuned": {**arguments, "learning_rate": drawn(rng, rates)}},
        "training": {"num_train_epochs": rng.choice((1, 2, 3)), "tokens_per_micro_batch": 4096},
        "evaluation": {"metrics": ["exact_match"], "select_by": "loss", "baselines": ["zero-shot"]},
        "retention": {
            "self_texts": 0,
            "alphas": list(ALPHAS),
            "budget": {OTHER_TASKS: f"{BUDGET * 100:g} points of exact_match"},
        },
        "seed": seed,
    }


def drawn(rng: Random, bounds: tuple[float, float]) -> float:
    """Return a learning rate, evenly in its logarithm, to three digits."""
    return float(f"{math.exp(rng.uniform(*map(math.log, bounds))):.3g}")


class Truth:
    """The fresh records and which of them the base answers rightly."""

    def __init__(self, lab: Path, folder: Path) -> None:
        each = NUM_FRESH // len(RETAINED)
        made = recipe(lab, folder, seed=FRESH_SEED)
        for task in TASKS:
            if task.name in RETAINED:
                # Some rows more, since duplicates are left out.
                write_rows(task, folder / f"{task.name}.jsonl", count=each + each // 10, seed=FRESH_SEED)
        del made["retention"]["budget"]
        path = folder / "fresh.yaml"
        path.write_text(yaml.safe_dump(made), encoding="utf-8")
        with stages.open_run(load_recipe(path), context=CONTEXT) as self.run:
            self.data = stages.prepare(self.run)
            split = evaluation_split(self.data, "test")
            by_id = {record.id: record for record in split.records}
            ids = split.examples.record_ids
            chosen = [[i for i, id_ in enumerate(ids) if by_id[id_].task == name][:each] for name in RETAINED]
            self.examples = [split.examples[i] for positions in chosen for i in positions]
            self.records = [by_id[ids[i]] for positions in chosen for i in positions]
            assert len(self.examples) == NUM_FRESH, f"found {len(self.examples)} fresh records"
            self.base = self._right(load_base(self.run, self.data))

    def lost(self, model: nn.Module) -> dict[str, float]:
        """Return what a model loses on the fresh records, with its standard error."""
        drops = self.base - self._right(model)
        return {"lost": float(drops.mean()), "standard_error": float(drops.std(ddof=1) / math.sqrt(len(drops)))}

    def _right(self, model: nn.Module) -> np.ndarray:
        """Return the exact match of each fresh record; only what one pass does not find right is generated."""
        values = right(model, self.examples).astype(float)
        others = np.flatnonzero(values == 0.0)
        records, folder = [self.records[i] for i in others], self.run.folder / "asked"
        table = Table.of([self.examples[i] for i in others], record_ids=[record.id for record in records])
        split = Split("test", records, table)
        answer(self.run, self.data, model, split=split, metrics=["exact_match"], name="fresh", folder=folder, key="")
        found = {asked.id: asked.metrics["exact_match"] for asked in read_answers(folder)}
        values[others] = [found[record.id] for record in records]
        shutil.rmtree(folder)
        return values


def right(model: nn.Module, examples: Sequence[Example]) -> np.ndarray:
    """Return for each example whether a greedy answer would be its completion, token by token.

    That is where each target token is the likeliest after those before it: one pass instead of one a token. Another
    answer may still match, as it does without the full stop.
    """
    order = np.argsort([len(example.input_ids) for example in examples], kind="stable")
    found = np.zeros(len(examples), dtype=bool)
    with evaluating(model):
        for positions in np.array_split(order, max(1, len(order) // 128)):
            batch = pad([examples[i] for i in positions], pad_id=0)
            likeliest = torch.cat([logits_CV.argmax(1) for logits_CV in target_logits(model, batch)]).numpy()
            is_target = batch.labels != NOT_TRAINED
            hits = np.ones(batch.labels.shape, dtype=bool)
            hits[is_target] = likeliest == batch.labels[is_target]
            found[positions] = hits.all(1)
    return found


def measure(lab: Path, out: Path, *, seed: int, truth: Truth) -> dict[str, Any]:
    """Make one run and return what was certified, what would have been chosen naively, and what each lost in truth."""
    folder = out / f"run-{seed}"
    made = recipe(lab, folder, seed=seed)
    target = made["data"]["tasks"][0]["name"]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(made, sort_keys=False), encoding="utf-8")
    with stages.open_run(load_recipe(path), context=CONTEXT) as run:
        data = stages.prepare(run)
        for stage in (stages.train, stages.evaluate, stages.certify):
            stage(run, data=data)
        forgetting, certificate = (read_json(run.folder / f"{name}.json") for name in ("forgetting", "certificate"))
        measured = {
            (row["model"], row["alpha"]): row["forgetting"] for row in forgetting["rows"] if row["suite"] == OTHER_TASKS
        }
        losses = {point: target_loss(run.folder, *point, target=target) for point in measured}
        base_loss = target_loss(run.folder, BASE, 0.0, target=target)
        within = [point for point, lost in measured.items() if lost <= BUDGET]
        naive = min(within, key=lambda point: (losses[point], point[1]), default=None)
        chosen = certificate["choice"]
        certified = (chosen["candidate"], chosen["alpha"]) if chosen else None
        true = {point: truth.lost(model_at(run, data, point)) for point in {certified, naive} if point is not None}

    def facts(point: tuple[str, float] | None) -> dict[str, Any] | None:
        if point is None:
            return None
        return {
            "method": point[0],
            "alpha": point[1],
            "measured": measured[point],
            "target_loss": losses[point],
            **true[point],
        }

    found = {
        "target": target,
        "method": made["methods"]["tuned"],
        "num_train_epochs": made["training"]["num_train_epochs"],
        "verdict": certificate["verdict"],
        "num_certify_records": certificate["items"][OTHER_TASKS],
        "base_loss": base_loss,
        "certified": facts(certified),
        "naive": facts(naive),
        "points": [
            {"method": p[0], "alpha": p[1], "measured": measured[p], "target_loss": losses[p]} for p in measured
        ],
    }
    shutil.rmtree(folder)
    return found


def model_at(run: stages.Run, data: Data, point: tuple[str, float]) -> nn.Module:
    """Return the model of a method at an alpha."""
    way = open_way(run, data, method_of(run.recipe, point[0]))
    way.set_(point[1])
    return way.model


def target_loss(folder: Path, name: str, alpha: float, *, target: str) -> float:
    """Return the mean loss of the target's test records, in nats per token, of the base or of a method at alpha."""
    if name == BASE:
        place = folder / BASE / ZERO_SHOT
    else:
        place = folder / name / (TEST if alpha == 1.0 else f"path/{alpha:g}/{TEST}")
    return float(np.mean([found.metrics["loss"] for found in read_answers(place) if found.task == target]))


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how often the certified and the naively chosen model lost more than the budget.

    The interval is that of Clopper and Pearson. What one can be sure of counts besides: losses that are above the
    budget by more than 1.96 standard errors of the measured truth.
    """
    kinds = {
        "certified": [row["certified"] for row in rows if row["certified"]],
        "naive": [row["naive"] for row in rows if row["naive"]],
    }
    found: dict[str, Any] = {"num_runs": len(rows)}
    for kind, models in kinds.items():
        broken = sum(model["lost"] > BUDGET for model in models)
        surely = sum(model["lost"] - 1.96 * model["standard_error"] > BUDGET for model in models)
        low = float(beta.ppf(0.025, broken, len(models) - broken + 1)) if broken else 0.0
        high = float(beta.ppf(0.975, broken + 1, len(models) - broken)) if broken < len(models) else 1.0
        found[kind] = {
            "num_models": len(models),
            "num_over_budget": broken,
            "num_surely_over_budget": surely,
            "interval": [low, high],
            "mean_lost": mean([model["lost"] for model in models]),
            "mean_target_loss": mean([model["target_loss"] for model in models]),
        }
    return found


def mean(values: Sequence[float]) -> float | None:
    """Return the mean, None of none."""
    return float(np.mean(values)) if values else None


def tables(found: Mapping[str, Any]) -> str:
    """Return the tables of docs/certificate.md from the results."""
    first = ("chosen by", "models", "lost more than 2 points in truth", "95 % interval", "surely more")
    lines = [f"| {' | '.join(first)} | mean loss on the target |", "|---|---|---|---|---|---|"]
    for kind, name in (("certified", "the certificate"), ("naive", "the measured loss alone")):
        of = found["summary"][kind]
        share = of["num_over_budget"] / of["num_models"]
        low, high = (f"{100 * end:.1f}" for end in of["interval"])
        lines.append(
            f"| {name} | {of['num_models']} | {of['num_over_budget']} ({100 * share:.1f} %) | {low} to {high} % | "
            f"{of['num_surely_over_budget']} | {of['mean_target_loss']:.2f} |"
        )
    columns = ("run", "task", "method", "learning rate", "epochs", "whole training, points lost", "verdict")
    chosen = [f"{name}: α, measured, true" for name in ("certified", "naive")]
    lines += ["", f"| {' | '.join((*columns, *chosen))} |", "|---|---|---|---|---|---|---|---|---|"]
    for seed, row in found["runs"].items():
        method = row["method"].get("peft_type", "full") + (
            f", r = {row['method']['r']}" if "r" in row["method"] else ""
        )
        whole = next(point["measured"] for point in row["points"] if point["alpha"] == 1.0)
        cells = [seed, row["target"], method, f"{row['method']['learning_rate']:g}", row["num_train_epochs"]]
        cells += [f"{100 * whole:.1f}", row["verdict"], _chosen(row["certified"]), _chosen(row["naive"])]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _chosen(model: Mapping[str, Any] | None) -> str:
    if model is None:
        return "none"
    doubt = 100 * 1.96 * model["standard_error"]
    true = f"{100 * model['lost']:.2f} ± {doubt:.2f}"
    return f"{model['alpha']:g}, {100 * model['measured']:.2f}, {f'**{true}**' if model['lost'] > BUDGET else true}"


def main() -> None:
    """Make the runs that are missing and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("lab-certificate"), help="where the lab and the runs go")
    parser.add_argument("--runs", type=int, default=40, help="their number")
    parser.add_argument("--first", type=int, default=0, help="the first one's seed")
    parser.add_argument("--tables", action="store_true", help="print the tables of the results that stand")
    arguments = parser.parse_args()
    if arguments.tables:
        print(tables(read_json(RESULTS)))
        return
    out, name = arguments.out, f"from-{arguments.first}"
    write_lab(out / name / "lab", progress=Silent())
    truth = Truth(out / name / "lab", out / name / "fresh")
    known = read_json(RESULTS)["runs"] if RESULTS.exists() else {}
    for seed in range(arguments.first, arguments.first + arguments.runs):
        path = out / "rows" / f"{seed}.json"
        if not path.exists() and str(seed) not in known:
            path.parent.mkdir(exist_ok=True)
            write_json(path, measure(out / name / "lab", out / name, seed=seed, truth=truth))
        made = known | {row.stem: read_json(row) for row in (out / "rows").glob("*.json")}
        rows = {seed: made[seed] for seed in sorted(made, key=int)}
        found = {
            "budget": BUDGET,
            "num_fresh_records": NUM_FRESH,
            "summary": summary(list(rows.values())),
            "runs": rows,
        }
        write_json(RESULTS, found)
        print(seed, json.dumps(rows[str(seed)]), flush=True)


if __name__ == "__main__":
    main()
