"""A file of a run folder that changed is written again or named; it is never used in silence, and never a traceback."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keeptune.config import load_recipe
from keeptune.storage import is_sealed_text, read_record
from tests.stages.test_retention import finished
from tests.stages.world import Keeptune, llama, recipe_file, records

Give = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the recipe beside a finished run: one adapter, certified, with every kind of file in its folder."""
    folder = tmp_path_factory.mktemp("made")
    path = recipe_file(
        folder,
        model=llama(tmp_path_factory.mktemp("base")),
        data=records(folder / "a.jsonl", number=60),
        methods={"lora": {"peft_type": "LORA", "r": 4, "learning_rate": 1e-2}},
        retention={"self_texts": 60, "text_tokens": 16, "alphas": [0.5, 1.0], "budget": {"self": "0.9 nats"}},
        evaluation={"metrics": ["exact_match"], "max_new_tokens": 4, "baselines": ["zero-shot"]},
    )
    finished(load_recipe(path))
    return path


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made.with_name("run"), tmp_path / "run")


@pytest.fixture
def give(made: Path, run: Path, keeptune: Keeptune) -> Give:
    """Return what gives a command for the copied run, and returns its exit code and what it said of faults."""

    def command(verb: str, *options: str | Path) -> tuple[int, str]:
        done = keeptune(verb, made, "--set", f"output_dir={run}", *options)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr

    return command


def with_a_digit_changed(content: bytes, seed: int = 0) -> bytes:
    places = [i for i, byte in enumerate(content) if chr(byte).isdigit()] or [0]
    place = random.Random(seed).choice(places)
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def with_a_bit_flipped(content: bytes, seed: int = 0) -> bytes:
    generator = random.Random(seed)
    place = generator.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << generator.randrange(8))]) + content[place + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "digit": with_a_digit_changed,
    "high bit": lambda content: content[:9] + bytes([content[9] | 128]) + content[10:],
    "list": lambda _content: b"[]\n",
    "empty": lambda _content: b"",
    "half": lambda content: content[: len(content) // 2],
    **{f"bit {seed}": lambda content, seed=seed: with_a_bit_flipped(content, seed) for seed in range(4)},
}
SHOWN = ["manifest.json", "selection.json", "forgetting.json", "certificate.json", "lora/training.json"]
SHOWN += ["lora/events.jsonl", "base/zero-shot/samples.jsonl", "test_openings.jsonl", "instruct-model/README.md"]
DERIVED = ["certificate.json", "selection.json", "lora/card.json", "instruct-model/README.md"]
# What a training that is taken up again measures anew.
MEASURED = {"events_sha256", "train_seconds", "peak_memory_bytes", "tokens_per_second", "estimated_memory_bytes"}


@pytest.mark.parametrize("name", SHOWN)
def test_no_page_is_made_of_a_file_that_changed(name: str, run: Path, give: Give) -> None:
    page = (run / "report.html").read_bytes()
    path = run / name
    path.write_bytes(with_a_digit_changed(path.read_bytes()))
    code, said = give("report")
    assert code == 4 and f"{path}" in said
    assert (run / "report.html").read_bytes() == page


def test_every_file_that_changed_is_named_at_once(run: Path, give: Give) -> None:
    names = ("selection.json", "lora/training.json", "lora/test/scores.json")
    for name in names:
        (run / name).write_bytes(b"[1, 2]")
    code, said = give("report")
    assert code == 4 and all(str(run / name) in said for name in names)


@pytest.mark.parametrize("name", DERIVED)
def test_what_can_be_derived_again_is_and_no_opening_is_spent(name: str, run: Path, give: Give) -> None:
    path = run / name
    verdict, ledger = read_record(run / "certificate.json"), (run / "certify_openings.jsonl").read_bytes()
    path.write_bytes(with_a_digit_changed(path.read_bytes()))
    assert give("run")[0] == 0
    assert give("report")[0] == 0
    # The run that was copied had no ledger beside its own.
    passing = {"created", "ledger", "ledgers", "limits", "content_sha256"}
    found = read_record(run / "certificate.json")
    assert {k: v for k, v in found.items() if k not in passing} == {
        k: v for k, v in verdict.items() if k not in passing
    }
    assert (run / "certify_openings.jsonl").read_bytes() == ledger


def test_what_a_method_cost_is_derived_again_from_its_last_checkpoint(run: Path, give: Give) -> None:
    path = run / "lora" / "training.json"
    before = read_record(path)
    weights = (run / "lora" / "adapter" / "adapter_model.safetensors").read_bytes()
    path.write_bytes(with_a_digit_changed(path.read_bytes()))
    code, said = give("evaluate")
    assert code == 4 and f"{path}: found content that differs from its hash" in said
    assert give("run")[0] == 0
    after = read_record(path)
    assert {name for name in before if before[name] != after[name]} <= MEASURED
    assert (run / "lora" / "adapter" / "adapter_model.safetensors").read_bytes() == weights


def test_damaged_data_are_named_and_prepared_again(run: Path, give: Give) -> None:
    path = run / "data" / "test.jsonl"
    before = path.read_bytes()
    path.write_bytes(with_a_bit_flipped(before))
    code, said = give("run")
    assert code == 0 and f"{path}: found content that differs from its hash; data are prepared again" in said
    assert path.read_bytes() == before


def test_a_recipe_in_a_run_folder_that_changed_is_said_and_written_again(run: Path, give: Give) -> None:
    path = run / "recipe.yaml"
    path.write_bytes(b"\xff" + path.read_bytes())
    code, said = give("report")
    assert code == 0
    assert f"{path}: found content that differs from its hash; it is written again from the recipe" in said
    assert is_sealed_text(path)


def test_a_run_whose_manifest_was_removed_gets_another(run: Path, give: Give) -> None:
    (run / "manifest.json").write_bytes(b"\x80{}")
    code, said = give("run")
    assert code == 4 and "remove it and give `" in said
    (run / "manifest.json").unlink()
    assert give("run")[0] == 0
    assert set(read_record(run / "manifest.json")) >= {"created", "commands", "versions", "base"}


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "tokenizer.json", "manifest.json"])
def test_no_artifact_is_used_that_changed(name: str, run: Path, give: Give, keeptune: Keeptune, tmp_path: Path) -> None:
    path = run / "lora" / "adapter" / name
    path.write_bytes(with_a_bit_flipped(path.read_bytes()))
    for verb, *options in (["evaluate"], ["certify", "--artifact", path.parent]):
        code, said = give(verb, *options)
        assert code == 4 and f"{path}: found" in said
    foreign = shutil.copytree(path.parent, tmp_path / "foreign")
    for command, where in (
        (["export", run / "lora", "--merged", tmp_path / "out"], path),
        (["compare", run / "lora", foreign], foreign / name),
    ):
        done = keeptune(*command)
        assert done.returncode == 4 and f"{where}: found" in done.stderr
    assert not (tmp_path / "out").exists()


