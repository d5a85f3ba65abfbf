"""`keeptune certify --artifact`: a folder that the run did not deliver, held against the run's budgets."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from keeptune import stages
from keeptune.config import MethodFields
from keeptune.errors import DataError, RecipeError, StorageError
from keeptune.model.methods import quiet_peft
from keeptune.stages.budgets import budgets_of
from keeptune.storage import MANIFEST, file_sha256, read_record, write_json, write_record
from tests.stages.test_retention import Made, finished, written_recipe
from tests.stages.world import Notes, context, llama, t5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Made:
    folder = tmp_path_factory.mktemp("certified")
    # The untrained base answers the task at chance.
    budget = {"self": "0.9 nats", "others-task": "90 points of exact_match"}
    return finished(written_recipe(folder, model=model, budget=budget))


@pytest.fixture
def copied(made: Made, tmp_path: Path) -> Iterator[Made]:
    folder = tmp_path / "run"
    shutil.copytree(made.folder, folder)
    yield Made(made.recipe.model_copy(update={"output_dir": str(folder)}), folder, made.certificate, made.notes)


@pytest.fixture
def tuned(made: Made, tmp_path: Path) -> Path:
    """Return a copy of the trained model that knows nothing of the run, with a file more than the delivered one has."""
    folder = Path(shutil.copytree(made.folder / "full" / "model", tmp_path / "elsewhere" / "tuned"))
    (folder / "special_tokens_map.json").write_text("{}", encoding="utf-8")
    return folder


def certified(made: Made, folder: Path, *, notes: Notes | None = None) -> tuple[dict[str, Any], Path, tuple[str, ...]]:
    with stages.open_run(made.recipe, context=context(notes=notes)) as run:
        found = stages.certify_artifact(run, folder)
    return json.loads(found.path.read_text(encoding="utf-8")), found.path, found.lines


def adapter(base: Path, folder: Path) -> None:
    """Write an adapter that changes nothing, as peft alone would."""
    with quiet_peft():
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2)).save_pretrained(str(folder))


def ledger(made: Made) -> list[dict[str, Any]]:
    lines = (made.folder / "certify_openings.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def files(folder: Path) -> dict[str, int]:
    return {path.as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_folder_gets_a_certificate_that_names_it_by_its_hashes(copied: Made, tuned: Path) -> None:
    value, path, lines = certified(copied, tuned)
    assert (value["verdict"], lines[0]) == ("CERTIFIED", "CERTIFIED, EXCEPT FOR others-task")
    assert path.parent == copied.folder / "certificates" and path.stem.startswith("tuned-")
    assert value["artifact"]["folder"] == str(tuned)
    assert value["artifact"]["sha256"]["model.safetensors"] == file_sha256(tuned / "model.safetensors")
    assert value["artifact"]["sha256"].keys() >= {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
    }  # fmt: skip
    assert value["choice"] == {"candidate": path.stem, "alpha": 1.0}
    assert (
        "alpha" not in value["sentence"]
        and "stays within all other budgets: self loses at most 0.9 nats" in value["sentence"]
    )
    assert str(tuned) in lines[2] and str(path) in lines[-1]


def test_it_is_one_more_opening_whose_error_its_two_suites_share(copied: Made, tuned: Path) -> None:
    value, path, _ = certified(copied, tuned)
    assert value["opening"] == 2 and value["delta"] == pytest.approx(0.0025)
    assert [line["opening"] for line in ledger(copied)] == [1, 2]
    assert ledger(copied)[1]["candidates"] == [path.stem]
    assert {cell["delta"] for cell in value["cells"]} == {value["delta"]}


def test_too_few_records_for_any_verdict_are_refused_before_they_are_opened(copied: Made, tuned: Path) -> None:
    retention = copied.recipe.retention.model_copy(
        update={"budget": {**copied.recipe.retention.budget, "self": "0.001 nats"}}
    )
    strict = Made(copied.recipe.model_copy(update={"retention": retention}), copied.folder, copied.certificate, [])
    with pytest.raises(
        RecipeError, match=r"retention\.budget\.self: found [\d,]+ records to certify on; expected at least"
    ):
        certified(strict, tuned)
    assert len(ledger(copied)) == 1


def test_the_same_files_are_not_asked_again(copied: Made, tuned: Path) -> None:
    first, path, _ = certified(copied, tuned)
    notes = Notes()
    assert certified(copied, tuned, notes=notes)[:2] == (first, path)
    assert len(ledger(copied)) == 2
    assert f"{path}: certified before and unchanged" in notes.lines


def test_an_interrupted_one_goes_on_without_another_opening(copied: Made, tuned: Path) -> None:
    first, path, _ = certified(copied, tuned)
    path.unlink()
    assert certified(copied, tuned)[0]["cells"] == first["cells"]
    assert len(ledger(copied)) == 2


def test_it_measures_what_the_run_measured_of_the_same_weights(copied: Made, tuned: Path) -> None:
    value = certified(copied, tuned)[0]
    own = next(cell for cell in copied.certificate["cells"] if cell["choice"]["alpha"] == 1.0)
    assert value["cells"][0]["measured"]["mean"] == pytest.approx(own["measured"]["mean"], abs=1e-7)


def test_the_base_s_answers_are_those_of_the_run_and_all_else_of_it_stays(copied: Made, tuned: Path) -> None:
    before = {p: t for p, t in files(copied.folder).items() if "/base/" in p or "/full/" in p or "/instruct-" in p}
    own = (copied.folder / "certificate.json").read_bytes()
    certified(copied, tuned)
    assert {p: t for p, t in files(copied.folder).items() if p in before} == before
    assert (copied.folder / "certificate.json").read_bytes() == own


def test_a_model_that_lost_too_much_is_told_so(copied: Made, tmp_path: Path, model: Path) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    weights = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.mul_(12.0)
    weights.save_pretrained(broken)
    value, _, lines = certified(copied, broken)
    assert value["verdict"] == "INFEASIBLE" == lines[0]
    assert value["choice"] is None and "the smallest tested" not in value["sentence"]
    assert value["artifact"]["folder"] == str(broken)
    assert (copied.folder / "instruct-model").is_dir()


def test_an_adapter_of_another_tool_is_certified_on_the_run_s_base(copied: Made, tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "adapter"
    adapter(model, folder)
    value = certified(copied, folder)[0]
    assert value["verdict"] == "CERTIFIED"
    assert value["cells"][0]["measured"]["mean"] == 0.0
    assert value["artifact"]["sha256"].keys() == {"adapter_model.safetensors", "adapter_config.json"}


def test_a_run_that_was_not_certified_yet_certifies_a_folder(copied: Made, tuned: Path) -> None:
    for name in ("certificate.json", "certify_openings.jsonl", "forgetting.json"):
        (copied.folder / name).unlink()
    facts = read_record(copied.folder / MANIFEST)
    del facts["ledgers"]["certify_openings.jsonl"]
    write_record(copied.folder / MANIFEST, facts)
    value = certified(copied, tuned)[0]
    assert value["verdict"] == "CERTIFIED" and value["opening"] == 1


def test_a_folder_that_changed_since_is_certified_anew_and_the_change_is_said(copied: Made, tuned: Path) -> None:
    _, earlier, _ = certified(copied, tuned)
    expected = file_sha256(tuned / "config.json")
    config = json.loads((tuned / "config.json").read_text(encoding="utf-8"))
    (tuned / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}), encoding="utf-8")
    with pytest.raises(StorageError, match=r"config\.json: found a file that differs from what manifest\.json"):
        certified(copied, tuned)
    (tuned / MANIFEST).unlink()
    notes = Notes()
    value, path, _ = certified(copied, tuned, notes=notes)
    assert path != earlier and value["opening"] == 3
    said = next(line for line in notes.lines if "certificate of its own" in line)
    assert f"{tuned / 'config.json'}: found the hash {file_sha256(tuned / 'config.json')[:16]}" in said
    assert f"expected {expected[:16]}, which {earlier} speaks of" in said


def test_a_recipe_without_a_budget_certifies_nothing(copied: Made, tuned: Path) -> None:
    retention = copied.recipe.retention.model_copy(update={"budget": {}})
    without = Made(copied.recipe.model_copy(update={"retention": retention}), copied.folder, {}, [])
    with pytest.raises(DataError, match=r"retention\.budget: found none; expected what each suite may lose"):
        certified(without, tuned)


def test_suites_at_chance_alone_are_no_ground_for_a_certificate(
    copied: Made, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scored(*arguments: Any, **named: Any) -> dict[str, Any]:
        return {suite: budget for suite, budget in budgets_of(*arguments, **named).items() if budget.metric != "loss"}

    monkeypatch.setattr(importlib.import_module("keeptune.stages.session"), "budgets_of", scored)
    with pytest.raises(
        DataError,
        match=r"nothing to lose beyond the budget \(others-task: exact_match 0, chance 0\.\d+\)",
    ):
        certified(copied, tuned)
    assert len(ledger(copied)) == 1


def test_what_the_base_has_to_lose_is_judged_by_its_answers_to_test_which_are_made_where_they_are_missing(
    copied: Made, tuned: Path
) -> None:
    found = certified(copied, tuned)[0]
    shutil.rmtree(copied.folder / "base" / "zero-shot")
    next((copied.folder / "certificates").glob("*.json")).unlink()
    again = certified(copied, tuned)[0]
    assert again["left_out_at_chance"] == found["left_out_at_chance"] != {}
    assert (copied.folder / "base" / "zero-shot" / "samples.jsonl").is_file()


def test_suites_at_chance_are_left_out_and_the_sentence_says_so(copied: Made, tuned: Path) -> None:
    found = certified(copied, tuned)[0]
    one = found["left_out_at_chance"]["others-task"]
    assert (one["metric"], one["base"]) == ("exact_match", 0.0) and 0.1 < one["chance"] < 0.5
    assert found["sentence"].startswith("Not certified for others-task (exact_match 0, chance 0.")
    assert found["budgets"].keys() == found["items"].keys() == {"self"}
    assert found["items"]["self"] == found["cells"][0]["measured"]["num_records"]


def test_a_folder_without_a_model_is_refused_before_anything_is_opened(copied: Made, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="found no model; expected a folder with config.json or adapter_config.json"):
        certified(copied, tmp_path / "nothing")
    with pytest.raises(RecipeError, match=r"found no model; .*Name .*full/model\."):
        certified(copied, copied.folder / "full")
    assert len(ledger(copied)) == 1 and not (copied.folder / "certificates").exists()


def test_a_model_of_another_kind_is_refused(copied: Made, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="found a t5 model of .*; expected a tuning of the run's base model, a llama"):
        certified(copied, t5(tmp_path / "t5"))


def test_an_adapter_on_another_base_is_refused(copied: Made, tmp_path: Path, model: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(model)
    other.lm_head.weight.data += 1.0
    other.save_pretrained(tmp_path / "other")
    adapter(tmp_path / "other", tmp_path / "adapter")
    with pytest.raises(RecipeError, match="found an adapter on .*other, whose weights are not those of the run's base"):
        certified(copied, tmp_path / "adapter")


def test_an_adapter_over_other_bits_than_the_run_s_is_refused(copied: Made, tmp_path: Path, model: Path) -> None:
    adapter(model, tmp_path / "adapter")
    write_record(tmp_path / "adapter" / "manifest.json", {"quantization": "4bit", "files": {}})
    with pytest.raises(RecipeError) as caught:
        certified(copied, tmp_path / "adapter")
    assert str(caught.value) == (
        f"{tmp_path / 'adapter'}: found an adapter that was trained over 4bit weights; expected one over the run's "
        "unquantised ones. Certify it with a recipe of its own quantization."
    )
    write_record(tmp_path / "adapter" / "manifest.json", {"key": "another run's", "files": {}})
    assert certified(copied, tmp_path / "adapter")[0]["verdict"] == "CERTIFIED"


@pytest.mark.parametrize(("name", "bits"), [("tuned", None), ("adapter", "4bit")])
def test_a_whole_model_is_read_as_it_lies_and_an_adapter_over_the_run_s_bits(
    name: str, bits: str | None, copied: Made, tuned: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter(model, tuned.parent / "adapter")
    read: list[str | None] = []

    def prepared(run: Any) -> Any:
        data = stages.prepare(run)
        return replace(data, base=replace(data.base, facts=replace(data.base.facts, quantization="4bit")))

    def load_at(_run: Any, data: Any, *_: Any, **__: Any) -> None:
        read.append(data.base.facts.quantization)
        raise RecipeError("far enough")

    recertify = importlib.import_module("keeptune.stages.recertify")
    monkeypatch.setattr(recertify, "prepare", prepared)
    monkeypatch.setattr(recertify, "load_at", load_at)
    monkeypatch.setattr(recertify, "base_answers", lambda session: [])
    with pytest.raises(RecipeError, match="far enough"):
        certified(copied, tuned.parent / name)
    assert read == [bits]


def test_an_adapter_on_a_hub_id_that_is_not_the_run_s_is_refused(copied: Made, tmp_path: Path, model: Path) -> None:
    path = tmp_path / "adapter"
    adapter(model, path)
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    write_json(path / "adapter_config.json", {**config, "base_model_name_or_path": "owner/model"})
    with pytest.raises(RecipeError, match="found an adapter on owner/model, whose weights are not those of the run's"):
        certified(copied, path)


def test_another_tokenizer_is_refused_with_what_it_means(copied: Made, tuned: Path) -> None:
    path = tuned / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    value["normalizer"] = {"type": "Lowercase"}
    value["pre_tokenizer"] = None
    (tuned / MANIFEST).unlink()
    path.write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(RecipeError, match="found a tokenizer that gives other ids than the run's.*record by record"):
        certified(copied, tuned)


def test_a_tokenizer_saved_anew_that_reads_alike_is_accepted(copied: Made, tuned: Path) -> None:
    path = tuned / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")), indent=4), encoding="utf-8")
    (tuned / MANIFEST).unlink()
    assert certified(copied, tuned)[0]["verdict"] == "CERTIFIED"


def test_another_chat_template_is_refused_with_what_it_means(copied: Made, tuned: Path) -> None:
    (tuned / MANIFEST).unlink()
    (tuned / "chat_template.jinja").write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    with pytest.raises(RecipeError, match="found another chat template than the run's .*put other prompts before"):
        certified(copied, tuned)


def test_an_unchanged_copy_of_the_delivered_model_has_its_certificate_and_opens_nothing(
    copied: Made, tmp_path: Path
) -> None:
    copy = shutil.copytree(copied.folder / "instruct-model", tmp_path / "copy")
    value, path, lines = certified(copied, copy)
    assert path == copied.folder / "certificate.json"
    assert value["sentence"] == lines[1]
    assert f"{copy}: its files are those that {path} speaks of" in lines[2]
    assert len(ledger(copied)) == 1
    (copy / "special_tokens_map.json").write_text("{}", encoding="utf-8")
    assert certified(copied, copy)[1] != path


@pytest.mark.parametrize("begun", [False, True])
def test_a_copy_of_the_delivered_model_is_asked_anew_where_the_recipe_has_a_method_more(
    begun: bool, copied: Made, tmp_path: Path
) -> None:
    copy = shutil.copytree(copied.folder / "instruct-model", tmp_path / "copy")
    methods = {**copied.recipe.methods, "lora": MethodFields(peft_type="LORA")}
    more = Made(copied.recipe.model_copy(update={"methods": methods}), copied.folder, copied.certificate, [])
    with stages.open_run(more.recipe, context=context()):
        pass
    if begun:
        (copied.folder / "lora" / "checkpoints" / "step-1").mkdir(parents=True)
    value, path, _ = certified(more, copy)
    assert path.parent.name == "certificates" and value["verdict"] == "CERTIFIED"
    assert len(ledger(copied)) == 2
