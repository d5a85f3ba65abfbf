"""Which parameters train: a base model and a `Method` arrive, a model with trained weights marked leaves.

A method is full fine-tuning or any PEFT method under PEFT's own argument names. What needs data, a second model or a
loss of its own beside what the training loop has is refused by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from keeptune.errors import RecipeError, raise_collected
from keeptune.model.folder import Quantization
from keeptune.model.memory import lacks_memory

_OWN_ARGUMENTS = frozenset(field.name for field in dataclasses.fields(PeftConfig))
# What a recipe's method has beside PEFT's arguments.
_OWN_KEYS = ("learning_rate", "peft_type", "replay_fraction", "replay_kl")
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
# AdaLoRA's steps are counted when the data are there; any schedule fits into so many.
_ANY_NUMBER_OF_STEPS = 10**9
# Methods that PEFT computes with bitsandbytes' layers, and those that leave linear layers alone.
_ON_QUANTISED = {"ADALORA", "IA3", "LN_TUNING", "LORA", "OFT", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "VERA"}
_UNSERVED_INIT = re.compile(r"eva|corda|lora_ga|loftq|pissa_niter_.*")
_MODULE_LISTS = ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save")
# What torch says where a method looks at values of weights.
_NO_VALUES = re.compile(r"meta tensor", re.IGNORECASE)
# A module that stands in a list, as each layer and all that is inside it do.
_IN_A_LIST = re.compile(r"\.\d+\.")
_OTHER_THAN_CONV1D = "Set {}.peft_type=LORA, which adapts this model's Conv1D layers."
_PEFT_ERRORS = (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, ImportError, AssertionError)


@dataclass(frozen=True, slots=True)
class Method:
    """How the parameters train; `arguments` go to the config class of `peft_type`; no `peft_type`: all train.

    The rest keeps what the base model knows, as the recipe's fields of the same names say; 0: it is not done.
    """

    name: str
    peft_type: str | None
    learning_rate: float
    arguments: Mapping[str, Any]
    frozen_layers: int = 0
    l2_base: float = 0.0
    replay_fraction: float = 0.0
    replay_kl: float = 0.0


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Numbers of weights; tied weights count once."""

    trained: int
    total: int


def check_method(method: Method, *, encoder_decoder: bool, quantised: Quantization | bool = False) -> None:
    """Accept a method that keeptune can train, before any weight is read.

    Raises:
        RecipeError: unknown or unserved `peft_type` or arguments, values that PEFT refuses, or full fine-tuning of a
            quantised base model.
    """
    if method.peft_type is None:
        _check_full(method, quantised=quantised)
        return
    problems = _type_problems(method) or _argument_problems(method)
    if quantised and not problems:
        problems = _quantised_problems(method, bits=str(quantised))
    if problems:
        raise_collected(RecipeError, problems)
    with _peft_errors(method):
        config: Any = _make_config(method, encoder_decoder=encoder_decoder, defaults={})
    if method.peft_type == "ADALORA" and config.init_r <= config.target_r:
        raise RecipeError(
            f"methods.{method.name}.init_r: found {config.init_r} with a target_r of {config.target_r}; expected more, "
            f"as ranks only shrink. Set methods.{method.name}.init_r={config.target_r * 3 // 2 + 1}."
        )


def _check_full(method: Method, *, quantised: Quantization | bool) -> None:
    if method.arguments:
        raise RecipeError(
            f"methods.{method.name}: found {', '.join(sorted(method.arguments))} without peft_type; expected no PEFT "
            f"argument for full fine-tuning. Add methods.{method.name}.peft_type, or remove these keys."
        )
    if quantised:
        raise RecipeError(
            f"methods.{method.name}: found full fine-tuning of a quantised base model; expected weights that can "
            f"change. Set methods.{method.name}.peft_type=LORA, or name an unquantised model."
        )


def _type_problems(method: Method) -> list[str]:
    known = [peft_type.value for peft_type in PEFT_TYPE_TO_CONFIG_MAPPING]
    where = f"methods.{method.name}.peft_type"
    if method.peft_type not in known:
        remedy = _nearest(method.peft_type or "", [name for name in known if name not in _UNSERVED_TYPES])
        return [f"{where}: found {method.peft_type!r}; expected one of PEFT's methods. {remedy}"]
    if method.peft_type in _UNSERVED_TYPES:
        return [
            f"{where}: found {method.peft_type!r}, which keeptune cannot train: {_UNSERVED_TYPES[method.peft_type]}; "
            f"expected a method that trains by the one loss. Set {where}=LORA."
        ]
    return []


