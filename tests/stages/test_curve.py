"""A learning curve from a recipe to its page, on tiny models: nested records, what is foretold, what is refused."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from keeptune import stages
from keeptune.config import load_recipe
from keeptune.errors import FolderInUseError, RecipeError
from keeptune.storage import read_json, write_record
from tests.stages import world

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SHORT = {"num_train_epochs": 1, "tokens_per_step": 256, "tokens_per_micro_batch": 128}


class Ended:
    """A process that is at its end."""

    returncode, stdin = 0, None

    def poll(self) -> int:
        return self.returncode

    wait = poll


class Launcher:
    """Trains the one in `trained` in this process, writes a loss of 2 + 8 / √n for others; notes what it was given."""

    def __init__(self, *, trained: str = "") -> None:
        self.trained = trained
        self.given: dict[str, tuple[int, list[str]]] = {}

    def __call__(self, recipe: Path, *, parts: Path, subset: str, log: Path) -> subprocess.Popen[bytes]:
        lines = (parts / subset / "train.jsonl").read_text(encoding="utf-8").splitlines()
        loaded = load_recipe(recipe)
        self.given[f"{recipe.parent.name}/{recipe.stem}"] = (loaded.seed, [json.loads(line)["id"] for line in lines])
        with stages.open_run(loaded, context=world.context()) as run:
            if recipe.stem == self.trained:
                stages.run_trial(run, parts, subset=subset)
            else:
                value = 2.0 + 8.0 * len(lines) ** -0.5 + 0.001 * loaded.seed
                facts = {"drift": None, "drops": {}, "excess": None, "seconds": 1.5}
                write_record(run.folder / "result.json", {"value": value, **facts})
        return cast("subprocess.Popen[bytes]", Ended())


def curved(path: Path, launch: Launcher, *, sizes: str | None = "8,16,32") -> Path:
    return stages.curve(path, overrides=[], sizes=sizes, num_jobs=1, context=world.context(), launch=launch)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.llama(tmp_path_factory.mktemp("base"))


def recipe(folder: Path, base: Path, **sections: Any) -> Path:
    records = world.records(folder / "data.jsonl", number=60)
    methods = {"full": {"learning_rate": 1e-3}}
    return world.recipe_file(folder, model=base, data=records, **{"training": SHORT, "methods": methods, **sections})


def test_a_curve_foretells_the_next_doubling_from_nested_records_of_three_seeds(tmp_path: Path, base: Path) -> None:
    launch = Launcher()
    path = recipe(tmp_path, base, seed=5)
    found = read_json(curved(path, launch))["methods"]["full"]
    assert [(one["num_records"], one["seed"]) for one in found["measured"]] == [
        (number, seed) for number in (8, 16, 32) for seed in (0, 1, 2)
    ]
    assert found["law"]["doubling"]["num_records"] == 64
    assert found["law"]["doubling"]["gain"] == pytest.approx(8.0 * (32**-0.5 - 64**-0.5), rel=0.03)
    for repeat in (0, 1, 2):
        seeds, sets = zip(*(launch.given[f"full/records-{n}-seed-{repeat}"] for n in (8, 16, 32)), strict=True)
        assert set(seeds) == {5 + repeat}
        assert [len(records) for records in sets] == [8, 16, 32]
        assert set(sets[0]) < set(sets[1]) < set(sets[2])
    assert set(launch.given["full/records-8-seed-0"][1]) != set(launch.given["full/records-8-seed-1"][1])
    page = (tmp_path / "run" / "curve" / "report.html").read_text(encoding="utf-8")
    assert "full: Loss" in page and "more records of this kind help" in page and "foretold" in page


def test_further_sizes_add_to_a_curve_and_the_same_are_not_trained_again(tmp_path: Path, base: Path) -> None:
    path = recipe(tmp_path, base)
    curved(path, Launcher())
    again, more = Launcher(), Launcher()
    assert len(read_json(curved(path, again))["methods"]["full"]["measured"]) == 9 and not again.given
    assert len(read_json(curved(path, more, sizes="8,16,24,32"))["methods"]["full"]["measured"]) == 12
    assert sorted(more.given) == [f"full/records-24-seed-{seed}" for seed in (0, 1, 2)]


def test_a_training_of_a_curve_is_a_real_one_without_test(tmp_path: Path, base: Path) -> None:
    path = recipe(tmp_path, base)
    launch = Launcher(trained="records-8-seed-2")
    found = {
        (one["num_records"], one["seed"]): one["value"]
        for one in read_json(curved(path, launch, sizes="4,8,16"))["methods"]["full"]["measured"]
    }
    training = read_json(tmp_path / "run" / "curve" / "full" / "records-8-seed-2" / "full" / "training.json")
    assert len(found) == 9 and found[8, 2] == training["best_value"] != found[8, 1]
    assert not list((tmp_path / "run" / "curve").rglob("*test*"))
    # Weights of a training are of no use any more.
    assert not list((tmp_path / "run" / "curve" / "full").rglob("*.safetensors"))


def test_without_sizes_it_is_an_eighth_to_all_of_train(tmp_path: Path, base: Path) -> None:
    launch = Launcher()
    written = curved(recipe(tmp_path, base), launch, sizes=None)
    number = read_json(written)["num_train_records"]
    sizes = {one["num_records"] for one in read_json(written)["methods"]["full"]["measured"]}
    assert sizes == {round(number / part) for part in (8, 4, 2, 1)}


def test_the_report_of_the_run_holds_the_curve(tmp_path: Path, base: Path) -> None:
    path = recipe(tmp_path, base)
    curved(path, Launcher())
    with stages.open_run(load_recipe(path), context=world.context()) as run:
        page = stages.report(run)
    assert '<section id="examples">' in page.read_text(encoding="utf-8")
    assert "more records of this kind help" in read_json(run.folder / "report.json")["examples"][0]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("8,16", r"--sizes: found 2 different numbers in '8,16'; expected 3 or more numbers of train records\. Write"),
        ("8,8,16", "--sizes: found 2 different numbers in '8,8,16'; expected 3 or more"),
        ("8,many,16", "--sizes: found 'many'; expected 3 or more numbers of train records"),
        ("0,8,16", "--sizes: found '0'; expected 3 or more numbers"),
        ("8,16,1000", r"--sizes: found 1,000; expected at most \d+, the number of train records\. Write \d+ in its pl"),
    ],
)
def test_sizes_that_cannot_be_used_are_refused(tmp_path: Path, base: Path, sizes: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        curved(recipe(tmp_path, base), Launcher(), sizes=sizes)


def test_ranges_are_for_a_search(tmp_path: Path, base: Path) -> None:
    methods = {"lora": {"peft_type": "LORA", "r": {"choices": [2, 4]}}}
    with pytest.raises(RecipeError, match=r"methods\.lora\.r: found a range; expected a value, as only a search takes"):
        curved(recipe(tmp_path, base, methods=methods), Launcher())


def test_a_curve_of_another_recipe_is_refused(tmp_path: Path, base: Path) -> None:
    curved(recipe(tmp_path, base), Launcher())
    with pytest.raises(
        FolderInUseError, match=r"curve/full: found .*\): methods.full.learning_rate was 0.001, now 0.002"
    ):
        curved(recipe(tmp_path, base, methods={"full": {"learning_rate": 2e-3}}), Launcher())
    path = recipe(tmp_path, base)
    overrides = ["data.mixture={cap: 20}"]
    with pytest.raises(FolderInUseError, match="found a study of another recipe"):
        stages.curve(path, overrides=overrides, sizes=None, num_jobs=1, context=world.context(), launch=Launcher())
