"""What a model's config.json declares: its fields arrive; sizes, how weights are stored, and refusals leave.

No torch here, and transformers only where a folder brings code of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from keeptune.errors import RecipeError

# Bits of a weight of the base model's linear layers, its output layer apart, as bitsandbytes stores them.
Quantization = Literal["4bit", "8bit"]
# What bitsandbytes is asked for. 4-bit weights are as QLoRA has them: NormalFloat, and the scales quantised too
# (Dettmers et al. 2023, arXiv 2305.14314).
BITSANDBYTES: dict[Quantization, dict[str, Any]] = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8bit": {"load_in_8bit": True},
}
T5_FAMILY = {"t5", "mt5", "umt5", "longt5", "switch_transformers"}
_ENCODER_DECODERS = T5_FAMILY | {"bart", "mbart", "pegasus", "marian", "blenderbot", "led"}
_UNSERVED = {"reformer": "it trains on no lengths but multiples of its chunks"}
_CODE_KEYS = ("auto_map", "trust_remote_code", "custom_pipelines")
# Where a configuration of several parts says what its text part is.
_TEXT_PARTS = ("text_config", "decoder", "encoder")
_VOCABULARIES = ("vocab_size", "src_vocab_size", "tgt_vocab_size", "n_words")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
_MOST_LEVELS = 16


def is_encoder_decoder(config: Mapping[str, Any]) -> bool:
    """Tell whether the model reads with one half and writes with the other."""
    return bool(config.get("is_encoder_decoder", config["model_type"] in _ENCODER_DECODERS))


def text_parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the parts of a configuration that may describe its language model, those that decide first."""
    parts = [config[name] for name in _TEXT_PARTS if isinstance(config.get(name), dict)]
    inner = [part["text_config"] for part in parts if isinstance(part.get("text_config"), dict)]
    return [*inner, *parts, config]


def declared_vocab_size(config: Mapping[str, Any]) -> int | None:
    """Return how many token ids the model both reads and writes; None: the configuration leaves it to transformers."""
    for part in text_parts(config):
        sizes = [part[key] for key in _VOCABULARIES if _is_count(part.get(key))]
        if sizes:
            return min(sizes)
    return None


def declared_positions(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens the position embeddings were made for; None where there is no limit."""
    # T5 has relative positions; its n_positions is the length of its pre-training, not a limit.
    if config.get("model_type") in T5_FAMILY:
        return None
    found = (part[key] for part in text_parts(config) for key in _POSITIONS if _is_count(part.get(key)))
    return next(found, None)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def stored_quantisation(folder: Path, config: Mapping[str, Any]) -> Quantization | Literal[False]:
    """Return in how many bits bitsandbytes has stored the weights; False: they are stored as they are.

    Raises:
        RecipeError: another library has stored them.
    """
    found = (part.get("quantization_config") for part in text_parts(config))
    stored = next((value for value in found if value is not None), None)
    if stored is None:
        return False
    stored = stored if isinstance(stored, dict) else {}
    by = stored.get("quant_method")
    for bits in BITSANDBYTES:
        if by in ("bitsandbytes", None) and stored.get(f"load_in_{bits}"):
            return bits
    how = "in a way that quantization_config does not name" if by in ("bitsandbytes", None) else f"by {str(by)!r}"
    remedy = "Name the model that it was made from; quantization: 4bit then keeps its weights small."
    if by == "fp8":
        out = f"{folder.name}-bf16"
        remedy = (
            'Write it back in 16 bits: python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as '
            f"T, FineGrainedFP8Config as Q; M.from_pretrained('{folder}', quantization_config=Q(dequantize=True), "
            f"dtype='bfloat16').save_pretrained('{out}'); T.from_pretrained('{folder}').save_pretrained('{out}')\"."
        )
    raise RecipeError(
        f"{folder / 'config.json'}: found weights stored quantised {how}, which keeptune cannot train on; expected "
        f"unquantised weights, or weights quantised by bitsandbytes. {remedy}"
    )


def refuse_unserved(folder: Path, config: Mapping[str, Any], *, num_tensors: int) -> None:
    """Refuse families that keeptune cannot train, and a depth that the weight files cannot hold.

    transformers would build every layer that the configuration asks for before it looks at the weights.

    Raises:
        RecipeError: the model is of such a family, or has more layers than tensors.
    """
    where = folder / "config.json"
    if reason := _UNSERVED.get(config["model_type"]):
        raise RecipeError(
            f"{where}: found a {config['model_type']} model, which keeptune cannot train: {reason}; expected another "
            "family. Choose another model; docs/models.md lists what is served."
        )
    for part in (*text_parts(config), *(part for part in config.values() if isinstance(part, dict))):
        for key in _DEPTHS:
            depth = part.get(key)
            if isinstance(depth, int | float) and not (math.isfinite(depth) and 0 <= depth <= num_tensors):
                raise RecipeError(
                    f"{where}: found {key}: {depth}, and weight files of {num_tensors:,} tensors in all; expected at "
                    "least one for each layer. Fetch the model again."
                )


def brings_own_code(folder: Path, config: Mapping[str, Any]) -> bool:
    """Tell whether a folder brings code that is not needed, as transformers knows the model itself; it is never run.

    Raises:
        RecipeError: the model needs it, or the configuration asks for code in another way.
    """
    code = sorted(path.name for path in folder.glob("*.py"))
    keys = [key for key in _keys(config) if key.rpartition(".")[2] in _CODE_KEYS or key.endswith("_internal")]
    if not code and not keys:
        return False
    # At the top alone: what a part asks for is read by the class of the whole.
    if set(keys) <= {"auto_map"} and _is_native(config):
        return True
    if keys:
        raise RecipeError(
            f"{folder / 'config.json'}: found {keys[0]!r}, which asks for code from outside transformers to be run; "
            "expected a model that transformers itself knows. Choose another model; keeptune runs no model's code."
        )
    raise RecipeError(
        f"{folder}: found the Python file {code[0]!r} and a {config['model_type']} model, which transformers does not "
        "know; expected one that it knows. Choose another model; keeptune runs no model's code."
    )


def _is_native(config: Mapping[str, Any]) -> bool:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    pairs = is_encoder_decoder(config)
    return config["model_type"] in (
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES if pairs else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )


def require_flat(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a configuration that is nested deeper than any model's.

    Raises:
        RecipeError: it is.
    """
    level: list[object] = [config]
    for _ in range(_MOST_LEVELS):
        level = [child for value in level for child in _children(value)]
        if not level:
            return
    raise RecipeError(
        f"{path}: found values nested more than {_MOST_LEVELS} levels deep; expected a model configuration. "
        "Fetch the model again."
    )


def _children(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def _keys(value: object, prefix: str = "") -> Iterator[str]:
    children: list[tuple[str, object]] = []
    if isinstance(value, dict):
        children = [(f"{prefix}{key}", child) for key, child in value.items()]
    elif isinstance(value, list):
        children = [(f"{prefix}{index}", child) for index, child in enumerate(value)]
    for key, child in children:
        if isinstance(value, dict):
            yield key
        yield from _keys(child, f"{key}.")
