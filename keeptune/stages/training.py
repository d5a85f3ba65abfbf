"""Training: a prepared run arrives; each method's folder with its log, checkpoints and artifact leaves."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keeptune.config import Recipe
from keeptune.errors import RecipeError
from keeptune.progress import UNCHANGED
from keeptune.stages.asking import ask
from keeptune.stages.computing import policy_of
from keeptune.stages.data import Data, evaluation_split, max_new_tokens, prepare
from keeptune.stages.estimate import Intended, estimate, make_decoding
from keeptune.stages.keep import KeepTexts, Kept, keep, make_drift_meter, own_facts, require_texts
from keeptune.stages.methods import check_methods, method_of
from keeptune.stages.mixture import mixture_facts, mixture_key, task_scores, tokens_per_step, train_examples
from keeptune.stages.rehearsal import rehearse
from keeptune.stages.run import EVENTS, TRAINING, Run, begun_methods, intact_record, is_done, note_facts, stage_key
from keeptune.storage import MANIFEST, file_sha256, read_record, write_record

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from keeptune.evaluation.evaluate import Bench
    from keeptune.evaluation.generate import SideBySide
    from keeptune.model.device import Policy
    from keeptune.model.methods import Method, ParameterCounts
    from keeptune.text.batches import Batch, Layout
    from keeptune.text.tokens import Example, Examples
    from keeptune.training.settings import TrainingResult, TrainingSettings

TOO_LITTLE_MEMORY = "found too little memory; expected room for the model twice. Choose a smaller one."
# What a micro-batch is, in a person's words.
_LAYOUTS = {
    "packed": "whole records packed one behind the other",
    "padded": "records padded to the longest beside them",
    "pairs": "pairs of prompt and completion, padded to the longest beside them",
    "single": "one record each, because this model's loss on a record depends on the records beside it",
}
_ANSWERS = {
    "equal": "prompts of one length are answered together, because padding before a prompt changes this model's answer",
    "single": "prompts are answered one at a time, because the prompts beside one change this model's answer",
}


@dataclass(frozen=True, slots=True)
class Fit:
    """How a model's batches are laid out and computed on its device; both losses are in nats, `batch_loss` summed.

    `through_logits` says that they take the model's own logits.
    """

    layout: Layout
    collate: Callable[[Sequence[Example]], Batch]
    batch_loss: Callable[..., Tensor]
    target_losses: Callable[[nn.Module, Batch], Tensor]
    pair_divergences: Callable[[nn.Module, nn.Module, Batch], Tensor]
    device: torch.device
    autocast: torch.dtype | None
    through_logits: bool
    side_by_side: SideBySide


def train(
    run: Run,
    *,
    data: Data | None = None,
    methods: Sequence[str] | None = None,
    texts: KeepTexts | None = None,
    dry_run: bool = True,
) -> list[Path]:
    """Train the methods (default: all) of the recipe, each from the base model; return their folders.

    `data` is what `prepare` returned for this run; without it, data are prepared here. `texts` are what methods replay,
    and what the drift of each is measured on. With `dry_run`, one record first goes through all that a method's run
    does with it, unless its training has begun.

    Raises:
        RecipeError: a method is not in the recipe, does not fit the model, or replays texts where there are none.
    """
    chosen = list(methods or run.recipe.methods)
    for name in chosen:
        if name not in run.recipe.methods:
            raise RecipeError(
                f"--method {name}: found no such method in the recipe; expected one of "
                f"{', '.join(run.recipe.methods)}. Add it under methods."
            )
    from keeptune.model.memory import memory_errors

    check_methods(run.recipe, prepared=data is not None)
    require_texts(run, chosen, texts=texts)
    data = data or prepare(run)
    folders = []
    for name in chosen:
        with memory_errors(f"methods.{name}: {TOO_LITTLE_MEMORY}"):
            folders.append(_train_method(run, data, method_of(run.recipe, name), texts=texts, dry_run=dry_run))
            gc.collect()
    return folders


def artifact_folder(folder: Path, method: Method) -> Path:
    """Return where a method's artifact stands: `model/` for full fine-tuning, else `adapter/`."""
    return folder / ("model" if method.peft_type is None else "adapter")


