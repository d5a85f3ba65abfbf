"""The loop with the real loss over packed batches: a tiny random Llama, all of it and with LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from keeptune.errors import Interrupted
from keeptune.model.loss import batch_loss
from keeptune.model.methods import Method, apply_method

from .tiny import VOCABULARY, StopAt, digest_run, read_events, run

LORA = {"r": 2, "lora_dropout": 0.2, "target_modules": "all-linear"}


def make_llama(peft_type: str | None) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.1,
        bos_token_id=1,
        eos_token_id=2,
    )
    method = Method(peft_type or "full", peft_type, 0.01, LORA if peft_type else {})
    return apply_method(LlamaForCausalLM(config), method, seed=1)


def start(peft_type: str | None, folder: Path, **changed: Any) -> dict[str, Any]:
    model = make_llama(peft_type)
    changed = {"tokens_per_step": 40, "tokens_per_micro_batch": 20, "loss": batch_loss, **changed}
    run(model, folder, **changed)
    return digest_run(model, folder)


@pytest.mark.parametrize("peft_type", [None, "LORA"])
def test_a_llama_stopped_anywhere_ends_with_the_same_bits(tmp_path: Path, peft_type: str | None) -> None:
    stop = StopAt()
    expected = start(peft_type, tmp_path / "reference", stop_requested=stop)
    losses = [event["loss"] for event in read_events(tmp_path / "reference") if event["event"] == "step"]
    assert losses[-1] < losses[0]
    for position in range(0, stop.num_polls, 4):
        folder = tmp_path / str(position)
        with pytest.raises(Interrupted):
            start(peft_type, folder, stop_requested=StopAt(position))
        digest = start(peft_type, folder)
        assert {**digest, "checkpoints": None} == {**expected, "checkpoints": None}, position


@pytest.mark.parametrize("peft_type", [None, "LORA"])
def test_gradient_checkpointing_changes_no_loss_and_is_off_again(tmp_path: Path, peft_type: str | None) -> None:
    plain = start(peft_type, tmp_path / "plain")
    forward_passes, model = counted_forward_passes(peft_type)
    arguments: dict[str, Any] = {"tokens_per_step": 40, "tokens_per_micro_batch": 20, "loss": batch_loss}
    run(model, tmp_path / "recomputed", gradient_checkpointing=True, **arguments)
    recomputed = digest_run(model, tmp_path / "recomputed")
    losses, expected = ([e["loss"] for e in digest["log"] if "loss" in e] for digest in (recomputed, plain))
    assert losses == pytest.approx(expected, abs=1e-4)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    plain_forward_passes, plain_model = counted_forward_passes(peft_type)
    run(plain_model, tmp_path / "again", **arguments)
    assert len(forward_passes) > len(plain_forward_passes)


def counted_forward_passes(peft_type: str | None) -> tuple[list[int], nn.Module]:
    model, passes = make_llama(peft_type), []
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.0.mlp"))
    layer.register_forward_pre_hook(lambda *_: passes.append(1))
    return passes, model
