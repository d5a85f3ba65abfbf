"""Models of no run arrive; their answers to a run's test set leave, made under its prompts, metrics and limit.

A model whose tokenizer gives the same ids reads the run's own tokens. Another one reads the same records as its own
tokenizer renders them, whole, or cut where the run's recipe cuts.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from keeptune.config import Recipe, load_recipe
from keeptune.data.clean import prompt_key
from keeptune.data.record import record_from_json
from keeptune.errors import DataError, RecipeError
from keeptune.stages.certified import refuse_changed
from keeptune.stages.computing import policy_of
from keeptune.stages.data import Base, Data, evaluation_split, read_base, rendering, require_embeddings
from keeptune.stages.entries import Answered, Entry, read_answered
from keeptune.stages.openings import record_opening
from keeptune.stages.retention import answer
from keeptune.stages.run import Context, Run, is_done, is_run, stage_key
from keeptune.stages.way import BASE, ZERO_SHOT, load_at
from keeptune.storage import (
    MANIFEST,
    file_sha256,
    locked_folder,
    read_manifest,
    read_record,
    remove_leftovers,
    require_unchanged,
    storage_errors,
)

if TYPE_CHECKING:
    from keeptune.evaluation.evaluate import Split
    from keeptune.evaluation.metrics import Answer

COMPARISONS = "comparisons"


@dataclass(frozen=True, slots=True)
class _Reader:
    """A model that is to answer: its weights, a whole model or an adapter, its text side, and where its answers go."""

    entry: Entry
    base: Base
    artifact: Path
    folder: Path
    key: str
    own_tokenizer: bool


def answer_test(
    entries: Sequence[Entry], *, run: Path, first: Answered, max_new_tokens: int, context: Context
) -> list[Answered]:
    """Return the models' answers to the test set of `run`, of which `first` is a model; each model answers once.

    Answers stand in the run's `comparisons/answers/`, and each opening of its test set in `test_openings.jsonl`.

    Raises:
        RecipeError: what is no model, or cannot read the records.
        DataError: the run's tokenizer changed, a model was trained on records of this test set, or it was certified
            and its files are others now.
        FolderInUseError: another process holds the run's folder.
    """
    recipe = load_recipe(run / "recipe.yaml")
    asked = {"metrics": tuple(first.header["metrics"]), "max_new_tokens": max_new_tokens}
    recipe = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update=asked)})
    opened = Run(recipe, run, context)
    for entry in entries:
        require_unchanged(entry.folder)
        refuse_changed(entry.folder, runs={run, entry.folder.parent})
        _refuse_test_in_training(entry, run=run, answers=first.answers)
    with locked_folder(run), tempfile.TemporaryDirectory(prefix="keeptune-") as scratch:
        data = _prepared(opened)
        remove_leftovers(run / COMPARISONS / "answers")
        readers = [_reader(entry, run=opened, data=data, first=first, scratch=Path(scratch)) for entry in entries]
        waiting = [reader for reader in readers if not is_done(reader.folder, reader.key)]
        if waiting:
            record_opening(opened, data, keys={reader.entry.name: reader.key for reader in waiting})
        for reader in waiting:
            split = _split(reader, run=opened, data=data, scratch=Path(scratch))
            own = replace(data, base=reader.base)
            name = reader.entry.name
            context.progress.say(f"{name}: answering the {len(split.records):,} records of test")
            answer(
                opened,
                own,
                load_at(opened, own, reader.artifact, name=name),
                split=split,
                metrics=recipe.evaluation.metrics,
                name=name,
                folder=reader.folder,
                key=reader.key,
            )
    return [read_answered(r.entry, r.folder, own_tokenizer=r.own_tokenizer) for r in readers]


def _refuse_test_in_training(entry: Entry, *, run: Path, answers: Sequence[Answer]) -> None:
    """Refuse a model of another run that was trained on inputs of this test set."""
    # A hub id is no path.
    parents = entry.folder.parents if entry.folder.is_absolute() else ()
    other = next((folder for folder in parents if is_run(folder)), run)
    path = other / "data" / "train.jsonl"
    if other == run or not path.is_file():
        return
    require_unchanged(path.parent)
    with storage_errors(path), path.open(encoding="utf-8", errors="surrogatepass") as file:
        rows = (record_from_json(json.loads(line), where=f"{path}:{i}") for i, line in enumerate(file, 1))
        trained = {prompt_key(row) for row in rows}
    num_seen = sum(answer.cluster in trained for answer in answers)
    if num_seen:
        raise DataError(
            f"{entry.argument}: found {num_seen:,} of the {len(answers):,} inputs of the test set among those that it "
            f"was trained on ({path}); expected none. Leave it out, or train it without them."
        )


def _prepared(run: Run) -> Data:
    """Return the data of a run as they were prepared, with the text side of its base model."""
    folder = run.folder / "data"
    facts = read_record(folder / MANIFEST)
    base = read_base(run.recipe, cache=run.folder)
    if (base.tokenizer.fingerprint, base.template.fingerprint) != (facts["tokenizer_sha256"], facts["template_sha256"]):
        raise DataError(
            f"{base.folder}: found another tokenizer or template than when {folder} was prepared; expected the same. "
            "Put its files back, or run the recipe again into another output_dir."
        )
    return Data(base, folder, facts["key"])


def _reader(entry: Entry, *, run: Run, data: Data, first: Answered, scratch: Path) -> _Reader:
    is_adapter = (entry.folder / "adapter_config.json").is_file()
    base = _own_base(entry, recipe=run.recipe, is_adapter=is_adapter, scratch=scratch)
    if not is_adapter and base.facts.sha256 == _answered_base(run.folder):
        raise RecipeError(
            f"{entry.argument}: found the weights of the run's base model, which has answered; expected another model. "
            f"Leave it out, or name {run.folder / BASE} in its place."
        )
    own_tokenizer = not _reads_alike(base, data.base, answers=first.answers)
    if not own_tokenizer:
        base = replace(data.base, name=base.name, folder=base.folder, facts=base.facts)
    files = [path for path in sorted(entry.folder.glob("adapter_*")) if path.is_file()] if is_adapter else []
    key = stage_key(
        data=data.key,
        weights=[base.facts.sha256, *(file_sha256(path) for path in files)],
        text=[base.tokenizer.fingerprint, base.template.fingerprint],
        metrics={name: facts["signature"] for name, facts in first.header["metrics"].items()},
        max_new_tokens=run.recipe.evaluation.max_new_tokens,
        **policy_of(run.recipe).answers_key(),
    )
    folder = run.folder / COMPARISONS / "answers" / key[:12]
    artifact = entry.folder if is_adapter else base.folder
    return _Reader(entry, base, artifact, folder, key, own_tokenizer)


def _answered_base(run: Path) -> str | None:
    """Return the hash of the run's base model, None where it has answered nothing."""
    answered = (run / BASE / ZERO_SHOT).is_dir()
    return read_manifest(run).get("base", {}).get("sha256") if answered else None


