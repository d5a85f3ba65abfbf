"""The work inside one step: what of a micro-batch is still there when the next one begins."""

from __future__ import annotations

import weakref

import numpy as np
from torch import Tensor, nn

from keeptune.text.batches import Batch, Step, pack
from keeptune.text.tokens import Example
from keeptune.training.step import Work, accumulate
from keeptune.training.tensors import trained_parameters
from keeptune.training.world import SINGLE

from .tiny import CPU, Table, make_model, tiny_loss


def test_the_graph_of_a_micro_batch_is_gone_before_the_next_one_begins() -> None:
    losses: list[weakref.ref[Tensor]] = []
    still_there: list[bool] = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        still_there.extend(reference() is not None for reference in losses)
        value = tiny_loss(model, batch)
        losses.append(weakref.ref(value))
        return value

    model = make_model()
    work = Work(model, trained_parameters(model), loss, pack, SINGLE, CPU, None, lambda: False)
    example = Example(np.ones(4, dtype=np.int32), np.arange(4) >= 2)
    accumulate(work, Step(((0,), (1,), (2,)), 12, 6), table=Table((example,) * 3, ("a", "b", "c")))
    assert still_there == [False, False, False]
