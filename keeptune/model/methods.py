"""Which parameters train: a base model and a `Method` arrive, a model with trained weights marked leaves.

A method is full fine-tuning or any PEFT method under PEFT's own argument names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from keeptune.errors import RecipeError, raise_collected
from keeptune.model.declared import Quantization
from keeptune.model.memory import lacks_memory
from keeptune.model.patterns import refuse_endless_patterns
from keeptune.model.served import config_class, method_problems, nearest

# AdaLoRA's steps are counted when the data are there; any schedule fits into so many.
_ANY_NUMBER_OF_STEPS = 10**9
_MODULE_LISTS = ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save")
# What torch says where a method looks at values of weights.
_NO_VALUES = re.compile(r"meta tensor", re.IGNORECASE)
# A module that stands in a list, as each layer and all that is inside it do.
_IN_A_LIST = re.compile(r"\.\d+\.")
_OTHER_THAN_CONV1D = "Set {}.peft_type=LORA, which adapts this model's Conv1D layers."
_PEFT_ERRORS = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    RuntimeWarning,
    RuntimeError,
    ImportError,
    AssertionError,
)
_WITH_MAMBA_KERNEL = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
# What PEFT only warns of and goes on: a name that would have no effect.
_WITHOUT_EFFECT = "target_(modules|parameters)=.* were set but no (module|parameter) was matched"


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
    if problems := method_problems(method, quantised=quantised):
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


def _make_config(method: Method, *, encoder_decoder: bool, defaults: Mapping[str, Any]) -> PeftConfig:
    """Return the PEFT config; LoRA and AdaLoRA without targets take every linear layer but the output head."""
    arguments = {**defaults, **method.arguments}
    if method.peft_type == "ADALORA":
        arguments["total_step"] = _ANY_NUMBER_OF_STEPS
    if method.peft_type in {"LORA", "ADALORA"} and not arguments.keys() & {"target_modules", "target_parameters"}:
        arguments["target_modules"] = "all-linear"
    return config_class(method)(task_type="SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM", **arguments)  # pyright: ignore[reportArgumentType]


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
        # PEFT's own pattern for experts whose weights are joined, where an adapter leaves the experts alone.
        warnings.filterwarnings("ignore", message=r"The following alpha_pattern keys did not match.*gate_up_proj'\]")
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
    # OSF leaves tensors without an element where all directions of a weight stay.
    if not any(parameter.numel() for parameter in trained):
        where = f"methods.{method.name}"
        remedy = f"Set {where}.target_modules=all-linear."
        if _has_conv1d(model):
            remedy = _OTHER_THAN_CONV1D.format(where)
        elif method.peft_type == "OSF":
            remedy = f"Lower {where}.effective_rank, the number of directions that stay."
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


def _check_depth(model: PreTrainedModel, method: Method) -> None:
    """Refuse another number of layers than the model's: of a prefix, PEFT would train parts that no layer reads."""
    number = method.arguments.get("num_layers")
    depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    if "num_virtual_tokens" in method.arguments and number not in (None, depth):
        raise RecipeError(
            f"methods.{method.name}.num_layers: found {number}; expected {depth}, the number of the model's layers, "
            "which PEFT finds by itself. Remove this key."
        )


def _wrap(model: PreTrainedModel, method: Method, *, seed: int) -> PeftModel:
    _check_modules(model, method)
    refuse_endless_patterns(method.arguments, model, prefix=f"methods.{method.name}.")
    _check_depth(model, method)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), quiet_peft(), _peft_errors(method):
        warnings.filterwarnings("error", message=_WITHOUT_EFFECT, category=RuntimeWarning)
        torch.manual_seed(seed)
        encoder_decoder = bool(model.config.is_encoder_decoder)
        config = _make_config(method, encoder_decoder=encoder_decoder, defaults=_model_defaults(model, method))
        adapted = get_peft_model(model, config)
    if method.peft_type == "IA3":
        _name_feedforward_modules(adapted)
    return adapted


def _model_defaults(model: PreTrainedModel, method: Method) -> dict[str, Any]:
    """Return what PEFT would find out by itself with a warning, or show as a progress bar, and what it cannot adapt."""
    known = {field.name for field in dataclasses.fields(config_class(method))}
    defaults: dict[str, Any] = {}
    if "exclude_modules" in known and method.arguments.get("target_modules", "all-linear") == "all-linear":
        defaults["exclude_modules"] = _not_plainly_linear(model) or None
    if "fan_in_fan_out" in known and _has_conv1d(model):
        defaults["fan_in_fan_out"] = True
    if "progressbar" in known:
        defaults["progressbar"] = False
    return defaults


def _not_plainly_linear(model: PreTrainedModel) -> list[str]:
    """Return the linear layers that no adapter can stand beside: routers that return several tensors, Mamba's last."""
    found = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and type(module).__module__.startswith("transformers.models.")
        and type(module).forward is not nn.Linear.forward
        and not _returns_a_product(module)
    }
    # Mamba's kernel reads this layer's weight and never calls it; PEFT refuses to adapt it.
    return sorted(found | ({"out_proj"} if model.config.model_type in _WITH_MAMBA_KERNEL else set()))


@torch.no_grad()
def _returns_a_product(layer: nn.Linear) -> bool:
    try:
        out = layer(layer.weight.new_zeros(1, layer.in_features))
    except (TypeError, ValueError, RuntimeError, LookupError):
        # It takes more than an input, or inputs of another shape.
        return False
    return isinstance(out, torch.Tensor) and out.shape == (1, layer.out_features)


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
                problems.append(f"{found}. {nearest(str(wanted), leaves, listed=linear)}")
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
