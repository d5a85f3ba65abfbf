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
from keeptune.storage import read_record
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
    places = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
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
SHOWN = ["manifest.json", "selection.json", "paired.json", "forgetting.json", "certificate.json", "lora/training.json"]
SHOWN += ["lora/card.json", "lora/events.jsonl", "data/audit.json", "base/zero-shot/samples.jsonl"]
SHOWN += ["lora/test/scores.json", "test_openings.jsonl", "certify_openings.jsonl", "instruct-model/README.md"]


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


def content(path: Path) -> Any:
    """Return what a file says but for when it was written."""
    if path.suffix != ".json":
        return path.read_bytes()
    return {
        key: value for key, value in read_record(path).items() if key not in ("created", "commands", "content_sha256")
    }


@pytest.mark.parametrize(
    "name",
    [
        "certificate.json",
        "selection.json",
        "paired.json",
        "lora/card.json",
        "data/train.jsonl",
        "instruct-model/README.md",
    ],
)
def test_what_can_be_derived_again_is_and_no_opening_is_spent(name: str, run: Path, give: Give) -> None:
    path = run / name
    before, ledger = content(path), (run / "certify_openings.jsonl").read_bytes()
    path.write_bytes(with_a_digit_changed(path.read_bytes()))
    assert give("run")[0] == 0
    assert content(path) == before
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
    assert {name for name in before if before[name] != after[name]} <= {
        "events_sha256",
        "train_seconds",
        "peak_memory_bytes",
        "tokens_per_second",
    }
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
    before = path.read_bytes()
    path.write_bytes(b"\xff" + before)
    code, said = give("report")
    assert (
        code == 0 and f"{path}: found content that differs from its hash; it is written again from the recipe" in said
    )
    assert path.read_bytes() == before


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
    for command in (["export", run / "lora", "--merged", tmp_path / "out"], ["compare", run, path.parent]):
        done = keeptune(*command)
        assert done.returncode in (2, 4) and f"{path}: found" in done.stderr
    assert not (tmp_path / "out").exists()


LEDGER_DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1])),
    "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
    "changed": lambda path: path.write_bytes(path.read_bytes().replace(b'"opening": 2', b'"opening": 1')),
    "torn": lambda path: path.write_bytes(path.read_bytes()[:-9]),
}


@pytest.mark.parametrize("damage", LEDGER_DAMAGES)
@pytest.mark.parametrize("known", ["manifest and certificate", "manifest", "certificate"])
def test_openings_cannot_be_taken_back(damage: str, known: str, run: Path, give: Give) -> None:
    assert give("certify", "--set", "retention.budget.self=0.8 nats")[0] == 0
    assert read_record(run / "certificate.json")["opening"] == 2
    LEDGER_DAMAGES[damage](run / "certify_openings.jsonl")
    if known == "manifest":
        (run / "certificate.json").unlink()
    elif known == "certificate":
        (run / "manifest.json").unlink()
        shutil.copyfile(run / "data" / "manifest.json", run / "manifest.json")
        (run / "manifest.json").unlink()
        give("prepare")
    code, said = give("certify", "--set", "retention.budget.self=0.7 nats")
    assert code == 4
    assert "certify_openings.jsonl" in said and "what was opened before cannot be counted any more" in said


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
            assert done.returncode in (0, 4, 8), (name, verb, done.stderr)
            assert done.returncode == 0 or str(name.parent) in done.stderr, (name, verb, done.stderr)
            assert done.returncode or shown(run) == report, (name, verb)
        shutil.rmtree(run)


def shown(run: Path) -> Any:
    """Return what the report says, but for times, commands and what a training anew measures."""
    return _lasting(json.loads((run / "report.json").read_text(encoding="utf-8")))


def _lasting(value: Any) -> Any:
    passing = {
        "command",
        "commands",
        "created",
        "test_openings",
        "run",
        "peak_memory_bytes",
        "tokens_per_second",
        "resumed",
    }
    if isinstance(value, dict):
        return {k: _lasting(v) for k, v in value.items() if k not in passing and "seconds" not in k}
    return [_lasting(part) for part in value] if isinstance(value, list) else value
