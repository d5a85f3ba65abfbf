"""How a model is set for a while: a model arrives, is switched inside a block and left as it came."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from keeptune.errors import RecipeError

# Methods of PEFT that stand in a cache of keys and values, which layers do not read when they are recomputed.
NOT_RECOMPUTED = frozenset({"CARTRIDGE", "PREFIX_TUNING"})


@contextlib.contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like on inside the block; each module's own mode returns after it."""
    with _mode(model, training=True):
        yield


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout and gradients off inside the block; each module's own mode returns after it."""
    with _mode(model, training=False), torch.no_grad():
        yield


@contextlib.contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextlib.contextmanager
def gradient_checkpointing(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Recompute activations in the backward pass inside the block, where `enabled`.

    Raises:
        RecipeError: the model cannot.
    """
    if not enabled:
        yield
        return
    # The methods of a transformers model, also inside a PEFT wrapper; later versions call them activation_….
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    enable, disable = (getattr(model, f"{name}_checkpointing_{verb}") for verb in ("enable", "disable"))
    try:
        # The re-entrant variant would lose the gradients of adapters, whose input needs none.
        enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
    except ValueError as error:
        raise RecipeError(
            f"training.gradient_checkpointing: found true with a model that cannot recompute its activations "
            f"({error}); expected false. Set training.gradient_checkpointing=false."
        ) from error
    try:
        yield
    finally:
        disable()
