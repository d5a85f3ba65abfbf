"""A probe whose examples have teachers arrives; the drift meter leaves: it asks a model how far it is from the base."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from keeptune.errors import Interrupted
from keeptune.model.device import autocasting, widest
from keeptune.text.batches import Batch
from keeptune.text.tokens import Example, Examples, Teacher


def drift_meter(
    probe: Examples,
    *,
    micro_batches: Sequence[Sequence[int]],
    collate: Callable[[Sequence[Example]], Batch],
    divergences: Callable[[nn.Module, Batch, Teacher], Tensor],
    device: torch.device,
    autocast: torch.dtype | None,
    stop_requested: Callable[[], bool],
) -> Callable[[nn.Module], float]:
    """Return a function that gives a model's KL(base‖model) on the probe in nats per target token.

    `micro_batches` hold every example of the probe once, `divergences` returns the nats at every target of a batch. The
    function raises `Interrupted` where a stop is asked for.
    """

    def drift(model: nn.Module) -> float:
        wide = widest(device)
        total = torch.zeros((), dtype=wide, device=device)
        with torch.no_grad(), autocasting(device, autocast):
            for micro_batch in micro_batches:
                if stop_requested():
                    raise Interrupted("drift: stopped on request; it is measured when the run goes on.")
                batch = collate([probe[i] for i in micro_batch])
                assert batch.teacher is not None
                total += divergences(model, batch, batch.teacher).to(wide).sum()
        return float(total) / int(probe.num_targets.sum())

    return drift
