"""Trained weights and optimizer state as safetensors files: named parameters arrive, files leave, and back."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from keeptune.errors import CheckpointError
from keeptune.model.ranks import AdaptiveRanks
from keeptune.storage import storage_errors

# What AdamW keeps for each parameter that has had a gradient.
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
# Stands before the names of what AdaLoRA knows of its ranks, beside the moments.
_RANKS = "ranks/"
_OS_ERROR = re.compile(r"os error (\d+)")


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that take part in training, by name; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, *, parameters: Mapping[str, nn.Parameter], ranks: AdaptiveRanks | None = None
) -> dict[str, Tensor]:
    """Return the optimizer's state as `{kind}/{parameter name}`; a parameter without a gradient so far has none.

    What `ranks` need to go on stands beside it.
    """
    known = {} if ranks is None else ranks.tensors()
    return {f"{_RANKS}{name}": tensor for name, tensor in known.items()} | {
        f"{kind}/{name}": optimizer.state[parameter][kind]
        for name, parameter in parameters.items()
        if optimizer.state[parameter]
        for kind in _MOMENTS
    }


def save_tensors(path: Path, *, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as one safetensors file; the caller syncs it.

    Raises:
        StorageError: the disk refuses.
    """
    with storage_errors(path):
        try:
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
        except SafetensorError as error:
            # The library tells the system's error in words only.
            code = _OS_ERROR.search(str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def restore_parameters(path: Path, *, parameters: Mapping[str, nn.Parameter]) -> None:
    """Overwrite `parameters` with those in a file that `save_tensors` wrote.

    Raises:
        CheckpointError: the file holds other names or shapes.
    """
    with safe_open(path, framework="pt") as file, torch.no_grad():
        _require_same_names(path, found=set(file.keys()), expected=set(parameters))
        for name, parameter in parameters.items():
            _require_same_shape(path, name, found=file.get_slice(name).get_shape(), expected=parameter)
            parameter.copy_(file.get_tensor(name))


def restore_optimizer(
    path: Path,
    *,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    ranks: AdaptiveRanks | None = None,
) -> None:
    """Overwrite the state of `optimizer`, and that of `ranks`, with the tensors that `optimizer_tensors` gave.

    Raises:
        CheckpointError: the file holds other names or shapes.
    """
    optimizer.state.clear()
    with safe_open(path, framework="pt") as file:
        of_ranks = {key for key in file.keys() if key.startswith(_RANKS) and ranks is not None}  # noqa: SIM118
        if ranks is not None:
            ranks.restore_({key.removeprefix(_RANKS): file.get_tensor(key).clone() for key in of_ranks})
        found = set(file.keys()) - of_ranks
        with_state = {key.split("/", 1)[-1] for key in found} & set(parameters)
        _require_same_names(path, found=found, expected={f"{kind}/{name}" for name in with_state for kind in _MOMENTS})
        for name in sorted(with_state):
            parameter = parameters[name]
            for kind in ("exp_avg", "exp_avg_sq"):
                _require_same_shape(path, name, found=file.get_slice(f"{kind}/{name}").get_shape(), expected=parameter)
            # `clone`: a tensor of the file may be a view of its memory map, and the optimizer writes in place.
            optimizer.state[parameter] = {
                kind: file.get_tensor(f"{kind}/{name}").to(parameter.device).clone() for kind in _MOMENTS
            }


def _require_same_names(path: Path, *, found: set[str], expected: set[str]) -> None:
    different = sorted(found ^ expected)
    if different:
        raise CheckpointError(
            f"{path}: found other tensors than this model trains ({len(different)} differ, first {different[0]!r}); "
            "expected the same names. Use the model and method that wrote it, or choose another output_dir."
        )


def _require_same_shape(path: Path, name: str, *, found: list[int], expected: Tensor) -> None:
    if list(found) != list(expected.shape):
        raise CheckpointError(
            f"{path}: found {name!r} of shape {list(found)}; expected {list(expected.shape)}. "
            "Use the model and method that wrote it, or choose another output_dir."
        )
