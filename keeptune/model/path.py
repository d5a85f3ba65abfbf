"""The way from the base model to a tuned one: an artifact and its base arrive, a model set to any α in [0, 1] leaves.

α = 0 is the base model and α = 1 the tuned one. Between them each tensor goes in a straight line from its value at the
base to its trained value. So a whole model goes the way of WiSE-FT, θ₀ + α(θ₁ - θ₀), and so does LoRA, of which B alone
moves: scale·(αB)A. Methods that rotate (OFT, BOFT, ROAD) go along the rotation's generator: a curve with the same ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from keeptune.errors import RecipeError, raise_collected
from keeptune.model.artifact import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    TEXT_FILES,
    adapter_weights,
    load_artifact,
    save_adapter_weights,
    save_whole_model,
    writing,
)
from keeptune.model.attention import base_of
from keeptune.model.declared import Quantization
from keeptune.model.folder import check_model_folder
from keeptune.model.load import load_model
from keeptune.model.methods import quiet_peft
from keeptune.model.patterns import refuse_endless_patterns
from keeptune.model.served import refuse_unserved_adapter
from keeptune.storage import (
    MANIFEST,
    file_sha256,
    read_json_object,
    read_record,
    require_unchanged,
    staged_folder,
    write_atomic,
)

# Where a tensor of an adapter starts: at a number, at the base model's own value, or at its trained value, unmoved.
_HELD: Final = "held"
_OWN: Final = "own"
_Start = float | str
# Per method, the tensors that PEFT saves and their start. Of factors that are multiplied, one moves and the others are
# held, so that their product moves in a straight line and is exactly 0 at the start.
_STARTS: dict[str, dict[str, _Start]] = {
    "ADALORA": {"lora_A": _HELD, "lora_B": _HELD, "lora_E": 0.0},
    "BEFT": {"beft_bias": 0.0},
    "BOFT": {"boft_R": 0.0, "boft_s": 1.0},
    "C3A": {"c3a_kernel": 0.0},
    "DELORA": {"delora_A": _HELD, "delora_B": _HELD, "delora_w_norm": _HELD, "delora_lambda": 0.0},
    "FOURIERFT": {"fourierft_spectrum": 0.0},
    "GRALORA": {"gralora_A": _HELD, "gralora_B": 0.0, "gralora_A_general": _HELD, "gralora_B_general": 0.0},
    "HIRA": {"hira_A": _HELD, "hira_B": 0.0, "hira_embedding_A": _HELD, "hira_embedding_B": 0.0},
    "IA3": {"ia3_l": 1.0},
    "LN_TUNING": {"ln_tuning_layers": _OWN},
    "LOHA": dict.fromkeys(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_t1", "hada_t2"), _HELD) | {"hada_w2_b": 0.0},
    # PEFT has either w1 or its factors; so with w2.
    "LOKR": dict.fromkeys(("lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"), _HELD)
    | {"lokr_w1": 0.0, "lokr_w1_a": 0.0},
    "LORA": {
        "lora_A": _HELD,
        "lora_B": 0.0,
        "lora_embedding_A": _HELD,
        "lora_embedding_B": 0.0,
        "lora_magnitude_vector": _OWN,
    },
    "MISS": {"miss_block": 0.0},
    "OFT": {"oft_R": 0.0, "oft_embedding_R": 0.0},
    "RANDLORA": {"randlora_A": _HELD, "randlora_B": _HELD, "randlora_gamma": _HELD, "randlora_lambda": 0.0},
    "ROAD": {"road_theta": 0.0, "road_alpha": 1.0},
    "SHIRA": {"shira_weight": 0.0, "shira_indices": _HELD},
    "TRAINABLE_TOKENS": {},
    "VERA": {"vera_A": _HELD, "vera_B": _HELD, "vera_lambda_d": _HELD, "vera_lambda_b": 0.0},
    "WAVEFT": {"waveft_spectrum": 0.0},
}
# Saved beside any method's tensors where it trains single tokens.
_TOKENS: dict[str, _Start] = {"trainable_tokens_delta": _OWN}
# What PEFT puts into the names of the base model's own weights (trained biases, modules_to_save).
_WRAPPERS = {"base_layer", "original_module", "modules_to_save"}
_PROMPTS = ("CARTRIDGE", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")


def why_no_path(peft_type: str | None, arguments: Mapping[str, Any]) -> str | None:
    """Return why a method has no way from the base model, as a clause to follow "because", or None where it has one.

    `arguments` are those of a recipe's method or the content of an `adapter_config.json`; no `peft_type` is full
    fine-tuning. A method without a way can be set to α = 1 only.
    """
    if peft_type is None:
        return None
    start = arguments.get("init_lora_weights")
    if peft_type == "LORA" and isinstance(start, str) and start.lower().startswith(("pissa", "olora")):
        return f"its start (init_lora_weights: {start}) moves a part of the base model's weights into the adapter"
    if arguments.get("layer_replication"):
        return "its replicated layers (layer_replication) are not in the base model"
    if peft_type in _PROMPTS:
        return f"{peft_type} adds inputs, and no value of them gives the base model"
    if peft_type not in _STARTS:
        return f"keeptune knows no way from the base model that {peft_type} could go"
    return None


def moves_own_weights(peft_type: str | None, arguments: Mapping[str, Any]) -> bool:
    """Tell whether a method trains weights of the base model itself, rather than weights beside them."""
    kept_whole = ("modules_to_save", "trainable_token_indices")
    biases = arguments.get("bias", "none") != "none"
    return peft_type in {None, "LN_TUNING", "TRAINABLE_TOKENS"} or biases or any(arguments.get(k) for k in kept_whole)


@dataclass(frozen=True, slots=True)
class _Moved:
    """A tensor of the model, which it shares, and its values at α = 0 and at α = 1."""

    live: Tensor
    base: Tensor
    tuned: Tensor


@dataclass(frozen=True, slots=True)
class ModelPath:
    """A model between base and tuned, as `load_artifact` returns it; `open_path` makes it, at α = 1."""

    model: nn.Module
    artifact: Path
    source_sha256: str
    """Of the artifact's manifest, which holds the hash of each of its files."""
    no_path: str | None
    """Why only α = 1 is possible; None where every α is."""
    moved: tuple[_Moved, ...]

    @torch.no_grad()
    def set_(self, alpha: float) -> None:
        """Set the model's weights to α in place; the result does not depend on where they stood.

        They are computed in fp32 on the CPU, each operation rounded by itself, so that every machine finds the same
        bits, and then cast to the type of the model's weights.

        Raises:
            RecipeError: α is not from 0 to 1, or is not 1 and the method has no path.
        """
        if not 0.0 <= alpha <= 1.0:
            raise RecipeError(f"alpha: found {alpha}; expected a number from 0 (base) to 1 (tuned). Choose such a one.")
        if self.no_path is not None and alpha != 1.0:
            raise RecipeError(
                f"{self.artifact}: found alpha {alpha}; expected 1, because {self.no_path}. Leave out other values, "
                "or train another method, such as LORA."
            )
        for moved in self.moved:
            moved.live.copy_(_between(moved.base, moved.tuned, alpha))

    def save(self, alpha: float, folder: Path, *, facts: Mapping[str, Any]) -> None:
        """Set the model to α and write it to `folder` in the layout of `save_artifact`, bit for bit as it is set.

        The files of text and generation are the artifact's own. `manifest.json` holds the artifact's facts but for the
        `key` of its stage, then `facts`, `alpha` and `source_sha256`.

        Raises:
            RecipeError: the same as `set_`.
            StorageError: the disk refuses.
        """
        assert folder.resolve() != self.artifact.resolve(), folder
        self.set_(alpha)
        source = {k: v for k, v in read_record(self.artifact / MANIFEST).items() if k not in {"files", "key"}}
        own_facts = {"alpha": alpha, "source_sha256": self.source_sha256}
        copied = TEXT_FILES
        with staged_folder(folder, facts={**source, **facts, **own_facts}) as staging, writing(folder):
            if isinstance(self.model, PeftModel):
                save_adapter_weights(self.model, staging)
                copied = (*TEXT_FILES, ADAPTER_CONFIG)
            else:
                generation = GenerationConfig.from_pretrained(self.artifact)
                save_whole_model(base_of(self.model), staging, generation=generation)
            for name in copied:
                if (self.artifact / name).exists():
                    write_atomic(staging / name, (self.artifact / name).read_bytes())


