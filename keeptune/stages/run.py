"""The run folder: a recipe arrives, a folder that is held, cleared and known to belong to that recipe leaves."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from keeptune import __version__
from keeptune.config import Recipe
from keeptune.errors import FolderInUseError, Interrupted, KeeptuneError, RecipeError, StorageError
from keeptune.progress import Progress
from keeptune.storage import (
    MANIFEST,
    is_sealed_text,
    locked_folder,
    read_manifest,
    read_record,
    read_sealed_text,
    remove_leftovers,
    storage_errors,
    verify_folder,
    write_record,
    write_sealed_text,
)

_TRAIN = re.compile(r"data\.tasks\.\d+\.train")
_KEEP = re.compile(r"methods\..+\.(frozen_layers|l2_base|replay_fraction|replay_kl)")
# Files of a run folder beside its manifest.
RECIPE, SELECTION, TRAINING, EVENTS = "recipe.yaml", "selection.json", "training.json", "events.jsonl"
CARD, INSTRUCT_MODEL = "card.json", "instruct-model"
_MAX_LISTED = 3
_MAX_SHOWN = 60
_LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "datasets", "numpy", "pyarrow", "rouge-score", "sacrebleu")


@dataclass(frozen=True, slots=True)
class Context:
    """What the command line lends to the stages; `now` gives the time as ISO 8601 text.

    `ledger` is the file in which the user's openings of certify records are counted over all run folders, where the
    recipe names none; None: only the run folder counts them.
    """

    progress: Progress
    stop_requested: Callable[[], bool]
    command: str
    now: Callable[[], str]
    ledger: Path | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """An open run folder; `recipe` has every default filled in."""

    recipe: Recipe
    folder: Path
    context: Context

    @property
    def progress(self) -> Progress:
        """The context's progress, which stops the work that reports to it where that was asked for."""
        return _StoppableProgress(self)

    def poll(self) -> None:
        """Stop between two pieces of work where that was asked for.

        Raises:
            Interrupted: a signal came; what is finished stands.
        """
        if self.context.stop_requested():
            raise Interrupted(
                f"{self.folder}: stopped on request; everything that is finished stands. "
                "Give the same command again to go on."
            )


class _StoppableProgress:
    """A `Progress` that polls its run whenever work is done."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def start(self, title: str, *, total: int, unit: str) -> None:
        self._run.poll()
        self._run.context.progress.start(title, total=total, unit=unit)

    def advance(self, count: int = 1, *, note: str = "") -> None:
        self._run.poll()
        self._run.context.progress.advance(count, note=note)

    def finish(self) -> None:
        self._run.context.progress.finish()

    def say(self, text: str) -> None:
        self._run.context.progress.say(text)


@contextmanager
def open_run(recipe: Recipe, *, context: Context, begun: bool = False, beside: bool = False) -> Iterator[Run]:
    """Hold the recipe's run folder, clear what a killed process left half-written, and write the recipe into it.

    `begun`: only a folder that a run has begun is opened, and none is made. `beside`: what will be made stands beside
    the methods of the run; where some are begun, their recipe stays as it is.

    Raises:
        RecipeError: `begun`, and there is no run in the folder.
        FolderInUseError: another process holds the folder, or it holds results of another recipe.
        StorageError: the folder cannot be written to.
    """
    folder = Path(recipe.output_dir)
    if begun and not (folder / MANIFEST).is_file():
        raise RecipeError(
            f"output_dir: found no run in {recipe.output_dir!r}; expected the folder of one. "
            "Fix output_dir, or start the run with `keeptune run`."
        )
    with locked_folder(folder):
        _refuse_a_foreign_folder(folder)
        for place in [folder, *(folder / name for name in ("base", *recipe.methods))]:
            remove_leftovers(place)
        if not (beside and begun_methods(folder)):
            _refuse_another_recipe(folder, recipe, say=context.progress.say)
            _write_run_manifest(folder, recipe, context=context)
            write_sealed_text(folder / RECIPE, recipe.to_yaml())
        yield Run(recipe, folder, context)


def is_run(folder: Path) -> bool:
    """Tell whether a folder holds a run of keeptune's."""
    return {"commands", "versions"} <= read_manifest(folder).keys()


