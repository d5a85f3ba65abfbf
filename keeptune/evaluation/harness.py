"""lm-evaluation-harness: names of its tasks arrive; their documents, and a model's answers to some of them, leave.

The only module that knows the harness. It is imported when a recipe names a task: that takes seconds.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from keeptune.data.clean import prompt_key
from keeptune.data.record import Message, Record
from keeptune.errors import RecipeError, import_extra, stopped
from keeptune.evaluation.evaluate import Bench
from keeptune.evaluation.generate import beside_virtual_tokens, forbids_padding, plainly_greedy
from keeptune.evaluation.harness_values import LABEL_AGGREGATIONS, values_of
from keeptune.evaluation.metrics import DIVERGENCE, LABEL_METRICS, LOSS_METRICS, METRICS, Answer
from keeptune.evaluation.squad import importable_squad_metrics
from keeptune.model.attention import base_of
from keeptune.model.memory import memory_errors
from keeptune.model.modes import evaluating

_KEY = "retention.harness.tasks"
# As the harness's own command line draws solved examples.
_FEWSHOT_SEED = 1234
# The harness takes the logits of every position; of this many numbers at most, 2 GB in fp32.
_MOST_LOGITS = 1 << 29
_NO_LIMIT_TOKENS = 2048
# Under these names keeptune has metrics of its own that are no means of values between 0 and 1.
_OWN_NAMES = frozenset(
    {*LOSS_METRICS, DIVERGENCE, *LABEL_METRICS, *(name for name, metric in METRICS.items() if metric.scale > 1.0)}
)


@dataclass(frozen=True, slots=True)
class HarnessSuite:
    """A task of the harness, or the tasks of a group, each document counting alike.

    `metric` is the first in the task's own list that keeptune can measure, `also` are the further ones. `tasks` are the
    harness's objects by their names; `num_shots` are the solved examples that each puts before a document. `group` is
    the name that was asked for: the suite's own, or that of a group whose tasks are judged by different metrics.
    """

    name: str
    tasks: Mapping[str, Any]
    metric: str
    also: tuple[str, ...]
    group: str

    @property
    def num_shots(self) -> dict[str, int]:
        """The solved examples in each task's prompts."""
        return {name: task.get_config("num_fewshot") or 0 for name, task in self.tasks.items()}


@dataclass(frozen=True, slots=True)
class HarnessDocument:
    """One document of a suite: the `index`-th of `task`. `id` depends on its text alone.

    `prompt` is its own text, without solved examples; `num_choices` is None where it offers none.
    """

    id: str
    suite: str
    task: str
    index: int
    prompt: str
    references: tuple[str, ...]
    num_choices: int | None

    @property
    def cluster(self) -> str:
        """The same for documents with the same input."""
        return prompt_key(Record(self.id, self.suite, "", (Message("user", self.prompt), Message("assistant", ""))))


def harness_version() -> str:
    """Return the harness's version.

    Raises:
        RecipeError: it is not installed.
    """
    import_extra("lm_eval", extra="harness")
    return metadata.version("lm-eval")


def load_suites(names: Sequence[str], *, include_path: Path | None) -> list[HarnessSuite]:
    """Return the named tasks and groups of the harness, and of the task files in `include_path`, with their documents.

    A group whose tasks are judged by different metrics is a suite for each of its tasks.

    Raises:
        RecipeError: the harness is not installed, a name is unknown, or a task cannot be loaded or has no metric that
            is known for each document.
    """
    import_extra("lm_eval", extra="harness")
    if include_path is not None and not include_path.is_dir():
        raise RecipeError(
            f"retention.harness.include_path: found no folder {str(include_path)!r}; expected one with task files "
            "(.yaml) of the harness. Fix the path, or remove it."
        )
    with _silent():
        manager = _manager(names, include_path=include_path)
        unknown = [name for name in names if name not in manager.task_index]
        if unknown:
            _refuse_unknown(unknown, known=manager.all_tasks)
        return [suite for name in names for suite in _suites(name, manager)]


