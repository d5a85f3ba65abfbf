"""Records arrive, examples (token ids and a loss mask) leave: the one length policy and the token cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenised record. With an encoder: its ids first (not trained), then the decoder's (trained), in one array."""

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]

    @property
    def prompt_ids(self) -> NDArray[np.int32]:
        """The ids before the last completion: what generation starts from."""
        return self.input_ids[: self._completion_start]

    @property
    def completion_ids(self) -> NDArray[np.int32]:
        """The ids of the last completion, end token included."""
        return self.input_ids[self._completion_start :]

    @property
    def _completion_start(self) -> int:
        untrained = np.flatnonzero(~self.loss_mask)
        return int(untrained[-1]) + 1 if len(untrained) else 0
