"""Tasks of lm-evaluation-harness: a prepared run arrives; `harness/` with their documents by part leaves.

A model's answers to a part stand in files like those of every other suite, so that what was lost is measured alike.
"""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keeptune.config import Recipe
from keeptune.data.record import Message, PartName, Record, SplitName
from keeptune.errors import DataError, RecipeError, raise_collected
from keeptune.stages.computing import policy_of
from keeptune.stages.data import Data, max_new_tokens_on_test
from keeptune.stages.parts import part_shares
from keeptune.stages.run import Run, is_done, stage_key
from keeptune.stages.training import make_bench
from keeptune.stages.way import BASE, Point, load_base, open_way, points, trained_facts
from keeptune.storage import file_sha256, read_json, staged_folder, storage_errors, write_json, write_jsonl

if TYPE_CHECKING:
    from torch import nn

    from keeptune.evaluation.harness import HarnessDocument, HarnessSuite
    from keeptune.evaluation.metrics import Answer
    from keeptune.model.methods import Method

_AUDIT = "audit.json"
_CODE_VERSION = 2


@dataclass(frozen=True)
class Harness:
    """The folder with the documents of every harness suite by part; "test" is the part that is reported on."""

    folder: Path
    key: str
    names: tuple[str, ...]
    include_path: Path | None

    @property
    def audit(self) -> Mapping[str, Any]:
        """What became of the documents of each suite, its metric, and what chance scores."""
        return read_json(self.folder / _AUDIT)

    @property
    def metrics(self) -> dict[str, str]:
        """The metric of each suite."""
        return {suite: facts["metric"] for suite, facts in self.audit.items()}

    def named(self, name: str) -> list[str]:
        """The suites that the recipe means by the name of a task or group."""
        return [suite for suite, facts in self.audit.items() if facts["group"] == name]

    @cached_property
    def suites(self) -> list[HarnessSuite]:
        """The harness's own tasks, loaded once a process."""
        from keeptune.evaluation.harness import load_suites

        return load_suites(self.names, include_path=self.include_path)

    @cached_property
    def ids(self) -> Mapping[tuple[str, int], str]:
        """The id of each document as the harness has it now, by its task and place."""
        from keeptune.evaluation.harness import suite_documents

        return {(d.task, d.index): d.id for suite in self.suites for d in suite_documents(suite)}

    def stored(self, part: PartName | SplitName) -> list[HarnessDocument]:
        """Read a part's documents as they were divided."""
        from keeptune.evaluation.harness import HarnessDocument

        path = self.folder / f"{part}.jsonl"
        if not path.is_file():
            return []
        with storage_errors(path), path.open(encoding="utf-8", errors="surrogatepass") as file:
            rows = [json.loads(line) for line in file]
        return [HarnessDocument(**{**row, "references": tuple(row["references"])}) for row in rows]

    def documents(self, part: PartName | SplitName, *, of: Collection[str]) -> list[HarnessDocument]:
        """Read a part's documents, those of the suites in `of`.

        Raises:
            DataError: the harness has another document in the place of one of them now.
        """
        wanted = [document for document in self.stored(part) if document.suite in of]
        changed = [d for d in wanted if self.ids.get((d.task, d.index)) != d.id]
        if changed:
            first = changed[0]
            raise DataError(
                f"{self.folder}: found {len(changed):,} documents that the harness no longer has, the first of them "
                f"{first.index} of {first.task!r}; expected those that were divided into parts. Put its data or the "
                "task file back, or choose another output_dir."
            )
        return wanted


def write_harness(run: Run, data: Data) -> Harness | None:
    """Divide the documents of the recipe's harness suites into parts in `harness/`, unless they stand there.

    None where the recipe names none. Documents that overlap with train are left out, and counted.

    Raises:
        RecipeError: the harness is not installed, or a name is no task that can be used.
        DataError: no document of a suite is left.
    """
    fields = run.recipe.retention.harness
    if not fields.tasks:
        return None
    if fields.apply_chat_template and data.base.facts.encoder_decoder:
        raise RecipeError(
            "retention.harness.apply_chat_template: found true with an encoder-decoder, which reads prompts without "
            "turns; expected false. Set retention.harness.apply_chat_template=false."
        )
    include_path = Path(fields.include_path).expanduser() if fields.include_path else None
    folder = run.folder / "harness"
    found = Harness(folder, _key(run.recipe, data, include_path=include_path), fields.tasks, include_path)
    if is_done(folder, found.key):
        run.context.progress.say(f"{folder}: written before and unchanged")
        return found
    run.context.progress.say(f"Loading {', '.join(fields.tasks)} of lm-evaluation-harness")
    parts: dict[PartName | SplitName, list[HarnessDocument]] = {}
    _refuse_taken(run.recipe, found.suites)
    audit = {suite.name: _place(run.recipe, data, suite, into=parts) for suite in found.suites}
    with staged_folder(folder, facts={"key": found.key, "seed": run.recipe.seed}) as staging:
        for part, documents in parts.items():
            write_jsonl(staging / f"{part}.jsonl", map(asdict, documents))
        write_json(staging / _AUDIT, audit)
    for suite, facts in audit.items():
        run.context.progress.say(_described(suite, facts))
    return found


