"""A lack of memory, and nothing else, becomes the one named error."""

from __future__ import annotations

import errno

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
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB, other allocations: 1.2 MB)"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
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
    with pytest.raises(FileNotFoundError), memory_errors("step 3: too little"):
        raise FileNotFoundError(errno.ENOENT, "No such file", "out of memory.txt")
    with pytest.raises(ValueError, match="out of memory"), memory_errors("step 3: too little"):
        raise ValueError("found no file 'out of memory'")
