"""Checkpoints, one folder each: tensors and a state arrive, `step-N/` stands whole on the disk or not at all.

A bad checkpoint is set aside under another name and never removed; a run whose checkpoints are all bad stops.
"""

from __future__ import annotations

import dataclasses
import math
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from keeptune.errors import CheckpointError, FolderInUseError, StorageError
from keeptune.storage import (
    MANIFEST,
    read_json,
    read_record,
    remove_leftovers,
    staged_folder,
    storage_errors,
    verify_folder,
    write_json,
)
from keeptune.training.settings import Validation
from keeptune.training.tensors import restore_parameters, save_tensors

WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"
_FILES = {WEIGHTS, OPTIMIZER, _STATE}
_VERSION = 1
_NAME = re.compile(r"step-([0-9]+)")
_SET_ASIDE = ".corrupt-"
_NUM_KEPT = 2


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What a run is besides its tensors, after `step` whole steps; seconds and tokens are sums over every start.

    `drift_step` is the last step after which the drift was measured, 0 where there is none.
    """

    step: int = 0
    validations: tuple[Validation, ...] = ()
    train_seconds: float = 0.0
    num_train_tokens: int = 0
    num_target_tokens: int = 0
    peak_memory_bytes: int = 0
    drift_step: int = 0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint; `quarantined` names those newer than it that were set aside."""

    folder: Path
    state: TrainingState
    quarantined: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the manifest and the state file both say of a checkpoint, so that neither can change unseen."""

    version: int
    run_key: str
    step: int
    best_step: int | None


def save_checkpoint(
    folder: Path,
    *,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: TrainingState,
    best_step: int | None,
    run_key: str,
) -> None:
    """Write `folder/step-N/`, read it back, then remove what rotation no longer keeps.

    Raises:
        StorageError: the disk refuses or returns other bytes; older checkpoints stand untouched.
    """
    target = folder / f"step-{state.step}"
    facts = dataclasses.asdict(_Facts(_VERSION, run_key, state.step, best_step))
    with staged_folder(target, facts=facts) as staging:
        save_tensors(staging / WEIGHTS, tensors=weights)
        save_tensors(staging / OPTIMIZER, tensors=optimizer)
        write_json(staging / _STATE, {**facts, "training": _state_to_json(state)})
    if _facts_of_whole(target) is None:
        raise StorageError(
            f"{target}: found other bytes than were written; expected the same. Check the disk, then give the same "
            "command again: it goes on from an older checkpoint."
        )
    _rotate(folder, run_key=run_key)


def load_latest(folder: Path, *, run_key: str) -> Checkpoint | None:
    """Return the newest whole checkpoint, or None where none was ever written.

    Clears away what a killed process left half-written or not yet rotated. A checkpoint that is not whole, or whose
    best step's is not, is renamed to `step-N.corrupt-<nonce>`.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
        FolderInUseError: the checkpoints belong to another run.
    """
    remove_leftovers(folder)
    quarantined: list[str] = []
    for step in reversed(_steps(folder)):
        target = folder / f"step-{step}"
        facts = _facts_of_whole(target)
        if facts is not None:
            _require_ours(target, facts, run_key=run_key)
        if facts is not None and (facts.best_step is None or _facts_of_whole(folder / f"step-{facts.best_step}")):
            state = _state_from_json(read_json(target / _STATE)["training"])
            _rotate(folder, run_key=run_key)
            return Checkpoint(target, state, tuple(quarantined))
        with storage_errors(target):
            quarantined.append(target.rename(f"{target}{_SET_ASIDE}{secrets.token_hex(4)}").name)
    set_aside = sorted(path.name for path in folder.glob(f"step-*{_SET_ASIDE}*"))
    if set_aside:
        raise CheckpointError(
            f"{folder}: found {len(set_aside)} checkpoints ({', '.join(set_aside[:10])}), none of them whole "
            "together with its best step; expected one to go on from. Put back a copy of one, or remove "
            f"{folder} to train from the start."
        )
    return None


def restore_weights(folder: Path, *, step: int, parameters: Mapping[str, nn.Parameter]) -> None:
    """Overwrite `parameters` with those of the checkpoint of `step`.

    Raises:
        CheckpointError: that checkpoint is not whole any more.
    """
    target = folder / f"step-{step}"
    if _facts_of_whole(target) is None:
        raise CheckpointError(
            f"{target}: found no whole checkpoint; expected the one with the best weights. "
            "Give the same command again: it goes on from an older one, if there is one."
        )
    restore_parameters(target / WEIGHTS, parameters=parameters)


def _rotate(folder: Path, *, run_key: str) -> None:
    """Remove all checkpoints of this run but the last two and the best ones that these two need."""
    steps = _steps(folder)
    kept = set(steps[-_NUM_KEPT:])
    for step in steps[-_NUM_KEPT:]:
        facts = _facts(folder / f"step-{step}")
        kept |= {facts.best_step} if facts is not None and facts.best_step is not None else set()
    for step in steps:
        target = folder / f"step-{step}"
        facts = _facts(target)
        if step in kept or facts is None or facts.run_key != run_key:
            continue
        # Renamed first: a kill amid the removal must leave nothing that looks like a checkpoint.
        with storage_errors(target):
            shutil.rmtree(target.rename(f"{target}.tmp-rotated-{secrets.token_hex(4)}"))


def _steps(folder: Path) -> list[int]:
    with storage_errors(folder):
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def _facts_of_whole(target: Path) -> _Facts | None:
    """Return a checkpoint's facts if it is whole: three files as the manifest says, and one story in all of them."""
    manifest = None if target.is_symlink() else verify_folder(target)
    facts = _facts(target)
    if manifest is None or facts is None or set(manifest["files"]) != _FILES:
        return None
    state = read_json(target / _STATE)
    same = {key: state[key] for key in state if key != "training"} == dataclasses.asdict(facts)
    return facts if same and target.name == f"step-{facts.step}" else None