def _refuse_taken(recipe: Recipe, suites: Sequence[HarnessSuite]) -> None:
    """Refuse a task of a group whose name another suite has."""
    named = Counter(suite.name for suite in suites)
    named.update(task.name for task in recipe.data.tasks)
    named.update(text.name for text in recipe.retention.texts)
    problems = [
        f"retention.harness.tasks: found {suite.name!r} of {suite.group!r} beside another suite of that name; expected "
        "each name once. Rename the other one, or name the group's tasks one by one."
        for suite in suites
        if suite.name != suite.group and named[suite.name] > 1
    ]
    if problems:
        raise_collected(RecipeError, problems)


def _key(recipe: Recipe, data: Data, *, include_path: Path | None) -> str:
    from keeptune.evaluation.harness import harness_version

    fields = recipe.retention.harness
    own: dict[str, str] = {}
    if include_path is not None and include_path.is_dir():
        with storage_errors(include_path):
            files = sorted(path for path in include_path.rglob("*") if path.suffix in (".yaml", ".py"))
        own = {path.relative_to(include_path).as_posix(): file_sha256(path) for path in files}
    return stage_key(
        data=data.key,
        tasks=list(fields.tasks),
        own=own,
        max_records=fields.max_records,
        chat=fields.apply_chat_template,
        shares={task: part_shares(recipe, task) for task in fields.tasks},
        seed=recipe.seed,
        harness=harness_version(),
        version=_CODE_VERSION,
    )


def _place(
    recipe: Recipe, data: Data, suite: HarnessSuite, *, into: dict[PartName | SplitName, list[HarnessDocument]]
) -> dict[str, Any]:
    """Add a suite's documents to the parts; return what became of them, and what they are judged by."""
    from keeptune.data.documents import place_documents
    from keeptune.evaluation.harness import suite_documents

    documents = suite_documents(suite)
    by_id = {document.id: document for document in reversed(documents)}
    # An id is a hash of its document's text: the smallest ones are as good as random ones, and need no seed.
    kept = sorted(by_id)[: recipe.retention.harness.max_records]
    dropped = Counter(exact_duplicate=len(documents) - len(by_id), max_records=len(by_id) - len(kept))
    placed = place_documents(
        [_as_text(by_id[id_]) for id_ in kept],
        train=data.records("train"),
        seed=recipe.seed,
        shares=part_shares(recipe, suite.group),
        dropped=+dropped,
        num_read=len(documents),
    )
    if not placed.parts["test"]:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in placed.dropped.items()) or "none"
        raise DataError(
            f"retention.harness.tasks: found no document of {suite.name!r} to report on ({placed.num_read:,} read; "
            f"dropped: {reasons}); expected one or more that do not overlap with train. Name another task."
        )
    for part, records in placed.parts.items():
        into.setdefault(part, []).extend(by_id[record.id] for record in records)
    choices = [by_id[record.id].num_choices for records in placed.parts.values() for record in records]
    return {
        "num_read": placed.num_read,
        "dropped": dict(placed.dropped),
        "parts": {part: len(records) for part, records in placed.parts.items() if records},
        "metric": suite.metric,
        "also": list(suite.also),
        "group": suite.group,
        "chance": sum(1.0 / number for number in choices if number) / len(choices),
        "num_shots": suite.num_shots,
    }


def _as_text(document: HarnessDocument) -> Record:
    """Return the document's input as a text, which groups and overlap with train are looked for in."""
    message = Message("assistant", document.prompt)
    return Record(document.id, document.suite, f"{document.task}[{document.index}]", (message,))


