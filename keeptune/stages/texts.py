"""Texts: a prepared run arrives; `texts/` with what the base model knew leaves: its own texts, and general ones."""

from __future__ import annotations

import gc
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keeptune.config import Recipe, TextFields
from keeptune.data.record import (
    OTHER_TASKS,
    SELF_TEXTS,
    Message,
    PartName,
    Record,
    SplitName,
    record_id,
    record_to_json,
)
from keeptune.errors import DataError
from keeptune.stages.budgets import check_budgets
from keeptune.stages.computing import policy_of
from keeptune.stages.data import Data, open_table, read_records
from keeptune.stages.mixture import train_examples
from keeptune.stages.parts import part_shares
from keeptune.stages.run import Run, is_done, stage_key
from keeptune.storage import (
    MANIFEST,
    read_json,
    read_manifest,
    read_record,
    staged_folder,
    storage_errors,
    write_json,
    write_jsonl,
)

if TYPE_CHECKING:
    from keeptune.evaluation.evaluate import Split
    from keeptune.retention.sampling import Written
    from keeptune.stages.keep import KeepTexts
    from keeptune.text.table import TokenTable
    from keeptune.text.tokens import Tokenized

AUDIT = "audit.json"
# Texts on which the drift meter may look while training; it uses as many as its share of the time allows.
_NUM_PROBE_TEXTS = 64
# Beyond this many, texts to train on again are repeated.
_MOST_REPLAY_TEXTS = 2_000
_CODE_VERSION = 1
# A base that writes so large a share of loops may not write as many other texts as it should.
_MANY_LOOPS = 1 / 3
# What training reads, and what is first read after it.
_EARLY: frozenset[PartName | SplitName] = frozenset({"probe", "replay"})
_LATE: frozenset[PartName | SplitName] = frozenset({"test", "certify"})


@dataclass(frozen=True, slots=True)
class Texts:
    """The folder with the texts of every suite by part; "test" is the part that is reported on."""

    folder: Path
    key: str

    @property
    def audit(self) -> Mapping[str, Any]:
        """What became of the texts of each suite."""
        return read_json(self.folder / AUDIT)

    def has(self, part: PartName | SplitName) -> bool:
        """Tell whether there is a text in this part."""
        return (self.folder / f"{part}.jsonl").is_file()

    def table(self, part: PartName | SplitName) -> TokenTable:
        """Open the tokens of a part."""
        return open_table(self.folder, part)

    def records(self, part: PartName | SplitName) -> list[Record]:
        """Read the texts of a part as records without a prompt."""
        return read_records(self.folder, part)

    def split(self, part: PartName | SplitName) -> Split:
        """Open a part for evaluation."""
        from keeptune.evaluation.evaluate import Split

        records = self.records(part)
        return Split(part, records, self.table(part), untrained_tasks=frozenset(record.task for record in records))