LEDGER_DAMAGES: dict[str, Callable[[Path], object]] = {
    "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
    "changed": lambda path: path.write_bytes(path.read_bytes().replace(b'"opening": 1', b'"opening": 0')),
    "torn": lambda path: path.write_bytes(path.read_bytes()[:-9]),
}


@pytest.mark.parametrize(
    ("damage", "forgotten"), [*((damage, None) for damage in LEDGER_DAMAGES), ("removed", "certificate.json")]
)
def test_openings_cannot_be_taken_back(damage: str, forgotten: str | None, run: Path, give: Give) -> None:
    LEDGER_DAMAGES[damage](run / "certify_openings.jsonl")
    if forgotten is not None:
        (run / forgotten).unlink()
    code, said = give("certify", "--set", "retention.budget.self=0.7 nats")
    assert code == 4
    assert "certify_openings.jsonl" in said and "what was opened before cannot be counted any more" in said


def test_a_certificate_knows_the_openings_where_the_manifest_is_gone(run: Path, give: Give) -> None:
    (run / "manifest.json").unlink()
    (run / "certify_openings.jsonl").unlink()
    code, said = give("run", "--set", "retention.budget.self=0.7 nats")
    assert code == 4
    assert f"certify_openings.jsonl: found 0 of the 1 lines that {run / 'certificate.json'} knows of" in said


def test_a_line_that_a_crash_tore_is_removed_and_the_openings_count_on(run: Path, give: Give) -> None:
    for name in ("certify_openings.jsonl", "test_openings.jsonl"):
        with (run / name).open("ab") as file:
            file.write(b'{"opening": 2, "ope')
    shutil.rmtree(run / "lora" / "test")
    code, said = give("run", "--set", "retention.budget.self=0.8 nats")
    assert code == 0 and said.count("the last line was cut off while it was written; it is removed") == 2
    assert read_record(run / "certificate.json")["opening"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_mended_or_named(damage: str, made: Path, tmp_path: Path, keeptune: Keeptune) -> None:
    reference, run = made.with_name("run"), tmp_path / "run"
    report = shown(reference)
    for path in sorted(reference.rglob("*")):
        name = path.relative_to(reference)
        if not path.is_file() or path.name in (".lock", "report.html", "report.json"):
            continue
        shutil.copytree(reference, run)
        (run / name).write_bytes(DAMAGES[damage](path.read_bytes()))
        for verb in ("report", "run"):
            done = keeptune(verb, made, "--set", f"output_dir={run}")
            assert "Traceback" not in done.stderr, (name, verb, done.stderr)
            # 3: a delivered model is no longer what its certificate speaks of.
            assert done.returncode in (0, 3, 4, 8), (name, verb, done.stderr)
            assert done.returncode == 0 or str(name.parent) in done.stderr, (name, verb, done.stderr)
            if done.returncode == 0:
                found = shown(run)
                assert all(line.startswith(f"{name}: ") for line in found["missing"]), (name, verb, found["missing"])
                assert found | {"missing": []} == report, (name, verb)
        shutil.rmtree(run)


def shown(run: Path) -> Any:
    """Return what the report says, but for times, commands and what a training anew measures."""
    return _lasting(json.loads((run / "report.json").read_text(encoding="utf-8")))


def _lasting(value: Any) -> Any:
    passing = {*MEASURED, "command", "commands", "created", "test_openings", "run", "resumed"}
    if isinstance(value, dict):
        return {k: _lasting(v) for k, v in value.items() if k not in passing and "seconds" not in k}
    return [_lasting(part) for part in value] if isinstance(value, list) else value