def _manager(names: Sequence[str], *, include_path: Path | None) -> Any:
    """Return the index of tasks; that of the harness's own 14,000 takes a while, and is read where it is needed."""
    tasks = import_extra("lm_eval.tasks", extra="harness")
    if include_path is not None:
        own = tasks.TaskManager(include_path=str(include_path), include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    return tasks.TaskManager(include_path=str(include_path) if include_path is not None else None)


def _refuse_unknown(names: Sequence[str], *, known: Sequence[str]) -> None:
    for name in names:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        remedy = f"Did you mean {near[0]!r}?" if near else "Name the folder of its file in retention.harness."
        raise RecipeError(
            f"{_KEY}: found {name!r}; expected a task or group of lm-evaluation-harness {harness_version()} or of "
            f"include_path. {remedy}"
        )


def _suites(name: str, manager: Any) -> list[HarnessSuite]:
    try:
        with importable_squad_metrics():
            tasks = manager.load([name])["tasks"]
    except Exception as error:
        # A task runs code and reads data of others: it can fail in any way.
        raise RecipeError(
            f"{_KEY}: found {name!r}, which the harness cannot load ({type(error).__name__}: {_first_line(error)}); "
            "expected its task file and its data to be at hand. Fix the file, fetch the data, or leave the task out."
        ) from error
    metrics = {task: _metrics(task, loaded) for task, loaded in tasks.items()}
    if len({first for first, *_ in metrics.values()}) == 1:
        first = next(iter(metrics.values()))[0]
        shared = [m for m in next(iter(metrics.values()))[1:] if all(m in of for of in metrics.values())]
        return [HarnessSuite(name, tasks, first, tuple(shared), name)]
    return [
        HarnessSuite(task, {task: tasks[task]}, first, tuple(also), name) for task, (first, *also) in metrics.items()
    ]


def _metrics(name: str, task: Any) -> list[str]:
    """Return a task's metrics that two models can be compared in document by document, in its own order.

    They are better where they are higher, and are means over documents, or MCC and F1 of labels.
    """
    if getattr(task, "MULTIMODAL", False) or getattr(task, "UNSAFE_CODE", False):
        found = "pictures or sound in its prompts" if getattr(task, "MULTIMODAL", False) else "answers that are run"
        raise RecipeError(f"{_KEY}: found {name!r}, a task with {found}; expected text alone. Leave it out.")
    aggregation_of = import_extra("lm_eval.api.registry", extra="harness").get_aggregation
    mean = aggregation_of("mean")
    of_labels: dict[Any, str] = {aggregation_of(a): own for a, own in LABEL_AGGREGATIONS.items()}
    directions = task.higher_is_better()
    listed: dict[str, Any] = task.aggregation()
    labelled = task.OUTPUT_TYPE == "multiple_choice"
    found = [
        of_labels.get(aggregation, metric)
        for metric, aggregation in listed.items()
        if directions.get(metric)
        and ((aggregation is mean and metric not in _OWN_NAMES) or (labelled and aggregation in of_labels))
    ]
    if not found:
        raise RecipeError(
            f"{_KEY}: found {name!r}, whose metrics are {', '.join(listed) or 'none'}; expected one that is a mean "
            "over documents, MCC or F1 of labels, and better where it is higher, such as acc or exact_match. Name "
            "another task; texts that have a loss alone belong under retention.texts."
        )
    return found


def suite_documents(suite: HarnessSuite) -> list[HarnessDocument]:
    """Return every document that the harness evaluates of a suite, in its order.

    Raises:
        RecipeError: a task file makes no prompt of a document.
    """
    with _silent():
        return [
            _document(suite.name, task, document, place=(name, index))
            for name, task in suite.tasks.items()
            for index, document in enumerate(task.eval_docs)
        ]


def _document(suite: str, task: Any, document: Any, *, place: tuple[str, int]) -> HarnessDocument:
    try:
        question, references, choices = _texts(task, document)
    except Exception as error:
        raise RecipeError(
            f"{_KEY}: found document {place[1]} of {place[0]!r}, of which its task file makes no prompt "
            f"({type(error).__name__}: {_first_line(error)}); expected one. Fix the task file."
        ) from error
    content = json.dumps([suite, question, references, choices], ensure_ascii=False)
    id_ = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return HarnessDocument(id_, suite, *place, question, references, len(choices) or None)


def _texts(task: Any, document: Any) -> tuple[str, tuple[str, ...], list[str]]:
    """Return a document's question, its right answers and the choices that it offers."""
    question, target, choices = task.doc_to_text(document), task.doc_to_target(document), _choices(task, document)
    if not isinstance(question, str):
        # Where the choices are inputs before one ending (winogrande), the question is the right one's number.
        question, target = "\n".join([*choices, str(target)]), question
    targets = target if isinstance(target, list) else [target]
    return question, tuple(choices[t] if isinstance(t, int) and choices else str(t) for t in targets), choices


def _choices(task: Any, document: Any) -> list[str]:
    offered = task.OUTPUT_TYPE == "multiple_choice" and hasattr(task, "doc_to_choice")
    return [str(choice) for choice in task.doc_to_choice(document)] if offered else []


def ask(
    model: nn.Module,
    suites: Sequence[HarnessSuite],
    documents: Sequence[HarnessDocument],
    *,
    bench: Bench,
    tokenizer: Any,
    apply_chat_template: bool = False,
) -> list[Answer]:
    """Return a model's answers to the documents, in their order, each with its value of its suite's metric.

    Solved examples are drawn anew from one seed, so that every model that is asked the same documents reads the same
    prompts. `tokenizer` is the one of transformers, whose chat template is put around them where that is asked for.

    Raises:
        DataError: a document's value is no number between 0 and 1.
        OutOfMemoryError: a batch does not fit.
        Interrupted: a stop was asked for.
    """
    evaluate = import_extra("lm_eval", extra="harness").evaluate
    huggingface = import_extra("lm_eval.models.huggingface", extra="harness")
    indices: dict[str, set[int]] = {}
    for document in documents:
        indices.setdefault(document.task, set()).add(document.index)
    # The harness numbers its results by their order in its data, so that samples must rise, each one once: a task may
    # stand in two suites.
    wanted = {task: sorted(found) for task, found in indices.items()}
    tasks = {name: task for suite in suites for name, task in suite.tasks.items() if name in wanted}
    for task in tasks.values():
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    too_large = "evaluation.tokens_per_batch: found too little memory for harness prompts; expected room. Lower it."
    with _silent(), evaluating(model), plainly_greedy(model, bench.decoding), memory_errors(too_large):
        asked = huggingface.HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            backend="seq2seq" if bench.decoding.encoder_decoder else "causal",
            max_length=beside_virtual_tokens(model, bench.decoding).max_positions or _NO_LIMIT_TOKENS,
            mixed_precision_dtype=bench.autocast,
            softmax_dtype=torch.float32,
        )
        _report_work(asked, bench)
        try:
            found = evaluate(
                asked,
                {"tasks": tasks, "groups": {}, "group_map": {}},
                samples=wanted,
                bootstrap_iters=0,
                apply_chat_template=apply_chat_template,
            )
        finally:
            bench.progress.finish()
    metrics = {suite.name: (suite.metric, *suite.also) for suite in suites}
    samples: dict[tuple[str, int], Mapping[str, Any]] = {}
    assert found is not None, "the harness ran in another process than the first"
    for name, rows in found["samples"].items():
        for row in rows:
            # A task with several filters has a row of each; the first is the one that it puts first.
            samples.setdefault((name, row["doc_id"]), row)
    return [
        _answer(document, samples[document.task, document.index], metrics=metrics[document.suite], task=tasks)
        for document in documents
    ]


