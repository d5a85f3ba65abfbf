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
from keeptune.stages.data import Data, evaluation_split, max_new_tokens, prepare
from keeptune.stages.estimate import Intended, estimate, make_decoding
from keeptune.stages.keep import KeepTexts, Kept, keep, make_drift_meter, own_facts, require_texts
from keeptune.stages.methods import check_methods, method_of
from keeptune.stages.mixture import mixture_facts, mixture_key, task_scores, tokens_per_step, train_examples
from keeptune.stages.run import EVENTS, TRAINING, Run, intact_record, is_done, note_facts, stage_key
from keeptune.storage import MANIFEST, file_sha256, read_record, write_record

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from keeptune.evaluation.evaluate import Bench
    from keeptune.model.methods import Method
    from keeptune.text.batches import Batch, Layout
    from keeptune.text.tokens import Example, Examples
    from keeptune.training.settings import TrainingResult, TrainingSettings

TOO_LITTLE_MEMORY = "found too little memory; expected room for the model twice. Choose a smaller one."
# What a micro-batch is, in a person's words.
_LAYOUTS = {
    "packed": "whole records packed one behind the other",
    "padded": "records padded to the longest beside them",
    "pairs": "pairs of prompt and completion, padded to the longest beside them",
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


def train(
    run: Run, *, data: Data | None = None, methods: Sequence[str] | None = None, texts: KeepTexts | None = None
) -> list[Path]:
    """Train the methods (default: all) of the recipe, each from the base model; return their folders.

    `data` is what `prepare` returned for this run; without it, data are prepared here. `texts` are what methods replay,
    and what the drift of each is measured on.

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

    check_methods(run.recipe)
    require_texts(run, chosen, texts=texts)
    data = data or prepare(run)
    folders = []
    for name in chosen:
        with memory_errors(f"methods.{name}: {TOO_LITTLE_MEMORY}"):
            folders.append(_train_method(run, data, method_of(run.recipe, name), texts=texts))
            gc.collect()
    return folders


def artifact_folder(folder: Path, method: Method) -> Path:
    """Return where a method's artifact stands: `model/` for full fine-tuning, else `adapter/`."""
    return folder / ("model" if method.peft_type is None else "adapter")


def fit_model(model: nn.Module, *, recipe: Recipe, data: Data, device: torch.device, has_weights: bool = True) -> Fit:
    """Choose packed batches and the chunked loss where the model is exact under them, else padding and logits.

    A model without weights cannot be tried: it is taken for exact.
    """
    import torch

    from keeptune.model.divergence import pair_divergences
    from keeptune.model.loss import batch_loss, loss_is_exact, target_losses

    layout, collate = _layout(model, data=data, has_weights=has_weights)
    through_logits = has_weights and not loss_is_exact(model)
    return Fit(
        layout=layout,
        collate=collate,
        batch_loss=partial(batch_loss, through_logits=through_logits),
        target_losses=partial(target_losses, through_logits=through_logits),
        pair_divergences=partial(pair_divergences, through_logits=through_logits),
        device=device,
        autocast=torch.bfloat16 if computes_in_bf16(recipe, device) else None,
        through_logits=through_logits,
    )


def computes_in_bf16(recipe: Recipe, device: torch.device) -> bool:
    """Tell whether training computes in bf16, as the recipe says or by the device's default."""
    bf16 = recipe.training.bf16
    return device.type == "cuda" if bf16 is None else bf16


def _layout(model: nn.Module, *, data: Data, has_weights: bool) -> tuple[Layout, Callable[[Sequence[Example]], Batch]]:
    from keeptune.model.attention import can_pack, uses_virtual_tokens
    from keeptune.text.batches import pack, pad, pad_pairs

    pad_id = data.base.tokenizer.pad_id
    if data.base.facts.encoder_decoder:
        return "pairs", partial(pad_pairs, pad_id=pad_id)
    if not uses_virtual_tokens(model) and (not has_weights or can_pack(model)):
        return "packed", pack
    return "padded", partial(pad, pad_id=pad_id)


def _train_method(run: Run, data: Data, method: Method, *, texts: KeepTexts | None) -> Path:
    """Train one method into its folder, unless the same training is finished there."""
    import torch

    from keeptune.model.load import load_model, pick_device
    from keeptune.model.methods import apply_method, count_parameters

    run.poll()
    folder, progress = run.folder / method.name, run.context.progress
    key = training_key(run.recipe, data, method, texts=texts)
    done = folder / TRAINING
    if intact_record(done, say=progress.say).get("key") == key and is_done(artifact_folder(folder, method), key):
        progress.say(f"{folder}: trained {UNCHANGED}")
        return folder
    device = pick_device(run.recipe.device)
    dtype, quantization = weight_type(run.recipe, device, method), data.base.facts.quantization
    model = load_model(data.base.folder, device=device, dtype=dtype, quantization=quantization)
    kept = Kept(train_examples(run.recipe, data), None, {})
    if texts is not None:
        fit = fit_model(model, recipe=run.recipe, data=data, device=device)
        settings = training_settings(run.recipe, data, method, layout=fit.layout)
        kept = keep(run, data, method, texts=texts, base=model, fit=fit, settings=settings)
    adapted = apply_method(model, method, seed=run.recipe.seed)
    fit = fit_model(adapted, recipe=run.recipe, data=data, device=device)
    counts = count_parameters(adapted)
    dtype = "bfloat16" if fit.autocast is not None else "float32"
    note_facts(run, {"device": device.type, "dtype": dtype, "num_threads": torch.get_num_threads()})
    progress.say(
        f"{method.name}: {counts.trained:,} of {counts.total:,} parameters train "
        f"({100 * counts.trained / counts.total:.2f} %) on {device.type}; batches hold {_LAYOUTS[fit.layout]}"
    )
    own = own_facts(method, counts) | mixture_facts(run, method.name, table=kept.train_table)
    if method.l2_base:
        progress.say(f"{method.name}: the base model's weights stay beside it, {own['start_weight_bytes']:,} bytes")
    intended = intend(run.recipe, data, method, model=adapted, fit=fit, table=kept.train_table)
    memory = _expected_memory(run, data, intended, name=method.name)
    result, scores = _run_loop(run, data, intended, name=method.name, key=key, kept=kept)
    artifact_bytes = _save(run, data, method, model=adapted, key=key)
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


def training_key(recipe: Recipe, data: Data, method: Method, *, texts: KeepTexts | None = None) -> str:
    """Return the key of everything that decides a method's weights."""
    evaluation = recipe.evaluation
    chooses = {"select_by": evaluation.select_by}
    if evaluation.select_by != "loss":
        chooses |= {"records": evaluation.num_validation_records, "max_new_tokens": evaluation.max_new_tokens}
    training = recipe.training.model_dump(mode="json", exclude={"save_steps"})
    # A method that leaves a field at its default keeps the key from before there was such a field.
    unused = {field.name for field in fields(method) if getattr(method, field.name) == field.default}
    replayed = {"texts": texts.sha256} if texts is not None and method.replay_fraction else {}
    return stage_key(
        data=data.key,
        weights=data.base.facts.sha256,
        method={name: value for name, value in asdict(method).items() if name not in unused},
        training=training,
        chooses=chooses,
        seed=recipe.seed,
        device=recipe.device,
        **replayed,
        **mixture_key(recipe),
    )


def make_bench(
    run: Run,
    data: Data,
    model: nn.Module,
    *,
    fit: Fit,
    max_new_tokens: int,
    tokens_per_batch: int | None = None,
) -> Bench:
    """Return what all evaluations of a model on one split share; `tokens_per_batch` defaults to the recipe's."""
    from keeptune.evaluation.evaluate import Bench

    limits = {"max_new_tokens": max_new_tokens, "tokens_per_batch": tokens_per_batch}
    return Bench(
        template=data.base.template,
        decoding=make_decoding(run.recipe, data, model, **limits),
        collate=fit.collate,
        target_losses=fit.target_losses,
        pair_divergences=fit.pair_divergences,
        # Decoding would cast every weight anew for each token; on a processor that costs more than it saves.
        autocast=fit.autocast if fit.device.type == "cuda" else None,
        progress=run.context.progress,
        stop_requested=run.context.stop_requested,
    )


def weight_type(recipe: Recipe, device: torch.device, method: Method) -> torch.dtype:
    """Return fp32 for weights that train or live on a CPU, bf16 for frozen weights on a GPU that computes in it."""
    import torch

    frozen = device.type == "cuda" and method.peft_type is not None
    return torch.bfloat16 if frozen and computes_in_bf16(recipe, device) else torch.float32


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


def _save(run: Run, data: Data, method: Method, *, model: nn.Module, key: str) -> int:
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
