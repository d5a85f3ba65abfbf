"""The stages of a run: a recipe arrives, a run folder leaves; the only place that opens a recipe.

prepare → data/ · train → METHOD/ · evaluate → base/, METHOD/test/, instruct-model/ · report → report.html.
Stages meet on disk. Each writes a key of all that it depends on; a stage whose key stands there is not run again.
Whatever needs torch is imported inside the stage that needs it, so that data work starts at once.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from keeptune import __version__
from keeptune.errors import DataError, FolderInUseError, RecipeError
from keeptune.storage import (
    MANIFEST,
    locked_folder,
    read_json,
    remove_leftovers,
    staged_folder,
    storage_errors,
    write_atomic,
    write_json,
    write_jsonl,
)

if TYPE_CHECKING:
    from keeptune.config import Recipe
    from keeptune.progress import Progress

_LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "datasets", "numpy", "pyarrow", "rouge-score", "sacrebleu")


@dataclass(frozen=True, slots=True)
class Context:
    """What the command line lends to the stages."""

    progress: Progress
    stop_requested: Callable[[], bool]
    command: str
    now: Callable[[], str]


@dataclass(frozen=True, slots=True)
class Run:
    """An open run folder; `recipe` has every default filled in."""

    recipe: Recipe
    folder: Path
    context: Context


@dataclass(frozen=True, slots=True)
class Data:
    """What `prepare` left: the base model's facts and text side, and the folder with the splits."""

    base: Base
    folder: Path
    key: str
    audit: Mapping[str, Any]

    def table(self, split: SplitName) -> TokenTable:
        """Open a split's tokens, memory-mapped."""
        from keeptune.text.tokens import TokenTable

        return TokenTable.open(self.folder / "tokens" / f"{split}.arrow")

    def records(self, split: SplitName) -> list[Record]:
        """Read a split's records."""
        from keeptune.data.record import record_from_json

        path = self.folder / f"{split}.jsonl"
        with storage_errors(path), path.open(encoding="utf-8", errors="surrogatepass") as file:
            return [record_from_json(json.loads(line), where=f"{path}:{i}") for i, line in enumerate(file, 1)]


@dataclass(frozen=True, slots=True)
class Base:
    """The base model before any weight is read."""

    name: str
    folder: Path
    facts: ModelFacts
    tokenizer: Tokenizer
    tokenizer_folder: Path
    template: Template


@contextmanager
def open_run(recipe: Recipe, *, context: Context) -> Iterator[Run]:
    """Hold the recipe's run folder, clear what a killed process left half-written, and write the recipe into it.

    Raises:
        RecipeError: a metric does not exist.
        FolderInUseError: another process holds the folder, or it holds results of another recipe.
        StorageError: the folder cannot be written to.
    """
    from keeptune.evaluation.metrics import check_metrics

    check_metrics(recipe.evaluation.metrics)
    folder = Path(recipe.output_dir)
    with locked_folder(folder):
        for place in [folder, *(folder / name for name in ("base", *recipe.methods))]:
            remove_leftovers(place)
        _refuse_another_recipe(folder, recipe)
        write_atomic(folder / "recipe.yaml", recipe.to_yaml())
        _write_run_manifest(folder, recipe, context=context)
        yield Run(recipe, folder, context)


def _refuse_another_recipe(folder: Path, recipe: Recipe) -> None:
    """Let a run folder go on only with the recipe that its finished training came from.

    What the metrics are, further methods and the speed of decoding may change; what decides weights may not.
    """
    path = folder / "recipe.yaml"
    if not path.exists():
        return
    trained = [name for name in recipe.methods if (folder / name / "events.jsonl").exists()]
    with storage_errors(path):
        before = _weight_deciding(yaml.safe_load(path.read_text(encoding="utf-8")), methods=trained)
    after = _weight_deciding(recipe.model_dump(mode="json"), methods=trained)
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    if trained and changed:
        key = changed[0]
        raise FolderInUseError(
            f"{folder}: found results of another recipe ({key} was {before.get(key)!r}, now {after.get(key)!r}"
            f"{f', and {len(changed) - 1} more' if len(changed) > 1 else ''}); expected the same settings to go on. "
            "Choose another output_dir, or remove this folder."
        )


