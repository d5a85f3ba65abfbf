"""A model without data: the same bytes live at the same time as in the truth, and the heap grows for them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from keeptune.model.loss import batch_loss
from keeptune.model.methods import Method, apply_method
from keeptune.model.modes import gradient_checkpointing
from keeptune.text.batches import Batch, pack, pad, pad_pairs
from keeptune.text.tokens import Example
from keeptune.training import heap
from keeptune.training.footprint import Footprint, without_data
from tests.model.test_methods import META, llama, t5

from .tiny import CPU

FULL = Method("full", None, 1e-3, {})
LORA = Method("lora", "LORA", 1e-3, {"r": 4, "lora_dropout": 0.1})
MEGABYTE = 1_000_000


def examples(*lengths: int) -> list[Example]:
    generator = np.random.default_rng(0)
    return [Example(generator.integers(0, 64, n).astype(np.int32), np.arange(n) >= n // 2) for n in lengths]


def passed(model: nn.Module, batch: Batch, *, bf16: bool = False, checkpointing: bool = False) -> Footprint:
    """Return the footprint of two forward and backward passes."""
    compute = torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext()
    with Footprint(model) as footprint, gradient_checkpointing(model.train(), enabled=checkpointing):
        for _ in range(2):
            with compute:
                loss = batch_loss(model, batch)
            loss.backward()
            del loss
    return footprint


@pytest.mark.parametrize("method", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("make", "collate"),
    [
        (llama, pack),
        (llama, partial(pad, pad_id=0)),
        (partial(t5, decoder_start_token_id=0), partial(pad_pairs, pad_id=0)),
    ],
    ids=["packed", "padded", "pairs"],
)
def test_a_copy_without_data_holds_as_many_bytes_at_its_peak_as_the_model(
    make: Callable[[], Any], collate: Callable[[list[Example]], Batch], *, method: Method, bf16: bool
) -> None:
    model = apply_method(make(), method, seed=0)
    batch = collate(examples(23, 9, 17))
    estimated = passed(without_data(model, device=CPU), batch, bf16=bf16).peak_bytes
    assert estimated == passed(model, batch, bf16=bf16).peak_bytes > 10_000


def test_gradient_checkpointing_lowers_the_peak_as_it_does_in_the_truth() -> None:
    model, batch = llama(num_hidden_layers=6), pack(examples(60, 50, 40))
    plain = passed(without_data(model, device=CPU), batch)
    less = passed(without_data(model, device=CPU), batch, checkpointing=True)
    assert less.peak_bytes < 0.8 * plain.peak_bytes
    assert less.peak_bytes == passed(model, batch, checkpointing=True).peak_bytes


def test_the_copy_leaves_the_model_and_its_gradients_alone() -> None:
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attention = model.config._attn_implementation
    passed(without_data(model, device=CPU), pack(examples(9, 5)))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert (model.config._attn_implementation, model.training) == (attention, False)


def test_a_model_on_the_meta_device_counts_as_one_on_its_device() -> None:
    batch = pack(examples(23, 9, 17))
    expected = passed(without_data(llama(), device=CPU), batch).peak_bytes
    assert passed(without_data(llama().to(META), device=CPU), batch).peak_bytes == expected


def test_tied_weights_stay_one_tensor_in_the_copy() -> None:
    copy: Any = without_data(llama(tie_word_embeddings=True), device=CPU)
    assert copy.get_output_embeddings().weight is copy.get_input_embeddings().weight


def test_a_tensor_counts_until_its_last_view_is_gone() -> None:
    with Footprint(nn.Linear(2, 2)) as footprint:
        first = torch.zeros(1000)
        view = first[10:]
        del first
        second = torch.zeros(500)
        del view
        third = torch.zeros(200)
    assert footprint.peak_bytes == 4 * 1500
    assert len(second) + len(third) == 700


glibc = pytest.mark.skipif(heap.heap_growth_bytes([]) is None, reason="only glibc tells about its heap")


@glibc
def test_the_heap_of_another_process_grows_by_what_is_taken_at_a_time() -> None:
    events = [8 * MEGABYTE, 4 * MEGABYTE, -1, 2 * MEGABYTE, -2, -3]
    command = [sys.executable, "-I", str(heap.__file__)]
    done = subprocess.run(command, input=json.dumps(events), capture_output=True, text=True, check=True)
    assert 12 * MEGABYTE <= json.loads(done.stdout) < 12.5 * MEGABYTE


@glibc
def test_the_heap_holds_what_the_tensors_do_and_more_where_nodes_stand_between_them() -> None:
    footprint = passed(without_data(llama(num_hidden_layers=4), device=CPU), pack(examples(250, 200)))
    assert footprint.peak_bytes < footprint.heap_bytes() < 3 * footprint.peak_bytes


def test_where_the_c_library_cannot_tell_the_tensors_count(monkeypatch: pytest.MonkeyPatch) -> None:
    footprint = passed(without_data(llama(), device=CPU), pack(examples(9, 5)))
    monkeypatch.setattr(heap, "__file__", "/nowhere/heap.py")
    assert footprint.heap_bytes() == footprint.peak_bytes


def test_a_heap_that_cannot_be_asked_has_no_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: object())
    assert heap.heap_growth_bytes([MEGABYTE]) is None
