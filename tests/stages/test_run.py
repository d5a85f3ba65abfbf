"""A whole run from data to instruct model and report, on tiny models, decoder-only and encoder-decoder."""

from __future__ import annotations

import ast
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from keeptune import stages
from keeptune.data.source import source_sha256
from keeptune.errors import DataError, FolderInUseError, Interrupted, KeeptuneError, RecipeError, StorageError
from keeptune.progress import UNCHANGED
from keeptune.stages.run import stage_key
from keeptune.stages.training import make_bench
from keeptune.storage import read_json, verify_folder, write_sealed_text
from keeptune.text.tokenizer import Tokenizer
from tests.stages import world

torch.set_num_threads(1)
# PEFT itself asks transformers for a deprecated property.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def finished(path: Path, **overrides: Any) -> tuple[stages.Run, world.Notes]:
    notes = world.Notes()
    with stages.open_run(world.recipe(path, **overrides), context=world.context(notes=notes)) as run:
        stages.train(run)
        stages.evaluate(run)
        stages.report(run)
    return run, notes


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("run")
    base = world.llama(folder / "base")
    path = world.recipe_file(folder, model=base, data=world.records(folder / "data.jsonl"))
    finished(path)
    return path, folder / "run"


def test_a_run_leaves_everything_that_it_promises(done: tuple[Path, Path]) -> None:
    _, run = done
    names = {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()}
    assert {
        "recipe.yaml",
        "manifest.json",
        "report.html",
        "report.json",
        "selection.json",
        "paired.json",
        "test_openings.jsonl",
        "data/train.jsonl",
        "data/validation.jsonl",
        "data/test.jsonl",
        "data/audit.json",
        "base/zero-shot/samples.jsonl",
        "base/zero-shot/scores.json",
        "full/events.jsonl",
        "full/model/model.safetensors",
        "full/test/scores.json",
        "lora/adapter/adapter_model.safetensors",
        "lora/test/samples.jsonl",
        "instruct-model/README.md",
        "instruct-model/tokenizer.json",
        "instruct-model/chat_template.jinja",
    } <= names
    assert not any(".tmp-" in name for name in names)


def test_the_report_has_the_promised_fields(done: tuple[Path, Path]) -> None:
    report = read_json(done[1] / "report.json")
    assert {score["model"] for score in report["scores"]} == {"base", "full", "lora"}
    assert set(report["scores"][0]) >= {
        "model", "shots", "task", "metric", "mean", "standard_error", "low", "high", "num_records", "num_clusters"
    }  # fmt: skip
    assert set(report["paired"][0]) >= {
        "model", "against", "task", "metric", "difference", "low", "high", "better", "worse"
    }  # fmt: skip
    assert {cost["model"] for cost in report["cost"]} == {"full", "lora"}
    assert all(cost["peak_memory_bytes"] > 0 and cost["artifact_bytes"] > 0 for cost in report["cost"])
    assert report["selected"] == read_json(done[1] / "selection.json")["selected"]


def test_rows_in_equal_kept_and_dropped_everywhere(done: tuple[Path, Path]) -> None:
    audit = read_json(done[1] / "data" / "audit.json")
    lines = sum(
        len((done[1] / "data" / f"{s}.jsonl").read_text().splitlines()) for s in ("train", "validation", "test")
    )
    assert audit["rows_in"] == 80 == lines + sum(audit["dropped"].values())


def test_the_same_command_again_runs_nothing_again(done: tuple[Path, Path]) -> None:
    path, folder = done
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}
    openings = (folder / "test_openings.jsonl").read_text()
    _, notes = finished(path)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")} == before
    assert (folder / "test_openings.jsonl").read_text() == openings
    unchanged = [line for line in notes.lines if "unchanged" in line]
    assert {line.split(":")[0].rsplit("/", 1)[-1] for line in unchanged} == {"data", "full", "lora", "run"}
    # So are they joined into one line.
    assert all(line.endswith(f" {UNCHANGED}") for line in unchanged)


def test_data_that_stood_there_are_known_from_those_just_made(done: tuple[Path, Path], tmp_path: Path) -> None:
    path, _ = done
    for made_before in (False, True):
        with stages.open_run(world.recipe(path, output_dir=str(tmp_path / "run")), context=world.context()) as run:
            assert stages.prepare(run).made_before is made_before


def test_the_test_split_is_opened_once_for_all_models(done: tuple[Path, Path]) -> None:
    openings = [json.loads(line) for line in (done[1] / "test_openings.jsonl").read_text().splitlines()]
    assert [opening["models"] for opening in openings] == [["base", "full", "lora"]]


