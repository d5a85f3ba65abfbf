"""How often a certified model loses more than its budget in truth, beside a model chosen from the same figures naively.

    python benchmarks/certificate.py [--out FOLDER] [--runs 200] [--first 0] [--through-stages 0]
    python benchmarks/certificate.py --tables

Each run draws one of the lab's tasks that its model does not know, 200 of its records, a method, a learning rate and
retention records, and trains as `keeptune train` does. Base and tuned model answer the retained tasks at alphas in
steps of 0.1. From these answers a point is certified in four ways: a budget of 2 points of exact match or of 0.02 nats,
each with 95 and with 90 % confidence. The truth is what the model loses on fresh records of the same tasks: 1,250 at
first, up to 20,000 while the budget lies within four standard errors. The naive choice is the point with the lowest
loss on the target's test records among those whose measured loss, on the report part, is within the budget.

`--through-stages N` certifies the first N runs by `keeptune certify` too, and stops where that chooses another point.
Runs that stand in `--out` are not made again; two processes may make different ones at once. Results:
`benchmarks/results/certificate.json`; docs/certificate.md shows them.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import yaml
from peft import PeftModel
from scipy.stats import beta
from torch import nn

from keeptune import stages
from keeptune.config import load_recipe
from keeptune.data.clean import prompt_key
from keeptune.data.record import OTHER_TASKS, PartName, Record, SplitName
from keeptune.evaluation.evaluate import Split, read_answers
from keeptune.evaluation.metrics import Answer
from keeptune.lab.folder import write_lab
from keeptune.lab.tasks import SPAN_SENTENCE, TASKS, LabTask, examples, write_task
from keeptune.lab.world import make_world
from keeptune.model.loss import target_logits
from keeptune.model.modes import evaluating
from keeptune.progress import Silent
from keeptune.retention.budget import Budget
from keeptune.retention.drops import Drops, paired_drops
from keeptune.retention.ledger import confidence_left
from keeptune.retention.walk import Candidate, Choice, choose, walk
from keeptune.stages.data import Data
from keeptune.stages.methods import method_of
from keeptune.stages.retention import answer
from keeptune.stages.way import load_base, open_way
from keeptune.storage import read_json, write_json, write_jsonl
from keeptune.text.batches import NOT_TRAINED, pad
from keeptune.text.table import Table
from keeptune.text.tokens import Example

RESULTS = Path(__file__).parent / "results" / "certificate.json"
WORLD = make_world()
BUDGETS = {
    "2 points of exact_match": Budget(0.02, "points", "exact_match"),
    "0.02 nats": Budget(0.02, "nats", "loss"),
}
CONFIDENCES = (0.95, 0.9)
ALPHAS = tuple(round(0.1 * step, 1) for step in range(1, 11))
# A path is not followed beyond the alpha at which so many times every budget is measured.
FAR_BEYOND = 2.0
NUM_TRAIN = 200
# Three fifths of the retained records are the certify part, about 640, and two fifths the report part.
NUM_RETAINED = 270
NUM_FRESH, FRESH_BLOCK, FRESH_SEED = 20_000, 1_250, 1_000_000
SURE = 4.0
RETAINED = ("translation", "sums", "tense", "sorting")
TARGETS = (SPAN_SENTENCE, *(task for task in TASKS if task.held_out))
# Each method with the range over which its learning rate is drawn, evenly in its logarithm.
METHODS: tuple[tuple[dict[str, Any], tuple[float, float]], ...] = (
    ({}, (1e-4, 2e-3)),
    ({"peft_type": "LORA", "r": 16, "lora_alpha": 32}, (5e-4, 1e-2)),
    ({"peft_type": "LORA", "r": 4, "lora_alpha": 8}, (5e-4, 1e-2)),
    ({"peft_type": "IA3"}, (3e-3, 5e-2)),
)
METHOD = "tuned"
CONTEXT = stages.Context(progress=Silent(), stop_requested=lambda: False, command="benchmark", now=lambda: "")


def write_rows(task: LabTask, path: Path, *, count: int, seed: int) -> None:
    """Write rows of a task that no lab model was trained on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, islice(examples(task, WORLD, split="test", seed=seed), count))


