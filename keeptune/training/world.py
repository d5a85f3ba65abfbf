"""One process or many: a rank, the number of ranks and a sum over them arrive with whoever starts the processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class World:
    """The processes that train together; rank 0 writes to the disk.

    `sum_over_ranks` returns the elementwise sum of every rank's tensor; all ranks call it in the same order.
    """

    rank: int
    size: int
    sum_over_ranks: Callable[[Tensor], Tensor]

    def any_rank(self, flag: bool, /, *, device: torch.device) -> bool:
        """Return whether the flag is up on at least one rank; every rank gets the same answer."""
        if self.size == 1:
            return flag
        return bool(self.sum_over_ranks(torch.tensor(float(flag), device=device)) > 0)

    def wait(self, *, device: torch.device) -> None:
        """Return when every rank has come here."""
        self.sum_over_ranks(torch.zeros((), device=device))


def _same(tensor: Tensor) -> Tensor:
    return tensor


SINGLE = World(0, 1, _same)
