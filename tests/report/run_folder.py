"""Run folders as keeptune leaves them, for the tests of the report; every number is made up for them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

METRICS: dict[str, Any] = {
    "rougeL": {
        "signature": "rouge_score 0.1.2|rougeL|stemmer|F1|max over 1 reference",
        "higher_is_better": True,
    },
    "exact_match": {"signature": "SQuAD normalisation|max over 1 reference", "higher_is_better": True},
    "loss": {"signature": "nats per target token|fp32", "higher_is_better": False},
}
MEANS = {
    "base": {"rougeL": 0.118, "exact_match": 0.012, "loss": 3.412},
    "full": {"rougeL": 0.402, "exact_match": 0.231, "loss": 1.704},
    "lora": {"rougeL": 0.431, "exact_match": 0.262, "loss": 1.655},
}
FIRST_COMMAND = "keeptune run recipes/news.yaml --set training.num_train_epochs=3"
RECIPE = """model: ../shared/models/english-3m
output_dir: runs/news
data:
  tasks:
  - {path: ../shared/data/p3_sample/ag_news.jsonl, name: ag_news}
methods:
  full: {learning_rate: 2.0e-05}
  lora: {peft_type: LORA, r: 16, lora_alpha: 32, learning_rate: 0.0002}
seed: 0
"""


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, values: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


def score(model: str, task: str, metric: str, mean: float, num_records: int) -> dict[str, Any]:
    error = 0.4 * max(0.02, min(mean, 1.0)) / math.sqrt(num_records) * 2
    counts = {"num_records": num_records, "num_clusters": num_records - 3}
    ends = {"low": max(0.0, mean - 1.96 * error), "high": mean + 1.96 * error}
    of = {"model": model, "shots": 0, "task": task, "metric": metric}
    return of | {"mean": mean, "standard_error": error, **ends} | counts


# How far the base's mean changes on tasks that were not trained on.
OTHERS = {"base": 0.9, "full": 0.354, "lora": 0.354}


def scores_file(
    model: str, tasks: Sequence[str], *, others: Sequence[str] = (), num_records: int = 100
) -> dict[str, Any]:
    rows = [score(model, "all", metric, mean, num_records * len(tasks)) for metric, mean in MEANS[model].items()]
    for task in (*others, *(["others"] if others else [])):
        number = num_records * len(others) if task == "others" else num_records
        for metric, mean in MEANS["base"].items():
            # 0.118 becomes 0.106 for the base and 0.042 for the tuned models.
            rows.append(score(model, task, metric, mean * OTHERS[model], number))
    for i, task in enumerate(tasks):
        for metric, mean in MEANS[model].items():
            rows.append(score(model, task, metric, mean * (0.6 + 0.16 * i), num_records))
    return {
        "model": model,
        "shots": 0,
        "split": "test",
        "prompt_sha256": "5d41402abc4b2a76b9719d911017c592aa",
        "decoding": {"strategy": "greedy", "max_new_tokens": 64, "stop_ids": [2]},
        "num_records": num_records * len(tasks),
        "num_left_out": 0,
        "untrained_tasks": list(others),
        "cut_fraction": 0.12 if model == "base" else 0.01,
        "metrics": METRICS,
        "scores": rows,
    }


def paired_row(model: str, task: str, metric: str, *, factor: float = 1.0) -> dict[str, Any]:
    difference = (MEANS[model][metric] - MEANS["base"][metric]) * factor
    width = abs(difference) * 0.12 + (0.3 if task == "boolq" else 0.01)
    ends = {"difference": difference, "low": difference - width, "high": difference + width}
    return {"model": model, "against": "base", "task": task, "metric": metric, "better": 61, "worse": 9} | ends


def sample(task: str, index: int, *, value: float, prediction: str, prompt: str | None = None) -> dict[str, Any]:
    question = f"Which section of a newspaper would this article be in? Storm number {index} closes two airports."
    return {
        "id": f"{index:016x}",
        "task": task,
        "cluster": f"{index:016x}",
        "prompt": prompt if prompt is not None else question,
        "prediction": prediction,
        "references": ["World" if index % 2 else "Sci/Tech"],
        "ended": index % 17 != 0,
        "metrics": {"rougeL": value, "exact_match": float(value > 0.9), "loss": 2.0 - value},
        "num_target_tokens": 3,
    }


def samples(model: str, tasks: Sequence[str], *, num_records: int = 40) -> list[dict[str, Any]]:
    random_ = random.Random(model)
    found = []
    for i in range(num_records):
        value = random_.random() * (0.3 if model == "base" else 1.0)
        words = "the article is about the article is about" if model == "base" else "World"
        found.append(sample(tasks[i % len(tasks)], i, value=round(value, 4), prediction=words))
    return found


def events(num_steps: int, *, level: float = 1.7) -> list[dict[str, Any]]:
    random_ = random.Random(num_steps)
    found: list[dict[str, Any]] = [{"event": "run", "num_examples": 812, "num_steps": num_steps}]
    for step in range(1, num_steps + 1):
        loss = level + 2.2 * math.exp(-step / max(1, num_steps / 8)) + random_.gauss(0, 0.12)
        found.append({"event": "step", "step": step, "epoch": step / 40, "loss": loss, "learning_rate": 1e-4})
        if step % max(1, num_steps // 6) == 0:
            value = {"metric": "rougeL", "value": 0.43 - 0.3 * math.exp(-step / num_steps * 3)}
            found.append({"event": "validation", "step": step, "epoch": step / 40, "loss": loss * 0.97 + 0.1} | value)
    return [*found, {"event": "finished", "num_steps": num_steps}]


def training(method: str, num_steps: int) -> dict[str, Any]:
    is_lora = method == "lora"
    return {
        "method": method,
        "peft_type": "LORA" if is_lora else None,
        "learning_rate": 2e-4 if is_lora else 2e-5,
        "trained_parameters": 589_824 if is_lora else 3_147_264,
        "total_parameters": 3_737_088 if is_lora else 3_147_264,
        "num_steps": num_steps,
        "best_step": num_steps // 6 * 5,
        "select_by": "rougeL",
        "best_value": 0.41,
        "train_seconds": 192.4 if is_lora else 241.0,
        "num_train_tokens": 812_345,
        "num_target_tokens": 30_120,
        "tokens_per_second": 4222.0 if is_lora else 3370.0,
        "peak_memory_bytes": 911_000_000 if is_lora else 1_212_000_000,
        "artifact_bytes": 2_400_000 if is_lora else 12_600_000,
        "layout": "packed",
        "device": "cpu",
        "dtype": "float32",
        "stopped_early": not is_lora,
    }


def audit(tasks: Sequence[str], *, others: Sequence[str] = ()) -> dict[str, Any]:
    pair = {"first": "ag_news.jsonl:12", "second": "ag_news.jsonl:711", "jaccard": 0.87}
    leak = {"train": "ag_news.jsonl:31", "held_out": "ag_news.jsonl:905", "split": "test", "overlap_fraction": 0.61}
    return {
        "rows_in": 1_020,
        "kept": 1_000,
        "dropped": {"exact_duplicate": 12, "leak": 6, "empty_completion": 2},
        "dropped_rows": [{"origin": "ag_news.jsonl:77", "reason": "empty_completion"}],
        "exact_duplicates": 12,
        "near_duplicates": {"num_pairs": 2, "examples": [pair]},
        "groups": {"num_groups": 998, "num_joined": 2, "num_moved": 1, "largest_group": 2},
        "tasks": {task: {"train": 812, "validation": 92, "test": 96} for task in tasks}
        | {task: {"train": 0, "validation": 0, "test": 96} for task in others},
        "untrained_tasks": list(others),
        "leaks": {
            "exact": {"num_train_records": 0, "num_removed": 0, "examples": []},
            "near": {"num_train_records": 4, "num_removed": 4, "examples": []},
            "ngram_cover": {"num_train_records": 2, "num_removed": 2, "examples": [leak]},
            "ngram_13": {"num_train_records": 31, "num_removed": 0, "examples": [leak] * 9},
        },
        "tokens": {
            "prompt": {"p50": 61, "p90": 112, "p99": 240, "max": 611, "mean": 70.25},
            "completion": {"p50": 3, "p90": 5, "p99": 5, "max": 6, "mean": 3.4},
            "total": {"p50": 65, "p90": 117, "p99": 244, "max": 615, "mean": 73.7},
            "truncated": 4,
            "completion_cut": 0,
            "too_long": 0,
            "supervised_tokens": 30_120,
            "truncated_fraction": 0.004,
        },
        "splits": {"train": 812 * len(tasks), "validation": 92 * len(tasks), "test": 96 * len(tasks)},
        "kept_whole": 996,
        "truncated": 4,
    }


def write_run(
    run: Path, *, tasks: Sequence[str] = ("ag_news",), others: Sequence[str] = (), num_steps: int = 120
) -> Path:
    """Write a finished run: base, full and lora, lora chosen; `others` were not trained on, and both lost there."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    versions = {"keeptune": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"}
    write_json(
        run / "manifest.json",
        {
            "created": "2026-11-23T20:30:00Z",
            "command": FIRST_COMMAND,
            "commands": [
                {"time": "2026-11-23T20:30:00Z", "command": FIRST_COMMAND, "keeptune": "0.1.0"},
                {"time": "2026-11-23T20:31:00Z", "command": "keeptune report news.yaml", "keeptune": "0.1.0"},
            ],
            "model": "../shared/models/english-3m",
            "model_sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            "seed": 0,
            "platform": "Linux x86_64",
            "device": "cpu",
            "versions": versions,
        },
    )
    write_json(run / "data/audit.json", audit(tasks, others=others))
    write_json(run / "data/manifest.json", {"template": "alpaca", "files": {}})
    write_json(run / "base/zero-shot/scores.json", scores_file("base", tasks, others=others))
    write_lines(run / "base/zero-shot/samples.jsonl", samples("base", (*tasks, *others)))
    for method in ("full", "lora"):
        write_json(run / method / "training.json", training(method, num_steps))
        write_lines(run / method / "events.jsonl", events(num_steps, level=1.7 if method == "full" else 1.6))
        write_json(run / method / "test/scores.json", scores_file(method, tasks, others=others))
        write_lines(run / method / "test/samples.jsonl", samples(method, (*tasks, *others)))
    pairs = [paired_row(m, "all", metric) for metric in METRICS for m in ("full", "lora")]
    pairs += [paired_row(m, t, metric, factor=0.8) for metric in METRICS for m in ("full", "lora") for t in tasks]
    pairs += [paired_row("lora", "all", metric, factor=0.05) | {"against": "full"} for metric in METRICS]
    for task in (*others, *(["others"] if others else [])):
        lost = {"against": "base", "task": task, "difference": -0.064, "better": 3, "worse": 40}
        for metric in METRICS:
            pairs.append({"model": "full", "metric": metric, "low": -0.14, "high": 0.012, **lost})
            pairs.append({"model": "lora", "metric": metric, "low": -0.08, "high": -0.048, **lost})
    write_json(run / "paired.json", {"paired": pairs[::-1]})
    values = {"full": 0.3991, "lora": 0.4312}
    selection = {"selected": "lora", "metric": "rougeL", "split": "validation", "values": values}
    write_json(run / "selection.json", selection)
    opening = {"opened": "2026-11-23T21:02:11Z", "models": ["base", "full", "lora"], "test_sha256": "ab12"}
    write_lines(run / "test_openings.jsonl", [opening])
    return run


