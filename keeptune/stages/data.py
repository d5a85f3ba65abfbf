"""Data: a recipe arrives; `data/` with audited splits and their tokens leaves, or the preview of what it would hold."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keeptune import __version__
from keeptune.config import Recipe
from keeptune.config_data import TaskFields
from keeptune.data.record import PartName, Record, SplitName, record_from_json
from keeptune.errors import DataError, FolderInUseError, RecipeError
from keeptune.progress import UNCHANGED, Progress
from keeptune.stages.parts import part_shares
from keeptune.stages.run import Run, begun_methods, is_done, note_facts, stage_key
from keeptune.storage import (
    MANIFEST,
    changed_file,
    read_json,
    read_record,
    require_unchanged,
    staged_folder,
    storage_errors,
)

if TYPE_CHECKING:
    from keeptune.data.disk import Records
    from keeptune.evaluation.evaluate import Split
    from keeptune.model.folder import ModelFacts
    from keeptune.text.table import TokenTable
    from keeptune.text.template import Template
    from keeptune.text.tokenizer import Tokenizer


# Part of every key: raise it when the same rows and settings give other splits.
_CODE_VERSION = 3
# What trials were given names in this file, beside them, the key of the data that it was taken from.
TRIAL_FACTS = "parts.json"


@dataclass(frozen=True, slots=True)
class Base:
    """The base model before any weight is read."""

    name: str
    folder: Path
    facts: ModelFacts
    tokenizer: Tokenizer
    tokenizer_folder: Path
    template: Template
    longest_record: int
    """The most tokens that a record has by the recipe."""
    longest_answered: int
    """The most tokens that a prompt has with its answer, as far as the recipe tells."""


@dataclass(frozen=True, slots=True)
class Data:
    """What `prepare` left: the base model's text side, and the folder with splits, tokens and audit.

    `made_before`: they stood there, prepared by an earlier command.
    """

    base: Base
    folder: Path
    key: str
    made_before: bool = False

    @property
    def audit(self) -> Mapping[str, Any]:
        """The content of `audit.json`."""
        return read_json(self.folder / "audit.json")

    @property
    def untrained_tasks(self) -> frozenset[str]:
        """The names of the tasks that are scored only."""
        return frozenset(self.audit.get("untrained_tasks", ()))

    def table(self, split: SplitName | PartName) -> TokenTable:
        """Open a split's tokens, memory-mapped."""
        return open_table(self.folder, split)

    def stored(self, split: SplitName | PartName) -> Records:
        """Return a split's records, which stay on the disk until they are read."""
        return stored_records(self.folder, split)

    def records(self, split: SplitName | PartName, *, at_most: int | None = None) -> list[Record]:
        """Read a split's records, the first of them where `at_most` says how many."""
        return read_records(self.folder, split, at_most=at_most)


def open_table(folder: Path, split: SplitName | PartName) -> TokenTable:
    """Open the tokens of a split or part that stand in `folder`, memory-mapped."""
    from keeptune.text.table import TokenTable

    return TokenTable.open(folder / "tokens" / f"{split}.arrow")


def stored_records(folder: Path, split: SplitName | PartName) -> Records:
    """Return the records of a split or part that stand in `folder`, which stay on the disk until they are read."""
    import numpy as np

    from keeptune.data.disk import RecordFile, Records

    file = RecordFile(folder / f"{split}.jsonl", written=True)
    return Records(file, np.arange(len(file)))


def read_records(folder: Path, split: SplitName | PartName, *, at_most: int | None = None) -> list[Record]:
    """Read the records of a split or part that stand in `folder`, the first `at_most` of them."""
    path = folder / f"{split}.jsonl"
    with storage_errors(path), path.open(encoding="utf-8", errors="surrogatepass") as file:
        lines = enumerate(itertools.islice(file, at_most), 1)
        return [record_from_json(json.loads(line), where=f"{path}:{i}") for i, line in lines]