def intact_record(path: Path, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Return a record that is written again where it is missing or has changed: then an empty one, and say so."""
    try:
        return read_record(path) if path.is_file() else {}
    except StorageError:
        say(f"{path}: found content that differs from its hash; it is written again")
        return {}


@contextmanager
def naming_recipe(path: Path, recipe: Recipe) -> Iterator[None]:
    """Put the recipe's path before what a message inside the block says of one of the recipe's keys."""
    try:
        yield
    except KeeptuneError as error:
        sections = recipe.model_dump(mode="json").items()
        keys = [key for section, value in sections for key, _ in leaves(value, section)]
        lines = []
        for line in str(error).split("\n"):
            where = line.partition(": ")[0]
            is_key = any(key == where or key.startswith(f"{where}.") for key in keys)
            lines.append(f"{path}: {line}" if is_key else line)
        raise type(error)("\n".join(lines)) from error


def begun_methods(folder: Path) -> set[str]:
    """Return the names of the methods of which something is saved: what they were trained on must not change now."""
    checkpoints = {path.parent.parent.name for path in folder.glob("*/checkpoints/*")}
    return checkpoints | {path.parent.name for path in folder.glob(f"*/{TRAINING}")}


def stage_key(**parts: Any) -> str:
    """Return the SHA-256 of a stage's inputs; a stage whose key is unchanged need not run again."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode("utf-8")).hexdigest()


def is_done(folder: Path, key: str) -> bool:
    """Tell whether a stage's folder stands whole, every byte of it, and came from the inputs of `key`."""
    manifest = verify_folder(folder)
    return manifest is not None and manifest.get("key") == key


def note_facts(run: Run, facts: Mapping[str, Any]) -> None:
    """Add facts that a stage found out to the run's manifest."""
    path = run.folder / MANIFEST
    before = read_record(path)
    if before != {**before, **facts}:
        write_record(path, {**before, **facts})


def _refuse_a_foreign_folder(folder: Path) -> None:
    """Leave a folder alone that holds anything and is no run of keeptune's: a run replaces what it finds by name."""
    with storage_errors(folder):
        names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    # Without its manifest a run is known by its recipe.
    if names and not is_run(folder) and not is_sealed_text(folder / RECIPE):
        raise FolderInUseError(
            f"{folder}: found {', '.join(names[:5])} and no run of keeptune; expected an empty or a new folder. "
            "Choose another output_dir."
        )


def _refuse_another_recipe(folder: Path, recipe: Recipe, *, say: Callable[[str], None]) -> None:
    """Let a run folder go on only with the recipe that its training came from.

    Metrics, further methods and the speed of decoding may change; what decides weights may not.
    """
    path = folder / RECIPE
    begun = begun_methods(folder)
    if not path.exists() or not begun:
        return
    trained = [name for name in recipe.methods if name in begun]
    if not is_sealed_text(path):
        # The keys of what is trained tell another recipe too.
        say(f"{path}: found content that differs from its hash; it is written again from the recipe of this command")
        return
    before = _weight_deciding(yaml.safe_load(read_sealed_text(path)), methods=trained)
    after = _weight_deciding(recipe.model_dump(mode="json"), methods=trained)
    if changed := differences(before, after):
        raise FolderInUseError(
            f"output_dir: found results of another recipe in {folder} ({changed}); expected the "
            "same settings to go on. Choose another output_dir, or remove that folder."
        )


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return which settings by dotted key are others now, the first few of them; "" where none is."""
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    listed = [f"{key} was {_short(before.get(key))}, now {_short(after.get(key))}" for key in changed[:_MAX_LISTED]]
    more = [f"and {len(changed) - _MAX_LISTED} more"] if len(changed) > _MAX_LISTED else []
    return "; ".join([*listed, *more])


def _short(value: object) -> str:
    """Return a setting as a message shows it."""
    if value is None:
        return "unset"
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield the settings in `value` by dotted key, list elements that are sections by their number."""
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        value = dict(enumerate(value))
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from leaves(inner, f"{key}.{name}")
    else:
        yield key, value


def _weight_deciding(recipe: Mapping[str, Any], *, methods: Sequence[str]) -> dict[str, Any]:
    """Return the settings, by dotted key, that a trained method's weights depend on."""
    flat: dict[str, Any] = {"model": recipe.get("model"), "seed": recipe.get("seed")}
    # Unset in recipes from before there was this key too.
    flat["quantization"] = recipe.get("quantization")
    for section in ("data", "training"):
        flat |= dict(leaves(recipe.get(section, {}), section))
    # A mixture is a word or a section: a message names it as a whole.
    flat = {key: value for key, value in flat.items() if not key.startswith("data.mixture")}
    mixture = recipe.get("data", {}).get("mixture")
    is_section = isinstance(mixture, dict)
    flat["data.mixture"] = {k: v for k, v in mixture.items() if v is not None} if is_section else mixture
    for name in methods:
        flat |= dict(leaves(recipe.get("methods", {}).get(name), f"methods.{name}"))
    evaluation = recipe.get("evaluation", {})
    flat["evaluation.select_by"] = evaluation.get("select_by")
    if evaluation.get("select_by") != "loss":
        flat |= {f"evaluation.{key}": evaluation.get(key) for key in ("max_new_tokens", "num_validation_records")}
    # How often a run is saved changes no weight (the law "Resume").
    flat.pop("training.save_steps", None)
    # A recipe from before there were these keys lacks them: every task was trained on, and no method had means to keep
    # what the base model knows.
    defaults = [k for k, v in flat.items() if (_TRAIN.fullmatch(k) and v is True) or (_KEEP.fullmatch(k) and v == 0)]
    return {key: value for key, value in flat.items() if key not in defaults}


def _write_run_manifest(folder: Path, recipe: Recipe, *, context: Context) -> None:
    versions = {"keeptune": __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    facts = {
        "created": context.now(),
        "command": context.command,
        "model": recipe.model,
        "seed": recipe.seed,
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions,
    }
    path = folder / MANIFEST
    # Once a method is in training, the command that began it made the run; later ones are added to `commands`.
    before = read_record(path) if path.exists() else {}
    made = {**facts, **before} if begun_methods(folder) else {**before, **facts}
    given = {"time": facts["created"], "command": context.command, "keeptune": __version__}
    commands = [*before.get("commands", []), given]
    write_record(path, {**made, "methods": list(recipe.methods), "commands": commands})