def write_texts(run: Run, data: Data, *, for_training: bool = False) -> Texts | None:
    """Let the base model write its texts and read the general ones into `texts/`, unless they stand there.

    None where the recipe wants none of either. `for_training`: only what training reads is written, the texts to replay
    and those that drift is measured on; a later call adds the others, and each is the same as if all came at once.

    Raises:
        DataError: a source has no texts, or all of them overlap with train.
        RecipeError: a budget has too few texts to certify on.
    """
    recipe = run.recipe
    retention = recipe.retention
    if not retention.self_texts and not retention.texts:
        return None
    counts = _self_counts(recipe, data)
    key = _texts_key(recipe, data, counts=counts)
    folder = run.folder / "texts"
    texts = Texts(folder, key)
    stands = is_done(folder, key)
    waiting = set(read_record(folder / MANIFEST).get("waiting", ())) if stands else {*_LATE, *_EARLY}
    wanted = waiting - (_LATE if for_training and counts.keys() & _LATE else set())
    if not wanted:
        run.context.progress.say(f"{folder}: written before and unchanged")
        return texts
    parts, audit = read_general(recipe, data)
    check_budgets(run, data, certify_texts(audit))
    kept = texts.audit if stands else {}
    if counts:
        own = _write_own(run, data, counts=counts, wanted=counts.keys() & wanted, into=parts)
        audit[SELF_TEXTS] = _joined(kept.get(SELF_TEXTS), own, counts=counts)
    left = sorted(waiting - wanted)
    with staged_folder(
        folder, facts={"key": key, "seed": recipe.seed, **({"waiting": left} if left else {})}
    ) as staging:
        _write_parts(staging, {part: rows for part, rows in parts.items() if part in wanted})
        if stands:
            _copy_parts(folder, staging)
        write_json(staging / AUDIT, audit)
    run.context.progress.say("; ".join(_described(name, facts) for name, facts in audit.items()))
    if left and "certify" in counts and _loops_often(audit[SELF_TEXTS]):
        # So many may be left out that too few remain for the budget: that shows before training, or never too late.
        return write_texts(run, data)
    if "certify" in wanted:
        check_budgets(run, data, certify_texts(texts))
    return texts


def _loops_often(own: Mapping[str, Any]) -> bool:
    return sum(own["dropped"].values()) > _MANY_LOOPS * own["num_read"]


def read_general(
    recipe: Recipe, data: Data
) -> tuple[dict[PartName | SplitName, list[Tokenized]], dict[str, dict[str, Any]]]:
    """Read the suites of general text; return the texts of each part, and what became of each suite's documents.

    Raises:
        DataError: a source has no texts, or all of them overlap with train.
    """
    parts: dict[PartName | SplitName, list[Tokenized]] = {}
    return parts, {suite.name: _read_suite(recipe, data, suite, into=parts) for suite in recipe.retention.texts}


def certify_texts(texts: Texts | Mapping[str, Any] | None) -> dict[str, int]:
    """Return how many texts of each suite there are to certify on, of what is written so far or of an audit of it."""
    audit = texts.audit if isinstance(texts, Texts) else texts or {}
    return {suite: facts["parts"].get("certify", 0) for suite, facts in audit.items()}


def _joined(
    before: Mapping[str, Any] | None, now: dict[str, Any], *, counts: Mapping[PartName | SplitName, int]
) -> dict[str, Any]:
    """Return what became of the base's own texts of parts that were written before and now."""
    if before is None:
        return now
    parts = {**before["parts"], **now["parts"]}
    dropped = Counter(before["dropped"]) + Counter(now["dropped"])
    return {
        **now,
        "num_read": before["num_read"] + now["num_read"],
        "dropped": dict(dropped),
        "parts": {part: parts[part] for part in counts if part in parts},
    }


def _copy_parts(folder: Path, staging: Path) -> None:
    """Put the parts that stand in `folder` beside those in `staging`."""
    with storage_errors(staging):
        for file in folder.glob("*.jsonl"):
            shutil.copy2(file, staging / file.name)
        shutil.copytree(folder / "tokens", staging / "tokens", dirs_exist_ok=True)


def keep_texts(recipe: Recipe, data: Data, texts: Texts | None) -> KeepTexts | None:
    """Return what methods replay and measure their drift on; None where there is neither."""
    from keeptune.stages.keep import KeepTexts

    named = {OTHER_TASKS, *(task.name for task in recipe.data.tasks)}
    owner = data if recipe.retention.replay in named else texts
    replaying = owner if owner is not None and (owner.folder / "replay.jsonl").is_file() else None
    replay = replaying.table("replay") if replaying is not None else None
    probe = texts.table("probe") if texts is not None and texts.has("probe") else None
    if replay is None and probe is None:
        return None
    # Of their content: what else is set aside of these texts, such as for a certificate, decides no weight.
    manifest = read_manifest(replaying.folder / "tokens/replay.arrow") if replaying is not None else {}
    return KeepTexts(replay, probe, stage_key(**manifest["files"]) if manifest else "")


