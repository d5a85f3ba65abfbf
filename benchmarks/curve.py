"""What more records bring in the lab, and whether it is what was foretold.

    python benchmarks/curve.py --out FOLDER [--jobs 2]

`keeptune curve` trains the lab's instruct model on 100, 250, 500 and 1,000 records of a task that it does not know, in
full and by LoRA, and foretells the loss at 2,000. Then it trains on 2,000, which shows the truth. Results:
`benchmarks/results/curve.json`; the table goes into docs/curve.md.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from keeptune.data.record import SplitName
from keeptune.lab.folder import write_lab
from keeptune.lab.tasks import SPAN_SENTENCE, write_task
from keeptune.lab.world import make_world
from keeptune.progress import Silent
from keeptune.storage import read_json, write_json

RESULTS = Path(__file__).parent / "results" / "curve.json"
PAGE = Path(__file__).parents[1] / "docs" / "curve.md"
SIZES, TRUTH = (100, 250, 500, 1000), 2000
COUNTS: dict[SplitName, int] = {"train": TRUTH + 400, "validation": 300, "test": 50}
METHODS = {
    "full": {"learning_rate": 3e-4},
    "lora": {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "learning_rate": 3e-3},
}


def recipe(out: Path) -> dict[str, Any]:
    """Write the lab and the task's rows; return the recipe."""
    write_lab(out / "lab", progress=Silent())
    write_task(SPAN_SENTENCE, make_world(), out / "task", counts=COUNTS, seed=11)
    return {
        "model": str(out / "lab" / "models" / "lab-instruct"),
        "output_dir": str(out / "run"),
        "data": {"tasks": [{"path": str(out / "task"), "name": SPAN_SENTENCE.name}]},
        "methods": METHODS,
        "training": {"num_train_epochs": 2, "tokens_per_micro_batch": 4096},
        "evaluation": {"metrics": ["exact_match"], "select_by": "loss"},
        "retention": {"self_texts": 0},
    }


def curve(path: Path, *, sizes: tuple[int, ...], jobs: int) -> dict[str, Any]:
    """Return what `keeptune curve` finds."""
    listed = ",".join(map(str, sizes))
    command = [sys.executable, "-m", "keeptune.cli", "curve", str(path), "--sizes", listed, "--jobs", str(jobs)]
    subprocess.run([*command, "--quiet"], check=True)
    return read_json(path.parent / "run" / "curve" / "curve.json")


def table(found: Mapping[str, Any]) -> str:
    """Return the table of docs/curve.md."""
    header = [*(f"{size:,}" for size in SIZES), f"{TRUTH:,} foretold", f"{TRUTH:,} in truth"]
    lines = [f"| method | {' | '.join(header)} |", "|---" * (len(header) + 1) + "|"]
    for name in METHODS:
        doubling, measured = found["foretold"]["methods"][name]["law"]["doubling"], found["truth"]["methods"][name]
        values = {
            size: [m["value"] for m in measured["measured"] if m["num_records"] == size] for size in (*SIZES, TRUTH)
        }
        means = {size: sum(of) / len(of) for size, of in values.items()}
        cells = [f"{means[size]:.3f}" for size in SIZES]
        cells.append(f"{doubling['value']:.3f} ({doubling['low']:.3f} to {doubling['high']:.3f})")
        cells.append(f"{means[TRUTH]:.3f} ({', '.join(f'{value:.3f}' for value in values[TRUTH])})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make what is missing, and write the results and the page's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the lab and the run go")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    arguments = parser.parse_args()
    path = arguments.out / "curve.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe(arguments.out), sort_keys=False), encoding="utf-8")
    foretold = curve(path, sizes=SIZES, jobs=arguments.jobs)
    found = {"foretold": foretold, "truth": curve(path, sizes=(*SIZES, TRUTH), jobs=arguments.jobs)}
    write_json(RESULTS, found)
    page = PAGE.read_text(encoding="utf-8")
    shown = re.sub(r"(<!-- curve -->\n).*?(<!-- end -->)", lambda m: m[1] + table(found) + m[2], page, flags=re.DOTALL)
    PAGE.write_text(shown, encoding="utf-8")


if __name__ == "__main__":
    main()
