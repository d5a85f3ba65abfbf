"""A comparison: runs, their methods and other models arrive; every pair of them on one test set leaves.

Models of runs are compared by the answers that `evaluate` left. A model of no run answers the test set of the first
run named, once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from keeptune import __version__
from keeptune.errors import DataError, raise_collected
from keeptune.stages.answering import COMPARISONS, answer_test
from keeptune.stages.entries import Answered, Entry, find_entries, read_tested
from keeptune.stages.intact import refuse_changed_files
from keeptune.stages.replicates import differ_by_seed, find_replicates, pairs_apart, replicates_to_json
from keeptune.stages.run import INSTRUCT_MODEL, SELECTION, TRAINING, Context, stage_key
from keeptune.storage import MANIFEST, read_record, storage_errors, write_atomic, write_json

VERSION = 1
_COSTS = (
    "peft_type",
    "trained_parameters",
    "total_parameters",
    "peak_memory_bytes",
    "estimated_memory_bytes",
    "train_seconds",
    "tokens_per_second",
    "artifact_bytes",
)


def compare(models: Sequence[str], *, out: Path | None, context: Context) -> Path:
    """Compare models on the test set of the first run among them; return the path of `comparison.json`.

    A model is a run folder (its base and all its trained methods), a method's folder in one, or a model folder, adapter
    folder or hub id. `out` is by default a folder of the first run. `comparison.md` stands beside the JSON.

    Raises:
        RecipeError: fewer than two models, one of them twice, none of a run, or what is no model.
        DataError: a run's model has not answered test, or models of runs answered different tests.
        StorageError: files of a run have changed since they were written.
    """
    from keeptune.evaluation.comparisons import compare_models
    from keeptune.report.comparison import markdown
    from keeptune.report.tables import read_report

    entries, notes = find_entries(models)
    run = next(entry.run for entry in entries if entry.run is not None)
    for folder in dict.fromkeys(entry.run for entry in entries if entry.run is not None):
        refuse_changed_files(folder)
    answered = _answered(entries, run=run, context=context)
    first = next(found for found in answered if found.entry.run is not None)
    main_metric = read_report(run).main_metric
    assert main_metric is not None, "scores without a metric"
    replicates = find_replicates(entries)
    scores = [score for found in answered for score in _scores(found, first=first)]
    comparisons = compare_models(
        {found.entry.name: found.answers for found in answered},
        metrics=list(first.header["metrics"]),
        main_metric=main_metric,
        untrained_tasks=first.header["untrained_tasks"],
        without_loss={found.entry.name for found in answered if found.own_tokenizer},
        apart=pairs_apart(replicates),
    )
    value = {
        "version": VERSION,
        "keeptune": __version__,
        "command": context.command,
        "test": _test_facts(answered, first=first, run=run),
        "main_metric": main_metric,
        "untrained_tasks": sorted(first.header["untrained_tasks"]),
        "metrics": [{"name": name, **facts} for name, facts in first.header["metrics"].items()],
        "models": [_model_facts(found) for found in answered],
        "scores": scores,
        "replicates": replicates_to_json(replicates, scores),
        "pairs": [comparison.to_json() for comparison in comparisons],
        "notes": [*notes, *_notes(answered, first=first)],
    }
    folder = out or run / COMPARISONS / stage_key(models=[str(entry.folder) for entry in entries])[:12]
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "comparison.json", value)
    write_atomic(folder / "comparison.md", markdown(value))
    return folder / "comparison.json"


def _answered(entries: Sequence[Entry], *, run: Path, context: Context) -> list[Answered]:
    """Return every model's answers to the test set of `run`; a model of no run answers it now, or did so before."""
    tested = read_tested([entry for entry in entries if entry.run is not None])
    _refuse_other_tests(tested)
    others = [entry for entry in entries if entry.run is None]
    if others:
        limit = max(found.limit for found in tested)
        tested += answer_test(others, run=run, first=tested[0], max_new_tokens=limit, context=context)
    by_name = {found.entry.name: found for found in tested}
    return [by_name[entry.name] for entry in entries]


def _refuse_other_tests(tested: Sequence[Answered]) -> None:
    """Refuse to set side by side what was not measured alike: other data, prompts, metrics or decoding."""
    first, longest = tested[0], max(found.limit for found in tested)
    problems = [problem for found in tested for problem in _differences(found, first=first, longest=longest)]
    if problems:
        # Models of one run were measured alike: they have their problems in common.
        raise_collected(DataError, list(dict.fromkeys(problems)))