def recipe(lab: Path, folder: Path, *, seed: int, retained: int = NUM_RETAINED) -> dict[str, Any]:
    """Write a run's data and return its recipe; everything that varies is drawn from `seed`."""
    rng = Random(seed)
    target, (arguments, rates) = rng.choice(TARGETS), rng.choice(METHODS)
    counts: dict[SplitName, int] = {"train": NUM_TRAIN, "validation": 100, "test": 100}
    write_task(target, WORLD, folder / target.name, counts=counts, seed=seed + 1)
    for task in TASKS:
        if task.name in RETAINED:
            write_rows(task, folder / f"{task.name}.jsonl", count=retained, seed=seed + 1)
    tasks = [{"path": str(folder / f"{name}.jsonl"), "name": name, "train": False} for name in RETAINED]
    return {
        "model": str(lab / "models" / "lab-instruct"),
        "output_dir": str(folder / "run"),
        "data": {"tasks": [{"path": str(folder / target.name), "name": target.name}, *tasks]},
        "methods": {METHOD: {**arguments, "learning_rate": drawn(rng, rates)}},
        "training": {"num_train_epochs": rng.choice((1, 2, 3)), "tokens_per_micro_batch": 4096},
        "evaluation": {"metrics": ["exact_match"], "select_by": "loss", "baselines": ["zero-shot"]},
        "retention": {
            "self_texts": 0,
            "alphas": list(ALPHAS),
            "budget": {OTHER_TASKS: next(iter(BUDGETS))},
        },
        "seed": seed,
    }


def drawn(rng: Random, bounds: tuple[float, float]) -> float:
    """Return a learning rate, evenly in its logarithm, to three digits."""
    return float(f"{math.exp(rng.uniform(*map(math.log, bounds))):.3g}")


