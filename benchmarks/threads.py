"""How waiting threads should behave: training speed by OpenMP's setting, on quiet cores and beside another process.

    python benchmarks/threads.py [--rounds 3]

Each measurement is a process of its own that trains the lab's base model on random tokens; settings alternate. The
other process counts on one core. Results: `benchmarks/results/threads.json`. About five minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from training import machine

RESULTS = Path(__file__).parent / "results" / "threads.json"
SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=20000": {"GOMP_SPINCOUNT": "20000"},
}
NUM_PASSES, NUM_TOKENS, NUM_ROWS = 8, 512, 8
COUNTING = [sys.executable, "-c", "while True: pass"]


def worker() -> None:
    """Print the tokens per second of a few forward and backward passes in bf16."""
    import numpy as np
    import torch

    from keeptune.lab.folder import MODELS
    from keeptune.model.load import load_model
    from keeptune.model.loss import batch_loss
    from keeptune.text.batches import pack
    from keeptune.text.tokens import Example

    model = load_model(MODELS / "lab-base", device=torch.device("cpu"), dtype=torch.float32)
    rng, loss_mask = np.random.default_rng(0), np.arange(NUM_TOKENS) > 0
    rows = rng.integers(4, 2_000, size=(NUM_ROWS, NUM_TOKENS), dtype=np.int32)
    batch = pack([Example(row, loss_mask=loss_mask) for row in rows])
    started = 0.0
    for i in range(NUM_PASSES + 1):
        if i == 1:  # The first pass warms up.
            started = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = batch_loss(model, batch)
        loss.backward()
    print(NUM_PASSES * NUM_ROWS * NUM_TOKENS / (time.perf_counter() - started))


def measure(setting: dict[str, str], *, busy: bool) -> float:
    """Return the tokens per second of one worker; None of the caller's own settings reach it."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    other = subprocess.Popen(COUNTING) if busy else None
    try:
        command = [sys.executable, __file__, "--worker"]
        done = subprocess.run(command, env={**inherited, **setting}, capture_output=True, text=True, check=True)
    finally:
        if other is not None:
            other.kill()
            other.wait()
    return float(done.stdout)


def main() -> None:
    """Measure every setting in turn, several times over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each setting")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker()
        return
    found: dict[str, dict[str, list[float]]] = {name: {"quiet": [], "busy": []} for name in SETTINGS}
    for _ in range(arguments.rounds):
        for busy in (False, True):
            for name, setting in SETTINGS.items():
                found[name]["busy" if busy else "quiet"].append(measure(setting, busy=busy))
    results = {"machine": machine(), "tokens_per_second": found}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for name, rates in found.items():
        print(f"{name}: " + ", ".join(f"{kind} {median(values):,.0f} tokens/s" for kind, values in rates.items()))


if __name__ == "__main__":
    main()
