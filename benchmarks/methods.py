"""Every method in the lab and on one P3 task: a learning rate by search, then scores, forgetting and costs at it.

    python benchmarks/methods.py [--out FOLDER] [--methods lora ia3] [--first 8] [--parts ladder lab p3]
    python benchmarks/methods.py --tables

In the lab each method learns a new wording from 500 examples; the rate with the lowest validation loss on a ladder of
half decades wins, and the ladder grows where an end of it wins. At that rate the method then learns common_gen of P3,
on the 3.1M-parameter English Llama in `--model`. A row is written to `benchmarks/results/methods.json` as soon as it is
measured, and rows that stand there are not measured again; two processes may share the methods, each with its own
`--out`. `--tables` writes the tables of docs/methods.md. About four minutes of one core a method.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import re
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from real import RETAINED, TARGET

from keeptune.config import LEARNING_RATES
from keeptune.lab.folder import write_lab
from keeptune.progress import Silent

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "methods.json"
PAGE = ROOT / "docs" / "methods.md"
# Half decades, from 1e-5 to 3.
RATES = tuple(float(f"{digit}e{power}") for power in range(-5, 1) for digit in (1, 3))
MOST_RATES = 5
LINEAR = {"target_modules": "all-linear"}
VIRTUAL = {"num_virtual_tokens": 20}
LORA = {"peft_type": "LORA", "r": 16, "lora_alpha": 32}
# Each with the rate in the middle of its first three.
METHODS: dict[str, tuple[float, dict[str, Any]]] = {
    "full": (1e-3, {}),
    "lora": (3e-3, LORA),
    "rslora": (1e-3, {**LORA, "use_rslora": True}),
    "dora": (3e-3, {**LORA, "use_dora": True}),
    "pissa": (1e-3, {**LORA, "init_lora_weights": "pissa"}),
    "ia3": (3e-2, {"peft_type": "IA3"}),
    "loha": (3e-3, {"peft_type": "LOHA", "r": 8, "alpha": 16, **LINEAR}),
    "lokr": (3e-3, {"peft_type": "LOKR", "r": 8, "alpha": 16, **LINEAR}),
    "vera": (3e-2, {"peft_type": "VERA", "r": 64, **LINEAR}),
    "oft": (3e-3, {"peft_type": "OFT", "oft_block_size": 16, **LINEAR}),
    "boft": (3e-3, {"peft_type": "BOFT", "boft_block_size": 4, **LINEAR}),
    "osf": (1e-3, {"peft_type": "OSF"}),
    "ln_tuning": (1e-2, {"peft_type": "LN_TUNING"}),
    "prompt_tuning": (1e-1, {"peft_type": "PROMPT_TUNING", **VIRTUAL}),
    "prefix_tuning": (3e-2, {"peft_type": "PREFIX_TUNING", **VIRTUAL}),
    "p_tuning": (1e-2, {"peft_type": "P_TUNING", **VIRTUAL}),
    "adalora": (1e-2, {"peft_type": "ADALORA", "lora_alpha": 32}),
}
PARTS = ("ladder", "lab", "p3")
NUM_EXAMPLES, NUM_RETAINED = 500, 60
COSTS = ("trained_parameters", "peak_memory_bytes", "artifact_bytes", "train_seconds", "num_steps", "best_step")


@dataclass(frozen=True)
class Bench:
    """One model and its data; its trainings share a folder, so that data are prepared and the base asked once.

    Methods with virtual tokens share another: these take positions from the records.
    """

    name: str
    recipe: Mapping[str, Any]
    target: str
    metric: str
    folder: Path

    def keeptune(self, *command: str, method: str, fields: Mapping[str, Any]) -> bool:
        """Give one command with this method beside those before it, and tell whether it succeeded."""
        folder = self.run_folder(fields).parent
        path = folder / "recipe.yaml"
        folder.mkdir(parents=True, exist_ok=True)
        before = yaml.safe_load(path.read_text(encoding="utf-8"))["methods"] if path.exists() else {}
        methods = {**before, method: dict(fields)}
        made = {**self.recipe, "methods": methods, "output_dir": str(folder / "run")}
        path.write_text(yaml.safe_dump(made, sort_keys=False), encoding="utf-8")
        words = [sys.executable, "-m", "keeptune.cli", command[0], str(path), *command[1:], "--quiet"]
        return subprocess.run(words).returncode == 0

    def run_folder(self, fields: Mapping[str, Any]) -> Path:
        """Return the folder of the runs with a method."""
        return self.folder / ("inputs" if VIRTUAL.keys() & fields.keys() else "weights") / "run"

    def trained(self, name: str, arguments: Mapping[str, Any], *, rate: float) -> dict[str, Any] | None:
        """Return what one training says of itself, None where it failed; CPU-seconds are those of the process."""
        own, before = f"{name}-{rate:g}", _cpu_seconds()
        done = self.run_folder(arguments) / own / "training.json"
        if not self.keeptune("train", "--method", own, method=own, fields={**arguments, "learning_rate": rate}):
            return None
        facts = json.loads(done.read_text(encoding="utf-8"))
        return {**facts, "cpu_seconds": _cpu_seconds() - before}

    def measured(self, name: str, arguments: Mapping[str, Any], *, rate: float) -> dict[str, Any]:
        """Return scores on test, forgetting and costs of a method at a rate."""
        own = f"{name}-{rate:g}"
        training = self.trained(name, arguments, rate=rate)
        if training is None or not self.keeptune("run", method=own, fields={**arguments, "learning_rate": rate}):
            raise SystemExit(f"{self.name}: {own} failed")
        run = self.run_folder(arguments)
        scores = json.loads((run / "report.json").read_text(encoding="utf-8"))["scores"]
        rows = json.loads((run / "forgetting.json").read_text(encoding="utf-8"))["rows"]
        return {
            "learning_rate": rate,
            "layout": training["layout"],
            "validation_loss": training["best_value"],
            "cpu_seconds": training["cpu_seconds"],
            **{key: training[key] for key in COSTS},
            "scores": [
                row
                for row in scores
                if row["task"] == self.target and row["model"] in ("base", own) and not (row["shots"] or 0)
            ],
            "forgetting": [row for row in rows if row["model"] == own and row["suite"] in ("others", "self")],
        }


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def lab_bench(out: Path, *, folder: str = "lab-methods") -> Bench:
    """Return the lab's new wording, the demo's with half its examples."""
    lab = out / "lab"
    write_lab(lab, progress=Silent())
    recipe = yaml.safe_load((lab / "lab-demo.yaml").read_text(encoding="utf-8"))
    recipe["data"]["tasks"][0]["max_records"] = NUM_EXAMPLES
    recipe["evaluation"] |= {"baselines": ["zero-shot"]}
    for key in ("num_shots", "num_draws"):
        del recipe["evaluation"][key]
    recipe["retention"] = {"self_texts": recipe["retention"]["self_texts"]}
    return Bench("lab", recipe, "span_sentence", "exact_match", out / folder)


def p3_bench(out: Path, *, data: Path, model: Path) -> Bench:
    """Return common_gen in five wordings, and five other tasks that are not trained on."""

    out.mkdir(parents=True, exist_ok=True)
    target = out / "common_gen.jsonl"
    rows = [gzip.decompress((data / f"{name}.jsonl.gz").read_bytes()).decode("utf-8") for name in TARGET]
    target.write_text("".join(rows), encoding="utf-8")
    kept = {"train": False, "max_records": NUM_RETAINED}
    retained = [{"path": str(data / f"{name}.jsonl.gz"), "name": name, **kept} for name in RETAINED]
    recipe = {
        "model": str(model),
        "data": {
            "tasks": [{"path": str(target), "name": "common_gen", "max_records": NUM_EXAMPLES}, *retained],
            "max_length": 512,
            "over_length": "drop",
        },
        "training": {"num_train_epochs": 3, "tokens_per_micro_batch": 4096},
        "evaluation": {"metrics": ["rougeL", "exact_match"], "baselines": ["zero-shot"]},
        "retention": {"self_texts": 64},
    }
    return Bench("p3", recipe, "common_gen", "rougeL", out / "p3-methods")


def ladder(bench: Bench, name: str) -> dict[str, float | None]:
    """Return the validation loss at each rate that was tried, None where the training failed."""
    middle, arguments = METHODS[name]
    first = RATES.index(middle)
    waiting, found = [first, first - 1, first + 1], {}
    while waiting:
        i = waiting.pop(0)
        training = bench.trained(name, arguments, rate=RATES[i])
        found[i] = math.inf if training is None or training["best_value"] is None else training["best_value"]
        if waiting or len(found) == MOST_RATES:
            continue
        best = min(found, key=lambda j: found[j])
        waiting = [j for j in (best - 1, best + 1) if j not in found and 0 <= j < len(RATES)][:1]
    return {f"{RATES[i]:g}": found[i] if math.isfinite(found[i]) else None for i in sorted(found)}


def best_rate(losses: Mapping[str, float | None]) -> float:
    """Return the rate with the lowest validation loss."""
    finite = {rate: loss for rate, loss in losses.items() if loss is not None}
    return float(min(finite, key=lambda rate: finite[rate]))


def results() -> dict[str, Any]:
    """Return what was measured so far, by method and part."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def keep(name: str, part: str, found: Any) -> None:
    """Add one row to the results as they are now on the disk."""
    rows = results()
    rows[name] = {**rows.get(name, {"arguments": METHODS[name][1]}), part: found}
    ordered = {name: rows[name] for name in METHODS if name in rows}
    RESULTS.parent.mkdir(exist_ok=True)
    staged = RESULTS.with_suffix(".new")
    staged.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    staged.replace(RESULTS)