def _differences(found: Answered, *, first: Answered, longest: int) -> Iterator[str]:
    """Yield a problem for each thing that makes the scores of `found` none on the test of `first`."""
    where, other = (tested.entry.name.rpartition("/")[0] for tested in (found, first))
    answer_it = f"Name the adapter/ or model/ folder of a method of {where}: it then answers the test set of {other}."
    evaluate_again = "in both recipes, then give `keeptune evaluate` with each."
    if found.records != first.records:
        num_shared = len(set(found.records) & set(first.records))
        if differ_by_seed(found.entry, first.entry):
            answer_it = (
                "The seed decides the split too: give each task its own validation and test files, then runs with "
                "several seeds have one test set."
            )
        yield (
            f"{where}: data: found {len(found.records):,} test records, {num_shared:,} of them among the "
            f"{len(first.records):,} of {other}; expected the same ones in the same order. {answer_it}"
        )
    elif found.header["prompt_sha256"] != first.header["prompt_sha256"]:
        yield f"{where}: template: found {_prompts(found)}; expected those of {other}, {_prompts(first)}. {answer_it}"
    mine, theirs = _signatures(found), _signatures(first)
    if mine != theirs:
        metric = next(name for name in (*theirs, *mine) if mine.get(name) != theirs.get(name))
        yield (
            f"{where}: metrics: found {mine.get(metric, 'none')} for {metric}; expected {theirs.get(metric, 'none')}, "
            f"as for {other}. Set the same evaluation.metrics {evaluate_again}"
        )
    # Greedy answers that ended under a low limit are the same under a higher one.
    if found.limit < longest and found.header["cut_fraction"] > 0:
        yield (
            f"{where}: decoding: found answers of at most {found.limit} tokens, some of them cut there; expected a "
            f"limit of {longest}, as for the others. Set the same evaluation.max_new_tokens {evaluate_again}"
        )


def _prompts(found: Answered) -> str:
    assert found.entry.run is not None, "a model of no run reads the prompts of one"
    facts = read_record(found.entry.run / "data" / MANIFEST)
    prompts, tokenizer = found.header["prompt_sha256"][:8], facts["tokenizer_sha256"][:8]
    return f"prompts {prompts} (template {facts['template']}, tokenizer {tokenizer})"


def _signatures(found: Answered) -> dict[str, str]:
    return {name: facts["signature"] for name, facts in found.header["metrics"].items()}


def _test_facts(answered: Sequence[Answered], *, first: Answered, run: Path) -> dict[str, Any]:
    return {
        "run": first.entry.name.rpartition("/")[0],
        "sha256": read_record(run / "data" / MANIFEST)["files"]["test.jsonl"]["sha256"],
        "prompt_sha256": first.header["prompt_sha256"],
        "num_records": len(first.answers),
        "num_clusters": len({answer.cluster for answer in first.answers}),
        "max_new_tokens": max(found.limit for found in answered),
    }


def _model_facts(found: Answered) -> dict[str, Any]:
    """Return where a model comes from, how it read the prompts, and what its training cost, as far as that is known."""
    path = found.entry.folder / TRAINING
    training = read_record(path) if found.entry.run is not None and path.is_file() else {}
    return {
        "name": found.entry.name,
        "argument": found.entry.argument,
        "own_tokenizer": found.own_tokenizer,
        "prompt_sha256": found.header["prompt_sha256"],
        "cut_fraction": found.header["cut_fraction"],
        **{name: training.get(name) for name in _COSTS},
    }


def _scores(found: Answered, *, first: Answered) -> list[dict[str, Any]]:
    """Return a model's scores, each with its interval; which tasks stand together is as in the first run."""
    from keeptune.evaluation.metrics import LOSS_METRICS
    from keeptune.evaluation.scores import score_answers
    from keeptune.report.scores import read_scores

    metrics = [name for name in first.header["metrics"] if not found.own_tokenizer or name not in LOSS_METRICS]
    scores = score_answers(found.answers, metrics=metrics, untrained_tasks=first.header["untrained_tasks"])
    rows = [{**asdict(score), "model": found.entry.name} for score in scores]
    return [asdict(score) for score in read_scores({"scores": rows})]


def _notes(answered: Sequence[Answered], *, first: Answered) -> Iterator[str]:
    """Yield what a reader of the tables must know of single models."""
    for found in answered:
        if found.entry.run is not None and found.entry.folder.name == INSTRUCT_MODEL:
            chosen = read_record(found.entry.run / SELECTION)
            yield f"{found.entry.name} is the delivered model: {chosen['selected']} at alpha {chosen['alpha']:g}."
        if found.own_tokenizer:
            yield (
                f"{found.entry.name} reads and writes with a tokenizer of its own: its loss per token is not "
                "comparable and left out, and the limit of an answer counts its own tokens."
            )
        elif found.header["untrained_tasks"] != first.header["untrained_tasks"]:
            yield (
                f"{found.entry.name} was trained on other tasks than the run of {first.entry.name}, which says what "
                "stands under all and under others."
            )
