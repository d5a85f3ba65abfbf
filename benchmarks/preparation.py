"""From files to tokens on the disk: keeptune's `prepare` against TRL's preparation of the same rows.

keeptune reads, checks, deduplicates, splits, audits for overlap, renders, tokenises and writes; TRL's SFTTrainer
renders and tokenises (its `dataset.map`). Each runs in a process of its own, in turn; memory is counted above what
the interpreter takes before it imports anything.

    python benchmarks/preparation.py --data FOLDER --model FOLDER [--records 40000]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from training import machine, peak_bytes, versions

RESULTS = Path(__file__).parent / "results" / "preparation.json"


def with_keeptune(data: Path, model: Path) -> None:
    """Prepare as `keeptune prepare` does, each file a task of its own."""
    from keeptune import stages
    from keeptune.config import DataFields, Recipe, TaskFields
    from keeptune.progress import Silent

    with tempfile.TemporaryDirectory() as out:
        tasks = tuple(TaskFields(path=str(path)) for path in sorted(data.iterdir()))
        recipe = Recipe(model=str(model), output_dir=out, data=DataFields(tasks=tasks, over_length="cut"))
        context = stages.Context(Silent(), lambda: False, "benchmark", lambda: "")
        with stages.open_run(recipe, context=context) as run:
            stages.prepare(run)


def with_trl(data: Path, model: Path) -> None:
    """Tokenise as SFTTrainer does when it is made."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    # Not splitlines(): records hold other line separators.
    lines = (line for path in sorted(data.iterdir()) for line in path.read_text("utf-8").split("\n"))
    rows = [json.loads(line) for line in lines if line]
    with tempfile.TemporaryDirectory() as out:
        SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(model),
            args=SFTConfig(output_dir=out, report_to=[], use_cpu=True, max_length=1024),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(model),
        )


def child(side: str, data: Path, model: Path) -> dict[str, float]:
    """Measure one side in this process, imports included."""
    start = peak_bytes()
    cpu, wall = time.process_time(), time.perf_counter()
    (with_keeptune if side == "keeptune" else with_trl)(data, model)
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "added_bytes": peak_bytes() - start,
    }


def take(source: Path, into: Path, *, limit: int) -> int:
    """Copy the first rows of every file, `limit` in all, as plain JSON lines."""
    import gzip

    left = limit
    for path in sorted(source.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.readlines()[:left]
        left -= len(lines)
        if lines:
            (into / path.name.removesuffix(".gz")).write_text("".join(lines), encoding="utf-8")
    return limit - left


def main() -> None:
    """Alternate the sides and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of prompt/completion files, .jsonl.gz")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--records", type=int, default=40_000)
    parser.add_argument("--pairs", type=int, default=2)
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {"keeptune": [], "trl": []}
    with tempfile.TemporaryDirectory() as scratch:
        number = take(arguments.data, Path(scratch), limit=arguments.records)
        for _ in range(arguments.pairs):
            for side, measured in runs.items():
                command = [sys.executable, __file__, "--child", side, scratch, str(arguments.model)]
                result = subprocess.run(command, capture_output=True, text=True, check=True)
                measured.append(json.loads(result.stdout.splitlines()[-1]))
                run = measured[-1]
                print(
                    f"{side}: {number:,} records in {run['seconds']:.1f} s ({number / run['seconds']:,.0f}/s, "
                    f"{run['cpu_seconds']:.1f} CPU-seconds), {run['added_bytes'] / 1e6:.0f} MB above the start"
                )
    facts = {"machine": machine(), "versions": versions(), "num_records": number, "runs": runs}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))))
    else:
        main()