def _self_counts(recipe: Recipe, data: Data) -> dict[PartName | SplitName, int]:
    """Return how many texts the base writes for each part."""
    from keeptune.text.mixture import first_epoch

    retention = recipe.retention
    if not retention.self_texts:
        return {}
    counts: dict[PartName | SplitName, int] = {"probe": _NUM_PROBE_TEXTS, "test": retention.self_texts}
    most = max((method.replay_fraction for method in recipe.methods.values()), default=0.0)
    if most and retention.replay == SELF_TEXTS:
        wanted_tokens = most / (1.0 - most) * float(first_epoch(train_examples(recipe, data)).lengths.sum())
        counts["replay"] = min(_MOST_REPLAY_TEXTS, math.ceil(wanted_tokens / retention.text_tokens))
    # Last, since the number of a part seeds its texts: a budget that is added later changes no others.
    if SELF_TEXTS in retention.budget:
        counts["certify"] = retention.self_texts
    return counts


def _texts_key(recipe: Recipe, data: Data, *, counts: Mapping[PartName | SplitName, int]) -> str:
    from keeptune.data.source import source_sha256

    retention = recipe.retention
    return stage_key(
        weights=data.base.facts.sha256,
        tokenizer=data.base.tokenizer.fingerprint,
        # What overlaps with train is left out; an encoder writes behind validation's prompts.
        data=data.key if retention.texts or data.base.facts.encoder_decoder else None,
        texts=[
            {**text.model_dump(mode="json"), "sha256": _source_sha256(text, whole=source_sha256)}
            for text in retention.texts
        ],
        shares={text.name: part_shares(recipe, text.name) for text in retention.texts},
        counts=dict(counts),
        num_tokens=retention.text_tokens,
        seed=recipe.seed,
        device=recipe.device,
        **policy_of(recipe).answers_key(),
        version=_CODE_VERSION,
    )


def _source_sha256(text: TextFields, *, whole: Any) -> str:
    from keeptune.storage import file_sha256

    path = Path(text.path).expanduser()
    if path.suffix == ".txt" and path.is_file():
        return file_sha256(path)
    return whole(text.path, revision=None, validation=None, test=None)


def _read_suite(
    recipe: Recipe, data: Data, suite: TextFields, *, into: dict[PartName | SplitName, list[Tokenized]]
) -> dict[str, Any]:
    """Add a suite of general text to the parts; return what became of its documents."""
    from keeptune.data.documents import place_documents, read_documents
    from keeptune.text.documents import document_examples

    found, dropped, num_read = read_documents(suite.path, suite=suite.name, max_records=suite.max_records)
    placed = place_documents(
        found,
        train=data.stored("train"),
        seed=recipe.seed,
        shares=part_shares(recipe, suite.name),
        dropped=dropped,
        num_read=num_read,
    )
    lost, num_parts = Counter(placed.dropped), Counter[str]()
    for part, documents in placed.parts.items():
        rows = document_examples(
            documents,
            tokenizer=data.base.tokenizer,
            num_tokens=recipe.retention.text_tokens,
            encoder_decoder=data.base.facts.encoder_decoder,
        )
        for row in rows:
            if row.example is None:
                lost["too_short"] += 1
                continue
            into.setdefault(part, []).append(row)
            num_parts[part] += 1
    if not num_parts["test"]:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in lost.items()) or "none"
        raise DataError(
            f"{suite.path}: found no document to report on ({num_read:,} read; dropped: {reasons}); expected one or "
            "more that do not overlap with train. Name another source."
        )
    return {"num_read": num_read, "dropped": dict(lost), "parts": dict(num_parts)}


