"""What a search finds and what kills do to it: `search` against a dense grid in the lab, and a search killed ten times.

    python benchmarks/search.py --out FOLDER [--only grid search kills] [--trials 12] [--kills 10] [--jobs 2]
    python benchmarks/search.py --out FOLDER --only    # writes the tables of docs/search.md from the results alone

The lab's base model learns to answer questions on its world from 300 examples, starting from keeptune's own learning
rates. It cannot know every answer, so the loss keeps a floor: on tasks that the lab's models learn wholly, the loss
ends at a thousandth of a nat at half of the rates, and 5 % of that is noise.
The grid trains each method at every rate, four a decade, with `keeptune train`. A search is killed with its trials at
random moments, the driver alone and a trial alone in turn, and started again until it ends; its trials are then held
against those of the search that nobody killed. Results: `benchmarks/results/search.json`, tables: docs/search.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from keeptune.lab.folder import write_lab
from keeptune.progress import Silent
from keeptune.storage import read_json

RESULTS = Path(__file__).parent / "results" / "search.json"
PAGE = Path(__file__).parents[1] / "docs" / "search.md"
METHODS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"peft_type": "LORA", "r": 16, "lora_alpha": 32}}
PER_DECADE = 4
DECADES = {"full": (-5, -2), "lora": (-4, -1)}
SHORTEST_SECONDS, LONGEST_SECONDS = 2.0, 20.0


def recipe(lab: Path, *, output_dir: Path, task: str, records: int, epochs: int | None) -> dict[str, Any]:
    """Return the demo's recipe for the base model and one task, without a budget and without learning rates."""
    value = yaml.safe_load((lab / "lab-demo.yaml").read_text(encoding="utf-8"))
    value["model"] = str(lab / "models" / "lab-base")
    value["data"] = {"template": "chatml", "tasks": [{"path": str(lab / "tasks" / task), "max_records": records}]}
    value["retention"] = {"self_texts": value["retention"]["self_texts"]}
    value["methods"] = METHODS
    if epochs is not None:
        value["training"] = {**value.get("training", {}), "num_train_epochs": epochs}
    return {**value, "output_dir": str(output_dir)}


def keeptune(*arguments: str) -> list[str]:
    """Return a command line."""
    return [sys.executable, "-m", "keeptune.cli", *arguments]


def grid(out: Path, **how: Any) -> dict[str, Any]:
    """Return the loss on validation at every learning rate of a dense grid, by method."""
    value = recipe(out / "lab", output_dir=out / "grid", **how)
    rates = {
        f"{name}-{i}": (name, 10 ** (low + i / PER_DECADE))
        for name, (low, high) in DECADES.items()
        for i in range((high - low) * PER_DECADE + 1)
    }
    value["methods"] = {key: {**METHODS[name], "learning_rate": rate} for key, (name, rate) in rates.items()}
    path = out / "grid.yaml"
    path.write_text(yaml.safe_dump(value), encoding="utf-8")
    subprocess.run(keeptune("train", str(path), "--quiet"), check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = {name: [] for name in METHODS}
    for key, (name, rate) in rates.items():
        loss = read_json(out / "grid" / key / "training.json")["best_value"]
        found[name].append({"learning_rate": rate, "loss": loss})
    return found


def search(out: Path, *, trials: int, jobs: int, **how: Any) -> dict[str, Any]:
    """Return every trial of a search, and what it chose."""
    path = _search_recipe(out, "search", **how)
    subprocess.run(_search(path, trials=trials, jobs=jobs), check=True, stdout=subprocess.DEVNULL)
    return read_json(out / "search" / "search" / "search.json")


def kills(out: Path, *, trials: int, jobs: int, number: int, **how: Any) -> dict[str, Any]:
    """Return whether a search that was killed `number` times ended in the trials of the one that was not."""
    path = _search_recipe(out, "killed", **how)
    generator, killed, finished = random.Random(0), {"driver": 0, "trial": 0}, False
    while not finished:
        with subprocess.Popen(_search(path, trials=trials, jobs=jobs), stdout=subprocess.DEVNULL) as process:
            while sum(killed.values()) < number and not _ended(process, killed, generator):
                what = "driver" if sum(killed.values()) % 2 else "trial"
                killed[what] += _kill(process, what, generator)
            code = process.wait()
        # A driver that was killed ends with less than 0.
        if code > 0:
            raise subprocess.CalledProcessError(code, process.args)
        finished = code == 0
    whole, after = (_values(read_json(out / name / "search" / "search.json")) for name in ("search", "killed"))
    return {"killed": killed, "num_trials": len(whole), "same": whole == after}


def _ended(process: subprocess.Popen[bytes], killed: dict[str, int], generator: random.Random) -> bool:
    """Wait a while, longer after each kill so that the search gets further; tell whether it came to its end."""
    longest = LONGEST_SECONDS * 1.1 ** sum(killed.values())
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=generator.uniform(SHORTEST_SECONDS, longest))
    return process.poll() is not None