def test_nothing_but_the_test_stage_reads_test_and_it_says_so_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = world.llama(tmp_path / "base")
    path = world.recipe_file(tmp_path, model=base, data=world.records(tmp_path / "data.jsonl", number=40))
    asked: list[str] = []
    openings = tmp_path / "run" / "test_openings.jsonl"

    def noted(read: Callable[..., Any]) -> Callable[..., Any]:
        def reader(data: stages.Data, split: str, **arguments: Any) -> Any:
            asked.append(split)
            assert split != "test" or openings.exists()
            return read(data, split, **arguments)

        return reader

    for name in ("table", "records"):
        monkeypatch.setattr(stages.Data, name, noted(getattr(stages.Data, name)))
    recipe = world.recipe(path, **{"evaluation.select_by": "exact_match"})
    with stages.open_run(recipe, context=world.context()) as run:
        stages.prepare(run)
        stages.train(run)
        assert "validation" in asked and "test" not in asked
        stages.evaluate(run)
    assert "test" in asked


def test_a_model_that_cannot_be_packed_is_padded_and_says_so(tmp_path: Path) -> None:
    base = world.llama(tmp_path / "base")
    config = read_json(base / "config.json") | {"max_position_embeddings": 48}
    (base / "config.json").write_text(json.dumps(config))
    methods = {"prompts": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5, "learning_rate": 0.1}}
    data = world.records(tmp_path / "data.jsonl", number=40)
    path = world.recipe_file(tmp_path, model=base, data=data, methods=methods)
    run, notes = finished(path, **{"data.over_length": "cut"})
    assert any("on cpu, fp32; batches hold records padded to the longest beside them" in line for line in notes.lines)
    assert "data.max_length lowered from 1024 to 43: the model has room for no more tokens" in notes.lines
    assert read_json(run.folder / "prompts" / "training.json")["layout"] == "padded"
    assert read_json(run.folder / "data" / "audit.json")["tokens"]["total"]["max"] > 43
    assert all("padded" not in line for line in notes.lines if line.startswith("data"))


def test_what_is_saved_of_no_method_yet_may_change(done: tuple[Path, Path], tmp_path: Path) -> None:
    path, _ = done
    moved = {"output_dir": str(tmp_path / "run")}
    with stages.open_run(world.recipe(path, **moved), context=world.context()) as run:
        stages.prepare(run)
    (tmp_path / "run" / "full").mkdir()
    (tmp_path / "run" / "full" / "events.jsonl").write_text("")
    changed = world.recipe(path, **moved, **{"training.tokens_per_micro_batch": 64, "seed": 3})
    with stages.open_run(changed, context=world.context()) as run:
        assert read_json(run.folder / "manifest.json")["seed"] == 3


def test_every_folder_stands_whole(done: tuple[Path, Path]) -> None:
    for name in ("data", "full/model", "lora/adapter", "base/zero-shot", "full/test", "lora/test", "instruct-model"):
        assert verify_folder(done[1] / name) is not None, name


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_artifact_loaded_without_keeptune_gives_the_reported_answers(done: tuple[Path, Path], method: str) -> None:
    path, folder = done
    base = str(world.recipe(path).model)
    place = folder / "full" / "model" if method == "full" else folder / "lora" / "adapter"
    model: Any = AutoModelForCausalLM.from_pretrained(place if method == "full" else base)
    if method == "lora":
        model = PeftModel.from_pretrained(model, str(place))
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(place)
    samples = [json.loads(line) for line in (folder / method / "test" / "samples.jsonl").read_text().splitlines()]
    test = [json.loads(line) for line in (folder / "data" / "test.jsonl").read_text().splitlines()]
    assert [sample["id"] for sample in samples] == [record["id"] for record in test]
    for sample, record in list(zip(samples, test, strict=True))[:6]:
        prompt = tokenizer.apply_chat_template(record["messages"][:-1], add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert tokenizer.decode(out, skip_special_tokens=True) == sample["prediction"]


def test_a_merged_model_is_exported(done: tuple[Path, Path], tmp_path: Path) -> None:
    merged = stages.export(done[1] / "lora", merged=tmp_path / "merged", base=None)
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(world.recipe(done[0]).model), str(done[1] / "lora" / "adapter")
    ).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        found = AutoModelForCausalLM.from_pretrained(merged)(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-4)
    card = (merged / "README.md").read_text()
    assert "This folder holds the whole model." in card and "library_name: transformers" in card
    assert verify_folder(merged) is not None
    again = stages.export(done[1] / "lora" / "adapter", merged=tmp_path / "again", base=None)
    assert (again / "README.md").read_text() == card
    with pytest.raises(RecipeError, match=r"found no adapter_config\.json"):
        stages.export(done[1] / "full", merged=tmp_path / "other", base=None)


