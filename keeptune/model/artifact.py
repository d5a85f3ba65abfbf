"""What is saved: a trained model arrives, a Hugging Face folder leaves, proved to give the same logits.

Full fine-tuning leaves a whole model, PEFT an adapter; beside either stand the tokenizer, the chat template that was
trained with, and a greedy generation config with every stop id. All weights are safetensors.
"""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from keeptune.errors import RecipeError, StorageError
from keeptune.model.asked import Asked, require_same_answers
from keeptune.model.attention import base_of, uses_virtual_tokens, vocab_size
from keeptune.model.declared import Quantization
from keeptune.model.folder import ADAPTER_CONFIG, adapter_base, resolve_model
from keeptune.model.load import load_model
from keeptune.model.memory import lacks_memory
from keeptune.model.methods import quiet_peft
from keeptune.model.modes import evaluating
from keeptune.model.patterns import refuse_endless_patterns
from keeptune.model.ranks import note_ranks_
from keeptune.model.served import refuse_unserved_adapter
from keeptune.storage import (
    read_json_object,
    require_unchanged,
    staged_folder,
    storage_errors,
    write_atomic,
    write_json,
)
from keeptune.text.template import Template
from keeptune.text.tokenizer import Tokenizer

ADAPTER_WEIGHTS = "adapter_model.safetensors"
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
_PROBE_TOKENS = 8
# How torch says that weights do not fit; it raises the same kind of error where a device fails.
_SHAPES = re.compile(r"\b(sizes?|shapes?|dimensions?|state_dict)\b")
_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4}
_HALF_TOLERANCE = 5e-2


def stop_token_ids(model: nn.Module, *, tokenizer: Tokenizer, template: Template) -> tuple[int, ...]:
    """Return, sorted, every id that ends an answer: the template's, the tokenizer's and the base model's own."""
    own = base_of(model).generation_config
    found = own.eos_token_id if own is not None else None
    ids = {tokenizer.eos_id, tokenizer.added_tokens[template.end_token]}
    return tuple(sorted(ids | set(found if isinstance(found, list) else [] if found is None else [found])))


def save_artifact(
    model: nn.Module,
    folder: Path,
    *,
    base_name: str,
    tokenizer_folder: Path,
    tokenizer: Tokenizer,
    template: Template,
    max_new_tokens: int,
    facts: Mapping[str, Any],
) -> None:
    """Write the trained model to `folder`, whole or not at all; an older `folder` is replaced.

    `base_name` is the recipe's `model`; an adapter names it, with its revision, as its base model. `manifest.json`
    holds `facts`, the names and hashes of template and tokenizer, the limit of answers, and the hash of each file.

    Raises:
        StorageError: the disk refuses.
    """
    stop_ids = stop_token_ids(model, tokenizer=tokenizer, template=template)
    own_facts: dict[str, Any] = {
        "base_model": base_name,
        "template": template.name,
        "template_sha256": template.fingerprint,
        "tokenizer_sha256": tokenizer.fingerprint,
        "stop_ids": list(stop_ids),
        "max_new_tokens": max_new_tokens,
    }
    if isinstance(model, PeftModel) and getattr(base_of(model).config, "quantization_config", None) is not None:
        # Stored so, or read so: folded into other weights, the adapter would give other answers.
        own_facts["base_quantised"] = True
    generation = _generation_config(base_of(model), tokenizer=tokenizer, stop_ids=stop_ids)
    with staged_folder(folder, facts={**facts, **own_facts}) as staging, writing(folder):
        if isinstance(model, PeftModel):
            _save_adapter(model, staging, base_name=base_name)
        else:
            save_whole_model(base_of(model), staging, generation=generation)
        generation.save_pretrained(staging)
        _save_tokenizer(tokenizer_folder, staging, chat_template=template.chat_template)


def artifact_bytes(model: nn.Module, *, tokenizer_folder: Path) -> int:
    """Return about how many bytes `save_artifact` writes: weights and texts; the model may be on the meta device."""
    saved = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not isinstance(model, PeftModel):
        saved = model.parameters()
    elif not uses_virtual_tokens(model):
        # PEFT saves of some methods more than what trains.
        saved = get_peft_model_state_dict(model, save_embedding_layers=False).values()
    texts = [tokenizer_folder / name for name in TEXT_FILES if (tokenizer_folder / name).exists()]
    return sum(t.numel() * t.element_size() for t in saved) + sum(path.stat().st_size for path in texts)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses inside the block into a `StorageError`, and keep transformers from drawing bars."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with storage_errors(folder):
            yield
    except SafetensorError as error:
        raise StorageError(
            f"{folder}: found that weights cannot be written or read ({error}); expected a place to read and write. "
            "Free space, or choose another output_dir."
        ) from error
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _generation_config(base: PreTrainedModel, *, tokenizer: Tokenizer, stop_ids: tuple[int, ...]) -> GenerationConfig:
    """Return greedy decoding with every stop id; sampling that the base model suggests is left out.

    So is a limit of new tokens: vLLM would cut every answer of a server there, whatever a client asks for.
    """
    starts = [getattr(owner, "decoder_start_token_id", None) for owner in (base.generation_config, base.config)]
    return GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=list(stop_ids),
        pad_token_id=tokenizer.pad_id,
        decoder_start_token_id=next((start for start in starts if start is not None), None),
    )


