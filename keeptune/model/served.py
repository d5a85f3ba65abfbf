"""What keeptune can train of PEFT: a method's name and arguments arrive; what speaks against them leaves.

What needs data, a second model or a loss of its own beside what the training loop has is refused by name.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from keeptune.errors import RecipeError
from keeptune.model.declared import Quantization

if TYPE_CHECKING:
    from keeptune.model.methods import Method

_OWN_ARGUMENTS = frozenset(field.name for field in dataclasses.fields(PeftConfig))
# What a recipe's method has beside PEFT's arguments.
_OWN_KEYS = ("learning_rate", "peft_type", "replay_fraction", "replay_kl")
_VIRTUAL = "num_virtual_tokens"
# How PEFT's config classes annotate a number, some of them in text.
_NUMBERS = (int, float, "int", "float")
_PER_TASK = "it needs the number of a task beside each batch, which keeptune does not pass"
_OWN_LOSS = "it adds a loss of its own, and keeptune has one loss"
_DATA_INIT = "it starts from statistics of the data, which would have to be collected before training"
_UNSERVED_TYPES = {
    "CPT": _OWN_LOSS,
    "MULTITASK_PROMPT_TUNING": _PER_TASK,
    "POLY": _PER_TASK,
    "SHADOW": "it trains a second model beside the first by a loss of its own",
    "XLORA": "it mixes adapters that were trained before",
}
_UNSERVED_ARGUMENTS = {
    "alora_invocation_tokens": "it looks for these tokens in each prompt, which a packed batch does not keep apart",
    "arrow_config": "it routes between adapters that were trained before",
    "corda_config": _DATA_INIT,
    "eva_config": _DATA_INIT,
    "kasa_config": _OWN_LOSS,
    "loftq_config": "it needs a base model that is quantised while it is adapted",
    "lora_ga_config": _DATA_INIT,
    "megatron_config": "it needs Megatron",
    "megatron_core": "it needs Megatron",
    "monteclora_config": _OWN_LOSS,
    "runtime_config": "it is about serving, not training",
    "use_asa": "it moves rank between layers after each update",
    "use_qalora": "it needs a base model quantised by GPTQ",
    "velora_config": "its backward pass keeps state that no checkpoint holds",
}
_INIT_RANKS = "AdaLoRA has init_r and target_r in its place"
_NOT_READ_BY_ADALORA = {
    "alpha_pattern": "AdaLoRA does not read it",
    "r": _INIT_RANKS,
    "rank_pattern": _INIT_RANKS,
    "total_step": "keeptune counts the steps of the training",
    "use_rslora": "AdaLoRA does not read it",
}
# Methods that PEFT computes with bitsandbytes' layers, and those that leave linear layers alone.
_ON_QUANTISED = {"ADALORA", "IA3", "LN_TUNING", "LORA", "OFT", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "VERA"}
_UNSERVED_INIT = re.compile(r"eva|corda|lora_ga|loftq|pissa_niter_.*")


def method_problems(method: Method, *, quantised: Quantization | bool) -> list[str]:
    """Return what is wrong with the method's name and arguments, over a base model that may be quantised."""
    problems = _type_problems(method) or _argument_problems(method)
    return problems or (_quantised_problems(method, bits=quantised) if quantised else [])


def _type_problems(method: Method) -> list[str]:
    known = [peft_type.value for peft_type in PEFT_TYPE_TO_CONFIG_MAPPING]
    where = f"methods.{method.name}.peft_type"
    if method.peft_type not in known:
        remedy = nearest(method.peft_type or "", [name for name in known if name not in _UNSERVED_TYPES])
        return [f"{where}: found {method.peft_type!r}; expected one of PEFT's methods. {remedy}"]
    if method.peft_type in _UNSERVED_TYPES:
        return [
            f"{where}: found {method.peft_type!r}, which keeptune cannot train: {_UNSERVED_TYPES[method.peft_type]}; "
            f"expected a method that trains by the one loss. Set {where}=LORA."
        ]
    return []