def check_model(recipe: Recipe) -> None:
    """Refuse a model that is not there or not whole, before a run folder is made for it.

    Raises:
        RecipeError: the folder or hub id is no model that keeptune trains.
    """
    from keeptune.model.folder import check_model_folder, resolve_model

    check_sources(recipe)
    check_model_folder(resolve_model(recipe.model))


def prepare(run: Run) -> Data:
    """Read, audit, split and tokenise the data into `data/`, unless the same data stand there.

    Raises:
        RecipeError: a metric cannot read the references of a task.
    """
    from keeptune.stages.splits import write_data

    progress = run.progress
    base = read_base(run.recipe, cache=run.folder)
    note_facts(run, {"base": {"model_type": base.facts.model_type, "sha256": base.facts.sha256}})
    say_ignored_code(base, progress=progress)
    sources = source_hashes(run.recipe)
    key = _data_key(run.recipe, base, sources=sources)
    folder = run.folder / "data"
    made_before = is_done(folder, key)
    if made_before:
        progress.say(f"{folder}: prepared {UNCHANGED}")
    else:
        if folder.exists() and read_record(run.folder / MANIFEST).get("data_key") == key:
            progress.say(f"{changed_file(folder)}: found content that differs from its hash; data are prepared again")
        else:
            _refuse_other_data(run.folder, folder, key=key)
        facts: dict[str, Any] = {
            "key": key,
            "keeptune": __version__,
            "seed": run.recipe.seed,
            "sources": {
                task.name: {"path": task.path, "sha256": sha256}
                for task, sha256 in zip(run.recipe.data.tasks, sources, strict=True)
            },
            "tokenizer_sha256": base.tokenizer.fingerprint,
            "template": base.template.name,
            "template_sha256": base.template.fingerprint,
        }
        with staged_folder(folder, facts=facts) as staging:
            facts["counts"] = write_data(run.recipe, base, staging, progress=progress).counts()
        note_facts(run, {"data_key": key})
    data = Data(base, folder, key, made_before=made_before)
    for remark in check_metrics(run.recipe, data):
        progress.say(remark)
    return data


def check_metrics(recipe: Recipe, data: Data) -> list[str]:
    """Return remarks on metrics that say less of a task than they seem to.

    Raises:
        RecipeError: a metric cannot read a task's references, so that right answers would score 0.
    """
    from keeptune.evaluation.corpus import load_tokenisers
    from keeptune.evaluation.legible import blind_problems, remarks

    metrics, references = recipe.evaluation.metrics, data.audit.get("references", {})
    problems = [*load_tokenisers(metrics), *blind_problems(metrics, references)]
    if problems:
        raise RecipeError("\n".join(f"evaluation.metrics: {problem}" for problem in problems))
    return remarks(metrics, references)


@contextmanager
def borrowed_data(recipe: Recipe, *, progress: Progress) -> Iterator[Data]:
    """Lend the run's own data where they stand prepared and unchanged, else the same data for the time of the block."""
    from keeptune.stages.splits import write_data

    with tempfile.TemporaryDirectory(prefix="keeptune-") as scratch:
        base = read_base(recipe, cache=Path(scratch))
        folder, key = Path(recipe.output_dir) / "data", _data_key(recipe, base, sources=source_hashes(recipe))
        if not is_done(folder, key):
            folder = Path(scratch) / "data"
            folder.mkdir()
            write_data(recipe, base, folder, progress=progress)
        yield Data(base, folder, key)


def _refuse_other_data(run_folder: Path, folder: Path, *, key: str) -> None:
    """Keep the data that methods or trials were trained on: other data would move records between train and test."""
    if not folder.exists():
        return
    if begun_methods(run_folder):
        raise FolderInUseError(
            f"{folder}: found methods trained on other data, another tokenizer or other base weights than the recipe "
            "names now, or on tasks divided otherwise (a search sets retention.probe_fraction); expected the same. "
            "Choose another output_dir, or put the files back."
        )
    for kind in ("search", "curve"):
        parts = run_folder / kind / "parts" / TRIAL_FACTS
        before = read_record(parts, again="the same command")["data"] if parts.is_file() else key
        if before != key:
            raise FolderInUseError(
                f"{folder}: found the data of {run_folder / kind} (hash {before[:16]}), and the recipe names other "
                f"data, other splits or another tokenizer now (hash {key[:16]}); expected the same. Choose another "
                f"output_dir, put the files back, or remove {run_folder / kind}."
            )