def _quantised_problems(method: Method, *, bits: str) -> list[str]:
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
            "unquantised weights. Set quantization=4bit, or remove this key."
        ]
    return []


def _argument_problems(method: Method) -> list[str]:
    known = [field.name for field in dataclasses.fields(_config_class(method)) if field.name not in _OWN_ARGUMENTS]
    problems = []
    for key, value in method.arguments.items():
        where = f"methods.{method.name}.{key}"
        if key in _OWN_ARGUMENTS:
            problems.append(f"{where}: found {value!r}; expected nothing, as keeptune sets it. Remove this key.")
        elif key not in known:
            expected = f"an argument of PEFT's {_config_class(method).__name__}"
            near = _nearest(key, [*known, *_OWN_KEYS])
            problems.append(f"{where}: found an unknown key; expected {expected}. {near}")
        elif value and (reason := _unserved(key, value, peft_type=method.peft_type)):
            problems.append(f"{where}: found {value!r}; expected it unset, as {reason}. Remove this key.")
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


def _nearest(found: str, known: Sequence[str], *, listed: Collection[str] | None = None) -> str:
    near = difflib.get_close_matches(found, known, n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else f"Choose from: {', '.join(sorted(listed or known))}."


def _config_class(method: Method) -> type[PeftConfig]:
    assert method.peft_type is not None
    return PEFT_TYPE_TO_CONFIG_MAPPING[method.peft_type]  # pyright: ignore[reportArgumentType]


def _make_config(method: Method, *, encoder_decoder: bool, defaults: Mapping[str, Any]) -> PeftConfig:
    """Return the PEFT config; LoRA and AdaLoRA without targets take every linear layer but the output head."""
    arguments = {**defaults, **method.arguments}
    if method.peft_type == "ADALORA":
        arguments["total_step"] = _ANY_NUMBER_OF_STEPS
    if method.peft_type in {"LORA", "ADALORA"} and not arguments.keys() & {"target_modules", "target_parameters"}:
        arguments["target_modules"] = "all-linear"
    return _config_class(method)(task_type="SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM", **arguments)  # pyright: ignore[reportArgumentType]


@contextlib.contextmanager
def _peft_errors(method: Method) -> Iterator[None]:
    """Turn what PEFT raises about its arguments into a `RecipeError` about the method."""
    try:
        yield
    except _PEFT_ERRORS as error:
        if lacks_memory(error):
            raise
        detail, where = " ".join(str(error).split()) or type(error).__name__, f"methods.{method.name}"
        remedy = f"Change the keys of {where}."
        if "Conv1D" in detail:
            remedy = _OTHER_THAN_CONV1D.format(where)
        elif "specify `target_modules`" in detail:
            remedy = f"Name the modules that it is to adapt in {where}.target_modules."
        raise RecipeError(
            f"{where}: PEFT refuses this {method.peft_type} for this model: {detail[:500].rstrip('.')}; "
            f"expected arguments that fit. {remedy}"
        ) from error


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence PEFT's warnings about what keeptune does on purpose or cannot change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`is_gradient_checkpointing` is deprecated")
        # `merge` parts tied weights on purpose and looks at the merged model's logits.
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied after merging")
        # BOFT does without its kernel, which needs a compiler; LN tuning trains norms of every kind.
        warnings.filterwarnings("ignore", message="Failed to load the CUDA extension")
        warnings.filterwarnings("ignore", message="Setting boft_n_butterfly_factor to 1")
        warnings.filterwarnings("ignore", message="Unsupported layer type")
        # AdaLoRA leaves some layers no rank, and names in its own way those of the others.
        warnings.filterwarnings("ignore", message=r"(?s)Adapter .*have invalid shape.*\(0, \d+\)")
        warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match any targeted module")
        yield


def apply_method(model: PreTrainedModel, method: Method, *, seed: int) -> nn.Module:
    """Mark what trains in `model` and return it, wrapped by PEFT where the method is one of PEFT's.

    Trained weights become fp32, whatever the base model's type. `seed` alone decides new weights; the global random
    state stays as it was.

    Raises:
        RecipeError: a named module does not exist, PEFT refuses the arguments for this model, or it has fewer layers
            than are to be frozen.
    """
    adapted = model if method.peft_type is None else _wrap(model, method, seed=seed)
    if method.frozen_layers:
        _freeze(model, method)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    if not trained:
        where = f"methods.{method.name}"
        remedy = _OTHER_THAN_CONV1D.format(where) if _has_conv1d(model) else f"Set {where}.target_modules=all-linear."
        raise RecipeError(f"{where}: found no weight that would train; expected at least one. {remedy}")
    for parameter in trained:
        parameter.data = parameter.data.float()
    return adapted


def check_fit(model: PreTrainedModel, method: Method) -> None:
    """Apply the method to a model on the meta device, which it changes: names and shapes are held against each other.

    Raises:
        RecipeError: the same as `apply_method`.
    """
    try:
        with torch.device("meta"):
            apply_method(model, method, seed=0)
    except RecipeError as error:
        # BOFT, FROD and UNILORA compute with the weights' values, which are not there: training tells.
        if not _NO_VALUES.search(str(error.__cause__)):
            raise


def _freeze(model: PreTrainedModel, method: Method) -> None:
    """Let the embeddings and the first layers (with an encoder: of the encoder) stay as they are, for good."""
    pairs = bool(model.config.is_encoder_decoder)
    stack = model.get_encoder() if pairs else model.get_decoder()
    layers = next((list(module) for module in stack.modules() if isinstance(module, nn.ModuleList)), [])
    if method.frozen_layers > len(layers):
        raise RecipeError(
            f"methods.{method.name}.frozen_layers: found {method.frozen_layers}; expected at most {len(layers)}, the "
            f"number of the {'encoder' if pairs else 'model'}'s layers. Lower it."
        )
    outside = [(name, module) for name, module in model.named_modules() if not _IN_A_LIST.search(name)]
    embeddings = [module for _, module in outside if isinstance(module, nn.Embedding)]
    for module in [*embeddings, *layers[: method.frozen_layers]]:
        module.requires_grad_(False)


def _wrap(model: PreTrainedModel, method: Method, *, seed: int) -> PeftModel:
    _check_modules(model, method)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), quiet_peft(), _peft_errors(method):
        torch.manual_seed(seed)
        encoder_decoder = bool(model.config.is_encoder_decoder)
        config = _make_config(method, encoder_decoder=encoder_decoder, defaults=_model_defaults(model, method))
        adapted = get_peft_model(model, config)
    if method.peft_type == "IA3":
        _name_feedforward_modules(adapted)
    return adapted