def fit_model(
    model: nn.Module, *, data: Data, device: torch.device, autocast: torch.dtype | None, has_weights: bool = True
) -> Fit:
    """Choose layout and loss such that a record's loss and answer are those that it has alone.

    They are tried as they will be computed, under `autocast`. A model without weights cannot be tried: it is taken for
    exact.

    Raises:
        NonFiniteError: the loss of a random record is NaN or infinite.
        RecipeError: the model sees the tokens that it is to predict, or fails on a record.
    """
    from keeptune.model.device import autocasting
    from keeptune.model.divergence import pair_divergences
    from keeptune.model.loss import batch_loss, target_losses

    with autocasting(device, autocast):
        layout, through_logits, side_by_side = _batching(model, data=data, has_weights=has_weights)
    return Fit(
        layout=layout,
        collate=_collate(layout, data=data),
        batch_loss=partial(batch_loss, through_logits=through_logits),
        target_losses=partial(target_losses, through_logits=through_logits),
        pair_divergences=partial(pair_divergences, through_logits=through_logits),
        device=device,
        autocast=autocast,
        through_logits=through_logits,
        side_by_side=side_by_side,
    )


def _batching(model: nn.Module, *, data: Data, has_weights: bool) -> tuple[Layout, bool, SideBySide]:
    """Return the layout of batches, whether losses take the model's own logits, and what is answered side by side."""
    from keeptune.evaluation.generate import prompts_side_by_side
    from keeptune.model.attention import uses_virtual_tokens
    from keeptune.model.loss import loss_is_exact
    from keeptune.model.neighbours import layout_of, model_errors

    base = data.base
    if not has_weights:
        alone: Layout = "padded" if uses_virtual_tokens(model) else "packed"
        return "pairs" if base.facts.encoder_decoder else alone, False, "padded"
    with model_errors(model):
        through_logits = not loss_is_exact(model)
    layout = layout_of(model, through_logits=through_logits, longest=base.longest_record)
    return layout, through_logits, prompts_side_by_side(model, layout=layout, longest=base.longest_answered)


def _collate(layout: Layout, *, data: Data) -> Callable[[Sequence[Example]], Batch]:
    from keeptune.text.batches import pack, pad, pad_pairs

    if layout == "packed":
        return pack
    return partial(pad_pairs if data.base.facts.encoder_decoder else pad, pad_id=data.base.tokenizer.pad_id)


def _train_method(run: Run, data: Data, method: Method, *, texts: KeepTexts | None, dry_run: bool) -> Path:
    """Train one method into its folder, unless the same training is finished there."""
    import torch

    from keeptune.model.load import load_model
    from keeptune.model.methods import apply_method, count_parameters

    run.poll()
    folder, progress = run.folder / method.name, run.context.progress
    key = training_key(run.recipe, data, method, texts=texts)
    done = folder / TRAINING
    if intact_record(done, say=progress.say).get("key") == key and is_done(artifact_folder(folder, method), key):
        progress.say(f"{folder}: trained {UNCHANGED}")
        return folder
    policy = policy_of(run.recipe)
    device, quantization = policy.device, data.base.facts.quantization
    model = load_model(data.base.folder, device=device, dtype=weight_type(policy, method), quantization=quantization)
    kept = Kept(train_examples(run.recipe, data), None, {})
    if texts is not None:
        fit = fit_model(model, data=data, device=device, autocast=policy.compute)
        settings = training_settings(run.recipe, data, method, layout=fit.layout)
        kept = keep(run, data, method, texts=texts, base=model, fit=fit, settings=settings)
    adapted = apply_method(model, method, seed=run.recipe.seed)
    fit = fit_model(adapted, data=data, device=device, autocast=policy.compute)
    counts = count_parameters(adapted)
    dtype = policy.trains_in[1]
    note_facts(run, {"device": device.type, "dtype": dtype, "num_threads": torch.get_num_threads()})
    _say_fit(run, method, fit=fit, counts=counts, where=policy.why)
    own = own_facts(method, counts) | mixture_facts(run, method.name, table=kept.train_table)
    if method.l2_base:
        progress.say(f"{method.name}: the base model's weights stay beside it, {own['start_weight_bytes']:,} bytes")
    intended = intend(run.recipe, data, method, model=adapted, fit=fit, table=kept.train_table)
    if dry_run and method.name not in begun_methods(run.folder):
        rehearse(run, data, method, intended=intended)
    memory = _expected_memory(run, data, intended, name=method.name)
    result, scores = _run_loop(run, data, intended, name=method.name, key=key, kept=kept)
    artifact_bytes = save_method(run, data, method, model=adapted, key=key)
    facts = {name: value for name, value in asdict(result).items() if name != "validation"}
    write_record(
        done,
        {
            "key": key,
            "method": method.name,
            "peft_type": method.peft_type,
            "learning_rate": method.learning_rate,
            "trained_parameters": counts.trained,
            "total_parameters": counts.total,
            **own,
            **kept.facts,
            **facts,
            **scores,
            "artifact_bytes": artifact_bytes,
            "events_sha256": file_sha256(folder / EVENTS),
            "estimated_memory_bytes": memory,
            "layout": fit.layout,
            "device": device.type,
            "dtype": dtype,
        },
    )
    return folder


