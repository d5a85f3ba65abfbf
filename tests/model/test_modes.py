from __future__ import annotations

import pytest
import torch

from keeptune.errors import RecipeError
from keeptune.model.modes import evaluating, gradient_checkpointing, training
from tests.training.tiny import make_model


def test_each_module_gets_its_own_mode_back() -> None:
    model = make_model()
    model.train()
    model.norm.eval()
    with evaluating(model):
        assert not model.training and not model.dropout.training
        assert not torch.is_grad_enabled()
    assert model.training and model.dropout.training and not model.norm.training
    with training(model):
        assert model.norm.training
    assert not model.norm.training


def test_the_mode_returns_after_an_error() -> None:
    model = make_model().train()
    with pytest.raises(ValueError, match="x"), evaluating(model):
        raise ValueError("x")
    assert model.dropout.training and torch.is_grad_enabled()


class Switchable(torch.nn.Module):
    """A model of transformers before it renamed these methods."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[object] = []

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, bool]) -> None:
        self.calls.append(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.calls.append("off")


class Renamed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[object] = []

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict[str, bool]) -> None:
        self.calls.append(activation_checkpointing_kwargs)

    def activation_checkpointing_disable(self) -> None:
        self.calls.append("off")


@pytest.mark.parametrize("kind", [Switchable, Renamed])
def test_gradient_checkpointing_is_on_inside_the_block_only(kind: type[Switchable | Renamed]) -> None:
    model = kind()
    with gradient_checkpointing(model, enabled=True):
        assert model.calls == [{"use_reentrant": False}]
    assert model.calls[-1] == "off"
    with gradient_checkpointing(model, enabled=False):
        assert len(model.calls) == 2


def test_a_model_that_cannot_recompute_is_refused() -> None:
    class Unable(Switchable):
        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, bool]) -> None:
            raise ValueError("Unable does not support it")

    with (
        pytest.raises(
            RecipeError, match=r"cannot recompute its activations \(Unable does.*gradient_checkpointing=false"
        ),
        gradient_checkpointing(Unable(), enabled=True),
    ):
        pass