def _facts(target: Path) -> _Facts | None:
    """Return what a checkpoint's manifest says, or None where it cannot be read."""
    try:
        manifest = read_record(target / MANIFEST)
        return _Facts(**{key: value for key, value in manifest.items() if key != "files"})
    except (StorageError, TypeError):
        return None


def _require_ours(target: Path, facts: _Facts, *, run_key: str) -> None:
    if facts.version != _VERSION:
        raise CheckpointError(
            f"{target}: found version {facts.version} of the checkpoint; expected {_VERSION}. "
            "Go on with the version of keeptune that wrote it, or choose another output_dir."
        )
    if facts.run_key != run_key:
        raise FolderInUseError(
            f"{target}: found a checkpoint of another run ({facts.run_key[:12]}); expected one of this run "
            f"({run_key[:12]}): the recipe, the data or the model has changed. Choose another output_dir, or remove "
            f"{target.parent} to train from the start."
        )


def _state_to_json(state: TrainingState) -> dict[str, Any]:
    value = dataclasses.asdict(state)
    value["validations"] = [
        {**validation, "loss": _number(validation["loss"]), "metric": _number(validation["metric"])}
        for validation in value["validations"]
    ]
    # A run that measures none writes what it wrote before there was a drift to measure.
    return {key: part for key, part in value.items() if key != "drift_step" or part}


def _number(value: float | None) -> float | str | None:
    """Return what stands in JSON for a number; "nan" and "inf" differ from null, which means not taken."""
    return value if value is None or math.isfinite(value) else str(value)


def _state_from_json(value: Mapping[str, Any]) -> TrainingState:
    validations = tuple(
        Validation(
            step=validation["step"],
            epoch=validation["epoch"],
            loss=float(validation["loss"]),
            metric=None if validation["metric"] is None else float(validation["metric"]),
        )
        for validation in value["validations"]
    )
    return TrainingState(**{**value, "validations": validations})