def save_whole_model(model: PreTrainedModel, folder: Path, *, generation: GenerationConfig) -> None:
    """Write config and weights; the model's own generation config stands aside, as it may be one that none can save."""
    own = model.generation_config
    model.generation_config = generation
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = own


def _save_adapter(model: PeftModel, folder: Path, *, base_name: str) -> None:
    """Write PEFT's two files as PEFT would, but with lists in a fixed order and the base model's public name."""
    note_ranks_(model)
    save_adapter_weights(model, folder)
    config = copy.deepcopy(model.peft_config["default"])
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, set):
            setattr(config, field.name, sorted(value))
    config.base_model_name_or_path, config.revision = _public_name(base_name)
    config.inference_mode = True
    config.save_pretrained(str(folder))


def save_adapter_weights(model: PeftModel, folder: Path) -> None:
    """Write the adapter's tensors as they are, under the names that PEFT gives them."""
    # The base embeddings never change size here, so they need not be saved, nor the hub be asked about them.
    with quiet_peft():
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _public_name(base_name: str) -> tuple[str, str | None]:
    """Return a hub id and its pinned revision, or the whole path of a local folder."""
    if Path(base_name).expanduser().exists():
        return str(Path(base_name).expanduser().resolve()), None
    name, _, revision = base_name.partition("@")
    return name, revision or None


def _save_tokenizer(source: Path, folder: Path, *, chat_template: str) -> None:
    """Copy the tokenizer's files; the one chat template is that of training, in both places where it is looked for."""
    for name in TEXT_FILES:
        if name in {"chat_template.jinja", "generation_config.json"} or not (source / name).exists():
            continue
        if name == "tokenizer_config.json":
            config = read_json_object(source / name)
            write_json(folder / name, {**config, "chat_template": chat_template})
        else:
            write_atomic(folder / name, (source / name).read_bytes())
    write_atomic(folder / "chat_template.jinja", chat_template)


def load_artifact(
    folder: Path,
    *,
    base: Path | None,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
) -> nn.Module:
    """Return the model that `save_artifact` left, in evaluation mode; `base` defaults to the one an adapter names.

    `quantization` is that of the weights that are frozen: the base model's, or a whole model's.

    Raises:
        StorageError: a file is not as its manifest says, or weights are missing or are not those that the adapter's
            config asks for.
        RecipeError: the adapter's base model is not to be found.
    """
    require_unchanged(folder)
    if not (folder / ADAPTER_CONFIG).exists():
        return load_model(folder, device=device, dtype=dtype, quantization=quantization)
    if base is None:
        base = resolve_model(adapter_base(folder))
    return attach_adapter(load_model(base, device=device, dtype=dtype, quantization=quantization), folder)


def attach_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Wrap `model` with the adapter in `folder`, frozen and in evaluation mode, its weights in fp32 as in training.

    Raises:
        StorageError: weights are missing, or are not those that the adapter's config asks for.
    """
    config = read_json_object(folder / ADAPTER_CONFIG)
    tensors = adapter_weights(folder)
    refuse_unserved_adapter(config, where=str(folder / ADAPTER_CONFIG))
    refuse_endless_patterns(config, model, prefix=f"{folder / ADAPTER_CONFIG}: ")
    own = {id(parameter) for parameter in model.parameters()}
    with writing(folder), quiet_peft(), _complete_adapter(folder):
        adapted = PeftModel.from_pretrained(model, str(folder), torch_device=str(model.device))
        live = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        unexpected = tensors.keys() - live.keys()
        if unexpected:
            raise _incomplete(folder, f"unexpected {sorted(unexpected)[0]}")
        added = [parameter for parameter in adapted.parameters() if id(parameter) not in own]
        if any(parameter.dtype != torch.float32 for parameter in added):
            # PEFT has rounded them to the base model's type; what was trained is fp32.
            for parameter in added:
                parameter.data = parameter.data.float()
            set_peft_model_state_dict(adapted, tensors)
        elif adapted.peft_config["default"].peft_type == "ADALORA":
            # It cut the layers to their ranks, and rounded what it cut; a second time it would find nothing to cut.
            for name, tensor in tensors.items():
                live[name].copy_(tensor)
    return adapted.eval()


def adapter_weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of the adapter in `folder` by the names that PEFT gives them.

    Raises:
        StorageError: they are missing or cannot be read.
    """
    weights, index = folder / ADAPTER_WEIGHTS, folder / f"{ADAPTER_WEIGHTS}.index.json"
    if index.exists():
        raise StorageError(
            f"{folder}: found {index.name}; expected all weights in {ADAPTER_WEIGHTS}, as PEFT reads no others. "
            "Save the adapter with PEFT as one file, or remove the index if it belongs to no file here."
        )
    if not weights.exists():
        raise StorageError(
            f"{folder}: found no {ADAPTER_WEIGHTS}; expected an adapter's weights as safetensors. "
            "Name the folder that holds them."
        )
    with writing(folder):
        return load_file(weights)