def evaluation_split(data: Data, split: SplitName) -> Split:
    """Open a split for evaluation; the caller writes down that test was opened."""
    from keeptune.evaluation.evaluate import Split

    table = data.table(split)
    left_out = table.counts.num_dropped
    return Split(split, data.stored(split), table, num_left_out=left_out, untrained_tasks=data.untrained_tasks)


def max_new_tokens(recipe: Recipe, data: Data) -> int:
    """Return the limit of an answer's tokens: the recipe's, or what the train completions need."""
    from keeptune.evaluation.generate import auto_max_new_tokens

    chosen = recipe.evaluation.max_new_tokens
    return auto_max_new_tokens(data.table("train").completion_lengths) if chosen == "auto" else chosen


def max_new_tokens_on_test(recipe: Recipe, data: Data) -> int:
    """Return the limit of an answer's tokens on test: `max_new_tokens`, or what the untrained tasks need, if more.

    For those the limit looks at test completions, as the audit counted them: their lengths decide no weight and no
    choice, since validation's answers keep to `max_new_tokens`.
    """
    from keeptune.evaluation.generate import auto_max_new_tokens

    untrained = data.audit["tokens"].get("untrained_completion")
    if recipe.evaluation.max_new_tokens != "auto" or untrained is None:
        return max_new_tokens(recipe, data)
    return auto_max_new_tokens(data.table("train").completion_lengths, at_least_p99=untrained["p99"])


def read_base(recipe: Recipe, *, cache: Path) -> Base:
    """Check the model folder and load its tokenizer and template, without torch where the tokenizer allows it."""
    from keeptune.model.folder import check_model_folder, resolve_model
    from keeptune.text.template import make_template
    from keeptune.text.tokenizer import Tokenizer

    folder = resolve_model(recipe.model)
    require_unchanged(folder)
    facts = replace(check_model_folder(folder), quantization=recipe.quantization)
    tokenizer_folder = folder
    if not (folder / "tokenizer.json").exists() and (folder / "spiece.model").exists():
        from keeptune.model.load import convert_tokenizer

        tokenizer_folder = cache / "tokenizer"
        convert_tokenizer(folder, tokenizer_folder)
    tokenizer = Tokenizer.load(tokenizer_folder)
    if max(tokenizer.eos_id, tokenizer.pad_id) >= facts.vocab_size:
        raise _no_embedding(folder, max(tokenizer.eos_id, tokenizer.pad_id), vocab_size=facts.vocab_size)
    template = make_template(
        recipe.data.template,
        tokenizer=tokenizer,
        encoder_decoder=facts.encoder_decoder,
        enable_thinking=recipe.data.enable_thinking,
    )
    longest, limit = recipe.data.max_length, recipe.evaluation.max_new_tokens
    # An automatic limit is little above the train completions, and these are parts of records.
    longest_answered = longest + (longest if limit == "auto" else limit)
    return Base(recipe.model, folder, facts, tokenizer, tokenizer_folder, template, longest, longest_answered)


def say_ignored_code(base: Base, *, progress: Progress) -> None:
    """Say that the model's folder brings code, where it does: it is not run."""
    if base.facts.ignored_code:
        progress.say(
            f"{base.folder}: brings Python code of its own, which is not run: transformers knows "
            f"{base.facts.model_type} models itself"
        )


def rendering(recipe: Recipe, base: Base) -> dict[str, Any]:
    """Return the arguments that say how a record becomes tokens."""
    return {
        "tokenizer": base.tokenizer,
        "template": base.template,
        "train_on": recipe.data.train_on,
        "encoder_decoder": base.facts.encoder_decoder,
    }


