"""Whole runs on real data: one file of mixed instructions, one classification task, eight tasks at once.

    python benchmarks/runs.py --model FOLDER --data FOLDER [--only classification]

`--data` holds `alpaca_en_demo.json` and `p3_sample/*.jsonl.gz`. Each run is `keeptune run RECIPE.yaml` in a process of
its own; the scores on test go to `benchmarks/results/runs.json`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "runs.json"
CLASSIFICATION = (
    "ag_news_classify",
    "ag_news_classify_question_first",
    "ag_news_classify_with_choices",
    "ag_news_which_section",
    "ag_news_which_section_choices",
)
EIGHT_TASKS = (
    "ag_news_classify_with_choices",
    "amazon_polarity_Is_this_review",
    "common_gen_Put_together",
    "dbpedia_14_given_list_what_category_does_the_paragraph_belong_to",
    "glue_mrpc_same_thing",
    "glue_qqp_same_thing",
    "imdb_Movie_Expressed_Sentiment",
    "wiqa_effect_with_string_answer",
)
EPOCHS = {"alpaca": 2, "classification": 4, "eight-tasks": 4}
METHODS = {
    "full": {"learning_rate": 1e-3},
    "lora": {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "learning_rate": 4e-3},
}


def recipes(model: Path, data: Path, out: Path) -> dict[str, dict[str, Any]]:
    """Return the recipes by name; the classification task is five wordings of one data set, 1,000 rows in all."""
    p3 = data / "p3_sample"
    folder = out / "ag_news"
    folder.mkdir(parents=True, exist_ok=True)
    for name in CLASSIFICATION:
        shutil.copy(p3 / f"{name}.jsonl.gz", folder)
    tasks = {
        "alpaca": [{"path": str(data / "alpaca_en_demo.json"), "name": "alpaca"}],
        "classification": [{"path": str(folder), "name": "ag_news"}],
        "eight-tasks": [{"path": str(p3 / f"{name}.jsonl.gz")} for name in EIGHT_TASKS],
    }
    evaluation = {
        "alpaca": {"metrics": ["rougeL", "chrf"]},
        "classification": {"metrics": ["exact_match"], "select_by": "exact_match"},
        "eight-tasks": {"metrics": ["exact_match", "rougeL"]},
    }
    return {
        name: {
            "model": str(model),
            "output_dir": str(out / name),
            "data": {"tasks": tasks[name], "over_length": "cut", "max_length": 512},
            "methods": METHODS,
            "training": {"num_train_epochs": EPOCHS[name]},
            "evaluation": evaluation[name],
        }
        for name in tasks
    }


def run(name: str, recipe: dict[str, Any], *, out: Path) -> dict[str, Any]:
    """Run one recipe from data to report and return what the report says."""
    path = out / f"{name}.yaml"
    # JSON is YAML.
    path.write_text(json.dumps(recipe, indent=1), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "keeptune.cli", "run", str(path)], check=True)
    report = json.loads((out / name / "report.json").read_text(encoding="utf-8"))
    return {key: report[key] for key in ("scores", "paired", "cost", "selected")}


def main() -> None:
    """Run the recipes and keep what their reports say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--only", help="the name of one run")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name, recipe in recipes(arguments.model, arguments.data, arguments.out).items():
        if arguments.only in (None, name):
            results[name] = run(name, recipe, out=arguments.out)
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
