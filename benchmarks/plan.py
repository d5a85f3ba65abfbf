"""How near `keeptune plan` comes: the memory and the time that it says over what training then measures.

    python benchmarks/plan.py --data FOLDER --model FOLDER [--only 19m]

`--data` holds `alpaca_en_demo.json`; `--model` is the 3.1M-parameter English Llama. Each method of each model is
planned and then trained, each in a process of its own, one after the other. `small` steps are those that keeptune
chooses for so few records; `filled` ones fill whole micro-batches, of 1,024 tokens (the lab's: 4,096). Results:
`benchmarks/results/plan.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from training import build_base, machine, read_records

RESULTS = Path(__file__).parent / "results" / "plan.json"
METHODS: dict[str, dict[str, Any]] = {
    "full": {"learning_rate": 1e-4},
    "lora": {"peft_type": "LORA", "r": 16, "lora_alpha": 32},
    "ia3": {"peft_type": "IA3"},
}
# What keeptune's command line sets for itself.
ENVIRONMENT = {**os.environ, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "OMP_WAIT_POLICY": "PASSIVE"}
PLAN = """
import json, sys
from pathlib import Path
from keeptune import stages
from keeptune.config import load_recipe
from keeptune.progress import Silent
context = stages.Context(progress=Silent(), stop_requested=lambda: False, command="plan", now=lambda: "")
(method,) = stages.plan(load_recipe(Path(sys.argv[1])), context=context).methods
print(json.dumps({"memory": method.memory.to_json(), "seconds": method.seconds}))
"""


def recipes(scratch: Path, *, data: Path, model: Path) -> dict[str, dict[str, Any]]:
    """Return the recipes by name, without methods; the lab and the 19M model of training.py are made in `scratch`."""
    subprocess.run([sys.executable, "-m", "keeptune.cli", "lab", str(scratch / "lab"), "--quiet"], check=True)
    alpaca = {"path": str(data / "alpaca_en_demo.json"), "name": "alpaca"}
    build_base(scratch / "19m", read_records([alpaca["path"]], limit=320))
    span = {"path": str(scratch / "lab" / "tasks" / "span_sentence"), "max_records": 1000}
    filled = {"tokens_per_step": 4096}
    lab = {"tokens_per_micro_batch": 4096}
    bases = {
        "lab-instruct": (
            scratch / "lab" / "models" / "lab-instruct",
            span,
            {"small": lab, "filled": {**lab, **filled}},
        ),
        "english-3m": (model, {**alpaca, "max_records": 400}, {"small": {}, "filled": filled}),
        "19m": (
            scratch / "19m",
            {**alpaca, "max_records": 200},
            {
                "small": {},
                "filled": filled,
                "filled bf16": {**filled, "bf16": True},
                "filled checkpointing": {**filled, "gradient_checkpointing": True},
            },
        ),
    }
    return {
        f"{name} {kind}": {
            "model": str(base),
            "data": {"tasks": [task], "over_length": "cut", "max_length": 512},
            "training": {"num_train_epochs": 1, **training},
            "evaluation": {"metrics": ["exact_match"]},
        }
        for name, (base, task, kinds) in bases.items()
        for kind, training in kinds.items()
    }


def measure(recipe: dict[str, Any], *, method: str, scratch: Path) -> dict[str, Any]:
    """Plan and then train one method, each in a process of its own; return both and their ratios."""
    run, path = scratch / "run", scratch / "recipe.yaml"
    shutil.rmtree(run, ignore_errors=True)
    # JSON is YAML.
    path.write_text(json.dumps({**recipe, "output_dir": str(run), "methods": {method: METHODS[method]}}))
    kept: dict[str, Any] = {"check": True, "env": ENVIRONMENT}
    planned = subprocess.run([sys.executable, "-c", PLAN, str(path)], capture_output=True, text=True, **kept)
    plan = json.loads(planned.stdout)
    subprocess.run([sys.executable, "-m", "keeptune.cli", "train", str(path), "--quiet"], **kept)
    training = json.loads((run / method / "training.json").read_text(encoding="utf-8"))
    peak, stated = training["peak_memory_bytes"], training["estimated_memory_bytes"]
    return {
        "planned_memory_bytes": plan["memory"],
        "stated_memory_bytes": stated,
        "peak_memory_bytes": peak,
        "num_steps": training["num_steps"],
        "planned_seconds": plan["seconds"],
        "train_seconds": training["train_seconds"],
        "memory_ratio": plan["memory"]["total"] / peak,
        "stated_memory_ratio": stated["total"] / peak,
        "seconds_ratio": plan["seconds"] / training["train_seconds"],
    }


def describe(name: str, row: dict[str, Any]) -> str:
    """Return a result as a row of the table in README.md."""
    sizes = [row["planned_memory_bytes"]["total"] / 1e6, row["peak_memory_bytes"] / 1e6]
    cells = [name, f"{sizes[0]:,.0f} : {sizes[1]:,.0f} MB", f"{row['memory_ratio']:.2f}"]
    cells += [f"{row['planned_seconds']:.0f} : {row['train_seconds']:.0f} s", f"{row['seconds_ratio']:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure every model with every method and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--only", default="", help="the beginning of the recipes' names")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"rows": {}}
    with tempfile.TemporaryDirectory() as folder:
        made = recipes(Path(folder), data=arguments.data, model=arguments.model)
        for name in (name for name in made if name.startswith(arguments.only)):
            for method in METHODS:
                row = measure(made[name], method=method, scratch=Path(folder))
                print(describe(f"{name} | {method}", row), flush=True)
                results = {"machine": machine(), "rows": {**results["rows"], f"{name} {method}": row}}
                RESULTS.parent.mkdir(exist_ok=True)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