def _between(base: Tensor, tuned: Tensor, alpha: float) -> Tensor:
    """Return base + α(tuned - base) in fp32; at the ends the end itself, as the formula may lose its last bit."""
    if alpha == 0.0:
        return base
    if alpha == 1.0:
        return tuned
    start = base.float()
    return (tuned.float() - start).mul_(alpha).add_(start)


def open_path(
    artifact: Path,
    *,
    base: Path,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
) -> ModelPath:
    """Return the way from the model in `base` to `artifact`, a folder that `save_artifact` wrote.

    α = 0 of a whole model is the base's weights bit for bit. Of an adapter it adds exactly nothing; two kinds compute
    with the base's weights or activations anew, which is exact as far as the device's products are (not in TF32): DoRA
    divides a norm by itself, OFT and BOFT multiply by a unit matrix. Both ends of a whole model stay on the disk,
    mapped into memory, where their files hold nothing but fp32 or nothing but bf16.

    Raises:
        RecipeError: a weight of a whole model is in one of the two only or has two shapes, or a tensor of an adapter is
            unknown.
        StorageError: the artifact is not as its manifest says.
    Source: Wortsman et al. 2021, "Robust fine-tuning of zero-shot models", arXiv 2109.01903, section 3.
    """
    require_unchanged(artifact)
    source_sha256 = file_sha256(artifact / MANIFEST)
    if not (artifact / ADAPTER_CONFIG).exists():
        ends = _whole_ends(artifact, base)
        model = load_artifact(artifact, base=base, device=device, dtype=dtype)
        return ModelPath(model, artifact, source_sha256, None, _moved(_weights(model), ends))
    config = read_json_object(artifact / ADAPTER_CONFIG)
    refuse_unserved_adapter(config, where=str(artifact / ADAPTER_CONFIG))
    no_path = why_no_path(config["peft_type"], config)
    # PEFT draws weights before it reads the trained ones; the global random state stays as it was.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        read_base = partial(load_model, base, device=device, dtype=dtype, quantization=quantization)
        ends = {} if no_path else _adapter_ends(artifact, config["peft_type"], read_base=read_base)
        model = load_artifact(artifact, base=base, device=device, dtype=dtype, quantization=quantization)
    live = get_peft_model_state_dict(model, save_embedding_layers=False)
    return ModelPath(model, artifact, source_sha256, no_path, _moved(live, ends))