def _own_base(entry: Entry, *, recipe: Recipe, is_adapter: bool, scratch: Path) -> Base:
    """Read the text side of a model, or of an adapter's base model; its template is the run's wording, or its own."""
    from keeptune.model.folder import adapter_base, adapter_quantization
    from keeptune.model.load import require_quantization

    model = adapter_base(entry.folder) if is_adapter else entry.argument
    quantization = adapter_quantization(entry.folder) if is_adapter else None
    if quantization is not None:
        require_quantization()
    # Alpaca and plain are the same words for every tokenizer; a chat template belongs to one.
    template = recipe.data.template if recipe.data.template in ("alpaca", "plain") else "auto"
    data = recipe.data.model_copy(update={"template": template})
    # How the run quantises its own base model is nothing to another model.
    own = {"model": model, "quantization": quantization, "data": data}
    try:
        return read_base(recipe.model_copy(update=own), cache=scratch)
    except RecipeError as error:
        raise RecipeError(f"{entry.argument}: {error}") from error


def _reads_alike(base: Base, other: Base, *, answers: Sequence[Answer]) -> bool:
    """Tell whether two models' tokenizers give the same ids for every text of the test set."""
    if base.facts.encoder_decoder != other.facts.encoder_decoder:
        return False
    if base.tokenizer.special_tokens != other.tokenizer.special_tokens:
        return False
    texts = [text for answer in answers for text in (answer.prompt, *answer.references)]
    return all(
        base.tokenizer.encode(texts, first=first) == other.tokenizer.encode(texts, first=first)
        for first in (True, False)
    )


def _split(reader: _Reader, *, run: Run, data: Data, scratch: Path) -> Split:
    """Open the test set as the model reads it; the opening is written down already."""
    from keeptune.text.table import TokenTable
    from keeptune.text.tokens import tokenize

    split, base = evaluation_split(data, "test"), reader.base
    if not reader.own_tokenizer:
        require_embeddings(data.table("test"), base=base)
        return split
    room, cut = base.facts.max_positions or sys.maxsize, run.recipe.data.over_length == "cut"
    tokenized = tokenize(
        split.records,
        **{**rendering(run.recipe, base), "train_on": "last"},
        max_length=min(room, run.recipe.data.max_length) if cut else room,
        over_length="cut" if cut else "error",
        max_positions=base.facts.max_positions,
    )
    table = TokenTable.write(scratch / f"{reader.key[:12]}.arrow", tokenized)
    require_embeddings(table, base=base)
    return replace(split, examples=table)
