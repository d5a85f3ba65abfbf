"""A whole run, killed at random moments and started again each time, ends in the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.stages import world

NUM_KILLS = 20
LONGEST_SECONDS = 16.0
RESULTS = (
    "data/train.jsonl",
    "full/model/model.safetensors",
    "lora/adapter/adapter_model.safetensors",
    "base/zero-shot/samples.jsonl",
    "full/test/samples.jsonl",
    "lora/test/samples.jsonl",
    "paired.json",
)


def digest(run: Path) -> dict[str, Any]:
    """Return the hashes of what a run left, and its logs without durations and resumptions."""
    value: dict[str, Any] = {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in RESULTS}
    for method in ("full", "lora"):
        events = [json.loads(line) for line in (run / method / "events.jsonl").read_text().splitlines()]
        value[method] = [
            {key: event[key] for key in sorted(event) if "seconds" not in key and "per_second" not in key}
            for event in events
            if event["event"] in ("step", "validation")
        ]
    return value


@pytest.mark.slow
def test_twenty_kills_change_no_byte(tmp_path: Path) -> None:
    base = world.llama(tmp_path / "base", dropout=0.1)
    data = world.records(tmp_path / "data.jsonl", number=200)
    training = {"num_train_epochs": 6, "tokens_per_step": 256, "tokens_per_micro_batch": 128, "save_steps": 7}
    path = world.recipe_file(tmp_path, model=base, data=data, training=training)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(run: str) -> list[str]:
        return [sys.executable, "-m", "keeptune.cli", "run", str(path), "-q", "--set", f"output_dir={tmp_path / run}"]

    subprocess.run(command("whole"), check=True, env=environment, stdout=subprocess.DEVNULL)
    reference = digest(tmp_path / "whole")
    generator = random.Random(0)
    kills = finished = 0
    while kills < NUM_KILLS or not finished:
        with subprocess.Popen(command(f"killed-{finished}"), env=environment, stdout=subprocess.DEVNULL) as process:
            try:
                code = process.wait(timeout=generator.uniform(0.2, LONGEST_SECONDS))
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
                continue
        assert code == 0, f"start after {kills} kills"
        assert digest(tmp_path / f"killed-{finished}") == reference
        finished += 1
    # The last run too, wherever the last kill left it.
    subprocess.run(command(f"killed-{finished}"), check=True, env=environment, stdout=subprocess.DEVNULL)
    assert digest(tmp_path / f"killed-{finished}") == reference
