"""The loss: equal to transformers' own, whatever the layout and the chunks, and never a (T, V) tensor."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model

from keeptune.model.linear_loss import even_chunks
from keeptune.model.loss import batch_loss, loss_is_exact, target_losses
from keeptune.text.batches import NOT_TRAINED, Batch
from tests.model.test_attention import LargestTensor
from tests.model.tiny import (
    CONFIGS,
    T5,
    VOCAB_SIZE,
    gradients,
    loss_one_by_one,
    make_examples,
    make_model,
    packed,
    padded,
    pairs,
)

# peft 0.21 asks transformers 5.23 for a name that it has since given another.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LENGTHS = [9, 3, 12]


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item() < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_the_padded_loss_is_that_of_transformers(name: str) -> None:
    model = make_model(CONFIGS[name])
    reference = copy.deepcopy(model)
    examples = make_examples(LENGTHS)
    expected = loss_one_by_one(reference, examples)
    expected.backward()
    loss = batch_loss(model, padded(examples))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert close(gradients(model), gradients(reference))


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_of_an_encoder_decoder_is_that_of_transformers(tied: bool) -> None:
    config = copy.deepcopy(T5)
    config.scale_decoder_outputs = tied
    # In fp32 either gradient is 3e-4 away from the exact one, and how far from the other depends on the processor.
    model = make_model(config).double()
    reference = copy.deepcopy(model)
    batch = pairs([5, 9, 2], [4, 1, 6])
    out = reference(
        input_ids=torch.from_numpy(batch.input_ids),
        attention_mask=torch.arange(9)[None] < torch.from_numpy(batch.lengths)[:, None],
        labels=torch.from_numpy(batch.labels),
    )
    (out.loss * batch.num_targets).backward()
    loss = batch_loss(model, batch)
    loss.backward()
    assert loss_is_exact(model)
    assert loss.item() == pytest.approx(out.loss.item() * 11, rel=1e-5)
    assert close(gradients(model), gradients(reference))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40), st.integers(0, 5))
def test_the_size_of_a_chunk_changes_nothing(chunk_targets: int, seed: int) -> None:
    examples = make_examples(LENGTHS, seed=seed)
    outcomes = []
    for size in (chunk_targets, 512):
        model = make_model(CONFIGS["llama-tied"])
        loss = batch_loss(model, packed(examples), chunk_targets=size)
        loss.backward()
        outcomes.append((loss.detach(), gradients(model)))
    assert close(outcomes[0][0], outcomes[1][0])
    assert close(outcomes[0][1], outcomes[1][1])


@pytest.mark.parametrize("make_batch", [packed, padded])
def test_target_losses_stand_in_the_order_of_the_batch(make_batch: object) -> None:
    model = make_model(CONFIGS["llama"]).eval()
    examples = make_examples(LENGTHS)
    losses = target_losses(model, make_batch(examples))  # pyright: ignore[reportCallIssue]
    assert losses.shape == (make_batch(examples).num_targets,)  # pyright: ignore[reportCallIssue]
    assert not losses.requires_grad
    start = 0
    for ids, labels in examples:
        logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0]
        expected = torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(labels[1:]), reduction="none")
        expected = expected[torch.from_numpy(labels[1:] != NOT_TRAINED)]
        assert torch.allclose(losses[start : start + len(expected)], expected, atol=1e-5)
        start += len(expected)


def test_without_gradients_the_loss_is_the_sum_of_the_target_losses() -> None:
    model = make_model(CONFIGS["llama"])
    batch = packed(make_examples(LENGTHS))
    with torch.no_grad():
        assert batch_loss(model, batch).item() == pytest.approx(target_losses(model, batch).sum().item())


def test_a_factor_behind_the_loss_reaches_every_gradient() -> None:
    batch = packed(make_examples(LENGTHS))
    one, half = make_model(CONFIGS["llama"]), make_model(CONFIGS["llama"])
    batch_loss(one, batch).backward()
    (batch_loss(half, batch) / 2).backward()
    assert close(gradients(half) * 2, gradients(one))


def test_a_second_backward_pass_fails_instead_of_scaling_twice() -> None:
    loss = batch_loss(make_model(CONFIGS["llama"]), packed(make_examples(LENGTHS)))
    loss.backward(retain_graph=True)
    with pytest.raises(AttributeError):
        loss.backward()


def test_a_frozen_output_layer_gets_no_gradient() -> None:
    model = make_model(CONFIGS["llama"])
    model.lm_head.requires_grad_(False)
    reference = make_model(CONFIGS["llama"])
    examples = make_examples(LENGTHS)
    batch_loss(model, packed(examples)).backward()
    loss_one_by_one(reference, examples).backward()
    assert model.lm_head.weight.grad is None
    assert close(model.model.embed_tokens.weight.grad, reference.model.embed_tokens.weight.grad)


def test_an_output_layer_with_a_bias() -> None:
    model = make_model(CONFIGS["llama"])
    model.lm_head = torch.nn.Linear(32, VOCAB_SIZE)
    reference = copy.deepcopy(model)
    examples = make_examples(LENGTHS)
    batch_loss(model, packed(examples), chunk_targets=5).backward()
    loss_one_by_one(reference, examples).backward()
    assert close(gradients(model), gradients(reference))
    assert model.lm_head.bias.grad is not None


@pytest.mark.parametrize("modules", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_an_output_layer_that_peft_wrapped(modules: dict[str, Any]) -> None:
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, init_lora_weights=False, **modules)
    model = get_peft_model(make_model(CONFIGS["llama"]), config)
    reference = copy.deepcopy(model)
    examples = make_examples(LENGTHS)
    batch_loss(model, packed(examples), chunk_targets=5).backward()
    loss_one_by_one(reference, examples).backward()
    assert close(gradients(model), gradients(reference))


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_carry_no_loss(config: type) -> None:
    model = get_peft_model(make_model(CONFIGS["llama"]), config(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3))
    reference = copy.deepcopy(model)
    examples = make_examples(LENGTHS)
    batch = padded(examples)
    loss = batch_loss(model, batch)
    loss.backward()
    attention_mask = torch.arange(12)[None] < torch.from_numpy(batch.lengths)[:, None]
    logits = reference(input_ids=torch.from_numpy(batch.input_ids), attention_mask=attention_mask).logits[:, -12:-1]
    labels = torch.from_numpy(batch.labels[:, 1:])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert close(gradients(model), gradients(reference))


def test_a_model_with_unknown_arithmetic_on_its_logits_goes_through_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(CONFIGS["llama"]).eval()
    assert loss_is_exact(model)
    forward = model.forward

    def shifted(*args: object, **kwargs: object) -> object:
        out = forward(*args, **kwargs)
        out.logits = out.logits * torch.linspace(0.5, 2, VOCAB_SIZE)
        return out

    monkeypatch.setattr(model, "forward", shifted)
    assert not loss_is_exact(model)
    batch = padded(make_examples(LENGTHS))
    loss = batch_loss(model, batch, through_logits=True)
    logits = model(input_ids=torch.from_numpy(batch.input_ids)).logits[:, :-1].flatten(0, 1)
    labels = torch.from_numpy(batch.labels[:, 1:]).flatten()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.requires_grad


def test_no_tensor_of_tokens_by_vocabulary_is_made() -> None:
    config = copy.deepcopy(CONFIGS["llama"])
    config.vocab_size, config.max_position_embeddings = 2000, 512
    model = make_model(config)
    with LargestTensor() as largest:
        batch_loss(model, packed(make_examples([200, 200])), chunk_targets=16).backward()
    # The largest are the weights' gradients, (2000, 32); 400 tokens by 2000 would be 800,000.
    assert largest.num_elements == 2000 * 32


def test_a_batch_without_targets_has_the_loss_zero() -> None:
    model = make_model(CONFIGS["llama"])
    ids = np.array([5, 6, 7])
    batch = Batch(ids, np.full(3, NOT_TRAINED), lengths=np.array([3]), packed=True)
    loss = batch_loss(model, batch)
    loss.backward()
    assert loss.item() == 0.0
    assert target_losses(model, batch).shape == (0,)
    assert gradients(model).abs().max() == 0


def test_a_loss_on_the_first_token_of_an_example_is_our_own_mistake() -> None:
    ids = np.array([5, 6, 7])
    with pytest.raises(AssertionError, match="first token"):
        batch_loss(make_model(CONFIGS["llama"]), Batch(ids, ids, lengths=np.array([1, 2]), packed=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_loss_is_fp32_under_autocast(dtype: torch.dtype) -> None:
    model: Any = make_model(CONFIGS["llama"])
    model.to(dtype)
    examples = make_examples(LENGTHS)
    expected = loss_one_by_one(make_model(CONFIGS["llama"]), examples).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = batch_loss(model, packed(examples))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=0.05)
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())


def test_many_chunks_in_bf16_add_up_in_fp32() -> None:
    examples = make_examples([40, 60, 30])
    exact = make_model(CONFIGS["llama"])
    batch_loss(exact, packed(examples)).backward()
    worst = []
    for chunk_targets in (512, 1):
        model = make_model(CONFIGS["llama"])
        with torch.autocast("cpu", torch.bfloat16):
            batch_loss(model, packed(examples), chunk_targets=chunk_targets).backward()
        difference = model.lm_head.weight.grad - exact.lm_head.weight.grad
        worst.append(float(difference.abs().max() / exact.lm_head.weight.grad.abs().max()))
    assert worst[0] < 0.05
    assert worst[1] < 1.2 * worst[0]


@given(st.integers(0, 2000), st.integers(1, 600))
def test_chunks_are_few_full_and_even(number: int, largest: int) -> None:
    chunks = even_chunks(number, largest)
    sizes = [chunk.stop - chunk.start for chunk in chunks]
    assert [i for chunk in chunks for i in range(chunk.start, chunk.stop)] == list(range(number))
    assert len(chunks) == -(-number // largest)
    assert not sizes or (max(sizes) <= largest and max(sizes) - min(sizes) <= 1)