def _moved(live: Mapping[str, Tensor], ends: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[_Moved, ...]:
    return tuple(_Moved(live[name], base, tuned) for name, (base, tuned) in ends.items())


def _whole_ends(artifact: Path, base: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each weight's values in the base and in the tuned model, tied ones once."""
    start, end = (
        _weights(load_model(folder, device=torch.device("cpu"), dtype=_stored_dtype(folder)))
        for folder in (base, artifact)
    )
    problems = [
        f"{artifact}: found {_shape(end, name)} of the weight {name!r} and {_shape(start, name)} in {base}; expected "
        "the same weights in both. Name the base model that was trained."
        for name in sorted(start.keys() | end.keys())
        if _shape(start, name) != _shape(end, name)
    ]
    if problems:
        raise_collected(RecipeError, problems)
    return {name: (start[name], end[name]) for name in start}


def _shape(weights: Mapping[str, Tensor], name: str) -> str:
    return f"shape {tuple(weights[name].shape)}" if name in weights else "nothing"


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and saved buffers, sharing memory with the model; tied ones have one name only."""
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return {name: parameter.detach() for name, parameter in model.named_parameters()} | buffers


def _stored_dtype(folder: Path) -> torch.dtype:
    """Return bf16 where all weights in the folder's files are that, else fp32: reading them so rounds nothing."""
    found = set()
    for file in check_model_folder(folder).files[1:]:
        with safe_open(file, framework="pt") as weights:
            found |= {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118 (no mapping)
    return torch.bfloat16 if found == {"BF16"} else torch.float32


def _adapter_ends(
    artifact: Path, peft_type: str, *, read_base: Callable[[], PreTrainedModel]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return, by the names of PEFT's file, the values at the base and the trained ones of each tensor that moves."""
    tuned = adapter_weights(artifact)
    known = _STARTS[peft_type] | _TOKENS
    starts = {name: next((known[part] for part in name.split(".") if part in known), None) for name in tuned}
    moving = {name: start for name, start in starts.items() if start != _HELD}
    at_base: dict[str, Tensor] = {}
    if not all(isinstance(start, float) for start in moving.values()):
        strangers = {name for name, start in starts.items() if start is None}
        at_base = _untrained(artifact, read_base(), strangers=strangers)
    return {
        name: (torch.tensor(start).expand_as(tuned[name]) if isinstance(start, float) else at_base[name], tuned[name])
        for name, start in moving.items()
    }


def _untrained(artifact: Path, model: PreTrainedModel, *, strangers: set[str]) -> dict[str, Tensor]:
    """Return what PEFT would save before any training: biases, whole modules, tokens and norms are the base model's.

    `strangers` are names that the method's table does not know: each must be one of the base model's own weights.
    """
    own = model.state_dict().keys()
    unknown = sorted(name for name in strangers if _own_name(name) not in own)
    if unknown:
        raise RecipeError(
            f"{artifact / ADAPTER_WEIGHTS}: found {unknown[0]!r}, whose value at the base model is unknown; expected "
            "only tensors of an adapter that keeptune trained. Train the method with keeptune, or evaluate no path."
        )
    config: Any = PeftConfig.from_pretrained(str(artifact))
    for chance in {"init_lora_weights", "init_weights"} & vars(config).keys():
        # Tokens that start at random, and norms of weights to which something random was added, are not the base's.
        setattr(config, chance, True)
    refuse_endless_patterns(vars(config), model, prefix=f"{artifact / ADAPTER_CONFIG}: ")
    with quiet_peft():
        state = get_peft_model_state_dict(get_peft_model(model, config), save_embedding_layers=False)
    return {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}


def _own_name(name: str) -> str:
    """Return the base model's name of a weight that PEFT's file names by where it stands among PEFT's modules."""
    parts = name.removeprefix("base_model.model.").split(".")
    return ".".join(part for part in parts if part not in _WRAPPERS)
