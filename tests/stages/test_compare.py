"""Models of several runs, and models of none, side by side on one test set."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from transformers import AutoModelForCausalLM

from keeptune import cli, stages
from keeptune.data.clean import prompt_key
from keeptune.data.record import Message, Record, record_id, record_to_json
from keeptune.errors import DataError, RecipeError, StorageError
from keeptune.evaluation.metrics import Answer, answer_to_json
from keeptune.stages import answering
from keeptune.stages.replicates import Replicates, pairs_apart
from keeptune.storage import (
    read_json,
    read_record,
    read_sealed_text,
    staged_folder,
    write_json,
    write_jsonl,
    write_record,
    write_sealed_text,
)
from tests.stages import world

torch.set_num_threads(1)
# PEFT itself asks transformers for a deprecated property.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the runs `one` (full and LoRA) and `two` (another LoRA) on the same data and base."""
    folder = tmp_path_factory.mktemp("runs")
    base, data = world.llama(folder / "base"), world.records(folder / "data.jsonl", number=50)
    short = {"num_train_epochs": 1, "tokens_per_step": 256}
    two = {"lora": {"peft_type": "LORA", "r": 4, "learning_rate": 3e-2}}
    for name, methods in (("one", {}), ("two", {"methods": two})):
        sections = {"output_dir": str(folder / name), "training": short, **methods}
        path = world.recipe_file(folder, model=base, data=data, **sections)
        with stages.open_run(world.recipe(path), context=world.context()) as run:
            stages.train(run)
            stages.evaluate(run)
    return folder


def compared(*models: str | Path, out: Path | None = None) -> dict[str, Any]:
    return read_json(stages.compare([str(model) for model in models], out=out, context=world.context()))


def openings(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "test_openings.jsonl").read_text().splitlines()]


def pair(value: Mapping[str, Any], model: str, against: str, *, metric: str, task: str = "all") -> dict[str, Any]:
    wanted = (model, against, metric, task)
    (found,) = [p for p in value["pairs"] if (p["model"], p["against"], p["metric"], p["task"]) == wanted]
    return found


def test_runs_on_the_same_data_are_compared_from_their_answers_alone(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "answer", None)
    before = [openings(runs / name) for name in ("one", "two")]
    value = compared(runs / "one", runs / "two")
    assert [openings(runs / name) for name in ("one", "two")] == before
    assert [model["name"] for model in value["models"]] == ["one/base", "one/full", "one/lora", "two/lora"]
    assert value["notes"] == ["two/base has the weights of one/base, which stands for both."]
    assert value["main_metric"] == "exact_match"
    assert len([p for p in value["pairs"] if p["holm_p_value"] is not None]) == 6
    # What each run says of itself stands here unchanged.
    for name in ("full", "lora"):
        own = [
            p for p in read_json(runs / "one" / "paired.json")["paired"] if (p["model"], p["against"]) == (name, "base")
        ]
        for paired in own:
            here = pair(value, f"one/{name}", "one/base", metric=paired["metric"], task=paired["task"])
            assert {**paired, "model": f"one/{name}", "against": "one/base"}.items() <= here.items()
    scores = read_json(runs / "two" / "lora" / "test" / "scores.json")["scores"]
    means = {(s["task"], s["metric"]): s["mean"] for s in value["scores"] if s["model"] == "two/lora"}
    assert means == {(s["task"], s["metric"]): s["mean"] for s in scores}
    costs = {model["name"]: model["trained_parameters"] for model in value["models"]}
    assert costs["one/base"] is None and costs["one/lora"] == costs["two/lora"] < costs["one/full"]


def test_the_comparison_stands_in_the_first_run_or_where_it_is_told_to(runs: Path, tmp_path: Path) -> None:
    arguments = [str(runs / "two" / "lora"), str(runs / "one" / "lora")]
    written = stages.compare(arguments, out=None, context=world.context())
    assert written.parent.parent == runs / "two" / "comparisons"
    assert stages.compare(arguments, out=None, context=world.context()) == written
    elsewhere = stages.compare(arguments, out=tmp_path / "there", context=world.context())
    assert elsewhere == tmp_path / "there" / "comparison.json"
    assert elsewhere.read_bytes() == written.read_bytes()
    assert elsewhere.with_suffix(".md").read_text(encoding="utf-8").startswith("# 2 models on the test set of two\n")