# Mean ROUGE-L and loss of the base behind examples, by shots and draw.
SHOT_MEANS = {
    (1, 1): (0.16, 3.1),
    (1, 2): (0.18, 3.0),
    (1, 3): (0.20, 2.9),
    (4, 1): (0.21, 2.8),
    (4, 2): (0.30, 2.5),
    (4, 3): (0.24, 2.6),
    (4, "nearest"): (0.28, 2.4),
}


def shot_name(shots: int, draw: int | str) -> str:
    drawn = f"base, {shots} shot{'s' * (shots > 1)}, draw {draw}"
    return f"base, {shots} nearest shots" if draw == "nearest" else drawn


def write_shots(run: Path, *, tasks: Sequence[str] = ("ag_news",), num_records: int = 100) -> Path:
    """Add few-shot answers of the base to a run: 1 and 4 shots in three draws, 4 nearest; lora is paired with each."""
    pairs = json.loads((run / "paired.json").read_text(encoding="utf-8"))["paired"]
    for (shots, draw), (rouge, loss) in SHOT_MEANS.items():
        rows = []
        for task in (*tasks, "all"):
            number = num_records * (len(tasks) if task == "all" else 1)
            means = {"rougeL": rouge, "exact_match": rouge / 2, "loss": loss}
            rows += [score("base", task, metric, mean, number) | {"shots": shots} for metric, mean in means.items()]
            for metric, mean in means.items():
                difference = MEANS["lora"][metric] - mean
                ends = {"difference": difference, "low": difference - 0.05, "high": difference + 0.05}
                ends |= {"standard_error": 0.025, "num_clusters": number - 3}
                name = {"model": "lora", "against": shot_name(shots, draw), "task": task, "metric": metric}
                pairs.append({**name, **ends, "better": 50, "worse": 10})
        header = {
            "model": "base",
            "shots": shots,
            "row": shot_name(shots, draw),
            "num_records": num_records * len(tasks),
            "prompt_tokens_mean": 70.0 + 75.0 * shots,
            "own_prompt_tokens_mean": 70.0,
            "num_fitted": 3 if shots == 4 else 0,
            "num_without_exemplars": 1 if shots == 4 else 0,
            "num_refused": 0,
            "num_shown_mean": shots - 0.05 * (shots == 4),
            "exemplars": {"draw": draw, "ids": {}},
            "cut_fraction": 0.02,
            "metrics": METRICS,
            "scores": rows,
        }
        folder = "4-shot-nearest" if draw == "nearest" else f"{shots}-shot-draw-{draw}"
        write_json(run / "base" / folder / "scores.json", header)
    write_json(run / "paired.json", {"paired": pairs[::-1]})
    return run


