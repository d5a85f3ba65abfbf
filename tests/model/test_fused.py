"""Replaced layers: the same losses and gradients, in less memory, and no trace of them after the block."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn

from keeptune.model.fused import FusedLayers, fused_layers
from keeptune.model.loss import batch_loss
from tests.model.tiny import CONFIGS, T5, gradients, make_examples, make_model, packed, pairs

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def lora_model(**arguments: object) -> nn.Module:
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules="all-linear", **arguments)  # pyright: ignore
    return get_peft_model(make_model(CONFIGS["llama"]), config)


def outcome(model: nn.Module, *, fused: bool) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    batch = pairs([5, 9, 2], [4, 1, 6]) if encoder_decoder else packed(make_examples([9, 3, 60]))
    with fused_layers(model if fused else nn.Identity()):
        loss = batch_loss(model, batch)
        loss.backward()
    return loss.item(), gradients(model)


def assert_unchanged(model: nn.Module) -> None:
    loss, grads = outcome(model, fused=False)
    fused_loss, fused_grads = outcome(model, fused=True)
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    assert ((fused_grads - grads).abs().max() / grads.abs().max()).item() < 1e-5


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", FusedLayers(num_norms=5, num_gated=2, num_lora=0)),
        ("qwen3", FusedLayers(num_norms=9, num_gated=2, num_lora=0)),
        # Gemma multiplies by 1 + weight and gates by GELU: the probe, or the parts, say no.
        ("gemma", FusedLayers(num_norms=0, num_gated=0, num_lora=0)),
        ("gpt2", FusedLayers(num_norms=0, num_gated=0, num_lora=0)),
    ],
)
def test_known_layers_are_replaced_and_nothing_changes(name: str, expected: FusedLayers) -> None:
    model = make_model(CONFIGS[name])
    for norm in (module for module in model.modules() if type(module).__name__.endswith("RMSNorm")):
        nn.init.normal_(norm.weight)  # pyright: ignore[reportArgumentType]
    with fused_layers(model) as layers:
        assert layers == expected
    assert_unchanged(model)


def test_the_norms_of_t5_are_replaced_and_nothing_changes() -> None:
    model = make_model(T5)
    with fused_layers(model) as layers:
        assert layers.num_norms == 12
    assert_unchanged(model)


def test_adapters_are_replaced_and_nothing_changes() -> None:
    model = lora_model(init_lora_weights=False)
    with fused_layers(model) as layers:
        assert layers == FusedLayers(num_norms=5, num_gated=2, num_lora=14)
    assert_unchanged(model)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_checkpointed_layers_are_recomputed_by_the_replacements() -> None:
    model = lora_model(init_lora_weights=False)
    loss, grads = outcome(model, fused=True)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})  # pyright: ignore
    again, fused_grads = outcome(model, fused=True)
    assert again == pytest.approx(loss, rel=1e-6)
    assert torch.allclose(grads, fused_grads, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("arguments", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_adapters_of_another_kind_are_left_alone(arguments: dict[str, object]) -> None:
    with fused_layers(lora_model(**arguments)) as layers:
        assert layers.num_lora == 0


def test_a_disabled_adapter_gives_the_base_model_inside_the_block() -> None:
    model = lora_model(init_lora_weights=False)
    batch = packed(make_examples([9, 3]))
    with model.disable_adapter():  # pyright: ignore[reportCallIssue]
        expected = batch_loss(model, batch).item()
        with fused_layers(model):
            assert batch_loss(model, batch).item() == pytest.approx(expected, rel=1e-5)
    with fused_layers(model):
        assert batch_loss(model, batch).item() != pytest.approx(expected, rel=1e-3)
        with model.disable_adapter():  # pyright: ignore[reportCallIssue]
            assert batch_loss(model, batch).item() == pytest.approx(expected, rel=1e-5)


def test_a_layer_that_computes_otherwise_is_left_alone() -> None:
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))
            self.variance_epsilon = 1e-6

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.weight * hidden / hidden.abs().mean(-1, keepdim=True)

    with fused_layers(OddRMSNorm()) as layers:
        assert layers.num_norms == 0


def test_the_originals_are_back_after_the_block_and_compute_without_gradients() -> None:
    model = make_model(CONFIGS["llama"])
    with pytest.raises(KeyError), fused_layers(model):
        assert any("forward" in vars(module) for module in model.modules())
        raise KeyError
    assert not any("forward" in vars(module) for module in model.modules())
    ids = torch.arange(3, 9)[None]
    with torch.no_grad(), fused_layers(model):
        inside = model(input_ids=ids).logits
    assert torch.equal(inside, model(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["llama", "lora"])
def test_less_is_kept_for_the_backward_pass(name: str) -> None:
    model = lora_model() if name == "lora" else make_model(CONFIGS["llama"])
    batch = packed(make_examples([60]))
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    totals = []
    for part in (nn.Identity(), model):
        kept.clear()
        with fused_layers(part), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = batch_loss(model, batch)
        totals.append(sum(kept.values()))
        del loss
    assert totals[1] < 0.93 * totals[0]
