"""A certified run on real data: what three methods learn of one P3 data set and lose of five others and of `self`.

    python benchmarks/real.py --data FOLDER --model FOLDER [--out FOLDER]

`--data` holds the P3 sample, a `.jsonl.gz` file per prompt template; `--model` is the 3.1M-parameter English Llama,
which was never tuned on instructions. The target is common_gen in five wordings: a sentence from a list of concepts.
Two budgets hold what the five other tasks and the base's own texts may lose, in nats, since the base answers the tasks
at chance. The run stays in `--out`, its report.html too; `benchmarks/results/real.json` has what docs/certificate.md
shows.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

RESULTS = Path(__file__).parent / "results" / "real.json"
TARGET = (
    "common_gen_Example_prompt",
    "common_gen_Given_concepts_type_1",
    "common_gen_Given_concepts_type_2",
    "common_gen_Put_together",
    "common_gen_random_task_template_prompt",
)
RETAINED = (
    "ag_news_classify",
    "gigaword_make_a_title",
    "glue_mrpc_generate_paraphrase",
    "sciq_Direct_Question_Closed_Book_",
    "wiki_bio_guess_person",
)
KEPT = ("scores", "paired", "cost", "selection", "certificate")


def recipe(data: Path, model: Path, out: Path) -> dict[str, Any]:
    """Write the target's records into one file and return the recipe."""
    out.mkdir(parents=True, exist_ok=True)
    target = out / "common_gen.jsonl"
    rows = [gzip.decompress((data / f"{name}.jsonl.gz").read_bytes()).decode("utf-8") for name in TARGET]
    target.write_text("".join(rows), encoding="utf-8")
    retained = [{"path": str(data / f"{name}.jsonl.gz"), "name": name, "train": False} for name in RETAINED]
    return {
        "model": str(model),
        "output_dir": str(out / "run"),
        "data": {
            "tasks": [{"path": str(target), "name": "common_gen"}, *retained],
            "max_length": 512,
            "over_length": "drop",
        },
        "methods": {
            "full": {"learning_rate": 3e-4},
            "lora": {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "learning_rate": 3e-3},
            "ia3": {"peft_type": "IA3", "learning_rate": 1e-2},
        },
        "training": {"num_train_epochs": 3},
        "evaluation": {"metrics": ["rougeL", "exact_match"], "num_shots": [1, 4]},
        "retention": {
            "alphas": [0.2, 0.4, 0.6, 0.8, 1.0],
            "budget": {"others": "0.1 nats of loss", "self": "0.1 nats"},
            "ledger": str(out / "ledger.jsonl"),
        },
    }


def main() -> None:
    """Make the run and write down what its report says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("real"))
    arguments = parser.parse_args()
    made = recipe(arguments.data, arguments.model, arguments.out)
    path = arguments.out / "real.yaml"
    path.write_text(yaml.safe_dump(made, sort_keys=False), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "keeptune.cli", "run", str(path)], check=True)
    run = arguments.out / "run"
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    forgetting = json.loads((run / "forgetting.json").read_text(encoding="utf-8"))
    found = {
        "methods": made["methods"],
        "budget": made["retention"]["budget"],
        **{key: report[key] for key in KEPT},
        "forgetting": forgetting["rows"],
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
