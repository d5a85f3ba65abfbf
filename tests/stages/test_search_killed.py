"""A real search, whose driver and trials are killed at random moments, ends in the trials of one that nobody killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.stages import world

NUM_KILLS = 10
LONGEST_SECONDS = 12.0


def trials(run: Path) -> dict[str, Any]:
    summary = json.loads((run / "search" / "search.json").read_text())
    rows = summary["methods"]["full"]["trials"]
    return {row["name"]: (row["params"], row["value"], row["state"]) for row in rows}


def children(process: subprocess.Popen[bytes]) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_ten_kills_change_no_trial_and_leave_no_process(tmp_path: Path) -> None:
    data = world.records(tmp_path / "data.jsonl", number=200)
    training = {"num_train_epochs": 6, "tokens_per_step": 256, "tokens_per_micro_batch": 128, "save_steps": 7}
    methods = {"full": {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}}
    base = world.llama(tmp_path / "base")
    path = world.recipe_file(tmp_path, model=base, data=data, training=training, methods=methods)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(run: str) -> list[str]:
        options = ["--trials", "4", "--jobs", "2", "-q", "--set", f"output_dir={tmp_path / run}"]
        return [sys.executable, "-m", "keeptune.cli", "search", str(path), *options]

    subprocess.run(command("whole"), check=True, env=environment, stdout=subprocess.DEVNULL)
    generator = random.Random(0)
    for number in range(NUM_KILLS):
        with subprocess.Popen(command("killed"), env=environment, stdout=subprocess.DEVNULL) as process:
            time.sleep(generator.uniform(1.0, LONGEST_SECONDS))
            begun = children(process)
            if number % 2 and begun:
                os.kill(generator.choice(begun), signal.SIGKILL)
                time.sleep(generator.uniform(0.1, LONGEST_SECONDS))
                begun = [*begun, *children(process)]
            process.kill()
        until = time.monotonic() + 10
        while time.monotonic() < until and any(map(lives, begun)):
            time.sleep(0.1)
        assert not any(map(lives, begun)), f"kill {number} left a trial behind"
    subprocess.run(command("killed"), check=True, env=environment, stdout=subprocess.DEVNULL)
    assert trials(tmp_path / "killed") == trials(tmp_path / "whole")
