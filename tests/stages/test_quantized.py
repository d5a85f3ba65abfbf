"""A run over quantised base weights: trained, scored and planned over them; what does not fit them is refused."""

from __future__ import annotations

import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from keeptune import stages
from keeptune.errors import FolderInUseError, RecipeError
from keeptune.model.artifact import load_artifact
from keeptune.recipe_text import read_yaml
from keeptune.stages import answering, way
from keeptune.storage import read_json
from tests.model.bases import logits
from tests.stages import world
from tests.stages.test_compare import other_model

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


@pytest.fixture(scope="module")
def trained(path: Path) -> Path:
    """Return the folder of a run over 4-bit weights."""
    with stages.open_run(world.recipe(path, quantization="4bit"), context=world.context()) as run:
        data = stages.prepare(run)
        stages.train(run, data=data)
        stages.evaluate(run, data=data)
    return path.parent / "run"


def test_a_run_trains_and_answers_over_quantised_weights(trained: Path, path: Path) -> None:
    assert read_yaml(trained / "recipe.yaml")["quantization"] == "4bit"
    assert read_json(trained / "lora" / "adapter" / "manifest.json")["quantization"] == "4bit"
    assert read_json(trained / "lora" / "training.json")["layout"] == "packed"
    with (
        pytest.raises(FolderInUseError, match=r"quantization was '4bit', now unset"),
        stages.open_run(world.recipe(path), context=world.context()),
    ):
        pass


def test_compare_reads_each_model_over_the_bits_that_it_was_trained_over(
    trained: Path, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = shutil.copytree(trained / "lora" / "adapter", tmp_path / "adapter")
    whole = other_model(tmp_path / "whole", base=path.parent / "base")
    foreign = shutil.copytree(adapter, tmp_path / "foreign")
    (foreign / "manifest.json").unlink()
    read: dict[str, Any] = {}

    def load_at(run: Any, data: Any, artifact: Path, *, name: str) -> Any:
        read[name] = data.base.facts.quantization
        return way.load_at(run, data, artifact, name=name)

    monkeypatch.setattr(answering, "load_at", load_at)
    models = [str(model) for model in (trained / "lora", adapter, whole, foreign)]
    value = read_json(stages.compare(models, out=None, context=world.context()))
    assert read == {"adapter": "4bit", "whole": None, "foreign": None}
    same = [p for p in value["pairs"] if {p["model"], p["against"]} == {"run/lora", "adapter"}]
    assert same and all(p["difference"] == 0.0 for p in same)
    losses = [p for p in value["pairs"] if {p["model"], p["against"]} == {"run/lora", "foreign"}]
    assert any(p["metric"] == "loss" and p["difference"] != 0.0 for p in losses)


def test_the_card_of_the_delivered_adapter_shows_how_to_read_it(
    trained: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained / "instruct-model"
    (shown,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    # Else, where a processor multiplies bf16, bitsandbytes stores the weights anew, and these are too small for it.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"print": lambda _: None}
    exec(shown, names)
    alike = {"base": path.parent / "base", "device": torch.device("cpu"), "dtype": torch.float32}
    assert torch.equal(logits(names["model"]), logits(load_artifact(folder, quantization="4bit", **alike)))
    assert not torch.equal(logits(names["model"]), logits(load_artifact(folder, **alike)))


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