def measure(part: str, name: str, bench: Bench) -> None:
    """Measure one method on one bench, unless its row stands; all but the ladder take the rate that won there."""
    rows = results().get(name, {})
    if part == "ladder" and part not in rows:
        keep(name, part, ladder(bench, name))
    if part != "ladder" and part not in rows and "ladder" in rows:
        keep(name, part, bench.measured(name, METHODS[name][1], rate=best_rate(rows["ladder"])))
        print(f"{name}: {part} done", flush=True)


def table(part: str, metric: str) -> str:
    """Return a part's table in Markdown, a method a row, the base model first."""
    columns = [
        "method",
        "learning rate",
        metric,
        "others lost",
        "self lost (nats)",
        "trained",
        "memory",
        "CPU-s",
        "bytes",
    ]
    lines = [_line(columns), _line(["---"] * len(columns))]
    for name, rows in results().items():
        if part not in rows:
            continue
        row = rows[part]
        scores = {score["model"] == "base": score for score in row["scores"] if score["metric"] == metric}
        if len(lines) == 2:
            lines.append(_line(["base", "", _with_error(scores[True], "mean"), *[""] * 6]))
        costs = (row["trained_parameters"], row["peak_memory_bytes"] / 1e6, row["cpu_seconds"], row["artifact_bytes"])
        cells = [
            name,
            f"{row['learning_rate']:g}",
            _with_error(scores[False], "mean"),
            _lost(row, "others", metric),
            _lost(row, "self", "loss"),
            "{:,} | {:,.0f} MB | {:.0f} | {:,}".format(*costs),
        ]
        lines.append(_line(cells))
    return "\n".join(lines) if len(lines) > 2 else "None is measured so far."


