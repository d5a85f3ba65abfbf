"""An adapter folder and its base model arrive; one plain model folder with the adapter folded in leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from keeptune.errors import RecipeError, StorageError
from keeptune.model.artifact import (
    ADAPTER_CONFIG,
    TEXT_FILES,
    attach_adapter,
    base_of,
    probe_logits,
    require_same_logits,
    save_whole_model,
    writing,
)
from keeptune.model.card import ModelCard, write_model_card
from keeptune.model.folder import adapter_quantization, check_model_folder
from keeptune.model.load import load_model
from keeptune.model.memory import lacks_memory
from keeptune.model.methods import quiet_peft
from keeptune.storage import read_manifest, require_unchanged, staged_folder, write_atomic


def merge_adapter(
    adapter_folder: Path, *, base: Path, out: Path, card: ModelCard | None = None, dtype: torch.dtype = torch.float32
) -> None:
    """Write to `out` a model that transformers alone loads and that gives the adapted model's logits.

    Folding is done in fp32 on the CPU, then rounded to `dtype`; the result is loaded again and compared before `out`
    appears, with `card` as its model card. Where an adapter touches only one of two tied matrices, both are written.

    Raises:
        RecipeError: the base model is quantised, or was for the training, or the method cannot be folded into weights.
        StorageError: adapter or base are not as their manifests say, `out` holds files, the disk refuses, or the
            merged model's logits differ.
    """
    require_unchanged(adapter_folder)
    require_unchanged(base)
    _check_place(adapter_folder, base=base, out=out)
    adapted = attach_adapter(load_model(base, device=torch.device("cpu"), dtype=torch.float32), adapter_folder)
    expected = probe_logits(adapted)
    merged = _fold(adapted, where=adapter_folder).to(dtype)  # pyright: ignore[reportArgumentType]
    with staged_folder(out, facts=_facts(adapter_folder)) as staging, writing(out):
        save_whole_model(merged, staging, generation=GenerationConfig.from_pretrained(adapter_folder))
        del merged, adapted
        for name in TEXT_FILES:
            if (adapter_folder / name).exists():
                write_atomic(staging / name, (adapter_folder / name).read_bytes())
        if card is not None:
            write_model_card(staging, card=card, merged=True)
        fresh = load_model(staging, device=torch.device("cpu"), dtype=dtype)
        require_same_logits(probe_logits(fresh), expected, dtype=dtype, where=out)


def _quantised(adapter_folder: Path) -> str:
    """Return "quantised" where an adapter was trained over a model that is stored so; else empty."""
    return "quantised" if read_manifest(adapter_folder).get("base_quantised") else ""


def _check_place(adapter_folder: Path, *, base: Path, out: Path) -> None:
    if not (adapter_folder / ADAPTER_CONFIG).exists():
        raise RecipeError(
            f"{adapter_folder}: found no {ADAPTER_CONFIG}; expected an adapter folder. "
            "Name the adapter/ folder of a PEFT method; a fully fine-tuned model needs no merging."
        )
    if check_model_folder(base).quantised:
        raise RecipeError(
            f"{base}: found quantised weights; expected a base model in fp32 or bf16, as folding an adapter into "
            "quantised weights rounds it away. Use the adapter as it is, or train it on the unquantised model."
        )
    if weights := adapter_quantization(adapter_folder) or _quantised(adapter_folder):
        raise RecipeError(
            f"{adapter_folder}: found an adapter that was trained and scored over {weights} weights; expected one "
            "over the weights that it is folded into, as the merged model would give other answers than were scored. "
            "Use the adapter over the quantised base model, or train without quantization."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StorageError(f"{out}: found a file or a folder that is not empty; expected a new folder. Name another.")


def _facts(adapter_folder: Path) -> dict[str, Any]:
    facts = read_manifest(adapter_folder)
    return {**{key: value for key, value in facts.items() if key != "files"}, "merged": True}


def _fold(adapted: PeftModel, *, where: Path) -> PreTrainedModel:
    """Return the base model with the adapter in its weights; `adapted` is used up."""
    config = adapted.peft_config["default"]
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise _unfoldable(config, where=where, reason="it adds inputs, not weights")
    if getattr(config, "layer_replication", None):
        raise _unfoldable(config, where=where, reason="its replicated layers share weights")
    untied = _untie(base_of(adapted))
    tuner: Any = adapted
    try:
        with quiet_peft():
            merged = tuner.merge_and_unload(safe_merge=True)
    except (NotImplementedError, RuntimeError, ValueError, TypeError) as error:
        if lacks_memory(error):
            raise
        raise _unfoldable(config, where=where, reason=str(error).rstrip(".")) from error
    if untied:
        _tie_again(merged)
    return merged


def _unfoldable(config: PeftConfig, *, where: Path, reason: str) -> RecipeError:
    return RecipeError(
        f"{where}: found an adapter of {getattr(config.peft_type, 'value', config.peft_type)}, which PEFT cannot fold "
        f"into this model's weights ({reason}); expected one such as LORA. Use the adapter folder as it is."
    )


def _untie(model: PreTrainedModel) -> bool:
    """Give the output head weights of its own where an adapter sits on one side of a tied pair; tell if it did.

    Folding adds to a weight in place: into a shared one it would add to both sides.
    """
    head = model.get_output_embeddings()
    sides = (model.get_input_embeddings(), head)
    touched = any(isinstance(side, BaseTunerLayer | AuxiliaryTrainingWrapper) for side in sides)
    if head is None or not touched or not model.config.get_text_config().tie_word_embeddings:
        return False
    core = _unwrapped(head)
    core.weight = nn.Parameter(core.weight.detach().clone())
    return True


def _unwrapped(module: nn.Module) -> Any:
    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        inner = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.get_base_layer()
        assert isinstance(inner, nn.Module)
        module = inner
    return module


def _tie_again(model: PreTrainedModel) -> None:
    """Tie equal embeddings again, or have the config say that they differ now."""
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    tied = torch.equal(head.weight, embeddings.weight)
    if tied:
        head.weight = embeddings.weight
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = tied
