from __future__ import annotations

import json
from pathlib import Path

from keeptune.storage import read_json
from tests.stages import world


def tied_run(folder: Path, keeptune: world.Keeptune) -> tuple[Path, str]:
    """Run two methods whose exact match is 0 at every validation; return the run folder and what was said."""
    lines = [{"prompt": f"say {i}", "completion": f"this is far too long an answer, {i * 7919}"} for i in range(24)]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    evaluation = {"metrics": ["exact_match", "chrf"], "select_by": "exact_match", "max_new_tokens": 4}
    path = world.recipe_file(folder, model=world.llama(folder / "base"), data=data, evaluation=evaluation)
    result = keeptune("run", path)
    assert result.returncode == 0, result.stderr
    return folder / "run", result.stderr


def validations(run: Path, method: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / method / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "validation" and line.get("metric") is not None]


def test_where_the_metric_never_moves_the_loss_chooses_checkpoint_and_method_and_it_is_said(
    tmp_path: Path, keeptune: world.Keeptune
) -> None:
    run, said = tied_run(tmp_path, keeptune)
    losses = {}
    for method in ("full", "lora"):
        taken = validations(run, method)
        assert [v["value"] for v in taken] == [0.0, 0.0]
        lowest = min(taken, key=lambda v: v["loss"])
        facts = read_json(run / method / "training.json")
        assert (facts["best_step"], facts["best_value"], facts["metric_moved"]) == (lowest["step"], 0.0, False)
        assert lowest is taken[-1]
        losses[method] = facts["best_loss"]
    selection = read_json(run / "selection.json")
    assert selection["selected"] == min(losses, key=lambda name: losses[name])
    # Nothing else was measured, and yet the answers that never end are counted, of base and methods.
    broken = read_json(run / "forgetting.json")["canaries"]
    assert [row["model"] for row in broken] == ["base", "full", "lora"]
    assert all(row["num_unended"] == row["num_records"] for row in broken if row["model"] == "full")
    assert "exact_match was 0.000 at all 2 validations, so the validation loss chose step" in said
    note = (
        f"full, lora have the same exact_match on validation, 0.000: {selection['selected']} has the lowest validation "
        "loss of these."
    )
    assert selection["note"] == note
    assert note in said
    page = (run / "report.html").read_text(encoding="utf-8")
    assert note in page
    assert "The lowest validation loss decided which weights are kept." in page
