"""A lack of memory, and nothing else, becomes the one named error."""

from __future__ import annotations

import pytest
import torch

from keeptune.errors import OutOfMemoryError
from keeptune.model.memory import memory_errors


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_every_lack_of_memory_is_named(fault: Exception) -> None:
    with pytest.raises(OutOfMemoryError, match="^step 3: too little$"), memory_errors("step 3: too little"):
        raise fault


def test_a_real_allocation_that_cannot_be_is_named() -> None:
    with pytest.raises(OutOfMemoryError), memory_errors("step 3: too little"):
        torch.empty(1 << 55, dtype=torch.int8)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shape"), memory_errors("step 3: too little"):
        raise RuntimeError("shape")