def test_the_card_shows_a_prompt_of_the_train_split_and_a_single_tasks_scores_once(done: tuple[Path, Path]) -> None:
    card = (done[1] / "instruct-model" / "README.md").read_text()
    (shown,) = re.findall(r"^messages = (.*)$", card, re.MULTILINE)
    lines = (done[1] / "data" / "train.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["messages"][:-1] for line in lines]
    assert ast.literal_eval(shown) in prompts
    # A typical one: the shortest may be empty but for its instruction.
    num_shorter = sum(len(prompt[0]["content"]) < len(ast.literal_eval(shown)[0]["content"]) for prompt in prompts)
    assert len(prompts) / 4 < num_shorter <= len(prompts) / 2
    rows = [line.split(" | ")[:2] for line in card.splitlines() if line.startswith("| ")][2:]
    assert rows == [["| first-word", metric] for metric in ("exact_match", "rougeL", "loss", "perplexity")]


def test_a_manifest_names_what_it_was_made_from(done: tuple[Path, Path]) -> None:
    path, folder = done
    data = read_json(folder / "data" / "manifest.json")
    audit = read_json(folder / "data" / "audit.json")
    assert (data["seed"], data["template"]) == (0, "chat")
    assert data["counts"] == {key: audit[key] for key in ("rows_in", "kept_whole", "truncated", "dropped", "splits")}
    sha256 = source_sha256(str(folder.parent / "data.jsonl"), revision=None, validation=None, test=None)
    assert data["sources"] == {"first-word": {"path": world.recipe(path).data.tasks[0].path, "sha256": sha256}}
    delivered = read_json(folder / "instruct-model" / "manifest.json")
    selected = read_json(folder / "selection.json")["selected"]
    made = read_json(folder / selected / ("model" if selected == "full" else "adapter") / "manifest.json")
    own = {"key": "", "files": {}, "content_sha256": ""}
    assert {**made, **own} == {**delivered, **own}
    assert delivered["key"] != made["key"]


def test_bf16_trains_fp32_weights_close_to_those_of_fp32(done: tuple[Path, Path], tmp_path: Path) -> None:
    path, reference = done
    finished(path, output_dir=str(tmp_path / "run"), **{"training.bf16": True})
    for name, place in (("full", "model/model"), ("lora", "adapter/adapter_model")):
        assert read_json(reference / name / "training.json")["dtype"] == "float32"
        assert read_json(tmp_path / "run" / name / "training.json")["dtype"] == "bfloat16"
        exact = load_file(reference / name / f"{place}.safetensors")
        found = load_file(tmp_path / "run" / name / f"{place}.safetensors")
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}
        assert any(not torch.equal(found[key], exact[key]) for key in exact)
        assert all(torch.allclose(found[key], exact[key], atol=0.1) for key in exact)


def test_settings_that_decide_weights_may_not_change_in_a_used_folder(done: tuple[Path, Path]) -> None:
    with pytest.raises(
        FolderInUseError, match=r"found results of another recipe in .* \(training\.num_train_epochs was 2, now 5"
    ):
        finished(done[0], **{"training.num_train_epochs": 5})


def test_a_run_from_before_tasks_could_be_scored_only_goes_on(done: tuple[Path, Path], tmp_path: Path) -> None:
    path, folder = done
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["data"]["tasks"][0].pop("train") is True
    write_sealed_text(run / "recipe.yaml", yaml.safe_dump(recipe))
    _, notes = finished(path, output_dir=str(run))
    unchanged = [line for line in notes.lines if "unchanged" in line]
    assert {line.split(":")[0].rsplit("/", 1)[-1] for line in unchanged} == {"data", "full", "lora", "run"}
    with pytest.raises(FolderInUseError, match="data.tasks.0.name"):
        finished(path, **{"output_dir": str(run), "data.tasks.0.name": "other"})