def _answer(
    document: HarnessDocument, sample: Mapping[str, Any], *, metrics: Sequence[str], task: Mapping[str, Any]
) -> Answer:
    where = f"{_KEY}: document {document.index} of {document.task!r}"
    values = values_of(sample, metrics=metrics, where=where)
    return Answer(
        id=document.id,
        task=document.suite,
        cluster=document.cluster,
        prompt=str(sample["arguments"][0][0]),
        prediction=_prediction(sample, task[document.task]),
        references=document.references,
        ended=True,
        metrics=values,
        num_target_tokens=0,
    )


def _prediction(sample: Mapping[str, Any], task: Any) -> str:
    """Return the answer as text: what was written, or the choice of the highest likelihood."""
    answers = sample["filtered_resps"]
    choices = _choices(task, sample["doc"])
    if choices:
        likelihoods = [answer[0] for answer in answers[: len(choices)]]
        return choices[likelihoods.index(max(likelihoods))]
    return str(answers[0])


def _report_work(asked: Any, bench: Bench) -> None:
    """Let the harness's model size its batches by tokens, tell of its work, and stop where that is asked for."""
    progress = bench.progress
    vocab_size = base_of(asked.model).config.get_text_config().vocab_size
    num_left = [0]

    def listening(method: Callable[..., Any]) -> Callable[..., Any]:
        def listened(requests: Sequence[Any], **_: Any) -> Any:
            longest = max(len(asked.tok_encode("".join(a for a in r.args if isinstance(a, str)))) for r in requests)
            tokens = min(bench.decoding.tokens_per_batch, _MOST_LOGITS // vocab_size)
            alone = bench.losses_alone or bench.decoding.side_by_side != "padded" or forbids_padding(asked.model)
            asked.batch_size_per_gpu = 1 if alone else max(1, tokens // max(1, longest))
            num_left[0] = len(requests)
            progress.start("Harness", total=len(requests), unit="requests")
            found = method(requests, disable_tqdm=True)
            # Choices of one token share a forward pass.
            progress.advance(num_left[0])
            progress.finish()
            return found

        return listened

    def polled(method: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **named: Any) -> Any:
            if bench.stop_requested():
                raise stopped("answers to harness tasks")
            found = method(*arguments, **named)
            num_done = min(len(arguments[0] if arguments else named["context"]), num_left[0])
            num_left[0] -= num_done
            progress.advance(num_done)
            return found

        return step

    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(asked, name, listening(getattr(asked, name)))
    asked._model_call = polled(asked._model_call)
    asked._model_generate = polled(asked._model_generate)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep the harness's log, warnings and progress bars off the terminal; what it says is raised here instead."""
    from tqdm import tqdm

    begin = tqdm.__init__
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]

    def hidden(bar: Any, *arguments: Any, **named: Any) -> None:
        begin(bar, *arguments, **{**named, "disable": True})

    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    tqdm.__init__ = hidden  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        tqdm.__init__ = begin
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