def other_model(folder: Path, *, base: Path) -> Path:
    """Write the base model with other weights and without its chat template."""
    shutil.copytree(base, folder)
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


def test_a_model_of_no_run_reads_the_runs_prompts_and_answers_once(runs: Path, tmp_path: Path) -> None:
    model = other_model(tmp_path / "other", base=runs / "base")
    before = len(openings(runs / "one"))
    value = compared(runs / "one" / "lora", model)
    lora, other = value["models"]
    assert (other["name"], other["own_tokenizer"]) == ("other", False)
    assert other["prompt_sha256"] == lora["prompt_sha256"]
    assert pair(value, "other", "one/lora", metric="loss")["difference"] > 0
    assert openings(runs / "one")[before:] == [
        {
            "opened": "2026-01-01T00:00:00",
            "command": "keeptune run",
            "models": ["other"],
            "test_sha256": value["test"]["sha256"],
            "keys": {"other": ANY},
            "previous_sha256": ANY,
        }
    ]
    # Among other models, and for another place, the same answers serve.
    again = compared(model, runs / "one", out=tmp_path / "out")
    assert len(openings(runs / "one")) == before + 1
    assert [model["name"] for model in again["models"]] == ["other", "one/base", "one/full", "one/lora"]
    here, there = pair(value, "other", "one/lora", metric="loss"), pair(again, "one/lora", "other", metric="loss")
    assert (here["difference"], here["p_value"]) == pytest.approx((-there["difference"], there["p_value"]))


def test_an_adapter_of_no_run_answers_exactly_as_it_did_in_its_run(runs: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(runs / "one" / "lora" / "adapter", tmp_path / "adapter")
    value = compared(runs / "one" / "lora", adapter)
    for found in value["pairs"]:
        assert (found["difference"], found["standard_error"], found["p_value"]) == (0.0, 0.0, 1.0)
        assert (found["better"], found["worse"]) == (0, 0)


def test_a_model_with_another_tokenizer_answers_and_its_loss_is_left_out(runs: Path, tmp_path: Path) -> None:
    value = compared(runs / "one" / "lora", world.t5(tmp_path / "t5"))
    lora, t5 = value["models"]
    assert (t5["name"], t5["own_tokenizer"]) == ("t5", True)
    assert t5["prompt_sha256"] != lora["prompt_sha256"]
    assert {s["metric"] for s in value["scores"] if s["model"] == "t5"} == {"exact_match", "rougeL"}
    assert {p["metric"] for p in value["pairs"]} == {"exact_match", "rougeL"}
    (note,) = value["notes"]
    assert note.startswith("t5 reads and writes with a tokenizer of its own: its loss per token is not comparable")


def test_a_long_record_is_read_whole_by_another_tokenizer_or_refused(runs: Path, tmp_path: Path) -> None:
    short = world.llama(tmp_path / "short")
    config = read_json(short / "config.json")
    write_json(short / "config.json", {**config, "max_position_embeddings": 8})
    tokenizer = read_json(short / "tokenizer.json")
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:1]
    write_json(short / "tokenizer.json", tokenizer)
    with pytest.raises(DataError, match=r"expected at most 8, the model having room for 8"):
        compared(runs / "one" / "lora", short)


def test_the_base_model_by_its_own_folder_is_refused_beside_its_run(runs: Path) -> None:
    with pytest.raises(RecipeError, match=r"found the weights of the run's base model, which has answered"):
        compared(runs / "one" / "lora", runs / "base")