def _model_defaults(model: PreTrainedModel, method: Method) -> dict[str, Any]:
    """Return what PEFT would find out by itself with a warning, or show as a progress bar."""
    known = {field.name for field in dataclasses.fields(_config_class(method))}
    defaults: dict[str, Any] = {}
    if "fan_in_fan_out" in known and _has_conv1d(model):
        defaults["fan_in_fan_out"] = True
    if "progressbar" in known:
        defaults["progressbar"] = False
    return defaults


def _has_conv1d(model: nn.Module) -> bool:
    return any(isinstance(module, Conv1D) for module in model.modules())


def _check_modules(model: PreTrainedModel, method: Method) -> None:
    """Refuse a list that names a module which does not exist; PEFT would train without it and say nothing."""
    modules = [name for name, _ in model.named_modules() if name]
    leaves = sorted({name.rpartition(".")[2] for name in modules if not name.rpartition(".")[2].isdecimal()})
    linear = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    problems = []
    for key in _MODULE_LISTS:
        value = method.arguments.get(key)
        for wanted in value if isinstance(value, list | tuple | set) else ():
            if not any(name == wanted or name.endswith(f".{wanted}") for name in modules):
                found = f"methods.{method.name}.{key}: found {wanted!r}; expected a module of the model"
                problems.append(f"{found}. {_nearest(str(wanted), leaves, listed=linear)}")
    if problems:
        raise_collected(RecipeError, problems)


def _name_feedforward_modules(model: PeftModel) -> None:
    """Write full module names into an IA3 config, whose own short names PEFT may refuse when it reads them again."""
    config: Any = model.peft_config["default"]
    tuner: Any = model.base_model
    layers = {name: tuner.model.get_submodule(name) for name in tuner.targeted_module_names}
    config.target_modules = set(layers)
    config.feedforward_modules = {name for name, layer in layers.items() if layer.is_feedforward}


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Return how many weights train and how many there are, the method's own included."""
    parameters = list(model.parameters())
    return ParameterCounts(
        trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        total=sum(_num_weights(parameter) for parameter in parameters),
    )


def _num_weights(parameter: nn.Parameter) -> int:
    # bitsandbytes stores two 4-bit weights in a byte.
    stored: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if stored is None else stored.shape.numel()
