"""What the base expects, held against its own logits; and the loss of batches whose examples have a teacher or none."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from keeptune.model.loss import batch_loss, target_losses
from keeptune.model.teacher import base_top_k
from keeptune.progress import Silent
from keeptune.text.batches import Batch, pack, pad, pad_pairs
from keeptune.text.mixture import Chosen
from keeptune.text.tokens import Example, Teacher
from tests.model.test_attention import LargestTensor
from tests.model.tiny import CONFIGS, T5, VOCAB_SIZE, gradients, make_model
from tests.training.tiny import Table

# peft 0.21 asks transformers 5.23 for a name that it has since given another.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Collate = Callable[[Sequence[Example]], Batch]
PAD = partial(pad, pad_id=0)
PAIRS = partial(pad_pairs, pad_id=0)
EVERYTHING = 1000


def examples(lengths: Sequence[int], *, seed: int = 0) -> list[Example]:
    """Return random examples with a prompt of two tokens, or of one in the shortest."""
    generator = np.random.default_rng(seed)
    return [
        Example(generator.integers(3, VOCAB_SIZE, size=n).astype(np.int32), loss_mask=np.arange(n) >= min(2, n - 1))
        for n in lengths
    ]


def teachers(
    model: nn.Module,
    given: Sequence[Example],
    *,
    k: int,
    collate: Collate = pack,
    micro_batches: Sequence[Sequence[int]] | None = None,
    **changed: Any,
) -> list[Teacher]:
    table = Table(tuple(given), tuple(map(str, range(len(given)))))
    arguments: dict[str, Any] = {"through_logits": False, "autocast": None, "progress": Silent(), **changed}
    groups = [range(len(given))] if micro_batches is None else micro_batches
    return base_top_k(model, table, k=k, micro_batches=groups, collate=collate, **arguments)


def logits_of(model: nn.Module, example: Example, collate: Collate) -> Tensor:
    """Return the model's own logits at the targets of one example, in fp32."""
    if collate is PAIRS:
        completion = torch.from_numpy(example.completion_ids.astype(np.int64))
        decoder = torch.cat([torch.zeros(1, dtype=torch.long), completion[:-1]])[None]
        prompt = torch.from_numpy(example.prompt_ids.astype(np.int64))[None]
        return model(input_ids=prompt, decoder_input_ids=decoder).logits[0].float()
    logits = model(input_ids=torch.from_numpy(example.input_ids.astype(np.int64))[None]).logits[0].float()
    return logits[:-1][torch.from_numpy(example.loss_mask[1:])]


KINDS = [("llama", pack), ("llama", PAD), ("granite", pack), ("gemma2", PAD), ("t5", PAIRS)]


def model_of(name: str, *, seed: int = 0) -> PreTrainedModel:
    if name != "t5":
        return make_model(CONFIGS[name], seed=seed)
    config = copy.deepcopy(T5)
    # Of a size at which fp32 keeps five digits of the gradient.
    config.initializer_factor = 1.0
    return make_model(config, seed=seed)


@pytest.mark.parametrize(("name", "collate"), KINDS)
@pytest.mark.parametrize("through_logits", [False, True])
def test_a_teacher_holds_the_base_models_own_log_probabilities(
    name: str, collate: Collate, through_logits: bool
) -> None:
    model = model_of(name)
    given = examples([9, 3, 12])
    micro_batches = [[2], [1, 0]]
    found = teachers(model, given, k=5, collate=collate, micro_batches=micro_batches, through_logits=through_logits)
    model.eval()
    for example, teacher in zip(given, found, strict=True):
        log_probs = logits_of(model, example, collate).log_softmax(1).detach()
        top = log_probs.topk(5, 1)
        assert (teacher.ids.dtype, teacher.log_probs.dtype) == (np.int32, np.float32)
        assert teacher.ids.tolist() == top.indices.tolist()
        assert np.allclose(teacher.log_probs[:, :-1], top.values, atol=1e-5)
        assert np.allclose(teacher.log_probs[:, -1], (1 - top.values.double().exp().sum(1)).log(), atol=1e-4)


def test_k_stops_at_the_vocabulary_and_dropout_is_off() -> None:
    config = copy.deepcopy(CONFIGS["llama"])
    config.attention_dropout = 0.5  # pyright: ignore[reportAttributeAccessIssue]
    model = make_model(config)
    given = examples([9, 3])
    first, second = (teachers(model, given, k=EVERYTHING) for _ in range(2))
    assert model.training
    for one, other in zip(first, second, strict=True):
        assert one.ids.shape[1] == VOCAB_SIZE and np.array_equal(one.log_probs, other.log_probs)
        assert np.all(one.log_probs[:, -1] == -np.inf)


def test_the_base_model_may_compute_in_bf16() -> None:
    given = examples([9, 3])
    exact, short = (teachers(model_of("llama"), given, k=4, autocast=dtype) for dtype in (None, torch.bfloat16))
    assert short[0].log_probs.dtype == np.float32
    difference = np.abs(exact[0].log_probs.max(1) - short[0].log_probs.max(1)).max()
    assert 0 < difference < 0.3


