"""A checked model folder arrives; a `PreTrainedModel` leaves: every weight accounted for, or none of them read."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from keeptune.errors import RecipeError, import_extra
from keeptune.model.declared import BITSANDBYTES, T5_FAMILY, Quantization, declared_positions
from keeptune.model.memory import lacks_memory
from keeptune.storage import staged_folder, storage_errors

# Buffers that older checkpoints carry and that are computed at construction.
_COMPUTED = re.compile(r"(inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids)$")
# What changes no answer and cannot be computed beside padding (routers' logits, for a loss of their own), or rewrites
# the weights whenever a model is switched from training to evaluation (RWKV's scaling for fp16).
_OFF = {"output_router_logits": False, "rescale_every": 0}
# Quantised weights stand two to a byte; tied ones may be counted twice.
_MOST_PER_NUMBER = 4
# How transformers and its models fail on what they cannot read or compute; never a fault of keeptune's alone.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


@contextlib.contextmanager
def library_errors(worded: Callable[[str], str]) -> Iterator[None]:
    """Turn what libraries and models raise inside the block into a `RecipeError` that says `worded(reason)`.

    A lack of memory passes as it is.
    """
    try:
        yield
    except FAILURES as error:
        if lacks_memory(error):
            raise
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise RecipeError(worded(f"{type(error).__name__}: {reason}")) from error


def load_model(
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    attn_implementation: str = "sdpa",
    quantization: Quantization | None = None,
) -> PreTrainedModel:
    """Return the model of a folder that `check_model_folder` passed, in evaluation mode.

    `quantization` stores the weights of linear layers in so many bits as they are read; `dtype` is that of all other
    weights and of what is computed. A class without `attn_implementation` (Gemma 2 has no sdpa) gets transformers' own
    choice.

    Raises:
        RecipeError: transformers does not know the model as a language model, weights are missing or left over, a
            T5-family model is asked for in fp16, which overflows in its feed-forward layers, or bitsandbytes is needed
            and not installed.
    """
    with _silent_transformers():
        config = _read_config(folder)
        if dtype == torch.float16 and config.model_type in T5_FAMILY:
            raise RecipeError(
                f"{folder}: found fp16 for a {config.model_type} model; expected bf16 or fp32, because its activations "
                "overflow fp16. Use dtype=bf16 or dtype=fp32."
            )
        auto = _auto_class(config)
        model_class = auto._model_mapping.get(type(config), None)
        quantised = _quantised(config, quantization, device=device, dtype=dtype)
        supported = attn_implementation != "sdpa" or getattr(model_class, "_supports_sdpa", True)
        try:
            model, loading = auto.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation=attn_implementation if supported else None,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported in `loading`, and refused below
                **quantised,
            )
        except SafetensorError as error:
            raise RecipeError(
                f"{folder}: found a damaged safetensors file ({error}); expected whole weights. Fetch the model again."
            ) from error
        except FAILURES as error:
            if lacks_memory(error):
                raise
            raise _unknown(folder, error) from error
    _require_all_weights(folder, loading)
    if not quantised:
        return model.to(device).eval()
    for module in model.modules():
        # Where a processor multiplies bf16, 4-bit layers would be stored anew, and rounded, as soon as one evaluates.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    # Quantised weights were put in their place as they were read, and cannot be moved on.
    return model.eval()


def require_quantization() -> None:
    """Accept quantised weights where the libraries that read them are installed.

    Raises:
        RecipeError: one is not.
    """
    for library in ("bitsandbytes", "accelerate"):
        import_extra(library, extra="quantized")
    # It says at each product of matrices that it casts what it multiplies.
    getLogger("bitsandbytes").setLevel(ERROR)


def _quantised(
    config: PreTrainedConfig, quantization: Quantization | None, *, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Return what transformers is told to read quantised weights; nothing for others."""
    stored = getattr(config, "quantization_config", None)
    if quantization is None and stored is None:
        return {}
    placed: dict[str, Any] = {"device_map": {"": device}}
    if quantization is None:
        if "bitsandbytes" in str(stored):
            require_quantization()
        return placed
    require_quantization()
    # 8-bit layers have no use for a type to compute in.
    asked = BitsAndBytesConfig(**BITSANDBYTES[quantization], bnb_4bit_compute_dtype=dtype)
    return {**placed, "quantization_config": asked}