def test_a_tokenizer_that_changed_since_the_data_were_prepared_is_refused(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "one", tmp_path / "one")
    base = shutil.copytree(runs / "base", tmp_path / "base")
    text = read_sealed_text(run / "recipe.yaml").replace(str(runs / "base"), str(base))
    write_sealed_text(run / "recipe.yaml", text)
    config = read_json(base / "tokenizer_config.json")
    write_json(base / "tokenizer_config.json", {**config, "model_max_length": 77})
    with pytest.raises(DataError, match=r"found another tokenizer or template than when .*data was prepared"):
        compared(run / "lora", other_model(tmp_path / "other", base=runs / "base"))


# What follows needs no model: the folders hold what `evaluate` would have written.


def record(number: int) -> Record:
    messages = (Message("user", f"question {number}"), Message("assistant", f"answer {number}"))
    return Record(record_id("t", messages), "t", f"data.jsonl:{number}", messages)


def answer(number: int, value: float, *, ended: bool = True) -> Answer:
    asked, loss = record(number), 2.0 - value
    metrics = {"exact_match": value, "loss": loss, "perplexity": math.exp(loss)}
    return Answer(
        asked.id, "t", prompt_key(asked), asked.prompt, "", (asked.completion,), ended, metrics, num_target_tokens=2
    )


def written_run(
    folder: Path,
    *,
    methods: Mapping[str, list[Answer]],
    prompts: str = "same",
    signature: str = "v1",
    limit: int = 8,
    untrained_tasks: tuple[str, ...] = (),
    train: tuple[int, ...] = (),
) -> Path:
    """Write what a comparison reads of a run; of `train` the numbers of the records that its methods learned."""
    folder.mkdir(parents=True)
    write_record(folder / "manifest.json", {"commands": [], "versions": {}, "methods": list(methods)})
    facts = {"template": "chat", "template_sha256": "0" * 64, "tokenizer_sha256": "1" * 64, "key": "k"}
    with staged_folder(folder / "data", facts=facts) as staging:
        write_jsonl(staging / "train.jsonl", (record_to_json(record(number)) for number in train))
        write_jsonl(staging / "test.jsonl", [])
    for name, answers in methods.items():
        with staged_folder(folder / name / "test", facts={"key": name}) as staging:
            write_jsonl(staging / "samples.jsonl", map(answer_to_json, answers))
            metrics = {name: {"signature": name, "higher_is_better": False} for name in ("loss", "perplexity")}
            header = {
                "prompt_sha256": prompts,
                "decoding": {"strategy": "greedy", "max_new_tokens": limit},
                "untrained_tasks": list(untrained_tasks),
                "cut_fraction": sum(not a.ended for a in answers) / len(answers),
                "metrics": {"exact_match": {"signature": signature, "higher_is_better": True}, **metrics},
            }
            write_json(staging / "scores.json", {**header, "scores": []})
        write_record(
            folder / name / "training.json", {"estimated_memory_bytes": {"weights": 4}, "peak_memory_bytes": 9}
        )
    return folder


def ten(*wrong: int) -> list[Answer]:
    return [answer(i, 0.0 if i in wrong else 1.0) for i in range(10)]


def test_a_written_run_is_compared(tmp_path: Path) -> None:
    value = compared(written_run(tmp_path / "a", methods={"lora": ten(1), "ia3": ten(1, 2, 3)}))
    assert pair(value, "a/ia3", "a/lora", metric="exact_match")["difference"] == pytest.approx(-0.2)
    assert value["models"][0]["estimated_memory_bytes"] == {"weights": 4}
    assert value["test"]["num_records"] == value["test"]["num_clusters"] == 10


