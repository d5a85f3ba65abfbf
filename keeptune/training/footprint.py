"""A model arrives, a copy without data leaves, and with it how much memory operations on that copy would take.

The copy's tensors have shapes, types and a device and no memory, yet torch chooses the same kernels for them, casts
them under autocast as it would and keeps what it would keep for the backward pass.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from keeptune.training import heap

# Small parts of an autograd node (its edges, what it saved, its hooks), in bytes: each fits into one of the gaps that
# the alignment of a tensor's block leaves beside it.
_NODE_PARTS = (24, 56, 88)


def without_data(model: nn.Module, *, device: torch.device) -> nn.Module:
    """Return a copy of a model, which may be on the meta device, with every tensor as if on `device` and no data."""
    replaced: dict[int, Any] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for tensor in (*model.parameters(), *model.buffers()):
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            parameter = isinstance(tensor, nn.Parameter)
            replaced[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if parameter else empty
    # `deepcopy` takes what is in its memo for copied: no data of the model is read.
    return copy.deepcopy(model, replaced)


class Footprint(TorchDispatchMode):
    """Notes every tensor that operations inside the block make, and when it is gone; `model`'s own do not count."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # Held, so that no storage of its own can go and leave its address to another.
        self._own = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
        self._known = {storage._cdata for storage in self._own}
        # As `keeptune.training.heap` reads them.
        self._events: list[int] = []
        self._num_blocks = self._live_bytes = 0
        self._nodes: list[tuple[int, list[int]]] = []
        self.peak_bytes = 0
        """The most that the tensors held at a time."""

    def __torch_dispatch__(  # noqa: PLR0917 (torch's own signature)
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            # A sparse tensor has no storage of its own: its parts are tensors, and were noted.
            if isinstance(value, Tensor) and value.layout == torch.strided:
                self._note(value)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        num_bytes, key = storage.nbytes(), storage._cdata
        if key in self._known or num_bytes == 0:
            return
        self._known.add(key)
        # Gradients are off in a backward pass and inside functions of our own: no node is made there.
        parts = [self._take(part) for part in _NODE_PARTS] if torch.is_grad_enabled() else []
        block = self._take(num_bytes)
        if parts:
            self._nodes.append((block, [*parts, *(self._take(part) for part in _NODE_PARTS)]))
        self._live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        weakref.finalize(storage, self._gone, key, num_bytes, block).atexit = False

    def _gone(self, key: int, num_bytes: int, block: int) -> None:
        self._known.discard(key)
        self._live_bytes -= num_bytes
        self._events.append(-block)
        if not torch.is_grad_enabled():
            # The backward pass goes from the last node to the first.
            while self._nodes and self._nodes[-1][0] >= block:
                self._events.extend(-part for part in self._nodes.pop()[1])

    def _take(self, num_bytes: int) -> int:
        self._events.append(num_bytes)
        self._num_blocks += 1
        return self._num_blocks

    def heap_bytes(self) -> int:
        """Return how far the heap of a process grows for these tensors, at least `peak_bytes`.

        That is more than they hold. A block that is aligned asks for a few bytes more than it keeps (glibc before 2.38,
        bug 14581), so that the next tensor of a size does not fit where one was freed unless free space beside it
        joins; and in a forward pass parts of autograd's nodes come to stand in between. The C library itself tells:
        another process takes and gives back blocks of the same sizes in the same order. Where it cannot, as on macOS,
        the tensors' own bytes count.
        """
        command = [sys.executable, "-I", str(heap.__file__)]
        events = json.dumps(self._events)
        done = subprocess.run(command, input=events, capture_output=True, text=True, check=False)
        grown = json.loads(done.stdout) if done.returncode == 0 else None
        return max(self.peak_bytes, grown or 0)