def test_the_key_of_the_data_knows_what_is_scored_only_and_nothing_else_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keyed: list[Any] = []

    def noted(**parts: Any) -> str:
        keyed.extend([parts["data"]["tasks"]] if "tokens" in parts else [])
        return stage_key(**parts)

    monkeypatch.setattr("keeptune.stages.data.stage_key", noted)
    with stages.open_run(world.recipe(two_tasks(tmp_path)), context=world.context()) as run:
        stages.prepare(run)
    assert [task.get("train") for task in keyed[0]] == [None, False]


def test_only_the_settings_that_differ_are_shown_and_short(done: tuple[Path, Path]) -> None:
    value = json.loads(done[0].read_text())
    value["data"]["tasks"].append({"path": "x" * 200})
    value["methods"]["lora"]["r"] = 8
    value["seed"] = 9
    other = done[0].with_name("differs.yaml")
    other.write_text(json.dumps(value))
    with pytest.raises(FolderInUseError) as caught:
        finished(other)
    name, path = "x" * 64, "x" * 59
    assert (
        f"another recipe in {done[1]} (data.tasks.1.name was unset, now '{name[:59]}…; data.tasks.1.path was unset, "
        f"now '{path}…; methods.lora.r was 4, now 8; and 1 more); expected the same settings to go on. Choose"
    ) in str(caught.value)