def test_the_delivered_model_on_the_way_stands_beside_the_trained_ones(tmp_path: Path) -> None:
    run = written_run(tmp_path / "a", methods={"lora": ten(1), "lora/path/0.5": ten(1, 2, 3)})
    write_record(run / "manifest.json", {"commands": [], "versions": {}, "methods": ["lora"]})
    write_record(run / "selection.json", {"selected": "lora", "alpha": 0.5})
    with staged_folder(run / "instruct-model", facts={"key": "k"}) as staging:
        (staging / "adapter.safetensors").write_bytes(b"weights")
    value = compared(run)
    assert [model["name"] for model in value["models"]] == ["a/lora", "a/instruct-model"]
    assert pair(value, "a/instruct-model", "a/lora", metric="exact_match")["difference"] == pytest.approx(-0.2)
    assert value["notes"] == ["a/instruct-model is the delivered model: lora at alpha 0.5."]
    assert compared(run / "lora", run / "instruct-model")["notes"] == value["notes"]
    named = {"folder": "instruct-model", "sha256": {"adapter.safetensors": "0" * 64}}
    write_record(run / "certificate.json", {"verdict": "CERTIFIED", "artifact": named})
    with pytest.raises(DataError, match="adapter.safetensors: found the hash .*; expected 0000000000000000, which"):
        compared(run)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"methods": {"lora": [answer(i, 1.0) for i in range(5, 14)]}},
            r"^b: data: found 9 test records, 5 of them among the 10 of a; expected the same ones in the same order\. "
            r"Name the adapter/ or model/ folder of a method of b: it then answers the test set of a\.$",
        ),
        (
            {"methods": {"lora": ten(), "ia3": ten()}, "prompts": "differs"},
            r"^b: template: found prompts differs \(template chat, tokenizer 11111111\); expected those of a, prompts "
            r"same \(template chat, tokenizer 11111111\)\. Name the adapter/ or model/",
        ),
        (
            {"methods": {"lora": ten(), "ia3": ten()}, "signature": "v2"},
            r"^b: metrics: found v2 for exact_match; expected v1, as for a\. Set the same evaluation\.metrics in both "
            r"recipes, then give `keeptune evaluate` with each\.$",
        ),
        (
            {"methods": {"lora": [*ten()[:9], answer(9, 0.0, ended=False)]}, "limit": 6},
            r"^b: decoding: found answers of at most 6 tokens, some of them cut there; expected a limit of 8, as for "
            r"the others\. Set the same evaluation\.max_new_tokens in both recipes, then give `keeptune evaluate` with",
        ),
    ],
)
def test_other_data_prompts_metrics_or_decoding_are_refused(tmp_path: Path, other: Any, message: str) -> None:
    one = written_run(tmp_path / "a", methods={"lora": ten(1)})
    with pytest.raises(DataError, match=message):
        compared(one, written_run(tmp_path / "b", **other))


def test_a_lower_limit_that_cut_no_answer_is_no_other_decoding(tmp_path: Path) -> None:
    one = written_run(tmp_path / "a", methods={"lora": ten(1)}, limit=6)
    value = compared(
        one, written_run(tmp_path / "b", methods={"lora": [answer(i, 1.0, ended=False) for i in range(10)]})
    )
    assert value["test"]["max_new_tokens"] == 8


def test_runs_that_trained_on_other_tasks_are_told_of(tmp_path: Path) -> None:
    one = written_run(tmp_path / "a", methods={"lora": ten(1)})
    value = compared(one, written_run(tmp_path / "b", methods={"lora": ten(2)}, untrained_tasks=("t",)))
    assert value["notes"] == [
        "b/lora was trained on other tasks than the run of a/lora, which says what stands under all and under others."
    ]
    assert {score["task"] for score in value["scores"]} == {"t", "all"}


def test_a_method_without_answers_is_to_be_evaluated_first(tmp_path: Path) -> None:
    run = written_run(tmp_path / "a", methods={"lora": ten(1), "ia3": ten(2)})
    shutil.rmtree(run / "ia3" / "test")
    message = r"a/ia3/test: found no whole answers to test; expected those of `keeptune evaluate`\. Evaluate first\.$"
    with pytest.raises(DataError, match=message):
        compared(run)
    samples = run / "lora" / "test" / "samples.jsonl"
    samples.write_text(samples.read_text().replace("1.0", "0.5"))
    with pytest.raises(StorageError, match=r"a/lora/test/samples\.jsonl: found content that differs from its hash"):
        compared(run)