def lost_row(
    model: str, suite: str, forgetting: float, *, alpha: float = 1.0, metric: str = "rougeL"
) -> dict[str, Any]:
    base = 2.1 if metric == "loss" else 0.6
    tuned = base + forgetting if metric == "loss" else base - forgetting
    return {
        "model": model,
        "alpha": alpha,
        "suite": suite,
        "metric": metric,
        "num_records": 100,
        "num_clusters": 98,
        "base": base,
        "tuned": tuned,
        "forgetting": forgetting,
        "low": forgetting - 0.02,
        "high": forgetting + 0.02,
        "worst_low": forgetting - 0.03,
        "worst_high": forgetting + 0.03,
        "num_suites": 1 if metric == "loss" else 2,
        "num_lost": 31,
        "num_gained": 4,
        "chance": 0.1,
        "base_at_chance": False,
        "retention": None if metric == "loss" else (tuned - 0.1) / (base - 0.1),
        "kl": 0.134 if metric == "loss" else None,
    }


def write_forgetting(run: Path, *, verdict: str | None = None) -> Path:
    """Add to a run with the other tasks boolq and wiki what it forgot; with a verdict, its choice too.

    The budget on all other tasks leaves wiki out.
    """
    rows, under_budget, left_out = [], [], []
    for alpha, share in ((0.3, 0.2), (1.0, 1.0)):
        for model, most in (("full", 0.3), ("lora", 0.2)):
            for suite, part in (("boolq", 1.0), ("wiki", 0.4), ("others", 0.7)):
                rows.append(lost_row(model, suite, most * part * share, alpha=alpha))
            rows.append(lost_row(model, "self", most * share / 2, alpha=alpha, metric="loss"))
            under_budget.append(lost_row(model, "others", most * share, alpha=alpha) | {"without": ["wiki"]})
            left_out.append(lost_row(model, "wiki", most * share * 2, alpha=alpha, metric="token_f1"))
    counts = {"num_records": 100, "num_unended": 7, "num_empty": 0, "num_looping": 3}
    canaries = [
        {"model": "base", "alpha": None, "task": "boolq", **dict.fromkeys(counts, 0), "num_records": 100},
        {"model": "lora", "alpha": 1.0, "task": "wiki", **counts, "num_other_script": None, "num_broken_format": 5},
    ]
    noise = {"num_records": 200, "num_answers_changed": 3, "num_scores_changed": 1, "largest_loss_change": 0.0004}
    value = {"metric": "rougeL", "suites": ["boolq", "others", "self", "wiki"], "rows": rows, "canaries": canaries}
    value |= {"under_budget": under_budget, "left_out": left_out} if verdict else {}
    write_json(run / "forgetting.json", value | {"noise": noise, "texts": {}})
    for model in ("full", "lora"):
        scores = scores_file(model, ["ag_news"])
        for row in scores["scores"]:
            row["mean"] *= 0.8
        write_json(run / model / "path/0.3/test/scores.json", scores)
        lines = samples(model, ("ag_news", "boolq", "wiki"))
        write_lines(run / model / "path/0.3/test/samples.jsonl", lines)
        write_json(run / model / "texts/scores.json", {"scores": [score(model, "self", "loss", 2.2, 40)]})
        drift = [{"event": "drift", "step": s, "epoch": s / 40, "kl": 0.002 * s} for s in (12, 60, 120)]
        write_lines(run / model / "events.jsonl", [*events(120), *drift])
    for name in ("texts", "repeat"):
        write_json(run / "base" / name / "scores.json", {"scores": [score(name, "self", "loss", 2.0, 40)]})
    write_json(run / "texts/audit.json", {})
    return write_certificate(run, verdict) if verdict else run


