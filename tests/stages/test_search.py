"""A search from a recipe to its best recipe, on tiny models: what trials may see, what they leave, what is refused."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml

from keeptune import cli, invocation, stages
from keeptune.config import Recipe, load_recipe
from keeptune.errors import FolderInUseError, KeeptuneError, RecipeError
from keeptune.evaluation.generate import auto_max_new_tokens
from keeptune.evaluation.metrics import Answer, answer_to_json
from keeptune.report.reading import RunFolder
from keeptune.report.search import read_search
from keeptune.stages.data import Data, max_new_tokens, open_table
from keeptune.stages.openings import LEDGER
from keeptune.storage import read_json, read_record, write_jsonl, write_record
from tests.stages import world

torch.set_num_threads(1)
# PEFT itself asks transformers for a deprecated property.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
ONE = {"full": {"learning_rate": 1e-3}}
RANGES = {
    "full": {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}},
    "lora": {"peft_type": "LORA", "r": {"choices": [2, 4]}, "learning_rate": {"low": 1e-3, "high": 3e-2, "log": True}},
}
SHORT = {"num_train_epochs": 1, "tokens_per_step": 256, "tokens_per_micro_batch": 128}


@dataclass
class _Ended:
    returncode: int
    stdin: None = None

    def poll(self) -> int:
        return self.returncode

    wait = poll


@dataclass
class Launcher:
    """Makes trials at once: those in `trained` in this process, others by a formula; `faults` come in place of one."""

    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: dict[str, KeeptuneError] = field(default_factory=dict)
    trained: frozenset[str] = frozenset()
    killed: set[str] = field(default_factory=set)
    excess_of: Callable[[float], float] | None = None

    def __call__(self, recipe: Path, *, parts: Path, subset: str, log: Path) -> subprocess.Popen[bytes]:
        name = f"{recipe.parent.name}/{recipe.stem}"
        self.recipes[name] = yaml.safe_load(recipe.read_text())
        if name in self.killed:
            self.killed.remove(name)
            return cast("subprocess.Popen[bytes]", _Ended(-9))
        try:
            if name in self.faults:
                raise self.faults[name]
            with stages.open_run(load_recipe(recipe), context=world.context()) as run:
                if name in self.trained:
                    stages.run_trial(run, parts, subset=subset)
                else:
                    simulate(run, excess_of=self.excess_of)
        except KeeptuneError as error:
            log.write_text(f"keeptune: {error}\n")
            return cast("subprocess.Popen[bytes]", _Ended(error.exit_code))
        return cast("subprocess.Popen[bytes]", _Ended(0))


def simulate(run: stages.Run, *, excess_of: Callable[[float], float] | None = None) -> None:
    """Write the result of a trial that is the better the nearer its learning rate is to 0.004, and its answers."""
    (method,) = run.recipe.methods.values()
    assert method.learning_rate is not None
    value = 2.0 + abs(math.log10(method.learning_rate / 4e-3)) + 0.01 * run.recipe.seed
    answers = [
        Answer(
            f"r{i}",
            "first-word",
            f"r{i}",
            "",
            "",
            ("",),
            True,
            {"loss": value + 0.3 * ((i * i + round(1000 * value)) % 3), "rougeL": 0.0, "exact_match": 0.0},
            4,
        )
        for i in range(9)
    ]
    (run.folder / "validation").mkdir()
    write_jsonl(run.folder / "validation" / "samples.jsonl", map(answer_to_json, answers))
    facts = {"drift": 0.1, "drops": {}, "excess": excess_of(value) if excess_of else None, "seconds": 1.5}
    write_record(run.folder / "result.json", {"value": value, **facts})


def searched(path: Path, launch: Launcher, *, trials: int = 2, jobs: int = 1, **options: Any) -> Path:
    options = {"overrides": [], "halving": False, "against_drift": False, "context": world.context(), **options}
    return stages.search(path, num_trials=trials, num_jobs=jobs, launch=launch, **options)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.llama(tmp_path_factory.mktemp("base"))


def recipe(folder: Path, base: Path, **sections: Any) -> Path:
    records = world.records(folder / "data.jsonl", number=60)
    data = sections.pop("data", None)
    path = world.recipe_file(folder, model=base, data=records, **{"training": SHORT, "methods": ONE, **sections})
    if data is not None:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data": data}))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[Path, Launcher]:
    folder, launch = tmp_path_factory.mktemp("search"), Launcher()
    searched(recipe(folder, base, methods=RANGES), launch, trials=3, jobs=2)
    return folder, launch


def test_a_search_leaves_a_row_for_every_trial_and_the_best_of_each_method(done: tuple[Path, Launcher]) -> None:
    summary = read_json(done[0] / "run" / "search" / "search.json")
    assert (summary["metric"], summary["split"], summary["higher_is_better"]) == ("loss", "validation", False)
    for method in ("full", "lora"):
        rows = summary["methods"][method]["trials"]
        assert len(rows) == 7
        assert all(row["state"] == "finished" and row["seconds"] > 0 for row in rows)
        contenders = summary["methods"][method]["winner"]["contenders"]
        assert [len(contender["values"]) for contender in contenders] == [3, 3]
        first = [row for row in rows if not row["repeat"]]
        best = sorted(first, key=lambda row: row["value"])[:2]
        assert {contender["name"] for contender in contenders} == {row["name"] for row in best}


def test_a_difference_is_held_against_its_error_over_the_validation_records(done: tuple[Path, Launcher]) -> None:
    winners = [found["winner"] for found in read_json(done[0] / "run/search/search.json")["methods"].values()]
    spreads = [max(max(c["fresh"]) - min(c["fresh"]) for c in winner["contenders"]) for winner in winners]
    assert spreads == pytest.approx([0.01, 0.01])
    # The further seeds alone would make 4.3 · 0.0071 at most.
    assert max(winner["high"] - winner["gain"] for winner in winners) > 0.05


def test_the_best_method_is_held_against_the_next_and_the_summary_says_where_it_comes_from(
    done: tuple[Path, Launcher],
) -> None:
    summary = read_json(done[0] / "run" / "search" / "search.json")
    between = summary["between"]
    assert between["methods"] == [summary["best"], *({"full", "lora"} - {summary["best"]})]
    winners = [summary["methods"][name]["winner"]["contenders"][0] for name in between["methods"]]
    assert between["contenders"] == winners and between["low"] < between["gain"] < between["high"]
    table = open_table(done[0] / "run" / "data", "train")
    assert (summary["num_train_records"], summary["tasks"]) == (len(table), ["first-word"])
    assert [r["key"] for r in summary["methods"]["lora"]["ranges"]] == ["methods.lora.r", "methods.lora.learning_rate"]
    page = (done[0] / "run" / "search" / "report.html").read_text(encoding="utf-8")
    assert f"The best method by loss on validation is {summary['best']}. With 2 further seeds it has" in page


def test_the_best_recipe_is_a_plain_one_with_each_methods_best_settings(done: tuple[Path, Launcher]) -> None:
    search = done[0] / "run" / "search"
    best = load_recipe(search / "best.yaml")
    summary = read_json(search / "search.json")
    for method in ("full", "lora"):
        params = summary["methods"][method]["winner"]["contenders"][0]["params"]
        assert best.methods[method].learning_rate == params[f"methods.{method}.learning_rate"]
        assert set(load_recipe(search / method / "best.yaml").methods) == {method}
    assert best.output_dir == str(done[0] / "run")
    assert best.data.tasks[0].path == str(done[0] / "data.jsonl")


def test_the_best_recipe_goes_on_in_the_folder_of_its_search(tmp_path: Path, base: Path) -> None:
    path = recipe(tmp_path, base)
    best = searched(path, Launcher(), trials=4).with_name("best.yaml")
    with stages.open_run(load_recipe(best), context=world.context()) as run:
        assert stages.prepare(run).made_before
        page = stages.report(run)
        # A training of the best recipe is begun.
        (run.folder / "full" / "checkpoints" / "step-1").mkdir(parents=True)
    assert "How the settings were found" in page.read_text(encoding="utf-8")
    assert any("is chosen" in sentence for sentence in read_json(run.folder / "report.json")["search"])
    before = (run.folder / "recipe.yaml").read_bytes()
    launch = Launcher()
    searched(path, launch, trials=6)
    assert [name for name in launch.recipes if "seed" not in name] == ["full/trial-0004", "full/trial-0005"]
    assert (run.folder / "recipe.yaml").read_bytes() == before


def test_a_repeat_differs_in_the_seed_alone(done: tuple[Path, Launcher]) -> None:
    recipes = done[1].recipes
    for name in (name for name in recipes if "seed" in name):
        first, again = recipes[name.partition("-seed")[0]], recipes[name]
        assert again["seed"] == int(name[-1])
        assert {**again, "seed": 0, "output_dir": ""} == {**first, "seed": 0, "output_dir": ""}


def test_a_finished_search_makes_no_trial_again(done: tuple[Path, Launcher]) -> None:
    launch = Launcher()
    before = (done[0] / "run" / "search" / "search.json").read_bytes()
    searched(done[0] / "recipe.yaml", launch, trials=3, jobs=2)
    assert launch.recipes == {}
    assert (done[0] / "run" / "search" / "search.json").read_bytes() == before


class Counted(world.Notes):
    """A progress that keeps what is counted too."""

    def start(self, title: str, *, total: int, unit: str) -> None:
        self.lines.append(f"{title}: {total} {unit}")

    def advance(self, count: int = 1, *, note: str = "") -> None:
        self.lines.append(f"+{count}")

    def finish(self) -> None:
        self.lines.append("end")


def test_a_search_counts_its_trials_and_those_that_are_to_come(tmp_path: Path, base: Path) -> None:
    path, notes = recipe(tmp_path, base), Counted()
    searched(path, Launcher(), trials=2, context=world.context(notes=notes))
    # Two settings, and each again with two seeds.
    begun = notes.lines.index("Trials: 6 trials")
    assert [line for line in notes.lines[begun:] if line.startswith("+")] == ["+1"] * 6
    assert notes.lines[begun + 1].startswith("full trial-0000: loss ") and notes.lines[-1] == "end"
    again = Counted()
    searched(path, Launcher(), trials=3, context=world.context(notes=again))
    assert "6 trials stood before, 1 to come" in again.lines
    # The third is one of the two best, and is tried again: more than was expected, and not counted.
    assert [line for line in again.lines if line.startswith("+")] == ["+1"]
    assert len([line for line in again.lines if line.startswith("full trial-0002")]) == 3


def test_a_trial_whose_process_was_killed_is_told_to_go_on(tmp_path: Path, base: Path) -> None:
    notes, launch = Counted(), Launcher(killed={"full/trial-0001"})
    searched(recipe(tmp_path, base), launch, trials=2, context=world.context(notes=notes))
    assert "full trial-0001: its process was killed; it goes on from its last checkpoint" in notes.lines


def test_other_ranges_or_other_data_are_refused_with_the_hashes(done: tuple[Path, Launcher], tmp_path: Path) -> None:
    folder = shutil.copytree(done[0], tmp_path / "moved")
    value = json.loads((folder / "recipe.yaml").read_text()) | {"output_dir": str(folder / "run")}
    value["methods"]["full"]["learning_rate"]["high"] = 0.1
    (folder / "recipe.yaml").write_text(json.dumps(value))
    key = read_json(folder / "run" / "search" / "search.json")["methods"]["full"]["key"]
    other = rf"search/full: found a study of another recipe .hash {key[:16]}\): methods\.full\.learning_rate was {{'low"
    with pytest.raises(FolderInUseError, match=other):
        searched(folder / "recipe.yaml", Launcher(), trials=3)
    # Of a study without its settings the hashes are named.
    (folder / "run" / "search" / "full" / "study.json").unlink()
    with pytest.raises(FolderInUseError, match=rf"search/full: found a study of another recipe.*hash {key[:16]}, now "):
        searched(folder / "recipe.yaml", Launcher(), trials=3)
    value["methods"]["full"]["learning_rate"]["high"] = 0.01
    (folder / "recipe.yaml").write_text(json.dumps(value))
    with (folder / "data.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "one more", "completion": "red"}) + "\n")
    with pytest.raises(FolderInUseError, match="search/lora: found a study.*: data.tasks.0.path was '"):
        searched(folder / "recipe.yaml", Launcher(), trials=3, overrides=[f"data.tasks.0.path={folder / 'data.jsonl'}"])


def test_a_refused_search_leaves_the_data_of_the_study_as_they_are(tmp_path: Path, base: Path) -> None:
    path = recipe(tmp_path, base)
    searched(path, Launcher(), trials=1)
    before = {file: file.read_bytes() for file in (tmp_path / "run" / "data").rglob("*") if file.is_file()}
    with pytest.raises(
        FolderInUseError, match=r"search/full: found .*: data\.tasks\.0\.max_records was unset, now 40; "
    ):
        searched(path, Launcher(), trials=1, overrides=["data.tasks.0.max_records=40"])
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "one more", "completion": "red"}) + "\n")
    known = read_json(tmp_path / "run" / "data" / "manifest.json")["key"][:16]
    with pytest.raises(
        FolderInUseError, match=rf"run/data: found the data of .*run/search \(hash {known}\), and the re"
    ):
        searched(path, Launcher(), trials=1)
    after = {file: file.read_bytes() for file in (tmp_path / "run" / "data").rglob("*") if file.is_file()}
    assert after == before
    # Data that are damaged are made anew, since the study is of the same.
    path.with_name("data.jsonl").write_text("".join((tmp_path / "data.jsonl").read_text().splitlines(True)[:-1]))
    (tmp_path / "run" / "data" / "train.jsonl").write_text("")
    launch = Launcher()
    searched(path, launch, trials=1)
    assert launch.recipes == {}


_OPENED: list[str] = []
_WATCHING = [False]


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _WATCHING[0] and event in ("open", "os.listdir", "os.scandir", "os.rename", "os.link", "os.remove"):
        _OPENED.extend(str(argument) for argument in arguments if isinstance(argument, str | bytes | Path))


@contextmanager
def watching() -> Iterator[list[str]]:
    """Collect every path that this process opens or lists in the meantime."""
    if not hasattr(sys, "_keeptune_hook"):
        sys.addaudithook(_hook)
        sys._keeptune_hook = True  # pyright: ignore[reportAttributeAccessIssue]
    _OPENED.clear()
    _WATCHING[0] = True
    try:
        yield _OPENED
    finally:
        _WATCHING[0] = False


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[Path, Launcher]:
    """A search of one trial, really trained, with suites that must not be forgotten and a test file of its own."""
    folder = tmp_path_factory.mktemp("kept")
    own = world.records(folder / "own-secret.jsonl", number=12, seed=3)
    tasks = [
        {"path": str(world.records(folder / "data.jsonl", number=60)), "name": "first-word", "test": str(own)},
        {"path": str(world.records(folder / "others.jsonl", number=60, seed=9)), "name": "old", "train": False},
    ]
    path = recipe(
        folder,
        base,
        data={"tasks": tasks, "validation_fraction": 0.2, "test_fraction": 0.2},
        retention={"self_texts": 8, "text_tokens": 16, "budget": {"others": "0.5 nats", "self": "0.5 nats"}},
        evaluation={"metrics": ["exact_match"], "select_by": "exact_match", "max_new_tokens": 4},
        # Long enough for the drift of one text to be measured beside it.
        training={**SHORT, "num_train_epochs": 5},
    )
    launch = Launcher(trained=frozenset({"full/trial-0000"}))
    searched(path, launch, trials=1)
    return folder, launch


def test_a_trial_trains_in_a_folder_of_its_own_and_keeps_no_weights(kept: tuple[Path, Launcher]) -> None:
    trial = kept[0] / "run" / "search" / "full" / "trial-0000"
    names = {path.relative_to(trial).as_posix() for path in trial.rglob("*") if path.is_file()}
    assert {"result.json", "recipe.yaml", "full/events.jsonl", "validation/samples.jsonl", "probe/tasks/samples.jsonl",
            "probe/texts/samples.jsonl"} <= names  # fmt: skip
    assert not [name for name in names if name.endswith(".safetensors")]
    assert read_json(trial / "result.json")["value"] == read_json(trial / "full" / "training.json")["best_value"]


def test_no_certificate_can_stand_on_the_records_that_trials_looked_at(kept: tuple[Path, Launcher]) -> None:
    folder = kept[0]
    assert load_recipe(folder / "run" / "search" / "best.yaml").retention.probe_fraction == 0.2
    [line] = (folder / "run" / LEDGER).read_text(encoding="utf-8").splitlines()
    asked = [json.loads(row)["task"] for row in (folder / "run" / "data" / "probe.jsonl").read_text().splitlines()]
    assert json.loads(line)["searched"] and len(json.loads(line)["records"][asked[0]]) == len(asked)


def test_what_a_budget_allows_is_measured_on_the_probe(kept: tuple[Path, Launcher]) -> None:
    (row,) = read_json(kept[0] / "run" / "search" / "search.json")["methods"]["full"]["trials"]
    assert set(row["drops"]) == {"others", "self"}
    assert row["drift"] > 0
    assert row["drops"]["self"] != 0
    assert row["excess"] == pytest.approx((max(row["drops"].values()) - 0.5) / 0.5)


def test_the_test_split_cannot_be_reached_from_a_trial(kept: tuple[Path, Launcher], tmp_path: Path) -> None:
    folder, launch = kept
    run, parts = folder / "run", folder / "run" / "search" / "parts"
    # What the trial is given holds no test record, and names no file with one.
    secret = {record["messages"][0]["content"] for record in lines(run / "data" / "test.jsonl")}
    given = {path.relative_to(parts).as_posix() for path in parts.rglob("*") if path.is_file()}
    assert {name for name in given if name.endswith(".jsonl")} == {
        "data/train.jsonl", "data/validation.jsonl", "data/probe.jsonl", "texts/probe.jsonl", "texts/replay.jsonl"
    }  # fmt: skip
    assert not [name for name in given if "test" in name or "certify" in name]
    shown = {record["messages"][0]["content"] for path in parts.glob("data/*.jsonl") for record in lines(path)}
    assert len(secret) > 12 and not secret & shown
    text = json.dumps(launch.recipes["full/trial-0000"])
    assert not [name for name in ("data.jsonl", "others.jsonl", "own-secret") if name in text]
    # And a whole trial, in a place where nothing but these parts is, opens no file of test and comes to the same.
    moved = tmp_path / "apart"
    shutil.copytree(parts, moved / "parts")
    shutil.copytree(run / "search" / "base", moved / "base")
    again = {**launch.recipes["full/trial-0000"], "output_dir": str(moved / "trial")}
    (moved / "trial.yaml").write_text(yaml.safe_dump(again))
    hidden = folder.rename(folder.with_name("hidden"))
    try:
        with watching() as opened, stages.open_run(load_recipe(moved / "trial.yaml"), context=world.context()) as trial:
            stages.run_trial(trial, moved / "parts", subset="data")
    finally:
        hidden.rename(folder)
    inside = [Path(path).relative_to(moved).as_posix() for path in opened if path.startswith(f"{moved}/")]
    assert "parts/data/validation.jsonl" in inside
    assert not [path for path in inside if "test" in path]
    assert not [path for path in opened if path.startswith(str(folder)) or path.startswith(str(hidden))]
    before = read_record(run / "search" / "full" / "trial-0000" / "result.json")
    assert read_record(moved / "trial" / "result.json") | {"seconds": 0} == before | {"seconds": 0}


def test_under_a_budget_the_preset_replays_texts_that_the_base_wrote_before(tmp_path: Path, base: Path) -> None:
    retention = {"self_texts": 8, "text_tokens": 16, "budget": {"self": "0.5 nats"}}
    path = recipe(tmp_path, base, methods={"full": {"learning_rate": 4e-3}}, retention=retention)
    launch = Launcher()
    summary = read_json(searched(path, launch, trials=4))
    assert [row["params"]["methods.full.replay_fraction"] for row in summary["methods"]["full"]["trials"]][-1] == 0.05
    assert launch.recipes["full/trial-0000"]["methods"]["full"]["replay_fraction"] == 0.0
    texts = {path.name for path in (tmp_path / "run" / "search" / "parts" / "texts").glob("*.jsonl")}
    assert texts == {"probe.jsonl", "replay.jsonl"}
    # No trial reports or certifies, so that the base writes no text for that.
    assert {path.name for path in (tmp_path / "run" / "search" / "texts").glob("*.jsonl")} == texts


def test_where_no_trial_keeps_the_budget_the_nearest_is_chosen_of_each_method_and_of_all(
    tmp_path: Path, base: Path
) -> None:
    path = recipe(tmp_path, base, methods={**ONE, "better": {"learning_rate": 3e-3}})
    summary = read_json(searched(path, Launcher(excess_of=lambda value: 1.0 / value), trials=2))
    for found in summary["methods"].values():
        nearest, second = found["winner"]["contenders"]
        assert nearest["excess"] < second["excess"] and nearest["mean"] > second["mean"]
        assert (nearest["feasible"], second["feasible"]) == (False, False)
    assert summary["best"] == "full"


def test_under_a_budget_more_trials_go_on_from_a_few(tmp_path: Path, base: Path) -> None:
    retention = {"self_texts": 8, "text_tokens": 16, "budget": {"self": "0.5 nats"}}
    path = recipe(tmp_path, base, methods={"full": {"learning_rate": 4e-3}}, retention=retention)
    launch = Launcher()
    searched(path, launch, trials=2)
    searched(path, launch, trials=4)
    first = [name for name in launch.recipes if "seed" not in name]
    assert first == [f"full/trial-{i:04d}" for i in range(4)]


def test_a_method_of_which_every_trial_fails_does_not_keep_the_others_from_their_end(
    tmp_path: Path, base: Path
) -> None:
    launch = Launcher(faults={f"wide/trial-{i:04d}": RecipeError("a: found b; expected c. Fix it.") for i in (0, 1)})
    written = searched(recipe(tmp_path, base, methods={**ONE, "wide": {"learning_rate": 1.0}}), launch, trials=2)
    summary = read_json(written)
    assert (summary["best"], summary["together"]) == ("full", ["full"])
    assert summary["methods"]["wide"]["winner"] is None
    assert set(load_recipe(written.with_name("best.yaml")).methods) == {"full"}
    assert not (written.parent / "wide" / "best.yaml").exists()


def test_a_search_goes_on_with_halving_only_where_it_began_with_it(tmp_path: Path, base: Path) -> None:
    path = recipe(tmp_path, base, methods={"full": RANGES["full"]})
    searched(path, Launcher(), trials=2)
    with pytest.raises(FolderInUseError, match=r"search/full: found a search without --halving; expected the same to"):
        searched(path, Launcher(), trials=2, halving=True)
    shutil.rmtree(tmp_path / "run")
    searched(path, Launcher(), trials=2, halving=True)
    with pytest.raises(
        FolderInUseError, match=r"found a search with --halving; expected .*\. Add --halving, or choose"
    ):
        searched(path, Launcher(), trials=2)


def test_a_trial_that_fails_is_a_row_and_where_all_fail_the_reason_is_told(tmp_path: Path, base: Path) -> None:
    path = recipe(tmp_path, base)
    fault = RecipeError("a: found b; expected c. Fix it.")
    launch = Launcher(faults={"full/trial-0001": fault})
    summary = read_json(searched(path, launch, trials=2))
    rows = {row["name"]: row for row in summary["methods"]["full"]["trials"]}
    assert (rows["trial-0001"]["state"], rows["trial-0001"]["reason"]) == ("failed", f"keeptune: {fault}")
    assert summary["methods"]["full"]["winner"]["is_likely"] is None
    found = read_search(RunFolder(tmp_path / "run"))
    assert found is not None
    assert [trial.remark for trial in found.methods[0].trials] == ["best", f"failed: keeptune: {fault}"]
    failing = Launcher(faults={f"full/trial-{i:04d}": fault for i in range(2)})
    other = recipe(tmp_path / "other", base) if (tmp_path / "other").mkdir() is None else path
    with pytest.raises(RecipeError, match=r"methods\.full: found 1 trial and none that came to its end \(the last: k"):
        searched(other, failing, trials=1)


def test_halving_trains_on_a_share_of_the_records_with_a_schedule_of_its_own(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[int] = set()

    def noted(of: Recipe, data: Data) -> int:
        asked.add(max_new_tokens(of, data))
        return max_new_tokens(of, data)

    for module in ("trial", "training"):
        monkeypatch.setattr(f"keeptune.stages.{module}.max_new_tokens", noted)
    launch = Launcher(trained=frozenset({"full/trial-0000-short-9"}))
    evaluation = {"metrics": ["exact_match"], "select_by": "exact_match", "num_validation_records": 4}
    path = recipe(tmp_path, base, methods={"full": RANGES["full"]}, evaluation=evaluation)
    rows = [
        {**row, "completion": " ".join(["red"] * (1 + i // 6))} for i, row in enumerate(lines(tmp_path / "data.jsonl"))
    ]
    write_jsonl(tmp_path / "data.jsonl", rows)
    summary = read_json(searched(path, launch, trials=3, halving=True))
    rows = summary["methods"]["full"]["trials"]
    assert {row["share"] for row in rows} == {1 / 9, 1 / 3, 1.0}
    events = tmp_path / "run" / "search" / "full" / "trial-0000-short-9" / "full" / "events.jsonl"
    found = lines(events)
    whole = len(lines(tmp_path / "run" / "data" / "train.jsonl"))
    assert found[0]["num_examples"] == math.ceil(whole / 9)
    last = [event for event in found if event["event"] == "step"][-1]
    assert last["step"] == found[0]["num_steps"]
    short, third = (
        {record["id"] for record in lines(tmp_path / "run" / "search" / "parts" / f"data-{part}" / "train.jsonl")}
        for part in (9, 3)
    )
    assert short < third
    # How long an answer may be is not for the few records to say.
    parts = tmp_path / "run" / "search" / "parts"
    limits = [auto_max_new_tokens(open_table(parts / f"data{part}", "train").completion_lengths) for part in ("", "-9")]
    assert limits[0] > limits[1] and asked == {limits[0]}


def test_a_metric_chooses_in_its_own_direction_and_one_that_is_not_computed_is_refused(
    tmp_path: Path, base: Path
) -> None:
    evaluation = {"metrics": ["exact_match", "rougeL"], "select_by": "rougeL", "max_new_tokens": 4}
    path = recipe(tmp_path, base, evaluation=evaluation)
    summary = read_json(searched(path, Launcher(), trials=2))
    assert (summary["metric"], summary["higher_is_better"]) == ("rougeL", True)
    with pytest.raises(RecipeError, match="found select_by: bleu; expected loss or one of metrics. Add it to metrics"):
        searched(path, Launcher(), overrides=["evaluation.select_by=bleu"])


def test_the_command_makes_a_trial_in_a_process_of_its_own_and_names_the_best_recipe(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(invocation._Signals, "install", lambda signals: None)
    monkeypatch.setattr(sys, "argv", ["keeptune", "search", str(recipe(tmp_path, base)), "--trials", "1", "-q"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    folder = tmp_path / "run" / "search"
    (row,) = read_json(folder / "search.json")["methods"]["full"]["trials"]
    assert row["value"] == read_json(folder / "full" / "trial-0000" / "full" / "training.json")["best_value"]
    assert (folder / "full" / "trial-0000.log").read_text() == ""
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].strip() == "full: trials on validation"
    assert shown[-2] == f"Report: {folder / 'report.html'}"
    assert shown[-1].startswith(f"Best: {folder / 'best.yaml'}. Next: ") and shown[-1].endswith(
        f" run {folder / 'best.yaml'}"
    )


def test_without_optuna_nothing_is_prepared(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(RecipeError, match=r"pip install 'keeptune\[search\]'"):
        searched(recipe(tmp_path, base), Launcher())
    assert not (tmp_path / "run").exists()


def test_a_range_with_a_value_that_the_recipe_refuses_is_refused_before_any_trial(tmp_path: Path, base: Path) -> None:
    launch = Launcher()
    ranks = {"lora": {"peft_type": "LORA", "rank": {"choices": [4, 8]}}}
    with pytest.raises(
        RecipeError, match="methods.lora.rank: found an argument that LoraConfig does not know|LoraConfig"
    ):
        searched(recipe(tmp_path, base, methods=ranks), launch)
    with pytest.raises(RecipeError, match=r"methods\.full\.learning_rate: found -1\.0; expected greater than 0"):
        searched(recipe(tmp_path, base, methods={"full": {"learning_rate": {"low": -1.0, "high": 1.0}}}), launch)
    assert launch.recipes == {} and not (tmp_path / "run").exists()


def test_little_drift_can_be_a_second_objective_where_it_is_measured(tmp_path: Path, base: Path) -> None:
    retention = {"self_texts": 8, "text_tokens": 16}
    path = recipe(tmp_path, base, methods={"full": RANGES["full"]}, retention=retention)
    summary = read_json(searched(path, Launcher(), trials=3, against_drift=True))
    # Drifts are all the same here: the best value beats the others.
    chosen = summary["methods"]["full"]["winner"]["contenders"]
    assert summary["methods"]["full"]["front"] == [min(chosen, key=lambda c: c["values"][0])["name"]]
    with pytest.raises(RecipeError, match="retention.self_texts: found 0 with --against-drift; expected texts"):
        searched(path, Launcher(), against_drift=True, overrides=["retention.self_texts=0"])
    with pytest.raises(RecipeError, match=r"methods\.full: found no range with --against-drift; expected one"):
        searched(path, Launcher(), against_drift=True, overrides=["methods.full.learning_rate=0.1"])


def test_methods_with_other_best_settings_of_the_training_have_recipes_of_their_own(tmp_path: Path, base: Path) -> None:
    path = recipe(tmp_path, base, methods={**ONE, "wide": {"learning_rate": 1e-2}},
                  training={**SHORT, "num_train_epochs": {"choices": [1, 2, 3]}})  # fmt: skip
    summary = read_json(searched(path, Launcher(), trials=2))
    search = tmp_path / "run" / "search"
    for name in ("full", "wide"):
        params = summary["methods"][name]["winner"]["contenders"][0]["params"]
        assert load_recipe(search / name / "best.yaml").training.num_train_epochs == params["training.num_train_epochs"]
    best = load_recipe(search / "best.yaml")
    assert set(best.methods) == set(summary["together"])
    chosen = summary["methods"][summary["best"]]["winner"]["contenders"][0]["params"]
    assert best.training.num_train_epochs == chosen["training.num_train_epochs"]
