"""A certified folder whose files are others now is not taken for the certified one, wherever it is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from keeptune import stages
from keeptune.errors import DataError
from keeptune.stages.certified import certificates_of, changed_file, refuse_changed
from keeptune.storage import file_sha256, write_record
from tests.stages.test_retention import Made, finished, written_recipe
from tests.stages.world import context, llama


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("certified")
    model = llama(tmp_path_factory.mktemp("base"))
    return finished(written_recipe(folder, model=model, budget={"self": "0.9 nats"}))


@pytest.fixture
def changed(made: Made, tmp_path: Path) -> Iterator[Made]:
    """Copy the run and change the last byte of its instruct model."""
    folder = tmp_path / "run"
    shutil.copytree(made.folder, folder)
    weights = folder / "instruct-model" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    yield Made(made.recipe.model_copy(update={"output_dir": str(folder)}), folder, made.certificate, made.notes)


def named(made: Made) -> str:
    """Return what the error says: file, found hash, expected hash, remedy."""
    file = made.folder / "instruct-model" / "model.safetensors"
    expected = made.certificate["artifact"]["sha256"]["model.safetensors"]
    return (
        f"{file}: found the hash {file_sha256(file)[:16]}; expected {expected[:16]}, which "
        f"{made.folder / 'certificate.json'} speaks of. `keeptune certify RECIPE` puts the certified model back"
    )


def test_a_report_refuses_a_delivered_model_that_changed(changed: Made) -> None:
    with stages.open_run(changed.recipe, context=context()) as run, pytest.raises(DataError) as error:
        stages.report(run)
    assert str(error.value).startswith(named(changed))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_every_file_that_decides_answers_is_certified_and_put_back(made: Made, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(made.folder, folder)
    file = folder / "instruct-model" / name
    before = file.read_bytes()
    file.write_bytes(before + b" ")
    with stages.open_run(made.recipe.model_copy(update={"output_dir": str(folder)}), context=context()) as run:
        with pytest.raises(DataError, match=rf"{name}: found the hash \w+; expected \w+, which"):
            stages.report(run)
        stages.certify(run)
        assert file.read_bytes() == before
        stages.report(run)


def test_a_file_added_to_a_certified_folder_that_decides_answers_is_noticed(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(made.folder, folder)
    added = folder / "instruct-model" / "special_tokens_map.json"
    assert not added.exists()
    added.write_text("{}", encoding="utf-8")
    with pytest.raises(DataError) as error:
        refuse_changed(folder / "instruct-model", runs=[folder])
    assert str(error.value).startswith(
        f"{added}: found the hash {file_sha256(added)[:16]}; expected no such file, as {folder / 'certificate.json'} "
        "names none"
    )


def test_a_comparison_refuses_a_delivered_model_that_changed(changed: Made) -> None:
    models = [str(changed.folder), str(changed.folder / "instruct-model")]
    with pytest.raises(DataError) as error:
        stages.compare(models, out=None, context=context())
    assert str(error.value).startswith(named(changed))


def test_certify_puts_the_certified_model_back_without_another_opening(changed: Made) -> None:
    with stages.open_run(changed.recipe, context=context()) as run:
        stages.certify(run)
        stages.report(run)
    assert changed_file(changed.folder / "certificate.json") is None
    assert len((changed.folder / "certify_openings.jsonl").read_text(encoding="utf-8").splitlines()) == 1


def test_without_a_budget_validation_chooses_again_and_no_certificate_stays(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(made.folder, folder)
    certificate = made.certificate | {"artifact": {"folder": "instruct-model", "sha256": {"model.safetensors": "0"}}}
    write_record(folder / "certificate.json", certificate)
    retention = made.recipe.retention.model_copy(update={"budget": {}, "self_texts": 0})
    recipe = made.recipe.model_copy(update={"output_dir": str(folder), "retention": retention})
    with stages.open_run(recipe, context=context()) as run:
        assert stages.evaluate(run) == folder / "instruct-model"
        assert not (folder / "certificate.json").exists()
        stages.report(run)


@pytest.mark.parametrize("name", ["instruct-model", "lora/adapter"])
def test_an_export_refuses_an_adapter_that_changed(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir(parents=True)
    write_record(tmp_path / "manifest.json", {"commands": [], "versions": {}})
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    artifact = {"folder": name, "sha256": {"adapter_config.json": "0" * 64}}
    write_record(tmp_path / "certificate.json", {"verdict": "CERTIFIED", "artifact": artifact})
    with pytest.raises(DataError, match="found the hash 44136fa355b3678a; expected 0000000000000000"):
        stages.export(folder, merged=tmp_path / "out", base=None)


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    certificate = tmp_path / "certificate.json"
    write_record(
        certificate,
        {"verdict": "CERTIFIED", "artifact": {"folder": "model", "sha256": {"model.safetensors": "1" * 64}}},
    )
    with pytest.raises(DataError, match=r"model\.safetensors: found no such file; expected 1111111111111111"):
        refuse_changed(tmp_path / "model", runs=[tmp_path])


def test_a_folder_that_is_gone_and_one_without_a_certificate_are_no_fault(tmp_path: Path) -> None:
    gone = {"folder": "gone", "sha256": {"x": "1" * 64}}
    write_record(tmp_path / "certificate.json", {"verdict": "CERTIFIED", "artifact": gone})
    refuse_changed(tmp_path / "gone", runs=[tmp_path])
    refuse_changed(tmp_path, runs=[tmp_path])
    write_record(tmp_path / "certificate.json", {"verdict": "INFEASIBLE", "artifact": None})
    assert list(certificates_of(tmp_path / "gone", runs=[tmp_path])) == []


def test_a_folder_that_was_tested_and_not_certified_may_change(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    artifact = {"folder": "model", "sha256": {"config.json": "1" * 64}}
    write_record(tmp_path / "certificate.json", {"verdict": "NOT CERTIFIED", "artifact": artifact})
    refuse_changed(tmp_path / "model", runs=[tmp_path])


def test_a_folder_that_was_certified_again_as_it_is_now_passes(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "certificates").mkdir()
    for name, sha256 in (("a", "0" * 64), ("b", file_sha256(folder / "config.json"))):
        artifact = {"folder": str(folder), "sha256": {"config.json": sha256}}
        write_record(tmp_path / "certificates" / f"{name}.json", {"verdict": "CERTIFIED", "artifact": artifact})
    refuse_changed(folder, runs=[tmp_path])
    (folder / "config.json").write_text(json.dumps({"a": 1}), encoding="utf-8")
    with pytest.raises(DataError, match=r"b\.json speaks of\. Put the file back; `keeptune certify RECIPE --artifact"):
        refuse_changed(folder, runs=[tmp_path])