FALLBACK = {
    "model": "base",
    "shots": 4,
    "draw": 1,
    "metric": "loss",
    "split": "validation",
    "values": [{"shots": 0, "draw": None, "value": 3.4}, {"shots": 4, "draw": 1, "value": 2.8}],
    "sentence": "Use the base model with 4 solved examples in its prompt: of the prompts tried it has the best loss.",
}


def tested_cell(model: str, alpha: float, *, certified: bool) -> dict[str, Any]:
    """Return a test of `certificate.json`: 0.012 lost of a budget of 0.05."""
    measured = {"p": 0.0021 if certified else 0.31, "mean": 0.012, "standard_error": 0.011}
    return {
        "choice": {"candidate": model, "alpha": alpha},
        "suite": "others",
        "budget": {"amount": 0.05, "unit": "points", "metric": "rougeL"},
        "delta": 0.0125,
        "measured": {**measured, "num_records": 800, "num_clusters": 790, "num_changed": 64},
        "upper_bound": 0.038 if certified else 0.071,
        "certified": certified,
        "num_records_needed": None if certified else 2100,
    }


def write_certificate(run: Path, verdict: str) -> Path:
    is_certified = verdict == "CERTIFIED"
    budget = {"text": "5 points of rougeL", "amount": 0.05, "unit": "points", "metric": "rougeL"}
    choice = {"candidate": "lora", "alpha": 0.3} if is_certified else None
    certificate = {
        "verdict": verdict,
        "sentence": "With 95 % confidence over the draw of records, a sentence of the certificate.",
        "choice": choice,
        "fallback": None if is_certified else FALLBACK,
        "budgets": {"others": budget},
        "cells": [tested_cell("lora", 0.3, certified=is_certified), tested_cell("full", 0.3, certified=False)],
        "certified": [],
        "limits": ["It names these weights."],
        "opening": 2,
        "ledger": "/home/ada/.keeptune/ledger.jsonl",
        "delta": 0.025,
        "confidence": 0.95,
        "items": {"others": 400},
        "left_out_at_chance": {
            "wiki": {"suite": "wiki", "budget": "others", "metric": "rougeL", "base": 0.02, "chance": 0.0},
            "arc_easy": {"suite": "arc_easy", "budget": "arc_easy", "metric": "acc", "base": 0.25, "chance": 0.25},
        },
        "artifact": {"folder": "adapter", "sha256": {"adapter_model.safetensors": "ab12"}} if is_certified else None,
    }
    write_json(run / "certificate.json", certificate)
    chosen = {"selected": "lora", "alpha": 0.3} if is_certified else {"selected": None, "alpha": None}
    values = {"full": 0.3991, "lora": 0.4312}
    facts = {"metric": "rougeL", "split": "validation", "values": values, "certified": is_certified}
    write_json(run / "selection.json", chosen | facts)
    return run