@contextlib.contextmanager
def _complete_adapter(folder: Path) -> Iterator[None]:
    """Turn PEFT's warning about missing weights, and torch's error about their shapes, into a `StorageError`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            yield
        except (UserWarning, KeyError) as error:
            raise _incomplete(folder, " ".join(str(error).split())[:300]) from error
        except RuntimeError as error:
            if not _SHAPES.search(str(error)) or lacks_memory(error):
                raise
            raise _incomplete(folder, " ".join(str(error).split())[:300]) from error


def _incomplete(folder: Path, found: str) -> StorageError:
    return StorageError(
        f"{folder / ADAPTER_WEIGHTS}: found {found}; expected exactly the weights that {ADAPTER_CONFIG} describes for "
        "this base model. Name the base model that the adapter was trained on, or train it again."
    )


def verify_artifact(
    model: nn.Module,
    folder: Path,
    *,
    base: Path,
    quantization: Quantization | None = None,
    asked: Sequence[Asked] = (),
) -> None:
    """Load the saved model anew and compare its logits and its answers with those of the trained one.

    The answers are those to `asked`, through the folder's own template. Costs a second model in memory.

    Raises:
        StorageError: logits, the ids of a prompt or an answer differ.
        RecipeError: an adapter gives the base model's logits: it has learned nothing.
    """
    expected = probe_logits(model)
    device, dtype = base_of(model).device, weight_dtype(model)
    if isinstance(model, PeftModel):
        fresh: nn.Module = load_model(base, device=device, dtype=dtype, quantization=quantization)
        plain = probe_logits(fresh)
        fresh = attach_adapter(base_of(fresh), folder)
        if torch.equal(expected, plain):
            raise RecipeError(
                f"{folder}: found an adapter that gives the base model's logits; expected it to have learned. "
                "Raise the method's learning_rate or training.num_train_epochs."
            )
    else:
        fresh = load_model(folder, device=device, dtype=dtype)
    require_same_logits(probe_logits(fresh), expected, dtype=dtype, where=folder)
    require_same_answers(fresh, folder, asked, tolerance=_TOLERANCES.get(dtype, _HALF_TOLERANCE))


def weight_dtype(model: nn.Module) -> torch.dtype:
    """Return the type of most of the base model's weights."""
    counts: dict[torch.dtype, int] = {}
    for parameter in base_of(model).parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype])


def require_same_logits(found: Tensor, expected: Tensor, *, dtype: torch.dtype, where: Path) -> None:
    """Accept logits that differ by at most 1e-4 (half precision: 5 %) of the largest one.

    Raises:
        StorageError: they differ by more.
    """
    tolerance = _TOLERANCES.get(dtype, _HALF_TOLERANCE) * max(1.0, expected.abs().max().item())
    difference = (found - expected).abs().max().item()
    if not difference <= tolerance:
        raise StorageError(
            f"{where}: found logits that differ by {difference:.2g} from those of the model that was saved; expected "
            f"at most {tolerance:.2g}. Check the disk and give the same command again; if it stays so, choose another "
            "method or other arguments."
        )


def probe_logits(model: nn.Module) -> Tensor:
    """Return fp32 logits of two fixed inputs on the CPU; the model keeps its mode."""
    base = base_of(model)
    ids = (torch.arange(2 * _PROBE_TOKENS, device=base.device).reshape(2, -1) * 7919 + 3) % vocab_size(base)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if base.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(0)
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    half = next((dtype for dtype in dtypes if dtype.itemsize == 2), torch.bfloat16)
    with evaluating(model), torch.autocast(base.device.type, dtype=half, enabled=len(dtypes) > 1):
        logits = model(**inputs).logits
    return logits[:, -_PROBE_TOKENS:].float().cpu()