def test_metrics_may_change_and_the_second_look_at_test_is_written_down(tmp_path: Path) -> None:
    base = world.llama(tmp_path / "base")
    path = world.recipe_file(tmp_path, model=base, data=world.records(tmp_path / "data.jsonl", number=40))
    path.write_text(path.read_text().replace('"full": {"learning_rate": 0.001}, ', ""))
    finished(path)
    weights = (tmp_path / "run" / "lora" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    finished(path, **{"evaluation.metrics": ["exact_match", "rougeL", "token_f1"]})
    assert (tmp_path / "run" / "lora" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == weights
    lines = (tmp_path / "run" / "test_openings.jsonl").read_text().splitlines()
    assert [json.loads(line).get("resumes") for line in lines] == [None, None]
    metrics = {score["metric"] for score in read_json(tmp_path / "run" / "report.json")["scores"]}
    assert metrics == {"exact_match", "rougeL", "token_f1", "loss", "perplexity"}


def stop_after(number: int) -> Callable[[], bool]:
    calls = iter(range(10**9))
    return lambda: next(calls) >= number


def test_a_stopped_run_goes_on_to_the_same_weights(done: tuple[Path, Path], tmp_path: Path) -> None:
    path, reference = done
    moved = json.loads(path.read_text()) | {"output_dir": str(tmp_path / "run")}
    (tmp_path / "recipe.yaml").write_text(json.dumps(moved))
    recipe = world.recipe(tmp_path / "recipe.yaml")
    with (
        pytest.raises(Interrupted, match="Give the same command again"),
        stages.open_run(recipe, context=world.context(stop_requested=stop_after(40))) as run,
    ):
        stages.prepare(run)
    assert not run.folder.joinpath("data").exists()
    with stages.open_run(recipe, context=world.context()) as run:
        stages.prepare(run)
    interruptions = 0
    for number in (3, 7, 25, 40, 70, 10**9):
        try:
            with stages.open_run(recipe, context=world.context(stop_requested=stop_after(number))) as run:
                stages.train(run)
                stages.evaluate(run)
        except Interrupted as stopped:
            assert "Give the same command again to go on" in str(stopped)
            interruptions += 1
    assert interruptions >= 3
    for name in ("full/model/model.safetensors", "lora/adapter/adapter_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (reference / name).read_bytes()
    samples = "lora/test/samples.jsonl"
    assert (tmp_path / "run" / samples).read_text() == (reference / samples).read_text()


def test_going_on_with_an_interrupted_look_at_test_is_no_second_look(done: tuple[Path, Path], tmp_path: Path) -> None:
    path, folder = done
    shutil.copytree(folder, tmp_path / "run")
    openings = tmp_path / "run" / "test_openings.jsonl"
    # What a power cut may leave.
    openings.write_text(openings.read_text() + '{"models"')
    shutil.rmtree(tmp_path / "run" / "lora" / "test")
    metrics = ["exact_match", "rougeL", "token_f1"]
    for changed in ({}, {"evaluation.metrics": metrics}, {"evaluation.metrics": metrics}):
        recipe = world.recipe(path, output_dir=str(tmp_path / "run"), **changed)
        with (
            stages.open_run(recipe, context=world.context(stop_requested=lambda: True)) as run,
            pytest.raises(Interrupted),
        ):
            stages.evaluate(run)
    lines = openings.read_text().splitlines()
    seen = [(line["models"], line.get("resumes")) for line in map(json.loads, lines)]
    every = ["base", "full", "lora"]
    assert seen == [(every, None), (["lora"], True), (every, None), (every, True)]


def test_an_encoder_decoder_model_runs_from_end_to_end(tmp_path: Path) -> None:
    base = world.t5(tmp_path / "base")
    data = world.records(tmp_path / "data.jsonl", number=40)
    evaluation = {"metrics": ["exact_match"], "select_by": "exact_match", "max_new_tokens": 8}
    path = world.recipe_file(tmp_path, model=base, data=data, evaluation=evaluation)
    _, notes = finished(path)
    report = read_json(tmp_path / "run" / "report.json")
    assert {score["model"] for score in report["scores"]} == {"base", "full", "lora"}
    assert any("batches hold pairs of prompt and completion" in line for line in notes.lines)
    config = read_json(tmp_path / "run" / "lora" / "adapter" / "adapter_config.json")
    assert config["task_type"] == "SEQ_2_SEQ_LM"


def test_tasks_are_scored_apart_and_together(tmp_path: Path) -> None:
    base = world.llama(tmp_path / "base")
    one = world.records(tmp_path / "one.jsonl", number=40)
    two = world.records(tmp_path / "two.jsonl", number=60, seed=1)
    path = world.recipe_file(
        tmp_path,
        model=base,
        data=one,
        data_section=None,
        methods={"lora": {"peft_type": "LORA", "learning_rate": 1e-2}},
    )
    value = json.loads(path.read_text())
    del value["data_section"]
    value["data"]["tasks"] = [{"path": str(one)}, {"path": str(two)}]
    path.write_text(json.dumps(value))
    finished(path)
    scores = read_json(tmp_path / "run" / "report.json")["scores"]
    counts = {s["task"]: s["num_records"] for s in scores if s["model"] == "lora" and s["metric"] == "rougeL"}
    assert counts["all"] == counts["one"] + counts["two"]
    card = (tmp_path / "run" / "instruct-model" / "README.md").read_text()
    assert [task for task in ("one", "two", "all") if f"| {task} | rougeL |" in card] == ["one", "two", "all"]


def two_tasks(folder: Path, **evaluation: Any) -> Path:
    """Write a recipe with one task to train on and one of longer completions that is scored only."""
    base = world.llama(folder / "base")
    one = world.records(folder / "one.jsonl", number=60)
    rows = [{"prompt": f"story {i}?", "completion": f"it was number {i} of them"} for i in range(12)]
    (folder / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = world.recipe_file(
        folder, model=base, data=one, methods={"lora": {"peft_type": "LORA", "learning_rate": 1e-2}}
    )
    value = json.loads(path.read_text())
    value["data"]["tasks"] = [{"path": str(one)}, {"path": str(folder / "two.jsonl"), "train": False}]
    value["evaluation"] |= evaluation
    path.write_text(json.dumps(value))
    return path


def test_a_task_that_is_scored_only_is_answered_by_every_model_and_never_trained_or_chosen_on(tmp_path: Path) -> None:
    path = two_tasks(tmp_path, select_by="exact_match", max_new_tokens="auto")
    finished(path)
    run = tmp_path / "run"
    tasks = {
        split: [json.loads(line)["task"] for line in (run / "data" / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "validation", "test")
    }
    assert set(tasks["train"]) == set(tasks["validation"]) == {"one"}
    assert tasks["test"].count("two") == 12
    report = read_json(run / "report.json")
    for model in ("base", "lora"):
        counts = {s["task"]: s["num_records"] for s in report["scores"] if (s["model"], s["metric"]) == (model, "loss")}
        assert counts == {"one": tasks["test"].count("one"), "two": 12, "all": counts["one"], "others": 12}
    assert {p["task"] for p in report["paired"]} == {"one", "two", "all", "others"}
    assert report["untrained_tasks"] == ["two"]
    card = (run / "instruct-model" / "README.md").read_text(encoding="utf-8")
    trained, others = card.split("On tasks that it was not trained on:")
    assert "| one | rougeL |" in trained and "| two |" not in trained
    assert "| two | rougeL |" in others and "| others |" not in others
    lost = json.loads((run / "forgetting.json").read_text(encoding="utf-8"))["rows"]
    assert [row["suite"] for row in lost if row["suite"] == "two"] == ["two"]
    assert "## What it forgot" in others and "Exact match on two " in others
    assert "What the base model lost beyond the suites above was not measured." in others


def test_answers_that_choose_keep_to_what_the_train_completions_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = two_tasks(tmp_path, select_by="exact_match", max_new_tokens="auto")
    limits: dict[str, list[int]] = {"training": [], "evaluation": []}
    for name, seen in limits.items():

        def noted(*given: Any, seen: list[int] = seen, max_new_tokens: int, **rest: Any) -> Any:
            seen.append(max_new_tokens)
            return make_bench(*given, max_new_tokens=max_new_tokens, **rest)

        monkeypatch.setattr(f"keeptune.stages.{name}.make_bench", noted)
    with stages.open_run(world.recipe(path), context=world.context()) as run:
        stages.train(run, dry_run=False)
        stages.evaluate(run)
    tokens = read_json(tmp_path / "run" / "data" / "audit.json")["tokens"]
    on_test = math.ceil(1.1 * tokens["untrained_completion"]["p99"])
    assert limits["evaluation"] == [on_test, on_test]
    assert limits["training"] == [8] and on_test > 8
    assert read_json(tmp_path / "run" / "lora" / "adapter" / "manifest.json")["max_new_tokens"] == 8


def test_a_task_that_is_scored_only_fills_no_split_of_the_others(tmp_path: Path) -> None:
    path = two_tasks(tmp_path)
    with pytest.raises(
        DataError, match=r"data: found no test record \(.*test 0\); expected at least one in each split"
    ):
        finished(path, **{"data.test_fraction": 0.0})


def test_check_names_no_task_that_is_scored_only_as_one_without_a_train_record(tmp_path: Path) -> None:
    outcome = stages.check(world.recipe(two_tasks(tmp_path)), context=world.context(), num_shown=0)
    assert list(outcome.others) == ["one"]


@pytest.mark.parametrize(
    ("own", "key", "found"),
    [
        ({"path": "none.jsonl"}, "data.tasks.1.path", "none.jsonl: found no such file or folder"),
        ({"path": "one.jsonl", "name": "b", "test": "gone.csv"}, "data.tasks.1.test", "gone.csv: found no such"),
        ({"path": "one.jsonl", "name": "b", "revision": "v1"}, "data.tasks.1.path", "one.jsonl: found revision 'v1'"),
    ],
)
def test_a_wrong_path_is_told_by_its_key(
    own: dict[str, str], key: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one = world.records(Path("one.jsonl"), number=10)
    path = world.recipe_file(tmp_path, model=world.llama(tmp_path / "base"), data=one)
    value = json.loads(path.read_text())
    value["data"]["tasks"].append(own)
    path.write_text(json.dumps(value))
    with pytest.raises(KeeptuneError) as of_check:
        stages.check(world.recipe(path), context=world.context(), num_shown=1)
    with stages.open_run(world.recipe(path), context=world.context()) as run, pytest.raises(KeeptuneError) as of_run:
        stages.prepare(run)
    assert str(of_check.value) == str(of_run.value)
    assert str(of_check.value).startswith(f"{key}: {found}")


def test_what_is_said_of_a_recipes_key_names_the_recipe(tmp_path: Path) -> None:
    path = world.recipe_file(tmp_path, model=tmp_path / "base", data=tmp_path / "data.jsonl")
    recipe = world.recipe(path)

    def named(message: str) -> str:
        with pytest.raises(DataError) as caught, stages.naming_recipe(path, recipe):
            raise DataError(message)
        return str(caught.value)

    for key in ("model", "data", "data.tasks.0.path", "methods.lora.r", "methods.full", "output_dir"):
        assert named(f"{key}: found x; expected y.") == f"{path}: {key}: found x; expected y."
    # The second is a file of data, the third no key of this recipe.
    for where in ("runs/x", "data.jsonl:3", "data.tasks.7.path", "out", f"{path}: model", "--set seed"):
        assert named(f"{where}: found x; expected y.") == f"{where}: found x; expected y."
    assert named("model: a\nb\nmethods.lora: c") == f"{path}: model: a\nb\n{path}: methods.lora: c"


def test_an_empty_split_is_told(tmp_path: Path) -> None:
    base = world.llama(tmp_path / "base")
    path = world.recipe_file(tmp_path, model=base, data=world.records(tmp_path / "data.jsonl", number=1))
    with pytest.raises(DataError, match=r"found no .* record \(1 rows read; dropped: none"):
        finished(path)


def test_a_method_that_is_not_in_the_recipe_is_refused(done: tuple[Path, Path]) -> None:
    with (
        stages.open_run(world.recipe(done[0]), context=world.context()) as run,
        pytest.raises(RecipeError, match="--method lorra: found no such method in the recipe"),
    ):
        stages.train(run, methods=["lorra"])


def test_methods_that_do_not_fit_the_model_are_all_refused_before_any_data_are_prepared(tmp_path: Path) -> None:
    base = world.llama(tmp_path / "base")
    methods = {
        "full": {},
        "first": {"peft_type": "LORA", "r": 0},
        "good": {"peft_type": "LORA"},
        "second": {"peft_type": "LORA", "target_modules": ["q_proj", "v_porj"]},
        "third": {"peft_type": "LORA", "lora_alhpa": 4},
    }
    (tmp_path / "unread.jsonl").write_text("no data", encoding="utf-8")
    path = world.recipe_file(tmp_path, model=base, data=tmp_path / "unread.jsonl", methods=methods)
    with pytest.raises(RecipeError) as caught:
        stages.check_methods(world.recipe(path))
    first, second, third = str(caught.value).splitlines()
    assert first.startswith("methods.first: PEFT refuses this LORA for this model: `r` should be a positive integer")
    assert second.endswith("found 'v_porj'; expected a module of the model. Did you mean 'v_proj'?")
    assert third.startswith("methods.third.lora_alhpa: found an unknown key")


def test_evaluating_before_training_is_refused(tmp_path: Path) -> None:
    base = world.llama(tmp_path / "base")
    path = world.recipe_file(tmp_path, model=base, data=world.records(tmp_path / "data.jsonl", number=40))
    with (
        stages.open_run(world.recipe(path), context=world.context()) as run,
        pytest.raises(DataError, match="found no whole trained model; expected `keeptune train` to have finished"),
    ):
        stages.evaluate(run)
    assert not (tmp_path / "run" / "test_openings.jsonl").exists()


def test_a_changed_tokenizer_never_meets_old_tokens(tmp_path: Path) -> None:
    base = world.llama(tmp_path / "base")
    path = world.recipe_file(tmp_path, model=base, data=world.records(tmp_path / "data.jsonl", number=40))
    with stages.open_run(world.recipe(path), context=world.context()) as run:
        before = stages.prepare(run).key
        (base / "tokenizer.json").write_text((base / "tokenizer.json").read_text() + "\n")
        assert stages.prepare(run).key != before


def test_check_shows_what_would_be_trained_on_and_writes_nothing(tmp_path: Path) -> None:
    base = world.llama(tmp_path / "base")
    path = world.recipe_file(tmp_path, model=base, data=world.records(tmp_path / "data.jsonl", number=40))
    outcome = stages.check(world.recipe(path), context=world.context(), num_shown=3)
    assert outcome.template == "chat"
    assert len(outcome.previews) == 3
    for title, tokens in outcome.previews:
        assert title.startswith("first-word · ")
        trained = "".join(token.text for token in tokens if token.trained)
        assert trained.removesuffix("<|im_end|>") in world.WORDS
    assert not (tmp_path / "run").exists()


def test_check_shows_a_record_of_every_task_and_how_each_method_would_train(tmp_path: Path) -> None:
    tasks = [{"path": str(world.records(tmp_path / f"{n}.jsonl", number=30, seed=n))} for n in range(4)]
    path = world.recipe_file(
        tmp_path,
        model=world.llama(tmp_path / "base"),
        data=tmp_path,
        methods={"full": {}, "lora": {"peft_type": "LORA", "learning_rate": 1e-2}},
    )
    value = json.loads(path.read_text())
    value["data"]["tasks"] = tasks
    path.write_text(json.dumps(value))
    recipe = world.recipe(path)
    outcome = stages.check(recipe, context=world.context(), num_shown=3)
    assert [title.split(" · ")[0] for title, _ in outcome.previews] == ["0", "1", "2"]
    assert outcome.others == {"3": outcome.audit["tasks"]["3"]["train"]}
    shown = [title.split(" · ")[0] for title, _ in stages.check(recipe, context=world.context(), num_shown=6).previews]
    assert shown == ["0", "1", "2", "3", "0", "1"]
    assert [(m.name, m.peft_type, m.learning_rate) for m in outcome.methods] == [
        ("full", None, 2e-5),
        ("lora", "LORA", 1e-2),
    ]
    with stages.open_run(recipe, context=world.context()) as run:
        (folder,) = stages.train(run, methods=["lora"])
    num_steps = read_json(folder / "training.json")["num_steps"]
    assert abs(outcome.methods[1].num_steps - num_steps) <= 0.1 * num_steps


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    base = world.llama(tmp_path / "base")
    path = world.recipe_file(tmp_path, model=base, data=world.records(tmp_path / "data.jsonl", number=40))
    (tmp_path / "run" / "data").mkdir(parents=True)
    (tmp_path / "run" / "data" / "mine.txt").write_text("mine")
    with pytest.raises(FolderInUseError, match="found data and no run of keeptune; expected an empty or a new folder"):
        finished(path)
    assert (tmp_path / "run" / "data" / "mine.txt").read_text() == "mine"


def test_trained_methods_keep_the_data_that_they_were_trained_on(tmp_path: Path) -> None:
    base = world.llama(tmp_path / "base")
    data = world.records(tmp_path / "data.jsonl", number=40)
    methods = {"lora": {"peft_type": "LORA", "learning_rate": 1e-2}}
    path = world.recipe_file(tmp_path, model=base, data=data, methods=methods)
    finished(path)
    before = (tmp_path / "run" / "data" / "test.jsonl").read_text()
    world.records(data, number=40, seed=5)
    for stage in (stages.prepare, stages.evaluate):
        with (
            stages.open_run(world.recipe(path), context=world.context()) as run,
            pytest.raises(FolderInUseError, match="found methods trained on other data"),
        ):
            stage(run)
    assert (tmp_path / "run" / "data" / "test.jsonl").read_text() == before


def test_another_recipe_is_refused_under_other_method_names_too(done: tuple[Path, Path]) -> None:
    value = json.loads(done[0].read_text())
    value["methods"] = {"other": {"peft_type": "LORA"}}
    value["seed"] = 9
    other = done[0].with_name("other.yaml")
    other.write_text(json.dumps(value))
    with pytest.raises(FolderInUseError, match="found results of another recipe"):
        finished(other)


def test_a_damaged_artifact_is_neither_tested_nor_delivered(done: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(done[1], tmp_path / "run")
    moved = json.loads(done[0].read_text()) | {"output_dir": str(tmp_path / "run")}
    (tmp_path / "recipe.yaml").write_text(json.dumps(moved))
    weights = tmp_path / "run" / "lora" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with (
        stages.open_run(world.recipe(tmp_path / "recipe.yaml"), context=world.context()) as run,
        pytest.raises(StorageError, match=r"adapter_model\.safetensors: found a file that differs from what manifest"),
    ):
        stages.evaluate(run)


def test_the_manifest_keeps_the_first_command_and_adds_the_later_ones(done: tuple[Path, Path]) -> None:
    with stages.open_run(world.recipe(done[0]), context=world.context()) as run:
        manifest = read_json(run.folder / "manifest.json")
    assert manifest["command"] == "keeptune run"
    assert manifest["base"]["model_type"] == "llama"
    assert manifest["device"] == "cpu"
    assert len(manifest["commands"]) >= 2


def test_no_record_is_longer_than_the_models_positions(tmp_path: Path) -> None:
    base = world.llama(tmp_path / "base")
    config = read_json(base / "config.json") | {"max_position_embeddings": 40}
    (base / "config.json").write_text(json.dumps(config))
    path = world.recipe_file(tmp_path, model=base, data=world.records(tmp_path / "data.jsonl", number=40))
    with pytest.raises(DataError, match=r"the model having room for 40\. Set data\.over_length=cut or drop\."):
        stages.check(world.recipe(path), context=world.context(), num_shown=1)
    with stages.open_run(world.recipe(path, **{"data.over_length": "cut"}), context=world.context()) as run:
        data = stages.prepare(run)
    assert data.table("train").lengths.max() <= 40


def test_a_text_with_a_token_that_has_no_embedding_is_refused(tmp_path: Path) -> None:
    base = world.llama(tmp_path / "base")
    tokenizer = Tokenizer.load(base)
    smaller = tokenizer.encode(["e"], first=True)[0][0]
    assert max(tokenizer.eos_id, tokenizer.pad_id) < smaller
    config = read_json(base / "config.json") | {"vocab_size": smaller}
    (base / "config.json").write_text(json.dumps(config))
    path = world.recipe_file(tmp_path, model=base, data=world.records(tmp_path / "data.jsonl", number=40))
    with stages.open_run(world.recipe(path), context=world.context()) as run:
        with pytest.raises(RecipeError, match=rf"found a tokenizer with id \d+ for a model of {smaller} embeddings"):
            stages.prepare(run)
        assert not (run.folder / "data").exists()
