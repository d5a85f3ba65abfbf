"""A model and a split's records arrive; `samples.jsonl` and `scores.json` leave, or one value for the training loop."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from keeptune.data.clean import prompt_key
from keeptune.data.record import ALL_TASKS, PartName, Record, SplitName
from keeptune.errors import NonFiniteError, stopped
from keeptune.evaluation.generate import Decoding, Generated, generate
from keeptune.evaluation.metrics import (
    DIVERGENCE,
    LOSS_METRICS,
    METRICS,
    Answer,
    answer_from_json,
    answer_to_json,
    measure,
    with_loss,
)
from keeptune.evaluation.scores import Score, score_answers
from keeptune.model.memory import memory_errors
from keeptune.model.modes import evaluating
from keeptune.progress import Progress
from keeptune.storage import staged_folder, storage_errors, write_json, write_jsonl
from keeptune.text.batches import NOT_TRAINED, Batch
from keeptune.text.template import Template
from keeptune.text.tokens import Example
from keeptune.training.plan import Examples

SAMPLES = "samples.jsonl"
SCORES = "scores.json"


@dataclass(frozen=True, slots=True)
class Split:
    """The records of a split and their tokens; `num_left_out` further ones were dropped by the length policy.

    The tasks in `untrained_tasks` are scored only; no model of the run is trained or chosen on them.
    """

    name: SplitName | PartName
    records: Sequence[Record]
    examples: Examples
    num_left_out: int = 0
    untrained_tasks: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Exemplars:
    """The solved examples before the prompts of a split, and how many of them fitted.

    `row` names the answers among the base model's, `draw` the choice: a number, or "nearest". `ids` are a task's, where
    one choice serves all of its records; `shown` are those before each record's prompt, by the record's id.
    `num_fitted` records show fewer than were asked for, `num_without_exemplars` of them none, `num_refused` of those
    because the template does not write them.
    """

    row: str
    draw: int | Literal["nearest"]
    ids: Mapping[str, Sequence[str]]
    shown: Mapping[str, Sequence[str]]
    num_fitted: int
    num_without_exemplars: int
    num_refused: int
    num_shown_mean: float
    own_prompt_tokens_mean: float

    def header(self) -> dict[str, Any]:
        """Return what `scores.json` says of them; what each prompt shows stands in `samples.jsonl`."""
        apart = ("row", "draw", "ids", "shown")
        counts = {name: getattr(self, name) for name in self.__slots__ if name not in apart}
        return {"row": self.row, "exemplars": {"draw": self.draw, "ids": self.ids}, **counts}


@dataclass(frozen=True, slots=True)
class Bench:
    """What all evaluations of a run share.

    `template` tells the answer from the thoughts before it, and writes references that are tool calls.
    `collate` makes the batches that `target_losses` returns each target's cross-entropy of: (N,), in nats, row by row;
    `pair_divergences` returns KL(base || model) there, given the model and the base. `losses_alone`: each batch holds
    one record, because the model's loss on a record depends on those beside it.
    """

    template: Template
    decoding: Decoding
    collate: Callable[[Sequence[Example]], Batch]
    target_losses: Callable[[nn.Module, Batch], Tensor]
    pair_divergences: Callable[[nn.Module, nn.Module, Batch], Tensor]
    autocast: torch.dtype | None
    progress: Progress
    stop_requested: Callable[[], bool]
    losses_alone: bool = False


def evaluate_model(
    model: nn.Module,
    *,
    split: Split,
    bench: Bench,
    metrics: Sequence[str],
    name: str,
    shots: int,
    folder: Path,
    facts: Mapping[str, Any],
    exemplars: Exemplars | None = None,
    base: nn.Module | None = None,
) -> list[Score]:
    """Let `model` answer every prompt of the split and write answers and scores to `folder`, whole or not at all.

    `name`, `shots` and `exemplars` say in the scores which model under which prompts this is; `facts` go into the
    manifest. Loss and perplexity of the reference completions are always among the metrics, and where `base` is given
    the divergence from it.

    Raises:
        NonFiniteError: a record's loss is NaN or infinite.
        OutOfMemoryError: half a batch does not fit either.
        Interrupted: a stop was asked for.
        StorageError: the disk refuses.
    """
    names = with_loss(metrics)
    positions = list(range(len(split.examples)))
    answers = _answers(model, split, positions, bench=bench, metrics=names)
    if base is not None:
        names = (*names, DIVERGENCE)
        answers = _with_divergence(answers, model, split, bench=bench, base=base)
    scores = score_answers(answers, metrics=names, untrained_tasks=split.untrained_tasks)
    with staged_folder(folder, facts=facts) as staging:
        write_jsonl(staging / SAMPLES, (_sample(answer, exemplars) for answer in answers))
        header = {
            "model": name,
            "shots": shots,
            "split": split.name,
            "prompt_sha256": _prompts_sha256(split.examples),
            "prompt_tokens_mean": prompt_tokens_mean(split.examples),
            "decoding": {"strategy": "greedy", **asdict(bench.decoding)},
            "num_records": len(answers),
            "num_left_out": split.num_left_out,
            "untrained_tasks": sorted(split.untrained_tasks),
            "cut_fraction": sum(not answer.ended for answer in answers) / max(1, len(answers)),
            "metrics": _described(names, answers),
            **(exemplars.header() if exemplars else {}),
        }
        rows = [{"model": name, "shots": shots, **asdict(score)} for score in scores]
        write_json(staging / SCORES, {**header, "scores": rows})
    return scores


def validation_value(model: nn.Module, *, split: Split, bench: Bench, metric: str, num_records: int) -> float:
    """Return one metric over the records of `validation_scores`, all together.

    Raises:
        the same as `validation_scores`.
    """
    scores = validation_scores(model, split=split, bench=bench, metric=metric, num_records=num_records)
    return next(score.mean for score in scores if score.task == ALL_TASKS)


def validation_scores(model: nn.Module, *, split: Split, bench: Bench, metric: str, num_records: int) -> list[Score]:
    """Return one metric over at most `num_records` records of the split, chosen by their ids' hashes, by task.

    Raises:
        NonFiniteError: a record's loss is NaN or infinite.
        OutOfMemoryError: half a batch does not fit either.
        Interrupted: a stop was asked for.
    """
    ids = split.examples.record_ids
    assert len(ids), f"no example in the {split.name} split"
    positions = validation_positions(ids, num_records=num_records)
    names = LOSS_METRICS if metric in LOSS_METRICS else (metric,)
    answers = _answers(model, split, positions, bench=bench, metrics=names)
    return score_answers(answers, metrics=(metric,))


def validation_positions(ids: Sequence[str], *, num_records: int) -> list[int]:
    """Return the positions of the records that `validation_value` is taken over."""
    # An id is a hash of its record's content: its order is as good as a random one, and needs no seed.
    return sorted(range(len(ids)), key=lambda i: (ids[i], i))[:num_records]


def read_answers(folder: Path) -> list[Answer]:
    """Return the answers that `evaluate_model` wrote to `folder`.

    Raises:
        StorageError: there are none.
        DataError: a line was edited.
    """
    path = folder / SAMPLES
    with storage_errors(path), path.open(encoding="utf-8", errors="surrogatepass") as file:
        return [answer_from_json(line, where=f"{path}:{i}") for i, line in enumerate(file, 1)]


def prompt_tokens_mean(examples: Examples) -> float:
    """Return the mean tokens of a prompt, 0 where there is none."""
    return sum(len(examples[i].prompt_ids) for i in range(len(examples))) / max(1, len(examples))


def _sample(answer: Answer, exemplars: Exemplars | None) -> dict[str, Any]:
    line = answer_to_json(answer)
    return line if exemplars is None else {**line, "exemplars": list(exemplars.shown[answer.id])}


def _answers(
    model: nn.Module, split: Split, positions: Sequence[int], *, bench: Bench, metrics: Sequence[str]
) -> list[Answer]:
    """Return the answers to the examples at `positions`, decoded and scored only as far as `metrics` need it."""
    examples = [_last_completion(split.examples[i]) for i in positions]
    ids = [split.examples.record_ids[i] for i in positions]
    wanted = set(ids)
    by_id = {record.id: record for record in split.records if record.id in wanted}
    losses = [_Loss(0.0, 0)] * len(ids)
    generated = [Generated([], ended=True)] * len(ids)
    with _computing(model, bench):
        if set(metrics) & set(LOSS_METRICS):
            losses = _losses(model, examples, ids=ids, bench=bench)
        if set(metrics) - set(LOSS_METRICS):
            generated = generate(
                model,
                [example.prompt_ids.tolist() for example in examples],
                decoding=bench.decoding,
                progress=bench.progress,
                stop_requested=bench.stop_requested,
            )
    predictions = bench.template.answers([answer.ids for answer in generated])
    return [
        _answer(
            by_id[id_],
            prediction,
            reference=_reference(by_id[id_], template=bench.template),
            ended=answer.ended,
            loss=loss,
            metrics=metrics,
        )
        for id_, prediction, answer, loss in zip(ids, predictions, generated, losses, strict=True)
    ]


def _with_divergence(
    answers: Sequence[Answer], model: nn.Module, split: Split, *, bench: Bench, base: nn.Module
) -> list[Answer]:
    """Return the answers, each with KL(base || model) over its reference completion in nats per target token."""
    examples = [_last_completion(split.examples[i]) for i in range(len(split.examples))]
    with _computing(model, bench):
        found = _losses(
            model,
            examples,
            ids=split.examples.record_ids,
            bench=bench,
            per_target=lambda tuned, batch: bench.pair_divergences(tuned, base, batch),
        )
    return [
        replace(answer, metrics={**answer.metrics, DIVERGENCE: loss.nats / max(1, loss.num_targets)})
        for answer, loss in zip(answers, found, strict=True)
    ]


def _reference(record: Record, *, template: Template) -> str:
    """Return what an answer is compared with: the completion, or the tool calls as the template writes them."""
    if not record.messages[-1].tool_calls:
        return record.completion
    return template.reference(record.messages, tools=record.tools)


def _answer(
    record: Record, prediction: str, *, reference: str, ended: bool, loss: _Loss, metrics: Sequence[str]
) -> Answer:
    references = (reference,)
    mean_loss = loss.nats / max(1, loss.num_targets)
    return Answer(
        id=record.id,
        task=record.task,
        # A text without a prompt is like no other: its prompt's key would be that of all of them.
        cluster=prompt_key(record) if record.prompt else record.id,
        prompt=record.prompt,
        prediction=prediction,
        references=references,
        ended=ended,
        metrics=measure(prediction, references, loss=mean_loss, names=metrics),
        num_target_tokens=loss.num_targets,
    )


@dataclass(frozen=True, slots=True)
class _Loss:
    """The summed cross-entropy of one reference completion over its target tokens."""

    nats: float
    num_targets: int


def _losses(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    ids: Sequence[str],
    bench: Bench,
    per_target: Callable[[nn.Module, Batch], Tensor] | None = None,
) -> list[_Loss]:
    """Return each example's loss, or the sum of what `per_target` returns; batches hold examples of like length."""
    per_target = per_target or bench.target_losses
    losses: dict[int, _Loss] = {}
    too_large = (
        f"evaluation.tokens_per_batch: found no memory for the loss of {bench.decoding.tokens_per_batch} tokens; "
        "expected them to fit. Lower evaluation.tokens_per_batch."
    )
    bench.progress.start("Losses", total=len(examples), unit="records")
    try:
        most = 0 if bench.losses_alone else bench.decoding.tokens_per_batch
        for positions in _by_length([len(example.input_ids) for example in examples], most):
            if bench.stop_requested():
                raise stopped("losses")
            batch = bench.collate([examples[i] for i in positions])
            with evaluating(model), memory_errors(too_large):
                nats = per_target(model, batch).cpu().double().numpy()
            losses.update(zip(positions, _split_by_example(nats, batch), strict=True))
            bench.progress.advance(len(positions))
    finally:
        bench.progress.finish()
    broken = [i for i, loss in losses.items() if not math.isfinite(loss.nats)]
    if broken:
        first = min(broken)
        raise NonFiniteError(
            f"record {ids[first]}: found a loss of {losses[first].nats} on its completion, and so on {len(broken)} of "
            f"{len(ids)} records; expected finite ones. The weights are broken: train with a lower learning_rate."
        )
    return [losses[i] for i in range(len(examples))]