def _quantised_problems(method: Method, *, bits: Quantization | bool) -> list[str]:
    where = f"methods.{method.name}"
    start = method.arguments.get("init_lora_weights")
    if method.peft_type not in _ON_QUANTISED:
        return [
            f"{where}.peft_type: found {method.peft_type!r} over a quantised base model, whose weights PEFT does not "
            f"read for it; expected one of {', '.join(sorted(_ON_QUANTISED))}. Set {where}.peft_type=LORA."
        ]
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "mica")):
        return [
            f"{where}.init_lora_weights: found {start!r} over a quantised base model, whose weights cannot be taken "
            "apart; expected a start that leaves them as they are. Remove this key."
        ]
    if method.arguments.get("use_dora") and bits == "8bit":
        return [
            f"{where}.use_dora: found it set over 8-bit weights, whose norms PEFT cannot take; expected 4-bit or "
            "unquantised weights. Remove this key, or keep the weights in 4 bits."
        ]
    return []


def _argument_problems(method: Method) -> list[str]:
    known = {f.name: f.type for f in dataclasses.fields(config_class(method)) if f.name not in _OWN_ARGUMENTS}
    problems = []
    for key, value in method.arguments.items():
        where = f"methods.{method.name}.{key}"
        if key in _OWN_ARGUMENTS:
            problems.append(f"{where}: found {value!r}; expected nothing, as keeptune sets it. Remove this key.")
        elif key not in known:
            expected = f"an argument of PEFT's {config_class(method).__name__}"
            near = nearest(key, [*known, *_OWN_KEYS])
            problems.append(f"{where}: found an unknown key; expected {expected}. {near}")
        elif value and (reason := _unserved(key, value, peft_type=method.peft_type)):
            problems.append(f"{where}: found {value!r}; expected it unset, as {reason}. Remove this key.")
        elif known[key] in _NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float | None)):
            # PEFT compares it with a number first, and does not say which argument that was.
            problems.append(f"{where}: found {value!r}; expected a number. Fix this value.")
    number = method.arguments.get(_VIRTUAL)
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    if _VIRTUAL in known and (number is None or (is_number and (type(number) is not int or number < 1))):
        found, where = "nothing" if number is None else repr(number), f"methods.{method.name}.{_VIRTUAL}"
        problems.append(f"{where}: found {found}; expected how many input vectors train, from 1. Set {where}=20.")
    return problems


def _unserved(key: str, value: object, *, peft_type: str | None = None) -> str | None:
    if peft_type == "ADALORA" and key in _NOT_READ_BY_ADALORA:
        return _NOT_READ_BY_ADALORA[key]
    if peft_type == "ADALORA" and key == "init_lora_weights" and isinstance(value, str):
        return "AdaLoRA has a start of its own"
    if key == "init_lora_weights" and isinstance(value, str) and _UNSERVED_INIT.fullmatch(value):
        return "this start needs data or chance, so that the saved adapter alone would not give the trained answers"
    return _UNSERVED_ARGUMENTS.get(key)


def refuse_unserved_adapter(config: Mapping[str, Any], *, where: str) -> None:
    """Refuse the `adapter_config.json` of a foreign adapter that would make PEFT load more than weights.

    Raises:
        RecipeError: its method or an argument is one that keeptune cannot train.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING["LORA"])}  # pyright: ignore[reportArgumentType]
    for key, value in config.items():
        if value and value != defaults.get(key) and (reason := _unserved(key, value)):
            raise RecipeError(
                f"{where}: found {key}: {value!r}; expected it unset, as {reason}. "
                "Use an adapter that keeptune trained."
            )
    peft_type = str(config.get("peft_type"))
    if peft_type in _UNSERVED_TYPES or peft_type not in [known.value for known in PEFT_TYPE_TO_CONFIG_MAPPING]:
        raise RecipeError(
            f"{where}: found peft_type {peft_type!r}; expected a method that keeptune trains. "
            "Use an adapter that keeptune trained."
        )


def nearest(found: str, known: Sequence[str], *, listed: Collection[str] | None = None) -> str:
    """Return the remedy for a word that is none of `known`: the nearest one, or all of `listed`."""
    near = difflib.get_close_matches(found, known, n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else f"Choose from: {', '.join(sorted(listed or known))}."


def config_class(method: Method) -> type[PeftConfig]:
    """Return PEFT's config class of a method that is one of PEFT's."""
    assert method.peft_type is not None
    return PEFT_TYPE_TO_CONFIG_MAPPING[method.peft_type]  # pyright: ignore[reportArgumentType]
