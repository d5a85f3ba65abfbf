"""Many tasks on real data: the whole P3 sample as one mixture, scored data set by data set before and after.

    python benchmarks/p3.py --data FOLDER --model FOLDER [--out FOLDER] [--records 50] [--method full]

`--data` holds the P3 sample, a `.jsonl.gz` file per prompt template; `--model` is the 3.1M-parameter English Llama,
which was never tuned on instructions. Each data set is one task whose templates are its files; three data sets are
held out. An epoch shows each trained data set `CAP` records at most, softened by `TEMPERATURE`. The run stays in
`--out`, its report.html too; `benchmarks/results/p3.json` has what the table in docs/tasks.md shows. With `--records`,
which keeps so few of each data set, nothing is written but the run, and the table goes to the terminal.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "p3.json"
PAGE = Path(__file__).parents[1] / "docs" / "tasks.md"
DATA_SETS = (
    "adversarial_qa",
    "ag_news",
    "amazon_polarity",
    "app_reviews",
    "cnn_dailymail",
    "common_gen",
    "commonsense_qa",
    "cosmos_qa",
    "dbpedia_14",
    "dream",
    "duorc",
    "gigaword",
    "glue_mrpc",
    "glue_qqp",
    "imdb",
    "kilt_tasks_hotpotqa",
    "multi_news",
    "quarel",
    "quartz",
    "ropes",
    "sciq",
    "social_i_qa",
    "wiki_bio",
    "wiki_hop_original",
    "wiki_qa",
    "wiqa",
    "xsum",
    "yelp_review_full",
)
# A classification, a headline and a question: each has relatives among the trained data sets.
HELD_OUT = ("imdb", "gigaword", "sciq")
CAP, TEMPERATURE = 150, 2
METHODS = {
    "full": {"learning_rate": 1e-3},
    "lora": {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "learning_rate": 4e-3},
}
METRICS = {"exact_match": "exact match", "rougeL": "ROUGE-L", "loss": "loss"}
KEPT = ("scores", "macro_scores", "validation_scores", "mixture", "cost", "selected", "audit")


def templates(data: Path) -> dict[str, int]:
    """Return the number of templates of each data set; every file of the sample belongs to one."""
    counts = {name: len(list(data.glob(f"{name}_*.jsonl.gz"))) for name in DATA_SETS}
    num_files = len(list(data.glob("*.jsonl.gz")))
    if sum(counts.values()) != num_files or not all(counts.values()):
        sys.exit(f"{data}: found {num_files} files, {counts}; expected the P3 sample of 228. Check --data.")
    return counts


def recipe(data: Path, model: Path, out: Path, *, records: int | None, method: str | None) -> dict[str, Any]:
    """Return the recipe; `records` caps every data set."""
    tasks: list[dict[str, Any]] = []
    for name in DATA_SETS:
        task: dict[str, Any] = {"path": str(data / f"{name}_*.jsonl.gz"), "name": name}
        if name in HELD_OUT:
            task |= {"train": False, "max_records": min(200, records or 200)}
        elif records is not None:
            task |= {"max_records": records}
        tasks.append(task)
    fraction = 0.04 if records is None else 0.15
    return {
        "model": str(model),
        "output_dir": str(out / "run"),
        "data": {
            "tasks": tasks,
            "validation_fraction": fraction,
            "test_fraction": fraction,
            "max_length": 384,
            "over_length": "cut",
            "mixture": {"cap": CAP, "temperature": TEMPERATURE},
        },
        "methods": {name: METHODS[name] for name in METHODS if method in (None, name)},
        "training": {"num_train_epochs": 2 if records is None else 1, "tokens_per_step": 2048, "evals_per_epoch": 1},
        "evaluation": {
            "metrics": ["rougeL", "exact_match"],
            "baselines": ["zero-shot"],
            "max_new_tokens": 64,
        },
        "retention": {"self_texts": 0},
    }


def table(results: Mapping[str, Any]) -> str:
    """Return a row for each data set, base → methods, then the means over data sets."""
    methods = list(results["methods"])
    means = {(s["task"], s["model"], s["metric"]): s for s in results["scores"]}
    macros = {(s["tasks"], s["model"], s["metric"]): s for s in results["macro_scores"]}
    shares = {row["source"]: row for row in results["mixture"]}
    header = ["data set", "templates", "records an epoch, of", "test records"]
    header += [f"{label}: base → {' / '.join(methods)}" for label in METRICS.values()]
    lines = [header, ["---"] * len(header)]
    for name in sorted(DATA_SETS, key=lambda name: name in HELD_OUT):
        if (name, "base", "loss") not in means:
            continue
        share = shares.get(name)
        counts = f"{share['num_per_epoch']:,} of {share['num_examples']:,}" if share else "held out"
        num_records = f"{means[name, 'base', 'loss']['num_records']:,}"
        lines.append([name, str(results["templates"][name]), counts, num_records, *_changes(means, name, methods)])
    for tasks, label in (("all", "mean of the trained"), ("others", "mean of the held out")):
        lines.append([f"**{label}**", "", "", "", *_changes(macros, tasks, methods)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _changes(scores: Mapping[Any, Any], task: str, methods: Sequence[str]) -> list[str]:
    def shown(model: str, metric: str) -> str:
        return f"{scores[task, model, metric]['mean']:.2f}"

    return [f"{shown('base', m)} → {' / '.join(shown(name, m) for name in methods)}" for m in METRICS]


def main() -> None:
    """Make the run, and write down what its report says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("p3"))
    parser.add_argument("--records", type=int, help="keep at most so many records of a data set, for one epoch")
    parser.add_argument("--method", choices=list(METHODS), help="train this method alone")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    counts = templates(arguments.data)
    made = recipe(arguments.data, arguments.model, arguments.out, records=arguments.records, method=arguments.method)
    path = arguments.out / "p3.yaml"
    # JSON is YAML.
    path.write_text(json.dumps(made, indent=1), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "keeptune.cli", "run", str(path)], check=True)
    report = json.loads((arguments.out / "run" / "report.json").read_text(encoding="utf-8"))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    results = {
        "methods": made["methods"],
        "templates": counts,
        "held_out": list(HELD_OUT),
        "mixture_rule": made["data"]["mixture"],
        "cpu_seconds": round(used.ru_utime + used.ru_stime),
        "peak_memory_bytes": 1024 * used.ru_maxrss,
        **{key: report[key] for key in KEPT},
    }
    made_table = table(results)
    print(f"{made_table}\n{results['cpu_seconds']:,} CPU-seconds, {results['peak_memory_bytes'] / 1e9:.2f} GB")
    if arguments.records is None:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        page = PAGE.read_text(encoding="utf-8")
        new = re.sub(r"(<!-- p3 -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{made_table}{m[2]}", page, flags=re.DOTALL)
        PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
