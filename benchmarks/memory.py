"""Peak memory of `prepare` and of a training's first steps, against the number of records: does it stay flat?

Four sets of records: a tenth of the rows of every file of the real data, all of them, and generated ones (50 random
words each, no two alike) in two numbers. Each set is prepared and then trained on for a few steps, each in a process
of its own whose largest resident size the kernel tells; the share of it that is no mapped file is sampled beside it.

    python benchmarks/memory.py --data FOLDER/p3_sample --model FOLDER [--generated 50000 500000] [--steps 5]
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from training import machine, versions

from keeptune.errors import Interrupted
from keeptune.progress import Silent

RESULTS = Path(__file__).parent / "results" / "memory.json"
_SAMPLING_SECONDS = 0.02


class Counting(Silent):
    """Counts the steps of a training, so that it can be stopped after a few."""

    def __init__(self) -> None:
        self.num_steps = 0
        self._training = False

    def start(self, title: str, *, total: int, unit: str) -> None:
        self._training = title.startswith("Epoch")

    def advance(self, count: int = 1, *, note: str = "") -> None:
        self.num_steps += self._training


def child(stage: str, *, data: Path, model: Path, out: Path, num_steps: int) -> None:
    """Prepare, or train a method for a few steps; each file of `data` is a task."""
    from keeptune import stages
    from keeptune.config import Recipe

    progress = Counting()
    context = stages.Context(progress, lambda: progress.num_steps >= num_steps, "benchmark", lambda: "")
    recipe = Recipe.model_validate(
        {
            "model": str(model),
            "output_dir": str(out),
            "data": {"tasks": [{"path": str(path)} for path in sorted(data.iterdir())], "over_length": "cut"},
            "methods": {"lora": {"peft_type": "LORA", "r": 8, "target_modules": "all-linear", "learning_rate": 1e-3}},
            "training": {"tokens_per_step": 4096},
        }
    )
    with stages.open_run(recipe, context=context) as run:
        if stage == "prepare":
            stages.prepare(run)
            return
        try:
            stages.train(run)
        except Interrupted:
            assert progress.num_steps >= num_steps


def measured(command: list[str]) -> dict[str, float]:
    """Run a command; return its largest resident size, that without mapped files, and its time."""
    start = time.perf_counter()
    process = subprocess.Popen(command)
    anonymous = 0
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
        anonymous = max(anonymous, int(found[1]) * 1024 if found else 0)
        time.sleep(_SAMPLING_SECONDS)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return {
        "peak_bytes": usage.ru_maxrss * 1024,
        "peak_anonymous_bytes": anonymous,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
    }


def generated(number: int) -> Iterator[str]:
    """Yield records of random words as lines of JSON."""
    draw = random.Random(0)
    syllables = [a + b for a in "bcdfghklmnprstvz" for b in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(20_000)]
    for _ in range(number):
        prompt, completion = " ".join(draw.choices(words, k=40)), " ".join(draw.choices(words, k=10))
        yield json.dumps({"prompt": prompt, "completion": completion}) + "\n"


def write_real(source: Path, into: Path, *, every: int) -> int:
    """Write one in `every` rows of each file; return how many."""
    number = 0
    into.mkdir()
    for path in sorted(source.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
            lines = list(islice(file, 0, None, every))
        (into / path.name.removesuffix(".gz")).write_text("".join(lines), encoding="utf-8", newline="\n")
        number += len(lines)
    return number


def main() -> None:
    """Measure every set of records and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of prompt/completion files, .jsonl.gz")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--generated", type=int, nargs="*", default=[50_000, 500_000])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        sets: list[tuple[str, Path, int]] = []
        for every in (10, 1) if arguments.data else ():
            folder = Path(scratch) / f"real-{every}"
            sets.append(("real", folder, write_real(arguments.data, folder, every=every)))
        for number in arguments.generated:
            folder = Path(scratch) / f"generated-{number}"
            folder.mkdir()
            with (folder / "generated.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(generated(number))
            sets.append(("generated", folder, number))
        for kind, folder, number in sets:
            out = folder.with_name(f"{folder.name}-run")
            for stage in ("prepare", "train"):
                places = [str(folder), str(arguments.model), str(out), str(arguments.steps)]
                row = measured([sys.executable, __file__, "--child", stage, *places])
                rows.append({"records": kind, "num_records": number, "stage": stage, **row})
                print(
                    f"{kind} {number:,} {stage}: {row['peak_bytes'] / 1e6:.0f} MB, without mapped files "
                    f"{row['peak_anonymous_bytes'] / 1e6:.0f} MB, {row['cpu_seconds']:.0f} CPU-seconds"
                )
                facts = {"machine": machine(), "versions": versions(), "num_steps": arguments.steps, "rows": rows}
                arguments.results.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _, _, stage_, data_, model_, out_, num_steps_ = sys.argv
        child(stage_, data=Path(data_), model=Path(model_), out=Path(out_), num_steps=int(num_steps_))
    else:
        main()
