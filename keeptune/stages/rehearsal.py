"""A dry run: a method and prepared data arrive; nothing leaves but the error that a run would meet after hours."""

from __future__ import annotations

import math
import tempfile
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from keeptune.errors import NonFiniteError
from keeptune.progress import Silent
from keeptune.stages.computing import policy_of
from keeptune.stages.data import Data, max_new_tokens
from keeptune.stages.mixture import train_examples
from keeptune.stages.run import Run

if TYPE_CHECKING:
    from keeptune.evaluation.evaluate import Bench, Split
    from keeptune.model.methods import Method
    from keeptune.stages.estimate import Intended

# A model of up to so many bytes is read anew, saved and loaded within seconds.
_MOST_BYTES = 300_000_000
_MOST_NEW_TOKENS = 4
_NOISE = 1e-3
_NUM_CANDIDATES = 100


def is_small(data: Data) -> bool:
    """Tell whether a dry run may read and write the model's weights."""
    return data.base.facts.weight_bytes <= _MOST_BYTES


def rehearse(run: Run, data: Data, method: Method, *, intended: Intended | None = None) -> None:
    """Take one short train record through what a run does with it, in seconds.

    A model of at most 300 MB is read anew, and goes through a training step, an answer, saving and loading, scores and
    a point on the way to the base model, in a scratch folder. Of a larger one, which `intended` has, only the gradient
    of the record and the first tokens of an answer are tried. The weights, the gradients and the random state of
    `intended` stay as they are.

    Raises:
        NonFiniteError: the record's loss is NaN or infinite.
        OutOfMemoryError: the model does not fit into memory beside `intended`.
        RecipeError: a step fails.
    """
    import torch

    device = policy_of(run.recipe).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), tempfile.TemporaryDirectory(prefix="keeptune-") as scratch:
        quiet = replace(run, folder=Path(scratch), context=replace(run.context, progress=Silent()))
        split = _short_record(data)
        if is_small(data):
            _rehearse_all(quiet, data, method, split=split)
        elif intended is not None:
            _try_step(intended, split, method=method)
            _try_answer(quiet, data, intended, split=split, method=method)


def _short_record(data: Data) -> Split:
    """Return the shortest of the first train records as a split of its own."""
    import numpy as np

    from keeptune.evaluation.evaluate import Split
    from keeptune.text.mixture import Chosen

    table, records = data.table("train"), data.records("train", at_most=_NUM_CANDIDATES)
    number = min(len(table), _NUM_CANDIDATES)
    wanted = {record.id for record in records}
    known = [i for i in range(number) if table.record_ids[i] in wanted]
    shortest = min(known, key=lambda i: (int(table.lengths[i]), i))
    return Split("train", records, Chosen(table, np.array([shortest])))


def _rehearse_all(run: Run, data: Data, method: Method, *, split: Split) -> None:
    import torch

    from keeptune.evaluation.evaluate import evaluate_model
    from keeptune.model.load import load_model
    from keeptune.model.methods import apply_method
    from keeptune.stages.training import fit_model, intend, save_method, weight_type
    from keeptune.stages.way import load_base, open_way, points

    policy, quantization = policy_of(run.recipe), data.base.facts.quantization
    dtype = weight_type(policy, method)
    base = load_model(data.base.folder, device=policy.device, dtype=dtype, quantization=quantization)
    model = apply_method(base, method, seed=run.recipe.seed)
    fit = fit_model(model, data=data, device=policy.device, autocast=policy.compute)
    intended = intend(run.recipe, data, method, model=model, fit=fit, table=train_examples(run.recipe, data))
    _try_step(intended, split, method=method)
    with torch.no_grad():
        for parameter in intended.work().parameters.values():
            parameter.add_(_NOISE * torch.randn_like(parameter))
    _try_answer(run, data, intended, split=split, method=method)
    with _trying(method, "saving the model and loading it again"):
        save_method(run, data, method, model=model, key="")
    if len(points(run, method)) > 1:
        with _trying(method, "setting the model halfway to the base model"):
            open_way(run, data, method).set_(0.5)
    with _trying(method, "scoring an answer against the base model's"):
        evaluate_model(
            model,
            split=split,
            bench=_short_bench(run, data, intended),
            metrics=run.recipe.evaluation.metrics,
            name=method.name,
            shots=0,
            folder=run.folder / "answers",
            facts={},
            base=load_base(run, data),
        )


def _try_step(intended: Intended, split: Split, *, method: Method) -> None:
    """Compute the loss of the record and its gradient as a training step does."""
    from keeptune.model.modes import gradient_checkpointing, training
    from keeptune.training.step import clear_gradients, compute_loss

    work, checkpointing = intended.work(), intended.settings.gradient_checkpointing
    with _trying(method, "a training step"):
        batch = intended.fit.collate([split.examples[0]])
        with training(work.model), gradient_checkpointing(work.model, enabled=checkpointing):
            loss = compute_loss(work, work.model, batch)
            (loss / max(1, batch.num_targets)).backward()
        clear_gradients(work)
    if not math.isfinite(loss.item()):
        raise NonFiniteError(
            f"methods.{method.name}: found a loss of {loss.item()} on record {split.examples.record_ids[0]} before any "
            "training; expected a finite one. The model's weights are broken or overflow: choose another model."
        )


def _try_answer(run: Run, data: Data, intended: Intended, *, split: Split, method: Method) -> None:
    from keeptune.evaluation.generate import generate

    bench = _short_bench(run, data, intended)
    prompt = split.examples[0].prompt_ids.tolist()
    with _trying(method, "an answer"):
        generate(
            intended.model,
            [prompt],
            decoding=bench.decoding,
            progress=bench.progress,
            stop_requested=bench.stop_requested,
        )


def _short_bench(run: Run, data: Data, intended: Intended) -> Bench:
    """Return the run's way to answer, cut after the first tokens."""
    from keeptune.stages.training import make_bench

    limit = max_new_tokens(run.recipe, data)
    bench = make_bench(run, data, intended.model, fit=intended.fit, max_new_tokens=limit)
    return replace(bench, decoding=replace(bench.decoding, max_new_tokens=min(limit, _MOST_NEW_TOKENS)))


def _trying(method: Method, step: str) -> AbstractContextManager[None]:
    """Turn what libraries raise inside the block into a `RecipeError` that names the step."""
    from keeptune.model.load import library_errors

    return library_errors(
        lambda reason: (
            f"methods.{method.name}: found that {step} fails in a trial with one record ({reason}); expected it to "
            "work. Choose another method or model, or another version of transformers and PEFT."
        )
    )