def _say_fit(run: Run, method: Method, *, fit: Fit, counts: ParameterCounts, where: str) -> None:
    """Say what trains, and how records share batches."""
    say = run.progress.say
    say(
        f"{method.name}: {counts.trained:,} of {counts.total:,} parameters train "
        f"({100 * counts.trained / counts.total:.2f} %) on {where}; batches hold {_LAYOUTS[fit.layout]}"
    )
    if fit.side_by_side in _ANSWERS:
        say(f"{method.name}: {_ANSWERS[fit.side_by_side]}")


def training_key(recipe: Recipe, data: Data, method: Method, *, texts: KeepTexts | None = None) -> str:
    """Return the key of everything that decides a method's weights."""
    evaluation = recipe.evaluation
    chooses = {"select_by": evaluation.select_by}
    if evaluation.select_by != "loss":
        chooses |= {"records": evaluation.num_validation_records, "max_new_tokens": evaluation.max_new_tokens}
    training = recipe.training.model_dump(mode="json", exclude={"save_steps"})
    # A method that leaves a field at its default keeps the key from before there was such a field.
    unused = {field.name for field in fields(method) if getattr(method, field.name) == field.default}
    replayed = {"texts": texts.replay_sha256} if texts is not None and method.replay_fraction else {}
    return stage_key(
        data=data.key,
        weights=data.base.facts.sha256,
        method={name: value for name, value in asdict(method).items() if name not in unused},
        training=training,
        chooses=chooses,
        seed=recipe.seed,
        device=recipe.device,
        **policy_of(recipe).training_key(),
        **replayed,
        **mixture_key(recipe),
    )


def make_bench(
    run: Run,
    data: Data,
    model: nn.Module,
    *,
    max_new_tokens: int,
    fit: Fit | None = None,
    tokens_per_batch: int | None = None,
) -> Bench:
    """Return what all evaluations of a model on one split share.

    `fit` is that of a model in training, None for one that was loaded to answer. `tokens_per_batch` defaults to the
    recipe's.
    """
    from keeptune.evaluation.evaluate import Bench

    policy = policy_of(run.recipe)
    autocast = policy.answering_autocast if fit is None else policy.validating_autocast
    fit = fit or fit_model(model, data=data, device=policy.device, autocast=autocast)
    limits = {"max_new_tokens": max_new_tokens, "tokens_per_batch": tokens_per_batch}
    return Bench(
        template=data.base.template,
        decoding=make_decoding(run.recipe, data, model, side_by_side=fit.side_by_side, **limits),
        collate=fit.collate,
        losses_alone=fit.layout == "single",
        target_losses=fit.target_losses,
        pair_divergences=fit.pair_divergences,
        autocast=autocast,
        progress=run.context.progress,
        stop_requested=run.context.stop_requested,
    )