def _split_by_example(nats_N: np.ndarray, batch: Batch) -> list[_Loss]:
    """Return the sums over each example's targets; targets come in the order of the batch, row by row."""
    trained = batch.labels != NOT_TRAINED
    rows = np.split(trained, np.cumsum(batch.lengths)[:-1]) if batch.packed else list(trained)
    num_targets = [int(np.count_nonzero(row)) for row in rows]
    assert sum(num_targets) == len(nats_N), "the loss has other targets than the batch"
    parts = np.split(nats_N, np.cumsum(num_targets)[:-1])
    return [_Loss(float(part.sum()), count) for part, count in zip(parts, num_targets, strict=True)]


def _by_length(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Return positions in batches, longest first; a batch fits the budget even where it is padded, or holds one."""
    batches: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens_per_batch:
            batches[-1].append(position)
        else:
            batches.append([position])
    return batches


def _last_completion(example: Example) -> Example:
    """Return the example with its last completion alone trained on: that is what an answer is compared with."""
    loss_mask = np.arange(len(example.input_ids)) >= len(example.prompt_ids)
    return Example(example.input_ids, loss_mask)


@contextlib.contextmanager
def _computing(model: nn.Module, bench: Bench) -> Iterator[None]:
    if bench.autocast is None:
        yield
        return
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype=bench.autocast):
        yield


def _described(names: Sequence[str], answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    counts = {len(answer.references) for answer in answers}
    num_references = counts.pop() if len(counts) == 1 else -1
    return {
        name: {
            "signature": METRICS[name].signature(num_references),
            "higher_is_better": METRICS[name].higher_is_better,
        }
        for name in names
    }


def _prompts_sha256(examples: Examples) -> str:
    """Return the hash of every prompt's ids, in order: equal hashes mean that two models read the same prompts."""
    digest = hashlib.sha256()
    for i in range(len(examples)):
        prompt = examples[i].prompt_ids
        digest.update(len(prompt).to_bytes(8, "little") + prompt.astype("<i4").tobytes())
    return digest.hexdigest()
