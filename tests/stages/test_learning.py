"""Training teaches: a random encoder-decoder learns a task that it could not do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from keeptune import stages
from keeptune.storage import read_json
from tests.stages import world


@pytest.mark.slow
def test_a_random_t5_learns_to_copy_the_first_word(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    training = {
        "num_train_epochs": 60,
        "tokens_per_step": 1024,
        "tokens_per_micro_batch": 4096,
        "lr_scheduler_type": "constant_with_cooldown",
        "patience": None,
    }
    path = world.recipe_file(
        tmp_path,
        model=world.t5(tmp_path / "base", width=64),
        data=world.records(tmp_path / "data.jsonl", number=600),
        methods={"full": {"learning_rate": 2e-3}},
        training=training,
        evaluation={"metrics": ["exact_match"], "max_new_tokens": 8},
    )
    with stages.open_run(world.recipe(path), context=world.context()) as run:
        stages.train(run)
        stages.evaluate(run)
        stages.report(run)
    scores = read_json(tmp_path / "run" / "report.json")["scores"]
    exact_match = {s["model"]: s["mean"] for s in scores if s["metric"] == "exact_match" and s["task"] == "all"}
    assert exact_match["base"] < 0.1
    assert exact_match["full"] > 0.9