def empty_model(folder: Path) -> PreTrainedModel:
    """Return the model of a folder on the meta device: its modules and their shapes, with no weight read.

    Raises:
        RecipeError: transformers does not know the model as a language model.
    """
    with _silent_transformers():
        config = _read_config(folder)
        try:
            with torch.device("meta"):
                return _auto_class(config).from_config(config, trust_remote_code=False)
        except FAILURES as error:
            raise _unknown(folder, error) from error


def check_size(folder: Path, *, num_weights: int) -> None:
    """Refuse a configuration that asks for far more weights than the `num_weights` numbers that the files hold.

    transformers would make all of them, in memory, before it says which the files lack.

    Raises:
        RecipeError: it does, or transformers does not know the model as a language model.
    """
    asked = sum(parameter.numel() for parameter in empty_model(folder).parameters())
    if asked > _MOST_PER_NUMBER * num_weights:
        raise RecipeError(
            f"{folder / 'config.json'}: found a model of {asked:,} weights, and weight files that hold "
            f"{num_weights:,} numbers; expected as many. Fetch the model again."
        )


def _read_config(folder: Path) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except FAILURES as error:
        raise _unknown(folder, error) from error
    # Code that is not needed, and that would not stand beside what is saved of the model.
    config.__dict__.pop("auto_map", None)
    for part in (config, config.get_text_config()):
        for name, value in _OFF.items():
            if getattr(part, name, None):
                setattr(part, name, value)
    return config


@dataclass(frozen=True, slots=True)
class Configured:
    """What transformers makes of a configuration that leaves fields out."""

    vocab_size: int | None
    max_positions: int | None
    decoder_start_token_id: int | None


def configured(folder: Path) -> Configured:
    """Return sizes and start of a model by the defaults of its configuration's class; takes transformers' import.

    Raises:
        RecipeError: transformers cannot read the configuration.
    """
    with _silent_transformers():
        config = _read_config(folder)
        text = config.get_text_config(decoder=True)
        start = getattr(config, "decoder_start_token_id", None)
        vocab_size = getattr(text, "vocab_size", None)
    return Configured(vocab_size, declared_positions({**text.to_dict(), "model_type": config.model_type}), start)


def _auto_class(config: PreTrainedConfig) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _unknown(folder: Path, error: Exception) -> RecipeError:
    reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
    return RecipeError(
        f"{folder}: found a model that transformers cannot load as a language model ({reason}); expected a "
        "decoder-only or encoder-decoder one. Choose another model, or install a transformers that knows it."
    )


def _require_all_weights(folder: Path, loading: dict[str, Any]) -> None:
    for kind, name in _differences(loading):
        raise RecipeError(
            f"{folder}: found {kind} weights, the first is {name!r}; expected exactly those of its configuration. "
            "Fetch the model again, or fix its config.json."
        )


def _differences(loading: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield from (("missing", str(name)) for name in sorted(loading["missing_keys"]))
    for name, stored, wanted in loading.get("mismatched_keys", ()):
        yield "misshapen", f"{name} of {tuple(stored)} where the configuration says {tuple(wanted)}"
    yield from (("left-over", str(n)) for n in sorted(loading["unexpected_keys"]) if not _COMPUTED.search(str(n)))


def convert_tokenizer(folder: Path, into: Path) -> None:
    """Write the folder's tokenizer as `into` in the fast format (`tokenizer.json`), for a model with a slow one only.

    Raises:
        RecipeError: transformers cannot convert it.
    """
    with _silent_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
            raise _no_tokenizer(folder, str(error).strip().splitlines()[0]) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _no_tokenizer(folder, f"{type(tokenizer).__name__} has no fast form")
    with staged_folder(into, facts={"kind": "tokenizer"}) as staging, storage_errors(into):
        tokenizer.save_pretrained(staging)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Return transformers' own tokenizer of a folder that holds `tokenizer.json`.

    Raises:
        RecipeError: transformers cannot read it.
    """
    with _silent_transformers():
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
            raise _no_tokenizer(folder, str(error).strip().splitlines()[0]) from error


def _no_tokenizer(folder: Path, reason: str) -> RecipeError:
    return RecipeError(
        f"{folder}: found no tokenizer that can be converted ({reason}); expected tokenizer.json or a SentencePiece "
        "model. Fetch the tokenizer's files again."
    )


@contextlib.contextmanager
def _silent_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off the terminal; what they say is raised here instead."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
