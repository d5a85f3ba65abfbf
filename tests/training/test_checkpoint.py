from __future__ import annotations

import contextlib
import json
import math
import random
import resource
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from keeptune.errors import CheckpointError, FolderInUseError, StorageError
from keeptune.storage import write_json
from keeptune.training import checkpoint as checkpoint_module
from keeptune.training.checkpoint import (
    OPTIMIZER,
    WEIGHTS,
    TrainingState,
    load_latest,
    restore_weights,
    save_checkpoint,
)
from keeptune.training.settings import Validation
from keeptune.training.step import make_optimizer
from keeptune.training.tensors import (
    optimizer_tensors,
    restore_optimizer,
    restore_parameters,
    save_tensors,
    trained_parameters,
)

from .faults import Killed, full, killed
from .tiny import SETTINGS, make_model, weights_sha256

STATE = TrainingState(
    step=3,
    validations=(
        Validation(1, 0.1 + 0.2, math.nan, None),
        Validation(2, 2 / 3, 1 / 3, math.inf),
        Validation(3, 1.0, 1e-300, 0.1),
    ),
    train_seconds=1.7,
    num_train_tokens=100,
    num_target_tokens=50,
    peak_memory_bytes=1 << 40,
)


def save(folder: Path, step: int, *, best_step: int | None = None, run_key: str = "ours") -> None:
    value = torch.full((3, 2), float(step))
    save_checkpoint(
        folder,
        weights={"weight": value},
        optimizer={
            "exp_avg/weight": value + 1,
            "exp_avg_sq/weight": value + 2,
            "step/weight": torch.tensor(float(step)),
        },
        state=TrainingState(step=step),
        best_step=best_step,
        run_key=run_key,
    )


def loaded_step(folder: Path) -> int:
    found = load_latest(folder, run_key="ours")
    assert found is not None
    weight = torch.nn.Parameter(torch.zeros(3, 2))
    restore_parameters(found.folder / WEIGHTS, parameters={"weight": weight})
    assert weight[0, 0] == found.state.step
    return found.state.step


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_state_comes_back_exactly(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, weights={}, optimizer={}, state=STATE, best_step=None, run_key="ours")
    found = load_latest(tmp_path, run_key="ours")
    assert found is not None
    first, *others = found.state.validations
    assert math.isnan(first.loss) and first.metric is None
    assert replace(found.state, validations=tuple(others)) == replace(STATE, validations=STATE.validations[1:])


def test_weights_and_optimizer_come_back_bit_for_bit(tmp_path: Path) -> None:
    model, other = make_model(), make_model(seed=8)
    parameters, others = trained_parameters(model), trained_parameters(other)
    optimizer, other_optimizer = (
        make_optimizer(parameters, settings=SETTINGS),
        make_optimizer(others, settings=SETTINGS),
    )
    # The head gets no gradient and thus no state, as an expert that no token was sent to.
    model.norm(model.hidden(model.embedding(torch.tensor([1])))).exp().sum().backward()
    optimizer.step()
    before = optimizer_tensors(optimizer, parameters=parameters)
    assert "exp_avg/head.weight" not in before and "exp_avg/hidden.weight" in before
    save_checkpoint(tmp_path, weights=parameters, optimizer=before, state=STATE, best_step=None, run_key="ours")
    restore_parameters(tmp_path / "step-3" / WEIGHTS, parameters=others)
    restore_optimizer(tmp_path / "step-3" / OPTIMIZER, optimizer=other_optimizer, parameters=others)
    assert weights_sha256(model) == weights_sha256(other)
    after = optimizer_tensors(other_optimizer, parameters=others)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


def test_a_checkpoint_is_safetensors_and_json_with_a_manifest(tmp_path: Path) -> None:
    save(tmp_path, 1)
    assert names(tmp_path / "step-1") == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    manifest = json.loads((tmp_path / "step-1" / "manifest.json").read_text())
    assert list(manifest) == ["version", "run_key", "step", "best_step", "files", "content_sha256"]
    assert set(manifest["files"]) == {"model.safetensors", "optimizer.safetensors", "state.json"}


def test_nothing_to_load_is_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "missing", run_key="ours") is None
    assert load_latest(tmp_path, run_key="ours") is None


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    save(tmp_path, 9)
    save(tmp_path, 10)
    assert loaded_step(tmp_path) == 10


