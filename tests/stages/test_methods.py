"""A recipe's methods with their defaults, and what is held against the training before any data are prepared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keeptune import stages
from keeptune.config import LEARNING_RATES, MethodFields
from keeptune.errors import RecipeError
from keeptune.stages.methods import learning_rate
from tests.stages import world


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (MethodFields(), 2e-5),
        (MethodFields(peft_type="LORA"), 2e-4),
        (MethodFields(peft_type="ia3"), LEARNING_RATES["IA3"]),
        (MethodFields(peft_type="C3A"), 2e-4),
        (MethodFields(peft_type="IA3", learning_rate=0.5), 0.5),
    ],
)
def test_a_method_has_the_learning_rate_of_its_kind(fields: MethodFields, expected: float) -> None:
    assert learning_rate(fields) == expected


def never_read(folder: Path) -> Path:
    (folder / "rows.jsonl").touch()
    return folder / "rows.jsonl"


def test_virtual_tokens_leave_room_for_a_record(tmp_path: Path) -> None:
    base, methods = world.llama(tmp_path / "base"), {"p": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 504}}
    path = world.recipe_file(tmp_path, model=base, data=never_read(tmp_path), methods=methods)
    stages.check_methods(world.recipe(path))
    with pytest.raises(RecipeError) as caught:
        stages.check_methods(world.recipe(path, **{"methods.p.num_virtual_tokens": 5000}))
    assert str(caught.value) == (
        "methods.p.num_virtual_tokens: found 5000; expected at most 504, as the model has 512 positions and a record "
        "needs some of them. Lower it, to methods.p.num_virtual_tokens=20 for instance."
    )


@pytest.mark.parametrize("size", [{"vocab_size": 10**9}, {"intermediate_size": 10**9}, {"vocab_size": -5}])
def test_a_model_that_is_larger_than_its_weight_files_is_refused_before_it_is_made(
    tmp_path: Path, size: dict[str, int]
) -> None:
    base = world.llama(tmp_path / "base")
    path = world.recipe_file(tmp_path, model=base, data=world.records(tmp_path / "data.jsonl", number=10))
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(config | size), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"found a model of [\d,]+ weights, and weight files that hold|negative dim"):
        stages.check_methods(world.recipe(path))


def test_a_prefix_is_not_recomputed(tmp_path: Path) -> None:
    methods = {"prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}, "lora": {"peft_type": "LORA"}}
    path = world.recipe_file(tmp_path, model=world.llama(tmp_path / "base"), data=never_read(tmp_path), methods=methods)
    stages.check_methods(world.recipe(path))
    with pytest.raises(RecipeError) as caught:
        stages.check_methods(world.recipe(path, **{"training.gradient_checkpointing": True}))
    assert str(caught.value) == (
        "training.gradient_checkpointing: found true with methods.prefix, a PREFIX_TUNING, whose keys and values "
        "recomputed layers do not read; expected false. Set training.gradient_checkpointing=false, or give the method "
        "a recipe of its own."
    )
