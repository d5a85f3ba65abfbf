"""What a training will take: exact where it can be, the largest micro-batch, and a speed that is only a guess."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from keeptune.model.loss import batch_loss
from keeptune.model.methods import Method, apply_method
from keeptune.text.batches import Batch, Step, pack, pad_pairs
from keeptune.text.tokens import Example
from keeptune.training.estimate import (
    MemoryEstimate,
    Speed,
    estimate_memory,
    largest_micro_batch,
    measure_speed,
    weights_bytes,
)
from keeptune.training.step import Work, make_optimizer
from keeptune.training.tensors import trained_parameters
from keeptune.training.world import SINGLE
from tests.model.test_methods import llama, t5

from .tiny import CPU, SETTINGS, Table, make_model, tiny_loss

FULL = Method("full", None, 1e-3, {})
LORA = Method("lora", "LORA", 1e-3, {"r": 4})


def work_of(model: nn.Module, *, loss: Any = batch_loss) -> Work:
    return Work(model, trained_parameters(model), loss, pack, SINGLE, CPU, None, lambda: False)


def rows_of(*lengths: int) -> list[Example]:
    generator = np.random.default_rng(0)
    return [Example(generator.integers(0, 64, n).astype(np.int32), np.arange(n) >= n // 2) for n in lengths]


def batch_of(*lengths: int) -> Batch:
    return pack(rows_of(*lengths))


def estimated(model: nn.Module, batch: Batch, **changed: Any) -> MemoryEstimate:
    arguments: dict[str, Any] = {"accumulates": True, "settings": SETTINGS, **changed}
    found = estimate_memory(work_of(model), batch=batch, **arguments)
    assert found is not None
    return found


@pytest.mark.parametrize("method", [FULL, LORA], ids=["full", "lora"])
def test_weights_gradients_and_optimizer_are_those_of_a_real_step(method: Method) -> None:
    model = apply_method(llama(tie_word_embeddings=True), method, seed=0)
    found = estimated(model, batch_of(20, 10))
    parameters = trained_parameters(model)
    optimizer = make_optimizer(parameters, settings=SETTINGS)
    batch_loss(model, batch_of(20, 10)).backward()
    optimizer.step()
    gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    assert found.gradients == sum(gradient.numel() * gradient.element_size() for gradient in gradients)
    assert found.optimizer == sum(value.numel() * value.element_size() for value in state)
    assert found.weights == sum(tensor.numel() * 4 for tensor in (*model.parameters(), *model.buffers()))


def test_a_pull_to_the_start_keeps_the_trained_weights_twice() -> None:
    model = apply_method(llama(), LORA, seed=0)
    plain, pulled = (estimated(model, batch_of(9, 5), keeps_start=keeps) for keeps in (False, True))
    assert pulled.weights - plain.weights == plain.gradients


def test_the_total_is_the_sum_of_the_kinds() -> None:
    estimate = MemoryEstimate(weights=1, gradients=20, optimizer=300, activations=4_000, runtime=50_000)
    assert estimate.total == 54_321
    assert estimate.to_json() == {
        "weights": 1, "gradients": 20, "optimizer": 300, "activations": 4_000, "runtime": 50_000, "total": 54_321,
    }  # fmt: skip


def test_the_process_counts_without_the_weights_that_it_holds() -> None:
    large = llama(vocab_size=1_000_000)
    found = estimated(large, batch_of(9, 5)).runtime
    del large
    again = estimated(llama(), batch_of(9, 5)).runtime
    # 32 million weights for the embeddings, and as many for the output layer.
    assert abs(found - again) < 60_000_000 < 100_000_000 < again


def test_more_tokens_take_more_and_checkpointing_takes_less() -> None:
    model = llama(num_hidden_layers=4)
    plain, more = estimated(model, batch_of(90, 60)), estimated(model, batch_of(180, 120))
    less = estimated(model, batch_of(90, 60), settings=replace(SETTINGS, gradient_checkpointing=True))
    assert less.activations < plain.activations < more.activations
    assert less.weights == plain.weights == more.weights


def test_a_single_micro_batch_a_step_finds_no_gradient_there() -> None:
    model = llama(intermediate_size=4_000)
    several, single = (estimated(model, batch_of(9, 5), accumulates=value) for value in (True, False))
    assert single.activations < several.activations


def test_answers_that_take_more_than_a_micro_batch_decide_and_smaller_ones_do_not() -> None:
    model, batch = llama(), batch_of(20, 10)
    plain = estimated(model, batch)
    tiny = estimated(model, batch, answer=lambda copy: copy(input_ids=torch.ones(1, 2, dtype=torch.long)))
    many = estimated(model, batch, answer=lambda copy: copy(input_ids=torch.ones(200, 50, dtype=torch.long)))
    assert tiny.activations == plain.activations
    # The logits alone: 200 rows of 50 tokens, 64 fp32 numbers each.
    assert many.activations > 200 * 50 * 64 * 4


def looking_at_its_value(model: nn.Module, batch: Batch) -> Tensor:
    loss = batch_loss(model, batch)
    return loss if loss.item() > 0 else -loss


def test_a_model_that_looks_at_values_goes_through_the_micro_batch_itself_and_stays_as_it_is() -> None:
    model, batch = llama(), batch_of(9, 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    work = work_of(model, loss=looking_at_its_value)
    found = estimate_memory(work, batch=batch, accumulates=True, settings=SETTINGS)
    assert found is not None
    assert found.activations == pytest.approx(estimated(model, batch).activations, rel=0.02)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_looks_at_values_it_has_not_has_no_estimate() -> None:
    with torch.device("meta"):
        work = work_of(llama(), loss=looking_at_its_value)
    assert estimate_memory(work, batch=batch_of(9, 5), accumulates=True, settings=SETTINGS) is None


def failing(model: nn.Module, batch: Batch) -> Tensor:
    raise RuntimeError("expected scalar type Float but found BFloat16")


def test_an_estimate_that_cannot_be_made_stops_no_training() -> None:
    work = work_of(llama(), loss=failing)
    assert estimate_memory(work, batch=batch_of(9, 5), accumulates=True, settings=SETTINGS) is None


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    ("peft_type", "arguments"),
    [
        ("FROD", {}),
        ("SHIRA", {"r": 4}),
        ("VBLORA", {"vector_length": 16, "num_vectors": 16, "topk": 2}),
        ("WAVEFT", {"n_frequency": 32}),
    ],
)
def test_methods_that_compute_with_values_have_an_estimate(peft_type: str, arguments: dict[str, Any]) -> None:
    method = Method("mine", peft_type, 1e-3, arguments)
    model = apply_method(llama(hidden_size=64, intermediate_size=128), method, seed=0)
    assert estimated(model, batch_of(9, 5)).activations > 0


def test_an_encoder_decoder_has_an_estimate_too() -> None:
    assert estimated(t5(decoder_start_token_id=0), pad_pairs(rows_of(20, 16), pad_id=0)).activations > 0


def table_of(*sizes: tuple[int, int]) -> Table:
    """Return examples of (tokens, targets)."""
    examples = [Example(np.zeros(n, dtype=np.int32), np.arange(n) >= n - targets) for n, targets in sizes]
    return Table(tuple(examples), tuple(map(str, range(len(sizes)))))


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        # 9 + 3 tokens against 6 + 5 and 4 + 4.
        ("packed", (0, 1)),
        # 2 rows of 9 tokens against 2 of 6 and 2 of 4.
        ("padded", (0, 1)),
        # Prompt and completion: 2 x (8 + 1) against 2 x (5 + 4) and 2 x (3 + 1); 5 of the second's are targets.
        ("pairs", (2, 3)),
    ],
)
def test_the_largest_micro_batch_is_found_by_what_its_layout_pads(layout: Any, expected: tuple[int, ...]) -> None:
    table = table_of((9, 1), (3, 1), (6, 1), (5, 4), (4, 1), (4, 1))
    steps = [Step(((2, 3), (0, 1)), 0, 0), Step(((4, 5),), 0, 0)]
    assert largest_micro_batch(table, steps, settings=replace(SETTINGS, layout=layout)) == expected


def test_speed_comes_from_a_few_micro_batches_and_leaves_no_gradient() -> None:
    model, table = make_model(), table_of((8, 4), (6, 3), (7, 4))
    steps = [Step(((0,), (1,)), 14, 7), Step(((2,),), 7, 4)]
    work = work_of(model, loss=tiny_loss)
    speed = measure_speed(work, table, steps=steps, settings=SETTINGS, at_most_seconds=0.0)
    assert speed.tokens_per_second > 0
    assert speed.update_seconds > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_time_of_a_gpu_counts_what_it_has_not_done_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    # A GPU returns at once and works on: the wait stands for that work.
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: time.sleep(0.05))
    work = replace(work_of(make_model(), loss=tiny_loss), device=torch.device("cuda"))
    steps = [Step(((0,),), 8, 4)]
    speed = measure_speed(work, table_of((8, 4)), steps=steps, settings=SETTINGS, at_most_seconds=0.0)
    assert speed.update_seconds >= 0.05
    assert speed.tokens_per_second <= 8 / 0.05


def test_a_training_takes_its_tokens_and_its_updates() -> None:
    assert Speed(tokens_per_second=100.0, update_seconds=0.5).seconds(num_tokens=1_000, num_steps=4) == 12.0


def test_weights_count_once_wherever_they_are() -> None:
    tied, untied = llama(tie_word_embeddings=True), llama(tie_word_embeddings=False)
    assert weights_bytes(untied) - weights_bytes(tied) == 64 * 32 * 4
    with torch.device("meta"):
        assert weights_bytes(llama(tie_word_embeddings=False)) == weights_bytes(untied)