def with_teachers(given: Sequence[Example], found: Sequence[Teacher], *, taught: Sequence[int]) -> list[Example]:
    table = Table(tuple(given), tuple(map(str, range(len(given)))))
    all_taught = Chosen(table, np.arange(len(given)), teachers=found)
    return [all_taught[i] if i in taught else example for i, example in enumerate(given)]


def reference_loss(
    model: nn.Module,
    base: nn.Module,
    given: Sequence[Example],
    *,
    taught: Sequence[int],
    k: int,
    kl_weight: float,
    collate: Collate,
) -> Tensor:
    """Return the loss from full logits, one example after the other."""
    total = torch.zeros(())
    for i, example in enumerate(given):
        logits = logits_of(model, example, collate)
        if i not in taught:
            targets = torch.from_numpy(example.input_ids[example.loss_mask].astype(np.int64))
            total = total + torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
            continue
        p, q = (tensor.double().softmax(1) for tensor in (logits_of(base, example, collate).detach(), logits))
        kept = p.topk(min(k, VOCAB_SIZE), 1).indices
        p_kept, q_kept = p.gather(1, kept), q.gather(1, kept)
        divergence = (p_kept * (p_kept / q_kept).log()).sum()
        if k < VOCAB_SIZE:
            p_rest, q_rest = 1 - p_kept.sum(1), 1 - q_kept.sum(1)
            divergence = divergence + (p_rest * (p_rest / q_rest).log()).sum()
        total = total + kl_weight * divergence.float()
    return total


@pytest.mark.parametrize(("name", "collate"), KINDS)
@pytest.mark.parametrize("k", [6, EVERYTHING])
@pytest.mark.parametrize("through_logits", [False, True])
def test_a_batch_with_and_without_teachers_has_the_loss_of_its_examples_one_by_one(
    name: str, collate: Collate, k: int, through_logits: bool
) -> None:
    base, model = model_of(name).eval(), model_of(name, seed=1).eval()
    reference = copy.deepcopy(model)
    given = examples([9, 3, 12, 5, 2])
    found = teachers(base, given, k=k, collate=collate)
    batch = collate(with_teachers(given, found, taught=[0, 3]))
    arguments: dict[str, Any] = {"through_logits": through_logits, "kl_weight": 0.3, "chunk_targets": 3}
    loss = batch_loss(model, batch, **arguments)
    loss.backward()
    expected = reference_loss(reference, base, given, taught=[0, 3], k=k, kl_weight=0.3, collate=collate)
    expected.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, theirs = gradients(model), gradients(reference)
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < 1e-5
    with torch.no_grad():
        assert batch_loss(model, batch, **arguments).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("modules", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}, {}])
def test_an_adapter_learns_from_the_unwrapped_base(modules: dict[str, Any]) -> None:
    base = model_of("llama").eval()
    given = examples([9, 3, 12])
    found = teachers(base, given, k=6)
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, init_lora_weights=False, **modules)
    model = get_peft_model(copy.deepcopy(base), config)
    reference = copy.deepcopy(model)
    batch_loss(model, pack(with_teachers(given, found, taught=[0, 1])), chunk_targets=5).backward()
    reference_loss(reference, base, given, taught=[0, 1], k=6, kl_weight=1.0, collate=pack).backward()
    ours, theirs = gradients(model), gradients(reference)
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < 1e-5


def test_the_loss_with_teachers_is_fp32_under_autocast() -> None:
    base = model_of("llama").eval()
    given = examples([9, 3, 12])
    batch = pack(with_teachers(given, teachers(base, given, k=6), taught=[0, 1]))
    exact, short = model_of("llama", seed=1).eval(), model_of("llama", seed=1).eval()
    expected = batch_loss(exact, batch)
    expected.backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss = batch_loss(short, batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)
    ours, theirs = gradients(short), gradients(exact)
    assert ours.dtype == torch.float32
    assert ((ours - theirs).norm() / theirs.norm()).item() < 0.05


def test_a_batch_of_taught_examples_alone_and_one_without_weight() -> None:
    base, model = model_of("llama").eval(), model_of("llama", seed=1).eval()
    given = examples([9, 3])
    batch = pack(with_teachers(given, teachers(base, given, k=6), taught=[0, 1]))
    loss = batch_loss(model, batch)
    loss.backward()
    assert loss.item() > 0 and gradients(model).abs().max() > 0
    model.zero_grad()
    batch_loss(model, batch, kl_weight=0.0).backward()
    assert gradients(model).abs().max() == 0
    assert torch.equal(target_losses(model, batch), target_losses(model, pack(given)))


def test_no_tensor_of_tokens_by_vocabulary_is_made() -> None:
    config = copy.deepcopy(CONFIGS["llama"])
    config.vocab_size, config.max_position_embeddings = 2000, 512  # pyright: ignore[reportAttributeAccessIssue]
    model = make_model(config)
    given = examples([200, 200])
    batch = pack(with_teachers(given, teachers(model, given, k=4), taught=[1]))
    with LargestTensor() as largest:
        batch_loss(model, batch, chunk_targets=16).backward()
    # The largest are the weights' gradients, (2000, 32); 400 tokens by 2000 would be 800,000.
    assert largest.num_elements == 2000 * 32
