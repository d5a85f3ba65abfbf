"""Quantised base weights on a GPU: the same LoRA over 4-bit, 8-bit and unquantised weights; loss, memory and seconds.

    python benchmarks/quantized.py [--out FOLDER] [--model FOLDER] [--cpu]

Each is `keeptune run RECIPE` in a process of its own on the lab's new wording, or with `--model` from that base model.
The results go to `benchmarks/results/quantized.json`. Without a GPU it says so and does nothing, unless `--cpu` asks
for a run on the processor, which bitsandbytes serves too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from keeptune.lab.folder import write_lab
from keeptune.progress import Silent

RESULTS = Path(__file__).parent / "results" / "quantized.json"
BITS = (None, "8bit", "4bit")
LORA = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "learning_rate": 3e-3}
COSTS = (
    "trained_parameters",
    "total_parameters",
    "peak_memory_bytes",
    "train_seconds",
    "best_value",
    "layout",
    "device",
)


def recipe(lab: Path, *, model: Path | None, bits: str | None, device: str, out: Path) -> dict[str, Any]:
    """Return the demo's recipe with 500 examples and LoRA alone."""
    made = yaml.safe_load((lab / "lab-demo.yaml").read_text(encoding="utf-8"))
    made["data"]["tasks"][0]["max_records"] = 500
    made["evaluation"] = {"metrics": ["exact_match", "rougeL"], "baselines": ["zero-shot"]}
    made["retention"] = {"self_texts": made["retention"]["self_texts"]}
    own = {"quantization": bits, "methods": {"lora": LORA}, "device": device, "output_dir": str(out / str(bits))}
    return {**made, **own, **({"model": str(model)} if model else {})}


def run(made: dict[str, Any], path: Path) -> dict[str, Any]:
    """Make one run and return what it says of costs and scores."""
    path.write_text(yaml.safe_dump(made, sort_keys=False), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "keeptune.cli", "run", str(path)], check=True)
    folder = Path(made["output_dir"])
    training = json.loads((folder / "lora" / "training.json").read_text(encoding="utf-8"))
    scores = json.loads((folder / "report.json").read_text(encoding="utf-8"))["scores"]
    return {**{key: training[key] for key in COSTS}, "scores": scores}


def main() -> None:
    """Measure each number of bits where there is a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("quantized"))
    parser.add_argument("--model", type=Path, help="a base model other than the lab's")
    parser.add_argument("--cpu", action="store_true", help="run on the processor")
    arguments = parser.parse_args()
    if not arguments.cpu and not torch.cuda.is_available():
        print("torch sees no GPU: nothing was measured")
        return
    lab, device = arguments.out / "lab", "cpu" if arguments.cpu else "cuda"
    write_lab(lab, progress=Silent())
    results = {}
    for bits in BITS:
        made = recipe(lab, model=arguments.model, bits=bits, device=device, out=arguments.out)
        results[str(bits)] = run(made, arguments.out / f"{bits}.yaml")
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