def _weight_deciding(recipe: Mapping[str, Any], *, methods: Sequence[str]) -> dict[str, Any]:
    kept = {key: recipe.get(key) for key in ("model", "seed", "data", "training")}
    kept["evaluation.select_by"] = recipe.get("evaluation", {}).get("select_by")
    kept |= {f"methods.{name}": recipe.get("methods", {}).get(name) for name in methods}
    flat: dict[str, Any] = {}
    for key, value in kept.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return {key: value for key, value in flat.items() if key != "training.save_steps"}


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
        "platform": f"{platform.system()} {platform.machine()}, Python on {sys.platform}",
        "versions": versions,
    }
    write_json(folder / MANIFEST, facts)


def _key(**parts: Any) -> str:
    """Return the SHA-256 of a stage's inputs; a stage whose key is unchanged need not run again."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _is_done(folder: Path, key: str) -> bool:
    """Tell whether a stage's folder stands whole and came from the same inputs."""
    path = folder / MANIFEST
    return path.exists() and read_json(path).get("key") == key and verify_folder(folder) is not None


def _read_base(recipe: Recipe, *, cache: Path) -> Base:
    """Check the model folder and load its tokenizer and template, without torch where the tokenizer allows it."""
    from keeptune.model.folder import check_model_folder, resolve_model
    from keeptune.text.template import make_template
    from keeptune.text.tokenizer import Tokenizer

    folder = resolve_model(recipe.model)
    facts = check_model_folder(folder)
    tokenizer_folder = folder
    if not (folder / "tokenizer.json").exists():
        from keeptune.model.load import convert_tokenizer

        tokenizer_folder = cache / "tokenizer"
        convert_tokenizer(folder, tokenizer_folder)
    tokenizer = Tokenizer.load(tokenizer_folder)
    template = make_template(recipe.data.template, tokenizer=tokenizer, encoder_decoder=facts.encoder_decoder)
    return Base(recipe.model, folder, facts, tokenizer, tokenizer_folder, template)


def _sources(recipe: Recipe) -> list[TaskSource]:
    from keeptune.data.prepare import TaskSource

    return [TaskSource(**task.model_dump()) for task in recipe.data.tasks]


def _prepare_records(recipe: Recipe, *, progress: Progress) -> Prepared:
    from keeptune.data.prepare import prepare_records

    return prepare_records(
        _sources(recipe),
        seed=recipe.seed,
        validation_fraction=recipe.data.validation_fraction,
        test_fraction=recipe.data.test_fraction,
        drop_incomplete=recipe.data.drop_incomplete,
        duplicates=recipe.data.duplicates,
        leaks=recipe.data.leaks,
        progress=progress,
    )


def _tokenize(recipe: Recipe, base: Base, records: Sequence[Record]) -> Iterator[Tokenized]:
    from keeptune.text.tokens import tokenize

    return tokenize(
        records,
        tokenizer=base.tokenizer,
        template=base.template,
        train_on=recipe.data.train_on,
        max_length=recipe.data.max_length,
        over_length=recipe.data.over_length,
        encoder_decoder=base.facts.encoder_decoder,
    )


def prepare(run: Run) -> Data:
    """Read, audit, split and tokenise the data into `data/`, unless the same data stand there."""
    recipe, progress = run.recipe, run.context.progress
    base = _read_base(recipe, cache=run.folder)
    key = _data_key(recipe, base)
    folder = run.folder / "data"
    if _is_done(folder, key):
        progress.say(f"{folder}: prepared before and unchanged")
    else:
        with staged_folder(folder, facts={"key": key, "template": base.template.name}) as staging:
            _write_data(recipe, base, staging, progress=progress)
    return Data(base, folder, key, read_json(folder / "audit.json"))


def _data_key(recipe: Recipe, base: Base) -> str:
    from keeptune.data.source import source_sha256
    from keeptune.text.tokens import token_cache_key

    data = recipe.data
    bytes_read = [
        source_sha256(task.path, revision=task.revision, validation=task.validation, test=task.test)
        for task in data.tasks
    ]
    tokens = token_cache_key(
        data_sha256=_key(sources=bytes_read),
        tokenizer=base.tokenizer,
        template=base.template,
        train_on=data.train_on,
        max_length=data.max_length,
        over_length=data.over_length,
        encoder_decoder=base.facts.encoder_decoder,
    )
    return _key(tokens=tokens, data=data.model_dump(mode="json"), seed=recipe.seed, version=__version__)