def length_policy(recipe: Recipe, base: Base) -> dict[str, Any]:
    """Return what is too long, and what happens to it."""
    return {"max_length": max_length(recipe, base), "over_length": recipe.data.over_length}


def max_length(recipe: Recipe, base: Base) -> int:
    """Return the recipe's limit in tokens, or what the model has room for."""
    room = max_positions(recipe, base)
    return recipe.data.max_length if room is None else min(recipe.data.max_length, room)


def max_positions(recipe: Recipe, base: Base) -> int | None:
    """Return how many tokens the model has room for beside PEFT's virtual tokens; None: no limit."""
    if base.facts.max_positions is None:
        return None
    virtual = [(method.model_extra or {}).get("num_virtual_tokens") for method in recipe.methods.values()]
    most = max((number for number in virtual if isinstance(number, int)), default=0)
    return max(1, base.facts.max_positions - most)


def source_hashes(recipe: Recipe) -> list[str]:
    """Return the SHA-256 of each task's files, in the recipe's order.

    Raises:
        DataError, RecipeError: a task's path or own file cannot be used; the message begins with its key.
    """
    from keeptune.data.source import source_sha256

    hashes, names = [], {"path", "revision", "validation", "test", "config", "split"}
    for i, task in enumerate(recipe.data.tasks):
        with _under_its_key(i, task):
            hashes.append(source_sha256(**task.model_dump(include=names)))
    return hashes


def check_sources(recipe: Recipe) -> None:
    """Refuse data files that are not there, before anything slow is imported; what may be a hub id is not looked up.

    Raises:
        DataError: a task's path or own file cannot be used; the message begins with its key.
    """
    from keeptune.data.source import check_source

    for i, task in enumerate(recipe.data.tasks):
        with _under_its_key(i, task):
            check_source(task.path, validation=task.validation, test=task.test)


@contextmanager
def _under_its_key(number: int, task: TaskFields) -> Iterator[None]:
    """Put the recipe's key before an error about a task's path or own file."""
    try:
        yield
    except (DataError, RecipeError) as error:
        own = {"validation": task.validation, "test": task.test}
        key = next((key for key, path in own.items() if path and str(error).startswith(path)), "path")
        raise type(error)(f"data.tasks.{number}.{key}: {error}") from error


def _data_key(recipe: Recipe, base: Base, *, sources: Sequence[str]) -> str:
    """Return the key of all that decides the splits and their tokens."""
    from keeptune.text.tokens import token_cache_key

    tokens = token_cache_key(
        data_sha256=stage_key(sources=list(sources)), **rendering(recipe, base), **length_policy(recipe, base)
    )
    settings = recipe.data.model_dump(mode="json", exclude={"mixture"})
    # Data prepared before tasks could be scored only stay what they are.
    settings["tasks"] = [{k: v for k, v in task.items() if (k, v) != ("train", True)} for task in settings["tasks"]]
    # Data of which nothing is set aside for a certificate or for replay are the same as before there were parts.
    shares = {task.name: part_shares(recipe, task.name) for task in recipe.data.tasks if not task.train}
    parts = {"parts": {task: value for task, value in shares.items() if value}} if any(shares.values()) else {}
    return stage_key(tokens=tokens, data=settings, seed=recipe.seed, version=_CODE_VERSION, **parts)


def require_embeddings(table: TokenTable, *, base: Base) -> None:
    """Refuse tokens that the model has no embedding for.

    Raises:
        RecipeError: there is one.
    """
    if table.largest_id >= base.facts.vocab_size:
        raise _no_embedding(base.folder, table.largest_id, vocab_size=base.facts.vocab_size)


def _no_embedding(folder: Path, token_id: int, *, vocab_size: int) -> RecipeError:
    return RecipeError(
        f"{folder}: found a tokenizer with id {token_id} for a model of {vocab_size} embeddings; expected every id "
        "to have one. Use the model's own tokenizer, or correct vocab_size in config.json."
    )