def test_a_run_without_a_trained_method_is_refused(tmp_path: Path) -> None:
    run = written_run(tmp_path / "a", methods={})
    with pytest.raises(
        DataError, match=r"found a run without a trained method; expected one or more\. Give `keeptune run`"
    ):
        compared(run, written_run(tmp_path / "b", methods={"lora": ten(1)}))


def test_what_an_earlier_recipe_left_in_a_run_is_none_of_its_methods(tmp_path: Path) -> None:
    run = written_run(tmp_path / "a", methods={"lora": ten(1), "ia3": ten(2)})
    facts = read_record(run / "manifest.json")
    write_record(run / "manifest.json", {**facts, "methods": ["lora"]})
    with pytest.raises(RecipeError, match=r"found the one model a/lora; expected two or more\. Name another run"):
        compared(run)
    assert [m["name"] for m in compared(run, run / "ia3")["models"]] == ["a/lora", "a/ia3"]


def test_the_same_model_twice_is_refused(tmp_path: Path) -> None:
    run = written_run(tmp_path / "a", methods={"lora": ten(1), "ia3": ten(2)})
    (run / "lora" / "adapter").mkdir()
    (run / "lora" / "adapter" / "adapter_config.json").write_text("{}")
    for again in (run, run / "lora", run / "lora" / ".." / "lora", run / "lora" / "adapter"):
        with pytest.raises(RecipeError, match=r"found the same model twice .*; expected each once"):
            compared(run, again)


def test_models_without_any_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^compare: found no run among owner/one, owner/two; expected one or more"):
        compared("owner/one", "owner/two")


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    run = written_run(tmp_path / "a", methods={"lora": ten(1)})
    with pytest.raises(RecipeError, match=r"a/data: found no run, no trained method of one and no model"):
        compared(run, run / "data")
    with pytest.raises(RecipeError, match=r"found no run, no trained method of one and no model"):
        compared(run, run / "manifest.json")


def test_a_path_that_is_not_there_is_refused(runs: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"/none: model: found no folder '/none'; expected a model folder or a hub id"
    ):
        compared(runs / "one" / "lora", "/none")


def test_a_model_that_was_trained_on_inputs_of_this_test_set_is_refused(tmp_path: Path) -> None:
    run = written_run(tmp_path / "a", methods={"lora": ten(1)})
    other = written_run(tmp_path / "b", methods={"lora": ten(2)}, train=(8, 9, 10, 11))
    (other / "lora" / "adapter").mkdir()
    (other / "lora" / "adapter" / "adapter_config.json").write_text("{}")
    recipe = {"model": str(tmp_path), "output_dir": str(run), "data": {"tasks": [{"path": "x.jsonl"}]}}
    write_sealed_text(run / "recipe.yaml", json.dumps(recipe) + "\n")
    with pytest.raises(DataError, match=r"found 2 of the 10 inputs of the test set among those that it was trained on"):
        compared(run, other / "lora" / "adapter")


def test_names_are_as_short_as_tells_models_apart(tmp_path: Path) -> None:
    one = written_run(tmp_path / "x" / "run", methods={"lora": ten(1)})
    two = written_run(tmp_path / "y" / "run", methods={"lora": ten(2)})
    names = [model["name"] for model in compared(one, two)["models"]]
    assert names == ["x/run/lora", "y/run/lora"]


def test_tokenizers_are_told_apart_by_what_they_do(runs: Path, tmp_path: Path) -> None:
    # The same merges in a file written otherwise are the same tokenizer.
    model = other_model(tmp_path / "other", base=runs / "base")
    value = read_json(model / "tokenizer.json")
    (model / "tokenizer.json").write_text(json.dumps(value, indent=3, sort_keys=True))
    assert compared(runs / "one" / "lora", model)["models"][1]["own_tokenizer"] is False


