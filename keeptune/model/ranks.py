"""AdaLoRA's ranks: an adapted model arrives at the loop; after each update its rank stands where it mattered most.

What AdaLoRA asks of a loop beside one loss and one update: a term that keeps its factors orthogonal, a look at the
gradients after each update, and the number of steps, over which the ranks shrink from `init_r` to `target_r`.

Source: Zhang et al. 2023, "Adaptive budget allocation for parameter-efficient fine-tuning", arXiv 2303.10512.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import AdaLoraModel
from torch import Tensor, nn

from keeptune.errors import RecipeError

_ADAPTER = "default"
# Of a rank's importance: the running mean, and how far its values lie from that.
_MEAN, _SPREAD, _KEPT = "mean", "spread", "kept"
# Of each weight PEFT keeps its last importance beside these two.
_NUM_NOTES = 3


@dataclass(frozen=True, slots=True)
class AdaptiveRanks:
    """The ranks of one model in training; each method that changes something ends in an underscore."""

    tuner: AdaLoraModel

    def add_orthogonality_(self) -> float:
        """Add the gradient of `orth_reg_weight` · mean ‖PᵀP - I‖ over the factors to theirs; return that value."""
        factors = [
            parameter if "lora_B." in name else parameter.T
            for name, parameter in self.tuner.model.named_parameters()
            if parameter.requires_grad and ("lora_A." in name or "lora_B." in name)
        ]
        with torch.enable_grad():
            distances = [torch.linalg.matrix_norm(p.T @ p - torch.eye(p.shape[1], device=p.device)) for p in factors]
            penalty = _config(self.tuner).orth_reg_weight * torch.stack(distances).mean()
        penalty.backward()
        return penalty.item()

    def allocate_(self, step: int) -> None:
        """Take the gradients of the update that was just made into account, and set ranks over budget to 0."""
        self.tuner.update_and_allocate(step)

    def tensors(self) -> dict[str, Tensor]:
        """Return, as `{kind}/{name}`, all that the next `allocate_` depends on beside the weights."""
        allocator, pattern = self.tuner.rankallocator, _config(self.tuner).rank_pattern or {}
        return {
            **{f"{_MEAN}/{name}": tensor for name, tensor in allocator.exp_avg_ipt.items()},
            **{f"{_SPREAD}/{name}": tensor for name, tensor in allocator.exp_avg_unc.items()},
            **{f"{_KEPT}/{name}": torch.tensor(kept) for name, kept in pattern.items()},
        }

    def restore_(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` returned."""
        found: dict[str, dict[str, Tensor]] = {_MEAN: {}, _SPREAD: {}, _KEPT: {}}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            found[kind][name] = tensor
        device = next(self.tuner.parameters()).device
        allocator = self.tuner.rankallocator
        allocator.exp_avg_ipt = {name: tensor.to(device) for name, tensor in found[_MEAN].items()}
        allocator.exp_avg_unc = {name: tensor.to(device) for name, tensor in found[_SPREAD].items()}
        # Only its names are read: PEFT writes each value before it uses it.
        allocator.ipt = dict(allocator.exp_avg_ipt)
        _config(self.tuner).rank_pattern = {name: kept.tolist() for name, kept in found[_KEPT].items()} or None


def adaptive_ranks(model: nn.Module, *, num_steps: int) -> AdaptiveRanks | None:
    """Return the ranks of an AdaLoRA model that trains for `num_steps` steps, None for any other model.

    Where neither `tinit` nor `tfinal` is given, the first tenth of the steps keeps all ranks and the last three tenths
    the final ones.

    Raises:
        RecipeError: `tinit` and `tfinal` leave no step in which the ranks could shrink.
    """
    tuner = _tuner(model)
    if tuner is None:
        return None
    config = _config(tuner)
    if config.tinit == config.tfinal == 0:
        config.tinit, config.tfinal = num_steps // 10, num_steps * 3 // 10
    if config.tinit + config.tfinal >= num_steps:
        raise RecipeError(
            f"peft_type ADALORA: found tinit {config.tinit} and tfinal {config.tfinal} in a training of {num_steps} "
            "steps; expected steps between them, in which ranks shrink. Lower them, or remove both."
        )
    config.total_step = num_steps
    return AdaptiveRanks(tuner)


def note_ranks_(model: nn.Module) -> None:
    """Have an AdaLoRA model's config name the ranks that its weights use, which may be those of an earlier step."""
    tuner = _tuner(model)
    if tuner is not None:
        names = {name: p for name, p in tuner.model.named_parameters() if f"lora_E.{_ADAPTER}" in name}
        _config(tuner).rank_pattern = {name: (p != 0).flatten().tolist() for name, p in names.items()}


def ranks_bytes(model: nn.Module) -> int:
    """Return how many bytes a training notes of an AdaLoRA model's weights, 0 for other models."""
    trained = (p for p in model.parameters() if p.requires_grad)
    return 0 if _tuner(model) is None else _NUM_NOTES * sum(p.numel() * p.element_size() for p in trained)


def _tuner(model: nn.Module) -> AdaLoraModel | None:
    tuner = getattr(model, "base_model", None)
    return tuner if isinstance(tuner, AdaLoraModel) else None


def _config(tuner: AdaLoraModel) -> Any:
    return tuner.peft_config[_ADAPTER]