def _kill(process: subprocess.Popen[bytes], what: str, generator: random.Random) -> int:
    """Kill the driver or one of its trials; return 1 where there was one."""
    if what == "driver":
        process.kill()
        return 1
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    children = path.read_text(encoding="utf-8").split() if path.exists() else []
    if not children:
        return 0
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(generator.choice(children)), signal.SIGKILL)
    return 1


def _values(summary: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{method}/{trial['name']}": (trial["params"], trial["value"], trial["state"])
        for method, found in summary["methods"].items()
        for trial in found["trials"]
    }


def _search_recipe(out: Path, name: str, **how: Any) -> Path:
    path = out / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe(out / "lab", output_dir=out / name, **how)), encoding="utf-8")
    return path


def _search(path: Path, *, trials: int, jobs: int) -> list[str]:
    return keeptune("search", str(path), "--quiet", "--trials", str(trials), "--jobs", str(jobs))


def compared(results: dict[str, Any]) -> dict[str, Any]:
    """Return the best loss of the search over the grid's, by method.

    Of the search it is that of the best learning rate with the grid's other settings, and that of what it chose.
    """
    found = {}
    for name in METHODS:
        best = min(results["grid"][name], key=lambda row: row["loss"])
        searched = results["search"]["methods"][name]
        first, *others = [trial for trial in searched["trials"] if not trial["repeat"] and trial["value"] is not None]
        key = f"methods.{name}.learning_rate"
        same = [t for t in (first, *others) if {**t["params"], key: 0} == {**first["params"], key: 0}]
        rate = min(same, key=lambda trial: trial["value"])
        (chosen, *_) = searched["winner"]["contenders"]
        found[name] = {
            "grid": best,
            "rate": {"learning_rate": rate["params"][key], "loss": rate["value"]},
            "rate_over_the_grids_best": rate["value"] / best["loss"] - 1.0,
            "chosen": {"params": chosen["params"], "loss": chosen["values"][0]},
            "chosen_over_the_grids_best": chosen["values"][0] / best["loss"] - 1.0,
        }
    return found


def tables(results: dict[str, Any]) -> str:
    """Return the grid's losses, the best of grid and search, and what the kills did, in Markdown."""
    lines = ["| learning rate | " + " | ".join(METHODS) + " |", "|---|" + "---|" * len(METHODS)]
    losses = {name: {row["learning_rate"]: row["loss"] for row in results["grid"][name]} for name in METHODS}
    for rate in sorted(set().union(*losses.values())):
        cells = [f"{found[rate]:.3f}" if rate in found else "" for found in losses.values()]
        lines.append(f"| {rate:.2g} | {' | '.join(cells)} |")
    lines += ["", "| | learning rate | loss | against the grid's best |", "|---|---|---|---|"]
    for name, found in results["compared"].items():
        grid, rate, chosen = found["grid"], found["rate"], found["chosen"]
        settings = ", ".join(f"{key.split('.')[-1]} {value:g}" for key, value in chosen["params"].items())
        lines += [
            f"| {name}: best of the grid | {grid['learning_rate']:.2g} | {grid['loss']:.3f} | |",
            f"| {name}: best rate of the search, all else as in the grid | {rate['learning_rate']:.2g} | "
            f"{rate['loss']:.3f} | {100 * found['rate_over_the_grids_best']:+.1f} % |",
            f"| {name}: chosen ({settings}) | | {chosen['loss']:.3f} | "
            f"{100 * found['chosen_over_the_grids_best']:+.1f} % |",
        ]
    if "kills" in results:
        kills = results["kills"]
        killed = " and ".join(
            f"{'the driver' if what == 'driver' else 'a trial'} {n} times" for what, n in kills["killed"].items()
        )
        same = "the same" if kills["same"] else "NOT the same"
        lines += [
            "",
            f"Killed {killed}, a search of {kills['num_trials']} trials ended with {same} settings and values.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what was asked for and add it to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the lab and the runs go")
    parts = ["grid", "search", "kills"]
    parser.add_argument("--only", nargs="*", choices=parts, default=parts)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--task", default="closed_book", help="one of the lab's")
    parser.add_argument("--records", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=None, help="default: the demo's")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    out = arguments.out
    how = {"task": arguments.task, "records": arguments.records, "epochs": arguments.epochs}
    tried = {"trials": arguments.trials, "jobs": arguments.jobs, **how}
    results = read_json(arguments.results) if arguments.results.exists() else {}
    if arguments.only:
        write_lab(out / "lab", progress=Silent())
    for name in arguments.only:
        if name == "grid":
            results[name] = grid(out, **how)
        elif name == "search":
            results[name] = search(out, **tried)
        else:
            results[name] = kills(out, number=arguments.kills, **tried)
        if {"grid", "search"} <= results.keys():
            results["compared"] = compared(results)
        arguments.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {arguments.results}")
    if "compared" in results:
        page = PAGE.read_text(encoding="utf-8")
        made = tables(results)
        page = re.sub(r"(<!-- search -->\n).*?(<!-- end -->)", lambda m: m[1] + made + m[2], page, flags=re.DOTALL)
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