def _write_own(
    run: Run,
    data: Data,
    *,
    counts: Mapping[PartName | SplitName, int],
    wanted: Set[PartName | SplitName],
    into: dict[PartName | SplitName, list[Tokenized]],
) -> dict[str, Any]:
    """Add texts that the base model writes itself to the `wanted` parts; return how many, and of which seeds.

    The number of a part among all `counts` seeds it, wanted or not.
    """
    from keeptune.model.artifact import stop_token_ids
    from keeptune.model.load import load_model
    from keeptune.model.memory import memory_errors
    from keeptune.retention.sampling import write_texts as sample
    from keeptune.text.documents import start_id, written_texts

    base = data.base
    policy = policy_of(run.recipe)
    with memory_errors("retention.self_texts: found too little memory; expected room for the base model."):
        model = load_model(
            base.folder, device=policy.device, dtype=policy.answering, quantization=base.facts.quantization
        )
        stop_ids = stop_token_ids(model, tokenizer=base.tokenizer, template=base.template)
        prompts = [[start_id(base.tokenizer)]]
        if base.facts.encoder_decoder:
            validation = data.table("validation")
            prompts = [validation[i].prompt_ids.tolist() for i in range(len(validation))]
        num_loops = 0
        for number, (part, num_texts) in enumerate(counts.items()):
            if part not in wanted:
                continue
            written = sample(
                model,
                prompts=prompts,
                num_texts=num_texts,
                num_tokens=_room(run.recipe, data),
                tokenizer=base.tokenizer,
                stop_ids=stop_ids,
                seed=(run.recipe.seed, number),
                progress=run.progress,
                stop_requested=run.context.stop_requested,
            )
            num_loops += written.num_loops
            records = list(_own_records(written, data, part=part))
            into.setdefault(part, []).extend(written_texts(records, prompts=written.prompts, rows=written.rows))
    del model
    gc.collect()
    found = {part: sum(row.record.task == SELF_TEXTS for row in into[part]) for part in counts if part in wanted}
    dropped = {"loop": num_loops} if num_loops else {}
    return {"num_read": sum(found.values()) + num_loops, "dropped": dropped, "parts": found, "seed": run.recipe.seed}


def _room(recipe: Recipe, data: Data) -> int:
    """Return the tokens of a text that the model has positions for, the first token apart."""
    positions = data.base.facts.max_positions
    return recipe.retention.text_tokens if positions is None else min(recipe.retention.text_tokens, positions - 1)


def _own_records(written: Written, data: Data, *, part: str) -> Iterable[Record]:
    pairs = data.base.facts.encoder_decoder
    texts = data.base.tokenizer.decode_batch(written.rows, first=pairs, skip_special_tokens=True)
    prompts = data.base.tokenizer.decode_batch(written.prompts, first=True, skip_special_tokens=True)
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        messages = (Message("assistant", text),)
        # Two equal texts, such as empty ones, are two draws; their number tells them apart.
        id_ = record_id(f"{SELF_TEXTS}/{part}/{i}", messages)
        question = (Message("user", prompt),) if pairs else ()
        yield Record(id_, SELF_TEXTS, f"{SELF_TEXTS}/{part}[{i}]", (*question, *messages))


def _write_parts(folder: Path, parts: Mapping[PartName | SplitName, Sequence[Tokenized]]) -> None:
    from keeptune.text.table import TokenTable

    with storage_errors(folder):
        (folder / "tokens").mkdir()
    for part, rows in parts.items():
        TokenTable.write(folder / "tokens" / f"{part}.arrow", rows)
        write_jsonl(folder / f"{part}.jsonl", (record_to_json(row.record) for row in rows))


def _described(name: str, facts: Mapping[str, Any]) -> str:
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in facts["dropped"].items())
    kept = ", ".join(f"{count:,} {'report' if part == 'test' else part}" for part, count in facts["parts"].items())
    return f"{name}: {facts['num_read']:,} texts = {kept}" + (f", {dropped} dropped" if dropped else "")
