"""What a GPU changes: bf16 compute, frozen weights in bf16, trained ones in fp32, its own peak memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from keeptune import stages
from keeptune.storage import read_json
from tests.stages import world

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.mark.parametrize("make_base", [world.llama, world.t5])
@pytest.mark.parametrize("bf16", [None, False])
def test_a_whole_run_on_a_gpu_ends_with_fp32_weights_and_scores(
    make_base: Callable[[Path], Path], bf16: bool | None, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base")
    path = world.recipe_file(tmp_path, model=base, data=world.records(tmp_path / "data.jsonl"), device="cuda")
    with stages.open_run(world.recipe(path, **{"training.bf16": bf16}), context=world.context()) as run:
        stages.train(run)
        stages.evaluate(run)
        stages.report(run)
    for name, place in (("full", "model/model"), ("lora", "adapter/adapter_model")):
        facts = read_json(run.folder / name / "training.json")
        assert (facts["device"], facts["dtype"]) == ("cuda", "float32" if bf16 is False else "bfloat16")
        assert 0 < facts["peak_memory_bytes"] < 2**30
        weights = load_file(run.folder / name / f"{place}.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        events = (run.folder / name / "events.jsonl").read_text().splitlines()
        assert any('"validation"' in line for line in events)
    models = {score["model"] for score in read_json(run.folder / "report.json")["scores"]}
    assert models == {"base", "full", "lora"}
