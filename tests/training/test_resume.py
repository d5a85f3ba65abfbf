"""The law "Resume": wherever a run stops, the same call again ends with the same bits."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from keeptune.errors import CheckpointError, FolderInUseError, Interrupted, StorageError
from keeptune.model.modes import evaluating
from keeptune.text.mixture import Mixture, Share

from .faults import Killed, full, killed
from .tiny import (
    SETTINGS,
    TRAIN,
    StopAt,
    TinyModel,
    digest_run,
    log_without_measures,
    make_model,
    read_events,
    run,
    weights_sha256,
)

ONE_EPOCH = replace(SETTINGS, num_train_epochs=1, evals_per_epoch=1)


def metric(model: torch.nn.Module) -> float:
    """Return something that depends on the weights, draws random numbers and is not monotonous."""
    assert isinstance(model, TinyModel) and not model.training
    return float(model(torch.tensor([1, 2])).sum() + torch.rand(1) * 1e-9)


def settings_of(kind: str) -> dict[str, Any]:
    return {
        "full": {},
        "frozen": {"save_steps": 1, "evals_per_epoch": 1},
        "metric": {"select_by": "f1", "validate": metric, "higher_is_better": True, "patience": 2},
        "ties": {"select_by": "f1", "validate": lambda _: 0.0, "higher_is_better": True, "patience": 1},
    }[kind]


def start(kind: str, folder: Path, *, stop_at: int | None = None, seed: int = 3) -> tuple[dict[str, Any], int]:
    """Run to the end, or to the poll at which a stop is asked for; return the digest and the number of polls."""
    stop = StopAt(stop_at)
    model = make_model(frozen=kind == "frozen", seed=seed)
    run(model, folder, stop_requested=stop, **settings_of(kind))
    return digest_run(model, folder), stop.num_polls


@pytest.mark.parametrize("kind", ["full", "frozen", "metric", "ties"])
def test_a_stop_at_any_micro_batch_changes_no_bit(tmp_path: Path, kind: str) -> None:
    expected, num_polls = start(kind, tmp_path / "reference")
    assert num_polls > 20
    # The metric's stops differ from the others only at the end of an epoch.
    for position in range(0, num_polls, 4 if kind == "metric" else 1):
        folder = tmp_path / str(position)
        with pytest.raises(Interrupted, match=r"stopped on request at step .* Give the same command again to go on"):
            start(kind, folder, stop_at=position)
        digest, polls_after = start(kind, folder)
        assert digest["log"] == expected["log"], position
        assert (digest["model"], digest["weights"], digest["optimizer"]) == (
            expected["model"],
            expected["weights"],
            expected["optimizer"],
        ), position
        assert polls_after <= num_polls


@pytest.mark.parametrize("kind", ["full", "frozen", "metric"])
def test_a_chain_of_stops_changes_no_bit(tmp_path: Path, kind: str) -> None:
    expected, _ = start(kind, tmp_path / "reference")
    for length in (9, 10, 13):
        # Long enough for the validation that a stop put off and one whole step.
        num_starts, digest = 0, None
        while digest is None:
            num_starts += 1
            assert num_starts < 30, "each start gets on"
            with contextlib.suppress(Interrupted):
                digest, _ = start(kind, tmp_path / f"every-{length}", stop_at=length)
        assert num_starts >= 3
        assert {**digest, "checkpoints": None} == {**expected, "checkpoints": None}


def test_the_weights_come_from_the_checkpoint_and_not_from_the_model(tmp_path: Path) -> None:
    expected, _ = start("full", tmp_path / "reference")
    with pytest.raises(Interrupted):
        start("full", tmp_path / "run", stop_at=20)
    digest, _ = start("full", tmp_path / "run", seed=99)
    assert digest["model"] == expected["model"]


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    model = make_model()
    first = run(model, tmp_path)
    before = digest_run(model, tmp_path)
    again, stop = make_model(seed=5), StopAt()
    second = run(again, tmp_path, stop_requested=stop)
    assert stop.num_polls == 0
    assert digest_run(again, tmp_path) == before
    assert replace(second, peak_memory_bytes=0) == replace(first, peak_memory_bytes=0)
    assert [event["event"] for event in read_events(tmp_path)].count("finished") == 1


def test_how_often_one_validates_and_saves_changes_no_weight(tmp_path: Path) -> None:
    digests = set()
    for i, changed in enumerate(
        [
            {"evals_per_epoch": 1},
            {"evals_per_epoch": 3},
            {"eval_steps": 1, "save_steps": 1},
            {"eval_steps": 7, "save_steps": 7},
            {"eval_steps": 1, "select_by": "f1", "validate": metric, "higher_is_better": True},
        ]
    ):
        folder = tmp_path / str(i)
        digest = digest_run(run_model(folder, **changed), folder)
        steps = [tuple(event.items()) for event in digest["log"] if event["event"] == "step"]
        digests.add((digest["weights"], digest["optimizer"], tuple(steps)))
    assert len(digests) == 1


def run_model(folder: Path, **changed: Any) -> torch.nn.Module:
    model = make_model()
    run(model, folder, **changed)
    return model


def test_a_stop_inside_the_metric_takes_it_again(tmp_path: Path) -> None:
    expected, _ = start("metric", tmp_path / "reference")
    calls: list[int] = []

    def interrupted_metric(model: torch.nn.Module) -> float:
        calls.append(1)
        if len(calls) == 1:
            raise Interrupted("while answering")
        return metric(model)

    changed = {**settings_of("metric"), "validate": interrupted_metric}
    with pytest.raises(Interrupted, match="stopped on request at step 3 of 6"):
        run(make_model(), tmp_path / "run", **changed)
    model = make_model()
    run(model, tmp_path / "run", **changed)
    assert digest_run(model, tmp_path / "run") == expected
    assert len(calls) == 3


def test_a_stop_before_the_first_step_leaves_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="stopped on request at step 0 of 6"):
        start("full", tmp_path / "run", stop_at=0)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert start("full", tmp_path / "run") == start("full", tmp_path / "reference")


def test_a_step_that_a_stop_cut_leaves_no_gradient(tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(Interrupted):
        run(model, tmp_path, stop_requested=StopAt(2))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="only Linux tells the name of an open file")
def test_the_log_is_on_the_disk_before_each_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}").rsplit("/", 1)[-1]))
    run(make_model(), tmp_path, save_steps=1)
    relevant = [name for name in synced if name in ("events.jsonl", "model.safetensors")]
    assert relevant == ["events.jsonl", "model.safetensors"] * 6


@pytest.mark.parametrize("frozen", [False, True])
def test_a_kill_at_any_operation_on_the_disk_changes_no_bit(tmp_path: Path, frozen: bool) -> None:
    reference = make_model(frozen=frozen)
    run(reference, tmp_path / "reference", settings=ONE_EPOCH, save_steps=1)
    expected = digest_run(reference, tmp_path / "reference")
    fail_at, finished = 2 if frozen else 0, False
    while not finished:
        # Every fifth: a single save is killed at each of its operations in test_checkpoint.
        fail_at += 5
        folder = tmp_path / str(fail_at)
        folder.mkdir()
        with killed(fail_at) as failing:
            with contextlib.suppress(Killed):
                run(make_model(frozen=frozen), folder, settings=ONE_EPOCH, save_steps=1)
            finished = not failing.failed
        model = make_model(frozen=frozen)
        run(model, folder, settings=ONE_EPOCH, save_steps=1)
        assert digest_run(model, folder) == expected, fail_at
    assert fail_at > 40


def test_a_full_disk_stops_the_run_and_it_goes_on_when_there_is_space(tmp_path: Path) -> None:
    reference = make_model()
    run(reference, tmp_path / "reference", settings=ONE_EPOCH, save_steps=1)
    expected = digest_run(reference, tmp_path / "reference")
    num_refused, finished, fail_at = 0, False, 0
    while not finished:
        fail_at += 7
        folder = tmp_path / str(fail_at)
        folder.mkdir()
        with full(fail_at) as failing:
            try:
                run(make_model(), folder, settings=ONE_EPOCH, save_steps=1)
            except StorageError as error:
                num_refused += 1
                assert "no space left" in str(error)
            finished = not failing.failed
        model = make_model()
        run(model, folder, settings=ONE_EPOCH, save_steps=1)
        assert digest_run(model, folder) == expected, fail_at
    assert num_refused >= 6


def test_a_disk_that_is_too_small_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 100})()
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    stop = StopAt()
    with pytest.raises(StorageError, match=r"0.00 GB free; expected at least"):
        run(make_model(), tmp_path, stop_requested=stop)
    assert stop.num_polls == 0


@pytest.mark.parametrize("file", ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_set_aside_and_its_steps_done_again(tmp_path: Path, file: str) -> None:
    expected, _ = start("frozen", tmp_path / "reference")
    with pytest.raises(Interrupted):
        start("frozen", tmp_path / "run", stop_at=20)
    steps = sorted(int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").iterdir())
    path = tmp_path / "run" / "checkpoints" / f"step-{steps[-1]}" / file
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    said: list[str] = []
    model = make_model(frozen=True)
    run(model, tmp_path / "run", progress=Listener(said), **settings_of("frozen"))
    digest = digest_run(model, tmp_path / "run")
    assert {**digest, "checkpoints": None} == {**expected, "checkpoints": None}
    assert any(f"step-{steps[-1]}.corrupt-" in text and "set aside" in text for text in said)
    assert any(text.startswith(f"Going on after step {steps[-2]} of") for text in said)
    resumed = [event for event in read_events(tmp_path / "run") if event["event"] == "resumed"]
    assert [(event["step"], len(event["quarantined"])) for event in resumed] == [(steps[-2], 1)]


class Listener:
    """A progress that keeps what is said."""

    def __init__(self, said: list[str]) -> None:
        self.said = said

    def start(self, title: str, *, total: int, unit: str) -> None: ...

    def advance(self, count: int = 1, *, note: str = "") -> None: ...

    def finish(self) -> None: ...

    def say(self, text: str) -> None:
        self.said.append(text)


def test_no_whole_checkpoint_stops_the_run_and_never_starts_over(tmp_path: Path) -> None:
    start("full", tmp_path)
    for path in (tmp_path / "checkpoints").glob("*/state.json"):
        path.write_bytes(b"")
    log = (tmp_path / "events.jsonl").read_bytes()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="none of them whole"):
            start("full", tmp_path)
    assert (tmp_path / "events.jsonl").read_bytes() == log


def test_another_run_in_the_folder_is_refused_and_left_untouched(tmp_path: Path) -> None:
    model = make_model()
    run(model, tmp_path)
    before = digest_run(model, tmp_path)
    with pytest.raises(FolderInUseError, match="a checkpoint of another run"):
        run(make_model(), tmp_path, run_key="another")
    assert digest_run(model, tmp_path) == before


def test_the_best_weights_are_in_the_model_at_the_end(tmp_path: Path) -> None:
    model = make_model()
    seen: dict[float, str] = {}

    def remember(current: torch.nn.Module) -> float:
        with evaluating(current):
            value = metric(current)
        seen[value] = weights_sha256(current)
        return value

    result = run(model, tmp_path, num_train_epochs=6, select_by="f1", validate=remember, learning_rate=0.5)
    assert result.best_value == min(seen) and result.best_step < result.num_steps
    assert weights_sha256(model) == seen[min(seen)]
    assert (tmp_path / "checkpoints" / f"step-{result.best_step}").is_dir()
    assert log_without_measures(tmp_path)[-1]["best_step"] == result.best_step


def test_a_mixture_that_stops_anywhere_shows_what_it_would_have_shown(tmp_path: Path) -> None:
    shares = [Share("many", 9, 4), Share("few", 3, 7)]

    def mixed(folder: Path, *, stop_at: int | None) -> tuple[dict[str, Any], int]:
        table = Mixture(TRAIN, tasks=np.repeat([0, 1], [9, 3]), shares=shares, seed=SETTINGS.seed)
        stop, model = StopAt(stop_at), make_model()
        run(model, folder, train_table=table, stop_requested=stop, num_train_epochs=4)
        return digest_run(model, folder), stop.num_polls

    expected, num_polls = mixed(tmp_path / "reference", stop_at=None)
    hashes = [event["record_ids_sha256"] for event in expected["log"] if event["event"] == "step"]
    assert len(set(hashes)) == len(hashes) > 8
    for position in range(0, num_polls, 3):
        folder = tmp_path / str(position)
        with pytest.raises(Interrupted):
            mixed(folder, stop_at=position)
        found, _ = mixed(folder, stop_at=None)
        assert {**found, "checkpoints": expected["checkpoints"]} == expected, position