def answer_harness(
    run: Run,
    data: Data,
    model: nn.Module,
    *,
    harness: Harness,
    part: PartName | SplitName,
    suites: Collection[str],
    name: str,
    folder: Path,
    key: str,
) -> None:
    """Let a model answer a part's documents of some suites into `folder`, whole or not at all."""
    from keeptune.evaluation.evaluate import SAMPLES, SCORES
    from keeptune.evaluation.harness import ask, harness_version
    from keeptune.evaluation.metrics import answer_to_json
    from keeptune.model.load import load_tokenizer

    run.poll()
    bench = make_bench(run, data, model, max_new_tokens=max_new_tokens_on_test(run.recipe, data))
    documents = harness.documents(part, of=suites)
    tokenizer = load_tokenizer(data.base.tokenizer_folder)
    tokenizer.chat_template = data.base.template.chat_template
    chat = run.recipe.retention.harness.apply_chat_template
    answers = ask(model, harness.suites, documents, bench=bench, tokenizer=tokenizer, apply_chat_template=chat)
    prompts = stage_key(prompts=[answer.prompt for answer in answers])
    header = {
        "model": name,
        "split": part,
        "harness": harness_version(),
        "prompt_sha256": prompts,
        "num_records": len(answers),
    }
    with staged_folder(folder, facts={"key": key, "created": run.context.now()}) as staging:
        write_jsonl(staging / SAMPLES, map(answer_to_json, answers))
        write_json(staging / SCORES, {**header, "scores": list(_scores(answers, harness.audit))})


def _scores(answers: Sequence[Answer], suites: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    from keeptune.evaluation.scores import score_answers

    for suite, facts in suites.items():
        own = [answer for answer in answers if answer.task == suite]
        scores = score_answers(own, metrics=[facts["metric"], *facts["also"]])
        yield from (asdict(score) for score in scores if score.task == suite)


def ask_base(run: Run, data: Data, *, harness: Harness) -> None:
    """Let the base model answer the report part, unless it did."""
    folder = run.folder / BASE / "harness"
    key = stage_key(harness=harness.key, weights=data.base.facts.sha256, **policy_of(run.recipe).answers_key())
    if not is_done(folder, key):
        _ask(run, data, load_base(run, data), harness=harness, name=BASE, folder=folder, key=key)


def ask_all(run: Run, data: Data, methods: Sequence[Method], *, harness: Harness) -> None:
    """Let the base and each method's points answer the report part, but for those that did."""
    ask_base(run, data, harness=harness)
    answered = policy_of(run.recipe).answers_key()
    for method in methods:
        trained = trained_facts(run, method)["key"]
        given = {"trained": trained, "harness": harness.key, **answered}
        keyed = [(point, stage_key(**given, alpha=point.alpha)) for point in points(run, method)]
        waiting = [(point, key) for point, key in keyed if not is_done(point.harness, key)]
        way = open_way(run, data, method) if waiting else None
        for point, key in waiting:
            assert way is not None
            way.set_(point.alpha)
            name = f"{method.name} at alpha {point.alpha:g}"
            _ask(run, data, way.model, harness=harness, name=name, folder=point.harness, key=key)
        del way
        gc.collect()


def _ask(run: Run, data: Data, model: nn.Module, *, harness: Harness, name: str, folder: Path, key: str) -> None:
    run.context.progress.say(f"{name}: {', '.join(harness.metrics)}")
    suites = harness.metrics
    answer_harness(run, data, model, harness=harness, part="test", suites=suites, name=name, folder=folder, key=key)


def harness_answers(run: Run, point: Point | None) -> list[Answer]:
    """Read the answers of a point, or of the base, to the report part; none where the recipe names no harness task."""
    from keeptune.evaluation.evaluate import read_answers

    if not run.recipe.retention.harness.tasks:
        return []
    return read_answers(run.folder / BASE / "harness" if point is None else point.harness)


def harness_rows(
    base: Sequence[Answer], tuned: Sequence[Answer], *, harness: Harness | None
) -> Iterator[dict[str, Any]]:
    """Yield what each suite lost, a row of `forgetting.json` each; none stands among `others`."""
    from keeptune.retention.measures import measure_retention

    suites = harness.audit if harness is not None else {}
    measure = partial(measure_retention, num_suites=len(suites))
    for suite, facts in suites.items():
        before, after = ([a for a in answers if a.task == suite] for answers in (base, tuned))
        if not before:
            continue
        first, *also = (
            asdict(measure(before, after, metric=metric, least_chance=facts["chance"]).tasks[0])
            for metric in (facts["metric"], *facts["also"])
        )
        yield {"suite": first.pop("task"), **first, "kl": None, **({"also": also} if also else {})}


def _described(suite: str, facts: Mapping[str, Any]) -> str:
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in facts["dropped"].items())
    kept = ", ".join(f"{count:,} {'report' if part == 'test' else part}" for part, count in facts["parts"].items())
    chance = f", chance {facts['chance']:.3g}" if facts["chance"] else ""
    return (
        f"{suite}: {facts['num_read']:,} documents = {kept}{f', {dropped} dropped' if dropped else ''}; judged by "
        f"{facts['metric']}, higher is better{chance}"
    )