@dataclass(frozen=True)
class Asked:
    """Records of a run that models are asked, with their tokens."""

    run: stages.Run
    data: Data
    records: Sequence[Record]
    tokens: Sequence[Example]

    @classmethod
    def of(cls, run: stages.Run, data: Data, part: SplitName | PartName, *, tasks: Sequence[str]) -> Asked:
        """Return the records of tasks in a split or part, in their order."""
        by_id = {record.id: record for record in data.records(part) if record.task in tasks}
        table = data.table(part)
        places = [i for i, id_ in enumerate(table.record_ids) if id_ in by_id]
        return cls(run, data, [by_id[table.record_ids[i]] for i in places], [table[i] for i in places])

    def block(self, places: slice) -> Asked:
        """Return some of the records."""
        return Asked(self.run, self.data, self.records[places], self.tokens[places])

    def losses(self, model: nn.Module) -> np.ndarray:
        """Return each completion's loss in nats per token."""
        return self._in_one_pass(model)[0]

    def answers(self, model: nn.Module) -> list[Answer]:
        """Return each record's exact match and loss, as answers without their text.

        Greedy decoding gives the completion where each of its tokens is the likeliest after those before it: one pass
        tells that. Another answer may still match, as without the full stop: what is left is generated.
        """
        losses, likeliest = self._in_one_pass(model)
        exact = likeliest.astype(float)
        others = np.flatnonzero(~likeliest)
        if len(others):
            exact[others] = self._generated(model, others)
        return [
            Answer(r.id, r.task, prompt_key(r), "", "", (r.completion,), True, {"exact_match": value, "loss": loss}, 1)
            for r, value, loss in zip(self.records, exact.tolist(), losses.tolist(), strict=True)
        ]

    def _in_one_pass(self, model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort([len(example.input_ids) for example in self.tokens], kind="stable")
        losses, likeliest = np.zeros(len(order)), np.zeros(len(order), dtype=bool)
        with evaluating(model):
            for places in np.array_split(order, max(1, len(order) // 128)):
                batch = pad([self.tokens[i] for i in places], pad_id=0)
                is_target = batch.labels != NOT_TRAINED
                ids = torch.from_numpy(batch.labels[is_target]).long()
                logits = torch.cat([*target_logits(model, batch)])
                nats, hits = np.zeros(batch.labels.shape), np.ones(batch.labels.shape, dtype=bool)
                nats[is_target] = torch.nn.functional.cross_entropy(logits, ids, reduction="none").numpy()
                hits[is_target] = (logits.argmax(1) == ids).numpy()
                losses[places], likeliest[places] = nats.sum(1) / is_target.sum(1), hits.all(1)
        return losses, likeliest

    def _generated(self, model: nn.Module, places: np.ndarray) -> list[float]:
        records = [self.records[i] for i in places]
        table = Table.of([self.tokens[i] for i in places], record_ids=[record.id for record in records])
        split = Split("test", records, table)
        with tempfile.TemporaryDirectory(dir=self.run.folder) as scratch:
            folder = Path(scratch) / "asked"
            answer(self.run, self.data, model, split=split, metrics=["exact_match"], name="", folder=folder, key="")
            found = {one.id: one.metrics["exact_match"] for one in read_answers(folder)}
        return [found[record.id] for record in records]


class Truth:
    """Fresh records of the retained tasks, and what the base answers to them."""

    def __init__(self, lab: Path, folder: Path) -> None:
        each = NUM_FRESH // len(RETAINED)
        # Some rows more, since duplicates are left out; of own tasks four fifths are not in the certify part.
        made = recipe(lab, folder, seed=FRESH_SEED, retained=each + each // 10)
        del made["retention"]["budget"]
        path = folder / "fresh.yaml"
        path.write_text(yaml.safe_dump(made), encoding="utf-8")
        with stages.open_run(load_recipe(path), context=CONTEXT) as run:
            data = stages.prepare(run)
            tasks = [Asked.of(run, data, "test", tasks=[name]) for name in RETAINED]
            # In turn, so that every block has as many of each task.
            records = [record for four in zip(*(task.records for task in tasks), strict=False) for record in four]
            tokens = [example for four in zip(*(task.tokens for task in tasks), strict=False) for example in four]
            assert len(records) >= NUM_FRESH, f"found {len(records)} fresh records"
            self.asked = Asked(run, data, records, tokens)
            self.base: list[Answer] = []

    def lost(self, model: nn.Module, budgets: Sequence[Budget]) -> dict[str, dict[str, float]]:
        """Return what a model loses in each budget's metric, with its standard error."""
        tuned: list[Answer] = []
        found: dict[str, dict[str, float]] = {}
        while len(tuned) < NUM_FRESH:
            block = self.asked.block(slice(len(tuned), len(tuned) + FRESH_BLOCK))
            if len(self.base) == len(tuned):
                self.base += block.answers(load_base(self.asked.run, self.asked.data))
            tuned += block.answers(model)
            found = {budget.metric: _mean_of(drops(self.base[: len(tuned)], tuned, budget)) for budget in budgets}
            if all(abs(found[b.metric]["lost"] - b.amount) > SURE * found[b.metric]["error"] for b in budgets):
                break
        return found


def drops(base: Sequence[Answer], tuned: Sequence[Answer], budget: Budget) -> Drops:
    """Return what was lost in the metric of a budget."""
    return paired_drops(base, tuned, metric=budget.metric, scale=budget.scale, suite=OTHER_TASKS)


def _mean_of(found: Drops) -> dict[str, float]:
    values = found.values_R
    return {
        "lost": float(values.mean()),
        "error": float(values.std(ddof=1) / math.sqrt(len(values))),
        "num_records": len(values),
    }


@dataclass(frozen=True)
class Measured:
    """A trained run: what the base and the model at each alpha answer, and what it reaches on the target."""

    run: stages.Run
    data: Data
    target: str

    @cached_property
    def base(self) -> dict[str, list[Answer]]:
        """What the base answers to the certify part and to the report part, test."""
        model = load_base(self.run, self.data)
        return {part: self._part(part).answers(model) for part in ("certify", "test")}

    @cached_property
    def base_target_loss(self) -> float:
        """The base's loss on the target's test records, in nats per token."""
        return float(self._target("test").losses(load_base(self.run, self.data)).mean())

    @cached_property
    def points(self) -> dict[float, dict[str, Any]]:
        """Of each alpha: answers to both parts, and the target's losses on validation and test."""
        found: dict[float, dict[str, Any]] = {}
        for alpha in ALPHAS:
            model = self.model_at(alpha)
            found[alpha] = {part: self._part(part).answers(model) for part in ("certify", "test")}
            for split in ("validation", "test"):
                found[alpha][f"target_{split}"] = float(self._target(split).losses(model).mean())
            if all(self.lost(found[alpha], b) > FAR_BEYOND * b.amount for b in BUDGETS.values()):
                break
        return found

    def lost(self, point: Mapping[str, Any], budget: Budget) -> float:
        """Return what was measured lost on the report part."""
        return float(drops(self.base["test"], point["test"], budget).values_R.mean())

    def certified(self, budget: Budget, confidence: float) -> float | None:
        """Return the alpha that a first opening certifies and that is best on validation."""
        walked = walk(
            [Candidate(METHOD, tuple(self.points))],
            budgets={OTHER_TASKS: budget},
            delta=confidence_left(1.0 - confidence, opening=1, num_suites=1),
            drops_at=lambda _, alpha: {OTHER_TASKS: drops(self.base["certify"], self.points[alpha]["certify"], budget)},
        )

        def on_validation(_: str, alpha: float) -> float:
            return float(self.points[alpha]["target_validation"])

        chosen = choose(walked.certified, validation=on_validation, loss=on_validation, higher_is_better=False)
        return chosen.alpha if chosen else None

    def naive(self, budget: Budget) -> float | None:
        """Return the alpha with the lowest target loss on test among those measured within the budget."""
        within = [alpha for alpha, point in self.points.items() if self.lost(point, budget) <= budget.amount]
        return min(within, key=lambda alpha: (self.points[alpha]["target_test"], alpha), default=None)

    def model_at(self, alpha: float) -> nn.Module:
        """Return the model at an alpha."""
        way = open_way(self.run, self.data, method_of(self.run.recipe, METHOD))
        way.set_(alpha)
        if isinstance(way.model, PeftModel):
            # It answers faster, and is not used again.
            return way.model.merge_and_unload()
        return way.model

    def _part(self, part: SplitName | PartName) -> Asked:
        return Asked.of(self.run, self.data, part, tasks=RETAINED)

    def _target(self, split: SplitName) -> Asked:
        return Asked.of(self.run, self.data, split, tasks=[self.target])


def measure(lab: Path, out: Path, *, seed: int, truth: Truth, through_stages: bool) -> dict[str, Any]:
    """Make one run and return what was certified, what would have been chosen naively, and what each lost in truth."""
    folder = out / f"run-{seed}"
    made = recipe(lab, folder, seed=seed)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(made, sort_keys=False), encoding="utf-8")
    with stages.open_run(load_recipe(path), context=CONTEXT) as run:
        data = stages.prepare(run)
        stages.train(run, data=data)
        measured = Measured(run, data, made["data"]["tasks"][0]["name"])
        choices: dict[str, dict[str, float | None]] = {
            name: {
                **{f"{confidence:g}": measured.certified(budget, confidence) for confidence in CONFIDENCES},
                "naive": measured.naive(budget),
            }
            for name, budget in BUDGETS.items()
        }
        if through_stages:
            _require_same(run, data, alpha=choices[next(iter(BUDGETS))][f"{run.recipe.retention.confidence:g}"])
        true: dict[float, Any] = {}
        for alpha in sorted({alpha for chosen in choices.values() for alpha in chosen.values() if alpha is not None}):
            asked = [budget for name, budget in BUDGETS.items() if alpha in choices[name].values()]
            true[alpha] = truth.lost(measured.model_at(alpha), asked)
    found = {
        "target": measured.target,
        "method": made["methods"][METHOD],
        "num_train_epochs": made["training"]["num_train_epochs"],
        "num_certify_records": len(measured.base["certify"]),
        "base_target_loss": measured.base_target_loss,
        "points": {
            f"{alpha:g}": {
                "target_loss": point["target_test"],
                "measured": {budget.metric: measured.lost(point, budget) for budget in BUDGETS.values()},
                **({"true": true[alpha]} if alpha in true else {}),
            }
            for alpha, point in measured.points.items()
        },
        "choices": choices,
    }
    shutil.rmtree(folder)
    return found


def _require_same(run: stages.Run, data: Data, *, alpha: float | None) -> None:
    """Certify through the stages of `keeptune run`, and refuse another choice than `alpha`."""
    stages.evaluate(run, data=data)
    stages.certify(run, data=data)
    chosen = read_json(run.folder / "certificate.json")["choice"]
    found = Choice(**chosen).alpha if chosen else None
    assert found == alpha, f"{run.folder}: the stages certify alpha {found}, the study {alpha}"


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return for each budget and way to choose how often the model lost more than the budget in truth.

    The interval is that of Clopper and Pearson. What one can be sure of counts besides: losses that are above the
    budget by more than 1.96 standard errors of the measured truth. Where nothing is chosen the base's loss counts.
    """
    found = []
    for name, budget in BUDGETS.items():
        for kind in (*(f"{confidence:g}" for confidence in CONFIDENCES), "naive"):
            chosen = [(row, row["choices"][name][kind]) for row in rows]
            models = [row["points"][f"{alpha:g}"] for row, alpha in chosen if alpha is not None]
            true = [model["true"][budget.metric] for model in models]
            broken = sum(one["lost"] > budget.amount for one in true)
            reached = [
                row["base_target_loss"] if alpha is None else row["points"][f"{alpha:g}"]["target_loss"]
                for row, alpha in chosen
            ]
            found.append(
                {
                    "budget": name,
                    "chosen_by": kind,
                    "num_runs": len(rows),
                    "num_models": len(models),
                    "num_over_budget": broken,
                    "num_surely_over_budget": sum(o["lost"] - 1.96 * o["error"] > budget.amount for o in true),
                    "interval": clopper_pearson(broken, len(models)),
                    "mean_lost": float(np.mean([one["lost"] for one in true])) if true else None,
                    "mean_target_loss": float(np.mean([m["target_loss"] for m in models])) if models else None,
                    "mean_target_loss_with_base": float(np.mean(reached)),
                }
            )
    return found


def clopper_pearson(count: int, number: int) -> tuple[float, float]:
    """Return the exact 95 % interval of a share."""
    low = float(beta.ppf(0.025, count, number - count + 1)) if count else 0.0
    high = float(beta.ppf(0.975, count + 1, number - count)) if count < number else 1.0
    return low, high


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of docs/certificate.md from the results."""
    columns = (
        "budget",
        "chosen by",
        "models",
        "over budget in truth",
        "95 % interval",
        "surely over",
        "mean true loss",
    )
    lines = [f"| {' | '.join(columns)} | mean target loss | with the base where none |", "|---" * 9 + "|"]
    for row in rows:
        by = "the measured loss alone" if row["chosen_by"] == "naive" else f"a certificate of {row['chosen_by']}"
        low, high = (f"{100 * end:.1f}" for end in row["interval"])
        share = 100 * row["num_over_budget"] / max(1, row["num_models"])
        lines.append(
            f"| {row['budget']} | {by} | {row['num_models']} of {row['num_runs']} | {row['num_over_budget']} "
            f"({share:.1f} %) | {low} to {high} % | {row['num_surely_over_budget']} | {row['mean_lost']:.4f} | "
            f"{row['mean_target_loss']:.2f} | {row['mean_target_loss_with_base']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Make the runs that are missing and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("lab-certificate"), help="where the lab and the runs go")
    parser.add_argument("--runs", type=int, default=200, help="their number")
    parser.add_argument("--first", type=int, default=0, help="the first one's seed")
    parser.add_argument("--through-stages", type=int, default=0, help="how many are certified by the stages too")
    parser.add_argument("--tables", action="store_true", help="print the tables of the results that stand")
    given = parser.parse_args()
    if given.tables:
        print(tables(read_json(RESULTS)["summary"]))
        return
    out, name = given.out, f"from-{given.first}"
    write_lab(out / name / "lab", progress=Silent())
    truth = Truth(out / name / "lab", out / name / "fresh")
    (out / "rows").mkdir(exist_ok=True)
    for i, seed in enumerate(range(given.first, given.first + given.runs)):
        path = out / "rows" / f"{seed}.json"
        if not path.exists():
            through = i < given.through_stages
            write_json(path, measure(out / name / "lab", out / name, seed=seed, truth=truth, through_stages=through))
        rows = {row.stem: read_json(row) for row in sorted((out / "rows").glob("*.json"), key=lambda p: int(p.stem))}
        budgets = {name: budget.amount for name, budget in BUDGETS.items()}
        write_json(RESULTS, {"budgets": budgets, "summary": summary(list(rows.values())), "runs": rows})
        print(seed, json.dumps(rows[str(seed)]), flush=True)


if __name__ == "__main__":
    main()
