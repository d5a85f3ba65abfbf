"""A training in a process of its own: says "ready" before it begins and, at the end, what it ended with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.training.tiny import digest_run, make_model, run


def main(folder: Path, *, frozen: bool) -> None:
    torch.set_num_threads(1)
    model = make_model(frozen=frozen)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    run(model, folder, num_train_epochs=60, save_steps=7, evals_per_epoch=1)
    sys.stdout.write(json.dumps(digest_run(model, folder)) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), frozen=sys.argv[2] == "frozen")
