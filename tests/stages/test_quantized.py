"""A run over quantised base weights: trained, scored and planned over them; what does not fit them is refused."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from keeptune import stages
from keeptune.errors import FolderInUseError, RecipeError
from keeptune.recipe_text import read_yaml
from keeptune.storage import read_json
from tests.stages import world

pytest.importorskip("bitsandbytes", reason="bitsandbytes, the extra `quantized`, is not installed")
pytest.importorskip("accelerate", reason="accelerate, of the extra `quantized`, is not installed")
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LORA: dict[str, Any] = {"lora": {"peft_type": "LORA", "r": 4, "learning_rate": 1e-2}}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    base = world.llama(folder / "base")
    return world.recipe_file(folder, model=base, data=world.records(folder / "data.jsonl", number=40), methods=LORA)


def test_a_run_trains_and_answers_over_quantised_weights(path: Path) -> None:
    with stages.open_run(world.recipe(path, quantization="4bit"), context=world.context()) as run:
        data = stages.prepare(run)
        stages.train(run, data=data)
        stages.evaluate(run, data=data)
    folder = path.parent / "run"
    assert read_yaml(folder / "recipe.yaml")["quantization"] == "4bit"
    assert read_json(folder / "lora" / "adapter" / "manifest.json")["quantization"] == "4bit"
    assert read_json(folder / "lora" / "training.json")["layout"] == "packed"
    with (
        pytest.raises(FolderInUseError, match=r"quantization was '4bit', now unset"),
        stages.open_run(world.recipe(path), context=world.context()),
    ):
        pass


def test_a_plan_counts_quantised_weights_in_their_bits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("keeptune.stages.plan"), "_PROBE_SECONDS", 0.0)
    plain, short = (
        stages.plan(world.recipe(path, quantization=bits), context=world.context()).methods[0]
        for bits in (None, "4bit")
    )
    assert plain.memory is not None and short.memory is not None
    assert short.memory.weights < 0.7 * plain.memory.weights
    assert (short.trained_parameters, short.total_parameters) == (plain.trained_parameters, plain.total_parameters)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"full": {}}, "methods.full: found full fine-tuning of a quantised base model"),
        ({"lokr": {"peft_type": "LOKR"}}, "methods.lokr.peft_type: found 'LOKR' over a quantised base model"),
    ],
)
def test_what_quantised_weights_cannot_serve_is_refused_before_data(
    methods: dict[str, Any], message: str, path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        stages.check_methods(world.recipe(path, quantization="8bit", methods=methods))


def test_a_model_is_not_quantised_twice(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from keeptune.model import folder

    check = folder.check_model_folder
    monkeypatch.setattr(folder, "check_model_folder", lambda place: replace(check(place), quantised=True))
    with pytest.raises(RecipeError, match="quantization: found 4bit and a model that is stored quantised"):
        stages.check_methods(world.recipe(path, quantization="4bit"))