def ladder_table() -> str:
    """Return the validation losses at each rate, a method a row, the best in bold."""
    tried = {rate for rows in results().values() for rate in rows.get("ladder", ())}
    rates = sorted(tried, key=float)
    lines = [_line(["method", *rates]), _line(["---"] * (len(rates) + 1))]
    for name, rows in results().items():
        if "ladder" in rows:
            best = f"{best_rate(rows['ladder']):g}"
            cells = [_loss(rows["ladder"], rate, bold=rate == best) for rate in rates]
            lines.append(_line([name, *cells]))
    return "\n".join(lines)


def rates_table() -> str:
    """Return the default learning rates of PEFT's methods beside those that the ladders give, a type a row."""
    rows = results()
    best = {name: best_rate(row["ladder"]) for name, row in rows.items() if "ladder" in row}
    lines = [_line(["`peft_type`", "default", "from"]), _line(["---"] * 3)]
    for peft_type, default in LEARNING_RATES.items():
        name = next((n for n, (_, arguments) in METHODS.items() if arguments.get("peft_type") == peft_type), "full")
        # OSF trains whole weights.
        like = "full" if peft_type == "OSF" else "lora"
        rate = LEARNING_RATES[None if like == "full" else "LORA"] * best[name] / best[like]
        is_usual = peft_type in {None, "LORA"}
        found = f"best in the lab {best[name]:g}"
        source = f"a usual rate; {found}" if is_usual else f"{found}, which gives {rate:.1g}"
        lines.append(_line([f"`{peft_type}`" if peft_type else "none: full", f"{default:g}", source]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _loss(losses: Mapping[str, float | None], rate: str, *, bold: bool) -> str:
    if rate not in losses:
        return ""
    loss = losses[rate]
    text = "failed" if loss is None else f"{loss:.3f}"
    return f"**{text}**" if bold else text


def _lost(row: Mapping[str, Any], suite: str, metric: str) -> str:
    found = [entry for entry in row["forgetting"] if entry["suite"] == suite and entry["metric"] == metric]
    return _with_error(found[0], "forgetting") if found else ""


def _with_error(row: Mapping[str, Any], key: str) -> str:
    error = row["standard_error"]
    return f"{row[key]:.3f}" + ("" if error is None else f" ± {error:.3f}")


def write_tables() -> None:
    """Put the tables between their marks in docs/methods.md."""
    tables = {
        "lab": table("lab", "exact_match"),
        "p3": table("p3", "rougeL"),
        "ladder": ladder_table(),
        "rates": rates_table(),
    }
    text = PAGE.read_text(encoding="utf-8")
    for name, made in tables.items():
        marks = f"<!-- {name} -->", f"<!-- /{name} -->"
        pattern = re.compile(f"{marks[0]}.*?{marks[1]}", re.DOTALL)
        text = pattern.sub(lambda _, made=made, marks=marks: f"{marks[0]}\n{made}\n{marks[1]}", text)
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    """Measure what was asked for, or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("methods-bench"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data/p3_sample"))
    parser.add_argument("--model", type=Path, default=Path("../shared/models/english-3m"))
    parser.add_argument("--methods", nargs="*", choices=[*METHODS], default=[*METHODS])
    parser.add_argument("--first", type=int, default=0, help="begin with this one of the methods, then go round")
    parser.add_argument("--parts", nargs="*", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--tables", action="store_true", help="write the tables into docs/methods.md, measure nothing")
    arguments = parser.parse_args()
    if arguments.tables:
        write_tables()
        return
    names = arguments.methods[arguments.first :] + arguments.methods[: arguments.first]
    benches = {
        "ladder": lab_bench(arguments.out, folder="lab-ladder"),
        "lab": lab_bench(arguments.out),
        "p3": p3_bench(arguments.out, data=arguments.data, model=arguments.model),
    }
    for part in arguments.parts:
        for name in names:
            measure(part, name, benches[part])


if __name__ == "__main__":
    main()