def weight_type(policy: Policy, method: Method) -> torch.dtype:
    """Return the format of the base model's weights under a method: fp32 where they train."""
    import torch

    return torch.float32 if method.peft_type is None else policy.frozen


def intend(recipe: Recipe, data: Data, method: Method, *, model: nn.Module, fit: Fit, table: Examples) -> Intended:
    """Return the training of a method's model on a table as it stands before it begins."""
    return Intended(
        model=model,
        fit=fit,
        loss=partial(fit.batch_loss, kl_weight=method.replay_kl) if method.replay_kl else fit.batch_loss,
        settings=training_settings(recipe, data, method, layout=fit.layout),
        table=table,
        l2_base=method.l2_base,
    )


def _expected_memory(run: Run, data: Data, intended: Intended, *, name: str) -> dict[str, int] | None:
    """Say how much memory a training is expected to hold, and return it by kind; None where only training tells."""
    memory = estimate(run.recipe, data, intended)
    if memory is None:
        return None
    run.context.progress.say(f"{name}: {memory.total / 1e9:.2f} GB of memory expected at the peak")
    return memory.to_json()


def _run_loop(
    run: Run, data: Data, intended: Intended, *, name: str, key: str, kept: Kept
) -> tuple[TrainingResult, dict[str, Any]]:
    """Train, and score the tasks on validation where there are several; the model is left with its best weights."""
    from keeptune.evaluation.evaluate import validation_value
    from keeptune.evaluation.metrics import METRICS
    from keeptune.training.loop import train as run_loop
    from keeptune.training.world import SINGLE

    fit, model, select_by = intended.fit, intended.model, run.recipe.evaluation.select_by
    bench = make_bench(run, data, model, fit=fit, max_new_tokens=max_new_tokens(run.recipe, data))
    split = evaluation_split(data, "validation")

    def validate(adapted: nn.Module) -> float:
        number = run.recipe.evaluation.num_validation_records
        return validation_value(adapted, split=split, bench=bench, metric=select_by, num_records=number)

    result = run_loop(
        model=model,
        train_table=intended.table,
        validation_table=split.examples,
        loss=intended.loss,
        collate=fit.collate,
        settings=intended.settings,
        folder=run.folder / name,
        validate=None if select_by == "loss" else validate,
        higher_is_better=METRICS[select_by].higher_is_better,
        world=SINGLE,
        device=fit.device,
        autocast=fit.autocast,
        progress=run.context.progress,
        stop_requested=run.context.stop_requested,
        run_key=key,
        l2_base=intended.l2_base,
        drift=make_drift_meter(run, kept.probe, fit=fit, settings=intended.settings),
    )
    return result, task_scores(run, name, model=model, split=split, bench=bench)


def training_settings(recipe: Recipe, data: Data, method: Method, *, layout: Layout) -> TrainingSettings:
    """Return the numbers of a method's training."""
    from keeptune.training.settings import TrainingSettings

    numbers = recipe.training.model_dump(exclude={"bf16"})
    numbers["tokens_per_step"] = tokens_per_step(recipe, train_examples(recipe, data))
    return TrainingSettings(
        **numbers,
        learning_rate=method.learning_rate,
        seed=recipe.seed,
        layout=layout,
        select_by=recipe.evaluation.select_by,
    )


def save_method(run: Run, data: Data, method: Method, *, model: nn.Module, key: str) -> int:
    """Write the artifact, prove that it gives the trained answers when loaded alone, and return its bytes."""
    from keeptune.model.artifact import save_artifact, verify_artifact

    target, quantization = artifact_folder(run.folder / method.name, method), data.base.facts.quantization
    save_artifact(
        model,
        target,
        base_name=data.base.name,
        tokenizer_folder=data.base.tokenizer_folder,
        tokenizer=data.base.tokenizer,
        template=data.base.template,
        max_new_tokens=max_new_tokens(run.recipe, data),
        facts={"key": key} if quantization is None else {"key": key, "quantization": quantization},
    )
    asked = ask(run, data, model)
    verify_artifact(model, target, base=data.base.folder, quantization=quantization, asked=asked)
    return sum(facts["bytes"] for facts in read_record(target / MANIFEST)["files"].values())
