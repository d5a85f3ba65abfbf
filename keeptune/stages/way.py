"""The way from the base model to a trained one: a run arrives; models at points of it, and their artifacts, leave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keeptune.errors import DataError
from keeptune.stages.computing import policy_of, wanted_alphas
from keeptune.stages.data import Data
from keeptune.stages.run import TRAINING, Run, is_done, stage_key
from keeptune.stages.training import artifact_folder
from keeptune.storage import read_manifest, read_record, require_unchanged

if TYPE_CHECKING:
    from torch import nn

    from keeptune.model.methods import Method
    from keeptune.model.path import ModelPath

BASE = "base"
# Where answers to test stand, in the folder of the base model and in a method's.
ZERO_SHOT, TEST = "zero-shot", "test"


@dataclass(frozen=True, slots=True)
class Point:
    """A method's model at alpha, from 0, the base, to 1, the trained model, and where its answers lie."""

    method: Method
    alpha: float
    folder: Path

    @property
    def test(self) -> Path:
        """The answers to test."""
        return self.folder / TEST

    @property
    def texts(self) -> Path:
        """The losses of texts."""
        return self.folder / "texts"

    @property
    def harness(self) -> Path:
        """The answers to documents of the harness."""
        return self.folder / "harness"


def points(run: Run, method: Method) -> list[Point]:
    """Return the points of a method's way that the recipe asks for, the trained model last and always."""
    from keeptune.model.path import why_no_path

    wanted = wanted_alphas(run.recipe)
    if why_no_path(method.peft_type, method.arguments) is not None:
        wanted = ()
    folder = run.folder / method.name
    between = [Point(method, alpha, folder / "path" / f"{alpha:g}") for alpha in wanted if alpha < 1.0]
    return [*between, Point(method, 1.0, folder)]


def open_way(run: Run, data: Data, method: Method) -> ModelPath:
    """Load the way from the base model to a method's artifact, as it lies on the disk."""
    from keeptune.model.memory import memory_errors
    from keeptune.model.path import open_path

    policy = policy_of(run.recipe)
    folder = artifact_folder(run.folder / method.name, method)
    with memory_errors(f"{method.name}: found too little memory; expected room for the model twice. Close programs."):
        return open_path(folder, device=policy.device, dtype=policy.answering, **_base(data))


def load_base(run: Run, data: Data) -> nn.Module:
    """Load the base model as it is, without any wrapper."""
    return load_at(run, data, data.base.folder, name=BASE)


def load_at(run: Run, data: Data, artifact: Path, *, name: str) -> nn.Module:
    """Load what a user would load: a whole model, or an adapter on the run's base, as it lies on the disk."""
    from keeptune.model.artifact import load_artifact
    from keeptune.model.memory import memory_errors

    policy = policy_of(run.recipe)
    with memory_errors(f"{name}: found too little memory; expected room for the model. Close programs."):
        return load_artifact(artifact, device=policy.device, dtype=policy.answering, **_base(data))


def _base(data: Data) -> dict[str, Any]:
    return {"base": data.base.folder, "quantization": data.base.facts.quantization}


def artifact_at(run: Run, data: Data, point: Point) -> Path:
    """Return the folder with a point's artifact; one between base and trained model is written where it is missing."""
    trained = artifact_folder(run.folder / point.method.name, point.method)
    if point.alpha == 1.0:
        return trained
    target = artifact_folder(point.folder, point.method)
    key = stage_key(trained=trained_facts(run, point.method)["key"], alpha=point.alpha)
    if not is_done(target, key):
        open_way(run, data, point.method).save(point.alpha, target, facts={"key": key})
    return target


def trained_facts(run: Run, method: Method) -> Mapping[str, Any]:
    """Return what `training.json` says of a method.

    Raises:
        DataError: the method is not trained to its end.
        StorageError: what its training left has changed.
    """
    path = run.folder / method.name / TRAINING
    facts = read_record(path, again="`keeptune train`") if path.exists() else {}
    artifact = artifact_folder(path.parent, method)
    if facts and read_manifest(artifact).get("key") == facts["key"]:
        require_unchanged(artifact)
    else:
        raise DataError(
            f"{path.parent}: found no whole trained model; expected `keeptune train` to have finished. "
            "Run `keeptune train` with this recipe first, or `keeptune run`."
        )
    return facts
