"""SIGKILL at random moments, with real files, real syncs and a new process each time."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_KILLS = 10


def begin(folder: Path, kind: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.training.killed_run", str(folder), kind]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return json.loads(output)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "frozen"])
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path: Path, kind: str) -> None:
    process = begin(tmp_path / "reference", kind)
    began = time.perf_counter()
    expected = end(process)
    run_seconds = time.perf_counter() - began
    generator = random.Random(kind)
    num_kills, folder = 0, tmp_path / "killed"
    while True:
        process = begin(folder, kind)
        # A third of the run at most, so that the chain is long; the seed names the moments again.
        delay_seconds = generator.uniform(0.0, run_seconds / 3)
        try:
            process.wait(timeout=delay_seconds if num_kills < NUM_KILLS else 300)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            num_kills += 1
    assert num_kills >= 3, "the run was too short to be killed"
    digest = end(process)
    assert {**digest, "checkpoints": None} == {**expected, "checkpoints": None}, num_kills
    assert not [path.name for path in (folder / "checkpoints").iterdir() if "." in path.name]
