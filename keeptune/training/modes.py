"""How a model is set for a while: a model arrives, is switched inside a block and left as it came."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn


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
    """Recompute activations in the backward pass inside the block, where `enabled`."""
    if not enabled:
        yield
        return
    # transformers' and PEFT's own methods; the re-entrant variant would lose the gradients of adapters, whose
    # input needs none.
    switchable = cast("Any", model)
    switchable.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        switchable.gradient_checkpointing_disable()