def test_rotation_keeps_the_last_two_and_the_best_that_they_need(tmp_path: Path) -> None:
    save(tmp_path, 1, best_step=1)
    save(tmp_path, 2, best_step=1)
    save(tmp_path, 3, best_step=1)
    assert names(tmp_path) == ["step-1", "step-2", "step-3"]
    save(tmp_path, 4, best_step=4)
    assert names(tmp_path) == ["step-1", "step-3", "step-4"]
    save(tmp_path, 5, best_step=4)
    assert names(tmp_path) == ["step-4", "step-5"]


def test_rotation_removes_nothing_that_is_not_of_this_run(tmp_path: Path) -> None:
    save(tmp_path, 1, run_key="theirs")
    (tmp_path / "step-2").mkdir()
    (tmp_path / "step-2" / "notes.txt").write_text("mine")
    (tmp_path / "old-step-3").mkdir()
    for step in (4, 5, 6):
        save(tmp_path, step)
    assert names(tmp_path) == ["old-step-3", "step-1", "step-2", "step-5", "step-6"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 1, best_step=1)
    assert names(tmp_path) == ["step-1"]
    assert json.loads((tmp_path / "step-1" / "state.json").read_text())["best_step"] == 1


@pytest.mark.parametrize("file", ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize(
    "damage", ["empty", "one byte", "half", "one byte less", "one byte more", "zeros", "missing", "other"]
)
def test_every_damaged_file_is_detected_and_the_checkpoint_before_taken(tmp_path: Path, file: str, damage: str) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = tmp_path / "step-2" / file
    data = path.read_bytes()
    damaged = {
        "empty": b"",
        "one byte": data[:1],
        "half": data[: len(data) // 2],
        "one byte less": data[:-2] if file == "manifest.json" else data[:-1],
        "one byte more": data + b"x",
        "zeros": bytes(len(data)),
        "missing": None,
        "other": (tmp_path / "step-1" / file).read_bytes(),
    }[damage]
    path.unlink() if damaged is None else path.write_bytes(damaged)
    found = load_latest(tmp_path, run_key="ours")
    assert found is not None and found.state.step == 1
    assert [name.rsplit("-", 1)[0] for name in found.quarantined] == ["step-2.corrupt"]
    assert names(tmp_path) == ["step-1", *found.quarantined]


def test_a_flipped_bit_anywhere_is_detected(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    generator = random.Random(0)
    for file in ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"):
        path = tmp_path / "step-2" / file
        data = path.read_bytes()
        for _ in range(60):
            flipped = bytearray(data)
            flipped[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
            path.write_bytes(flipped)
            assert checkpoint_module._facts_of_whole(tmp_path / "step-2") is None, (file, bytes(flipped))
        path.write_bytes(data)
    assert loaded_step(tmp_path) == 2


def test_a_checkpoint_under_another_steps_name_is_not_trusted(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-1", tmp_path / "step-7")
    assert loaded_step(tmp_path) == 1


def test_a_link_is_set_aside_and_what_it_points_to_left_alone(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path / "elsewhere", 2)
    (tmp_path / "step-2").symlink_to(tmp_path / "elsewhere" / "step-2")
    assert loaded_step(tmp_path) == 1
    assert names(tmp_path / "elsewhere") == ["step-2"]


def test_a_checkpoint_whose_best_step_is_damaged_is_not_gone_on_from(tmp_path: Path) -> None:
    save(tmp_path, 1, best_step=1)
    shutil.copytree(tmp_path / "step-1", tmp_path / "copy")
    save(tmp_path, 2, best_step=2)
    save(tmp_path, 3, best_step=2)
    (tmp_path / "step-2" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="found 2 checkpoints"):
        load_latest(tmp_path, run_key="ours")
    (tmp_path / "copy").rename(tmp_path / "step-1")
    assert loaded_step(tmp_path) == 1
    assert [name.split(".")[0] for name in names(tmp_path)] == ["step-1", "step-2", "step-3"]


def test_all_checkpoints_bad_is_an_error_every_time_and_nothing_is_removed(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
        (tmp_path / f"step-{step}" / "state.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"found 2 checkpoints \(step-1.corrupt-.*none of them whole together.*Put back"
        ):
            load_latest(tmp_path, run_key="ours")
    assert [name.split("-")[1] for name in names(tmp_path)] == ["1.corrupt", "2.corrupt"]
    assert all(len(names(tmp_path / name)) == 4 for name in names(tmp_path))


def test_checkpoints_of_another_run_are_refused_and_left_alone(tmp_path: Path) -> None:
    save(tmp_path, 1, run_key="0123456789abcdef")
    with pytest.raises(
        FolderInUseError, match=r"another run \(0123456789ab\); expected one of this run \(ours\).*Choose"
    ):
        load_latest(tmp_path, run_key="ours")
    assert names(tmp_path) == ["step-1"]


def test_a_checkpoint_of_another_version_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint_module, "_VERSION", 2)
    with pytest.raises(CheckpointError, match=r"found version 1 of the checkpoint; expected 2. Go on with the version"):
        load_latest(tmp_path, run_key="ours")
    assert names(tmp_path) == ["step-1"]


def test_best_weights_that_are_gone_are_an_error(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-1" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="step-1: found no whole checkpoint; expected the one with the best"):
        restore_weights(tmp_path, step=1, parameters={})


def test_tensors_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, tensors={"a": torch.zeros(2), "b": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"found other tensors than this model trains \(1 differ, first 'b'\)"):
        restore_parameters(path, parameters={"a": torch.nn.Parameter(torch.zeros(2))})
    parameters = {"a": torch.nn.Parameter(torch.zeros(2)), "b": torch.nn.Parameter(torch.zeros(3))}
    with pytest.raises(CheckpointError, match=r"found 'b' of shape \[2\]; expected \[3\]"):
        restore_parameters(path, parameters=parameters)
    optimizer = make_optimizer(parameters, settings=SETTINGS)
    with pytest.raises(CheckpointError, match=r"found other tensors"):
        restore_optimizer(path, optimizer=optimizer, parameters=parameters)
    save_tensors(path, tensors={f"{kind}/b": torch.zeros(2) for kind in ("exp_avg", "exp_avg_sq", "step")})
    with pytest.raises(CheckpointError, match=r"found 'b' of shape \[2\]; expected \[3\]"):
        restore_optimizer(path, optimizer=optimizer, parameters=parameters)


def test_a_disk_that_fails_at_any_operation_leaves_the_older_checkpoints_whole(tmp_path: Path) -> None:
    save(tmp_path / "start", 1, best_step=1)
    save(tmp_path / "start", 2, best_step=1)
    fail_at, finished = 0, False
    while not finished:
        fail_at += 1
        folder = tmp_path / str(fail_at)
        shutil.copytree(tmp_path / "start", folder)
        with full(fail_at) as failing:
            try:
                save(folder, 3, best_step=3)
            except StorageError as error:
                assert "no space left" in str(error) and "free space" in str(error)
            finished = not failing.failed
        assert loaded_step(folder) in ({3} if finished else {2, 3})
        assert {"step-1", "step-2"} <= set(names(folder)) or loaded_step(folder) == 3
        save(folder, 3, best_step=3)
        assert loaded_step(folder) == 3
        assert names(folder) == ["step-1", "step-2", "step-3"]
    assert fail_at > 10


def test_a_process_killed_at_any_operation_of_a_save_loses_nothing_older(tmp_path: Path) -> None:
    save(tmp_path / "start", 1)
    save(tmp_path / "start", 2)
    fail_at, finished = 0, False
    while not finished:
        fail_at += 1
        folder = tmp_path / str(fail_at)
        shutil.copytree(tmp_path / "start", folder)
        with killed(fail_at) as failing:
            with contextlib.suppress(Killed):
                save(folder, 3)
            finished = not failing.failed
        assert loaded_step(folder) in ({3} if finished else {2, 3})
        assert all("." not in name for name in names(folder)), "half-written folders are cleared away"
        save(folder, 3)
        assert names(folder) == ["step-2", "step-3"]
    assert fail_at > 15


@pytest.fixture
def small_files() -> Iterator[None]:
    """Let the system refuse files above 4 KiB, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_files")
def test_the_systems_own_refusal_of_a_tensor_file_is_a_storage_error(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(StorageError, match=r"model.safetensors: the file is larger than the limit"):
        save_checkpoint(
            tmp_path,
            weights={"a": torch.zeros(4000)},
            optimizer={},
            state=TrainingState(step=2),
            best_step=None,
            run_key="ours",
        )
    assert names(tmp_path) == ["step-1"]


def test_bytes_that_change_on_the_way_to_the_disk_are_noticed_before_rotation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)

    def write_other(path: Path, value: object) -> None:
        write_json(path, {**value, "step": 99} if isinstance(value, dict) else value)

    monkeypatch.setattr(checkpoint_module, "write_json", write_other)
    with pytest.raises(StorageError, match=r"step-3: found other bytes than were written; expected the same. Check"):
        save(tmp_path, 3)
    assert names(tmp_path) == ["step-1", "step-2", "step-3"]