def test_the_command_prints_a_table_of_eighty_columns_and_where_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = written_run(tmp_path / "a", methods={"lora": ten(1), "ia3": ten(1, 2, 3)})
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["keeptune", "compare", str(run), "--out", str(tmp_path / "out"), "--quiet"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert printed.endswith(f"Comparison: {tmp_path / 'out' / 'comparison.md'}\n")
    assert "No clear difference in Exact match: a/ia3 and a/lora." in printed
    table, _, _ = printed.partition("Clear in Exact match")
    assert max(map(len, table.splitlines())) <= 80
    assert "…" not in printed


@pytest.fixture(scope="module")
def seeds(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with runs of two seeds on given splits, and one whose split the seed decided."""
    folder = tmp_path_factory.mktemp("seeds")
    split = {
        part: str(world.records(folder / f"{part}.jsonl", number=number, seed=number))
        for part, number in (("path", 40), ("validation", 8), ("test", 12))
    }
    lora = {"lora": {"peft_type": "LORA", "r": 4, "learning_rate": 1e-2}}
    given = {"tasks": [{"name": "first-word", **split}]}
    own = {"tasks": [{"name": "first-word", "path": split["path"]}], "validation_fraction": 0.2, "test_fraction": 0.2}
    for name, seed, data in (("zero", 0, given), ("one", 1, given), ("own-zero", 0, own), ("own-one", 1, own)):
        sections = {"output_dir": str(folder / name), "seed": seed, "methods": lora}
        sections["training"] = {"num_train_epochs": 1, "tokens_per_step": 256}
        path = world.recipe_file(folder, model=runs / "base", data=folder, **sections)
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "data": data}), encoding="utf-8")
        with stages.open_run(world.recipe(path), context=world.context()) as run:
            stages.train(run)
            stages.evaluate(run)
    return folder


def test_runs_that_differ_by_their_seed_are_replicates_and_no_rivals(seeds: Path) -> None:
    value = compared(seeds / "zero", seeds / "one")
    (lora,) = value["replicates"]
    assert (lora["name"], lora["models"], lora["seeds"]) == ("lora over 2 seeds", ["zero/lora", "one/lora"], [0, 1])
    means = {s["model"]: s["mean"] for s in value["scores"] if (s["task"], s["metric"]) == ("all", "loss")}
    (of_loss,) = [s for s in lora["scores"] if (s["task"], s["metric"]) == ("all", "loss")]
    zero, one = means["zero/lora"], means["one/lora"]
    assert zero != one
    assert of_loss["mean"] == pytest.approx((zero + one) / 2)
    assert of_loss["standard_deviation"] == pytest.approx(abs(zero - one) / math.sqrt(2))
    pairs = {(p["model"], p["against"]) for p in value["pairs"]}
    assert pairs == {("zero/lora", "zero/base"), ("one/lora", "zero/base")}


def test_methods_with_several_seeds_are_paired_at_the_same_seed() -> None:
    full = Replicates("full over 2 seeds", (("a/full", 0), ("b/full", 1)))
    lora = Replicates("lora over 2 seeds", (("a/lora", 0), ("b/lora", 1)))
    assert pairs_apart([full, lora]) == {
        frozenset(pair)
        for pair in (("a/full", "b/full"), ("a/lora", "b/lora"), ("a/full", "b/lora"), ("b/full", "a/lora"))
    }


def test_other_settings_beside_the_seed_make_rivals(seeds: Path, tmp_path: Path) -> None:
    shutil.copytree(seeds / "one", tmp_path / "one")
    recipe = tmp_path / "one/recipe.yaml"
    write_sealed_text(recipe, read_sealed_text(recipe).replace("0.01", "0.02"))
    value = compared(seeds / "zero/lora", tmp_path / "one/lora", out=tmp_path / "there")
    assert value["replicates"] == []
    assert {(p["model"], p["against"]) for p in value["pairs"]} == {("one/lora", "zero/lora")}


def test_a_split_that_the_seed_decided_is_refused_with_what_to_do(seeds: Path) -> None:
    with pytest.raises(DataError, match="The seed decides the split too: give each task its own validation and test"):
        compared(seeds / "own-zero/lora", seeds / "own-one/lora")
