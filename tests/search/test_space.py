"""Ranges in a recipe: what they are, what is refused, and the plain recipes that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from keeptune.config import is_fractional, load_recipe, make_recipe
from keeptune.errors import RecipeError
from keeptune.search.space import Plan, Range, plan_search, with_values

TASKS = {"tasks": [{"path": "d.jsonl"}]}


def plan(methods: dict[str, Any], **sections: Any) -> Plan:
    recipe = {"model": "m", "output_dir": "o", "data": TASKS, "methods": methods, **sections}
    return plan_search(recipe, where="r.yaml", is_fractional=is_fractional)


def test_a_range_is_taken_out_and_the_largest_value_stands_in_its_place() -> None:
    found = plan(
        {
            "lora": {
                "peft_type": "LORA",
                "r": {"choices": [8, 32, 16]},
                "learning_rate": {"low": 1e-5, "high": 1e-3, "log": True},
            }
        },
        training={"num_train_epochs": {"low": 1, "high": 4}, "weight_decay": {"low": 0, "high": 1, "step": 0.5}},
    )  # fmt: skip
    assert found.ranges == (
        Range("methods.lora.r", choices=("8", "32", "16")),
        Range("methods.lora.learning_rate", 1e-5, 1e-3, log=True),
        Range("training.num_train_epochs", 1, 4),
        Range("training.weight_decay", 0.0, 1.0, step=0.5),
    )
    assert found.recipe["methods"]["lora"] == {"peft_type": "LORA", "r": 32, "learning_rate": 1e-3}
    assert found.recipe["training"] == {"num_train_epochs": 4, "weight_decay": 1.0}


def test_whole_ends_of_a_setting_that_may_be_a_fraction_give_fractions() -> None:
    ranges = plan(
        {"full": {"l2_base": {"low": 0, "high": 1}}}, training={"num_train_epochs": {"low": 1, "high": 3}}
    ).ranges
    assert [type(range_.high) for range_ in ranges] == [float, int]


def test_a_range_ends_at_its_last_step() -> None:
    ranges = plan({"full": {}}, training={"num_train_epochs": {"low": 1, "high": 6, "step": 2},
                                          "weight_decay": {"low": 0.0, "high": 0.2, "step": 0.05}}).ranges  # fmt: skip
    assert [range_.high for range_ in ranges] == [5, pytest.approx(0.2)]


@pytest.mark.parametrize(
    ("method", "low", "high"),
    [
        ({}, 1e-5, 1e-3),
        ({"peft_type": "lora"}, 1e-4, 1e-2),
        ({"peft_type": "IA3"}, 1e-4, 1e-1),
        ({"peft_type": "PROMPT_TUNING"}, 1e-3, 1.0),
    ],
)
def test_auto_is_a_range_of_the_method(method: dict[str, str], low: float, high: float) -> None:
    (found,) = plan({"a": {**method, "learning_rate": "auto"}}).ranges
    assert (found.low, found.high, found.log) == (low, high, True)


def test_auto_of_the_training_keeps_its_own_meaning() -> None:
    found = plan({"full": {}}, training={"tokens_per_step": "auto", "num_train_epochs": "auto"})
    assert found.ranges == (Range("training.num_train_epochs", choices=("1", "2", "3")),)
    assert found.recipe["training"]["tokens_per_step"] == "auto"


def test_a_method_searches_its_own_ranges_and_those_of_the_training() -> None:
    found = plan(
        {"a.b": {"learning_rate": "auto"}, "a": {"learning_rate": "auto"}},
        training={"weight_decay": {"choices": [0, 0.1]}},
    )
    assert [range_.key for range_ in found.of("a.b")] == ["methods.a.b.learning_rate", "training.weight_decay"]
    assert [range_.key for range_ in found.of("a")] == ["methods.a.learning_rate", "training.weight_decay"]
    assert set(found.recipe["methods"]) == {"a.b", "a"}


def test_corners_hold_every_end_and_every_choice() -> None:
    found = plan(
        {"lora": {"peft_type": "LORA", "r": {"choices": [8, 4, 6]}, "learning_rate": {"low": 0.1, "high": 0.2}}}
    )
    corners = [corner["methods"]["lora"] for corner in found.corners()]
    assert {corner["r"] for corner in corners} == {4, 6, 8}
    assert {corner["learning_rate"] for corner in corners} == {0.1, 0.2}


def test_a_weight_of_replay_goes_where_nothing_is_replayed() -> None:
    recipe = {"methods": {"full": {"replay_fraction": 0.1, "replay_kl": 0.3}}}
    without = with_values(recipe, {"methods.full.replay_fraction": 0.0})
    assert without["methods"]["full"] == {"replay_fraction": 0.0}
    assert recipe["methods"]["full"]["replay_kl"] == 0.3


@pytest.mark.parametrize(
    ("range_", "message"),
    [
        ({"choices": []}, "found choices: []; expected a list with entries. List what may be chosen."),
        ({"choices": 8}, "found choices: 8; expected a list with entries."),
        ({"choices": [8, 4, 8]}, "found the choice 8 twice; expected each once. Remove one of them."),
        ({"choices": [8], "log": True}, "found choices and log in one range; expected choices alone."),
        ({"low": 1}, "found a range without high; expected low and high, or choices. Add it."),
        ({"low": 2, "high": 2}, "found a range from 2 to 2, which is empty; expected low < high. Fix the range."),
        ({"low": "a", "high": 2}, "found a range from 'a' to 2; expected numbers. Fix them, or use choices."),
        ({"low": 0.0, "high": float("inf")}, "found a range from 0.0 to inf; expected numbers. Fix them, or use"),
        ({"low": float("nan"), "high": 1.0}, "found a range from nan to 1.0; expected numbers. Fix them, or use"),
        ({"low": 0, "high": 2, "log": True}, "found log: true with low: 0; expected low > 0, which has a logarithm."),
        ({"low": 1, "high": 2, "log": "yes"}, "found log: 'yes'; expected true or false. Fix it."),
        ({"low": 1, "high": 2, "log": True, "step": 1}, "found log and step in one range; expected one of them."),
        ({"low": 1, "high": 2, "step": 3}, "found step: 3; expected a number above 0 that fits between low and high."),
        ({"low": 1, "hihg": 2}, "found 'hihg' in a range; expected low and high with log or step, or choices. Did you "
         "mean 'high'?"),
        ("auto", "found auto; expected it for learning_rate, num_virtual_tokens, r, replay_fraction, replay_kl alone."),
    ],
)  # fmt: skip
def test_a_range_that_is_none_is_refused(range_: Any, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        plan({"lora": {"peft_type": "LORA", "lora_dropout": range_}})
    assert str(error.value).startswith(f"r.yaml: methods.lora.lora_dropout: {message}")


def test_every_wrong_range_is_told_at_once() -> None:
    with pytest.raises(RecipeError) as error:
        plan(
            {"full": {"learning_rate": {"low": 2, "high": 1}}},
            seed={"choices": [1, 2]},
            data={"tasks": [{"path": "d", "max_records": {"low": 1, "high": 2}}], "test_fraction": {"choices": [0.1]}},
        )
    where = [line.split(": found")[0] for line in str(error.value).split("\n")]
    assert where == [
        "r.yaml: methods.full.learning_rate", "r.yaml: data.tasks.0.max_records", "r.yaml: data.test_fraction",
        "r.yaml: seed",
    ]  # fmt: skip
    assert "the data, the splits and what is measured are the same in every trial" in str(error.value)


def test_methods_that_are_no_section_are_left_for_the_recipe_to_refuse() -> None:
    for methods in (["full"], "full"):
        with pytest.raises(RecipeError, match=r"r\.yaml: methods: found .*full.*; expected a section"):
            make_recipe(plan(methods).recipe, path=Path("r.yaml"))  # pyright: ignore[reportArgumentType]


def test_a_run_refuses_ranges_and_names_the_command_that_takes_them(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    methods = {"full": {"learning_rate": "auto"}, "lora": {"peft_type": "LORA", "r": {"choices": [4]}}}
    path.write_text(yaml.safe_dump({"model": "m", "output_dir": "o", "data": TASKS, "methods": methods}))
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    lines = str(error.value).split("\n")
    assert [line.split(": ")[1] for line in lines] == ["methods.full.learning_rate", "methods.lora.r"]
    assert (
        "found a range; expected a value, as only a search takes ranges. Write a value, or find one with "
        "`keeptune search`" in lines[0]
    )


def test_what_ranges_leave_is_a_recipe() -> None:
    found = plan({"full": {"learning_rate": "auto"}})
    assert make_recipe(found.recipe, path=Path("r.yaml")).methods["full"].learning_rate == 1e-3
